//! A look at the locks of all nodes. Only what a majority says of a lock is so.

use std::{collections::HashSet, time::Duration};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use tokio::time::Instant;

use super::{Redlock, Shared, round::Call, within};
use crate::{
    error::StorageError,
    key::LockName,
    storage::{
        LockOwner, LockRecord, LockStorage, ReleaseReply, Survey, SurveyRequest, release_of,
    },
};

/// What the nodes have said of one lock.
#[derive(Default)]
struct Sightings {
    seen: Vec<LockRecord>,
    free: usize,
    errors: Vec<StorageError>,
}

impl Sightings {
    fn count(&mut self, answer: Result<Option<LockRecord>, StorageError>) {
        match answer {
            Ok(Some(record)) => self.seen.push(record),
            Ok(None) => self.free += 1,
            Err(error) => self.errors.push(error),
        }
    }

    /// Who has it on so many nodes, if anybody does.
    fn held_on(&self, quorum: usize) -> Option<LockRecord> {
        let count = |owner: &LockOwner| self.of(owner).count();
        let first = self.seen.iter().find(|it| count(&it.owner) >= quorum)?;
        // It is held for as long as so many have it. What never expires comes first.
        let mut ttls: Vec<_> = self.of(&first.owner).map(|it| it.ttl).collect();
        ttls.sort_by_key(|ttl| std::cmp::Reverse(ttl.unwrap_or(Duration::MAX)));
        let ttl = ttls.get(quorum - 1).copied().flatten();
        let mut record = LockRecord::new(first.name.clone(), first.owner.clone(), ttl);
        let mut known = HashSet::new();
        let queues = self.seen.iter().flat_map(|it| it.queue.iter().copied());
        record.queue = queues.filter(|inbox| known.insert(*inbox)).collect();
        Some(record)
    }

    fn of(&self, owner: &LockOwner) -> impl Iterator<Item = &LockRecord> {
        self.seen.iter().filter(move |it| it.owner == *owner)
    }

    /// Whether no so many nodes can have it, whatever `unanswered` of them say.
    fn is_free(&self, quorum: usize, unanswered: usize) -> bool {
        let most = self.seen.iter().map(|it| self.of(&it.owner).count()).max();
        most.unwrap_or(0) + unanswered + self.errors.len() < quorum
    }
}

impl Shared {
    /// How long a node has for a call that is about no ttl.
    fn time(&self) -> Duration {
        self.node_timeout(Duration::MAX)
    }
}

impl Redlock {
    pub(super) async fn look_for(
        &self,
        name: &LockName,
    ) -> Result<Option<LockRecord>, StorageError> {
        let shared = &self.shared;
        let quorum = shared.quorum();
        let call = |node| -> Option<Call<_>> { Some(shared.storage(node).look(name.clone())) };
        let mut round = shared.ask(call, &|_, _| ());
        let mut sightings = Sightings::default();
        within(shared.time(), |cx, time_is_up| {
            round.poll(cx, |_, answer| sightings.count(answer));
            let late = round.unanswered();
            if time_is_up {
                round.give_up();
            } else if round.is_waited_for() {
                // Each may know of others that wait.
                return None;
            }
            if let Some(record) = sightings.held_on(quorum) {
                return Some(Ok(Some(record)));
            }
            if sightings.is_free(quorum, late) {
                return Some(Ok(None));
            }
            if late > 0 && !time_is_up {
                return None;
            }
            let (ours, not_ours) = (sightings.seen.len(), sightings.free);
            Some(Err(shared.no_quorum(
                ours,
                not_ours,
                late,
                &sightings.errors,
            )))
        })
        .await
    }

    pub(super) async fn survey_all(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        let shared = &self.shared;
        let quorum = shared.quorum();
        let until = Instant::now() + request.time;
        // The rest of the time is for the second round.
        let request = SurveyRequest {
            time: request.time / 2,
            ..request.clone()
        };
        let call = |node| -> Option<Call<_>> { Some(shared.storage(node).survey(request.clone())) };
        let mut round = shared.ask(call, &|_, _| ());
        let (mut names, mut known) = (Vec::new(), HashSet::new());
        let (mut answered, mut more, mut errors) = (0, false, Vec::new());
        let late = within(request.time + shared.time(), |cx, time_is_up| {
            round.poll(cx, |_, answer| match answer {
                Ok(survey) => {
                    answered += 1;
                    more |= survey.more;
                    let found = survey.locks.into_iter().map(|record| record.name);
                    names.extend(found.filter(|name| known.insert(name.clone())));
                }
                Err(error) => errors.push(error),
            });
            if time_is_up {
                round.give_up();
            }
            let late = round.unanswered();
            // Without the rest, nothing that a majority has is missed.
            let decided = late == 0 || answered >= quorum && !round.is_waited_for();
            (decided || time_is_up).then_some(late)
        })
        .await;
        if answered < quorum {
            return Err(shared.no_quorum(answered, 0, late, &errors));
        }
        // A node lists as many as it may, and another lists others.
        let mut locks = Vec::new();
        for names in names.chunks(256) {
            if Instant::now() >= until {
                more = true;
                break;
            }
            for record in join_all(names.iter().map(|name| self.look_for(name))).await {
                match record? {
                    Some(record) if locks.len() < request.limit => locks.push(record),
                    Some(_) => more = true,
                    None => {}
                }
            }
        }
        Ok(Survey::new(locks, more))
    }

    pub(super) async fn force(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        if let Some(request) = release_of(seen) {
            return self.release(&request).await;
        }
        let shared = &self.shared;
        let (nodes, quorum) = (shared.nodes.len(), shared.quorum());
        let call =
            |node| -> Option<Call<_>> { Some(shared.storage(node).force_release(seen.clone())) };
        let mut round = shared.ask(call, &|_, _| ());
        let (mut done, mut gone, mut errors) = (0, 0, Vec::new());
        let late = within(shared.time(), |cx, time_is_up| {
            round.poll(cx, |_, answer| match answer {
                Ok(ReleaseReply::NotOurs) => gone += 1,
                Ok(_) => done += 1,
                Err(error) => errors.push(error),
            });
            let late = round.unanswered();
            (late == 0 || time_is_up).then_some(late)
        })
        .await;
        if done >= quorum {
            Ok(ReleaseReply::Released)
        } else if gone > nodes - quorum {
            Ok(ReleaseReply::NotOurs)
        } else {
            Err(shared.no_quorum(done, gone, late, &errors))
        }
    }

    /// One node that is heard is enough.
    pub(super) async fn tell_inbox(
        &self,
        prefix: &str,
        inbox: u128,
        text: &str,
    ) -> Result<bool, StorageError> {
        let tell = |node| {
            let storage = self.shared.storage(node);
            storage.tell(prefix.into(), inbox, text.into())
        };
        let mut telling: FuturesUnordered<_> = (0..self.nodes()).map(tell).collect();
        let (mut nobody, mut failed) = (0, None);
        while let Some(heard) = telling.next().await {
            match heard {
                Ok(true) => return Ok(true),
                Ok(false) => nobody += 1,
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if nobody == 0 => Err(error),
            _ => Ok(false),
        }
    }
}
