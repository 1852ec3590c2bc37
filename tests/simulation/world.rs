//! One run: hosts, network and clients, moved through virtual time tick by tick
//! on one thread, and watched at every step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay::node::{Bootstrap, ExitReason, InitialMember, Node};
use tokio::runtime::Builder;

use crate::chance::Chance;
use crate::disk::{Speed, Survives};
use crate::host::{Face, Faces, Host, Standing, Surroundings, Tuning, faces};
use crate::network::Network;
use crate::oracle::Oracle;
use crate::trace::Trace;
use crate::transport::url;
use crate::{director, network, scenarios};

/// The step of virtual time. Whatever happens within one is ordered, too: by the
/// turn of the nodes, which is drawn anew for every step.
const TICK_MS: u64 = 2;
/// Places for machines; not all of them are members at any time.
pub const PLACES: usize = 7;
/// A run that takes longer than this hangs.
const RUN_MS_MAX: u64 = 600_000;

/// What is asked of the hosts; carried out between two ticks.
#[derive(Clone, Debug)]
pub enum Order {
    Start(usize),
    Crash(usize, Survives),
    Stop(usize),
    Wipe(usize),
    FailDisk(usize),
}

/// The world as those see it who live in it: clients, and whoever breaks things.
#[derive(Clone)]
pub struct World {
    pub trace: Arc<Trace>,
    pub faces: Faces,
    pub network: Arc<Network>,
    pub seed: u64,
    oracle: Arc<Mutex<Oracle>>,
    orders: Arc<Mutex<Vec<Order>>>,
    ending: Arc<AtomicBool>,
}

/// The connection ended before the answer came: nobody knows what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl World {
    pub fn oracle(&self) -> MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn order(&self, order: Order) {
        self.trace.line(format_args!("order {order:?}"));
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
    }

    /// Whether clients should come to an end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed) || self.trace.failed().is_some()
    }

    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Places where a node runs.
    pub fn up(&self) -> Vec<usize> {
        let faces = faces(&self.faces);
        (0..PLACES).filter(|place| faces[*place].standing == Standing::Up).collect()
    }

    /// The node at a place, if it runs.
    pub fn node(&self, place: usize) -> Option<Node> {
        faces(&self.faces)[place].node.clone()
    }

    /// The place of whoever leads by its own word, in the highest term.
    pub fn leader(&self) -> Option<usize> {
        let faces = faces(&self.faces);
        let nodes = faces.iter().enumerate().filter_map(|(place, face)| Some((place, face.node.as_ref()?)));
        let leading = nodes.map(|(place, node)| (node.leadership(), place)).filter(|(lead, _)| lead.here);
        leading.max_by_key(|(lead, _)| lead.term).map(|(_, place)| place)
    }

    /// Does something at a node, as a request over a connection that takes its
    /// time and may end with the node.
    pub async fn at<T, F, W>(&self, place: usize, chance: &mut Chance, serve: F) -> Result<T, Gone>
    where
        T: Send + 'static,
        F: FnOnce(Node) -> W,
        W: Future<Output = T> + Send + 'static,
    {
        let (there, back) = (chance.below(4), chance.below(4));
        tokio::time::sleep(Duration::from_millis(there)).await;
        let target = {
            let faces = faces(&self.faces);
            faces[place].node.clone().zip(faces[place].handle.clone())
        };
        let Some((node, handle)) = target else {
            tokio::time::sleep(Duration::from_millis(1 + back)).await;
            return Err(Gone);
        };
        let (tell, told) = tokio::sync::oneshot::channel();
        let work = serve(node);
        handle.spawn(async move {
            let _ = tell.send(work.await);
        });
        let told = told.await;
        tokio::time::sleep(Duration::from_millis(back)).await;
        told.map_err(|_| Gone)
    }
}

/// What a run was.
pub struct Ran {
    pub trace: Arc<Trace>,
    pub virtual_ms: u64,
    pub operations: u64,
}

