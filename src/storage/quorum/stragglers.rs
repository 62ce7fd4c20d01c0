//! Calls that go on after their caller has what it needs, and releases that nodes owe an answer to.
//!
//! A grant that comes late must not stay behind, and a release has to reach every node, also one
//! that does not answer now. Both are followed here, each by a short task on the runtime of whoever
//! made the call; without a runtime they are dropped, and the ttl frees what they left.
//!
//! Most calls that a grant leaves behind are answered a moment later, and nobody has to do anything
//! about it: a task for each would cost more than the call. So they are put aside, and only those
//! are followed that are still there at the lock's release or when one task for all of them has
//! come by.

use std::{
    collections::HashMap,
    future::ready,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{Instant, sleep, timeout},
};

use super::{Node, Shared, round::Call};
use crate::{
    error::StorageError,
    storage::{
        AcquireReply, AcquireRequest, GivenUp, OwnerToken, ReleaseReply, ReleaseRequest,
        RenewRequest,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
};

/// How long a call is followed. A storage that learns that its calls are given up can find out that
/// its connection is dead.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long calls that were put aside are left alone at least, and twice that at most.
const ASIDE: Duration = Duration::from_millis(20);

/// When the task that sees to them has not come by for this long, another is started.
const OVERDUE: Duration = Duration::from_secs(1);

/// Between one try of a release and the next: doubling, up to this.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A node with so many calls in the background is not asked for new locks, so that a node that hangs
/// cannot fill the memory; and with so many, releases that it does not answer are left to the ttl.
const FAR_BEHIND: usize = 1_024;
const TOO_FAR_BEHIND: usize = 4 * FAR_BEHIND;

impl Node {
    pub(super) fn is_far_behind(&self) -> bool {
        self.behind.load(Relaxed) >= FAR_BEHIND
    }
}

#[derive(Default)]
pub(super) struct Stragglers {
    open: Mutex<Open>,
    /// Notified when one has come to its end.
    ended: Notify,
}

#[derive(Default)]
struct Open {
    /// By token and node.
    calls: HashMap<(OwnerToken, usize), Pending>,
    /// Calls of attempts that were granted without them.
    aside: HashMap<OwnerToken, Aside>,
    /// When the task that comes by has last done so, or was started. `None`: there is none.
    swept_at: Option<Instant>,
    /// Tokens whose renewal is on its way, and whether they were released meanwhile.
    renewing: HashMap<OwnerToken, bool>,
    /// Tokens whose release is being sent, by so many callers. A renewal that begins now may still
    /// come before it.
    releasing: HashMap<OwnerToken, usize>,
}

/// What a grant left behind. Nobody polls it.
struct Aside {
    calls: Leftover,
    ttl: Duration,
    /// The task has come by once.
    is_old: bool,
}

/// Acquires that were not answered.
type Leftover = Vec<Unanswered>;

/// An acquire that a node has not answered.
struct Unanswered {
    node: usize,
    call: Call<AcquireReply>,
    given_up: GivenUp,
}

impl Unanswered {
    /// Whether it has come to its end.
    fn is_done(&mut self) -> bool {
        self.look().is_ready()
    }

    /// Whether it was answered. What has failed may be carried out all the same, and stays as it is.
    fn is_answered(&mut self) -> bool {
        match self.look() {
            Poll::Ready(Err(error)) => {
                self.call = Box::pin(ready(Err(error)));
                false
            }
            looked => looked.is_ready(),
        }
    }

    fn look(&mut self) -> Poll<Result<AcquireReply, StorageError>> {
        let mut cx = Context::from_waker(Waker::noop());
        self.call.as_mut().poll(&mut cx)
    }
}

impl Open {
    fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.aside.is_empty()
    }

    /// A release has been answered, or is followed.
    fn was_sent(&mut self, token: OwnerToken) {
        if let Some(callers) = self.releasing.get_mut(&token) {
            *callers -= 1;
            if *callers == 0 {
                self.releasing.remove(&token);
            }
        }
    }

    /// Has a release sent after what is on its way to the node. `false`: nothing is.
    fn owe(&mut self, node: usize, request: &ReleaseRequest) -> bool {
        let pending = self.calls.get_mut(&(request.token, node));
        pending.is_some_and(|pending| {
            pending.owed = Some(request.clone());
            // A quiet one is for an attempt in vain, of which a word in the queue is still wanted.
            if !request.quiet {
                pending.given_up.iter().for_each(GivenUp::set);
            }
            true
        })
    }
}

