//! A storage that fails, hangs and loses replies exactly as a test tells it to.

use std::{
    collections::{HashMap, VecDeque},
    future::{pending, poll_fn},
    sync::{Arc, Mutex, MutexGuard},
    task::Poll,
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, sleep},
};
use tower_distributed_lock::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockName, LockRecord, LockStorage, MemoryStorage,
        ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Survey, SurveyRequest,
    },
};

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Acquire,
    Renew,
    Release,
}

/// Keeps calls back until it is opened. Clones are the same valve.
#[derive(Clone)]
pub struct Valve(Arc<Semaphore>);

impl Valve {
    pub fn shut() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    pub fn open(&self) {
        self.0.close();
    }

    async fn passed(&self) {
        // A closed semaphore answers at once, with an error.
        let _ = self.0.acquire().await;
    }
}

/// A point at which a call may have to wait.
#[derive(Clone, Default)]
pub enum Gate {
    #[default]
    Open,
    /// Pending at the first poll, open at the second: what a call over a network does at the least.
    Once,
    Valve(Valve),
    /// Open after this long by a timer of tokio, which a call over a network has as well.
    Timer(Duration),
    Never,
}

impl Gate {
    async fn passed(&self) {
        match self {
            Self::Open => {}
            Self::Once => {
                let mut polled = false;
                poll_fn(|cx| {
                    if std::mem::replace(&mut polled, true) {
                        return Poll::Ready(());
                    }
                    cx.waker().wake_by_ref();
                    Poll::Pending
                })
                .await;
            }
            Self::Valve(valve) => valve.passed().await,
            Self::Timer(duration) => sleep(*duration).await,
            Self::Never => pending().await,
        }
    }
}

/// What becomes of one call: it waits at `send`, is carried out or not, waits at `reply`, and
/// answers or fails.
#[derive(Clone, Default)]
pub struct Fault {
    pub send: Gate,
    pub not_executed: bool,
    pub reply: Gate,
    pub error: Option<StorageErrorKind>,
}

impl Fault {
    /// Takes two more polls than it would, as a network does.
    pub fn slow() -> Self {
        Self {
            send: Gate::Once,
            reply: Gate::Once,
            ..Self::default()
        }
    }

    /// Takes this long, by a timer of tokio.
    pub fn timed(duration: Duration) -> Self {
        Self {
            send: Gate::Timer(duration),
            ..Self::default()
        }
    }

    /// Fails without having done anything.
    pub fn fails(kind: StorageErrorKind) -> Self {
        Self {
            not_executed: true,
            error: Some(kind),
            ..Self::default()
        }
    }

    /// Never reaches the storage, and never answers.
    pub fn hangs() -> Self {
        Self {
            send: Gate::Never,
            ..Self::default()
        }
    }

    /// Is carried out, and never answers.
    pub fn loses_its_reply() -> Self {
        Self {
            reply: Gate::Never,
            ..Self::default()
        }
    }

    /// Reaches the storage when the valve opens.
    pub fn sent_by(valve: &Valve) -> Self {
        Self {
            send: Gate::Valve(valve.clone()),
            ..Self::default()
        }
    }

    /// Is carried out at once and answers when the valve opens.
    pub fn answered_by(valve: &Valve) -> Self {
        Self {
            reply: Gate::Valve(valve.clone()),
            ..Self::default()
        }
    }
}

/// A break in the line: what becomes of the calls of one kind that are on their way when it comes,
/// and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// No break: they go through.
    None,
    /// Those not carried out yet never are, and never answer.
    SendHangs,
    /// Those not carried out yet never are, and fail.
    SendFails,
    /// They are carried out, and never answer.
    ReplyHangs,
    /// They are carried out, and fail.
    ReplyFails,
}

/// A call that was sent.
#[derive(Clone, Debug)]
pub struct Call {
    pub op: Op,
    /// The keys and the tokens; a renewal may have many, the others have one.
    pub locks: Vec<(String, String)>,
    pub at: Instant,
}

impl Call {
    pub fn token(&self) -> &str {
        &self.locks[0].1
    }
}

#[derive(Default)]
struct Script {
    next: HashMap<Op, VecDeque<Fault>>,
    always: HashMap<Op, Fault>,
    cut: HashMap<Op, Cut>,
    calls: Vec<Call>,
    acquires: Vec<AcquireRequest>,
}

/// A [`MemoryStorage`] behind a line that a test controls. Clones are the same storage and the same
/// line.
#[derive(Clone)]
pub struct FaultyStorage {
    memory: MemoryStorage,
    script: Arc<Mutex<Script>>,
    called: Arc<Notify>,
    listens: bool,
}

