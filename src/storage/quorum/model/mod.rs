//! Redlock in every state that some processes around some nodes can bring it to: an explicit-state
//! model check of the very code that runs in production.
//!
//! What is explored is [`Redlock`] itself, with its rounds, its agreement on fencing tokens and its
//! stragglers. Futures cannot be copied, so a state is kept as the steps that lead to it, and made anew
//! from the beginning: each process has a runtime of its own whose clock stands still, and nothing
//! happens that is not a [`Step`]. Two states are the same if the nodes, and what is on its way, are
//! the same, and each process has seen the same, in the same order, since it was last at rest: its
//! code has nothing else to go by. Two things are taken as read. Which number a node or a process has
//! does not count. Nor does the order in which a process hears from different nodes, as long as it does
//! nothing about it that can be seen: a round counts votes, and all else is kept for each node. The
//! second can be left out ([`Scenario::exact`]).
//!
//! The tests cut each scenario off after a thousand states; `scripts/model --deep` goes on to 100,000.
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
//! meanwhile they could have done before the call as well. Processes stop, or crash. Time passes in
//! steps of one `node_timeout`. What a process does with the lock is what a factory does: it asks, and holds, renews
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
use super::fence::WriteBack;
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
    /// A renewal may also begin while the lock is being given back, by another thread.
    races: bool,
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
        races: false,
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
        states: 1_000,
        settled: 32,
    };

    /// Nothing stands in anybody's way.
    fn is_calm(&self) -> bool {
        self.processes == 1 && self.faults + self.leaves + self.passes == 0
    }

    /// As the environment says: `MODEL="deep"`, or `MODEL="rounds=2 passes=3 late=1 faults=2 states=100000"`.
    fn as_told(self) -> Self {
        self.told(&std::env::var("MODEL").unwrap_or_default())
    }

    fn told(mut self, told: &str) -> Self {
        for word in told.split_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<usize>().unwrap();
            match name {
                "deep" => self.states = 100_000,
                // Of the other model.
                "callers" => {}
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
            states: 1_000_000,
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
        let mut search = Self {
            path: Vec::new(),
            steps: Vec::new(),
            fingerprint: 0,
            scenario,
        };
        search.look(&search.world());
        search
    }

    /// What can happen now. In which order it is tried is left to the state, so that a search that is
    /// cut off has not tried the same kind of step first everywhere.
    fn look(&mut self, world: &World) {
        self.steps = world.steps();
        self.fingerprint = world.fingerprint();
        if !self.steps.is_empty() {
            let first = self.fingerprint % self.steps.len() as u64;
            self.steps.rotate_left(first as usize);
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
        self.look(&world);
    }

    fn settle(self) {
        self.world().settle();
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

const fn call(process: u8, node: u8, what: What) -> CallId {
    CallId {
        process,
        node,
        what,
        token: 0,
        nth: 0,
    }
}

const fn acquires(process: u8, node: u8) -> Step {
    Step::Answer(call(process, node, What::Acquire))
}

/// A has the lock, from all nodes.
const HELD: &[Step] = &[Step::Ask(0), acquires(0, 0), acquires(0, 1), acquires(0, 2)];

/// A has the lock from two nodes, and the third has not been reached.
const BARELY_HELD: &[Step] = &[Step::Ask(0), acquires(0, 0), acquires(0, 1)];

/// The same, and B asks for it.
const BARELY_HELD_AND_WANTED: &[Step] =
    &[Step::Ask(0), acquires(0, 0), acquires(0, 1), Step::Ask(1)];

/// A has the lock from all nodes, renews it, and gives it back meanwhile.
const RENEWED_AND_RELEASED: &[Step] = &[
    Step::Ask(0),
    acquires(0, 0),
    acquires(0, 1),
    acquires(0, 2),
    Step::Renew(0),
    Step::Release(0),
];

const fn renews(node: u8) -> Step {
    Step::Answer(call(0, node, What::Renew))
}

/// A has the lock from two nodes, and has found at a renewal that the third does not have it.
const HEALING: &[Step] = &[
    Step::Ask(0),
    acquires(0, 0),
    acquires(0, 1),
    Step::Renew(0),
    renews(0),
    renews(1),
    renews(2),
];

/// A has been granted the lock by two nodes whose fencing tokens differ, and has lost one of them
/// before its token could be written back there.
const AGREEING: &[Step] = &[
    Step::Ask(0),
    acquires(0, 0),
    acquires(0, 2),
    Step::SetForward(0),
];

/// Both ask, and the nodes are divided.
const DIVIDED: &[Step] = &[Step::Ask(0), Step::Ask(1), acquires(0, 0), acquires(1, 2)];

const SHORT: Time = 300;

// --- where all assumptions hold --------------------------------------------------------------

/// As `scripts/model` names them.
#[test]
fn bounds_are_understood_as_they_are_told() {
    assert_eq!(Scenario::PLAIN.told("deep").states, 100_000);
    let told = Scenario::PLAIN.told("rounds=2 passes=3 late=1 faults=2 states=40000");
    assert_eq!((told.rounds, told.passes, told.late), (2, 3, 1));
    assert_eq!((told.faults, told.states), (2, 40_000));
}

#[test]
fn who_is_alone_gets_the_lock_and_keeps_it() {
    Scenario {
        name: "alone",
        processes: 1,
        renewals: 1,
        fencing: true,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn who_is_alone_gets_the_lock_though_replies_are_late() {
    Scenario {
        name: "alone, late replies",
        processes: 1,
        rounds: 2,
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
fn two_processes_want_the_lock_and_a_fencing_token() {
    Scenario {
        name: "two processes, fencing",
        fencing: true,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn two_processes_want_the_lock_twice() {
    Scenario {
        name: "two processes, twice",
        start: BARELY_HELD,
        rounds: 2,
        fencing: true,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn two_processes_divide_the_nodes() {
    Scenario {
        name: "divided",
        start: DIVIDED,
        rounds: 2,
        late: 1,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn three_processes_want_the_lock() {
    Scenario {
        name: "three processes",
        start: DIVIDED,
        processes: 3,
        fencing: true,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_lock_of_one_node() {
    Scenario {
        name: "one node",
        nodes: 1,
        rounds: 2,
        renewals: 1,
        fencing: true,
        late: 1,
        faults: 1,
        of: &[Fault::Losses, Fault::Repetition],
        passes: 1,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn callers_leave_and_nothing_is_left() {
    Scenario {
        name: "callers leave",
        processes: 1,
        fencing: true,
        leaves: 1,
        late: 1,
        passes: 1,
        rounds: 2,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn calls_and_replies_are_lost() {
    Scenario {
        name: "losses",
        start: BARELY_HELD_AND_WANTED,
        fencing: true,
        passes: 2,
        faults: 1,
        of: &[Fault::Losses],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn calls_are_lost_while_the_lock_is_renewed() {
    Scenario {
        name: "losses, renewals",
        start: HELD,
        processes: 1,
        renewals: 1,
        passes: 2,
        faults: 1,
        of: &[Fault::Losses],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_lock_is_given_back_while_it_is_renewed() {
    Scenario {
        name: "renewed and released",
        start: RENEWED_AND_RELEASED,
        processes: 1,
        renewals: 1,
        late: 1,
        passes: 1,
        faults: 1,
        of: &[Fault::Losses, Fault::ClockForward],
        promise: Promise::Fencing,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_renewal_begins_while_the_lock_is_given_back() {
    Scenario {
        name: "renewal behind a release",
        start: HELD,
        processes: 1,
        renewals: 1,
        races: true,
        faults: 1,
        of: &[Fault::ClockForward],
        promise: Promise::Fencing,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_lock_that_was_healed_is_given_back() {
    Scenario {
        name: "healed",
        start: HEALING,
        processes: 1,
        renewals: 1,
        ..Scenario::PLAIN
    }
    .holds();
}

/// What was written back counts only where the lock is still that one's.
#[test]
fn tokens_are_in_order_though_a_node_is_lost_while_they_are_agreed_on() {
    Scenario {
        name: "agreeing",
        start: AGREEING,
        fencing: true,
        promise: Promise::Fencing,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn calls_arrive_twice_and_nodes_refuse() {
    Scenario {
        name: "repetitions, refusals",
        start: BARELY_HELD_AND_WANTED,
        fencing: true,
        passes: 1,
        faults: 1,
        of: &[Fault::Repetition, Fault::Refusal],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_crashed_holder_is_outlived() {
    Scenario {
        name: "crash",
        start: BARELY_HELD_AND_WANTED,
        ttl: SHORT,
        fencing: true,
        passes: 4,
        faults: 1,
        of: &[Fault::Crash],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_process_that_stands_still_relies_on_nothing_afterwards() {
    Scenario {
        name: "pauses",
        start: BARELY_HELD_AND_WANTED,
        ttl: SHORT,
        fencing: true,
        renewals: 1,
        passes: 4,
        faults: 1,
        of: &[Fault::Pause],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn locks_run_out_while_they_are_asked_for_and_renewed() {
    Scenario {
        name: "ttls",
        start: BARELY_HELD_AND_WANTED,
        ttl: SHORT,
        fencing: true,
        renewals: 2,
        late: 1,
        passes: 5,
        ..Scenario::PLAIN
    }
    .holds();
}

/// "Delayed restarts" of the Redis documentation.
#[test]
fn a_node_that_forgets_and_stays_away_for_a_ttl_lets_nobody_in() {
    Scenario {
        name: "amnesia, and away",
        start: BARELY_HELD_AND_WANTED,
        ttl: SHORT,
        renewals: 1,
        passes: 4,
        faults: 1,
        of: &[Fault::LateAmnesia],
        promise: Promise::Exclusion,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_node_that_forgets_lets_nobody_in_while_all_others_have_the_lock() {
    Scenario {
        name: "amnesia of one of three",
        start: HELD,
        renewals: 1,
        faults: 1,
        of: &[Fault::Amnesia],
        promise: Promise::Exclusion,
        ..Scenario::PLAIN
    }
    .holds();
}

/// Two holders have different tokens, and the later the higher.
#[test]
fn tokens_are_in_order_whatever_nodes_forget() {
    Scenario {
        name: "amnesia, tokens",
        start: BARELY_HELD,
        rounds: 2,
        fencing: true,
        faults: 1,
        of: &[Fault::Amnesia, Fault::ClockForward],
        promise: Promise::Fencing,
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

#[test]
fn a_clock_that_is_set_forward_lets_a_second_holder_in() {
    Scenario {
        name: "a clock is set",
        faults: 1,
        of: &[Fault::ClockForward],
        promise: Promise::Exclusion,
        ..Scenario::PLAIN
    }
    .ends_with("two holders");
}

#[test]
fn without_the_second_round_a_token_is_not_above_the_last() {
    Scenario {
        name: "no second round",
        fencing: true,
        write_back: WriteBack::LeftOut,
        ..Scenario::PLAIN
    }
    .ends_with("was granted after");
}

// --- of the model itself ---------------------------------------------------------------------

/// Otherwise a trace would not lead where it did.
#[test]
fn the_same_steps_lead_to_the_same_state() {
    let scenario = Scenario {
        fencing: true,
        renewals: 1,
        passes: 3,
        late: 2,
        leaves: 1,
        faults: 2,
        of: &[Fault::Losses, Fault::Pause, Fault::Crash, Fault::Amnesia],
        promise: Promise::Fencing,
        ..Scenario::PLAIN
    };
    for seed in 0..20 {
        let mut chance = fastrand::Rng::with_seed(seed);
        let mut search = Search::new(scenario);
        while let Some(step) = chance.choice(&search.steps).copied() {
            search.take(step);
            let (steps, fingerprint) = (search.steps.clone(), search.fingerprint);
            search.look(&search.world());
            assert_eq!(search.steps, steps, "seed {seed}");
            assert_eq!(search.fingerprint, fingerprint, "seed {seed}");
        }
    }
}

/// Neither the numbers of nodes and processes nor what happened elsewhere meanwhile count.
#[test]
fn states_that_differ_in_names_alone_are_the_same() {
    let come_to = |steps: &[Step]| {
        let mut search = Search::new(Scenario {
            counters: [0; 3],
            fencing: true,
            ..Scenario::PLAIN
        });
        steps.iter().for_each(|step| search.take(*step));
        search.fingerprint
    };
    let [a, b] = [0, 1].map(Step::Ask);
    let state = come_to(&[a, acquires(0, 0), b, acquires(1, 1)]);
    for same in [
        [a, b, acquires(1, 1), acquires(0, 0)],
        [b, acquires(1, 2), a, acquires(0, 1)],
        [b, a, acquires(0, 2), acquires(1, 0)],
    ] {
        assert_eq!(come_to(&same), state);
    }
    for other in [
        [a, acquires(0, 0), b, acquires(1, 0)],
        [a, acquires(0, 0), b, acquires(0, 1)],
    ] {
        assert_ne!(come_to(&other), state);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_answers_as_a_storage_in_memory_does() {
    wire::agrees_with_memory().await;
}
