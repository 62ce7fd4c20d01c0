//! What may be locked, and how it is written in the storage.

use std::{
    collections::BTreeSet,
    fmt,
    hash::{Hash, Hasher},
    str::FromStr,
    sync::Arc,
};

use crate::{
    error::{InvalidKey, InvalidSettings},
    text::{Draft, Text},
};

/// What a lock is about: `orders/42`, `account:17`.
///
/// Anything from 1 to [`LockKey::MAX_LEN`] bytes can be a key. Equal bytes are the same lock in
/// every process that uses the same storage and prefix.
///
/// # Encoding
///
/// A lock is stored under the name `prefix:key`. Three rules keep apart what is meant to be apart,
/// whatever a client sends:
///
/// - Every byte of a key that is not plain ASCII is percent-encoded, and so are `%` itself and the
///   braces `{` and `}` (braces choose the slot of a key in Redis Cluster). So different keys have
///   different names.
/// - A prefix holds no `:`, so a name has one reading: no key under one prefix equals a key under
///   another.
/// - [`LockKey::from_parts`] encodes `/` inside a part, so `["a/b", "c"]` and `["a", "b/c"]`
///   differ.
///
/// Keys of letters, digits and the usual separators are stored as they are: the key `orders/42` is
/// the Redis key `distributed-locks:orders/42`, and a client in another language can use that name.
///
/// ```
/// use tower_distributed_lock::LockKey;
///
/// assert_eq!(LockKey::new("orders/42")?.as_str(), "orders/42");
/// assert_eq!(LockKey::new("naïve {key}")?.as_str(), "na%C3%AFve%20%7Bkey%7D");
/// assert!(LockKey::new("").is_err());
/// # Ok::<(), tower_distributed_lock::error::InvalidKey>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LockKey(Text);

impl LockKey {
    /// The longest key, in bytes before encoding.
    pub const MAX_LEN: usize = 1024;

    /// Makes a key of text or bytes.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if `key` is empty or longer than [`LockKey::MAX_LEN`].
    pub fn new(key: impl AsRef<[u8]>) -> Result<Self, InvalidKey> {
        let key = key.as_ref();
        check_len(key.len())?;
        Ok(Self(encoded(key)))
    }

    /// Makes a key of several parts, joined by `/`, so that no two lists of parts give the same
    /// key. Use this where parts come from a client: `/` inside a part is encoded.
    ///
    /// ```
    /// use tower_distributed_lock::LockKey;
    ///
    /// let key = LockKey::from_parts(["tenants", "a/b", "orders", "42"])?;
    /// assert_eq!(key.as_str(), "tenants/a%2Fb/orders/42");
    /// # Ok::<(), tower_distributed_lock::error::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if all parts together are empty or, with their separators, longer than
    /// [`LockKey::MAX_LEN`].
    pub fn from_parts<P: AsRef<[u8]>>(
        parts: impl IntoIterator<Item = P>,
    ) -> Result<Self, InvalidKey> {
        let mut encoded = Draft::new();
        let mut len = 0;
        for (index, part) in parts.into_iter().enumerate() {
            if index > 0 {
                encoded.push_str("/");
                len += 1;
            }
            len += part.as_ref().len();
            if len > Self::MAX_LEN {
                break;
            }
            push(&mut encoded, part.as_ref(), |byte| {
                is_plain(byte) && byte != b'/'
            });
        }
        check_len(len)?;
        Ok(Self(encoded.finish()))
    }

    /// Takes a key as it is stored, as [`LockKey::as_str`] and the dashboard's JSON have it, and does
    /// not encode it again.
    ///
    /// ```
    /// use tower_distributed_lock::LockKey;
    ///
    /// let key = LockKey::new("50%")?;
    /// assert_eq!(LockKey::from_encoded(key.as_str())?, key);
    /// assert_ne!(LockKey::new(key.as_str())?, key);
    /// # Ok::<(), tower_distributed_lock::error::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if no key is stored like that.
    pub fn from_encoded(encoded: impl AsRef<str>) -> Result<Self, InvalidKey> {
        let encoded = encoded.as_ref();
        check_encoded(encoded)?;
        Ok(Self(encoded.into()))
    }

    /// The key as it is stored: [encoded](LockKey#encoding), without the prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_len(len: usize) -> Result<(), InvalidKey> {
    match len {
        0 => Err(InvalidKey::Empty),
        1..=LockKey::MAX_LEN => Ok(()),
        _ => Err(InvalidKey::TooLong),
    }
}

fn check_encoded(encoded: &str) -> Result<(), InvalidKey> {
    if encoded.len() > 3 * LockKey::MAX_LEN {
        return Err(InvalidKey::TooLong);
    }
    let bytes = decode(encoded).ok_or(InvalidKey::NotEncoded)?;
    check_len(bytes.len())
}

