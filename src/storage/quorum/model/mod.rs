//! Redlock in every state that some processes around some nodes can bring it to: an explicit-state
//! model check of the very code that runs in production.
//!
//! What is explored is [`Redlock`] itself, with its rounds, its agreement on fencing tokens and its
//! stragglers. Futures cannot be copied, so a state is kept as the steps that lead to it, and made anew
//! from the beginning: each process has a runtime of its own whose clock stands still, and nothing
//! happens that is not a [`Step`]. Two states are the same if the nodes, and what is on its way, are
//! the same, and each process has seen the same, in the same order, since it was last at rest: its
//! code has nothing else to go by. Which number a node or a process has does not count, as nothing is
//! decided by that.
//!
//! # What is checked, and how
//!
//! | promise | how |
//! |---|---|
//! | at most one holder relies on the lock | `World::check`, in each state: there is at most one whose deadline lies ahead, and a majority of the nodes has the lock as that one's until then at least |
//! | a release or renewal touches nobody else's lock | `World::carry_out`; and `Wire::send`: no release is sent for a token that its holder has not given up, and nothing but releases for one that it has |
//! | fencing tokens are unique and grow | `World::check_tokens`, with each grant |
//! | nothing is left behind | `World::settle`: from the state on, nothing more goes wrong; then no task is left, no call, and no lock at any node but of crashed processes, and of acquires that were carried out later than they are followed. Of so many states one is tried, and each in which nothing more can happen |
//! | a free lock is to be had | the same, by one more process; and a process that is alone always gets it ([`Scenario::is_calm`]) |
//!
//! # What is assumed
//!
//! Calls arrive late and in any order, twice or never; their replies, late or never. Mostly a call is
//! answered as it is carried out; how many replies may come later than that is bounded
//! ([`Scenario::late`]). That a reply waits matters only to its own process: what other processes do
//! meanwhile they could have done before the call as well. Processes stop, or crash. Time passes in steps of one
//! `node_timeout`. What a process does with the lock is what a factory does: it asks, and holds, renews
//! and gives back what it was granted in time, or gives back at once what was denied, and lets go of a
//! call that takes too long. Nodes keep what they were told unless a scenario makes them forget.

#![allow(
    clippy::print_stderr,
    reason = "what was explored is worth telling, where anybody looks"
)]

mod trace;
mod wire;
mod world;

use self::{
    wire::{CallId, Time, What},
    world::{Fault, Step, World},
};
use super::{fence::WriteBack, *};
use crate::explorer::{Broken, Order, Plan, Report, System, explore};

/// What has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    /// A holder has a majority of the nodes as long as it relies on the lock.
    Majority,
    /// There is one holder at most.
    Exclusion,
    /// Fencing tokens are unique, and grow for whoever asks later.
    Fencing,
}

impl Promise {
    fn is_with_majority(self) -> bool {
        self == Self::Majority
    }

    fn is_exclusive(self) -> bool {
        self != Self::Fencing
    }
}

/// How much may happen.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    /// What has happened before.
    start: &'static [Step],
    processes: u8,
    nodes: u8,
    /// How often each process asks for the lock, and renews it each time.
    rounds: u8,
    renewals: u8,
    ttl: Time,
    fencing: bool,
    /// The fencing tokens that the nodes have given.
    counters: [u64; 3],
    write_back: WriteBack,
    /// So many callers leave before they are answered.
    leaves: u8,
    /// How often time passes.
    passes: u8,
    /// How many replies may come later than the call is carried out.
    late: u8,
    faults: u8,
    of: &'static [Fault],
    promise: Promise,
    /// Also the order of replies from different nodes counts where it makes no difference to be seen.
    exact: bool,
    states: usize,
    /// Of so many states one is settled.
    settled: u64,
}

impl Scenario {
    const PLAIN: Self = Self {
        name: "",
        start: &[],
        processes: 2,
        nodes: 3,
        rounds: 1,
        renewals: 0,
        ttl: 10_000,
        fencing: false,
        counters: [0, 0, 5],
        write_back: WriteBack::Done,
        leaves: 0,
        passes: 0,
        late: 0,
        faults: 0,
        of: &[],
        promise: Promise::Majority,
        exact: false,
        states: 1_000_000,
        settled: 32,
    };

    /// Nothing stands in anybody's way.
    fn is_calm(&self) -> bool {
        self.processes == 1 && self.faults + self.leaves + self.passes == 0
    }

