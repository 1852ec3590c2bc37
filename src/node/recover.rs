//! A new cluster out of old data: the lone survivor of a lost quorum, or a
//! snapshot that an operator kept. Both work on a data directory that no
//! process uses, and make a new one beside it before anything old is touched.
//!
//! A recovered cluster has another id than the one its data comes from, so that
//! members of the old one can neither reach it nor be mistaken for its own.
//! Whether this is wanted is the caller's question to the operator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::storage::{RaftLogReader, RaftLogStorage};

use super::NodeError;
use super::core::internal;
use super::ids::{initial_cluster_id, initial_node_id, joining_node_id, recovered_cluster_id};
use super::options::InitialMember;
use crate::env::EnvRef;
use crate::machine::{Entry, Machine, Payload};
use crate::raft::{
    EntryPayload, LogId, LogStore, LogStoreOptions, Membership, StoredMembership, Vote, record,
};
use crate::storage::layout::LogPosition;
use crate::storage::log::{LogEngine, SegmentLog, SegmentLogOptions};
use crate::storage::{DataDir, DataDirOptions, Standing, StateDb, StateOptions, StorageError, archive};
use crate::types::{ClusterId, Member, MemberKind, NodeId, Revision};

/// Entries applied in one chunk.
const CHUNK_ENTRIES: u64 = 1_000;

/// A cluster of one, out of the data of one member.
#[derive(Clone, Debug)]
pub struct ForceNewCluster {
    /// The data directory of the survivor.
    pub data_dir: PathBuf,
    /// Its name in the new cluster; `None` keeps the one the old cluster knew.
    pub name: Option<String>,
    /// Where peers will reach it; none keeps where the old cluster's did.
    pub peer_urls: Vec<String>,
    /// Where clients will reach it; none keeps where the old cluster's did.
    pub client_urls: Vec<String>,
    /// What may be tuned of the state database.
    pub state: StateOptions,
}

/// A member of a new cluster, out of a snapshot file. To be done for each
/// member with the same file, members and token.
#[derive(Clone, Debug)]
pub struct RestoreSnapshot {
    /// The snapshot file.
    pub file: PathBuf,
    /// The data directory to make; must not exist, or be empty.
    pub data_dir: PathBuf,
    /// Which of the members this is.
    pub name: String,
    /// All members of the new cluster.
    pub members: Vec<InitialMember>,
    /// Keeps clusters with equal members apart.
    pub token: String,
    /// What may be tuned of the state database.
    pub state: StateOptions,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The new cluster.
    pub cluster_id: ClusterId,
    /// The node in it.
    pub node_id: NodeId,
    /// The store's revision.
    pub revision: Revision,
    /// Where the old data directory is now; none after a restore.
    pub backup: Option<PathBuf>,
}

/// Makes a cluster of one out of a member's data, every entry of its log
/// included, committed or not: after a lost quorum nobody can tell which were.
/// The old directory is kept beside the new one.
///
/// # Errors
/// [`NodeError::NotAdmitted`] when the directory is in use, not a member's, or
/// an earlier recovery's leftovers are in the way; [`NodeError::Internal`] when
/// the disk fails. The old directory is then as it was.
pub async fn force_new_cluster(request: ForceNewCluster, env: &EnvRef) -> Result<Recovered, NodeError> {
    let making = beside(&request.data_dir, "recovering");
    let backup = beside(&request.data_dir, "before-recovery");
    for path in [&making, &backup] {
        if path.exists() {
            return Err(NodeError::NotAdmitted(format!(
                "{} is in the way, from an earlier recovery; move it away first",
                path.display()
            )));
        }
    }
    if !request.data_dir.exists() {
        return Err(NodeError::NotAdmitted(format!("{} does not exist", request.data_dir.display())));
    }
    let no_ballast = DataDirOptions { ballast_bytes: 0 };
    let old = DataDir::open(&request.data_dir, no_ballast.clone(), env).map_err(refused)?;
    let Some((old_cluster, old_node)) = old.identity().ids() else {
        return Err(NodeError::NotAdmitted(format!(
            "{} was never a member's: there is nothing to recover",
            request.data_dir.display()
        )));
    };
    let new = DataDir::open(&making, no_ballast, env).map_err(refused)?;
    let cluster_id = recovered_cluster_id(old_cluster, old_node, env.random_u64());
    let node_id = joining_node_id(cluster_id, new.identity().disk);
    let become_member = |recorded: Option<Member>| {
        let recorded = recorded.unwrap_or_default();
        let or = |given: &[String], known: Vec<String>| if given.is_empty() { known } else { given.to_vec() };
        let member = Member {
            id: node_id,
            name: request.name.clone().unwrap_or(recorded.name),
            peer_urls: or(&request.peer_urls, recorded.peer_urls),
            client_urls: or(&request.client_urls, recorded.client_urls),
            kind: MemberKind::Voter,
            disk: new.identity().disk,
        };
        match member.name.is_empty() || member.peer_urls.is_empty() {
            true => Err(NodeError::Invalid(
                "the data does not tell this node's name and peer URLs; \
                 give them with --name and --initial-advertise-peer-urls"
                    .to_owned(),
            )),
            false => Ok(member),
        }
    };
    let copied = copy(&old, &new, &request.state, env, old_node, become_member).await;
    let revision = copied.inspect_err(|_| {
        // What is half made would stand in the way of the next try.
        if let Err(error) = std::fs::remove_dir_all(&making) {
            tracing::warn!(%error, path = %making.display(), "the unfinished recovery is left behind");
        }
    })?;
    new.set_standing(Standing::Member { cluster: cluster_id, node: node_id }).map_err(refused)?;
    // Both locks are let go of before the names change.
    drop((old, new));
    let rename = |from: &Path, to: &Path| {
        std::fs::rename(from, to).map_err(|error| internal(format!("{}: {error}", to.display())))
    };
    rename(&request.data_dir, &backup)?;
    rename(&making, &request.data_dir)?;
    sync_parent(&request.data_dir)?;
    Ok(Recovered { cluster_id, node_id, revision, backup: Some(backup) })
}

