use std::{
    collections::VecDeque,
    ops::{Deref, DerefMut},
    rc::Rc,
};

#[cfg(test)]
use proptest::prelude::*;

use super::*;

const PROCESSES: usize = 3;
const WAITERS: usize = 4;
const TTLS: [Duration; 2] = [ms(300), ms(100)];
const MAX_HOLDS: [Duration; 2] = [ms(10_000), ms(150)];
const LIMIT: HandoffLimit = HandoffLimit {
    turns: 3,
    time: ms(200),
};

/// All that can happen, instead of what chance brings.
#[cfg(test)]
#[path = "model/mod.rs"]
mod model;

type WaiterId = u32;

/// What can happen. A `pick` chooses among what there is to choose from.
#[derive(Clone, Copy, Debug)]
enum Event {
    Join {
        process: usize,
        ttl: usize,
        max_hold: usize,
    },
    /// A waiter that does not follow an attempt looks, woken or not.
    Poll {
        process: usize,
        pick: u8,
    },
    /// All that were woken, or whose time has come, look.
    Run(usize),
    Leave {
        process: usize,
        pick: u8,
    },
    TurnDone {
        process: usize,
        pick: u8,
    },
    Tick(usize),
    Revoke(usize),
    /// The storage takes the lock from whoever has it, and says so.
    Force,
    /// The process is told so by somebody who makes it up.
    Lie(usize),
    WakeAll(usize),
    /// The storage gets a message.
    Arrive(u8),
    /// A process learns how one of its calls ended.
    Reply {
        pick: u8,
        how: How,
        pause: u8,
    },
    Pass(u16),
    /// A message of the storage to a process arrives; or again some time.
    Deliver {
        pick: u8,
        again: bool,
    },
    Lose(u8),
    /// The storage begins to reach a process, or ceases to.
    Reach(usize, bool),
    /// The process learns of it.
    Notice(usize),
    /// The storage forgets everything. Its clock may go on from somewhere else.
    Restart(u16),
    /// The process ends without a word. Another starts in its place, with an inbox of its own.
    Crash(usize),
    /// The storage's replica learns what the storage knows.
    Replicate,
    /// The replica takes over, with what it knows. Its clock may be ahead of the old one.
    FailOver(u16),
    /// Its clock is set forward, and all that was to expire with it.
    SetForward(u16),
    SetBack(u8),
    /// Time passes towards the end of a turn, or of what the storage gave if nobody uses it.
    PassTowardsTheEnd {
        process: usize,
        pick: u8,
        how_far: HowFar,
    },
}

#[derive(Clone, Copy, Debug)]
enum HowFar {
    Half,
    AllBut,
    All,
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// As it was.
    Answered,
    /// The reply is lost; the message arrives some time.
    TimedOut,
    /// The message is lost, if it has not arrived yet.
    Vanished,
    /// The storage does not do it.
    Refused,
}

/// An index: 0, or now and then 1.
#[cfg(test)]
fn mostly() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0), 1 => Just(1)]
}

#[cfg(test)]
fn event() -> impl Strategy<Value = Event> {
    let process = 0..PROCESSES;
    let pick = any::<u8>();
    let whose = (process.clone(), pick);
    let how_far = prop_oneof![Just(HowFar::Half), Just(HowFar::AllBut), Just(HowFar::All)];
    let how = prop_oneof![
        8 => Just(How::Answered),
        3 => Just(How::TimedOut),
        1 => Just(How::Vanished),
        1 => Just(How::Refused),
    ];
    prop_oneof![
        6 => (process.clone(), mostly(), mostly())
            .prop_map(|(process, ttl, max_hold)| Event::Join { process, ttl, max_hold }),
        4 => whose.clone().prop_map(|(process, pick)| Event::Poll { process, pick }),
        12 => process.clone().prop_map(Event::Run),
        2 => whose.clone().prop_map(|(process, pick)| Event::Leave { process, pick }),
        8 => whose.prop_map(|(process, pick)| Event::TurnDone { process, pick }),
        5 => process.clone().prop_map(Event::Tick),
        1 => process.clone().prop_map(Event::Revoke),
        2 => Just(Event::Force),
        1 => process.clone().prop_map(Event::Lie),
        1 => process.clone().prop_map(Event::WakeAll),
        4 => pick.prop_map(Event::Arrive),
        14 => (pick, how, 0..200_u8)
            .prop_map(|(pick, how, pause)| Event::Reply { pick, how, pause }),
        6 => prop_oneof![4 => 0..20_u16, 2 => 20..120_u16, 1 => 120..700_u16]
            .prop_map(Event::Pass),
        10 => (pick, prop::bool::weighted(0.2))
            .prop_map(|(pick, again)| Event::Deliver { pick, again }),
        1 => pick.prop_map(Event::Lose),
        2 => (process.clone(), prop::bool::weighted(0.7))
            .prop_map(|(process, is_reached)| Event::Reach(process, is_reached)),
        2 => process.clone().prop_map(Event::Notice),
        4 => (process, pick, how_far).prop_map(|(process, pick, how_far)| {
            Event::PassTowardsTheEnd { process, pick, how_far }
        }),
    ]
}

/// What kind of world it is.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// How much faster the storage's clock runs, in thousandths.
    drift: i64,
    /// Whether the storage keeps a queue.
    queues: bool,
    /// Whether everybody hears of it from the beginning.
    listens: bool,
    /// Whether who asks for the first time gets a free lock also if others stand in its queue.
    first_may_pass: bool,
    /// Whether a pushed grant is for half the time that was asked for.
    grants_half: bool,
    /// Whether the storage knows which run of its clock it is in.
    knows_run: bool,
    /// Whether grants come with fencing tokens.
    fences: bool,
    /// Nothing is lost, nothing breaks and all want the same: everybody is served in order.
    calm: bool,
    may_restart: bool,
    /// The storage's clock may be set forward. A grant may then look as if it lasted longer than it
    /// does, until its first renewal.
    may_set_forward: bool,
    processes: usize,
    linger: [Duration; PROCESSES],
    keeps_hot: [bool; PROCESSES],
    limit: HandoffLimit,
    /// Nobody is excused by what nobody could have known: two holders are two holders.
    strict: bool,
}

impl Kind {
    const PLAIN: Self = Self {
        drift: 0,
        queues: false,
        listens: false,
        first_may_pass: false,
        grants_half: false,
        knows_run: false,
        fences: true,
        calm: false,
        may_restart: false,
        may_set_forward: false,
        processes: PROCESSES,
        linger: [ms(0), ms(50), ms(400)],
        keeps_hot: [true, false, true],
        limit: LIMIT,
        strict: false,
    };

    /// What does not go together is given up.
    fn made_sound(self) -> Self {
        let calm = self.calm;
        Self {
            queues: self.queues || calm,
            listens: self.queues && self.listens || calm,
            first_may_pass: self.first_may_pass && !calm,
            may_restart: self.may_restart && !calm,
            may_set_forward: self.may_set_forward && !calm,
            ..self
        }
    }

