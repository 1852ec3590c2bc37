//! Courses that are not drawn but written down: what a seed once found, and
//! what must be met in every run of the tests whatever the seeds draw.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mainstay::types::{KeyRange, LeaseId, Operation, RangeQuery, Reply, Space};
use tokio::time::Instant;

use crate::clients::{Client, Told};
use crate::director::{self, Trouble};
use crate::disk::{Speed, Survives};
use crate::host::{Standing, faces};
use crate::members::{self, Change};
use crate::watchers;
use crate::world::{FAST, Order, PLACES, World};

/// All of them, by name.
pub const ALL: &[&str] = &[
    "removed-while-down",
    "behind-a-snapshot",
    "power-fails-everywhere",
    "votes-outlive-power",
    "wiped-member-comes-back",
    "disk-fails",
    "members-come-and-go",
    "wall-clocks-jump",
    "leader-stands-still",
];

/// Members of every scenario's cluster.
pub const MEMBERS: usize = 3;

/// Plays one.
pub async fn play(name: String, world: World) {
    if !director::form(&world, MEMBERS).await {
        return;
    }
    match name.as_str() {
        "removed-while-down" => removed_while_down(&world).await,
        "behind-a-snapshot" => behind_a_snapshot(&world).await,
        "power-fails-everywhere" => power_fails_everywhere(&world).await,
        "votes-outlive-power" => votes_outlive_power(&world).await,
        "wiped-member-comes-back" => wiped_member_comes_back(&world).await,
        "disk-fails" => disk_fails(&world).await,
        "members-come-and-go" => members_come_and_go(&world).await,
        "wall-clocks-jump" => wall_clocks_jump(&world).await,
        "leader-stands-still" => leader_stands_still(&world).await,
        other => world.trace.violation(format_args!("no scenario is called {other:?}")),
    }
}

fn follower(world: &World) -> usize {
    let leader = world.leader();
    (0..MEMBERS).find(|place| Some(*place) != leader).unwrap_or(0)
}

