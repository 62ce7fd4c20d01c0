//! A lock server in the simulated network, and the [`LockStorage`] of the replicas, which speaks to it.
//!
//! The server is a [`MemoryStorage`]. It is asked over one connection, and says who has been given
//! a lock over another, so that messages and replies may overtake each other. A frame on the wire is
//! eight bytes: the number under which the two sides find what it says.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Poll, Waker},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, timeout, timeout_at},
};
use tower_distributed_lock::{
    Clock,
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockName, LockRecord, LockStorage,
        MemoryStorage, Message, OwnerToken, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest, Stamp, Survey, SurveyRequest,
    },
};

use crate::{
    history::History,
    net::{HostId, Net, Stream, Writer},
};

const PING: Duration = Duration::from_millis(8);
/// Who has been silent for so long has gone.
const SILENCE: Duration = Duration::from_millis(30);

enum Frame {
    Call(u64, Call),
    Reply(u64, Reply),
    /// From now on this connection is for the messages to this inbox.
    Listen(u128, Arc<str>),
    Listening,
    Message(Message),
    Ping,
    Pong,
}

#[derive(Clone)]
enum Call {
    Acquire(AcquireRequest),
    Renew(Vec<RenewRequest>),
    Release(ReleaseRequest),
    Raise(RaiseRequest),
    Survey(SurveyRequest),
    Look(LockName),
    Tell(u128, String),
}

enum Reply {
    Acquire(AcquireReply),
    Renew(Vec<RenewReply>),
    Release(ReleaseReply),
    Raise(RaiseReply),
    Survey(Survey),
    Look(Option<LockRecord>),
    Tell(bool),
}

/// What the numbers on the wire stand for.
#[derive(Clone, Default)]
pub struct Frames(Arc<Mutex<(u64, HashMap<u64, Frame>)>>);

impl Frames {
    fn send(&self, writer: &Writer, frame: Frame) -> io::Result<()> {
        let number = {
            let mut frames = self.0.lock().unwrap();
            frames.0 += 1;
            let number = frames.0;
            frames.1.insert(number, frame);
            number
        };
        writer.send(&number.to_be_bytes())
    }

