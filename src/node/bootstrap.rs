//! How a node with a new data directory comes into a cluster: makes one
//! together with others, claims a record that was added for it, or asks to be
//! let in.
//!
//! Refuses to take part whenever a peer's answer contradicts what this node was
//! told: other initial members, another token, a disk that is not the recorded
//! one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{InitializeError, RaftError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeError;
use super::control::{Dialer, JoinRequest, ProbeReply, ProbeRequest};
use super::core::{Core, Pause};
use super::ids::{initial_cluster_id, initial_node_id};
use super::membership::wiped;
use super::options::{Bootstrap, InitialMember, NodeOptions};
use super::tasks::ExitReason;
use crate::env::EnvRef;
use crate::mutant::{self, Mutant};
use crate::types::{ClusterId, DiskId, Member, MemberKind, NodeId};

/// How long one peer may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one request to be let in may take: the leader has to commit it.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a node keeps asking to be let in.
const JOIN_TIMEOUT_ALL: Duration = Duration::from_secs(60);
/// How often the initial members look whether all are there.
const FORM_INTERVAL: Duration = Duration::from_millis(100);
/// How often a node that waits for others says so.
const FORM_SAY_INTERVAL: Duration = Duration::from_secs(10);

/// Who this node is in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub cluster_id: ClusterId,
    pub node_id: NodeId,
    /// Log index of the membership that let it in; 0 for the first members.
    pub joined_index: u64,
}

/// Finds out who a node with a new data directory is.
pub(super) async fn enter(
    options: &NodeOptions,
    dialer: &dyn Dialer,
    env: &EnvRef,
    disk: DiskId,
) -> Result<Place, NodeError> {
    let request = JoinRequest {
        disk_id: disk,
        name: options.name.clone(),
        peer_urls: options.peer_urls.clone(),
        client_urls: options.client_urls.clone(),
        kind: MemberKind::Voter,
        claim: false,
    };
    match &options.bootstrap {
        Bootstrap::Initial { members, token } => {
            let own = own_entry(members, options)?;
            Ok(Place {
                cluster_id: initial_cluster_id(token, members),
                node_id: initial_node_id(token, own),
                joined_index: 0,
            })
        }
        Bootstrap::Existing { members } => {
            let others = members.iter().filter(|member| member.name != options.name);
            let urls: Vec<String> = others.flat_map(|member| member.peer_urls.clone()).collect();
            if urls.is_empty() {
                return Err(NodeError::Invalid(
                    "initial-cluster-state existing needs another member in initial-cluster to ask"
                        .to_owned(),
                ));
            }
            be_let_in(dialer, env, &urls, JoinRequest { claim: true, ..request }).await
        }
        Bootstrap::Join { addresses, kind } => {
            be_let_in(dialer, env, addresses, JoinRequest { kind: *kind, ..request }).await
        }
    }
}

fn own_entry<'a>(
    members: &'a [InitialMember],
    options: &NodeOptions,
) -> Result<&'a InitialMember, NodeError> {
    members.iter().find(|member| member.name == options.name).ok_or_else(|| {
        NodeError::Invalid(format!("initial-cluster does not name this node, {:?}", options.name))
    })
}

/// Asks each address in turn until one lets this node in. The same disk gets
/// the same answer however often it asks.
async fn be_let_in(
    dialer: &dyn Dialer,
    env: &EnvRef,
    addresses: &[String],
    request: JoinRequest,
) -> Result<Place, NodeError> {
    let deadline = Instant::now() + JOIN_TIMEOUT_ALL;
    let mut pause = Pause::default();
    let mut last = String::new();
    loop {
        for address in addresses {
            match dialer.join(address, request.clone(), JOIN_TIMEOUT).await {
                Ok(Ok(reply)) => {
                    tracing::info!(
                        cluster = %format!("{:x}", reply.cluster_id),
                        member = %format!("{:x}", reply.member.id),
                        "let into the cluster"
                    );
                    return Ok(Place {
                        cluster_id: reply.cluster_id,
                        node_id: reply.member.id,
                        joined_index: reply.membership_index,
                    });
                }
                Ok(Err(refused)) if !refused.may_retry => {
                    return Err(NodeError::NotAdmitted(format!("{address}: {}", refused.reason)));
                }
                Ok(Err(refused)) => last = format!("{address}: {}", refused.reason),
                Err(error) => last = error.to_string(),
            }
            tracing::info!(reason = %last, "not let in yet");
        }
        if !pause.wait(env, deadline).await {
            return Err(NodeError::NotAdmitted(format!(
                "nobody let this node in within {} s; the last answer: {last}",
                JOIN_TIMEOUT_ALL.as_secs()
            )));
        }
    }
}

