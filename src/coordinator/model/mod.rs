//! The state machine of a key, in every state that some processes around one storage can bring it
//! to: an explicit-state model check of the very code that runs in production.
//!
//! The world is that of the random tests ([`World`]), with its storage and all that it checks after
//! each event; only that here nothing is left to chance. Whatever may happen in a state is tried, in
//! each state, until nothing new comes. A [`Scenario`] bounds it: so many callers come and leave, so
//! many things go wrong, time passes so often.
//!
//! # What is checked, and how
//!
//! | promise | how |
//! |---|---|
//! | at most one holder relies on the lock | `World::check`, in each state: of the turns whose deadline lies ahead there is at most one, and the storage has the lock as that one's |
//! | a release or renewal touches nobody else's lock | `World::arrive` compares tokens as the scripts do; `World::poll` and `deliver` see to it that no token that was given back, or taken away, is used again |
//! | fencing tokens are unique and grow | `World::check_fencing`, at the begin of each turn |
//! | nobody goes on at or past the deadline | a turn begins before its deadline; no renewal brings one back to life; how a turn ended is what its holder could see |
//! | turns of one process do not overlap, and are given in the order of arrival | `World::poll`; over all processes where nothing goes wrong ([`Kind::calm`]) |
//! | who leaves leaves nothing behind, and the next is served | `World::settle`: from the state on, nothing more goes wrong; then all are served, and no key, place, claim or waiter is left. Of so many states one is tried, and each in which nothing more can happen. And in each state, whoever is first goes on by itself or something is under way that will wake it |
//! | a crashed holder blocks a key for its ttl at most | the same, against the clock: [`Scenario::rest`] |
//! | others wait for no more than so many turns | `World::check_sharing` |
//! | no memory of keys that nobody uses | `World::settle`: the machine says that it is done |
//!
//! # What is assumed
//!
//! Messages of the storage arrive late, in any order, twice or never. Calls arrive late and in any
//! order; their replies, late or never. Processes stop for as long as time can pass, or for good.
//! Time passes in steps, of a third of the ttl mostly, not evenly; clocks run at the same rate where
//! a scenario does not say otherwise. The storage does each call at once and whole, as a script does,
//! and keeps what it was told unless a scenario makes it forget.
//!
//! The tests cut each scenario off after some thousand states; `scripts/model` goes on, in an optimized
//! build, to the end or to five million.
//!
//! # Why not with a library
//!
//! `stateright` would bring 40 packages, a web server among them that cannot be left out. The search
//! itself is [`explorer`](crate::explorer), 100 lines; the work is in the world, which would be the same. Its "eventually"
//! does not see a cycle, or two ways that meet; [`World::settle`] goes each way to its end.

#![allow(
    clippy::print_stderr,
    reason = "what was explored is worth telling, where anybody looks"
)]

mod canon;
mod trace;

use self::canon::Canon;
use super::*;
use crate::explorer::{Broken, Order, Plan, Report, System, explore, hash};

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The reply to a call is lost, or later than anybody waits.
    LostReply,
    /// A call is lost before it arrives.
    LostCall,
    /// The storage refuses a call.
    Refusal,
    /// What the storage says of its own accord is lost.
    LostMessage,
    /// It arrives twice.
    Repetition,
    /// A process loses its subscription.
    Deafness,
    Crash,
    /// The storage forgets all.
    Amnesia,
    /// A replica takes over that may lag, and whose clock is so many milliseconds ahead.
    FailOver(u16),
    /// Somebody takes the lock away by force.
    Force,
    /// Somebody says so.
    Lie,
    /// The process shuts down and takes the turn away.
    Revocation,
    ClockForward(u16),
    ClockBack(u8),
}

const LOSSES: &[Fault] = &[
    Fault::LostReply,
    Fault::LostCall,
    Fault::LostMessage,
    Fault::Repetition,
];

const fn join(process: usize) -> Event {
    Event::Join {
        process,
        ttl: 0,
        max_hold: 0,
    }
}

