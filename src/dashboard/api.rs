//! What the page asks for, as JSON.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::Shared;
use crate::{
    error::{ForceReleaseError, StorageError},
    inspect::{LockInfo, LockInspector, Process, Snapshot, Waiting},
    key::LockKey,
};

/// A key is up to 3 KiB long, a reason 2 KB; JSON may take six characters for one.
pub(super) const MAX_BODY: usize = 16 * 1024;

const MAX_REASON: usize = 500;

/// How long an answer is given to all who ask.
const SHARED_FOR: Duration = Duration::from_millis(500);

pub(super) struct Locks {
    inspector: LockInspector,
    limit: usize,
    /// Held by the one who asks the storage. The others wait for the same answer.
    last: Mutex<Option<Answer>>,
}

#[derive(Clone)]
struct Answer {
    at: Instant,
    status: StatusCode,
    json: Bytes,
}

impl Locks {
    pub(super) fn new(inspector: LockInspector, limit: usize) -> Self {
        Self {
            inspector,
            limit,
            last: Mutex::new(None),
        }
    }

    async fn look(&self) -> Answer {
        let mut last = self.last.lock().await;
        if let Some(answer) = &*last
            && answer.at.elapsed() < SHARED_FOR
        {
            return answer.clone();
        }
        let (status, json) = match self.inspector.locks(self.limit).await {
            Ok(snapshot) => json(StatusCode::OK, &SnapshotJson::from(&snapshot)),
            // Also shared: a storage that does not answer would keep all who ask waiting in turn.
            Err(failure) => unavailable(&failure),
        };
        let answer = Answer {
            // Not when it was asked: that may have taken longer than an answer is shared for.
            at: Instant::now(),
            status,
            json,
        };
        *last = Some(answer.clone());
        answer
    }

    async fn release(&self, wanted: &Release) -> Result<bool, Refusal> {
        let key = LockKey::from_encoded(&wanted.key).map_err(|invalid| Refusal {
            status: StatusCode::BAD_REQUEST,
            why: invalid.to_string(),
        })?;
        let (inspector, reason) = (&self.inspector, wanted.reason.trim());
        let released = match wanted.fencing_token {
            // Whoever clicked saw this holder, some seconds ago.
            Some(token) => inspector.force_release_if(&key, token, reason).await,
            None => inspector
                .force_release(&key, reason)
                .await
                .map_err(ForceReleaseError::from),
        };
        *self.last.lock().await = None;
        Ok(released?.is_some())
    }
}

pub(super) async fn locks(State(shared): State<Arc<Shared>>) -> Response {
    let answer = shared.locks.look().await;
    respond(answer.status, answer.json)
}

pub(super) async fn release(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let released = match Release::read(&headers, body) {
        Ok(wanted) => shared.locks.release(&wanted).await,
        Err(refusal) => Err(refusal),
    };
    let (status, json) = match released {
        Ok(released) => json(StatusCode::OK, &Released { released }),
        Err(Refusal { status, why }) => return error(status, &why),
    };
    respond(status, json)
}

/// What `POST release` takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    key: String,
    reason: String,
    /// The holder that is meant.
    #[serde(default)]
    fencing_token: Option<u64>,
}

