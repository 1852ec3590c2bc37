//! What each watcher of a stream has seen, and what the hub marks on it.
//!
//! The state of a stream stands behind one lock, shared by the hub's task,
//! which marks the revisions that concern a watcher, and the stream's own task,
//! which turns the marks into messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::hub::{Hub, TICKS_PER_INTERVAL};
use super::{WatchMessage, WatchSpec};
use crate::types::{EventKind, KeyRange, Revision, Space};

/// Revisions of the ring that may wait for a live watcher. Beyond it the watcher
/// falls behind: the list is dropped and it looks through the ring itself. Few
/// in tests, so that they get there.
const PENDING_MAX: usize = if cfg!(test) { 4 } else { 256 };
/// One watcher, as the index knows it.
pub(super) struct Watcher {
    /// Unlike the id, never used twice.
    pub(super) number: u64,
    /// The tick at which it is next looked at for progress; changed under the
    /// lock of the hub's registry.
    pub(super) due_tick: AtomicU64,
    pub(super) stream: Arc<StreamShared>,
    pub(super) id: i64,
    pub(super) spec: WatchSpec,
}

impl Watcher {
    pub(super) fn space(&self) -> Space {
        self.spec.space
    }

    pub(super) fn range(&self) -> &KeyRange {
        &self.spec.range
    }

    pub(super) fn wants(&self, kind: EventKind) -> bool {
        match kind {
            EventKind::Put => !self.spec.no_put,
            EventKind::Delete => !self.spec.no_delete,
        }
    }
}

/// The part of a stream that the hub reaches.
#[derive(Default)]
pub(super) struct StreamShared {
    pub(super) state: Mutex<StreamState>,
    /// The task that serves the stream, woken when there may be something new to say.
    pub(super) task: Arc<AtomicWaker>,
}

#[derive(Default)]
pub(super) struct StreamState {
    pub(super) watchers: BTreeMap<i64, WatcherState>,
    /// Live watchers with revisions waiting. May name a watcher that has none.
    pub(super) ready: VecDeque<i64>,
    /// Watchers that are behind, in the order of their turns. May name others.
    pub(super) behind: VecDeque<i64>,
    /// How many watchers are behind.
    pub(super) behind_count: usize,
    /// Watchers that may be due a progress message.
    pub(super) progress: BTreeSet<i64>,
    /// The client asked for progress of the whole stream, to this revision at least.
    pub(super) progress_all: Option<Revision>,
    /// What was decided to be said. Holds what one step made and what the client's
    /// own requests caused; nothing else is made before it is empty.
    pub(super) outbox: VecDeque<WatchMessage>,
}

pub(super) struct WatcherState {
    pub(super) watcher: Arc<Watcher>,
    /// Everything below was sent, or does not concern it.
    pub(super) cursor: Revision,
    pub(super) mode: Mode,
    /// The tick at which events were last sent.
    pub(super) heard_tick: u64,
}

pub(super) enum Mode {
    /// Told by the hub; these revisions concern it and wait to be sent.
    Live(VecDeque<Revision>),
    /// Reads from its cursor on, from the ring or from disk.
    Behind,
    /// Ended by compaction; keeps its id until it is canceled.
    Gone,
}

impl StreamState {
    /// The watcher, unless it is gone and its id now another's.
    pub(super) fn get_mut(&mut self, watcher: &Watcher) -> Option<&mut WatcherState> {
        self.watchers.get_mut(&watcher.id).filter(|state| state.watcher.number == watcher.number)
    }

    /// Sends a watcher, which is live, to read from `cursor` on.
    pub(super) fn fall_behind(&mut self, hub: &Hub, id: i64, cursor: Revision) {
        if let Some(state) = self.watchers.get_mut(&id) {
            state.cursor = cursor;
            state.mode = Mode::Behind;
            self.behind.push_back(id);
            self.behind_count += 1;
            hub.gauges.slow.increment(1.0);
        }
    }

    /// A watcher stops being behind.
    pub(super) fn leave_behind(&mut self, hub: &Hub) {
        self.behind_count -= 1;
        hub.gauges.slow.decrement(1.0);
    }
}

impl StreamShared {
    /// There may be something new to say.
    pub(super) fn wake(&self) {
        self.task.wake();
    }

    /// A revision changed something in the watcher's range. True when the stream is
    /// to be woken: with older changes waiting, it was woken for those.
    #[must_use]
    pub(super) fn offer(&self, hub: &Hub, watcher: &Watcher, revision: Revision, kind: EventKind) -> bool {
        if !watcher.wants(kind) {
            return false;
        }
        let mut state = self.state.lock();
        let Some(found) = state.get_mut(watcher) else { return false };
        let Mode::Live(pending) = &mut found.mode else { return false };
        if revision < found.cursor || pending.back() == Some(&revision) {
            return false;
        }
        match pending.front().copied() {
            None => {
                pending.push_back(revision);
                state.ready.push_back(watcher.id);
                true
            }
            Some(first) if pending.len() >= PENDING_MAX => {
                state.fall_behind(hub, watcher.id, first);
                true
            }
            Some(_) => {
                pending.push_back(revision);
                false
            }
        }
    }

    /// The ring lost what follows `from`; `head` is where matching goes on.
    pub(super) fn fall_behind(&self, hub: &Hub, from: Revision, head: Revision) {
        let mut state = self.state.lock();
        let position = |found: &WatcherState| match &found.mode {
            Mode::Live(pending) => Some(pending.front().copied().unwrap_or(found.cursor.max(from))),
            Mode::Behind | Mode::Gone => None,
        };
        let cursors = state.watchers.iter().filter_map(|(id, found)| Some((*id, position(found)?)));
        let lost: Vec<_> = cursors.filter(|(_, cursor)| *cursor <= head).collect();
        for (id, cursor) in lost {
            state.fall_behind(hub, id, cursor);
        }
        drop(state);
        self.wake();
    }

    /// The progress interval of a watcher is over. Returns the tick from which the
    /// next one counts.
    pub(super) fn progress_due(&self, watcher: &Watcher, tick: u64) -> u64 {
        let mut state = self.state.lock();
        let Some(found) = state.get_mut(watcher) else { return tick };
        let heard = found.heard_tick;
        if heard + TICKS_PER_INTERVAL > tick {
            return heard;
        }
        state.progress.insert(watcher.id);
        drop(state);
        self.wake();
        tick
    }
}
