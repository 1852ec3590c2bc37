//! The watch room as stories (`testscripts/`) and against a model, over a past
//! that is a list in memory.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::history::{History, Past, PastQuery, Position};
use super::*;
use crate::mvcc::{Published, View};
use crate::storage::StorageError;
use crate::types::{Event, EventKind, KeyValue, LeaseId, RevisionEvents};

/// A store of the user space: what the applying thread and the disk are to the hub.
#[derive(Default)]
struct Feed {
    state: Mutex<FeedState>,
}

#[derive(Default)]
struct FeedState {
    past: Vec<Arc<RevisionEvents>>,
    current: BTreeMap<Bytes, KeyValue>,
    compacted: Revision,
    reads: usize,
}

impl FeedState {
    fn revision(&self) -> Revision {
        Revision(self.past.len() as i64 + 1)
    }
}

impl Feed {
    /// One transaction: puts and deletes (no value), at most one of each key.
    fn write(&self, changes: &[(Bytes, Option<Bytes>)]) -> Arc<RevisionEvents> {
        let mut state = self.state.lock();
        let revision = state.revision().next();
        let mut events = Vec::new();
        for (key, value) in changes {
            let prev = state.current.get(key).cloned();
            let kv = KeyValue {
                key: key.clone(),
                create_revision: prev.as_ref().map_or(revision, |prev| prev.create_revision),
                mod_revision: revision,
                version: prev.as_ref().map_or(1, |prev| prev.version + 1),
                lease: LeaseId::NONE,
                value: value.clone().unwrap_or_default(),
            };
            let kind = match value {
                Some(_) => EventKind::Put,
                None => EventKind::Delete,
            };
            match kind {
                EventKind::Put => state.current.insert(key.clone(), kv.clone()),
                EventKind::Delete => state.current.remove(key),
            };
            events.push(Arc::new(Event { space: Space::User, kind, kv, prev }));
        }
        let revision = Arc::new(RevisionEvents { revision, events });
        state.past.push(revision.clone());
        revision
    }
}

impl History for Feed {
    fn position(&self, _space: Space) -> Position {
        let state = self.state.lock();
        Position { revision: state.revision(), compacted: state.compacted }
    }

    fn read(&self, query: &PastQuery) -> Result<Past, StorageError> {
        let mut state = self.state.lock();
        state.reads += 1;
        if query.from < state.compacted {
            return Ok(Past::Compacted(state.compacted));
        }
        let (mut found, mut bytes, mut next) = (Vec::new(), 0, query.from);
        for revision in state.past.iter().filter(|revision| revision.revision >= query.from) {
            if bytes >= query.budget_bytes {
                break;
            }
            next = revision.revision.next();
            let wanted = revision.events.iter().filter(|event| query.range.contains(&event.kv.key));
            let events: Vec<_> = wanted.cloned().collect();
            bytes += events.iter().map(|event| event.kv.key.len() + event.kv.value.len() + 50).sum::<usize>();
            if !events.is_empty() {
                found.push(RevisionEvents { revision: revision.revision, events });
            }
        }
        Ok(Past::Events(found, next))
    }
}

fn small_options() -> HubOptions {
    HubOptions {
        ring_bytes_max: 16 << 10,
        message_bytes: 700,
        fragment_bytes: 500,
        inline_reads: true,
        ..HubOptions::default()
    }
}

/// What the stream says without waiting for anybody.
fn poll(stream: &mut WatchStream) -> Option<WatchMessage> {
    // A turn given to others shows as a pause, so it asks more than once.
    (0..3).find_map(|_| stream.next().now_or_never().flatten())
}

/// Runs a script's commands.
struct Runner {
    feed: Arc<Feed>,
    hub: Arc<Hub>,
    streams: BTreeMap<String, WatchStream>,
    /// Whether the hub's task is kept from running.
    held: bool,
}

