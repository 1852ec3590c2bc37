//! Changes of the membership, made by the leader, one at a time.
//!
//! Invariants: a change is decided on the membership it is applied to
//! (`Precondition::LastMembershipLogId`); it never leads through a state whose
//! quorum is not alive; a disk that holds a member's vote is never replaced by
//! another under the same id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::Precondition;
use openraft::type_config::TypeConfigExt as _;
use openraft::type_config::alias::InstantOf;
use tokio::time::Instant;

use super::control::{JoinRequest, MemberChange, MemberChanged};
use super::core::{Core, Pause, Roster};
use super::ids::joining_node_id;
use super::options::sorted;
use super::read::Reads;
use super::{MemberView, NodeError};
use crate::raft::{LogId, StoredMembership, TypeConfig};
use crate::types::{Member, MemberKind, NodeId};

/// How many entries a learner may be behind to be made a voter.
pub(super) const PROMOTE_LAG_MAX: u64 = 1_000;

/// How often answers are looked for while a change waits for them.
const HEALTH_INTERVAL: Duration = Duration::from_millis(20);

type Changes = ChangeMembers<NodeId, Member>;

/// Why the leader did not make a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ChangeError {
    /// This node does not lead; nothing was done.
    NotLeader,
    /// It must not, or could not, be done.
    Failed(NodeError),
}

impl From<NodeError> for ChangeError {
    fn from(error: NodeError) -> ChangeError {
        ChangeError::Failed(error)
    }
}

/// What the leader sees of each member.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// Members that answered within the last two election timeouts, this one among them.
    pub alive: BTreeSet<NodeId>,
    /// Entries that each member is known to be behind.
    pub lag: BTreeMap<NodeId, u64>,
}

impl Health {
    /// What this leader's replication says. Everyone is dead to a follower.
    pub fn of(core: &Core) -> Health {
        let metrics = core.raft.metrics();
        let metrics = metrics.borrow_watched();
        let recent = 2 * core.options.election_timeout;
        let mut health = Health::default();
        health.alive.insert(core.id);
        for (id, acknowledged) in metrics.heartbeat.iter().flatten() {
            if acknowledged.as_ref().is_some_and(|at| at.elapsed() < recent) {
                health.alive.insert(*id);
            }
        }
        let last = metrics.last_log_index.unwrap_or(0);
        for (id, matched) in metrics.replication.iter().flatten() {
            if let Some(matched) = matched {
                health.lag.insert(*id, last.saturating_sub(matched.index));
            }
        }
        health
    }

    /// What the replication says now: alive is who acknowledged something sent
    /// after the call. Waits for everyone in `asked`, for one election timeout
    /// at most: a member that died a moment ago must not count for a quorum.
    pub async fn now(core: &Core, asked: &BTreeSet<NodeId>) -> Result<Health, NodeError> {
        let began = TypeConfig::now();
        let until = Instant::now() + core.options.election_timeout;
        core.raft.trigger().heartbeat().await.map_err(|fatal| core.fail(fatal))?;
        loop {
            let answered = Health::answered_since(core, began);
            if asked.is_subset(&answered) || Instant::now() >= until {
                return Ok(Health { alive: answered, ..Health::of(core) });
            }
            tokio::time::sleep(HEALTH_INTERVAL).await;
        }
    }

    fn answered_since(core: &Core, began: InstantOf<TypeConfig>) -> BTreeSet<NodeId> {
        let metrics = core.raft.metrics();
        let metrics = metrics.borrow_watched();
        let answered =
            metrics.heartbeat.iter().flatten().filter_map(|(id, acknowledged)| {
                acknowledged.as_ref().filter(|at| ***at >= began).map(|_| *id)
            });
        answered.chain([core.id]).collect()
    }

    /// Whether a member receives the log and has nearly all of it.
    pub fn caught_up(&self, id: NodeId) -> bool {
        self.alive.contains(&id) && self.lag.get(&id).is_some_and(|lag| *lag <= PROMOTE_LAG_MAX)
    }
}

/// What a wish comes to, on one membership.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// It holds already.
    Holds(NodeId),
    /// This change makes it hold; the id is of the member it is about.
    Change(NodeId, Changes),
    /// The leader itself is to go: it must hand over first.
    HandOver,
}

/// Makes changes of the membership while this node leads.
pub(super) struct Membership {
    core: Arc<Core>,
    reads: Arc<Reads>,
    /// Held through one change, joint state and all.
    changing: tokio::sync::Mutex<()>,
}

