//! The contract of [`LockStorage`] as a test that any storage can be run through.
//!
//! ```
//! use tower_distributed_lock::storage::{MemoryStorage, conformance};
//!
//! #[tokio::test]
//! async fn my_storage_keeps_the_contract() {
//!     conformance::check(MemoryStorage::new()).await;
//! }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
//! #     .block_on(conformance::check(MemoryStorage::new()));
//! ```

use std::{
    future::{Future, ready},
    pin::pin,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::{join_all, select};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver},
    time::{Instant, timeout},
};

use crate::{
    error::{StorageError, StorageErrorKind},
    key::{KeyPrefix, LockKey, LockName},
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, GivenUp, Inbox, LockRecord, LockStorage,
        Message, OwnerToken, PushedGrant, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest,
        RenewReply, RenewRequest, Requeue, Stamp, SurveyRequest,
    },
};

const PREFIX: &str = "conformance";

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);
/// How late a lock may disappear: the storage's own 0.1 %, and a busy machine.
const LATE: Duration = Duration::from_secs(5);

/// Runs `storage` through the contract. Takes about two seconds, and twice that for a storage that
/// [answers at once](LockStorage::acquire_at_once), which is asked both ways; uses locks under the prefix
/// `conformance` with random keys.
///
/// # Panics
///
/// When the storage breaks the contract, with a sentence that says which part.
pub async fn check<S: LockStorage>(storage: S) {
    let mut subject = Subject::new(storage);
    check_all(&subject).await;
    if subject.answers_at_once().await {
        subject.run = random();
        subject.at_once = true;
        check_all(&subject).await;
    }
}

async fn check_all<S: LockStorage>(subject: &Subject<S>) {
    let fresh = || subject.with_new_tokens();
    fresh().a_free_lock_is_granted_and_a_held_one_is_not().await;
    fresh()
        .a_repeated_attempt_is_granted_again_for_the_whole_ttl()
        .await;
    fresh().one_of_many_attempts_is_granted().await;
    fresh()
        .a_renewal_prolongs_what_is_ours_and_nothing_else()
        .await;
    fresh()
        .a_release_frees_what_is_ours_and_nothing_else()
        .await;
    fresh()
        .a_lock_disappears_after_its_ttl_and_not_before()
        .await;
    fresh().names_do_not_touch_each_other().await;
    fresh().fencing_tokens_grow_from_grant_to_grant().await;
    fresh().tokens_are_raised_for_the_holder_alone().await;
    fresh().what_is_held_can_be_seen_and_taken_away().await;
    fresh().a_storage_that_listens_keeps_a_queue().await;
}

fn random() -> u128 {
    u128::from(fastrand::u64(..)) << 64 | u128::from(fastrand::u64(..))
}

struct Subject<S> {
    storage: S,
    run: u128,
    /// What tokens are counted from: a token is for one lock, so each check has its own.
    tokens: AtomicU64,
    /// Whether it is asked at once.
    at_once: bool,
    /// Whether the storage can fence: known from the first grant that was asked to bring tokens.
    fences: OnceLock<bool>,
}

/// The fencing tokens that the grants of one lock came with.
#[derive(Default)]
struct Fence {
    /// What every token from now on has to be at least.
    next: u64,
}

impl<S: LockStorage> Subject<S> {
    fn new(storage: S) -> Self {
        Self {
            storage,
            run: random(),
            tokens: AtomicU64::new(0),
            at_once: false,
            fences: OnceLock::new(),
        }
    }

    fn name(&self, key: &str) -> LockName {
        let key = LockKey::from_parts([format!("{:x}", self.run).as_str(), key]);
        let prefix = KeyPrefix::new(PREFIX);
        match (prefix, key) {
            (Ok(prefix), Ok(key)) => prefix.name(&key),
            _ => unreachable!("the names of this test are valid"),
        }
    }

    fn token(&self, number: u64) -> OwnerToken {
        OwnerToken::new(self.run, self.tokens.load(Relaxed) + number)
    }

    /// With tokens that no check before had.
    fn with_new_tokens(&self) -> &Self {
        self.tokens.fetch_add(1_000, Relaxed);
        self
    }

    /// Whether the storage does without futures.
    async fn answers_at_once(&self) -> bool {
        let request = AcquireRequest {
            name: self.name("at once"),
            token: self.token(1),
            ttl: LONG,
            again: false,
            repeated: false,
            queue: None,
            hint: None,
            fencing: 0,
            given_up: GivenUp::default(),
        };
        let answer = self.storage.acquire_at_once(&request);
        self.quiet_release("at once", 1).await;
        answer.is_some()
    }

    async fn ask(&self, request: &AcquireRequest) -> AcquireReply {
        let reply = self.at_once.then(|| self.storage.acquire_at_once(request));
        match reply.flatten() {
            Some(reply) => answer("acquire_at_once", ready(reply)).await,
            None => answer("acquire", self.storage.acquire(request)).await,
        }
    }

