//! A cluster of three in one process, for tests: the real log, state and
//! snapshots on temporary directories, over whatever carries the calls.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;

use super::*;
use crate::env::{EnvRef, SystemEnv};
use crate::machine::Machine;
use crate::mvcc::{self, Published};
use crate::storage::log::{SegmentLog, SegmentLogOptions};
use crate::storage::snapshot::{SnapshotStore, StoredSnapshot};
use crate::storage::{DataDir, DataDirOptions, StateDb, StateOptions, StorageError, codec};
use crate::types::{Command, KeyRange, LeaseId, Member, NodeId, Operation, Put, RangeQuery, Reply, Space};

pub(crate) const CLUSTER: u64 = 0xc1;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What carries the calls between the nodes of a cluster.
pub(crate) trait Links: Send + Sync + 'static {
    fn transport(&self, directory: Arc<Directory>) -> Arc<dyn Transport>;
    /// Where a node will be reached.
    fn urls(&self, id: NodeId) -> Vec<String>;
    /// A node can be reached from here on.
    fn up(&self, id: NodeId, receiver: Arc<Receiver>);
    /// A node cannot be reached any more.
    fn down(&self, id: NodeId);
    /// Whether nobody reaches a node, though it is up.
    fn is_cut(&self, _id: NodeId) -> bool {
        false
    }
}

/// A network that is a table of receivers, and of cut links.
#[derive(Clone, Default)]
pub(crate) struct Table(Arc<Wire>);

#[derive(Default)]
struct Wire {
    receivers: Mutex<HashMap<NodeId, Arc<Receiver>>>,
    cut: Mutex<HashSet<NodeId>>,
}

impl Wire {
    fn reach(&self, to: &Envelope) -> Result<Arc<Receiver>, PeerError> {
        let cut = self.cut.lock();
        if cut.contains(&to.sender) || cut.contains(&to.target) {
            return Err(PeerError::NotSent("the link is cut".to_owned()));
        }
        let receiver = self.receivers.lock().get(&to.target).cloned();
        let receiver = receiver.ok_or_else(|| PeerError::NotSent("nobody is there".to_owned()))?;
        receiver.check(to)?;
        Ok(receiver)
    }
}

impl Table {
    pub(crate) fn cut(&self, id: NodeId, cut: bool) {
        let mut links = self.0.cut.lock();
        if cut {
            links.insert(id)
        } else {
            links.remove(&id)
        };
    }
}

impl Links for Table {
    fn transport(&self, _: Arc<Directory>) -> Arc<dyn Transport> {
        Arc::new(self.clone())
    }

    fn urls(&self, _: NodeId) -> Vec<String> {
        Vec::new()
    }

    fn up(&self, id: NodeId, receiver: Arc<Receiver>) {
        self.0.receivers.lock().insert(id, receiver);
    }

    fn down(&self, id: NodeId) {
        self.0.receivers.lock().remove(&id);
    }

    fn is_cut(&self, id: NodeId) -> bool {
        self.0.cut.lock().contains(&id)
    }
}

impl Transport for Table {
    fn append(
        &self,
        to: Envelope,
        requests: BoxStream<AppendRequest>,
        _timeout: Duration,
    ) -> PeerFuture<BoxStream<Result<AppendResult, PeerError>>> {
        let wire = self.0.clone();
        async move {
            let receiver = wire.reach(&to)?;
            let answers = receiver.append(requests.map(Ok).boxed());
            let lost = || Err(PeerError::Lost("the link is cut".to_owned()));
            Ok(answers.map(move |answer| wire.reach(&to).map_or_else(|_| lost(), |_| answer)).boxed())
        }
        .boxed()
    }

    fn heartbeat(&self, to: Envelope, request: AppendRequest, _: Duration) -> PeerFuture<AppendResult> {
        let receiver = self.0.reach(&to);
        async move { receiver?.heartbeat(request).await }.boxed()
    }