impl Membership {
    pub fn new(core: Arc<Core>, reads: Arc<Reads>) -> Arc<Membership> {
        Arc::new(Membership { core, reads, changing: tokio::sync::Mutex::new(()) })
    }

    /// Makes one change, if this node leads.
    pub async fn change(
        &self,
        change: &MemberChange,
        deadline: Instant,
    ) -> Result<MemberChanged, ChangeError> {
        let _turn = tokio::time::timeout_at(deadline, self.changing.lock())
            .await
            .map_err(|_| ChangeError::Failed(NodeError::Timeout))?;
        let mut pause = Pause::default();
        loop {
            self.ready(deadline).await?;
            let stored = self.stored();
            let roster = Roster::of(&stored);
            let health = Health::now(&self.core, &concerned(change, &roster)).await?;
            let decision = decide(change, &roster, &health, &self.core)?;
            let (id, changes) = match decision {
                Decision::Holds(id) => return Ok(changed(&roster, id)),
                Decision::HandOver => {
                    let target = self.successor(&roster).ok_or(NodeError::Unhealthy)?;
                    self.transfer(target, deadline).await?;
                    return Err(ChangeError::NotLeader);
                }
                Decision::Change(id, changes) => (id, changes),
            };
            tracing::info!(?change, "changing the membership");
            match self.write(changes, *stored.log_id(), deadline).await? {
                Written::Done => {
                    let committed = self.core.committed_membership().await?;
                    return Ok(changed(&Roster::of(&committed), id));
                }
                // Another change is not committed yet, or came in between.
                Written::Again if pause.wait(&self.core.env, deadline).await => {}
                Written::Again => return Err(NodeError::Timeout.into()),
            }
        }
    }

    /// Ends a change that a former leader left in its joint state. Does nothing
    /// while a change is being made here.
    pub async fn finish_joint(&self) -> Result<(), ChangeError> {
        let Ok(_turn) = self.changing.try_lock() else { return Ok(()) };
        if !Roster::of(&self.stored()).joint {
            return Ok(());
        }
        let deadline = self.core.deadline(None);
        self.confirm(deadline).await?;
        self.flatten(deadline).await
    }

    /// Hands leadership to a voter and waits until it has it.
    ///
    /// # Errors
    /// `BadTransferee` for a member that does not vote, is not reachable or lags.
    pub async fn move_leader(&self, target: NodeId, deadline: Instant) -> Result<(), NodeError> {
        let _turn =
            tokio::time::timeout_at(deadline, self.changing.lock()).await.map_err(|_| NodeError::Timeout)?;
        if !self.core.leadership().here {
            return Err(NodeError::NotLeader);
        }
        if target == self.core.id {
            return Ok(());
        }
        let roster = Roster::of(&self.stored());
        let votes = roster.members.get(&target).is_some_and(|view| view.is_voter);
        if !votes || !Health::now(&self.core, &BTreeSet::from([target])).await?.caught_up(target) {
            return Err(NodeError::BadTransferee);
        }
        self.transfer(target, deadline).await
    }

    /// The reachable voter that is least behind, if any.
    pub fn successor(&self, roster: &Roster) -> Option<NodeId> {
        let health = Health::of(&self.core);
        let candidates = roster.voters().map(|view| view.member.id).filter(|id| *id != self.core.id);
        candidates.filter(|id| health.caught_up(*id)).min_by_key(|id| (health.lag.get(id).copied(), *id))
    }

    /// Hands over if this node leads and somebody can take over: on a graceful stop.
    pub async fn hand_over(&self, deadline: Instant) -> Result<(), NodeError> {
        if !self.core.leadership().here {
            return Ok(());
        }
        match self.successor(&Roster::of(&self.stored())) {
            Some(target) => self.transfer(target, deadline).await,
            None => Ok(()),
        }
    }

