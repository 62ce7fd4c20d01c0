//! Processes around some nodes, and what can happen there.

use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
    time::{Instant, advance},
};

use futures_util::FutureExt;

use super::{
    super::*,
    Scenario,
    wire::{CallId, Line, Node, Reply, Request, Sent, Time, What, Wire},
};
use crate::{
    coordinator::lease::validity,
    explorer::hash,
    key::{KeyPrefix, LockKey, LockName},
    storage::{GivenUp, OwnerToken},
    sync::atomic::Ordering::Relaxed,
};

/// What a node has to answer: one pass of time, as all that matters here is longer or shorter.
pub(super) const NODE_TIMEOUT: Time = 100;
/// After this a caller lets go of its call, as a factory's `storage_timeout` does.
const LONGEST_CALL: Time = 200;
/// For so long a call is followed whose caller has gone, or for a ttl: what is carried out even later
/// stays for a ttl.
const PATIENCE: Time = 1_000;

const fn ms(ms: Time) -> Duration {
    Duration::from_millis(ms as u64)
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A process asks for the lock.
    Ask(u8),
    /// Its caller goes away before it has an answer.
    Leave(u8),
    Renew(u8),
    Release(u8),
    Crash(u8),
    /// It stands still; its clock goes on.
    Stop(u8),
    Resume(u8),
    /// A call is carried out and answered.
    Answer(CallId),
    /// It is carried out, and the reply is on its way.
    CarryOut(CallId),
    /// The reply is there.
    Hear(CallId),
    /// A call is carried out and answered, and arrives once more some time later.
    AnswerAndRepeat(CallId),
    LoseReply(CallId),
    LoseCall(CallId),
    /// It is answered with an error, and not carried out.
    Refuse(CallId),
    Pass,
    /// The clock of a node is set forward: what lock it has is over.
    SetForward(u8),
    /// A node is restarted with nothing.
    Restart(u8),
    /// The same, and it stays away for a ttl.
    RestartLater(u8),
}

/// What a process has seen since it was last at rest: with the code, all that its futures are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    what: u8,
    node: Option<u8>,
    word: u64,
    /// The number of the token whose acquire was answered.
    acquire: Option<u64>,
    /// A reply that brought forth nothing that others can see.
    is_quiet: bool,
}

mod seen {
    pub(super) const LATE: u8 = 1;
    pub(super) const ASKED: u8 = 2;
    pub(super) const LEFT: u8 = 3;
    pub(super) const RENEWED: u8 = 4;
    pub(super) const RELEASED: u8 = 5;
    pub(super) const TIME: u8 = 6;
    pub(super) const REPLY: u8 = 7;
    pub(super) const ASIDE: u8 = 8;
    pub(super) const SWEPT: u8 = 9;
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    Idle,
    Asking {
        token: OwnerToken,
        sent: Time,
        above: u64,
    },
    Holding {
        token: OwnerToken,
        deadline: Time,
    },
    Releasing {
        token: OwnerToken,
    },
}

impl Stage {
    /// What it is, without whose.
    fn words(self, now: Time) -> [u64; 4] {
        match self {
            Self::Idle => [0, 0, 0, 0],
            Self::Asking { token, sent, above } => {
                [1, token.number(), u64::from(now - sent), above]
            }
            Self::Holding { token, deadline } => {
                let left = u64::from(deadline.saturating_sub(now));
                [2, token.number(), left, 0]
            }
            Self::Releasing { token } => [3, token.number(), 0, 0],
        }
    }
}

#[derive(Debug)]
enum Outcome {
    Acquired(Result<AcquireReply, StorageError>),
    Renewed(Result<RenewReply, StorageError>),
    Released(Result<ReleaseReply, StorageError>),
}

/// A call to the Redlock.
#[derive(Debug)]
struct Op {
    task: JoinHandle<Outcome>,
    token: OwnerToken,
    since: Time,
}

