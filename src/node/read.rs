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
use tokio::sync::{Notify, SetOnce};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeError;
use super::control::{Answer, Ask};
use super::core::{Core, Pause, SHARED_FOR};
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

/// One round and who waits for it: each holds it. Whoever waits needs no timer of their own, because the
/// round is given up in time.
struct Round {
    deadline: Instant,
    answer: SetOnce<Result<Confirmed, NodeError>>,
}

impl Round {
    /// How many wait, when one more holds it.
    fn readers(self: &Arc<Round>) -> usize {
        Arc::strong_count(self) - 1
    }

    fn answer(&self, answer: Result<Confirmed, NodeError>) {
        let _ = self.answer.set(answer);
    }
}

/// Shares rounds of confirmation among all who wait.
pub(super) struct Reads {
    core: Arc<Core>,
    option: LinearizerOption,
    /// The rounds that have not begun yet and will begin together: usually one, more when they wait long, because
    /// those of one round have about the same deadline. `None` when none will begin.
    next: Mutex<Option<Vec<Arc<Round>>>>,
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
            next: Mutex::new(Some(Vec::new())),
            wanted: Notify::new(),
            barriers: metrics::counter!(telemetry::READ_BARRIERS),
            seconds: metrics::histogram!(telemetry::READ_BARRIER_SECONDS),
        });
        let own = reads.clone();
        tasks.start(name, |stop| own.run(stop));
        reads
    }

    /// Returns when this node's view holds everything acknowledged before the call.
    pub async fn barrier(&self) -> Result<(), NodeError> {
        if mutant::is(Mutant::ReadWithoutReadIndex) {
            return Ok(());
        }
        #[cfg(feature = "mutants")]
        if mutant::is(Mutant::LeaseReadPausedClock) && super::paused::holds_lease(&self.core) {
            return Ok(());
        }
        let started = Instant::now();
        self.barriers.increment(1);
        let round = self.join()?;
        let waited = match round.answer.wait().await {
            Ok(confirmed) => self.core.applied(confirmed.index, round.deadline).await,
            Err(error) => Err(error.clone()),
        };
        waited.inspect_err(|_| metrics::counter!(telemetry::READ_BARRIERS_FAILED).increment(1))?;
        self.seconds.record(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// A confirmation of leadership that began after the call, by whoever leads.
    pub async fn confirm(&self, deadline: Instant) -> Result<Confirmed, NodeError> {
        let round = self.join()?;
        match tokio::time::timeout_at(deadline, round.answer.wait()).await {
            Ok(answer) => answer.clone(),
            Err(_) => Err(self.too_late()),
        }
    }

    fn join(&self) -> Result<Arc<Round>, NodeError> {
        let deadline = self.core.deadline(None);
        let round = {
            let mut next = self.next.lock();
            let rounds = next.as_mut().ok_or(NodeError::Stopped)?;
            match rounds.last() {
                Some(round) if deadline <= round.deadline + SHARED_FOR => round.clone(),
                _ => {
                    rounds.push(Arc::new(Round { deadline, answer: SetOnce::new() }));
                    rounds[rounds.len() - 1].clone()
                }
            }
        };
        self.wanted.notify_one();
        Ok(round)
    }

    fn too_late(&self) -> NodeError {
        match self.core.leadership().leader {
            0 => NodeError::NoLeader,
            _ => NodeError::Timeout,
        }
    }

    async fn run(self: Arc<Reads>, stop: CancellationToken) {
        // Rounds whose attempt failed; the next attempt answers them too, as it
        // begins after they did.
        let mut waiting: Vec<Arc<Round>> = Vec::new();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.rounds(&mut waiting) => {}
        }
        waiting.extend(self.next.lock().take().into_iter().flatten());
        waiting.iter().for_each(|round| round.answer(Err(NodeError::Stopped)));
    }

    async fn rounds(&self, waiting: &mut Vec<Arc<Round>>) {
        let mut pause = Pause::default();
        let mut not_before = Instant::now();
        loop {
            if waiting.is_empty() {
                self.wanted.notified().await;
            }
            if Instant::now() < not_before {
                tokio::time::sleep_until(not_before).await;
            }
            waiting.extend(self.next.lock().iter_mut().flat_map(std::mem::take));
            waiting.retain(|round| round.readers() > 0);
            let Some(deadline) = waiting.iter().map(|round| round.deadline).min() else { continue };
            let began = Instant::now();
            metrics::counter!(telemetry::READ_ROUNDS).increment(1);
            match self.attempt(deadline).await {
                Some(confirmed) => {
                    pause = Pause::default();
                    let readers: usize = waiting.iter().map(Round::readers).sum();
                    if readers >= BUSY_READERS {
                        not_before = began + INTERVAL_MAX.min(INTERVAL_PER_READER * readers as u32);
                    }
                    for round in waiting.drain(..) {
                        round.answer(Ok(confirmed));
                    }
                }
                None => {
                    let until = (Instant::now() + self.core.options.election_timeout).min(deadline);
                    pause.wait(&self.core.env, until).await;
                    let late = |round: &mut Arc<Round>| round.deadline <= Instant::now();
                    waiting.extract_if(.., late).for_each(|round| round.answer(Err(self.too_late())));
                }
            }
        }
    }

    /// One round. `None` when there is no leader that could confirm itself by the deadline.
    async fn attempt(&self, deadline: Instant) -> Option<Confirmed> {
        let leadership = self.core.leadership();
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = self.core.options.election_timeout.max(Duration::from_millis(100)).min(left);
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
