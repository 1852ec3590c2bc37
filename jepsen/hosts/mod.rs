//! The hosts: each a network namespace, a disk of its own and one node process.
//!
//! The harness runs in namespaces of its own (network, mounts, processes), so
//! that everything it made goes with it, however it ends. Clients run where the
//! harness runs: on the switch, outside every host.

mod ask;
pub mod cgroup;
pub mod check;
pub mod command;
pub mod disk;
pub mod isolation;
mod network;
mod node;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::future::join_all;
use rustix::process::Signal;
use tokio::time::Instant;

pub use ask::Status;
use disk::Disk;
pub use node::process_state;
use node::{Launch, Node};

/// How long a node may take from its start until it serves.
pub const START_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a signal may take to show.
const SIGNAL_TIME_MAX: Duration = Duration::from_secs(3);
/// Members that a cluster begins with, at most.
pub const MEMBERS_MAX: usize = 5;

/// What a cluster is like.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The run's name: [`isolation::Inside::run`].
    pub run: String,
    /// Hosts whose nodes found the cluster.
    pub members: usize,
    /// Hosts that are prepared for nodes that join later.
    pub spares: usize,
    pub binary: PathBuf,
    /// Where the nodes' logs go, one file a host.
    pub logs: PathBuf,
    pub disk_bytes: u64,
    /// Log entries between two snapshots, and as many are kept for followers: a run of a minute sees several.
    pub snapshot_count: u64,
    pub election_timeout: Duration,
    /// More flags of `mainstay serve`, for every node.
    pub flags: Vec<String>,
    /// The nodes' environment, beside `PATH`.
    pub environment: Vec<(String, String)>,
}

