//! The schedule: which fault when, for how long, and together with which.
//!
//! A seed decides all of it, except who leads at the time. Faults that would make
//! each other meaningless are never under way together (see
//! [`Lock`](crate::faults::catalogue::Lock)). What was injected is healed, also
//! at the end, and each fault leaves one record.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::faults::Fault;
use crate::faults::catalogue::{self, Entry, Lock};
use crate::judge::history::FaultRecord;
use crate::probe::Ability;

/// Which faults a run has, and how they are combined.
#[derive(Clone)]
pub enum Plan {
    /// None at all.
    Quiet,
    /// These at the same time, again and again.
    Together(Vec<Entry>),
    /// One of these at a time, each equally often.
    OneOf(Vec<Entry>),
    /// Two of these at the same time, drawn anew each time.
    Pairs(Vec<Entry>),
    /// One fault after the other on nodes, meanwhile others on the network, meanwhile the rest.
    Everything(Vec<Entry>),
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// How long a fault stays, between half as long again and half of it less.
    pub hold: Duration,
    /// How long nothing is wrong between two, likewise.
    pub breathe: Duration,
}

impl Default for Rhythm {
    /// A fault about every five seconds.
    fn default() -> Rhythm {
        Rhythm { hold: Duration::from_secs(3), breathe: Duration::from_secs(2) }
    }
}

impl Plan {
    /// Understands `none`, `all`, `pairs`, `NAME`, `NAME+NAME` (at the same time) and `NAME,NAME` (in turn).
    ///
    /// # Errors
    /// For a name that there is not, and for faults that do not go together.
    pub fn parse(text: &str) -> anyhow::Result<Plan> {
        match text {
            "none" => Ok(Plan::Quiet),
            "all" => Ok(Plan::Everything(catalogue::all()?)),
            "pairs" => Ok(Plan::Pairs(catalogue::all()?)),
            list if list.contains(',') => {
                Ok(Plan::OneOf(list.split(',').map(catalogue::find).collect::<anyhow::Result<_>>()?))
            }
            sum => {
                let entries = sum.split('+').map(catalogue::find).collect::<anyhow::Result<Vec<Entry>>>()?;
                for (at, entry) in entries.iter().enumerate() {
                    if let Some(other) = entries[..at].iter().find(|other| !entry.goes_with(other)) {
                        bail!(
                            "{} and {} would make each other meaningless; use {},{} for one after the other",
                            other.name,
                            entry.name,
                            other.name,
                            entry.name
                        );
                    }
                }
                Ok(Plan::Together(entries))
            }
        }
    }

    /// The faults in it.
    pub fn entries(&self) -> &[Entry] {
        match self {
            Plan::Quiet => &[],
            Plan::Together(entries)
            | Plan::OneOf(entries)
            | Plan::Pairs(entries)
            | Plan::Everything(entries) => entries,
        }
    }

