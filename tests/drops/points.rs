//! The points at which a caller can be dropped, counted in one run and visited one by one in others.

use std::{
    env, fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::Waker,
    thread,
};

/// What becomes of the calls that are on their way to one server when the caller is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// They are carried out and answered.
    Through,
    /// They never arrive, and nothing comes back.
    NotSent,
    /// They never arrive, and fail.
    NotSentFails,
    /// They are carried out, and nothing comes back.
    ReplyLost,
    /// They are carried out, and fail.
    ReplyFails,
}

pub const FATES: [Fate; 5] = [
    Fate::Through,
    Fate::NotSent,
    Fate::NotSentFails,
    Fate::ReplyLost,
    Fate::ReplyFails,
];

/// Where the caller is dropped, and what becomes of its calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Points are counted from 0.
    pub point: usize,
    /// One for each server.
    pub fates: Vec<Fate>,
    /// Calls that are made in the moments after the drop, such as its release, share that fate.
    pub outage: bool,
}

/// As it is written in `DROPS`, after the name of the scene.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:?}:", self.point, self.fates)?;
        f.write_str(if self.outage { "outage" } else { "once" })
    }
}

/// Counts the points that a run passes, and stops at the one that is planned.
pub struct Points {
    stop_at: Option<usize>,
    passed: Mutex<Passed>,
}

#[derive(Default)]
struct Passed {
    is_open: bool,
    names: Vec<String>,
    stopped: bool,
    driver: Option<Waker>,
}

impl Points {
    /// `None` counts all of them.
    pub fn new(stop_at: Option<usize>) -> Self {
        Self {
            stop_at,
            passed: Mutex::default(),
        }
    }

    /// Points count from now on.
    pub fn open(&self) {
        self.passed.lock().unwrap().is_open = true;
    }

    /// Whether this is where the caller is dropped. Then it has been told.
    pub fn pass(&self, name: impl FnOnce() -> String) -> bool {
        let mut passed = self.passed.lock().unwrap();
        if !passed.is_open || passed.stopped {
            return false;
        }
        passed.stopped = self.stop_at == Some(passed.names.len());
        passed.names.push(name());
        let stopped = passed.stopped;
        let driver = passed.driver.take().filter(|_| stopped);
        drop(passed);
        if let Some(driver) = driver {
            driver.wake();
        }
        stopped
    }

    /// Whether the caller is to be dropped now. `driver` is woken when it is.
    pub fn has_stopped(&self, driver: &Waker) -> bool {
        let mut passed = self.passed.lock().unwrap();
        passed.driver = Some(driver.clone());
        passed.stopped
    }

    /// Of all points that were passed.
    pub fn names(&self) -> Vec<String> {
        self.passed.lock().unwrap().names.clone()
    }
}

/// Runs a scene once to count its points, and then once for each point and each of its plans. Fails
/// with the name of the point, and with what to set `DROPS` to, to run only that.
///
/// `run` answers the names of the points that it has passed, and panics at what is left over. So
/// many runs go on at the same time as there are `threads`.
pub fn visit_all(
    scene: &str,
    threads: usize,
    plans: impl Fn(usize, &str) -> Vec<Plan>,
    run: impl Fn(Option<&Plan>) -> Vec<String> + Sync,
) {
    let only = env::var("DROPS").ok();
    let only = match only.as_deref().map(|only| only.split_once(':')) {
        Some(Some((name, plan))) if name == scene => Some(plan.to_owned()),
        Some(_) => return,
        None => None,
    };
    let names = run(None);
    let points = names.iter().enumerate();
    let plans: Vec<_> = points
        .flat_map(|(number, name)| plans(number, name))
        .collect();
    let (next, runs) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(plan) = plans.get(next.fetch_add(1, SeqCst)) {
                    if only.as_ref().is_some_and(|only| *only != plan.to_string()) {
                        continue;
                    }
                    runs.fetch_add(1, SeqCst);
                    let result = catch_unwind(AssertUnwindSafe(|| run(Some(plan))));
                    let Err(panic) = result else { continue };
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or(panic.downcast_ref::<&str>().copied());
                    failures.lock().unwrap().push(format!(
                        "dropped at {} ({}): {}\n  DROPS='{scene}:{plan}'",
                        plan.point,
                        names[plan.point],
                        text.unwrap_or("a panic"),
                    ));
                }
            });
        }
    });
    let (runs, points) = (runs.into_inner(), names.len());
    println!("{scene}: {points} points, {runs} runs");
    let failures = failures.into_inner().unwrap();
    let first: Vec<_> = failures.iter().take(8).map(String::as_str).collect();
    assert!(
        failures.is_empty(),
        "{scene}: {} of {runs} runs failed\n{}\nall points: {names:#?}",
        failures.len(),
        first.join("\n")
    );
}
