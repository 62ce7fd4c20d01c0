//! Which charts are made of a run, and what is in them.

use crate::{
    Results,
    chart::{Bar, Chart, Panel, Scale},
    results::{Row, Unit},
};

/// A chart to be made, if the run had any of its rows.
struct Subject {
    /// Of its file, without the ending.
    file: &'static str,
    title: &'static str,
    /// What is better.
    better: &'static str,
    scale: Scale,
    panels: &'static [(&'static str, &'static [Part])],
}

/// Bars of one row in a panel.
struct Part {
    row: &'static str,
    /// Those of these alone, if any is named.
    only: &'static [&'static str],
    /// What ours is called there.
    ours: &'static str,
}

const OURS: &str = "tower-distributed-lock";

const fn all(row: &'static str) -> Part {
    Part {
        row,
        only: &[],
        ours: OURS,
    }
}

const FENCED: &str = "… with fencing tokens";

const SUBJECTS: &[Subject] = &[
    Subject {
        file: "uncontended",
        title: "Locks that nobody else wants",
        better: "Locks and confirmed releases per second, 64 tasks, a new key each time: longer is better",
        scale: Scale::Linear,
        panels: &[
            (
                "One Redis server",
                &[
                    all("uncontended_64"),
                    Part {
                        row: "uncontended_64_fenced",
                        only: &["ours"],
                        ours: FENCED,
                    },
                ],
            ),
            ("3 servers (Redlock)", &[all("redlock_3")]),
            ("5 servers (Redlock)", &[all("redlock_5")]),
        ],
    },
    Subject {
        file: "hot",
        title: "One lock that all want, all the time",
        better: "Sections per second: longer is better",
        scale: Scale::Logarithmic,
        panels: &[
            ("64 tasks of one process", &[all("hot_local")]),
            ("16 tasks in each of 4 processes", &[all("hot_remote")]),
            (
                "The same over 3 servers (Redlock)",
                &[Part {
                    row: "redlock_3_hot",
                    only: &["ours", "rslock"],
                    ours: OURS,
                }],
            ),
        ],
    },
    Subject {
        file: "waits",
        title: "How long one waits for a lock",
        better: "Shorter is better",
        scale: Scale::Logarithmic,
        panels: &[
            (
                "From the release in one process to the entry in another, median",
                &[all("handoff")],
            ),
            (
                "16 tasks in each of 4 processes want one lock: 99 % of the waits are at most",
                &[all("hot_remote_p99")],
            ),
            ("And the longest wait", &[all("hot_remote_max")]),
        ],
    },
    Subject {
        file: "axum",
        title: "Requests to a service with axum",
        better: "Requests per second, 64 connections: longer is better",
        scale: Scale::Linear,
        panels: &[
            (
                "A key for each request",
                &[
                    all("axum_distinct"),
                    Part {
                        row: "axum_distinct_fenced",
                        only: &["ours"],
                        ours: FENCED,
                    },
                ],
            ),
            ("One key for all", &[all("axum_hot")]),
        ],
    },
];

/// A chart's file, without the ending, and what it shows in words; then the chart.
pub(crate) fn charts(results: &Results) -> Vec<(&'static str, Chart)> {
    let charts = SUBJECTS.iter().map(|subject| {
        let panels = { subject.panels.iter() }
            .filter_map(|(title, parts)| panel(results, subject.scale, title, parts))
            .collect();
        let chart = Chart {
            title: subject.title.to_owned(),
            notes: vec![subject.better.to_owned(), origin(results)],
            panels,
        };
        (subject.file, chart)
    });
    charts
        .filter(|(_, chart)| !chart.panels.is_empty())
        .collect()
}

/// Where the figures are from, in a line that fits.
fn origin(results: &Results) -> String {
    let (machine, plan) = (&results.machine, &results.plan);
    format!(
        "Median of {} rounds, line from the smallest to the largest; {} cores for all, Redis {}, {}",
        plan.rounds,
        machine.cores,
        machine.redis,
        results.measured.split('T').next().unwrap_or_default(),
    )
}

