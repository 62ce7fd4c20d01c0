//! What happens in a simulation, and what must not.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tower_distributed_lock::HeldLock;

use crate::net::HostId;

/// See the [module documentation](self).
#[derive(Clone)]
pub struct History(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    prints: bool,
    now: u64,
    /// What each host's clock shows, in milliseconds.
    clocks: Vec<u64>,
    hash: u64,
    events: u64,
    violations: Vec<String>,
    /// Whether the server may forget a lock that somebody has.
    forgets: bool,
    /// If nothing goes wrong, or nothing any more.
    calm: Option<Calm>,
    inside: Vec<Section>,
    keys: Vec<Resource>,
    /// When each request came to the layer, as a number that grows.
    arrivals: Vec<(u64, u64)>,
    stats: Stats,
}

/// What the simulations went through, for people.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub sections: u64,
    pub lost: u64,
    pub refused: u64,
    pub unavailable: u64,
    pub broken: u64,
    pub left: u64,
    pub faults: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.sections += other.sections;
        self.lost += other.lost;
        self.refused += other.refused;
        self.unavailable += other.unavailable;
        self.broken += other.broken;
        self.left += other.left;
        self.faults += other.faults;
    }
}

/// What may be expected where nothing goes wrong.
#[derive(Clone, Copy)]
pub struct Calm {
    /// From this request on. Those before it came while something did.
    pub first: u64,
    /// Who waits for a lock that is free has it after so many milliseconds at most.
    pub soon: u64,
    /// For how long a process may keep a lock that another waits for, if nothing ever went wrong.
    pub kept: Duration,
}

impl Calm {
    fn is_for(&self, request: u64) -> bool {
        request >= self.first
    }
}

struct Section {
    request: u64,
    host: HostId,
    key: usize,
    /// When the lock is over by the host's clock, as the holder knew last.
    deadline: Duration,
}

/// What a lock guards.
#[derive(Default)]
struct Resource {
    /// The last fencing token that a section began with.
    entered: u64,
    tokens: Vec<u64>,
    /// The highest token that the resource has seen.
    seen: u64,
    /// Written only by whoever has the highest.
    fenced: u64,
    fenced_writes: u64,
    /// Written by whoever has the lock.
    plain: u64,
    plain_writes: u64,
    /// The last request of each host that began its section, by the order of arrival.
    last: Vec<usize>,
    free_since: u64,
}

