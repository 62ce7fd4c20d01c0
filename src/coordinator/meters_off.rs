//! What `meters.rs` is without the feature `metrics`: nothing.

use std::{borrow::Cow, time::Duration};

use crate::{
    clock::{Clock, Timestamp},
    coordinator::{key_events::Source, observe::Waited},
    error::{LossReason, StorageError},
};

#[derive(Debug)]
pub(crate) struct Meters;

/// There is none.
#[derive(Debug)]
pub(super) enum Meter {}

#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Acquire,
    Renew,
    Release,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Renewal {
    InTime,
    Late,
    NotOurs,
    Failed,
}

impl Meters {
    pub(super) const ARE_ON: bool = false;

    pub(super) fn new(_: Option<Cow<'static, str>>, _: Clock) -> Self {
        Self
    }

    pub(super) fn meter(&self, _: Timestamp) -> Option<Meter> {
        None
    }

    pub(super) fn renewed(&self, _: Renewal) {}

    pub(super) fn found_lost(&self) {}

    pub(super) fn storage_error(&self, _: Operation, _: &StorageError) {}

    pub(crate) fn invalid_key(&self) {}

    pub(crate) fn out_of_time(&self) {}
}

impl Meter {
    pub(super) fn waits(&mut self) {
        match *self {}
    }

    pub(super) fn waited(&mut self, _: Waited, _: Duration) {
        match *self {}
    }

    pub(super) fn holds(&mut self, _: Source) {
        match *self {}
    }

    pub(super) fn lost(&mut self, _: LossReason) {
        match *self {}
    }

    pub(super) fn held(&mut self, _: Duration) {
        match *self {}
    }
}
