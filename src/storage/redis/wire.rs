//! One connection to a server, and what has been found out over it.
//!
//! Commands of many tasks go through it, in the order in which they were sent, and into the same
//! write where they come together (`pipe.rs`).

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use redis::{Cmd, Value};

use super::{
    error::{Failure, value},
    health::{Health, Unanswered},
    own_pool::OwnConnection,
    pipe::{self, Pipe},
    sentinel::{Master, Sentinels},
    slot::Counters,
};

/// For how long a fencing counter that was right stays so, if it is not used. In less time no server
/// is demoted, falls behind another and is promoted again, without its connections being closed.
const RIGHT: Duration = Duration::from_secs(2);

/// How commands get to a server.
#[derive(Clone)]
pub(super) enum Link {
    Pipe(Pipe),
    /// Over what a pool of the user's has made.
    OwnPool(OwnConnection),
}

impl Link {
    /// See [`Pipe::call`].
    pub(super) fn call<const N: usize>(&self, commands: [Cmd; N]) -> pipe::Reply {
        match self {
            Self::Pipe(pipe) => pipe.call(commands),
            Self::OwnPool(connection) => connection.call(commands),
        }
    }
}

/// One connection and what is known of it.
pub(super) struct Wire {
    link: Link,
    health: Arc<Health>,
    origin: Origin,
    /// Which run of the server it leads to, if it tells.
    server_run: Option<u128>,
    /// What has been found out of the server over this connection.
    known: AtomicU8,
    /// When the fencing counter was last known to be right, or not long after that: in nanoseconds
    /// since the connection was made.
    counter_right: AtomicU64,
    /// What Sentinel knew of the server when the connection was made.
    master: Option<Master>,
    /// The fencing counters, if the server is a node of a cluster.
    counters: Option<Arc<Counters>>,
    /// That each command is for a slot that is on its way to this node.
    asking: bool,
}

/// Where a reply comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    wire: u64,
    /// Which run of the server's clock it was, if it tells. Not known where messages may come from
    /// other servers.
    pub(super) clock: Option<u128>,
}

/// Something that can be found out of a server, and is forgotten with the connection.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Fact {
    HasAcquireScript = 1,
    HasRenewScript = 2,
    HasFreeScript = 4,
    HasReleaseScript = 8,
    /// The fencing counter is above all tokens that were ever given. To be learned with each use of
    /// it: forgotten if it is not used for a while.
    CounterIsRight = 16,
    HasRaiseScript = 32,
}

