//! (scaffold) One node: proposes, confirms reads, keeps leases and members.

use std::sync::Arc;
use std::time::Duration;

mod error;
pub use error::NodeError;

use crate::machine::View;
use crate::types::{ClusterId, LeaseId, Member, MemberKind, NodeId, Operation, Reply, RequestId};
use crate::watch::Hub;

/// What one running node offers to the services above it.
pub struct Node {}

/// What the server adds to an operation.
#[derive(Clone, Debug, Default)]
pub struct ProposeContext {
    /// Who asks.
    pub actor: Option<Arc<str>>,
    /// Makes a retry apply once.
    pub request: Option<RequestId>,
    /// How long to wait; `None` is the node's own limit (etcd's: 5 s + 2 election timeouts).
    pub timeout: Option<Duration>,
}

/// What `Status` and the metrics tell.
#[derive(Clone, Debug, Default)]
pub struct NodeStatus {
    /// The leader this node follows, 0 if none.
    pub leader: NodeId,
    /// The current term.
    pub term: u64,
    /// Last index in the log.
    pub last_log_index: u64,
    /// Last index known to be committed.
    pub committed_index: u64,
    /// Last index applied.
    pub applied_index: u64,
    /// Whether this node is a learner or observer.
    pub is_learner: bool,
    /// Bytes of the store.
    pub db_size_bytes: u64,
    /// Bytes in use of them.
    pub db_live_bytes: u64,
    /// Quota in bytes.
    pub quota_bytes: u64,
}

/// A member as `MemberList` shows it.
#[derive(Clone, Debug)]
pub struct MemberView {
    /// The member.
    pub member: Member,
    /// Whether it votes today.
    pub is_voter: bool,
}

/// What is known of a lease.
#[derive(Clone, Debug)]
pub struct LeaseView {
    /// Remaining seconds; -1 when it does not exist.
    pub ttl_s: i64,
    /// Granted seconds; 0 when it does not exist.
    pub granted_ttl_s: i64,
    /// Attached keys of the user space, when asked for.
    pub keys: Vec<bytes::Bytes>,
}

impl Node {
    /// This node's id.
    pub fn id(&self) -> NodeId {
        todo!("scaffold")
    }
    /// The cluster's id.
    pub fn cluster_id(&self) -> ClusterId {
        todo!("scaffold")
    }
    /// Proposes through the leader, wherever it is; returns when this node's own view has it.
    pub async fn propose(&self, _operation: Operation, _context: ProposeContext) -> Result<Reply, NodeError> {
        todo!("scaffold")
    }
    /// Returns when this node's view holds everything acknowledged before the call.
    pub async fn read_barrier(&self) -> Result<(), NodeError> {
        todo!("scaffold")
    }
    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        todo!("scaffold")
    }
    /// The watch hub.
    pub fn hub(&self) -> &Arc<Hub> {
        todo!("scaffold")
    }
    /// Renews a lease at the leader; returns its full TTL in seconds, 0 when it does not exist.
    pub async fn lease_keep_alive(&self, _id: LeaseId) -> Result<i64, NodeError> {
        todo!("scaffold")
    }
    /// What is known of a lease, asked of the leader.
    pub async fn lease_time_to_live(&self, _id: LeaseId, _keys: bool) -> Result<LeaseView, NodeError> {
        todo!("scaffold")
    }
    /// All leases.
    pub async fn leases(&self) -> Result<Vec<LeaseId>, NodeError> {
        todo!("scaffold")
    }
    /// The members. Linearizable unless told otherwise.
    pub async fn members(&self, _linearizable: bool) -> Result<Vec<MemberView>, NodeError> {
        todo!("scaffold")
    }
    /// Adds a member (its id is drawn here) and returns it with the new list.
    pub async fn member_add(
        &self,
        _peer_urls: Vec<String>,
        _kind: MemberKind,
    ) -> Result<(Member, Vec<MemberView>), NodeError> {
        todo!("scaffold")
    }
    /// Removes a member.
    pub async fn member_remove(&self, _id: NodeId) -> Result<Vec<MemberView>, NodeError> {
        todo!("scaffold")
    }
    /// Changes where peers reach a member.
    pub async fn member_update(
        &self,
        _id: NodeId,
        _peer_urls: Vec<String>,
    ) -> Result<Vec<MemberView>, NodeError> {
        todo!("scaffold")
    }
    /// Makes a caught-up learner a voter.
    pub async fn member_promote(&self, _id: NodeId) -> Result<Vec<MemberView>, NodeError> {
        todo!("scaffold")
    }
    /// Hands leadership to a voter; only the leader can.
    pub async fn move_leader(&self, _target: NodeId) -> Result<(), NodeError> {
        todo!("scaffold")
    }
    /// Where the node stands.
    pub fn status(&self) -> NodeStatus {
        todo!("scaffold")
    }
    /// Changes whenever the leader this node follows changes; 0 is none.
    pub fn leader_changes(&self) -> tokio::sync::watch::Receiver<NodeId> {
        todo!("scaffold")
    }
    /// Rewrites the state's files, dropping what was deleted.
    pub async fn defragment(&self) -> Result<(), NodeError> {
        todo!("scaffold")
    }
    /// Writes a snapshot of this node's state as one file for an operator and opens it for reading.
    pub async fn snapshot_file(&self) -> Result<SnapshotFile, NodeError> {
        todo!("scaffold")
    }
}

/// A snapshot on its way to an operator: exactly `size_bytes` of payload, already
/// ended by the SHA-256 of everything before it.
pub struct SnapshotFile {
    /// The open file (deleted already, so that dropping it frees the space).
    pub file: std::fs::File,
    /// Bytes in it.
    pub size_bytes: u64,
}