    async fn ask_to_release(&self, request: &ReleaseRequest) -> ReleaseReply {
        let reply = self.at_once.then(|| self.storage.release_at_once(request));
        match reply.flatten() {
            Some(reply) => answer("release_at_once", ready(reply)).await,
            None => answer("release", self.storage.release(request)).await,
        }
    }

    async fn acquire(&self, key: &str, token: u64, ttl: Duration, again: bool) -> AcquireReply {
        let request = AcquireRequest {
            name: self.name(key),
            token: self.token(token),
            ttl,
            again,
            repeated: false,
            queue: None,
            hint: None,
            fencing: 0,
            given_up: GivenUp::default(),
        };
        let reply = self.ask(&request).await;
        if self.storage.is_divided() && !matches!(reply, AcquireReply::Granted { .. }) {
            self.quiet_release(key, token).await;
        }
        reply
    }

    /// Gives back the parts of a lock that an attempt in vain may have got.
    async fn quiet_release(&self, key: &str, token: u64) {
        let request = ReleaseRequest {
            name: self.name(key),
            token: self.token(token),
            ttl: LONG,
            requeue: None,
            wanted: None,
            quiet: true,
        };
        self.ask_to_release(&request).await;
    }

    async fn takes(&self, key: &str, token: u64, ttl: Duration) -> bool {
        self.acquire(key, token, ttl, false).await == AcquireReply::granted()
    }

    async fn renew(&self, locks: &[(&str, u64, Duration)]) -> Vec<RenewReply> {
        let requests: Vec<_> = locks
            .iter()
            .map(|&(key, token, ttl)| RenewRequest {
                name: self.name(key),
                token: self.token(token),
                ttl,
            })
            .collect();
        let replies = self.storage.renew(&requests).await;
        assert_eq!(
            replies.len(),
            requests.len(),
            "renew gives one reply per request"
        );
        let mut renewed = Vec::new();
        for reply in replies {
            renewed.push(answer("renew", async { reply }).await);
        }
        renewed
    }

    async fn release(&self, key: &str, token: u64) -> ReleaseReply {
        self.give_back(key, token, None, None).await
    }

    /// As it is released by a holder that knows of nobody who waits.
    async fn release_unwanted(&self, key: &str, token: u64) -> ReleaseReply {
        self.give_back(key, token, Some(false), None).await
    }

    async fn give_back(
        &self,
        key: &str,
        token: u64,
        wanted: Option<bool>,
        requeue: Option<Requeue>,
    ) -> ReleaseReply {
        let request = ReleaseRequest {
            name: self.name(key),
            token: self.token(token),
            ttl: LONG,
            wanted,
            requeue,
            quiet: false,
        };
        self.ask_to_release(&request).await
    }

    async fn a_free_lock_is_granted_and_a_held_one_is_not(&self) {
        for (key, again, owner) in [("held", false, 1), ("held-again", true, 3)] {
            assert!(self.takes(key, owner, LONG).await, "a free lock is granted");
            match self.acquire(key, owner + 1, LONG, again).await {
                AcquireReply::Granted { .. } => {
                    panic!("a held lock is not granted to another token")
                }
                AcquireReply::Held { ttl: Some(ttl), .. } => {
                    assert!(
                        ttl <= LONG && ttl > LONG / 2,
                        "the holder's ttl is told right: {ttl:?}"
                    );
                }
                AcquireReply::Held { ttl: None, .. } => {}
                AcquireReply::Undecided | AcquireReply::Unknown => {
                    panic!("nobody else asks for it, and nothing is repeated")
                }
            }
            assert_eq!(
                self.release(key, owner).await,
                ReleaseReply::Released,
                "a refused acquire changes nothing"
            );
        }
    }

    async fn a_repeated_attempt_is_granted_again_for_the_whole_ttl(&self) {
        assert!(self.takes("repeated", 1, SHORT).await);
        let again = self.acquire("repeated", 1, LONG, true).await;
        assert_eq!(
            again,
            AcquireReply::granted(),
            "an attempt meets its own token and is granted"
        );
        tokio::time::sleep(SHORT * 2).await;
        assert!(
            !self.takes("repeated", 2, LONG).await,
            "the repeated attempt set the ttl anew"
        );
        self.release("repeated", 1).await;
        let free = self.acquire("repeated", 3, LONG, true).await;
        assert_eq!(
            free,
            AcquireReply::granted(),
            "a repeated attempt takes a free lock"
        );
        self.release("repeated", 3).await;
    }

