//! What a request costs in allocations. A program of its own, because the allocator counts for all
//! threads: here there is one test and one thread.

use std::{alloc::System, convert::Infallible};

use http::{Request, Response};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_distributed_lock::{DistributedLockLayer, LockFactory, storage::MemoryStorage};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

async fn handle(_: Request<()>) -> Result<Response<()>, Infallible> {
    Ok(Response::new(()))
}

/// Allocations of one request after many.
async fn of_one_request<S>(mut service: S) -> usize
where
    S: Service<Request<()>, Response = Response<()>, Error = Infallible>,
{
    const TIMES: usize = 1_000;
    let mut counted = Region::new(ALLOCATOR);
    for time in 0..2 * TIMES {
        if time == TIMES {
            counted.reset();
        }
        let ready = service.ready().await.unwrap();
        ready.call(Request::new(())).await.unwrap();
    }
    let change = counted.change();
    // Tables that grow once in a while do not count.
    (change.allocations + change.reallocations) / TIMES
}

/// Two are for the lock: its key's cell, and the holder's turn. The handle on it is three, which are
/// one where the request has extensions already. A name of more than 64 bytes costs two more, and its
/// key, if that is as long, too. Whoever waits for the release has that in a box.
#[tokio::test]
async fn an_uncontended_request_costs_five_allocations_and_two_without_its_handle() {
    let locks = LockFactory::new(MemoryStorage::new());
    let layer = DistributedLockLayer::new(locks, |_: &Request<()>| "key");
    let seen = of_one_request(layer.clone().layer(service_fn(handle))).await;
    let unseen = of_one_request(layer.clone().without_held_lock().layer(service_fn(handle))).await;
    let confirmed = layer.clone().await_release(true);
    let confirmed = of_one_request(confirmed.layer(service_fn(handle))).await;
    assert_eq!((seen, unseen, confirmed), (5, 2, 6));
}