/// What is on its way to one node for one token.
#[derive(Default)]
struct Pending {
    calls: usize,
    /// Of those among them that are acquires.
    given_up: Vec<GivenUp>,
    /// The token was released meanwhile: this is sent once nothing is on its way any more.
    owed: Option<ReleaseRequest>,
}

impl Stragglers {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no call is on its way.
    pub(super) async fn have_ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Before the look, so that none is missed.
            ended.as_mut().enable();
            if self.open().is_empty() {
                return;
            }
            // Of those that were put aside, nobody tells.
            let _ = timeout(ASIDE, ended).await;
        }
    }

    /// How many calls are on their way.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let open = self.open();
        open.calls.len() + open.aside.len()
    }

    /// What was put aside, if nothing else is under way but the task that comes by: tokens and nodes,
    /// and whether it has come by once; and when that was.
    #[cfg(test)]
    #[expect(clippy::type_complexity, reason = "for tests")]
    pub(super) fn at_rest(&self) -> Option<(Vec<(OwnerToken, usize, bool)>, Option<Instant>)> {
        let open = self.open();
        let is_busy = [
            &open.calls.len(),
            &open.renewing.len(),
            &open.releasing.len(),
        ];
        if is_busy.into_iter().any(|it| *it > 0) {
            return None;
        }
        let aside = open.aside.iter().flat_map(|(token, aside)| {
            let calls = aside.calls.iter();
            calls.map(|left| (*token, left.node, aside.is_old))
        });
        Some((aside.collect(), open.swept_at))
    }
}

/// A call in the background.
struct Straggler {
    shared: Arc<Shared>,
    node: usize,
    token: OwnerToken,
    /// It has been taken out of the list.
    is_out: bool,
}

impl Straggler {
    /// `None` if the node is too far behind.
    fn new(
        shared: &Arc<Shared>,
        node: usize,
        token: OwnerToken,
        given_up: Option<GivenUp>,
    ) -> Option<Self> {
        Self::register(shared, &mut shared.stragglers.open(), node, token, given_up)
    }

    fn register(
        shared: &Arc<Shared>,
        open: &mut Open,
        node: usize,
        token: OwnerToken,
        given_up: Option<GivenUp>,
    ) -> Option<Self> {
        let behind = &shared.nodes[node].behind;
        if behind.load(Relaxed) >= TOO_FAR_BEHIND {
            return None;
        }
        behind.fetch_add(1, Relaxed);
        let pending = open.calls.entry((token, node)).or_default();
        pending.calls += 1;
        pending.given_up.extend(given_up);
        Some(Self {
            shared: Arc::clone(shared),
            node,
            token,
            is_out: false,
        })
    }

    /// The call has come to its end: what has to be sent now. `None` takes it out of the list.
    fn next(&mut self) -> Option<ReleaseRequest> {
        let mut open = self.shared.stragglers.open();
        let pending = open.calls.get_mut(&(self.token, self.node))?;
        // What is owed is sent by the last of them.
        if pending.calls == 1
            && let Some(owed) = pending.owed.take()
        {
            return Some(owed);
        }
        self.take_out(&mut open);
        self.is_out = true;
        None
    }

    fn take_out(&self, open: &mut Open) {
        if let Some(pending) = open.calls.get_mut(&(self.token, self.node)) {
            pending.calls -= 1;
            if pending.calls == 0 {
                open.calls.remove(&(self.token, self.node));
                if open.calls.is_empty() && open.calls.capacity() > FAR_BEHIND {
                    open.calls.shrink_to_fit();
                }
            }
        }
    }

    /// Sends what is owed until nothing is.
    async fn settle(mut self) {
        while let Some(request) = self.next() {
            self.insist(None, &request).await;
        }
    }