    async fn one_of_many_attempts_is_granted(&self) {
        let attempts = (0..50).map(|token| self.acquire("many", token, LONG, token % 2 == 0));
        let replies = join_all(attempts).await;
        let winners: Vec<u64> = (0..)
            .zip(replies)
            .filter(|(_, reply)| *reply == AcquireReply::granted())
            .map(|(token, _)| token)
            .collect();
        assert!(
            winners.len() <= 1,
            "one of many attempts at the same time is granted"
        );
        // Of a lock in parts, each may have got some.
        assert!(
            winners.len() == 1 || self.storage.is_divided(),
            "one of many attempts at the same time is granted"
        );
        if let Some(winner) = winners.first() {
            assert_eq!(self.release("many", *winner).await, ReleaseReply::Released);
        }
        assert!(self.takes("many", 50, LONG).await, "then it is free");
        assert_eq!(self.release("many", 50).await, ReleaseReply::Released);
    }

    async fn a_renewal_prolongs_what_is_ours_and_nothing_else(&self) {
        assert!(self.takes("ours", 1, SHORT).await);
        assert!(self.takes("theirs", 2, SHORT).await);
        let replies = self
            .renew(&[("theirs", 1, LONG), ("ours", 1, LONG), ("free", 1, LONG)])
            .await;
        let expected = [
            RenewReply::NotOurs,
            RenewReply::Renewed,
            RenewReply::NotOurs,
        ];
        assert_eq!(
            replies, expected,
            "a renewal finds its own lock only, in the order of the requests"
        );
        tokio::time::sleep(SHORT * 2).await;
        assert!(
            !self.takes("ours", 3, LONG).await,
            "a renewed lock lasts for the whole new ttl"
        );
        assert!(
            self.takes("free", 4, LONG).await,
            "the renewal of a free lock does not take it"
        );
        let expired = self.renew(&[("theirs", 2, LONG)]).await;
        assert_eq!(
            expired,
            [RenewReply::NotOurs],
            "an expired lock cannot be renewed"
        );
        assert!(self.takes("theirs", 5, LONG).await, "and is free");
        self.release("ours", 1).await;
        self.release("theirs", 5).await;
        self.release("free", 4).await;
    }

    async fn a_release_frees_what_is_ours_and_nothing_else(&self) {
        for wanted in [None, Some(false), Some(true)] {
            self.with_new_tokens();
            let release = async |token| self.give_back("released", token, wanted, None).await;
            assert!(self.takes("released", 1, LONG).await);
            assert_eq!(release(2).await, ReleaseReply::NotOurs);
            assert!(
                !self.takes("released", 3, LONG).await,
                "a release by another token changes nothing"
            );
            assert_eq!(release(1).await, ReleaseReply::Released);
            assert_eq!(
                release(1).await,
                ReleaseReply::NotOurs,
                "it can be released once"
            );
            assert!(
                self.takes("released", 4, LONG).await,
                "a released lock is free at once"
            );
            assert_eq!(
                release(1).await,
                ReleaseReply::NotOurs,
                "a late release frees nobody else's lock"
            );
            assert_eq!(release(4).await, ReleaseReply::Released);
        }
    }

    async fn a_lock_disappears_after_its_ttl_and_not_before(&self) {
        let started = Instant::now();
        assert!(self.takes("expires", 1, SHORT).await);
        let set = Instant::now();
        // Nothing tells of an expiry, so ask until it has happened.
        let mut next = 2;
        while !self.takes("expires", next, LONG).await {
            assert!(
                set.elapsed() < SHORT + LATE,
                "a lock disappears when its ttl is over"
            );
            next += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(started.elapsed() >= SHORT, "a lock lasts for its whole ttl");
        assert_eq!(self.release("expires", 1).await, ReleaseReply::NotOurs);
        assert_eq!(self.release("expires", next).await, ReleaseReply::Released);
    }

    async fn names_do_not_touch_each_other(&self) {
        assert!(self.takes("a", 1, LONG).await);
        assert!(
            self.takes("a/b", 2, LONG).await,
            "locks of other names are free"
        );
        assert_eq!(self.release("a", 1).await, ReleaseReply::Released);
        assert!(
            !self.takes("a/b", 3, LONG).await,
            "and are not freed with this one"
        );
        self.release("a/b", 2).await;
    }
}

impl<S: LockStorage> Subject<S> {
    /// Where the storage cannot fence, no grant may bring a token.
    async fn fencing_tokens_grow_from_grant_to_grant(&self) {
        let (key, mut fence) = ("fenced", Fence::default());
        self.grants(&mut fence, key, 1, false, 1).await;
        self.grants(&mut fence, key, 1, true, 3).await;
        // With the reply lost, the first may come twice.
        self.grants(&mut fence, key, 1, false, 2).await;
        self.grants(&mut fence, key, 1, true, 0).await;
        assert_eq!(self.release(key, 1).await, ReleaseReply::Released);
        self.grants(&mut fence, key, 2, false, 1_024).await;
        assert_eq!(self.release(key, 2).await, ReleaseReply::Released);
        self.grants(&mut fence, key, 3, true, 1).await;
        assert_eq!(self.release(key, 3).await, ReleaseReply::Released);
        self.grants(&mut fence, key, 4, false, 0).await;
        assert_eq!(self.release(key, 4).await, ReleaseReply::Released);

        // A denied attempt has none, and whoever comes after an expiry has higher ones.
        let request = self.fenced_request(key, 5, SHORT, false, 7);
        let granted = self.ask(&request).await;
        self.check_block(&mut fence, 7, granted);
        let started = Instant::now();
        let mut next = 6;
        loop {
            let request = self.fenced_request(key, next, LONG, false, 1);
            match self.ask(&request).await {
                AcquireReply::Held { .. } | AcquireReply::Undecided | AcquireReply::Unknown => {
                    if self.storage.is_divided() {
                        self.quiet_release(key, next).await;
                    }
                }
                granted => break self.check_block(&mut fence, 1, granted),
            }
            next += 1;
            assert!(started.elapsed() < SHORT + LATE, "a lock disappears");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.release(key, next).await, ReleaseReply::Released);
    }

