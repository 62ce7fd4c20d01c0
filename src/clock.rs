//! The clock that leases are measured on.

use std::{fmt, ops::Add, time::Duration};

/// A point in time on a [`Clock`], in nanoseconds since that clock's origin.
///
/// Time stamps of different clocks cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Timestamp(u64);

impl Timestamp {
    #[cfg(any(test, tower_distributed_lock_fuzzing))]
    pub(crate) const ORIGIN: Self = Self(0);

    /// After all others.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub(crate) const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How far this lies after `earlier`; zero when it lies before.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, after: Duration) -> Self {
        let nanos = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}

/// Where "now" comes from.
///
/// The default, [`Clock::system`], goes on while the machine sleeps: a laptop lid or a paused
/// virtual machine must not stretch a lease that runs out on the server meanwhile.
/// `std::time::Instant` stands still during suspend on Linux and macOS.
///
/// [`Clock::tokio`] follows tokio's clock, so that code under test can run with
/// `tokio::time::pause()`:
///
/// ```
/// use std::time::Duration;
/// use tower_distributed_lock::{Clock, LockFactory, LockOptions, storage::MemoryStorage};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let clock = Clock::tokio();
/// let factory = LockFactory::builder(MemoryStorage::with_clock(clock)).clock(clock).build()?;
/// let lock = factory.create_lock("report")?;
///
/// let guard = lock.lock(LockOptions::default()).await?;
/// // Five minutes pass at once: the default of `max_hold`.
/// tokio::time::sleep(Duration::from_secs(300)).await;
/// assert!(!guard.is_held());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    Tokio { origin: tokio::time::Instant },
}

impl Clock {
    /// The machine's monotonic clock, suspend included (`CLOCK_BOOTTIME` on Linux and Android,
    /// `CLOCK_MONOTONIC` on Apple systems; elsewhere the monotonic clock of the standard library).
    /// The default of a [`LockFactory`](crate::LockFactory) and of a
    /// [`MemoryStorage`](crate::storage::MemoryStorage).
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// Tokio's clock, which stands still while it is paused. For tests, as in the [example](Clock),
    /// and simulations: it does not count suspend.
    pub fn tokio() -> Self {
        Self(Source::Tokio {
            origin: tokio::time::Instant::now(),
        })
    }

    pub(crate) fn now(&self) -> Timestamp {
        let nanos = match self.0 {
            Source::System => system_nanos(),
            Source::Tokio { origin } => {
                u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
            }
        };
        Timestamp(nanos)
    }

    /// The instant for tokio's timers at which this clock will show `at`. Timers do not count
    /// suspend and may fire late, so whoever was woken by one looks at [`Clock::now`] again.
    pub(crate) fn timer(&self, at: Timestamp) -> tokio::time::Instant {
        Self::timer_from(self.now(), at)
    }

    /// The same for whoever has just looked at the clock.
    pub(crate) fn timer_from(now: Timestamp, at: Timestamp) -> tokio::time::Instant {
        tokio::time::Instant::now() + at.since(now)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

#[cfg(unix)]
fn system_nanos() -> u64 {
    use rustix::time::{ClockId, clock_gettime};

    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::Monotonic;

    let time = clock_gettime(CLOCK);
    // Neither part of a monotonic clock is ever negative.
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(not(unix))]
fn system_nanos() -> u64 {
    use std::{sync::LazyLock, time::Instant};

    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    ORIGIN.elapsed().as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_counts_at_the_rate_of_the_standard_one() {
        let clock = Clock::system();
        let (ours, std) = (clock.now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (ours, std) = (clock.now().since(ours), std.elapsed());
        assert!(ours >= Duration::from_millis(20), "{ours:?}");
        assert!(
            ours.abs_diff(std) < Duration::from_millis(15),
            "{ours:?} against {std:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_tokio_clock_follows_paused_time() {
        let clock = Clock::tokio();
        let start = clock.now();
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(clock.now().since(start), Duration::from_secs(7));
    }

    #[test]
    fn time_stamps_saturate() {
        let end = Timestamp::from_nanos(u64::MAX);
        assert_eq!(end + Duration::MAX, end);
        assert_eq!(Timestamp::ORIGIN.since(end), Duration::ZERO);
    }
}
