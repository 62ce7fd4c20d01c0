//! What holds whatever comes from outside: replies, published messages, URLs, what other servers say
//! of a deployment. Each promise is a function of the input that panics if it is broken. The property
//! tests below try inputs that can be made smaller; the fuzz targets of `tests/fuzz` try those that
//! reach new code.

#![allow(clippy::unwrap_used, reason = "a panic is a verdict")]

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use redis::Value;

use super::{
    address::{Address, REFUSALS},
    cluster_map::{self, most, range},
    error::{storage_error, value},
    frame, inbox,
    replies::{self, Taken},
    sentinel,
    slot::{Counters, SLOTS, slot},
    survey,
};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::{KeyPrefix, LockKey, LockName},
    options::LockOptions,
    storage::{
        AcquireReply, FencingBlock, Inbox, Message, OwnerToken, RaiseReply, ReleaseReply,
        RenewReply,
    },
};

/// Whose token the replies are for.
pub(crate) const FACTORY: u128 = 0x00AB_CDEF_0123_4567_89AB_CDEF_0123_4567;

/// What Redis Cluster makes of a key, by its specification: what is between the first `{` and the
/// first `}` after it counts, if there is anything.
fn slot_of_any(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| {
        let (tag, _) = rest.split_once('}')?;
        (!tag.is_empty()).then_some(tag)
    });
    slot(tag.unwrap_or(key))
}

/// A key of any bytes: it is refused for its length alone, can be read back from its name, and all
/// that belongs to it is beside it.
pub(crate) fn key(prefix: &str, bytes: &[u8]) {
    // The search for the counters of a prefix takes long, so it is done once for the usual one.
    static USUAL: LazyLock<Counters> = LazyLock::new(Counters::default);
    let prefix = KeyPrefix::new(prefix).unwrap_or_default();
    let others = Counters::default();
    let counters = match prefix == KeyPrefix::default() {
        true => &*USUAL,
        false => &others,
    };
    let key = LockKey::new(bytes);
    assert_eq!(key.is_ok(), (1..=LockKey::MAX_LEN).contains(&bytes.len()));
    let Ok(key) = key else {
        return;
    };
    assert!(key.as_str().len() <= 3 * bytes.len());
    assert_eq!(crate::key::decode(key.as_str()).unwrap(), bytes);
    assert_eq!(LockKey::from_encoded(key.as_str()), Ok(key.clone()));
    let name = prefix.name(&key);
    assert_eq!(name.key(), key.as_str());
    assert_eq!(*name.prefix(), *prefix.text());
    assert_eq!(
        LockName::parse_encoded(name.prefix(), name.as_str()).as_ref(),
        Some(&name)
    );
    let expected = slot(name.as_str());
    assert!(usize::from(expected) < SLOTS);
    for beside in [
        name.as_str().to_owned(),
        name.companion("queue"),
        counters.of(&name),
    ] {
        assert_eq!(slot_of_any(&beside), expected, "{beside}");
    }
}

/// Two lists of parts are the same key only if they are the same list, and so are two keys of bytes.
pub(crate) fn keys_differ(one: &[&[u8]], other: &[&[u8]]) {
    if let (Ok(left), Ok(right)) = (LockKey::from_parts(one), LockKey::from_parts(other)) {
        assert_eq!(left == right, one == other, "{left} {right}");
    }
    if let ([one, ..], [other, ..]) = (one, other)
        && let (Ok(left), Ok(right)) = (LockKey::new(one), LockKey::new(other))
    {
        assert_eq!(left == right, one == other, "{left} {right}");
    }
}

/// What is taken as a key that is stored already is one, or refused.
pub(crate) fn encoded(text: &str) {
    if let Ok(key) = LockKey::from_encoded(text) {
        assert_eq!(key.as_str(), text);
        let bytes = crate::key::decode(text).unwrap();
        assert!((1..=LockKey::MAX_LEN).contains(&bytes.len()));
        let parts: Vec<_> = text
            .split('/')
            .map(|part| crate::key::decode(part).unwrap())
            .collect();
        assert_eq!(LockKey::from_parts(parts), Ok(key));
    }
}

