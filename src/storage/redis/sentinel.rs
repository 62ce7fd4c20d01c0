//! The master, as Redis Sentinel knows it.
//!
//! Every new connection asks anew: connections are made when the old one broke, which is when there
//! may be another master. All Sentinels are asked at the same time, and the answer that knows of the
//! latest failover counts: at first only one of them knows, and one that was cut off from the others
//! may lead back to the old master. What they say is checked with the server itself.
//!
//! A master that is replaced while it is alive goes on as one, for some seconds, until Sentinel
//! makes it a replica. So we also listen to what the Sentinels tell of a failover, and leave it then.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use redis::{ErrorKind, PushKind, RedisError, ServerErrorKind, Value};
use tokio::{sync::Notify, time::sleep};

use super::{address::Endpoint, connector::Server, pipe::Unasked};

/// How long the last Sentinels are waited for when more than half of them have answered.
const GRACE: Duration = Duration::from_millis(100);

/// How often it is made sure that the connection to a Sentinel still lives.
const PROBE: Duration = Duration::from_secs(5);

/// How long to wait before a new one is tried.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The Sentinels of a service.
pub(super) struct Sentinels {
    service: String,
    sentinels: Vec<Server>,
    /// How to connect to the service's servers, up to their address.
    template: Endpoint,
    /// What was found last.
    found: Mutex<Option<Master>>,
}

/// Where the master is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Master {
    pub(super) host: String,
    pub(super) port: u16,
    /// Grows with each failover.
    epoch: u64,
}

impl Master {
    /// Whether this is another one, of a later failover.
    pub(super) fn replaces(&self, other: &Self) -> bool {
        (&self.host, self.port) != (&other.host, other.port) && self.epoch > other.epoch
    }
}

/// What a Sentinel says of the master.
pub(super) struct Answer {
    pub(super) master: Master,
    /// That the Sentinels have agreed that it is down.
    is_down: bool,
}

impl Sentinels {
    pub(super) fn new(service: String, sentinels: Vec<Endpoint>, template: Endpoint) -> Self {
        let server = |mut endpoint: Endpoint| {
            // Sentinels have no databases.
            let settings = endpoint.info.redis_settings().clone().set_db(0);
            endpoint.info = endpoint.info.set_redis_settings(settings);
            Server::new(endpoint)
        };
        Self {
            service,
            sentinels: sentinels.into_iter().map(server).collect(),
            template,
            found: Mutex::default(),
        }
    }

