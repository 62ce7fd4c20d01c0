//! The messages of one factory in a cluster: a subscription at each master.
//!
//! A message goes to all nodes, but the script that sends it learns only how many have heard it at
//! its own. So we listen at every master, or some releases would take us for dead; and so each
//! message comes as often as there are masters.
//!
//! A message may come from a node that has lost its slots and does not know yet, and nobody can tell
//! from which it came. So no grant counts by itself: it is confirmed by asking.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};

use super::{
    cluster::Cluster,
    cluster_map::{Address, Map},
    connection::Connection,
    fencing::Seen,
    inbox,
};
use crate::{
    key::LockName,
    storage::{Inbox, Message, OwnerToken},
};

/// How often it is looked whether the masters are still the same, should no command find out.
const LOOK: Duration = Duration::from_secs(5);

/// After the connection to a master was lost: how soon, for a failover takes its time.
const LOOK_WHEN_LOST: Duration = Duration::from_millis(250);

/// How many grants are remembered, to know them again when they come from another master.
const RECENT: usize = 1024;

/// Listens at all masters, whichever they are.
pub(super) async fn listen(cluster: &Arc<Cluster>, inbox: &Inbox, seen: &Arc<Seen>) {
    let mut map = cluster.map();
    let ears = Arc::new(Ears {
        inbox: inbox.clone(),
        state: Mutex::default(),
        lost_one: Notify::new(),
    });
    let mut sessions = FuturesUnordered::new();
    let mut sessions_of: HashMap<Address, watch::Sender<()>> = HashMap::new();
    loop {
        let present = Arc::clone(&map.borrow_and_update());
        sessions_of.retain(|address, _| present.masters.contains(address));
        for address in &present.masters {
            if sessions_of.contains_key(address) {
                continue;
            }
            let (end, ended) = watch::channel(());
            sessions_of.insert(address.clone(), end);
            let node = cluster.node(address);
            sessions.push(session(node, ears.at(address), Arc::clone(seen), ended));
        }
        ears.masters_are(&present);
        let pause = if ears.hears_all() {
            LOOK
        } else {
            LOOK_WHEN_LOST
        };
        tokio::select! {
            Ok(()) = map.changed() => {}
            Some(()) = sessions.next() => {}
            () = ears.lost_one.notified() => {}
            () = sleep(pause) => {
                // If it fails, the next look may not.
                let _ = cluster.look(present.version).await;
            }
        }
    }
}

/// Listens at one master until it is none any more.
async fn session(
    node: Arc<Connection>,
    inbox: Inbox,
    seen: Arc<Seen>,
    mut ended: watch::Receiver<()>,
) {
    tokio::select! {
        () = inbox::listen(&node, inbox, &seen, true) => {}
        // The sender was dropped.
        _ = ended.changed() => {}
    }
}

/// What comes from all masters, for one inbox.
struct Ears {
    inbox: Inbox,
    state: Mutex<State>,
    lost_one: Notify,
}

#[derive(Default)]
struct State {
    /// Whether we listen there.
    masters: HashMap<Address, bool>,
    map: Option<Arc<Map>>,
    recent: Recent,
}

impl State {
    fn hears_all(&self) -> bool {
        !self.masters.is_empty() && self.masters.values().all(|heard| *heard)
    }

    fn hears_none(&self) -> bool {
        !self.masters.values().any(|heard| *heard)
    }

    /// Whether a message about the lock counts: what comes from the master that has it, if we hear
    /// that one.
    fn counts(&self, name: &LockName, from: &Address) -> bool {
        let owner = self.map.as_ref().and_then(|map| map.owner_of(name));
        let other = owner.filter(|owner| *owner != from);
        let heard = other.and_then(|owner| self.masters.get(owner));
        heard != Some(&true)
    }
}

impl Ears {
    /// The inbox for what comes from one master.
    fn at(self: &Arc<Self>, address: &Address) -> Inbox {
        let (ears, address) = (Arc::clone(self), address.clone());
        let (id, prefix) = (self.inbox.id(), self.inbox.prefix().into());
        Inbox::new(id, prefix, move |message| ears.receive(&address, message))
    }