    async fn transfer(&self, target: NodeId, deadline: Instant) -> Result<(), NodeError> {
        tracing::info!(target = %format!("{target:x}"), "handing over leadership");
        let mut changes = self.core.leadership_changes();
        self.core.raft.trigger().transfer_leader(target).await.map_err(|fatal| self.core.fail(fatal))?;
        // This node takes no writes from here on; if nobody takes over, its
        // followers stop hearing heartbeats and elect by themselves.
        let own = self.core.id;
        let moved = changes.wait_for(|now| now.leader != own && now.leader != 0);
        match tokio::time::timeout_at(deadline, moved).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(NodeError::Stopped),
            Err(_) => Err(NodeError::TransferTimeout),
        }
    }

    fn stored(&self) -> Arc<StoredMembership> {
        let metrics = self.core.raft.server_metrics();
        metrics.borrow_watched().membership_config.clone()
    }

    async fn confirm(&self, deadline: Instant) -> Result<(), ChangeError> {
        if !self.core.leadership().here {
            return Err(ChangeError::NotLeader);
        }
        let confirmed = self.reads.confirm(deadline).await?;
        if confirmed.leader != self.core.id {
            return Err(ChangeError::NotLeader);
        }
        // An entry of this leader's own term is committed from here on.
        Ok(self.core.applied(confirmed.index, deadline).await?)
    }

    /// Confirmed as leader, and with no change half made.
    async fn ready(&self, deadline: Instant) -> Result<(), ChangeError> {
        self.confirm(deadline).await?;
        if Roster::of(&self.stored()).joint {
            self.flatten(deadline).await?;
        }
        Ok(())
    }

    async fn flatten(&self, deadline: Instant) -> Result<(), ChangeError> {
        tracing::info!("ending a change of the membership that was left half made");
        let nothing_more = ChangeMembers::AddVoterIds(BTreeSet::new());
        let at = *self.stored().log_id();
        self.write(nothing_more, at, deadline).await.map(|_| ())
    }

    async fn write(
        &self,
        changes: Changes,
        last_membership_log_id: Option<LogId>,
        deadline: Instant,
    ) -> Result<Written, ChangeError> {
        // A removed voter leaves altogether: it does not stay as a learner.
        let retain = false;
        let precondition = Precondition::LastMembershipLogId { last_membership_log_id };
        let write = self.core.raft.change_membership_if(changes, retain, [precondition]);
        let Ok(result) = tokio::time::timeout_at(deadline, write).await else {
            return Err(NodeError::Timeout.into());
        };
        match result {
            Ok(_) => Ok(Written::Done),
            Err(RaftError::Fatal(fatal)) => Err(self.core.fail(fatal).into()),
            Err(RaftError::APIError(error)) => refused(error),
        }
    }
}

enum Written {
    Done,
    Again,
}

fn refused(error: ClientWriteError<TypeConfig>) -> Result<Written, ChangeError> {
    match error {
        ClientWriteError::ForwardToLeader(_) => Err(ChangeError::NotLeader),
        ClientWriteError::LogEntryDiscarded(_) => Err(NodeError::LeaderChanged.into()),
        ClientWriteError::PreconditionFailed(_) => Ok(Written::Again),
        ClientWriteError::ChangeMembershipError(error) => match error {
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_) => {
                Ok(Written::Again)
            }
            ChangeMembershipError::EmptyMembership(_) => Err(NodeError::NotEnoughStarted.into()),
            ChangeMembershipError::LearnerNotFound(_) => Err(NodeError::MemberNotFound.into()),
            other => Err(NodeError::Internal(other.to_string()).into()),
        },
    }
}

fn changed(roster: &Roster, id: NodeId) -> MemberChanged {
    MemberChanged {
        member: roster.members.get(&id).map(|view| view.member.clone()),
        members: roster.list(),
        index: roster.position.map_or(0, |position| position.index),
    }
}

/// Whose health a wish depends on: of every voter, where a quorum is counted.
fn concerned(change: &MemberChange, roster: &Roster) -> BTreeSet<NodeId> {
    let voters = || roster.voters().map(|view| view.member.id);
    match change {
        MemberChange::Remove { id } => voters().filter(|voter| voter != id).collect(),
        MemberChange::Promote { id } => voters().chain([*id]).collect(),
        MemberChange::Add { .. } | MemberChange::Join(_) => voters().collect(),
        MemberChange::Update { .. } | MemberChange::Publish { .. } => BTreeSet::new(),
    }
}

