//! openraft's types, bound to ours, and the conversions between the two.
//!
//! Only values: no I/O and no format. How an entry becomes bytes is
//! `record`'s to say.

use std::fmt;

use bytes::Bytes;
use openraft::type_config::alias::{
    CommittedLeaderIdOf, EntryOf, LogIdOf, SnapshotMetaOf, StoredMembershipOf, VoteOf,
};

use crate::storage::layout::LogPosition;
use crate::types::{Member, NodeId, Reply};

openraft::declare_raft_types!(
    /// The types that openraft is compiled with.
    pub TypeConfig:
        D = Proposal,
        R = Reply,
        NodeId = NodeId,
        Node = Member,
);

/// openraft's log id: who led when the entry was written, and its index.
pub type LogId = LogIdOf<TypeConfig>;
/// The leader part of a [`LogId`].
pub type CommittedLeaderId = CommittedLeaderIdOf<TypeConfig>;
/// One entry of the log. Cheap to clone unless it holds a membership.
pub type Entry = EntryOf<TypeConfig>;
/// What an entry carries.
pub type EntryPayload = openraft::EntryPayload<Proposal, NodeId, Member>;
/// Whom this node follows or has voted for.
pub type Vote = VoteOf<TypeConfig>;
/// Voters, possibly of two configurations at once, and every member's record.
pub type Membership = openraft::Membership<NodeId, Member>;
/// A membership with the id of the entry that brought it.
pub type StoredMembership = StoredMembershipOf<TypeConfig>;
/// What openraft knows of a snapshot.
pub type SnapshotMeta = SnapshotMetaOf<TypeConfig>;

/// What a client's write looks like to Raft: bytes that were encoded once,
/// where they were proposed, and the stamp its leader gave them.
#[derive(Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The leader's stamp, milliseconds since 1970. Labels; decides nothing.
    pub time_ms: u64,
    /// A `types::Command` as `storage::codec` encoded it.
    pub body: Bytes,
}

impl fmt::Debug for Proposal {
    // The body is a client's data: it has no place in a log of messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proposal({} bytes at {} ms)", self.body.len(), self.time_ms)
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl From<LogPosition> for LogId {
    fn from(position: LogPosition) -> LogId {
        let leader = CommittedLeaderId { term: position.term, node_id: position.node };
        LogId::new(leader, position.index)
    }
}

impl From<&LogId> for LogPosition {
    fn from(id: &LogId) -> LogPosition {
        let leader = id.committed_leader_id();
        LogPosition { term: leader.term, node: leader.node_id, index: id.index }
    }
}

impl From<LogId> for LogPosition {
    fn from(id: LogId) -> LogPosition {
        LogPosition::from(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_log_ids_say_the_same() {
        let position = LogPosition { term: 3, node: 7, index: 11 };
        assert_eq!(LogPosition::from(LogId::from(position)), position);
    }

    #[test]
    fn a_proposal_does_not_print_its_content() {
        let proposal = Proposal { time_ms: 5, body: Bytes::from_static(b"secret") };
        assert_eq!(proposal.to_string(), "Proposal(6 bytes at 5 ms)");
    }
}