/// What only an initial member itself knows: its disk, and where clients reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Start {
    disk: DiskId,
    client_urls: Vec<String>,
}

/// What one initial member should do next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Somebody is missing, or another node makes the cluster.
    Wait(String),
    /// All are there and empty, and this node has the least id: make the
    /// cluster, with each member's disk.
    Initialise(BTreeMap<NodeId, Start>),
    /// The cluster is there and knows this node; its leader will send the log.
    Join,
    /// The answers contradict what this node was told.
    Refuse(String),
}

/// Makes the cluster together with the other initial members, unless this
/// node's log already holds something. Ends when the node takes part.
pub(super) async fn form(
    core: Arc<Core>,
    members: Vec<InitialMember>,
    token: String,
    stop: CancellationToken,
) {
    let mut said: Option<Instant> = None;
    loop {
        match core.raft.is_initialized().await {
            Ok(true) => return,
            Ok(false) => {}
            Err(fatal) => {
                core.fail(fatal);
                return;
            }
        }
        let replies = ask_all(&core, &members, &token).await;
        match next_step(&core, &members, &token, &replies) {
            Step::Join => {
                tracing::info!("the cluster knows this node; waiting for its log");
                return;
            }
            Step::Refuse(why) => return core.exit.announce(ExitReason::Refused(why)),
            Step::Initialise(starts) => match initialise(&core, &members, &token, starts).await {
                Ok(()) => return,
                Err(error) => tracing::warn!(%error, "could not make the cluster yet"),
            },
            Step::Wait(why) => {
                if said.is_none_or(|at| at.elapsed() >= FORM_SAY_INTERVAL) {
                    tracing::info!(%why, "waiting for the initial members");
                    said = Some(Instant::now());
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FORM_INTERVAL) => {}
        }
    }
}

async fn ask_all(
    core: &Core,
    members: &[InitialMember],
    token: &str,
) -> BTreeMap<NodeId, Result<ProbeReply, String>> {
    let probe =
        ProbeRequest { node_id: core.id, disk_id: core.disk, peer_urls: core.options.peer_urls.clone() };
    let others = members.iter().map(|member| (initial_node_id(token, member), member));
    let asked = others.filter(|(id, _)| *id != core.id).map(|(id, member)| {
        let probe = probe.clone();
        async move {
            let mut last = Err(format!("{} has no URL", member.name));
            for url in &member.peer_urls {
                last = core
                    .dialer
                    .probe(url, probe.clone(), ASK_TIMEOUT)
                    .await
                    .map_err(|error| error.to_string());
                if last.is_ok() {
                    break;
                }
            }
            (id, last)
        }
    });
    futures_util::future::join_all(asked).await.into_iter().collect()
}

fn next_step(
    core: &Core,
    members: &[InitialMember],
    token: &str,
    replies: &BTreeMap<NodeId, Result<ProbeReply, String>>,
) -> Step {
    let start = Start { disk: core.disk, client_urls: core.options.client_urls.clone() };
    let own = Identity { cluster: core.cluster_id, node: core.id, start, name: &core.options.name };
    let ids: BTreeSet<NodeId> = members.iter().map(|member| initial_node_id(token, member)).collect();
    decide(&own, &ids, replies)
}

struct Identity<'a> {
    cluster: ClusterId,
    node: NodeId,
    start: Start,
    name: &'a str,
}

fn decide(
    own: &Identity<'_>,
    members: &BTreeSet<NodeId>,
    replies: &BTreeMap<NodeId, Result<ProbeReply, String>>,
) -> Step {
    for reply in replies.values().flatten() {
        if reply.cluster_id != own.cluster {
            return Step::Refuse(format!(
                "the member {:?} is of cluster {:x}, this node's settings make cluster {:x}: \
                 initial-cluster or initial-cluster-token differ between the two",
                reply.name, reply.cluster_id, own.cluster
            ));
        }
    }
    for (id, reply) in replies {
        let Ok(reply) = reply else { continue };
        if reply.node_id != *id {
            return Step::Refuse(format!(
                "the URL of member {id:x} leads to member {:x} ({}): initial-cluster has URLs mixed up",
                reply.node_id, reply.name
            ));
        }
        if !reply.initialised || reply.membership_version == 0 {
            continue;
        }
        if !reply.asker_known {
            return Step::Refuse(format!(
                "the cluster is running and {:x} ({}) is not one of its members: \
                 it was removed, or never added; use --join to come in as a new member",
                own.node, own.name
            ));
        }
        let other_disk = reply.asker_disk != 0 && reply.asker_disk != own.start.disk;
        if other_disk && !mutant::is(Mutant::UnsafeMembershipChange) {
            let record = Member { id: own.node, name: own.name.to_owned(), ..Member::default() };
            return Step::Refuse(wiped(&record).to_string());
        }
        return Step::Join;
    }
    let mut starts = BTreeMap::from([(own.node, own.start.clone())]);
    for (id, reply) in replies {
        match reply {
            Err(reason) => return Step::Wait(reason.clone()),
            Ok(reply) if reply.initialised => return Step::Wait(format!("{} makes the cluster", reply.name)),
            Ok(reply) => {
                let start = Start { disk: reply.disk_id, client_urls: reply.client_urls.clone() };
                starts.insert(*id, start)
            }
        };
    }
    if members.first() != Some(&own.node) {
        return Step::Wait("the member with the least id makes the cluster".to_owned());
    }
    Step::Initialise(starts)
}

