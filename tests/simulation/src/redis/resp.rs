//! The protocol of Redis (RESP3), as far as a client here speaks it.

/// What a server says.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Simple(&'static str),
    Error(String),
    Int(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    Push(Vec<Reply>),
}

impl Reply {
    pub fn text(text: impl AsRef<[u8]>) -> Self {
        Self::Bulk(text.as_ref().to_vec())
    }

    pub fn error(text: &str) -> Self {
        Self::Error(text.to_owned())
    }

    /// Adds what is sent.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut head =
            |sign: char, rest: &str| out.extend(format!("{sign}{rest}\r\n").into_bytes());
        match self {
            Self::Simple(text) => head('+', text),
            Self::Error(text) => head('-', text),
            Self::Int(number) => head(':', &number.to_string()),
            Self::Nil => head('_', ""),
            Self::Bulk(bytes) => {
                head('$', &bytes.len().to_string());
                out.extend(bytes);
                out.extend(b"\r\n");
            }
            Self::Array(items) => {
                head('*', &items.len().to_string());
                items.iter().for_each(|item| item.write(out));
            }
            Self::Push(items) => {
                head('>', &items.len().to_string());
                items.iter().for_each(|item| item.write(out));
            }
            Self::Map(pairs) => {
                head('%', &pairs.len().to_string());
                for (key, value) in pairs {
                    key.write(out);
                    value.write(out);
                }
            }
        }
    }
}

/// Takes a command off the front of what has come. `None`: it has not come to its end.
pub fn take_command(bytes: &mut Vec<u8>) -> Option<Vec<Vec<u8>>> {
    let mut at = 0;
    let count = number_after(b'*', bytes, &mut at)?;
    let mut words = Vec::new();
    for _ in 0..count {
        let length = number_after(b'$', bytes, &mut at)?;
        words.push(bytes.get(at..at + length)?.to_vec());
        at += length + 2;
    }
    if at > bytes.len() {
        return None;
    }
    bytes.drain(..at);
    Some(words)
}

/// A line of a sign and a number.
fn number_after(sign: u8, bytes: &[u8], at: &mut usize) -> Option<usize> {
    let rest = bytes.get(*at..)?;
    let end = rest.iter().position(|byte| *byte == b'\r')?;
    assert_eq!(rest[0], sign, "the client makes no sense");
    let number = std::str::from_utf8(&rest[1..end]).unwrap();
    *at += end + 2;
    Some(number.parse().unwrap())
}