impl Op {
    /// What came of it, if it is over. A panic in it goes on here.
    fn outcome(&mut self) -> Option<Outcome> {
        match (&mut self.task).now_or_never()? {
            Ok(outcome) => Some(outcome),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

pub(super) struct Process {
    runtime: Runtime,
    redlock: Redlock,
    pub(super) stage: Stage,
    tokens: u64,
    rounds: u8,
    renewals: u8,
    /// An acquire or a release.
    op: Option<Op>,
    renewal: Option<Op>,
    pub(super) is_stopped: bool,
    /// So much time has passed since it was stopped.
    lag: Time,
    seen: Vec<Seen>,
}

impl Process {
    fn new(scenario: &Scenario, index: u8, wire: &Arc<Mutex<Wire>>) -> Self {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        let lines = (0..scenario.nodes).map(|node| Line {
            wire: Arc::clone(wire),
            process: index,
            node,
        });
        let builder = lines.fold(Redlock::builder(), RedlockBuilder::node);
        let mut redlock = builder.node_timeout(ms(NODE_TIMEOUT)).build().unwrap();
        Arc::get_mut(&mut redlock.shared).unwrap().write_back = scenario.write_back;
        Self {
            runtime,
            redlock,
            stage: Stage::Idle,
            tokens: 0,
            rounds: scenario.rounds,
            renewals: scenario.renewals,
            op: None,
            renewal: None,
            is_stopped: false,
            lag: 0,
            seen: Vec::new(),
        }
    }

    /// Nothing is under way, and no task of it is left.
    fn is_at_rest(&self) -> bool {
        self.op.is_none()
            && self.renewal.is_none()
            && self.redlock.shared.stragglers.len() == 0
            && self.runtime.metrics().num_alive_tasks() == 0
    }

    /// If no future is under way but what was put aside, and the task that comes by for that, then the
    /// process is what can be seen of it, whatever led to this.
    fn forget_the_way(&mut self) {
        if self.op.is_some() || self.renewal.is_some() {
            return;
        }
        let shared = Arc::clone(&self.redlock.shared);
        let Some((mut aside, swept_at)) = shared.stragglers.at_rest() else {
            return;
        };
        if self.runtime.metrics().num_alive_tasks() > swept_at.iter().len() {
            return;
        }
        aside.sort_by_key(|(token, node, _)| (token.number(), *node));
        let way = std::mem::take(&mut self.seen);
        for (token, node, is_old) in aside {
            let (number, node) = (token.number(), node as u8);
            self.see(seen::ASIDE, Some(node), number << 1 | u64::from(is_old));
            let is_its = |seen: &&Seen| seen.acquire == Some(number) && seen.node == Some(node);
            self.seen.extend(way.iter().filter(is_its));
        }
        for (node, index) in shared.nodes.iter().zip(0..) {
            if node.is_late.load(Relaxed) {
                self.see(seen::LATE, Some(index), 0);
            }
        }
        if let Some(at) = swept_at {
            let now = self.runtime.block_on(async { Instant::now() });
            self.see(seen::SWEPT, None, (now - at).as_millis() as u64);
        }
    }

    fn see(&mut self, what: u8, node: Option<u8>, word: u64) {
        self.seen.push(Seen {
            what,
            node,
            word,
            acquire: None,
            is_quiet: false,
        });
    }

    fn start(
        &self,
        token: OwnerToken,
        since: Time,
        call: impl Future<Output = Outcome> + Send + 'static,
    ) -> Op {
        Op {
            task: self.runtime.spawn(call),
            token,
            since,
        }
    }

    /// Whatever can go on goes on, and `by` passes before.
    fn run(&self, by: Time) {
        // Pauses between tries are the same in each state that is the same.
        fastrand::seed(0);
        self.runtime.block_on(async {
            if by > 0 {
                advance(ms(by)).await;
            }
            // All tasks that are ready have their turn before this one has it again.
            for _ in 0..2 {
                tokio::task::yield_now().await;
            }
        });
    }
}

pub(super) struct World {
    scenario: Scenario,
    name: LockName,
    pub(super) wire: Arc<Mutex<Wire>>,
    pub(super) nodes: Vec<Node>,
    pub(super) processes: Vec<Process>,
    pub(super) now: Time,
    /// Of all grants so far, their fencing tokens.
    tokens: Vec<FencingBlock>,
    restarts: u64,
    /// Tokens that may stay at a node until their time is over.
    left: Vec<OwnerToken>,
    leaves: u8,
    passes: u8,
    late: u8,
    faults: u8,
}

impl World {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let key = LockKey::from_parts(["k"]).unwrap();
        let wire = Arc::default();
        let processes = (0..scenario.processes).map(|it| Process::new(scenario, it, &wire));
        let mut world = Self {
            name: KeyPrefix::default().name(&key),
            nodes: (0..scenario.nodes as usize)
                .map(|node| Node::new(scenario.counters[node % 3]))
                .collect(),
            processes: processes.collect(),
            wire,
            now: 0,
            tokens: Vec::new(),
            restarts: 0,
            left: Vec::new(),
            leaves: scenario.leaves,
            passes: scenario.passes,
            late: scenario.late,
            faults: scenario.faults,
            scenario: *scenario,
        };
        if !scenario.start.is_empty() {
            world.is_free();
            for step in scenario.start {
                world.happen(*step);
            }
            world.is_bounded();
        }
        world
    }

    /// What happens from now on counts for nothing.
    pub(super) fn is_free(&mut self) {
        let all = [
            &mut self.leaves,
            &mut self.passes,
            &mut self.late,
            &mut self.faults,
        ];
        all.into_iter().for_each(|bound| *bound = u8::MAX);
    }

    fn is_bounded(&mut self) {
        let scenario = self.scenario;
        (self.leaves, self.passes) = (scenario.leaves, scenario.passes);
        (self.late, self.faults) = (scenario.late, scenario.faults);
    }

    fn wire(&self) -> std::sync::MutexGuard<'_, Wire> {
        self.wire.lock().unwrap()
    }

    pub(super) fn happen(&mut self, step: Step) {
        match step {
            Step::Ask(process) => self.ask(process),
            Step::Leave(process) => {
                self.leaves -= 1;
                self.leave(process);
            }
            Step::Renew(process) => self.renew(process),
            Step::Release(process) => self.release(process, false),
            Step::Crash(process) => self.crash(process),
            Step::Stop(process) => self.processes[usize::from(process)].is_stopped = true,
            Step::Resume(process) => self.resume(process),
            Step::Answer(id) => {
                let call = self.wire().take(id);
                let reply = self.carry_out(&call);
                self.deliver(call, reply);
            }
            Step::CarryOut(id) => {
                self.late -= 1;
                self.carry_out_late(id);
            }
            Step::Hear(id) => {
                let mut call = self.wire().take(id);
                let reply = call.answer.take().expect("a call that was carried out");
                self.deliver(call, reply);
            }
            Step::AnswerAndRepeat(id) => {
                let call = self.wire().take(id);
                let reply = self.carry_out(&call);
                let again = Sent {
                    request: call.request.clone(),
                    answer: None,
                    caller: tokio::sync::oneshot::channel().0,
                    ..call
                };
                if id.what == What::Acquire {
                    self.left.push(call.request.token());
                }
                self.wire().calls.push(again);
                self.deliver(call, reply);
            }
            Step::LoseReply(id) => {
                let call = self.wire().take(id);
                self.carry_out(&call);
            }
            Step::LoseCall(id) => drop(self.wire().take(id)),
            Step::Refuse(id) => {
                let call = self.wire().take(id);
                self.deliver(call, Reply::Refused);
            }
            Step::Pass => {
                self.passes -= 1;
                self.pass(NODE_TIMEOUT);
            }
            Step::SetForward(node) => self.nodes[usize::from(node)].owner = None,
            Step::Restart(node) => self.restart(node, 0),
            Step::RestartLater(node) => self.restart(node, self.scenario.ttl),
        }
        self.faults -= u8::from(is_fault(step));
        self.check();
    }

    // --- what a process does ------------------------------------------------------------------

    fn ask(&mut self, index: u8) {
        let (now, above, name) = (self.now, self.highest(), self.name.clone());
        let fencing = u32::from(self.scenario.fencing);
        let process = &mut self.processes[usize::from(index)];
        process.rounds -= 1;
        process.renewals = self.scenario.renewals;
        let token = OwnerToken::new(u128::from(index) + 1, process.tokens);
        process.tokens += 1;
        process.stage = Stage::Asking {
            token,
            sent: now,
            above,
        };
        process.see(seen::ASKED, None, token.number());
        let redlock = process.redlock.clone();
        let request = AcquireRequest {
            name,
            token,
            ttl: ms(self.scenario.ttl),
            again: token.number() > 0,
            repeated: false,
            queue: None,
            hint: None,
            fencing,
            given_up: GivenUp::default(),
        };
        let call = async move { Outcome::Acquired(redlock.acquire(&request).await) };
        process.op = Some(process.start(token, now, call));
        self.go_on(index, 0);
    }

    fn leave(&mut self, index: u8) {
        let process = &mut self.processes[usize::from(index)];
        process.see(seen::LEFT, None, 0);
        if let Some(op) = process.op.take() {
            op.task.abort();
        }
        process.run(0);
        self.release(index, true);
    }

    fn renew(&mut self, index: u8) {
        let (now, name) = (self.now, self.name.clone());
        let process = &mut self.processes[usize::from(index)];
        let (Stage::Holding { token, .. } | Stage::Releasing { token }) = process.stage else {
            unreachable!("only a holder renews")
        };
        process.renewals -= 1;
        process.see(seen::RENEWED, None, token.number());
        let redlock = process.redlock.clone();
        let request = RenewRequest {
            name,
            token,
            ttl: ms(self.scenario.ttl),
        };
        let call = async move { Outcome::Renewed(redlock.renew(&[request]).await.remove(0)) };
        process.renewal = Some(process.start(token, now, call));
        self.go_on(index, 0);
    }

    fn release(&mut self, index: u8, quiet: bool) {
        self.send_release(index, quiet);
        self.go_on(index, 0);
    }

    fn send_release(&mut self, index: u8, quiet: bool) {
        let (now, name) = (self.now, self.name.clone());
        let wire = Arc::clone(&self.wire);
        let process = &mut self.processes[usize::from(index)];
        let (Stage::Asking { token, .. } | Stage::Holding { token, .. }) = process.stage else {
            unreachable!("only what was asked for is released")
        };
        wire.lock().unwrap().given_up.insert(token);
        process.stage = Stage::Releasing { token };
        process.see(seen::RELEASED, None, token.number() << 1 | u64::from(quiet));
        let redlock = process.redlock.clone();
        let request = ReleaseRequest {
            name,
            token,
            ttl: ms(self.scenario.ttl),
            wanted: None,
            requeue: None,
            quiet,
        };
        let call = async move { Outcome::Released(redlock.release(&request).await) };
        process.op = Some(process.start(token, now, call));
    }

    /// Its memory is gone, and it begins anew; what it has sent goes its way.
    fn crash(&mut self, index: u8) {
        let fresh = Process::new(&self.scenario, index, &self.wire);
        let process = &mut self.processes[usize::from(index)];
        let old = std::mem::replace(process, fresh);
        (process.tokens, process.rounds) = (old.tokens, old.rounds);
        for number in 0..old.tokens {
            let token = OwnerToken::new(u128::from(index) + 1, number);
            self.wire.lock().unwrap().given_up.insert(token);
            self.left.push(token);
        }
    }

    fn resume(&mut self, index: u8) {
        let process = &mut self.processes[usize::from(index)];
        process.is_stopped = false;
        let lag = std::mem::take(&mut process.lag);
        process.see(seen::TIME, None, lag.into());
        self.go_on(index, lag);
    }

    /// A process does what it can, after some time.
    fn go_on(&mut self, index: u8, mut by: Time) {
        if self.processes[usize::from(index)].is_stopped {
            return;
        }
        loop {
            self.processes[usize::from(index)].run(std::mem::take(&mut by));
            if !self.has_progressed(index) {
                break;
            }
        }
        self.processes[usize::from(index)].forget_the_way();
    }

    /// Does what a factory does when a call has ended, or has taken too long.
    fn has_progressed(&mut self, index: u8) -> bool {
        let now = self.now;
        let process = &mut self.processes[usize::from(index)];
        if let Some(outcome) = process.op.as_mut().and_then(Op::outcome) {
            process.op = None;
            match outcome {
                Outcome::Acquired(reply) => self.acquired(index, reply),
                Outcome::Released(reply) => self.released(index, reply),
                Outcome::Renewed(_) => unreachable!(),
            }
            return true;
        }
        if let Some(outcome) = process.renewal.as_mut().and_then(Op::outcome) {
            let op = process.renewal.take();
            let Outcome::Renewed(reply) = outcome else {
                unreachable!()
            };
            let op = op.expect("the one that has ended");
            self.renewed(index, op.token, op.since, reply);
            return true;
        }
        let is_overdue =
            |op: &Option<Op>, limit| op.as_ref().is_some_and(|op| now >= op.since + limit);
        if is_overdue(&process.renewal, NODE_TIMEOUT)
            && let Some(op) = process.renewal.take()
        {
            op.task.abort();
            return true;
        }
        if is_overdue(&process.op, LONGEST_CALL)
            && let Some(op) = process.op.take()
        {
            op.task.abort();
            process.run(0);
            match process.stage {
                Stage::Asking { .. } => self.send_release(index, false),
                _ => process.stage = Stage::Idle,
            }
            return true;
        }
        false
    }

    fn acquired(&mut self, index: u8, reply: Result<AcquireReply, StorageError>) {
        let now = self.now;
        let stage = self.processes[usize::from(index)].stage;
        let Stage::Asking { token, sent, above } = stage else {
            unreachable!("an answer to what was not asked")
        };
        let deadline = sent + validity(ms(self.scenario.ttl)).as_millis() as Time;
        match reply {
            Ok(AcquireReply::Granted { fencing, .. }) if now < deadline => {
                self.check_tokens(fencing, above);
                self.processes[usize::from(index)].stage = Stage::Holding { token, deadline };
            }
            reply => {
                let calm = self.scenario.is_calm();
                assert!(!calm, "who is alone does not get the lock: {reply:?}");
                self.send_release(index, reply.is_ok());
            }
        }
    }

    fn renewed(
        &mut self,
        index: u8,
        renewed: OwnerToken,
        sent: Time,
        reply: Result<RenewReply, StorageError>,
    ) {
        let now = self.now;
        let process = &mut self.processes[usize::from(index)];
        let Stage::Holding { token, deadline } = &mut process.stage else {
            return;
        };
        if *token != renewed {
            return;
        }
        match reply {
            Ok(RenewReply::NotOurs) => {
                let calm = self.scenario.is_calm();
                assert!(!calm, "who is alone loses the lock");
                self.send_release(index, false);
            }
            Ok(_) if now < *deadline => {
                *deadline = sent + validity(ms(self.scenario.ttl)).as_millis() as Time;
            }
            // It was over, and stays so.
            Ok(_) => self.send_release(index, false),
            Err(_) => {}
        }
    }

    fn released(&mut self, index: u8, reply: Result<ReleaseReply, StorageError>) {
        let calm = self.scenario.is_calm();
        let ours = matches!(reply, Ok(ReleaseReply::Released));
        assert!(ours || !calm, "who is alone lost the lock: {reply:?}");
        self.processes[usize::from(index)].stage = Stage::Idle;
    }

    // --- what becomes of calls ----------------------------------------------------------------

    fn carry_out(&mut self, call: &Sent) -> Reply {
        let node = &mut self.nodes[usize::from(call.id.node)];
        let before = node.owner(self.now);
        let reply = node.carry_out(&call.request, self.now);
        if let Some((token, _)) = before
            && token != call.request.token()
        {
            assert_eq!(
                before,
                node.owner(self.now),
                "a lock of another was touched"
            );
        }
        if call.id.what == What::Acquire && self.now >= call.at + PATIENCE.min(self.scenario.ttl) {
            self.left.push(call.request.token());
        }
        reply
    }

    fn carry_out_late(&mut self, id: CallId) {
        let mut call = self.wire().take(id);
        let reply = self.carry_out(&call);
        call.answer = Some(reply);
        self.wire().calls.push(call);
    }

    fn deliver(&mut self, call: Sent, reply: Reply) {
        let id = call.id;
        if call.caller.is_closed() {
            return;
        }
        let word = [id.what as u64, id.token, id.nth.into(), reply.word()];
        let process = &mut self.processes[usize::from(id.process)];
        process.seen.push(Seen {
            what: seen::REPLY,
            node: Some(id.node),
            word: hash(word.into_iter()),
            acquire: (id.what == What::Acquire).then_some(id.token),
            is_quiet: false,
        });
        let before = self.outside(id.process);
        // Who waited for it may have gone.
        let _ = call.caller.send(reply);
        self.go_on(id.process, 0);
        let is_quiet = self.outside(id.process) == before;
        let process = &mut self.processes[usize::from(id.process)];
        if let Some(last) = process.seen.last_mut()
            && last.what == seen::REPLY
        {
            last.is_quiet = is_quiet;
        }
    }

    /// What can be seen of a process without a look into its futures.
    fn outside(&self, index: u8) -> [usize; 7] {
        let process = &self.processes[usize::from(index)];
        let wire = self.wire();
        let calls = wire.calls.iter();
        let heard = calls.filter(|call| call.id.process == index && !call.caller.is_closed());
        let nodes = process.redlock.shared.nodes.iter();
        let late = nodes.filter(|node| node.is_late.load(Relaxed)).count();
        [
            wire.number,
            heard.count(),
            late,
            process.op.iter().chain(&process.renewal).count(),
            process.redlock.shared.stragglers.len(),
            process.runtime.metrics().num_alive_tasks(),
            match process.stage {
                Stage::Idle => 0,
                Stage::Asking { .. } => 1,
                Stage::Holding { .. } => 2,
                Stage::Releasing { .. } => 3,
            },
        ]
    }

    pub(super) fn pass(&mut self, by: Time) {
        self.now += by;
        self.wire().now = self.now;
        for index in 0..self.processes.len() as u8 {
            let process = &mut self.processes[usize::from(index)];
            if process.is_stopped {
                process.lag += by;
                continue;
            }
            if !process.is_at_rest() {
                process.see(seen::TIME, None, by.into());
            }
            self.go_on(index, by);
        }
    }

    fn restart(&mut self, node: u8, away: Time) {
        self.restarts += 1;
        let node = &mut self.nodes[usize::from(node)];
        // Its clock, which shows more than all tokens so far.
        *node = Node::new(1_000 * self.restarts);
        node.away_until = self.now + away;
    }

    // --- what must hold -----------------------------------------------------------------------

    fn highest(&self) -> u64 {
        let last = self.tokens.iter().map(FencingBlock::last);
        last.max().unwrap_or(0)
    }

    fn check_tokens(&mut self, fencing: Option<FencingBlock>, above: u64) {
        let Some(block) = fencing else {
            assert!(!self.scenario.fencing, "a grant without a fencing token");
            return;
        };
        let first = block.first;
        let is_new = self.tokens.iter().all(|other| *other != block);
        assert!(is_new, "two grants have the fencing token {first}");
        assert!(
            first > above,
            "{first} was granted after {above} was in use"
        );
        if self.scenario.promise.is_exclusive() {
            let highest = self.highest();
            assert!(first > highest, "{first} was granted after {highest}");
        }
        self.tokens.push(block);
    }

    /// Who relies on the lock now.
    pub(super) fn holders(&self) -> impl Iterator<Item = (u8, OwnerToken, Time)> {
        let processes = self.processes.iter().zip(0..);
        processes.filter_map(|(process, index)| match process.stage {
            Stage::Holding { token, deadline } if deadline > self.now => {
                Some((index, token, deadline))
            }
            _ => None,
        })
    }

    fn check(&self) {
        if let Some(broken) = &self.wire().broken {
            panic!("{broken}");
        }
        let promise = self.scenario.promise;
        if promise.is_exclusive() {
            let holders = self.holders().count();
            assert!(holders <= 1, "two holders");
        }
        if promise.is_with_majority() {
            for (_, token, deadline) in self.holders() {
                let owners = self.nodes.iter().filter_map(|node| node.owner(self.now));
                let theirs = owners.filter(|owner| owner.0 == token && owner.1 >= deadline);
                let quorum = self.nodes.len() / 2 + 1;
                assert!(
                    theirs.count() >= quorum,
                    "a holder without a majority of the nodes"
                );
            }
        }
    }

    // --- what can happen ----------------------------------------------------------------------

    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::with_capacity(24);
        for (process, index) in self.processes.iter().zip(0..) {
            if process.is_stopped {
                steps.push(Step::Resume(index));
            } else {
                self.of_process(process, index, &mut steps);
            }
        }
        let may = |fault| self.faults > 0 && self.scenario.of.contains(&fault);
        let wire = self.wire();
        let mut calls: Vec<_> = wire.calls.iter().collect();
        calls.sort_by_key(|call| call.id);
        for call in calls {
            let id = call.id;
            if call.answer.is_some() {
                steps.push(Step::Hear(id));
                continue;
            }
            if self.nodes[usize::from(id.node)].away_until > self.now {
                continue;
            }
            steps.push(Step::Answer(id));
            // Nobody would hear it.
            if call.caller.is_closed() {
                continue;
            }
            if self.late > 0 {
                steps.push(Step::CarryOut(id));
            }
            if may(Fault::Losses) {
                steps.push(Step::LoseReply(id));
                steps.push(Step::LoseCall(id));
            }
            if may(Fault::Repetition) {
                steps.push(Step::AnswerAndRepeat(id));
            }
            if may(Fault::Refusal) {
                steps.push(Step::Refuse(id));
            }
        }
        if self.passes > 0 {
            steps.push(Step::Pass);
        }
        for (node, index) in self.nodes.iter().zip(0..) {
            if may(Fault::ClockForward) && node.owner(self.now).is_some() {
                steps.push(Step::SetForward(index));
            }
            if may(Fault::Amnesia) {
                steps.push(Step::Restart(index));
            }
            if may(Fault::LateAmnesia) {
                steps.push(Step::RestartLater(index));
            }
        }
        steps
    }

