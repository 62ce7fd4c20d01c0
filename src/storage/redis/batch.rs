//! Commands of many tasks, sent together.
//!
//! redis-rs takes a message through a bounded channel for each command, and is woken so early that
//! it writes few of them at a time. Here the commands of all tasks that are about to run go to it as
//! pipelines: one message, one write, and one wake-up when the replies are there.
//!
//! - Where few calls are open, each goes by itself, and waits for nobody.
//! - Where more are, those that are made at the same time go together.
//! - Where many are, and the server is near, they go in parts, a quarter of them each, or what there
//!   is when the pipeline before was answered. All at once, the tasks would make their calls while
//!   the server waits, and wait while it works, in turns; in parts, both work at the same time.
//!
//! Calls go into redis-rs's channel in the order in which they were made: whoever takes them from
//! the queue holds the connection before it lets the queue go. (A full channel may be entered in
//! another order.) Replies are handed out by short tasks
//! on the runtime on which the connection was made, where redis-rs's own task runs too. When that
//! runtime ends, or the connection is given up, calls fail.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use redis::{Cmd, Pipeline, RedisError, Value, aio::MultiplexedConnection};
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    task::{unconstrained, yield_now},
};

use super::{
    error::{Failure, value},
    health::Health,
};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// With no more calls open than this, there is nobody to wait for.
const FEW: usize = 3;

/// With so many open, they go in parts.
const MANY: usize = 16;

/// In how many.
const PARTS: usize = 4;

/// The most calls in one pipeline.
const LARGEST: usize = 32;

/// A server is near if a pipeline is answered within this time. Calls to one that is farther away
/// would gain nothing by waiting for each other: it is not the work that takes the time. On a busy
/// machine a pipeline to its own server takes several times as long as on an idle one.
const NEAR: Duration = Duration::from_millis(1);

type Answer<T> = Result<T, RedisError>;

/// Where commands are handed in.
#[derive(Clone)]
pub(super) struct Batches(Arc<Queue>);

struct Queue {
    unsent: Mutex<Unsent>,
    /// Locked before `unsent` is let go by whoever took calls out of it: so they are sent in their
    /// order, and others hand in theirs meanwhile.
    connection: Mutex<MultiplexedConnection>,
    health: Arc<Health>,
    runtime: Handle,
    /// Dropped with this, it ends the tasks that wait for replies.
    in_use: watch::Sender<()>,
}

/// Calls that are about to be sent. As long as there are any, a task is on its way that will send
/// them, or waits for the replies to others and will then.
#[derive(Default)]
struct Unsent {
    calls: Calls,
    /// How many calls have no reply yet, sent or not.
    open: usize,
    /// How many there were at most, of late.
    crowd: usize,
    /// How many pipelines have no replies yet.
    pipelines: usize,
    /// Whether the last one's came soon.
    is_near: bool,
}

struct Calls {
    pipeline: Pipeline,
    /// Who made them, and of how many commands.
    callers: Vec<(usize, oneshot::Sender<Answer<Value>>)>,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            pipeline: Pipeline::with_capacity(LARGEST),
            callers: Vec::with_capacity(LARGEST),
        }
    }
}

impl Unsent {
    /// Another call is made.
    fn opened(&mut self) {
        self.open += 1;
        self.crowd = self.crowd.max(self.open);
    }

    /// Calls have their replies, or will get none.
    fn closed(&mut self, calls: usize) {
        self.open -= calls;
        self.crowd -= self.crowd.saturating_sub(self.open) / 16;
    }

    /// How many calls are sent without waiting for others.
    fn part(&self) -> usize {
        match self.crowd {
            MANY.. => (self.crowd / PARTS).min(LARGEST),
            _ => LARGEST,
        }
    }

    /// Whether to wait for the replies to those before.
    fn has_time(&self) -> bool {
        self.pipelines > 0 && self.is_near && self.crowd >= MANY
    }
}