    fn vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        let receiver = self.0.reach(&to);
        async move { receiver?.vote(request).await }.boxed()
    }

    fn pre_vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        let receiver = self.0.reach(&to);
        async move { receiver?.pre_vote(request).await }.boxed()
    }

    fn transfer_leader(
        &self,
        to: Envelope,
        request: TransferLeaderRequest,
        _: Duration,
    ) -> PeerFuture<TransferLeaderResult> {
        let receiver = self.0.reach(&to);
        async move { receiver?.transfer_leader(request).await }.boxed()
    }

    fn snapshot(
        &self,
        to: Envelope,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
        _: SnapshotTimeouts,
    ) -> PeerFuture<Vote> {
        let receiver = self.0.reach(&to);
        async move { send(&*receiver?, leader, &snapshot).await?.install().await }.boxed()
    }

    fn call(&self, to: Envelope, _: &'static str, body: Bytes, _: Duration) -> PeerFuture<Bytes> {
        let receiver = self.0.reach(&to);
        async move { receiver.map(|_| body) }.boxed()
    }

    fn call_stream(
        &self,
        to: Envelope,
        _: &'static str,
        bodies: BoxStream<Bytes>,
        _: Duration,
    ) -> PeerFuture<BoxStream<Result<Bytes, PeerError>>> {
        let receiver = self.0.reach(&to);
        async move { receiver.map(|_| bodies.map(Ok).boxed()) }.boxed()
    }
}

pub(crate) async fn send(
    receiver: &Receiver,
    leader: Vote,
    snapshot: &Arc<StoredSnapshot>,
) -> Result<Reception, PeerError> {
    let mut reception = receiver.begin_snapshot(leader, snapshot.manifest().encode().into()).await?;
    let mut reader = snapshot.reader();
    while let Some(chunk) = reader.next().map_err(|error| PeerError::Disk(error.to_string()))? {
        reception.write(chunk).await?;
    }
    Ok(reception)
}

/// The machine, slow to take a snapshot in.
struct Slow(Machine, Duration);

impl Apply for Slow {
    fn apply(&mut self, entries: Vec<crate::machine::Entry>) -> Result<Vec<Reply>, StorageError> {
        self.0.apply(entries)
    }

    #[expect(clippy::disallowed_methods, reason = "a slow disk holds the applying thread, as this does")]
    fn replace(&mut self, db: StateDb) -> Result<(), StorageError> {
        std::thread::sleep(self.1);
        self.0.replace(db)
    }
}

pub(crate) struct Node {
    pub handle: RaftHandle,
    pub published: Arc<Published>,
    pub snapshots: Arc<SnapshotStore>,
    pub reader: LogReader,
    pub fatal: Fatal,
}

pub(crate) struct Cluster {
    links: Arc<dyn Links>,
    options: RaftOptions,
    install_takes: Duration,
    pub root: tempfile::TempDir,
    pub nodes: BTreeMap<NodeId, Node>,
}

pub(crate) fn options() -> RaftOptions {
    RaftOptions {
        heartbeat_interval: Duration::from_millis(50),
        election_timeout: Duration::from_millis(500),
        ..RaftOptions::default()
    }
}

impl Cluster {
    pub async fn start(links: Arc<dyn Links>, options: RaftOptions, install_takes: Duration) -> Cluster {
        let root = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { links, options, install_takes, root, nodes: BTreeMap::new() };
        for id in 1..=3 {
            cluster.open(id).await;
        }
        let urls = |id| cluster.links.urls(id);
        let members = (1..=3).map(|id| (id, Member { id, peer_urls: urls(id), ..Member::default() }));
        cluster.nodes[&1].handle.raft().initialize(members.collect::<BTreeMap<_, _>>()).await.unwrap();
        cluster
    }