/// What a wish comes to on this membership: a pure function, so that every
/// refusal is tested without a cluster.
fn decide(
    change: &MemberChange,
    roster: &Roster,
    health: &Health,
    core: &Core,
) -> Result<Decision, NodeError> {
    match change {
        MemberChange::Add { peer_urls, kind } => {
            // Drawn at random among 2^64: no id of the past comes again.
            let id = core.env.random_u64().max(1);
            add(roster, health, Member { id, peer_urls: peer_urls.clone(), kind: *kind, ..Member::default() })
        }
        MemberChange::Remove { id } => remove(roster, health, *id, core.id),
        MemberChange::Update { id, peer_urls } => update(roster, *id, peer_urls),
        MemberChange::Promote { id } => promote(roster, health, *id),
        MemberChange::Publish { id, disk, name, client_urls } => {
            let member = &roster.members.get(id).ok_or(NodeError::MemberNotFound)?.member;
            // The record of a member restored from a snapshot knows no disk yet.
            if member.disk != *disk && member.disk != 0 {
                return Err(wiped(member));
            }
            let (name, client_urls) = (name.clone(), client_urls.clone());
            let published = Member { name, client_urls, disk: *disk, ..member.clone() };
            Ok(set(member, published))
        }
        MemberChange::Join(request) if request.claim => claim(roster, request),
        MemberChange::Join(request) => join(roster, health, request, core.cluster_id),
    }
}

fn set(before: &Member, after: Member) -> Decision {
    if *before == after {
        return Decision::Holds(after.id);
    }
    Decision::Change(after.id, ChangeMembers::SetNodes(BTreeMap::from([(after.id, after)])))
}

fn check_urls(roster: &Roster, urls: &[String], own: Option<NodeId>) -> Result<(), NodeError> {
    if urls.is_empty() || urls.iter().any(String::is_empty) {
        return Err(NodeError::Invalid("etcdserver: given member URLs are invalid".to_owned()));
    }
    let others = roster.members.values().filter(|view| Some(view.member.id) != own);
    if others.flat_map(|view| &view.member.peer_urls).any(|url| urls.contains(url)) {
        return Err(NodeError::PeerUrlExists);
    }
    Ok(())
}

fn add(roster: &Roster, health: &Health, member: Member) -> Result<Decision, NodeError> {
    check_urls(roster, &member.peer_urls, None)?;
    if roster.members.contains_key(&member.id) {
        return Err(NodeError::MemberExists);
    }
    if member.kind == MemberKind::Voter {
        // As etcd counts: members that are still to become voters count, too.
        let voting = || roster.members.values().filter(|view| view.member.kind == MemberKind::Voter);
        let started = voting().filter(|view| view.member.disk != 0).count();
        let planned = voting().count() + 1;
        let first_growth = started == 1 && planned == 2;
        if !first_growth && started < quorum(planned) {
            return Err(NodeError::NotEnoughStarted);
        }
        let alive = roster.voters().filter(|view| health.alive.contains(&view.member.id)).count();
        if alive < quorum(roster.voters().count()) {
            return Err(NodeError::Unhealthy);
        }
    }
    let id = member.id;
    Ok(Decision::Change(id, ChangeMembers::AddNodes(BTreeMap::from([(id, member)]))))
}

fn remove(roster: &Roster, health: &Health, id: NodeId, leader: NodeId) -> Result<Decision, NodeError> {
    let view = roster.members.get(&id).ok_or(NodeError::MemberNotFound)?;
    if !view.is_voter {
        return Ok(Decision::Change(id, ChangeMembers::RemoveNodes(BTreeSet::from([id]))));
    }
    let staying: Vec<&MemberView> = roster.voters().filter(|view| view.member.id != id).collect();
    let needed = quorum(staying.len());
    let started = staying.iter().filter(|view| view.member.disk != 0).count();
    if staying.is_empty() || started < needed {
        return Err(NodeError::NotEnoughStarted);
    }
    if staying.iter().filter(|view| health.alive.contains(&view.member.id)).count() < needed {
        return Err(NodeError::Unhealthy);
    }
    if id == leader {
        return Ok(Decision::HandOver);
    }
    Ok(Decision::Change(id, ChangeMembers::RemoveVoters(BTreeSet::from([id]))))
}

fn update(roster: &Roster, id: NodeId, peer_urls: &[String]) -> Result<Decision, NodeError> {
    let member = &roster.members.get(&id).ok_or(NodeError::MemberNotFound)?.member;
    check_urls(roster, peer_urls, Some(id))?;
    Ok(set(member, Member { peer_urls: peer_urls.to_vec(), ..member.clone() }))
}

