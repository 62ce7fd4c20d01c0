//! bb8's part: it has connections made, one or a few, and has them replaced when they are dead; and
//! it says why it could not.

use std::sync::{Arc, Mutex, PoisonError};

use bb8_redis::bb8::{ErrorSink, ManageConnection, Pool};
use tokio::{
    sync::{Notify, futures::Notified},
    time::Instant,
};

use super::{connector::Connector, wire::Wire};
use crate::error::{StorageError, StorageErrorKind};

#[derive(Clone, Debug)]
pub(super) enum ConnectError {
    Dead,
    Failed(StorageError),
}

impl ManageConnection for Connector {
    type Connection = Arc<Wire>;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Arc<Wire>, ConnectError> {
        self.open().await.map_err(ConnectError::Failed)
    }

    async fn is_valid(&self, wire: &mut Arc<Wire>) -> Result<(), ConnectError> {
        if wire.is_dead() {
            Err(ConnectError::Dead)
        } else {
            Ok(())
        }
    }

    fn has_broken(&self, wire: &mut Arc<Wire>) -> bool {
        wire.is_dead()
    }
}

/// Where bb8 says why it could not connect. Whoever waits for a connection is told at once, instead
/// of after bb8's whole time-out.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures(Arc<FailuresInner>);

#[derive(Debug, Default)]
struct FailuresInner {
    last: Mutex<Option<StorageError>>,
    happened: Notify,
    /// When the pool was first asked for a connection since it last gave one or said why not.
    asked: Mutex<Option<Instant>>,
}

impl Failures {
    pub(super) fn asked(&self) -> Instant {
        let mut asked = self.0.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked.get_or_insert_with(Instant::now)
    }

    pub(super) fn answered(&self) {
        *self.0.asked.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Resolves at the next failure from its first poll on, or from when it is enabled.
    pub(super) fn happened(&self) -> Notified<'_> {
        self.0.happened.notified()
    }

    pub(super) fn last(&self) -> StorageError {
        let last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
            .unwrap_or_else(|| StorageError::new(StorageErrorKind::Unavailable))
    }
}

impl ErrorSink<ConnectError> for Failures {
    fn sink(&self, error: ConnectError) {
        if let ConnectError::Failed(error) = error {
            self.answered();
            *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            self.0.happened.notify_waiters();
        }
    }

    fn boxed_clone(&self) -> Box<dyn ErrorSink<ConnectError>> {
        Box::new(self.clone())
    }
}

/// A pool of so many connections, none of them made yet.
pub(super) fn pool(connector: &Connector, failures: &Failures, size: u32) -> Pool<Connector> {
    Pool::builder()
        .max_size(size)
        // No reaper: it would be bound to the runtime that happens to make the pool.
        .max_lifetime(None)
        .idle_timeout(None)
        // bb8 would try again and again while the caller waits without a word. The caller knows how
        // long it can wait, so it is told, and comes again.
        .retry_connection(false)
        // Longer than a connection may take, so that whoever waits hears of the failure itself.
        .connection_timeout(connector.longest())
        .error_sink(Box::new(failures.clone()))
        .build_unchecked(connector.clone())
}
