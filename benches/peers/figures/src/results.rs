use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Error;

/// The `format` of the JSON files that this program writes, and the only one that it reads.
pub const FORMAT: u32 = 1;

/// Everything that a run has measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Results {
    /// [`FORMAT`].
    pub format: u32,
    /// When the run began, in UTC.
    pub measured: String,
    /// The commit that was built, if git knows it; with `-dirty` if that is not all.
    pub commit: Option<String>,
    /// Where it was measured.
    pub machine: Machine,
    /// How it was measured.
    pub plan: Plan,
    /// The libraries by name.
    pub versions: BTreeMap<String, String>,
    /// In the order of measurement.
    pub rows: Vec<Row>,
}

/// Where a run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Processors that the program may use.
    pub cores: usize,
    /// Their model.
    pub cpu: String,
    /// The operating system and its kernel.
    pub os: String,
    /// The version of the Redis server.
    pub redis: String,
    /// How many threads wanted a processor in the minute before the run.
    pub load_before: f64,
}

/// How a run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// How often all took their turn.
    pub rounds: usize,
    /// How long each turn counted.
    pub window_seconds: f64,
    /// Runtime threads of each process.
    pub threads: usize,
}

/// One subject, and all who were compared in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// By which `scripts/bench` knows it.
    pub name: String,
    /// What is measured.
    pub what: String,
    /// What each had.
    pub figures: Vec<Figure>,
    /// Ours over theirs.
    pub ratios: Vec<Ratio>,
    /// What it took the server.
    pub costs: Vec<Cost>,
}

/// What one of those compared had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Who had it.
    pub who: String,
    /// Of what.
    pub unit: Unit,
    /// The values.
    #[serde(flatten)]
    pub series: Series,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Times a second.
    PerSecond,
    /// Seconds.
    Seconds,
    /// A plain number.
    Number,
}

/// Ours over theirs, round by round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Who they are; `-` where the value is ours alone.
    pub peer: String,
    /// The values.
    #[serde(flatten)]
    pub series: Series,
    /// What it should be.
    pub goal: Option<Goal>,
    /// Whether the median is that.
    pub reached: Option<bool>,
}

impl Ratio {
    /// With the goal that it has, and whether it is reached.
    #[must_use]
    pub fn new(peer: &str, series: Series, goal: Option<Goal>) -> Self {
        Self {
            peer: peer.to_owned(),
            reached: goal.map(|goal| goal.is_reached(series.median)),
            series,
            goal,
        }
    }
}

/// What a ratio should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Goal {
    fn is_reached(self, value: f64) -> bool {
        match self {
            Self::AtLeast(goal) => value >= goal,
            Self::AtMost(goal) => value <= goal,
        }
    }
}

/// What one section (a lock and its release; in `handoff`, one handoff) took all servers together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Whose sections.
    pub who: String,
    /// CPU time.
    pub server_cpu_seconds: Series,
    /// Commands carried out, those among them that scripts called.
    pub server_commands: Series,
    /// Commands that clients sent, in one short run under MONITOR, where they were counted.
    pub client_commands: Option<f64>,
}

/// One value a round, and what they come to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The middle one; the mean of the two in the middle if their number is even.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All, in the order of measurement.
    pub rounds: Vec<f64>,
}

impl Series {
    /// Of these values, to six digits: more of them were not measured.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let rounds: Vec<f64> = values.iter().copied().map(six_digits).collect();
        Self {
            median: six_digits(median(&rounds)),
            min: rounds.iter().copied().fold(f64::INFINITY, f64::min),
            max: rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            rounds,
        }
    }

    fn is_finite(&self) -> bool {
        [self.median, self.min, self.max]
            .iter()
            .chain(&self.rounds)
            .all(|value| value.is_finite())
    }
}

/// The middle of the values; the mean of the two in the middle if their number is even.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

fn six_digits(value: f64) -> f64 {
    // Text is what the digits are for, and its rounding is exact.
    format!("{value:.5e}").parse().unwrap_or(value)
}

