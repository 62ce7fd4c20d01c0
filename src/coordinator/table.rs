//! The keys this process has to do with at the moment.
//!
//! A key has a [`Cell`] from its first waiter to its last trace (a release that is on its way), and
//! none before and after, so the table's size follows the keys in use and not the keys ever seen.
//! The table is split into shards, each with its own lock. Lock order: shard, then cell.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use crate::{
    clock::Timestamp,
    coordinator::{
        alarm::{Alarm, Bell},
        key_state::KeyState,
        turn::Turn,
    },
    key::LockName,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const SHARDS: usize = 64;

/// One key.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) name: LockName,
    /// Of the name. Names come from outside, so it takes a hasher that nobody can find collisions
    /// for; that costs enough to do it only once.
    hash: u64,
    slot: Mutex<Slot>,
}

/// What a [`Cell`] guards.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) state: KeyState<Bell>,
    /// The turn that is out, to be told of renewals and of its end.
    pub(crate) holder: Option<Arc<Turn>>,
    /// Of a call that is on its way.
    pub(super) alarm: Option<Alarm>,
    /// When the first wait is over of those that the keeper ends, or before.
    pub(super) ends: Timestamp,
    /// Somebody sees to it that its lease is not kept for longer than a moment.
    pub(super) is_watched: bool,
}

impl Cell {
    fn new(name: LockName, hash: u64, in_parts: bool) -> Self {
        Self {
            name,
            hash,
            slot: Mutex::new(Slot {
                state: KeyState::new().in_parts(in_parts),
                holder: None,
                alarm: None,
                ends: Timestamp::NEVER,
                is_watched: false,
            }),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Slot> {
        // Poison would mean a panic inside the state machine; every step leaves it in one piece or
        // not begun.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Shard = HashTable<Arc<Cell>>;

#[derive(Debug)]
pub(crate) struct Table {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    /// Whether the storage keeps locks in parts.
    in_parts: bool,
}

impl Table {
    pub(crate) fn new(in_parts: bool) -> Self {
        Self {
            in_parts,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
        }
    }

    fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        // Bits that do not choose a place within the shard.
        let index = (hash >> 32) as usize % SHARDS;
        self.shards[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `enter` on the key's cell, which is made if there is none. The cell stays in the table
    /// at least until `enter` returns.
    pub(crate) fn enter<R>(
        &self,
        name: &LockName,
        enter: impl FnOnce(&Arc<Cell>, &mut Slot) -> R,
    ) -> R {
        let hash = self.hasher.hash_one(name);
        let mut shard = self.shard(hash);
        let known = shard
            .entry(hash, |cell| cell.name == *name, |cell| cell.hash)
            .or_insert_with(|| Arc::new(Cell::new(name.clone(), hash, self.in_parts)));
        let cell = known.get();
        let mut slot = cell.lock();
        let result = enter(cell, &mut slot);
        let is_done = slot.state.is_done();
        drop(slot);
        if is_done {
            known.remove();
            Self::shrink(&mut shard);
        }
        result
    }

    pub(crate) fn find(&self, name: &LockName) -> Option<Arc<Cell>> {
        self.find_hashed(name, self.hasher.hash_one(name))
    }

    fn find_hashed(&self, name: &LockName, hash: u64) -> Option<Arc<Cell>> {
        let shard = self.shard(hash);
        shard.find(hash, |cell| cell.name == *name).cloned()
    }

    /// The key's cell, if there is one; else one that is not in the table, for an event that nobody
    /// waits for any more.
    pub(crate) fn find_or_stray(&self, name: &LockName) -> Arc<Cell> {
        let hash = self.hasher.hash_one(name);
        self.find_hashed(name, hash)
            .unwrap_or_else(|| Arc::new(Cell::new(name.clone(), hash, self.in_parts)))
    }

    /// Forgets the key if there is nothing left to remember.
    pub(crate) fn forget(&self, cell: &Arc<Cell>) {
        let mut shard = self.shard(cell.hash);
        if let Ok(known) = shard.find_entry(cell.hash, |known| Arc::ptr_eq(known, cell))
            && cell.lock().state.is_done()
        {
            known.remove();
            Self::shrink(&mut shard);
        }
    }

    fn shrink(shard: &mut Shard) {
        if shard.capacity() > 64 && shard.len() < shard.capacity() / 8 {
            shard.shrink_to(shard.capacity() / 4, |cell| cell.hash);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.locked().all(|shard| shard.is_empty())
    }

    pub(crate) fn len(&self) -> usize {
        self.locked().map(|shard| shard.len()).sum()
    }

    /// The cells of all keys. Those that come or go meanwhile may be among them or not.
    pub(crate) fn cells(&self) -> impl Iterator<Item = Arc<Cell>> {
        self.locked()
            .flat_map(|shard| shard.iter().cloned().collect::<Vec<_>>())
    }

    /// Runs `visit` on every cell, one shard at a time.
    pub(crate) fn visit(&self, mut visit: impl FnMut(&Arc<Cell>, &mut Slot)) {
        for shard in self.locked() {
            for cell in shard.iter() {
                visit(cell, &mut cell.lock());
            }
        }
    }

    fn locked(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards
            .iter()
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
