//! (scaffold)

mod log_store;
pub mod record;
mod types;

pub use log_store::{LogReader, LogStore, LogStoreOptions};
pub use types::{
    CommittedLeaderId, Entry, EntryPayload, LogId, Membership, Proposal, SnapshotMeta, StoredMembership,
    TypeConfig, Vote,
};