/// A token is read from what it is written as, and tells itself from all other values.
pub(crate) fn token(value: &[u8]) {
    if let Some(token) = str::from_utf8(value).ok().and_then(OwnerToken::from_text) {
        assert_eq!(OwnerToken::from_text(&token.to_text()), Some(token));
    }
    let owner = survey::owner(value);
    let unmarked = value.strip_suffix(b"!").unwrap_or(value);
    match owner.token() {
        Some(token) => assert_eq!(token.to_text().as_bytes(), unmarked),
        None => assert_eq!(&*owner.value(), value),
    }
}

/// What the reply to each command is taken for: an answer that it gives, or an error.
pub(crate) fn reply(reply: &Value, number: u64, count: u32, seen: u64) {
    let token = OwnerToken::new(FACTORY, number);
    let token = token.to_text().into_bytes();
    let count = count.clamp(1, 1 << 20);

    // An error of the server's is told apart first. A reply that makes no sense says nothing of what
    // was done.
    let sound = |error: StorageError| assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    if let Value::ServerError(error) = reply {
        storage_error(error.clone().into());
        assert!(value(reply.clone()).is_err());
    }
    match replies::set(reply.clone()) {
        Ok(taken) => assert_eq!(taken, *reply == Value::Okay),
        Err(error) => sound(error),
    }
    match replies::taken(reply.clone(), &token, count, seen) {
        Ok(Taken::Granted { block, .. }) => {
            assert!(block.is_sound() && block.count == count && block.first > seen);
            assert!(is_taken(reply, &token, block), "{reply:?}");
        }
        // Else the lock would be free, or its tokens were refused.
        Ok(Taken::NotFree | Taken::NotRight | Taken::NoTokens(_)) => {
            assert!(matches!(reply, Value::Array(parts) if parts.len() == 3));
        }
        Err(_) => {}
    }
    match replies::acquired(reply.clone(), &token, count, Some(1)) {
        Ok(AcquireReply::Granted { fencing, .. }) => {
            let Value::Array(parts) = reply else {
                panic!("{reply:?}");
            };
            assert_eq!(parts[0], Value::BulkString(token.clone()));
            assert_eq!(parts.len(), 3);
            assert!(fencing.is_none_or(|block| block.is_sound() && block.count == count));
        }
        Ok(_) => assert!(matches!(reply, Value::Array(_))),
        Err(error) => sound(error),
    }
    let is = |number| *reply == Value::Int(number);
    match replies::renewed(reply) {
        Ok(RenewReply::NotOurs) => assert!(is(0)),
        Ok(RenewReply::Renewed) => assert!(is(1)),
        Ok(RenewReply::RenewedAndWanted) => assert!(is(2)),
        Err(error) => sound(error),
    }
    match replies::freed(reply) {
        Ok(Some(ReleaseReply::Released)) => assert!(is(1)),
        Ok(Some(freed)) => assert!(is(0) && freed == ReleaseReply::NotOurs),
        Ok(None) => assert!(is(2)),
        Err(error) => sound(error),
    }
    match replies::released(reply, None) {
        Ok(ReleaseReply::Released) => assert!(is(1)),
        Ok(ReleaseReply::NotOurs) => assert!(is(0)),
        Ok(ReleaseReply::Requeued { stamp, .. }) => {
            assert!(matches!(reply, Value::Array(parts) if parts.len() == 3));
            assert_eq!(stamp.run, None);
        }
        Err(error) => sound(error),
    }
    match replies::raised(reply) {
        Ok(RaiseReply::Raised) => assert!(is(1)),
        Ok(RaiseReply::NotOurs) => assert!(is(0)),
        Err(error) => sound(error),
    }
}

