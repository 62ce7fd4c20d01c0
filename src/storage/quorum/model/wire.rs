//! The nodes, and what is on its way between them and the processes.

use std::collections::{HashMap, HashSet};

use tokio::sync::oneshot;

use super::super::*;
use crate::storage::{GivenUp, OwnerToken};

/// What a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum What {
    Acquire,
    Raise,
    Renew,
    Release,
}

/// A call, by what does not depend on the order of what has nothing to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct CallId {
    pub(super) process: u8,
    pub(super) node: u8,
    pub(super) what: What,
    /// The number of its token.
    pub(super) token: u64,
    /// How many of the same were sent before.
    pub(super) nth: u8,
}

#[derive(Clone, Debug)]
pub(super) enum Request {
    Acquire(AcquireRequest),
    Raise(RaiseRequest),
    Renew(RenewRequest),
    Release(ReleaseRequest),
}

impl Request {
    pub(super) fn token(&self) -> OwnerToken {
        match self {
            Self::Acquire(request) => request.token,
            Self::Raise(request) => request.token,
            Self::Renew(request) => request.token,
            Self::Release(request) => request.token,
        }
    }

    fn what(&self) -> What {
        match self {
            Self::Acquire(_) => What::Acquire,
            Self::Raise(_) => What::Raise,
            Self::Renew(_) => What::Renew,
            Self::Release(_) => What::Release,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Reply {
    Acquire(AcquireReply),
    Raise(RaiseReply),
    Renew(RenewReply),
    Release(ReleaseReply),
    Refused,
}

impl Reply {
    /// All that a process can learn from it.
    pub(super) fn word(&self) -> u64 {
        let (kind, rest) = match self {
            Self::Acquire(AcquireReply::Granted { fencing, .. }) => {
                (1, fencing.map_or(0, |block| block.first))
            }
            Self::Acquire(AcquireReply::Held { ttl, .. }) => {
                (2, ttl.map_or(0, |ttl| ttl.as_millis() as u64))
            }
            Self::Acquire(_) => unreachable!("not of a node"),
            Self::Raise(RaiseReply::Raised) => (3, 0),
            Self::Raise(RaiseReply::NotOurs) => (4, 0),
            Self::Renew(RenewReply::NotOurs) => (5, 0),
            Self::Renew(_) => (6, 0),
            Self::Release(ReleaseReply::NotOurs) => (7, 0),
            Self::Release(_) => (8, 0),
            Self::Refused => (9, 0),
        };
        kind << 56 | rest
    }
}

/// Milliseconds since the world began.
pub(super) type Time = u32;

/// One lock of a server, and its counter. It does what [`MemoryStorage`](crate::storage::MemoryStorage)
/// does, but can be looked at as a whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) owner: Option<(OwnerToken, Time)>,
    pub(super) counter: u64,
    /// It carries out nothing before.
    pub(super) away_until: Time,
}

impl Node {
    pub(super) fn new(counter: u64) -> Self {
        Self {
            owner: None,
            counter,
            away_until: 0,
        }
    }

    pub(super) fn owner(&self, now: Time) -> Option<(OwnerToken, Time)> {
        self.owner.filter(|(_, until)| *until > now)
    }

    pub(super) fn carry_out(&mut self, request: &Request, now: Time) -> Reply {
        let owner = self.owner(now);
        let is_ours = owner.is_some_and(|(token, _)| token == request.token());
        let until = |ttl: Duration| now + ttl.as_millis() as Time;
        match request {
            Request::Acquire(request) => {
                if let Some((_, until)) = owner
                    && !is_ours
                {
                    let ttl = Duration::from_millis((until - now).into());
                    return Reply::Acquire(AcquireReply::held(Some(ttl)));
                }
                self.owner = Some((request.token, until(request.ttl)));
                let block = FencingBlock {
                    first: self.counter + 1,
                    count: request.fencing,
                };
                self.counter += u64::from(request.fencing);
                let block = (request.fencing > 0).then_some(block);
                Reply::Acquire(AcquireReply::granted().with_fencing(block))
            }
            Request::Raise(_) if !is_ours => Reply::Raise(RaiseReply::NotOurs),
            Request::Raise(request) => {
                self.counter = self.counter.max(request.above);
                Reply::Raise(RaiseReply::Raised)
            }
            Request::Renew(_) if !is_ours => Reply::Renew(RenewReply::NotOurs),
            Request::Renew(request) => {
                self.owner = Some((request.token, until(request.ttl)));
                Reply::Renew(RenewReply::Renewed)
            }
            Request::Release(_) if !is_ours => Reply::Release(ReleaseReply::NotOurs),
            Request::Release(_) => {
                self.owner = None;
                Reply::Release(ReleaseReply::Released)
            }
        }
    }
}

/// A call on its way.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) id: CallId,
    pub(super) request: Request,
    pub(super) at: Time,
    /// It has been carried out, and this is on its way back.
    pub(super) answer: Option<Reply>,
    pub(super) caller: oneshot::Sender<Reply>,
}

/// All that is on its way.
#[derive(Debug, Default)]
pub(super) struct Wire {
    pub(super) now: Time,
    pub(super) calls: Vec<Sent>,
    /// So many have been sent.
    pub(super) number: usize,
    sent: HashMap<(u8, u8, What, u64), u8>,
    /// Tokens that their processes do not want any more.
    pub(super) given_up: HashSet<OwnerToken>,
    /// What a process has sent that it must not send.
    pub(super) broken: Option<String>,
}

impl Wire {
    fn send(&mut self, process: u8, node: u8, request: Request) -> oneshot::Receiver<Reply> {
        let (what, token) = (request.what(), request.token());
        let is_over = self.given_up.contains(&token);
        // A renewal that comes too late finds nothing that is its own.
        if what != What::Renew && is_over != (what == What::Release) {
            let when = if is_over { "after" } else { "before" };
            let text = format!("a process sends {what:?} {when} its token was given up");
            self.broken.get_or_insert(text);
        }
        let number = token.number();
        let nth = self.sent.entry((process, node, what, number)).or_default();
        let id = CallId {
            process,
            node,
            what,
            token: number,
            nth: *nth,
        };
        *nth += 1;
        self.number += 1;
        let (caller, heard) = oneshot::channel();
        self.calls.push(Sent {
            id,
            request,
            at: self.now,
            answer: None,
            caller,
        });
        heard
    }