fn promote(roster: &Roster, health: &Health, id: NodeId) -> Result<Decision, NodeError> {
    let view = roster.members.get(&id).ok_or(NodeError::MemberNotFound)?;
    if view.is_voter {
        return Err(NodeError::NotLearner);
    }
    if view.member.kind == MemberKind::Observer {
        return Err(NodeError::Invalid(format!(
            "member {id:x} is an observer, which is never promoted; remove it and add it as a learner"
        )));
    }
    if view.member.disk == 0 || !health.caught_up(id) {
        return Err(NodeError::LearnerNotReady);
    }
    let alive = roster.voters().filter(|view| health.alive.contains(&view.member.id)).count() + 1;
    if alive < quorum(roster.voters().count() + 1) {
        return Err(NodeError::Unhealthy);
    }
    let member = Member { kind: MemberKind::Voter, ..view.member.clone() };
    let changes = vec![
        ChangeMembers::SetNodes(BTreeMap::from([(id, member)])),
        ChangeMembers::AddVoterIds(BTreeSet::from([id])),
    ];
    Ok(Decision::Change(id, ChangeMembers::Batch(changes)))
}

/// A member that was added before starts for the first time.
fn claim(roster: &Roster, request: &JoinRequest) -> Result<Decision, NodeError> {
    let urls = sorted(&request.peer_urls);
    let found = roster.members.values().find(|view| sorted(&view.member.peer_urls) == urls);
    let Some(view) = found else {
        return Err(NodeError::NotAdmitted(format!(
            "no member of the cluster has the peer URLs {}; add it first: mainstay member add {} --peer-urls {}",
            urls.join(","),
            request.name,
            urls.join(",")
        )));
    };
    take_record(&view.member, request)
}

fn take_record(member: &Member, request: &JoinRequest) -> Result<Decision, NodeError> {
    if member.disk == request.disk_id {
        return Ok(Decision::Holds(member.id));
    }
    if member.disk != 0 {
        return Err(wiped(member));
    }
    let claimed = Member {
        disk: request.disk_id,
        name: request.name.clone(),
        client_urls: request.client_urls.clone(),
        ..member.clone()
    };
    Ok(set(member, claimed))
}

/// A node asks to be let in.
fn join(
    roster: &Roster,
    health: &Health,
    request: &JoinRequest,
    cluster: crate::types::ClusterId,
) -> Result<Decision, NodeError> {
    if request.disk_id == 0 {
        return Err(NodeError::Invalid("a joining node must name its disk".to_owned()));
    }
    if let Some(view) = roster.members.values().find(|view| view.member.disk == request.disk_id) {
        return Ok(Decision::Holds(view.member.id));
    }
    let urls = sorted(&request.peer_urls);
    if let Some(view) = roster.members.values().find(|view| sorted(&view.member.peer_urls) == urls) {
        return take_record(&view.member, request);
    }
    let named =
        roster.members.values().find(|view| !request.name.is_empty() && view.member.name == request.name);
    if let Some(view) = named {
        return Err(NodeError::NotAdmitted(format!(
            "the name {:?} is taken by member {:x}; give this node another with --name, \
             or remove that member first if this node replaces it",
            request.name, view.member.id
        )));
    }
    let member = Member {
        id: joining_node_id(cluster, request.disk_id),
        name: request.name.clone(),
        peer_urls: request.peer_urls.clone(),
        client_urls: request.client_urls.clone(),
        kind: request.kind,
        disk: request.disk_id,
    };
    add(roster, health, member)
}