/// Whether these are the replies of a server that has given us the lock with these tokens: written in
/// another way than what it tests.
fn is_taken(reply: &Value, token: &[u8], block: FencingBlock) -> bool {
    let Value::Array(parts) = reply else {
        return false;
    };
    let [Value::Okay, Value::Int(last), Value::Array(found)] = &parts[..] else {
        return false;
    };
    let marked = [token, b"!"].concat();
    let is_ours = |owner: &Vec<u8>| owner == token || *owner == marked;
    let last_of_block = block.first + u64::from(block.count) - 1;
    u64::try_from(*last) == Ok(last_of_block)
        && matches!(&found[..], [Value::BulkString(owner), _] if is_ours(owner))
}

/// What a Sentinel, a node of a cluster or a step of `SCAN` says is understood, or it is an error.
pub(crate) fn deployment(reply: &Value) {
    if let Ok(answer) = sentinel::answer(reply.clone()) {
        assert!(!answer.master.host.is_empty() && answer.master.port > 0);
        assert!(!answer.master.replaces(&answer.master));
    }
    if let Value::Array(parts) = reply {
        let asked = cluster_map::Address("asked".to_owned(), 7);
        let view = || -> Vec<_> {
            parts
                .iter()
                .filter_map(|part| range(part, &asked))
                .collect()
        };
        let map = most(&[view(), view()], 3);
        for slot in (0..SLOTS as u16).step_by(7) {
            let owner = map.owner(slot);
            assert!(owner.is_none_or(|owner| map.masters.contains(owner)));
        }
        // Nobody counts as a master who has no slot.
        for (number, master) in (0..).zip(&map.masters) {
            let has_one = (0..SLOTS as u16).any(|slot| map.owner(slot) == Some(master));
            assert!(has_one && map.number_of(master) == Some(number));
        }
        assert_eq!(map.owner(u16::MAX), None);
    }
    let step = survey::step(reply.clone());
    assert!(step.is_none() || matches!(reply, Value::Array(parts) if parts.len() == 2));
    if let Value::BulkString(text) = reply {
        assert!(survey::inboxes(text).len() <= text.len() / 32 + text.len());
    }
}

/// What is published to our channel: nothing, or a message that a factory can make something of.
pub(crate) fn message(text: &str, id: u128, run: Option<u128>) -> Option<Message> {
    let inbox = Inbox::new(id, Arc::from("p"), |_| {});
    let message = inbox::parse(text, &inbox, run)?;
    match &message {
        Message::Granted(grant) => {
            assert_eq!((grant.token.inbox(), grant.name.prefix()), (id, "p"));
            assert!(grant.ttl <= LockOptions::MAX_DURATION);
            assert!(grant.fencing.is_none_or(|block| block.is_sound()));
            assert!(grant.stamp.run.is_none() || grant.stamp.run == run);
            // What a machine does with it.
            let _ = grant.stamp.at.saturating_sub(Duration::from_secs(1));
        }
        Message::Wanted(name) | Message::Free(name) => {
            assert!(text.contains(name.as_str()) && !name.key().is_empty());
        }
        Message::Told(told) => assert!(told.len() <= Message::MAX_TEXT),
        Message::Listening | Message::Deaf => panic!("nobody can publish that: {text:?}"),
    }
    Some(message)
}

/// What came from a socket. A reply that is read is what redis-rs reads there, and one that lacks a byte is none.
pub(crate) fn frame(bytes: &[u8]) -> Option<Value> {
    let (reply, length) = frame::first(bytes).ok()??;
    assert!(length <= bytes.len());
    match redis::parse_redis_value(&bytes[..length]) {
        Ok(expected) => assert!(are_same(&reply, &expected), "{reply:?}"),
        Err(error) => panic!("{error}"),
    }
    assert!(matches!(frame::first(&bytes[..length - 1]), Ok(None)));
    Some(reply)
}

/// What is no number is not even the same as itself.
fn are_same(one: &Value, other: &Value) -> bool {
    one == other || format!("{one:?}") == format!("{other:?}")
}