    /// Sends a release until the node has answered, or the ttl is over.
    async fn insist(&self, mut sent: Option<Call<ReleaseReply>>, request: &ReleaseRequest) {
        let until = Instant::now() + request.ttl;
        let mut pause = FIRST_PAUSE;
        loop {
            let call = sent
                .take()
                .unwrap_or_else(|| self.shared.storage(self.node).release(request.clone()));
            let answer = timeout(PATIENCE.min(request.ttl), call).await;
            let is_final = |error: &StorageError| !error.kind().is_transient();
            if answer.is_ok_and(|answer| answer.as_ref().err().is_none_or(is_final)) {
                self.shared.nodes[self.node].is_late.store(false, Relaxed);
                return;
            }
            if Instant::now() >= until {
                return;
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

impl Drop for Straggler {
    fn drop(&mut self) {
        self.shared.nodes[self.node].behind.fetch_sub(1, Relaxed);
        if !self.is_out {
            // With the runtime that it ran on.
            self.take_out(&mut self.shared.stragglers.open());
        }
        self.shared.stragglers.ended.notify_waiters();
    }
}

/// The task that comes by for what was put aside, until nothing is.
struct Sweeper {
    shared: Arc<Shared>,
    is_done: bool,
}

impl Sweeper {
    async fn run(mut self) {
        while !self.is_done {
            sleep(ASIDE).await;
            self.sweep();
        }
    }

    /// Follows what has been there for long enough.
    fn sweep(&mut self) {
        let shared = &self.shared;
        let mut open = shared.stragglers.open();
        let old: Vec<_> = open.aside.extract_if(|_, aside| aside.is_old).collect();
        open.aside.values_mut().for_each(|it| it.is_old = true);
        let mut calls = Vec::new();
        for (token, aside) in old {
            for left in aside.calls {
                let given_up = Some(left.given_up);
                // In the same step: a release finds it in one place or the other.
                let straggler = Straggler::register(shared, &mut open, left.node, token, given_up);
                calls.push((straggler, left.call, aside.ttl));
            }
        }
        if open.aside.is_empty() {
            open.aside.shrink_to(FAR_BEHIND);
            open.swept_at = None;
            self.is_done = true;
        } else {
            open.swept_at = Some(Instant::now());
        }
        drop(open);
        let runtime = Handle::current();
        for (straggler, call, ttl) in calls {
            if let Some(straggler) = straggler {
                spawn_acquire(&runtime, straggler, call, ttl);
            }
        }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        if !self.is_done {
            // With the runtime that it ran on: the next call that is put aside starts another.
            self.shared.stragglers.open().swept_at = None;
        }
    }
}

impl Shared {
    /// Puts aside what a granted attempt has left behind. It is for the lock's release, or followed
    /// after a while.
    pub(super) fn put_aside(
        self: &Arc<Self>,
        request: &AcquireRequest,
        calls: impl Iterator<Item = (usize, Call<AcquireReply>)>,
    ) {
        let mut calls = calls.peekable();
        if calls.peek().is_none() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let mut open = self.stragglers.open();
        let aside = open.aside.entry(request.token).or_insert(Aside {
            calls: Vec::new(),
            ttl: request.ttl,
            is_old: false,
        });
        aside.calls.extend(calls.map(|(node, call)| Unanswered {
            node,
            call,
            given_up: request.given_up.clone(),
        }));
        // Its runtime may be one that nobody drives any more.
        let now = Instant::now();
        let is_swept = open
            .swept_at
            .is_some_and(|at| now.duration_since(at) < OVERDUE);
        if !is_swept {
            open.swept_at = Some(now);
        }
        drop(open);
        if !is_swept {
            let sweeper = Sweeper {
                shared: Arc::clone(self),
                is_done: false,
            };
            runtime.spawn(sweeper.run());
        }
    }

    /// Follows an acquire to its end. If its token is released before, it is released once more after
    /// it.
    pub(super) fn follow(
        self: &Arc<Self>,
        node: usize,
        call: Call<AcquireReply>,
        request: &AcquireRequest,
    ) {
        if let Ok(runtime) = Handle::try_current()
            && let Some(straggler) =
                Straggler::new(self, node, request.token, Some(request.given_up.clone()))
        {
            spawn_acquire(&runtime, straggler, call, request.ttl);
        }
    }

    /// A token is released: what is still on its way for it has to be released once more.
    pub(super) fn released<'a>(self: &'a Arc<Self>, request: &'a ReleaseRequest) -> Overtaken<'a> {
        let mut open = self.stragglers.open();
        if let Some(released) = open.renewing.get_mut(&request.token) {
            *released = true;
        }
        *open.releasing.entry(request.token).or_default() += 1;
        if !open.calls.is_empty() {
            for node in 0..self.nodes.len() {
                open.owe(node, request);
            }
        }
        let aside = open.aside.remove(&request.token);
        drop(open);
        let mut overtaken = Overtaken {
            shared: self,
            request,
            calls: aside.map(|aside| aside.calls).unwrap_or_default(),
        };
        if !request.quiet {
            // A step that follows from an answer nobody has looked at would be sent after the release.
            let calls = &mut overtaken.calls;
            calls.iter().for_each(|left| left.given_up.set());
            calls.retain_mut(|left| !left.is_answered());
        }
        overtaken
    }

    /// Follows a release that was not answered in time, or failed, and sends it again until it is
    /// answered.
    pub(super) fn insist(
        self: &Arc<Self>,
        node: usize,
        call: Option<Call<ReleaseReply>>,
        request: &ReleaseRequest,
    ) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        // Whoever is on its way will do it.
        if call.is_none() && self.stragglers.open().owe(node, request) {
            return;
        }
        let Some(straggler) = Straggler::new(self, node, request.token, None) else {
            return;
        };
        let request = request.clone();
        runtime.spawn(async move {
            straggler.insist(call, &request).await;
            straggler.settle().await;
        });
    }
}

fn spawn_acquire(runtime: &Handle, straggler: Straggler, call: Call<AcquireReply>, ttl: Duration) {
    runtime.spawn(async move {
        if let Ok(Ok(_)) = timeout(PATIENCE.min(ttl), call).await {
            let node = &straggler.shared.nodes[straggler.node];
            node.is_late.store(false, Relaxed);
        }
        straggler.settle().await;
    });
}

/// Acquires that were put aside, and may be carried out after the release that was sent meanwhile.
/// Dropped, they are followed, and released once more after it.
pub(super) struct Overtaken<'a> {
    shared: &'a Arc<Shared>,
    request: &'a ReleaseRequest,
    calls: Leftover,
}

impl Overtaken<'_> {
    /// The node had the lock at its release: what has been answered by now was carried out before.
    pub(super) fn was_released(&mut self, node: usize) {
        self.calls
            .retain_mut(|left| left.node != node || !left.is_done());
    }
}

impl Drop for Overtaken<'_> {
    fn drop(&mut self) {
        self.shared.stragglers.open().was_sent(self.request.token);
        if self.calls.is_empty() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let request = self.request;
        for left in self.calls.drain(..) {
            let (node, given_up) = (left.node, Some(left.given_up));
            let mut open = self.shared.stragglers.open();
            let straggler =
                Straggler::register(self.shared, &mut open, node, request.token, given_up);
            open.owe(node, request);
            drop(open);
            if let Some(straggler) = straggler {
                spawn_acquire(&runtime, straggler, left.call, request.ttl);
            }
        }
    }
}

