//! Fencing tokens as they come with a grant.

/// Fencing tokens that came with a [grant](super::AcquireReply::Granted): consecutive numbers, to be used in their order.
///
/// A block is for the holders of one process that share a grant, one after the other. They need no
/// word with the storage between them, yet each has a token of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FencingBlock {
    /// The lowest of them.
    pub first: u64,
    /// How many they are. At least 1.
    pub count: u32,
}

impl FencingBlock {
    /// Tokens are below this: a number that JSON, Lua and signed SQL columns hold exactly.
    pub const LIMIT: u64 = 1 << 53;

    /// The highest of them.
    pub(crate) fn last(&self) -> u64 {
        self.first
            .saturating_add(u64::from(self.count))
            .saturating_sub(1)
    }

    /// Takes the lowest token out of the block.
    pub(crate) fn take(&mut self) -> Option<u64> {
        self.count = self.count.checked_sub(1)?;
        let token = self.first;
        self.first = self.first.saturating_add(1);
        Some(token)
    }

    /// Whether it is what the contract of a storage asks for.
    pub(crate) fn is_sound(&self) -> bool {
        let end = self.first.checked_add(u64::from(self.count));
        self.count > 0 && end.is_some_and(|end| end <= Self::LIMIT)
    }
}

#[cfg(test)]
mod tests {
    use super::FencingBlock;

    #[test]
    fn a_block_gives_each_of_its_tokens_once_and_in_order() {
        let mut block = FencingBlock { first: 7, count: 3 };
        let tokens = [(); 5].map(|()| block.take());
        assert_eq!(tokens, [Some(7), Some(8), Some(9), None, None]);
    }
}
