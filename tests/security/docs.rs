//! What `docs/security.md` says is shown, is shown.

use std::{fs, path::Path};

fn read_all(folder: &Path, all: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                read_all(&path, all);
            }
        } else if path.extension().is_some_and(|it| it == "rs") {
            *all += &fs::read_to_string(path).unwrap();
        }
    }
}

#[test]
fn each_test_that_the_docs_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for folder in ["src", "tests", "examples"] {
        read_all(&root.join(folder), &mut code);
    }
    let docs = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let names = docs.split('`').skip(1).step_by(2);
    // The name of a test is a sentence.
    let is_test = |name: &&str| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        name.bytes().all(plain) && name.matches('_').count() > 1
    };
    let names: Vec<_> = names.filter(is_test).chain(["keys_are_bounded"]).collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        assert!(
            code.contains(&format!("fn {name}(")) || code.contains(&format!("    {name}(")),
            "{name} is not there"
        );
    }
}
