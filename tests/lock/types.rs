//! What can be moved and shared.

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

    // The futures of the guard as well.
    fn futures(guard: LockGuard, factory: LockFactory) -> [Box<dyn Send>; 2] {
        [
            Box::new(guard.unlock()),
            Box::new(async move { factory.drain(ms(1)).await }),
        ]
    }
    let _ = futures;
}
