//! Commands of many tasks, sent together.
//!
//! redis-rs takes a message through a bounded channel for each command, and is woken so early that
//! it writes few of them at a time. Here the commands of all tasks that are about to run go to it as
//! pipelines of up to [`LARGEST`] calls: one message, one write, and one wake-up when the replies
//! are there. Where few calls are open, each goes by itself, and waits for nobody.
//!
//! Calls go into redis-rs's channel in the order in which they were made: all of it happens under
//! the lock of the queue. Replies are handed out by short tasks on the runtime on which the
//! connection was made, where redis-rs's own task runs too. When that runtime ends, calls fail.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use redis::{Cmd, Pipeline, RedisError, Value, aio::MultiplexedConnection};
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    task::{unconstrained, yield_now},
};

/// The most calls in one pipeline. All tasks together would be one large pipeline, and they and the
/// server would wait for each other in turn; this many keep both at work.
const LARGEST: usize = 24;

/// With fewer calls open than this, there is nobody to wait for.
const FEW: usize = 3;

type Answer<T> = Result<T, RedisError>;

/// Commands, and who waits for the replies to them.
struct Call {
    commands: Commands,
    reply: oneshot::Sender<Answer<Value>>,
}

/// A command, and those that follow it with nothing in between.
struct Commands {
    first: Cmd,
    rest: Vec<Cmd>,
}

impl Commands {
    fn add_to(self, pipeline: &mut Pipeline) {
        pipeline.add_command(self.first);
        for command in self.rest {
            pipeline.add_command(command);
        }
    }
}

/// Where commands are handed in.
pub(super) struct Batches {
    queue: Arc<Queue>,
    runtime: Handle,
    /// Calls whose reply somebody waits for.
    open: AtomicUsize,
    /// Dropped with this, it ends the tasks that wait for replies.
    in_use: watch::Sender<()>,
}

struct Queue {
    connection: MultiplexedConnection,
    /// Calls that are about to be sent. As long as it is not empty, a task is on its way that will
    /// send them.
    calls: Mutex<Vec<Call>>,
}

impl Batches {
    /// Must be called on a runtime, which hands out the replies.
    pub(super) fn new(connection: MultiplexedConnection) -> Self {
        Self {
            queue: Arc::new(Queue {
                connection,
                calls: Mutex::default(),
            }),
            runtime: Handle::current(),
            open: AtomicUsize::new(0),
            in_use: watch::Sender::new(()),
        }
    }

    /// Sends a command, and then those that follow it with nothing in between.
    ///
    /// The reply to a command may be a [`Value::ServerError`]. If there are several commands, it is
    /// an array of the replies to each.
    pub(super) fn call(&self, first: Cmd, rest: Vec<Cmd>) -> Reply<'_> {
        let commands = Commands { first, rest };
        let are_few = self.open.fetch_add(1, Relaxed) < FEW;
        let calls = self.queue.calls();
        let way = if are_few && calls.is_empty() {
            let sent = begin(send_one(self.queue.connection.clone(), commands));
            drop(calls);
            Way::Alone(sent)
        } else {
            Way::Together(self.hand_in(calls, commands))
        };
        Reply {
            open: &self.open,
            way,
        }
    }

    fn hand_in(
        &self,
        mut calls: MutexGuard<'_, Vec<Call>>,
        commands: Commands,
    ) -> oneshot::Receiver<Answer<Value>> {
        let (reply, replied) = oneshot::channel();
        calls.push(Call { commands, reply });
        if calls.len() >= LARGEST {
            let batch = self.queue.send(&mut calls);
            drop(calls);
            self.runtime.spawn(hand_out(batch, self.in_use.subscribe()));
        } else if calls.len() == 1 {
            drop(calls);
            let in_use = self.in_use.subscribe();
            let mut unsent = Unsent(Some(Arc::clone(&self.queue)));
            self.runtime.spawn(async move {
                // Where one task has something to send, others may be about to: they run first.
                yield_now().await;
                if let Some(queue) = unsent.0.take() {
                    let batch = queue.send(&mut queue.calls());
                    hand_out(batch, in_use).await;
                }
            });
        }
        replied
    }
}

