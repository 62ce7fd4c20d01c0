//! The calls of a storage, each over one line to one server: what is sent, and what follows from the
//! reply (`replies.rs` reads it). Which server that is, and whether to ask the next one, is not known here.
//!
//! A lock that is free is taken by plain commands; everything else is a script's work.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use redis::Cmd;

use super::{
    RedisStorage,
    error::unexpected,
    fencing, names,
    replies::{self, Taken},
    script::{ACQUIRE, FREE, RAISE, RELEASE, RENEW, Script},
    topology::Line,
    wire::{Fact, Wire},
};
use crate::{
    error::{StorageError, StorageErrorKind},
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, RaiseReply, RaiseRequest, ReleaseReply,
        ReleaseRequest, RenewReply, RenewRequest,
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
            let may_take = !request.is_given_up() && wire.knows(Fact::CounterIsRight);
            may_take.then(|| {
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
        match replies::taken(replies?, token, request.fencing, seen)? {
            Taken::Granted { wanted, block } => {
                self.fencing.update(block);
                line.learn(origin, Fact::CounterIsRight);
                let granted = match wanted {
                    true => AcquireReply::granted_and_wanted(),
                    false => AcquireReply::granted(),
                };
                Ok(Some(granted.with_fencing(Some(block))))
            }
            Taken::NotFree => Ok(None),
            Taken::NotRight => {
                line.unlearn(Fact::CounterIsRight);
                Ok(None)
            }
            Taken::NoTokens(error) => {
                // A lock without its tokens is not what was asked for.
                Box::pin(self.give_back(line, request, token)).await?;
                Err(error.into())
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

    /// Takes the lock if it is free, and asks for it otherwise. Nothing is sent once the attempt is
    /// given up.
    async fn take(
        &self,
        line: &Line<'_>,
        request: &AcquireRequest,
        token: &[u8],
    ) -> Result<AcquireReply, StorageError> {
        let fenced = request.fencing > 0;
        if !request.again && !fenced {
            let set = set_if_free(request, token);
            let send = |wire: &Wire| (!request.is_given_up()).then(|| wire.send([set]));
            let Some((reply, _)) = line.call(send).await? else {
                return Ok(AcquireReply::held(None));
            };
            if replies::set(reply?)? {
                return Ok(AcquireReply::granted());
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
        let is_wanted = || !request.is_given_up();
        let acquired = ACQUIRE.run_while(is_wanted, false, line, &request.name, arguments);
        let (reply, origin) = match Box::pin(acquired).await {
            Ok(Some(reply)) => reply,
            Ok(None) => return Ok(AcquireReply::held(None)),
            Err(error) => {
                // By the commands before, the lock may be ours.
                if fenced && !request.again && !error.kind().is_transient() {
                    Box::pin(self.give_back(line, request, token)).await?;
                }
                return Err(error);
            }
        };
        let reply = replies::acquired(reply, token, request.fencing, origin.clock)?;
        if has_raised.load(Relaxed) {
            line.learn(origin, Fact::CounterIsRight);
        }
        if let AcquireReply::Granted {
            fencing: Some(block),
            ..
        } = &reply
        {
            self.fencing.update(*block);
        }
        Ok(reply)
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
        match renewed.await {
            Ok((reply, _)) => replies::renewed(&reply),
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
        let script = match request.wanted == Some(false) && !request.quiet {
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
        let called =
            script.run_telling(request.wanted == Some(true), line, &request.name, arguments);
        let (reply, origin) = match called.await {
            Err(error) if frees && error.kind() == StorageErrorKind::WrongType => {
                return Ok(Some(ReleaseReply::NotOurs));
            }
            reply => reply?,
        };
        match frees {
            true => replies::freed(&reply),
            false => replies::released(&reply, origin.clock).map(Some),
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
        let reply = replies::raised(&raised.0)?;
        if reply == RaiseReply::Raised {
            // A counter that falls back below this was lost.
            self.fencing.update(FencingBlock {
                first: request.above,
                count: 1,
            });
        }
        Ok(reply)
    }
}
