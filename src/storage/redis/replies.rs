//! How replies of a server are read: each is the answer that its command can give, or an error.
//!
//! Nothing here asks anybody anything, so whatever a server may say can be tried out. What a command
//! cannot have answered is never taken for a grant.

use std::time::Duration;

use redis::Value;

use super::{
    error::{Failure, unexpected, value},
    fencing,
};
use crate::{
    error::StorageError,
    storage::{AcquireReply, FencingBlock, RaiseReply, ReleaseReply, RenewReply, Stamp},
};

/// What `SET .. NX` brought: whether the lock was free, and so is ours.
pub(super) fn set(reply: Value) -> Result<bool, StorageError> {
    match reply {
        Value::Okay => Ok(true),
        Value::Nil => Ok(false),
        _ => Err(unexpected()),
    }
}

/// What the plain commands for a lock with its fencing tokens brought.
pub(super) enum Taken {
    Granted {
        wanted: bool,
        block: FencingBlock,
    },
    /// The lock was not free, or is gone already.
    NotFree,
    /// The tokens are not good: the counter went back, or somebody else has the lock already.
    NotRight,
    /// The lock was free, but its tokens were not to be had.
    NoTokens(Failure),
}

/// Reads the replies to `SET .. NX`, to `INCRBY` by `count`, and to `MGET` of the lock and its queue.
/// `seen`: all tokens have to be above it.
pub(super) fn taken(
    replies: Value,
    token: &[u8],
    count: u32,
    seen: u64,
) -> Result<Taken, StorageError> {
    let Value::Array(replies) = replies else {
        return Err(unexpected());
    };
    let Ok([was_set, last, found]) = <[_; 3]>::try_from(replies) else {
        return Err(unexpected());
    };
    if !set(value(was_set)?)? {
        return Ok(Taken::NotFree);
    }
    let (last, found) = match (value(last), value(found)) {
        (Ok(Value::Int(last)), Ok(Value::Array(found))) => (last, found),
        (Ok(_), Ok(_)) => return Err(unexpected()),
        (Err(error), _) | (_, Err(error)) => return Ok(Taken::NoTokens(error)),
    };
    let (owner, wanted) = match &found[..] {
        [Value::BulkString(owner), queue] => (owner, *queue != Value::Nil),
        [Value::Nil, _] => return Ok(Taken::NotFree),
        _ => return Err(unexpected()),
    };
    // Others may have come to wait for it meanwhile, and have marked it.
    let is_ours = owner.strip_suffix(b"!").unwrap_or(owner) == token;
    let first = last.saturating_sub(i64::from(count) - 1);
    match fencing::block(first, count) {
        Some(block) if block.first > seen && is_ours => Ok(Taken::Granted { wanted, block }),
        _ => Ok(Taken::NotRight),
    }
}

/// What the acquire script says. `clock`: which run of the server's clock its time is of.
pub(super) fn acquired(
    reply: Value,
    token: &[u8],
    count: u32,
    clock: Option<u128>,
) -> Result<AcquireReply, StorageError> {
    let Value::Array(values) = reply else {
        return Err(unexpected());
    };
    if let [
        Value::BulkString(owner),
        Value::Int(wanted),
        Value::Int(first),
    ] = &values[..]
        && owner[..] == *token
    {
        let granted = match *wanted > 0 {
            true => AcquireReply::granted_and_wanted(),
            false => AcquireReply::granted(),
        };
        return Ok(granted.with_fencing(fencing::block(*first, count)));
    }
    match numbers(&values).as_deref() {
        Some([]) => Ok(AcquireReply::Unknown),
        Some([time]) => Ok(AcquireReply::held(left(*time))),
        Some([time, seconds, micros]) => Ok(AcquireReply::queued(
            left(*time),
            stamp(clock, *seconds, *micros),
        )),
        _ => Err(unexpected()),
    }
}

/// What the renew script says.
pub(super) fn renewed(reply: &Value) -> Result<RenewReply, StorageError> {
    match reply {
        Value::Int(0) => Ok(RenewReply::NotOurs),
        Value::Int(1) => Ok(RenewReply::Renewed),
        Value::Int(2) => Ok(RenewReply::RenewedAndWanted),
        _ => Err(unexpected()),
    }
}

/// What the script says that frees a lock for which nobody waits. `None`: somebody has come to wait.
pub(super) fn freed(reply: &Value) -> Result<Option<ReleaseReply>, StorageError> {
    match reply {
        Value::Int(0) => Ok(Some(ReleaseReply::NotOurs)),
        Value::Int(1) => Ok(Some(ReleaseReply::Released)),
        Value::Int(2) => Ok(None),
        _ => Err(unexpected()),
    }
}

/// What the release script says.
pub(super) fn released(reply: &Value, clock: Option<u128>) -> Result<ReleaseReply, StorageError> {
    match reply {
        Value::Int(0) => Ok(ReleaseReply::NotOurs),
        Value::Int(1) => Ok(ReleaseReply::Released),
        Value::Array(values) => match numbers(values).as_deref() {
            Some([ttl, seconds, micros]) => Ok(ReleaseReply::Requeued {
                ttl: left(*ttl).unwrap_or_default(),
                stamp: stamp(clock, *seconds, *micros),
            }),
            _ => Err(unexpected()),
        },
        _ => Err(unexpected()),
    }
}

/// What the script says that raises the fencing counter.
pub(super) fn raised(reply: &Value) -> Result<RaiseReply, StorageError> {
    match reply {
        Value::Int(0) => Ok(RaiseReply::NotOurs),
        Value::Int(1) => Ok(RaiseReply::Raised),
        _ => Err(unexpected()),
    }
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

/// The server's time, as `TIME` gives it.
fn stamp(run: Option<u128>, seconds: i64, micros: i64) -> Stamp {
    let at =
        Duration::from_secs(seconds.unsigned_abs()) + Duration::from_micros(micros.unsigned_abs());
    Stamp { run, at }
}
