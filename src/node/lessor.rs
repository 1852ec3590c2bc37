//! When leases and sessions run out: the leader's business, on its monotonic
//! clock.
//!
//! Only apply removes anything. This room proposes removals, carries the term
//! in them so that a deposed leader's come to nothing, and never promises a
//! renewal that a quorum has not confirmed this leader for. A new leader starts
//! from the replicated remaining times, never short.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeError;
use super::core::{Core, internal};
use super::propose::Proposer;
use super::read::Reads;
use super::tasks::Tasks;
use crate::env::off_thread;
use crate::machine::Effect;
use crate::mutant::{self, Mutant};
use crate::mvcc::View;
use crate::storage::layout::{Family, LeaseRecord, SessionRecord, parse_lease, prefix_end};
use crate::storage::{Read, codec};
use crate::telemetry;
use crate::types::{LeaseId, Operation};

/// Leases or sessions removed by one proposal; their keys' deletion is one
/// entry's work. With [`EXPIRY_INTERVAL`], at most 1,000 a second, as etcd's.
const EXPIRY_BATCH: usize = 500;
/// How often expiry is looked at.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(500);
/// Leases whose remaining time one proposal records.
const CHECKPOINT_BATCH: usize = 1000;
/// How often a lease that is longer than this has its remaining time recorded.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

/// A lease as the leader keeps time of it.
#[derive(Clone, Copy, Debug)]
struct LeaseClock {
    ttl_s: i64,
    /// When it runs out, on the monotonic clock.
    deadline: Duration,
    /// When its remaining time is next recorded.
    checkpoint: Option<Duration>,
    /// A shorter remaining time than `ttl_s` is recorded in the log.
    shortened: bool,
    /// Its end was proposed: it is not renewed any more.
    expiring: bool,
}

#[derive(Clone, Copy, Debug)]
struct SessionClock {
    deadline: Duration,
    /// Log index of the renewal that `deadline` comes from.
    renewed: u64,
    expiring: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Lease(LeaseId),
    Checkpoint(LeaseId),
    Session(u64),
}

/// What the leader knows. Empty on a follower.
#[derive(Debug, Default)]
struct Clocks {
    /// The term in which these clocks run; 0 when this node does not lead.
    term: u64,
    leases: BTreeMap<LeaseId, LeaseClock>,
    sessions: BTreeMap<u64, SessionClock>,
    due: BTreeSet<(Duration, Due)>,
    /// Effects that arrive while a new leader reads the stored records.
    meanwhile: Option<Vec<Effect>>,
}

/// What is due at one moment.
#[derive(Debug, Default, PartialEq, Eq)]
struct DueNow {
    leases: Vec<LeaseId>,
    checkpoints: Vec<(LeaseId, i64)>,
    sessions: Vec<(u64, u64)>,
}

fn seconds(ttl_s: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl_s).unwrap_or(0))
}

impl Clocks {
    fn grant(&mut self, now: Duration, id: LeaseId, ttl_s: i64, remaining_s: i64) {
        self.forget_lease(id);
        let remaining = if remaining_s > 0 { remaining_s.min(ttl_s) } else { ttl_s };
        let clock = LeaseClock {
            ttl_s,
            deadline: now + seconds(remaining),
            checkpoint: (seconds(remaining) > CHECKPOINT_INTERVAL).then_some(now + CHECKPOINT_INTERVAL),
            shortened: remaining < ttl_s,
            expiring: false,
        };
        self.insert_lease(id, clock);
    }

    fn insert_lease(&mut self, id: LeaseId, clock: LeaseClock) {
        self.due.insert((clock.deadline, Due::Lease(id)));
        if let Some(at) = clock.checkpoint {
            self.due.insert((at, Due::Checkpoint(id)));
        }
        self.leases.insert(id, clock);
    }

    fn forget_lease(&mut self, id: LeaseId) -> Option<LeaseClock> {
        let clock = self.leases.remove(&id)?;
        self.due.remove(&(clock.deadline, Due::Lease(id)));
        if let Some(at) = clock.checkpoint {
            self.due.remove(&(at, Due::Checkpoint(id)));
        }
        Some(clock)
    }

    fn renew_session(&mut self, now: Duration, id: u64, ttl_s: u64, renewed: u64) {
        self.forget_session(id);
        let deadline = now.saturating_add(Duration::from_secs(ttl_s));
        self.due.insert((deadline, Due::Session(id)));
        self.sessions.insert(id, SessionClock { deadline, renewed, expiring: false });
    }

