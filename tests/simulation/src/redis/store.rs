//! The keys of a server, and the commands about them that a client here uses.

use std::collections::BTreeMap;

use super::resp::Reply;

#[derive(Default)]
pub struct Store {
    values: BTreeMap<Vec<u8>, Entry>,
    /// The server's clock, in microseconds since 1970.
    pub now: u64,
}

struct Entry {
    value: Vec<u8>,
    /// In milliseconds.
    expires: Option<u64>,
}

impl Store {
    /// In milliseconds, in which keys expire.
    fn now_ms(&self) -> u64 {
        self.now / 1_000
    }

    /// Those that are there.
    pub fn keys(&self) -> impl Iterator<Item = &Vec<u8>> {
        let now = self.now_ms();
        let there = self.values.iter().filter(move |(_, it)| it.is_there(now));
        there.map(|(key, _)| key)
    }

    pub fn clear(&mut self) {
        self.values.clear();
    }

    pub fn get(&self, key: &[u8]) -> Option<&Vec<u8>> {
        Some(&self.entry(key)?.value)
    }

    /// From when on a key that is there is no more, in microseconds: Redis keeps it for the whole of its last millisecond.
    pub fn expires(&self, key: &[u8]) -> Option<u64> {
        Some(1_000 * (self.entry(key)?.expires? + 1))
    }

    fn entry(&self, key: &[u8]) -> Option<&Entry> {
        let now = self.now_ms();
        self.values.get(key).filter(|entry| entry.is_there(now))
    }

    /// Carries out a command. `None`: it is none about keys.
    pub fn call(&mut self, words: &[Vec<u8>]) -> Option<Reply> {
        let word = |index: usize| words.get(index).map_or(&b""[..], Vec::as_slice);
        let key = word(1);
        Some(match word(0).to_ascii_uppercase().as_slice() {
            b"GET" => self.get(key).map_or(Reply::Nil, Reply::text),
            b"MGET" => {
                let keys = words[1..].iter();
                let values = keys.map(|key| self.get(key).map_or(Reply::Nil, Reply::text));
                Reply::Array(values.collect())
            }
            b"SET" => self.set(key, word(2), &words[3..]),
            b"DEL" => {
                let deleted = words[1..].iter().filter(|key| {
                    let was_there = self.entry(key).is_some();
                    self.values.remove(*key);
                    was_there
                });
                Reply::Int(deleted.count() as i64)
            }
            b"APPEND" => {
                let mut value = self.get(key).cloned().unwrap_or_default();
                value.extend(word(2));
                let length = value.len();
                self.replace(key, value);
                Reply::Int(length as i64)
            }
            b"INCRBY" => {
                let text = self.get(key).map_or(&b"0"[..], Vec::as_slice);
                let sum = number(text) + number(word(2));
                self.replace(key, sum.to_string().into_bytes());
                Reply::Int(sum)
            }
            b"PEXPIRE" => {
                let expires = self.now_ms() + number(word(2)) as u64;
                match self.entry(key).is_some() {
                    true => {
                        self.values.get_mut(key)?.expires = Some(expires);
                        Reply::Int(1)
                    }
                    false => Reply::Int(0),
                }
            }
            b"PTTL" => Reply::Int(match self.entry(key).map(|entry| entry.expires) {
                None => -2,
                Some(None) => -1,
                Some(Some(expires)) => (expires - self.now_ms()) as i64,
            }),
            b"TIME" => {
                let (seconds, micros) = (self.now / 1_000_000, self.now % 1_000_000);
                let texts = [seconds, micros].map(|number| Reply::text(number.to_string()));
                Reply::Array(texts.into())
            }
            _ => return None,
        })
    }

    fn set(&mut self, key: &[u8], value: &[u8], options: &[Vec<u8>]) -> Reply {
        let old = self.entry(key).map(|entry| entry.expires);
        let mut expires = None;
        let mut options = options.iter();
        while let Some(option) = options.next() {
            match option.as_slice() {
                b"NX" if old.is_some() => return Reply::Nil,
                b"NX" => {}
                b"PX" => {
                    let time = options.next().map_or(0, |time| number(time));
                    assert!(time > 0, "an invalid expire time");
                    expires = Some(self.now_ms() + time as u64);
                }
                b"KEEPTTL" => expires = old.flatten(),
                option => panic!("SET with {:?}", String::from_utf8_lossy(option)),
            }
        }
        let value = value.to_vec();
        self.values.insert(key.to_vec(), Entry { value, expires });
        Reply::Simple("OK")
    }

    /// Another value, and the same expiry.
    fn replace(&mut self, key: &[u8], value: Vec<u8>) {
        let expires = self.entry(key).and_then(|entry| entry.expires);
        self.values.insert(key.to_vec(), Entry { value, expires });
    }
}

impl Entry {
    fn is_there(&self, now: u64) -> bool {
        self.expires.is_none_or(|expires| now <= expires)
    }
}

pub fn number(text: &[u8]) -> i64 {
    let text = std::str::from_utf8(text).unwrap_or_default();
    let number = text.parse();
    number.unwrap_or_else(|_| panic!("{text:?} is no number"))
}
