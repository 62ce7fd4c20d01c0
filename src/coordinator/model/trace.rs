//! A trace as one would tell it.

use super::{super::*, *};

/// The steps, with what each brought.
pub(super) fn tell(scenario: &Scenario, trace: &[Event]) -> String {
    let mut search = Search::new(Scenario {
        start: &[],
        ..*scenario
    });
    let mut text = String::new();
    for (number, step) in scenario.start.iter().chain(trace).enumerate() {
        let what = words(&search.world, *step);
        // The last one breaks a promise.
        let is_sound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            search.happen(*step);
        }));
        let after = match is_sound {
            Ok(()) => state(&search.world),
            Err(_) => "✗".to_owned(),
        };
        let now = search.world.now.since(Timestamp::ORIGIN).as_millis();
        text += &format!("{:>3}. {now:>4} ms  {what:<64} {after}\n", number + 1);
    }
    text
}

/// `B2`: the second token of the second process.
fn name(token: OwnerToken) -> String {
    let letter = char::from(b'A' + process_of(token) as u8);
    let again = "'".repeat((token.inbox() / PROCESSES as u128) as usize);
    format!("{letter}{again}{}", token.number())
}

fn letter(process: usize) -> char {
    char::from(b'A' + process as u8)
}

fn call(message: &Message) -> String {
    let token = name(message.claim.token);
    match message.call {
        Call::Acquire(_) if message.repeated => format!("acquire {token} (again)"),
        Call::Acquire(_) => format!("acquire {token}"),
        Call::Renew => format!("renew {token}"),
        Call::Release(None) => format!("release {token}"),
        Call::Release(Some((claim, _))) => {
            format!("release {token}, queue {}", name(claim.token))
        }
    }
}

fn push(push: &Push) -> String {
    match push {
        Push::Granted(grant) => format!("\"granted to {}\"", name(grant.token)),
        Push::Wanted => "\"wanted\"".to_owned(),
        Push::Forced(token) => format!("\"{} was taken away\"", name(*token)),
    }
}

fn nth<T>(all: impl Iterator<Item = T>, pick: u8) -> T {
    all.into_iter().nth(pick.into()).unwrap()
}

fn words(world: &World, step: Event) -> String {
    let messages = world.messages.iter();
    match step {
        Event::Join { process, .. } => format!("{}: a caller comes", letter(process)),
        Event::Poll { process, pick } => {
            let is_first = if pick == 0 { "" } else { ", not the first," };
            format!("{}: the caller{is_first} looks", letter(process))
        }
        Event::Leave { process, .. } => format!("{}: a caller leaves", letter(process)),
        Event::TurnDone { process, pick } => {
            let holder = &world.processes[process].holders[usize::from(pick)];
            let token = name(holder.claim.token);
            format!("{}: the holder of {token} is done", letter(process))
        }
        Event::Tick(process) => format!("{}: the keeper looks", letter(process)),
        Event::Arrive(pick) => {
            let all = messages.filter(|message| message.answer.is_none());
            format!("server: carries out {}", call(nth(all, pick)))
        }
        Event::Reply { pick, how, .. } => {
            let all = messages.filter(|message| !message.is_settled);
            let message = nth(all, pick);
            let (process, call) = (letter(message.process), call(message));
            match how {
                How::Answered => format!("{process}: hears the reply to {call}"),
                How::TimedOut => format!("{process}: gets no reply in time to {call}"),
                How::Vanished => format!("{process}: {call} is lost on its way"),
                How::Refused => format!("{process}: {call} is refused"),
            }
        }
        Event::Deliver { pick, again } => {
            let (process, text) = &world.pushes[usize::from(pick)];
            let twice = if again { ", not for the last time" } else { "" };
            format!("{}: hears {}{twice}", letter(*process), push(text))
        }
        Event::Lose(pick) => {
            let (process, text) = &world.pushes[usize::from(pick)];
            format!("{}: {} is lost", letter(*process), push(text))
        }
        Event::Reach(process, true) => format!("{}: is subscribed", letter(process)),
        Event::Reach(process, false) => format!("{}: the subscription breaks", letter(process)),
        Event::Notice(process) => format!("{}: learns about its subscription", letter(process)),
        Event::Pass(by) => format!("{by} ms pass"),
        Event::PassTowardsTheEnd { process, .. } => {
            format!(
                "time passes, to just before the deadline of {}",
                letter(process)
            )
        }
        Event::Crash(process) => format!("{}: crashes, and is started anew", letter(process)),
        Event::Restart(_) => "server: restarts with nothing".to_owned(),
        Event::Replicate => "server: its replica catches up".to_owned(),
        Event::FailOver(0) => "server: its replica takes over".to_owned(),
        Event::FailOver(by) => format!("server: its replica takes over, {by} ms ahead"),
        Event::Force => "somebody takes the lock away by force".to_owned(),
        Event::Lie(process) => format!("{}: is told wrong of a force", letter(process)),
        Event::Revoke(process) => format!("{}: shuts down", letter(process)),
        Event::SetForward(by) => format!("server: its clock is set {by} ms forward"),
        Event::SetBack(by) => format!("server: its clock is set {by} ms back"),
        other => format!("{other:?}"),
    }
}

/// Who has it for the server, and who relies on it.
fn state(world: &World) -> String {
    let now = world.storage_now();
    let mut text = match world.owner() {
        Some((token, until)) => {
            format!("{} for {} ms", name(token), until.since(now).as_millis())
        }
        None => "free".to_owned(),
    };
    for standing in &world.queue {
        text += &format!(", then {}", name(standing.claim.token));
    }
    for process in &world.processes {
        for holder in &process.holders {
            let token = name(holder.claim.token);
            text += &match holder.is_sure(world.now) {
                true => {
                    let left = holder.deadline.since(world.now).as_millis();
                    format!("; {token} in use, sure of {left} ms")
                }
                false => format!("; {token} over"),
            };
        }
    }
    text
}
