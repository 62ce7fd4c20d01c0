//! Replies, as they lie in the bytes of a connection.
//!
//! What locks are answered mostly (`OK`, a number, a token, nothing, or a few of these) is read here; redis-rs reads the
//! rest once all of it is there. Its parser can go on in the middle of a reply, which costs each of them several times
//! what a look at a line does.
//!
//! [The protocol](https://redis.io/docs/latest/develop/reference/protocol-spec/), RESP2 and RESP3.

use redis::{ErrorKind, RedisError, Value};

/// How deep arrays may be in each other. Redis's own are in four at the most.
const DEEPEST: usize = 32;

/// The first reply, and how many bytes it has. `None`: not all of it is there.
///
/// # Errors
///
/// It is no reply, and nobody knows where the next one begins.
pub(super) fn first(bytes: &[u8]) -> Result<Option<(Value, usize)>, RedisError> {
    let mut rest = Rest { bytes, at: 0 };
    match rest.value(0) {
        Ok(value) => Ok(Some((value, rest.at))),
        Err(Stop::NotAll) => Ok(None),
        Err(Stop::Malformed) => Err(malformed()),
        Err(Stop::Error(error)) => Err(error),
    }
}

/// What came makes no sense.
pub(super) fn malformed() -> RedisError {
    (ErrorKind::Parse, "no reply of a Redis server").into()
}

/// Why there is no reply.
enum Stop {
    NotAll,
    Malformed,
    Error(RedisError),
}

struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn value(&mut self, depth: usize) -> Result<Value, Stop> {
        let begin = self.at;
        match self.kind()? {
            b'+' => match self.line()? {
                b"OK" => Ok(Value::Okay),
                text => {
                    let text = str::from_utf8(text).map_err(|_| Stop::Malformed)?;
                    Ok(Value::SimpleString(text.into()))
                }
            },
            b':' => Ok(Value::Int(self.number()?)),
            b'$' => Ok(match self.blob()? {
                Some(blob) => Value::BulkString(blob.into()),
                None => Value::Nil,
            }),
            b'_' => match self.line()? {
                b"" => Ok(Value::Nil),
                _ => Err(Stop::Malformed),
            },
            b'*' => {
                let Some(length) = self.length()? else {
                    return Ok(Value::Nil);
                };
                let mut values = Vec::with_capacity(length.min(8));
                for _ in 0..length {
                    values.push(self.value(deeper(depth)?)?);
                }
                Ok(Value::Array(values))
            }
            _ => {
                self.at = begin;
                self.skip(depth)?;
                redis::parse_redis_value(&self.bytes[begin..self.at]).map_err(Stop::Error)
            }
        }
    }

    /// Goes to the end of a value.
    fn skip(&mut self, depth: usize) -> Result<(), Stop> {
        let values = match self.kind()? {
            b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => {
                self.line()?;
                0
            }
            b'$' | b'!' | b'=' => {
                self.blob()?;
                0
            }
            b'*' | b'~' | b'>' => self.length()?.unwrap_or(0),
            kind @ (b'%' | b'|') => {
                let pairs = self.length()?.unwrap_or(0).checked_mul(2);
                // Attributes stand before what they are of.
                let values = pairs.and_then(|pairs| pairs.checked_add(usize::from(kind == b'|')));
                values.ok_or(Stop::Malformed)?
            }
            _ => return Err(Stop::Malformed),
        };
        for _ in 0..values {
            self.skip(deeper(depth)?)?;
        }
        Ok(())
    }

    fn kind(&mut self) -> Result<u8, Stop> {
        let kind = *self.bytes.get(self.at).ok_or(Stop::NotAll)?;
        self.at += 1;
        Ok(kind)
    }

    /// The rest of the line, without its end.
    fn line(&mut self) -> Result<&'a [u8], Stop> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\r');
        let end = end.ok_or(Stop::NotAll)?;
        match rest.get(end + 1) {
            None => Err(Stop::NotAll),
            Some(b'\n') => {
                self.at += end + 2;
                Ok(&rest[..end])
            }
            Some(_) => Err(Stop::Malformed),
        }
    }

    fn number(&mut self) -> Result<i64, Stop> {
        let line = str::from_utf8(self.line()?).map_err(|_| Stop::Malformed)?;
        line.parse().map_err(|_| Stop::Malformed)
    }

    /// `None`: less than none, which is RESP2's word for nothing.
    fn length(&mut self) -> Result<Option<usize>, Stop> {
        Ok(usize::try_from(self.number()?).ok())
    }

    fn blob(&mut self) -> Result<Option<&'a [u8]>, Stop> {
        let Some(length) = self.length()? else {
            return Ok(None);
        };
        let rest = &self.bytes[self.at..];
        let end = length.checked_add(2).ok_or(Stop::Malformed)?;
        let blob = rest.get(..end).ok_or(Stop::NotAll)?;
        let blob = blob.strip_suffix(b"\r\n").ok_or(Stop::Malformed)?;
        self.at += end;
        Ok(Some(blob))
    }
}

