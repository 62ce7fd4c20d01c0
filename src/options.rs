//! How long a lock lasts and how long a caller waits for it.

use std::time::Duration;

use crate::error::InvalidOptions;

/// The options of one [`Lock::lock`](crate::Lock::lock) call, or of all requests of a
/// [`DistributedLockLayer`](crate::DistributedLockLayer).
///
/// | option | default | meaning |
/// |---|---|---|
/// | [`ttl`](LockOptionsBuilder::ttl) | 10 s | how long the lock outlives a holder that crashed |
/// | [`interval`](LockOptionsBuilder::interval) | 1 s | how often a lock held by another process is asked for, should a wake-up be missed |
/// | [`retries`](LockOptionsBuilder::retries) | 3 | the caller gives up after `retries` × `interval` |
/// | [`max_hold`](LockOptionsBuilder::max_hold) | 5 min | how long one holder may keep the lock by renewal |
///
/// ```
/// use std::time::Duration;
/// use tower_distributed_lock::LockOptions;
///
/// let options = LockOptions::builder()
///     .ttl(Duration::from_secs(5))
///     .interval(Duration::from_millis(100))
///     .retries(20)
///     .build()?;
/// assert_eq!(options.max_wait(), Duration::from_secs(2));
/// # Ok::<(), tower_distributed_lock::error::InvalidOptions>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOptions {
    ttl: Duration,
    retries: u32,
    interval: Duration,
    max_wait: Duration,
    max_hold: Duration,
}

impl LockOptions {
    /// The shortest ttl: below it the drift allowance (1 % and 2 ms) and a round trip would leave
    /// next to nothing.
    pub const MIN_TTL: Duration = Duration::from_millis(10);
    /// The longest ttl, interval, wait and hold.
    pub const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

    /// Starts from the [defaults](LockOptions).
    pub fn builder() -> LockOptionsBuilder {
        LockOptionsBuilder {
            options: Self::default(),
            limit: Duration::MAX,
        }
    }

    /// Starts from these options, with all that is set in them; a limit set by [`within`](Self::within)
    /// stays.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::LockOptions;
    ///
    /// let reports = LockOptions::builder().max_hold(Duration::from_secs(3600)).build()?;
    /// let big_report = reports.to_builder().ttl(Duration::from_secs(60)).build()?;
    /// assert_eq!(big_report.max_hold(), reports.max_hold());
    /// # Ok::<(), tower_distributed_lock::error::InvalidOptions>(())
    /// ```
    pub fn to_builder(self) -> LockOptionsBuilder {
        // What they were built with fits.
        let wait = self.interval.saturating_mul(self.retries);
        LockOptionsBuilder {
            options: self,
            limit: if self.max_wait < wait {
                self.max_wait
            } else {
                Duration::MAX
            },
        }
    }

    /// How long the storage keeps the lock when nothing is heard of its holder. A holder that lives
    /// has its lock renewed in the background every third of this. See [`LockOptionsBuilder::ttl`].
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// See [`LockOptionsBuilder::retries`].
    pub fn retries(&self) -> u32 {
        self.retries
    }

    /// See [`LockOptionsBuilder::interval`].
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// See [`LockOptionsBuilder::max_hold`].
    pub fn max_hold(&self) -> Duration {
        self.max_hold
    }

    /// How long a caller waits for the lock at most: `retries` × `interval`, or what is
    /// [less](Self::within).
    pub fn max_wait(&self) -> Duration {
        self.max_wait
    }

    /// These options, for a caller who has no more than `limit` left to wait. With 0 the lock is
    /// had at once or not at all.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::LockOptions;
    ///
    /// let options = LockOptions::default();
    /// assert_eq!(options.max_wait(), Duration::from_secs(3));
    /// assert_eq!(options.within(Duration::from_secs(1)).max_wait(), Duration::from_secs(1));
    /// // It makes no wait longer.
    /// assert_eq!(options.within(Duration::from_secs(60)), options);
    /// ```
    #[must_use]
    pub fn within(self, limit: Duration) -> Self {
        Self {
            max_wait: self.max_wait.min(limit),
            ..self
        }
    }

    /// These options, with no wait: the lock is had at once or not at all.
    pub(crate) fn without_wait(self) -> Self {
        self.within(Duration::ZERO)
    }
}

impl Default for LockOptions {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(10),
            retries: 3,
            interval: Duration::from_secs(1),
            max_wait: Duration::from_secs(3),
            max_hold: Duration::from_secs(5 * 60),
        }
    }
}

