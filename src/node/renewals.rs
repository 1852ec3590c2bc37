//! Renewals of leases, gathered: all that wait go to the leader in one message,
//! and are confirmed by one quorum.
//!
//! Invariant: a round renews only what was asked for before it began, so that
//! its confirmation covers it.

use std::sync::Arc;

use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeError;
use super::ask::Desk;
use super::control::{Answer, Ask};
use super::tasks::Tasks;
use crate::types::LeaseId;

/// Renewals of one round: no message to the leader is larger than a few of its
/// proposals.
pub(super) const ROUND_LEASES_MAX: usize = 1000;
/// Rounds that may run at once. What is asked for meanwhile goes with the next
/// one: under load a round renews many, and a lone renewal never waits.
const ROUNDS_MAX: usize = 4;

/// Gathers renewals.
pub(super) struct Renewals {
    waiting: Mutex<Vec<Waiting>>,
    wanted: Notify,
}

struct Waiting {
    id: LeaseId,
    answer: oneshot::Sender<Result<i64, NodeError>>,
}

impl Renewals {
    /// Starts the task that runs the rounds.
    pub fn start(desk: &Arc<Desk>, tasks: &Tasks) -> Arc<Renewals> {
        let renewals = Arc::new(Renewals { waiting: Mutex::default(), wanted: Notify::new() });
        let (own, desk) = (renewals.clone(), desk.clone());
        tasks.start("renewals", |stop| async move { own.run(&desk, stop).await });
        renewals
    }

    /// Renews a lease: its TTL in seconds, 0 when it does not exist.
    ///
    /// # Errors
    /// When no leader confirmed it by `deadline`; it is then not promised.
    pub async fn renew(&self, desk: &Desk, id: LeaseId, deadline: Instant) -> Result<i64, NodeError> {
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().push(Waiting { id, answer });
        self.wanted.notify_one();
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(answered) => answered.unwrap_or(Err(NodeError::Stopped)),
            Err(_) if desk.core.leadership().leader == 0 => Err(NodeError::NoLeader),
            Err(_) => Err(NodeError::Timeout),
        }
    }

    async fn run(&self, desk: &Desk, stop: CancellationToken) {
        let mut rounds = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(()) = rounds.next(), if !rounds.is_empty() => {}
                () = self.wanted.notified(), if rounds.len() < ROUNDS_MAX => {}
            }
            while rounds.len() < ROUNDS_MAX {
                let due = self.take();
                if due.is_empty() {
                    break;
                }
                rounds.push(round(desk, due));
            }
        }
        // Dropped, so that nobody waits for them until the deadline.
        self.waiting.lock().clear();
    }

    /// The renewals of the next round.
    fn take(&self) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock();
        waiting.retain(|renewal| !renewal.answer.is_closed());
        let count = waiting.len().min(ROUND_LEASES_MAX);
        waiting.drain(..count).collect()
    }
}

async fn round(desk: &Desk, due: Vec<Waiting>) {
    let ids = due.iter().map(|renewal| renewal.id).collect();
    let asked = desk.ask_leader(Ask::LeaseKeepAlive { ids }, desk.core.deadline(None)).await;
    let answers: Vec<Result<i64, NodeError>> = match asked {
        Ok(Answer::LeaseKeptAlive { ttls_s }) if ttls_s.len() == due.len() => {
            ttls_s.into_iter().map(Ok).collect()
        }
        Ok(other) => {
            let error = NodeError::Internal(format!("{} renewals were answered with {other:?}", due.len()));
            vec![Err(error); due.len()]
        }
        Err(error) => vec![Err(error); due.len()],
    };
    for (renewal, answer) in due.into_iter().zip(answers) {
        let _ = renewal.answer.send(answer);
    }
}
