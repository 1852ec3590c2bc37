//! Who breaks things, and who says at the end whether the store came through:
//! the course of one run.
//!
//! A run forms a cluster, sets clients on it, lets everything go wrong that its
//! seed draws, heals, and then holds the store to what it has promised: writes
//! flow again, every watcher has seen everything, every lease that nobody keeps
//! has ended, and every member holds what the model holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay::mvcc;
use mainstay::node::control::ProbeRequest;
use mainstay::types::{KeyRange, LeaseId, Operation, Put, RangeQuery, Revision, Space};
use tokio::time::Instant;

use crate::chance::Chance;
use crate::clients::{self, Client, Told};
use crate::disk::{Speed, Survives};
use crate::host::{Standing, faces};
use crate::members;
use crate::network::Weather;
use crate::watchers;
use crate::world::{Order, PLACES, World, draw_weather};

/// How long writes may take to flow after everything was healed.
const FLOW_MAX: Duration = Duration::from_secs(10);
/// How long members may take to hold the same.
const CONVERGE_MAX: Duration = Duration::from_secs(30);

/// What those who break things share.
#[derive(Clone, Default)]
pub struct Trouble {
    healing: Arc<AtomicBool>,
    held: Arc<Mutex<BTreeSet<usize>>>,
}

impl Trouble {
    /// Whether nothing may be broken any more.
    pub fn is_healing(&self) -> bool {
        self.healing.load(Ordering::Relaxed)
    }

