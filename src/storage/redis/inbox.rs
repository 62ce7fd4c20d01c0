//! The messages of one factory: a subscription to its own channel, on a connection of its own.
//!
//! No command about a lock goes over this connection: a server cuts off who does not read its messages soon enough.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use redis::{PushInfo, PushKind, Value};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{
    connection::Connection,
    error::{storage_error, value},
    fencing::{self, Seen},
    pipe::Unasked,
};
use crate::{
    error::{StorageError, StorageErrorKind},
    options::LockOptions,
    storage::{Inbox, Message, OwnerToken, PushedGrant, Stamp},
};

/// How often it is made sure that the connection still lives, and how long that may take.
const PROBE: Duration = Duration::from_secs(2);

/// How long to wait before a new connection is tried: after a short time at first, then longer, and
/// long where we are not let in or may not listen.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_WHEN_REFUSED: Duration = Duration::from_secs(30);

/// Listens, and connects again whenever the connection is lost. If `confirm`, no grant is good
/// without another attempt.
pub(super) async fn listen(connection: &Connection, inbox: Inbox, seen: &Arc<Seen>, confirm: bool) {
    let mut pause = FIRST_PAUSE;
    let mut warned = false;
    loop {
        let mut listened = false;
        let result = session(connection, &inbox, seen, confirm, &mut listened).await;
        inbox.deliver(Message::Deaf);
        if listened {
            (pause, warned) = (FIRST_PAUSE, false);
        }
        if let Err(error) = result
            && !error.kind().is_transient()
        {
            if !std::mem::replace(&mut warned, true) {
                tracing::warn!(%error, "no wake-ups from Redis: waiters poll");
            }
            pause = PAUSE_WHEN_REFUSED;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Listens until the connection is lost, or commands go to another server.
async fn session(
    commands: &Connection,
    inbox: &Inbox,
    seen: &Arc<Seen>,
    confirm: bool,
    listened: &mut bool,
) -> Result<(), StorageError> {
    let lost = Arc::new(Notify::new());
    let run = Arc::new(OnceLock::new());
    let mut present = commands.run();
    let trusted = present.clone();
    let is_replaceable = commands.connector().is_replaceable();
    let opened = {
        let (inbox, seen) = (inbox.clone(), Arc::clone(seen));
        let (lost, run) = (Arc::clone(&lost), Arc::clone(&run));
        // Called by the task that reads from the connection: a message wakes its waiter without a
        // detour over another task.
        commands
            .connector()
            .open_resp3(Box::new(move |unasked| match unasked {
                Unasked::Over => lost.notify_one(),
                Unasked::Push(push) if push.kind == PushKind::Message => {
                    let run = run.get().copied().flatten();
                    // A server that commands no longer go to may go on giving away locks.
                    let run = run.filter(|_| !is_replaceable && *trusted.borrow() == run);
                    receive(&push, &inbox, &seen, run);
                }
                Unasked::Push(_) => {}
            }))
    };
    let (connection, server_run) = opened.await?;
    // Before the first message can come. Of a run that is not known, nobody can tell when a grant
    // was made.
    let _ = run.set(server_run.filter(|_| !confirm));
    // As the scripts have it.
    let channel = format!("{}:inbox:{:032x}", inbox.prefix(), inbox.id());
    let mut subscribe = redis::cmd("SUBSCRIBE");
    subscribe.arg(channel);
    let subscribed = timeout(PROBE, connection.call([subscribe])).await;
    let subscribed = subscribed.map_err(|_| StorageError::new(StorageErrorKind::Timeout))?;
    value(subscribed.map_err(storage_error)?)?;
    *listened = true;
    inbox.deliver(Message::Listening);
    loop {
        tokio::select! {
            // A simulation is the same each time.
            biased;
            () = lost.notified() => return Ok(()),
            Ok(()) = present.changed() => {
                let commands = *present.borrow_and_update();
                // There, nobody who gives away a lock would find us.
                if commands.is_some() && server_run.is_some() && commands != server_run {
                    return Ok(());
                }
                continue;
            }
            () = sleep(PROBE) => {}
        }
        // Is anybody there?
        let alive = timeout(PROBE, connection.call([redis::cmd("PING")])).await;
        if !matches!(alive, Ok(Ok(_))) {
            return Ok(());
        }
    }
}

fn receive(push: &PushInfo, inbox: &Inbox, seen: &Seen, run: Option<u128>) {
    let text = match push.data.last() {
        Some(Value::BulkString(text)) => str::from_utf8(text).ok(),
        _ => None,
    };
    // Anybody can publish anything: what makes no sense is passed over.
    let Some(message) = text.and_then(|text| parse(text, inbox, run)) else {
        return;
    };
    if let Message::Granted(PushedGrant {
        fencing: Some(block),
        ..
    }) = &message
    {
        seen.update(*block);
    }
    inbox.deliver(message);
}

/// Reads what was published to our channel. `run`: of the server's clock, where that can be known.
pub(super) fn parse(text: &str, inbox: &Inbox, run: Option<u128>) -> Option<Message> {
    if let Some(told) = text.strip_prefix("t ") {
        return (told.len() <= Message::MAX_TEXT).then(|| Message::Told(told.to_owned()));
    }
    let mut words = text.split(' ');
    match words.next()? {
        "w" => Some(Message::Wanted(inbox.name(words.next()?)?)),
        "f" => Some(Message::Free(inbox.name(words.next()?)?)),
        "g" => {
            let name = inbox.name(words.next()?)?;
            // Another's is neither ours to use nor ours to release.
            let token =
                OwnerToken::from_text(words.next()?).filter(|token| token.inbox() == inbox.id())?;
            let mut number = || words.next()?.parse::<u64>().ok();
            // No lock is asked for for longer, and what is to be released is followed for so long.
            let ttl = Duration::from_millis(number()?);
            let ttl = (ttl <= LockOptions::MAX_DURATION).then_some(ttl)?;
            let (seconds, micros) = (number()?, number()?);
            let at = Duration::from_secs(seconds).checked_add(Duration::from_micros(micros))?;
            let wanted = number()? > 0;
            let first = i64::try_from(number()?).ok()?;
            let count = u32::try_from(number()?).ok()?;
            let fencing = fencing::block(first, count).filter(|&block| fencing::is_likely(block));
            // Without the tokens that were asked for, it is not complete. Asking again tells why.
            let run = run.filter(|_| count == 0 || fencing.is_some());
            let mut grant = PushedGrant::new(name, token, ttl, Stamp { run, at });
            grant.wanted = wanted;
            grant.fencing = fencing;
            Some(Message::Granted(grant))
        }
        _ => None,
    }
}