const HEARD: Event = Event::Reply {
    pick: 0,
    how: How::Answered,
    pause: 100,
};

const FIRST_OF_A: Event = Event::Poll {
    process: 0,
    pick: 0,
};

/// One process has the lock, the other stands in the queue.
const QUEUED: &[Event] = &[
    join(0),
    HEARD,
    FIRST_OF_A,
    join(1),
    HEARD,
    Event::Deliver {
        pick: 0,
        again: false,
    },
];

/// The same, and the replica knows it.
const QUEUED_AND_COPIED: &[Event] = &[
    join(0),
    HEARD,
    FIRST_OF_A,
    join(1),
    HEARD,
    Event::Deliver {
        pick: 0,
        again: false,
    },
    Event::Replicate,
];

/// It has been given to the other, who has not heard of it.
const HANDED_OVER: &[Event] = &[
    join(0),
    HEARD,
    FIRST_OF_A,
    join(1),
    HEARD,
    Event::Deliver {
        pick: 0,
        again: false,
    },
    Event::TurnDone {
        process: 0,
        pick: 0,
    },
    HEARD,
];

/// Two callers of one process, of whom the first has the lock.
const TWO_OF_ONE: &[Event] = &[join(0), join(0), HEARD, FIRST_OF_A];

/// How much may happen.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    kind: Kind,
    /// What has happened before, and was no fault.
    start: &'static [Event],
    /// Callers that come to each process, at any time.
    callers: [u8; PROCESSES],
    /// Which ttl the callers want. Those after the first of a process want the other, if `mixed`.
    ttl: usize,
    mixed: bool,
    /// So many of them leave before they have had a turn.
    leaves: u8,
    /// How often time passes, and by how many milliseconds.
    passes: u8,
    ticks: &'static [u16],
    /// Time may also pass up to a moment before the end of what is held.
    to_the_end: bool,
    faults: u8,
    of: &'static [Fault],
    /// When nothing goes wrong any more, everybody is served within this time.
    rest: Duration,
    states: usize,
    /// Of so many states one is settled.
    settled: u64,
}

impl Scenario {
    const PLAIN: Self = Self {
        name: "",
        kind: Kind {
            queues: true,
            listens: true,
            knows_run: true,
            processes: 2,
            linger: [ms(0); PROCESSES],
            keeps_hot: [false; PROCESSES],
            limit: HandoffLimit {
                turns: 1,
                time: ms(1_000),
            },
            ..Kind::PLAIN
        },
        start: &[],
        callers: [1, 1, 0],
        ttl: 0,
        mixed: false,
        leaves: 0,
        passes: 3,
        ticks: &[100],
        to_the_end: false,
        faults: 0,
        of: &[],
        rest: ms(5_000),
        states: 5_000,
        settled: 64,
    };

    /// As the environment says: `MODEL="deep"`, or `MODEL="callers=2,1,0 passes=4 faults=2 states=100000"`.
    fn as_told(self) -> Self {
        self.told(&std::env::var("MODEL").unwrap_or_default())
    }