    fn of_process(&self, process: &Process, index: u8, steps: &mut Vec<Step>) {
        let may = |fault| self.faults > 0 && self.scenario.of.contains(&fault);
        match process.stage {
            Stage::Idle if process.rounds > 0 => steps.push(Step::Ask(index)),
            Stage::Asking { .. } if self.leaves > 0 => steps.push(Step::Leave(index)),
            Stage::Holding { deadline, .. } => {
                let is_free = process.renewal.is_none() && process.renewals > 0;
                if is_free && deadline > self.now {
                    steps.push(Step::Renew(index));
                }
                steps.push(Step::Release(index));
            }
            Stage::Releasing { .. }
                if self.scenario.races && process.renewal.is_none() && process.renewals > 0 =>
            {
                steps.push(Step::Renew(index));
            }
            _ => {}
        }
        if !process.is_at_rest() || !matches!(process.stage, Stage::Idle) {
            if may(Fault::Crash) {
                steps.push(Step::Crash(index));
            }
            if may(Fault::Pause) {
                steps.push(Step::Stop(index));
            }
        }
    }

    // --- when nothing goes wrong any more -----------------------------------------------------

    pub(super) fn settle(&mut self) {
        for index in 0..self.processes.len() as u8 {
            if self.processes[usize::from(index)].is_stopped {
                self.resume(index);
            }
        }
        self.come_to_rest();
        for node in &mut self.nodes {
            // Nobody has to give them back.
            node.owner = node
                .owner(self.now)
                .filter(|(token, _)| !self.left.contains(token));
            assert!(node.owner.is_none(), "a lock is left behind");
        }
        // Who comes now gets it, and has the highest token.
        let stranger = self.processes.len() as u8;
        let mut process = Process::new(&self.scenario, stranger, &self.wire);
        process.rounds = 1;
        self.processes.push(process);
        self.ask(stranger);
        self.hear_all(|_| true);
        let stage = self.processes[usize::from(stranger)].stage;
        assert!(
            matches!(stage, Stage::Holding { .. }),
            "a free lock is not to be had"
        );
    }

