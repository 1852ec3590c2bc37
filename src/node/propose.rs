//! From an operation to a reply: admission, the leader's batches, forwarding to
//! the leader, and what to do when it changes.
//!
//! Invariants: a command is encoded once; it is proposed again only when it is
//! certainly in no log, or when it carries a request id; an answer is given
//! only when this node's own view holds the entry.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{BoxStream, FuturesUnordered, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::core::{Core, Leadership, Pause};
use super::options::LEASE_TTL_S_MAX;
use super::tasks::Tasks;
use super::{NodeError, ProposeContext, forward};
use crate::raft::{Proposal, TypeConfig};
use crate::storage::codec;
use crate::telemetry;
use crate::types::{Command, LeaseId, Operation, Reply};

/// Commands that one message to Raft may carry.
pub(super) const BATCH_COUNT_MAX: usize = 1024;
/// Batches of this node's own that Raft has not answered yet. What is proposed
/// meanwhile goes with the next one.
const BATCHES_IN_FLIGHT_MAX: usize = 4;
/// The unit in which bytes in flight are counted.
const ADMISSION_UNIT_BYTES: usize = 256;

/// What became of one attempt.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It was applied at `index`.
    Applied { index: u64, reply: Reply },
    /// It is certainly in no log. The leader has too much in flight, or is another.
    Rejected { too_many: bool },
    /// It may have been applied, or may yet be.
    Unknown,
}

/// One command on its way.
pub(super) struct Pending {
    pub body: Bytes,
    pub answer: oneshot::Sender<Outcome>,
    /// Held until the command's fate is known, even if nobody waits any more.
    pub admitted: Option<Admitted>,
}

/// The room that one command takes while it is in flight.
pub(super) struct Admitted {
    _count: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// Bounds what is in flight. Overflow: refused at once, never queued.
pub(super) struct Admission {
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Admission {
    pub fn new(count: usize, bytes: usize) -> Admission {
        let units = (bytes / ADMISSION_UNIT_BYTES).max(1);
        Admission { count: Arc::new(Semaphore::new(count)), bytes: Arc::new(Semaphore::new(units)) }
    }

    pub fn admit(&self, bytes: usize) -> Option<Admitted> {
        let units = u32::try_from(bytes.div_ceil(ADMISSION_UNIT_BYTES)).ok()?;
        let count = self.count.clone().try_acquire_owned().ok()?;
        let bytes = self.bytes.clone().try_acquire_many_owned(units).ok()?;
        Some(Admitted { _count: count, _bytes: bytes })
    }
}

/// The way into the log.
pub(super) struct Proposer {
    core: Arc<Core>,
    own: Admission,
    /// What followers forward here has its own room, so that neither starves.
    forwarded: Admission,
    local: mpsc::Sender<Pending>,
    remote: mpsc::Sender<Pending>,
    /// Looked up once, because every proposal counts.
    seconds: metrics::Histogram,
}

impl Proposer {
    /// Starts the two tasks that carry commands to Raft and to the leader.
    pub fn start(core: &Arc<Core>, tasks: &Tasks) -> Arc<Proposer> {
        let options = &core.options;
        // Every command in a queue holds admission, so the queues cannot fill
        // before admission refuses; internal commands add a few.
        let room = options.in_flight_count + 64;
        let (local, local_queue) = mpsc::channel(room);
        let (remote, remote_queue) = mpsc::channel(room);
        let proposer = Proposer {
            core: core.clone(),
            own: Admission::new(options.in_flight_count, options.in_flight_bytes),
            forwarded: Admission::new(options.in_flight_count, options.in_flight_bytes),
            local,
            remote,
            seconds: metrics::histogram!(telemetry::PROPOSAL_SECONDS),
        };
        let own = core.clone();
        tasks.start("propose", |stop| run_local(own, local_queue, stop));
        let own = core.clone();
        tasks.start("forward", |stop| forward::run(own, remote_queue, stop));
        Arc::new(proposer)
    }

    /// Proposes through the leader, wherever it is.
    pub async fn propose(&self, operation: Operation, context: ProposeContext) -> Result<Reply, NodeError> {
        let operation = self.normalise(operation)?;
        self.check_version(&operation)?;
        let repeatable = context.request.is_some();
        let command = Command { request: context.request, actor: context.actor, operation };
        let body = Bytes::from(codec::encode(&command));
        drop(command);
        if body.len() > self.core.options.max_request_bytes {
            return Err(NodeError::RequestTooLarge);
        }
        let started = Instant::now();
        let Some(admitted) = self.own.admit(body.len()) else {
            metrics::counter!(telemetry::PROPOSALS_REFUSED).increment(1);
            return Err(NodeError::TooManyRequests);
        };
        let deadline = self.core.deadline(context.timeout);
        let result = self.until_applied(body, Some(admitted), repeatable, deadline).await;
        self.seconds.record(started.elapsed().as_secs_f64());
        if result.is_err() {
            metrics::counter!(telemetry::PROPOSALS_FAILED).increment(1);
        }
        result
    }

