//! Changes of the membership, one after another, while everything else goes
//! wrong: members join, leave, are replaced, and leadership is moved.

use std::time::Duration;

use mainstay::node::{Bootstrap, MemberView, NodeError};
use mainstay::types::{MemberKind, NodeId};
use tokio::time::Instant;

use crate::clients::Client;
use crate::director::Trouble;
use crate::disk::Survives;
use crate::host::{Standing, faces};
use crate::transport::url;
use crate::world::{Order, PLACES};

/// How long one change is waited for before something else is tried.
const CHANGE_MAX: Duration = Duration::from_secs(15);

/// Changes members until things are healed.
pub async fn changing(mut client: Client, trouble: Trouble) {
    let pause_ms = *client.chance.pick(&[2_000, 6_000, 20_000]);
    loop {
        let next = Instant::now() + Duration::from_millis(client.chance.between(500, pause_ms));
        while Instant::now() < next {
            if trouble.is_healing() || client.world.trace.failed().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let change = match client.chance.below(5) {
            0 | 1 => Change::Grow,
            2 => Change::Shrink,
            3 => Change::Replace,
            _ => Change::MoveLeader,
        };
        make(&mut client, &trouble, change).await;
    }
}

/// What can be done to the membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Grow,
    Shrink,
    Replace,
    MoveLeader,
}

/// Tries one change; one that would leave too few or too many members, or that
/// nobody answers for, is let be.
pub async fn make(client: &mut Client, trouble: &Trouble, change: Change) {
    let Some(members) = list(client).await else { return };
    if trouble.is_healing() {
        return;
    }
    let voters = members.iter().filter(|view| view.is_voter).count();
    match change {
        Change::Grow if members.len() < 5 => grow(client, trouble).await,
        Change::Grow | Change::Shrink if voters > 3 => shrink(client, trouble, &members).await,
        Change::Replace => replace(client, trouble, &members).await,
        _ => move_leader(client, &members).await,
    }
}

async fn list(client: &mut Client) -> Option<Vec<MemberView>> {
    let place = client.choose();
    let work = client.world.at(place, &mut client.chance, |node| async move { node.members(true).await });
    let answer = tokio::time::timeout(CHANGE_MAX, work).await;
    answer.ok()?.ok()?.ok()
}

fn place_of(view: &MemberView) -> Option<usize> {
    (0..PLACES).find(|place| view.member.peer_urls.contains(&url(*place)))
}

async fn grow(client: &mut Client, trouble: &Trouble) {
    let free = {
        let faces = faces(&client.world.faces);
        let held = trouble.held();
        (0..PLACES).find(|place| {
            !faces[*place].in_use && faces[*place].standing == Standing::Down && !held.contains(place)
        })
    };
    if let Some(place) = free {
        join(client, trouble, place).await;
    }
}

/// Starts a node with an empty disk that asks to be let in, and waits for it.
async fn join(client: &mut Client, trouble: &Trouble, place: usize) {
    let through = client.choose();
    let kind =
        *client.chance.pick(&[MemberKind::Voter, MemberKind::Voter, MemberKind::Voter, MemberKind::Observer]);
    // The one it asks first may be removed before it answers; then it asks the others.
    let others = (0..PLACES).filter(|other| *other != place && *other != through);
    let addresses = std::iter::once(through).chain(others).map(url).collect();
    {
        let mut faces = faces(&client.world.faces);
        faces[place].bootstrap = Bootstrap::Join { addresses, kind };
        faces[place].in_use = true;
    }
    client.world.trace.line(format_args!("n{} joins through n{} as {kind}", place + 1, through + 1));
    client.world.order(Order::Start(place));
    let until = Instant::now() + CHANGE_MAX;
    while Instant::now() < until && !trouble.is_healing() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let votes = client.world.node(place).and_then(|node| node.own_kind());
        if votes.is_some_and(|(kind, votes)| votes || kind == MemberKind::Observer) {
            return client.world.trace.count("members joined");
        }
    }
}

/// True when the member is certainly gone.
async fn remove(client: &mut Client, id: NodeId) -> bool {
    let place = client.choose();
    let work =
        client.world.at(place, &mut client.chance, move |node| async move { node.member_remove(id).await });
    let answer = tokio::time::timeout(CHANGE_MAX, work).await;
    client.world.trace.line(format_args!(
        "removing {id:x}: {:?}",
        answer.as_ref().map(|answer| answer.as_ref().map(|result| result.as_ref().map(Vec::len)))
    ));
    let gone = matches!(answer, Ok(Ok(Ok(_) | Err(NodeError::MemberNotFound))));
    if gone {
        client.world.trace.count("members removed");
    }
    gone
}

async fn shrink(client: &mut Client, trouble: &Trouble, members: &[MemberView]) {
    let view = client.chance.pick(members).clone();
    let Some(place) = place_of(&view) else { return };
    if !remove(client, view.member.id).await {
        return;
    }
    // It has to find out by itself; whoever is down finds out when it starts.
    let until = Instant::now() + CHANGE_MAX;
    while Instant::now() < until && !trouble.is_healing() {
        if faces(&client.world.faces)[place].removed {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A machine is lost for good: its member is removed, and another takes its place.
async fn replace(client: &mut Client, trouble: &Trouble, members: &[MemberView]) {
    let view = client.chance.pick(members).clone();
    let Some(place) = place_of(&view) else { return };
    trouble.held().insert(place);
    client.world.order(Order::Crash(place, Survives::Nothing));
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.move_on();
    if remove(client, view.member.id).await && !client.world.up().contains(&place) {
        client.world.order(Order::Wipe(place));
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.world.trace.count("members replaced");
        join(client, trouble, place).await;
    }
    trouble.held().remove(&place);
}

async fn move_leader(client: &mut Client, members: &[MemberView]) {
    let Some(leader) = client.world.leader() else { return };
    let target = client.chance.pick(members).member.id;
    let work = client
        .world
        .at(leader, &mut client.chance, move |node| async move { node.move_leader(target).await });
    let answer = tokio::time::timeout(CHANGE_MAX, work).await;
    client.world.trace.line(format_args!("moving leadership to {target:x}: {answer:?}"));
    if let Ok(Ok(Ok(()))) = answer {
        client.world.trace.count("leadership moved");
    }
}