    /// Where the storage cannot raise its tokens, or has none, there is nothing to check.
    async fn tokens_are_raised_for_the_holder_alone(&self) {
        const UP: u64 = 1_000_000;
        let key = "raised";
        let mut fence = Fence::default();
        self.grants(&mut fence, key, 1, false, 1).await;
        if fence.next > 0 && self.raises(key, 1, fence.next + UP).await != Err(()) {
            fence.next += UP + 1;
            // The highest that was asked for counts.
            assert_eq!(self.raises(key, 1, fence.next - UP).await, Ok(true));
            assert_eq!(
                self.raises(key, 2, fence.next + 1_000 * UP).await,
                Ok(false),
                "tokens are raised by the holder alone"
            );
            let highest = fence.next + 1_000 * UP;
            assert_eq!(self.release(key, 1).await, ReleaseReply::Released);
            assert_eq!(
                self.raises(key, 1, highest).await,
                Ok(false),
                "who was the holder cannot raise them"
            );
            self.grants(&mut fence, key, 3, true, 2).await;
            assert!(
                fence.next <= highest,
                "whoever does not hold the lock changes nothing"
            );
            assert_eq!(self.release(key, 3).await, ReleaseReply::Released);
        } else {
            self.release(key, 1).await;
        }
    }

    /// Whether the tokens were raised; an error if this cannot be done.
    async fn raises(&self, key: &str, token: u64, above: u64) -> Result<bool, ()> {
        let request = RaiseRequest {
            name: self.name(key),
            token: self.token(token),
            above,
        };
        match self.storage.raise(&request).await {
            Err(error) if error.kind() == StorageErrorKind::Rejected => Err(()),
            reply => Ok(answer("raise", async { reply }).await == RaiseReply::Raised),
        }
    }

    fn fenced_request(
        &self,
        key: &str,
        token: u64,
        ttl: Duration,
        again: bool,
        fencing: u32,
    ) -> AcquireRequest {
        AcquireRequest {
            name: self.name(key),
            token: self.token(token),
            ttl,
            again,
            repeated: false,
            queue: None,
            hint: None,
            fencing,
            given_up: GivenUp::default(),
        }
    }

    /// Takes a lock that has to be granted, with so many fencing tokens.
    async fn grants(&self, fence: &mut Fence, key: &str, token: u64, again: bool, fencing: u32) {
        let request = self.fenced_request(key, token, LONG, again, fencing);
        let reply = self.ask(&request).await;
        self.check_block(fence, fencing, reply);
    }

    fn check_block(&self, fence: &mut Fence, asked: u32, reply: AcquireReply) {
        match reply {
            AcquireReply::Granted { fencing, .. } => self.check_tokens(fence, asked, fencing),
            _ => panic!("a free lock, or one's own, is granted"),
        }
    }

    fn check_tokens(&self, fence: &mut Fence, asked: u32, block: Option<FencingBlock>) {
        if asked == 0 {
            assert_eq!(block, None, "fencing tokens come with a grant if asked for");
            return;
        }
        let fences = *self.fences.get_or_init(|| block.is_some());
        assert_eq!(
            block.is_some(),
            fences,
            "a storage gives fencing tokens with each grant or with none"
        );
        let Some(block) = block else { return };
        assert_eq!(block.count, asked, "as many fencing tokens as asked for");
        assert!(
            block.first >= fence.next,
            "fencing tokens are greater than those of all grants before: {block:?}"
        );
        fence.next = block.first.saturating_add(block.count.into());
        assert!(
            fence.next <= FencingBlock::LIMIT,
            "fencing tokens are below 2^53: {block:?}"
        );
    }
}

// --- looking -------------------------------------------------------------------------------------

impl<S: LockStorage> Subject<S> {
    /// The locks of this run that the storage lists. `None` if it cannot.
    async fn survey(&self, limit: usize) -> Option<(Vec<LockRecord>, bool)> {
        let request = SurveyRequest::new(PREFIX.into(), limit, LATE);
        let mut survey = match self.storage.survey(&request).await {
            Err(error) if error.kind() == StorageErrorKind::Rejected => return None,
            survey => answer("survey", async { survey }).await,
        };
        assert!(
            survey.locks.len() <= limit,
            "a survey lists {limit} locks at most, not {}",
            survey.locks.len()
        );
        let ours = self.name("x");
        let ours = ours.as_str().trim_end_matches('x');
        survey
            .locks
            .retain(|lock| lock.name.as_str().starts_with(ours));
        Some((survey.locks, survey.more))
    }