    fn forget_session(&mut self, id: u64) {
        if let Some(clock) = self.sessions.remove(&id) {
            self.due.remove(&(clock.deadline, Due::Session(id)));
        }
    }

    fn take(&mut self, now: Duration, effect: Effect) {
        match effect {
            Effect::LeaseGranted(id, ttl_s) => self.grant(now, id, ttl_s, 0),
            Effect::LeaseGone(id) => drop(self.forget_lease(id)),
            Effect::LeaseCheckpoint(id, remaining_s) => {
                if let Some(clock) = self.leases.get_mut(&id) {
                    clock.shortened = remaining_s > 0 && remaining_s < clock.ttl_s;
                }
            }
            Effect::SessionRenewed(id, ttl_s, renewed) => self.renew_session(now, id, ttl_s, renewed),
            Effect::SessionGone(id) => self.forget_session(id),
            Effect::Compacted(..) => {}
            // A leader never takes a snapshot: it does not lead any more.
            Effect::Replaced => *self = Clocks { meanwhile: self.meanwhile.take(), ..Clocks::default() },
        }
    }

    /// Which of `ids` can be renewed and have less than their full time recorded,
    /// and their full times.
    fn shortened(&self, ids: &[LeaseId]) -> Vec<(LeaseId, i64)> {
        let found = ids.iter().filter_map(|id| Some((*id, self.leases.get(id)?)));
        let due = found.filter(|(_, clock)| clock.shortened && !clock.expiring);
        due.map(|(id, clock)| (id, clock.ttl_s)).collect()
    }

    /// Starts a renewed lease again. `None` when it must be told that it is gone.
    fn renew(&mut self, now: Duration, id: LeaseId) -> Option<i64> {
        if self.leases.get(&id)?.expiring {
            return None;
        }
        let ttl_s = self.forget_lease(id)?.ttl_s;
        self.grant(now, id, ttl_s, 0);
        Some(ttl_s)
    }