    /// Where an event cannot happen in such a world, something more likely does.
    fn instead_of(self, event: Event) -> Event {
        match event {
            Event::Restart(_) if !self.may_restart => Event::Tick(0),
            Event::SetForward(_) if !self.may_set_forward => Event::Tick(0),
            event if !self.calm => event,
            Event::Join {
                process, max_hold, ..
            } => Event::Join {
                process,
                max_hold,
                ttl: 0,
            },
            Event::Reply { pick, pause, .. } => Event::Reply {
                pick,
                pause,
                how: How::Answered,
            },
            Event::Deliver { pick, .. } | Event::Lose(pick) => {
                Event::Deliver { pick, again: false }
            }
            Event::Reach(process, _) | Event::Lie(process) => Event::Tick(process),
            Event::Force => Event::Tick(0),
            event => event,
        }
    }
}

#[cfg(test)]
fn kind() -> impl Strategy<Value = Kind> {
    let often = || prop::bool::weighted(0.8);
    let seldom = || prop::bool::weighted(0.2);
    let storage = (often(), often(), any::<bool>(), seldom(), often());
    (-5..=5_i64, storage, often(), seldom(), seldom(), seldom()).prop_map(
        |(
            drift,
            (queues, listens, first_may_pass, grants_half, knows_run),
            fences,
            calm,
            may_restart,
            may_set_forward,
        )| {
            let kind = Kind {
                drift,
                queues,
                listens,
                first_may_pass,
                grants_half,
                knows_run,
                fences,
                calm,
                may_restart,
                may_set_forward,
                ..Kind::PLAIN
            };
            kind.made_sound()
        },
    )
}

/// What may happen in a world of this kind.
#[cfg(test)]
fn events(kind: Kind) -> impl Strategy<Value = Vec<Event>> {
    let event = event().prop_map(move |event| kind.instead_of(event));
    let breaks = prop_oneof![
        2 => Just(None),
        1 => (0..1_000_u16).prop_map(move |by| kind.may_restart.then_some(Event::Restart(by))),
        1 => (0..1_000_u16).prop_map(move |by| kind.may_set_forward.then_some(Event::SetForward(by))),
        1 => (0..100_u8).prop_map(|by| Some(Event::SetBack(by))),
    ];
    let event = (event, prop::option::weighted(0.05, breaks))
        .prop_map(|(event, breaks)| breaks.flatten().unwrap_or(event));
    prop::collection::vec(event, 0..400)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Doing {
    /// Its task is about to run.
    Awake,
    Asleep,
    /// It sleeps, but no longer than this.
    Dozing(Timestamp),
    /// It follows its attempt.
    Asking,
}

#[derive(Clone, Debug)]
struct Waiter {
    id: WaiterId,
    place: Place,
    doing: Doing,
}

/// A turn as its holder sees it.
#[derive(Clone, Debug)]
struct Holder {
    id: TurnId,
    claim: Claim,
    deadline: Timestamp,
    ends: Timestamp,
    was_told: bool,
}

impl Holder {
    fn is_sure(&self, now: Timestamp) -> bool {
        !self.was_told && now < self.deadline
    }
}

#[derive(Clone, Debug)]
struct Process {
    /// The number that all its tokens have in common.
    inbox: u128,
    state: KeyState<WaiterId>,
    /// In the order of their arrival.
    waiters: Vec<Waiter>,
    holders: Vec<Holder>,
    /// The turn that the driver tells of renewals and losses.
    present: Option<TurnId>,
    /// When the keeper looks next.
    look_by: Option<Timestamp>,
    /// Tokens that the storage may hold for this process, as far as it can know.
    owed: Tokens,
    /// Tokens of attempts that were not answered.
    open: Tokens,
    /// Tokens that were told to stand in the storage's queue, and were neither granted nor given
    /// back.
    queued: Tokens,
    given_back: Tokens,
    /// Tokens that a message has granted the lock to.
    granted: Tokens,
    /// Tokens that it was told, rightly, to have been taken away.
    taken: Tokens,
    /// Tokens that have the lock by a message and by no round trip yet.
    unconfirmed: Tokens,
    /// The lease that its last turn was on, and the turns on it while others were known to wait.
    shared: Option<(OwnerToken, u32)>,
    /// Whether the storage's messages reach it.
    is_reached: bool,
    /// Whether it believes so.
    listens: bool,
    /// Whether it was out of reach since it last began to listen.
    missed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    /// By the caller that still follows it, if there is one.
    Acquire(Option<WaiterId>),
    Renew,
    /// With a token that wants a new place, and so many fencing tokens.
    Release(Option<(Claim, u32)>),
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    Yes {
        wanted: bool,
        fencing: Option<FencingBlock>,
    },
    /// The new place was given too.
    Requeued { ttl: Duration, stamp: Stamp },
    No {
        holder_ttl: Option<Duration>,
        queued: Option<Stamp>,
    },
    /// A token that had asked before has nothing.
    Unknown,
}

/// Who stands in the storage's queue, until when by its clock.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Standing {
    claim: Claim,
    fencing: u32,
    until: Timestamp,
}

/// What the storage says of its own accord.
#[derive(Clone, Debug)]
enum Push {
    Granted(PushedGrant),
    Wanted,
    /// Of another process: it may overtake the others.
    Forced(OwnerToken),
}

#[derive(Clone, Debug)]
struct Message {
    process: usize,
    call: Call,
    claim: Claim,
    sent: Timestamp,
    /// Whether it is sent for the first time, with a new token, and for how long it wants a place in
    /// the queue.
    again: bool,
    repeated: bool,
    place: Option<Duration>,
    fencing: u32,
    /// What the storage did when it got it.
    answer: Option<Answer>,
    /// Whether the process has been told how it ended.
    is_settled: bool,
}

/// Cloned for nothing, as long as nobody changes it.
#[derive(Debug, Default)]
struct Shared<T> {
    value: Rc<T>,
}

impl<T> Shared<T> {
    fn new(value: T) -> Self {
        Self {
            value: Rc::new(value),
        }
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self {
            value: Rc::clone(&self.value),
        }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Clone> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        Rc::make_mut(&mut self.value)
    }
}

/// A few tokens: a hash set would cost more to clone than to search.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tokens(Vec<OwnerToken>);

impl Tokens {
    fn contains(&self, token: &OwnerToken) -> bool {
        self.0.contains(token)
    }

    /// Whether it is new.
    fn insert(&mut self, token: OwnerToken) -> bool {
        let is_new = !self.contains(&token);
        if is_new {
            self.0.push(token);
        }
        is_new
    }

    /// Whether it was there.
    fn remove(&mut self, token: &OwnerToken) -> bool {
        let place = self.0.iter().position(|it| it == token);
        place.map(|place| self.0.swap_remove(place)).is_some()
    }

    fn iter(&self) -> impl Iterator<Item = &OwnerToken> {
        self.0.iter()
    }
}

/// What is remembered of a token.
fn noted(notes: &[(OwnerToken, u64)], token: OwnerToken) -> Option<u64> {
    let mut notes = notes.iter();
    notes
        .find(|(of, _)| *of == token)
        .map(|(_, number)| *number)
}

