//! A server that is reached through a pool of the user's.
//!
//! Nothing is checked out of the pool: its manager makes one more connection, for locks alone. A
//! connection that others check out as well would carry what they do there: a `SELECT` would let our
//! locks go to another database, a `MULTI` would take them for its own, a `BLPOP` would hold them
//! up. A new connection for each command, or several in turn, would let commands overtake each
//! other: an acquire whose caller has gone could be carried out after its release, and lock the key
//! for a ttl. And a checkout costs a PING, and with the server down all of the pool's
//! `connection_timeout`, without a word of why.
//!
//! Such a connection is as the pool's manager makes it. It cannot receive messages, nor tell that
//! the server has closed it while nobody used it.

use std::{
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bb8_redis::{RedisConnectionManager, bb8::Pool};
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesOrdered};
use redis::{Cmd, Pipeline, RedisError, Value, aio::MultiplexedConnection};
use tokio::{
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        oneshot,
    },
    task::unconstrained,
};

use super::{
    frame::malformed,
    health::Health,
    pipe::{Answer, Reply},
};

/// The most calls that are sent together.
const LARGEST: usize = 32;

/// How many times so many may be on their way.
const MOST: usize = 4;

#[derive(Clone)]
pub(super) struct OwnPool(Pool<RedisConnectionManager>);

impl OwnPool {
    /// How long making a connection may take. The manager goes by redis-rs's default.
    pub(super) const TIMEOUT: Duration = Duration::from_secs(1);

    pub(super) fn new(pool: Pool<RedisConnectionManager>) -> Self {
        tracing::warn!(
            "locks over a pool made elsewhere: no wake-ups, waiters poll every `interval`; \
             a connection that was closed while idle costs its next caller an error"
        );
        Self(pool)
    }

    pub(super) async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        self.0.dedicated_connection().await
    }
}

/// A connection of redis-rs's, for calls of many tasks.
#[derive(Clone)]
pub(super) struct OwnConnection(UnboundedSender<Call>);

struct Call {
    commands: Vec<Cmd>,
    tell: oneshot::Sender<Answer>,
}

impl OwnConnection {
    /// Must be called on a runtime, which takes the calls to the connection.
    pub(super) fn new(connection: MultiplexedConnection, health: Arc<Health>) -> Self {
        let (calls, to_send) = unbounded_channel();
        tokio::spawn(carry(connection, to_send, health));
        Self(calls)
    }

    /// As [`Pipe::call`](super::pipe::Pipe::call).
    pub(super) fn call<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        let (tell, reply) = Reply::channel();
        let commands = commands.into();
        // If nobody takes it, it is dropped, which tells its caller.
        let _ = self.0.send(Call { commands, tell });
        reply
    }
}

/// Takes calls to redis-rs, in their order. It takes no more than there is room for in its channel: what has to wait
/// there may be overtaken.
async fn carry(
    connection: MultiplexedConnection,
    mut calls: UnboundedReceiver<Call>,
    health: Arc<Health>,
) {
    let mut sent = FuturesOrdered::new();
    let mut next = Vec::new();
    loop {
        tokio::select! {
            some = calls.recv_many(&mut next, LARGEST), if sent.len() < MOST => {
                if some == 0 {
                    return;
                }
                if sent.is_empty() {
                    health.first_call();
                }
                sent.push_back(begin(send(connection.clone(), std::mem::take(&mut next))));
            }
            Some((calls, values)) = sent.next() => {
                health.replied();
                hand_out(calls, values, &health);
            }
        }
    }
}

/// Gives each call what it is answered.
fn hand_out(calls: Vec<Call>, values: Result<Vec<Value>, RedisError>, health: &Health) {
    let mut values = values.map(Vec::into_iter);
    for Call { commands, tell } in calls {
        let answer = match &mut values {
            Ok(values) if commands.len() == 1 => values.next().ok_or_else(malformed),
            Ok(values) => Ok(Value::Array(values.take(commands.len()).collect())),
            Err(error) => Err(error.clone()),
        };
        health.judge(&answer);
        // Whoever has stopped waiting needs no reply.
        let _ = tell.send(answer);
    }
}

type Sent = BoxFuture<'static, (Vec<Call>, Result<Vec<Value>, RedisError>)>;

async fn send(
    mut connection: MultiplexedConnection,
    calls: Vec<Call>,
) -> (Vec<Call>, Result<Vec<Value>, RedisError>) {
    let mut pipeline = Pipeline::with_capacity(calls.len());
    for command in calls.iter().flat_map(|call| &call.commands) {
        pipeline.add_command(command.clone());
    }
    // A command that the server refuses brings an error as its value, and its neighbours theirs.
    let values = connection.send_packed_commands(&pipeline, 0, pipeline.len());
    let values = values.await;
    (calls, values)
}

/// Puts calls into redis-rs's channel. That happens in the first poll, unless tokio finds that this task has had its share
/// and others should run: hence `unconstrained`.
fn begin(
    call: impl Future<Output = (Vec<Call>, Result<Vec<Value>, RedisError>)> + Send + 'static,
) -> Sent {
    let mut call = Box::pin(unconstrained(call));
    match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
        Poll::Pending => call,
    }
}