impl Runner {
    fn new() -> Runner {
        let feed = Arc::new(Feed::default());
        let hub = Hub::over(feed.clone(), small_options());
        Runner { feed, hub, streams: BTreeMap::new(), held: false }
    }

    fn stream(&mut self, name: Option<&String>) -> &mut WatchStream {
        let name = name.cloned().unwrap_or_default();
        self.streams.entry(name).or_insert_with(|| self.hub.stream())
    }

    fn run_hub(&self) {
        while !self.held && self.hub.match_batch() {}
    }

    fn say(message: &WatchMessage, output: &mut String) -> std::fmt::Result {
        write!(output, "{} @{} ", message.watch_id, message.revision)?;
        match &message.kind {
            WatchMessageKind::Created => writeln!(output, "created"),
            WatchMessageKind::Canceled => writeln!(output, "canceled"),
            WatchMessageKind::Progress => writeln!(output, "progress"),
            WatchMessageKind::Refused(reason) => writeln!(output, "refused: {reason}"),
            WatchMessageKind::Compacted { compact_revision } => {
                writeln!(output, "compacted at {compact_revision}")
            }
            WatchMessageKind::Events { events, prev_kv, fragment } => {
                let text = |bytes: &Bytes| {
                    let text = String::from_utf8_lossy(bytes).into_owned();
                    if text.len() > 20 { format!("({} bytes)", text.len()) } else { text }
                };
                for event in events {
                    let event = event.event();
                    write!(output, "[{} ", event.kv.mod_revision)?;
                    match event.kind {
                        EventKind::Put => {
                            write!(output, "{}={}", text(&event.kv.key), text(&event.kv.value))?
                        }
                        EventKind::Delete => write!(output, "{} deleted", text(&event.kv.key))?,
                    }
                    if let Some(prev) = event.prev.as_ref().filter(|_| *prev_kv) {
                        write!(output, " was {}", text(&prev.value))?;
                    }
                    write!(output, "] ")?;
                }
                writeln!(output, "{}", if *fragment { "more" } else { "" })
            }
        }
    }
}

#[derive(goldenscript::Command)]
enum Command {
    /// One transaction: `put a=1 b=2`; the value `-` deletes.
    Put(Vec<(String, String)>),
    /// As many single puts of a key as told, with values of some length.
    Fill {
        key: String,
        count: usize,
        #[arg(key, optional)]
        length: usize,
    },
    /// As `put`, but as part of a snapshot: only the disk has it.
    Install(Vec<(String, String)>),
    Compact(i64),
    /// Watches a key, or with `to` a range (`to=end`: without end).
    Watch {
        key: String,
        #[arg(key)]
        stream: Option<String>,
        #[arg(key)]
        id: Option<i64>,
        #[arg(key)]
        to: Option<String>,
        #[arg(key, optional)]
        start: i64,
        /// Any of: prev, noput, nodelete, notify, fragment, joined by commas.
        #[arg(key, optional)]
        with: String,
    },
    Cancel {
        id: i64,
        #[arg(key)]
        stream: Option<String>,
    },
    /// Asks for progress of the stream.
    Progress {
        #[arg(key)]
        stream: Option<String>,
    },
    /// Says what the stream says, at most so many messages.
    Read {
        count: Option<usize>,
        #[arg(key)]
        stream: Option<String>,
    },
    /// Keeps the hub's task from running until `release`.
    Hold,
    Release,
    /// Lets so many ticks of the progress clock (eight to an interval) pass.
    Tick(u64),
    /// How many reads of the past there were.
    Reads,
    Close,
}

fn pair((key, value): &(String, String)) -> (Bytes, Option<Bytes>) {
    let value = (value != "-").then(|| Bytes::from(value.clone()));
    (Bytes::from(key.clone()), value)
}

