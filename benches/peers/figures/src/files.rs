//! What is written where.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Error, Results, charts::charts, document};

const JSON: &str = "benchmarks.json";
const DOCUMENT: &str = "benchmarks.md";
/// The folder of the charts.
const CHARTS: &str = "benchmarks";

/// Writes the figures into a folder: `benchmarks.json`, the charts in `benchmarks/`, and the part of `benchmarks.md`
/// that is between its markers; a document with nothing else if there is none. Returns the files that were written.
///
/// # Errors
///
/// If a file cannot be written, a figure is not a number, or `benchmarks.md` has no markers. What was written before
/// that stays.
pub fn write(results: &Results, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    // First, so that nothing that comes after it can lose the figures.
    let json = put(folder, JSON, &results.to_json()?)?;
    let mut written = vec![json];
    written.extend(write_charts(results, folder)?);
    Ok(written)
}

/// Makes all but the JSON file again, from that file. Returns the files that were written.
///
/// # Errors
///
/// If the file is not one that [`write`] wrote; else as there.
pub fn remake(json: &Path) -> Result<Vec<PathBuf>, Error> {
    let results = Results::from_json(&fs::read_to_string(json)?)?;
    write_charts(&results, json.parent().unwrap_or(Path::new("")))
}

fn write_charts(results: &Results, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let charts = charts(results);
    let mut written = Vec::new();
    for (file, chart) in &charts {
        let name = format!("{CHARTS}/{file}.svg");
        written.push(put(folder, &name, &chart.svg())?);
    }
    let old = match fs::read_to_string(folder.join(DOCUMENT)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => document::empty(),
        other => other?,
    };
    let titles: Vec<_> = { charts.iter() }
        .map(|(file, chart)| (*file, chart.title.as_str()))
        .collect();
    let figures = document::figures(results, CHARTS, &titles);
    let new = document::with_figures(&old, &figures)?;
    written.push(put(folder, DOCUMENT, &new)?);
    Ok(written)
}

fn put(folder: &Path, name: &str, text: &str) -> Result<PathBuf, Error> {
    let file = folder.join(name);
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&file, text)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn the_same_comes_of_the_json_file_alone() {
        let (one, other) = (tempfile::tempdir(), tempfile::tempdir());
        let (one, other) = (one.expect("a folder"), other.expect("a folder"));
        let written = write(&sample(), one.path()).expect("written");
        fs::copy(one.path().join(JSON), other.path().join("any.json")).expect("copied");
        let remade = remake(&other.path().join("any.json")).expect("made");
        // All but the JSON file.
        assert_eq!(remade.len() + 1, written.len());
        for file in remade {
            let name = file.strip_prefix(other.path()).expect("its folder");
            let [first, second] = [one.path(), other.path()]
                .map(|folder| fs::read_to_string(folder.join(name)).expect("a file"));
            assert_eq!(first, second, "{}", name.display());
        }
    }

    #[test]
    fn the_links_of_the_document_lead_to_the_charts() {
        let folder = tempfile::tempdir().expect("a folder");
        write(&sample(), folder.path()).expect("written");
        let document = fs::read_to_string(folder.path().join(DOCUMENT)).expect("a document");
        let links: Vec<&str> = { document.split("](").skip(1) }
            .filter_map(|rest| rest.split(')').next())
            .collect();
        assert_eq!(links.len(), 4);
        for link in links {
            assert!(folder.path().join(link).is_file(), "{link}");
        }
    }

    #[test]
    fn figures_are_kept_if_the_document_has_no_place_for_them() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(DOCUMENT), "By hand.\n").expect("written");
        write(&sample(), folder.path()).expect_err("no markers");
        let document = fs::read_to_string(folder.path().join(DOCUMENT)).expect("a document");
        assert_eq!(document, "By hand.\n");
        let json = fs::read_to_string(folder.path().join(JSON)).expect("figures");
        assert_eq!(Results::from_json(&json).expect("our own"), sample());
    }
}