fn note(notes: &mut Vec<(OwnerToken, u64)>, token: OwnerToken, number: u64) {
    notes.retain(|(of, _)| *of != token);
    notes.push((token, number));
}

/// What a replica of the storage knows.
#[derive(Clone, Debug, Default)]
struct Replica {
    owner: Option<(OwnerToken, Timestamp)>,
    queue: VecDeque<Standing>,
}

#[derive(Clone, Debug)]
struct World {
    name: LockName,
    now: Timestamp,
    kind: Kind,
    /// What the storage's clock showed at the beginning, and by how much it was set since.
    clock: Duration,
    run: u128,
    owner: Option<(OwnerToken, Timestamp)>,
    queue: VecDeque<Standing>,
    replica: Shared<Replica>,
    /// When a token got its place, or the lock without waiting.
    order: Shared<Vec<(OwnerToken, u64)>>,
    last_order: u64,
    /// The place of the lease that was entered last.
    entered: (u64, Option<OwnerToken>),
    /// Who had the lock when the storage forgot it, or when it was taken away.
    forgotten: Shared<Tokens>,
    /// The last fencing token that the storage gave. It does not forget that.
    last_fencing: u64,
    /// What came with each grant, in the order of the grants.
    blocks: Shared<Vec<(OwnerToken, FencingBlock)>>,
    /// The highest fencing token of any turn, and of the turns of each owner.
    highest: Shared<(u64, Vec<(OwnerToken, u64)>)>,
    processes: Vec<Shared<Process>>,
    messages: Vec<Message>,
    pushes: Vec<(usize, Push)>,
    tokens: u64,
    arrivals: WaiterId,
    /// Whether any call ended otherwise than with its true answer.
    was_in_trouble: bool,
}

fn picked(pick: u8, from: impl Iterator<Item = usize>) -> Option<usize> {
    let from: Vec<_> = from.collect();
    (!from.is_empty()).then(|| from[usize::from(pick) % from.len()])
}

/// Whose inbox it is, or was.
fn process_of(token: OwnerToken) -> usize {
    usize::try_from(token.inbox()).unwrap() % PROCESSES
}

impl World {
    fn new(kind: Kind) -> Self {
        let process = |index| Shared::new(Process::new(index as u128, kind.listens, kind.listens));
        Self {
            name: LockName::parse("lock", "lock:key").unwrap(),
            now: Timestamp::ORIGIN,
            kind,
            clock: ms(1_000_000),
            run: 1,
            queue: VecDeque::new(),
            replica: Shared::default(),
            order: Shared::default(),
            last_order: 0,
            entered: (0, None),
            forgotten: Shared::default(),
            last_fencing: 0,
            blocks: Shared::default(),
            highest: Shared::default(),
            pushes: Vec::new(),
            owner: None,
            processes: (0..kind.processes).map(process).collect(),
            messages: Vec::new(),
            tokens: 0,
            arrivals: 0,
            was_in_trouble: false,
        }
    }

    // --- the storage -------------------------------------------------------------------------

    fn storage_now(&self) -> Timestamp {
        let faster = (1_000 + self.kind.drift).unsigned_abs();
        Timestamp::from_nanos(self.now.as_nanos() / 1_000 * faster) + self.clock
    }

    fn stamp(&self) -> Stamp {
        Stamp {
            run: self.kind.knows_run.then_some(self.run),
            at: self.storage_now().since(Timestamp::ORIGIN),
        }
    }

    /// Who owns the key, and until when by the storage's clock.
    fn owner(&self) -> Option<(OwnerToken, Timestamp)> {
        self.owner.filter(|(_, until)| *until > self.storage_now())
    }

    /// Whether the storage's messages reach whose token this is.
    fn reaches(&self, token: OwnerToken) -> bool {
        let process = &self.processes[process_of(token)];
        process.is_reached && process.inbox == token.inbox()
    }

    /// Gives a free lock to the first in the queue that can be reached, unless it is who asks.
    fn pass_on(&mut self, asking: Option<OwnerToken>) {
        let now = self.storage_now();
        while let Some(&Standing {
            claim,
            fencing,
            until,
        }) = self.queue.front()
        {
            if Some(claim.token) == asking {
                return;
            }
            self.queue.pop_front();
            let process = process_of(claim.token);
            if until <= now || !self.reaches(claim.token) {
                continue;
            }
            let ttl = if self.kind.grants_half {
                claim.ttl / 2
            } else {
                claim.ttl
            };
            self.owner = Some((claim.token, now + ttl));
            let grant = PushedGrant {
                name: self.name.clone(),
                token: claim.token,
                ttl,
                stamp: self.stamp(),
                wanted: !self.queue.is_empty(),
                fencing: self.fence(claim.token, fencing),
            };
            self.pushes.push((process, Push::Granted(grant)));
            return;
        }
    }

    /// The fencing tokens of a grant.
    fn fence(&mut self, owner: OwnerToken, count: u32) -> Option<FencingBlock> {
        if !self.kind.fences {
            return None;
        }
        let first = self.last_fencing + 1;
        self.last_fencing += u64::from(count);
        let block = FencingBlock { first, count };
        self.blocks.push((owner, block));
        Some(block)
    }

    fn stand(&mut self, claim: Claim, fencing: u32, place: Duration, owner: OwnerToken) {
        let until = self.storage_now() + place;
        let mut queue = self.queue.iter_mut();
        match queue.find(|standing| standing.claim.token == claim.token) {
            Some(standing) => standing.until = until,
            None => {
                self.queue.push_back(Standing {
                    claim,
                    fencing,
                    until,
                });
                self.last_order += 1;
                note(&mut self.order, claim.token, self.last_order);
            }
        }
        if self.reaches(owner) {
            self.pushes.push((process_of(owner), Push::Wanted));
        }
    }

    fn unstand(&mut self, token: OwnerToken) {
        self.queue.retain(|standing| standing.claim.token != token);
    }