    async fn look(&self, key: &str) -> Option<LockRecord> {
        answer("look", self.storage.look(&self.name(key))).await
    }

    /// Where the storage cannot list its locks, there is nothing to check.
    async fn what_is_held_can_be_seen_and_taken_away(&self) {
        if self.survey(1).await.is_none() {
            return;
        }
        let keys = ["seen/a", "seen/b", "seen/c"];
        for (key, token) in keys.iter().zip(1..) {
            assert!(self.takes(key, token, LONG).await);
        }
        let (locks, _) = self.survey(10_000).await.unwrap_or_default();
        for (key, token) in keys.iter().zip(1..) {
            let name = self.name(key);
            let mut found = locks.iter().filter(|lock| lock.name == name);
            let Some(listed) = found.next() else {
                panic!("a lock that is held is listed");
            };
            assert!(found.next().is_none(), "a lock is listed once");
            let Some(seen) = self.look(key).await else {
                panic!("a lock that is held is seen");
            };
            for lock in [listed, &seen] {
                let owner = lock.owner.token();
                assert_eq!(
                    owner,
                    Some(self.token(token)),
                    "a lock is shown as its owner's"
                );
                let ttl = lock.ttl.unwrap_or_default();
                assert!(
                    ttl <= LONG && ttl > Duration::ZERO,
                    "a lock is shown with the time that it has left, not {ttl:?}"
                );
            }
        }
        let Some((one, true)) = self.survey(1).await else {
            panic!("a survey that leaves out locks says so");
        };
        assert!(one.len() <= 1);

        let Some(stale) = self.look("seen/a").await else {
            panic!("looking at a lock changes nothing");
        };
        assert_eq!(self.release("seen/a", 1).await, ReleaseReply::Released);
        assert!(
            self.look("seen/a").await.is_none(),
            "a free lock is held by nobody"
        );
        let (locks, _) = self.survey(10_000).await.unwrap_or_default();
        let name = self.name("seen/a");
        assert!(
            locks.iter().all(|lock| lock.name != name),
            "a free lock is not listed"
        );
        assert!(self.takes("seen/a", 4, LONG).await);
        let reply = answer("force_release", self.storage.force_release(&stale)).await;
        assert_eq!(
            reply,
            ReleaseReply::NotOurs,
            "a lock is taken only from whom it was seen with"
        );
        let renewed = self.renew(&[("seen/a", 4, LONG)]).await;
        assert_eq!(
            renewed,
            [RenewReply::Renewed],
            "the next holder's lock is not touched"
        );

        for (key, token) in [("seen/a", 4), ("seen/b", 2), ("seen/c", 3)] {
            let Some(seen) = self.look(key).await else {
                panic!("a lock that is held is seen");
            };
            let reply = answer("force_release", self.storage.force_release(&seen)).await;
            assert_eq!(reply, ReleaseReply::Released);
            assert_eq!(self.release(key, token).await, ReleaseReply::NotOurs);
            assert!(
                self.look(key).await.is_none(),
                "what was taken away is free"
            );
        }
    }

    /// What one process tells another arrives as it is. Where the storage tells nobody, there is
    /// nothing to check.
    async fn what_is_told_arrives(&self, messages: &mut UnboundedReceiver<Message>) {
        let text = "x ! {é} \"%\" ".repeat(Message::MAX_TEXT / 16);
        if answer("tell", self.storage.tell(PREFIX, self.run, &text)).await {
            match next(messages, "what it was told to tell").await {
                Message::Told(told) => assert_eq!(told, text, "a text arrives as it is"),
                other => panic!("what was told is told, not {other:?}"),
            }
            // More than once, perhaps.
            while let Ok(Some(message)) = timeout(SHORT, messages.recv()).await {
                assert!(matches!(message, Message::Told(_)), "{message:?}");
            }
        }
        answer("tell", self.storage.tell(PREFIX, !self.run, &text)).await;
        is_silent(messages).await;
    }

