//! What processes have to say to each other about locks, beside the storage's own messages: as
//! text, in one line.
//!
//! | text | |
//! |---|---|
//! | `? <inbox> <number> <key> ..` | a question: what do you know of these locks? The answer goes to that inbox. |
//! | `! <number> <label> <details> ..` | the answer to it, in the order of its keys |
//! | `x <key> <number>` | the lock that your token with this number had was taken from it by force: look for yourself |
//!
//! Anybody who may send messages can send anything, so what is not exactly this is nothing, and
//! what can be asked at once is bounded, and with it the answer.

use std::{fmt::Write, sync::Arc, time::Duration};

use crate::{
    key::{LockName, decode, encode},
    storage::Message,
};

/// How many locks one question can be about. The longest answer has to fit into one text.
pub(super) const MAX_KEYS: usize = 128;

/// How long a label may be, in bytes.
pub(crate) const MAX_LABEL: usize = 128;

/// What a process knows of a lock that it has or waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Detail {
    /// The number of the token by which it has it.
    pub(crate) lease: Option<u64>,
    /// For how long its present holder has had it. Whole milliseconds.
    pub(crate) held_for: Option<Duration>,
    /// The fencing token of that one.
    pub(crate) fencing: Option<u64>,
    /// How many callers wait for it there.
    pub(crate) callers: usize,
}

/// See the [module documentation](self).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Note {
    Question {
        inbox: u128,
        number: u64,
        names: Vec<LockName>,
    },
    Answer {
        number: u64,
        answer: Answer,
    },
    ForceReleased {
        name: LockName,
        number: u64,
    },
}

/// What a process answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) label: Option<Arc<str>>,
    pub(super) details: Vec<Detail>,
}

impl Note {
    /// Reads a text about locks with this prefix.
    pub(super) fn parse(prefix: &str, text: &str) -> Option<Self> {
        if text.len() > Message::MAX_TEXT {
            return None;
        }
        let mut words = text.split(' ');
        match words.next()? {
            "?" => {
                let inbox = hex(words.next()?, 32)?;
                let number = number_of(words.next()?)?;
                let names = words.map(|key| LockName::of_encoded(prefix, key));
                let names: Vec<_> = names.take(MAX_KEYS + 1).collect::<Option<_>>()?;
                (1..=MAX_KEYS)
                    .contains(&names.len())
                    .then_some(Self::Question {
                        inbox,
                        number,
                        names,
                    })
            }
            "!" => {
                let number = number_of(words.next()?)?;
                let label = label(words.next()?)?;
                let details = words.map(Detail::parse).take(MAX_KEYS + 1);
                let details: Vec<_> = details.collect::<Option<_>>()?;
                let answer = Answer { label, details };
                (answer.details.len() <= MAX_KEYS).then_some(Self::Answer { number, answer })
            }
            "x" => {
                let name = LockName::of_encoded(prefix, words.next()?)?;
                let number = decimal(words.next()?)?;
                words
                    .next()
                    .is_none()
                    .then_some(Self::ForceReleased { name, number })
            }
            _ => None,
        }
    }

    /// What [`Note::parse`] reads.
    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        match self {
            Self::Question {
                inbox,
                number,
                names,
            } => {
                // Writing to a string does not fail.
                let _ = write!(text, "? {inbox:032x} {number:016x}");
                for name in names {
                    text.extend([" ", name.key()]);
                }
            }
            Self::Answer { number, answer } => {
                let _ = write!(text, "! {number:016x} ");
                match &answer.label {
                    Some(label) => text.extend(["=", &encode(label.as_bytes())]),
                    None => text.push('-'),
                }
                answer
                    .details
                    .iter()
                    .for_each(|detail| detail.write(&mut text));
            }
            Self::ForceReleased { name, number } => {
                let _ = write!(text, "x {} {number}", name.key());
            }
        }
        text
    }

    /// Questions about these locks, as many as it takes. `new_number` makes their numbers.
    pub(super) fn questions(
        inbox: u128,
        names: Vec<LockName>,
        mut new_number: impl FnMut() -> u64,
    ) -> Vec<(u64, Vec<LockName>)> {
        let head = Self::Question {
            inbox,
            number: 0,
            names: Vec::new(),
        };
        let head = head.to_text().len();
        let mut questions: Vec<(u64, Vec<LockName>)> = Vec::new();
        let mut length = 0;
        for name in names {
            let more = 1 + name.key().len();
            match questions.last_mut() {
                Some((_, names))
                    if names.len() < MAX_KEYS && length + more <= Message::MAX_TEXT =>
                {
                    length += more;
                    names.push(name);
                }
                _ => {
                    length = head + more;
                    questions.push((new_number(), vec![name]));
                }
            }
        }
        questions
    }
}

impl Detail {
    fn parse(word: &str) -> Option<Self> {
        let mut numbers = word.split(',');
        let mut next = || match numbers.next()? {
            "-" => Some(None),
            number => decimal(number).map(Some),
        };
        let detail = Self {
            lease: next()?,
            held_for: next()?.map(Duration::from_millis),
            fencing: next()?,
            callers: usize::try_from(next()??).ok()?,
        };
        numbers.next().is_none().then_some(detail)
    }

    fn write(&self, text: &mut String) {
        let held_for = self.held_for.map(|it| it.as_millis() as u64);
        let mut before = ' ';
        for number in [
            self.lease,
            held_for,
            self.fencing,
            Some(self.callers as u64),
        ] {
            text.push(std::mem::replace(&mut before, ','));
            match number {
                Some(number) => {
                    let _ = write!(text, "{number}");
                }
                None => text.push('-'),
            }
        }
    }
}

