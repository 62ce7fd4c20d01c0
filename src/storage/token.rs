//! Who owns a lock, and how that is written.

use std::{fmt, ops::Deref};

/// Who owns a lock: an id of the factory that took it, 128 random bits, and a number that is new
/// for every attempt.
///
/// Whoever knows a token can free its lock, so `Debug` shows the number alone;
/// [`OwnerToken::to_text`] is what a storage writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerToken {
    /// The bytes of a `u128`. As such it would want an address that 16 divides, and so would all
    /// that has a token in it.
    factory: [u8; 16],
    number: u64,
}

impl OwnerToken {
    pub(crate) fn new(factory: u128, number: u64) -> Self {
        Self {
            factory: factory.to_be_bytes(),
            number,
        }
    }

    /// The token as a storage keeps it: 32 hex digits, `:`, a decimal number.
    ///
    /// ```
    /// use tower_distributed_lock::storage::OwnerToken;
    ///
    /// let token = OwnerToken::from_text("0123456789abcdef0123456789abcdef:7").ok_or("no token")?;
    /// assert_eq!(token.to_text(), "0123456789abcdef0123456789abcdef:7");
    /// assert_eq!(token.inbox(), 0x0123456789abcdef0123456789abcdef);
    /// # Ok::<(), &str>(())
    /// ```
    pub fn to_text(&self) -> String {
        self.text().iter().copied().map(char::from).collect()
    }

    /// The same without an allocation, and without the formatter: it is needed for every command.
    pub(crate) fn text(&self) -> TokenText {
        let mut bytes = [0; TokenText::LONGEST];
        let (factory, rest) = bytes.split_at_mut(32);
        let pairs = factory.as_chunks_mut().0;
        for (pair, byte) in pairs.iter_mut().zip(self.factory) {
            *pair = HEX[usize::from(byte)];
        }
        rest[0] = b':';
        let digits = self.number.checked_ilog10().unwrap_or(0) as usize + 1;
        let mut left = self.number;
        for digit in rest[1..=digits].iter_mut().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
        }
        TokenText {
            bytes,
            length: 33 + digits,
        }
    }

    /// Reads what [`OwnerToken::to_text`] wrote.
    pub fn from_text(text: &str) -> Option<Self> {
        let (factory, number) = text.split_once(':')?;
        Some(Self {
            factory: u128::from_str_radix(factory, 16).ok()?.to_be_bytes(),
            number: number.parse().ok()?,
        })
    }

    /// What tells it from all others of its factory.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Which [`Inbox`](super::Inbox) messages for this owner go to.
    pub fn inbox(&self) -> u128 {
        u128::from_be_bytes(self.factory)
    }
}

/// Each byte in hex. Tokens are written for every call, so it is done two digits at a time.
const HEX: [[u8; 2]; 256] = {
    let digits = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [digits[byte >> 4], digits[byte & 15]];
        byte += 1;
    }
    pairs
};

/// An [`OwnerToken`] as text.
pub(crate) struct TokenText {
    bytes: [u8; Self::LONGEST],
    length: usize,
}

impl TokenText {
    /// The factory's number, a colon and the largest `u64`.
    const LONGEST: usize = 32 + 1 + 20;
}

impl Deref for TokenText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Debug for OwnerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerToken(..:{})", self.number)
    }
}
