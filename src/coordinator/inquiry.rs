//! What this process asks others about their locks, and what it answers when it is asked.
//!
//! The storage knows whose a lock is; since when, and who waits for it there, only that process
//! knows. So nothing about it is written down on a lock's way: whoever wants to know asks, through
//! the inboxes by which processes are told of grants.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    coordinator::{
        Coordinator,
        keeper::Job,
        note::{Answer, Detail, Note},
        random_id,
    },
    error::{StorageError, StorageErrorKind},
    key::LockName,
    storage::{LockRecord, OwnerToken, ReleaseReply, Survey, SurveyRequest},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

/// How long other processes have to answer.
const ANSWER_TIME: Duration = Duration::from_millis(250);

/// How long to wait before a message that could not be sent is sent again.
const TELL_AGAIN: Duration = Duration::from_millis(50);

/// How long a storage may list locks before it has to do with what it found.
const SURVEY_TIME: Duration = Duration::from_secs(2);

/// How many answers may be on their way to others. Who asks more often gets none.
const MAX_ANSWERING: usize = 64;

/// How many questions are remembered, to know them again when they come from another server.
const RECENT: usize = 256;

/// Whether other processes could be heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hearing {
    NotYet,
    Yes,
    /// The storage does not listen.
    Never,
}

/// What a process has said.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub(crate) label: Option<Arc<str>>,
    pub(crate) details: HashMap<LockName, Detail>,
}

/// Questions on their way, of this process and to it.
pub(super) struct Inquiries {
    /// Of this process, by number.
    asked: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    /// To this process, the last ones.
    recent: Mutex<VecDeque<u64>>,
    answering: AtomicUsize,
    hearing: watch::Sender<Hearing>,
}

impl Inquiries {
    pub(super) fn new() -> Self {
        Self {
            asked: Mutex::default(),
            recent: Mutex::default(),
            answering: AtomicUsize::new(0),
            hearing: watch::Sender::new(Hearing::NotYet),
        }
    }

    pub(super) fn hears(&self, hearing: Hearing) {
        self.hearing.send_replace(hearing);
    }

    fn ask(&self, number: u64) -> oneshot::Receiver<Answer> {
        let (sender, answer) = oneshot::channel();
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of a snapshot that was dropped.
        asked.retain(|_, sender| !sender.is_closed());
        asked.insert(number, sender);
        answer
    }

    fn answered(&self, number: u64, answer: Answer) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = asked.remove(&number) {
            // Nobody waits for it any more.
            let _ = sender.send(answer);
        }
    }

    /// Whether a question to this process is to be answered.
    fn is_new(&self, number: u64) -> bool {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.contains(&number) {
            return false;
        }
        recent.push_back(number);
        if recent.len() > RECENT {
            recent.pop_front();
        }
        true
    }
}

impl fmt::Debug for Inquiries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inquiries").finish_non_exhaustive()
    }
}

impl Coordinator {
    /// The number that all tokens of this process have in common.
    pub(crate) fn id(&self) -> u128 {
        self.factory
    }

    pub(crate) fn label(&self) -> Option<&Arc<str>> {
        self.limits.label.as_ref()
    }

    /// Lists the locks that are held, by any process.
    pub(crate) async fn survey(&self, limit: usize) -> Result<Survey, StorageError> {
        let request = SurveyRequest::new(Arc::clone(&self.prefix), limit, SURVEY_TIME);
        let survey = Arc::clone(&self.storage).survey(request);
        let limit = SURVEY_TIME + self.limits.storage_timeout;
        timeout(limit, survey).await.unwrap_or_else(|_| Err(late()))
    }

    /// Who has a lock.
    pub(crate) async fn look_at(
        &self,
        name: &LockName,
    ) -> Result<Option<LockRecord>, StorageError> {
        let look = Arc::clone(&self.storage).look(name.clone());
        let limit = self.limits.storage_timeout;
        timeout(limit, look).await.unwrap_or_else(|_| Err(late()))
    }

    /// Has this done also if whoever wants it goes away.
    pub(crate) fn carry_through(self: &Arc<Self>, job: Job) {
        self.keeper.submit(self, job);
    }

    /// Takes a lock from whom it was seen with, and tells that process. Also whether that process
    /// was told.
    pub(crate) async fn force_release(
        self: &Arc<Self>,
        seen: LockRecord,
    ) -> (Result<ReleaseReply, StorageError>, bool) {
        let (name, token) = (seen.name.clone(), seen.owner.token());
        let release = Arc::clone(&self.storage).force_release(seen);
        let limit = self.limits.storage_timeout;
        let reply = timeout(limit, release)
            .await
            .unwrap_or_else(|_| Err(late()));
        // Without an answer it may have been done.
        let may_be_done = match &reply {
            Ok(reply) => *reply != ReleaseReply::NotOurs,
            Err(error) => error.kind().is_transient(),
        };
        let told = match token {
            Some(token) if may_be_done => self.tell_of_force(name, token).await,
            _ => false,
        };
        (reply, told)
    }

    /// Whether the process of this token was told to look. Should it not hear of it, its next renewal
    /// shows it.
    async fn tell_of_force(self: &Arc<Self>, name: LockName, token: OwnerToken) -> bool {
        let (inbox, number) = (token.inbox(), token.number());
        if inbox == self.factory {
            self.told_of_force(&name, number);
            return true;
        }
        let note = Note::ForceReleased { name, number };
        let limit = Instant::now() + self.limits.storage_timeout;
        loop {
            match timeout_at(limit, self.tell(inbox, &note)).await {
                Ok(Ok(is_heard)) => return is_heard,
                Ok(Err(error)) if error.kind().is_transient() => {}
                Ok(Err(_)) | Err(_) => return false,
            }
            if timeout_at(limit, sleep(TELL_AGAIN)).await.is_err() {
                return false;
            }
        }
    }