impl Release {
    fn read(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Self, Refusal> {
        let refuse = |status, why: &str| {
            Err(Refusal {
                status,
                why: why.into(),
            })
        };
        // Browsers that send this say where a request comes from; others rely on the content type
        // alone.
        let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
        if !matches!(site, None | Some(b"same-origin" | b"none")) {
            return refuse(
                StatusCode::FORBIDDEN,
                "this request comes from another site",
            );
        }
        // A form of a foreign page cannot send it.
        if !is_json(headers) {
            let why = "the content-type has to be application/json";
            return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, why);
        }
        let body = match body {
            Ok(body) => body,
            Err(rejection) => return refuse(rejection.status(), &rejection.body_text()),
        };
        let wanted: Self = match serde_json::from_slice(&body) {
            Ok(wanted) => wanted,
            Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let reason = wanted.reason.trim();
        if reason.is_empty()
            || reason.chars().count() > MAX_REASON
            || reason.chars().any(char::is_control)
        {
            let why = "the reason has to be one line of 1 to 500 characters";
            return refuse(StatusCode::BAD_REQUEST, why);
        }
        Ok(wanted)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(Ok(content_type)) = headers.get(CONTENT_TYPE).map(|value| value.to_str()) else {
        return false;
    };
    let (media_type, _parameters) = content_type.split_once(';').unwrap_or((content_type, ""));
    media_type.trim().eq_ignore_ascii_case("application/json")
}

/// Why a lock was not taken away.
struct Refusal {
    status: StatusCode,
    why: String,
}

impl From<ForceReleaseError> for Refusal {
    fn from(error: ForceReleaseError) -> Self {
        let status = match error {
            ForceReleaseError::OtherHolder => StatusCode::CONFLICT,
            ForceReleaseError::Storage(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self {
            status,
            why: error.to_string(),
        }
    }
}

#[derive(Serialize)]
struct Released {
    released: bool,
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    error: &'a str,
}

#[derive(Serialize)]
struct SnapshotJson<'a> {
    more: bool,
    locks: Vec<LockJson<'a>>,
}

#[derive(Serialize)]
struct LockJson<'a> {
    key: &'a str,
    holder: ProcessJson<'a>,
    ttl_ms: Option<u64>,
    held_ms: Option<u64>,
    fencing_token: Option<u64>,
    waiters: Vec<WaitingJson<'a>>,
}

#[derive(Serialize)]
struct ProcessJson<'a> {
    label: Option<&'a str>,
    this: bool,
    answered: bool,
}

#[derive(Serialize)]
struct WaitingJson<'a> {
    label: Option<&'a str>,
    this: bool,
    answered: bool,
    callers: Option<usize>,
}

impl<'a> From<&'a Snapshot> for SnapshotJson<'a> {
    fn from(snapshot: &'a Snapshot) -> Self {
        Self {
            more: snapshot.more,
            locks: snapshot.locks.iter().map(LockJson::from).collect(),
        }
    }
}

impl<'a> From<&'a LockInfo> for LockJson<'a> {
    fn from(lock: &'a LockInfo) -> Self {
        Self {
            key: lock.key.as_str(),
            holder: ProcessJson::from(&lock.holder),
            ttl_ms: lock.ttl.map(ms),
            held_ms: lock.held_for.map(ms),
            fencing_token: lock.fencing_token,
            waiters: lock.waiters.iter().map(WaitingJson::from).collect(),
        }
    }
}

impl<'a> From<&'a Process> for ProcessJson<'a> {
    fn from(process: &'a Process) -> Self {
        Self {
            label: process.label.as_deref(),
            this: process.is_this,
            answered: process.answered,
        }
    }
}

impl<'a> From<&'a Waiting> for WaitingJson<'a> {
    fn from(waiting: &'a Waiting) -> Self {
        Self {
            label: waiting.process.label.as_deref(),
            this: waiting.process.is_this,
            answered: waiting.process.answered,
            callers: waiting.callers,
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn error(status: StatusCode, why: &str) -> Response {
    let (status, json) = json(status, &ErrorJson { error: why });
    respond(status, json)
}

fn unavailable(failure: &StorageError) -> (StatusCode, Bytes) {
    let error = &*failure.to_string();
    json(StatusCode::SERVICE_UNAVAILABLE, &ErrorJson { error })
}

fn json(status: StatusCode, body: &impl Serialize) -> (StatusCode, Bytes) {
    match serde_json::to_vec(body) {
        Ok(json) => (status, json.into()),
        // Nothing above can fail; but a body that is cut off would be worse than none.
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, Bytes::new()),
    }
}

fn respond(status: StatusCode, json: Bytes) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], json).into_response()
}