/// Runs one seed below `root`.
pub fn run(seed: u64, scenario: Option<String>, root: std::path::PathBuf, print: bool) -> Ran {
    let trace = Arc::new(Trace::new(print));
    let mut chance = Chance::new(seed, "world");
    let tuning = draw_tuning(&mut chance);
    let drawn = *chance.pick(&[3_usize, 3, 3, 4, 5, 5]);
    let members = if scenario.is_some() { scenarios::MEMBERS } else { drawn };
    trace.line(format_args!("seed {seed}: {members} members, {tuning:?}"));
    let network = Network::new(trace.clone(), Chance::new(seed, "network"));
    let all: Faces = Arc::new(Mutex::new((0..PLACES).map(|_| face()).collect()));
    let surroundings = Surroundings {
        root,
        faces: all.clone(),
        network: network.clone(),
        trace: trace.clone(),
        seed,
        tuning,
    };
    let mut hosts: Vec<Host> = (0..PLACES).map(|place| Host::new(place, &surroundings)).collect();
    let initial: Vec<InitialMember> = (0..members)
        .map(|place| InitialMember { name: format!("n{}", place + 1), peer_urls: vec![url(place)] })
        .collect();
    let speed = draw_speed(&mut chance);
    for face in faces(&all).iter_mut() {
        (face.speed, face.usual_speed) = (speed, speed);
    }
    for (place, face) in faces(&all).iter_mut().enumerate().take(members) {
        face.bootstrap = Bootstrap::Initial { members: initial.clone(), token: "simulation".to_owned() };
        face.in_use = true;
        trace.fold(place as u64);
    }
    let world = World {
        oracle: Arc::new(Mutex::new(Oracle::new(trace.clone()))),
        trace: trace.clone(),
        faces: all,
        network: network.clone(),
        seed,
        orders: Arc::default(),
        ending: Arc::default(),
    };
    let clients = Builder::new_current_thread().enable_time().start_paused(true).build();
    let clients = clients.expect("a runtime needs nothing that could be missing");
    let directing = match scenario {
        Some(name) => clients.spawn(scenarios::play(name, world.clone())),
        None => clients.spawn(director::direct(world.clone(), members)),
    };
    let began = {
        let _inside = clients.enter();
        tokio::time::Instant::now()
    };
    let mut now_ms = 0;
    while !directing.is_finished() && trace.failed().is_none() {
        now_ms += TICK_MS;
        trace.set_now_ms(now_ms);
        if now_ms > RUN_MS_MAX {
            trace.violation("the run does not come to its end");
        }
        tick(&world, &mut hosts, &mut chance, now_ms);
        clients
            .block_on(async move { tokio::time::sleep_until(began + Duration::from_millis(now_ms)).await });
        carry_out(&world, &mut hosts, now_ms);
    }
    if let Ok(Err(error)) = clients.block_on(async { tokio::time::timeout(Duration::ZERO, directing).await })
    {
        trace.violation(format_args!("the director ended: {error}"));
    }
    let operations = world.oracle().operations();
    drop(clients);
    hosts.iter_mut().for_each(|host| host.crash(Survives::Everything));
    Ran { trace, virtual_ms: now_ms, operations }
}

fn tick(world: &World, hosts: &mut [Host], chance: &mut Chance, now_ms: u64) {
    world.network.deliver(now_ms);
    let mut order: Vec<usize> = (0..hosts.len()).filter(|place| hosts[*place].runs()).collect();
    chance.shuffle(&mut order);
    for place in order {
        hosts[place].live(now_ms);
    }
    observe(world, hosts);
}

/// Looks at what every node shows: who leads, what was applied, who has ended.
fn observe(world: &World, hosts: &mut [Host]) {
    let mut oracle = world.oracle();
    for host in hosts.iter_mut() {
        let Some(node) = world.node(host.place) else { continue };
        let leadership = node.leadership();
        if leadership.here {
            oracle.leads(node.id(), leadership.term);
        }
        let applied = node.view().applied;
        if applied == Default::default() {
            continue;
        }
        let from = host.looked_at.map_or(0, |looked_at| looked_at + 1);
        for index in from..=applied.index {
            oracle.applied(host.place, index, host.log().record(index));
        }
        if from <= applied.index {
            world.trace.fold(applied.index << 8 | host.place as u64);
            host.looked_at = Some(applied.index);
        }
    }
    oracle.follow();
    drop(oracle);
    for host in hosts.iter_mut() {
        look_at_end(world, host);
        host.reap();
    }
}

