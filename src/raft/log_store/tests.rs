//! The log store over both engines: openraft's own suite, what a restart and a
//! crash leave, and that a stream ends when the leader changes.

use futures_util::TryStreamExt;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::type_config::alias::SnapshotOf;
use proptest::prelude::*;

use super::super::types::{CommittedLeaderId, EntryPayload, Proposal, SnapshotMeta, StoredMembership};
use super::*;
use crate::env::SystemEnv;
use crate::storage::log::{FatalHook, MemoryLog, SegmentLog, SegmentLogOptions};
use crate::types::{Outcome, Reply, Revision};

/// The least state machine that the suite accepts: it remembers what it was given.
#[derive(Default, Clone)]
struct Remembers {
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<SnapshotMeta>,
    built: Arc<Mutex<Option<SnapshotMeta>>>,
}

impl RaftSnapshotBuilder<TypeConfig> for Remembers {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, ()>, io::Error> {
        let meta = SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        *self.built.lock() = Some(meta.clone());
        Ok(openraft::Snapshot { meta, snapshot: () })
    }
}

impl RaftStateMachine<TypeConfig> for Remembers {
    type SnapshotData = ();
    type SnapshotBuilder = Remembers;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            self.applied = Some(entry.log_id);
            if let EntryPayload::Membership(membership) = entry.payload {
                self.membership = StoredMembership::new(self.applied, membership);
            }
            if let Some(responder) = responder {
                responder.send(Reply { revision: Revision::FIRST, outcome: Ok(Outcome::Done) });
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Remembers {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _snapshot: ()) -> Result<(), io::Error> {
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.snapshot = Some(meta.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<TypeConfig, ()>>, io::Error> {
        let meta = self.snapshot.clone().or_else(|| self.built.lock().clone());
        Ok(meta.map(|meta| openraft::Snapshot { meta, snapshot: () }))
    }
}

fn no_failure() -> FatalHook {
    Arc::new(|error| panic!("the log failed: {error}"))
}

/// With a tail so small that reads go to the engine as well.
fn options() -> LogStoreOptions {
    LogStoreOptions { tail_bytes: 150, unflushed_bytes_max: 1 << 20 }
}

fn on_disk(path: &std::path::Path) -> Arc<SegmentLog> {
    Arc::new(
        SegmentLog::open(path, &SegmentLogOptions::default(), SystemEnv::shared(), no_failure()).unwrap(),
    )
}

struct InMemory;

impl StoreBuilder<TypeConfig, LogStore, Remembers> for InMemory {
    async fn build(&self) -> Result<((), LogStore, Remembers), openraft::StorageError<TypeConfig>> {
        let engine = Arc::new(MemoryLog::new(no_failure()));
        Ok(((), LogStore::open(engine, &options(), None).unwrap(), Remembers::default()))
    }
}

struct OnDisk;

impl StoreBuilder<TypeConfig, LogStore, Remembers, tempfile::TempDir> for OnDisk {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, LogStore, Remembers), openraft::StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = LogStore::open(on_disk(dir.path()), &options(), None).unwrap();
        Ok((dir, store, Remembers::default()))
    }
}

#[tokio::test]
async fn openraft_accepts_the_log_in_memory() {
    Suite::test_all(InMemory).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openraft_accepts_the_log_on_disk() {
    Suite::test_all(OnDisk).await.unwrap();
}

fn id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId { term, node_id: 1 }, index)
}

fn command(term: u64, index: u64, bytes: usize) -> Entry {
    let body = vec![index as u8; bytes].into();
    Entry { log_id: id(term, index), payload: EntryPayload::Normal(Proposal { time_ms: index, body }) }
}

fn commands(term: u64, indexes: Range<u64>) -> Vec<Entry> {
    indexes.map(|index| command(term, index, 20)).collect()
}

async fn append(store: &mut LogStore, entries: Vec<Entry>) {
    let (tell, told) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(tell)).await.unwrap();
    told.await.unwrap().unwrap();
}

async fn indexes(store: &LogStore) -> Vec<u64> {
    let entries = store.reader().try_get_log_entries(..).await.unwrap();
    entries.iter().map(|entry| entry.log_id.index).collect()
}