    /// Places that nobody but their holder starts.
    pub fn held(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the course.
pub async fn direct(world: World, members: usize) {
    if !form(&world, members).await {
        return;
    }
    let mut chance = Chance::new(world.seed, "director");
    let mut running = Vec::new();
    let think_ms = *chance.pick(&[10, 30, 100]);
    let client = |kind: &str, number: u64| Client::new(&world, format!("{kind}{number}"));
    for number in 0..chance.between(3, 6) {
        running.push(tokio::spawn(clients::mixed(client("mixed", number), think_ms)));
    }
    for number in 0..chance.between(1, 2) {
        running.push(tokio::spawn(clients::repeating(client("repeating", number), think_ms)));
        running.push(tokio::spawn(clients::leasing(client("leasing", number), think_ms)));
    }
    running.push(tokio::spawn(clients::swapping(client("swapping", 0), think_ms * 2)));
    if chance.permille(750) {
        running.push(tokio::spawn(clients::compacting(client("compacting", 0))));
    }
    for number in 0..chance.between(3, 5) {
        running.push(tokio::spawn(watchers::watching(client("watching", number))));
    }
    let trouble = Trouble::default();
    let changing = tokio::spawn(members::changing(client("members", 0), trouble.clone()));
    let mut director = Director::new(world.clone(), chance, trouble.clone());
    let lasts_ms = director.chance.between(10_000, 30_000);
    director.make_trouble(Duration::from_millis(lasts_ms)).await;
    trouble.healing.store(true, Ordering::Relaxed);
    director.heal().await;
    let changed = tokio::time::timeout(Duration::from_secs(60), changing).await;
    if !matches!(changed, Ok(Ok(()))) {
        return world.trace.violation(format_args!("a change of the members does not end: {changed:?}"));
    }
    trouble.held().clear();
    director.everyone_up().await;
    director.writes_flow().await;
    world.end();
    let all = futures_util::future::join_all(running);
    match tokio::time::timeout(Duration::from_secs(40), all).await {
        Err(_) => return world.trace.violation("a client or a watcher does not come to its end"),
        Ok(ended) => {
            for ended in ended {
                if let Err(error) = ended {
                    return world.trace.violation(format_args!("a client ended badly: {error}"));
                }
            }
        }
    }
    director.leases_end().await;
    director.converge().await;
    world.oracle().at_the_end();
}

/// Starts the first members and waits for a first write. False in vain.
pub async fn form(world: &World, members: usize) -> bool {
    for place in 0..members {
        world.order(Order::Start(place));
    }
    let mut client = Client::new(world, "first".to_owned());
    let until = Instant::now() + Duration::from_secs(30);
    while Instant::now() < until {
        if let Told::Reply(_) = client.propose(probe("first"), None).await {
            return true;
        }
        client.pause(100).await;
    }
    world.trace.violation("the cluster does not form");
    false
}

/// Waits until every member has applied the same, and compares what they hold.
pub async fn converge(world: World, trouble: Trouble) {
    let chance = Chance::new(world.seed, "comparison");
    Director::new(world, chance, trouble).converge().await;
}

/// A write of no other use than that it goes through.
pub fn probe(value: &str) -> Operation {
    Operation::Put(Put {
        space: Space::User,
        key: Bytes::from_static(b"probe"),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

/// The kinds of trouble that are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    CrashOne,
    CrashMajority,
    CrashAll,
    Restart,
    Pause,
    Partition,
    Weather,
    Streams,
    WallClock,
    SlowDisk,
    FailDisk,
}

struct Director {
    world: World,
    chance: Chance,
    trouble: Trouble,
    /// When places that are down are started again.
    restarts: BTreeMap<usize, Instant>,
    cut_until: Option<Instant>,
    slow_until: BTreeMap<usize, Instant>,
}

impl Director {
    fn new(world: World, chance: Chance, trouble: Trouble) -> Director {
        let restarts = BTreeMap::new();
        Director { world, chance, trouble, restarts, cut_until: None, slow_until: BTreeMap::new() }
    }

    async fn make_trouble(&mut self, lasts: Duration) {
        let until = Instant::now() + lasts;
        // Each seed likes some kinds more than others, and leaves some out.
        let all = [
            (Kind::CrashOne, 8),
            (Kind::CrashMajority, 2),
            (Kind::CrashAll, 2),
            (Kind::Restart, 3),
            (Kind::Pause, 5),
            (Kind::Partition, 7),
            (Kind::Weather, 6),
            (Kind::Streams, 3),
            (Kind::WallClock, 3),
            (Kind::SlowDisk, 4),
            (Kind::FailDisk, 1),
        ];
        let mut kinds = Vec::new();
        for (kind, weight) in all {
            if self.chance.permille(700) {
                kinds.extend(std::iter::repeat_n(kind, weight));
            }
        }
        let pause_ms = *self.chance.pick(&[700, 2000, 4000]);
        let weather = draw_weather(&mut self.chance);
        self.world.network.set_weather(weather);
        let mut next = Instant::now() + Duration::from_millis(500);
        while Instant::now() < until && self.world.trace.failed().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.mend();
            if Instant::now() >= next && !kinds.is_empty() {
                next =
                    Instant::now() + Duration::from_millis(self.chance.between(pause_ms / 5, pause_ms * 2));
                let kind = *self.chance.pick(&kinds);
                self.make(kind);
            }
        }
    }

    fn make(&mut self, kind: Kind) {
        let up = self.world.up();
        if up.is_empty() {
            return;
        }
        let victim = match self.world.leader() {
            Some(leader) if self.chance.permille(400) => leader,
            _ => *self.chance.pick(&up),
        };
        let survives =
            *self.chance.pick(&[Survives::Everything, Survives::Some, Survives::Nothing, Survives::Nothing]);
        match kind {
            Kind::CrashOne => self.crash(&[victim], survives),
            Kind::CrashMajority => {
                let mut some = up.clone();
                self.chance.shuffle(&mut some);
                some.truncate(up.len() / 2 + 1);
                self.world.trace.count("majorities crashed");
                self.crash(&some, survives);
            }
            Kind::CrashAll => {
                self.world.trace.count("all crashed");
                self.crash(&up, survives);
            }
            Kind::Restart => {
                self.world.trace.count("orderly restarts");
                self.world.order(Order::Stop(victim));
            }
            Kind::Pause => self.pause(victim),
            Kind::Partition => self.partition(victim),
            Kind::Weather => {
                let weather = draw_weather(&mut self.chance);
                self.world.trace.line(format_args!("{weather:?}"));
                self.world.network.set_weather(weather);
            }
            Kind::Streams => {
                self.world.trace.count("connections cut");
                let share = self.chance.between(100, 1000);
                self.world.network.break_streams(share);
            }
            Kind::WallClock => {
                self.world.trace.count("wall clocks jumped");
                let jump = self.chance.between(0, 600_000) as i64 - 300_000;
                self.world.trace.line(format_args!("the wall clock of n{} jumps by {jump} ms", victim + 1));
                faces(&self.world.faces)[victim].wall_offset_ms.fetch_add(jump, Ordering::Relaxed);
            }
            Kind::SlowDisk => {
                self.world.trace.count("disks slowed");
                let sync_ms_max = *self.chance.pick(&[40, 200, 900]);
                faces(&self.world.faces)[victim].speed = Speed { sync_ms_min: sync_ms_max / 4, sync_ms_max };
                let lasts_ms = self.chance.between(500, 6000);
                self.slow_until.insert(victim, Instant::now() + Duration::from_millis(lasts_ms));
            }
            Kind::FailDisk => self.world.order(Order::FailDisk(victim)),
        }
    }

    fn crash(&mut self, places: &[usize], survives: Survives) {
        for place in places {
            self.world.order(Order::Crash(*place, survives));
        }
    }

    fn pause(&mut self, place: usize) {
        self.world.trace.count("pauses");
        let lasts_ms = self.chance.between(100, 7000);
        self.world.trace.line(format_args!("n{} is stopped for {lasts_ms} ms", place + 1));
        faces(&self.world.faces)[place].paused_until_ms = self.world.trace.now_ms() + lasts_ms;
    }

    fn partition(&mut self, victim: usize) {
        self.world.trace.count("partitions");
        let mut places: Vec<usize> = (0..PLACES).collect();
        self.chance.shuffle(&mut places);
        let others = || (0..PLACES).filter(move |place| *place != victim);
        let both = |one: usize, other: usize| [(one, other), (other, one)];
        let links: Vec<(usize, usize)> = match self.chance.below(6) {
            0 => others().flat_map(|other| both(victim, other)).collect(),
            1 => others().map(|other| (victim, other)).collect(),
            2 => others().map(|other| (other, victim)).collect(),
            // A ring: everyone sees two.
            3 => {
                let far = |a: usize, b: usize| (a + PLACES - b) % PLACES > 1 && (b + PLACES - a) % PLACES > 1;
                let pairs = (0..PLACES).flat_map(|a| (0..PLACES).map(move |b| (a, b)));
                pairs.filter(|(a, b)| far(*a, *b)).map(|(a, b)| (places[a], places[b])).collect()
            }
            // Halves that only one machine sees both of.
            4 => {
                let (left, right) = places.split_at(PLACES / 2);
                let crossing = left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b)));
                crossing.filter(|(a, b)| *a != victim && *b != victim).flat_map(|(a, b)| both(a, b)).collect()
            }
            _ => {
                let (left, right) = places.split_at(PLACES / 2);
                left.iter().flat_map(|a| right.iter().flat_map(move |b| both(*a, *b))).collect()
            }
        };
        self.world.trace.line(format_args!("cut: {links:?}"));
        self.world.network.cut(links);
        let lasts_ms = self.chance.between(300, 7000);
        self.cut_until = Some(Instant::now() + Duration::from_millis(lasts_ms));
    }

