//! One nemesis, at work for a while on servers and clients of its own.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::time::sleep;

use super::{
    check::{Fault, Findings, History, Stay, check, passed},
    client::{Client, FENCED, Orders, PLAIN, Record, keys},
    kit::{LIMIT, ms},
    nemesis::{Fleet, Nemesis, strike},
    record::{Line, now},
    sabotage::Sabotage,
    store,
    watch::{Replacement, Watch},
    world::{Deployment, World},
};

/// How many processes want the same locks.
const CLIENTS: usize = 3;

/// How many grants of a key may go to others while one waits, where there is a queue: each of the other processes may come
/// before it, and once more before it if another task of its own process does, for 5 ms each time (`handoff_limit`). Those
/// are some 30 at most, as holders here mostly stay for 0 to 4 ms.
const MOST_PASSED: usize = 64;

/// How many grants each key has before the first fault, so that there is something to judge by [`MOST_PASSED`].
const UNDISTURBED: usize = 100;

/// How long a process may be deaf after a fault.
const DEAF: Duration = Duration::from_secs(5);

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Episode {
    pub deployment: Deployment,
    pub nemesis: Nemesis,
    pub faults: usize,
    pub seed: u64,
    pub sabotage: Option<Sabotage>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub findings: Findings,
    pub faults: usize,
    pub grants: usize,
    /// From the end of a fault to the next grant, for each key.
    pub recoveries: Vec<Duration>,
    /// The longest that anybody waited for a lock.
    pub longest_wait: Duration,
    /// How many grants of a key went to others while one waited for it, at most, and nothing was
    /// wrong.
    pub passed: usize,
    /// Updates of the plain counter that the store does not have.
    pub lost: u64,
    pub refused: usize,
    /// When Sentinel or the cluster replaced a master that nothing was done to, in milliseconds
    /// since the beginning.
    pub replaced: Vec<(u64, u64)>,
    /// Where all that is known of an episode with violations was written.
    pub kept: Option<PathBuf>,
}

impl Episode {
    pub async fn run(&self) -> Outcome {
        let mut rng = fastrand::Rng::with_seed(self.seed);
        let ttls = self.deployment.ttls();
        let ttl = ms(ttls[rng.usize(..ttls.len())]);
        let world = World::start(self.deployment, self.nemesis, CLIENTS).await;
        let record = Record::default();
        let orders: Vec<_> = (0..CLIENTS)
            .map(|client| Orders {
                name: format!("p{client}"),
                deployment: self.deployment,
                ttl,
                store: world.store.url(),
                urls: world.urls(client),
                seed: rng.u64(..),
                sabotage: self.sabotage,
                replicas: self.nemesis.replicas(),
            })
            .collect();
        let clients = { orders.iter().enumerate() }
            .map(|(number, orders)| Client::start(number, orders, &record))
            .collect();
        let fleet = Fleet {
            clients,
            orders,
            record,
            replaced: 0,
        };
        let running = Running {
            episode: *self,
            world,
            fleet,
            rng,
            ttl,
            outcome: Outcome::default(),
        };
        running.run().await
    }
}

struct Running {
    episode: Episode,
    world: World,
    fleet: Fleet,
    rng: fastrand::Rng,
    ttl: Duration,
    outcome: Outcome,
}

