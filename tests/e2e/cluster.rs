//! A cluster of real processes: started, broken, restarted and taken down.
//!
//! Ports are allocated, data directories are temporary, readiness is polled
//! with a deadline. A test that fails leaves its directory behind and prints
//! the end of every node's log.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions};
use rustix::process::Signal;

use crate::process::{Process, free_port};
use crate::target::Target;

/// How long a cluster may take until it serves; generous, because the machine may be busy.
pub const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long one test may take.
const TEST_LIMIT: Duration = Duration::from_secs(300);

/// What a cluster is started with.
#[derive(Clone, Debug)]
pub struct Spec {
    /// How many members.
    pub nodes: usize,
    /// Flags every node gets.
    pub flags: Vec<String>,
    /// Environment variables every node gets.
    pub env: Vec<(String, String)>,
    /// The program.
    pub target: Target,
}

impl Spec {
    /// `nodes` members with default settings.
    pub fn nodes(nodes: usize) -> Spec {
        Spec { nodes, flags: Vec::new(), env: Vec::new(), target: Target::get().clone() }
    }

    /// Adds a flag with its value.
    pub fn flag(mut self, name: &str, value: impl ToString) -> Spec {
        self.flags.push(format!("--{name}={}", value.to_string()));
        self
    }

    /// Adds an environment variable.
    pub fn env(mut self, key: &str, value: impl ToString) -> Spec {
        self.env.push((key.into(), value.to_string()));
        self
    }
}

/// One member: where it listens, where its data is, and its process if it runs.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its client port.
    pub client_port: u16,
    /// Its peer port.
    pub peer_port: u16,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Its log file.
    pub log: PathBuf,
    /// The flags it is started with, bootstrap ones included.
    pub flags: Vec<String>,
    /// Environment variables it is started with.
    pub env: Vec<(String, String)>,
    /// The program it runs.
    pub target: Target,
    /// The running process.
    pub process: Option<Process>,
}

impl Node {
    /// A member with ports and directories of its own, not started.
    pub fn new(root: &Path, name: &str, target: &Target) -> Node {
        Node {
            name: name.into(),
            client_port: free_port(),
            peer_port: free_port(),
            data_dir: root.join(name),
            log: root.join(format!("{name}.log")),
            flags: Vec::new(),
            env: Vec::new(),
            target: target.clone(),
            process: None,
        }
    }

    /// `http://` address for clients.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// `http://` address for peers.
    pub fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// Its process id; it must run.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the node runs").pid()
    }

    /// Starts the process; it is not awaited.
    pub fn start(&mut self) {
        let (program, mut args) = self.target.serve();
        args.extend([
            format!("--name={}", self.name),
            format!("--data-dir={}", self.data_dir.display()),
            format!("--listen-client-urls={}", self.url()),
            format!("--advertise-client-urls={}", self.url()),
            format!("--listen-peer-urls={}", self.peer_url()),
            format!("--initial-advertise-peer-urls={}", self.peer_url()),
        ]);
        args.extend(self.flags.iter().cloned());
        let process = Process::start(&program, &args, &self.env, &self.log).expect("the server starts");
        self.process = Some(process);
    }

    /// kill -9; a no-op when it does not run.
    pub fn kill(&mut self) {
        drop(self.process.take());
    }

    /// Sends a signal to the running process.
    pub fn signal(&mut self, signal: Signal) {
        self.process.as_mut().expect("the node runs").signal(signal);
    }

    /// Waits for the process to end by itself.
    pub async fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let status = self.process.as_mut().expect("the node was started").wait(limit).await;
        let status = status.unwrap_or_else(|| panic!("{} still runs after {limit:?}", self.name));
        self.process = None;
        status
    }

    /// Everything it has ever logged.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// A client that speaks to this node alone.
    pub async fn client(&self) -> Client {
        connect(&[self.url()]).await
    }
}

/// A client of these endpoints with deadlines on everything.
pub async fn connect(endpoints: &[String]) -> Client {
    let options = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(3))
        .with_timeout(Duration::from_secs(15));
    Client::connect(endpoints, Some(options)).await.expect("connecting is lazy")
}

/// A client without a deadline per call, for streams and for calls that wait.
pub async fn connect_patient(endpoints: &[String]) -> Client {
    let options = ConnectOptions::new().with_connect_timeout(Duration::from_secs(3));
    Client::connect(endpoints, Some(options)).await.expect("connecting is lazy")
}