fn deeper(depth: usize) -> Result<usize, Stop> {
    match depth {
        DEEPEST => Err(Stop::Malformed),
        depth => Ok(depth + 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::redis::promises;

    /// Replies of all kinds, as a server writes them.
    fn reply() -> impl Strategy<Value = Vec<u8>> {
        let text = "[ -~]{0,12}";
        let blob = || proptest::collection::vec(any::<u8>(), 0..40);
        let line = |kind: &str, text: String| format!("{kind}{text}\r\n").into_bytes();
        let sized = |kind: &str, blob: Vec<u8>| {
            let head = format!("{kind}{}\r\n", blob.len()).into_bytes();
            [head, blob, b"\r\n".to_vec()].concat()
        };
        let leaf = prop_oneof![
            text.prop_map(move |text| line("+", text)),
            "OK|QUEUED".prop_map(move |text| line("+", text)),
            "(ERR|NOSCRIPT|READONLY|MOVED) [ -~]{1,30}".prop_map(move |text| line("-", text)),
            any::<i64>().prop_map(move |number| line(":", number.to_string())),
            blob().prop_map(move |blob| sized("$", blob)),
            "txt:[ -~]{0,20}".prop_map(move |text| sized("=", text.into_bytes())),
            "ERR [ -~]{1,20}".prop_map(move |text| sized("!", text.into_bytes())),
            Just(b"$-1\r\n".to_vec()),
            Just(b"*-1\r\n".to_vec()),
            Just(b"_\r\n".to_vec()),
            Just(b"#t\r\n".to_vec()),
            Just(b",1.25\r\n".to_vec()),
            Just(b"(3492890328409238509324850943850943825024385\r\n".to_vec()),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            let several = |kind: &'static str, each: usize| {
                proptest::collection::vec(inner.clone(), 0..5).prop_map(move |mut values| {
                    values.truncate(values.len() / each * each);
                    let head = format!("{kind}{}\r\n", values.len() / each);
                    [head.into_bytes(), values.concat()].concat()
                })
            };
            prop_oneof![several("*", 1), several("~", 1), several("%", 2)]
        })
    }

    proptest! {
        #[test]
        fn a_reply_is_what_redis_rs_says_it_is(reply in reply(), after in reply()) {
            let expected = redis::parse_redis_value(&reply).unwrap();
            let bytes = [reply.as_slice(), &after].concat();
            prop_assert_eq!(first(&bytes).unwrap(), Some((expected, reply.len())));
        }

        #[test]
        fn a_part_of_a_reply_is_none(reply in reply()) {
            for end in 0..reply.len() {
                prop_assert_eq!(first(&reply[..end]).unwrap(), None, "{} of {}", end, reply.len());
            }
        }

        #[test]
        fn whatever_comes_is_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            promises::frame(&bytes);
        }
    }

    #[test]
    fn what_no_server_says_is_refused() {
        for bytes in [
            &b"hello\r\n"[..],
            b":12a\r\n",
            b"$3\r\nabcd\r\n",
            b"+OK\rx",
            b"_\x91\r\n",
            b"*1\r\n?",
            &b"*1\r\n".repeat(100),
            &b"~1\r\n".repeat(100),
        ] {
            assert!(first(bytes).is_err(), "{:?}", str::from_utf8(bytes));
        }
    }
}