impl Queue {
    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the calls into redis-rs's channel.
    fn send(&self, calls: &mut Vec<Call>) -> Batch {
        let calls = std::mem::take(calls);
        let mut pipeline = Pipeline::with_capacity(calls.len());
        let mut waiting = Vec::with_capacity(calls.len());
        for call in calls {
            // Some may have stopped waiting meanwhile.
            if !call.reply.is_closed() {
                waiting.push((call.commands.rest.len(), call.reply));
                call.commands.add_to(&mut pipeline);
            }
        }
        let mut connection = self.connection.clone();
        let sent = (!waiting.is_empty()).then(|| {
            begin(async move {
                connection
                    .send_packed_commands(&pipeline, 0, pipeline.len())
                    .await
            })
        });
        Batch { sent, waiting }
    }
}

/// The calls in the queue, for the task that will send them. Dropped with its runtime before that,
/// it drops them, which tells their callers.
struct Unsent(Option<Arc<Queue>>);

impl Drop for Unsent {
    fn drop(&mut self) {
        if let Some(queue) = &self.0 {
            let calls = std::mem::take(&mut *queue.calls());
            // Outside the lock: whoever is told may come back here at once.
            drop(calls);
        }
    }
}

/// A pipeline that was sent.
struct Batch {
    sent: Option<Sent<Vec<Value>>>,
    /// Who waits, and for how many replies more than one.
    waiting: Vec<(usize, oneshot::Sender<Answer<Value>>)>,
}

async fn hand_out(batch: Batch, mut in_use: watch::Receiver<()>) {
    let Some(sent) = batch.sent else { return };
    let result = tokio::select! {
        biased;
        result = sent => result,
        // Nobody waits any more, and the connection may be one on which nothing comes back.
        _ = in_use.changed() => return,
    };
    // A command that the server refuses brings an error as its value, and its neighbours theirs.
    let mut values = result.map(Vec::into_iter);
    for (rest, reply) in batch.waiting {
        let value = match &mut values {
            Ok(values) if rest == 0 => values.next().ok_or_else(gone),
            Ok(values) => Ok(Value::Array(values.take(1 + rest).collect())),
            Err(error) => Err(error.clone()),
        };
        // Whoever has stopped waiting needs no reply.
        let _ = reply.send(value);
    }
}

/// A call that is in redis-rs's channel, or has its place in the line before it.
type Sent<T> = Pin<Box<dyn Future<Output = Answer<T>> + Send>>;

/// Puts a call into redis-rs's channel. That happens in its first poll, unless tokio finds that
/// this task has done enough for now.
fn begin<T: Send + 'static>(call: impl Future<Output = Answer<T>> + Send + 'static) -> Sent<T> {
    let mut call = Box::pin(unconstrained(call));
    match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
        Poll::Pending => call,
    }
}

async fn send_one(mut connection: MultiplexedConnection, commands: Commands) -> Answer<Value> {
    if commands.rest.is_empty() {
        return connection.send_packed_command(&commands.first).await;
    }
    let mut pipeline = Pipeline::with_capacity(1 + commands.rest.len());
    commands.add_to(&mut pipeline);
    let values = connection
        .send_packed_commands(&pipeline, 0, pipeline.len())
        .await;
    values.map(Value::Array)
}

/// The reply to a call. Dropped, the call may be carried out or not.
pub(super) struct Reply<'a> {
    open: &'a AtomicUsize,
    way: Way,
}

enum Way {
    Alone(Sent<Value>),
    Together(oneshot::Receiver<Answer<Value>>),
}

impl Future for Reply<'_> {
    type Output = Answer<Value>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.way {
            Way::Alone(sent) => sent.as_mut().poll(cx),
            Way::Together(replied) => Pin::new(replied)
                .poll(cx)
                .map(|reply| reply.unwrap_or_else(|_| Err(gone()))),
        }
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Relaxed);
    }
}

/// The runtime that hands out the replies has ended.
fn gone() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()
}