/// Copies the state of `old` into `new`, applies the rest of the old log to it,
/// and ends it with a membership of one: what `become_member` makes of the
/// newest record of `old_node`.
async fn copy(
    old: &DataDir,
    new: &DataDir,
    state: &StateOptions,
    env: &EnvRef,
    old_node: NodeId,
    become_member: impl FnOnce(Option<Member>) -> Result<Member, NodeError>,
) -> Result<Revision, NodeError> {
    let old_db = StateDb::open(&old.state_path(), state).map_err(refused)?;
    old_db.checkpoint(&new.state_path()).map_err(refused)?;
    drop(old_db);
    let db = StateDb::open(&new.state_path(), state).map_err(refused)?;
    let mut machine = Machine::open(db.clone()).map_err(refused)?;
    let mut last = machine.applied();
    let stored = machine.membership().map(|bytes| record::decode_stored_membership(bytes)).transpose();
    let mut recorded = stored.map_err(refused)?.and_then(|stored| record_of(stored.membership(), old_node));
    let engine = open_log(&old.raft_path(), env)?;
    let applied = (last.index > 0).then_some(last.index);
    let mut log = LogStore::open(engine, &LogStoreOptions::default(), applied).map_err(refused)?;
    let end = log.get_log_state().await.map_err(internal)?.last_log_id.map_or(0, |id: LogId| id.index);
    let mut reader = log.get_log_reader().await;
    // The first entry of a log has index 0, and so has "nothing applied".
    let mut next = applied.map_or(0, |index| index + 1);
    while next <= end {
        let upto = (next + CHUNK_ENTRIES).min(end + 1);
        let entries = reader.try_get_log_entries(next..upto).await.map_err(internal)?;
        let Some(newest) = entries.last() else { break };
        last = LogPosition::from(&newest.log_id);
        next = last.index + 1;
        let entries = entries.into_iter().map(|entry| {
            let position = LogPosition::from(&entry.log_id);
            let (time_ms, payload) = match entry.payload {
                EntryPayload::Normal(proposal) => (proposal.time_ms, Payload::Command(proposal.body)),
                EntryPayload::Blank => (0, Payload::Blank),
                // The memberships of the old cluster mean nothing any more, but
                // for what they say of this node.
                EntryPayload::Membership(membership) => {
                    recorded = record_of(&membership, old_node).or(recorded.take());
                    (0, Payload::Blank)
                }
            };
            Entry { position, time_ms, payload }
        });
        machine.apply(entries.collect()).map_err(refused)?;
    }
    let member = become_member(recorded)?;
    let node_id = member.id;
    seed(new, machine, last, vec![member], node_id, env).await
}

fn record_of(membership: &Membership, id: NodeId) -> Option<Member> {
    membership.nodes().find(|(node, _)| **node == id).map(|(_, member)| member.clone())
}

