//! The part of `benchmarks.md` that is made of the figures.

use std::fmt::Write;

use crate::{
    Error, Results,
    results::{Cost, Ratio, Unit},
    text::number,
};

const BEGIN: &str = "<!-- figures: made by scripts/bench; what is written here by hand is lost with the next run -->";
const END: &str = "<!-- end of figures -->";

/// A document that has nothing but the figures.
pub(crate) fn empty() -> String {
    format!("# Benchmarks\n\n{BEGIN}\n{END}\n")
}

/// The document with these figures between the markers.
pub(crate) fn with_figures(document: &str, figures: &str) -> Result<String, Error> {
    let missing =
        || format!("benchmarks.md is without one line {BEGIN:?} and one {END:?} after it");
    let (before, rest) = document.split_once(BEGIN).ok_or_else(missing)?;
    let (_, after) = rest.split_once(END).ok_or_else(missing)?;
    if [before, after]
        .iter()
        .any(|text| text.contains(BEGIN) || text.contains(END))
    {
        return Err(missing().into());
    }
    Ok(format!("{before}{BEGIN}\n\n{figures}\n{END}{after}"))
}

/// The figures, in Markdown. The charts are those in `folder`, which is beside the document, with their titles.
pub(crate) fn figures(results: &Results, folder: &str, charts: &[(&str, &str)]) -> String {
    let mut text = origin(results);
    for (file, title) in charts {
        let _ = writeln!(text, "\n![{title}]({folder}/{file}.svg)");
    }
    let _ = write!(
        text,
        "\nOurs over theirs, the median of the rounds, with the smallest and the largest:\n\n\
         | row | what is compared | peer | ratio | goal | |\n|---|---|---|---|---|---|\n"
    );
    for row in &results.rows {
        for (position, ratio) in row.ratios.iter().enumerate() {
            let what = if position == 0 {
                cell(&row.what)
            } else {
                String::new()
            };
            let peer = cell(&ratio.peer);
            let Ratio { series, .. } = ratio;
            let _ = writeln!(
                text,
                "| `{}` | {what} | {peer} | {} | {} | {} |",
                row.name,
                series.text(Unit::Number),
                ratio.goal.map(|goal| goal.text()).unwrap_or_default(),
                match ratio.reached {
                    Some(true) => "reached",
                    Some(false) => "**short**",
                    None => "",
                },
            );
        }
    }
    if results.rows.iter().any(|row| !row.costs.is_empty()) {
        costs(results, &mut text);
    }
    text
}

/// When and where, in a list of short lines.
fn origin(results: &Results) -> String {
    let Results {
        measured,
        commit,
        machine,
        plan,
        versions,
        ..
    } = results;
    let when = measured.split('T').next().unwrap_or_default();
    let commit = commit
        .as_ref()
        .map(|commit| format!(", commit {commit}"))
        .unwrap_or_default();
    let versions: Vec<String> = { versions.iter() }
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    format!(
        "- {when}{commit}; {} rounds in turn, {} s each, {} runtime threads a process\n\
         - {} cores, {}, {}; Redis {} on the same machine; load {} before\n\
         - {}\n\
         - every round of every figure: `benchmarks.json`\n",
        plan.rounds,
        plan.window_seconds,
        plan.threads,
        machine.cores,
        machine.cpu,
        machine.os,
        machine.redis,
        machine.load_before,
        versions.join(", "),
    )
}

fn costs(results: &Results, text: &mut String) {
    let _ = write!(
        text,
        "\nWhat a section (a lock and its release) takes all servers together; for `handoff`, what one handoff takes:\n\n\
         | row | who | server CPU | commands sent by clients | carried out, with those in scripts |\n\
         |---|---|---|---|---|\n"
    );
    for row in &results.rows {
        for cost in &row.costs {
            let Cost {
                who,
                server_cpu_seconds,
                server_commands,
                client_commands,
            } = cost;
            let _ = writeln!(
                text,
                "| `{}` | {} | {} | {} | {} |",
                row.name,
                cell(who),
                server_cpu_seconds.text(Unit::Seconds),
                client_commands.map_or_else(|| "–".to_owned(), number),
                number(server_commands.median),
            );
        }
    }
}

/// A cell of a table ends where this begins.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn what_is_written_by_hand_stays() {
        let old = format!("# Title\n\nBefore.\n\n{BEGIN}\nold figures\n{END}\n\nAfter.\n");
        let new = with_figures(&old, "new figures\n").expect("markers");
        assert!(new.starts_with("# Title\n\nBefore.\n"), "{new}");
        assert!(new.ends_with("\nAfter.\n"), "{new}");
        assert!(new.contains("new figures") && !new.contains("old figures"));
        assert_eq!(with_figures(&new, "new figures\n").expect("markers"), new);
    }

    #[test]
    fn a_document_without_its_markers_is_left_alone() {
        let twice = format!("{BEGIN}\n{END}\n{BEGIN}\n{END}\n");
        let turned = format!("{END}\n{BEGIN}\n");
        for document in ["# Title\n", BEGIN, END, &twice, &turned] {
            assert!(with_figures(document, "x").is_err(), "{document}");
        }
    }

    #[test]
    fn the_document_of_this_repository_has_a_place_for_figures() {
        let document = include_str!("../../../../docs/benchmarks.md");
        with_figures(document, "new figures\n").expect("markers");
    }

    #[test]
    fn all_ratios_are_in_the_table_with_their_goals() {
        let text = figures(&sample(), "charts", &[("hot", "One lock")]);
        let by_hand = "| by_hand | 0.940 (0.860 to 0.960) | at least 1 | **short** |";
        let rslock = "| rslock | 1.36 (1.33 to 1.43) | at least 1.25 | reached |";
        for line in [by_hand, rslock, "![One lock](charts/hot.svg)", "| 4.10 µs"] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