impl Wire {
    pub(super) async fn new(
        link: Link,
        health: Arc<Health>,
        master: Option<Master>,
        counters: Option<Arc<Counters>>,
    ) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let server_run = link.call([run_query()]).await.ok().and_then(run_of);
        let origin = Origin {
            wire: NUMBER.fetch_add(1, Relaxed),
            // A message may have come from another node.
            clock: server_run.filter(|_| master.is_none() && counters.is_none()),
        };
        Arc::new(Self {
            link,
            health,
            origin,
            server_run,
            known: AtomicU8::new(0),
            counter_right: AtomicU64::new(0),
            master,
            counters,
            asking: false,
        })
    }

    /// The same connection, for commands about a slot that is on its way to this node.
    pub(super) fn asking(&self) -> Self {
        Self {
            link: self.link.clone(),
            health: Arc::clone(&self.health),
            origin: self.origin,
            server_run: self.server_run,
            known: AtomicU8::new(self.known.load(Relaxed)),
            counter_right: AtomicU64::new(0),
            master: None,
            counters: self.counters.clone(),
            asking: true,
        }
    }

    /// The fencing counters, if the server is a node of a cluster.
    pub(super) fn counters(&self) -> Option<&Counters> {
        self.counters.as_deref()
    }

    /// Sends a command, or several that follow each other in one write; then the reply is an array
    /// of the replies to each (see [`value`](super::error::value)), and commands of other clients
    /// may be carried out between them. How long it may take, is the caller's business.
    pub(super) fn send<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        if !self.asking {
            return Reply {
                reply: self.link.call(commands),
                only_last: false,
            };
        }
        // `ASKING` counts for the next command only. In a cluster, commands go by themselves.
        debug_assert!(N == 1, "one command for a slot on its way");
        let command = commands.into_iter().next().unwrap_or_default();
        Reply {
            reply: self.link.call([redis::cmd("ASKING"), command]),
            only_last: true,
        }
    }

    /// The same for a command that tells another client something, which is to hear of it first.
    ///
    /// A server writes to its clients in turn, from the one to which it last began to have something to say; a message comes
    /// before the reply to what sent it, and so is written after it. With a reply before both it is the other way
    /// round. Half of the way of a lock to the next process is sleeping threads: the one that waits for the lock should not
    /// be woken behind one that has done with it.
    pub(super) fn send_telling(&self, command: Cmd) -> Reply {
        if self.asking {
            return self.send([command]);
        }
        Reply {
            reply: self.link.call([redis::cmd("PING"), command]),
            only_last: true,
        }
    }

    /// The same, and waits for the reply.
    pub(super) async fn run<const N: usize>(&self, commands: [Cmd; N]) -> Result<Value, Failure> {
        let unanswered = Unanswered::new(|| self.given_up());
        let answer = self.send(commands).await;
        unanswered.answered();
        answer
    }

    /// A call was given up.
    pub(super) fn given_up(&self) {
        self.health.given_up();
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Which run of the server it leads to, if it tells.
    pub(super) fn server_run(&self) -> Option<u128> {
        self.server_run
    }

    /// Whether the reply came over this connection.
    pub(super) fn is_at(&self, origin: Origin) -> bool {
        self.origin.wire == origin.wire
    }

    /// Whether Sentinel has put this master in the place of the server it leads to.
    pub(super) fn is_replaced_by(&self, master: &Master) -> bool {
        self.master.as_ref().is_some_and(|old| master.replaces(old))
    }

    /// Whether they have put another master in the place of the server it leads to.
    pub(super) fn is_behind(&self, sentinels: &Sentinels) -> bool {
        let replaced = |master| sentinels.have_replaced(master);
        self.master.as_ref().is_some_and(replaced)
    }

    pub(super) fn is_dead(&self) -> bool {
        self.health.is_dead()
    }

    /// Nobody is to use it any more.
    pub(super) fn leave(&self) {
        self.health.kill();
    }

    pub(super) fn knows(&self, fact: Fact) -> bool {
        // A slot may go to another node, lose some of its counter in a failover there, and come back.
        let in_cluster = self.counters.is_some();
        self.known.load(Relaxed) & fact as u8 != 0
            && (!matches!(fact, Fact::CounterIsRight) || (!in_cluster && self.counter_is_fresh()))
    }

    /// Remembers what was found out.
    pub(super) fn learn(&self, fact: Fact) {
        if matches!(fact, Fact::CounterIsRight) {
            // A reply has just come.
            let now = self.health.last_heard();
            let right = Duration::from_nanos(self.counter_right.load(Relaxed));
            if now.saturating_sub(right) > RIGHT / 16 {
                self.counter_right.store(now.as_nanos() as u64, Relaxed);
            }
        }
        // Written only when it is news: other cores read it for each call.
        if self.known.load(Relaxed) & fact as u8 == 0 {
            self.known.fetch_or(fact as u8, Relaxed);
        }
    }

    /// It may not be so any more.
    pub(super) fn unlearn(&self, fact: Fact) {
        self.known.fetch_and(!(fact as u8), Relaxed);
    }

    fn counter_is_fresh(&self) -> bool {
        let right = Duration::from_nanos(self.counter_right.load(Relaxed));
        self.health.age().saturating_sub(right) < RIGHT
    }
}

/// The reply to what was sent over a [`Wire`]. Dropped, it may be carried out or not.
pub(super) struct Reply {
    reply: pipe::Reply,
    only_last: bool,
}

impl Future for Reply {
    type Output = Result<Value, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let reply = ready!(Pin::new(&mut self.reply).poll(cx));
        Poll::Ready(match reply.map_err(Failure::from).and_then(value) {
            Ok(Value::Array(mut replies)) if self.only_last => match replies.pop() {
                Some(last) => value(last),
                None => Ok(Value::Nil),
            },
            reply => reply,
        })
    }
}

/// Asks for [`run_of`].
pub(super) fn run_query() -> Cmd {
    let mut info = redis::cmd("INFO");
    info.arg("server");
    info
}

/// The id of the server's run: it changes with every start, and every server has its own. Not every
/// user may ask for it.
pub(super) fn run_of(info: Value) -> Option<u128> {
    let info: String = redis::from_redis_value(info).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("run_id:"))?;
    u128::from_str_radix(id.trim().get(..32)?, 16).ok()
}
