//! What every part of the node shares: who we are, Raft, the published state,
//! the way to the other members, and who leads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use openraft::Instant as _;
use openraft::alias::InstantOf;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::control::{Answer, Ask, Carrier, ControlError, Dialer};
use super::options::NodeOptions;
use super::tasks::{Exit, ExitReason};
use super::{MemberView, NodeError};
use crate::env::EnvRef;
use crate::mvcc::{Published, View};
use crate::raft::{Fatal, LogId, Raft, StoredMembership, TypeConfig};
use crate::storage::layout::{Family, LogPosition, meta};
use crate::storage::{Read, codec};
use crate::telemetry;
use crate::types::{ClusterId, DiskId, NodeId, Revision, Space};

/// Who comes so much later than the first that waits for a round joins the next one: the round is given up
/// when the first has waited long enough.
pub(super) const SHARED_FOR: Duration = Duration::from_millis(50);
/// The first wait before something is tried again; doubled up to [`RETRY_MAX`].
pub(super) const RETRY_MIN: Duration = Duration::from_millis(10);
/// The longest wait before something is tried again.
pub(super) const RETRY_MAX: Duration = Duration::from_millis(250);

/// Whom this node follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader; 0 for none, or for one that has not been heard of for too
    /// long, or that leads here and has no quorum to confirm it.
    pub leader: NodeId,
    /// The term of this node's vote.
    pub term: u64,
    /// Whether this node leads, and a quorum follows.
    pub here: bool,
}

/// The compact marks that the sweep has reached.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Swept {
    pub user: Revision,
    pub system: Revision,
}

impl Swept {
    pub fn of(&mut self, space: Space) -> &mut Revision {
        match space {
            Space::User => &mut self.user,
            Space::System => &mut self.system,
        }
    }
}

/// The members, as the newest membership in this node's log has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Roster {
    /// The entry that brought the membership.
    pub position: Option<LogPosition>,
    /// The members by id.
    pub members: BTreeMap<NodeId, MemberView>,
    /// Whether two configurations hold at once, as in the middle of a change.
    pub joint: bool,
}

impl Roster {
    pub fn of(stored: &StoredMembership) -> Roster {
        let membership = stored.membership();
        let voters: std::collections::BTreeSet<NodeId> = membership.voter_ids().collect();
        let view = |(id, member): (&NodeId, &crate::types::Member)| {
            (*id, MemberView { member: member.clone(), is_voter: voters.contains(id) })
        };
        Roster {
            position: position_of(stored),
            members: membership.nodes().map(view).collect(),
            joint: membership.get_joint_config().len() > 1,
        }
    }

    /// One above the log index of the membership, because the first one stands
    /// at index 0; 0 for none.
    pub fn version(&self) -> u64 {
        self.position.map_or(0, |position| position.index + 1)
    }

    pub fn list(&self) -> Vec<MemberView> {
        self.members.values().cloned().collect()
    }

    pub fn voters(&self) -> impl Iterator<Item = &MemberView> {
        self.members.values().filter(|view| view.is_voter)
    }
}

fn position_of(stored: &StoredMembership) -> Option<LogPosition> {
    stored.log_id().as_ref().map(|id: &LogId| LogPosition::from(id))
}

/// What every part of the node shares.
pub(super) struct Core {
    pub options: Arc<NodeOptions>,
    pub env: EnvRef,
    pub id: NodeId,
    pub cluster_id: ClusterId,
    pub disk: DiskId,
    pub raft: Raft,
    pub published: Arc<Published>,
    pub carrier: Arc<dyn Carrier>,
    pub dialer: Arc<dyn Dialer>,
    pub exit: Exit,
    pub fatal: Fatal,
    /// How far each space's old versions are deleted on this node's disk.
    pub swept: watch::Sender<Swept>,
    leadership: watch::Sender<Leadership>,
    leader: watch::Sender<NodeId>,
    roster: ArcSwap<Roster>,
    committed_roster: ArcSwap<Roster>,
    /// The newest stamp this node gave or saw as leader, milliseconds since 1970.
    stamp_ms: AtomicU64,
}