    /// Proposes here or not at all: for what only the leader may say. `None`
    /// when it was not applied, or may not have been.
    pub async fn propose_here(&self, operation: Operation) -> Result<Option<Reply>, NodeError> {
        let body = Bytes::from(codec::encode(&Command::internal(operation)));
        let deadline = self.core.deadline(None);
        let (answer, outcome) = oneshot::channel();
        let pending = Pending { body, answer, admitted: None };
        self.local.send(pending).await.map_err(|_| NodeError::Stopped)?;
        match tokio::time::timeout_at(deadline, outcome).await {
            Ok(Ok(Outcome::Applied { reply, .. })) => Ok(Some(reply)),
            Ok(Ok(_)) | Err(_) => Ok(None),
            Ok(Err(_)) => Err(NodeError::Stopped),
        }
    }

    async fn until_applied(
        &self,
        body: Bytes,
        mut admitted: Option<Admitted>,
        repeatable: bool,
        deadline: Instant,
    ) -> Result<Reply, NodeError> {
        let mut pause = Pause::default();
        // Whether an earlier attempt may have happened.
        let mut in_doubt = false;
        loop {
            let leadership = self.core.leadership();
            if leadership.leader == 0 {
                if self.leader_or_deadline(leadership, deadline).await {
                    continue;
                }
                return Err(if in_doubt { NodeError::Timeout } else { NodeError::NoLeader });
            }
            let queue = if leadership.here { &self.local } else { &self.remote };
            let (answer, outcome) = oneshot::channel();
            let pending = Pending { body: body.clone(), answer, admitted: admitted.take() };
            queue.send(pending).await.map_err(|_| NodeError::Stopped)?;
            match tokio::time::timeout_at(deadline, outcome).await {
                Ok(Ok(Outcome::Applied { index, reply })) => {
                    self.core.applied(index, deadline).await?;
                    return Ok(reply);
                }
                Ok(Ok(Outcome::Rejected { too_many: true })) => return Err(refused(in_doubt)),
                Ok(Ok(Outcome::Rejected { too_many: false })) => {}
                Ok(Ok(Outcome::Unknown)) if repeatable => in_doubt = true,
                Ok(Ok(Outcome::Unknown)) => return Err(NodeError::LeaderChanged),
                Ok(Err(_)) => return Err(NodeError::Stopped),
                Err(_) => return Err(NodeError::Timeout),
            }
            // The admission went with the attempt that failed; a new attempt
            // needs its own, or what is in flight would be unbounded.
            if !pause.wait(&self.core.env, deadline).await {
                let certain = !in_doubt && self.core.leadership().leader == 0;
                return Err(if certain { NodeError::NoLeader } else { NodeError::Timeout });
            }
            admitted = Some(self.own.admit(body.len()).ok_or_else(|| refused(in_doubt))?);
        }
    }

    async fn leader_or_deadline(&self, seen: Leadership, deadline: Instant) -> bool {
        let now = self.core.leadership_beyond(seen, deadline).await;
        now != seen && Instant::now() < deadline
    }

    /// Room for an item that a follower forwarded here.
    pub fn admit_forwarded(&self, bytes: usize) -> Option<Admitted> {
        self.forwarded.admit(bytes)
    }

    /// Fills in what the client left to the server, and refuses what no replica
    /// should have to.
    fn normalise(&self, operation: Operation) -> Result<Operation, NodeError> {
        match operation {
            Operation::LeaseGrant { id, ttl_s } => {
                if ttl_s > LEASE_TTL_S_MAX {
                    return Err(NodeError::LeaseTtlTooLarge);
                }
                let drawn = LeaseId(((self.core.env.random_u64() >> 1) as i64).max(1));
                let id = if id.is_some() { id } else { drawn };
                Ok(Operation::LeaseGrant { id, ttl_s: ttl_s.max(self.core.options.lease_ttl_s_min()) })
            }
            other => Ok(other),
        }
    }

