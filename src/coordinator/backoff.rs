//! When to ask again for a lock that was not obtained.

use std::time::Duration;

/// After a failure, from this on, doubling.
const FIRST_RETRY: Duration = Duration::from_millis(10);

/// How long after a denial to ask again: when the holder's lock runs out at the latest, and every
/// `interval` until then because it may be released before. `random` is from 0 to 1; it keeps the
/// waiters of different processes apart.
pub(crate) fn after_denial(
    holder_ttl: Option<Duration>,
    interval: Duration,
    random: f64,
) -> Duration {
    let poll = interval.mul_f64(0.5 + random / 2.0);
    match holder_ttl {
        // The storage counts in milliseconds: a lock with 0 ms left is still there.
        Some(ttl) => {
            poll.min(ttl + Duration::from_millis(1) + (ttl / 10).min(FIRST_RETRY).mul_f64(random))
        }
        None => poll,
    }
}

/// Over how long those are spread who heard at the same time that a lock in parts is free: some
/// round trips, so that mostly one of them is alone with it for the time that it takes.
const SPREAD: Duration = Duration::from_millis(4);

/// How long after the word that a lock in parts is free to ask for it.
pub(crate) fn after_hint(random: f64) -> Duration {
    SPREAD.mul_f64(random)
}

/// How long to leave a lock in parts to those who heard that it is free: until one of them has it.
pub(crate) fn after_giving_way(random: f64) -> Duration {
    SPREAD.mul_f64(1.0 + random)
}

/// How long after an attempt that got but parts of a lock, as did others, to ask again. `splits` such
/// attempts came before it, in a row.
pub(crate) fn after_split(splits: u32, interval: Duration, random: f64) -> Duration {
    SPREAD
        .saturating_mul(1 << splits.min(16))
        .min(interval)
        .mul_f64(random)
}

/// How long after the `failures`-th failure in a row to ask again.
pub(crate) fn after_failure(failures: u32, interval: Duration, random: f64) -> Duration {
    after_late(failures, interval).mul_f64(0.5 + random / 2.0)
}

/// The same after a grant that came too late to be used: not at random, as this is worked out for
/// every grant.
pub(crate) fn after_late(failures: u32, interval: Duration) -> Duration {
    FIRST_RETRY
        .saturating_mul(1 << failures.min(16))
        .min(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_denied_waiter_asks_when_the_holder_runs_out_and_every_interval_until_then() {
        assert_eq!(after_denial(Some(ms(9_000)), ms(1_000), 1.0), ms(1_000));
        assert_eq!(after_denial(Some(ms(9_000)), ms(1_000), 0.0), ms(500));
        assert_eq!(after_denial(None, ms(1_000), 0.0), ms(500));
        assert_eq!(after_denial(Some(ms(200)), ms(1_000), 0.0), ms(201));
        assert_eq!(after_denial(Some(ms(200)), ms(1_000), 1.0), ms(211));
        assert_eq!(after_denial(Some(ms(0)), ms(1_000), 1.0), ms(1));
    }

    #[test]
    fn who_gave_a_lock_up_comes_after_all_who_were_told() {
        assert_eq!(after_hint(0.0), ms(0));
        assert!(after_hint(1.0) <= after_giving_way(0.0));
    }

    #[test]
    fn split_votes_are_repeated_at_random_times_over_a_growing_span() {
        assert_eq!(after_split(0, ms(1_000), 0.0), ms(0));
        assert_eq!(after_split(0, ms(1_000), 1.0), ms(4));
        assert_eq!(after_split(3, ms(1_000), 1.0), ms(32));
        assert_eq!(after_split(u32::MAX, ms(1_000), 1.0), ms(1_000));
    }

    #[test]
    fn failures_back_off_up_to_the_interval() {
        assert_eq!(after_failure(0, ms(1_000), 1.0), ms(10));
        assert_eq!(after_failure(3, ms(1_000), 1.0), ms(80));
        assert_eq!(after_failure(3, ms(1_000), 0.0), ms(40));
        assert_eq!(after_failure(u32::MAX, ms(1_000), 1.0), ms(1_000));
    }
}
