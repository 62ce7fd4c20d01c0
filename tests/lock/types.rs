//! What can be moved and shared.

use tower_distributed_lock::{
    HeldLock, LockSet, LockSetFuture, LockSetGuard,
    inspect::LockInspector,
    middleware::{HeldBody, Rejection, RequestLock},
};

use super::*;

#[test]
fn the_types_can_be_moved_and_shared_as_servers_need() {
    fn clone_send_sync<T: Clone + Send + Sync + 'static>() {}
    fn send_sync<T: Send + Sync + 'static>() {}
    fn send<T: Send + 'static>() {}
    fn error<T: std::error::Error + Clone + Send + Sync + 'static>() {}

    clone_send_sync::<LockFactory>();
    clone_send_sync::<LockFactoryBuilder<MemoryStorage>>();
    clone_send_sync::<Lock>();
    clone_send_sync::<LockOptions>();
    clone_send_sync::<MemoryStorage>();
    send::<LockFuture>();
    send_sync::<LockGuard>();
    error::<LockError>();
    error::<NotObtained>();
    error::<TooManyWaiters>();
    error::<StorageError>();
    error::<InvalidKey>();
    error::<InvalidSettings>();
    error::<InvalidOptions>();
    error::<LossReason>();

    clone_send_sync::<LockSet>();
    send::<LockSetFuture>();
    send_sync::<LockSetGuard>();
    clone_send_sync::<LockInspector>();
    clone_send_sync::<HeldLock>();
    send_sync::<RequestLock>();
    send_sync::<Rejection>();
    send::<HeldBody<axum::body::Body>>();

    // The futures of the guard as well.
    fn futures(guard: LockGuard, factory: LockFactory) -> [Box<dyn Send>; 2] {
        [
            Box::new(guard.unlock()),
            Box::new(async move { factory.drain(ms(1)).await }),
        ]
    }
    let _ = futures;
}