impl Running {
    async fn run(mut self) -> Outcome {
        let nemesis = self.episode.nemesis;
        let began = now();
        let watch = Watch::over(&self.world).await;
        self.all_are_served(began, "at the start").await;
        if self.has_order() && self.episode.sabotage.is_none() {
            self.each_key_is_had(UNDISTURBED).await;
        }
        let mut faults = Vec::new();
        for _ in 0..self.episode.faults {
            sleep(ms(100 + self.rng.u64(..300))).await;
            let (world, fleet, rng) = (&mut self.world, &mut self.fleet, &mut self.rng);
            let from = strike(nemesis, world, fleet, rng, self.ttl).await;
            let until = now();
            let breaks = nemesis.breaks();
            faults.push(Fault {
                from,
                until,
                breaks,
            });
            self.all_are_served(until, "after a fault").await;
        }
        sleep(ms(600)).await;
        if nemesis.is_lasting() {
            let breaks = nemesis.breaks();
            faults.push(Fault {
                from: began,
                until: now() + LIMIT.as_nanos() as u64,
                breaks,
            });
        }
        self.stop(&watch).await;
        let ended = now();
        // On a busy machine a master may not answer in time, though nothing was done to it.
        let mut replaced = Vec::new();
        if !nemesis.replaces_masters() {
            for replacement in watch.replacements() {
                let Replacement { from, until } = replacement;
                let until = until.unwrap_or(ended);
                let millis = |at: u64| at.saturating_sub(began) / 1_000_000;
                replaced.push((millis(from), millis(until)));
                let breaks = true;
                faults.push(Fault {
                    from,
                    until,
                    breaks,
                });
            }
        }
        drop(watch);
        self.outcome.replaced = replaced;

        let lines = self.lines();
        let history = History::of(&lines);
        let ttl = self.ttl.as_nanos() as u64;
        let mut violations = std::mem::take(&mut self.outcome.findings.violations);
        let has_order = self.has_order();
        let mut outcome = self.outcome;
        outcome.findings = check(&history, &faults, ttl);
        outcome.faults = self.episode.faults;
        outcome.grants = history.stays.len();
        outcome.refused = history.refused.values().sum();
        let waits = history.stays.iter().map(|stay| stay.granted - stay.asked);
        outcome.longest_wait = Duration::from_nanos(waits.max().unwrap_or(0));
        let strikes = match nemesis.is_lasting() {
            true => &[],
            false => &faults[..],
        };
        // Before that, not everybody is connected.
        let served = (0..CLIENTS).filter_map(|client| {
            let first = history.stays.iter().find(|stay| stay.by == client);
            first.map(|stay| stay.granted)
        });
        let settled = served.max().unwrap_or(0);
        // Who does not hear any more finds that out by then, and stands in no queue until it does.
        let deaf = ttl.max(DEAF.as_nanos() as u64);
        outcome.passed = passed(&history.stays, |from, until| {
            let near = |fault: &Fault| from <= fault.until + deaf && fault.from <= until;
            from < settled || strikes.iter().any(near)
        });
        if has_order && outcome.passed > MOST_PASSED {
            violations.push(format!(
                "{} grants went to others while one waited",
                outcome.passed
            ));
        }
        // What lasts has no end.
        let ended = match nemesis.is_lasting() {
            true => &[],
            false => &faults[..self.episode.faults],
        };
        for end in ended.iter().map(|fault| fault.until) {
            for key in keys() {
                let after = |stay: &&Stay| stay.granted > end && stay.key == key && stay.held;
                if let Some(stay) = history.stays.iter().find(after) {
                    let recovery = Duration::from_nanos(stay.granted - end);
                    outcome.recoveries.push(recovery);
                }
            }
        }
        // What the writers know is one account, the store's is the other.
        outcome.lost = store::lost(&self.world.store, PLAIN).await;
        let fenced = store::lost(&self.world.store, FENCED).await;
        if fenced > 0 {
            violations.push(format!("{fenced} updates are gone in spite of fencing"));
        }
        if history.drained.len() != CLIENTS || history.drained.iter().any(|keys| *keys > 0) {
            violations.push(format!("drained clients left keys: {:?}", history.drained));
        }
        outcome.findings.violations.extend(violations);
        if !outcome.findings.violations.is_empty() || !outcome.replaced.is_empty() {
            let kept = keep(&self.episode, &self.world, &outcome, &faults, &lines, began);
            outcome.kept = Some(kept.expect("it can be written down"));
        }
        outcome
    }