    fn told(mut self, told: &str) -> Self {
        for word in told.split_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let numbers = value.split(',').filter(|it| !it.is_empty());
            let numbers: Vec<usize> = numbers.map(|it| it.parse().unwrap()).collect();
            match (name, &numbers[..]) {
                ("deep", []) => (self.passes, self.states) = (self.passes + 1, 5_000_000),
                ("callers", all) => self.callers = std::array::from_fn(|it| all[it] as u8),
                ("passes", [passes]) => self.passes = *passes as u8,
                ("faults", [faults]) => self.faults = *faults as u8,
                ("states", [states]) => self.states = *states,
                ("settled", [settled]) => self.settled = *settled as u64,
                _ => panic!("MODEL: {word}"),
            }
        }
        self
    }

    fn run(&self, order: Order) -> Report<Event> {
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
            "{:<24} {:>9} states {:>9} steps, depth {:>3}, {:>7} settled, {:>6.1} s: {end}",
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

    /// Where nobody is excused by what nobody could have known, two rely on the lock in the end.
    fn has_two_holders(self) {
        let mut scenario = self;
        scenario.kind.strict = true;
        (scenario.states, scenario.settled) = (1_000_000, u64::MAX);
        let broken = scenario.run(Order::Breadth).broken.expect("two holders");
        let text = scenario.tell(&broken);
        assert!(broken.what.starts_with("two holders"), "{text}");
        eprintln!("{text}");
    }

    fn tell(&self, broken: &Broken<Event>) -> String {
        let after = match broken.when_settled {
            true => "     and then nothing more goes wrong\n",
            false => "",
        };
        let (name, what) = (self.name, &broken.what);
        let steps = trace::tell(self, &broken.trace);
        format!("{name}: {what}\n{steps}{after}")
    }
}

/// A world, and how much may still happen in it.
#[derive(Clone)]
struct Search {
    scenario: Scenario,
    world: World,
    callers: [u8; PROCESSES],
    leaves: u8,
    passes: u8,
    faults: u8,
}

impl Search {
    fn new(scenario: Scenario) -> Self {
        let mut search = Self {
            world: World::new(scenario.kind),
            callers: scenario.callers,
            leaves: scenario.leaves,
            passes: scenario.passes,
            faults: scenario.faults,
            scenario,
        };
        for step in scenario.start {
            search.happen(*step);
        }
        search
    }

    fn happen(&mut self, step: Event) {
        self.world.happen(step);
        if let Event::Join { process, .. } = step {
            // Who comes looks at once.
            let last = self.world.processes[process].waiters.len() - 1;
            self.world.poll(process, last);
        }
        self.world.check();
    }

    fn may(&self, fault: Fault) -> bool {
        self.faults > 0 && self.scenario.of.contains(&fault)
    }

    fn of_process(&self, index: usize, steps: &mut Vec<Event>) {
        let process = &self.world.processes[index];
        let now = self.world.now;
        if self.callers[index] > 0 {
            let is_first = self.callers[index] == self.scenario.callers[index];
            let ttl = match self.scenario.mixed && !is_first {
                true => 1 - self.scenario.ttl,
                false => self.scenario.ttl,
            };
            steps.push(Event::Join {
                process: index,
                ttl,
                max_hold: 0,
            });
        }
        let free = |waiter: &&Waiter| waiter.doing != Doing::Asking;
        for (pick, waiter) in process.waiters.iter().filter(free).enumerate() {
            let is_due = match waiter.doing {
                Doing::Awake => true,
                Doing::Dozing(until) => until <= now,
                _ => false,
            };
            if is_due {
                let pick = pick as u8;
                steps.push(Event::Poll {
                    process: index,
                    pick,
                });
            }
        }
        if self.leaves > 0 {
            for pick in 0..process.waiters.len() as u8 {
                steps.push(Event::Leave {
                    process: index,
                    pick,
                });
            }
        }
        for pick in 0..process.holders.len() as u8 {
            steps.push(Event::TurnDone {
                process: index,
                pick,
            });
        }
        if process.look_by.is_some_and(|at| at <= now) {
            steps.push(Event::Tick(index));
        }
        if !process.is_reached && self.world.kind.queues {
            steps.push(Event::Reach(index, true));
        }
        if process.is_reached != process.listens || process.missed {
            steps.push(Event::Notice(index));
        }
        if process.is_reached && self.may(Fault::Deafness) {
            steps.push(Event::Reach(index, false));
        }
        let knows_it = !matches!(process.state.phase, Phase::Idle) || !process.holders.is_empty();
        if knows_it && self.may(Fault::Crash) {
            steps.push(Event::Crash(index));
        }
        if process.present.is_some() && self.may(Fault::Revocation) {
            steps.push(Event::Revoke(index));
        }
        if knows_it && self.may(Fault::Lie) {
            steps.push(Event::Lie(index));
        }
    }

