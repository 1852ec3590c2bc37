//! The other members, as this node sees them: where they are, how they are,
//! and every call to them with its deadline, its breaker and its retries.
//!
//! The breaker keeps this node from queueing work for a peer that does not
//! answer. It never stands before votes and heartbeats, because those are how
//! a cluster heals, and whichever of them gets through closes it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use super::transport::{
    AppendRequest, AppendResult, BoxStream, Envelope, Local, PeerError, PeerFuture, Refusal,
    SnapshotTimeouts, TransferLeaderRequest, TransferLeaderResult, Transport, VoteRequest, VoteResponse,
};
use super::types::Vote;
use crate::env::EnvRef;
use crate::resilience::{
    Admission, Backoff, BackoffOptions, Breaker, BreakerOptions, BreakerState, Budget, BudgetOptions,
};
use crate::storage::snapshot::StoredSnapshot;
use crate::telemetry;
use crate::types::{DiskId, Member, NodeId};

/// Between two attempts of a call.
const RETRY: BackoffOptions =
    BackoffOptions::exponential(Duration::from_millis(20), Duration::from_millis(500));
/// How long a breaker stays open. Short, because a cluster waits for its peers.
const OPEN: BackoffOptions = BackoffOptions::exponential(Duration::from_millis(200), Duration::from_secs(2));
/// A call that finds out whether a peer is back, and is never heard of again,
/// stands in the way of the next for this long.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the members are reached. Shared with whoever opens connections.
#[derive(Default)]
pub struct Directory {
    members: RwLock<BTreeMap<NodeId, Record>>,
    changes: AtomicU64,
}

struct Record {
    peer_urls: Vec<String>,
    disk: DiskId,
    generation: u64,
}

impl Directory {
    /// Takes over what the membership says of a member. Connections to an
    /// address that it no longer has are not used for new calls.
    pub fn update(&self, id: NodeId, member: &Member) {
        if let Some(known) = self.members.read().get(&id)
            && known.peer_urls == member.peer_urls
            && known.disk == member.disk
        {
            return;
        }
        let mut members = self.members.write();
        let moved = members.get(&id).is_none_or(|known| known.peer_urls != member.peer_urls);
        let generation = match members.get(&id) {
            Some(known) if !moved => known.generation,
            _ => self.changes.fetch_add(1, Ordering::Relaxed) + 1,
        };
        let (peer_urls, disk) = (member.peer_urls.clone(), member.disk);
        members.insert(id, Record { peer_urls, disk, generation });
    }

    /// Forgets a member that was removed.
    pub fn remove(&self, id: NodeId) {
        self.members.write().remove(&id);
    }

    /// The URLs of a member's peer listener, and a number that changes with them.
    pub fn urls(&self, id: NodeId) -> (Vec<String>, u64) {
        let members = self.members.read();
        members.get(&id).map(|known| (known.peer_urls.clone(), known.generation)).unwrap_or_default()
    }

    /// A number that changes whenever a member's URLs do; 0 when it is unknown.
    pub fn generation(&self, id: NodeId) -> u64 {
        self.members.read().get(&id).map_or(0, |known| known.generation)
    }

    /// A member's data directory; 0 when it is not known.
    pub fn disk(&self, id: NodeId) -> DiskId {
        self.members.read().get(&id).map_or(0, |known| known.disk)
    }
}

/// Which failures of a call are answered by trying again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// None.
    Never,
    /// Those after which the peer has surely done nothing.
    IfNotDone,
    /// All that can pass: the call may safely happen twice.
    Always,
}

/// Times that calls to peers keep to.
#[derive(Clone, Copy, Debug)]
pub struct PeerTimeouts {
    /// For opening a stream, and for the answer to anything sent on it.
    pub append: Duration,
    /// For snapshots.
    pub snapshot: SnapshotTimeouts,
}

/// The other members.
pub struct Peers {
    local: Local,
    directory: Arc<Directory>,
    transport: Arc<dyn Transport>,
    env: EnvRef,
    timeouts: PeerTimeouts,
    health: Mutex<BTreeMap<NodeId, Health>>,
    budget: Mutex<Budget>,
}

struct Health {
    breaker: Breaker,
    refusal: Option<Refusal>,
    label: Arc<str>,
}

impl Peers {
    /// The members in `directory`, reached by `transport`.
    pub fn new(
        local: Local,
        directory: Arc<Directory>,
        transport: Arc<dyn Transport>,
        env: EnvRef,
        timeouts: PeerTimeouts,
    ) -> Arc<Peers> {
        let budget = Mutex::new(Budget::new(BudgetOptions::default()));
        Arc::new(Peers { local, directory, transport, env, timeouts, health: Mutex::default(), budget })
    }