    fn arrive(&mut self, message: usize) {
        let Message {
            call,
            claim,
            again,
            repeated,
            place,
            fencing,
            ..
        } = self.messages[message];
        let now = self.storage_now();
        let is_owner = self.owner().is_some_and(|(token, _)| token == claim.token);
        let mut queue = self.queue.iter();
        if repeated && !is_owner && !queue.any(|standing| standing.claim.token == claim.token) {
            self.messages[message].answer = Some(Answer::Unknown);
            return;
        }
        let passes = self.kind.first_may_pass && !again;
        if matches!(call, Call::Acquire(_)) && self.owner().is_none() && !passes {
            self.pass_on(Some(claim.token));
        }
        let owner = self.owner();
        let is_ours = owner.is_some_and(|(token, _)| token == claim.token);
        let mut answer = Answer::No {
            holder_ttl: owner.map(|(_, until)| until.since(now)),
            queued: None,
        };
        match (call, owner) {
            (Call::Acquire(_), Some((owner, until))) if !is_ours => {
                if let Some(place) = place {
                    self.stand(claim, fencing, place, owner);
                    answer = Answer::No {
                        holder_ttl: Some(until.since(now)),
                        queued: Some(self.stamp()),
                    };
                }
            }
            (Call::Acquire(_), _) => {
                if !self.queue.iter().any(|standing| standing.claim == claim) && !is_ours {
                    self.last_order += 1;
                    note(&mut self.order, claim.token, self.last_order);
                }
                self.unstand(claim.token);
                self.owner = Some((claim.token, now + claim.ttl));
                answer = Answer::Yes {
                    wanted: !self.queue.is_empty(),
                    fencing: self.fence(claim.token, fencing),
                };
            }
            (Call::Renew, _) if is_ours => {
                self.owner = Some((claim.token, now + claim.ttl));
                answer = Answer::Yes {
                    wanted: !self.queue.is_empty(),
                    fencing: None,
                };
            }
            (Call::Release(rejoin), _) if is_ours => {
                self.owner = None;
                self.pass_on(None);
                answer = match (self.owner(), rejoin) {
                    (Some((owner, until)), Some((rejoin, fencing))) => {
                        self.stand(rejoin, fencing, 2 * (rejoin.ttl + PAUSE), owner);
                        Answer::Requeued {
                            ttl: until.since(now),
                            stamp: self.stamp(),
                        }
                    }
                    _ => Answer::Yes {
                        wanted: false,
                        fencing: None,
                    },
                };
            }
            (Call::Release(_), _) => self.unstand(claim.token),
            (Call::Renew, _) => {}
        }
        self.messages[message].answer = Some(answer);
    }

    fn force(&mut self) {
        let Some((token, _)) = self.owner() else {
            return;
        };
        self.forgotten.insert(token);
        self.owner = None;
        self.pass_on(None);
        if self.reaches(token) {
            self.pushes.push((process_of(token), Push::Forced(token)));
        }
    }

    fn tell_of_force(&mut self, index: usize, token: OwnerToken) {
        let process = &mut *self.processes[index];
        let effects = process.state.told_of_force(token, self.now);
        if let Some(due) = process.state.due() {
            process.look_by = Some(process.look_by.map_or(due, |at| at.min(due)));
        }
        self.carry_out(index, effects);
    }

    fn restart(&mut self, by: Duration) {
        self.replica = Shared::default();
        self.fail_over(by);
    }

    fn fail_over(&mut self, by: Duration) {
        self.was_in_trouble = true;
        let Replica { owner, queue } = Replica::clone(&self.replica);
        if owner != self.owner {
            let forgets = self.owner().map(|(token, _)| token);
            forgets.map(|token| self.forgotten.insert(token));
        }
        // Expiries are moments of the clock that now shows another time.
        self.owner = owner.map(|(token, until)| (token, until + by));
        self.queue = queue;
        for standing in &mut self.queue {
            standing.until = standing.until + by;
        }
        self.replica = Shared::new(Replica {
            owner: self.owner,
            queue: self.queue.clone(),
        });
        self.run += 1;
        self.clock += by;
        for process in &mut self.processes {
            process.missed |= process.is_reached;
            process.is_reached = false;
        }
    }

    fn crash(&mut self, index: usize) {
        self.was_in_trouble = true;
        let process = Process::new(
            self.processes[index].inbox + PROCESSES as u128,
            self.kind.queues,
            false,
        );
        self.processes[index] = Shared::new(process);
        self.pushes.retain(|(process, _)| *process != index);
        for message in &mut self.messages {
            message.is_settled |= message.process == index;
        }
        self.messages
            .retain(|message| !message.is_settled || message.answer.is_none());
    }

    /// Sets the storage's clock, and all that was to expire with it.
    fn set_clock(&mut self, set: impl Fn(Duration) -> Duration) {
        let shift = |at: &mut Timestamp| {
            *at = Timestamp::ORIGIN + set(at.since(Timestamp::ORIGIN));
        };
        self.clock = set(self.clock);
        self.owner.iter_mut().for_each(|(_, until)| shift(until));
        self.queue
            .iter_mut()
            .for_each(|standing| shift(&mut standing.until));
    }

    fn reach(&mut self, index: usize, is_reached: bool) {
        let process = &mut *self.processes[index];
        process.missed |= !is_reached;
        process.is_reached = is_reached && self.kind.queues;
    }

    fn notice(&mut self, index: usize) {
        let process = &mut *self.processes[index];
        let is_news = process.missed || !process.listens;
        process.listens = process.is_reached;
        if process.listens && is_news {
            process.missed = false;
            let effects = process.state.ask_again(self.now);
            self.carry_out(index, effects);
        } else if !process.listens {
            let effects = process.state.stop_idling();
            self.carry_out(index, effects);
        }
    }

    fn deliver(&mut self, push: usize, again: bool) {
        let (index, push) = if again {
            self.pushes[push].clone()
        } else {
            self.pushes.remove(push)
        };
        let now = self.now;
        let process = &mut *self.processes[index];
        let grant = match push {
            Push::Granted(grant) => grant,
            Push::Wanted => {
                let effects = process.state.wanted(now);
                return self.carry_out(index, effects);
            }
            Push::Forced(token) => {
                process.taken.insert(token);
                return self.tell_of_force(index, token);
            }
        };
        let token = grant.token;
        process.granted.insert(token);
        let has_it = |state: &KeyState<WaiterId>| matches!(&state.phase, Phase::Held(held) if held.lease.claim.token == token);
        let had_it = has_it(&process.state);
        let is_retired = process.given_back.contains(&token);
        let effects = process.state.pushed(&grant, now);
        let is_open = match &process.state.phase {
            Phase::Asking { claim, .. } => claim.token == token,
            Phase::BackOff { open, .. } => open.is_some_and(|open| open.claim.token == token),
            _ => false,
        };
        if !is_open {
            process.queued.remove(&token);
        }
        if is_retired {
            assert!(!has_it(&process.state), "a retired token was used again");
            let release = effects.release.as_ref().map(|it| it.claim.token);
            assert_eq!(release, Some(token), "it is still ours for the storage");
        }
        if has_it(&process.state) && !had_it {
            process.unconfirmed.insert(token);
        }
        self.carry_out(index, effects);
    }

    // --- the driver --------------------------------------------------------------------------

    fn send(&mut self, process: usize, call: Call, claim: Claim) {
        self.send_attempt(
            process,
            call,
            Attempt {
                claim,
                again: false,
                repeated: false,
                fencing: 0,
            },
            None,
        );
    }

    fn send_attempt(
        &mut self,
        process: usize,
        call: Call,
        attempt: Attempt,
        place: Option<Duration>,
    ) {
        let Attempt {
            claim,
            again,
            repeated,
            fencing,
        } = attempt;
        self.messages.push(Message {
            process,
            call,
            claim,
            sent: self.now,
            again,
            repeated,
            place,
            fencing,
            answer: None,
            is_settled: false,
        });
    }

