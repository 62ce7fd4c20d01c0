//! A recorder of one's own, and what it was told.

use std::{cell::RefCell, collections::BTreeMap};

use metrics::LocalRecorderGuard;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// The numbers of this thread from now on, by series: `name{label=value,..}`.
pub struct Numbers {
    snapshotter: Snapshotter,
    kept: RefCell<BTreeMap<String, Series>>,
    _local: LocalRecorderGuard<'static>,
}

/// A snapshot takes the values away, so they are added up here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub kind: &'static str,
    pub unit: String,
    pub sum: f64,
    pub values: Vec<f64>,
}

impl Numbers {
    pub fn start() -> Self {
        // The guard borrows it for as long as the thread may use it.
        let recorder: &'static DebuggingRecorder = Box::leak(Box::default());
        Self {
            snapshotter: recorder.snapshotter(),
            kept: RefCell::default(),
            _local: metrics::set_default_local_recorder(recorder),
        }
    }

    pub fn all(&self) -> BTreeMap<String, Series> {
        let mut kept = self.kept.borrow_mut();
        for (key, unit, _, value) in self.snapshotter.snapshot().into_vec() {
            let labels = key.key().labels();
            let mut labels: Vec<_> = labels
                .map(|label| format!("{}={}", label.key(), label.value()))
                .collect();
            labels.sort();
            let name = key.key().name();
            let name = match labels.is_empty() {
                true => name.to_owned(),
                false => format!("{name}{{{}}}", labels.join(",")),
            };
            let series = kept.entry(name).or_default();
            series.unit = unit.map_or_else(String::new, |unit| unit.as_str().to_owned());
            match value {
                DebugValue::Counter(count) => {
                    series.kind = "counter";
                    series.sum += count as f64;
                }
                DebugValue::Gauge(change) => {
                    series.kind = "gauge";
                    series.sum += change.0;
                }
                DebugValue::Histogram(values) => {
                    series.kind = "histogram";
                    series
                        .values
                        .extend(values.into_iter().map(|value| value.0));
                }
            }
        }
        kept.clone()
    }

    /// The value of a counter or gauge. One that is not there fails the test.
    #[track_caller]
    pub fn of(&self, series: &str) -> f64 {
        let all = self.all();
        let found = all
            .get(series)
            .unwrap_or_else(|| panic!("no {series} in {:?}", all.keys()));
        assert_ne!(found.kind, "histogram", "{series}");
        found.sum
    }

    /// What a histogram was told, in the order of time.
    #[track_caller]
    pub fn values(&self, series: &str) -> Vec<f64> {
        let all = self.all();
        let found = all
            .get(series)
            .unwrap_or_else(|| panic!("no {series} in {:?}", all.keys()));
        assert_eq!(found.kind, "histogram", "{series}");
        found.values.clone()
    }

    /// All series that something was recorded for: counters and gauges that are not 0, and how many
    /// values a histogram has.
    pub fn seen(&self) -> Vec<(String, f64)> {
        let all = self.all().into_iter();
        let all = all.map(|(name, series)| {
            let count = series.values.len() as f64;
            (name.replace("distributed_lock_", ""), series.sum + count)
        });
        all.filter(|(_, value)| *value != 0.0).collect()
    }

    /// Exactly these, by name without `distributed_lock_`.
    #[track_caller]
    pub fn are(&self, expected: &[(&str, f64)]) {
        let seen = self.seen();
        let seen: Vec<_> = seen
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        assert_eq!(seen, expected);
    }
}
