//! One node: proposes, confirms reads, keeps leases and members, and does its
//! housekeeping in named tasks with an order to stop in.
//!
//! The services above see [`Node`]; other members reach it through the
//! `answer_*` methods and [`Node::serve_forward`]. Nothing here knows gRPC.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod ask;
mod bootstrap;
pub mod carrier;
pub mod control;
mod core;
mod error;
mod forward;
mod ids;
mod inbound;
mod keeper;
mod lessor;
mod maintenance;
mod membership;
mod options;
#[cfg(feature = "mutants")]
mod paused;
mod propose;
mod read;
mod recover;
mod renewals;
mod start;
mod sweeper;
mod tasks;
#[cfg(test)]
mod tests;

pub use self::core::Leadership;
use self::core::Roster;
pub use error::NodeError;
pub use ids::{initial_cluster_id, initial_node_id, joining_node_id};
pub use options::{AutoCompaction, Bootstrap, InitialMember, LEASE_TTL_S_MAX, NodeOptions};
pub use propose::{own_version, version_text};
pub use recover::{ForceNewCluster, Recovered, RestoreSnapshot, force_new_cluster, restore_snapshot};
pub use start::{MakeTransport, NodeParts};
pub use tasks::{Exit, ExitReason};

use crate::mvcc::View;
use crate::storage::archive::Packing;
use crate::storage::layout::{lease_keys, parse_lease_key};
use crate::types::{
    ClusterId, DiskId, LeaseId, Member, MemberKind, NodeId, Operation, Reply, RequestId, Revision, Space,
};
use crate::watch::Hub;
use control::{Answer, Ask, MemberChange, MemberChanged};

/// How long a stopping leader waits for somebody to take over.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);

/// What one running node offers to the services above it. Clones share it.
#[derive(Clone)]
pub struct Node {
    inner: Arc<start::Inner>,
}

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
    /// Bytes of the Raft log.
    pub log_bytes: u64,
}

/// A member as `MemberList` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// The member.
    pub member: Member,
    /// Whether it votes today.
    pub is_voter: bool,
}

