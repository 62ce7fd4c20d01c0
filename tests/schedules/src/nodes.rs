//! A lock of several nodes, one of which is slow, forgets, or fails: what goes on in the background
//! (`storage/quorum/stragglers.rs`) leaves nothing behind, whoever comes first.

use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};
use tokio::sync::watch;

use crate::{
    Clock, Redlock,
    error::{StorageError, StorageErrorKind},
    key::LockName,
    models::{Inside, driven, join},
    storage::{
        AcquireReply, AcquireRequest, GivenUp, LockStorage, MemoryStorage, OwnerToken,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest,
    },
};

const TTL: Duration = Duration::from_secs(3_600);

/// A little longer than calls that were put aside are left alone.
const A_WHILE: Duration = Duration::from_millis(21);

#[derive(Clone)]
struct Node {
    storage: MemoryStorage,
    /// Acquires are carried out when this is set.
    is_open: watch::Sender<bool>,
    /// So many releases fail.
    failing: Arc<AtomicUsize>,
}

impl Node {
    fn new() -> Self {
        Self {
            storage: MemoryStorage::with_clock(Clock::tokio()),
            is_open: watch::Sender::new(true),
            failing: Arc::default(),
        }
    }
}

impl LockStorage for Node {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let mut is_open = self.is_open.subscribe();
        let _ = is_open.wait_for(|is_open| *is_open).await;
        self.storage.acquire(request).await
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.storage.renew(requests).await
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let fails = self.failing.load(SeqCst) > 0;
        if fails {
            self.failing.fetch_sub(1, SeqCst);
            return Err(StorageError::new(StorageErrorKind::Unavailable));
        }
        self.storage.release(request).await
    }
}

/// Runs a model with a lock of three nodes, and then until nothing goes on in the background: nothing
/// is left on any node.
fn with_nodes(model: impl FnOnce(&Redlock, &[Node; 3])) {
    driven(|| {
        fastrand::seed(7);
        let nodes = [(); 3].map(|()| Node::new());
        let redlock = Redlock::new(nodes.clone()).expect("settings");
        model(&redlock, &nodes);
        block_on(async {
            let mut settled = pin!(redlock.settled());
            while poll_fn(|cx| Poll::Ready(settled.as_mut().poll(cx).is_pending())).await {
                tokio::time::advance(A_WHILE).await;
                thread::yield_now();
            }
        });
        for node in &nodes {
            assert!(node.storage.is_empty(), "something is left on a node");
        }
    });
}

fn name() -> LockName {
    LockName::parse("lock", "lock:key").expect("a name")
}

fn token(number: u64) -> OwnerToken {
    OwnerToken::new(1, number)
}

async fn acquire(redlock: &Redlock, number: u64) -> bool {
    let request = AcquireRequest {
        name: name(),
        token: token(number),
        ttl: TTL,
        again: false,
        repeated: false,
        queue: None,
        hint: None,
        fencing: 0,
        given_up: GivenUp::default(),
    };
    let reply = redlock.acquire(&request).await;
    matches!(reply, Ok(AcquireReply::Granted { .. }))
}

async fn release(redlock: &Redlock, number: u64) {
    let request = ReleaseRequest {
        name: name(),
        token: token(number),
        ttl: TTL,
        wanted: None,
        requeue: None,
        quiet: false,
    };
    let _ = redlock.release(&request).await;
}

/// Comes by a few times while the others are at it.
fn time_passes() -> thread::JoinHandle<()> {
    thread::spawn(|| {
        for _ in 0..3 {
            block_on(tokio::time::advance(A_WHILE));
            thread::yield_now();
        }
    })
}

fn opens(node: &Node) -> thread::JoinHandle<()> {
    node.is_open.send_replace(false);
    let node = node.clone();
    thread::spawn(move || {
        node.is_open.send_replace(true);
    })
}

pub(crate) fn late_grants() {
    with_nodes(|redlock, nodes| {
        nodes[2].failing.store(2, SeqCst);
        let opens = opens(&nodes[2]);
        let redlock = redlock.clone();
        let holds = thread::spawn(move || {
            block_on(async {
                assert!(acquire(&redlock, 1).await, "two of three are there");
                let passes = time_passes();
                for _ in 0..4 {
                    thread::yield_now();
                }
                release(&redlock, 1).await;
                join(vec![passes]);
            });
        });
        join(vec![opens, holds]);
    });
}

pub(crate) fn one_of_all() {
    with_nodes(|redlock, nodes| {
        let inside = Inside::default();
        let mut threads = vec![opens(&nodes[1])];
        for number in 1..=3 {
            let (redlock, inside) = (redlock.clone(), inside.clone());
            threads.push(thread::spawn(move || {
                block_on(async {
                    if acquire(&redlock, number).await {
                        inside.visit();
                    }
                    release(&redlock, number).await;
                });
            }));
        }
        join(threads);
    });
}

pub(crate) fn healed_and_released() {
    with_nodes(|redlock, nodes| {
        block_on(async { assert!(acquire(redlock, 1).await) });
        nodes[2].storage.clear();
        let (renews, releases) = (redlock.clone(), redlock.clone());
        let renewal = RenewRequest {
            name: name(),
            token: token(1),
            ttl: TTL,
        };
        join(vec![
            thread::spawn(move || {
                block_on(renews.renew(&[renewal]));
            }),
            thread::spawn(move || block_on(release(&releases, 1))),
        ]);
    });
}
