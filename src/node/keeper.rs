//! What the node does about its membership without being asked: the leader
//! promotes who has caught up, ends changes left half made and raises the
//! cluster version; every node publishes its name and notices its removal.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ask::Desk;
use super::control::{Ask, MemberChange, ProbeRequest};
use super::core::{Core, Roster};
use super::membership::{ChangeError, Health};
use super::propose::own_version;
use super::tasks::{ExitReason, Tasks};
use crate::types::{MemberKind, NodeId, Operation};

/// How often the leader looks at its learners.
const PROMOTE_INTERVAL: Duration = Duration::from_millis(500);
/// How often versions are compared, and own facts published again.
const SLOW_INTERVAL: Duration = Duration::from_secs(2);
/// How often own facts are compared until they are known.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(50);
/// How long one member may take to say its version or what it knows of us.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts the tasks. `joined_index` is the log index of the membership that let
/// this node in, 0 for the first members. `on_removed` makes the removal stand
/// across restarts.
pub(super) fn start(
    desk: &Arc<Desk>,
    tasks: &Tasks,
    joined_index: u64,
    on_removed: impl Fn() + Send + Sync + 'static,
) {
    let own = desk.clone();
    tasks.start("members", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = promote(&own) => {} }
    });
    let own = desk.clone();
    tasks.start("cluster-version", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = raise_version(&own) => {} }
    });
    let own = desk.clone();
    tasks.start("publish", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = publish(&own) => {} }
    });
    let own = desk.clone();
    tasks.start("removal", |stop| async move {
        notice_removal(&own.core, joined_index, stop).await;
        if own.core.exit.reason() == Some(ExitReason::Removed) {
            on_removed();
        }
    });
}

/// The leader ends joint states and promotes joining members that caught up.
async fn promote(desk: &Desk) {
    loop {
        tokio::time::sleep(PROMOTE_INTERVAL).await;
        if !desk.core.leadership().here {
            continue;
        }
        let roster = desk.core.roster();
        if roster.joint
            && let Err(error) = desk.membership.finish_joint().await
        {
            tracing::debug!(?error, "cannot end the half-made change yet");
            continue;
        }
        let health = Health::of(&desk.core);
        let joining = |id: &NodeId| {
            let view = &roster.members[id];
            !view.is_voter && view.member.kind == MemberKind::Voter && view.member.disk != 0
        };
        let ready = roster.members.keys().filter(|id| joining(id)).find(|id| health.caught_up(**id));
        let Some(id) = ready.copied() else { continue };
        let deadline = desk.core.deadline(None);
        match desk.membership.change(&MemberChange::Promote { id }, deadline).await {
            Ok(_) => tracing::info!(member = %format!("{id:x}"), "a joining member caught up and votes now"),
            Err(ChangeError::NotLeader) => {}
            Err(ChangeError::Failed(error)) => {
                tracing::debug!(member = %format!("{id:x}"), %error, "cannot promote yet");
            }
        }
    }
}

/// The leader sets the cluster version to the lowest of all members'.
async fn raise_version(desk: &Desk) {
    let mut interval = SLOW_INTERVAL / 4;
    loop {
        tokio::time::sleep(interval).await;
        interval = SLOW_INTERVAL;
        let standing = desk.core.view().cluster_version;
        if !desk.core.leadership().here || standing >= own_version() {
            continue;
        }
        let Some(lowest) = lowest_version(&desk.core).await else { continue };
        if lowest > standing
            && let Err(error) =
                desk.proposer.propose_here(Operation::ClusterVersion { version: lowest }).await
        {
            tracing::debug!(%error, "could not raise the cluster version");
        }
    }
}

/// The lowest version of all members; `None` while one of them cannot say.
async fn lowest_version(core: &Core) -> Option<u32> {
    let mut lowest = own_version();
    for (id, view) in &core.roster().members {
        // A member that has not started yet will start with this version or a
        // newer one: an older one finds a cluster version it does not know.
        if *id == core.id || view.member.disk == 0 {
            continue;
        }
        let url = view.member.peer_urls.first()?;
        let reply = core.dialer.probe(url, own_probe(core), PROBE_TIMEOUT).await.ok()?;
        if reply.cluster_id != core.cluster_id || reply.node_id != *id {
            return None;
        }
        lowest = lowest.min(reply.version);
    }
    Some(lowest)
}

fn own_probe(core: &Core) -> ProbeRequest {
    ProbeRequest { node_id: core.id, disk_id: core.disk, peer_urls: core.options.peer_urls.clone() }
}

/// Tells the cluster this node's name and client URLs when its record differs:
/// soon after the start, so that clients are told of them from the first on.
async fn publish(desk: &Desk) {
    let core = &desk.core;
    let mut interval = PUBLISH_INTERVAL;
    loop {
        let published = core.committed_roster().members.get(&core.id).is_some_and(|view| {
            view.member.name == core.options.name && view.member.client_urls == core.options.client_urls
        });
        let known = core.committed_roster().members.contains_key(&core.id);
        if published {
            interval = SLOW_INTERVAL / 4;
        } else if known {
            let change = MemberChange::Publish {
                id: core.id,
                disk: core.disk,
                name: core.options.name.clone(),
                client_urls: core.options.client_urls.clone(),
            };
            if let Err(error) = desk.ask_leader(Ask::Member(change), core.deadline(None)).await {
                tracing::debug!(%error, "cannot publish this node's name yet");
            }
        }
        tokio::time::sleep(interval).await;
    }
}

/// Ends the node when a committed membership, newer than every one that held
/// it, does not hold it any more: found in its own log, or told by a member.
async fn notice_removal(core: &Core, joined_index: u64, stop: CancellationToken) {
    // The newest membership known to have held this node, by its version.
    let mut held = joined_index + u64::from(joined_index > 0);
    let mut turn = 0_usize;
    loop {
        let roster = core.committed_roster();
        if roster.members.contains_key(&core.id) {
            held = held.max(roster.version());
        } else if roster.version() > held {
            return core.exit.announce(ExitReason::Removed);
        }
        // The newest membership says whom to ask: after a crash the committed one
        // is what the state's last flush knew, which may be nothing, and nobody
        // tells a removed member of another.
        let newest = core.roster();
        let told = if core.leadership().here { None } else { ask_around(core, &newest, &mut turn).await };
        if told.is_some_and(|version| version > held) {
            return core.exit.announce(ExitReason::Removed);
        }
        let until = Instant::now() + SLOW_INTERVAL.min(4 * core.options.election_timeout);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

/// Asks the leader, or members in turn, whether they still know this node. The
/// version of a committed membership that does not hold it, if there is one.
async fn ask_around(core: &Core, roster: &Roster, turn: &mut usize) -> Option<u64> {
    let others: Vec<_> = roster.members.values().filter(|view| view.member.id != core.id).collect();
    if others.is_empty() {
        return None;
    }
    let leader = core.leadership().leader;
    *turn += 1;
    let in_turn = others[*turn % others.len()];
    // Every other time another than the leader: the leader this node believes
    // in may be long gone.
    let asked = if turn.is_multiple_of(2) {
        others.iter().find(|view| view.member.id == leader).copied().unwrap_or(in_turn)
    } else {
        in_turn
    };
    let url = asked.member.peer_urls.first()?;
    let reply = core.dialer.probe(url, own_probe(core), PROBE_TIMEOUT).await.ok()?;
    let same = reply.cluster_id == core.cluster_id;
    (same && !reply.asker_known).then_some(reply.membership_version)
}
