//! Doors to what is private, for the fuzz targets in `tests/fuzz`: each takes bytes and panics if
//! a promise is broken. Compiled only with `--cfg tower_distributed_lock_fuzzing`; no part of the crate for anybody else.

#![allow(clippy::unwrap_used, reason = "a panic is a verdict")]

use std::time::Duration;

use http::{HeaderName, HeaderValue, Request};

use crate::{
    LockKey,
    middleware::{
        client_patience,
        key::{KeyFunction, header, metadata},
        request_key::Keys,
    },
    storage::{Message, redis::promises},
};

/// A key's state machine: three processes around one storage, by bytes.
pub fn machine(data: &[u8]) {
    crate::coordinator::live(data);
}

/// What was published to this inbox, if it is a message.
pub fn message(text: &str, inbox: u128, run: Option<u128>) -> Option<Message> {
    promises::message(text, inbox, run)
}

/// Keys of any bytes, lists of parts, what is taken as it is stored, and tokens. Lines: the first is
/// the prefix; those before an empty line are one list, those after it another.
pub fn keys(data: &[u8]) {
    let mut lines: Vec<_> = data.split(|byte| *byte == b'\n').collect();
    let prefix = str::from_utf8(lines.remove(0)).unwrap_or_default();
    promises::key(prefix, data);
    for line in &lines {
        promises::key("", line);
        promises::token(line);
        str::from_utf8(line).into_iter().for_each(promises::encoded);
    }
    let end = lines.iter().position(|line| line.is_empty());
    let (one, other) = lines.split_at(end.unwrap_or(lines.len()));
    promises::keys_differ(one, other.get(1..).unwrap_or_default());
}

/// What a server may answer, as it comes from the socket. The bytes before it choose what was asked.
pub fn replies(data: &[u8]) {
    let Some(([number, count, seen, high], reply)) = data.split_first_chunk() else {
        return;
    };
    if let Some(value) = promises::frame(reply) {
        let seen = u64::from(*seen) << (high % 46);
        promises::reply(&value, u64::from(*number), u32::from(*count), seen);
        promises::deployment(&value);
    }
}

/// URLs, users, passwords: a line each.
pub fn addresses(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let mut lines = text.split('\n');
    let url = lines.next().unwrap_or_default();
    promises::url(url, lines.next(), lines.next());
}

/// Headers of a request: its type, `grpc-timeout`, a key, a binary key; a line each.
pub fn headers(data: &[u8]) {
    const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
    const TEXT: HeaderName = HeaderName::from_static("account");
    const BINARY: HeaderName = HeaderName::from_static("account-bin");
    let mut request = Request::new(());
    let mut lines = data.split(|byte| *byte == b'\n');
    for name in [http::header::CONTENT_TYPE, TIMEOUT, TEXT, BINARY] {
        if let Some(Ok(value)) = lines.next().map(HeaderValue::from_bytes) {
            request.headers_mut().append(name, value);
        }
    }
    if let Some(patience) = client_patience(&request) {
        assert!(patience <= Duration::from_secs(99_999_999 * 3_600));
        let timeout = request.headers()[TIMEOUT].as_bytes();
        assert!((2..=9).contains(&timeout.len()));
    }
    let value = |request: &Request<()>, name| request.headers().get(name).cloned();
    if let Ok(key) = header("a", TEXT).request_key(&mut request) {
        let value = value(&request, TEXT).unwrap();
        let expected = LockKey::from_parts([b"a", value.as_bytes()]).unwrap();
        assert_eq!(key.keys, Keys::One(expected));
    }
    if let Ok(key) = metadata("a", BINARY).request_key(&mut request) {
        let value = value(&request, BINARY).unwrap();
        let digits = value.as_bytes().split(|byte| *byte == b'=').next().unwrap();
        let Keys::One(key) = key.keys else {
            panic!("{key:?}");
        };
        // Each digit has its bits in the key.
        let bytes = crate::key::decode(key.as_str()).unwrap();
        assert_eq!(bytes.len() - 2, digits.len() * 6 / 8);
    }
}