#[tokio::test]
async fn what_was_saved_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let vote = Vote::new_committed(3, 1);
    {
        let mut store = LogStore::open(on_disk(dir.path()), &options(), None).unwrap();
        append(&mut store, commands(1, 0..20)).await;
        store.truncate_after(Some(id(1, 11))).await.unwrap();
        append(&mut store, commands(3, 12..15)).await;
        store.purge(id(1, 4)).await.unwrap();
        store.save_committed(Some(id(3, 13))).await.unwrap();
        store.save_vote(&vote).await.unwrap();
    }
    let mut store = LogStore::open(on_disk(dir.path()), &options(), Some(7)).unwrap();
    let state = store.get_log_state().await.unwrap();
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(1, 4)), Some(id(3, 14))));
    assert_eq!(store.read_committed().await.unwrap(), Some(id(3, 13)));
    assert_eq!(store.reader().read_vote().await.unwrap(), Some(vote));
    let expected: Vec<Entry> = commands(1, 5..12).into_iter().chain(commands(3, 12..15)).collect();
    assert_eq!(store.reader().try_get_log_entries(..).await.unwrap(), expected);
}

#[tokio::test]
async fn a_purge_beyond_the_end_empties_the_log_and_it_goes_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    {
        let mut store = LogStore::open(on_disk(dir.path()), &options(), None).unwrap();
        append(&mut store, commands(1, 0..5)).await;
        store.purge(id(2, 99)).await.unwrap();
        assert!(indexes(&store).await.is_empty());
        append(&mut store, commands(2, 100..102)).await;
    }
    let mut store = LogStore::open(on_disk(dir.path()), &options(), Some(99)).unwrap();
    assert_eq!(indexes(&store).await, [100, 101]);
    assert_eq!(store.get_log_state().await.unwrap().last_purged_log_id, Some(id(2, 99)));
}

#[tokio::test]
async fn what_was_committed_is_never_ahead_of_the_log() {
    let engine = Arc::new(MemoryLog::new(no_failure()));
    let mut store = LogStore::open(engine.clone(), &options(), None).unwrap();
    append(&mut store, commands(1, 0..3)).await;
    store.save_committed(Some(id(1, 9))).await.unwrap();
    drop(store);
    let mut store = LogStore::open(engine, &options(), None).unwrap();
    assert_eq!(store.read_committed().await.unwrap(), Some(id(1, 2)));
}

#[tokio::test]
async fn a_limited_read_is_bounded_and_never_empty() {
    let engine = Arc::new(MemoryLog::new(no_failure()));
    let mut store = LogStore::open(engine, &LogStoreOptions::default(), None).unwrap();
    append(&mut store, (0..5).map(|index| command(1, index, 600 << 10)).collect()).await;
    append(&mut store, vec![command(1, 5, 3 << 20)]).await;
    let mut reader = store.reader();
    assert_eq!(reader.limited_get_log_entries(0, 6).await.unwrap().len(), 2);
    assert_eq!(reader.limited_get_log_entries(5, 6).await.unwrap().len(), 1);
    let all: Vec<Entry> = reader.entries_stream(0..6).await.try_collect().await.unwrap();
    assert_eq!(all.len(), 6);
}

#[tokio::test]
async fn a_stream_ends_when_the_leader_changes_between_two_steps() {
    let engine = Arc::new(MemoryLog::new(no_failure()));
    let mut store = LogStore::open(engine, &LogStoreOptions::default(), None).unwrap();
    let vote = Vote::new_committed(1, 1);
    store.save_vote(&vote).await.unwrap();
    append(&mut store, (0..4).map(|index| command(1, index, 600 << 10)).collect()).await;
    let mut reader = store.reader();
    let mut stream = std::pin::pin!(reader.leader_bounded_stream(*vote.leader_id(), 0..4).await);
    stream.try_next().await.unwrap().unwrap();
    stream.try_next().await.unwrap().unwrap();
    store.save_vote(&Vote::new(2, 2)).await.unwrap();
    let ended = stream.try_next().await;
    assert!(matches!(ended, Err(LeaderBoundedStreamError::LeaderChanged(_))), "{ended:?}");
}

#[tokio::test]
async fn entries_are_readable_before_they_are_durable_and_called_back_after() {
    let engine = Arc::new(MemoryLog::new(no_failure()));
    engine.sync_when_told();
    let mut store = LogStore::open(engine.clone(), &options(), None).unwrap();
    let (tell, mut told) = TypeConfig::oneshot();
    store.append(commands(1, 0..50), IOFlushed::signal(tell)).await.unwrap();
    assert_eq!(indexes(&store).await, (0..50).collect::<Vec<u64>>());
    assert!(told.try_recv().is_err());
    engine.sync(1);
    told.try_recv().unwrap().unwrap();
}

