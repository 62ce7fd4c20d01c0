//! Slots of Redis Cluster: which one a lock is in, and the names of what lies beside it.
//!
//! A lock's queue has the lock's name in braces, so it is in the same slot. The fencing counter is not
//! one for each lock but one for each slot: `{prefix:N}:fence`, where `N` is the lowest number that
//! brings it there. The order of tokens matters for each lock alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::key::LockName;

/// How many slots there are.
pub(super) const SLOTS: usize = 16_384;

/// The slot of a key without braces, or of what is between them.
pub(super) fn slot(key: &str) -> u16 {
    crc(0, key.as_bytes()) % SLOTS as u16
}

/// CRC-16 as in XMODEM, continued from `crc`.
fn crc(crc: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(crc, |crc, &byte| {
        (crc << 8) ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)]
    })
}

const TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            let carry = crc & 0x8000 != 0;
            crc <<= 1;
            if carry {
                crc ^= 0x1021;
            }
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// The names of the fencing counters, one for each slot, for each prefix in use.
#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<HashMap<Arc<str>, Numbers>>);

/// Which number brings a name into which slot.
#[derive(Debug)]
struct Numbers {
    /// All lower numbers have been tried.
    next: u32,
    /// One more than the number; 0 where it is not known yet.
    of_slot: Vec<u32>,
}

impl Counters {
    /// The counter of the lock's slot.
    pub(super) fn of(&self, name: &LockName) -> String {
        let prefix = name.prefix();
        let number = {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !known.contains_key(prefix) {
                let numbers = Numbers {
                    next: 0,
                    of_slot: vec![0; SLOTS],
                };
                known.insert(prefix.into(), numbers);
            }
            known
                .get_mut(prefix)
                .map_or(0, |numbers| numbers.find(prefix, slot(name.as_str())))
        };
        format!("{{{prefix}:{number}}}:fence")
    }
}

impl Numbers {
    fn find(&mut self, prefix: &str, slot: u16) -> u32 {
        let prefix = crc(crc(0, prefix.as_bytes()), b":");
        // It ends: behind any prefix, the numbers with six digits reach all slots.
        while self.of_slot[usize::from(slot)] == 0 {
            let found = crc(prefix, self.next.to_string().as_bytes()) % SLOTS as u16;
            self.next += 1;
            let number = &mut self.of_slot[usize::from(found)];
            if *number == 0 {
                *number = self.next;
            }
        }
        self.of_slot[usize::from(slot)] - 1
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::key::{KeyPrefix, LockKey};

    #[test]
    fn slots_are_those_of_the_specification() {
        // From the specification of Redis Cluster.
        assert_eq!(crc(0, b"123456789"), 0x31C3);
        assert_eq!(slot("123456789"), 0x31C3);
    }

    #[test]
    fn the_numbers_with_six_digits_reach_all_slots_behind_any_prefix() {
        let sum = |number: u32| crc(0, number.to_string().as_bytes()) % SLOTS as u16;
        let slots: HashSet<_> = (100_000..1_000_000).map(sum).collect();
        // A prefix changes the sums of all names with as many bytes behind it by the same bits.
        assert_eq!(slots.len(), SLOTS);
    }

    #[test]
    fn each_slot_has_a_counter_of_its_own_and_in_it() {
        let prefixes = ["distributed-locks", "a", &"9".repeat(64)];
        for prefix in prefixes {
            let counters = Counters::default();
            let prefix = KeyPrefix::new(prefix).unwrap();
            let mut names = HashSet::new();
            for key in 0..200_000 {
                let name = prefix.name(&LockKey::new(key.to_string()).unwrap());
                let counter = counters.of(&name);
                let tag = counter.strip_prefix('{').unwrap();
                let (tag, _) = tag.split_once('}').unwrap();
                assert_eq!(slot(tag), slot(name.as_str()));
                names.insert(counter);
            }
            assert!(names.len() <= SLOTS && names.len() > SLOTS * 99 / 100);
        }
    }

    /// As the specification has it: what is between the first `{` and the first `}` after it counts,
    /// if there is anything.
    fn slot_of_any(key: &str) -> u16 {
        let tag = key.split_once('{').and_then(|(_, rest)| {
            let (tag, _) = rest.split_once('}')?;
            (!tag.is_empty()).then_some(tag)
        });
        slot(tag.unwrap_or(key))
    }

    proptest! {
        #[test]
        fn all_that_belongs_to_a_lock_is_in_its_slot(
            prefix in "[A-Za-z0-9_./-]{1,64}",
            key in proptest::collection::vec(
                prop_oneof![any::<u8>(), proptest::sample::select(b"{}:%/\0\n".to_vec())],
                1..=64,
            ),
        ) {
            let name = KeyPrefix::new(&prefix).unwrap().name(&LockKey::new(key).unwrap());
            let expected = slot(name.as_str());
            prop_assert_eq!(slot_of_any(name.as_str()), expected);
            prop_assert_eq!(slot_of_any(&name.companion("queue")), expected);
            prop_assert_eq!(slot_of_any(&Counters::default().of(&name)), expected);
        }
    }

    #[test]
    fn the_counter_of_a_slot_is_the_same_in_all_processes() {
        let prefix = KeyPrefix::default();
        let names: Vec<_> = (0..100)
            .map(|key| prefix.name(&LockKey::new(key.to_string()).unwrap()))
            .collect();
        let (one, other) = (Counters::default(), Counters::default());
        let forward: Vec<_> = names.iter().map(|name| one.of(name)).collect();
        let backward: Vec<_> = names.iter().rev().map(|name| other.of(name)).collect();
        assert!(forward.iter().eq(backward.iter().rev()));
    }
}
