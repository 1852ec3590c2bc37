//! What a watcher sees.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{KeyValue, Revision, Space};

/// Whether a change set a key or removed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// The key was set.
    Put,
    /// The key was removed.
    Delete,
}

/// One change to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The space of the key.
    pub space: Space,
    /// Set or removed.
    pub kind: EventKind,
    /// The key after the change. For a removal only key and mod revision are set.
    pub kv: KeyValue,
    /// The key before the change, if it existed.
    pub prev: Option<KeyValue>,
}

/// All changes of one revision, in the order of their sub-index. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionEvents {
    /// The revision.
    pub revision: Revision,
    /// Its changes.
    pub events: Vec<Arc<Event>>,
}