#[tokio::test]
async fn a_failed_disk_is_told_to_everyone_who_waits() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let hook: FatalHook = {
        let told = told.clone();
        Arc::new(move |error| told.lock().push(error.to_string()))
    };
    let engine = Arc::new(MemoryLog::new(hook));
    engine.sync_when_told();
    let mut store = LogStore::open(engine.clone(), &options(), None).unwrap();
    let (tell, waits) = TypeConfig::oneshot();
    store.append(commands(1, 0..2), IOFlushed::signal(tell)).await.unwrap();
    engine.fail(StorageError::Refused("the disk is gone".to_owned()));
    assert!(waits.await.unwrap().is_err());
    assert!(store.save_vote(&Vote::new(2, 1)).await.is_err());
    assert_eq!(*told.lock(), ["the disk is gone"]);
}

#[derive(Clone, Debug)]
enum Step {
    Append(u64),
    Truncate(u64),
    Purge(u64),
    Vote,
    Sync(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1u64..5).prop_map(Step::Append),
        1 => (1u64..4).prop_map(Step::Truncate),
        1 => (0u64..6).prop_map(Step::Purge),
        1 => Just(Step::Vote),
        3 => (1usize..4).prop_map(Step::Sync),
    ];
    proptest::collection::vec(step, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever the moment of the crash, and whatever unsynced writes survive it.
    #[test]
    fn what_was_called_back_survives_a_crash_and_leaves_no_hole(steps in steps(), surviving in 0usize..5) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(crash_case(steps, surviving))?;
    }
}

async fn crash_case(steps: Vec<Step>, surviving: usize) -> Result<(), TestCaseError> {
    let engine = Arc::new(MemoryLog::new(no_failure()));
    engine.sync_when_told();
    let mut store = LogStore::open(engine.clone(), &options(), None).unwrap();
    // What the log is after each operation that reached the engine, oldest first.
    let mut model: Vec<Entry> = Vec::new();
    let mut begin = 0;
    let mut vote = None;
    let mut history = vec![(begin, model.clone(), vote)];
    let (mut term, mut waiting) = (1, Vec::new());
    for step in steps {
        let end = begin + model.len() as u64;
        match step {
            Step::Append(count) => {
                let entries = commands(term, end..end + count);
                model.extend(entries.clone());
                let (tell, told) = TypeConfig::oneshot();
                store.append(entries, IOFlushed::signal(tell)).await.unwrap();
                waiting.push((history.len(), told));
            }
            Step::Truncate(count) if count < model.len() as u64 => {
                term += 1;
                model.truncate(model.len() - count as usize);
                store.truncate_after(model.last().map(|entry| entry.log_id)).await.unwrap();
            }
            Step::Purge(count) => {
                // Also beyond the end, as after a crash that took the log's tail.
                let upto = begin + count;
                model.retain(|entry| entry.log_id.index > upto);
                begin = upto + 1;
                store.purge(id(term, upto)).await.unwrap();
            }
            Step::Vote => {
                vote = Some(Vote::new(term, history.len() as u64));
                let mut save = std::pin::pin!(store.save_vote(vote.as_ref().unwrap()));
                prop_assert!(futures_util::poll!(save.as_mut()).is_pending(), "a vote was saved unsynced");
                engine.sync(usize::MAX);
                save.await.unwrap();
            }
            Step::Truncate(_) => continue,
            Step::Sync(count) => {
                engine.sync(count);
                continue;
            }
        }
        history.push((begin, model.clone(), vote));
        let read = store.reader().try_get_log_entries(..).await.unwrap();
        prop_assert_eq!(&read, &model, "before the crash");
    }
    let durable = history.len() - 1 - engine.unsynced();
    let kept = (durable + surviving).min(history.len() - 1);
    let called_back = waiting.iter_mut().filter_map(|(at, told)| told.try_recv().ok().map(|_| *at)).max();
    prop_assert!(called_back.unwrap_or(0) <= durable, "called back before it was durable");

    let after = LogStore::open(Arc::new(engine.crash(surviving)), &options(), None).unwrap();
    let (_, expected, vote) = &history[kept];
    prop_assert_eq!(&after.reader().try_get_log_entries(..).await.unwrap(), expected);
    prop_assert_eq!(&after.reader().read_vote().await.unwrap(), vote);
    Ok(())
}
