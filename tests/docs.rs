//! What the README and the guide name is there, and what there is to set is in the guide.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn chapters() -> BTreeSet<String> {
    let files = fs::read_dir(root().join("docs/guide")).unwrap();
    let names = files.map(|file| file.unwrap().path().file_stem().unwrap().to_owned());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// The README and the chapters, by their paths.
fn pages() -> Vec<(PathBuf, String)> {
    let chapters = chapters()
        .into_iter()
        .map(|name| format!("docs/guide/{name}.md"));
    let pages = chapters.chain(["README.md".into()]);
    pages
        .map(|path| (root().join(&path), read(&path)))
        .collect()
}

#[test]
fn each_chapter_is_in_the_readme_the_index_and_the_links() {
    let (readme, index, links) = (
        read("README.md"),
        read("src/guide.rs"),
        read("src/guide/links.md"),
    );
    let chapters = chapters();
    assert!(chapters.len() > 10, "{chapters:?}");
    for chapter in &chapters {
        assert!(
            readme.contains(&format!("[{chapter}]: docs/guide/{chapter}.md\n")),
            "{chapter}"
        );
        assert!(index.contains(&format!("]({chapter})")), "{chapter}");
        assert!(index.contains(&format!("\n    {chapter}\n")), "{chapter}");
        assert!(
            links.contains(&format!("[{chapter}]: crate::guide::{chapter}\n")),
            "{chapter}"
        );
    }
    assert_eq!(
        links.lines().filter(|line| !line.is_empty()).count(),
        chapters.len()
    );
}

#[test]
fn what_the_pages_link_to_is_there() {
    let mut links = 0;
    for (path, text) in pages() {
        // `[label]: target`, and images.
        let defined = text.lines().filter_map(|line| {
            let (label, target) = line.strip_prefix('[')?.split_once("]: ")?;
            (!label.contains('`')).then_some(target)
        });
        let images = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for target in defined.chain(images).filter(|it| !it.contains("://")) {
            let is_code = target.contains("::");
            assert!(
                is_code || path.with_file_name(target).exists(),
                "{target} in {path:?}"
            );
            links += usize::from(!is_code);
        }
        // A label that has no target in the file, which only the documentation knows.
        for label in chapters() {
            let used =
                text.contains(&format!("[{label}]")) || text.contains(&format!("][{label}]"));
            assert!(
                !used || text.contains(&format!("\n[{label}]: ")),
                "{label} in {path:?}"
            );
        }
    }
    assert!(links > 40, "{links}");
}

#[test]
fn the_files_that_the_pages_name_are_there() {
    let mut named = 0;
    for (path, text) in pages() {
        for name in text.split('`').skip(1).step_by(2) {
            let name = name.split(' ').next().unwrap();
            let folders = ["docs/", "examples/", "scripts/", "tests/", "src/"];
            let is_ours = folders.iter().any(|folder| name.starts_with(folder));
            // `src/main.rs` is the reader's.
            if is_ours && name != "src/main.rs" {
                assert!(root().join(name).exists(), "{name} in {path:?}");
                named += 1;
            }
        }
    }
    assert!(named > 20, "{named}");
}

/// The methods that take the thing that they set.
fn settings(path: &str, owner: &str) -> BTreeSet<String> {
    let code = read(path);
    let mut settings = BTreeSet::new();
    let mut is_owner = false;
    let mut method: Option<String> = None;
    for line in code.lines() {
        if line.starts_with("impl") {
            is_owner = line.contains(owner) && !line.contains(" for ");
        }
        if let Some(rest) = line.strip_prefix("    pub fn ").filter(|_| is_owner) {
            let name = rest.split(['(', '<']).next().unwrap();
            method = Some(name.to_owned());
        }
        // Its first argument may be on the next line.
        let takes_self = ["(self", "(mut self", "        self,", "        mut self,"];
        if takes_self.iter().any(|it| line.contains(it)) {
            settings.extend(method.take());
        }
        if line == "    }" {
            method = None;
        }
    }
    settings
}

#[test]
fn each_setting_is_in_the_table_of_settings() {
    let tuning = read("docs/guide/tuning.md");
    let rows: String = tuning
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    // What ends a builder, and what it is made of.
    let no_settings = ["build", "connect", "connect_lazily", "node"];
    let mut count = 0;
    for (path, owner) in [
        ("src/options.rs", "LockOptionsBuilder"),
        ("src/lock/factory.rs", "LockFactoryBuilder"),
        ("src/storage/redis/builder.rs", "RedisStorageBuilder"),
        ("src/storage/quorum/mod.rs", "RedlockBuilder"),
        ("src/middleware/layer.rs", "DistributedLockLayer"),
    ] {
        assert!(root().join(Path::new(path)).exists());
        for setting in settings(path, owner) {
            if no_settings.contains(&setting.as_str()) {
                continue;
            }
            assert!(rows.contains(&format!("`{setting}`")), "{owner}::{setting}");
            count += 1;
        }
    }
    assert!(count >= 34, "{count}");
}
