//! A first-in-first-out queue from whose middle anybody can leave in constant time.
//!
//! A doubly linked list whose nodes live in a slab, so that a waiter's id finds its node at once.
//! Most keys have one waiter at a time: that one's node is in the queue itself.

use slab::Slab;

/// Where an item stands. Unique among the items that are in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(usize);

#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
struct Node<T> {
    item: T,
    before: Option<usize>,
    after: Option<usize>,
}

/// Nodes by their number.
#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
struct Nodes<T> {
    /// Number 0.
    one: Option<Node<T>>,
    /// The numbers from 1 on.
    more: Slab<Node<T>>,
}

impl<T> Nodes<T> {
    const fn new() -> Self {
        Self {
            one: None,
            more: Slab::new(),
        }
    }

    fn len(&self) -> usize {
        usize::from(self.one.is_some()) + self.more.len()
    }

    #[cfg(test)]
    fn get(&self, number: usize) -> Option<&Node<T>> {
        match number.checked_sub(1) {
            None => self.one.as_ref(),
            Some(number) => self.more.get(number),
        }
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut Node<T>> {
        match number.checked_sub(1) {
            None => self.one.as_mut(),
            Some(number) => self.more.get_mut(number),
        }
    }

    fn insert(&mut self, node: Node<T>) -> usize {
        if self.one.is_none() {
            self.one = Some(node);
            return 0;
        }
        self.more.insert(node) + 1
    }

    fn remove(&mut self, number: usize) -> Option<Node<T>> {
        let Some(number) = number.checked_sub(1) else {
            return self.one.take();
        };
        let node = self.more.try_remove(number);
        // A crowd that has left should not keep its room.
        if self.more.is_empty() && self.more.capacity() > 16 {
            self.more = Slab::new();
        }
        node
    }
}

#[derive(Debug)]
#[cfg_attr(any(test, tower_distributed_lock_fuzzing), derive(Clone))]
pub(crate) struct Queue<T> {
    nodes: Nodes<T>,
    ends: Option<(usize, usize)>,
}

impl<T> Queue<T> {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Nodes::new(),
            ends: None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ends.is_none()
    }

    pub(crate) fn push(&mut self, item: T) -> Place {
        let before = self.ends.map(|(_, last)| last);
        let new = self.nodes.insert(Node {
            item,
            before,
            after: None,
        });
        if let Some(last) = before.and_then(|last| self.nodes.get_mut(last)) {
            last.after = Some(new);
        }
        self.ends = Some((self.ends.map_or(new, |(first, _)| first), new));
        Place(new)
    }

    pub(crate) fn remove(&mut self, place: Place) -> Option<T> {
        let node = self.nodes.remove(place.0)?;
        if let Some(before) = node.before.and_then(|before| self.nodes.get_mut(before)) {
            before.after = node.after;
        }
        if let Some(after) = node.after.and_then(|after| self.nodes.get_mut(after)) {
            after.before = node.before;
        }
        self.ends = self.ends.and_then(|(first, last)| {
            let first = if first == place.0 { node.after? } else { first };
            let last = if last == place.0 { node.before? } else { last };
            Some((first, last))
        });
        Some(node.item)
    }

    pub(crate) fn first(&self) -> Option<Place> {
        self.ends.map(|(first, _)| Place(first))
    }

    pub(crate) fn is_first(&self, place: Place) -> bool {
        self.first() == Some(place)
    }

    pub(crate) fn first_mut(&mut self) -> Option<&mut T> {
        let (first, _) = self.ends?;
        self.get_mut(Place(first))
    }

    pub(crate) fn get_mut(&mut self, place: Place) -> Option<&mut T> {
        self.nodes.get_mut(place.0).map(|node| &mut node.item)
    }

    #[cfg(test)]
    pub(crate) fn get(&self, place: Place) -> Option<&T> {
        self.nodes.get(place.0).map(|node| &node.item)
    }

    /// All items, in no particular order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let more = self.nodes.more.iter_mut().map(|(_, node)| node);
        let nodes = self.nodes.one.iter_mut().chain(more);
        nodes.map(|node| &mut node.item)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list: whoever leaves, from wherever, the others keep their order.
        #[test]
        fn the_order_is_that_of_a_plain_list(steps in prop::collection::vec(any::<(bool, u8)>(), 0..200)) {
            let mut queue = Queue::new();
            let mut model: VecDeque<(Place, usize)> = VecDeque::new();
            for (number, (push, choice)) in steps.into_iter().enumerate() {
                if push || model.is_empty() {
                    model.push_back((queue.push(number), number));
                } else {
                    let (place, item) = model.remove(usize::from(choice) % model.len()).unwrap();
                    prop_assert_eq!(queue.remove(place), Some(item));
                }
                prop_assert_eq!(queue.len(), model.len());
                prop_assert_eq!(queue.first(), model.front().map(|(place, _)| *place));
                prop_assert_eq!(queue.first_mut().copied(), model.front().map(|(_, item)| *item));
            }
            while let Some((place, item)) = model.pop_front() {
                prop_assert!(queue.is_first(place));
                prop_assert_eq!(queue.remove(place), Some(item));
            }
            prop_assert!(queue.is_empty() && queue.first().is_none());
        }
    }

    #[test]
    fn one_item_at_a_time_takes_no_room_of_its_own() {
        let mut queue = Queue::new();
        for item in 0..10 {
            let place = queue.push(item);
            queue.remove(place);
        }
        assert_eq!(queue.nodes.more.capacity(), 0);
    }

    #[test]
    fn an_emptied_queue_keeps_no_room() {
        let mut queue = Queue::new();
        let places: Vec<_> = (0..10_000).map(|item| queue.push(item)).collect();
        places.into_iter().for_each(|place| {
            queue.remove(place);
        });
        assert_eq!(queue.nodes.more.capacity(), 0);
    }
}