/// The parts a [`Core`] is made of.
pub(super) struct CoreParts {
    pub options: Arc<NodeOptions>,
    pub env: EnvRef,
    pub id: NodeId,
    pub cluster_id: ClusterId,
    pub disk: DiskId,
    pub raft: Raft,
    pub published: Arc<Published>,
    pub carrier: Arc<dyn Carrier>,
    pub dialer: Arc<dyn Dialer>,
    pub exit: Exit,
    pub fatal: Fatal,
}

impl Core {
    pub fn new(parts: CoreParts) -> Arc<Core> {
        let core = Core {
            options: parts.options,
            env: parts.env,
            id: parts.id,
            cluster_id: parts.cluster_id,
            disk: parts.disk,
            raft: parts.raft,
            published: parts.published,
            carrier: parts.carrier,
            dialer: parts.dialer,
            exit: parts.exit,
            fatal: parts.fatal,
            swept: watch::channel(Swept::default()).0,
            leadership: watch::channel(Leadership::default()).0,
            leader: watch::channel(0).0,
            roster: ArcSwap::default(),
            committed_roster: ArcSwap::default(),
            stamp_ms: AtomicU64::new(0),
        };
        core.take_roster();
        Arc::new(core)
    }

    pub fn view(&self) -> Arc<View> {
        self.published.view()
    }