/// Bytes in the characters of a key.
pub(crate) fn encode(bytes: &[u8]) -> String {
    String::from(&*encoded(bytes))
}

fn encoded(bytes: &[u8]) -> Text {
    let mut encoded = Draft::new();
    push(&mut encoded, bytes, is_plain);
    encoded.finish()
}

/// The bytes of a key, or of what [`encode`] made. `None` if neither has made it: what need not be
/// encoded is not, but for the `/` inside a part.
pub(crate) fn decode(encoded: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    };
    let mut bytes = encoded.bytes();
    let mut decoded = Vec::with_capacity(encoded.len());
    while let Some(byte) = bytes.next() {
        let is_encoded = byte == b'%';
        let byte = match is_encoded {
            true => digit(bytes.next()?)? << 4 | digit(bytes.next()?)?,
            false => byte,
        };
        if is_encoded == is_plain(byte) && !(is_encoded && byte == b'/') {
            return None;
        }
        decoded.push(byte);
    }
    Some(decoded)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'%' | b'{' | b'}')
}

fn push(encoded: &mut Draft, bytes: &[u8], is_plain: impl Fn(u8) -> bool) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    // Mostly all of it is plain.
    if bytes.iter().all(|&byte| is_plain(byte))
        && let Ok(text) = str::from_utf8(bytes)
    {
        return encoded.push_str(text);
    }
    for &byte in bytes {
        if is_plain(byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push('%');
            encoded.push(char::from(HEX[usize::from(byte >> 4)]));
            encoded.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

impl fmt::Debug for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockKey({})", &*self.0)
    }
}

impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for LockKey {
    type Err = InvalidKey;

    fn from_str(key: &str) -> Result<Self, InvalidKey> {
        Self::new(key)
    }
}

impl TryFrom<&str> for LockKey {
    type Error = InvalidKey;

    fn try_from(key: &str) -> Result<Self, InvalidKey> {
        Self::new(key)
    }
}

impl TryFrom<String> for LockKey {
    type Error = InvalidKey;

    fn try_from(key: String) -> Result<Self, InvalidKey> {
        Self::new(key)
    }
}

impl TryFrom<&String> for LockKey {
    type Error = InvalidKey;

    fn try_from(key: &String) -> Result<Self, InvalidKey> {
        Self::new(key)
    }
}

/// A key is cheap to clone, so what takes one takes a borrowed one, too.
impl From<&LockKey> for LockKey {
    fn from(key: &LockKey) -> Self {
        key.clone()
    }
}

/// The key as it is [stored](LockKey::as_str).
impl AsRef<str> for LockKey {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

/// Some keys, each once, in their order. At least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LockKeys(Arc<[LockKey]>);

impl LockKeys {
    pub(crate) const MAX_LEN: usize = 64;

    pub(crate) fn new<K>(keys: impl IntoIterator<Item = K>) -> Result<Self, InvalidKey>
    where
        K: TryInto<LockKey>,
        InvalidKey: From<K::Error>,
    {
        let mut unique = BTreeSet::new();
        for key in keys {
            unique.insert(key.try_into()?);
            if unique.len() > Self::MAX_LEN {
                return Err(InvalidKey::TooMany);
            }
        }
        if unique.is_empty() {
            return Err(InvalidKey::NoKeys);
        }
        Ok(Self(unique.into_iter().collect()))
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, LockKey> {
        self.0.iter()
    }

    /// The key, if it is one alone.
    pub(crate) fn single(&self) -> Option<&LockKey> {
        match &*self.0 {
            [key] => Some(key),
            _ => None,
        }
    }
}

/// The first part of a lock's name in the storage, before the `:`.
///
/// 1 to 64 ASCII letters, digits, `-`, `_`, `.` or `/`. Services that must not see each other's
/// locks on one Redis use different prefixes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyPrefix(Arc<str>);

impl KeyPrefix {
    pub(crate) const DEFAULT: &str = "distributed-locks";

    pub(crate) fn new(prefix: &str) -> Result<Self, InvalidSettings> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
        if (1..=64).contains(&prefix.len()) && prefix.bytes().all(plain) {
            Ok(Self(prefix.into()))
        } else {
            Err(InvalidSettings::KeyPrefix)
        }
    }