impl goldenscript::Runner for Runner {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &goldenscript::Context) -> Result<String, Box<dyn Error>> {
        let mut output = String::new();
        match command {
            Command::Put(pairs) => {
                let events = self.feed.write(&pairs.iter().map(pair).collect::<Vec<_>>());
                self.hub.accept(&[events]);
            }
            Command::Fill { key, count, length } => {
                for number in 0..*count {
                    let value = format!("{number:0>0$}", *length);
                    let events = self.feed.write(&[pair(&(key.clone(), value))]);
                    self.hub.accept(&[events]);
                }
            }
            Command::Install(pairs) => {
                self.feed.write(&pairs.iter().map(pair).collect::<Vec<_>>());
                self.hub.reset();
            }
            Command::Compact(revision) => self.feed.state.lock().compacted = Revision(*revision),
            Command::Watch { key, stream, id, to, start, with } => {
                let key = Bytes::from(key.clone());
                let range = match to.as_deref() {
                    None => KeyRange::Single(key),
                    Some("end") => KeyRange::From(key),
                    Some(to) => KeyRange::Span { start: key, end: Bytes::from(to.to_owned()) },
                };
                let has = |name| with.split(',').any(|word| word == name);
                let spec = WatchSpec {
                    prev_kv: has("prev"),
                    no_put: has("noput"),
                    no_delete: has("nodelete"),
                    progress_notify: has("notify"),
                    fragment: has("fragment"),
                    ..WatchSpec::new(Space::User, range, Revision(*start))
                };
                self.stream(stream.as_ref()).create(*id, spec)?;
            }
            Command::Cancel { id, stream } => self.stream(stream.as_ref()).cancel(*id),
            Command::Progress { stream } => self.stream(stream.as_ref()).request_progress(),
            Command::Read { count, stream } => {
                let stream = self.stream(stream.as_ref());
                for _ in 0..count.unwrap_or(usize::MAX) {
                    let Some(message) = poll(stream) else { break };
                    Runner::say(&message, &mut output)?;
                }
            }
            Command::Hold => self.held = true,
            Command::Release => self.held = false,
            Command::Tick(ticks) => (0..*ticks).for_each(|_| self.hub.on_tick()),
            Command::Reads => {
                writeln!(output, "{}", std::mem::take(&mut self.feed.state.lock().reads))?;
            }
            Command::Close => self.hub.close(),
        }
        self.run_hub();
        Ok(output)
    }
}

fn story(name: &str) {
    let path = std::path::Path::new("src/watch/testscripts").join(name);
    goldenscript::run(&mut Runner::new(), path).unwrap();
}

#[test]
fn story_create() {
    story("create");
}

#[test]
fn story_catch_up() {
    story("catch_up");
}

#[test]
fn story_compact() {
    story("compact");
}

#[test]
fn story_fragment() {
    story("fragment");
}

#[test]
fn story_progress() {
    story("progress");
}

#[test]
fn story_reset() {
    story("reset");
}

