//! Everything that knows openraft: the log store, the state machine's adapter,
//! the network between members, and how they are put together.
//!
//! Above this room only `node/` speaks to openraft, through [`Raft`].

mod applier;
mod config;
#[cfg(feature = "mutants")]
mod early;
mod fatal;
mod log_store;
mod network;
mod peers;
mod receiver;
pub mod record;
mod replication;
mod start;
mod state_machine;
mod transport;
mod types;
mod wire;

pub use applier::{Apply, ReplayLimits};
pub use config::{OptionsError, PEER_MESSAGE_BYTES_MAX, RaftOptions};
pub use fatal::{EXIT_FATAL, Fatal};
pub use log_store::{LogReader, LogStore, LogStoreOptions};
pub use network::{GrpcTransport, envelope_of, status_of};
pub use peers::{Directory, PeerTimeouts, Peers, Retry};
pub use receiver::{Receiver, Reception};
pub use start::{RaftHandle, StartError, StartParts, start};
pub use state_machine::{LiveState, SnapshotData, StateMachine};
pub use transport::{
    AppendRequest, AppendResult, BoxFuture, BoxStream, Envelope, Local, PeerError, PeerFuture, Refusal,
    SnapshotTimeouts, TransferLeaderRequest, TransferLeaderResult, Transport, VoteRequest, VoteResponse,
};
pub use types::{
    CommittedLeaderId, Entry, EntryPayload, LogId, Membership, Proposal, SnapshotMeta, StoredMembership,
    TypeConfig, Vote,
};
pub use wire::{
    append_request, append_response, ballot, parse_append_request, parse_append_response,
    parse_snapshot_header, parse_transfer_request, parse_transfer_response, parse_vote_request,
    parse_vote_response, transfer_request, transfer_response, vote_request, vote_response,
};

/// openraft, with this crate's types.
pub type Raft = openraft::Raft<TypeConfig, StateMachine>;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