/// What is known of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
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
        self.inner.core.id
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> ClusterId {
        self.inner.core.cluster_id
    }

    /// The identity of this node's data directory.
    pub fn disk_id(&self) -> DiskId {
        self.inner.core.disk
    }

    /// What the node was told at its start.
    pub fn options(&self) -> &NodeOptions {
        &self.inner.core.options
    }

    /// Proposes through the leader, wherever it is; returns when this node's own view has it.
    ///
    /// # Errors
    /// See [`NodeError::may_have_happened`]: a timeout is not a failure.
    pub async fn propose(&self, operation: Operation, context: ProposeContext) -> Result<Reply, NodeError> {
        self.ends_as_stopped(self.inner.desk.proposer.propose(operation, context).await)
    }

    /// Returns when this node's view holds everything acknowledged before the call.
    ///
    /// # Errors
    /// `NoLeader` or `Timeout` when no leader could be confirmed in time.
    pub async fn read_barrier(&self) -> Result<(), NodeError> {
        self.ends_as_stopped(self.inner.reads.barrier().await)
    }

    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        self.inner.core.view()
    }

    /// The watch hub.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.inner.hub
    }

    /// Renews a lease at the leader; returns its full TTL in seconds, 0 when it does not exist.
    ///
    /// # Errors
    /// When no leader confirmed the renewal in time; it is then not promised.
    pub async fn lease_keep_alive(&self, id: LeaseId) -> Result<i64, NodeError> {
        self.inner.renewals.renew(&self.inner.desk, id).await
    }

    /// What is known of a lease, asked of the leader.
    ///
    /// # Errors
    /// When no leader answered in time.
    pub async fn lease_time_to_live(&self, id: LeaseId, keys: bool) -> Result<LeaseView, NodeError> {
        let deadline = self.inner.core.deadline(None);
        let (ttl_s, granted_ttl_s) =
            match self.inner.desk.ask_leader(Ask::LeaseTimeToLive { id }, deadline).await? {
                Answer::LeaseTimeToLive { ttl_s, granted_ttl_s } => (ttl_s, granted_ttl_s),
                other => return Err(unexpected(&other)),
            };
        let mut view = LeaseView { ttl_s, granted_ttl_s, keys: Vec::new() };
        if keys && ttl_s >= 0 {
            let barrier = self.inner.desk.reads.barrier();
            tokio::time::timeout_at(deadline, barrier).await.map_err(|_| NodeError::Timeout)??;
            let prefix = lease_keys(id);
            let attached =
                lessor::scan(&self.view(), crate::storage::layout::Family::Lease, &prefix, |key, _| {
                    parse_lease_key(key)
                        .map(|(space, key)| (space, bytes::Bytes::copy_from_slice(key)))
                        .ok_or_else(|| NodeError::Internal("a lease's attachment is damaged".to_owned()))
                })?;
            let user = attached.into_iter().filter(|(space, _)| *space == Space::User);
            view.keys = user.map(|(_, key)| key).collect();
        }
        Ok(view)
    }

    /// All leases.
    ///
    /// # Errors
    /// When no leader could be confirmed in time, or a record is damaged.
    pub async fn leases(&self) -> Result<Vec<LeaseId>, NodeError> {
        self.read_barrier().await?;
        Ok(lessor::leases(&self.view())?.into_iter().map(|(id, _)| id).collect())
    }

    /// The members. Linearizable unless told otherwise.
    ///
    /// # Errors
    /// When no leader could be confirmed in time.
    pub async fn members(&self, linearizable: bool) -> Result<Vec<MemberView>, NodeError> {
        if linearizable {
            self.read_barrier().await?;
            let committed = self.inner.core.committed_membership().await?;
            return Ok(Roster::of(&committed).list());
        }
        Ok(self.inner.core.committed_roster().list())
    }

    /// What this node is by the newest committed membership, and whether it
    /// votes; `None` before a membership that holds it has come.
    pub fn own_kind(&self) -> Option<(MemberKind, bool)> {
        let roster = self.inner.core.committed_roster();
        roster.members.get(&self.id()).map(|view| (view.member.kind, view.is_voter))
    }

    /// Adds a member (its id is drawn here) and returns it with the new list.
    ///
    /// # Errors
    /// etcd's, when the URLs are taken or the cluster is not well enough.
    pub async fn member_add(
        &self,
        peer_urls: Vec<String>,
        kind: MemberKind,
    ) -> Result<(Member, Vec<MemberView>), NodeError> {
        let changed = self.change_members(MemberChange::Add { peer_urls, kind }).await?;
        let member = changed.member.ok_or(NodeError::MemberNotFound)?;
        Ok((member, changed.members))
    }

    /// Removes a member. A leader that is to go hands over first.
    ///
    /// # Errors
    /// etcd's, when the member is unknown or the quorum would be lost.
    pub async fn member_remove(&self, id: NodeId) -> Result<Vec<MemberView>, NodeError> {
        Ok(self.change_members(MemberChange::Remove { id }).await?.members)
    }

    /// Changes where peers reach a member.
    ///
    /// # Errors
    /// etcd's, when the member is unknown or the URLs are taken.
    pub async fn member_update(
        &self,
        id: NodeId,
        peer_urls: Vec<String>,
    ) -> Result<Vec<MemberView>, NodeError> {
        Ok(self.change_members(MemberChange::Update { id, peer_urls }).await?.members)
    }

    /// Makes a caught-up learner a voter.
    ///
    /// # Errors
    /// etcd's, when it is not a learner or has not caught up.
    pub async fn member_promote(&self, id: NodeId) -> Result<Vec<MemberView>, NodeError> {
        Ok(self.change_members(MemberChange::Promote { id }).await?.members)
    }

    async fn change_members(&self, change: MemberChange) -> Result<MemberChanged, NodeError> {
        let deadline = self.inner.core.deadline(None);
        match self.inner.desk.ask_leader(Ask::Member(change), deadline).await? {
            Answer::Member(changed) => {
                // What this node tells next is not older than what it told now.
                self.inner.core.applied(changed.index, deadline).await?;
                Ok(changed)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Hands leadership to a voter; only the leader can.
    ///
    /// # Errors
    /// `NotLeader`, `BadTransferee`, or `TransferTimeout`.
    pub async fn move_leader(&self, target: NodeId) -> Result<(), NodeError> {
        let deadline = self.inner.core.deadline(None);
        self.inner.desk.membership.move_leader(target, deadline).await
    }

    /// Where the node stands.
    pub fn status(&self) -> NodeStatus {
        self.inner.status()
    }

    /// Changes whenever the leader this node follows changes; 0 is none.
    pub fn leader_changes(&self) -> tokio::sync::watch::Receiver<NodeId> {
        self.inner.core.leader_changes()
    }

    /// Whom this node follows, and whether it leads itself.
    pub fn leadership(&self) -> Leadership {
        self.inner.core.leadership()
    }

    /// The node's end, for whoever runs it.
    pub fn exit(&self) -> &Exit {
        &self.inner.core.exit
    }

    /// Returns when what `revision` made unreadable is deleted on this node's disk.
    ///
    /// # Errors
    /// When the node stops before.
    pub async fn swept(&self, space: Space, revision: Revision) -> Result<(), NodeError> {
        let mut swept = self.inner.core.swept.subscribe();
        let reached = swept.wait_for(|swept| *swept.clone().of(space) >= revision);
        tokio::select! {
            _ = reached => Ok(()),
            _ = self.inner.core.exit.wait() => Err(NodeError::Stopped),
        }
    }

    /// Rewrites the state's files, dropping what was deleted.
    ///
    /// # Errors
    /// When the node is stopping.
    pub async fn defragment(&self) -> Result<(), NodeError> {
        self.inner.defragment().await
    }

    /// This node's state as one file for an operator, to be read piece by piece.
    ///
    /// # Errors
    /// When the disk fails or is full.
    pub async fn snapshot_file(&self) -> Result<Packing, NodeError> {
        self.inner.snapshot_file().await
    }

    /// Stops: hands leadership over if it can, ends every task, then Raft, and
    /// makes the state durable.
    pub async fn stop(&self) {
        self.inner.core.exit.announce(ExitReason::Stopped);
        self.inner.stop(HAND_OVER_MAX).await;
    }

    /// A request that met the node's end says so.
    fn ends_as_stopped<T>(&self, result: Result<T, NodeError>) -> Result<T, NodeError> {
        match result {
            Err(NodeError::Timeout | NodeError::NoLeader) if self.inner.core.exit.reason().is_some() => {
                Err(NodeError::Stopped)
            }
            other => other,
        }
    }
}

fn unexpected(answer: &Answer) -> NodeError {
    NodeError::Internal(format!("the leader answered another question: {answer:?}"))
}