    /// A place in a lock's queue is seen.
    async fn who_waits_is_seen(&self, key: &str) {
        if self.survey(1).await.is_some() {
            let queue = self.look(key).await.map(|seen| seen.queue);
            assert_eq!(
                queue,
                Some(vec![self.run]),
                "who stands in the queue is seen there"
            );
        }
    }
}

// --- the queue -----------------------------------------------------------------------------------

impl<S: LockStorage> Subject<S> {
    /// Where the storage does not listen, there is nothing to check.
    async fn a_storage_that_listens_keeps_a_queue(&self) {
        let (sender, mut messages) = mpsc::unbounded_channel();
        let inbox = Inbox::new(self.run, PREFIX.into(), move |message| {
            // Nobody receives any more once the check is done.
            let _ = sender.send(message);
        });
        let listens = pin!(self.storage.listen(inbox));
        let fresh = || self.with_new_tokens();
        let check = pin!(async {
            // A part may be behind with attempts of the checks before, and then still tell of them.
            let own = self.name("");
            let is_late = |message: &Message| match message {
                Message::Wanted(name) => {
                    self.storage.is_divided() && name.as_str().starts_with(own.as_str())
                }
                _ => false,
            };
            let first = async {
                loop {
                    match next(&mut messages, "that it listens").await {
                        message if is_late(&message) => {}
                        message => break message,
                    }
                }
            };
            let Ok(first) = timeout(LATE, first).await else {
                panic!("a storage that listens says so");
            };
            assert!(matches!(first, Message::Listening), "{first:?}");
            if self.storage.is_divided() {
                // Each part may say so.
                while let Ok(Some(message)) = timeout(SHORT, messages.recv()).await {
                    let is_due = matches!(message, Message::Listening) || is_late(&message);
                    assert!(is_due, "{message:?}");
                }
            } else {
                fresh().the_queue_is_served_in_order(&mut messages).await;
                fresh()
                    .a_token_is_given_the_lock_only_once(&mut messages)
                    .await;
                fresh()
                    .a_grant_from_the_queue_brings_higher_tokens(&mut messages)
                    .await;
                fresh().tokens_are_raised_though_others_wait().await;
            }
            fresh()
                .who_asks_for_a_word_is_told_of_the_release(&mut messages)
                .await;
            self.what_is_told_arrives(&mut messages).await;
        });
        select(listens, check).await;
    }

    async fn the_queue_is_served_in_order(&self, messages: &mut UnboundedReceiver<Message>) {
        let name = self.name("queue");
        assert!(self.takes("queue", 1, LONG).await);
        let second = self.stands("queue", 2, 0).await;
        self.who_waits_is_seen("queue").await;
        match next(messages, "that the lock is wanted").await {
            Message::Wanted(wanted) => assert_eq!(wanted, name),
            other => panic!("the holder is told that its lock is wanted, not {other:?}"),
        }
        let third = self.stands("queue", 3, 0).await;
        assert_eq!(third.run, second.run, "one run, one clock");
        assert!(third.at >= second.at, "the clock does not go back");

        // The lock goes to the first in the queue, and who released it may stand at the end.
        let requeue = Requeue {
            token: self.token(4),
            ttl: LONG,
            place: LONG,
            fencing: 0,
        };
        match self.give_back("queue", 1, Some(true), Some(requeue)).await {
            ReleaseReply::Requeued { ttl, stamp } => {
                assert!(
                    ttl <= LONG && ttl > LONG / 2,
                    "the new holder's ttl: {ttl:?}"
                );
                assert_eq!(stamp.run, second.run);
            }
            other => panic!("who wants a new place is told that it has one, not {other:?}"),
        }
        let granted = granted(messages).await;
        assert_eq!(granted.token, self.token(2), "the first in the queue");
        assert_eq!((&granted.name, granted.ttl), (&name, LONG));
        assert!(granted.stamp.run == second.run && granted.stamp.at >= second.at);
        assert!(granted.wanted, "others stand behind it");
        assert!(
            !self.takes("queue", 5, LONG).await,
            "the lock is not free in between"
        );

        // A place can be given back, and is passed over then.
        assert_eq!(self.release("queue", 3).await, ReleaseReply::NotOurs);
        let released = self.release_unwanted("queue", 2).await;
        assert_eq!(
            released,
            ReleaseReply::Released,
            "whatever its holder knows of"
        );
        let granted = self::granted(messages).await;
        assert_eq!(
            granted.token,
            self.token(4),
            "who gave its place back is passed over"
        );
        let again = self.acquire("queue", 4, LONG, true).await;
        assert!(
            matches!(again, AcquireReply::Granted { .. }),
            "it has the lock"
        );
        let released = self.release_unwanted("queue", 4).await;
        assert_eq!(released, ReleaseReply::Released);
        assert!(
            self.takes("queue", 6, LONG).await,
            "an empty queue leaves the lock free"
        );
        self.release("queue", 6).await;
    }

