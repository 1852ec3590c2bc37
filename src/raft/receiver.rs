//! What a node does when a peer calls: checks whom the call is for, hands it to
//! openraft, and stands between openraft and a second snapshot.
//!
//! Free of any wire: the gRPC service and a simulated network both end here.
//! Everything a peer sends is taken as possibly malformed; nothing it can send
//! makes this node panic or stop, except a snapshot that contradicts what is
//! committed, which openraft itself treats as the end (as it must).

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use openraft::errors::RaftError;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::peers::Peers;
use super::state_machine::Snapshot;
use super::state_machine::SnapshotData;
use super::transport::{
    AppendRequest, AppendResult, BoxStream, Envelope, Local, PeerError, Refusal, TransferLeaderRequest,
    TransferLeaderResult, VoteRequest, VoteResponse,
};
use super::types::{LogId, SnapshotMeta, StoredMembership, TypeConfig, Vote};
use super::{Raft, record};
use crate::env::{EnvRef, off_thread};
use crate::storage::StorageError;
use crate::storage::snapshot::{Incoming, Manifest, SnapshotStore};
use crate::types::NodeId;

/// The receiving end of all peer calls of one node.
pub struct Receiver {
    local: Local,
    raft: Raft,
    snapshots: Arc<SnapshotStore>,
    peers: Arc<Peers>,
    /// Held from a snapshot's first byte until openraft has dealt with it.
    /// openraft forgets the log ids below a snapshot as soon as it is handed
    /// over, while the install still waits in a queue; a second one in that
    /// time can make it look up an entry that is gone, and panic (#2116).
    install: Arc<AsyncMutex<()>>,
    installs: TaskTracker,
    stopping: CancellationToken,
    /// Callers that were refused, so that each is logged once.
    refused: Mutex<HashSet<(NodeId, Refusal)>>,
}

impl Receiver {
    pub(super) fn new(raft: Raft, snapshots: Arc<SnapshotStore>, peers: Arc<Peers>) -> Receiver {
        Receiver {
            local: peers.local(),
            raft,
            snapshots,
            peers,
            install: Arc::default(),
            installs: TaskTracker::new(),
            stopping: CancellationToken::new(),
            refused: Mutex::default(),
        }
    }

    /// Who this node is.
    pub fn local(&self) -> Local {
        self.local
    }

    /// Whether a call is for this node. A refused caller is logged once.
    ///
    /// # Errors
    /// [`Refusal`], to be answered as it is.
    pub fn check(&self, envelope: &Envelope) -> Result<(), Refusal> {
        let checked = self.local.check(envelope);
        if checked.is_ok() {
            self.peers.heard_from(envelope.sender);
        }
        if let Err(refusal) = checked
            && self.refused.lock().insert((envelope.sender, refusal))
        {
            tracing::warn!(
                sender = format_args!("{:x}", envelope.sender),
                cluster = format_args!("{:x}", envelope.cluster),
                target = format_args!("{:x}", envelope.target),
                target_disk = format_args!("{:x}", envelope.target_disk),
                "refused a peer that takes this node for another: {refusal}"
            );
        }
        checked
    }

    /// Appends; answers in the order of the requests, ends after the first
    /// that is an error. A malformed request ends the stream with its error.
    pub fn append(
        &self,
        requests: BoxStream<Result<AppendRequest, PeerError>>,
    ) -> BoxStream<Result<AppendResult, PeerError>> {
        let broken = Arc::new(Mutex::new(None));
        let seen = broken.clone();
        let requests = requests.scan((), move |(), request| {
            let request = request.map_err(|error| *seen.lock() = Some(error)).ok();
            std::future::ready(request)
        });
        let answers = self.raft.stream_append(requests).map(|answer| answer.map_err(stopped));
        let rest = futures_util::stream::once(async move { broken.lock().take() });
        let answers = answers.chain(rest.filter_map(|error| std::future::ready(error.map(Err))));
        // An idle stream would otherwise keep the listener from closing.
        answers.take_until(self.stopping.clone().cancelled_owned()).boxed()
    }

    /// One append without entries.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when this node is stopping.
    pub async fn heartbeat(&self, request: AppendRequest) -> Result<AppendResult, PeerError> {
        let previous = request.prev_log_id;
        let last = request.entries.last().map(|entry| entry.log_id).or(previous);
        let answer = self.raft.append_entries(request).await.map_err(failed)?;
        if answer.is_conflict() && previous.is_none() {
            return Err(PeerError::Failed("a conflict before the first entry".to_owned()));
        }
        Ok(answer.into_stream_result(previous, last))
    }

    /// A request for a vote.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when this node is stopping.
    pub async fn vote(&self, request: VoteRequest) -> Result<VoteResponse, PeerError> {
        self.raft.vote(request).await.map_err(failed)
    }

    /// Whether a vote would be granted.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when this node is stopping.
    pub async fn pre_vote(&self, request: VoteRequest) -> Result<VoteResponse, PeerError> {
        self.raft.pre_vote(request).await.map_err(failed)
    }

    /// The leader passes its office on, to this node or another.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when this node is stopping.
    pub async fn transfer_leader(
        &self,
        request: TransferLeaderRequest,
    ) -> Result<TransferLeaderResult, PeerError> {
        self.raft.handle_transfer_leader(request).await.map_err(stopped)
    }

