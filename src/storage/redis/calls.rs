//! The calls of a storage, each over one line to one server: what is sent, and how the reply is
//! read. Which server that is, and whether to ask the next one, is not known here.
//!
//! A lock that is free is taken by plain commands; everything else is a script's work.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use redis::{Cmd, Value};

use super::{
    RedisStorage,
    error::{unexpected, value},
    fencing, names,
    script::{ACQUIRE, FREE, RAISE, RELEASE, RENEW, Script},
    topology::Line,
    wire::{Fact, Wire},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, RaiseReply, RaiseRequest, ReleaseReply,
        ReleaseRequest, RenewReply, RenewRequest, Stamp,
    },
};

/// What the release script takes for a release that tells nobody.
const QUIET: &str = "quiet";

pub(super) fn millis(duration: Duration) -> u64 {
    // Options are bounded to 24 h.
    duration.as_millis() as u64
}

fn set_if_free(request: &AcquireRequest, token: &[u8]) -> Cmd {
    let name = request.name.as_str();
    let mut command = Cmd::with_capacity(6, name.len() + 96);
    command
        .arg("SET")
        .arg(name)
        .arg(token)
        .arg("NX")
        .arg("PX")
        .arg(millis(request.ttl));
    command
}

/// The numbers of a reply, such as the time left and the server's time.
fn numbers(values: &[Value]) -> Option<Vec<i64>> {
    let number = |value: &Value| match value {
        Value::Int(number) => Some(*number),
        Value::BulkString(text) => str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    };
    values.iter().map(number).collect()
}

/// How long a holder has left. Negative: its key never expires.
fn left(millis: i64) -> Option<Duration> {
    u64::try_from(millis).ok().map(Duration::from_millis)
}

fn granted(wanted: bool) -> AcquireReply {
    match wanted {
        true => AcquireReply::granted_and_wanted(),
        false => AcquireReply::granted(),
    }
}

/// The server's time, as `TIME` gives it.
fn stamp(run: Option<u128>, seconds: i64, micros: i64) -> Stamp {
    let at =
        Duration::from_secs(seconds.unsigned_abs()) + Duration::from_micros(micros.unsigned_abs());
    Stamp { run, at }
}

