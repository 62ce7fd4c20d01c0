//! What a client process says of its locks, a line at a time: read back by who watches it.

use std::{
    fmt,
    io::{self, Write as _},
    str::FromStr,
};

/// Nanoseconds on the machine's monotonic clock, which is the same for all of its processes.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// How a stay under a lock ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The lock was the holder's to the end, as `unlock` said.
    Held,
    /// The holder was told that it was not, by the guard or by `unlock`.
    Told,
    /// Nobody could say.
    Unknown,
}

/// What became of a write that was made of an earlier read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Nobody else had written in between.
    Kept,
    /// So many writes of others were overwritten, the last of them by this stay.
    Lost { writes: u64, last: String },
    /// A later holder had been there.
    Refused,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A lock was asked for and given.
    In {
        stay: String,
        key: String,
        asked: u64,
        granted: u64,
        token: u64,
        /// What the guard said right after it was given.
        held: bool,
    },
    /// The guard said that the lock is held, at a moment after this one.
    Still {
        stay: String,
        at: u64,
    },
    /// A write; `held` is what the guard said after it was confirmed.
    Wrote {
        stay: String,
        write: Write,
        held: bool,
    },
    Out {
        stay: String,
        left: u64,
        end: End,
    },
    /// Somebody did not get the lock: an error, or the time that it wanted to wait.
    Not {
        why: String,
    },
    /// The process has drained its factory; so many keys were left.
    Drained {
        keys: usize,
    },
}

impl Line {
    /// In one write, so that a killed process leaves whole lines.
    pub fn say(&self) {
        let mut out = io::stdout().lock();
        out.write_all(format!("{self}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In {
                stay,
                key,
                asked,
                granted,
                token,
                held,
            } => write!(f, "in {stay} {key} {asked} {granted} {token} {held}"),
            Self::Still { stay, at } => write!(f, "still {stay} {at}"),
            Self::Wrote { stay, write, held } => match write {
                Write::Kept => write!(f, "kept {stay} {held}"),
                Write::Lost { writes, last } => write!(f, "lost {stay} {held} {writes} {last}"),
                Write::Refused => write!(f, "refused {stay} {held}"),
            },
            Self::Out { stay, left, end } => write!(f, "out {stay} {left} {end:?}"),
            Self::Not { why } => write!(f, "not {why}"),
            Self::Drained { keys } => write!(f, "drained {keys}"),
        }
    }
}

impl FromStr for Line {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<_> = line.split(' ').collect();
        let number = |text: &str| text.parse::<u64>().map_err(|_| line.to_owned());
        let wrote = |stay: &str, held: &str, write| Self::Wrote {
            stay: stay.to_owned(),
            write,
            held: held == "true",
        };
        Ok(match words[..] {
            ["in", stay, key, asked, granted, token, held] => Self::In {
                stay: stay.to_owned(),
                key: key.to_owned(),
                asked: number(asked)?,
                granted: number(granted)?,
                token: number(token)?,
                held: held == "true",
            },
            ["still", stay, at] => Self::Still {
                stay: stay.to_owned(),
                at: number(at)?,
            },
            ["kept", stay, held] => wrote(stay, held, Write::Kept),
            ["refused", stay, held] => wrote(stay, held, Write::Refused),
            ["lost", stay, held, writes, last] => {
                let (writes, last) = (number(writes)?, last.to_owned());
                wrote(stay, held, Write::Lost { writes, last })
            }
            ["out", stay, left, end] => Self::Out {
                stay: stay.to_owned(),
                left: number(left)?,
                end: match end {
                    "Held" => End::Held,
                    "Told" => End::Told,
                    "Unknown" => End::Unknown,
                    _ => return Err(line.to_owned()),
                },
            },
            ["not", why] => Self::Not {
                why: why.to_owned(),
            },
            ["drained", keys] => Self::Drained {
                keys: number(keys)? as usize,
            },
            _ => return Err(line.to_owned()),
        })
    }
}
