//! What a subscription has yet to hand out: changes in order, within bounds, by
//! the policy for when there are more.
//!
//! It waits for nobody: what does not fit is given back. The changes of one
//! revision come in together and go out together. A snapshot stands alone: it
//! comes in when nothing else is queued, and nothing comes in while it lasts.
//! It has no bound of its own, because it was in memory before it came here.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use tokio::time::Instant;

use super::{Batch, Overflow, SnapshotPart};
use crate::types::{Event, Revision};

/// The changes of one revision that match.
#[derive(Debug)]
pub(super) struct Unit {
    pub revision: Revision,
    /// Never empty.
    pub events: Vec<Event>,
    /// When it came from the server.
    pub since: Instant,
}

/// Invariants: `units` is in the order of revisions, and its first is not empty;
/// `len` is the number of events in it; `places` has the revision of each queued
/// key, when changes are merged.
#[derive(Debug)]
pub(super) struct Queue {
    capacity: usize,
    overflow: Overflow,
    units: VecDeque<Unit>,
    /// How many units merging has left without events.
    hollow: usize,
    len: usize,
    places: HashMap<Bytes, Revision>,
    snapshot: Option<Snapshot>,
    /// Everything that matches up to here came in.
    seen: Revision,
    /// Something did not fit since the last batch.
    full: bool,
    /// Since the last batch.
    merged: u64,
    dropped: u64,
}

#[derive(Debug)]
struct Snapshot {
    revision: Revision,
    events: std::vec::IntoIter<Event>,
    since: Instant,
    begun: bool,
}

/// What an offer did to what was queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Made {
    pub merged: u64,
    pub dropped: u64,
}

impl Queue {
    pub(super) fn new(capacity: usize, overflow: Overflow) -> Queue {
        Queue {
            capacity,
            overflow,
            units: VecDeque::new(),
            hollow: 0,
            len: 0,
            places: HashMap::new(),
            snapshot: None,
            seen: Revision(0),
            full: false,
            merged: 0,
            dropped: 0,
        }
    }

    /// Lets the changes of a revision in; gives them back if there is no room.
    /// Older changes of their keys may be merged away even then.
    pub(super) fn offer(&mut self, unit: Unit) -> (Made, Option<Unit>) {
        let mut made = Made::default();
        if self.snapshot.is_some() {
            return (made, Some(unit));
        }
        if self.overflow == Overflow::CoalescePerKey {
            made.merged = self.merge(&unit);
        }
        let fits = |queue: &Queue| queue.len == 0 || queue.len + unit.events.len() <= queue.capacity;
        if self.overflow == Overflow::DropOldest {
            while !fits(self) {
                made.dropped += self.pop().map_or(0, |oldest| oldest.events.len() as u64);
            }
        }
        self.merged += made.merged;
        self.dropped += made.dropped;
        if !fits(self) {
            self.full = true;
            return (made, Some(unit));
        }
        if self.overflow == Overflow::CoalescePerKey {
            self.places.extend(unit.events.iter().map(|event| (event.kv.key.clone(), unit.revision)));
        }
        self.len += unit.events.len();
        self.seen = self.seen.max(unit.revision);
        self.units.push_back(unit);
        (made, None)
    }

    /// Lets a snapshot in; gives it back unless nothing is queued.
    pub(super) fn offer_snapshot(
        &mut self,
        revision: Revision,
        events: Vec<Event>,
        since: Instant,
    ) -> Option<Vec<Event>> {
        if self.len > 0 || self.snapshot.is_some() {
            self.full = true;
            return Some(events);
        }
        self.snapshot = Some(Snapshot { revision, events: events.into_iter(), since, begun: false });
        self.seen = self.seen.max(revision);
        None
    }

    /// Takes note that nothing else matches up to `revision`.
    pub(super) fn advance(&mut self, revision: Revision) {
        self.seen = self.seen.max(revision);
    }

    /// The next batch: whole revisions until there are `events_max`, or part of
    /// a snapshot; `None` when there is nothing.
    pub(super) fn take(&mut self, events_max: usize) -> Option<Batch> {
        let (merged, dropped) = (self.merged, self.dropped);
        if let Some(snapshot) = &mut self.snapshot {
            let events = snapshot.events.by_ref().take(events_max).collect();
            let part = SnapshotPart { first: !snapshot.begun, last: snapshot.events.len() == 0 };
            snapshot.begun = true;
            let revision = snapshot.revision;
            if part.last {
                self.snapshot = None;
            }
            (self.merged, self.dropped) = (0, 0);
            return Some(Batch { revision, events, snapshot: Some(part), merged, dropped });
        }
        let Unit { mut revision, mut events, .. } = self.pop()?;
        while events.len() < events_max {
            let Some(unit) = self.pop() else { break };
            revision = unit.revision;
            events.extend(unit.events);
        }
        if self.len == 0 {
            revision = revision.max(self.seen);
        }
        (self.merged, self.dropped, self.full) = (0, 0, false);
        Some(Batch { revision, events, snapshot: None, merged, dropped })
    }

    /// Events that wait.
    pub(super) fn len(&self) -> usize {
        self.len + self.snapshot.as_ref().map_or(0, |snapshot| snapshot.events.len())
    }

    /// Whether waiting would not make the next batch larger.
    pub(super) fn is_due(&self, events_max: usize) -> bool {
        self.snapshot.is_some() || self.full || self.len >= events_max.min(self.capacity)
    }

    /// When what has waited longest came from the server.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let unit = self.units.front().map(|unit| unit.since);
        self.snapshot.as_ref().map(|snapshot| snapshot.since).or(unit)
    }

    fn pop(&mut self) -> Option<Unit> {
        let unit = self.units.pop_front()?;
        self.drop_hollow_front();
        self.len -= unit.events.len();
        if self.overflow == Overflow::CoalescePerKey {
            for event in &unit.events {
                self.places.remove(&event.kv.key);
            }
        }
        Some(unit)
    }

    /// Removes what `unit` supersedes.
    fn merge(&mut self, unit: &Unit) -> u64 {
        let mut merged = 0;
        for event in &unit.events {
            let Some(place) = self.places.remove(&event.kv.key) else { continue };
            let Ok(place) = self.units.binary_search_by_key(&place, |unit| unit.revision) else { continue };
            let older = &mut self.units[place].events;
            let before = older.len();
            older.retain(|queued| queued.kv.key != event.kv.key);
            merged += before - older.len();
            self.hollow += usize::from(older.is_empty());
        }
        self.len -= merged;
        self.drop_hollow_front();
        if self.hollow > self.units.len() / 2 {
            self.units.retain(|unit| !unit.events.is_empty());
            self.hollow = 0;
        }
        merged as u64
    }

    fn drop_hollow_front(&mut self) {
        while self.units.front().is_some_and(|unit| unit.events.is_empty()) {
            self.units.pop_front();
            self.hollow -= 1;
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