/// A running cluster. Dropping it kills every process.
#[derive(Debug)]
pub struct Cluster {
    /// The members, in the order of their names.
    pub nodes: Vec<Node>,
    /// The directory of everything it has.
    pub root: PathBuf,
    flags: Vec<String>,
    env: Vec<(String, String)>,
    _permit: Permit,
}

impl Cluster {
    /// The nodes with their flags, not started.
    pub fn prepare(spec: Spec, permit: Permit) -> Cluster {
        let root = fresh_root();
        let mut nodes: Vec<Node> =
            (1..=spec.nodes).map(|i| Node::new(&root, &format!("n{i}"), &spec.target)).collect();
        let members: Vec<String> = nodes.iter().map(|n| format!("{}={}", n.name, n.peer_url())).collect();
        let token = root.file_name().expect("made from a name").to_string_lossy().into_owned();
        for node in &mut nodes {
            node.flags = vec![
                format!("--initial-cluster={}", members.join(",")),
                "--initial-cluster-state=new".into(),
                format!("--initial-cluster-token={token}"),
            ];
            node.flags.extend(spec.flags.iter().cloned());
            node.env = spec.env.clone();
        }
        Cluster { nodes, root, flags: spec.flags, env: spec.env, _permit: permit }
    }

    /// Starts every node that does not run.
    pub fn start_all(&mut self) {
        for node in self.nodes.iter_mut().filter(|node| node.process.is_none()) {
            node.start();
        }
    }

    /// kill -9 of every node.
    pub fn kill_all(&mut self) {
        self.nodes.iter_mut().for_each(Node::kill);
    }

    /// Waits until every started node has a leader and answers a linearizable read.
    pub async fn wait_ready(&mut self) {
        for i in 0..self.nodes.len() {
            if self.nodes[i].process.is_some() {
                self.wait_node_ready(i).await;
            }
        }
    }