async fn initialise(
    core: &Core,
    members: &[InitialMember],
    token: &str,
    mut starts: BTreeMap<NodeId, Start>,
) -> Result<(), NodeError> {
    let records: BTreeMap<NodeId, Member> = members
        .iter()
        .map(|member| {
            let id = initial_node_id(token, member);
            let Start { disk, client_urls } = starts.remove(&id).unwrap_or_default();
            let record = Member {
                id,
                name: member.name.clone(),
                peer_urls: member.peer_urls.clone(),
                client_urls,
                kind: MemberKind::Voter,
                disk,
            };
            (id, record)
        })
        .collect();
    tracing::info!(members = records.len(), cluster = %format!("{:x}", core.cluster_id), "making the cluster");
    match core.raft.initialize(records).await {
        Ok(()) => Ok(()),
        // Somebody was faster, or an earlier try went through.
        Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(RaftError::APIError(error)) => Err(NodeError::Internal(error.to_string())),
        Err(RaftError::Fatal(fatal)) => Err(core.fail(fatal)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Identity<'static> {
        Identity { cluster: 7, node: 1, start: start(1), name: "a" }
    }

    fn start(node: NodeId) -> Start {
        Start { disk: node * 100, client_urls: vec![format!("http://clients-{node}")] }
    }

    fn reply(node: NodeId) -> ProbeReply {
        ProbeReply {
            cluster_id: 7,
            node_id: node,
            disk_id: node * 100,
            name: "x".into(),
            client_urls: start(node).client_urls,
            ..Default::default()
        }
    }

    fn running(node: NodeId, known: bool, disk: DiskId) -> ProbeReply {
        ProbeReply {
            initialised: true,
            membership_version: 3,
            asker_known: known,
            asker_disk: disk,
            ..reply(node)
        }
    }

    fn step(replies: [Result<ProbeReply, String>; 2]) -> Step {
        let [b, c] = replies;
        decide(&own(), &BTreeSet::from([1, 2, 3]), &BTreeMap::from([(2, b), (3, c)]))
    }

    #[test]
    fn the_least_id_makes_the_cluster_once_all_are_there_and_empty() {
        let starts = [1, 2, 3].map(|node| (node, start(node)));
        assert_eq!(step([Ok(reply(2)), Ok(reply(3))]), Step::Initialise(starts.into()));
        assert!(matches!(step([Ok(reply(2)), Err("down".into())]), Step::Wait(_)));
        let other = Identity { node: 2, ..own() };
        let replies = BTreeMap::from([(1, Ok(reply(1))), (3, Ok(reply(3)))]);
        assert!(matches!(decide(&other, &BTreeSet::from([1, 2, 3]), &replies), Step::Wait(_)));
        assert!(matches!(decide(&own(), &BTreeSet::from([1]), &BTreeMap::new()), Step::Initialise(_)));
    }

    #[test]
    fn a_running_cluster_takes_its_member_back_but_not_another_disk() {
        assert_eq!(step([Ok(running(2, true, 100)), Err("down".into())]), Step::Join);
        let Step::Refuse(why) = step([Ok(running(2, true, 999)), Err("down".into())]) else {
            panic!("a wiped disk must be refused");
        };
        assert!(why.contains("wiped disk") && why.contains("add it again"), "{why}");
        assert!(matches!(step([Ok(running(2, false, 0)), Ok(reply(3))]), Step::Refuse(_)));
    }

    #[test]
    fn other_settings_are_refused_with_the_reason() {
        let other = ProbeReply { cluster_id: 8, ..reply(2) };
        assert!(
            matches!(step([Ok(other), Ok(reply(3))]), Step::Refuse(why) if why.contains("initial-cluster-token"))
        );
        assert!(matches!(step([Ok(reply(9)), Ok(reply(3))]), Step::Refuse(why) if why.contains("mixed up")));
    }
}
