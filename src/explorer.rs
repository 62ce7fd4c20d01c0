//! Visits every state that a system can come to.
//!
//! A state is known again by 64 bits of hash; of ten million states, two are mistaken for each other
//! with a chance of 1 in 370,000. What is kept of a state is that, and the step that led to it, so
//! that a trace can be told.

use std::{
    collections::{HashSet, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

/// What can be explored. It has to be finite.
pub(crate) trait System: Clone {
    type Step: Copy;

    /// What can happen now, in an order that depends on the state alone.
    fn steps(&self) -> Vec<Self::Step>;

    /// Panics if a promise is broken.
    fn take(&mut self, step: Self::Step);

    /// Nothing more goes wrong from here on. Panics if something is left, or does not go on.
    fn settle(self);

    /// The same for states from which the same can follow.
    fn fingerprint(&self) -> u64;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The shortest trace is found first. Keeps as many states as are reached in the same number of
    /// steps.
    Breadth,
    /// Keeps as many states as a trace is long, about.
    Depth,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) order: Order,
    /// The exploration ends there, complete or not.
    pub(crate) most_states: usize,
    /// Of so many states one is settled, and so is each at which nothing more can happen.
    pub(crate) settled: u64,
}

/// What was seen.
#[derive(Clone, Debug)]
pub(crate) struct Report<S> {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    /// Of the longest way that was gone.
    pub(crate) depth: usize,
    pub(crate) settled: usize,
    pub(crate) time: Duration,
    pub(crate) is_complete: bool,
    pub(crate) broken: Option<Broken<S>>,
}

/// How a promise was broken.
#[derive(Clone, Debug)]
pub(crate) struct Broken<S> {
    pub(crate) what: String,
    pub(crate) trace: Vec<S>,
    /// By the last step, or by what follows when nothing more goes wrong.
    pub(crate) when_settled: bool,
}

/// Fingerprints are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole fingerprints");
    }

    fn write_u64(&mut self, fingerprint: u64) {
        self.0 = fingerprint;
    }
}

/// How a state was come to: from which, by which of its steps.
#[derive(Clone, Copy)]
struct Origin {
    from: u32,
    step: u8,
}

struct Open<T> {
    system: T,
    number: u32,
    depth: usize,
}

struct Search<T> {
    start: T,
    known: HashSet<u64, BuildHasherDefault<AsItIs>>,
    origins: Vec<Origin>,
}

/// What was said in a panic.
fn attempt<T>(act: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|said| {
        let text = said.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| said.downcast_ref::<String>().cloned())
            .unwrap_or_default()
    })
}

impl<T: System> Search<T> {
    /// The steps that led to a state.
    fn trace(&self, mut number: u32) -> Vec<T::Step> {
        let mut steps = Vec::new();
        while number != 0 {
            let Origin { from, step } = self.origins[number as usize];
            steps.push(step);
            number = from;
        }
        let mut system = self.start.clone();
        let taken = steps.iter().rev().map(|step| {
            let step = system.steps()[usize::from(*step)];
            system.take(step);
            step
        });
        taken.collect()
    }
}

/// Explores until all is seen, a promise is broken, or there are too many states.
pub(crate) fn explore<T: System>(start: T, plan: Plan) -> Report<T::Step> {
    let started = Instant::now();
    let mut search = Search {
        known: HashSet::default(),
        origins: vec![Origin { from: 0, step: 0 }],
        start: start.clone(),
    };
    search.known.insert(start.fingerprint());
    let mut open = VecDeque::from([Open {
        system: start,
        number: 0,
        depth: 0,
    }]);
    let mut report = Report {
        states: 1,
        steps: 0,
        depth: 0,
        settled: 0,
        time: Duration::ZERO,
        is_complete: false,
        broken: None,
    };
    'search: loop {
        let next = match plan.order {
            Order::Breadth => open.pop_front(),
            Order::Depth => open.pop_back(),
        };
        let Some(Open {
            system,
            number,
            depth,
        }) = next
        else {
            report.is_complete = true;
            break;
        };
        let steps = system.steps();
        assert!(steps.len() <= 256, "too many steps for a trace");
        for (index, step) in steps.iter().enumerate() {
            let mut after = system.clone();
            report.steps += 1;
            if let Err(what) = attempt(|| after.take(*step)) {
                let mut trace = search.trace(number);
                trace.push(*step);
                report.broken = Some(Broken {
                    what,
                    trace,
                    when_settled: false,
                });
                break 'search;
            }
            if !search.known.insert(after.fingerprint()) {
                continue;
            }
            report.states += 1;
            report.depth = report.depth.max(depth + 1);
            let after_number = search.origins.len() as u32;
            search.origins.push(Origin {
                from: number,
                step: index as u8,
            });
            open.push_back(Open {
                system: after,
                number: after_number,
                depth: depth + 1,
            });
            if report.states >= plan.most_states {
                break 'search;
            }
        }
        if steps.is_empty() || u64::from(number).is_multiple_of(plan.settled) {
            report.settled += 1;
            if let Err(what) = attempt(|| system.settle()) {
                report.broken = Some(Broken {
                    what,
                    trace: search.trace(number),
                    when_settled: true,
                });
                break;
            }
        }
    }
    report.time = started.elapsed();
    report
}

/// 64 bits out of all: a product's halves, folded, with each word.
pub(crate) fn hash(words: impl Iterator<Item = u64>) -> u64 {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let mut number = 0_u64;
    let sum = words.fold(0x243f_6a88_85a3_08d3, |sum, word| {
        number += 1;
        // Nothing is lost where one of the factors is small.
        let mixed = fold(word ^ 0x9e37_79b9_7f4a_7c15, sum ^ 0xd1b5_4a32_d192_ed03);
        mixed ^ sum.rotate_left(23) ^ word.wrapping_mul(0xff51_afd7_ed55_8ccd)
    });
    fold(sum ^ number, 0xe703_7ed1_a0b4_28db) ^ sum
}