    /// All calls and replies arrive, and all holders give the lock back, until nothing is under way.
    fn come_to_rest(&mut self) {
        let until = self.now + 4 * self.scenario.ttl;
        loop {
            self.hear_all(|_| true);
            let holder = self.processes.iter().zip(0..).find_map(|(process, index)| {
                matches!(process.stage, Stage::Holding { .. }).then_some(index)
            });
            if let Some(holder) = holder {
                self.release(holder, false);
                continue;
            }
            if self.processes.iter().all(Process::is_at_rest) && self.wire().calls.is_empty() {
                return;
            }
            assert!(self.now < until, "something goes on for ever");
            self.pass(50);
            self.check();
        }
    }

    fn hear_all(&mut self, hears: impl Fn(CallId) -> bool) {
        loop {
            let next = self.wire().calls.iter().find_map(|call| {
                let is_there = self.nodes[usize::from(call.id.node)].away_until <= self.now;
                (hears(call.id) && (is_there || call.answer.is_some())).then_some(call.id)
            });
            let Some(id) = next else { return };
            let mut call = self.wire().take(id);
            let reply = match call.answer.take() {
                Some(reply) => reply,
                None => self.carry_out(&call),
            };
            self.deliver(call, reply);
            self.check();
        }
    }

    // --- what of it matters for what can follow -----------------------------------------------