impl Batches {
    /// Must be called on a runtime, which hands out the replies.
    pub(super) fn new(connection: MultiplexedConnection, health: Arc<Health>) -> Self {
        Self(Arc::new(Queue {
            unsent: Mutex::default(),
            connection: Mutex::new(connection),
            health,
            runtime: Handle::current(),
            in_use: watch::Sender::new(()),
        }))
    }

    /// Sends commands, with nothing in between.
    ///
    /// The reply to a command may be a [`Value::ServerError`]. If there are several commands, it is
    /// an array of the replies to each.
    pub(super) fn call<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        let queue = &self.0;
        let mut unsent = lock(&queue.unsent);
        unsent.opened();
        if unsent.open == 1 {
            queue.health.first_call();
        }
        if unsent.open <= FEW && unsent.calls.callers.is_empty() {
            let open = Open(Arc::clone(queue));
            let connection = lock(&queue.connection);
            drop(unsent);
            let way = Way::Alone {
                sent: begin(send_one(connection.clone(), commands)),
                open,
            };
            return Reply(way);
        }
        let (reply, replied) = oneshot::channel();
        unsent.calls.callers.push((N, reply));
        for command in commands {
            unsent.calls.pipeline.add_command(command);
        }
        let calls = unsent.calls.callers.len();
        if calls >= unsent.part() {
            queue.send_now(unsent);
        } else if calls == 1 && !unsent.has_time() {
            drop(unsent);
            let errand = Errand(Some(Arc::clone(queue)));
            queue.runtime.spawn(errand.send_soon());
        }
        Reply(Way::Together(replied))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    /// Puts the calls into redis-rs's channel.
    fn send(self: &Arc<Self>, mut unsent: MutexGuard<'_, Unsent>) -> Batch {
        let connection = lock(&self.connection);
        let Calls { pipeline, callers } = std::mem::take(&mut unsent.calls);
        unsent.pipelines += 1;
        drop(unsent);
        let mut connection = connection.clone();
        Batch {
            sent_at: Instant::now(),
            sent: begin(async move {
                connection
                    .send_packed_commands(&pipeline, 0, pipeline.len())
                    .await
            }),
            callers,
            queue: Arc::downgrade(self),
            health: Arc::clone(&self.health),
            in_use: self.in_use.subscribe(),
        }
    }

    /// The same, where a task has other things to do than to hand out the replies.
    fn send_now(self: &Arc<Self>, unsent: MutexGuard<'_, Unsent>) {
        // Made before the calls are sent: the last task that becomes ready is the next that runs,
        // and this should be redis-rs's.
        let (batch, sent) = oneshot::channel();
        self.runtime.spawn(hand_out_later(sent));
        let _ = batch.send(self.send(unsent));
    }

    /// A pipeline of so many calls was answered, after this time. Calls that have waited for it are
    /// sent.
    fn answered(self: &Arc<Self>, calls: usize, after: Duration) {
        let mut unsent = lock(&self.unsent);
        unsent.pipelines -= 1;
        unsent.closed(calls);
        unsent.is_near = after < NEAR;
        if unsent.pipelines == 0 && !unsent.calls.callers.is_empty() {
            self.send_now(unsent);
        }
    }

    /// Nobody will send what is unsent. Dropped, the calls tell their callers.
    fn give_up(&self) {
        let mut unsent = lock(&self.unsent);
        let calls = std::mem::take(&mut unsent.calls);
        unsent.closed(calls.callers.len());
        self.health.kill();
        drop(unsent);
        // Outside the lock: whoever is told may come back here at once.
        drop(calls);
    }
}

/// To send what is unsent. Dropped with its runtime before that, it drops the calls, which tells
/// their callers.
struct Errand(Option<Arc<Queue>>);