/// What the model does.
#[derive(Clone, Debug)]
enum Step {
    /// Keys to put (true) or delete in one transaction.
    Write(BTreeMap<u8, bool>),
    /// The disk alone gets this, then the hub is reset.
    Install(BTreeMap<u8, bool>),
    /// Moves the compact mark this share of the way to the head.
    Compact(u8),
    /// Stream, range, how far back from the head to start, filters.
    Create {
        stream: usize,
        range: (u8, u8),
        start: i64,
        flags: u8,
    },
    Cancel {
        stream: usize,
        id: i64,
    },
    Progress(usize),
    /// The hub's task matches one batch.
    Match,
    Tick,
    /// A client reads so many messages.
    Read(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let keys = || proptest::collection::btree_map(0u8..6, any::<bool>(), 1..4);
    prop_oneof![
        8 => keys().prop_map(Step::Write),
        1 => keys().prop_map(Step::Install),
        1 => any::<u8>().prop_map(Step::Compact),
        3 => (0usize..2, (0u8..6, 0u8..8), -20i64..4, any::<u8>())
            .prop_map(|(stream, range, start, flags)| Step::Create { stream, range, start, flags }),
        1 => (0usize..2, 0i64..8).prop_map(|(stream, id)| Step::Cancel { stream, id }),
        1 => (0usize..2).prop_map(Step::Progress),
        4 => Just(Step::Match),
        1 => Just(Step::Tick),
        4 => (0usize..2, 1usize..5).prop_map(|(stream, count)| Step::Read(stream, count)),
    ]
}

/// What a client knows of one watcher.
struct Seen {
    spec: WatchSpec,
    /// The next revision it may see events of.
    next: Revision,
    /// The part of a message that was received in fragments.
    part: Vec<Arc<WatchEvent>>,
}

struct Model {
    feed: Arc<Feed>,
    hub: Arc<Hub>,
    streams: Vec<(WatchStream, BTreeMap<i64, Seen>)>,
}

impl Model {
    /// The events a watcher must see in `from..to`.
    fn expected(&self, spec: &WatchSpec, from: Revision, to: Revision) -> Vec<Arc<Event>> {
        let state = self.feed.state.lock();
        let revisions = state.past.iter().filter(|past| from <= past.revision && past.revision < to);
        let wanted = |event: &&Arc<Event>| {
            let filtered = match event.kind {
                EventKind::Put => spec.no_put,
                EventKind::Delete => spec.no_delete,
            };
            spec.range.contains(&event.kv.key) && !filtered
        };
        revisions.flat_map(|past| past.events.iter().filter(wanted)).cloned().collect()
    }

    /// One message, checked against everything that was ever written.
    fn read(&mut self, stream: usize) -> bool {
        let Some(message) = poll(&mut self.streams[stream].0) else { return false };
        let (compacted, head) = {
            let state = self.feed.state.lock();
            (state.compacted, state.revision())
        };
        let upto = message.revision.next();
        assert!(upto <= head.next(), "{message:?} is of the future");
        let mut watchers = std::mem::take(&mut self.streams[stream].1);
        match &message.kind {
            WatchMessageKind::Created | WatchMessageKind::Canceled | WatchMessageKind::Refused(_) => {}
            WatchMessageKind::Compacted { compact_revision } => {
                assert!(*compact_revision <= compacted, "{message:?}");
                // A canceled watcher may have had this message in its stream already.
                if let Some(seen) = watchers.remove(&message.watch_id) {
                    assert!(seen.next < *compact_revision, "{message:?} came at {}", seen.next);
                }
            }
            WatchMessageKind::Progress => {
                for (id, seen) in &mut watchers {
                    if *id == message.watch_id || message.watch_id == -1 {
                        let missing = self.expected(&seen.spec, seen.next, upto);
                        assert!(missing.is_empty(), "{message:?} promises watcher {id} {missing:?}");
                        seen.next = seen.next.max(upto);
                    }
                }
            }
            WatchMessageKind::Events { events, fragment, .. } => {
                if let Some(seen) = watchers.get_mut(&message.watch_id) {
                    seen.part.extend(events.iter().cloned());
                    if !fragment {
                        let got: Vec<_> = seen.part.drain(..).map(|event| event.event().clone()).collect();
                        assert_eq!(got, self.expected(&seen.spec, seen.next, upto), "{:?}", seen.spec);
                        seen.next = upto;
                    }
                }
            }
        }
        self.streams[stream].1 = watchers;
        true
    }

