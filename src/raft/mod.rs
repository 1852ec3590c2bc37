//! (scaffold)

pub mod record;
mod types;

pub use types::{
    CommittedLeaderId, Entry, EntryPayload, LogId, Membership, Proposal, SnapshotMeta, StoredMembership,
    TypeConfig, Vote,
};
