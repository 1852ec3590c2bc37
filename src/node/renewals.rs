//! Renewals of leases, gathered: all that wait go to the leader in one message,
//! and are confirmed by one quorum.
//!
//! Invariant: a round renews only what was asked for before it began, so that
//! its confirmation covers it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::{Notify, SetOnce};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::NodeError;
use super::ask::Desk;
use super::control::{Answer, Ask};
use super::core::SHARED_FOR;
use super::tasks::Tasks;
use crate::types::LeaseId;

/// Renewals of one round: no message to the leader is larger than a few of its
/// proposals.
pub(super) const ROUND_LEASES_MAX: usize = 1000;
/// Rounds that may run at once: under load a round renews many, and a lone
/// renewal never waits.
const ROUNDS_MAX: usize = 4;
/// The time from the beginning of a round to that of the next, for each renewal
/// in it beyond the first: clients renew seconds before it is urgent, and a round
/// costs everybody together about as much as some ten renewals.
const INTERVAL_PER_RENEWAL: Duration = Duration::from_micros(50);
/// And at the most.
const INTERVAL_MAX: Duration = Duration::from_millis(2);

/// Gathers renewals.
pub(super) struct Renewals {
    /// In the order in which they begin; `None` when none will.
    waiting: Mutex<Option<VecDeque<Round>>>,
    wanted: Notify,
}

/// Renewals that are asked for together. However it ends, it answers.
struct Round {
    ids: Vec<LeaseId>,
    deadline: Instant,
    /// The TTLs in the order of `ids`.
    answer: Arc<SetOnce<Result<Vec<i64>, NodeError>>>,
}

impl Drop for Round {
    fn drop(&mut self) {
        let _ = self.answer.set(Err(NodeError::Stopped));
    }
}

impl Renewals {
    /// Starts the task that runs the rounds.
    pub fn start(desk: &Arc<Desk>, tasks: &Tasks) -> Arc<Renewals> {
        let renewals =
            Arc::new(Renewals { waiting: Mutex::new(Some(VecDeque::new())), wanted: Notify::new() });
        let (own, desk) = (renewals.clone(), desk.clone());
        tasks.start("renewals", |stop| async move {
            tokio::select! { () = stop.cancelled() => {}, () = own.run(&desk) => {} }
            own.waiting.lock().take();
        });
        renewals
    }

    /// Renews a lease: its TTL in seconds, 0 when it does not exist.
    ///
    /// # Errors
    /// When no leader confirmed it in time; it is then not promised.
    pub async fn renew(&self, desk: &Desk, id: LeaseId) -> Result<i64, NodeError> {
        let (place, answer) = {
            let mut waiting = self.waiting.lock();
            let rounds = waiting.as_mut().ok_or(NodeError::Stopped)?;
            let deadline = desk.core.deadline(None);
            if !rounds.back().is_some_and(|round| round.takes_another(deadline)) {
                rounds.push_back(Round { ids: Vec::new(), deadline, answer: Arc::default() });
            }
            let round = rounds.back_mut().expect("there is one");
            round.ids.push(id);
            (round.ids.len() - 1, round.answer.clone())
        };
        self.wanted.notify_one();
        answer.wait().await.as_ref().map(|ttls_s| ttls_s[place]).map_err(NodeError::clone)
    }

    async fn run(&self, desk: &Desk) {
        let mut running = FuturesUnordered::new();
        let mut not_before = Instant::now();
        loop {
            let (free, due) = (running.len() < ROUNDS_MAX, self.is_due());
            let pause = async {
                if Instant::now() < not_before {
                    sleep_until(not_before).await;
                }
            };
            tokio::select! {
                Some(()) = running.next(), if !running.is_empty() => {}
                () = self.wanted.notified(), if !due => {}
                () = pause, if due && free => {
                    let Some(round) = self.take() else { continue };
                    let others = round.ids.len() - 1;
                    not_before = Instant::now() + INTERVAL_MAX.min(INTERVAL_PER_RENEWAL * others as u32);
                    running.push(round.run(desk));
                }
            }
        }
    }

    fn is_due(&self) -> bool {
        self.waiting.lock().as_ref().is_some_and(|rounds| !rounds.is_empty())
    }

    fn take(&self) -> Option<Round> {
        self.waiting.lock().as_mut()?.pop_front()
    }
}

impl Round {
    /// Whether one more may join who has until `deadline`.
    fn takes_another(&self, deadline: Instant) -> bool {
        self.ids.len() < ROUND_LEASES_MAX && deadline <= self.deadline + SHARED_FOR
    }

    async fn run(self, desk: &Desk) {
        let count = self.ids.len();
        let asked = desk.ask_leader(Ask::LeaseKeepAlive { ids: self.ids.clone() }, self.deadline);
        let answer = match timeout_at(self.deadline, asked).await.unwrap_or(Err(NodeError::Timeout)) {
            Ok(Answer::LeaseKeptAlive { ttls_s }) if ttls_s.len() == count => Ok(ttls_s),
            Ok(other) => Err(NodeError::Internal(format!("{count} renewals were answered with {other:?}"))),
            Err(error) => Err(error),
        };
        let _ = self.answer.set(answer);
    }
}
