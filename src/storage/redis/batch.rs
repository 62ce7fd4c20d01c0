//! Commands of many tasks, sent together.
//!
//! redis-rs takes a message through a bounded channel per command, and is woken so early that it
//! writes few of them at a time. Here the commands of all tasks that are about to run go to it as
//! one pipeline: one message, one write, and one wake-up when the replies are there.
//!
//! The task that does this runs on the runtime on which the connection was made, as redis-rs's own
//! does, and ends with the connection's last user.

use futures_util::{StreamExt, stream::FuturesUnordered};
use redis::{Cmd, Pipeline, RedisError, Value, aio::MultiplexedConnection};
use tokio::sync::{
    mpsc::{self, UnboundedReceiver, UnboundedSender},
    oneshot,
};

/// The most calls in one pipeline: the replies to all of them come before the first one's caller
/// goes on.
const LARGEST: usize = 64;

/// Commands, and who waits for the replies to them.
struct Call {
    first: Cmd,
    /// Those that follow it, with nothing in between.
    rest: Vec<Cmd>,
    /// What is said to the first, or an array of what is said to each if there are several.
    reply: oneshot::Sender<Result<Value, RedisError>>,
}

/// Where commands are handed in.
pub(super) struct Batches {
    /// Not bounded: whoever hands in a call waits for the reply, and callers are bounded.
    calls: UnboundedSender<Call>,
}

impl Batches {
    /// Must be called on a runtime, which sends the commands.
    pub(super) fn new(connection: MultiplexedConnection) -> Self {
        let (calls, handed_in) = mpsc::unbounded_channel();
        tokio::spawn(send_batches(connection, handed_in));
        Self { calls }
    }

    /// Sends a command and waits for the reply, which may be a [`Value::ServerError`].
    ///
    /// Commands are sent in the order of the first polls. Dropped after that, it may be sent or not.
    pub(super) async fn run(&self, command: Cmd) -> Result<Value, RedisError> {
        self.call(command, Vec::new()).await
    }

    /// The same for commands that follow each other, with nothing in between. One value for each.
    pub(super) async fn run_all(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, RedisError> {
        let mut commands = commands.into_iter();
        let Some(first) = commands.next() else {
            return Ok(Vec::new());
        };
        match self.call(first, commands.collect()).await? {
            Value::Array(values) => Ok(values),
            value => Ok(vec![value]),
        }
    }

    async fn call(&self, first: Cmd, rest: Vec<Cmd>) -> Result<Value, RedisError> {
        let (reply, replied) = oneshot::channel();
        let call = Call { first, rest, reply };
        self.calls.send(call).map_err(|_| gone())?;
        replied.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// The runtime that sends the commands has ended.
fn gone() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()
}

async fn send_batches(connection: MultiplexedConnection, mut handed_in: UnboundedReceiver<Call>) {
    let mut calls = Vec::new();
    let mut last = 0;
    let mut under_way = FuturesUnordered::new();
    loop {
        tokio::select! {
            // Polls a new batch before the next one is taken up, and so sends them in order.
            biased;
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            count = handed_in.recv_many(&mut calls, LARGEST) => {
                if count == 0 {
                    return;
                }
                // Where one task has something to send, others may be about to: they run first. A
                // caller that is alone does not wait for that.
                if last > 1 || !under_way.is_empty() {
                    tokio::task::yield_now().await;
                }
                while calls.len() < LARGEST && let Ok(call) = handed_in.try_recv() {
                    calls.push(call);
                }
                last = calls.len();
                let calls = std::mem::take(&mut calls);
                under_way.push(send(connection.clone(), calls));
            }
        }
    }
}

async fn send(mut connection: MultiplexedConnection, calls: Vec<Call>) {
    let mut pipeline = Pipeline::with_capacity(calls.len());
    let mut waiting = Vec::with_capacity(calls.len());
    // Some may have stopped waiting meanwhile.
    for call in calls.into_iter().filter(|call| !call.reply.is_closed()) {
        waiting.push((call.rest.len(), call.reply));
        pipeline.add_command(call.first);
        for command in call.rest {
            pipeline.add_command(command);
        }
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