impl Errand {
    async fn send_soon(mut self) {
        // Where one task has something to send, others may be about to: they run first.
        yield_now().await;
        let batch = self.0.take().and_then(|queue| {
            let unsent = lock(&queue.unsent);
            // Others may have sent it: there were enough of them.
            (!unsent.calls.callers.is_empty()).then(|| queue.send(unsent))
        });
        if let Some(batch) = batch {
            batch.hand_out().await;
        }
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        if let Some(queue) = &self.0 {
            queue.give_up();
        }
    }
}

/// Calls that were sent together.
struct Batch {
    sent_at: Instant,
    sent: Sent<Vec<Value>>,
    callers: Vec<(usize, oneshot::Sender<Answer<Value>>)>,
    queue: Weak<Queue>,
    health: Arc<Health>,
    in_use: watch::Receiver<()>,
}

async fn hand_out_later(batch: oneshot::Receiver<Batch>) {
    if let Ok(batch) = batch.await {
        batch.hand_out().await;
    }
}

impl Batch {
    async fn hand_out(mut self) {
        let result = tokio::select! {
            biased;
            result = self.sent.as_mut() => result,
            // Nobody uses the connection any more, and it may be one on which nothing comes back.
            _ = self.in_use.changed() => return,
        };
        self.health.replied();
        let callers = std::mem::take(&mut self.callers);
        if let Some(queue) = self.queue.upgrade() {
            queue.answered(callers.len(), self.sent_at.elapsed());
        }
        // A command that the server refuses brings an error as its value, and its neighbours theirs.
        let mut values = result.map(Vec::into_iter);
        for (commands, reply) in callers {
            let answer = match &mut values {
                Ok(values) if commands == 1 => values.next().ok_or_else(gone),
                Ok(values) => Ok(Value::Array(values.take(commands).collect())),
                Err(error) => Err(error.clone()),
            };
            self.health.judge(&answer);
            // Whoever has stopped waiting needs no reply.
            let _ = reply.send(answer);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // Whoever was to hand out the replies has ended, and there will be no others.
        if !self.callers.is_empty() {
            self.health.kill();
            if let Some(queue) = self.queue.upgrade() {
                queue.give_up();
            }
        }
    }
}

/// A call that is in redis-rs's channel, or has its place in the line before it.
type Sent<T> = Pin<Box<dyn Future<Output = Answer<T>> + Send>>;

/// Puts a call into redis-rs's channel. That happens in its first poll, if tokio does not find that
/// this task has done enough for now: hence `unconstrained`.
fn begin<T: Send + 'static>(call: impl Future<Output = Answer<T>> + Send + 'static) -> Sent<T> {
    let mut call = Box::pin(unconstrained(call));
    match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
        Poll::Pending => call,
    }
}

async fn send_one<const N: usize>(
    mut connection: MultiplexedConnection,
    commands: [Cmd; N],
) -> Answer<Value> {
    if let [command] = &commands[..] {
        return connection.send_packed_command(command).await;
    }
    let mut pipeline = Pipeline::with_capacity(N);
    for command in commands {
        pipeline.add_command(command);
    }
    let values = connection
        .send_packed_commands(&pipeline, 0, pipeline.len())
        .await;
    values.map(Value::Array)
}

/// The reply to a call. Dropped, the call may be carried out or not.
pub(super) struct Reply(Way);

enum Way {
    Alone { sent: Sent<Value>, open: Open },
    Together(oneshot::Receiver<Answer<Value>>),
}

/// Counts a call that goes by itself among those that are open.
struct Open(Arc<Queue>);

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.0.unsent).closed(1);
    }
}

impl Future for Reply {
    type Output = Result<Value, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = match &mut self.0 {
            Way::Alone { sent, open } => {
                let answer = ready!(sent.as_mut().poll(cx));
                let health = &open.0.health;
                health.replied();
                health.judge(&answer);
                answer
            }
            Way::Together(replied) => {
                ready!(Pin::new(replied).poll(cx)).unwrap_or_else(|_| Err(gone()))
            }
        };
        Poll::Ready(answer.map_err(Failure::from).and_then(value))
    }
}

/// The runtime that hands out the replies has ended.
fn gone() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
