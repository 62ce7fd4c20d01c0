//! The moment for which a hot lease is kept, and its end.
//!
//! The keeper's look at all leases is for what is seldom due. A key that is hot lingers a thousand
//! times a second, so it has a job of its own, which sleeps for as long as nobody uses the lease and
//! then gives it back. The job holds the factory, so that one that nobody uses any more ends after
//! it; and dropped before its end, with its runtime, it gives the lease back at once, if there is
//! still a connection to do so.

use tokio::time::sleep_until;

use crate::{
    clock::Timestamp,
    coordinator::{Coordinator, key_events::Effects, table::Cell},
    sync::Arc,
};

pub(super) struct Watch {
    coordinator: Arc<Coordinator>,
    cell: Arc<Cell>,
    is_over: bool,
}

impl Coordinator {
    /// Watches a lease that has just begun to linger for a moment, if nobody does.
    pub(super) fn watch(self: &Arc<Self>, cell: &Arc<Cell>) {
        if std::mem::replace(&mut cell.lock().is_watched, true) {
            return;
        }
        let watch = Watch {
            coordinator: Arc::clone(self),
            cell: Arc::clone(cell),
            is_over: false,
        };
        self.keeper.submit(self, Box::pin(watch.run()));
    }
}

impl Watch {
    async fn run(mut self) {
        let clock = self.coordinator.clock;
        while let Some(until) = self.until() {
            sleep_until(clock.timer(until)).await;
            self.end_by(clock.now());
        }
    }

    /// Until when the lease is kept. If it is not, the next time it is has a watch of its own.
    fn until(&mut self) -> Option<Timestamp> {
        let mut slot = self.cell.lock();
        let until = slot.state.moment_ends();
        self.is_over = until.is_none();
        slot.is_watched = !self.is_over;
        until
    }

    /// Gives the lease back, if it is kept no longer than until then.
    fn end_by(&self, now: Timestamp) {
        self.coordinator.update(&self.cell, |slot| {
            let effects = match slot.state.moment_ends() {
                Some(until) if until <= now => slot.state.stop_idling(),
                _ => Effects::none(),
            };
            ((), effects)
        });
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.is_over {
            self.cell.lock().is_watched = false;
            self.end_by(Timestamp::NEVER);
        }
    }
}