    /// What must be proposed now, marked so that it is proposed once.
    fn due_now(&mut self, now: Duration) -> DueNow {
        let mut found = DueNow::default();
        let due: Vec<(Duration, Due)> = self.due.iter().take_while(|(at, _)| *at <= now).copied().collect();
        for (at, due) in due {
            match due {
                Due::Lease(id) if found.leases.len() < EXPIRY_BATCH => {
                    found.leases.push(id);
                    self.postpone_lease(id, now);
                }
                Due::Session(id) if found.sessions.len() < EXPIRY_BATCH => {
                    if let Some(renewed) = self.postpone_session(id, now) {
                        found.sessions.push((id, renewed));
                    }
                }
                Due::Checkpoint(id) if found.checkpoints.len() < CHECKPOINT_BATCH => {
                    self.due.remove(&(at, due));
                    if let Some(clock) = self.leases.get_mut(&id) {
                        let remaining = clock.deadline.saturating_sub(now);
                        clock.checkpoint =
                            (remaining > CHECKPOINT_INTERVAL).then_some(now + CHECKPOINT_INTERVAL);
                        if let Some(next) = clock.checkpoint {
                            self.due.insert((next, Due::Checkpoint(id)));
                        }
                        // Rounded up: a new leader must not start short.
                        let remaining_s = remaining.as_secs() as i64 + 1;
                        found.checkpoints.push((id, remaining_s.min(clock.ttl_s)));
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Proposed as expired: if apply does not remove it soon, it is proposed again.
    fn postpone_lease(&mut self, id: LeaseId, now: Duration) {
        if let Some(mut clock) = self.forget_lease(id) {
            clock.expiring = true;
            clock.checkpoint = None;
            clock.deadline = now + 4 * EXPIRY_INTERVAL;
            self.insert_lease(id, clock);
        }
    }

    fn postpone_session(&mut self, id: u64, now: Duration) -> Option<u64> {
        let mut clock = *self.sessions.get(&id)?;
        self.forget_session(id);
        clock.expiring = true;
        clock.deadline = now + 4 * EXPIRY_INTERVAL;
        self.due.insert((clock.deadline, Due::Session(id)));
        self.sessions.insert(id, clock);
        Some(clock.renewed)
    }
}

/// What the leader answers about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeaseTimes {
    /// Remaining seconds; -1 when it does not exist.
    pub ttl_s: i64,
    /// Granted seconds; 0 when it does not exist.
    pub granted_ttl_s: i64,
}

/// Keeps time of leases and sessions while this node leads.
pub(super) struct Lessor {
    env: crate::env::EnvRef,
    clocks: Mutex<Clocks>,
    /// The term whose clocks run; 0 for none.
    running: watch::Sender<u64>,
    wake: Notify,
}

impl Lessor {
    /// Clocks that do not run yet; `on_effects` may be called at once.
    pub fn new(env: crate::env::EnvRef) -> Arc<Lessor> {
        let (running, wake) = (watch::channel(0).0, Notify::new());
        Arc::new(Lessor { env, clocks: Mutex::default(), running, wake })
    }

    /// The clock that leases run by.
    fn now(&self) -> Duration {
        match mutant::is(Mutant::LeaseByWallClock) {
            true => Duration::from_millis(self.env.wall_ms()),
            false => self.env.monotonic(),
        }
    }

    /// Hears what apply did. Called by the applying thread: takes one lock.
    pub fn on_effects(&self, effects: &[Effect]) {
        if effects.is_empty() {
            return;
        }
        for effect in effects {
            match effect {
                Effect::LeaseGranted(..) => metrics::counter!(telemetry::LEASES_GRANTED).increment(1),
                Effect::LeaseGone(_) => metrics::counter!(telemetry::LEASES_ENDED).increment(1),
                _ => {}
            }
        }
        let mut clocks = self.clocks.lock();
        if let Some(meanwhile) = &mut clocks.meanwhile {
            meanwhile.extend(effects.iter().cloned());
        }
        if clocks.term != 0 {
            let now = self.now();
            for effect in effects {
                clocks.take(now, effect.clone());
            }
        }
    }

    /// Renews leases: the TTL of each, 0 for one that does not exist. `None` when
    /// this node does not lead, and nothing was done.
    pub async fn keep_alive(
        &self,
        core: &Core,
        reads: &Reads,
        proposer: &Proposer,
        ids: &[LeaseId],
        deadline: Instant,
    ) -> Result<Option<Vec<i64>>, NodeError> {
        let Some(term) = self.confirmed(core, reads, deadline).await? else { return Ok(None) };
        let remaining = {
            let clocks = self.clocks.lock();
            if clocks.term != term {
                return Ok(None);
            }
            clocks.shortened(ids)
        };
        if !remaining.is_empty() {
            // A recorded short remainder would make the next leader end the
            // lease early; the full time is recorded before it is promised.
            let operation = Operation::LeaseCheckpoint { term, remaining };
            if proposer.propose_here(operation).await?.is_none() {
                return Ok(None);
            }
        }
        let mut clocks = self.clocks.lock();
        if clocks.term != term {
            return Ok(None);
        }
        let now = self.now();
        metrics::counter!(telemetry::LEASE_KEEP_ALIVES).increment(ids.len() as u64);
        Ok(Some(ids.iter().map(|id| clocks.renew(now, *id).unwrap_or(0)).collect()))
    }

    /// How long a lease still has. `None` when this node does not lead.
    pub async fn time_to_live(
        &self,
        core: &Core,
        reads: &Reads,
        id: LeaseId,
        deadline: Instant,
    ) -> Result<Option<LeaseTimes>, NodeError> {
        let Some(term) = self.confirmed(core, reads, deadline).await? else { return Ok(None) };
        let clocks = self.clocks.lock();
        if clocks.term != term {
            return Ok(None);
        }
        let now = self.now();
        let gone = LeaseTimes { ttl_s: -1, granted_ttl_s: 0 };
        Ok(Some(clocks.leases.get(&id).map_or(gone, |clock| {
            let remaining = if clock.expiring { Duration::ZERO } else { clock.deadline.saturating_sub(now) };
            LeaseTimes { ttl_s: remaining.as_secs() as i64, granted_ttl_s: clock.ttl_s }
        })))
    }

    /// Waits for a quorum's confirmation begun after the call, and for clocks of
    /// its term that have seen everything it covers. The term, or `None` when
    /// another leads.
    async fn confirmed(
        &self,
        core: &Core,
        reads: &Reads,
        deadline: Instant,
    ) -> Result<Option<u64>, NodeError> {
        let confirmed = reads.confirm(deadline).await?;
        if confirmed.leader != core.id || confirmed.term == 0 {
            return Ok(None);
        }
        core.applied(confirmed.index, deadline).await?;
        let mut running = self.running.subscribe();
        let mut leadership = core.leadership_changes();
        tokio::select! {
            reached = running.wait_for(|term| *term >= confirmed.term) => {
                Ok(reached.ok().filter(|term| **term == confirmed.term).map(|term| *term))
            }
            _ = leadership.wait_for(|now| now.term > confirmed.term) => Ok(None),
            () = tokio::time::sleep_until(deadline) => Err(NodeError::Timeout),
        }
    }

    /// Starts the task that proposes what has run out.
    pub fn start(
        self: &Arc<Self>,
        core: &Arc<Core>,
        reads: &Arc<Reads>,
        proposer: &Arc<Proposer>,
        tasks: &Tasks,
    ) {
        let (lessor, core, reads, proposer) = (self.clone(), core.clone(), reads.clone(), proposer.clone());
        tasks.start("lessor", |stop| async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = lessor.run(&core, &reads, &proposer, stop.clone()) => {}
            }
            lessor.step_down();
        });
    }

    async fn run(&self, core: &Core, reads: &Reads, proposer: &Proposer, stop: CancellationToken) {
        let mut changes = core.leadership_changes();
        while !stop.is_cancelled() {
            let leadership = *changes.borrow_and_update();
            let running = *self.running.borrow();
            if !leadership.here {
                if running != 0 {
                    self.step_down();
                }
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            if running != leadership.term {
                self.step_down();
                if let Err(error) = self.take_over(core, reads, leadership.term).await {
                    tracing::warn!(%error, "cannot start the clocks of the leases yet");
                    tokio::time::sleep(EXPIRY_INTERVAL).await;
                }
                continue;
            }
            self.expire(proposer, leadership.term).await;
            tokio::select! {
                _ = changes.changed() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep(EXPIRY_INTERVAL) => {}
            }
        }
    }

    fn step_down(&self) {
        *self.clocks.lock() = Clocks::default();
        self.running.send_replace(0);
    }

    /// A new leader: reads what is stored once its own view holds everything
    /// committed before its term.
    async fn take_over(&self, core: &Core, reads: &Reads, term: u64) -> Result<(), NodeError> {
        let deadline = core.deadline(None);
        let confirmed = reads.confirm(deadline).await?;
        if confirmed.leader != core.id || confirmed.term != term {
            return Err(NodeError::LeaderChanged);
        }
        core.applied(confirmed.index, deadline).await?;
        core.take_stamp()?;
        // From here on effects are kept; what the view already has is repeated
        // by them, which changes nothing.
        self.clocks.lock().meanwhile = Some(Vec::new());
        let view = core.view();
        let loaded = off_thread(&self.env, move || load(&view)).await.map_err(internal)?;
        let (leases, sessions) = loaded.inspect_err(|error| {
            core.fail(error);
        })?;
        let mut clocks = self.clocks.lock();
        let now = self.now() + core.options.election_timeout;
        for (id, record) in leases {
            clocks.grant(now, id, record.ttl_s, record.remaining_s);
        }
        for (id, record) in sessions {
            clocks.renew_session(now, id, record.ttl_s, record.renewed);
        }
        for effect in clocks.meanwhile.take().unwrap_or_default() {
            clocks.take(now, effect);
        }
        clocks.term = term;
        tracing::info!(
            term,
            leases = clocks.leases.len(),
            sessions = clocks.sessions.len(),
            "keeping leases"
        );
        drop(clocks);
        self.running.send_replace(term);
        Ok(())
    }

    async fn expire(&self, proposer: &Proposer, term: u64) {
        let due = {
            let mut clocks = self.clocks.lock();
            metrics::gauge!(telemetry::LEASES).set(clocks.leases.len() as f64);
            metrics::gauge!(telemetry::SESSIONS).set(clocks.sessions.len() as f64);
            let now = self.now();
            clocks.due_now(now)
        };
        let mut operations = Vec::new();
        if !due.leases.is_empty() {
            operations.push(Operation::LeaseExpire { term, ids: due.leases });
        }
        if !due.checkpoints.is_empty() {
            operations.push(Operation::LeaseCheckpoint { term, remaining: due.checkpoints });
        }
        if !due.sessions.is_empty() {
            operations.push(Operation::SessionExpire { term, sessions: due.sessions });
        }
        for operation in operations {
            // What did not go through is due again in a while.
            if let Err(error) = proposer.propose_here(operation).await {
                tracing::debug!(%error, "could not propose what has run out");
            }
        }
    }
}

type Stored = (Vec<(LeaseId, LeaseRecord)>, Vec<(u64, SessionRecord)>);

/// All leases and sessions of a view.
fn load(view: &View) -> Result<Stored, NodeError> {
    let sessions = scan(view, Family::Session, b"s", |key, value| {
        let id = key.strip_prefix(b"s").and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
        let record = codec::decode("a session", value).map_err(internal)?;
        Ok((id.ok_or_else(|| internal("a session's key is damaged"))?, record))
    })?;
    Ok((leases(view)?, sessions))
}

/// All leases of a view, in the order of their ids on disk.
pub(super) fn leases(view: &View) -> Result<Vec<(LeaseId, LeaseRecord)>, NodeError> {
    scan(view, Family::Lease, b"r", |key, value| {
        let id = parse_lease(key).ok_or_else(|| internal("a lease's key is damaged"))?;
        Ok((id, codec::decode("a lease", value).map_err(internal)?))
    })
}

pub(super) fn scan<T>(
    view: &View,
    family: Family,
    prefix: &[u8],
    mut parse: impl FnMut(&[u8], &[u8]) -> Result<T, NodeError>,
) -> Result<Vec<T>, NodeError> {
    let end = prefix_end(prefix);
    let mut cursor = view.data.scan(family, prefix, Some(&end));
    let mut found = Vec::new();
    cursor.seek_to_first();
    while let Some((key, value)) = cursor.item().map_err(internal)? {
        found.push(parse(key, value)?);
        cursor.next();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: LeaseId = LeaseId(7);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_expires_at_its_time_and_a_renewal_moves_it() {
        let mut clocks = Clocks::default();
        clocks.take(at(0), Effect::LeaseGranted(LEASE, 10));
        assert_eq!(clocks.due_now(at(9)), DueNow::default());
        assert_eq!(clocks.renew(at(9), LEASE), Some(10));
        assert_eq!(clocks.due_now(at(18)), DueNow::default());
        assert_eq!(clocks.due_now(at(19)).leases, vec![LEASE]);
        assert_eq!(clocks.renew(at(19), LEASE), None, "once proposed, it is not renewed");
        assert_eq!(clocks.due_now(at(19)), DueNow::default(), "proposed once");
        assert_eq!(clocks.due_now(at(30)).leases, vec![LEASE], "and again if it is still there");
        clocks.take(at(30), Effect::LeaseGone(LEASE));
        assert_eq!(clocks.due_now(at(99)), DueNow::default());
        assert!(clocks.due.is_empty());
    }

    #[test]
    fn long_leases_record_their_remaining_time_rounded_up() {
        let mut clocks = Clocks::default();
        clocks.take(at(0), Effect::LeaseGranted(LEASE, 1000));
        assert_eq!(clocks.due_now(at(300)).checkpoints, vec![(LEASE, 701)]);
        clocks.take(at(300), Effect::LeaseCheckpoint(LEASE, 701));
        assert!(clocks.leases[&LEASE].shortened);
        clocks.take(at(301), Effect::LeaseCheckpoint(LEASE, 1000));
        assert!(!clocks.leases[&LEASE].shortened);
        clocks.take(at(0), Effect::LeaseGranted(LeaseId(8), 200));
        assert!(clocks.leases[&LeaseId(8)].checkpoint.is_none(), "short leases are not recorded");
    }

    #[test]
    fn a_new_leader_starts_from_what_remained() {
        let mut clocks = Clocks::default();
        clocks.grant(at(50), LEASE, 1000, 400);
        assert_eq!(clocks.leases[&LEASE].deadline, at(450));
        assert!(clocks.leases[&LEASE].shortened);
        clocks.grant(at(50), LEASE, 1000, 0);
        assert_eq!(clocks.leases[&LEASE].deadline, at(1050));
    }

    #[test]
    fn a_session_expires_with_the_renewal_that_ran_out() {
        let mut clocks = Clocks::default();
        clocks.take(at(0), Effect::SessionRenewed(3, 10, 100));
        clocks.take(at(5), Effect::SessionRenewed(3, 10, 120));
        assert_eq!(clocks.due_now(at(14)), DueNow::default());
        assert_eq!(clocks.due_now(at(15)).sessions, vec![(3, 120)]);
        clocks.take(at(16), Effect::SessionRenewed(3, 10, 140));
        assert_eq!(clocks.due_now(at(25)), DueNow::default(), "a renewal that came in time wins");
        clocks.take(at(26), Effect::SessionGone(3));
        assert!(clocks.due.is_empty());
    }

    #[test]
    fn one_proposal_carries_a_bounded_number() {
        let mut clocks = Clocks::default();
        for id in 1..=1200 {
            clocks.take(at(0), Effect::LeaseGranted(LeaseId(id), 1));
        }
        assert_eq!(clocks.due_now(at(2)).leases.len(), EXPIRY_BATCH);
        assert_eq!(clocks.due_now(at(2)).leases.len(), EXPIRY_BATCH);
        assert_eq!(clocks.due_now(at(2)).leases.len(), 200);
    }
}
