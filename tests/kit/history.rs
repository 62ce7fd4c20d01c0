//! Who was under a lock, when, and with which fencing token, as the holders of one test process saw
//! it.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tower_distributed_lock::{LockGuard, Unlocked};

/// One stay under a lock.
#[derive(Clone, Debug)]
pub struct Stay {
    /// Stays are numbered as they end.
    pub number: usize,
    pub key: String,
    pub by: String,
    pub entered: Instant,
    pub left: Instant,
    pub token: u64,
    /// That the lock may have been lost before it was given back: the guard said so, or nobody could
    /// say that it was not.
    pub told: bool,
    /// That it was lost.
    pub lost: bool,
}

/// What all holders write.
#[derive(Debug, Default)]
pub struct History(Mutex<Vec<Stay>>);

impl History {
    /// Is under the lock for as long as `work` takes.
    pub async fn stay(
        &self,
        (key, by): (&str, &str),
        guard: LockGuard,
        work: impl Future<Output = ()>,
    ) {
        let entered = Instant::now();
        let token = guard.fencing_token().expect("every lock has a token");
        work.await;
        let lost = !guard.is_held();
        // Before it is given back, or the next may seem to have come too early.
        let left = Instant::now();
        let unlocked = guard.unlock().await;
        let told = lost || !matches!(unlocked, Ok(Unlocked::Held));
        let lost = lost || matches!(unlocked, Ok(Unlocked::Lost));
        let mut stays = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = stays.len();
        stays.push(Stay {
            number,
            key: key.to_owned(),
            by: by.to_owned(),
            entered,
            left,
            token,
            told,
            lost,
        });
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn stays(&self) -> Vec<Stay> {
        let mut stays = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        stays.sort_by_key(|stay| stay.entered);
        stays
    }

    /// The longest time in which nobody came in.
    pub fn longest_pause(&self) -> Duration {
        let stays = self.stays();
        let pauses = stays
            .windows(2)
            .map(|pair| pair[1].entered - pair[0].entered);
        pauses.max().unwrap_or_default()
    }

    /// How often two were in under one key at the same time, and for how long at most.
    pub fn overlaps(&self) -> (usize, Duration) {
        let stays = self.stays();
        let mut overlaps = (0, Duration::ZERO);
        for (number, before) in stays.iter().enumerate() {
            let after = stays[number + 1..].iter();
            for after in after.filter(|after| after.key == before.key) {
                if after.entered < before.left {
                    let until = before.left.min(after.left);
                    overlaps.0 += 1;
                    overlaps.1 = overlaps.1.max(until - after.entered);
                }
            }
        }
        overlaps
    }

    /// Of two that were in at the same time, the first was told; and whoever came after another had
    /// left has the higher token, and no token was given twice. Answers how many were lost.
    pub fn check(&self) -> usize {
        let stays = self.stays();
        for (number, before) in stays.iter().enumerate() {
            for after in &stays[number + 1..] {
                if before.key != after.key {
                    continue;
                }
                let in_order = before.left <= after.entered;
                let right = if in_order {
                    before.token < after.token
                } else {
                    before.told && before.token != after.token
                };
                assert!(right, "{}", tell(&stays, before, after));
            }
        }
        stays.iter().filter(|stay| stay.lost).count()
    }
}

/// What went on under the key at that time.
fn tell(stays: &[Stay], before: &Stay, after: &Stay) -> String {
    let mut text = format!("in order: {}\n", before.left <= after.entered);
    let start = stays[0].entered;
    for stay in stays {
        let far = stay.number + 40 < before.number || stay.number > after.number + 10;
        if stay.key == before.key && !far {
            let mark = [before.number, after.number].contains(&stay.number);
            text += &format!(
                "{} {} by {}: {:?} to {:?}, token {}, told {}, lost {}\n",
                if mark { ">" } else { " " },
                stay.number,
                stay.by,
                stay.entered - start,
                stay.left - start,
                stay.token,
                stay.told,
                stay.lost,
            );
        }
    }
    text
}
