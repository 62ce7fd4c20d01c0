//! What of a world matters for what can follow, as numbers.
//!
//! Times are counted from now, and from when they have passed, all are the same where they are only
//! compared with now. Tokens are numbered anew in the order in which their process made them, as far
//! as anybody still knows them; messages on their way are in no order.

use super::super::*;

/// In the place of a number where there is none.
const NONE: u64 = u64::MAX;

pub(super) struct Canon<'a> {
    world: &'a World,
    /// Those that somebody still knows, by process, in the order in which they were made.
    tokens: Vec<(u128, u64)>,
    pub(super) words: Vec<u64>,
}

fn key(token: OwnerToken) -> (u128, u64) {
    (token.inbox(), token.number())
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// How far one moment lies from another, on either side of it.
fn apart(at: Timestamp, from: Timestamp) -> u64 {
    at.as_nanos().wrapping_sub(from.as_nanos())
}

impl<'a> Canon<'a> {
    pub(super) fn of(world: &'a World) -> Self {
        let mut canon = Self {
            world,
            tokens: known_tokens(world),
            words: Vec::with_capacity(256),
        };
        canon.storage();
        for process in &world.processes {
            canon.process(process);
        }
        canon.messages();
        canon.histories();
        canon
    }

    fn put(&mut self, words: impl IntoIterator<Item = u64>) {
        self.words.extend(words);
    }

    fn token(&self, token: OwnerToken) -> u64 {
        let number = self.tokens.binary_search(&key(token));
        number.map_or(NONE - 1, |number| number as u64)
    }

    /// For what is only compared with now.
    fn ahead(&self, at: Timestamp) -> u64 {
        nanos(at.since(self.world.now))
    }

    fn ahead_or_none(&self, at: Option<Timestamp>) -> u64 {
        at.map_or(NONE, |at| self.ahead(at))
    }

    fn offset(&self, at: Timestamp) -> u64 {
        apart(at, self.world.now)
    }

    fn claim(&self, claim: Claim) -> [u64; 2] {
        [self.token(claim.token), nanos(claim.ttl)]
    }

    fn stamp(&self, stamp: Stamp) -> [u64; 2] {
        let run = stamp.run.map_or(NONE, |run| (self.world.run - run) as u64);
        let now = nanos(self.world.storage_now().since(Timestamp::ORIGIN));
        [run, nanos(stamp.at).wrapping_sub(now)]
    }

    fn baseline(&self, baseline: Option<Baseline>) -> [u64; 3] {
        baseline.map_or([NONE; 3], |Baseline { sent, stamp }| {
            let [run, at] = self.stamp(stamp);
            [self.offset(sent), run, at]
        })
    }

    fn block(&self, block: Option<FencingBlock>) -> [u64; 2] {
        block.map_or([NONE; 2], |block| {
            [self.fencing(block.first), block.count.into()]
        })
    }

    fn fencing(&self, number: u64) -> u64 {
        self.world.last_fencing.wrapping_sub(number)
    }

    fn pushed(&self, grant: &PushedGrant) -> [u64; 7] {
        let [run, at] = self.stamp(grant.stamp);
        let [first, count] = self.block(grant.fencing);
        let wanted = u64::from(grant.wanted);
        let (token, ttl) = (self.token(grant.token), nanos(grant.ttl));
        [token, ttl, run, at, first, count, wanted]
    }

    fn kept(&mut self, owner: Option<(OwnerToken, Timestamp)>, queue: &VecDeque<Standing>) {
        let now = self.world.storage_now();
        match owner.filter(|(_, until)| *until > now) {
            Some((token, until)) => self.put([self.token(token), nanos(until.since(now))]),
            None => self.put([NONE]),
        }
        for standing in queue {
            let until = nanos(standing.until.since(now));
            self.put(self.claim(standing.claim));
            self.put([standing.fencing.into(), until]);
        }
        self.put([NONE]);
    }

    fn storage(&mut self) {
        let world = self.world;
        self.kept(world.owner, &world.queue);
        self.kept(world.replica.owner, &world.replica.queue);
        self.put([
            u64::from(world.was_in_trouble),
            self.fencing(world.highest.0),
        ]);
        if world.kind.calm {
            let (order, token) = world.entered;
            self.put([
                world.last_order - order,
                token.map_or(NONE, |it| self.token(it)),
            ]);
        }
    }

    fn process(&mut self, process: &Process) {
        let state = &process.state;
        self.phase(process);
        let served = |turns: u32| u64::from(turns);
        let lost = state
            .lost
            .filter(|lost| self.token(lost.claim.token) < NONE - 1);
        self.put([
            state.releasing.into(),
            // Whether there were any decides how the next attempt is sent.
            u64::from(state.failures > 0),
            u64::from(state.wanted),
            u64::from(state.last_error.is_some()),
            state.fencing_used.into(),
            u64::from(
                state
                    .gave_back
                    .is_some_and(|at| self.world.now.since(at) <= HOT)
                    && self.heeds_heat(),
            ),
            lost.map_or(NONE, |lost| {
                2 * self.token(lost.claim.token) + u64::from(lost.in_turn)
            }),
            u64::from(process.is_reached),
            u64::from(process.listens),
            u64::from(process.missed),
            self.ahead_or_none(process.look_by),
        ]);
        match process.shared {
            Some((token, turns)) => self.put([self.token(token), served(turns)]),
            None => self.put([NONE]),
        }
        for waiter in &process.waiters {
            let doing = match waiter.doing {
                Doing::Awake => NONE - 1,
                Doing::Asleep => NONE - 2,
                Doing::Asking => NONE - 3,
                Doing::Dozing(until) => self.ahead(until),
            };
            let in_line = state.queue.get(waiter.place);
            let words = in_line.map(|it| [nanos(it.ttl), u64::from(it.wake.is_some())]);
            self.put([doing]);
            self.put(words.unwrap_or([NONE; 2]));
        }
        self.put([NONE]);
        for holder in &process.holders {
            self.put(self.claim(holder.claim));
            self.put([
                self.ahead(holder.deadline),
                self.ahead(holder.ends),
                u64::from(holder.was_told),
                u64::from(process.present == Some(holder.id)),
            ]);
        }
        self.put([NONE]);
    }

    fn phase(&mut self, process: &Process) {
        match &process.state.phase {
            Phase::Idle => self.put([0]),
            Phase::BackOff {
                until,
                open,
                own_release,
                told_free,
            } => {
                let flags = u64::from(*own_release) + 2 * u64::from(*told_free);
                self.put([1, self.ahead(*until), flags]);
                if let Some(open) = open {
                    self.put(self.claim(open.claim));
                    self.put(self.baseline(open.baseline));
                }
            }
            Phase::Asking {
                claim,
                sent,
                repeated,
                baseline,
                pushed,
                ask_again,
                crosses_release,
                is_hot,
                told_free,
                told_of_force,
            } => {
                let flags = [
                    *repeated,
                    *ask_again,
                    *crosses_release,
                    *is_hot && self.heeds_heat(),
                    *told_free,
                    *told_of_force,
                ];
                let flags = flags.iter().fold(0, |sum, flag| 2 * sum + u64::from(*flag));
                self.put([2, self.offset(*sent), flags]);
                self.put(self.claim(*claim));
                self.put(self.baseline(*baseline));
                if let Some(grant) = pushed {
                    self.put(self.pushed(grant));
                }
            }
            Phase::Held(held) => self.held(process, held),
        }
    }

    /// Where no process keeps what is hot, nothing is different for it.
    fn heeds_heat(&self) -> bool {
        self.world.kind.keeps_hot.contains(&true)
    }

    fn held(&mut self, process: &Process, held: &Held) {
        let lease = &held.lease;
        let (is_unsure, fencing, turns) = lease.inside();
        let is_hot = lease.is_hot && self.heeds_heat();
        let flags = u64::from(lease.renewing) + 2 * u64::from(is_unsure) + 4 * u64::from(is_hot);
        let limit = self.world.kind.limit;
        self.put([
            3,
            self.ahead(lease.deadline),
            self.ahead(lease.renew_at),
            flags,
        ]);
        self.put(self.claim(lease.claim));
        self.put(self.block(fencing));
        self.put([
            turns.into(),
            held.served.turns.min(limit.turns).into(),
            nanos(self.world.now.since(held.served.since).min(limit.time)),
            self.ahead_or_none(held.idle.map(|idle| idle.until)),
            u64::from(held.idle.is_some_and(|idle| idle.is_brief)),
            held.doubt as u64,
        ]);
        if let Some(turn) = held.turn {
            let whose = process
                .holders
                .iter()
                .position(|holder| holder.id == turn.id);
            self.put([
                whose.map_or(NONE, |whose| whose as u64),
                self.ahead(turn.until),
                u64::from(turn.revoked),
            ]);
        }
    }

    fn messages(&mut self) {
        let world = self.world;
        let mut all: Vec<[u64; 16]> = world.messages.iter().map(|it| self.message(it)).collect();
        all.sort_unstable();
        all.into_iter().for_each(|words| self.put(words));
        self.put([NONE]);
        let pushes = world.pushes.iter().map(|(process, push)| {
            let mut words = [0; 8];
            words[0] = *process as u64;
            match push {
                Push::Granted(grant) => words[1..].copy_from_slice(&self.pushed(grant)),
                Push::Wanted => words[1] = NONE,
                Push::Forced(token) => (words[1], words[2]) = (NONE, 1 + self.token(*token)),
            }
            words
        });
        let mut pushes: Vec<_> = pushes.collect();
        pushes.sort_unstable();
        pushes.into_iter().for_each(|words| self.put(words));
    }

    fn message(&self, message: &Message) -> [u64; 16] {
        let waiters = &self.world.processes[message.process].waiters;
        let [token, ttl] = self.claim(message.claim);
        let [call, with, count] = match message.call {
            Call::Acquire(caller) => {
                let place = waiters.iter().position(|waiter| Some(waiter.id) == caller);
                [0, place.map_or(NONE, |place| place as u64), 0]
            }
            Call::Renew => [1, 0, 0],
            Call::Release(None) => [2, 0, 0],
            Call::Release(Some((claim, fencing))) => [
                3 + nanos(claim.ttl),
                self.token(claim.token),
                fencing.into(),
            ],
        };
        let answer = match message.answer {
            None => [NONE; 3],
            Some(Answer::Yes { wanted, fencing }) => {
                let [first, count] = self.block(fencing);
                [u64::from(wanted), first, count]
            }
            Some(Answer::Requeued { ttl, stamp }) => {
                let [run, at] = self.stamp(stamp);
                [2 + nanos(ttl), run, at]
            }
            // The rest only tells whom to ask when, and how long that is.
            Some(Answer::No { queued, .. }) => {
                let [run, at] = queued.map_or([NONE; 2], |stamp| self.stamp(stamp));
                [NONE - 1, run, at]
            }
            Some(Answer::Unknown) => [NONE - 2; 3],
        };
        let flags = [message.again, message.repeated, message.is_settled];
        let flags = flags.iter().fold(0, |sum, flag| 2 * sum + u64::from(*flag));
        // Of no use to anybody but who waits for the reply of a renewal.
        let sent = match (message.call, message.is_settled) {
            (Call::Renew, false) => self.offset(message.sent),
            _ => 0,
        };
        let place = message.place.map_or(NONE, nanos);
        [
            message.process as u64,
            call,
            token,
            ttl,
            with,
            count,
            sent,
            flags,
            place,
            message.fencing.into(),
            answer[0],
            answer[1],
            answer[2],
            0,
            0,
            0,
        ]
    }

    /// What the oracle has in mind of each token.
    fn histories(&mut self) {
        let world = self.world;
        for number in 0..self.tokens.len() {
            let (inbox, of_inbox) = self.tokens[number];
            let token = OwnerToken::new(inbox, of_inbox);
            let process = &world.processes[process_of(token)];
            let sets = [
                &process.owed,
                &process.open,
                &process.queued,
                &process.given_back,
                &process.granted,
                &process.taken,
                &process.unconfirmed,
                &world.forgotten,
            ];
            let flags = sets
                .iter()
                .fold(0, |sum, set| 2 * sum + u64::from(set.contains(&token)));
            let generation = process.inbox.wrapping_sub(inbox) as u64;
            let highest = noted(&world.highest.1, token);
            self.put([
                process_of(token) as u64,
                flags,
                generation,
                highest.map_or(NONE, |highest| self.fencing(highest)),
            ]);
            for (_, block) in world.blocks.iter().filter(|(to, _)| *to == token) {
                self.put(self.block(Some(*block)));
            }
            if world.kind.calm {
                let order = noted(&world.order, token);
                self.put([order.map_or(NONE, |order| world.last_order - order)]);
            }
        }
    }
}

/// The tokens that may play a part once more.
fn known_tokens(world: &World) -> Vec<(u128, u64)> {
    let mut known = Vec::with_capacity(16);
    let mut add = |token: OwnerToken| known.push(key(token));
    for owner in [world.owner(), world.replica.owner].into_iter().flatten() {
        add(owner.0);
    }
    for standing in world.queue.iter().chain(&world.replica.queue) {
        add(standing.claim.token);
    }
    for message in &world.messages {
        add(message.claim.token);
        if let Call::Release(Some((claim, _))) = message.call {
            add(claim.token);
        }
    }
    for (_, push) in &world.pushes {
        match push {
            Push::Granted(grant) => add(grant.token),
            Push::Forced(token) => add(*token),
            Push::Wanted => {}
        }
    }
    for process in &world.processes {
        match &process.state.phase {
            Phase::Idle => {}
            Phase::BackOff { open, .. } => {
                open.iter().for_each(|open| {
                    add(open.claim.token);
                });
            }
            Phase::Asking { claim, .. } => {
                add(claim.token);
            }
            Phase::Held(held) => {
                add(held.lease.claim.token);
            }
        }
        for holder in &process.holders {
            add(holder.claim.token);
        }
        for token in process.owed.iter().chain(process.queued.iter()) {
            add(*token);
        }
    }
    if let (true, Some(token)) = (world.kind.calm, world.entered.1) {
        add(token);
    }
    known.sort_unstable();
    known.dedup();
    known
}