impl Shape {
    /// A usual cluster.
    pub fn new(run: &str, members: usize, spares: usize, binary: PathBuf) -> Shape {
        Shape {
            run: run.to_owned(),
            members,
            spares,
            binary,
            logs: PathBuf::from(isolation::ROOT).join("logs"),
            disk_bytes: 512 << 20,
            snapshot_count: 2000,
            election_timeout: Duration::from_secs(1),
            flags: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// All hosts of a run, in the order of their names: host 0 is `n1`.
pub struct Hosts {
    pub hosts: Vec<Host>,
    member: Mutex<Vec<bool>>,
    complaints: Mutex<Vec<String>>,
}

/// One host. Methods take `&self`: a host guards its own state.
pub struct Host {
    pub index: usize,
    /// `n1`, `n2`, ... Also the name of its network namespace.
    pub name: String,
    pub ip: Ipv4Addr,
    /// Where its disk is mounted; the node's data directory is `data` below it.
    pub mount: PathBuf,
    /// What the node wrote to stdout and stderr, over all of its starts.
    pub log: PathBuf,
    run: String,
    binary: PathBuf,
    /// Flags of every start.
    flags: Vec<String>,
    /// Flags that say how it became a member.
    origin: Mutex<Vec<String>>,
    disk: Disk,
    node: Node,
    /// Its node's member id, once it was heard.
    member_id: AtomicU64,
}

/// Whether a host's node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// Alive (or stopped by SIGSTOP) under this process id.
    Yes { pid: u32 },
    /// Ended, by the harness or by itself.
    No,
}

impl Hosts {
    /// Makes the hosts (bridge, namespaces, disks), starts no node yet.
    pub async fn create(shape: Shape) -> anyhow::Result<Hosts> {
        ensure!(
            (1..=MEMBERS_MAX).contains(&shape.members),
            "a cluster begins with 1 to {MEMBERS_MAX} members"
        );
        ensure!(shape.binary.is_file(), "there is no program at {}", shape.binary.display());
        std::fs::create_dir_all(&shape.logs).context("making the directory of the logs")?;
        network::make_bridge().await?;
        let count = shape.members + shape.spares;
        let hosts: Vec<Host> = (0..count).map(|index| Host::new(index, &shape)).collect();
        for host in &hosts {
            network::make_host(host.index, &host.name).await?;
            host.disk.make().await.with_context(|| format!("the disk of {}", host.name))?;
        }
        let member = (0..count).map(|index| index < shape.members).collect();
        Ok(Hosts { hosts, member: Mutex::new(member), complaints: Mutex::default() })
    }

    /// Starts every member's node and waits until all serve and know one leader.
    pub async fn start_all(&self) -> anyhow::Result<()> {
        for index in self.members() {
            self.hosts[index].start().await?;
        }
        self.settle(START_TIME_MAX).await
    }

    /// Client addresses of the hosts, in their order (spares included).
    pub fn client_urls(&self) -> Vec<String> {
        self.hosts.iter().map(Host::client_url).collect()
    }

    /// What every running node says of itself, by host.
    pub async fn statuses(&self) -> Vec<(usize, anyhow::Result<Status>)> {
        let running = self.hosts.iter().filter(|host| host.running() != Running::No);
        join_all(running.map(async |host| (host.index, host.status().await))).await
    }

    /// The index of the host whose node leads, by asking all running nodes; the answer of the highest term wins.
    pub async fn leader(&self) -> Option<usize> {
        let answers = self.statuses().await.into_iter().filter_map(|(_, status)| status.ok());
        let known = answers.filter(|status| status.leader != 0);
        let leader = known.max_by_key(|status| status.term)?.leader;
        self.hosts.iter().position(|host| host.member_id.load(Ordering::Relaxed) == leader)
    }

    /// Waits until somebody leads.
    pub async fn wait_leader(&self, within: Duration) -> anyhow::Result<usize> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(leader) = self.leader().await {
                return Ok(leader);
            }
            ensure!(Instant::now() < deadline, "nobody led for {within:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Indices of the hosts that are members now (grows and shrinks with membership faults).
    pub fn members(&self) -> Vec<usize> {
        let member = self.member.lock().expect("nobody panics while holding it");
        (0..member.len()).filter(|index| member[*index]).collect()
    }

    /// Records that a host's node became a member, or no longer is one.
    pub fn set_member(&self, index: usize, member: bool) {
        self.member.lock().expect("nobody panics while holding it")[index] = member;
    }

    /// Records that a node did what it must not, or did not what it must, as a fault saw it.
    pub fn complain(&self, complaint: String) {
        self.complaints.lock().expect("nobody panics while holding it").push(complaint);
    }

    /// What faults saw nodes do wrong. A run with any has failed.
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.lock().expect("nobody panics while holding it").clone()
    }

    /// Waits until every member serves linearizable reads, starting those that do not run.
    pub async fn settle(&self, within: Duration) -> anyhow::Result<()> {
        let members = self.members();
        let deadline = Instant::now() + within;
        let waits = members.iter().map(async |index| {
            let host = &self.hosts[*index];
            host.settle(deadline).await.with_context(|| format!("{} after {within:?}", host.name))
        });
        join_all(waits).await.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
        self.wait_leader(deadline.saturating_duration_since(Instant::now())).await.map(drop)
    }
}

impl Host {
    fn new(index: usize, shape: &Shape) -> Host {
        let name = format!("n{}", index + 1);
        let root = Path::new(isolation::ROOT).join(&name);
        let mount = root.join("disk");
        let ip = network::address(index);
        let peer = |index: usize| format!("http://{}:2380", network::address(index));
        let founders: Vec<String> =
            (0..shape.members).map(|index| format!("n{}={}", index + 1, peer(index))).collect();
        let mut flags = vec![
            format!("--name={name}"),
            format!("--data-dir={}", mount.join("data").display()),
            format!("--listen-client-urls=http://{ip}:2379"),
            format!("--listen-peer-urls={}", peer(index)),
            format!("--snapshot-count={}", shape.snapshot_count),
            format!("--log-retention-entries={}", shape.snapshot_count),
            format!("--election-timeout={}ms", shape.election_timeout.as_millis()),
            "--disk-reserve-bytes=64MiB".to_owned(),
            "--write-buffer-bytes=4MiB".to_owned(),
            "--block-cache-bytes=8MiB".to_owned(),
            "--record-cache-bytes=4KiB".to_owned(),
            "--warning-unary-request-duration=10s".to_owned(),
        ];
        flags.extend(shape.flags.iter().cloned());
        let origin = vec![
            format!("--initial-cluster={}", founders.join(",")),
            "--initial-cluster-state=new".to_owned(),
            format!("--initial-cluster-token={}", shape.run),
        ];
        let node = Node::new();
        for (key, value) in &shape.environment {
            node.set_environment(key, Some(value));
        }
        Host {
            index,
            ip,
            log: shape.logs.join(format!("{name}.log")),
            run: shape.run.clone(),
            binary: shape.binary.clone(),
            flags,
            origin: Mutex::new(origin),
            disk: Disk { image: root.join(&shape.run), mount: mount.clone(), bytes: shape.disk_bytes },
            node,
            member_id: AtomicU64::new(0),
            name,
            mount,
        }
    }

    /// `http://ip:2379`.
    pub fn client_url(&self) -> String {
        format!("http://{}:2379", self.ip)
    }

    /// `http://ip:2380`.
    pub fn peer_url(&self) -> String {
        format!("http://{}:2380", self.ip)
    }

    /// The node's data directory.
    pub fn data(&self) -> PathBuf {
        self.mount.join("data")
    }

    /// Starts the node as a member of the first cluster, or again with what its disk holds; extra flags and
    /// environment as given by [`Host::set_environment`]. Does not wait until it serves.
    pub async fn start(&self) -> anyhow::Result<()> {
        let mut flags = self.flags.clone();
        flags.extend(self.origin.lock().expect("nobody panics while holding it").iter().cloned());
        let launch = Launch { namespace: &self.name, binary: &self.binary, flags: &flags, log: &self.log };
        self.node.start(&launch).map(drop).with_context(|| format!("starting {}", self.name))
    }

    /// Starts the node with an empty disk as one that joins the cluster reached at the first of `endpoints`
    /// that answers; later starts remember that it joined.
    pub async fn start_joining(&self, endpoints: &[String]) -> anyhow::Result<()> {
        let mut through = endpoints.first().context("joining needs an endpoint")?;
        for endpoint in endpoints {
            if ask::status(endpoint).await.is_ok() {
                through = endpoint;
                break;
            }
        }
        *self.origin.lock().expect("nobody panics while holding it") = vec![format!("--join={through}")];
        self.member_id.store(0, Ordering::Relaxed);
        self.start().await
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.node.kill().await.with_context(|| format!("killing {}", self.name))
    }

    /// SIGTERM, and waits for the end; returns the exit code.
    pub async fn terminate(&self, within: Duration) -> anyhow::Result<i32> {
        let status =
            self.node.end(Signal::TERM, within).await.with_context(|| format!("ending {}", self.name))?;
        let status = status.with_context(|| format!("{} did not run", self.name))?;
        status.code().with_context(|| format!("{} ended with {status}", self.name))
    }

    /// SIGSTOP, and waits until the kernel shows the process as stopped.
    pub async fn pause(&self) -> anyhow::Result<()> {
        self.node.signal(Signal::STOP)?;
        self.wait_state(|state| state == 'T').await
    }

    /// SIGCONT, and waits until the kernel no longer shows the process as stopped.
    pub async fn resume(&self) -> anyhow::Result<()> {
        self.node.signal(Signal::CONT)?;
        self.wait_state(|state| state != 'T').await
    }

    async fn wait_state(&self, wanted: impl Fn(char) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + SIGNAL_TIME_MAX;
        loop {
            let state = process_state(self.pid()?)?;
            if wanted(state) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} is in state {state} after {SIGNAL_TIME_MAX:?}", self.name);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn running(&self) -> Running {
        self.node.running()
    }

    /// The process id of its node.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.node.pid().with_context(|| self.name.clone())
    }

    /// Waits until the node ends by itself; says how.
    pub async fn wait_end(&self, within: Duration) -> anyhow::Result<String> {
        let status = self.node.wait_end(within).await.with_context(|| self.name.clone())?;
        Ok(status.map_or_else(|| "ended".to_owned(), |status| status.to_string()))
    }

    /// How the node ended when it ended by itself (exit code or signal), oldest first, with what a fault
    /// announced by [`Host::expect_exit`] marked as expected.
    pub fn exits(&self) -> Vec<(String, bool)> {
        self.node.exits()
    }

    /// While set, the node's own end is not a violation (a failing disk makes it stop, as it must).
    pub fn expect_exit(&self, expected: bool) {
        self.node.expect_exit(expected);
    }

    /// Environment for the next starts (clock library, mutants).
    pub fn set_environment(&self, key: &str, value: Option<&str>) {
        self.node.set_environment(key, value);
    }

    /// What the node says of itself.
    pub async fn status(&self) -> anyhow::Result<Status> {
        let status = ask::status(&self.client_url()).await?;
        self.member_id.store(status.member, Ordering::Relaxed);
        Ok(status)
    }

    /// A linearizable read through this node; gives the store's revision.
    pub async fn read(&self) -> anyhow::Result<i64> {
        ask::read(&self.client_url()).await
    }

    /// What the node wrote since its log was `from` bytes long.
    pub fn log_since(&self, from: u64) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(text.len());
        String::from_utf8_lossy(&text[from..]).into_owned()
    }

