//! Which node of a cluster has which slot, as its nodes tell it.

use redis::Value;

use super::slot::{SLOTS, slot};
use crate::key::LockName;

/// Where a node is: host and port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Address(pub(super) String, pub(super) u16);

/// Which node has which slot.
#[derive(Clone, Debug)]
pub(super) struct Map {
    /// Nodes that have slots.
    pub(super) masters: Vec<Address>,
    /// By slot, which of them; none if the number is too high.
    owners: Vec<u16>,
    /// Grows with each look at the cluster.
    pub(super) version: u64,
}

impl Map {
    /// `owners`: by slot.
    pub(super) fn new(owners: &[Option<&Address>], version: u64) -> Self {
        let mut masters: Vec<Address> = Vec::new();
        let number = |owner: &Option<&Address>| {
            let Some(owner) = *owner else {
                return u16::MAX;
            };
            let known = masters.iter().position(|master| master == owner);
            let number = known.unwrap_or_else(|| {
                masters.push(owner.clone());
                masters.len() - 1
            });
            number as u16
        };
        let owners = owners.iter().map(number).collect();
        Self {
            masters,
            owners,
            version,
        }
    }

    pub(super) fn owner_of(&self, name: &LockName) -> Option<&Address> {
        self.owner(slot(name.as_str()))
    }

    /// Who has the slot.
    pub(super) fn owner(&self, slot: u16) -> Option<&Address> {
        let owner = *self.owners.get(usize::from(slot))?;
        self.masters.get(usize::from(owner))
    }

    /// Which of the masters it is.
    pub(super) fn number_of(&self, master: &Address) -> Option<u16> {
        let number = self.masters.iter().position(|known| known == master)?;
        Some(number as u16)
    }

    /// The slot is that master's now.
    pub(super) fn give(&mut self, slot: u16, owner: u16) {
        if let Some(known) = self.owners.get_mut(usize::from(slot)) {
            *known = owner;
        }
    }
}

/// Some slots and the node that has them.
pub(super) struct Range {
    first: u16,
    last: u16,
    owner: Address,
}

/// One element of the answer to `CLUSTER SLOTS`: the first slot, the last, the master, its replicas.
pub(super) fn range(value: &Value, asked: &Address) -> Option<Range> {
    let Value::Array(parts) = value else {
        return None;
    };
    let number = |value: &Value| match value {
        Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    };
    let [first, last, Value::Array(master), ..] = &parts[..] else {
        return None;
    };
    let host = match master.first()? {
        Value::BulkString(host) if !host.is_empty() => String::from_utf8(host.clone()).ok()?,
        // The one that was asked.
        _ => asked.0.clone(),
    };
    Some(Range {
        first: number(first)?,
        last: number(last)?,
        owner: Address(host, number(master.get(1)?)?),
    })
}

/// What most of the answers say.
pub(super) fn most(answers: &[Vec<Range>], version: u64) -> Map {
    let mut masters: Vec<Address> = Vec::new();
    // By slot: whom the answers name, and how often.
    let mut votes: Vec<Vec<(u16, usize)>> = vec![Vec::new(); SLOTS];
    for range in answers.iter().flatten() {
        let known = masters.iter().position(|master| *master == range.owner);
        let owner = known.unwrap_or_else(|| {
            masters.push(range.owner.clone());
            masters.len() - 1
        }) as u16;
        let slots = usize::from(range.first)..=usize::from(range.last);
        for votes in votes.get_mut(slots).into_iter().flatten() {
            match votes.iter_mut().find(|(voted, _)| *voted == owner) {
                Some((_, count)) => *count += 1,
                None => votes.push((owner, 1)),
            }
        }
    }
    let owners: Vec<_> = votes
        .iter()
        .map(|votes| {
            let most = votes.iter().max_by_key(|(_, count)| *count);
            most.map(|(owner, _)| &masters[usize::from(*owner)])
        })
        .collect();
    Map::new(&owners, version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address("host".to_owned(), port)
    }

    fn view(ranges: &[(u16, u16, u16)]) -> Vec<Range> {
        let range = |&(first, last, port)| Range {
            first,
            last,
            owner: address(port),
        };
        ranges.iter().map(range).collect()
    }

    #[test]
    fn most_nodes_say_whose_a_slot_is_and_nobody_else_counts_as_a_master() {
        let old = view(&[(0, 99, 1), (100, 16_382, 2)]);
        let new = || view(&[(0, 99, 3), (100, 16_382, 2)]);
        let map = most(&[old, new(), new()], 7);
        assert_eq!(map.masters, [address(3), address(2)]);
        assert_eq!(map.owner(0), Some(&address(3)));
        assert_eq!(map.owner(99), Some(&address(3)));
        assert_eq!(map.owner(100), Some(&address(2)));
        assert_eq!(map.owner(16_383), None, "nobody's");
        assert_eq!(map.version, 7);
    }
}