impl FaultyStorage {
    pub fn new(memory: MemoryStorage) -> Self {
        Self {
            memory,
            script: Arc::default(),
            called: Arc::default(),
            listens: false,
        }
    }

    /// The same with messages, which nothing holds up.
    pub fn listening(memory: MemoryStorage) -> Self {
        let listens = true;
        Self {
            listens,
            ..Self::new(memory)
        }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// What becomes of the next call of this kind that nothing is planned for.
    pub fn next(&self, op: Op, fault: Fault) {
        self.script().next.entry(op).or_default().push_back(fault);
    }

    /// What becomes of all calls of this kind that nothing else is planned for.
    pub fn always(&self, op: Op, fault: Fault) {
        self.script().always.insert(op, fault);
    }

    /// Breaks the line for one kind of call.
    pub fn cut(&self, op: Op, cut: Cut) {
        self.script().cut.insert(op, cut);
    }

    /// All calls go through from now on. Those that hang go on hanging.
    pub fn heal(&self) {
        let mut script = self.script();
        script.next.clear();
        script.always.clear();
        script.cut.clear();
    }

    /// The calls of this kind so far.
    pub fn calls(&self, op: Op) -> Vec<Call> {
        let script = self.script();
        script
            .calls
            .iter()
            .filter(|call| call.op == op)
            .cloned()
            .collect()
    }

    pub fn count(&self, op: Op) -> usize {
        self.calls(op).len()
    }

    /// Carries out the acquire with this number, as if it had been on its way until now. Nobody
    /// hears the reply.
    pub async fn carry_out_late(&self, number: usize) -> AcquireReply {
        let request = self.script().acquires[number].clone();
        self.memory.acquire(&request).await.unwrap()
    }

    /// Waits until so many calls of this kind have been sent.
    pub async fn sent_times(&self, op: Op, times: usize) {
        loop {
            let called = self.called.notified();
            tokio::pin!(called);
            called.as_mut().enable();
            if self.count(op) >= times {
                return;
            }
            called.await;
        }
    }

    async fn call<T>(
        &self,
        op: Op,
        locks: Vec<(String, String)>,
        execute: impl Future<Output = T>,
    ) -> Result<T, StorageError> {
        let fault = {
            let mut script = self.script();
            // A caller that asks without a pause would hang the test instead of failing it.
            assert!(script.calls.len() < 100_000, "a storm of calls");
            script.calls.push(Call {
                op,
                locks,
                at: Instant::now(),
            });
            let next = script.next.get_mut(&op).and_then(VecDeque::pop_front);
            next.or_else(|| script.always.get(&op).cloned())
                .unwrap_or_default()
        };
        self.called.notify_waiters();
        let cut = || self.script().cut.get(&op).copied().unwrap_or(Cut::None);
        let unavailable = StorageError::new(StorageErrorKind::Unavailable);

        fault.send.passed().await;
        match cut() {
            Cut::SendHangs => pending().await,
            Cut::SendFails => return Err(unavailable),
            _ => {}
        }
        let reply = if fault.not_executed {
            None
        } else {
            Some(execute.await)
        };
        fault.reply.passed().await;
        match cut() {
            Cut::ReplyHangs => pending().await,
            Cut::ReplyFails => return Err(unavailable),
            _ => {}
        }
        match (reply, fault.error) {
            (Some(reply), None) => Ok(reply),
            (_, kind) => Err(StorageError::new(
                kind.unwrap_or(StorageErrorKind::Unavailable),
            )),
        }
    }
}

impl LockStorage for FaultyStorage {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        let lock = (request.name.key().to_owned(), request.token.to_text());
        self.script().acquires.push(request.clone());
        self.call(Op::Acquire, vec![lock], self.memory.acquire(request))
            .await?
    }

    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        let locks = requests
            .iter()
            .map(|request| (request.name.key().to_owned(), request.token.to_text()))
            .collect();
        let replies = self
            .call(Op::Renew, locks, self.memory.renew(requests))
            .await;
        replies.unwrap_or_else(|error| vec![Err(error); requests.len()])
    }

    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        let lock = (request.name.key().to_owned(), request.token.to_text());
        self.call(Op::Release, vec![lock], self.memory.release(request))
            .await?
    }

    // Nothing of this fails.

    async fn listen(&self, inbox: Inbox) {
        if self.listens {
            self.memory.listen(inbox).await;
        }
    }

    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        self.memory.survey(request).await
    }

    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.memory.look(name).await
    }

    async fn force_release(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        self.memory.force_release(seen).await
    }

    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        self.memory.tell(prefix, inbox, text).await
    }
}
