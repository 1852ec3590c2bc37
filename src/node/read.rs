//! The read barrier: one confirmation of leadership in flight, shared by
//! everyone who arrived before it began.
//!
//! Invariant: a round answers only those who were waiting when it began. Who
//! arrives while it runs waits for the next one.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Histogram};
use openraft::{LinearizerOption, ReadPolicy};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeError;
use super::control::{Answer, Ask};
use super::core::{Core, Pause};
use super::tasks::Tasks;
use crate::mutant::{self, Mutant};
use crate::telemetry;
use crate::types::NodeId;

/// What a round of confirmation gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Confirmed {
    /// Everything acknowledged before the round began is at or below this index.
    pub index: u64,
    /// The leader that confirmed.
    pub leader: NodeId,
    /// Its term; 0 when another node confirmed and told only the index.
    pub term: u64,
}

/// A round that answered at least this many is followed by a short wait, so that
/// the next one answers many too.
const BUSY_READERS: usize = 8;
/// The time from the beginning of a busy round to that of the next, for each that it answered: a
/// round costs everybody together about as much as a few reads,
const INTERVAL_PER_READER: Duration = Duration::from_micros(50);
/// and at the most.
const INTERVAL_MAX: Duration = Duration::from_millis(3);

type Round = watch::Sender<Option<Confirmed>>;

/// Shares rounds of confirmation among all who wait.
pub(super) struct Reads {
    core: Arc<Core>,
    option: LinearizerOption,
    /// The round that has not begun yet, if anybody waits for it.
    next: Mutex<Option<Round>>,
    wanted: Notify,
    /// Looked up once, because every read counts.
    barriers: Counter,
    seconds: Histogram,
}

impl Reads {
    /// Starts the task that runs rounds which always ask a quorum.
    pub fn start(core: &Arc<Core>, tasks: &Tasks) -> Arc<Reads> {
        Reads::start_with(core, tasks, "read-index", LinearizerOption::from(ReadPolicy::ReadIndex))
    }

    /// Starts the task that runs rounds which trust the leader's lease, but for
    /// half of it only, so that clocks may drift apart by as much; beyond, they
    /// ask a quorum.
    pub fn start_by_lease(core: &Arc<Core>, tasks: &Tasks) -> Arc<Reads> {
        let lease = core.raft.config().election_timeout_max;
        let option = LinearizerOption::new(Some(Duration::from_millis(lease / 2)), true);
        Reads::start_with(core, tasks, "read-lease", option)
    }

    fn start_with(
        core: &Arc<Core>,
        tasks: &Tasks,
        name: &'static str,
        option: LinearizerOption,
    ) -> Arc<Reads> {
        let reads = Arc::new(Reads {
            core: core.clone(),
            option,
            next: Mutex::default(),
            wanted: Notify::new(),
            barriers: metrics::counter!(telemetry::READ_BARRIERS),
            seconds: metrics::histogram!(telemetry::READ_BARRIER_SECONDS),
        });
        let own = reads.clone();
        tasks.start(name, |stop| own.run(stop));
        reads
    }

    /// Returns when this node's view holds everything acknowledged before the call.
    pub async fn barrier(&self, deadline: Instant) -> Result<(), NodeError> {
        if mutant::is(Mutant::ReadWithoutReadIndex) {
            return Ok(());
        }
        #[cfg(feature = "mutants")]
        if mutant::is(Mutant::LeaseReadPausedClock) && super::paused::holds_lease(&self.core) {
            return Ok(());
        }
        let started = Instant::now();
        self.barriers.increment(1);
        let waited = match self.confirm(deadline).await {
            Ok(confirmed) => self.core.applied(confirmed.index, deadline).await,
            Err(error) => Err(error),
        };
        waited.inspect_err(|_| metrics::counter!(telemetry::READ_BARRIERS_FAILED).increment(1))?;
        self.seconds.record(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// A confirmation of leadership that began after the call, by whoever leads.
    pub async fn confirm(&self, deadline: Instant) -> Result<Confirmed, NodeError> {
        let mut answer = {
            let mut next = self.next.lock();
            next.get_or_insert_with(|| watch::channel(None).0).subscribe()
        };
        self.wanted.notify_one();
        let waited = tokio::time::timeout_at(deadline, answer.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(confirmed)) => Ok(confirmed.expect("waited for an answer")),
            Ok(Err(_)) => Err(NodeError::Stopped),
            Err(_) if self.core.leadership().leader == 0 => Err(NodeError::NoLeader),
            Err(_) => Err(NodeError::Timeout),
        }
    }

    async fn run(self: Arc<Reads>, stop: CancellationToken) {
        // Rounds whose attempt failed; the next attempt answers them too, as it
        // begins after they did.
        let mut waiting: Vec<Round> = Vec::new();
        let mut pause = Pause::default();
        let mut not_before = Instant::now();
        loop {
            if waiting.is_empty() {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.wanted.notified() => {}
                }
            }
            if Instant::now() < not_before {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep_until(not_before) => {}
                }
            }
            waiting.extend(self.next.lock().take());
            waiting.retain(|round| round.receiver_count() > 0);
            if waiting.is_empty() {
                continue;
            }
            let began = Instant::now();
            metrics::counter!(telemetry::READ_ROUNDS).increment(1);
            let confirmed = tokio::select! {
                () = stop.cancelled() => return,
                confirmed = self.attempt() => confirmed,
            };
            match confirmed {
                Some(confirmed) => {
                    pause = Pause::default();
                    let readers: usize = waiting.iter().map(|round| round.receiver_count()).sum();
                    if readers >= BUSY_READERS {
                        not_before = began + INTERVAL_MAX.min(INTERVAL_PER_READER * readers as u32);
                    }
                    for round in waiting.drain(..) {
                        round.send_replace(Some(confirmed));
                    }
                }
                None => {
                    let until = Instant::now() + self.core.options.election_timeout;
                    tokio::select! {
                        () = stop.cancelled() => return,
                        _ = pause.wait(&self.core.env, until) => {}
                    }
                }
            }
        }
    }

    /// One round. `None` when there is no leader that could confirm itself.
    async fn attempt(&self) -> Option<Confirmed> {
        let leadership = self.core.leadership();
        let limit = self.core.options.election_timeout.max(Duration::from_millis(100));
        if leadership.leader == 0 {
            self.core.leadership_beyond(leadership, Instant::now() + limit).await;
            return None;
        }
        if leadership.here {
            let round = self.core.raft.get_read_linearizer(self.option.clone());
            return match tokio::time::timeout(limit, round).await {
                Ok(Ok(linearizer)) => {
                    let id = linearizer.read_log_id();
                    let term = id.committed_leader_id().term;
                    Some(Confirmed { index: id.index(), leader: self.core.id, term })
                }
                Ok(Err(error)) => {
                    if let Some(fatal) = error.fatal() {
                        self.core.fail(fatal);
                    }
                    None
                }
                Err(_) => None,
            };
        }
        match self.core.ask(leadership.leader, Ask::ReadIndex, limit).await {
            Ok(Answer::ReadIndex { index }) => Some(Confirmed { index, leader: leadership.leader, term: 0 }),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, "the leader did not confirm");
                None
            }
        }
    }
}