    /// Anybody may say so: the lock's state has the storage asked, by the keeper.
    fn told_of_force(self: &Arc<Self>, name: &LockName, number: u64) {
        let token = OwnerToken::new(self.factory, number);
        let Some(cell) = self.table.find(name) else {
            return;
        };
        let now = self.clock.now();
        let due = self.update(&cell, |slot| {
            let effects = slot.state.told_of_force(token, now);
            (slot.state.due(), effects)
        });
        if let Some(due) = due {
            self.keeper.look_by(self, due);
        }
    }

    async fn tell(&self, inbox: u128, note: &Note) -> Result<bool, StorageError> {
        let prefix = Arc::clone(&self.prefix);
        let storage = Arc::clone(&self.storage);
        storage.tell(prefix, inbox, note.to_text().into()).await
    }

    /// What this process knows of a lock.
    pub(crate) fn describe(&self, name: &LockName) -> Detail {
        let Some(cell) = self.table.find(name) else {
            return Detail::default();
        };
        let slot = cell.lock();
        let turn = slot.holder.as_ref();
        let since = turn.map(|turn| turn.since());
        Detail {
            lease: slot.state.owner().map(|owner| owner.number()),
            held_for: since.map(|since| self.clock.now().since(since)),
            fencing: turn.and_then(|turn| turn.fencing_token()),
            callers: slot.state.waiters(),
        }
    }

    /// Asks other processes, by their inboxes, what they know of these locks. Those that do not
    /// answer in time are not among the answers.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        about: HashMap<u128, Vec<LockName>>,
    ) -> HashMap<u128, Account> {
        let mut accounts = HashMap::<u128, Account>::new();
        if about.is_empty() || !self.hears().await {
            return accounts;
        }
        let limit = Instant::now() + ANSWER_TIME;
        let questions = about.into_iter().flat_map(|(inbox, names)| {
            let questions = Note::questions(self.factory, names, || random_id() as u64);
            let questions = questions.into_iter();
            questions.map(move |(number, names)| (inbox, number, names))
        });
        let answers = questions.map(async |(inbox, number, names)| {
            let answer = timeout_at(limit, self.ask_one(inbox, number, &names));
            let answer = answer.await.ok().flatten();
            (inbox, names, answer)
        });
        for (inbox, names, answer) in join_all(answers).await {
            let Some(answer) = answer else { continue };
            let account = accounts.entry(inbox).or_default();
            account.label = answer.label;
            account
                .details
                .extend(names.into_iter().zip(answer.details));
        }
        accounts
    }

    async fn ask_one(&self, inbox: u128, number: u64, names: &[LockName]) -> Option<Answer> {
        let answer = self.inquiries.ask(number);
        let question = Note::Question {
            inbox: self.factory,
            number,
            names: names.to_vec(),
        };
        match self.tell(inbox, &question).await {
            Ok(true) => answer.await.ok(),
            Ok(false) | Err(_) => None,
        }
    }

    /// Whether answers could be heard: at once, or in a moment.
    async fn hears(self: &Arc<Self>) -> bool {
        let mut hearing = self.inquiries.hearing.subscribe();
        // It listens for us.
        self.keeper.ensure_running(self);
        let known = hearing.wait_for(|hearing| *hearing != Hearing::NotYet);
        let known = timeout(ANSWER_TIME, known).await;
        matches!(known, Ok(Ok(hearing)) if *hearing == Hearing::Yes)
    }

    /// Another process has something to say.
    pub(super) fn told(self: &Arc<Self>, text: &str) {
        match Note::parse(&self.prefix, text) {
            Some(Note::Question {
                inbox,
                number,
                names,
            }) if inbox != self.factory && self.inquiries.is_new(number) => {
                self.answer(inbox, number, &names);
            }
            Some(Note::Question { .. }) | None => {}
            Some(Note::Answer { number, answer }) => self.inquiries.answered(number, answer),
            Some(Note::ForceReleased { name, number }) => self.told_of_force(&name, number),
        }
    }

    fn answer(self: &Arc<Self>, inbox: u128, number: u64, names: &[LockName]) {
        let Some(answering) = Answering::begin(self) else {
            return;
        };
        let answer = Answer {
            label: self.label().cloned(),
            details: names.iter().map(|name| self.describe(name)).collect(),
        };
        let note = Note::Answer { number, answer };
        let job = async move {
            // Later it is of no use to anybody.
            let _ = timeout(ANSWER_TIME, answering.0.tell(inbox, &note)).await;
        };
        self.keeper.submit(self, Box::pin(job));
    }
}

fn late() -> StorageError {
    StorageError::new(StorageErrorKind::Timeout)
}

/// An answer on its way.
struct Answering(Arc<Coordinator>);

impl Answering {
    /// `None` if there are too many.
    fn begin(coordinator: &Arc<Coordinator>) -> Option<Self> {
        let this = Self(Arc::clone(coordinator));
        let before = coordinator.inquiries.answering.fetch_add(1, SeqCst);
        (before < MAX_ANSWERING).then_some(this)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.inquiries.answering.fetch_sub(1, SeqCst);
    }
}