    async fn a_token_is_given_the_lock_only_once(&self, messages: &mut UnboundedReceiver<Message>) {
        let key = "once";
        let repeat = async |token| self.asks_for_a_place(key, token, 0, true).await;
        // Nothing is known of it, whether the lock is free or not.
        assert_eq!(repeat(1).await, AcquireReply::Unknown);
        assert!(
            self.takes(key, 1, LONG).await,
            "what was not done leaves the lock free"
        );
        assert_eq!(repeat(2).await, AcquireReply::Unknown);
        // It keeps its place, and who has the lock is granted it.
        self.stands(key, 3, 0).await;
        self.stands(key, 4, 0).await;
        assert!(matches!(
            repeat(3).await,
            AcquireReply::Held {
                queued: Some(_),
                ..
            }
        ));
        assert_eq!(self.release(key, 1).await, ReleaseReply::Released);
        assert_eq!(granted(messages).await.token, self.token(3));
        assert_eq!(repeat(3).await, AcquireReply::granted_and_wanted());
        // Whatever it had is used up.
        assert_eq!(self.release(key, 3).await, ReleaseReply::Released);
        assert_eq!(granted(messages).await.token, self.token(4));
        assert_eq!(repeat(3).await, AcquireReply::Unknown);
        assert_eq!(self.release(key, 4).await, ReleaseReply::Released);
        assert_eq!(repeat(4).await, AcquireReply::Unknown);
        assert!(
            self.takes(key, 5, LONG).await,
            "who was not given a place does not stand there"
        );
        assert_eq!(self.release(key, 5).await, ReleaseReply::Released);
    }

    async fn a_grant_from_the_queue_brings_higher_tokens(
        &self,
        messages: &mut UnboundedReceiver<Message>,
    ) {
        let (key, mut fence) = ("fenced-queue", Fence::default());
        self.grants(&mut fence, key, 1, false, 1).await;
        self.stands(key, 2, 5).await;
        self.stands(key, 3, 0).await;
        let requeue = Requeue {
            token: self.token(4),
            ttl: LONG,
            place: LONG,
            fencing: 2,
        };
        let reply = self.give_back(key, 1, Some(true), Some(requeue)).await;
        assert!(matches!(reply, ReleaseReply::Requeued { .. }), "{reply:?}");
        for (token, fencing) in [(2, 5), (3, 0), (4, 2)] {
            let granted = granted(messages).await;
            assert_eq!(granted.token, self.token(token), "the first in the queue");
            self.check_tokens(&mut fence, fencing, granted.fencing);
            // Whoever cannot use the message asks.
            self.grants(&mut fence, key, token, true, 3).await;
            assert_eq!(self.release(key, token).await, ReleaseReply::Released);
        }
        self.grants(&mut fence, key, 5, false, 1).await;
        assert_eq!(self.release(key, 5).await, ReleaseReply::Released);
    }

    /// Others may wait for a place, or for a word.
    async fn tokens_are_raised_though_others_wait(&self) {
        const UP: u64 = 1_000_000;
        for (key, word, holder) in [("raised-queue", false, 1), ("raised-word", true, 3)] {
            let next = holder + 1;
            let mut fence = Fence::default();
            self.grants(&mut fence, key, holder, false, 1).await;
            if word {
                self.asks(key, OwnerToken::new(!self.run, 0), Some(LONG))
                    .await;
            } else {
                self.stands(key, next, 0).await;
            }
            if fence.next > 0 {
                let raised = self.raises(key, holder, fence.next + UP).await;
                assert_ne!(raised, Ok(false), "whoever waits, the lock is its holder's");
                if raised == Ok(true) {
                    fence.next += UP + 1;
                }
                self.grants(&mut fence, key, holder, true, 1).await;
            }
            self.release(key, next).await;
            assert_eq!(self.release(key, holder).await, ReleaseReply::Released);
        }
    }