    pub(crate) fn text(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    pub(crate) fn name(&self, key: &LockKey) -> LockName {
        let mut name = Draft::new();
        name.push_str(&self.0);
        name.push_str(":");
        name.push_str(&key.0);
        LockName {
            key_at: self.0.len() + 1,
            name: name.finish(),
        }
    }
}

impl Default for KeyPrefix {
    fn default() -> Self {
        Self(Self::DEFAULT.into())
    }
}

/// The full name of a lock in a storage: `prefix:key`, encoded. A [`LockStorage`](crate::storage::LockStorage) is asked by
/// it; [`LockKey`] is the part that users choose.
///
/// A storage finds it in each request, and an [`Inbox`](crate::storage::Inbox) makes it of what comes in a message:
///
/// ```
/// use tower_distributed_lock::storage::Inbox;
///
/// let inbox = Inbox::new(7, "shop".into(), |_message| {});
/// let name = inbox.name("shop:orders/42").ok_or("a lock of another factory")?;
/// assert_eq!(name.as_str(), "shop:orders/42");
/// assert_eq!((name.prefix(), name.key()), ("shop", "orders/42"));
/// assert_eq!(name.companion("queue"), "{shop:orders/42}:queue");
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct LockName {
    name: Text,
    key_at: usize,
}

impl LockName {
    /// The whole name, under which the lock is stored, as in the [example](Self).
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// The [key](LockKey) alone, encoded, without the prefix.
    pub fn key(&self) -> &str {
        &self.name[self.key_at..]
    }

    /// The [prefix](crate::LockFactoryBuilder::key_prefix) alone.
    pub fn prefix(&self) -> &str {
        &self.name[..self.key_at - 1]
    }

    /// The name of something that belongs to this lock, as the `queue` in the [example](Self):
    /// `{prefix:key}:what`. The braces put it into the lock's own slot in Redis Cluster, and no lock
    /// has a name with braces.
    pub fn companion(&self, what: &str) -> String {
        ["{", &self.name, "}:", what].concat()
    }

    pub(crate) fn to_key(&self) -> LockKey {
        LockKey(self.key().into())
    }

    pub(crate) fn parse(prefix: &str, name: &str) -> Option<Self> {
        let key = name.strip_prefix(prefix)?.strip_prefix(':')?;
        (!key.is_empty()).then(|| Self {
            key_at: prefix.len() + 1,
            name: name.into(),
        })
    }

    /// The same, if a [`LockKey`] can have that name.
    pub(crate) fn parse_encoded(prefix: &str, name: &str) -> Option<Self> {
        Self::parse(prefix, name).filter(|name| check_encoded(name.key()).is_ok())
    }

    /// The name of a key, as it is stored.
    pub(crate) fn of_encoded(prefix: &str, key: &str) -> Option<Self> {
        Self::parse_encoded(prefix, &[prefix, ":", key].concat())
    }
}

// Two names of one text are equal, so the text is enough.
impl Hash for LockName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockName({})", &*self.name)
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Undoes the encoding, to show that nothing is lost by it.
    fn decode(encoded: &str) -> Vec<u8> {
        let mut bytes = encoded.bytes();
        let mut out = Vec::new();
        while let Some(byte) = bytes.next() {
            if byte == b'%' {
                let hex = [bytes.next().unwrap(), bytes.next().unwrap()];
                out.push(u8::from_str_radix(str::from_utf8(&hex).unwrap(), 16).unwrap());
            } else {
                out.push(byte);
            }
        }
        out
    }

    proptest! {
        #[test]
        fn every_key_can_be_read_back_from_its_name(key in prop::collection::vec(any::<u8>(), 1..80)) {
            let encoded = LockKey::new(&key).unwrap();
            prop_assert_eq!(super::decode(encoded.as_str()), Some(key.clone()));
            prop_assert_eq!(decode(encoded.as_str()), key);
            let plain = |byte: u8| byte.is_ascii_graphic() && !b"{}".contains(&byte);
            prop_assert!(encoded.as_str().bytes().all(plain));
            prop_assert_eq!(LockKey::from_encoded(encoded.as_str()), Ok(encoded));
        }

        #[test]
        fn what_is_taken_as_it_is_stored_is_what_some_parts_are_stored_as(
            encoded in "([a/%{é]|%[0-9A-Fa-f]{2}){1,6}",
        ) {
            if let Ok(key) = LockKey::from_encoded(&encoded) {
                prop_assert_eq!(key.as_str(), &*encoded);
                let parts = encoded.split('/').map(decode);
                prop_assert_eq!(LockKey::from_parts(parts), Ok(key));
            }
        }

        #[test]
        fn different_lists_of_parts_are_different_keys(
            a in prop::collection::vec("[a/%{]{0,3}", 1..4),
            b in prop::collection::vec("[a/%{]{0,3}", 1..4),
        ) {
            if let (Ok(left), Ok(right)) = (LockKey::from_parts(&a), LockKey::from_parts(&b)) {
                prop_assert_eq!(left == right, a == b);
            }
        }

        #[test]
        fn a_name_belongs_to_one_prefix_and_one_key(
            a in ("[a./]{1,3}", "[a:./]{1,4}"),
            b in ("[a./]{1,3}", "[a:./]{1,4}"),
        ) {
            let name = |(prefix, key): &(String, String)| {
                KeyPrefix::new(prefix).unwrap().name(&LockKey::new(key).unwrap())
            };
            prop_assert_eq!(name(&a) == name(&b), a == b);
        }
    }