/// What a node with another disk than the recorded one is told.
pub(super) fn wiped(member: &Member) -> NodeError {
    NodeError::NotAdmitted(format!(
        "member {:x} ({}) holds its vote on another disk: this looks like a wiped disk. \
         A member must not come back without its data, because it may have voted: \
         remove the member and add it again (mainstay member remove {:x}, then start with --join)",
        member.id, member.name, member.id
    ))
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: NodeId) -> Member {
        Member {
            id,
            name: format!("n{id}"),
            peer_urls: vec![format!("http://{id}")],
            client_urls: vec![],
            kind: MemberKind::Voter,
            disk: id * 100,
        }
    }

    fn roster(voters: &[NodeId], learners: &[Member]) -> Roster {
        let voters = voters.iter().map(|id| (*id, MemberView { member: member(*id), is_voter: true }));
        let learners =
            learners.iter().map(|member| (member.id, MemberView { member: member.clone(), is_voter: false }));
        Roster { position: None, members: voters.chain(learners).collect(), joint: false }
    }

    fn alive(ids: &[NodeId]) -> Health {
        Health { alive: ids.iter().copied().collect(), lag: ids.iter().map(|id| (*id, 0)).collect() }
    }

    fn request(disk: u64, url: &str, claim: bool) -> JoinRequest {
        JoinRequest {
            disk_id: disk,
            name: "new".to_owned(),
            peer_urls: vec![url.to_owned()],
            client_urls: vec![],
            kind: MemberKind::Voter,
            claim,
        }
    }

    #[test]
    fn a_removal_that_would_lose_the_quorum_is_refused() {
        let three = roster(&[1, 2, 3], &[]);
        assert_eq!(remove(&three, &alive(&[1, 2]), 2, 1), Err(NodeError::Unhealthy));
        assert!(
            matches!(remove(&three, &alive(&[1, 2]), 3, 1), Ok(Decision::Change(3, _))),
            "the dead may go"
        );
        assert_eq!(remove(&three, &alive(&[1, 2, 3]), 1, 1), Ok(Decision::HandOver));
        assert_eq!(remove(&three, &alive(&[1]), 9, 1), Err(NodeError::MemberNotFound));
        assert_eq!(remove(&roster(&[1], &[]), &alive(&[1]), 1, 1), Err(NodeError::NotEnoughStarted));
    }

    #[test]
    fn promotion_needs_a_started_learner_that_caught_up() {
        let learner = Member { kind: MemberKind::Learner, ..member(4) };
        let with = |member: Member| roster(&[1, 2, 3], &[member]);
        let everyone = alive(&[1, 2, 3, 4]);
        assert!(matches!(promote(&with(learner.clone()), &everyone, 4), Ok(Decision::Change(4, _))));
        assert_eq!(promote(&with(learner.clone()), &everyone, 1), Err(NodeError::NotLearner));
        assert_eq!(promote(&with(learner.clone()), &alive(&[1, 2, 3]), 4), Err(NodeError::LearnerNotReady));
        let mut behind = everyone.clone();
        behind.lag.insert(4, PROMOTE_LAG_MAX + 1);
        assert_eq!(promote(&with(learner.clone()), &behind, 4), Err(NodeError::LearnerNotReady));
        let unstarted = Member { disk: 0, ..learner.clone() };
        assert_eq!(promote(&with(unstarted), &everyone, 4), Err(NodeError::LearnerNotReady));
        let observer = Member { kind: MemberKind::Observer, ..learner };
        assert!(matches!(promote(&with(observer), &everyone, 4), Err(NodeError::Invalid(_))));
    }

    #[test]
    fn adding_counts_members_that_have_not_started() {
        let new = |id| Member { disk: 0, ..member(id) };
        assert!(add(&roster(&[1], &[]), &alive(&[1]), new(2)).is_ok(), "the first growth");
        assert_eq!(add(&roster(&[1], &[new(2)]), &alive(&[1]), new(3)), Err(NodeError::NotEnoughStarted));
        let same_url = Member { id: 9, ..member(1) };
        assert_eq!(add(&roster(&[1], &[]), &alive(&[1]), same_url), Err(NodeError::PeerUrlExists));
        assert_eq!(add(&roster(&[1, 2, 3], &[]), &alive(&[1]), new(4)), Err(NodeError::Unhealthy));
    }

    #[test]
    fn a_join_is_idempotent_and_a_wiped_disk_is_refused() {
        let three = roster(&[1, 2, 3], &[]);
        let everyone = alive(&[1, 2, 3]);
        assert_eq!(join(&three, &everyone, &request(300, "http://3", false), 5), Ok(Decision::Holds(3)));
        let wiped = join(&three, &everyone, &request(999, "http://3", false), 5);
        assert!(matches!(wiped, Err(NodeError::NotAdmitted(text)) if text.contains("wiped disk")));
        let Ok(Decision::Change(id, _)) = join(&three, &everyone, &request(999, "http://4", false), 5) else {
            panic!("a new node is let in");
        };
        assert_eq!(id, joining_node_id(5, 999));
        let namesake = JoinRequest { name: "n2".to_owned(), ..request(999, "http://4", false) };
        let refused = join(&three, &everyone, &namesake, 5);
        assert!(matches!(refused, Err(NodeError::NotAdmitted(text)) if text.contains("is taken")));
    }

    #[test]
    fn a_claim_takes_an_unclaimed_record_only() {
        let unclaimed = Member { disk: 0, name: String::new(), ..member(4) };
        let four = roster(&[1, 2, 3], &[unclaimed]);
        assert!(matches!(claim(&four, &request(7, "http://4", true)), Ok(Decision::Change(4, _))));
        assert_eq!(claim(&four, &request(300, "http://3", true)), Ok(Decision::Holds(3)));
        assert!(matches!(claim(&four, &request(7, "http://3", true)), Err(NodeError::NotAdmitted(_))));
        assert!(matches!(claim(&four, &request(7, "http://9", true)), Err(NodeError::NotAdmitted(_))));
    }
}