    /// How long its log is.
    pub fn log_bytes(&self) -> u64 {
        std::fs::metadata(&self.log).map_or(0, |metadata| metadata.len())
    }

    /// Loses everything that was not synced: SIGKILL, shut the filesystem down without flushing its
    /// journal, mount it again. The node is left stopped. Says how it was seen.
    pub async fn power_fail(&self) -> anyhow::Result<String> {
        self.kill().await?;
        self.disk.power_fail().await.with_context(|| format!("the power failure of {}", self.name))
    }

    /// An empty disk again. The node must be stopped.
    pub async fn wipe(&self) -> anyhow::Result<()> {
        if let Running::Yes { pid } = self.running() {
            bail!("{} still runs as {pid}; its disk cannot be wiped", self.name);
        }
        self.disk.wipe().await.with_context(|| format!("wiping {}", self.name))
    }

    /// Its disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Puts its node, and those started later, into a control group of its own.
    pub fn enter_group(&self) -> anyhow::Result<cgroup::Group> {
        let group = cgroup::Group::make(&self.run, &self.name)?;
        self.node.set_group(Some(group.clone()))?;
        Ok(group)
    }

    /// Waits until the node serves linearizable reads; starts it when it does not run.
    async fn settle(&self, deadline: Instant) -> anyhow::Result<()> {
        let mut restarts = 0;
        loop {
            if self.running() == Running::No {
                ensure!(restarts < 3, "it ended {restarts} times: {:?}", self.exits().last());
                restarts += 1;
                self.start().await?;
            }
            let error = match self.read().await {
                // Hearing its id makes the leader known by host.
                Ok(_) => match self.status().await {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(error.context("it does not serve"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