    /// Waits until one node has a leader and answers a linearizable read.
    pub async fn wait_node_ready(&mut self, i: usize) {
        let deadline = Instant::now() + READY_LIMIT;
        let mut client = self.nodes[i].client().await;
        loop {
            let node = &mut self.nodes[i];
            if let Some(process) = node.process.as_mut()
                && let Some(status) = process.try_wait()
            {
                panic!(
                    "{} ended with {status} before it was ready:\n{}",
                    node.name,
                    tail(&node.log_text(), 30)
                );
            }
            let last = match tokio::time::timeout(Duration::from_secs(3), ready(&mut client)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => "no answer in 3 s".into(),
            };
            assert!(Instant::now() < deadline, "{} is not ready: {last}", self.nodes[i].name);
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Client addresses of all nodes.
    pub fn endpoints(&self) -> Vec<String> {
        self.nodes.iter().map(Node::url).collect()
    }

    /// A client that speaks to one node alone.
    pub async fn client(&self, i: usize) -> Client {
        self.nodes[i].client().await
    }

    /// Member id of a node.
    pub async fn member_id(&self, i: usize) -> u64 {
        let status = self.client(i).await.status().await.expect("the node answers");
        status.header().expect("every answer has one").member_id()
    }

    /// Which node leads, polled until one does.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            for (i, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.process.is_some()) {
                let call = async { node.client().await.status().await };
                if let Ok(Ok(status)) = tokio::time::timeout(Duration::from_secs(2), call).await
                    && status.leader() != 0
                    && status.leader() == status.header().expect("every answer has one").member_id()
                {
                    return i;
                }
            }
            assert!(Instant::now() < deadline, "no leader");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// A running node that does not lead.
    pub async fn follower(&self) -> usize {
        let leader = self.leader().await;
        let other = self.nodes.iter().enumerate().find(|(i, node)| *i != leader && node.process.is_some());
        other.expect("more than one node runs").0
    }

    /// A further node with the cluster's flags and none of the bootstrap ones; not started.
    pub fn extra_node(&mut self, name: &str) -> usize {
        let target = self.nodes[0].target.clone();
        let mut node = Node::new(&self.root, name, &target);
        node.flags = self.flags.clone();
        node.env = self.env.clone();
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Prints what a person needs to see after a failure.
    pub fn print_logs(&self) {
        eprintln!("---- kept for inspection: {} ----", self.root.display());
        for node in &self.nodes {
            eprintln!(
                "---- end of the log of {} ({}) ----\n{}",
                node.name,
                node.url(),
                tail(&node.log_text(), 25)
            );
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            self.print_logs();
        } else {
            let _ = std::fs::remove_dir_all(&self.root);
        }
    }
}

async fn ready(client: &mut Client) -> Result<(), String> {
    let status = client.status().await.map_err(|e| format!("status: {e}"))?;
    if status.leader() == 0 {
        return Err("no leader yet".into());
    }
    client.get("ready?", None).await.map_err(|e| format!("read: {e}"))?;
    Ok(())
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A directory nobody else uses. Those of test processes that are gone, and
/// did not fail, are removed on the way.
pub fn fresh_root() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    let base = BASE.get_or_init(|| {
        let base = std::env::var_os("MAINSTAY_TEST_DIR").map(PathBuf::from);
        let base = base.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("e2e"));
        for old in std::fs::read_dir(&base).into_iter().flatten().flatten() {
            let name = old.file_name().to_string_lossy().into_owned();
            let pid = name.split('-').nth(1).and_then(|pid| pid.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = std::fs::remove_dir_all(old.path());
            }
        }
        base
    });
    let root = base.join(format!("c-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&root).expect("the test directory can be made");
    root
}

// ---- how many clusters may live at once, and the ones that are lent out ----

#[derive(Debug, Default)]
struct Lending {
    alive: usize,
    idle: Vec<Cluster>,
}

fn lending() -> &'static (Mutex<Lending>, Condvar) {
    static LENDING: OnceLock<(Mutex<Lending>, Condvar)> = OnceLock::new();
    LENDING.get_or_init(Default::default)
}

fn limit() -> usize {
    let set = std::env::var("MAINSTAY_TEST_CLUSTERS").ok().and_then(|n| n.parse().ok());
    set.unwrap_or(2).max(1)
}

/// The right to have one cluster alive.
#[derive(Debug)]
pub struct Permit {
    counted: bool,
}

impl Permit {
    /// For a second small cluster of a test that has its permit already.
    pub fn uncounted() -> Permit {
        Permit { counted: false }
    }

    /// Waits for the right. An idle cluster gives up its own.
    pub fn take() -> Permit {
        let (lock, changed) = lending();
        let mut state = lock.lock().unwrap();
        loop {
            if state.alive < limit() {
                state.alive += 1;
                return Permit { counted: true };
            }
            let idle = state.idle.pop();
            state = if idle.is_some() {
                // Dropping it gives its permit back, which takes the lock.
                drop(state);
                drop(idle);
                lock.lock().unwrap()
            } else {
                changed.wait(state).unwrap()
            };
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        let (lock, changed) = lending();
        lock.lock().unwrap().alive -= 1;
        changed.notify_all();
    }
}

/// Runs a test on a borrowed three-node cluster: nobody else uses it meanwhile,
/// but earlier tests have left keys and revisions behind, so the test takes
/// keys under its own prefix. The test must leave all nodes running and healthy.
pub fn on_cluster(test: impl AsyncFnOnce(&mut Cluster)) {
    let (lock, changed) = lending();
    let mut state = lock.lock().unwrap();
    let lent = loop {
        if let Some(idle) = state.idle.pop() {
            break Ok(idle);
        }
        if state.alive < limit() {
            state.alive += 1;
            break Err(Permit { counted: true });
        }
        state = changed.wait(state).unwrap();
    };
    drop(state);
    block_on(async {
        let mut cluster = match lent {
            Ok(cluster) => cluster,
            Err(permit) => {
                let mut cluster = Cluster::prepare(Spec::nodes(3), permit);
                cluster.start_all();
                cluster.wait_ready().await;
                cluster
            }
        };
        test(&mut cluster).await;
        lock.lock().unwrap().idle.push(cluster);
        changed.notify_all();
    });
}

/// Runs a test on a cluster of its own, which it may break.
pub fn on_own_cluster(spec: Spec, test: impl AsyncFnOnce(&mut Cluster)) {
    let permit = Permit::take();
    block_on(async {
        let mut cluster = Cluster::prepare(spec, permit);
        cluster.start_all();
        cluster.wait_ready().await;
        test(&mut cluster).await;
    });
}

/// Runs a test on nodes it starts itself.
pub fn on_prepared(spec: Spec, test: impl AsyncFnOnce(&mut Cluster)) {
    let permit = Permit::take();
    block_on(async {
        let mut cluster = Cluster::prepare(spec, permit);
        test(&mut cluster).await;
    });
}

/// Runs a future on a runtime of its own, with a limit on the whole test.
pub fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(TEST_LIMIT, future).await.expect("the test ends within its limit");
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
}