    /// As the environment says: `MODEL="deep"`, or `MODEL="rounds=2 passes=3 late=1 faults=2 states=100000"`.
    fn as_told(mut self) -> Self {
        let told = std::env::var("MODEL").unwrap_or_default();
        for word in told.split_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<usize>().unwrap();
            match name {
                "deep" => (self.late, self.states) = (self.late + 1, 5_000_000),
                "exact" => self.exact = true,
                "rounds" => self.rounds = number() as u8,
                "passes" => self.passes = number() as u8,
                "late" => self.late = number() as u8,
                "faults" => self.faults = number() as u8,
                "states" => self.states = number(),
                "settled" => self.settled = number() as u64,
                _ => panic!("MODEL: {word}"),
            }
        }
        self
    }

    fn run(&self, order: Order) -> Report<Step> {
        let plan = Plan {
            order,
            most_states: self.states,
            settled: self.settled,
        };
        let report = explore(Search::new(*self), plan);
        let end = match (&report.broken, report.is_complete) {
            (Some(broken), _) => format!("broken after {} steps", broken.trace.len()),
            (None, true) => "complete".to_owned(),
            (None, false) => "cut off".to_owned(),
        };
        eprintln!(
            "{:<32} {:>9} states {:>9} steps, depth {:>3}, {:>7} settled, {:>6.1} s: {end}",
            self.name,
            report.states,
            report.steps,
            report.depth,
            report.settled,
            report.time.as_secs_f64(),
        );
        report
    }

    /// Every promise holds in every state.
    fn holds(self) {
        let scenario = self.as_told();
        if let Some(broken) = scenario.run(Order::Depth).broken {
            // A shorter way to it, or to another.
            let shortest = scenario.run(Order::Breadth).broken;
            panic!("{}", scenario.tell(&shortest.unwrap_or(broken)));
        }
    }

    /// The shortest way to this.
    fn ends_with(self, what: &str) {
        let plan = Self {
            settled: u64::MAX,
            ..self
        };
        let broken = plan.run(Order::Breadth).broken.expect("a broken promise");
        let text = self.tell(&broken);
        assert!(broken.what.contains(what), "{text}");
        eprintln!("{text}");
    }

    fn tell(&self, broken: &Broken<Step>) -> String {
        let after = match broken.when_settled {
            true => "     and then nothing more goes wrong\n",
            false => "",
        };
        let (name, what) = (self.name, &broken.what);
        let steps = trace::tell(self, &broken.trace);
        format!("{name}: {what}\n{steps}{after}")
    }
}

/// A state: how it is come to, what can happen in it, and what tells it from others.
#[derive(Clone)]
struct Search {
    scenario: Scenario,
    path: Vec<Step>,
    steps: Vec<Step>,
    fingerprint: u64,
}

impl Search {
    fn new(scenario: Scenario) -> Self {
        let world = World::new(&scenario);
        Self {
            path: Vec::new(),
            steps: world.steps(),
            fingerprint: world.fingerprint(),
            scenario,
        }
    }

    fn world(&self) -> World {
        let mut world = World::new(&self.scenario);
        for step in &self.path {
            world.happen(*step);
        }
        world
    }
}

impl System for Search {
    type Step = Step;

    fn steps(&self) -> Vec<Step> {
        self.steps.clone()
    }

    fn take(&mut self, step: Step) {
        self.path.push(step);
        let world = self.world();
        self.steps = world.steps();
        self.fingerprint = world.fingerprint();
    }

    fn settle(self) {
        self.world().settle();
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

const fn call(process: u8, node: u8, what: What, token: u64) -> CallId {
    CallId {
        process,
        node,
        what,
        token,
        nth: 0,
    }
}

const fn acquires(process: u8, node: u8) -> Step {
    Step::Answer(call(process, node, What::Acquire, 0))
}

/// The first process has the lock, from all nodes.
const HELD: &[Step] = &[Step::Ask(0), acquires(0, 0), acquires(0, 1), acquires(0, 2)];

// --- where all assumptions hold --------------------------------------------------------------

#[test]
fn who_is_alone_gets_the_lock_and_keeps_it() {
    Scenario {
        name: "alone",
        processes: 1,
        rounds: 2,
        renewals: 1,
        fencing: true,
        late: 2,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn two_processes_want_the_lock() {
    Scenario {
        name: "two processes",
        ..Scenario::PLAIN
    }
    .holds();
}
#[test]
fn two_processes_want_the_lock_fencing() {
    Scenario {
        name: "two processes, fencing",
        fencing: true,
        ..Scenario::PLAIN
    }
    .holds();
}

// --- where one is broken ---------------------------------------------------------------------

#[test]
fn a_node_that_forgets_within_the_ttl_lets_a_second_holder_in() {
    Scenario {
        name: "amnesia",
        faults: 1,
        of: &[Fault::Amnesia],
        promise: Promise::Exclusion,
        ..Scenario::PLAIN
    }
    .ends_with("two holders");
}
