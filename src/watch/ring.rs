//! The newest changes, in memory, shared by every watcher.
//!
//! Invariant: the ring holds an unbroken run of revisions, `start` to `head`.
//! It is bounded in bytes; the oldest revision leaves first, and the newest one
//! stays however large it is.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::types::{Event, KeyRange, KeyValue, Revision, Space};

/// An event on its way to watchers, with its encodings once someone has made them.
#[derive(Debug)]
pub struct WatchEvent {
    event: Arc<Event>,
    /// Without and with the key before.
    encoded: [OnceLock<Bytes>; 2],
}

/// An upper bound of what one protobuf key-value adds to its key and value:
/// five numbers of at most ten bytes, a tag for each field, and the lengths.
const KEY_VALUE_OVERHEAD_BYTES: usize = 72;

impl WatchEvent {
    /// Wraps an event.
    pub fn new(event: Arc<Event>) -> WatchEvent {
        WatchEvent { event, encoded: Default::default() }
    }

    /// The event.
    pub fn event(&self) -> &Arc<Event> {
        &self.event
    }

    /// The event's wire form, with the key before if `prev` is set: made by
    /// `encode` the first time, shared by everyone after that. Every caller
    /// passes the same `encode`.
    pub fn encoded(&self, prev: bool, encode: impl FnOnce(&Event, bool) -> Bytes) -> Bytes {
        let prev = prev && self.event.prev.is_some();
        self.encoded[usize::from(prev)].get_or_init(|| encode(&self.event, prev)).clone()
    }

    /// An upper bound of the bytes the event adds to a message.
    pub fn size_bytes_max(&self, prev: bool) -> usize {
        let prev = self.event.prev.as_ref().filter(|_| prev);
        8 + size_bytes_max(&self.event.kv) + prev.map_or(0, size_bytes_max)
    }

    /// What the event may come to hold in memory: itself and both encodings.
    fn memory_bytes(&self) -> usize {
        2 * self.size_bytes_max(true)
            + self.size_bytes_max(false)
            + size_of::<WatchEvent>()
            + size_of::<Event>()
    }
}

fn size_bytes_max(kv: &KeyValue) -> usize {
    kv.key.len() + kv.value.len() + KEY_VALUE_OVERHEAD_BYTES
}

/// The changes of one revision.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) revision: Revision,
    pub(super) events: Vec<Arc<WatchEvent>>,
    memory_bytes: usize,
}

impl Entry {
    pub(super) fn new(revision: Revision, events: &[Arc<Event>]) -> Entry {
        let events: Vec<_> = events.iter().map(|event| Arc::new(WatchEvent::new(event.clone()))).collect();
        let memory_bytes =
            size_of::<Entry>() + events.iter().map(|event| event.memory_bytes()).sum::<usize>();
        Entry { revision, events, memory_bytes }
    }

    /// The events of `range`, in order.
    pub(super) fn select(&self, space: Space, range: &KeyRange) -> impl Iterator<Item = &Arc<WatchEvent>> {
        let wanted =
            move |event: &&Arc<WatchEvent>| event.event.space == space && range.contains(&event.event.kv.key);
        self.events.iter().filter(wanted)
    }
}

/// The ring.
pub(super) struct Ring {
    entries: VecDeque<Arc<Entry>>,
    /// The first revision it holds, or the next it will hold when it is empty.
    start: Revision,
    bytes: usize,
    bytes_max: usize,
}

impl Ring {
    /// An empty ring after `head`.
    pub(super) fn new(head: Revision, bytes_max: usize) -> Ring {
        Ring { entries: VecDeque::new(), start: head.next(), bytes: 0, bytes_max }
    }

    /// Empties the ring; the next revision it takes is the one after `head`.
    pub(super) fn reset(&mut self, head: Revision) {
        *self = Ring::new(head, self.bytes_max);
    }

    /// The newest revision it holds, or was told of.
    pub(super) fn head(&self) -> Revision {
        Revision(self.start.0 + self.entries.len() as i64 - 1)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the next revision. What it holds already is ignored; a gap empties
    /// it first, so that the run stays unbroken and watchers read the gap from disk.
    pub(super) fn push(&mut self, entry: Entry) {
        if entry.revision <= self.head() {
            return;
        }
        if entry.revision > self.head().next() {
            self.reset(entry.revision.prev());
        }
        self.bytes += entry.memory_bytes;
        self.entries.push_back(Arc::new(entry));
        while self.bytes > self.bytes_max && self.entries.len() > 1 {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.memory_bytes;
                self.start = oldest.revision.next();
            }
        }
    }

    /// The entry of one revision.
    pub(super) fn get(&self, revision: Revision) -> Option<&Arc<Entry>> {
        let place = usize::try_from(revision.0.checked_sub(self.start.0)?).ok()?;
        self.entries.get(place)
    }

    /// At most `count` entries from `from` on, or `None` when `from` has left the ring.
    pub(super) fn slice(&self, from: Revision, count: usize) -> Option<Vec<Arc<Entry>>> {
        let skip = usize::try_from(from.0.checked_sub(self.start.0)?).ok()?;
        Some(self.entries.iter().skip(skip).take(count).cloned().collect())
    }
}