    async fn receive(&self, stream: &Stream) -> io::Result<Frame> {
        let number = u64::from_be_bytes(stream.read_exactly().await?);
        let frame = self.0.lock().unwrap().1.remove(&number);
        frame.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

// --- the replica's side --------------------------------------------------------------------------

/// The storage of one process.
#[derive(Clone)]
pub struct Remote {
    net: Net,
    frames: Frames,
    from: HostId,
    to: HostId,
    wire: Arc<Mutex<Wire>>,
    connected: Arc<Notify>,
}

#[derive(Default)]
struct Wire {
    writer: Option<Writer>,
    next: u64,
    calls: HashMap<u64, oneshot::Sender<Reply>>,
}

impl Remote {
    /// A storage of the process on the host `from`, which asks the server on the host `to`. Has to
    /// be made on that process's runtime.
    pub fn start(net: Net, frames: Frames, from: HostId, to: HostId) -> Self {
        let remote = Self {
            net,
            frames,
            from,
            to,
            wire: Arc::default(),
            connected: Arc::default(),
        };
        let this = remote.clone();
        tokio::spawn(async move { this.stay_connected().await });
        remote
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap()
    }

    async fn stay_connected(&self) {
        loop {
            if let Ok(Ok(stream)) = timeout(SILENCE, self.net.connect(self.from, self.to)).await {
                self.wire().writer = Some(stream.writer());
                self.connected.notify_waiters();
                self.listen_on(&stream, |frame| {
                    if let Frame::Reply(number, reply) = frame
                        && let Some(caller) = self.wire().calls.remove(&number)
                    {
                        let _ = caller.send(reply);
                    }
                })
                .await;
                let mut wire = self.wire();
                wire.writer = None;
                // Whoever waits for a reply learns that there will be none.
                let calls = std::mem::take(&mut wire.calls);
                drop(wire);
                drop(calls);
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Hands over what comes until the connection is of no more use.
    async fn listen_on(&self, stream: &Stream, mut deliver: impl FnMut(Frame)) {
        let writer = stream.writer();
        let mut silent = Duration::ZERO;
        let mut ping = Instant::now() + PING;
        loop {
            match timeout_at(ping, self.frames.receive(stream)).await {
                Ok(Ok(frame)) => {
                    silent = Duration::ZERO;
                    deliver(frame);
                }
                Ok(Err(_)) => return,
                Err(_) => {
                    silent += PING;
                    ping = Instant::now() + PING;
                    if silent >= SILENCE || self.frames.send(&writer, Frame::Ping).is_err() {
                        return;
                    }
                }
            }
        }
    }

    async fn call(&self, call: Call) -> Result<Reply, StorageError> {
        let reply = loop {
            let connected = self.connected.notified();
            tokio::pin!(connected);
            connected.as_mut().enable();
            let writer = self.wire().writer.clone();
            if let Some(writer) = writer {
                let (sender, reply) = oneshot::channel();
                let number = {
                    let mut wire = self.wire();
                    wire.next += 1;
                    let number = wire.next;
                    wire.calls.insert(number, sender);
                    number
                };
                if self
                    .frames
                    .send(&writer, Frame::Call(number, call))
                    .is_err()
                {
                    self.wire().calls.remove(&number);
                }
                break reply;
            }
            connected.await;
        };
        let gone =
            |_| StorageError::with_source(StorageErrorKind::Unavailable, "the connection broke");
        reply.await.map_err(gone)
    }
}

fn nonsense() -> StorageError {
    StorageError::new(StorageErrorKind::Rejected)
}

impl LockStorage for Remote {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        match self.call(Call::Acquire(request.clone())).await? {
            Reply::Acquire(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        match self.call(Call::Renew(requests.to_vec())).await {
            Ok(Reply::Renew(replies)) => replies.into_iter().map(Ok).collect(),
            Ok(_) => vec![Err(nonsense()); requests.len()],
            Err(error) => vec![Err(error); requests.len()],
        }
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        match self.call(Call::Release(request.clone())).await? {
            Reply::Release(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }

    async fn listen(&self, inbox: Inbox) {
        loop {
            if let Ok(Ok(stream)) = timeout(SILENCE, self.net.connect(self.from, self.to)).await {
                let hello = Frame::Listen(inbox.id(), inbox.prefix().into());
                let _ = self.frames.send(&stream.writer(), hello);
                self.listen_on(&stream, |frame| match frame {
                    Frame::Listening => inbox.deliver(Message::Listening),
                    Frame::Message(message) => inbox.deliver(message),
                    _ => {}
                })
                .await;
                inbox.deliver(Message::Deaf);
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        match self.call(Call::Raise(request.clone())).await? {
            Reply::Raise(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }

    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        match self.call(Call::Survey(request.clone())).await? {
            Reply::Survey(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        match self.call(Call::Look(name.clone())).await? {
            Reply::Look(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }

    async fn tell(&self, _: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        match self.call(Call::Tell(inbox, text.to_owned())).await? {
            Reply::Tell(reply) => Ok(reply),
            _ => Err(nonsense()),
        }
    }
}

// --- the server's side ---------------------------------------------------------------------------

/// The lock server.
#[derive(Clone)]
pub struct Server {
    net: Net,
    frames: Frames,
    host: HostId,
    clock: Clock,
    history: History,
    store: Arc<Mutex<Store>>,
}

struct Store {
    memory: MemoryStorage,
    started: Instant,
    run: Arc<Run>,
    /// Who listens.
    sessions: HashMap<u128, Session>,
    /// The last request for each lock: for a look at what is left.
    seen: Vec<AcquireRequest>,
    queues: Vec<(LockName, Order)>,
    /// All processes that have asked for anything, in that order.
    processes: Vec<u128>,
}

/// From one loss of memory to the next.
struct Run {
    /// What the clock is called, as far as it can be told from those before.
    number: AtomicU64,
    /// Added to the tokens of the storage in memory, which start at the time of day.
    offset: u64,
    /// The first of them.
    first: AtomicU64,
}

/// A process that listens. The future is dropped with it, and then it is passed over.
#[derive(Clone)]
struct Session(Arc<Mutex<Listening>>);

#[derive(Default)]
struct Listening {
    future: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    waker: Option<Waker>,
}

impl Session {
    fn end(&self) {
        let (future, waker) = {
            let mut this = self.0.lock().unwrap();
            (this.future.take(), this.waker.take())
        };
        drop(future);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn run(self) {
        poll_fn(|cx| {
            let mut this = self.0.lock().unwrap();
            this.waker = Some(cx.waker().clone());
            match &mut this.future {
                Some(future) => future.as_mut().poll(cx),
                None => Poll::Ready(()),
            }
        })
        .await;
    }
}

impl Server {
    /// Has to be made on its host's runtime.
    pub fn start(net: Net, frames: Frames, host: HostId, history: History) -> Self {
        let clock = Clock::tokio();
        let server = Self {
            net,
            frames,
            host,
            clock,
            store: Arc::new(Mutex::new(Store {
                memory: MemoryStorage::with_clock(clock),
                started: Instant::now(),
                run: Arc::new(Run::new(1, 0)),
                sessions: HashMap::new(),
                seen: Vec::new(),
                queues: Vec::new(),
                processes: Vec::new(),
            })),
            history,
        };
        let this = server.clone();
        tokio::spawn(async move {
            loop {
                let stream = this.net.accept(this.host).await;
                let this = this.clone();
                tokio::spawn(async move { this.serve(stream).await });
            }
        });
        server
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    /// It is started again at `now` microseconds, with or without what it knew.
    pub fn restarted(&self, forgets: bool, now: u64) {
        let mut store = self.store();
        let sessions: Vec<_> = store.sessions.drain().map(|(_, session)| session).collect();
        store.queues.clear();
        if forgets {
            let number = store.run.number.load(Relaxed);
            store.memory = MemoryStorage::with_clock(self.clock);
            store.run = Arc::new(Run::new(number, now));
        }
        store.run.number.fetch_add(1, Relaxed);
        drop(store);
        sessions.iter().for_each(Session::end);
    }

    async fn serve(&self, stream: Stream) {
        let writer = stream.writer();
        let mut inbox = None;
        while let Ok(Ok(frame)) = timeout(SILENCE, self.frames.receive(&stream)).await {
            let sent = match frame {
                Frame::Call(number, call) => {
                    let reply = self.answer(call);
                    self.frames.send(&writer, Frame::Reply(number, reply))
                }
                Frame::Listen(id, prefix) => {
                    inbox = Some((id, self.open(id, prefix, writer.clone())));
                    self.frames.send(&writer, Frame::Listening)
                }
                Frame::Ping => self.frames.send(&writer, Frame::Pong),
                _ => Ok(()),
            };
            if sent.is_err() {
                break;
            }
        }
        if let Some((id, session)) = inbox {
            self.close(id, &session);
        }
    }

    fn open(&self, id: u128, prefix: Arc<str>, writer: Writer) -> Session {
        let mut store = self.store();
        let old = store.sessions.remove(&id);
        let (memory, run) = (store.memory.clone(), Arc::clone(&store.run));
        let this = self.clone();
        let inbox = Inbox::new(id, prefix, move |message| {
            let message = match message {
                // That it listens is said by the server.
                Message::Listening => return,
                Message::Granted(mut grant) => {
                    this.store()
                        .granted(&grant.name, grant.token, grant.stamp.at, &this.history);
                    grant.stamp = run.stamp(grant.stamp);
                    grant.fencing = run.tokens(grant.fencing);
                    Message::Granted(grant)
                }
                other => other,
            };
            let _ = this.frames.send(&writer, Frame::Message(message));
        });
        drop(store);
        if let Some(old) = old {
            old.end();
        }
        let listening = async move { memory.listen(inbox).await };
        let session = Session(Arc::new(Mutex::new(Listening {
            future: Some(Box::pin(listening)),
            waker: None,
        })));
        self.store().sessions.insert(id, session.clone());
        tokio::spawn(session.clone().run());
        // It listens from its first poll on.
        let mut cx = std::task::Context::from_waker(Waker::noop());
        if let Some(future) = &mut session.0.lock().unwrap().future {
            let _ = future.as_mut().poll(&mut cx);
        }
        session
    }

    fn close(&self, id: u128, session: &Session) {
        session.end();
        let mut store = self.store();
        let is_last = store
            .sessions
            .get(&id)
            .is_some_and(|last| Arc::ptr_eq(&last.0, &session.0));
        if is_last {
            store.sessions.remove(&id);
            for (_, order) in &mut store.queues {
                order.waiting.retain(|place| place.token.inbox() != id);
            }
        }
    }

    fn answer(&self, call: Call) -> Reply {
        let (memory, run) = {
            let store = self.store();
            (store.memory.clone(), Arc::clone(&store.run))
        };
        match call {
            Call::Acquire(request) => {
                let reply = at_once(memory.acquire(&request));
                let mut store = self.store();
                let label = store.label(request.token);
                self.history.log(format_args!(
                    "server   {} is asked for by {label}: {}",
                    request.name,
                    short(&reply)
                ));
                store.seen.retain(|seen| seen.name != request.name);
                store.seen.push(request.clone());
                Reply::Acquire(match reply {
                    AcquireReply::Granted { fencing, .. } => {
                        store.granted(&request.name, request.token, Duration::MAX, &self.history);
                        reply.with_fencing(run.tokens(fencing))
                    }
                    AcquireReply::Held {
                        ttl,
                        queued: Some(stamp),
                        ..
                    } => {
                        store.stands(&request.name, request.token, stamp);
                        AcquireReply::queued(ttl, run.stamp(stamp))
                    }
                    other => other,
                })
            }
            Call::Renew(requests) => {
                let replies = at_once(memory.renew(&requests).map(Ok));
                let replies = replies.into_iter().map(|reply| reply.unwrap());
                Reply::Renew(replies.collect())
            }
            Call::Release(request) => {
                let reply = at_once(memory.release(&request));
                let mut store = self.store();
                let label = store.label(request.token);
                self.history.log(format_args!(
                    "server   {} is released by {label}: {reply:?}",
                    request.name
                ));
                store.order(&request.name).leaves(request.token);
                Reply::Release(match reply {
                    ReleaseReply::Requeued { ttl, stamp } => {
                        if let Some(requeue) = &request.requeue {
                            store.stands(&request.name, requeue.token, stamp);
                        }
                        ReleaseReply::Requeued {
                            ttl,
                            stamp: run.stamp(stamp),
                        }
                    }
                    other => other,
                })
            }
            Call::Raise(mut request) => {
                request.above =
                    (request.above + run.first.load(Relaxed)).saturating_sub(run.offset);
                Reply::Raise(at_once(memory.raise(&request)))
            }
            Call::Survey(request) => Reply::Survey(at_once(memory.survey(&request))),
            Call::Look(name) => Reply::Look(at_once(memory.look(&name))),
            Call::Tell(inbox, text) => Reply::Tell(at_once(memory.tell("", inbox, &text))),
        }
    }

    /// How many locks are held.
    pub fn held(&self) -> usize {
        self.store().memory.len()
    }

    /// The locks that are not there for whoever comes. Takes them all.
    pub fn left(&self) -> Vec<String> {
        let (seen, memory) = {
            let store = self.store();
            (store.seen.clone(), store.memory.clone())
        };
        let mut left = Vec::new();
        for mut request in seen {
            request.token = OwnerToken::from_text("1:1").unwrap();
            (
                request.queue,
                request.hint,
                request.fencing,
                request.repeated,
            ) = (None, None, 0, false);
            let reply = at_once(memory.acquire(&request));
            if reply != AcquireReply::granted() {
                left.push(format!("{:?}: {reply:?}", request.name));
            }
        }
        left
    }
}

fn short(reply: &AcquireReply) -> &'static str {
    match reply {
        AcquireReply::Granted { .. } => "granted",
        AcquireReply::Held { queued: None, .. } => "held",
        AcquireReply::Held { .. } => "queued",
        _ => "unknown",
    }
}

/// The storage in memory keeps nobody waiting.
fn at_once<T>(call: impl Future<Output = Result<T, StorageError>>) -> T {
    call.now_or_never().unwrap().unwrap()
}

impl Run {
    fn new(number: u64, offset: u64) -> Self {
        Self {
            number: number.into(),
            offset,
            first: 0.into(),
        }
    }

    fn stamp(&self, stamp: Stamp) -> Stamp {
        Stamp {
            run: Some(self.number.load(Relaxed).into()),
            ..stamp
        }
    }

    fn tokens(&self, block: Option<FencingBlock>) -> Option<FencingBlock> {
        let block = block?;
        let _ = self
            .first
            .compare_exchange(0, block.first, Relaxed, Relaxed);
        let first = self.offset + 1 + block.first - self.first.load(Relaxed);
        Some(FencingBlock { first, ..block })
    }
}

/// Who waits for a lock, in the server's own order, and what others were given meanwhile.
#[derive(Default)]
struct Order {
    owner: Option<OwnerToken>,
    /// Since when, by the server's clock.
    owned_since: Duration,
    waiting: Vec<Waiting>,
}

struct Waiting {
    token: OwnerToken,
    /// By the server's clock.
    since: Duration,
    passed: Vec<u128>,
}

impl Order {
    fn stands(&mut self, token: OwnerToken, stamp: Stamp) {
        if self.waiting.iter().all(|place| place.token != token) {
            self.waiting.push(Waiting {
                token,
                since: stamp.at,
                passed: Vec::new(),
            });
        }
    }

    fn leaves(&mut self, token: OwnerToken) {
        self.waiting.retain(|place| place.token != token);
    }
}

impl Store {
    /// What a token is called in the log.
    fn label(&mut self, token: OwnerToken) -> String {
        let known = self
            .processes
            .iter()
            .position(|known| *known == token.inbox());
        let process = known.unwrap_or_else(|| {
            self.processes.push(token.inbox());
            self.processes.len() - 1
        });
        let text = token.to_text();
        let number = text.split_once(':').map_or("", |(_, number)| number);
        format!("{number} of process {process}")
    }

    fn order(&mut self, name: &LockName) -> &mut Order {
        let known = self.queues.iter().position(|(known, _)| known == name);
        let index = known.unwrap_or_else(|| {
            self.queues.push((name.clone(), Order::default()));
            self.queues.len() - 1
        });
        &mut self.queues[index].1
    }

    /// Somebody who cannot be told is passed over.
    fn stands(&mut self, name: &LockName, token: OwnerToken, stamp: Stamp) {
        if self.sessions.contains_key(&token.inbox()) {
            self.order(name).stands(token, stamp);
        }
    }

    /// No process is given a lock twice while another waits for it.
    fn granted(&mut self, name: &LockName, token: OwnerToken, at: Duration, history: &History) {
        let label = self.label(token);
        history.log(format_args!("server   {name} is held by {label}"));
        let now = self.started.elapsed();
        let order = self.order(name);
        if let Some(owner) = order.owner.filter(|owner| *owner != token) {
            let others = order.waiting.iter();
            let others = others.filter(|place| place.token.inbox() != owner.inbox());
            if let Some(since) = others.map(|place| place.since).min() {
                history.kept(now.saturating_sub(since.max(order.owned_since)));
            }
        }
        if order.owner != Some(token) {
            order.owned_since = now;
        }
        order.leaves(token);
        if order.owner.replace(token) == Some(token) {
            return;
        }
        for place in &mut order.waiting {
            if place.token.inbox() == token.inbox() || place.since >= at {
                continue;
            }
            if place.passed.contains(&token.inbox()) {
                history.violated("a process was given a lock twice while another waited for it");
            }
            place.passed.push(token.inbox());
        }
    }
}
