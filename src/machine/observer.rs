//! What applying tells the rest of the node: effects beside the data, and who hears of them.
//!
//! An observer learns of a chunk after it can be read, and cannot hold the applying thread up.

use std::sync::Arc;

use crate::mvcc::View;
use crate::types::{LeaseId, Revision, RevisionEvents, Space};

/// What applying changed beside the data, for those who keep state beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A lease was granted, with its TTL in seconds.
    LeaseGranted(LeaseId, i64),
    /// A lease is gone.
    LeaseGone(LeaseId),
    /// A lease's remaining seconds were recorded.
    LeaseCheckpoint(LeaseId, i64),
    /// A session was opened or renewed: its id, its TTL in seconds, and the log
    /// index of the renewal.
    SessionRenewed(u64, u64, u64),
    /// A session is gone.
    SessionGone(u64),
    /// A space has a new compact mark, to be swept in the background.
    Compacted(Space, Revision),
    /// The state was replaced by a snapshot; read everything again from the view.
    Replaced,
}

/// Hears what each applied chunk made. Called by the applying thread after the
/// view was published and before replies go out; must not block.
pub trait Observer: Send + Sync + 'static {
    /// `events` in revision order; `effects` in log order.
    fn on_chunk(&self, view: &Arc<View>, events: Vec<Arc<RevisionEvents>>, effects: Vec<Effect>);
}