    fn lines(&self) -> Vec<(usize, Line)> {
        let record = &self.fleet.record;
        record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn violation(&mut self, text: String) {
        self.outcome.findings.violations.push(text);
    }

    /// Each process gets a lock, and each key a holder, after this moment. Nobody starves.
    async fn all_are_served(&mut self, after: u64, when: &str) {
        let started = Instant::now();
        let mut waiting: Vec<String>;
        // What has been looked at.
        let mut seen = 0;
        let mut served = [false; CLIENTS];
        let mut had: Vec<&str> = Vec::new();
        loop {
            {
                let record = Arc::clone(&self.fleet.record);
                let record = record.lock().unwrap_or_else(PoisonError::into_inner);
                for (by, line) in &record[seen..] {
                    if let Line::In { granted, key, .. } = line
                        && *granted > after
                    {
                        served[*by] = true;
                        had.extend(keys().find(|it| it == key));
                    }
                }
                seen = record.len();
            }
            waiting = (0..CLIENTS)
                .filter(|client| !served[*client])
                .map(|client| format!("process {client}"))
                .chain(keys().filter(|key| !had.contains(key)).map(str::to_owned))
                .collect();
            if waiting.is_empty() {
                return;
            }
            if started.elapsed() > LIMIT {
                return self.violation(format!("{when}, not served in {LIMIT:?}: {waiting:?}"));
            }
            sleep(ms(5)).await;
        }
    }

    /// Whether those who wait stand in a queue of the server's.
    fn has_order(&self) -> bool {
        self.episode.deployment != Deployment::Redlock
    }

    /// So many grants of each key, or as many as there are in [`LIMIT`].
    async fn each_key_is_had(&self, times: usize) {
        let started = Instant::now();
        let is_had = |key: &str| {
            let record = self.fleet.record.lock();
            let record = record.unwrap_or_else(PoisonError::into_inner);
            let grants = record
                .iter()
                .filter(|(_, line)| matches!(line, Line::In { key: it, .. } if it == key));
            grants.count() >= times
        };
        while !keys().all(is_had) && started.elapsed() < LIMIT {
            sleep(ms(20)).await;
        }
    }

    /// The clients end, and nothing of them is left.
    async fn stop(&mut self, watch: &Watch) {
        self.fleet.clients.iter_mut().for_each(Client::stop);
        let started = Instant::now();
        for number in 0..CLIENTS {
            let ended = loop {
                match self.fleet.clients[number].ended() {
                    None if started.elapsed() < LIMIT => sleep(ms(5)).await,
                    ended => break ended,
                }
            };
            if ended != Some(true) {
                self.violation(format!("client {number} has not ended well: {ended:?}"));
            }
            // All that it said is read.
            self.fleet.clients[number].kill();
        }
        // They keep connections open that the clients have closed.
        self.world.proxies.clear();
        // A client that was killed leaves its locks to their ttl, and its place in a queue. So does
        // one that has left them on a master whose replica had not heard of that.
        let limit = match self.fleet.replaced == 0 && watch.replacements().is_empty() {
            true => ms(2_000),
            false => 2 * self.ttl + LIMIT / 2,
        };
        let started = Instant::now();
        loop {
            let left = self.world.leftovers().await;
            if left.is_empty() {
                return;
            }
            if started.elapsed() > limit {
                return self.violation(format!("left after {limit:?}: {left:?}"));
            }
            sleep(ms(20)).await;
        }
    }
}

/// Writes down all that is known of an episode, in a folder of its own.
fn keep(
    episode: &Episode,
    world: &World,
    outcome: &Outcome,
    faults: &[Fault],
    lines: &[(usize, Line)],
    began: u64,
) -> io::Result<PathBuf> {
    let name = format!(
        "chaos-{}-{}-{}-{began}",
        episode.deployment.name(),
        episode.nemesis.name(),
        episode.seed
    );
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder)?;
    let findings = &outcome.findings;
    fs::write(folder.join("violations"), findings.violations.join("\n"))?;
    let at = SystemTime::now().duration_since(UNIX_EPOCH);
    let at = at.map_or(0, |at| at.as_millis());
    // The servers' logs go by the wall clock.
    let times = format!("began {began}, now {} = {at} ms of the wall clock", now());
    fs::write(
        folder.join("episode"),
        format!("{episode:?}\n{times}\n{faults:#?}\n"),
    )?;
    let lines: String = { lines.iter() }
        .map(|(client, line)| format!("{client} {line}\n"))
        .collect();
    fs::write(folder.join("history"), lines)?;
    for (name, log) in world.logs() {
        fs::write(folder.join(name), log)?;
    }
    Ok(folder)
}