    /// What the machine must be able to do for it.
    pub fn abilities(&self) -> Vec<Ability> {
        let mut all: Vec<Ability> =
            self.entries().iter().flat_map(|entry| entry.needs.abilities).copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Leaves out what a cluster of this size cannot have, and says what that is.
    ///
    /// # Errors
    /// When it was asked for by name, or nothing is left.
    pub fn fitted(mut self, members: usize, spares: usize) -> anyhow::Result<(Plan, Vec<&'static str>)> {
        let fits = |entry: &Entry| entry.needs.members <= members && entry.needs.spares <= spares;
        let mut left_out: Vec<&'static str> = Vec::new();
        match &mut self {
            Plan::Quiet => {}
            Plan::Together(entries) | Plan::OneOf(entries) => {
                if let Some(entry) = entries.iter().find(|entry| !fits(entry)) {
                    let (needs, name) = (entry.needs, entry.name);
                    bail!("{name} needs {} members and {} spare hosts", needs.members, needs.spares);
                }
            }
            Plan::Pairs(entries) | Plan::Everything(entries) => {
                left_out.extend(entries.iter().filter(|entry| !fits(entry)).map(|entry| entry.name));
                entries.retain(fits);
                ensure!(entries.len() > 1, "a cluster of {members} is too small for that");
            }
        }
        Ok((self, left_out))
    }

    /// Independent sequences of rounds, which go on at the same time.
    fn lanes(self) -> Vec<Rounds> {
        match self {
            Plan::Quiet => Vec::new(),
            Plan::Together(entries) => vec![Rounds::Same(entries)],
            Plan::OneOf(entries) => vec![Rounds::Single(Deck::new(entries))],
            Plan::Pairs(entries) => vec![Rounds::Pair(Deck::new(entries))],
            Plan::Everything(entries) => {
                let on_nodes = |entry: &Entry| {
                    entry.locks.contains(&Lock::Nodes) || entry.locks.contains(&Lock::Members)
                };
                let on_network = |entry: &Entry| {
                    entry.needs.abilities.iter().any(|ability| ability.is_of_network()) && !on_nodes(entry)
                };
                let lane = |wanted: &dyn Fn(&Entry) -> bool| {
                    let entries: Vec<Entry> = entries.iter().filter(|entry| wanted(entry)).copied().collect();
                    Rounds::Single(Deck::new(entries))
                };
                let rest = |entry: &Entry| !on_nodes(entry) && !on_network(entry);
                vec![lane(&on_nodes), lane(&on_network), lane(&rest)]
            }
        }
    }
}

/// Where a lane's next round comes from.
enum Rounds {
    Same(Vec<Entry>),
    Single(Deck),
    Pair(Deck),
}

impl Rounds {
    fn next(&mut self, rng: &mut StdRng) -> Vec<Entry> {
        match self {
            Rounds::Same(entries) => entries.clone(),
            Rounds::Single(deck) => deck.draw(rng, |_| true).into_iter().collect(),
            Rounds::Pair(deck) => {
                let Some(first) = deck.draw(rng, |_| true) else { return Vec::new() };
                let second = deck.draw(rng, |entry| entry.goes_with(&first));
                [first].into_iter().chain(second).collect()
            }
        }
    }
}

/// Entries that are drawn by chance, but each once before any is drawn again.
struct Deck {
    all: Vec<Entry>,
    left: Vec<Entry>,
}

impl Deck {
    fn new(all: Vec<Entry>) -> Deck {
        Deck { all, left: Vec::new() }
    }

    fn draw(&mut self, rng: &mut StdRng, fits: impl Fn(&Entry) -> bool) -> Option<Entry> {
        if !self.left.iter().any(&fits) {
            let mut again = self.all.clone();
            again.shuffle(rng);
            // What was passed over stays on top.
            again.append(&mut self.left);
            self.left = again;
        }
        let at = self.left.iter().rposition(fits)?;
        Some(self.left.remove(at))
    }
}

/// Holds what only one fault may have at a time.
#[derive(Default)]
struct Locks {
    members: Mutex<()>,
    nodes: Mutex<()>,
    clocks: Mutex<()>,
    pace: Mutex<()>,
    links: Mutex<()>,
}

impl Locks {
    /// Waits for all locks of these faults, in one order for all.
    async fn take(&self, entries: &[Entry]) -> Vec<MutexGuard<'_, ()>> {
        let mut wanted: Vec<Lock> = entries.iter().flat_map(|entry| entry.locks).copied().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut guards = Vec::new();
        for lock in wanted {
            let mutex = match lock {
                Lock::Members => &self.members,
                Lock::Nodes => &self.nodes,
                Lock::Clocks => &self.clocks,
                Lock::Pace => &self.pace,
                Lock::Links => &self.links,
            };
            guards.push(mutex.lock().await);
        }
        guards
    }
}

/// A schedule that is going on.
pub struct Nemesis {
    stop: CancellationToken,
    lanes: JoinSet<()>,
}