/// `None`: it is none. `Some(None)`: the process has none.
fn label(word: &str) -> Option<Option<Arc<str>>> {
    if word == "-" {
        return Some(None);
    }
    let label = word.strip_prefix('=')?;
    if label.len() > 3 * MAX_LABEL {
        return None;
    }
    let label = String::from_utf8(decode(label)?).ok()?;
    (1..=MAX_LABEL)
        .contains(&label.len())
        .then(|| Some(label.into()))
}

/// The number of a question.
fn number_of(word: &str) -> Option<u64> {
    u64::try_from(hex(word, 16)?).ok()
}

fn hex(word: &str, digits: usize) -> Option<u128> {
    // A sign is read too.
    let is_hex = word.len() == digits && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(word, 16).ok().filter(|_| is_hex)
}

fn decimal(word: &str) -> Option<u64> {
    let is_decimal = word.bytes().all(|byte| byte.is_ascii_digit());
    word.parse().ok().filter(|_| is_decimal)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::{KeyPrefix, LockKey};

    fn name(key: &[u8]) -> LockName {
        KeyPrefix::new("p")
            .unwrap()
            .name(&LockKey::new(key).unwrap())
    }

    fn names() -> impl Strategy<Value = LockName> {
        prop::collection::vec(any::<u8>(), 1..=64).prop_map(|key| name(&key))
    }

    fn details() -> impl Strategy<Value = Detail> {
        type Numbers = (Option<u64>, Option<u64>, Option<u64>, usize);
        any::<Numbers>().prop_map(|(lease, held_for, fencing, callers)| Detail {
            lease,
            held_for: held_for.map(Duration::from_millis),
            fencing,
            callers,
        })
    }

    fn notes() -> impl Strategy<Value = Note> {
        let label = prop::option::of("\\PC{1,32}".prop_map(Arc::from));
        prop_oneof![
            (
                any::<u128>(),
                any::<u64>(),
                prop::collection::vec(names(), 1..=MAX_KEYS)
            )
                .prop_map(|(inbox, number, names)| Note::Question {
                    inbox,
                    number,
                    names
                }),
            (
                any::<u64>(),
                label,
                prop::collection::vec(details(), 0..=MAX_KEYS)
            )
                .prop_map(|(number, label, details)| Note::Answer {
                    number,
                    answer: Answer { label, details }
                }),
            (names(), any::<u64>()).prop_map(|(name, number)| Note::ForceReleased { name, number }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(note in notes()) {
            let text = note.to_text();
            prop_assume!(text.len() <= Message::MAX_TEXT);
            prop_assert!(!text.contains('\n'));
            prop_assert_eq!(Note::parse("p", &text), Some(note));
        }

        #[test]
        fn what_was_not_written_so_is_nothing(text in "[?!x] ([0-9a-f ,=%+-]|\\PC){0,80}") {
            if let Some(note) = Note::parse("p", &text) {
                prop_assert_eq!(Note::parse("p", &note.to_text()), Some(note));
            }
        }

        #[test]
        fn questions_are_short_enough_and_forget_nothing(
            names in prop::collection::vec(names(), 0..400),
            long in 0..40_usize,
        ) {
            let mut names = names;
            names.extend((0..long).map(|_| name(&[0; LockKey::MAX_LEN])));
            let mut numbers = 0..;
            let questions = Note::questions(1, names.clone(), || numbers.next().unwrap());
            let mut asked = Vec::new();
            for (number, names) in questions {
                let question = Note::Question { inbox: 1, number, names: names.clone() };
                prop_assert_eq!(Note::parse("p", &question.to_text()), Some(question));
                asked.extend(names);
            }
            prop_assert_eq!(asked, names);
        }
    }

    #[test]
    fn the_longest_answer_fits_into_one_text() {
        let longest = Detail {
            lease: Some(u64::MAX),
            held_for: Some(Duration::from_millis(u64::MAX)),
            fencing: Some(u64::MAX),
            callers: usize::MAX,
        };
        let answer = Note::Answer {
            number: u64::MAX,
            answer: Answer {
                label: Some("é".repeat(MAX_LABEL / 2).into()),
                details: vec![longest; MAX_KEYS],
            },
        };
        let text = answer.to_text();
        assert!(text.len() <= Message::MAX_TEXT, "{}", text.len());
        assert_eq!(Note::parse("p", &text), Some(answer));
    }

    #[test]
    fn nonsense_is_nothing() {
        let id = "0123456789abcdef0123456789abcdef";
        let number = "0123456789abcdef";
        let crowd = " k".repeat(MAX_KEYS + 1);
        let label = "x".repeat(MAX_LABEL + 1);
        for text in [
            "",
            "?",
            &format!("? {id}"),
            &format!("? {id} {number}"),
            &format!("? {id} {number} "),
            &format!("? {id} {number}{crowd}"),
            &format!("? {id}0 {number} k"),
            &format!("? +{} {number} k", &id[1..]),
            &format!("? {id} 1 k"),
            &format!("? {id} {number} {{k}}"),
            &format!("? {id} {number} %6B"),
            &format!("! {number}"),
            &format!("! {number} shop"),
            &format!("! {number} ="),
            &format!("! {number} ={label}"),
            &format!("! {number} =%FF"),
            &format!("! {number} - 1,2,3"),
            &format!("! {number} - 1,2,3,-"),
            &format!("! {number} - 1,2,3,4,5"),
            &format!("! {number} - +1,2,3,4"),
            "x k",
            "x k 1 2",
            "x k -1",
            "y k 1",
        ] {
            assert_eq!(Note::parse("p", text), None, "{text}");
        }
    }
}