    async fn who_asks_for_a_word_is_told_of_the_release(
        &self,
        messages: &mut UnboundedReceiver<Message>,
    ) {
        let (key, name) = ("hint", self.name("hint"));
        let mut others = (1..).map(|number| OwnerToken::new(!self.run, number));
        let mut other = || others.next().unwrap_or(OwnerToken::new(!self.run, 0));
        // The lock is another process's; this one listens.
        let holder = other();
        assert_eq!(self.asks(key, holder, None).await, AcquireReply::granted());
        let denied = self.asks(key, self.token(1), Some(LONG)).await;
        assert!(
            matches!(denied, AcquireReply::Held { queued: None, .. }),
            "who asks for a word has no place: {denied:?}"
        );
        self.quiet_release(key, 1).await;
        self.gives_up(key, holder).await;
        self.is_told(messages, &name).await;
        // Nobody is given what is free.
        let next = other();
        assert_eq!(self.asks(key, next, None).await, AcquireReply::granted());
        // One word for all attempts, also after another attempt in vain, and none to spare.
        for token in [2, 3] {
            self.asks(key, self.token(token), Some(LONG)).await;
            self.quiet_release(key, token).await;
        }
        self.gives_up(key, next).await;
        self.is_told(messages, &name).await;
        // Who does not wait any more is not told, nor is anybody of a quiet release.
        let next = other();
        assert_eq!(self.asks(key, next, None).await, AcquireReply::granted());
        self.asks(key, self.token(4), Some(LONG)).await;
        assert_eq!(self.release(key, 4).await, ReleaseReply::NotOurs);
        self.gives_up(key, next).await;
        let next = self.token(5);
        assert_eq!(self.asks(key, next, None).await, AcquireReply::granted());
        self.asks(key, other(), Some(LONG)).await;
        self.quiet_release(key, 5).await;
        is_silent(messages).await;
        let last = other();
        self.gives_up(key, last).await;
        let taken = self.acquire(key, 6, LONG, false).await;
        assert!(
            matches!(taken, AcquireReply::Granted { .. }),
            "what was released quietly is free"
        );
        self.release(key, 6).await;
        is_silent(messages).await;
    }

    /// That the lock is free is told once, or once by each of its parts; that it is wanted, may be.
    async fn is_told(&self, messages: &mut UnboundedReceiver<Message>, name: &LockName) {
        let mut told = 0;
        loop {
            match timeout(SHORT, messages.recv()).await {
                Ok(Some(Message::Free(free))) => {
                    assert_eq!(free, *name);
                    told += 1;
                }
                Ok(Some(Message::Wanted(_))) => {}
                Ok(other) => panic!("that a lock is free is told, not {other:?}"),
                Err(_) if told > 0 => break,
                Err(_) => match next(messages, "that a lock is free").await {
                    Message::Free(_) => told += 1,
                    _ => continue,
                },
            }
        }
        assert!(told == 1 || self.storage.is_divided(), "told {told} times");
    }

    async fn asks(&self, key: &str, token: OwnerToken, hint: Option<Duration>) -> AcquireReply {
        let request = AcquireRequest {
            name: self.name(key),
            token,
            ttl: LONG,
            again: hint.is_some(),
            repeated: false,
            queue: None,
            hint,
            fencing: 0,
            given_up: GivenUp::default(),
        };
        self.ask(&request).await
    }

    async fn gives_up(&self, key: &str, token: OwnerToken) {
        let request = ReleaseRequest {
            name: self.name(key),
            token,
            ttl: LONG,
            requeue: None,
            wanted: None,
            quiet: false,
        };
        self.ask_to_release(&request).await;
    }

    /// Asks for a place in the queue of a held lock, and says when it was had.
    async fn stands(&self, key: &str, token: u64, fencing: u32) -> Stamp {
        match self.asks_for_a_place(key, token, fencing, false).await {
            AcquireReply::Held {
                queued: Some(stamp),
                ..
            } => stamp,
            other => panic!("a storage that listens gives a place in the queue, not {other:?}"),
        }
    }

    async fn asks_for_a_place(
        &self,
        key: &str,
        token: u64,
        fencing: u32,
        repeated: bool,
    ) -> AcquireReply {
        let request = AcquireRequest {
            name: self.name(key),
            token: self.token(token),
            ttl: LONG,
            again: repeated,
            repeated,
            queue: Some(LONG),
            hint: None,
            fencing,
            given_up: GivenUp::default(),
        };
        self.ask(&request).await
    }
}

async fn next(messages: &mut UnboundedReceiver<Message>, what: &str) -> Message {
    match timeout(LATE, messages.recv()).await {
        Ok(Some(message)) => message,
        _ => panic!("a storage that listens tells {what}"),
    }
}

/// The next grant. That a lock is wanted may be told again and again.
async fn granted(messages: &mut UnboundedReceiver<Message>) -> PushedGrant {
    loop {
        match next(messages, "who has the lock").await {
            Message::Granted(granted) => return granted,
            Message::Wanted(_) => {}
            other => panic!("a grant is told, not {other:?}"),
        }
    }
}

/// Nobody waits any more.
async fn is_silent(messages: &mut UnboundedReceiver<Message>) {
    while let Ok(Some(message)) = timeout(SHORT, messages.recv()).await {
        assert!(
            matches!(message, Message::Wanted(_)),
            "nobody waits any more, yet we are told {message:?}"
        );
    }
}

async fn answer<T>(what: &str, call: impl Future<Output = Result<T, StorageError>>) -> T {
    match call.await {
        Ok(reply) => reply,
        Err(error) => panic!("{what} failed, so the contract cannot be checked: {error}"),
    }
}
