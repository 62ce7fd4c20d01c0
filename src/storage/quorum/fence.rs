//! One fencing token out of what the counters of several nodes gave.

use crate::storage::FencingBlock;

/// What the nodes that granted a lock have to be brought to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Agreement {
    /// The tokens, if a majority of the nodes gives higher ones from now on.
    pub(super) block: FencingBlock,
    /// How many nodes do so already.
    pub(super) agree: usize,
    /// The nodes whose counters are lower.
    pub(super) lower: Vec<usize>,
}

impl Agreement {
    /// `granted` has the nodes that granted the lock, and the tokens that each gave. `None` if some
    /// of them do not fence, or gave what was not asked for.
    pub(super) fn of(
        granted: &[(usize, Option<FencingBlock>)],
        count: u32,
        quorum: usize,
    ) -> Option<Self> {
        let sound = |block: &FencingBlock| block.count == count && block.is_sound();
        let blocks: Option<Vec<_>> = granted
            .iter()
            .map(|(node, block)| Some((*node, block.filter(sound)?)))
            .collect();
        let blocks = blocks?;
        let same = |block: FencingBlock| blocks.iter().filter(move |(_, it)| *it == block).count();
        // Numbers of one counter differ, so no two grants can have the same from a majority each.
        let given = blocks.iter().find(|(_, block)| same(*block) >= quorum);
        let highest = blocks.iter().max_by_key(|(_, block)| block.last());
        let (_, block) = *given.or(highest)?;
        let lower = blocks.iter().filter(|(_, it)| it.last() < block.last());
        Some(Self {
            block,
            agree: same(block),
            lower: lower.map(|(node, _)| *node).collect(),
        })
    }
}

/// Whether what was agreed on is written to the nodes: to see a test fail without.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum WriteBack {
    #[default]
    Done,
    LeftOut,
}

#[cfg(test)]
impl WriteBack {
    pub(super) fn apply(self, mut agreement: Agreement) -> Agreement {
        if self == Self::LeftOut {
            agreement.agree = usize::MAX;
        }
        agreement
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(first: u64, count: u32) -> Option<FencingBlock> {
        Some(FencingBlock { first, count })
    }

    fn of(granted: &[Option<FencingBlock>], count: u32) -> Option<(u64, usize, Vec<usize>)> {
        let granted: Vec<_> = granted.iter().copied().enumerate().collect();
        let agreement = Agreement::of(&granted, count, 2)?;
        assert_eq!(agreement.block.count, count);
        Some((agreement.block.first, agreement.agree, agreement.lower))
    }

    #[test]
    fn the_highest_number_is_taken_and_the_others_are_raised() {
        assert_eq!(of(&[block(7, 1), block(9, 1)], 1), Some((9, 1, vec![0])));
        let three = [block(7, 3), block(5, 3), block(6, 3)];
        assert_eq!(of(&three, 3), Some((7, 1, vec![1, 2])));
    }

    #[test]
    fn what_a_majority_gave_needs_no_second_round() {
        assert_eq!(of(&[block(7, 1), block(7, 1)], 1), Some((7, 2, vec![])));
        let three = [block(7, 2), block(9, 2), block(7, 2)];
        assert_eq!(of(&three, 2), Some((7, 2, vec![])));
    }

    #[test]
    fn without_the_word_of_each_there_is_no_token() {
        assert_eq!(of(&[block(7, 1), None], 1), None);
        assert_eq!(of(&[block(7, 2), block(7, 1)], 1), None);
        assert_eq!(of(&[block(FencingBlock::LIMIT, 1), block(1, 1)], 1), None);
    }
}