/// Renewals on their way. While they are, it is noticed which of their tokens are released: what was
/// given up must not be given back to a node that has lost it.
pub(super) struct Renewing<'a> {
    shared: &'a Arc<Shared>,
    requests: &'a [RenewRequest],
}

impl<'a> Renewing<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, requests: &'a [RenewRequest]) -> Self {
        let mut open = shared.stragglers.open();
        for request in requests {
            let released = open.releasing.contains_key(&request.token);
            open.renewing.insert(request.token, released);
        }
        drop(open);
        Self { shared, requests }
    }

    /// Sets a lock that is ours on a node that does not have it, if it is free there.
    pub(super) fn heal(&self, node: usize, request: &RenewRequest) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let mut open = self.shared.stragglers.open();
        if open.renewing.get(&request.token) != Some(&false) {
            return;
        }
        let given_up = GivenUp::not_yet();
        let registered = Some(given_up.clone());
        let straggler =
            Straggler::register(self.shared, &mut open, node, request.token, registered);
        drop(open);
        let Some(straggler) = straggler else { return };
        let call = self.shared.storage(node).acquire(AcquireRequest {
            name: request.name.clone(),
            token: request.token,
            ttl: request.ttl,
            again: true,
            repeated: false,
            queue: None,
            hint: None,
            fencing: 0,
            given_up,
        });
        spawn_acquire(&runtime, straggler, call, request.ttl);
    }
}

impl Drop for Renewing<'_> {
    fn drop(&mut self) {
        let mut open = self.shared.stragglers.open();
        for request in self.requests {
            open.renewing.remove(&request.token);
        }
    }
}