    pub fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    pub fn leadership_changes(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    pub fn leader_changes(&self) -> watch::Receiver<NodeId> {
        self.leader.subscribe()
    }

    /// The members by the newest membership in the log, committed or not: whom
    /// to talk to.
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// The members by the newest committed membership: whom to tell clients of.
    pub fn committed_roster(&self) -> Arc<Roster> {
        self.committed_roster.load_full()
    }

    /// The newest committed membership, asked of Raft itself: what it tells of
    /// by its metrics comes a moment later.
    pub async fn committed_membership(&self) -> Result<Arc<StoredMembership>, NodeError> {
        let asked = self.raft.with_raft_state(|state| state.membership_state.committed().clone()).await;
        asked.map_err(|fatal| self.fail(fatal))
    }

    /// When a request that begins now must have ended.
    pub fn deadline(&self, timeout: Option<Duration>) -> Instant {
        let own = self.options.request_timeout();
        Instant::now() + timeout.map_or(own, |asked| asked.min(Duration::from_secs(24 * 3600)))
    }

    /// The stamp for an entry proposed now: max(previous, wall clock).
    pub fn stamp(&self) -> u64 {
        let wall = self.env.wall_ms();
        self.stamp_ms.fetch_max(wall, Ordering::Relaxed).max(wall)
    }

    /// Takes over the stamps of former leaders, so that ours do not go back.
    pub fn take_stamp(&self) -> Result<(), NodeError> {
        let view = self.view();
        let stored = view.data.get(Family::Meta, meta::STAMP).map_err(internal)?;
        if let Some(bytes) = stored {
            let stamp: u64 = codec::decode("the time stamp", &bytes).map_err(internal)?;
            self.stamp_ms.fetch_max(stamp, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until this node's view holds the entry at `index`.
    pub async fn applied(&self, index: u64, deadline: Instant) -> Result<(), NodeError> {
        if self.view().applied.index >= index {
            return Ok(());
        }
        let mut applied = self.published.applied_index();
        let waited = tokio::time::timeout_at(deadline, applied.wait_for(|applied| *applied >= index)).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(NodeError::Stopped),
            Err(_) => Err(NodeError::Timeout),
        }
    }

    /// Waits until there is a leader, or the leadership is no longer `seen`.
    pub async fn leadership_beyond(&self, seen: Leadership, deadline: Instant) -> Leadership {
        let mut changes = self.leadership.subscribe();
        let changed = changes.wait_for(|now| *now != seen);
        match tokio::time::timeout_at(deadline, changed).await {
            Ok(Ok(now)) => *now,
            _ => seen,
        }
    }

    /// Asks a member within `timeout`.
    pub async fn ask(&self, to: NodeId, ask: Ask, timeout: Duration) -> Result<Answer, ControlError> {
        self.carrier.ask(to, ask, timeout).await
    }

    /// The node cannot go on: announces it and gives the error to answer with.
    pub fn fail(&self, why: impl std::fmt::Display) -> NodeError {
        let why = why.to_string();
        // A core that was shut down on purpose is no failure.
        if self.exit.reason().is_none() {
            self.exit.announce(ExitReason::Failed(why.clone()));
            self.fatal.raise(&why);
        }
        NodeError::Internal(why)
    }

    /// Takes over the members as Raft has them.
    fn take_roster(&self) {
        let (stored, committed) = {
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            (metrics.membership_config.clone(), metrics.committed_membership_config.clone())
        };
        // The newest membership can be taken back with its entry, so it may go
        // back, too; equality is what says that nothing changed.
        if self.roster.load().position != position_of(&stored) {
            let roster = Roster::of(&stored);
            self.carrier.take_members(&roster.list());
            self.roster.store(Arc::new(roster));
        }
        if self.committed_roster.load().position != position_of(&committed) {
            self.committed_roster.store(Arc::new(Roster::of(&committed)));
        }
    }

    /// Takes over whom Raft follows. `touched` is when its vote was last
    /// confirmed: by the leader's call, or by this node's own election.
    fn take_leadership(&self, touched: Option<InstantOf<TypeConfig>>) {
        let (leader, term, leads) = {
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            let leader = metrics.current_leader.unwrap_or(0);
            (leader, metrics.vote.leader_id.term, metrics.state.is_leader() && leader == self.id)
        };
        let alone = leads && self.roster().voters().all(|voter| voter.member.id == self.id);
        let acked = self.raft.data_metrics().borrow_watched().last_quorum_acked.map(|at| at.into_inner());
        let confirmed = if leads { acked.max(touched) } else { touched };
        let current = confirmed.is_some_and(|at| at.elapsed() <= self.leaderless_after());
        let leadership = match alone || current {
            true => Leadership { leader, term, here: leads },
            false => Leadership { leader: 0, term, here: false },
        };
        self.leadership.send_if_modified(|standing| {
            let changed = *standing != leadership;
            *standing = leadership;
            changed
        });
        self.leader.send_if_modified(|standing| {
            let changed = *standing != leadership.leader;
            if changed {
                metrics::counter!(telemetry::LEADER_CHANGES).increment(1);
                tracing::info!(leader = %format!("{:x}", leadership.leader), term = leadership.term, "leader");
            }
            *standing = leadership.leader;
            changed
        });
    }

    /// How long a leader counts as one without being heard of, and a leader
    /// itself without being confirmed by a quorum. Raft's vote alone does not
    /// tell: with pre-vote it stays as it is until another can be elected.
    /// Between the one and two election timeouts that etcd takes.
    fn leaderless_after(&self) -> Duration {
        self.options.election_timeout * 3 / 2
    }

    /// Keeps leadership and roster as Raft has them.
    pub async fn follow_metrics(self: Arc<Core>, stop: CancellationToken) {
        let mut metrics = self.raft.server_metrics();
        loop {
            let looked = async {
                // Silence changes no metric, so it is looked for.
                let pause = tokio::time::sleep(self.options.heartbeat_interval);
                let changed = tokio::select! {
                    changed = WatchReceiver::changed(&mut metrics) => changed.is_ok(),
                    () = pause => true,
                };
                self.take_roster();
                match changed {
                    true => self.raft.with_raft_state(|state| state.vote_last_modified()).await.ok(),
                    false => None,
                }
            };
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = looked => looked,
            };
            let Some(touched) = looked else {
                if !stop.is_cancelled() {
                    self.fail("Raft ended without being asked to");
                }
                return;
            };
            self.take_leadership(touched);
        }
    }
}

/// An error of the disk in the middle of a request.
pub(super) fn internal(error: impl std::fmt::Display) -> NodeError {
    NodeError::Internal(error.to_string())
}

/// Waits that grow from [`RETRY_MIN`] to [`RETRY_MAX`], with jitter so that
/// those who failed together do not come back together.
pub(super) struct Pause {
    next: Duration,
}

impl Default for Pause {
    fn default() -> Pause {
        Pause { next: RETRY_MIN }
    }
}

impl Pause {
    /// Waits, but not beyond the deadline. False when the deadline has passed.
    pub async fn wait(&mut self, env: &EnvRef, deadline: Instant) -> bool {
        let jitter = self.next.mul_f64((env.random_u64() % 1000) as f64 / 2000.0);
        let until = Instant::now() + self.next / 2 + jitter;
        self.next = (self.next * 2).min(RETRY_MAX);
        tokio::time::sleep_until(until.min(deadline)).await;
        until < deadline
    }
}
