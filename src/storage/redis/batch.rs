//! Commands of many tasks, sent together.
//!
//! redis-rs takes a message through a bounded channel for each command, and is woken so early that
//! it writes few of them at a time. Here the commands of all tasks that are about to run go to it as
//! pipelines of up to [`LARGEST`] calls: one message, one write, and one wake-up when the replies
//! are there. A caller that is alone is not held up by any of this.
//!
//! Pipelines are sent by short tasks on the runtime on which the connection was made, where
//! redis-rs's own task runs too. When that runtime ends, calls fail.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use redis::{Cmd, Pipeline, RedisError, Value, aio::MultiplexedConnection};
use tokio::{runtime::Handle, sync::oneshot, task::yield_now};

/// The most calls in one pipeline. All tasks together would be one large pipeline, and they and the
/// server would wait for each other in turn; this many keep both at work.
const LARGEST: usize = 24;

/// With fewer calls open than this, there is nobody to wait for.
const FEW: usize = 3;

/// Commands, and who waits for the replies to them.
struct Call {
    commands: Commands,
    reply: oneshot::Sender<Result<Value, RedisError>>,
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
    connection: MultiplexedConnection,
    runtime: Handle,
    /// Calls that are about to be sent. As long as it is not empty, a task is on its way that will
    /// take them.
    queue: Arc<Queue>,
    /// Calls whose reply somebody waits for.
    open: AtomicUsize,
}

impl Batches {
    /// Must be called on a runtime, which sends the commands.
    pub(super) fn new(connection: MultiplexedConnection) -> Self {
        Self {
            connection,
            runtime: Handle::current(),
            queue: Arc::default(),
            open: AtomicUsize::new(0),
        }
    }

    /// Sends a command, and then those that follow it with nothing in between. It is sent by the
    /// first poll of the reply at the latest.
    ///
    /// The reply to a command may be a [`Value::ServerError`]. If there are several commands, it is
    /// an array of the replies to each.
    pub(super) fn call(&self, first: Cmd, rest: Vec<Cmd>) -> Reply<'_> {
        let commands = Commands { first, rest };
        let is_alone = self.open.fetch_add(1, Relaxed) < FEW;
        let way = if is_alone {
            Way::Alone(Box::pin(send_one(self.connection.clone(), commands)))
        } else {
            Way::Together(self.hand_in(commands))
        };
        Reply {
            open: &self.open,
            way,
        }
    }

    fn hand_in(&self, commands: Commands) -> oneshot::Receiver<Result<Value, RedisError>> {
        let (reply, replied) = oneshot::channel();
        let mut calls = self.queue.calls();
        calls.push(Call { commands, reply });
        if calls.len() >= LARGEST {
            let calls = std::mem::take(&mut *calls);
            self.runtime.spawn(send(self.connection.clone(), calls));
        } else if calls.len() == 1 {
            drop(calls);
            let mut unsent = Unsent(Some(Arc::clone(&self.queue)));
            let connection = self.connection.clone();
            self.runtime.spawn(async move {
                // Where one task has something to send, others may be about to: they run first.
                yield_now().await;
                send(connection, unsent.take()).await;
            });
        }
        replied
    }
}

#[derive(Default)]
struct Queue(Mutex<Vec<Call>>);

impl Queue {
    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The calls in the queue. Dropped with the runtime before they are taken, it drops them, which
/// tells their callers.
struct Unsent(Option<Arc<Queue>>);

impl Unsent {
    fn take(&mut self) -> Vec<Call> {
        match self.0.take() {
            Some(queue) => std::mem::take(&mut *queue.calls()),
            None => Vec::new(),
        }
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// The reply to a call. Dropped, the call may be carried out or not.
pub(super) struct Reply<'a> {
    open: &'a AtomicUsize,
    way: Way,
}

enum Way {
    Alone(Pin<Box<dyn Future<Output = Result<Value, RedisError>> + Send>>),
    Together(oneshot::Receiver<Result<Value, RedisError>>),
}

impl Future for Reply<'_> {
    type Output = Result<Value, RedisError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.way {
            Way::Alone(reply) => reply.as_mut().poll(cx),
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

/// The runtime that sends the commands has ended.
fn gone() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()
}

async fn send_one(
    mut connection: MultiplexedConnection,
    commands: Commands,
) -> Result<Value, RedisError> {
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

async fn send(mut connection: MultiplexedConnection, calls: Vec<Call>) {
    let mut pipeline = Pipeline::with_capacity(calls.len());
    let mut waiting = Vec::with_capacity(calls.len());
    // Some may have stopped waiting meanwhile.
    for call in calls.into_iter().filter(|call| !call.reply.is_closed()) {
        waiting.push((call.commands.rest.len(), call.reply));
        call.commands.add_to(&mut pipeline);
    }
    if waiting.is_empty() {
        return;
    }
    // A command that the server refuses brings an error as its value, and its neighbours theirs.
    let result = connection
        .send_packed_commands(&pipeline, 0, pipeline.len())
        .await;
    let mut values = result.map(Vec::into_iter);
    for (rest, reply) in waiting {
        let value = match &mut values {
            Ok(values) if rest == 0 => values.next().ok_or_else(gone),
            Ok(values) => Ok(Value::Array(values.take(1 + rest).collect())),
            Err(error) => Err(error.clone()),
        };
        // Whoever has stopped waiting needs no reply.
        let _ = reply.send(value);
    }
}
