//! A histogram of durations that can be sent from process to process.

use std::fmt;

use crate::Error;

/// Buckets per doubling are `1 << BITS`: durations are kept to within 0.4 %.
const BITS: u32 = 7;

/// How often which duration occurred, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
}

impl Histogram {
    pub(crate) fn add(&mut self, nanos: u64) {
        self.add_to(bucket(nanos), 1);
    }

    fn add_to(&mut self, bucket: usize, count: u64) {
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += count;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (bucket, &count) in other.buckets.iter().enumerate() {
            if count > 0 {
                self.add_to(bucket, count);
            }
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The duration that this part (0 to 1) of them do not exceed, in nanoseconds.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let rank = (part * self.count() as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            below += count;
            if below >= rank {
                return middle(bucket);
            }
        }
        f64::NAN
    }

    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let mut histogram = Self::default();
        for entry in text.split(',').filter(|entry| !entry.is_empty()) {
            let (bucket, count) = entry.split_once(':').ok_or("a histogram without counts")?;
            histogram.add_to(bucket.parse()?, count.parse()?);
        }
        Ok(histogram)
    }
}

/// `bucket:count,bucket:count`, empty buckets left out.
impl fmt::Display for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let filled = self
            .buckets
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        for (bucket, count) in filled {
            write!(f, "{bucket}:{count},")?;
        }
        Ok(())
    }
}

/// Up to `2 << BITS` a bucket is one nanosecond wide, then twice as wide with each doubling.
fn bucket(nanos: u64) -> usize {
    let shift = (u64::BITS - nanos.leading_zeros()).saturating_sub(BITS + 1);
    ((u64::from(shift) << BITS) + (nanos >> shift)) as usize
}

fn middle(bucket: usize) -> f64 {
    let bucket = bucket as u64;
    let shift = (bucket >> BITS).saturating_sub(1);
    let first = (bucket - (shift << BITS)) << shift;
    first as f64 + ((1_u64 << shift) - 1) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_found_again_within_its_bucket() {
        for nanos in (0..5_000).chain((1..60).map(|n| 3_u64.pow(n % 40))) {
            let found = middle(bucket(nanos));
            let error = (found - nanos as f64).abs();
            assert!(error <= nanos as f64 * 0.004, "{nanos} became {found}");
        }
    }

    #[test]
    fn buckets_follow_each_other() {
        assert_eq!(bucket(0), 0);
        for nanos in 1..100_000_u64 {
            let step = bucket(nanos) - bucket(nanos - 1);
            assert!(step <= 1, "a gap before {nanos}");
        }
    }

    #[test]
    fn quantiles_survive_the_way_between_processes() {
        let mut histogram = Histogram::default();
        (1..=100).for_each(|nanos| histogram.add(nanos));
        let mut twice = Histogram::parse(&histogram.to_string()).expect("its own text");
        assert_eq!(twice, histogram);
        twice.merge(&histogram);
        assert_eq!(twice.count(), 200);
        assert!((twice.quantile(0.5) - 50.0).abs() < f64::EPSILON);
        assert!((twice.quantile(0.99) - 99.0).abs() < f64::EPSILON);
    }
}