    /// The same for states that differ in the names of nodes and processes alone: neither matters to
    /// anybody.
    pub(super) fn fingerprint(&self) -> u64 {
        let ahead = |at: Time| u64::from(at.saturating_sub(self.now));
        let wire = self.wire();
        let calls_of = |of: &dyn Fn(CallId) -> bool| {
            let calls = wire.calls.iter().filter(|call| of(call.id));
            let kinds = calls.map(|call| hash([call.id.what as u64, call.id.token].into_iter()));
            kinds.fold(0_u64, u64::wrapping_add)
        };
        // What can be told of each without the names of others. Only where that is the same, both
        // ways to name them have to be tried.
        let nodes = self.nodes.iter().zip(0..).map(|(node, index)| {
            let until = node.owner(self.now).map_or(0, |(_, until)| ahead(until));
            let calls = calls_of(&|id| id.node == index);
            hash([until, node.counter, ahead(node.away_until), calls].into_iter())
        });
        let nodes = names(&nodes.collect::<Vec<_>>());
        let processes = self.processes.iter().zip(0..).map(|(process, index)| {
            let calls = calls_of(&|id| id.process == index);
            let seen = process.seen.len() as u64;
            let stage = process.stage.words(self.now);
            let all = [calls, seen, process.tokens, process.rounds.into()];
            hash(all.into_iter().chain(stage))
        });
        let processes = names(&processes.collect::<Vec<_>>());
        drop(wire);
        let all = nodes.iter().flat_map(|nodes| {
            let processes = processes.iter();
            processes.map(|processes| self.named(nodes, processes))
        });
        all.min().expect("at least one way to name them")
    }