async fn until(world: &World, limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= until || world.trace.failed().is_some() {
            world.trace.violation(format_args!("in vain: {what}"));
            return false;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    true
}

/// A member that is removed while it is down, before its state was ever
/// flushed, knows of no committed membership when it comes back. It must find
/// out all the same.
async fn removed_while_down(world: &World) {
    let place = follower(world);
    let Some(id) = world.node(place).map(|node| node.id()) else { return };
    world.order(Order::Crash(place, Survives::Everything));
    let down = || faces(&world.faces)[place].standing == Standing::Down;
    if !until(world, Duration::from_secs(1), "the member is down", down).await {
        return;
    }
    let mut client = Client::new(world, "operator".to_owned());
    let began = Instant::now();
    loop {
        let asked = client.choose();
        let work =
            world.at(asked, &mut client.chance, move |node| async move { node.member_remove(id).await });
        if let Ok(Ok(_)) = work.await {
            break;
        }
        if began.elapsed() > Duration::from_secs(20) {
            return world.trace.violation("the member cannot be removed");
        }
        client.pause(100).await;
    }
    world.order(Order::Start(place));
    let noticed = || faces(&world.faces)[place].removed;
    until(world, Duration::from_secs(15), "the removed member learns of it", noticed).await;
}

/// A member is cut off until the others have forgotten what it lacks, and comes
/// back by a snapshot; whoever watches there sees everything.
async fn behind_a_snapshot(world: &World) {
    for face in faces(&world.faces).iter_mut() {
        face.speed = FAST;
    }
    let place = follower(world);
    let watching = tokio::spawn(watchers::staying(Client::new(world, "watcher".to_owned()), place));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let others = || (0..PLACES).filter(move |other| *other != place);
    world.network.cut(others().flat_map(|other| [(place, other), (other, place)]).collect());
    let mut client = Client::new(world, "writer".to_owned());
    let mut written = 0;
    while written < 600 && world.trace.failed().is_none() {
        let asked = others().filter(|other| *other < MEMBERS).nth(written % 2).unwrap_or(0);
        if let Told::Reply(_) = client.propose_at(asked, director::probe(&written.to_string()), None).await {
            written += 1;
        }
    }
    let installed = || world.trace.coverage().get("snapshots installed").copied().unwrap_or(0);
    let before = installed();
    world.network.cut(Vec::new());
    let came = || installed() > before;
    if until(world, Duration::from_secs(20), "a snapshot is installed", came).await {
        director::converge(world.clone(), Trouble::default()).await;
    }
    world.end();
    if tokio::time::timeout(Duration::from_secs(30), watching).await.is_err() {
        world.trace.violation("the watcher does not see everything");
    }
}

/// Writes until `count` were acknowledged through one of `places`. False in vain.
async fn write(world: &World, places: &[usize], count: usize) -> bool {
    let mut client = Client::new(world, format!("writer at {}", world.trace.now_ms()));
    let began = Instant::now();
    let mut written = 0;
    while written < count {
        let place = places[written % places.len()];
        if let Told::Reply(_) = client.propose_at(place, director::probe(&written.to_string()), None).await {
            written += 1;
        }
        if began.elapsed() > Duration::from_secs(30) || world.trace.failed().is_some() {
            world.trace.violation(format_args!("in vain: {count} writes through {places:?}"));
            return false;
        }
    }
    true
}

/// The power fails in all places at once, under writes, on disks that take their
/// time: what was acknowledged was synced by a majority.
async fn power_fails_everywhere(world: &World) {
    for face in faces(&world.faces).iter_mut() {
        face.speed = Speed { sync_ms_min: 10, sync_ms_max: 40 };
    }
    for round in 0..6 {
        let writing: Vec<_> = (0..4)
            .map(|number| {
                let mut client = Client::new(world, format!("writer {round} {number}"));
                tokio::spawn(async move {
                    for value in 0..1000 {
                        client.propose_at(number % MEMBERS, director::probe(&value.to_string()), None).await;
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(1200 + 7 * round)).await;
        for place in 0..MEMBERS {
            world.order(Order::Crash(place, Survives::Nothing));
        }
        writing.iter().for_each(tokio::task::JoinHandle::abort);
        tokio::time::sleep(Duration::from_millis(100)).await;
        for place in 0..MEMBERS {
            world.order(Order::Start(place));
        }
        if !write(world, &[0, 1, 2], 3).await {
            return;
        }
    }
    director::converge(world.clone(), Trouble::default()).await;
    world.oracle().at_the_end();
}

/// A member's disk is replaced by an empty one, and the node started as before.
/// It must not speak for the member: together with one that lacks the newest
/// entries it would be a majority that never saw them.
async fn wiped_member_comes_back(world: &World) {
    let Some(leader) = world.leader() else { return world.trace.violation("nobody leads") };
    let others: Vec<usize> = (0..MEMBERS).filter(|place| *place != leader).collect();
    let (wiped, behind) = (others[0], others[1]);
    let alone = |place: usize| (0..PLACES).flat_map(move |other| [(place, other), (other, place)]).collect();
    world.network.cut(alone(behind));
    if !write(world, &[leader], 20).await {
        return;
    }
    world.order(Order::Crash(wiped, Survives::Everything));
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.order(Order::Wipe(wiped));
    faces(&world.faces)[wiped].may_be_refused = true;
    world.network.cut(alone(leader));
    world.order(Order::Start(wiped));
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut client = Client::new(world, "late writer".to_owned());
    client.propose_at(behind, director::probe("without a majority"), None).await;
    world.network.cut(Vec::new());
    if write(world, &[leader, behind], 20).await {
        director::converge(world.clone(), Trouble::default()).await;
        world.oracle().at_the_end();
    }
}

/// The leader goes, and everybody else just after one of them has given its
/// vote, on slow disks: whoever has voted still knows.
async fn votes_outlive_power(world: &World) {
    for face in faces(&world.faces).iter_mut() {
        face.speed = Speed { sync_ms_min: 40, sync_ms_max: 120 };
    }
    for _ in 0..12 {
        let leads = || world.leader().is_some();
        if !until(world, Duration::from_secs(20), "somebody leads", leads).await {
            return;
        }
        let Some(leader) = world.leader() else { continue };
        let before = world.network.votes();
        world.order(Order::Crash(leader, Survives::Nothing));
        let voted = || world.network.votes() != before;
        if !until(world, Duration::from_secs(20), "somebody votes", voted).await {
            return;
        }
        for place in (0..MEMBERS).filter(|place| *place != leader) {
            world.order(Order::Crash(place, Survives::Nothing));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        for place in 0..MEMBERS {
            world.order(Order::Start(place));
        }
    }
    write(world, &[0, 1, 2], 3).await;
}

/// The leader's disk fails under writes: it ends itself and acknowledges nothing
/// more, and what it acknowledged before is there when it comes back.
async fn disk_fails(world: &World) {
    for _ in 0..3 {
        let leads = || world.leader().is_some();
        if !until(world, Duration::from_secs(20), "somebody leads", leads).await {
            return;
        }
        let Some(leader) = world.leader() else { continue };
        if !write(world, &[leader], 20).await {
            return;
        }
        world.order(Order::FailDisk(leader));
        let ended = || faces(&world.faces)[leader].standing == Standing::Down;
        if !until(world, Duration::from_secs(2), "the node ends with its disk", ended).await {
            return;
        }
        world.order(Order::Start(leader));
        if !write(world, &[0, 1, 2], 5).await {
            return;
        }
    }
    director::converge(world.clone(), Trouble::default()).await;
    world.oracle().at_the_end();
}

/// Members join, are replaced and leave, one after another, and nothing else
/// goes wrong.
async fn members_come_and_go(world: &World) {
    let (trouble, mut client) = (Trouble::default(), Client::new(world, "operator".to_owned()));
    let reached = |what: &str| world.trace.coverage().get(what).copied().unwrap_or(0);
    for change in [Change::Grow, Change::Grow, Change::Replace, Change::Shrink, Change::MoveLeader] {
        let changes = || ["members joined", "members removed", "leadership moved"].map(reached);
        let before = changes();
        for attempt in 0.. {
            members::make(&mut client, &trouble, change).await;
            if changes() != before {
                break;
            }
            if attempt == 20 || world.trace.failed().is_some() {
                return world.trace.violation("a change of the members does not come about");
            }
        }
        let settled = || {
            let faces = faces(&world.faces);
            faces.iter().all(|face| !face.in_use || face.standing == Standing::Up || face.removed)
        };
        until(world, Duration::from_secs(20), "the members have settled", settled).await;
        if !write(world, &world.up(), 10).await {
            return;
        }
    }
    director::converge(world.clone(), Trouble::default()).await;
    world.oracle().at_the_end();
}

/// Every wall clock jumps forward and back: no lease ends before its time, and
/// every one ends soon after it.
async fn wall_clocks_jump(world: &World) {
    let mut client = Client::new(world, "holder".to_owned());
    for jump in [300_000, -300_000, -300_000, 300_000] {
        let id = LeaseId((client.chance.next() >> 1) as i64 | 1);
        let asked_ms = world.trace.now_ms();
        let told = client.propose(Operation::LeaseGrant { id, ttl_s: 5 }, None).await;
        let Told::Reply(Reply { outcome: Ok(_), .. }) = told else {
            return world.trace.violation("no lease is granted");
        };
        world.oracle().promised(id, asked_ms, 5);
        tokio::time::sleep(Duration::from_millis(700)).await;
        world.trace.count("wall clocks jumped");
        for face in faces(&world.faces).iter() {
            face.wall_offset_ms.fetch_add(jump, Ordering::Relaxed);
        }
        let ended = || !world.oracle().model().has_lease(id);
        if !until(world, Duration::from_secs(9), "a lease that nobody keeps ends", ended).await {
            return;
        }
    }
}

/// The leader is stopped while the others elect another and go on. Reads that
/// reach it meanwhile are answered when it goes on, and must not be old.
async fn leader_stands_still(world: &World) {
    for round in 0..5 {
        let leads = || world.leader().is_some();
        if !until(world, Duration::from_secs(20), "somebody leads", leads).await {
            return;
        }
        let Some(leader) = world.leader() else { continue };
        if !write(world, &[leader], 3).await {
            return;
        }
        world.trace.count("pauses");
        faces(&world.faces)[leader].paused_until_ms = world.trace.now_ms() + 5000;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let others: Vec<usize> = (0..MEMBERS).filter(|place| *place != leader).collect();
        if !write(world, &others, 5).await {
            return;
        }
        let reading: Vec<_> = (0..5)
            .map(|number| {
                let mut client = Client::new(world, format!("reader {round} {number}"));
                let query = RangeQuery::all(Space::User, KeyRange::Single(Bytes::from_static(b"probe")));
                tokio::spawn(async move { client.read_at(leader, query, true).await })
            })
            .collect();
        if futures_util::future::join_all(reading).await.iter().any(Result::is_err) {
            return world.trace.violation("a reader ended badly");
        }
    }
}