fn panel(results: &Results, scale: Scale, title: &str, parts: &[Part]) -> Option<Panel> {
    let mut bars = Vec::new();
    let mut unit = None;
    for part in parts {
        let Some(row) = results.row(part.row) else {
            continue;
        };
        for (bar, its) in row_bars(row, part) {
            // One axis, one unit: what a row has in another is not for the chart.
            if *unit.get_or_insert(its) == its {
                bars.push(bar);
            }
        }
    }
    // Ours side by side, in whatever rows they were.
    bars.sort_by_key(|bar: &Bar| !bar.ours);
    Some(Panel {
        title: title.to_owned(),
        scale,
        unit: unit?,
        bars,
    })
}

fn row_bars<'a>(row: &'a Row, part: &'a Part) -> impl Iterator<Item = (Bar, Unit)> + 'a {
    let wanted = row
        .figures
        .iter()
        .filter(|figure| part.only.is_empty() || part.only.contains(&figure.who.as_str()));
    wanted.map(|figure| {
        let ours = figure.who.starts_with("ours");
        let label = match figure.who.as_str() {
            "ours" => part.ours,
            other => label(other),
        };
        let bar = Bar {
            label: label.to_owned(),
            series: figure.series.clone(),
            ours,
        };
        (bar, figure.unit)
    })
}

fn label(who: &str) -> &str {
    match who {
        "by_hand" => "by hand (redis-rs)",
        "pubsub" => "by hand, with pub/sub",
        "rslock_default" => "rslock",
        "rslock_tuned" => "rslock, shortest delay",
        "ours_with_tokens" => FENCED,
        "ours_worst_process" => "… of its worst process",
        "mutex" => "mutex in the process",
        "no_lock" => "no lock",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn every_figure_of_a_row_is_in_its_chart() {
        let results = sample();
        let charts = charts(&results);
        let files: Vec<&str> = charts.iter().map(|(file, _)| *file).collect();
        assert_eq!(files, ["uncontended", "hot", "waits", "axum"]);
        let all: String = charts.iter().map(|(_, chart)| chart.svg()).collect();
        let all = format!("<all>{all}</all>");
        let document = roxmltree::Document::parse(&all).expect("valid XML");
        let texts: Vec<&str> = { document.descendants() }
            .filter(|node| node.tag_name().name() == "text")
            .filter_map(|node| node.text())
            .collect();
        for figure in results.rows.iter().flat_map(|row| &row.figures) {
            let value = figure.unit.text(figure.series.median);
            assert!(texts.contains(&value.as_str()), "{value} in {texts:?}");
        }
    }

    #[test]
    fn ours_are_side_by_side_also_from_two_rows() {
        let mut results = sample();
        let mut fenced = results.rows[0].clone();
        fenced.name = "uncontended_64_fenced".to_owned();
        results.rows.push(fenced);
        let charts = charts(&results);
        let bars = &charts[0].1.panels[0].bars;
        let labels: Vec<&str> = bars.iter().map(|bar| bar.label.as_str()).collect();
        // Of the second row ours alone, for the others have no tokens.
        let theirs = ["by hand (redis-rs)", "rslock <&\"x\">"];
        assert_eq!(labels, [&[OURS, FENCED][..], &theirs].concat());
    }

    #[test]
    fn a_run_of_few_rows_has_few_charts() {
        let mut results = sample();
        results.rows.retain(|row| row.name == "hot_remote");
        let charts = charts(&results);
        let [("hot", chart)] = &charts[..] else {
            panic!("{} charts", charts.len());
        };
        assert_eq!(chart.panels.len(), 1);
        results.rows.clear();
        assert!(super::charts(&results).is_empty());
    }

    #[test]
    fn all_rows_of_charts_are_rows() {
        for part in SUBJECTS
            .iter()
            .flat_map(|subject| subject.panels)
            .flat_map(|(_, parts)| *parts)
        {
            assert!(crate::what(part.row).is_some(), "{}", part.row);
        }
    }
}