    fn carry_out(&mut self, index: usize, effects: Effects<WaiterId>) {
        let process = &mut *self.processes[index];
        let present = process.present;
        let mut holder = process
            .holders
            .iter_mut()
            .find(|holder| Some(holder.id) == present);
        if let (Some(deadline), Some(holder)) = (effects.deadline, &mut holder) {
            assert!(deadline <= holder.ends, "prolonged past max_hold");
            let is_late = self.now >= holder.deadline && deadline > holder.deadline;
            assert!(!is_late, "brought back to life");
            holder.deadline = deadline;
        }
        if let (Some(_), Some(holder)) = (effects.lost, holder) {
            holder.was_told = true;
            process.present = None;
        }
        if let Some(id) = effects.wake {
            process.wake(id);
        }
        if let Some(release) = effects.release {
            let GiveBack { claim, rejoin, .. } = release;
            let stands = process.queued.contains(&claim.token);
            assert!(
                !(release.wanted == Some(false) && stands),
                "its place would stay"
            );
            let gives_up = process.queued.remove(&claim.token) && !process.waiters.is_empty();
            let is_early = gives_up && !process.granted.contains(&claim.token);
            assert!(!(is_early && self.kind.calm), "a place was given up");
            process.owed.remove(&claim.token);
            process.given_back.insert(claim.token);
            let rejoin = rejoin.map(|rejoin| (rejoin.claim, rejoin.fencing));
            if let Some((rejoin, fencing)) = rejoin {
                assert!(fencing > 0, "its turns would have no token");
                assert!(process.listens, "nobody would tell of a grant");
                let is_new = process.owed.insert(rejoin.token);
                assert!(is_new && !process.given_back.contains(&rejoin.token));
            }
            self.send(index, Call::Release(rejoin), claim);
        }
    }

    fn poll(&mut self, index: usize, waiter: usize) {
        let process = &mut *self.processes[index];
        let Waiter { id, place, .. } = process.waiters[waiter];
        let inbox = process.inbox;
        let new_token = || {
            self.tokens += 1;
            OwnerToken::new(inbox, self.tokens)
        };
        let (step, effects) = process.state.poll(place, self.now, || id, new_token);
        process.waiters[waiter].doing = match &step {
            Step::Granted(_) => Doing::Awake,
            Step::Ask(_) => Doing::Asking,
            Step::AskAt(at) => Doing::Dozing(*at),
            Step::Wait => Doing::Asleep,
        };
        match step {
            Step::Granted(granted) => {
                assert_eq!(waiter, 0, "not the first to come got the turn");
                process.waiters.remove(0);
                let token = granted.claim.token;
                let is_out = process.given_back.contains(&token);
                assert!(!is_out, "a token on its way out was used");
                let is_taken = process.taken.contains(&token);
                assert!(!is_taken, "a lock that was taken away was entered");
                process.queued.remove(&token);
                let place = (noted(&self.order, token).unwrap(), Some(token));
                let in_order = place.0 > self.entered.0 || place == self.entered;
                assert!(in_order || !self.kind.calm, "somebody was passed");
                self.entered = place;
                self.check_fencing(index, &granted);
                assert!(granted.deadline > self.now, "over before it began");
                self.check_sharing(index, token);
                let process = &mut *self.processes[index];
                process.present = Some(granted.id);
                process.holders.push(Holder {
                    id: granted.id,
                    claim: granted.claim,
                    deadline: granted.deadline,
                    ends: granted.ends,
                    was_told: false,
                });
                process.look_by = [process.look_by, process.state.due()]
                    .into_iter()
                    .flatten()
                    .min();
            }
            Step::Ask(attempt) => {
                let Attempt { claim, fencing, .. } = attempt;
                assert!(fencing > 0, "its turns would have no token");
                let is_new = !process.owed.contains(&claim.token);
                assert!(
                    is_new || process.open.contains(&claim.token),
                    "an answered token was used again"
                );
                assert!(
                    !process.given_back.contains(&claim.token),
                    "a token on its way out was used again"
                );
                process.owed.insert(claim.token);
                let place = process.listens.then_some(2 * (claim.ttl + PAUSE));
                let call = Call::Acquire(Some(id));
                self.send_attempt(index, call, attempt, place);
            }
            Step::AskAt(_) | Step::Wait => {}
        }
        self.carry_out(index, effects);
        if let Step::Ask(Attempt { claim, .. }) = step {
            let mut queued = self.processes[index].queued.iter();
            assert!(
                queued.all(|token| *token == claim.token),
                "a second place was asked for"
            );
        }
    }

    fn run(&mut self, index: usize) {
        while let Some(waiter) = self.processes[index].runnable(self.now) {
            self.poll(index, waiter);
        }
    }

    fn leave(&mut self, index: usize, waiter: usize) {
        let process = &mut *self.processes[index];
        let Waiter { id, place, .. } = process.waiters.remove(waiter);
        let effects = process.state.leave(place);
        for message in &mut self.messages {
            if message.call == Call::Acquire(Some(id)) {
                message.call = Call::Acquire(None);
            }
        }
        self.carry_out(index, effects);
    }

    fn turn_done(&mut self, index: usize, holder: usize) {
        let process = &mut *self.processes[index];
        let (holder, inbox) = (process.holders.remove(holder), process.inbox);
        process.present.take_if(|id| *id == holder.id);
        let (ended, effects) = process.state.turn_done(
            holder.id,
            holder.claim,
            Sharing {
                limit: self.kind.limit,
                told: process.listens,
                linger: self.kind.linger[index],
                keeps_hot: self.kind.keeps_hot[index],
                give_way: Duration::ZERO,
            },
            self.now,
            || {
                self.tokens += 1;
                OwnerToken::new(inbox, self.tokens)
            },
        );
        let look_by = [
            process.look_by,
            process.state.due(),
            process.state.moment_ends(),
        ];
        process.look_by = look_by.into_iter().flatten().min();
        let was_ours = ended != Ended::Lost;
        assert_eq!(was_ours, holder.is_sure(self.now), "{ended:?}: {holder:?}");
        self.carry_out(index, effects);
    }

    fn tick(&mut self, index: usize) {
        let process = &mut *self.processes[index];
        let Tick {
            effects,
            renew,
            due,
        } = process.state.tick(self.now);
        process.look_by = [due, process.state.moment_ends()]
            .into_iter()
            .flatten()
            .min();
        if let Some(claim) = renew {
            let in_use = |holder: &Holder| holder.claim == claim && holder.is_sure(self.now);
            let is_needed = process.holders.iter().any(in_use) || process.is_idle();
            assert!(is_needed, "nobody needs it");
            self.send(index, Call::Renew, claim);
        }
        self.carry_out(index, effects);
    }

    fn revoke(&mut self, index: usize) {
        let process = &mut *self.processes[index];
        if process.state.revoke() {
            let present = process.present;
            let is_present = |holder: &&mut Holder| Some(holder.id) == present;
            let holder = process.holders.iter_mut().find(is_present);
            holder.expect("a turn that can be revoked").was_told = true;
        }
    }