impl Nemesis {
    /// Starts it.
    pub fn start(context: &Arc<Context>, plan: Plan, rhythm: Rhythm) -> Nemesis {
        let (stop, locks) = (CancellationToken::new(), Arc::new(Locks::default()));
        let mut lanes = JoinSet::new();
        for (number, rounds) in plan.lanes().into_iter().enumerate() {
            let rng = StdRng::seed_from_u64(context.seed.wrapping_add(number as u64 * 0x9e37_79b9));
            lanes.spawn(lane(context.clone(), locks.clone(), rounds, rhythm, rng, stop.clone()));
        }
        Nemesis { stop, lanes }
    }

    /// Stops it, and waits until everything is healed.
    ///
    /// # Errors
    /// When a lane panicked: then nobody knows what is healed.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(ended) = self.lanes.join_next().await {
            ended.context("a lane of the schedule")?;
        }
        Ok(())
    }
}

async fn lane(
    context: Arc<Context>,
    locks: Arc<Locks>,
    mut rounds: Rounds,
    rhythm: Rhythm,
    mut rng: StdRng,
    stop: CancellationToken,
) {
    loop {
        // Drawn before anything is waited for, so that the schedule depends on the seed alone.
        let entries = rounds.next(&mut rng);
        let (breathe, hold) = (about(rhythm.breathe, &mut rng), about(rhythm.hold, &mut rng));
        let mut round_rng = StdRng::seed_from_u64(rng.random());
        if entries.is_empty() || stopped_within(&stop, breathe).await {
            return;
        }
        let taken = locks.take(&entries);
        let _guards = tokio::select! {
            guards = taken => guards,
            () = stop.cancelled() => return,
        };
        round(&context, &entries, hold, &mut round_rng, &stop).await;
    }
}

/// Between half and one and a half of a time.
fn about(time: Duration, rng: &mut StdRng) -> Duration {
    time.mul_f64(rng.random_range(0.5..=1.5))
}

async fn stopped_within(stop: &CancellationToken, time: Duration) -> bool {
    tokio::time::timeout(time, stop.cancelled()).await.is_ok()
}

/// How long an injection or a healing may take before it is given up. Changes of the membership wait for nodes.
const STEP_TIME_MAX: Duration = Duration::from_secs(240);

/// Injects these faults one after the other, lets them be, heals them in an order drawn by chance, and records them.
async fn round(
    context: &Arc<Context>,
    entries: &[Entry],
    hold: Duration,
    rng: &mut StdRng,
    stop: &CancellationToken,
) {
    let mut injected: Vec<(Box<dyn Fault>, FaultRecord)> = Vec::new();
    for entry in entries {
        let mut fault = (entry.make)();
        let mut fault_rng = StdRng::seed_from_u64(rng.random());
        let started_ns = context.now_ns();
        let effect = in_time(fault.inject(context, &mut fault_rng)).await;
        let effect = effect.map_err(|error| format!("{error:#}"));
        let record = FaultRecord { name: entry.name, started_ns, healed_ns: 0, effect, heal_error: None };
        injected.push((fault, record));
    }
    stopped_within(stop, hold).await;
    injected.shuffle(rng);
    for (mut fault, mut record) in injected {
        record.heal_error = in_time(fault.heal(context)).await.err().map(|error| format!("{error:#}"));
        record.healed_ns = context.now_ns();
        context.record_fault(record);
    }
}

async fn in_time<T>(deed: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(STEP_TIME_MAX, deed).await.context("it took too long")?
}

/// Makes ready what must be there before the first node starts, such as a clock that can be moved.
///
/// # Errors
/// When it cannot be made.
pub async fn prepare(plan: &Plan, hosts: &crate::hosts::Hosts) -> anyhow::Result<()> {
    if plan.abilities().contains(&Ability::ClockShim) {
        crate::faults::clock::prepare(hosts).await?;
    }
    Ok(())
}