    fn step(&mut self, step: Step) {
        let changes = |keys: BTreeMap<u8, bool>| -> Vec<_> {
            let change =
                |(key, put): (u8, bool)| (Bytes::from(vec![key]), put.then(|| vec![b'v'; 90].into()));
            keys.into_iter().map(change).collect()
        };
        match step {
            Step::Write(keys) => {
                let events = self.feed.write(&changes(keys));
                self.hub.accept(&[events]);
            }
            Step::Install(keys) => {
                self.feed.write(&changes(keys));
                self.hub.reset();
            }
            Step::Compact(share) => {
                let mut state = self.feed.state.lock();
                let span = state.revision().0 - state.compacted.0;
                state.compacted = Revision(state.compacted.0 + span * i64::from(share) / 512);
            }
            Step::Create { stream, range: (start_key, end_key), start, flags } => {
                let key = Bytes::from(vec![start_key]);
                let range = match end_key {
                    7 => KeyRange::From(key),
                    6 => KeyRange::Single(key),
                    _ => KeyRange::Span { start: key, end: Bytes::from(vec![end_key]) },
                };
                let head = self.feed.state.lock().revision();
                let start = if start == 0 { 0 } else { (head.0 + start).max(1) };
                let spec = WatchSpec {
                    no_put: flags & 7 == 1,
                    no_delete: flags & 7 == 2,
                    fragment: flags & 8 != 0,
                    prev_kv: flags & 16 != 0,
                    progress_notify: flags & 32 != 0,
                    ..WatchSpec::new(Space::User, range, Revision(start))
                };
                let next = if start == 0 { head.next() } else { spec.start };
                if let Ok(id) = self.streams[stream].0.create(None, spec.clone()) {
                    self.streams[stream].1.insert(id, Seen { spec, next, part: Vec::new() });
                }
            }
            Step::Cancel { stream, id } => {
                self.streams[stream].0.cancel(id);
                self.streams[stream].1.remove(&id);
            }
            Step::Progress(stream) => self.streams[stream].0.request_progress(),
            Step::Match => drop(self.hub.match_batch()),
            Step::Tick => self.hub.on_tick(),
            Step::Read(stream, count) => drop((0..count).all(|_| self.read(stream))),
        }
    }

