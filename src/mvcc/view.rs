//! The published view: one consistent state of the store as readers see it, where
//! the newest one is found, and how to wait for one.
//!
//! Who applies publishes; everyone else takes the newest view, without a lock.
//! Nothing here reads, writes or decides when a view is due.
//!
//! Invariants: a view's numbers are those of its own data; the index that is
//! announced is never ahead of the view that can be taken.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Marks;
use crate::storage::Snapshot;
use crate::storage::layout::LogPosition;
use crate::types::{Alarm, Revision, Space};

/// One consistent state of the store, as readers see it. Cheap to clone the
/// `Arc` of, not to be held for longer than one chunk of work: it pins files.
pub struct View {
    /// The data.
    pub data: Snapshot,
    /// The store's revision in `data`.
    pub revision: Revision,
    /// Compact mark of the user space; revisions below are gone.
    pub compacted_user: Revision,
    /// Compact mark of the system space.
    pub compacted_system: Revision,
    /// The last entry in `data`.
    pub applied: LogPosition,
    /// Raised alarms, sorted.
    pub alarms: Arc<[Alarm]>,
    /// The cluster version, as `major << 16 | minor`; 0 before it is first set.
    pub cluster_version: u32,
}

impl View {
    /// The compact mark of a space.
    pub fn compacted(&self, space: Space) -> Revision {
        match space {
            Space::User => self.compacted_user,
            Space::System => self.compacted_system,
        }
    }

    /// Where the view stands, for reads of a space.
    pub fn marks(&self, space: Space) -> Marks {
        Marks { revision: self.revision, compacted: self.compacted(space) }
    }
}

/// Where the newest [`View`] is found, and how to wait for one.
pub struct Published {
    view: ArcSwap<View>,
    applied_index: watch::Sender<u64>,
}

impl Published {
    /// Starts with a first view.
    pub fn new(view: View) -> Published {
        let (applied_index, _) = watch::channel(view.applied.index);
        Published { view: ArcSwap::from_pointee(view), applied_index }
    }

    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Swaps a newer view in, and wakes who waits for it.
    pub fn publish(&self, view: View) {
        let index = view.applied.index;
        self.view.store(Arc::new(view));
        self.applied_index.send_replace(index);
    }

    /// The index of the last applied entry, and its changes.
    pub fn applied_index(&self) -> watch::Receiver<u64> {
        self.applied_index.subscribe()
    }
}
