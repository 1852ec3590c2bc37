//! The hosts: each a network namespace, a disk of its own and one node process.
//!
//! The harness runs in namespaces of its own (network, mounts, processes), so
//! that everything it made goes with it, however it ends. Clients run where the
//! harness runs: on the switch, outside every host.

use std::path::PathBuf;
use std::time::Duration;

/// All hosts of a run, in the order of their names: host 0 is `n1`.
pub struct Hosts {
    pub hosts: Vec<Host>,
}

/// One host. Methods take `&self`: a host guards its own state.
pub struct Host {
    pub index: usize,
    /// `n1`, `n2`, ...
    pub name: String,
    pub ip: std::net::Ipv4Addr,
    /// Where its disk is mounted; the node's data directory is `data` below it.
    pub mount: PathBuf,
    /// What the node wrote to stdout and stderr, over all of its starts.
    pub log: PathBuf,
}

/// Whether a host's node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// Alive (or stopped by SIGSTOP) under this process id.
    Yes { pid: u32 },
    /// Ended, by the harness or by itself.
    No,
}

impl Host {
    /// `http://ip:2379`.
    pub fn client_url(&self) -> String {
        format!("http://{}:2379", self.ip)
    }
}

/// How long a node may take from its start until it serves.
pub const START_TIME_MAX: Duration = Duration::from_secs(30);

impl Hosts {
    /// Makes `count` hosts (bridge, namespaces, disks), starts no node yet. At most 5 hosts begin as
    /// members; `spare` more are prepared for nodes that join later.
    pub async fn create(_count: usize, _spare: usize, _binary: PathBuf) -> anyhow::Result<Hosts> {
        todo!()
    }

    /// Starts every member's node and waits until all serve and know one leader.
    pub async fn start_all(&self) -> anyhow::Result<()> {
        todo!()
    }

    /// Client addresses of the hosts, in their order (spares included).
    pub fn client_urls(&self) -> Vec<String> {
        self.hosts.iter().map(Host::client_url).collect()
    }

    /// The index of the host whose node leads, by asking all running nodes; the answer of the highest term wins.
    pub async fn leader(&self) -> Option<usize> {
        todo!()
    }

    /// Indices of the hosts that are members now (grows and shrinks with membership faults).
    pub fn members(&self) -> Vec<usize> {
        todo!()
    }

    /// Records that a host's node became a member, or no longer is one.
    pub fn set_member(&self, _index: usize, _member: bool) {
        todo!()
    }

    /// Waits until every member serves linearizable reads, starting those that do not run.
    pub async fn settle(&self, _within: Duration) -> anyhow::Result<()> {
        todo!()
    }
}

impl Host {
    /// Starts the node as a member of the first cluster, or again with what its disk holds; extra flags and
    /// environment as given by [`Host::set_environment`].
    pub async fn start(&self) -> anyhow::Result<()> {
        todo!()
    }

    /// Starts the node with an empty disk as one that joins the cluster reached at `endpoints`.
    pub async fn start_joining(&self, _endpoints: &[String]) -> anyhow::Result<()> {
        todo!()
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&self) -> anyhow::Result<()> {
        todo!()
    }

    /// SIGTERM, and waits for the end; returns the exit code.
    pub async fn terminate(&self, _within: Duration) -> anyhow::Result<i32> {
        todo!()
    }

    pub fn pause(&self) -> anyhow::Result<()> {
        todo!()
    }

    pub fn resume(&self) -> anyhow::Result<()> {
        todo!()
    }

    pub fn running(&self) -> Running {
        todo!()
    }

    /// How the node ended when it ended by itself (exit code or signal), oldest first, with what a fault
    /// announced by [`Host::expect_exit`] marked as expected.
    pub fn exits(&self) -> Vec<(String, bool)> {
        todo!()
    }

    /// While set, the node's own end is not a violation (a failing disk makes it stop, as it must).
    pub fn expect_exit(&self, _expected: bool) {
        todo!()
    }

    /// Environment for the next starts (clock library, mutants).
    pub fn set_environment(&self, _key: &str, _value: Option<&str>) {
        todo!()
    }

    /// Loses everything that was not synced: SIGKILL, shut the filesystem down without flushing its
    /// journal, mount it again. The node is left stopped.
    pub async fn power_fail(&self) -> anyhow::Result<()> {
        todo!()
    }

    /// An empty disk again. The node must be stopped.
    pub async fn wipe(&self) -> anyhow::Result<()> {
        todo!()
    }
}
