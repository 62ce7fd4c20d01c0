//! One question to all nodes, and the answers as they come.

use std::task::{Context, Poll};

use super::Shared;
use crate::{error::StorageError, storage::BoxFuture, sync::atomic::Ordering::Relaxed};

pub(super) type Call<T> = BoxFuture<Result<T, StorageError>>;

/// What becomes of the call of a node that has not answered.
pub(super) type Leave<'a, T> = &'a (dyn Fn(usize, Call<T>) + Sync);

/// Calls of several nodes. Each is on its way from the first poll on.
pub(super) struct Round<'a, T> {
    shared: &'a Shared,
    /// By node; `None` where there is nothing to wait for.
    calls: Vec<Option<Call<T>>>,
    leave: Leave<'a, T>,
}

impl<'a, T> Round<'a, T> {
    /// One call for each node; `None` leaves the node out. Dropped, the round leaves the calls that
    /// were not answered to `leave`.
    pub(super) fn new(
        shared: &'a Shared,
        calls: impl Iterator<Item = Option<Call<T>>>,
        leave: Leave<'a, T>,
    ) -> Self {
        Self {
            shared,
            calls: calls.collect(),
            leave,
        }
    }

    /// Hands new answers to `answered`, with the numbers of their nodes.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut answered: impl FnMut(usize, Result<T, StorageError>),
    ) {
        for (node, call) in self.calls.iter_mut().enumerate() {
            let Some(waiting) = call else { continue };
            if let Poll::Ready(answer) = waiting.as_mut().poll(cx) {
                *call = None;
                let is_late = &self.shared.nodes[node].is_late;
                // Mostly it is not: a look costs less than a write.
                if is_late.load(Relaxed) {
                    is_late.store(false, Relaxed);
                }
                answered(node, answer);
            }
        }
    }

    /// How many nodes have not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.calls.iter().flatten().count()
    }

    /// Whether one of them answered in time before.
    pub(super) fn is_waited_for(&self) -> bool {
        let nodes = self.calls.iter().zip(&self.shared.nodes);
        { nodes }.any(|(call, node)| call.is_some() && !node.is_late.load(Relaxed))
    }

    /// Those that have not answered are late from now on.
    pub(super) fn give_up(&self) {
        for (call, node) in self.calls.iter().zip(&self.shared.nodes) {
            if call.is_some() {
                node.is_late.store(true, Relaxed);
            }
        }
    }

    /// Takes the calls that were not answered, with the numbers of their nodes.
    pub(super) fn rest(&mut self) -> impl Iterator<Item = (usize, Call<T>)> {
        let calls = self.calls.iter_mut().enumerate();
        calls.filter_map(|(node, call)| Some((node, call.take()?)))
    }
}

impl<T> Drop for Round<'_, T> {
    fn drop(&mut self) {
        let leave = self.leave;
        self.rest().for_each(|(node, call)| leave(node, call));
    }
}
