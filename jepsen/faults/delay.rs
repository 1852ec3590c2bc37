//! A network that is slow, or slow by chance.
//!
//! The kernel here has no emulation of delays, so packets between members are
//! handed to the harness, which lets them go on when their time has come. The
//! rules stand only while the fault is on: even a delay of nothing costs time.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use nfq::{Message, Queue, Verdict};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::Instant;

use super::catalogue::{Entry, Lock, Needs};
use super::network::inside;
use super::{Deed, Fault, leader_or_any, within};
use crate::context::Context;
use crate::hosts::command;
use crate::probe::Ability;

pub const FAULTS: &[Entry] =
    &[entry("delay", || Delay::boxed("delay")), entry("jitter", || Delay::boxed("jitter"))];

const fn entry(name: &'static str, make: fn() -> Box<dyn Fault>) -> Entry {
    let needs = Needs { members: 2, spares: 0, abilities: &[Ability::Nfqueue] };
    Entry { name, needs, locks: &[Lock::Pace], make }
}

/// Numbers of queues belong to a network namespace, and so to the run.
pub const QUEUE: u16 = 7;
/// Packets on hold before the kernel drops more.
const HELD_MAX: u32 = 20_000;
/// How often the queue is looked at; what a delay is rounded up to.
const STEP: Duration = Duration::from_micros(500);

/// Packets between the leader and the others arrive late.
struct Delay {
    name: &'static str,
    rules: Vec<String>,
    holder: Option<Holder>,
}

impl Delay {
    fn boxed(name: &'static str) -> Box<dyn Fault> {
        Box::new(Delay { name, rules: Vec::new(), holder: None })
    }
}

impl Fault for Delay {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let leader = leader_or_any(context, &members).await;
            let other = members.iter().find(|member| **member != leader).context("it is alone")?;
            let (from, to) = (&context.hosts.hosts[leader], &context.hosts.hosts[*other]);
            let usual = connect_time(&from.name, to.ip).await?;
            let times = match self.name {
                "jitter" => (Duration::ZERO, Duration::from_millis(rng.random_range(100..=250))),
                _ => {
                    let time = Duration::from_millis(rng.random_range(40..=150));
                    (time, time)
                }
            };
            self.holder = Some(Holder::start(times.0, times.1, StdRng::seed_from_u64(rng.random()))?);
            for member in members.iter().filter(|member| **member != leader) {
                let (a, b) = (from.ip, context.hosts.hosts[*member].ip);
                for (source, target) in [(a, b), (b, a)] {
                    let rule = format!(
                        "FORWARD -s {source} -d {target} -j NFQUEUE --queue-num {QUEUE} --queue-bypass"
                    );
                    command::line(&format!("iptables -w -A {rule}")).await?;
                    self.rules.push(rule);
                }
            }
            let holder = self.holder.as_ref().context("it was just started")?;
            within(Duration::from_secs(5), || async {
                let slow = connect_time(&from.name, to.ip).await?;
                let held = holder.held.load(Ordering::Relaxed);
                // A connection takes one packet there and one back.
                let enough = slow >= (times.0 * 2).max(times.1 / 10);
                ensure!(held > 0 && enough, "to connect took {usual:?}, now {slow:?}; {held} packets were held");
                Ok(format!(
                    "{} from and to the others, {:?} to {:?} each way: to connect took {usual:?}, now {slow:?}; {held} \
                     packets held so far",
                    from.name, times.0, times.1
                ))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            let mut failed = Ok(());
            for rule in self.rules.drain(..) {
                if let Err(error) = command::line(&format!("iptables -w -D {rule}")).await {
                    failed = Err(error);
                }
            }
            if let Some(holder) = self.holder.take() {
                tokio::task::spawn_blocking(move || holder.stop()).await??;
            }
            failed
        })
    }
}

/// How long one host takes to reach the peer port of another, whoever answers, and be it with a refusal.
pub async fn connect_time(from: &str, to: Ipv4Addr) -> anyhow::Result<Duration> {
    let script = format!(
        "begin=${{EPOCHREALTIME/./}}; (exec 3<>/dev/tcp/{to}/2380) 2>/dev/null; echo $((${{EPOCHREALTIME/./}} - begin))"
    );
    let micros = inside(from, &["bash", "-c", &script]).await?;
    Ok(Duration::from_micros(micros.trim().parse()?))
}

/// The thread that keeps packets until their time has come.
pub struct Holder {
    stop: Arc<AtomicBool>,
    /// Packets that came by.
    pub held: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Holder {
    /// Begins to hold what the rules hand over, each packet for a time between these two.
    ///
    /// # Errors
    /// When the kernel has no such queue, or the harness no right to it.
    pub fn start(least: Duration, most: Duration, rng: StdRng) -> anyhow::Result<Holder> {
        let mut queue = Queue::open().context("opening a packet queue")?;
        queue.bind(QUEUE).context("binding a packet queue")?;
        queue.set_queue_max_len(QUEUE, HELD_MAX)?;
        // Only the verdict matters here: a few bytes of each packet are enough, and it need not be cut up.
        queue.set_copy_range(QUEUE, 64)?;
        queue.set_recv_gso(QUEUE, true)?;
        queue.set_nonblocking(true);
        let (stop, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, count) = (stop.clone(), held.clone());
        let work = move || hold(queue, least, most, rng, &stopping, &count);
        let thread = std::thread::Builder::new().name("delay".to_owned()).spawn(work)?;
        Ok(Holder { stop, held, thread })
    }

    /// Lets everything go.
    ///
    /// # Errors
    /// What ended the holding before.
    pub fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread that delays packets panicked"))?
    }
}

fn hold(
    mut queue: Queue,
    least: Duration,
    most: Duration,
    mut rng: StdRng,
    stop: &AtomicBool,
    held: &AtomicU64,
) -> anyhow::Result<()> {
    // By due time; equal times in the order of arrival.
    let mut waiting: BTreeMap<(Instant, u64), Message> = BTreeMap::new();
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        loop {
            match queue.recv() {
                Ok(message) => {
                    let due = Instant::now() + rng.random_range(least..=most);
                    waiting.insert((due, held.fetch_add(1, Ordering::Relaxed)), message);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("receiving a packet"),
            }
        }
        while let Some(next) = waiting.first_entry() {
            if next.key().0 > Instant::now() && !stopping {
                break;
            }
            let mut message = next.remove();
            message.set_verdict(Verdict::Accept);
            queue.verdict(message).context("letting a packet go on")?;
        }
        if stopping {
            return queue.unbind(QUEUE).context("unbinding a packet queue");
        }
        std::thread::park_timeout(STEP);
    }
}
