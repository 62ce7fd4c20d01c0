//! A trace as one would tell it.

use super::{
    super::*,
    Scenario,
    wire::{CallId, Reply, Request, What},
    world::{Stage, Step, World},
};
use crate::storage::OwnerToken;

/// The steps, with what each brought.
pub(super) fn tell(scenario: &Scenario, trace: &[Step]) -> String {
    let mut world = World::new(&Scenario {
        start: &[],
        ..*scenario
    });
    world.is_free();
    let mut text = String::new();
    for (number, step) in scenario.start.iter().chain(trace).enumerate() {
        let what = words(&world, *step);
        // The last one breaks a promise.
        let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.happen(*step);
        }));
        let after = match broken {
            Ok(()) => state(&world),
            Err(_) => format!("{} ✗", state(&world)),
        };
        text += &format!(
            "{:>3}. {:>4} ms  {what:<60} {after}\n",
            number + 1,
            world.now
        );
    }
    text
}

fn letter(process: u8) -> char {
    char::from(b'A' + process)
}

/// `B2`: the second token of the second process.
fn name(token: OwnerToken) -> String {
    format!("{}{}", letter(token.inbox() as u8 - 1), token.number() + 1)
}

fn call(id: CallId) -> String {
    let what = match id.what {
        What::Acquire => "acquire",
        What::Raise => "raise",
        What::Renew => "renew",
        What::Release => "release",
    };
    let again = if id.nth > 0 { " again" } else { "" };
    format!("{what} {}{}{again}", letter(id.process), id.token + 1)
}

fn said(reply: &Reply) -> String {
    match reply {
        Reply::Acquire(AcquireReply::Granted { fencing, .. }) => match fencing {
            Some(block) => format!("granted, {}", block.first),
            None => "granted".to_owned(),
        },
        Reply::Acquire(_) => "held".to_owned(),
        Reply::Raise(RaiseReply::Raised) => "raised".to_owned(),
        Reply::Renew(RenewReply::Renewed | RenewReply::RenewedAndWanted) => "renewed".to_owned(),
        Reply::Raise(_) | Reply::Renew(_) | Reply::Release(ReleaseReply::NotOurs) => {
            "not ours".to_owned()
        }
        Reply::Release(_) => "released".to_owned(),
        Reply::Refused => "refused".to_owned(),
    }
}

fn words(world: &World, step: Step) -> String {
    let answer = |id: CallId| {
        let mut wire = world.wire.lock().unwrap();
        let request: &Request = &wire.find(id).request;
        let mut node = world.nodes[usize::from(id.node)];
        said(&node.carry_out(request, world.now))
    };
    let node = |node: u8| format!("node {}", node + 1);
    let at = |id: CallId| node(id.node);
    match step {
        Step::Ask(process) => format!("{}: asks for the lock", letter(process)),
        Step::Leave(process) => format!("{}: the caller leaves", letter(process)),
        Step::Renew(process) => format!("{}: renews", letter(process)),
        Step::Release(process) => format!("{}: gives the lock back", letter(process)),
        Step::Crash(process) => format!("{}: crashes, and is started anew", letter(process)),
        Step::Stop(process) => format!("{}: stands still", letter(process)),
        Step::Resume(process) => format!("{}: goes on", letter(process)),
        Step::Answer(id) => format!("{}: {}: {}", at(id), call(id), answer(id)),
        Step::CarryOut(id) => {
            format!("{}: {}: {}, on its way", at(id), call(id), answer(id))
        }
        Step::Hear(id) => {
            let heard = format!("hears from {} of {}", at(id), call(id));
            format!("{}: {heard}", letter(id.process))
        }
        Step::AnswerAndRepeat(id) => {
            let again = "and it comes again";
            format!("{}: {}: {}, {again}", at(id), call(id), answer(id))
        }
        Step::LoseReply(id) => {
            format!("{}: {}: {}, which is lost", at(id), call(id), answer(id))
        }
        Step::LoseCall(id) => format!("{}: {} is lost on its way", at(id), call(id)),
        Step::Refuse(id) => format!("{}: {}: refused", at(id), call(id)),
        Step::Pass => "time passes".to_owned(),
        Step::SetForward(it) => format!("{}: its clock is set forward", node(it)),
        Step::Restart(it) => format!("{}: restarts with nothing", node(it)),
        Step::RestartLater(it) => {
            format!("{}: forgets, and is back after a ttl", node(it))
        }
    }
}

/// Who has it for each node, and who relies on it.
fn state(world: &World) -> String {
    let owners = world.nodes.iter().map(|node| match node.owner(world.now) {
        Some((token, _)) => name(token),
        None => "-".to_owned(),
    });
    let mut text = owners.collect::<Vec<_>>().join(" ");
    for (_, token, deadline) in world.holders() {
        text += &format!(
            "; {} in use, sure of {} ms",
            name(token),
            deadline - world.now
        );
    }
    for (process, index) in world.processes.iter().zip(0..) {
        if process.is_stopped {
            text += &format!("; {} stands still", letter(index));
        }
        if let Stage::Holding { token, deadline } = process.stage
            && deadline <= world.now
        {
            text += &format!("; {} over", name(token));
        }
    }
    text
}