/// A URL with a name and a password beside it. Whatever is wrong is told without repeating any of it,
/// and what asks for TLS gets it or is refused.
pub(crate) fn url(url: &str, username: Option<&str>, password: Option<&str>) {
    let address = Address {
        url: url.to_owned(),
        username: username.map(Into::into),
        password: password.map(Into::into),
        ..Address::default()
    };
    let wants_tls = ["rediss:", "valkeys:"]
        .iter()
        .any(|scheme| url.trim_start().to_ascii_lowercase().starts_with(scheme));
    match address.read() {
        Ok(endpoint) => {
            assert_eq!(endpoint.is_encrypted(), wants_tls);
            let settings = endpoint.info.redis_settings();
            assert!(username.is_none() || settings.username() == username);
            assert!(password.is_none() || settings.password() == password);
            assert!(settings.username().is_none() || settings.password().is_some());
        }
        Err(error) => {
            assert_eq!(error.kind(), StorageErrorKind::Rejected);
            // None of what was given is in it, as it is one of a few texts.
            let shown = error.to_string();
            let is_fixed = REFUSALS.iter().any(|text| shown.ends_with(text));
            assert!(is_fixed, "{shown}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes among which those with a meaning are frequent.
    fn bytes(len: usize) -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            any::<u8>(),
            prop::sample::select(b"{}:%/!\0\n ".to_vec()),
            Just(b'a')
        ];
        prop::collection::vec(byte, 0..=len)
    }

    fn prefixes() -> &'static str {
        "[A-Za-z0-9_./-]{1,64}"
    }

    /// Our token now and then, and what is nearly it.
    fn texts() -> impl Strategy<Value = Vec<u8>> {
        let token = || OwnerToken::new(FACTORY, 7).to_text();
        prop_oneof![
            3 => Just(token().into_bytes()),
            1 => Just(format!("{}!", token()).into_bytes()),
            1 => Just(format!("{}!!", token()).into_bytes()),
            1 => Just(OwnerToken::new(FACTORY, 8).to_text().into_bytes()),
            2 => any::<i64>().prop_map(|number| number.to_string().into_bytes()),
            1 => prop::sample::select(vec!["ip", "port", "config-epoch", "flags", "o_down", "::1"])
                .prop_map(|word| word.as_bytes().to_vec()),
            2 => bytes(40),
        ]
    }

    fn numbers() -> impl Strategy<Value = i64> {
        prop_oneof![
            4 => -2..4_i64,
            2 => prop::sample::select(vec![i64::MIN, i64::MAX, 1 << 53, (1 << 53) - 1, 16_383, 16_384]),
            1 => any::<i64>(),
        ]
    }

    fn replies() -> impl Strategy<Value = Value> {
        let error = "-[A-Z]{2,9} ([a-zA-Z@:_/.-]| ){0,30}\r\n"
            .prop_map(|line| redis::parse_redis_value(line.as_bytes()).unwrap_or_default());
        let leaf = prop_oneof![
            2 => Just(Value::Nil),
            4 => numbers().prop_map(Value::Int),
            4 => texts().prop_map(Value::BulkString),
            2 => Just(Value::Okay),
            1 => "\\PC{0,12}".prop_map(Value::SimpleString),
            1 => any::<f64>().prop_map(Value::Double),
            1 => any::<bool>().prop_map(Value::Boolean),
            2 => error,
        ];
        leaf.prop_recursive(3, 40, 10, |inner| {
            prop_oneof![
                4 => prop::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
                1 => prop::collection::vec(inner.clone(), 0..5).prop_map(Value::Set),
                1 => prop::collection::vec((inner.clone(), inner), 0..5).prop_map(Value::Map),
            ]
        })
    }

    /// Replies as the commands give them, with something else in the place of some.
    fn likely() -> impl Strategy<Value = Value> {
        let or = |value: Value| prop_oneof![6 => Just(value), 1 => replies()];
        let text = || prop_oneof![6 => texts().prop_map(Value::BulkString), 1 => replies()];
        let number = || prop_oneof![6 => numbers().prop_map(Value::Int), 1 => replies()];
        let queue = prop_oneof![Just(Value::Nil), text()];
        let found = prop_oneof![
            6 => (text(), queue).prop_map(|(owner, queue)| Value::Array(vec![owner, queue])),
            1 => replies()
        ];
        prop_oneof![
            (or(Value::Okay), number(), found)
                .prop_map(|(set, last, found)| Value::Array(vec![set, last, found])),
            (text(), number(), number()).prop_map(|(a, b, c)| Value::Array(vec![a, b, c])),
            number(),
        ]
    }

    fn words() -> impl Strategy<Value = String> {
        let token = OwnerToken::new(FACTORY, 7).to_text();
        prop_oneof![
            4 => prop::sample::select(vec!["w", "f", "g", "t", "?", "!", "x", "p:k", "p:a/%2F"])
                .prop_map(str::to_owned),
            3 => Just(token),
            4 => prop::sample::select(vec![0, 1, 5_000, 86_400_000, u64::MAX])
                .prop_map(|number| number.to_string()),
            1 => any::<u64>().prop_map(|number| number.to_string()),
            1 => "\\PC{0,8}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn a_key_is_bounded_readable_and_in_one_slot_with_all_that_is_its_own(
            prefix in prefixes(),
            bytes in prop_oneof![bytes(80), bytes(LockKey::MAX_LEN + 2)],
        ) {
            key(&prefix, &bytes);
        }

        #[test]
        fn no_two_keys_have_one_name(
            one in prop::collection::vec(bytes(4), 1..4),
            other in prop::collection::vec(bytes(4), 1..4),
        ) {
            let parts = |parts: &[Vec<u8>]| parts.to_vec();
            let (one, other) = (parts(&one), parts(&other));
            let one: Vec<_> = one.iter().map(Vec::as_slice).collect();
            let other: Vec<_> = other.iter().map(Vec::as_slice).collect();
            keys_differ(&one, &other);
            keys_differ(&one, &one);
        }

        #[test]
        fn only_what_a_key_is_stored_as_is_taken_as_it_is(
            text in "([a/%{:é]|%[0-9A-Fa-f]{2}){0,8}",
        ) {
            encoded(&text);
        }

        #[test]
        fn a_token_is_read_as_it_was_written_and_nothing_else_is_one(
            factory in any::<u128>(),
            number in any::<u64>(),
            other in prop_oneof![texts(), "[0-9a-fA-F+]{30,34}:[+0]?[0-9]{1,20}!{0,2}".prop_map(String::into_bytes)],
        ) {
            let text = OwnerToken::new(factory, number).to_text();
            prop_assert_eq!(OwnerToken::from_text(&text), Some(OwnerToken::new(factory, number)));
            prop_assert_eq!(survey::owner(text.as_bytes()).token(), OwnerToken::from_text(&text));
            token(&other);
        }

        #[test]
        fn no_reply_is_taken_for_a_grant_that_was_none(
            value in prop_oneof![replies(), likely(), likely()],
            count in prop_oneof![Just(1), 1..20_u32, any::<u32>()],
            seen in prop_oneof![Just(0), 0..1_u64 << 53],
        ) {
            reply(&value, 7, count, seen);
        }

        #[test]
        fn what_is_said_of_a_deployment_is_understood_or_refused(value in replies()) {
            deployment(&value);
        }

        #[test]
        fn a_map_of_slots_is_read_or_refused(
            ranges in prop::collection::vec(
                (numbers(), numbers(), texts(), numbers(), prop::option::of(replies())),
                0..6,
            ),
        ) {
            let range = |(first, last, host, port, odd): (_, _, _, _, Option<Value>)| {
                let master = Value::Array(vec![Value::BulkString(host), Value::Int(port)]);
                Value::Array(vec![Value::Int(first), Value::Int(last), odd.unwrap_or(master)])
            };
            deployment(&Value::Array(ranges.into_iter().map(range).collect()));
        }

        #[test]
        fn whatever_is_published_is_a_message_or_nothing(
            words in prop::collection::vec(words(), 0..10),
            kind in prop::sample::select(vec!["g p:k", "w", "f", "t", ""]),
            run in any::<Option<u128>>(),
        ) {
            message(&words.join(" "), FACTORY, run);
            message(&[kind, " ", &words.join(" ")].concat(), FACTORY, run);
            let token = OwnerToken::new(FACTORY, 7).to_text();
            message(&format!("g p:k {token} {}", words.join(" ")), FACTORY, run);
        }

        #[test]
        fn the_numbers_of_a_published_grant_may_be_any(numbers in prop::array::uniform6(any::<u64>())) {
            let token = OwnerToken::new(FACTORY, 7).to_text();
            let [ttl, ..] = numbers;
            for ttl in [ttl, ttl % 86_400_001] {
                let rest: Vec<_> = numbers[1..].iter().map(u64::to_string).collect();
                message(&format!("g p:k {token} {ttl} {}", rest.join(" ")), FACTORY, Some(1));
            }
        }

        #[test]
        fn a_url_is_read_to_the_letter_or_refused_without_repeating_it(
            scheme in prop::sample::select(vec![
                "redis://", "rediss://", "valkey://", "VALKEYS://", "unix://", "redis+unix://", "http://", "",
            ]),
            rest in prop_oneof![
                "\\PC{0,30}",
                "([a-z0-9]{0,4}(:[a-zA-Z#?/%@]{0,12})?@)?[a-z\\[\\]:.]{0,9}(:[0-9]{0,6})?(/[0-9a-z]{0,3})?(\\?[a-z=&]{0,12})?(#[a-z]{0,8})?",
            ],
            username in prop::option::of("[a-z]{8,12}"),
            password in prop::option::of("\\PC{8,12}"),
        ) {
            url(&[scheme, &rest].concat(), username.as_deref(), password.as_deref());
        }
    }

    /// A time that no server has: the sum of its parts is more than a `Duration` holds.
    #[test]
    fn a_published_time_beyond_all_bounds_is_nothing() {
        let token = OwnerToken::new(FACTORY, 7).to_text();
        let most = u64::MAX;
        let grant = |ttl: u64, seconds: u64, micros: u64| {
            message(
                &format!("g p:k {token} {ttl} {seconds} {micros} 0 0 0"),
                FACTORY,
                Some(1),
            )
        };
        assert!(grant(5_000, 1_700_000_000, 999_999).is_some());
        assert!(grant(5_000, most, most).is_none());
        assert!(grant(most, 1, 1).is_none());
    }

    #[test]
    fn a_published_grant_for_another_process_is_nothing() {
        let of = |factory| {
            let token = OwnerToken::new(factory, 7).to_text();
            message(&format!("g p:k {token} 5000 1 1 0 0 0"), FACTORY, None)
        };
        assert!(of(FACTORY).is_some());
        assert!(of(FACTORY + 1).is_none());
    }

    #[test]
    fn a_sentinel_that_names_no_server_has_not_answered() {
        let fields = |fields: &[(&str, &str)]| {
            let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
            let fields = fields
                .iter()
                .flat_map(|(name, field)| [text(name), text(field)]);
            sentinel::answer(Value::Array(fields.collect()))
        };
        let (ip, port, epoch) = (("ip", "10.0.0.1"), ("port", "6379"), ("config-epoch", "7"));
        let answer = fields(&[ip, port, epoch]).ok().unwrap();
        assert_eq!(
            (&*answer.master.host, answer.master.port),
            ("10.0.0.1", 6379)
        );
        for bad in [
            &[epoch, port][..],
            &[ip, epoch],
            &[ip, ("port", "70000"), epoch],
        ] {
            assert!(fields(bad).is_err(), "{bad:?}");
        }
    }
}