    #[test]
    fn a_name_is_made_of_its_parts_and_read_back() {
        let key = LockKey::new("a:b%").unwrap();
        let name = KeyPrefix::new("shop").unwrap().name(&key);
        assert_eq!((name.prefix(), name.key()), ("shop", "a:b%25"));
        assert_eq!(name.companion("queue"), "{shop:a:b%25}:queue");
        assert_eq!(format!("{name} {name:?} {key:?}"), {
            "shop:a:b%25 LockName(shop:a:b%25) LockKey(a:b%25)"
        });
        for read in [
            LockName::parse("shop", name.as_str()),
            LockName::parse_encoded("shop", name.as_str()),
            LockName::of_encoded("shop", key.as_str()),
        ] {
            let read = read.unwrap();
            assert_eq!((read.prefix(), read.key()), ("shop", "a:b%25"));
            assert_eq!(read, name);
        }
        for other in ["shop:", "shop", "shops:a", "sho:a", "a"] {
            assert_eq!(LockName::parse("shop", other), None, "{other}");
        }
        assert_eq!(LockName::parse_encoded("shop", "shop:a b"), None);
    }

    #[test]
    fn one_key_is_known_to_be_alone() {
        let keys = |keys: &[&str]| LockKeys::new(keys.iter().copied()).unwrap();
        assert_eq!(keys(&["a", "a"]).single(), LockKey::new("a").ok().as_ref());
        assert_eq!(keys(&["a", "b"]).single(), None);
    }

    #[test]
    fn keys_are_bounded() {
        assert_eq!(LockKey::new(""), Err(InvalidKey::Empty));
        assert_eq!(LockKey::from_parts([""; 1]), Err(InvalidKey::Empty));
        assert!(LockKey::new("x".repeat(LockKey::MAX_LEN)).is_ok());
        assert_eq!(
            LockKey::new("x".repeat(LockKey::MAX_LEN + 1)),
            Err(InvalidKey::TooLong)
        );
        let parts = std::iter::repeat_n("part", LockKey::MAX_LEN);
        assert_eq!(LockKey::from_parts(parts), Err(InvalidKey::TooLong));
    }

    #[test]
    fn several_keys_are_sorted_and_each_is_there_once() {
        let keys = |keys: &[&str]| {
            let keys = LockKeys::new(keys.iter().copied())?;
            Ok(keys.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(keys(&["b", "a", "b"]), Ok(vec!["a".into(), "b".into()]));
        assert_eq!(keys(&[]), Err(InvalidKey::NoKeys));
        assert_eq!(keys(&["a", ""]), Err(InvalidKey::Empty));

        let many = |count: usize| LockKeys::new((0..count).map(|number| number.to_string()));
        assert!(many(LockKeys::MAX_LEN).is_ok());
        assert_eq!(many(LockKeys::MAX_LEN + 1), Err(InvalidKey::TooMany));
    }

    #[test]
    fn what_no_key_is_stored_as_is_refused() {
        assert_eq!(LockKey::from_encoded(""), Err(InvalidKey::Empty));
        for bad in ["%", "%4", "%zz", "%41", "%c3%a9", "a b", "{a}", "é", "a%"] {
            let key = LockKey::from_encoded(bad);
            assert_eq!(key, Err(InvalidKey::NotEncoded), "{bad}");
        }
        let longest = "%00".repeat(LockKey::MAX_LEN);
        assert!(LockKey::from_encoded(&longest).is_ok());
        for bad in [longest + "x", "x".repeat(LockKey::MAX_LEN + 1)] {
            assert_eq!(LockKey::from_encoded(bad), Err(InvalidKey::TooLong));
        }
    }

    #[test]
    fn text_and_keys_become_keys_whether_borrowed_or_not() {
        let key = LockKey::new("50%").unwrap();
        let text = String::from("50%");
        assert_eq!(LockKey::try_from(&text), Ok(key.clone()));
        assert_eq!(LockKey::try_from(text), Ok(key.clone()));
        // Not encoded once more.
        assert_eq!(LockKey::from(&key), key);
        assert_eq!(LockKey::from_encoded(&key), Ok(key));
    }

    #[test]
    fn a_prefix_with_a_separator_is_refused() {
        for bad in ["", "a:b", "a b", "{a}", "ä", &"x".repeat(65)] {
            assert_eq!(
                KeyPrefix::new(bad),
                Err(InvalidSettings::KeyPrefix),
                "{bad}"
            );
        }
    }

    #[test]
    fn plain_keys_keep_their_spelling() {
        let name = KeyPrefix::default().name(&LockKey::new("order:42").unwrap());
        assert_eq!(name.as_str(), "distributed-locks:order:42");
        assert_eq!(name.key(), "order:42");
    }
}