    /// The state if the nodes and processes had these numbers.
    fn named(&self, nodes: &[u8], processes: &[u8]) -> u64 {
        let mut words = Vec::with_capacity(128);
        let process_of = |token: OwnerToken| {
            let index = token.inbox() as usize - 1;
            u64::from(processes[index]) << 32 | token.number()
        };
        let ahead = |at: Time| u64::from(at.saturating_sub(self.now));
        let left = [self.leaves, self.passes, self.late, self.faults];
        words.extend(left.map(u64::from));
        words.push(self.restarts);
        let mut tokens: Vec<_> = self.tokens.iter().map(|block| block.first).collect();
        tokens.sort_unstable();
        words.push(tokens.len() as u64);
        words.extend(tokens);

        let in_order = |names: &[u8]| {
            let mut order: Vec<_> = (0..names.len()).collect();
            order.sort_by_key(|index| names[*index]);
            order
        };
        for index in in_order(nodes) {
            let node = &self.nodes[index];
            let owner = node.owner(self.now);
            let owner = owner.map_or([u64::MAX; 2], |(token, until)| {
                [process_of(token), ahead(until)]
            });
            words.extend(owner);
            words.extend([node.counter, ahead(node.away_until)]);
        }
        for index in in_order(processes) {
            let process = &self.processes[index];
            words.extend(process.stage.words(self.now));
            let ages = [&process.op, &process.renewal];
            words.extend(ages.map(|op| {
                let age = |op: &Op| u64::from(self.now - op.since) << 8 | op.token.number();
                op.as_ref().map_or(u64::MAX, age)
            }));
            words.extend([process.rounds, process.renewals].map(u64::from));
            words.extend([
                process.tokens,
                process.is_stopped.into(),
                process.lag.into(),
            ]);
            words.push(process.seen.len() as u64);
            let name = |seen: &Seen| {
                let node = seen.node.map(|node| nodes[usize::from(node)]);
                node.map_or(u64::MAX, u64::from)
            };
            let mut way: Vec<_> = process.seen.iter().collect();
            if !self.scenario.exact {
                for together in way.chunk_by_mut(|a, b| a.is_quiet && b.is_quiet) {
                    together.sort_by_key(|seen| name(seen));
                }
            }
            for seen in way {
                words.extend([u64::from(seen.what), name(seen), seen.word]);
            }
        }
        // What is on its way is in no order.
        let wire = self.wire();
        let mut calls: Vec<_> = wire
            .calls
            .iter()
            .map(|call| {
                let id = call.id;
                let from = u64::from(processes[usize::from(id.process)]);
                let to = u64::from(nodes[usize::from(id.node)]);
                let detail = match &call.request {
                    Request::Acquire(request) => {
                        u64::from((self.now - call.at).min(PATIENCE)) << 8
                            | u64::from(request.fencing)
                    }
                    Request::Raise(request) => request.above,
                    Request::Renew(_) => 0,
                    Request::Release(request) => request.quiet.into(),
                };
                let way = from << 32 | to << 24 | (id.what as u64) << 16 | id.token;
                let answer = call.answer.as_ref().map_or(0, Reply::word);
                let heard = u64::from(id.nth) << 1 | u64::from(call.caller.is_closed());
                hash([way, detail, answer, heard].into_iter())
            })
            .collect();
        calls.sort_unstable();
        words.extend(calls);
        let mut left: Vec<_> = self.left.iter().map(|token| process_of(*token)).collect();
        left.sort_unstable();
        left.dedup();
        words.extend(left);
        hash(words.into_iter())
    }
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A call or a reply is lost.
    Losses,
    /// A call arrives twice.
    Repetition,
    /// A node answers with an error.
    Refusal,
    Crash,
    /// A process stands still.
    Pause,
    ClockForward,
    Amnesia,
    /// The node that forgets stays away for a ttl.
    LateAmnesia,
}

fn is_fault(step: Step) -> bool {
    matches!(
        step,
        Step::Crash(_)
            | Step::Stop(_)
            | Step::AnswerAndRepeat(_)
            | Step::LoseReply(_)
            | Step::LoseCall(_)
            | Step::Refuse(_)
            | Step::SetForward(_)
            | Step::Restart(_)
            | Step::RestartLater(_)
    )
}

/// All ways to number them in their order, the same among each other in any.
fn names(of: &[u64]) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new()];
    for last in 0..of.len() {
        let longer = all.iter().flat_map(|names: &Vec<u8>| {
            (0..=last as u8).map(move |at| {
                let moved = names.iter().map(|name| name + u8::from(*name >= at));
                moved.chain([at]).collect()
            })
        });
        all = longer.collect();
        all.retain(|names: &Vec<u8>| {
            (0..last).all(|it| match of[it].cmp(&of[last]) {
                std::cmp::Ordering::Less => names[it] < names[last],
                std::cmp::Ordering::Greater => names[it] > names[last],
                std::cmp::Ordering::Equal => true,
            })
        });
    }
    all
}