    /// Where the master is now. `timeout` bounds the search.
    pub(super) async fn find(&self, timeout: Duration) -> Result<Master, RedisError> {
        let asking = self
            .sentinels
            .iter()
            .map(|sentinel| tokio::time::timeout(timeout, self.ask(sentinel, timeout)));
        let mut asking: FuturesUnordered<_> = asking.collect();
        let mut answers = Vec::new();
        let mut failed = None;
        loop {
            let answer = if answers.len() > self.sentinels.len() / 2 {
                // Those that are well have answered by now, or are about to.
                tokio::time::timeout(GRACE, asking.next())
                    .await
                    .unwrap_or(None)
            } else {
                asking.next().await
            };
            match answer {
                None => break,
                Some(Ok(Ok(answer))) => answers.push(answer),
                // One that cannot be reached now may know what the others do not.
                Some(Ok(Err(error))) if !error.is_io_error() => failed = failed.or(Some(error)),
                Some(Ok(Err(error))) => failed = Some(error),
                Some(Err(_)) => failed = Some(late()),
            }
        }
        let latest = answers.into_iter().max_by_key(|answer| answer.master.epoch);
        let unknown = || unavailable("no Sentinel could be asked");
        let answer = latest.ok_or_else(|| failed.unwrap_or_else(unknown))?;
        if answer.is_down {
            // Connecting to it would take its time. When there is another, they will say so.
            return Err(unavailable("the master is down, says Sentinel"));
        }
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer.master.clone());
        Ok(answer.master)
    }

    /// Whether another has been found since.
    pub(super) fn have_replaced(&self, master: &Master) -> bool {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.as_ref().is_some_and(|found| found.replaces(master))
    }

    pub(super) fn server(&self, master: &Master) -> Server {
        Server::new(self.template.at(master.host.clone(), master.port))
    }

    /// Whether what goes to the servers is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        self.template.is_encrypted()
    }

    /// Listens to all Sentinels, and tells `switched` whenever there may be another master.
    pub(super) async fn watch(&self, timeout: Duration, switched: &Arc<Notify>) {
        let watching = self.sentinels.iter().map(async |sentinel| {
            let mut pause = FIRST_PAUSE;
            loop {
                let mut listened = false;
                // Whatever it was, it is tried again: nothing depends on it.
                let _ = watch_one(sentinel, timeout, switched, &mut listened).await;
                if listened {
                    pause = FIRST_PAUSE;
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        });
        join_all(watching).await;
    }

    async fn ask(&self, sentinel: &Server, timeout: Duration) -> Result<Answer, RedisError> {
        let pipe = sentinel.connect(timeout, &Arc::default()).await?;
        let mut command = redis::cmd("SENTINEL");
        command.arg("MASTER").arg(&self.service);
        answer(pipe.call([command]).await?)
    }
}

/// Reads the reply to `SENTINEL MASTER`. One that names no server is none: with a high epoch it would
/// count for more than the answers of all others.
pub(super) fn answer(reply: Value) -> Result<Answer, RedisError> {
    let mut fields: HashMap<String, String> = redis::from_redis_value(reply.extract_error()?)?;
    let mut field = |name| fields.remove(name).unwrap_or_default();
    let (host, port) = (field("ip"), field("port").parse().unwrap_or_default());
    if host.is_empty() || port == 0 {
        return Err(unavailable("a Sentinel does not say where the master is"));
    }
    Ok(Answer {
        master: Master {
            host,
            port,
            epoch: field("config-epoch").parse().unwrap_or_default(),
        },
        is_down: field("flags").split(',').any(|flag| flag == "o_down"),
    })
}

/// Listens until the connection is lost.
async fn watch_one(
    sentinel: &Server,
    timeout: Duration,
    switched: &Arc<Notify>,
    listened: &mut bool,
) -> Result<(), RedisError> {
    let lost = Arc::new(Notify::new());
    let (told, switched_by) = (Arc::clone(&lost), Arc::clone(switched));
    let pushes = Box::new(move |unasked| match unasked {
        Unasked::Over => told.notify_one(),
        // Of any service: a look tells whether it is ours.
        Unasked::Push(push) if push.kind == PushKind::Message => switched_by.notify_one(),
        Unasked::Push(_) => {}
    });
    let connection = sentinel.listen(timeout, pushes).await?;
    let ask = async |command| {
        let reply = tokio::time::timeout(timeout, connection.call([command])).await;
        reply.map_err(|_| late())??.extract_error()
    };
    let mut subscribe = redis::cmd("SUBSCRIBE");
    subscribe.arg("+switch-master");
    ask(subscribe).await?;
    *listened = true;
    // Something may have been missed.
    switched.notify_one();
    loop {
        if tokio::time::timeout(PROBE, lost.notified()).await.is_ok() {
            return Ok(());
        }
        // Is anybody there?
        ask(redis::cmd("PING")).await?;
    }
}

/// An error if the server's answer to `ROLE` says that it is not a master. Not every user may ask.
pub(super) fn check_role(role: Result<Value, RedisError>) -> Result<(), RedisError> {
    let role = match role {
        Ok(Value::Array(role)) => role,
        Err(error) if error.is_unrecoverable_error() => return Err(error),
        _ => return Ok(()),
    };
    match role.first() {
        Some(Value::BulkString(role)) if role != b"master" => {
            Err(unavailable("the server is not the master"))
        }
        _ => Ok(()),
    }
}

fn late() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

pub(super) fn unavailable(text: &'static str) -> RedisError {
    (ErrorKind::Server(ServerErrorKind::MasterDown), text).into()
}
