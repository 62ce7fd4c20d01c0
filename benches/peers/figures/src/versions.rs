use std::collections::BTreeMap;

/// The versions of these packages in a `Cargo.lock`, of several the newest, which is the last there.
#[must_use]
pub fn versions(lockfile: &str, packages: &[&str]) -> BTreeMap<String, String> {
    let quoted = |line: &str, name: &str| {
        let value = line.strip_prefix(name)?.strip_prefix(" = \"")?;
        Some(value.strip_suffix('"')?.to_owned())
    };
    let mut versions = BTreeMap::new();
    let mut name = None;
    for line in lockfile.lines() {
        if let Some(next) = quoted(line, "name") {
            name = Some(next).filter(|name| packages.contains(&name.as_str()));
        } else if let (Some(version), Some(name)) = (quoted(line, "version"), name.take()) {
            versions.insert(name, version);
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_are_those_that_are_built() {
        let packages = ["redis", "redis-lock", "rslock", "tower-distributed-lock"];
        let versions = versions(include_str!("../../Cargo.lock"), &packages);
        assert_eq!(versions.len(), packages.len(), "{versions:?}");
        // Ours needs no registry: its version is in its own manifest.
        let manifest = include_str!("../../../../Cargo.toml");
        let ours = format!("version = \"{}\"", versions["tower-distributed-lock"]);
        assert!(manifest.lines().any(|line| line == ours), "{ours}");
    }

    #[test]
    fn of_two_versions_the_newer_is_named() {
        let lockfile = "[[package]]\nname = \"redis\"\nversion = \"0.27.6\"\n\n\
                        [[package]]\nname = \"other\"\nversion = \"9.9.9\"\n\n\
                        [[package]]\nname = \"redis\"\nversion = \"1.8.1\"\n";
        let versions = versions(lockfile, &["redis"]);
        assert_eq!(versions, [("redis".to_owned(), "1.8.1".to_owned())].into());
    }
}