/// A node that has ended itself is a process that exits.
fn look_at_end(world: &World, host: &mut Host) {
    if !host.runs() || host.is_stopping() {
        return;
    }
    let (fatal, disk_failed, standing) = {
        let faces = faces(&world.faces);
        let face = &faces[host.place];
        (face.fatal.clone(), face.disk_failed, face.standing.clone())
    };
    let name = format!("n{}", host.place + 1);
    if disk_failed {
        world.trace.line(format_args!("{name} ends: its disk failed"));
        world.trace.count("disks failed");
        return host.crash(Survives::Nothing);
    }
    if let Some(why) = fatal {
        world.trace.violation(format_args!("{name} ended itself: {why}"));
        return host.crash(Survives::Everything);
    }
    if let Standing::Refused(why) = standing {
        world.trace.line(format_args!("{name} was not let in: {why}"));
        world.trace.count("starts refused");
        return host.crash(Survives::Everything);
    }
    match host.exit() {
        None | Some(ExitReason::Stopped) => {}
        Some(ExitReason::Removed) => {
            world.trace.line(format_args!("{name} learned that it was removed"));
            world.trace.count("removals noticed");
            faces(&world.faces)[host.place].removed = true;
            host.stop();
        }
        Some(ExitReason::Refused(why)) if faces(&world.faces)[host.place].may_be_refused => {
            world.trace.line(format_args!("{name} was refused: {why}"));
            host.crash(Survives::Everything);
            faces(&world.faces)[host.place].in_use = false;
        }
        Some(ExitReason::Refused(why)) => {
            world.trace.violation(format_args!("{name} may not take part: {why}"));
        }
        Some(ExitReason::Failed(why)) => world.trace.violation(format_args!("{name} failed: {why}")),
    }
}

fn carry_out(world: &World, hosts: &mut [Host], now_ms: u64) {
    let orders = std::mem::take(&mut *world.orders.lock().unwrap_or_else(PoisonError::into_inner));
    for order in orders {
        match order {
            Order::Start(place) if !hosts[place].runs() => hosts[place].start(now_ms),
            Order::Crash(place, survives) if hosts[place].runs() => {
                world.trace.count("crashes");
                hosts[place].crash(survives);
            }
            Order::Stop(place) => hosts[place].stop(),
            Order::Wipe(place) if !hosts[place].runs() => hosts[place].wipe(),
            Order::FailDisk(place) if hosts[place].runs() => hosts[place].fail_disk(),
            _ => {}
        }
    }
}

fn face() -> Face {
    Face {
        standing: Standing::Down,
        node: None,
        handle: None,
        incarnation: 0,
        bootstrap: Bootstrap::Initial { members: Vec::new(), token: String::new() },
        in_use: false,
        removed: false,
        paused_until_ms: 0,
        fatal: None,
        disk_failed: false,
        may_be_refused: false,
        speed: FAST,
        usual_speed: FAST,
        wall_offset_ms: Arc::default(),
    }
}

/// A disk that nobody waits for.
pub const FAST: Speed = Speed { sync_ms_min: 0, sync_ms_max: 3 };

/// What the disks of a run usually are: the slower, the more a crash takes.
fn draw_speed(chance: &mut Chance) -> Speed {
    match chance.below(4) {
        0 => Speed { sync_ms_min: 2, sync_ms_max: 12 },
        1 => Speed { sync_ms_min: 5, sync_ms_max: 40 },
        _ => FAST,
    }
}

fn draw_tuning(chance: &mut Chance) -> Tuning {
    let election_ms = *chance.pick(&[500, 800, 1000]);
    Tuning {
        heartbeat_ms: election_ms / 10,
        election_ms,
        snapshot_count: chance.between(40, 250),
        log_retained: chance.between(5, 50),
        ring_bytes: *chance.pick(&[4 << 10, 64 << 10, 1 << 20]),
        catch_up_bytes: *chance.pick(&[512, 4096, 1 << 20]),
        compact_every_ms: *chance.pick(&[0, 0, 4000, 8000]),
        lease_reads: chance.permille(200),
        record_cache_bytes: *chance.pick(&[0, 600, 1 << 20]),
    }
}

/// Weather as a seed draws it.
pub fn draw_weather(chance: &mut Chance) -> network::Weather {
    network::Weather {
        latency_ms_max: *chance.pick(&[2, 5, 20]),
        late: *chance.pick(&[0, 5, 50]),
        late_ms_max: *chance.pick(&[50, 300, 1500]),
        lost: *chance.pick(&[0, 5, 30, 120]),
        repeated: *chance.pick(&[0, 10, 60]),
        broken: *chance.pick(&[0, 0, 2, 10]),
    }
}