    fn of_calls(&self, steps: &mut Vec<Event>) {
        let messages = &self.world.messages;
        let on_the_way = messages.iter().filter(|message| message.answer.is_none());
        steps.extend((0..on_the_way.count()).map(|pick| Event::Arrive(pick as u8)));
        let waited_for = messages.iter().filter(|message| !message.is_settled);
        for (pick, message) in waited_for.enumerate() {
            let has_arrived = message.answer.is_some();
            let mut reply = |how| {
                steps.push(Event::Reply {
                    pick: pick as u8,
                    how,
                    pause: 100,
                });
            };
            if has_arrived {
                reply(How::Answered);
            }
            if self.may(Fault::LostReply) {
                reply(How::TimedOut);
            }
            if !has_arrived && self.may(Fault::LostCall) {
                reply(How::Vanished);
            }
            if !has_arrived && self.may(Fault::Refusal) {
                reply(How::Refused);
            }
        }
    }

    fn of_the_storage(&self, steps: &mut Vec<Event>) {
        let world = &self.world;
        for pick in 0..world.pushes.len() as u8 {
            steps.push(Event::Deliver { pick, again: false });
            if self.may(Fault::Repetition) {
                steps.push(Event::Deliver { pick, again: true });
            }
            if self.may(Fault::LostMessage) {
                steps.push(Event::Lose(pick));
            }
        }
        for fault in self.scenario.of {
            match *fault {
                Fault::FailOver(by) => {
                    let is_behind =
                        world.replica.owner != world.owner || world.replica.queue != world.queue;
                    if is_behind && self.faults > 0 {
                        steps.push(Event::Replicate);
                    }
                    if self.faults > 0 {
                        steps.push(Event::FailOver(by));
                    }
                }
                Fault::Amnesia if self.faults > 0 => steps.push(Event::Restart(0)),
                Fault::ClockForward(by) if self.faults > 0 => steps.push(Event::SetForward(by)),
                Fault::ClockBack(by) if self.faults > 0 => steps.push(Event::SetBack(by)),
                Fault::Force if self.faults > 0 && world.owner().is_some() => {
                    steps.push(Event::Force);
                }
                _ => {}
            }
        }
        if self.passes > 0 {
            steps.extend(self.scenario.ticks.iter().map(|by| Event::Pass(*by)));
            for (index, process) in world.processes.iter().enumerate() {
                if self.scenario.to_the_end && !process.holders.is_empty() {
                    steps.push(Event::PassTowardsTheEnd {
                        process: index,
                        pick: 0,
                        how_far: HowFar::AllBut,
                    });
                }
            }
        }
    }
}

impl System for Search {
    type Step = Event;

    fn steps(&self) -> Vec<Event> {
        let mut steps = Vec::with_capacity(16);
        for index in 0..self.world.processes.len() {
            self.of_process(index, &mut steps);
        }
        self.of_calls(&mut steps);
        self.of_the_storage(&mut steps);
        steps
    }

    fn take(&mut self, step: Event) {
        match step {
            Event::Join { process, .. } => self.callers[process] -= 1,
            Event::Leave { .. } => self.leaves -= 1,
            Event::Pass(_) | Event::PassTowardsTheEnd { .. } => self.passes -= 1,
            Event::Lose(_)
            | Event::Deliver { again: true, .. }
            | Event::Reach(_, false)
            | Event::Crash(_)
            | Event::Restart(_)
            | Event::FailOver(_)
            | Event::SetForward(_)
            | Event::SetBack(_)
            | Event::Force
            | Event::Lie(_)
            | Event::Revoke(_) => self.faults -= 1,
            Event::Reply { how, .. } if !matches!(how, How::Answered) => self.faults -= 1,
            _ => {}
        }
        self.happen(step);
    }

    fn settle(mut self) {
        let before = self.world.now;
        self.world.settle();
        let took = self.world.now.since(before);
        assert!(took <= self.scenario.rest, "it took {took:?}");
    }