    /// Ends what has lasted long enough, and starts who has been down long enough.
    fn mend(&mut self) {
        let now = Instant::now();
        if self.cut_until.is_some_and(|until| until <= now) {
            self.cut_until = None;
            self.world.trace.line("links are whole again");
            self.world.network.cut(Vec::new());
        }
        self.slow_until.retain(|place, until| {
            if *until <= now {
                let mut faces = faces(&self.world.faces);
                faces[*place].speed = faces[*place].usual_speed;
            }
            *until > now
        });
        for place in self.startable() {
            let wait_ms = *self.chance.pick(&[300, 1500, 5000]);
            let wait_ms = self.chance.between(20, wait_ms);
            let at = *self.restarts.entry(place).or_insert(now + Duration::from_millis(wait_ms));
            if at <= now {
                self.restarts.remove(&place);
                self.world.order(Order::Start(place));
            }
        }
    }

    /// Places that are down and should not stay so. One that was removed gets an
    /// empty disk instead.
    fn startable(&self) -> Vec<usize> {
        let held = self.trouble.held();
        let mut found = Vec::new();
        let mut removed = Vec::new();
        for (place, face) in faces(&self.world.faces).iter().enumerate() {
            if face.standing == Standing::Down && face.in_use && !held.contains(&place) {
                if face.removed { removed.push(place) } else { found.push(place) }
            }
        }
        for place in removed {
            self.world.order(Order::Wipe(place));
        }
        found
    }

    async fn heal(&mut self) {
        self.world.trace.line("everything is healed");
        self.world.network.cut(Vec::new());
        self.world.network.set_weather(Weather::FINE);
        for face in faces(&self.world.faces).iter_mut() {
            (face.paused_until_ms, face.speed) = (0, face.usual_speed);
        }
        self.cut_until = None;
        self.slow_until.clear();
        for place in self.startable() {
            self.world.order(Order::Start(place));
        }
    }

    /// Starts whoever is down until nobody is.
    async fn everyone_up(&mut self) {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let waiting = self.startable();
            for place in &waiting {
                self.world.order(Order::Start(*place));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            let settled =
                faces(&self.world.faces).iter().all(|face| !face.in_use || face.standing == Standing::Up);
            if settled || self.world.trace.failed().is_some() {
                return;
            }
            if Instant::now() >= until {
                let standings: Vec<_> =
                    faces(&self.world.faces).iter().map(|face| face.standing.clone()).collect();
                return self.world.trace.violation(format_args!("not everybody comes up: {standings:?}"));
            }
        }
    }