impl RedisStorage {
    /// Takes the lock if it is free, together with its fencing tokens, by plain commands in one
    /// write. `None` if a script has to look.
    ///
    /// The last command sees to it that the lock was ours when the tokens were taken, whatever came
    /// between: a token that was taken before the lock, or after it had run out, could be lower than
    /// that of an earlier holder, or higher than that of a later one. If the lock ran out in between,
    /// the reply would come too late anyway; but it may also have been deleted.
    ///
    /// A script would make it one step, for 1.4 us less of the client's time and 2 us more of the
    /// server's, which all clients share.
    async fn take_fenced(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<Option<AcquireReply>, StorageError> {
        let take = |wire: &Wire| {
            wire.knows(Fact::CounterIsRight).then(|| {
                let name = request.name.as_str();
                let mut take = Cmd::with_capacity(3, name.len() + 32);
                take.arg("INCRBY")
                    .arg(fencing::counter(&request.name))
                    .arg(request.fencing);
                let mut look = Cmd::with_capacity(3, 2 * name.len() + 16);
                look.arg("MGET").arg(name).arg(names::queue(&request.name));
                wire.send([set_if_free(request, token), take, look])
            })
        };
        let seen = self.fencing.get();
        let Some((replies, origin)) = line.call(take).await? else {
            return Ok(None);
        };
        let Value::Array(replies) = replies? else {
            return Err(unexpected());
        };
        let Ok([set, last, found]) = <[_; 3]>::try_from(replies) else {
            return Err(unexpected());
        };
        match value(set)? {
            Value::Okay => {}
            Value::Nil => return Ok(None),
            _ => return Err(unexpected()),
        }
        let (last, found) = match (value(last), value(found)) {
            (Ok(Value::Int(last)), Ok(Value::Array(found))) => (last, found),
            (Ok(_), Ok(_)) => return Err(unexpected()),
            (Err(error), _) | (_, Err(error)) => {
                // A lock without its tokens is not what was asked for.
                Box::pin(self.give_back(line, request, token)).await?;
                return Err(error.into());
            }
        };
        let (owner, is_wanted) = match &found[..] {
            [Value::BulkString(owner), queue] => (owner, *queue != Value::Nil),
            // It is gone already.
            [Value::Nil, _] => return Ok(None),
            _ => return Err(unexpected()),
        };
        // Others may have come to wait for it meanwhile, and have marked it.
        let is_ours = owner.strip_suffix(b"!").unwrap_or(owner) == token;
        let first = last.saturating_sub(i64::from(request.fencing) - 1);
        match fencing::block(first, request.fencing) {
            Some(block) if block.first > seen && is_ours => {
                self.fencing.update(block);
                line.learn(origin, Fact::CounterIsRight);
                let granted = granted(is_wanted);
                Ok(Some(granted.with_fencing(Some(block))))
            }
            _ => {
                // The counter went back, or somebody else has the lock already.
                line.unlearn(Fact::CounterIsRight);
                Ok(None)
            }
        }
    }

    /// Frees what an attempt took before it failed: its error says that it was not carried out. If
    /// that fails too, nobody knows.
    async fn give_back(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<(), StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token);
        };
        let given_back = RELEASE.run(line, &request.name, arguments);
        match given_back.await {
            Ok(_) => Ok(()),
            Err(error) if error.kind().is_transient() => Err(error),
            Err(error) => Err(StorageError::with_source(
                StorageErrorKind::Unavailable,
                error,
            )),
        }
    }

    /// Takes the lock if it is free, and asks for it otherwise.
    async fn take(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<AcquireReply, StorageError> {
        let fenced = request.fencing > 0;
        if !request.again && !fenced {
            let set = set_if_free(request, token);
            let called = line.call(|wire| Some(wire.send([set]))).await?;
            match called.ok_or_else(unexpected)?.0? {
                Value::Okay => return Ok(AcquireReply::granted()),
                Value::Nil => {}
                _ => return Err(unexpected()),
            }
        } else if !request.again
            && let Some(reply) = self.take_fenced(line, request, token).await?
        {
            return Ok(reply);
        }

        let has_raised = AtomicBool::new(false);
        let arguments = |command: &mut Cmd, wire: &Wire| {
            let raise = fenced && !wire.knows(Fact::CounterIsRight);
            has_raised.store(raise, Relaxed);
            let seen = if raise { self.fencing.get() as i64 } else { -1 };
            command
                .arg(token)
                .arg(millis(request.ttl))
                .arg(request.fencing)
                .arg(seen)
                .arg(u8::from(request.repeated));
            match (request.queue, request.hint) {
                (Some(place), _) => {
                    command.arg(millis(place));
                }
                (None, Some(hint)) => {
                    command.arg(millis(hint)).arg("hint");
                }
                (None, None) => {}
            }
        };
        let acquired = ACQUIRE.run(line, &request.name, arguments);
        let (values, origin) = match Box::pin(acquired).await {
            Ok((Value::Array(values), origin)) => (values, origin),
            Ok(_) => return Err(unexpected()),
            Err(error) => {
                // By the commands before, the lock may be ours.
                if fenced && !request.again && !error.kind().is_transient() {
                    Box::pin(self.give_back(line, request, token)).await?;
                }
                return Err(error);
            }
        };
        if has_raised.load(Relaxed) {
            line.learn(origin, Fact::CounterIsRight);
        }
        if let [
            Value::BulkString(owner),
            Value::Int(wanted),
            Value::Int(first),
        ] = &values[..]
            && owner[..] == *token
        {
            let block = fencing::block(*first, request.fencing);
            block.iter().for_each(|block| self.fencing.update(*block));
            return Ok(granted(*wanted > 0).with_fencing(block));
        }
        match numbers(&values).as_deref() {
            Some([]) => Ok(AcquireReply::Unknown),
            Some([time]) => Ok(AcquireReply::held(left(*time))),
            Some([time, seconds, micros]) => {
                let stamp = stamp(origin.clock, *seconds, *micros);
                Ok(AcquireReply::queued(left(*time), stamp))
            }
            _ => Err(unexpected()),
        }
    }

    pub(super) async fn acquire_over(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<AcquireReply, StorageError> {
        let reply = self.take(line, request, token).await?;
        if matches!(reply, AcquireReply::Granted { .. })
            && line.is_confirmed()
            && let Err(error) = Box::pin(line.confirm(request)).await
        {
            if !error.kind().is_transient() {
                // Nobody will ask for it again.
                Box::pin(self.give_back(line, request, token)).await?;
            }
            return Err(error);
        }
        Ok(reply)
    }

    pub(super) async fn renew_over(
        &self,
        line: &Line<'_>,
        request: &RenewRequest,
        token: &[u8],
    ) -> Result<RenewReply, StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token).arg(millis(request.ttl));
        };
        let renewed = RENEW.run(line, &request.name, arguments);
        match renewed.await.map(|(value, _)| value) {
            Ok(Value::Int(0)) => Ok(RenewReply::NotOurs),
            Ok(Value::Int(1)) => Ok(RenewReply::Renewed),
            Ok(Value::Int(2)) => Ok(RenewReply::RenewedAndWanted),
            Ok(_) => Err(unexpected()),
            Err(error) if error.kind() == StorageErrorKind::WrongType => Ok(RenewReply::NotOurs),
            Err(error) => Err(error),
        }
    }

    /// Gives the lock to the first in its queue, or frees it.
    pub(super) async fn release_over(
        &self,
        line: &Line<'_>,
        request: &ReleaseRequest,
        token: &[u8],
    ) -> Result<ReleaseReply, StorageError> {
        let script = match request.unwanted && !request.quiet {
            true => &FREE,
            false => &RELEASE,
        };
        if let Some(reply) = self.release_by(script, line, request, token).await? {
            return Ok(reply);
        }
        // In a box, as is all that is seldom needed: or every call's future would be as large.
        let released = Box::pin(self.release_by(&RELEASE, line, request, token));
        released.await?.ok_or_else(unexpected)
    }

    /// By [`RELEASE`], or by [`FREE`], which frees a lock that nobody waits for. `None`: somebody has
    /// come to wait for it meanwhile.
    async fn release_by(
        &self,
        script: &'static Script,
        line: &Line<'_>,
        request: &ReleaseRequest,
        token: &[u8],
    ) -> Result<Option<ReleaseReply>, StorageError> {
        let frees = std::ptr::eq(script, &FREE);
        let requeue = request.requeue.map(|requeue| requeue.token.text());
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token);
            if frees {
                return;
            }
            if request.quiet {
                command.arg(QUIET);
            } else if let (Some(requeue), Some(token)) = (&request.requeue, &requeue) {
                command
                    .arg(&**token)
                    .arg(millis(requeue.ttl))
                    .arg(requeue.fencing)
                    .arg(millis(requeue.place));
            }
        };
        let (reply, origin) = match script.run(line, &request.name, arguments).await {
            Err(error) if frees && error.kind() == StorageErrorKind::WrongType => {
                return Ok(Some(ReleaseReply::NotOurs));
            }
            reply => reply?,
        };
        match reply {
            Value::Int(0) => Ok(Some(ReleaseReply::NotOurs)),
            Value::Int(1) => Ok(Some(ReleaseReply::Released)),
            Value::Int(2) if frees => Ok(None),
            Value::Array(values) => match numbers(&values).as_deref() {
                Some([ttl, seconds, micros]) => Ok(Some(ReleaseReply::Requeued {
                    ttl: left(*ttl).unwrap_or_default(),
                    stamp: stamp(origin.clock, *seconds, *micros),
                })),
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    pub(super) async fn raise_over(
        &self,
        line: &Line<'_>,
        request: &RaiseRequest,
        token: &[u8],
    ) -> Result<RaiseReply, StorageError> {
        let arguments = |command: &mut Cmd, _: &Wire| {
            command.arg(token).arg(request.above);
        };
        let raised = RAISE.run(line, &request.name, arguments).await?;
        match raised.0 {
            Value::Int(0) => Ok(RaiseReply::NotOurs),
            Value::Int(1) => {
                // A counter that falls back below this was lost.
                self.fencing.update(FencingBlock {
                    first: request.above,
                    count: 1,
                });
                Ok(RaiseReply::Raised)
            }
            _ => Err(unexpected()),
        }
    }
}
