//! Hosts with a runtime and a clock of their own each, in one thread.
//!
//! Each host's runtime stands still but for its millisecond. A host that is paused misses some: when
//! it goes on, its clock has gone on without it, as that of a process does which the system did not
//! let run.

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::{
    history::History,
    net::{HostId, Net},
    randomness,
};

const MS: Duration = Duration::from_millis(1);

/// See the [module documentation](self).
pub struct World {
    pub net: Net,
    pub history: History,
    pub now: u64,
    hosts: Vec<Host>,
}

struct Host {
    runtime: Option<Runtime>,
    paused_until: u64,
    /// Milliseconds that its clock has gone on without it.
    missed: u64,
    clock: u64,
    /// Once in so many milliseconds it is a millisecond fast, or slow.
    drift: Option<(u64, bool)>,
}

impl World {
    pub fn new(hosts: usize, net: Net, history: History) -> Self {
        let host = || Host {
            runtime: None,
            paused_until: 0,
            missed: 0,
            clock: 0,
            drift: None,
        };
        Self {
            net,
            history,
            now: 0,
            hosts: (0..hosts).map(|_| host()).collect(),
        }
    }

    /// Starts a process: runs `program` to its end, and what it spawns from then on.
    pub fn start<T>(&mut self, host: HostId, program: impl Future<Output = T>) -> T {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let runtime = runtime.unwrap();
        // To a whole millisecond, in which timers count.
        runtime.block_on(async { tokio::time::sleep(MS).await });
        let started = runtime.block_on(program);
        self.hosts[host].runtime = Some(runtime);
        self.hosts[host].missed = 0;
        self.net.revive(host);
        started
    }

    /// The process is gone. What its destructors do, nobody sees.
    pub fn crash(&mut self, host: HostId, is_told: impl Fn(HostId) -> bool) {
        self.net.kill(host, is_told);
        if let Some(runtime) = self.hosts[host].runtime.take() {
            self.history.crashed(host);
            // Destructors look at the clock, too.
            let handle = runtime.handle().clone();
            let _inside = handle.enter();
            // Tasks end in an order that follows from their numbers, which count all tasks of all
            // threads. So it must not be seen afterwards in what order they did.
            randomness::apart(|| drop(runtime));
        }
        self.hosts[host].paused_until = 0;
    }

    /// Does something with a host's clock in reach.
    pub fn on<T>(&self, host: HostId, work: impl FnOnce() -> T) -> T {
        let runtime = self.hosts[host].runtime.as_ref();
        let _inside = runtime.map(|runtime| runtime.enter());
        work()
    }

    pub fn is_up(&self, host: HostId) -> bool {
        self.hosts[host].runtime.is_some()
    }

    /// It does not run for so long.
    pub fn pause(&mut self, host: HostId, time: u64) {
        self.hosts[host].paused_until = self.now + time;
    }

    pub fn drifts(&mut self, host: HostId, period: u64, is_fast: bool) {
        self.hosts[host].drift = Some((period, is_fast));
    }

    /// A millisecond for all, one after the other in any order.
    pub fn step(&mut self) {
        self.now += 1;
        self.history.set_time(self.now);
        self.net.advance();
        let first = self.net.random(self.hosts.len() as u64) as usize;
        for index in 0..self.hosts.len() {
            let index = (first + index) % self.hosts.len();
            let host = &mut self.hosts[index];
            match host.drift {
                Some((period, true)) if self.now.is_multiple_of(period) => {
                    host.missed += 1;
                    host.clock += 1;
                }
                Some((period, false)) if self.now.is_multiple_of(period) => continue,
                _ => {}
            }
            host.clock += 1;
            if self.now < host.paused_until {
                host.missed += 1;
            } else if let Some(runtime) = &host.runtime {
                self.history.set_clock(index, host.clock - 1);
                let missed = MS * std::mem::take(&mut host.missed) as u32;
                runtime.block_on(async {
                    if !missed.is_zero() {
                        tokio::time::advance(missed).await;
                    }
                    tokio::time::sleep(MS).await;
                });
            }
            self.history.set_clock(index, host.clock);
        }
    }
}