impl Results {
    /// The row of this name.
    #[must_use]
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// As a JSON file.
    ///
    /// # Errors
    ///
    /// If something is not a number: JSON could not tell what it was.
    pub fn to_json(&self) -> Result<String, Error> {
        for row in &self.rows {
            let figures = row
                .figures
                .iter()
                .map(|figure| (&figure.who, &figure.series));
            let ratios = row.ratios.iter().map(|ratio| (&ratio.peer, &ratio.series));
            let costs = row.costs.iter().flat_map(|cost| {
                [&cost.server_cpu_seconds, &cost.server_commands].map(|series| (&cost.who, series))
            });
            for (who, series) in figures.chain(ratios).chain(costs) {
                if !series.is_finite() {
                    return Err(format!("{} {who}: {series:?} are not numbers", row.name).into());
                }
            }
            for cost in &row.costs {
                if !cost.client_commands.is_none_or(f64::is_finite) {
                    return Err(format!("{} {}: no commands counted", row.name, cost.who).into());
                }
            }
        }
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// From a JSON file.
    ///
    /// # Errors
    ///
    /// If it is not one of ours, or one of another format.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Header {
            format: u32,
        }
        let Header { format } = serde_json::from_str(text)?;
        if format != FORMAT {
            return Err(format!("the format is {format}, and only {FORMAT} is known").into());
        }
        Ok(serde_json::from_str(text)?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results of all rows that charts are made of, with names that no chart may stumble over.
    pub(crate) fn sample() -> Results {
        let figure = |who: &str, unit, values: &[f64]| Figure {
            who: who.to_owned(),
            unit,
            series: Series::of(values),
        };
        let row = |name: &str, figures: Vec<Figure>, ratios: Vec<Ratio>| Row {
            name: name.to_owned(),
            what: crate::what(name).unwrap_or_default().to_owned(),
            figures,
            ratios,
            costs: Vec::new(),
        };
        let mut uncontended = row(
            "uncontended_64",
            vec![
                figure("ours", Unit::PerSecond, &[134_567.0, 120_001.0, 141_234.0]),
                figure(
                    "by_hand",
                    Unit::PerSecond,
                    &[140_000.0, 139_000.0, 150_500.0],
                ),
                figure(
                    "rslock <&\"x\">",
                    Unit::PerSecond,
                    &[98_700.0, 90_000.0, 99_000.0],
                ),
            ],
            vec![
                Ratio::new(
                    "by_hand",
                    Series::of(&[0.96, 0.86, 0.94]),
                    Some(Goal::AtLeast(1.0)),
                ),
                Ratio::new(
                    "rslock",
                    Series::of(&[1.36, 1.33, 1.43]),
                    Some(Goal::AtLeast(1.25)),
                ),
            ],
        );
        uncontended.costs.push(Cost {
            who: "ours".to_owned(),
            server_cpu_seconds: Series::of(&[4.1e-6, 4.0e-6, 4.2e-6]),
            server_commands: Series::of(&[3.0, 3.0, 3.0]),
            client_commands: Some(2.0),
        });
        let rate = |who: &str, rate: f64| figure(who, Unit::PerSecond, &[rate, rate * 1.1]);
        let time = |who: &str, time: f64| figure(who, Unit::Seconds, &[time, time * 1.1]);
        Results {
            format: FORMAT,
            measured: "2026-01-02T03:04:05Z".to_owned(),
            commit: None,
            machine: Machine {
                cores: 2,
                cpu: "A & B <3 GHz>".to_owned(),
                os: "linux 6.1".to_owned(),
                redis: "7.0.15".to_owned(),
                load_before: 0.25,
            },
            plan: Plan {
                rounds: 3,
                window_seconds: 1.5,
                threads: 2,
            },
            versions: [("rslock".to_owned(), "0.10.0".to_owned())].into(),
            rows: vec![
                uncontended,
                row(
                    "hot_local",
                    vec![rate("ours", 1_650_000.0), rate("redis-lock", 4_400.0)],
                    vec![],
                ),
                row(
                    "hot_remote",
                    vec![rate("ours", 509_000.0), rate("rslock_tuned", 21_300.0)],
                    vec![],
                ),
                row(
                    "hot_remote_p99",
                    vec![time("ours", 0.000_31), time("rslock_default", 0.271)],
                    vec![],
                ),
                row(
                    "handoff",
                    vec![time("ours", 0.000_099), time("redis-lock", 0.051_2)],
                    vec![],
                ),
                row("redlock_3", vec![rate("ours", 52_000.0)], vec![]),
                row(
                    "axum_hot",
                    vec![rate("ours", 104_000.0), rate("no_lock", 187_000.0)],
                    vec![],
                ),
            ],
        }
    }

    #[test]
    fn a_run_is_the_same_after_its_json_file() {
        let results = sample();
        let json = results.to_json().expect("finite");
        assert_eq!(Results::from_json(&json).expect("our own"), results);
    }

    #[test]
    fn the_json_file_has_every_round_and_whether_a_goal_was_reached() {
        let json = sample().to_json().expect("finite");
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        let row = &value["rows"][0];
        assert_eq!(row["name"], "uncontended_64");
        let ours = &row["figures"][0];
        assert_eq!(
            (&ours["who"], &ours["unit"]),
            (&"ours".into(), &"per_second".into())
        );
        assert_eq!(ours["median"], 134_567.0);
        assert_eq!(ours["min"], 120_001.0);
        assert_eq!(ours["max"], 141_234.0);
        assert_eq!(
            ours["rounds"],
            serde_json::json!([134_567.0, 120_001.0, 141_234.0])
        );
        let [short, reached] = [&row["ratios"][0], &row["ratios"][1]];
        assert_eq!(short["goal"]["at_least"], 1.0);
        assert_eq!(short["reached"], false);
        assert_eq!(reached["reached"], true);
        assert_eq!(row["costs"][0]["client_commands"], 2.0);
    }

    #[test]
    fn what_is_no_number_is_not_written() {
        for broken in 0..3 {
            let mut results = sample();
            let nothing = Series::of(&[1.0, f64::NAN]);
            let row = &mut results.rows[0];
            match broken {
                0 => row.figures[1].series = nothing,
                1 => row.ratios[0].series = nothing,
                _ => row.costs[0].client_commands = Some(f64::INFINITY),
            }
            let error = results.to_json().expect_err("not numbers").to_string();
            assert!(error.starts_with("uncontended_64 "), "{error}");
        }
    }

    #[test]
    fn a_file_of_another_format_is_refused_by_its_number() {
        let json = sample().to_json().expect("finite");
        let json = json.replace("\"format\": 1", "\"format\": 2");
        let error = Results::from_json(&json).expect_err("unknown").to_string();
        assert_eq!(error, "the format is 2, and only 1 is known");
    }

    #[test]
    fn a_goal_is_reached_from_its_own_side() {
        assert!(Goal::AtLeast(1.0).is_reached(1.0));
        assert!(!Goal::AtLeast(1.0).is_reached(0.999));
        assert!(Goal::AtMost(1.0).is_reached(1.0));
        assert!(!Goal::AtMost(1.0).is_reached(1.001));
        assert!(!Goal::AtMost(1.0).is_reached(f64::NAN));
    }

    #[test]
    fn the_median_is_in_the_middle_of_the_values_whatever_their_order() {
        let series = Series::of(&[4.0, 1.0, 2.0, 3.0]);
        assert_eq!((series.median, series.min, series.max), (2.5, 1.0, 4.0));
        assert_eq!(series.rounds, [4.0, 1.0, 2.0, 3.0]);
        assert_eq!(Series::of(&[3.0, 1.0, 2.0]).median, 2.0);
        assert!(Series::of(&[]).median.is_nan());
    }

    #[test]
    fn values_are_kept_to_six_digits() {
        let series = Series::of(&[134_567.891_2, 0.000_012_345_678_9]);
        assert_eq!(series.rounds, [134_568.0, 0.000_012_345_7]);
    }
}