/// Builds [`LockOptions`]; made by [`LockOptions::builder`] and [`LockOptions::to_builder`], which have examples.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct LockOptionsBuilder {
    options: LockOptions,
    limit: Duration,
}

impl LockOptionsBuilder {
    /// How long the storage keeps the lock when nothing is heard of its holder. Default 10 s; from
    /// 10 ms to 24 h.
    ///
    /// Short: a crashed holder blocks others for less long. Long: the lock survives longer pauses
    /// of the holder and of the storage. The holder itself counts on a little less: 1 % and 2 ms
    /// are kept back for clocks that run at different rates.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::{LockOptions, error::InvalidOptions};
    ///
    /// let options = LockOptions::builder().ttl(Duration::from_secs(60)).build()?;
    /// assert_eq!(options.ttl(), Duration::from_secs(60));
    ///
    /// let too_short = LockOptions::builder().ttl(Duration::from_millis(9)).build();
    /// assert_eq!(too_short, Err(InvalidOptions::Ttl));
    /// # Ok::<(), InvalidOptions>(())
    /// ```
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = ttl;
        self
    }

    /// How many intervals the caller waits before it gives up. Default 3. With 0 the lock is had at
    /// once or not at all. `retries` × `interval` is at most 24 h.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::LockOptions;
    ///
    /// let patient = LockOptions::builder().retries(30).interval(Duration::from_secs(2)).build()?;
    /// assert_eq!(patient.max_wait(), Duration::from_secs(60));
    ///
    /// let at_once = LockOptions::builder().retries(0).build()?;
    /// assert_eq!(at_once.max_wait(), Duration::ZERO);
    /// # Ok::<(), tower_distributed_lock::error::InvalidOptions>(())
    /// ```
    pub fn retries(mut self, retries: u32) -> Self {
        self.options.retries = retries;
        self
    }

    /// How often a lock that another process holds is asked for; together with
    /// [`retries`](Self::retries) it is how long the caller waits. Default 1 s; from 1 ms to 24 h.
    ///
    /// Waiters do not poll where wake-ups arrive: this is for wake-ups that are lost, and for
    /// storages and holders that send none. Of all waiters of a process only the first asks.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.options.interval = interval;
        self
    }

    /// How long one holder may keep the lock by background renewal. Default 5 min; from 10 ms to 24
    /// h.
    ///
    /// A holder that has not finished by then loses the lock as if it had expired, as in the example
    /// of [`Clock`](crate::Clock). Without this bound a handler that hangs, or a connection whose end
    /// is never noticed, would hold its key for ever.
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.options.max_hold = max_hold;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// [`InvalidOptions`] says which option is out of its range.
    pub fn build(self) -> Result<LockOptions, InvalidOptions> {
        let options = self.options;
        let range = |min: Duration| min..=LockOptions::MAX_DURATION;
        if !range(LockOptions::MIN_TTL).contains(&options.ttl) {
            return Err(InvalidOptions::Ttl);
        }
        if !range(Duration::from_millis(1)).contains(&options.interval) {
            return Err(InvalidOptions::Interval);
        }
        let max_wait = match options.interval.checked_mul(options.retries) {
            Some(wait) if wait <= LockOptions::MAX_DURATION => wait,
            _ => return Err(InvalidOptions::Wait),
        };
        if !range(LockOptions::MIN_TTL).contains(&options.max_hold) {
            return Err(InvalidOptions::MaxHold);
        }
        Ok(LockOptions {
            max_wait: max_wait.min(self.limit),
            ..options
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Around all bounds, and anything.
    fn durations() -> impl Strategy<Value = Duration> {
        let bounds = [
            Duration::ZERO,
            Duration::from_millis(1),
            LockOptions::MIN_TTL,
            LockOptions::MAX_DURATION,
        ];
        let near = (prop::sample::select(bounds.to_vec()), 0..3_u8).prop_map(|(bound, side)| {
            let step = Duration::from_nanos(1);
            match side {
                0 => bound.saturating_sub(step),
                1 => bound,
                _ => bound + step,
            }
        });
        prop_oneof![
            2 => near,
            4 => (1..90_000_000_000_u64).prop_map(Duration::from_micros),
            1 => any::<Duration>(),
            1 => Just(Duration::MAX),
        ]
    }

    proptest! {
        #[test]
        fn options_are_within_their_bounds_or_the_first_that_is_not_is_named(
            (ttl, interval, max_hold) in (durations(), durations(), durations()),
            retries in prop_oneof![0..4_u32, any::<u32>()],
            limit in prop::option::of(durations()),
        ) {
            let start = match limit {
                Some(limit) => LockOptions::default().within(limit).to_builder(),
                None => LockOptions::builder(),
            };
            let built = start.ttl(ttl).interval(interval).retries(retries).max_hold(max_hold).build();
            let day = 86_400_000_000_000_u128;
            let is = |it: Duration, least: u128| (least..=day).contains(&it.as_nanos());
            let wait = interval.as_nanos() * u128::from(retries);
            let wrong = [
                (is(ttl, 10_000_000), InvalidOptions::Ttl),
                (is(interval, 1_000_000), InvalidOptions::Interval),
                (wait <= day, InvalidOptions::Wait),
                (is(max_hold, 10_000_000), InvalidOptions::MaxHold),
            ];
            match wrong.into_iter().find(|(is_right, _)| !is_right) {
                Some((_, error)) => prop_assert_eq!(built, Err(error)),
                None => {
                    let built = built.unwrap();
                    prop_assert_eq!((built.ttl(), built.interval()), (ttl, interval));
                    prop_assert_eq!((built.retries(), built.max_hold()), (retries, max_hold));
                    // The limit counts if it was less than the default's wait.
                    let limit = limit.filter(|limit| *limit < Duration::from_secs(3));
                    let expected = limit.map_or(wait, |limit| limit.as_nanos().min(wait));
                    prop_assert_eq!(built.max_wait().as_nanos(), expected);
                    prop_assert_eq!(built.to_builder().build(), Ok(built));
                    prop_assert_eq!(built.without_wait().max_wait(), Duration::ZERO);
                }
            }
        }
    }

    #[test]
    fn the_defaults_are_those_of_the_original_and_valid() {
        let options = LockOptions::builder().build().unwrap();
        assert_eq!(options, LockOptions::default());
        assert_eq!(options.ttl(), Duration::from_secs(10));
        assert_eq!(
            (options.retries(), options.interval()),
            (3, Duration::from_secs(1))
        );
    }

    #[test]
    fn options_made_of_others_keep_what_is_not_set_anew() {
        let (s, ms) = (Duration::from_secs, Duration::from_millis);
        let first = LockOptions::builder()
            .ttl(s(20))
            .interval(ms(500))
            .retries(8)
            .max_hold(s(3_600));
        let first = first.build().unwrap();
        assert_eq!(first.to_builder().build(), Ok(first));

        let second = first.to_builder().ttl(s(60)).retries(2).build().unwrap();
        assert_eq!((second.ttl(), second.max_hold()), (s(60), s(3_600)));
        assert_eq!((second.interval(), second.max_wait()), (ms(500), s(1)));

        // What was not cut short is not short afterwards.
        let patient = first.to_builder().retries(20).build().unwrap();
        assert_eq!(patient.max_wait(), s(10));

        let hurried = first.within(ms(100));
        assert_eq!(hurried.to_builder().build(), Ok(hurried));
        let hurried = hurried.to_builder().retries(100).build().unwrap();
        assert_eq!(hurried.max_wait(), ms(100));
    }

    #[test]
    fn bad_options_are_refused_when_built() {
        let build = |change: fn(LockOptionsBuilder) -> LockOptionsBuilder| {
            change(LockOptions::builder()).build().unwrap_err()
        };
        let ms = Duration::from_millis;
        assert_eq!(build(|o| o.ttl(Duration::ZERO)), InvalidOptions::Ttl);
        assert_eq!(
            build(|o| o.ttl(Duration::from_millis(9))),
            InvalidOptions::Ttl
        );
        assert_eq!(build(|o| o.ttl(Duration::MAX)), InvalidOptions::Ttl);
        assert_eq!(
            build(|o| o.interval(Duration::ZERO)),
            InvalidOptions::Interval
        );
        assert_eq!(
            build(|o| o.interval(Duration::MAX)),
            InvalidOptions::Interval
        );
        assert_eq!(build(|o| o.retries(u32::MAX)), InvalidOptions::Wait);
        assert_eq!(
            build(|o| o.retries(25).interval(Duration::from_secs(3600))),
            InvalidOptions::Wait
        );
        assert_eq!(
            build(|o| o.max_hold(Duration::ZERO)),
            InvalidOptions::MaxHold
        );
        let day = Duration::from_secs(24 * 60 * 60);
        let longest = LockOptions::builder().ttl(day).max_hold(day);
        assert!(longest.retries(24).interval(day / 24).build().is_ok());
        let longer = LockOptions::builder().ttl(day + ms(1)).build();
        assert_eq!(longer, Err(InvalidOptions::Ttl));
        assert!(
            LockOptions::builder()
                .ttl(ms(10))
                .interval(ms(1))
                .retries(0)
                .build()
                .is_ok()
        );
    }
}