    fn fingerprint(&self) -> u64 {
        let left = [self.leaves, self.passes, self.faults];
        let left = self.callers.iter().chain(&left);
        let left = left.fold(0, |sum, it| sum << 8 | u64::from(*it));
        let words = Canon::of(&self.world).words;
        hash(std::iter::once(left).chain(words))
    }
}

// --- where all assumptions hold --------------------------------------------------------------

/// As `scripts/model` names them.
#[test]
fn bounds_are_understood_as_they_are_told() {
    let deep = Scenario::PLAIN.told("deep");
    assert_eq!(deep.passes, Scenario::PLAIN.passes + 1);
    assert_eq!(deep.states, 5_000_000);
    let told = Scenario::PLAIN.told("callers=2,1,0 passes=3 faults=2 states=1000000");
    assert_eq!((told.callers, told.passes), ([2, 1, 0], 3));
    assert_eq!((told.faults, told.states), (2, 1_000_000));
}

#[test]
fn all_are_served_in_order() {
    let scenario = Scenario {
        name: "nothing goes wrong",
        callers: [2, 1, 0],
        passes: 1,
        leaves: 1,
        ..Scenario::PLAIN
    };
    let kind = Kind {
        calm: true,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

#[test]
fn whatever_is_lost_or_comes_twice() {
    Scenario {
        name: "losses",
        passes: 2,
        faults: 1,
        of: LOSSES,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn whoever_leaves_with_whatever_is_lost() {
    Scenario {
        name: "losses, leaving",
        passes: 1,
        leaves: 1,
        faults: 1,
        of: &[Fault::LostReply, Fault::LostMessage],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn two_callers_of_one_process() {
    Scenario {
        name: "two of one process",
        callers: [2, 1, 0],
        passes: 1,
        faults: 1,
        of: &[Fault::LostReply],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn callers_of_different_ttls() {
    Scenario {
        name: "two ttls",
        callers: [2, 1, 0],
        mixed: true,
        passes: 1,
        faults: 1,
        of: &[Fault::LostReply],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn three_processes() {
    let scenario = Scenario {
        name: "three processes",
        callers: [1, 1, 1],
        passes: 1,
        ..Scenario::PLAIN
    };
    let kind = Kind {
        processes: 3,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

#[test]
fn a_crashed_holder_blocks_a_key_for_its_ttl_at_most() {
    Scenario {
        name: "crash",
        passes: 2,
        faults: 1,
        of: &[Fault::Crash],
        rest: ms(700),
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn subscriptions_break_and_come_back() {
    Scenario {
        name: "subscriptions",
        passes: 2,
        faults: 1,
        of: &[Fault::Deafness],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_lease_that_lingers() {
    let scenario = Scenario {
        name: "lingering leases",
        passes: 2,
        faults: 1,
        of: &[Fault::LostReply, Fault::LostMessage],
        ..Scenario::PLAIN
    };
    let kind = Kind {
        linger: [ms(200); PROCESSES],
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

/// One turn for each token, so it takes four callers to come back to a lease that was kept.
#[test]
fn a_hot_lease_that_lingers_for_a_moment() {
    let scenario = Scenario {
        name: "hot leases",
        passes: 2,
        faults: 1,
        of: &[Fault::LostReply, Fault::LostMessage],
        callers: [4, 1, 0],
        ..Scenario::PLAIN
    };
    let kind = Kind {
        keeps_hot: [true; PROCESSES],
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

/// What the storage has forgotten excuses whom it concerns, and nobody else.
#[test]
fn a_replica_takes_over() {
    Scenario {
        name: "failover",
        passes: 2,
        faults: 1,
        of: &[Fault::FailOver(200)],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_storage_that_forgets() {
    Scenario {
        name: "amnesia",
        passes: 2,
        faults: 1,
        of: &[Fault::Amnesia],
        ..Scenario::PLAIN
    }
    .holds();
}

/// A pushed grant may be dated wrong, for as long as its first renewal takes.
#[test]
fn the_clock_of_the_storage_is_set() {
    let scenario = Scenario {
        name: "a clock is set",
        passes: 2,
        faults: 1,
        of: &[Fault::ClockForward(200), Fault::ClockBack(200)],
        ..Scenario::PLAIN
    };
    let kind = Kind {
        may_set_forward: true,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

#[test]
fn clocks_that_drift_within_bounds() {
    let scenario = Scenario {
        name: "drift",
        passes: 3,
        to_the_end: true,
        ..Scenario::PLAIN
    };
    let kind = Kind {
        drift: 9,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

#[test]
fn locks_are_taken_away_and_lies_are_told() {
    Scenario {
        name: "force",
        callers: [2, 1, 0],
        passes: 0,
        faults: 1,
        of: &[Fault::Force, Fault::Lie, Fault::Revocation],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn without_a_queue_and_without_messages() {
    let scenario = Scenario {
        name: "polling only",
        passes: 3,
        faults: 1,
        of: &[Fault::LostReply, Fault::LostCall, Fault::Refusal],
        ..Scenario::PLAIN
    };
    let kind = Kind {
        queues: false,
        listens: false,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

// --- from where one waits for another ---------------------------------------------------------

#[test]
fn a_grant_under_way_with_whatever_is_lost() {
    Scenario {
        name: "handed over, losses",
        start: HANDED_OVER,
        callers: [1, 0, 0],
        passes: 4,
        faults: 1,
        of: LOSSES,
        ..Scenario::PLAIN
    }
    .holds();
}

/// A pushed grant counts from one request, whichever of them that was.
#[test]
fn a_waiter_that_asks_again_before_its_turn() {
    Scenario {
        name: "queued, asks again",
        start: QUEUED,
        callers: [0; PROCESSES],
        passes: 5,
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn a_replica_takes_over_while_somebody_waits() {
    Scenario {
        name: "queued, failover",
        start: QUEUED_AND_COPIED,
        callers: [0; PROCESSES],
        passes: 4,
        faults: 1,
        of: &[Fault::FailOver(200)],
        ..Scenario::PLAIN
    }
    .holds();
}

#[test]
fn the_clock_of_the_storage_is_set_while_somebody_waits() {
    let scenario = Scenario {
        name: "queued, a clock is set",
        start: QUEUED,
        callers: [0; PROCESSES],
        passes: 4,
        faults: 1,
        of: &[Fault::ClockForward(300)],
        ..Scenario::PLAIN
    };
    let kind = Kind {
        may_set_forward: true,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.holds();
}

#[test]
fn a_lock_is_taken_away_while_another_of_the_process_waits() {
    Scenario {
        name: "two of one, force",
        start: TWO_OF_ONE,
        callers: [0, 1, 0],
        passes: 1,
        faults: 1,
        of: &[Fault::Force, Fault::Lie, Fault::Revocation],
        ..Scenario::PLAIN
    }
    .holds();
}

// --- where one is broken ---------------------------------------------------------------------

#[test]
fn a_storage_that_forgets_within_the_ttl_lets_a_second_holder_in() {
    Scenario {
        name: "amnesia",
        faults: 1,
        of: &[Fault::Amnesia],
        ..Scenario::PLAIN
    }
    .has_two_holders();
}

#[test]
fn a_replica_that_lags_lets_a_second_holder_in() {
    Scenario {
        name: "failover",
        faults: 1,
        of: &[Fault::FailOver(0)],
        ..Scenario::PLAIN
    }
    .has_two_holders();
}

#[test]
fn a_clock_that_runs_half_as_fast_again_lets_a_second_holder_in() {
    let scenario = Scenario {
        name: "clock rate",
        ..Scenario::PLAIN
    };
    let kind = Kind {
        drift: 500,
        ..scenario.kind
    };
    Scenario { kind, ..scenario }.has_two_holders();
}