    fn reply(&mut self, message: usize, how: How, pause: Duration) {
        if matches!(how, How::Answered) && self.messages[message].answer.is_none() {
            self.arrive(message);
        }
        self.was_in_trouble |= !matches!(how, How::Answered);
        let Message {
            process: index,
            call,
            claim,
            sent,
            answer,
            ..
        } = self.messages[message];
        // What has arrived cannot be refused any more.
        let error = match how {
            How::Refused if answer.is_none() => StorageErrorKind::Rejected,
            _ => StorageErrorKind::Timeout,
        };
        let answer = answer.filter(|_| matches!(how, How::Answered));
        self.messages[message].is_settled = true;
        if matches!(how, How::Vanished | How::Refused) {
            self.messages.remove(message);
        }

        let now = self.now;
        let process = &mut *self.processes[index];
        let effects = match call {
            Call::Acquire(caller) => {
                let outcome = match answer {
                    Some(Answer::No { holder_ttl, queued }) => {
                        Outcome::Denied { holder_ttl, queued }
                    }
                    Some(Answer::Yes { wanted, fencing }) => Outcome::Granted { wanted, fencing },
                    Some(Answer::Unknown) => Outcome::NotQueued,
                    Some(Answer::Requeued { .. }) => unreachable!("by an acquire"),
                    None => Outcome::Failed(StorageError::new(error)),
                };
                if let Some(id) = caller {
                    process.wake(id);
                }
                process.learn(claim.token, &outcome);
                process.replied(claim, outcome, now, now + pause)
            }
            Call::Renew => {
                let answer = answer.map(|answer| match answer {
                    Answer::Yes { wanted, .. } => Renewed::Ours { wanted },
                    _ => Renewed::NotOurs,
                });
                match answer {
                    // One that is being given back has its release on the way.
                    Some(Renewed::Ours { .. }) => {
                        let kept = !process.given_back.contains(&claim.token);
                        kept && process.owed.insert(claim.token)
                    }
                    Some(Renewed::NotOurs) => process.owed.remove(&claim.token),
                    None => false,
                };
                if answer.is_some() {
                    process.unconfirmed.remove(&claim.token);
                }
                process.look_by = Some(now);
                process.state.renewed(claim, sent, answer, now)
            }
            Call::Release(Some((rejoin, _))) => {
                let outcome = match answer {
                    Some(Answer::Requeued { ttl, stamp }) => Outcome::Denied {
                        holder_ttl: Some(ttl),
                        queued: Some(stamp),
                    },
                    Some(_) => Outcome::NotQueued,
                    None => Outcome::Failed(StorageError::new(error)),
                };
                process.learn(rejoin.token, &outcome);
                let effects = process.replied(rejoin, outcome, now, now + pause);
                self.carry_out(index, effects);
                if answer.is_none() && error.is_transient() {
                    // Sent again, without asking for a place.
                    self.send(index, Call::Release(None), claim);
                    Effects::none()
                } else {
                    self.processes[index].state.release_done()
                }
            }
            Call::Release(None) => process.state.release_done(),
        };
        self.carry_out(index, effects);
        self.messages
            .retain(|message| !message.is_settled || message.answer.is_none());
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Join {
                process,
                ttl,
                max_hold,
            } => {
                let process = &mut *self.processes[process];
                if process.waiters.len() < WAITERS {
                    self.arrivals += 1;
                    process.waiters.push(Waiter {
                        id: self.arrivals,
                        place: process.state.join(TTLS[ttl], MAX_HOLDS[max_hold], PAUSE),
                        doing: Doing::Awake,
                    });
                }
            }
            Event::Poll { process, pick } => {
                let waiters = self.processes[process].waiters.iter().enumerate();
                let free = waiters.filter(|(_, waiter)| waiter.doing != Doing::Asking);
                if let Some(waiter) = picked(pick, free.map(|(index, _)| index)) {
                    self.poll(process, waiter);
                }
            }
            Event::Run(process) => self.run(process),
            Event::Leave { process, pick } => {
                if let Some(waiter) = picked(pick, 0..self.processes[process].waiters.len()) {
                    self.leave(process, waiter);
                }
            }
            Event::TurnDone { process, pick } => {
                if let Some(holder) = picked(pick, 0..self.processes[process].holders.len()) {
                    self.turn_done(process, holder);
                }
            }
            Event::Tick(process) => self.tick(process),
            Event::Revoke(process) => self.revoke(process),
            Event::Force => self.force(),
            Event::Lie(process) => {
                let token = match &self.processes[process].state.phase {
                    Phase::Held(held) => Some(held.lease.claim.token),
                    Phase::Asking { claim, .. } => Some(claim.token),
                    Phase::BackOff { open, .. } => open.map(|open| open.claim.token),
                    Phase::Idle => None,
                };
                if let Some(token) = token {
                    self.tell_of_force(process, token);
                }
            }
            Event::WakeAll(process) => {
                let process = &mut *self.processes[process];
                for id in process.state.wake_all() {
                    process.wake(id);
                }
            }
            Event::Arrive(pick) => {
                let all = self.messages.iter().enumerate();
                let on_the_way = all.filter(|(_, message)| message.answer.is_none());
                if let Some(message) = picked(pick, on_the_way.map(|(index, _)| index)) {
                    self.arrive(message);
                    self.messages
                        .retain(|message| !message.is_settled || message.answer.is_none());
                }
            }
            Event::Reply { pick, how, pause } => {
                let all = self.messages.iter().enumerate();
                let waited_for = all.filter(|(_, message)| !message.is_settled);
                if let Some(message) = picked(pick, waited_for.map(|(index, _)| index)) {
                    self.reply(message, how, ms(pause.into()));
                }
            }
            Event::Deliver { pick, again } => {
                if let Some(push) = picked(pick, 0..self.pushes.len()) {
                    self.deliver(push, again);
                }
            }
            Event::Lose(pick) => {
                if let Some(push) = picked(pick, 0..self.pushes.len()) {
                    self.was_in_trouble = true;
                    self.pushes.remove(push);
                }
            }
            Event::Reach(process, is_reached) => self.reach(process, is_reached),
            Event::Notice(process) => self.notice(process),
            Event::Crash(process) => self.crash(process),
            Event::Replicate => {
                self.replica = Shared::new(Replica {
                    owner: self.owner,
                    queue: self.queue.clone(),
                });
            }
            Event::FailOver(by) => self.fail_over(ms(by.into())),
            Event::Restart(by) => self.restart(ms(by.into())),
            Event::SetForward(by) => self.set_clock(|at| at + ms(by.into())),
            Event::SetBack(by) => self.set_clock(|at| at - ms(by.into())),
            Event::Pass(time) => self.now = self.now + ms(time.into()),
            Event::PassTowardsTheEnd {
                process,
                pick,
                how_far,
            } => {
                let holders = &self.processes[process].holders;
                let left = match picked(pick, 0..holders.len()) {
                    Some(holder) => Some(holders[holder].deadline.since(self.now)),
                    None => self
                        .owner()
                        .map(|(_, until)| until.since(self.storage_now())),
                };
                if let Some(left) = left {
                    let passes = match how_far {
                        HowFar::Half => left / 2,
                        HowFar::AllBut => left.saturating_sub(Duration::from_nanos(1)),
                        HowFar::All => left,
                    };
                    self.now = self.now + passes;
                }
            }
        }
    }

    // --- what must hold ----------------------------------------------------------------------

    /// A turn begins: its fencing token came with its own lease, and is greater than those of all
    /// turns that began before.
    fn check_fencing(&mut self, index: usize, granted: &Granted) {
        assert_eq!(granted.fencing.is_some(), self.kind.fences);
        let Some(fencing) = granted.fencing else {
            return;
        };
        let owner = granted.claim.token;
        let is_its_own = self.blocks.iter().any(|(to, block)| {
            *to == owner && (block.first..block.first + u64::from(block.count)).contains(&fencing)
        });
        assert!(is_its_own, "{fencing} did not come with the lease");
        let (highest, of_owners) = &mut *self.highest;
        let of_owner = noted(of_owners, owner).unwrap_or_default();
        assert!(fencing > of_owner, "{fencing} after {of_owner}");
        // One that does not know that others were here after it: that is what its token is for.
        let process = &self.processes[index];
        let may_be_late = self.forgotten.contains(&owner)
            || self.kind.may_set_forward && process.unconfirmed.contains(&owner);
        assert!(
            fencing > *highest || may_be_late,
            "{fencing} after {highest}"
        );
        note(of_owners, owner, fencing);
        *highest = fencing.max(*highest);
    }

    /// A turn begins: on a lease that others are known to wait for, no more than were agreed on.
    fn check_sharing(&mut self, index: usize, token: OwnerToken) {
        let process = &mut *self.processes[index];
        let (of, turns) = process.shared.get_or_insert((token, 0));
        if *of != token || !process.state.wanted {
            (*of, *turns) = (token, 0);
        }
        if process.state.wanted {
            *turns += 1;
            let most = self.kind.limit.turns;
            assert!(*turns <= most, "{turns} turns while others waited");
        }
    }

    fn check(&self) {
        let holders = self.processes.iter().flat_map(|process| {
            let is_sure = |holder: &&Holder| {
                let token = &holder.claim.token;
                // Told wrong, but for one round trip only.
                let may_err = self.kind.may_set_forward
                    && process.unconfirmed.contains(token)
                    && process.renews_soon(holder.claim, self.now);
                holder.is_sure(self.now) && (!may_err || self.kind.strict)
            };
            process.holders.iter().filter(is_sure)
        });
        // What the storage has forgotten nobody can know.
        let is_known =
            |holder: &&Holder| self.kind.strict || !self.forgotten.contains(&holder.claim.token);
        let sure: Vec<_> = holders.filter(is_known).collect();
        assert!(sure.len() <= 1, "two holders: {sure:?}");
        for holder in sure {
            let owner = self.owner().map(|(token, _)| token);
            let rightly = owner == Some(holder.claim.token);
            assert!(
                rightly || self.kind.strict,
                "{owner:?} owns it, not {holder:?}"
            );
        }
        for (index, process) in self.processes.iter().enumerate() {
            let waited_for = |is_it: fn(Call) -> bool| {
                let ours = self.messages.iter().filter(|message| {
                    message.process == index && !message.is_settled && is_it(message.call)
                });
                ours.count()
            };
            let attempts =
                waited_for(|call| matches!(call, Call::Acquire(_) | Call::Release(Some(_))));
            let is_asking = matches!(process.state.phase, Phase::Asking { .. });
            assert_eq!(attempts, usize::from(is_asking), "attempts on their way");
            let releases = waited_for(|call| matches!(call, Call::Release(_)));
            assert_eq!(releases, process.state.releasing as usize);
            assert_eq!(process.state.waiters(), process.waiters.len());
            process.check_that_it_goes_on(self.now);
        }
    }

    // --- how it ends -------------------------------------------------------------------------

    /// From now on the network works, tasks run when they are woken and timers when they are
    /// due, holders finish, and nobody new comes. Then everybody gets a turn, and nothing is
    /// left.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 1_000, "somebody waits for ever: {self:#?}");
            while !self.messages.is_empty() {
                if self.messages[0].is_settled {
                    self.arrive(0);
                    self.messages.remove(0);
                } else {
                    self.reply(0, How::Answered, ms(20));
                }
                self.check();
            }
            while !self.pushes.is_empty() {
                self.deliver(0, false);
                self.check();
            }
            for index in 0..self.processes.len() {
                self.reach(index, true);
                self.notice(index);
                if self.processes[index]
                    .look_by
                    .is_some_and(|at| at <= self.now)
                {
                    self.tick(index);
                }
                if !self.processes[index].holders.is_empty() {
                    self.turn_done(index, 0);
                }
                self.run(index);
                self.check();
            }
            self.now = self.now + ms(3);
            let at_rest = |process: &Shared<Process>| {
                process.waiters.is_empty() && process.holders.is_empty() && !process.is_idle()
            };
            let is_quiet = self.messages.is_empty() && self.pushes.is_empty();
            if is_quiet && self.processes.iter().all(at_rest) {
                break;
            }
        }
        for process in &self.processes {
            assert!(process.state.is_done(), "{process:#?}");
            assert_eq!(process.owed, Tokens::default(), "never given back");
        }
        assert!(
            self.was_in_trouble || self.owner().is_none() && self.queue.is_empty(),
            "something was left in the storage"
        );
    }
}