/// Makes one member of a new cluster out of a snapshot file.
///
/// # Errors
/// [`NodeError::Invalid`] when the members do not name this one,
/// [`NodeError::NotAdmitted`] when the directory is in use or not empty,
/// [`NodeError::Internal`] when the file is damaged or the disk fails.
pub async fn restore_snapshot(request: RestoreSnapshot, env: &EnvRef) -> Result<Recovered, NodeError> {
    let own = request.members.iter().find(|member| member.name == request.name).ok_or_else(|| {
        NodeError::Invalid(format!("initial-cluster does not name this node, {:?}", request.name))
    })?;
    let node_id = initial_node_id(&request.token, own);
    let cluster_id = initial_cluster_id(&request.token, &request.members);
    let dir = DataDir::open(&request.data_dir, DataDirOptions::default(), env).map_err(refused)?;
    if dir.identity().ids().is_some() || dir.state_path().exists() {
        return Err(NodeError::NotAdmitted(format!(
            "{} holds a node's data already; name an empty directory with --data-dir",
            request.data_dir.display()
        )));
    }
    archive::unpack(&request.file, &dir.state_path()).map_err(refused)?;
    let db = StateDb::open(&dir.state_path(), &request.state).map_err(refused)?;
    let machine = Machine::open(db.clone()).map_err(refused)?;
    let last = machine.applied();
    let disk = dir.identity().disk;
    let members = request.members.iter().map(|member| {
        let id = initial_node_id(&request.token, member);
        Member {
            id,
            name: member.name.clone(),
            peer_urls: member.peer_urls.clone(),
            client_urls: Vec::new(),
            kind: MemberKind::Voter,
            // The others' disks are not known here, and this record has to be
            // equal on all of them.
            disk: if request.members.len() == 1 { disk } else { 0 },
        }
    });
    let revision = seed(&dir, machine, last, members.collect(), node_id, env).await?;
    dir.set_standing(Standing::Member { cluster: cluster_id, node: node_id }).map_err(refused)?;
    Ok(Recovered { cluster_id, node_id, revision, backup: None })
}

/// Ends a state with a membership, and gives it a log that goes on from there.
/// Equal states and members make equal ends, so that several nodes restored
/// from one snapshot agree on the entry.
async fn seed(
    dir: &DataDir,
    mut machine: Machine,
    last: LogPosition,
    members: Vec<Member>,
    node_id: NodeId,
    env: &EnvRef,
) -> Result<Revision, NodeError> {
    let voters: BTreeSet<NodeId> = members.iter().map(|member| member.id).collect();
    let first = voters.first().copied().unwrap_or(node_id);
    let position = LogPosition { term: last.term + 1, node: first, index: last.index + 1 };
    let nodes: BTreeMap<NodeId, Member> = members.into_iter().map(|member| (member.id, member)).collect();
    let membership = Membership::new(vec![voters], nodes).map_err(internal)?;
    let stored = StoredMembership::new(Some(LogId::from(position)), membership);
    let payload = Payload::Membership(record::encode_stored_membership(&stored).into());
    machine.apply(vec![Entry { position, time_ms: 0, payload }]).map_err(refused)?;
    let revision = machine.published().view().revision;
    machine.db().flush().map_err(refused)?;
    drop(machine);
    let engine = open_log(&dir.raft_path(), env)?;
    let mut log =
        LogStore::open(engine, &LogStoreOptions::default(), Some(position.index)).map_err(refused)?;
    log.purge(LogId::from(position)).await.map_err(internal)?;
    // The vote is durable on return, and with it everything queued before it.
    log.save_vote(&Vote::new(position.term, node_id)).await.map_err(internal)?;
    Ok(revision)
}

fn open_log(path: &Path, env: &EnvRef) -> Result<Arc<dyn LogEngine>, NodeError> {
    // Nothing else runs here: the failed call itself tells of the error.
    let hook = Arc::new(|error: &StorageError| tracing::error!(%error, "the log cannot be written"));
    Ok(Arc::new(SegmentLog::open(path, &SegmentLogOptions::default(), env.clone(), hook).map_err(refused)?))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{suffix}"));
    path.with_file_name(name)
}

fn sync_parent(path: &Path) -> Result<(), NodeError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(internal)
}

fn refused(error: StorageError) -> NodeError {
    match error {
        StorageError::Refused(reason) => NodeError::NotAdmitted(reason),
        other => internal(other),
    }
}
