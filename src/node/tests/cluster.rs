//! Nodes on temporary directories, to be started, crashed and wiped.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::super::*;
use super::network::{Dial, Network, NetworkTransport};
use crate::env::SystemEnv;
use crate::mvcc::{Marks, range};
use crate::raft::Fatal;
use crate::storage::{DataDirOptions, StateOptions};
use crate::types::{KeyRange, Put, RangeQuery};
use crate::watch::HubOptions;

/// How long anything may take that is only waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const ELECTION_TIMEOUT: Duration = Duration::from_millis(500);

pub struct Cluster {
    pub network: Arc<Network>,
    root: tempfile::TempDir,
    initial: Vec<InitialMember>,
    bootstraps: BTreeMap<String, Bootstrap>,
    nodes: BTreeMap<String, Node>,
    pub quota_bytes: u64,
}

fn url(name: &str) -> String {
    format!("http://{name}")
}

impl Cluster {
    pub fn prepare(count: usize) -> Cluster {
        let names = (1..=count).map(|number| format!("n{number}"));
        let initial: Vec<InitialMember> =
            names.map(|name| InitialMember { peer_urls: vec![url(&name)], name }).collect();
        Cluster {
            network: Arc::default(),
            root: tempfile::tempdir().unwrap(),
            initial,
            bootstraps: BTreeMap::new(),
            nodes: BTreeMap::new(),
            quota_bytes: 0,
        }
    }

    pub async fn start(count: usize) -> Cluster {
        let mut cluster = Cluster::prepare(count);
        cluster.open_all().await;
        cluster
    }

    pub async fn open_all(&mut self) {
        for member in self.initial.clone() {
            self.reopen(&member.name).await.unwrap();
        }
        self.leader().await;
    }

    pub fn names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    pub fn node(&self, name: &str) -> &Node {
        &self.nodes[name]
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub async fn leader(&self) -> String {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let leading = self.nodes.iter().find(|(_, node)| node.leadership().here);
            if let Some((name, _)) = leading {
                return name.clone();
            }
            assert!(tokio::time::Instant::now() < deadline, "nobody leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts a node on whatever its directory holds.
    pub async fn reopen(&mut self, name: &str) -> Result<(), NodeError> {
        let initial = Bootstrap::Initial { members: self.initial.clone(), token: "test".to_owned() };
        let known = self.initial.iter().any(|member| member.name == name);
        let bootstrap = self.bootstraps.get(name).cloned().unwrap_or(if known {
            initial
        } else {
            let own = InitialMember { name: name.to_owned(), peer_urls: vec![url(name)] };
            Bootstrap::Initial { members: vec![own], token: "test".to_owned() }
        });
        let options = NodeOptions {
            name: name.to_owned(),
            data_dir: self.dir(name),
            peer_urls: vec![url(name)],
            client_urls: vec![format!("http://{name}-clients")],
            bootstrap,
            heartbeat_interval: Duration::from_millis(50),
            election_timeout: ELECTION_TIMEOUT,
            quota_bytes: self.quota_bytes,
            disk_reserve_bytes: 0,
            state: StateOptions {
                block_cache_bytes: 4 << 20,
                record_cache_bytes: 4 << 20,
                write_buffer_bytes: 4 << 20,
            },
            ..NodeOptions::default()
        };
        let network = self.network.clone();
        let node = Node::start(NodeParts {
            options,
            env: SystemEnv::shared(),
            fatal: Fatal::new(|_| {}),
            transport: Box::new(|_| Arc::new(NetworkTransport(network))),
            dialer: Arc::new(Dial { network: self.network.clone(), own: url(name) }),
            watch: HubOptions::default(),
            data_dir: DataDirOptions { ballast_bytes: 0 },
            inline: false,
            log: None,
        })
        .await?;
        self.network.attach(&url(name), &node);
        node.run();
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    pub async fn join(&mut self, name: &str, kind: MemberKind, through: &str) -> Result<(), NodeError> {
        self.bootstraps.insert(name.to_owned(), Bootstrap::Join { addresses: vec![url(through)], kind });
        self.reopen(name).await
    }

    pub async fn claim(&mut self, name: &str) -> Result<(), NodeError> {
        let own = InitialMember { name: name.to_owned(), peer_urls: vec![url(name)] };
        let members = self.initial.iter().cloned().chain([own]).collect();
        self.bootstraps.insert(name.to_owned(), Bootstrap::Existing { members });
        self.reopen(name).await
    }

    /// Stops a node in order.
    pub async fn stop_node(&mut self, name: &str) {
        if let Some(node) = self.nodes.remove(name) {
            node.stop().await;
            self.network.detach(&url(name));
        }
    }

    /// Cuts a node off from everybody, then ends it: nobody hears a farewell.
    pub async fn crash(&mut self, name: &str) {
        self.network.detach(&url(name));
        if let Some(node) = self.nodes.remove(name) {
            node.inner.core.exit.announce(ExitReason::Failed("as the test wants".to_owned()));
            node.stop().await;
        }
    }

    pub fn wipe(&self, name: &str) {
        std::fs::remove_dir_all(self.dir(name)).unwrap();
    }

    pub async fn save_snapshot(&self, name: &str) -> PathBuf {
        let mut snapshot = self.node(name).snapshot_file().await.unwrap();
        let path = self.root.path().join("snapshot");
        let whole = std::iter::from_fn(|| snapshot.next().unwrap()).collect::<Vec<_>>().concat();
        assert_eq!(whole.len() as u64, snapshot.size_bytes());
        std::fs::write(&path, whole).unwrap();
        path
    }

    pub async fn stop(mut self) {
        for name in self.names() {
            self.stop_node(&name).await;
        }
    }
}

pub fn put_operation(key: &str, value: &str) -> Operation {
    Operation::Put(Put {
        space: Space::User,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

pub async fn put(node: &Node, key: &str, value: &str) {
    let reply = node.propose(put_operation(key, value), ProposeContext::default()).await.unwrap();
    reply.outcome.unwrap();
}

pub async fn put_with_lease(node: &Node, key: &str, lease: LeaseId) {
    let Operation::Put(put) = put_operation(key, "v") else { unreachable!() };
    let operation = Operation::Put(Put { lease, ..put });
    node.propose(operation, ProposeContext::default()).await.unwrap().outcome.unwrap();
}

/// What this node's view holds.
pub fn get(node: &Node, key: &str) -> Option<String> {
    let view = node.view();
    let marks = Marks { revision: view.revision, compacted: view.compacted_user };
    let query = RangeQuery::all(Space::User, KeyRange::Single(Bytes::copy_from_slice(key.as_bytes())));
    let found = range(&view.data, marks, &query, 1 << 20).unwrap();
    found.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned())
}

/// Waits until something holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