    fn receive(&self, from: &Address, message: Message) {
        let message = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match message {
                Message::Listening => {
                    if let Some(heard) = state.masters.get_mut(from) {
                        *heard = true;
                    }
                    // Whoever asks for a place in a queue must be heard of where the queue is.
                    state.hears_all().then_some(Message::Listening)
                }
                Message::Deaf => {
                    if let Some(heard) = state.masters.get_mut(from) {
                        *heard = false;
                    }
                    self.lost_one.notify_one();
                    // The others go on. At the one that was lost, we lose our places.
                    state.hears_none().then_some(Message::Deaf)
                }
                Message::Granted(grant) => {
                    let is_new = state.recent.add((grant.token, grant.stamp.at));
                    is_new.then_some(Message::Granted(grant))
                }
                // Told once: by the master that has the lock, if we hear it.
                Message::Wanted(name) => state.counts(&name, from).then_some(Message::Wanted(name)),
                Message::Free(name) => state.counts(&name, from).then_some(Message::Free(name)),
                // Whoever is told knows it again.
                Message::Told(text) => Some(Message::Told(text)),
            }
        };
        if let Some(message) = message {
            self.inbox.deliver(message);
        }
    }

    fn masters_are(&self, map: &Arc<Map>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.hears_all();
        let masters = map.masters.iter();
        let masters = masters
            .map(|address| {
                let heard = state.masters.get(address).copied().unwrap_or(false);
                (address.clone(), heard)
            })
            .collect();
        state.masters = masters;
        state.map = Some(Arc::clone(map));
        let now = state.hears_all();
        drop(state);
        if now && !before {
            self.inbox.deliver(Message::Listening);
        }
    }

    fn hears_all(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.hears_all()
    }
}

/// A grant, by whom it was given to, and when.
type Grant = (OwnerToken, Duration);

/// The last grants.
#[derive(Default)]
struct Recent {
    order: VecDeque<Grant>,
    grants: HashSet<Grant>,
}

impl Recent {
    /// Whether it was not there yet.
    fn add(&mut self, grant: Grant) -> bool {
        if !self.grants.insert(grant) {
            return false;
        }
        self.order.push_back(grant);
        if self.order.len() > RECENT
            && let Some(oldest) = self.order.pop_front()
        {
            self.grants.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        key::{KeyPrefix, LockKey},
        storage::{
            PushedGrant, Stamp,
            redis::slot::{SLOTS, slot},
        },
    };

    /// Ears for three masters, of which `owner` has the lock, and what they have told.
    fn ears(owner: &Address) -> (Arc<Ears>, Arc<Mutex<Vec<Message>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let ears = Arc::new(Ears {
            inbox: Inbox::new(7, "p".into(), move |message| {
                sink.lock().unwrap().push(message);
            }),
            state: Mutex::default(),
            lost_one: Notify::new(),
        });
        let mut owners = vec![Some(owner); SLOTS];
        let others = [address(2), address(3)];
        let name = name();
        for (number, other) in others.iter().enumerate() {
            let slot = (usize::from(slot(name.as_str())) + 1 + number) % SLOTS;
            owners[slot] = Some(other);
        }
        ears.masters_are(&Arc::new(Map::new(&owners, 1)));
        (ears, told)
    }

    fn address(port: u16) -> Address {
        Address("host".to_owned(), port)
    }

    fn name() -> crate::key::LockName {
        KeyPrefix::new("p")
            .unwrap()
            .name(&LockKey::new("k").unwrap())
    }

    #[test]
    fn we_listen_when_all_masters_hear_us_and_are_deaf_when_none_does() {
        let (ears, told) = ears(&address(1));
        let told = |expected: &str| {
            let told: Vec<_> = told.lock().unwrap().drain(..).collect();
            assert_eq!(format!("{told:?}"), expected);
        };
        ears.receive(&address(1), Message::Listening);
        ears.receive(&address(2), Message::Listening);
        told("[]");
        ears.receive(&address(3), Message::Listening);
        told("[Listening]");
        ears.receive(&address(1), Message::Deaf);
        ears.receive(&address(2), Message::Deaf);
        told("[]");
        ears.receive(&address(1), Message::Listening);
        ears.receive(&address(2), Message::Listening);
        told("[Listening]");
        for port in [1, 2, 3] {
            ears.receive(&address(port), Message::Deaf);
        }
        told("[Deaf]");
    }

    #[test]
    fn what_comes_from_all_masters_is_told_once() {
        let (ears, told) = ears(&address(1));
        let ports = [2, 1, 3];
        for port in ports {
            ears.receive(&address(port), Message::Listening);
        }
        told.lock().unwrap().clear();
        for message in [Message::Wanted, Message::Free] {
            for port in ports {
                ears.receive(&address(port), message(name()));
            }
            assert_eq!(told.lock().unwrap().drain(..).count(), 1);
        }
        let grant = |micros| {
            let at = Duration::from_micros(micros);
            let stamp = Stamp { run: None, at };
            let token = OwnerToken::new(7, 1);
            Message::Granted(PushedGrant::new(
                name(),
                token,
                Duration::from_secs(1),
                stamp,
            ))
        };
        // The same token may be given the lock again, if it was lost meanwhile.
        for micros in [1, 2] {
            for port in ports {
                ears.receive(&address(port), grant(micros));
            }
            assert_eq!(told.lock().unwrap().drain(..).count(), 1);
        }
        // Where the master that has it does not hear us, another tells.
        ears.receive(&address(1), Message::Deaf);
        ears.receive(&address(2), Message::Wanted(name()));
        assert_eq!(told.lock().unwrap().drain(..).count(), 1);
    }
}