    /// Nothing goes into the log that a member could not apply.
    fn check_version(&self, operation: &Operation) -> Result<(), NodeError> {
        let needed = introduced_in(operation);
        let cluster = self.core.view().cluster_version;
        // Before the version is first set, only the first version's commands are known.
        if needed > cluster.max(FIRST_VERSION) {
            return Err(NodeError::ClusterTooOld {
                cluster: version_text(cluster),
                needed: version_text(needed),
            });
        }
        Ok(())
    }
}

/// No room; but an earlier attempt may have gone through.
fn refused(in_doubt: bool) -> NodeError {
    if in_doubt { NodeError::Timeout } else { NodeError::TooManyRequests }
}

/// The version that this program is, as `major << 16 | minor`.
pub fn own_version() -> u32 {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 16 | part(env!("CARGO_PKG_VERSION_MINOR"))
}

/// `major.minor` of a version in one number.
pub fn version_text(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

/// 0.1, which introduced the first commands.
const FIRST_VERSION: u32 = 1;

/// The cluster version that introduced a command. A new kind of command gets a
/// new line, so that a cluster in the middle of an upgrade never sees it.
fn introduced_in(operation: &Operation) -> u32 {
    match operation {
        Operation::Put(_)
        | Operation::DeleteRange(_)
        | Operation::Txn(_)
        | Operation::Compact { .. }
        | Operation::LeaseGrant { .. }
        | Operation::LeaseRevoke { .. }
        | Operation::LeaseExpire { .. }
        | Operation::LeaseCheckpoint { .. }
        | Operation::SessionOpen { .. }
        | Operation::SessionRenew { .. }
        | Operation::SessionExpire { .. }
        | Operation::Alarm { .. }
        | Operation::ClusterVersion { .. } => FIRST_VERSION,
    }
}

/// What Raft says of each command of a batch, in order.
pub(super) type WriteResults = BoxStream<'static, Outcome>;

/// Gives a batch to Raft in one message.
pub(super) async fn write_batch(core: &Core, bodies: Vec<Bytes>) -> Result<WriteResults, NodeError> {
    let stamp = core.stamp();
    let proposals = bodies.into_iter().map(|body| Proposal { time_ms: stamp, body });
    let results = core.raft.client_write_many(proposals).await.map_err(|fatal| core.fail(fatal))?;
    // Raft that is stopping ends the stream early, and whoever waits for the rest asks on: fused, it says so again.
    Ok(results.fuse().map(outcome).boxed())
}

type RaftResult = Result<openraft::raft::WriteResult<TypeConfig>, openraft::errors::Fatal<TypeConfig>>;

fn outcome(result: RaftResult) -> Outcome {
    use openraft::errors::ClientWriteError;
    match result {
        Ok(Ok(written)) => Outcome::Applied { index: written.log_id.index, reply: written.response },
        // openraft's contract: rejected before its entry was appended.
        Ok(Err(ClientWriteError::ForwardToLeader(_))) => Outcome::Rejected { too_many: false },
        Ok(Err(_)) | Err(_) => Outcome::Unknown,
    }
}

async fn run_local(core: Arc<Core>, mut queue: mpsc::Receiver<Pending>, stop: CancellationToken) {
    let mut batch: Vec<Pending> = Vec::with_capacity(BATCH_COUNT_MAX);
    // Bounded by admission: each pending answer holds its room.
    let mut answering = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(()) = answering.next(), if !answering.is_empty() => {}
            count = queue.recv_many(&mut batch, BATCH_COUNT_MAX), if answering.len() < BATCHES_IN_FLIGHT_MAX => {
                if count == 0 {
                    return;
                }
                // Whoever no longer waits gave up before anything was proposed.
                batch.retain(|pending| !pending.answer.is_closed());
                metrics::counter!(telemetry::PROPOSALS).increment(batch.len() as u64);
                let bodies = batch.iter().map(|pending| pending.body.clone()).collect();
                let waiting = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_COUNT_MAX));
                // On an error the answers are dropped, which says that the node stopped.
                if let Ok(results) = write_batch(&core, bodies).await {
                    answering.push(answer(&core, waiting, results));
                }
            }
        }
    }
}

async fn answer(core: &Core, waiting: Vec<Pending>, mut results: WriteResults) {
    let started = core.env.monotonic();
    for pending in waiting {
        let outcome = results.next().await.unwrap_or(Outcome::Unknown);
        drop(pending.admitted);
        // The caller may have run out of time; the outcome is then nobody's.
        let _ = pending.answer.send(outcome);
    }
    let took = core.env.monotonic().saturating_sub(started);
    metrics::histogram!(telemetry::COMMIT_SECONDS).record(took.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admission_counts_commands_and_bytes_and_gives_both_back() {
        let admission = Admission::new(2, 1024);
        let first = admission.admit(700).unwrap();
        assert!(admission.admit(400).is_none(), "the bytes are used up");
        let second = admission.admit(100).unwrap();
        assert!(admission.admit(1).is_none(), "the count is used up");
        drop((first, second));
        assert!(admission.admit(1024).is_some());
    }

    #[test]
    fn versions_order_as_numbers() {
        assert!(own_version() >= FIRST_VERSION);
        assert_eq!(version_text(1 << 16 | 20), "1.20");
    }
}