    pub(super) fn find(&mut self, id: CallId) -> &mut Sent {
        let call = self.calls.iter_mut().find(|call| call.id == id);
        call.expect("a call that is on its way")
    }

    pub(super) fn take(&mut self, id: CallId) -> Sent {
        let index = self.calls.iter().position(|call| call.id == id);
        self.calls
            .swap_remove(index.expect("a call that is on its way"))
    }
}

/// The way of one process to one node.
pub(super) struct Line {
    pub(super) wire: Arc<Mutex<Wire>>,
    pub(super) process: u8,
    pub(super) node: u8,
}

impl Line {
    async fn call(&self, request: Request) -> Reply {
        let heard = {
            let mut wire = self.wire.lock().unwrap();
            wire.send(self.process, self.node, request)
        };
        match heard.await {
            Ok(reply) => reply,
            // Lost: who waits for it learns nothing.
            Err(_) => std::future::pending().await,
        }
    }
}

fn refused() -> StorageError {
    StorageError::new(StorageErrorKind::Unavailable)
}

impl LockStorage for Line {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        match self.call(Request::Acquire(request.clone())).await {
            Reply::Acquire(reply) => Ok(reply),
            _ => Err(refused()),
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let [request] = requests else {
            unreachable!("there is one lock")
        };
        match self.call(Request::Renew(request.clone())).await {
            Reply::Renew(reply) => vec![Ok(reply)],
            _ => vec![Err(refused())],
        }
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        match self.call(Request::Release(request.clone())).await {
            Reply::Release(reply) => Ok(reply),
            _ => Err(refused()),
        }
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        match self.call(Request::Raise(request.clone())).await {
            Reply::Raise(reply) => Ok(reply),
            _ => Err(refused()),
        }
    }
}

/// Panics if some call has another answer than a storage in memory gives.
pub(super) async fn agrees_with_memory() {
    use crate::{
        clock::Clock,
        key::{KeyPrefix, LockKey},
        storage::MemoryStorage,
    };

    fastrand::seed(1);
    let name = KeyPrefix::default().name(&LockKey::from_parts(["k"]).unwrap());
    let memory = MemoryStorage::with_clock(Clock::tokio());
    memory.restart(0);
    let (mut node, mut now) = (Node::new(0), 0);
    let mut highest = 0;
    for _ in 0..5_000 {
        let passed = fastrand::u32(..4) * 50;
        tokio::time::advance(Duration::from_millis(passed.into())).await;
        now += passed;
        let token = OwnerToken::new(fastrand::u128(1..3), fastrand::u64(..2));
        let (name, ttl) = (name.clone(), Duration::from_millis(300));
        let (request, reply) = match fastrand::u8(..4) {
            0 => {
                let request = AcquireRequest {
                    name,
                    token,
                    ttl,
                    again: fastrand::bool(),
                    repeated: false,
                    queue: None,
                    hint: None,
                    fencing: fastrand::u32(..3),
                    given_up: GivenUp::default(),
                };
                let reply = memory.acquire(&request).await.unwrap();
                if let AcquireReply::Granted { fencing, .. } = reply {
                    highest = fencing.map_or(highest, |block| block.last());
                }
                (Request::Acquire(request), Reply::Acquire(reply))
            }
            1 => {
                let request = RenewRequest { name, token, ttl };
                let reply = memory.renew(std::slice::from_ref(&request)).await.remove(0);
                (Request::Renew(request), Reply::Renew(reply.unwrap()))
            }
            2 => {
                let request = ReleaseRequest {
                    name,
                    token,
                    ttl,
                    wanted: None,
                    requeue: None,
                    quiet: fastrand::bool(),
                };
                let reply = memory.release(&request).await.unwrap();
                (Request::Release(request), Reply::Release(reply))
            }
            _ => {
                let above = highest + fastrand::u64(..3);
                let request = RaiseRequest { name, token, above };
                let reply = memory.raise(&request).await.unwrap();
                (Request::Raise(request), Reply::Raise(reply))
            }
        };
        let answer = node.carry_out(&request, now);
        assert_eq!(answer.word(), reply.word(), "{request:?}");
    }
}
