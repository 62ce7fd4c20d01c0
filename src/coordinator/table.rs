//! The keys this process has to do with at the moment.
//!
//! A key has a [`Cell`] from its first waiter to its last trace (a release that is on its way), and
//! none before and after, so the table's size follows the keys in use and not the keys ever seen.
//! The table is split into shards, each with its own lock. Lock order: shard, then cell.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
};

use crate::{
    coordinator::{key_state::KeyState, turn::Turn},
    key::LockName,
};

const SHARDS: usize = 64;

/// One key.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) name: LockName,
    slot: Mutex<Slot>,
}

/// What a [`Cell`] guards.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) state: KeyState<Waker>,
    /// The turn that is out, to be told of renewals and of its end.
    pub(crate) holder: Option<Arc<Turn>>,
}

impl Cell {
    fn new(name: LockName, in_parts: bool) -> Self {
        Self {
            name,
            slot: Mutex::new(Slot {
                state: KeyState::new().in_parts(in_parts),
                holder: None,
            }),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Slot> {
        // Poison would mean a panic inside the state machine; every step leaves it in one piece or
        // not begun.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Shard = HashMap<LockName, Arc<Cell>>;

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

    fn shard(&self, name: &LockName) -> MutexGuard<'_, Shard> {
        let index = self.hasher.hash_one(name) as usize % SHARDS;
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
        let mut shard = self.shard(name);
        let cell = shard
            .entry(name.clone())
            .or_insert_with(|| Arc::new(Cell::new(name.clone(), self.in_parts)));
        let result = enter(cell, &mut cell.lock());
        if cell.lock().state.is_done() {
            Self::remove(&mut shard, name);
        }
        result
    }

    pub(crate) fn find(&self, name: &LockName) -> Option<Arc<Cell>> {
        self.shard(name).get(name).cloned()
    }

    /// The key's cell, if there is one; else one that is not in the table, for an event that nobody
    /// waits for any more.
    pub(crate) fn find_or_stray(&self, name: &LockName) -> Arc<Cell> {
        self.find(name)
            .unwrap_or_else(|| Arc::new(Cell::new(name.clone(), self.in_parts)))
    }

    /// Forgets the key if there is nothing left to remember.
    pub(crate) fn forget(&self, cell: &Arc<Cell>) {
        let mut shard = self.shard(&cell.name);
        let is_this = shard
            .get(&cell.name)
            .is_some_and(|known| Arc::ptr_eq(known, cell));
        if is_this && cell.lock().state.is_done() {
            Self::remove(&mut shard, &cell.name);
        }
    }

    fn remove(shard: &mut Shard, name: &LockName) {
        shard.remove(name);
        if shard.capacity() > 64 && shard.len() < shard.capacity() / 8 {
            shard.shrink_to(shard.capacity() / 4);
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
            .flat_map(|shard| shard.values().cloned().collect::<Vec<_>>())
    }

    /// Runs `visit` on every cell, one shard at a time.
    pub(crate) fn visit(&self, mut visit: impl FnMut(&Arc<Cell>, &mut Slot)) {
        for shard in self.locked() {
            for cell in shard.values() {
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
