//! What a storage says of the locks in it: the vocabulary of [`LockStorage::survey`],
//! [`LockStorage::look`] and [`LockStorage::force_release`].
//!
//! [`LockStorage::survey`]: super::LockStorage::survey
//! [`LockStorage::look`]: super::LockStorage::look
//! [`LockStorage::force_release`]: super::LockStorage::force_release

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use super::OwnerToken;
use crate::key::LockName;

/// Which locks [`LockStorage::survey`](super::LockStorage::survey) is asked for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SurveyRequest {
    /// What the names of the locks begin with, before the `:`.
    pub prefix: Arc<str>,
    /// How many locks are listed at most.
    pub limit: usize,
    /// How long it may take. What was found until then is the answer.
    pub time: Duration,
}

impl SurveyRequest {
    pub(crate) fn new(prefix: Arc<str>, limit: usize, time: Duration) -> Self {
        Self {
            prefix,
            limit,
            time,
        }
    }

    /// A lock's name, as it is in the storage. `None` if it does not begin with the prefix, or no
    /// [`LockKey`](crate::LockKey) has it.
    pub fn name(&self, name: &str) -> Option<LockName> {
        LockName::parse_encoded(&self.prefix, name)
    }
}

/// What [`LockStorage::survey`](super::LockStorage::survey) found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Survey {
    /// The locks that are held, in any order, each once.
    pub locks: Vec<LockRecord>,
    /// Whether there may be more than these.
    pub more: bool,
}

impl Survey {
    /// These locks and, if `more`, others.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_distributed_lock::storage::{LockOwner, LockRecord, Survey, SurveyRequest};
    ///
    /// struct Row {
    ///     name: String,
    ///     value: Vec<u8>,
    ///     ttl: Duration,
    /// }
    ///
    /// /// Of one row more than the limit.
    /// fn survey(request: &SurveyRequest, rows: &[Row]) -> Survey {
    ///     let records = rows.iter().filter_map(|row| {
    ///         let owner = LockOwner::from_value(&row.value);
    ///         Some(LockRecord::new(request.name(&row.name)?, owner, Some(row.ttl)))
    ///     });
    ///     Survey::new(records.take(request.limit).collect(), rows.len() > request.limit)
    /// }
    /// ```
    pub fn new(locks: Vec<LockRecord>, more: bool) -> Self {
        Self { locks, more }
    }
}

/// A lock that is held, as a storage knows it. Made by [`LockRecord::new`].
#[derive(Clone)]
#[non_exhaustive]
pub struct LockRecord {
    /// The lock.
    pub name: LockName,
    /// Who has it.
    pub owner: LockOwner,
    /// How long it is held if it is not renewed. `None`: it never expires.
    pub ttl: Option<Duration>,
    /// Whose processes stand in its queue, by their [inboxes](OwnerToken::inbox), the first first.
    /// A process may be there more than once.
    pub queue: Vec<u128>,
}

impl LockRecord {
    /// A lock for which nobody waits: a storage that has a queue sets [`queue`](Self::queue) then.
    /// [`Survey::new`] has an example.
    pub fn new(name: LockName, owner: LockOwner, ttl: Option<Duration>) -> Self {
        Self {
            name,
            owner,
            ttl,
            queue: Vec::new(),
        }
    }
}

impl fmt::Debug for LockRecord {
    /// Without the inboxes: whoever knows one is half-way to a token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockRecord")
            .field("name", &self.name)
            .field("owner", &self.owner)
            .field("ttl", &self.ttl)
            .field("queue", &self.queue.len())
            .finish()
    }
}

/// Who has a lock, in a [`LockRecord`]: a process that uses this crate, or a client of another kind.
///
/// Whoever knows it can free the lock, so `Debug` does not show it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LockOwner(Value);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Value {
    Token(OwnerToken),
    Foreign(Arc<[u8]>),
}

impl LockOwner {
    /// The owner of a lock with this value. What does not look exactly as
    /// [`OwnerToken::to_text`] writes it is the value of another client.
    ///
    /// ```
    /// use tower_distributed_lock::storage::LockOwner;
    ///
    /// let process = LockOwner::from_value(b"0123456789abcdef0123456789abcdef:7");
    /// assert!(process.token().is_some_and(|token| token.to_text().as_bytes() == &*process.value()));
    ///
    /// let client = LockOwner::from_value(b"client-7");
    /// assert_eq!(client.token(), None);
    /// assert_eq!(&*client.value(), b"client-7");
    /// ```
    pub fn from_value(value: &[u8]) -> Self {
        let token = str::from_utf8(value).ok().and_then(OwnerToken::from_text);
        match token.filter(|token| token.text()[..] == *value) {
            Some(token) => Self(Value::Token(token)),
            None => Self(Value::Foreign(value.into())),
        }
    }

    /// The token, if it is a process that uses this crate: see [`from_value`](Self::from_value).
    pub fn token(&self) -> Option<OwnerToken> {
        match self.0 {
            Value::Token(token) => Some(token),
            Value::Foreign(_) => None,
        }
    }

    /// What the lock's value is: what [`from_value`](Self::from_value) was given, or the text of the
    /// [token](OwnerToken::to_text) that it was made of.
    pub fn value(&self) -> Cow<'_, [u8]> {
        match &self.0 {
            Value::Token(token) => token.text().to_vec().into(),
            Value::Foreign(value) => (&**value).into(),
        }
    }
}

impl From<OwnerToken> for LockOwner {
    fn from(token: OwnerToken) -> Self {
        Self(Value::Token(token))
    }
}

impl fmt::Debug for LockOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Value::Token(token) => token.fmt(f),
            Value::Foreign(_) => f.write_str("another client"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_reads_exactly_like_a_token_is_one() {
        let token = OwnerToken::new(0xAB, 7);
        let text = token.to_text();
        assert_eq!(LockOwner::from_value(text.as_bytes()).token(), Some(token));
        for foreign in [
            "",
            "client-7",
            "ab:7",
            &text.to_uppercase(),
            &text.replace(":7", ":+7"),
            &text.replace(":7", ":07"),
            &format!("{text}!"),
        ] {
            let owner = LockOwner::from_value(foreign.as_bytes());
            assert_eq!(owner.token(), None, "{foreign}");
            assert_eq!(&*owner.value(), foreign.as_bytes());
        }
    }

    #[test]
    fn nothing_shows_what_frees_a_lock() {
        let name = LockName::parse_encoded("p", "p:k").unwrap();
        let token = OwnerToken::new(0xFEED_FACE, 7);
        for owner in [token.into(), LockOwner::from_value(b"secret")] {
            let mut record = LockRecord::new(name.clone(), owner, None);
            record.queue.push(token.inbox());
            let shown = format!("{record:#?}");
            assert!(
                !shown.contains("secret") && !shown.contains("feed"),
                "{shown}"
            );
            assert!(!shown.contains(&token.inbox().to_string()), "{shown}");
        }
    }
}