    /// Where the members are.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Who this node is.
    pub fn local(&self) -> Local {
        self.local
    }

    pub(super) fn env(&self) -> &EnvRef {
        &self.env
    }

    pub(super) fn timeouts(&self) -> PeerTimeouts {
        self.timeouts
    }

    /// How the breaker before a peer stands.
    pub fn breaker(&self, target: NodeId) -> BreakerState {
        self.health(target, |health| health.breaker.state())
    }

    /// Why a peer refuses this node, if its newest answer was a refusal.
    pub fn refusal(&self, target: NodeId) -> Option<Refusal> {
        self.health(target, |health| health.refusal)
    }

    /// One control call, tried again within `timeout` as `retry` allows.
    ///
    /// # Errors
    /// The newest [`PeerError`].
    pub async fn call(
        &self,
        target: NodeId,
        path: &'static str,
        body: Bytes,
        timeout: Duration,
        retry: Retry,
    ) -> Result<Bytes, PeerError> {
        let deadline = self.env.monotonic() + timeout;
        let mut backoff = Backoff::new(RETRY);
        loop {
            let left = deadline.saturating_sub(self.env.monotonic());
            let error = match self.attempt(target, path, body.clone(), left).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let allowed = match retry {
                Retry::Never => false,
                Retry::IfNotDone => error.may_retry() && !error.may_have_happened(),
                Retry::Always => error.may_retry(),
            };
            let pause = backoff.next_wait(self.env.random_u64());
            let in_time = self.env.monotonic() + pause < deadline;
            if !allowed || !in_time || !self.budget.lock().on_failure() {
                return Err(error);
            }
            let peer = self.health(target, |health| health.label.clone());
            metrics::counter!(telemetry::PEER_RETRIES, "peer" => peer).increment(1);
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(
        &self,
        target: NodeId,
        path: &'static str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, PeerError> {
        self.admit(target)?;
        let call = self.transport.call(self.envelope(target), path, body, timeout);
        let answer = within(timeout, call).await;
        if answer.is_ok() {
            self.budget.lock().on_success();
        }
        self.note(target, &answer);
        answer
    }

    /// One control stream, both ways. Keeping it moving is the caller's.
    ///
    /// # Errors
    /// [`PeerError`] when it could not be opened.
    pub async fn call_stream(
        &self,
        target: NodeId,
        path: &'static str,
        bodies: BoxStream<Bytes>,
    ) -> Result<BoxStream<Result<Bytes, PeerError>>, PeerError> {
        self.admit(target)?;
        let timeout = self.timeouts.append;
        let opened =
            within(timeout, self.transport.call_stream(self.envelope(target), path, bodies, timeout)).await;
        self.note(target, &opened);
        opened
    }

    pub(super) async fn append(
        &self,
        target: NodeId,
        requests: BoxStream<AppendRequest>,
    ) -> Result<BoxStream<Result<AppendResult, PeerError>>, PeerError> {
        self.admit(target)?;
        let timeout = self.timeouts.append;
        let opened = within(timeout, self.transport.append(self.envelope(target), requests, timeout)).await;
        self.note(target, &opened);
        opened
    }

    pub(super) async fn heartbeat(
        &self,
        target: NodeId,
        request: AppendRequest,
        timeout: Duration,
    ) -> Result<AppendResult, PeerError> {
        let started = self.env.monotonic();
        let call = self.transport.heartbeat(self.envelope(target), request, timeout);
        let answer = within(timeout, call).await;
        if answer.is_ok() {
            let rtt = self.env.monotonic().saturating_sub(started);
            let peer = self.health(target, |health| health.label.clone());
            metrics::histogram!(telemetry::PEER_RTT_SECONDS, "peer" => peer).record(rtt);
        }
        self.note(target, &answer);
        answer
    }

    pub(super) async fn vote(
        &self,
        target: NodeId,
        request: VoteRequest,
        pre: bool,
        timeout: Duration,
    ) -> Result<VoteResponse, PeerError> {
        let to = self.envelope(target);
        let call = match pre {
            true => self.transport.pre_vote(to, request, timeout),
            false => self.transport.vote(to, request, timeout),
        };
        let answer = within(timeout, call).await;
        self.note(target, &answer);
        answer
    }

    pub(super) async fn transfer_leader(
        &self,
        target: NodeId,
        request: TransferLeaderRequest,
        timeout: Duration,
    ) -> Result<TransferLeaderResult, PeerError> {
        let call = self.transport.transfer_leader(self.envelope(target), request, timeout);
        let answer = within(timeout, call).await;
        self.note(target, &answer);
        answer
    }

    pub(super) async fn snapshot(
        &self,
        target: NodeId,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
    ) -> Result<Vote, PeerError> {
        self.admit(target)?;
        let size_bytes = snapshot.manifest().size_bytes();
        let sent =
            self.transport.snapshot(self.envelope(target), leader, snapshot, self.timeouts.snapshot).await;
        self.note(target, &sent);
        if sent.is_ok() {
            let peer = self.health(target, |health| health.label.clone());
            metrics::counter!(telemetry::SNAPSHOTS_SENT, "peer" => peer).increment(1);
            metrics::counter!(telemetry::SNAPSHOT_SENT_BYTES).increment(size_bytes);
        }
        sent
    }

    /// A peer has called: calls to it are worth trying again.
    pub(super) fn heard_from(&self, sender: NodeId) {
        self.health(sender, |health| {
            let before = health.breaker.state();
            if before != BreakerState::Closed {
                health.breaker.on_success();
                health.export(before);
            }
        });
    }

    /// Tells the breaker how a call went, whoever admitted it.
    pub(super) fn note<T>(&self, target: NodeId, answer: &Result<T, PeerError>) {
        let now = self.env.monotonic();
        self.health(target, |health| {
            let before = health.breaker.state();
            match answer {
                Err(error) if error.is_failure() => {
                    metrics::counter!(telemetry::PEER_FAILURES, "peer" => health.label.clone()).increment(1);
                    health.breaker.on_failure(now, self.env.random_u64())
                }
                // Whoever answers, even to refuse, is alive.
                _ => health.breaker.on_success(),
            }
            health.export(before);
            let refusal = match answer {
                Err(PeerError::Refused(refusal)) => Some(*refusal),
                Ok(_) => None,
                Err(_) => return,
            };
            if health.refusal != refusal {
                health.refusal = refusal;
                if let Some(refusal) = refusal {
                    let peer = &*health.label;
                    tracing::warn!(peer, "a peer refuses this node's calls: {refusal}");
                }
            }
        });
    }

    /// Asks the breaker.
    fn admit(&self, target: NodeId) -> Result<(), PeerError> {
        let now = self.env.monotonic();
        self.health(target, |health| {
            let before = health.breaker.state();
            let admission = health.breaker.admit(now);
            health.export(before);
            match admission {
                Admission::Pass | Admission::Probe => Ok(()),
                Admission::Refuse { .. } => {
                    Err(PeerError::NotSent("the peer does not answer; its breaker is open".to_owned()))
                }
            }
        })
    }

    fn health<T>(&self, target: NodeId, look: impl FnOnce(&mut Health) -> T) -> T {
        let mut all = self.health.lock();
        look(all.entry(target).or_insert_with(|| Health {
            breaker: Breaker::new(BreakerOptions {
                open: OPEN,
                probe_timeout: PROBE_TIMEOUT,
                ..BreakerOptions::default()
            }),
            refusal: None,
            label: format!("{target:x}").into(),
        }))
    }

    fn envelope(&self, target: NodeId) -> Envelope {
        Envelope {
            cluster: self.local.cluster,
            target,
            target_disk: self.directory.disk(target),
            sender: self.local.node,
        }
    }
}

impl Health {
    fn export(&self, before: BreakerState) {
        let state = self.breaker.state();
        if state != before {
            let gauge = metrics::gauge!(telemetry::PEER_BREAKER_STATE, "peer" => self.label.clone());
            gauge.set(state.as_metric());
            if state == BreakerState::Open {
                let opened = metrics::counter!(telemetry::PEER_BREAKER_OPENED, "peer" => self.label.clone());
                opened.increment(1);
            }
            // Each state once, and not each call that failed: a probe that finds the
            // peer still away goes back and forth between the other two.
            match state {
                BreakerState::Closed => tracing::info!(peer = &*self.label, "a peer answers again"),
                BreakerState::Open if before == BreakerState::Closed => {
                    tracing::warn!(peer = &*self.label, "a peer does not answer");
                }
                BreakerState::Open | BreakerState::HalfOpen => {}
            }
        }
    }
}

/// The deadline of every call, whatever the transport does about it.
async fn within<T>(timeout: Duration, call: PeerFuture<T>) -> Result<T, PeerError> {
    match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer,
        Err(_) => Err(PeerError::Timeout(timeout)),
    }
}