    async fn writes_flow(&mut self) {
        let mut client = Client::new(&self.world, "probe".to_owned());
        let began = Instant::now();
        loop {
            let told = client.propose(probe("flows"), None).await;
            if began.elapsed() > FLOW_MAX {
                return self
                    .world
                    .trace
                    .violation(format_args!("no write flows within {FLOW_MAX:?} of healing"));
            }
            if let Told::Reply(_) = told {
                return self.world.trace.line(format_args!("writes flow after {:?}", began.elapsed()));
            }
            client.pause(50).await;
        }
    }

    async fn leases_end(&mut self) {
        let until = Instant::now() + Duration::from_secs(15);
        loop {
            let left = self.world.oracle().model().leases();
            if left.is_empty() || self.world.trace.failed().is_some() {
                return;
            }
            if Instant::now() >= until {
                return self
                    .world
                    .trace
                    .violation(format_args!("leases that nobody keeps do not end: {left:?}"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until every member has applied the same, and compares what they hold.
    async fn converge(&mut self) {
        let until = Instant::now() + CONVERGE_MAX;
        loop {
            let positions: Vec<(usize, u64)> = self.applied();
            let same = positions.windows(2).all(|pair| pair[0].1 == pair[1].1);
            let newest = self.world.oracle().chosen_up_to();
            if same && positions.first().map(|(_, index)| *index) == newest {
                break;
            }
            if Instant::now() >= until || self.world.trace.failed().is_some() {
                self.describe();
                return self.world.trace.violation(format_args!(
                    "members do not come to hold the same: {positions:?}, and {newest:?} is the newest"
                ));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.compare();
    }

    /// How every node stands, in its own words and in those of the others.
    fn describe(&self) {
        let nodes: Vec<_> =
            self.world.up().into_iter().filter_map(|place| Some((place, self.world.node(place)?))).collect();
        for (place, node) in &nodes {
            let (name, kind, status) = (place + 1, node.own_kind(), node.status());
            self.world.trace.line(format_args!("n{name} {:x} is {kind:?}: {status:?}", node.id()));
            for (other, asked) in &nodes {
                let probe =
                    ProbeRequest { node_id: node.id(), disk_id: node.disk_id(), peer_urls: Vec::new() };
                let reply = asked.answer_probe(&probe);
                let (version, known) = (reply.membership_version, reply.asker_known);
                self.world
                    .trace
                    .line(format_args!("  n{} has members {version}, with it: {known}", other + 1));
            }
        }
    }

    fn applied(&self) -> Vec<(usize, u64)> {
        let nodes = self.world.up().into_iter().filter_map(|place| Some((place, self.world.node(place)?)));
        nodes.map(|(place, node)| (place, node.view().applied.index)).collect()
    }

    fn compare(&mut self) {
        let oracle = self.world.oracle();
        let model = oracle.model();
        let everything = RangeQuery::all(Space::User, KeyRange::From(Bytes::from_static(b"\0")));
        let (newest, compacted) = (model.revision(), model.compacted());
        let mut asked: Vec<i64> = vec![newest, compacted.max(1)];
        asked.extend((0..4).map(|_| self.chance.between(compacted.max(1) as u64, newest as u64) as i64));
        let mut hashes = Vec::new();
        for place in self.world.up() {
            let Some(node) = self.world.node(place) else { continue };
            let view = node.view();
            let marks = view.marks(Space::User);
            if (marks.revision.0, marks.compacted.0) != (newest, compacted) {
                self.world.trace.violation(format_args!(
                    "n{} stands at {marks:?}, not at {newest}, {compacted}",
                    place + 1
                ));
            }
            for revision in &asked {
                let query = RangeQuery { revision: Revision(*revision), ..everything.clone() };
                let found = mvcc::range(&view.data, marks, &query, usize::MAX);
                let expected = model.range(&everything, *revision);
                match found {
                    Ok(found) if found == expected => {}
                    found => self.world.trace.violation(format_args!(
                        "n{} holds {found:?} at revision {revision}, not {expected:?}",
                        place + 1
                    )),
                }
            }
            match mvcc::hash_kv(&view.data, marks, Space::User, Revision(0)) {
                Ok(hash) => hashes.push((place, hash.hash)),
                Err(error) => self.world.trace.violation(format_args!("n{} has no hash: {error}", place + 1)),
            }
        }
        if hashes.windows(2).any(|pair| pair[0].1 != pair[1].1) {
            self.world.trace.violation(format_args!("members hash differently: {hashes:?}"));
        }
        self.world.trace.line(format_args!(
            "{} members hold the same {} keys at {newest}",
            hashes.len(),
            model.key_count()
        ));
    }
}