impl Process {
    fn new(inbox: u128, is_reached: bool, listens: bool) -> Self {
        Self {
            inbox,
            state: KeyState::new(),
            waiters: Vec::new(),
            holders: Vec::new(),
            present: None,
            look_by: None,
            owed: Tokens::default(),
            open: Tokens::default(),
            queued: Tokens::default(),
            given_back: Tokens::default(),
            granted: Tokens::default(),
            taken: Tokens::default(),
            unconfirmed: Tokens::default(),
            shared: None,
            is_reached,
            listens,
            missed: false,
        }
    }

    fn is_idle(&self) -> bool {
        matches!(&self.state.phase, Phase::Held(held) if held.idle.is_some())
    }

    /// Whether it does not leave a wrong deadline as it is. A renewal that failed is repeated after a
    /// tenth of the ttl.
    fn renews_soon(&self, claim: Claim, now: Timestamp) -> bool {
        match &self.state.phase {
            Phase::Held(Held { lease, .. }) if lease.claim == claim => {
                lease.renewing || lease.renew_at <= now + claim.ttl / 10
            }
            _ => true,
        }
    }

    fn wake(&mut self, id: WaiterId) {
        let mut waiters = self.waiters.iter_mut();
        let waiter = waiters.find(|waiter| waiter.id == id);
        waiter.expect("only who waits is woken").doing = Doing::Awake;
    }

    fn replied(
        &mut self,
        claim: Claim,
        outcome: Outcome,
        now: Timestamp,
        retry_at: Timestamp,
    ) -> Effects<WaiterId> {
        let by_the_reply = matches!(outcome, Outcome::Granted { .. });
        let effects = self.state.replied(claim, outcome, now, retry_at);
        // Else by a message that waited for it.
        if matches!(self.state.phase, Phase::Held(_)) && !by_the_reply {
            self.unconfirmed.insert(claim.token);
        }
        effects
    }