    /// Begins to receive a snapshot from the leader with this vote.
    ///
    /// # Errors
    /// [`PeerError::Busy`] while another is received or installed, or when the
    /// disk refuses; [`PeerError::Failed`] when the manifest is unusable.
    pub async fn begin_snapshot(&self, leader: Vote, manifest: Bytes) -> Result<Reception, PeerError> {
        let busy = || PeerError::Busy("another snapshot is being received or installed".to_owned());
        let guard = self.install.clone().try_lock_owned().map_err(|_| busy())?;
        let manifest = Manifest::decode(&manifest).map_err(unusable)?;
        let snapshots = self.snapshots.clone();
        let incoming = blocking(self.peers.env(), move || snapshots.receive(manifest)).await?;
        Ok(Reception {
            leader,
            guard,
            incoming: Some(incoming),
            received: 0,
            raft: self.raft.clone(),
            env: self.peers.env().clone(),
            installs: self.installs.clone(),
        })
    }

    /// The tasks that receive and install snapshots; awaited at [`Receiver::stop`].
    pub fn tasks(&self) -> &TaskTracker {
        &self.installs
    }

    /// Ends when this node stops; whatever waits for a peer should end with it.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Ends every stream, and waits until no snapshot is being received or
    /// installed. To be called after Raft has stopped, which refuses new ones.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.installs.close();
        self.installs.wait().await;
    }
}

/// A snapshot on its way in. Dropped, it is forgotten, and another may begin.
pub struct Reception {
    leader: Vote,
    guard: OwnedMutexGuard<()>,
    incoming: Option<Incoming>,
    received: u64,
    raft: Raft,
    env: EnvRef,
    installs: TaskTracker,
}

impl Reception {
    /// Takes the next bytes; returns how many have come so far.
    ///
    /// # Errors
    /// [`PeerError::Failed`] when they are not what the manifest says,
    /// [`PeerError::Busy`] when the disk refuses them.
    pub async fn write(&mut self, bytes: Bytes) -> Result<u64, PeerError> {
        let Some(mut incoming) = self.incoming.take() else {
            return Err(PeerError::Failed("the snapshot failed before".to_owned()));
        };
        self.received += bytes.len() as u64;
        let incoming = blocking(&self.env, move || incoming.write(&bytes).map(|()| incoming)).await?;
        self.incoming = Some(incoming);
        Ok(self.received)
    }

    /// Everything has arrived: checks it, makes it durable, hands it to
    /// openraft, and returns the vote that this node holds afterwards.
    ///
    /// The work goes on in a task of its own when the caller gives up, and
    /// keeps other snapshots out for as long as it takes.
    ///
    /// # Errors
    /// As [`Reception::write`]; [`PeerError::Failed`] when this node is stopping.
    pub async fn install(self) -> Result<Vote, PeerError> {
        let Reception { leader, guard, incoming, raft, env, installs, .. } = self;
        let Some(incoming) = incoming else {
            return Err(PeerError::Failed("the snapshot failed before".to_owned()));
        };
        let task = installs.spawn(async move {
            let _guard = guard;
            let received = blocking(&env, move || incoming.finish()).await?;
            let meta = snapshot_meta(received.manifest()).map_err(unusable)?;
            if meta.last_log_id.as_ref().is_none_or(|id| id.leader_id > *leader.leader_id()) {
                // openraft would panic on it, rightly: no leader has such a snapshot.
                return Err(PeerError::Failed(format!(
                    "{meta} cannot come from a leader with vote {leader}"
                )));
            }
            let snapshot = Snapshot { meta, snapshot: SnapshotData::Received(received) };
            let answer = raft.install_full_snapshot(leader, snapshot).await.map_err(stopped)?;
            // The answer comes when the install is done, but what was queued
            // behind it may not be: a round through the core drains that.
            raft.with_raft_state(|_| ()).await.map_err(stopped)?;
            Ok(answer.vote)
        });
        task.await.map_err(|error| PeerError::Failed(format!("the install ended: {error}")))?
    }
}

/// What openraft is told of a snapshot.
///
/// # Errors
/// [`StorageError::Corrupt`] when the manifest's membership is damaged.
pub(super) fn snapshot_meta(manifest: &Manifest) -> Result<SnapshotMeta, StorageError> {
    let last_membership = match manifest.membership.is_empty() {
        true => StoredMembership::default(),
        false => record::decode_stored_membership(&manifest.membership)?,
    };
    Ok(SnapshotMeta { last_log_id: applied_id(manifest.last), last_membership })
}

/// A position as openraft's log id; the state's default stands for "nothing".
pub(super) fn applied_id(position: crate::storage::layout::LogPosition) -> Option<LogId> {
    (position != Default::default()).then(|| LogId::from(position))
}

async fn blocking<T: Send + 'static>(
    env: &EnvRef,
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, PeerError> {
    match off_thread(env, work).await {
        Ok(done) => done.map_err(unusable),
        Err(error) => Err(PeerError::Failed(format!("the disk's thread ended: {error}"))),
    }
}

/// A snapshot that cannot be taken in stops nothing: the state is untouched.
fn unusable(error: StorageError) -> PeerError {
    match error {
        StorageError::Corrupt { .. } => PeerError::Failed(error.to_string()),
        other => PeerError::Busy(other.to_string()),
    }
}

fn stopped(error: openraft::errors::Fatal<TypeConfig>) -> PeerError {
    PeerError::Failed(format!("this node is stopping: {error}"))
}

fn failed(error: RaftError<TypeConfig>) -> PeerError {
    PeerError::Failed(format!("this node is stopping: {error}"))
}