    pub async fn open(&mut self, id: NodeId) {
        let env: EnvRef = SystemEnv::shared();
        let fatal = Fatal::new(|_| {});
        let path = self.root.path().join(id.to_string());
        let dir = DataDir::open(&path, DataDirOptions { ballast_bytes: 0 }, &env).unwrap();
        let db = StateDb::open(&dir.state_path(), &StateOptions::default()).unwrap();
        let machine = Machine::open(db.clone()).unwrap();
        let published = machine.published();
        let log = SegmentLog::open(
            &dir.raft_path(),
            &SegmentLogOptions::default(),
            env.clone(),
            Arc::new(|error: &StorageError| panic!("the log failed: {error}")),
        );
        let applied = Some(machine.applied()).filter(|at| *at != Default::default()).map(|at| at.index);
        let log_store = LogStore::open(Arc::new(log.unwrap()), &LogStoreOptions::default(), applied).unwrap();
        let snapshots = Arc::new(SnapshotStore::open(&dir.snapshots_path(), CLUSTER).unwrap());
        let idle = Duration::from_secs(5);
        let directory = Arc::<Directory>::default();
        let transport = self.links.transport(directory.clone());
        let peers = Peers::new(
            Local { cluster: CLUSTER, node: id, disk: id + 100 },
            directory,
            transport,
            env.clone(),
            PeerTimeouts {
                append: Duration::from_secs(2),
                snapshot: SnapshotTimeouts { idle, install: Duration::from_secs(20) },
            },
        );
        let reader = log_store.reader();
        let parts = StartParts {
            options: self.options.clone(),
            env,
            fatal: fatal.clone(),
            log_store,
            machine: Box::new(Slow(machine, self.install_takes)),
            db,
            db_options: StateOptions::default(),
            data_dir: Arc::new(dir),
            snapshots: snapshots.clone(),
            peers,
            replay: ReplayLimits::default(),
            inline: false,
        };
        let handle = start(parts).await.unwrap();
        self.links.up(id, handle.receiver().clone());
        handle.run();
        self.nodes.insert(id, Node { handle, published, snapshots, reader, fatal });
    }

    pub async fn stop(&mut self, id: NodeId) {
        self.links.down(id);
        let node = self.nodes.remove(&id).unwrap();
        node.handle.stop().await;
        assert!(!node.fatal.is_raised());
    }

    /// Whoever can write.
    pub async fn put(&self, key: &str, value: &str) -> NodeId {
        let operation = Operation::Put(Put {
            space: Space::User,
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            lease: LeaseId::NONE,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        });
        let body: Bytes = codec::encode(&Command::internal(operation)).into();
        let write = async {
            loop {
                for (id, node) in &self.nodes {
                    if self.links.is_cut(*id) || !node.handle.raft().is_leader() {
                        continue;
                    }
                    let proposal = Proposal { time_ms: 1, body: body.clone() };
                    if node.handle.raft().client_write(proposal).await.is_ok() {
                        return *id;
                    }
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, write).await.expect("somebody leads in time")
    }

    pub async fn applied(&self, id: NodeId, index: u64) {
        let mut applied = self.nodes[&id].published.applied_index();
        let reached = tokio::time::timeout(PATIENCE, applied.wait_for(|at| *at >= index)).await;
        reached.expect("the node catches up in time").unwrap();
    }

    pub fn applied_index(&self, id: NodeId) -> u64 {
        self.nodes[&id].published.view().applied.index
    }

    /// Whether every running node's log begins above `index`.
    pub fn purged(&self, index: u64) -> bool {
        self.nodes.values().all(|node| {
            let purged = node.handle.raft().metrics().borrow_watched().purged;
            purged.is_some_and(|purged| purged.index > index)
        })
    }

    /// All keys and values, as this node has them.
    pub fn content(&self, id: NodeId) -> Vec<(Bytes, Bytes)> {
        let view = self.nodes[&id].published.view();
        let query = RangeQuery::all(Space::User, KeyRange::From(Bytes::from_static(b"\0")));
        let found = mvcc::range(&view.data, view.marks(Space::User), &query, usize::MAX).unwrap();
        found.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect()
    }

    pub async fn stop_all(mut self) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let look = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("{what} did not come true in time"));
}