impl History {
    pub fn new(hosts: usize, keys: usize, prints: bool) -> Self {
        let state = State {
            prints,
            clocks: vec![0; hosts],
            hash: 0xCBF2_9CE4_8422_2325,
            keys: (0..keys)
                .map(|_| Resource {
                    last: vec![0; hosts],
                    ..Resource::default()
                })
                .collect(),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn expect(&self, forgets: bool, calm: Option<Calm>) {
        let mut state = self.state();
        (state.forgets, state.calm) = (forgets, calm);
    }

    /// A process had a lock while others waited for it, for so long.
    pub fn kept(&self, time: Duration) {
        let mut state = self.state();
        if state
            .calm
            .is_some_and(|calm| calm.is_for(0) && time > calm.kept)
        {
            state.violated(format_args!(
                "a lock was kept from those who waited, for {time:?}"
            ));
        }
    }

    pub fn set_time(&self, now: u64) {
        self.state().now = now;
    }

    pub fn set_clock(&self, host: HostId, time: u64) {
        self.state().clocks[host] = time;
    }

    pub fn log(&self, event: fmt::Arguments<'_>) {
        self.state().log(event);
    }

    pub fn violated(&self, what: &str) {
        self.state().violated(format_args!("{what}"));
    }

    pub fn fault(&self, event: fmt::Arguments<'_>) {
        let mut state = self.state();
        state.stats.faults += 1;
        state.log(event);
    }

    /// The hash of all events, how many they were, and what was wrong.
    pub fn outcome(&self) -> (u64, u64, Vec<String>, Stats) {
        let state = self.state();
        (
            state.hash,
            state.events,
            state.violations.clone(),
            state.stats,
        )
    }

    /// A request has come to the layer of a host.
    pub fn arrived(&self, request: u64) {
        let mut state = self.state();
        let now = state.now;
        state.arrivals.push((request, now));
        state.log(format_args!(
            "         request {request} has come to the layer"
        ));
    }

    /// A client's request has ended.
    pub fn answered(&self, request: u64, answer: Result<u16, &'static str>) {
        let mut state = self.state();
        match answer {
            Ok(200 | 503) => {}
            Ok(423) => state.stats.refused += 1,
            Ok(status) => state.violated(format_args!("request {request} was answered {status}")),
            Err("left") => state.stats.left += 1,
            Err(_) => state.stats.broken += 1,
        }
        if answer == Ok(503) {
            state.stats.unavailable += 1;
        }
        if state.calm.is_some_and(|calm| calm.is_for(request))
            && !matches!(answer, Ok(200) | Err("left"))
        {
            state.violated(format_args!(
                "nothing went wrong, and request {request} had {answer:?}"
            ));
        }
        state.log(format_args!("client   request {request}: {answer:?}"));
    }

    /// A critical section begins.
    pub fn enter(&self, host: HostId, key: usize, request: u64, lock: &HeldLock) -> Inside {
        let token = lock.fencing_token().unwrap_or(0);
        let remaining = lock.remaining();
        let mut state = self.state();
        let now = state.now;
        let (forgets, calm) = (state.forgets, state.calm);
        let arrival = state
            .arrivals
            .iter()
            .position(|(known, _)| *known == request)
            .unwrap_or(0);
        let came = state.arrivals.get(arrival).map_or(0, |(_, came)| *came);
        let resource = &mut state.keys[key];
        let mut wrong = None;
        if token == 0 {
            wrong = Some("a holder without a fencing token");
        } else if resource.tokens.contains(&token) {
            wrong = Some("two holders with one fencing token");
        } else if token < resource.entered && !forgets {
            wrong = Some("a fencing token that is not above the last");
        }
        resource.entered = token.max(resource.entered);
        resource.tokens.push(token);
        let last = std::mem::replace(&mut resource.last[host], arrival);
        if last > arrival {
            wrong = wrong.or(Some("a request was overtaken in its own process"));
        }
        let waits = now - resource.free_since.max(came);
        if calm.is_some_and(|calm| calm.is_for(request) && waits > calm.soon) {
            wrong = wrong.or(Some("a request slept though the lock was free"));
        }
        if let Some(wrong) = wrong {
            state.violated(format_args!("{wrong}: request {request}, token {token}"));
        }
        state.stats.sections += 1;
        state.log(format_args!(
            "host {host}   request {request} has key {key} with token {token}, for {remaining:?}"
        ));
        let deadline = state.deadline(host, remaining);
        state.inside.push(Section {
            request,
            host,
            key,
            deadline,
        });
        state.check_alone(request);
        let (fenced, plain) = state.keys[key].read(token);
        drop(state);
        Inside {
            history: self.clone(),
            request,
            key,
            token,
            fenced,
            plain,
            is_done: false,
        }
    }

    /// A host's process has ended, and so have the sections in it.
    pub fn crashed(&self, host: HostId) {
        let mut state = self.state();
        let ended = state.inside.iter().filter(|it| it.host == host);
        for request in Vec::from_iter(ended.map(|it| it.request)) {
            state.ends(request, false);
        }
    }

    /// Whether nothing is going on.
    pub fn is_quiet(&self) -> bool {
        self.state().inside.is_empty()
    }

    /// The whole is over.
    pub fn finish(&self) {
        let mut state = self.state();
        if !state.inside.is_empty() {
            state.violated(format_args!("a section has not ended"));
        }
        let forgets = state.forgets;
        for key in 0..state.keys.len() {
            let resource = &state.keys[key];
            let (fenced, writes) = (resource.fenced, resource.fenced_writes);
            if fenced != writes {
                state.violated(format_args!(
                    "key {key}: {writes} fenced writes, and {fenced} are there"
                ));
            }
            let resource = &state.keys[key];
            let (plain, writes) = (resource.plain, resource.plain_writes);
            if plain != writes && !forgets {
                state.violated(format_args!(
                    "key {key}: {writes} writes, and {plain} are there"
                ));
            }
        }
    }
}

impl Resource {
    /// What a holder with this token reads: nothing, if it comes too late for a fenced resource.
    fn read(&mut self, token: u64) -> (Option<u64>, u64) {
        let fenced = (token >= self.seen).then_some(self.fenced);
        self.seen = self.seen.max(token);
        (fenced, self.plain)
    }

    fn write(&mut self, token: u64, fenced: Option<u64>, plain: u64) {
        if let Some(fenced) = fenced.filter(|_| token >= self.seen) {
            self.fenced = fenced + 1;
            self.fenced_writes += 1;
        }
        self.plain = plain + 1;
        self.plain_writes += 1;
    }
}

impl State {
    fn log(&mut self, event: fmt::Arguments<'_>) {
        let line = format!("{:>5} ms  {event}", self.now);
        for byte in line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        self.events += 1;
        if self.prints {
            println!("{line}");
        }
    }

    fn violated(&mut self, what: fmt::Arguments<'_>) {
        self.log(format_args!("VIOLATION: {what}"));
        let now = self.now;
        self.violations.push(format!("at {now} ms: {what}"));
    }

    /// Not those of a process that has ended: that is known already.
    fn ends(&mut self, request: u64, is_done: bool) {
        let ended = self.inside.iter().position(|it| it.request == request);
        let Some(Section { key, .. }) = ended.map(|ended| self.inside.remove(ended)) else {
            return;
        };
        self.keys[key].free_since = self.now;
        let how = if is_done {
            "is done"
        } else {
            self.stats.lost += 1;
            "is stopped,"
        };
        self.log(format_args!(
            "         request {request} {how} with key {key}"
        ));
    }

    fn deadline(&self, host: HostId, remaining: Duration) -> Duration {
        Duration::from_millis(self.clocks[host]) + remaining
    }

    /// This request is inside. No other has the lock of its key, by its own clock.
    fn check_alone(&mut self, request: u64) {
        let Some(this) = self.inside.iter().find(|it| it.request == request) else {
            return;
        };
        let mut others = self
            .inside
            .iter()
            .filter(|it| it.key == this.key && it.request != request);
        let other = others.find(|it| it.deadline > Duration::from_millis(self.clocks[it.host] + 1));
        if let Some(other) = other
            && !self.forgets
        {
            let (key, other, host) = (this.key, other.request, other.host);
            self.violated(format_args!(
                "two holders of key {key}: request {request}, and request {other} on host {host}"
            ));
        }
    }
}

/// A critical section that has begun. Dropped half-way, it has written nothing.
pub struct Inside {
    history: History,
    request: u64,
    key: usize,
    token: u64,
    fenced: Option<u64>,
    plain: u64,
    is_done: bool,
}

impl Inside {
    /// It is polled, and so has its lock.
    pub fn goes_on(&self, host: HostId, lock: &HeldLock) {
        let remaining = lock.remaining();
        let mut state = self.history.state();
        let deadline = state.deadline(host, remaining);
        if remaining.is_zero() {
            state.violated(format_args!(
                "request {} goes on without its lock",
                self.request
            ));
        }
        if let Some(this) = state
            .inside
            .iter_mut()
            .find(|it| it.request == self.request)
        {
            this.deadline = deadline;
        }
        state.check_alone(self.request);
    }

    /// It writes, and is done.
    pub fn writes(mut self) {
        let mut state = self.history.state();
        state.keys[self.key].write(self.token, self.fenced, self.plain);
        drop(state);
        self.is_done = true;
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.history.state().ends(self.request, self.is_done);
    }
}