    /// What the end of an attempt says of its token.
    fn learn(&mut self, token: OwnerToken, outcome: &Outcome) {
        match outcome {
            Outcome::Granted { .. } => {
                self.open.remove(&token);
                self.queued.remove(&token);
                self.unconfirmed.remove(&token);
            }
            Outcome::Denied {
                queued: Some(_), ..
            } => {
                self.open.insert(token);
                self.queued.insert(token);
            }
            Outcome::Failed(error) if error.kind().is_transient() => {
                self.open.insert(token);
            }
            // Says nothing of an attempt before with the same token.
            Outcome::Failed(_) if self.open.contains(&token) => {}
            // Asked for without a place, it may stand there from before.
            Outcome::Denied { .. } if self.queued.contains(&token) => {}
            Outcome::Denied { .. }
            | Outcome::Undecided
            | Outcome::NotQueued
            | Outcome::Failed(_) => {
                self.queued.remove(&token);
                self.open.remove(&token);
                self.owed.remove(&token);
                self.given_back.insert(token);
            }
        }
    }

    fn runnable(&self, now: Timestamp) -> Option<usize> {
        self.waiters.iter().position(|waiter| match waiter.doing {
            Doing::Awake => true,
            Doing::Dozing(until) => until <= now,
            Doing::Asleep | Doing::Asking => false,
        })
    }

    /// Whoever is first goes on by itself, or something is under way that will wake it.
    fn check_that_it_goes_on(&self, now: Timestamp) {
        if let Phase::Held(Held {
            lease,
            turn: Some(turn),
            ..
        }) = &self.state.phase
        {
            let mut by = lease.deadline;
            if !turn.revoked {
                by = by.min(turn.until);
                if !lease.renewing {
                    by = by.min(lease.renew_at);
                }
            }
            assert!(
                self.look_by.is_some_and(|at| at <= by.max(now)),
                "the keeper has to look by {by:?}: {self:#?}"
            );
        }
        let Some(first) = self.waiters.first() else {
            return;
        };
        let goes_on = match (first.doing, &self.state.phase) {
            (Doing::Awake | Doing::Asking, _) => true,
            (Doing::Dozing(at), Phase::BackOff { until, .. }) => at <= *until,
            // The reply wakes it, or the end of the turn, or of the lease.
            (_, Phase::Asking { .. } | Phase::Held(Held { turn: Some(_), .. })) => true,
            _ => false,
        };
        assert!(goes_on, "at {now:?} nobody will wake the first: {self:#?}");
    }
}

/// The same world, and what happens in it by bytes: one for its kind, one for its drift, and then each
/// event by some.
#[cfg(tower_distributed_lock_fuzzing)]
pub(crate) fn live(data: &[u8]) {
    let mut bytes = data.iter().copied();
    let (Some(flags), Some(drift)) = (bytes.next(), bytes.next()) else {
        return;
    };
    let is = |bit: u8| flags >> bit & 1 == 1;
    let kind = Kind {
        drift: i64::from(drift % 11) - 5,
        queues: !is(0),
        listens: !is(1),
        first_may_pass: is(2),
        grants_half: is(3),
        knows_run: !is(4),
        fences: drift < 200,
        calm: is(5),
        may_restart: is(6),
        may_set_forward: is(7),
        ..Kind::PLAIN
    };
    let kind = kind.made_sound();
    let mut world = World::new(kind);
    for _ in 0..400 {
        let Some(event) = Event::from_bytes(&mut bytes) else {
            break;
        };
        world.happen(kind.instead_of(event));
        world.check();
    }
    world.settle();
}

#[cfg(tower_distributed_lock_fuzzing)]
impl Event {
    fn from_bytes(bytes: &mut impl Iterator<Item = u8>) -> Option<Self> {
        let what = bytes.next()?;
        let mut next = || bytes.next().unwrap_or_default();
        // A byte has room for a process beside a choice.
        let process = usize::from(what >> 5) % PROCESSES;
        Some(match what & 31 {
            0 | 1 => {
                let which = next();
                Self::Join {
                    process,
                    ttl: usize::from(which & 7 == 7),
                    max_hold: usize::from(which >> 3 & 7 == 7),
                }
            }
            2 => Self::Poll {
                process,
                pick: next(),
            },
            3..=6 => Self::Run(process),
            7 => Self::Leave {
                process,
                pick: next(),
            },
            8..=10 => Self::TurnDone {
                process,
                pick: next(),
            },
            11 | 12 => Self::Tick(process),
            13 => Self::Revoke(process),
            14 => Self::Force,
            15 => Self::Lie(process),
            16 => Self::WakeAll(process),
            17 => Self::Arrive(next()),
            18..=22 => Self::Reply {
                pick: next(),
                how: match what >> 5 {
                    0..=4 => How::Answered,
                    5 => How::TimedOut,
                    6 => How::Vanished,
                    _ => How::Refused,
                },
                pause: next() % 200,
            },
            23 => Self::Pass(u16::from(next()) * u16::from(what >> 5)),
            24 | 25 => Self::Deliver {
                pick: next(),
                again: what >> 5 == 7,
            },
            26 => Self::Lose(next()),
            27 => Self::Reach(process, what >> 7 == 0),
            28 => Self::Notice(process),
            29 => match what >> 5 {
                0..=2 => Self::Restart(u16::from(next()) * 4),
                3..=5 => Self::SetForward(u16::from(next()) * 4),
                _ => Self::SetBack(next() % 100),
            },
            _ => Self::PassTowardsTheEnd {
                process,
                pick: next(),
                how_far: match next() % 3 {
                    0 => HowFar::Half,
                    1 => HowFar::AllBut,
                    _ => HowFar::All,
                },
            },
        })
    }
}

/// A trace that is too long for chance to find often: a repetition must not share its token
/// with another ttl.
#[test]
fn an_attempt_that_arrives_late_shortens_nobodys_lease() {
    let (process, pick, pause) = (0, 0, 0);
    let join = |ttl| Event::Join {
        process,
        ttl,
        max_hold: 0,
    };
    let poll = Event::Poll { process, pick };
    let reply = |how| Event::Reply { pick, how, pause };
    let mut world = World::new(Kind::PLAIN);
    for event in [
        join(1),
        join(0),
        poll,
        reply(How::TimedOut),
        Event::Leave { process, pick },
        poll,
        reply(How::Answered),
        poll,
        Event::Arrive(0),
        Event::Pass(120),
    ] {
        world.happen(event);
        world.check();
    }
    world.settle();
}

#[cfg(test)]
proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 4_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_happens_one_holds_it_and_everybody_gets_a_turn(
        (kind, events) in kind().prop_flat_map(|kind| (Just(kind), events(kind))),
        all_leave in any::<bool>(),
    ) {
        let mut world = World::new(kind);
        for event in events {
            world.happen(event);
            world.check();
        }
        while let (true, Some(index)) = (
            all_leave,
            world.processes.iter().position(|process| !process.waiters.is_empty()),
        ) {
            world.leave(index, 0);
            world.check();
        }
        world.settle();
    }
}
