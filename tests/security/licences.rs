//! What we are built of may be used by whoever uses us: `.ci/deny.toml` without cargo-deny.

use std::{fs, path::Path, process::Command};

/// Whether a user who accepts these licences may use what has this one, written as in SPDX or, as
/// old crates have it, with a `/` for `OR`.
fn is_allowed(licence: &str, allowed: &[String]) -> bool {
    let spaced = licence.replace('/', " OR ");
    let spaced = spaced.replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_ascii_whitespace().peekable();
    let is_allowed = any(&mut words, allowed);
    is_allowed && words.next().is_none()
}

type Words<'a, 'b> = &'a mut std::iter::Peekable<std::str::SplitAsciiWhitespace<'b>>;

fn any(words: Words<'_, '_>, allowed: &[String]) -> bool {
    let mut is_allowed = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        is_allowed |= all(words, allowed);
    }
    is_allowed
}

fn all(words: Words<'_, '_>, allowed: &[String]) -> bool {
    let mut is_allowed = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        is_allowed &= one(words, allowed);
    }
    is_allowed
}

fn one(words: Words<'_, '_>, allowed: &[String]) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let is_allowed = any(words, allowed);
        return words.next() == Some(")") && is_allowed;
    }
    let Some(name) = words.next() else {
        return false;
    };
    // An exception is one more permission.
    if words.next_if_eq(&"WITH").is_some() {
        words.next();
    }
    allowed.iter().any(|it| it == name)
}

/// The strings of the list `allow` in the section `[licenses]`.
fn allowed() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/deny.toml");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("[licenses]").unwrap();
    let (_, list) = section.split_once("allow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn all_that_we_are_built_of_has_a_licence_that_is_allowed() {
    let allowed = allowed();
    assert!(allowed.iter().any(|it| it == "MIT"), "{allowed:?}");
    // For this platform alone: what others need may not be on this machine.
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--all-features", "--edges", "all"])
        .args(["--prefix", "none", "--format", "{l}\t{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8(tree.stdout).unwrap();
    let mut packages: Vec<_> = tree
        .lines()
        .filter_map(|line| line.trim_end_matches(" (*)").split_once('\t'))
        .collect();
    packages.sort_unstable();
    packages.dedup();
    assert!(packages.len() > 100, "{tree}");
    packages.retain(|(licence, _)| !is_allowed(licence, &allowed));
    assert!(packages.is_empty(), "{packages:?}");
}

#[test]
fn licences_are_read_as_they_are_meant() {
    let allowed = ["MIT", "ISC"].map(str::to_owned);
    for yes in [
        "MIT",
        "GPL-3.0 OR MIT",
        "GPL-3.0/MIT",
        "MIT AND ISC",
        "(GPL-3.0 OR MIT) AND ISC",
        "MIT WITH LLVM-exception",
    ] {
        assert!(is_allowed(yes, &allowed), "{yes}");
    }
    for no in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "GPL-3.0 AND MIT OR AGPL-3.0",
        "(MIT OR ISC) AND GPL-3.0",
        "MIT ISC",
    ] {
        assert!(!is_allowed(no, &allowed), "{no}");
    }
}