    /// In the end everybody has seen everything.
    fn finish(&mut self) {
        while self.hub.match_batch() {}
        for stream in 0..self.streams.len() {
            while self.read(stream) {}
            let head = self.feed.state.lock().revision();
            for (id, seen) in &self.streams[stream].1 {
                let missing = self.expected(&seen.spec, seen.next, head.next());
                assert!(missing.is_empty(), "watcher {id} of stream {stream} never saw {missing:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_watcher_sees_its_events_in_order_once_and_whole(
        steps in proptest::collection::vec(step(), 0..150), ring in 0usize..6000,
    ) {
        let feed = Arc::new(Feed::default());
        let hub = Hub::over(feed.clone(), HubOptions { ring_bytes_max: ring, ..small_options() });
        let streams = (0..2).map(|_| (hub.stream(), BTreeMap::new())).collect();
        let mut model = Model { feed, hub, streams };
        for step in steps {
            model.step(step);
        }
        model.finish();
    }
}

/// The same on real threads: a publisher that never waits, the hub's task, and
/// readers that come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_is_lost_between_threads() {
    const REVISIONS: usize = 4000;
    let feed = Arc::new(Feed::default());
    let options = HubOptions { inline_reads: false, ring_bytes_max: 20_000, ..small_options() };
    let hub = Hub::over(feed.clone(), options);
    let task = tokio::spawn(hub.clone().run());
    let publisher = std::thread::spawn({
        let (feed, hub) = (feed.clone(), hub.clone());
        move || {
            for number in 0..REVISIONS {
                let key = Bytes::from(vec![(number % 7) as u8]);
                hub.accept(&[feed.write(&[(key, Some(Bytes::from_static(b"v")))])]);
                if number % 50 == 0 {
                    std::thread::yield_now();
                }
            }
        }
    });
    let reader = |key: u8, pause: Duration| {
        let hub = hub.clone();
        tokio::spawn(async move {
            let mut stream = hub.stream();
            let range = KeyRange::Span { start: vec![key].into(), end: vec![key + 2].into() };
            stream.create(None, WatchSpec::new(Space::User, range, Revision(2))).unwrap();
            let wanted = |number: &usize| (number % 7) as u8 == key || (number % 7) as u8 == key + 1;
            let mut expected =
                (0..REVISIONS).filter(wanted).map(|number| Revision(number as i64 + 2)).peekable();
            while expected.peek().is_some() {
                let message = stream.next().await.unwrap();
                let WatchMessageKind::Events { events, .. } = message.kind else { continue };
                for event in events {
                    assert_eq!(Some(event.event().kv.mod_revision), expected.next());
                }
                tokio::time::sleep(pause).await;
            }
        })
    };
    let readers: Vec<_> = (0..18).map(|n| reader(n % 5, Duration::from_millis(u64::from(n / 6)))).collect();
    for reader in readers {
        tokio::time::timeout(Duration::from_secs(30), reader).await.unwrap().unwrap();
    }
    publisher.join().unwrap();
    hub.close();
    task.await.unwrap().unwrap();
}

/// A failing disk ends the hub's task with the reason, and every stream.
#[tokio::test]
async fn a_failed_read_of_the_past_stops_everything() {
    struct Broken;
    impl History for Broken {
        fn position(&self, _space: Space) -> Position {
            Position { revision: Revision(9), compacted: Revision(0) }
        }
        fn read(&self, _query: &PastQuery) -> Result<Past, StorageError> {
            Err(StorageError::Refused("the disk is gone".to_owned()))
        }
    }
    let hub = Hub::over(Arc::new(Broken), HubOptions::default());
    let task = tokio::spawn(hub.clone().run());
    let mut stream = hub.stream();
    stream.create(None, WatchSpec::new(Space::User, KeyRange::From(Bytes::new()), Revision(2))).unwrap();
    assert!(matches!(stream.next().await.unwrap().kind, WatchMessageKind::Created));
    assert!(stream.next().await.is_none());
    assert!(matches!(task.await.unwrap(), Err(StorageError::Refused(_))));
}

/// Ten thousand streams: what one change costs does not grow with those it does
/// not concern.
#[test]
fn ten_thousand_streams_wake_only_for_what_concerns_them() {
    let feed = Arc::new(Feed::default());
    let hub = Hub::over(feed.clone(), HubOptions { inline_reads: true, ..HubOptions::default() });
    let mut streams: Vec<_> = (0..10_000)
        .map(|number| {
            let mut stream = hub.stream();
            let range = KeyRange::prefix(format!("/{number}/").into());
            stream.create(None, WatchSpec::new(Space::User, range, Revision(0))).unwrap();
            assert!(poll(&mut stream).is_some());
            stream
        })
        .collect();
    hub.accept(&[feed.write(&[("/77/a".into(), Some("v".into()))])]);
    while hub.match_batch() {}
    let spoke: Vec<_> = (0..10_000).filter(|number| poll(&mut streams[*number]).is_some()).collect();
    assert_eq!(spoke, [77]);
}

/// A hub over a state database: single puts of the user space, on disk and published.
pub(crate) struct DiskFeed {
    _dir: tempfile::TempDir,
    db: crate::storage::StateDb,
    published: Arc<Published>,
    pub(crate) hub: Arc<Hub>,
    revision: Revision,
    compacted: Revision,
}

impl DiskFeed {
    pub(crate) fn new(options: HubOptions) -> DiskFeed {
        let dir = tempfile::tempdir().unwrap();
        let db = crate::storage::StateDb::open(dir.path(), &Default::default()).unwrap();
        let published = Arc::new(Published::new(view(&db, Revision::FIRST, Revision(0))));
        let hub = Hub::new(published.clone(), options);
        DiskFeed { _dir: dir, db, published, hub, revision: Revision::FIRST, compacted: Revision(0) }
    }

    /// Puts a key as new; with `prev` also as what was there before in the event.
    pub(crate) fn put(&mut self, key: &'static str, value: &'static str) {
        use crate::storage::layout::{self, Change, Family, Record, VersionRef};
        use crate::storage::{Batch, codec};
        self.revision = self.revision.next();
        let revision = self.revision;
        let record = Record {
            create: revision,
            modified: revision,
            version: 1,
            lease: LeaseId::NONE,
            value: value.into(),
        };
        let change = Change {
            space: Space::User,
            kind: EventKind::Put,
            key: key.into(),
            record: Some(record.clone()),
            actor: None,
            time_ms: 0,
        };
        let version = VersionRef { sub: 0, tombstone: false, digest: 0 };
        let mut batch = Batch::default();
        let versions_key = layout::version(Space::User, key.as_bytes(), revision);
        batch.put(&self.db, Family::History, &layout::history(revision, 0), &codec::encode(&change));
        batch.put(&self.db, Family::Versions, &versions_key, &codec::encode(&version));
        self.db.write(batch).unwrap();
        self.published.publish(view(&self.db, revision, self.compacted));
        let kv = crate::mvcc::key_value(key.as_bytes(), record);
        let event = Arc::new(Event { space: Space::User, kind: EventKind::Put, kv, prev: None });
        let events = vec![Arc::new(RevisionEvents { revision, events: vec![event] })];
        self.hub.publish(&self.published.view(), events);
    }

    pub(crate) fn compact(&mut self, revision: Revision) {
        self.compacted = revision;
        self.published.publish(view(&self.db, self.revision, self.compacted));
    }
}

fn view(db: &crate::storage::StateDb, revision: Revision, compacted: Revision) -> View {
    View {
        data: db.snapshot(),
        revision,
        compacted_user: compacted,
        compacted_system: Revision(0),
        applied: Default::default(),
        alarms: Arc::new([]),
        cluster_version: 0,
    }
}

/// The past as `mvcc` reads it from disk, by spans, by single keys and with the
/// key before, joins the present.
#[tokio::test]
async fn the_past_on_disk_joins_the_present() {
    let mut feed =
        DiskFeed::new(HubOptions { ring_bytes_max: 0, message_bytes: 300, ..HubOptions::default() });
    let task = tokio::spawn(feed.hub.clone().run());
    let ranges = [KeyRange::prefix("a".into()), KeyRange::Single("a".into()), KeyRange::From("a".into())];
    for _ in 0..20 {
        feed.put("a", "1");
        feed.put("b", "2");
    }
    feed.compact(Revision(4));
    for (number, range) in ranges.into_iter().enumerate() {
        let mut stream = feed.hub.stream();
        let spec =
            WatchSpec { prev_kv: number == 2, ..WatchSpec::new(Space::User, range.clone(), Revision(4)) };
        stream.create(None, spec).unwrap();
        if number == 0 {
            stream.create(None, WatchSpec::new(Space::User, range, Revision(3))).unwrap();
        }
        feed.put("a", "3");
        let (mut got, mut compacted) = (Vec::new(), 0);
        let mut last = 0;
        while last < feed.revision.0 {
            match stream.next().await.unwrap().kind {
                WatchMessageKind::Events { events, .. } => {
                    for event in &events {
                        let event = event.event();
                        last = event.kv.mod_revision.0;
                        assert!(number == 2 || event.kv.key == "a");
                        // The newest may have come from the ring, where the feed gives no key before.
                        let newest = last == feed.revision.0;
                        assert!(newest || event.prev.is_some() == (number == 2 && last > 4));
                        got.push(last);
                    }
                }
                WatchMessageKind::Compacted { compact_revision } => compacted = compact_revision.0,
                _ => {}
            }
        }
        let a_revisions = (4..=40).filter(|revision| number == 2 || revision % 2 == 0);
        let expected: Vec<_> = a_revisions
            .chain(if number == 2 { 41..=feed.revision.0 } else { 42..=feed.revision.0 })
            .collect();
        assert_eq!(got, expected);
        assert_eq!(compacted, if number == 0 { 4 } else { 0 });
    }
    feed.hub.close();
    task.await.unwrap().unwrap();
}
