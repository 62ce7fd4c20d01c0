//! A look, for a moment and without sleep, whether a lock is given back at once.
//!
//! Who queues up is woken when its turn comes, by a scheduler that may have other tasks to run first;
//! and as nobody overtakes those who wait, all who come meanwhile queue up as well. On a key that
//! many want, whose holders need but a few microseconds, one wait so brings the next, until every
//! caller waits: a lock convoy. A caller that finds a holder at work on another thread, that has only
//! just begun, and nobody who waits, therefore looks again for a moment before it queues up.
//!
//! It has no place meanwhile: the order is that in which callers queue up, as ever.

use std::{ptr, time::Duration};

use crate::{
    clock::Timestamp,
    coordinator::{table::Slot, turn::Turn},
    sync::{Arc, hint, thread_local},
};

/// A turn that is older goes on, as far as anybody can tell.
const MOMENT: Duration = Duration::from_micros(3);

/// At most, for clocks that stand still.
const LOOKS: u32 = 128;

/// A thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thread(usize);

impl Thread {
    /// The present one. One that has ended may have been called the same.
    pub(super) fn here() -> Self {
        thread_local!(static MARK: u8 = const { 0 });
        MARK.with(|mark| Self(ptr::from_ref(mark).addr()))
    }
}

/// The turn that keeps a new caller from the lock, if it may be over in a moment.
pub(super) fn ends_soon(slot: &Slot, now: Timestamp) -> Option<Arc<Turn>> {
    let turn = slot.holder.as_ref()?;
    // What goes on on this very thread goes on no further while it is looked at.
    let may_end = slot.state.waiters() == 0
        && now.since(turn.since()) < MOMENT
        && turn.began_on() != Thread::here();
    may_end.then(|| Arc::clone(turn))
}

/// Until the turn is over, or the moment is. What the clock shows after that.
pub(super) fn watch(turn: &Turn, mut now: impl FnMut() -> Timestamp) -> Timestamp {
    let end = turn.since() + MOMENT;
    for _ in 0..LOOKS {
        if turn.is_over() || now() >= end {
            break;
        }
        hint::spin_loop();
    }
    now()
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a test ends where it fails"
    )]

    use std::thread;

    use futures_util::FutureExt;
    use tokio::runtime::Handle;

    use super::*;
    use crate::{Clock, LockFactory, LockGuard, LockOptions, storage::MemoryStorage};

    struct World {
        factory: LockFactory,
        clock: Clock,
    }

    impl World {
        fn new() -> Self {
            let clock = Clock::tokio();
            let storage = MemoryStorage::with_clock(clock);
            let factory = LockFactory::builder(storage).clock(clock).build().unwrap();
            Self { factory, clock }
        }

        /// What there is to get without a wait.
        fn lock(&self) -> Option<LockGuard> {
            let lock = self.factory.create_lock("key").unwrap();
            lock.lock(LockOptions::default()).now_or_never()?.ok()
        }

        fn locked_on_another_thread(&self) -> LockGuard {
            let runtime = Handle::current();
            thread::scope(|scope| {
                let other = scope.spawn(|| {
                    let _inside = runtime.enter();
                    self.lock().expect("nobody has it")
                });
                other.join().unwrap()
            })
        }

        fn ends_soon(&self, now: Timestamp) -> Option<Arc<Turn>> {
            let cell = self.factory.coordinator().table.cells().next().unwrap();
            let slot = cell.lock();
            ends_soon(&slot, now)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_began_just_now_on_another_thread_may_end_soon() {
        let world = World::new();
        let began = world.clock.now();
        let guard = world.locked_on_another_thread();
        let turn = world.ends_soon(began).expect("it may end soon");
        assert!(world.ends_soon(began + MOMENT).is_none(), "it goes on");
        assert!(!turn.is_over());
        drop(guard);
        assert!(turn.is_over());

        let _guard = world.lock().expect("nobody has it");
        assert!(
            world.ends_soon(began).is_none(),
            "it does not end while this thread looks"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_ends_with_the_turn_or_the_moment() {
        let world = World::new();
        let began = world.clock.now();
        let mut guard = Some(world.locked_on_another_thread());
        let turn = world.ends_soon(began).expect("it may end soon");

        let mut looks = 0;
        watch(&turn, || {
            looks += 1;
            began
        });
        assert_eq!(looks, LOOKS + 1, "the clock stands still");
        let mut looks = 0;
        watch(&turn, || {
            looks += 1;
            began + looks * (MOMENT / 10)
        });
        assert_eq!(looks, 11, "it goes on beyond the moment");

        let mut looks = 0;
        let seen = watch(&turn, || {
            looks += 1;
            if looks == 5 {
                guard = None;
            }
            began + looks * (MOMENT / 10)
        });
        assert!(turn.is_over());
        assert_eq!(looks, 6, "it is seen at once");
        assert_eq!(seen, began + looks * (MOMENT / 10), "when it was over");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_looks_while_others_wait() {
        let world = World::new();
        let _guard = world.locked_on_another_thread();
        let lock = world.factory.create_lock("key").unwrap();
        let mut waiting = Box::pin(lock.lock(LockOptions::default()));
        // It looks itself, and ends though the clock stands still.
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(world.ends_soon(world.clock.now()).is_none());
        drop(waiting);
        assert!(world.ends_soon(world.clock.now()).is_some());
    }
}
