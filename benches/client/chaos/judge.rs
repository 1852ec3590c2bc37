//! What may be read when, and what must have been told: the book in which every
//! call is entered before it begins and after it ended.
//!
//! A lane is a key with one writer at a time, whose values count up from 1. So
//! the versions of a key are its values as long as each write took effect once,
//! and whatever is older than what was acknowledged before a strong read began
//! is wrong. A write in doubt may take effect at any later time: its lane goes
//! on with a new key, and the old one is only judged by history.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mainstay::client::Filter;
use mainstay::types::{Event, EventKind, KeyValue, Revision};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::BOUND;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A linearizable read.
    Strong,
    /// A read that is at most [`BOUND`] old.
    Bounded,
    /// A read of what there is.
    Eventual,
    /// A put with a request id.
    Write,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Strong, Kind::Bounded, Kind::Eventual, Kind::Write];
    pub const READS: [Kind; 3] = [Kind::Strong, Kind::Bounded, Kind::Eventual];
}

/// One key and everything known of it.
pub struct Key {
    name: String,
    state: Mutex<KeyState>,
}

#[derive(Default)]
struct KeyState {
    /// The newest value whose write began.
    begun: u64,
    /// When each value was acknowledged; value n is at n - 1.
    acknowledged: Vec<(Instant, Revision)>,
    /// The newest value that a strong read gave.
    strong_seen: u64,
    /// By client, the newest value that any read gave.
    seen: Vec<u64>,
    is_writing: bool,
    /// Its last write is in doubt.
    is_retired: bool,
}

/// A read that has begun.
pub struct Expected {
    key: Arc<Key>,
    kind: Kind,
    client: usize,
    floor: u64,
}

impl Expected {
    pub fn key(&self) -> &str {
        &self.key.name
    }
}

/// A write that has begun.
pub struct Write {
    key: Arc<Key>,
    lane: usize,
    value: u64,
}

impl Write {
    pub fn key(&self) -> &str {
        &self.key.name
    }

    pub fn value(&self) -> String {
        self.value.to_string()
    }
}

/// The book.
pub struct Book {
    lanes: Vec<Mutex<Arc<Key>>>,
    keys: Mutex<Vec<Arc<Key>>>,
    clients: usize,
    judged: AtomicU64,
    broken: Mutex<Vec<String>>,
}

impl Book {
    pub fn new(lanes: usize, clients: usize) -> Book {
        let mut book = Book {
            lanes: Vec::new(),
            keys: Mutex::default(),
            clients,
            judged: AtomicU64::new(0),
            broken: Mutex::default(),
        };
        book.lanes = (0..lanes).map(|lane| Mutex::new(book.new_key(lane))).collect();
        book
    }

    fn new_key(&self, lane: usize) -> Arc<Key> {
        let mut keys = self.keys.lock();
        let state = KeyState { seen: vec![0; self.clients], ..KeyState::default() };
        let key =
            Arc::new(Key { name: format!("chaos/{lane:02}-{:04}", keys.len()), state: Mutex::new(state) });
        keys.push(key.clone());
        key
    }

    pub fn broken(&self, words: String) {
        self.broken.lock().push(words);
    }

    pub fn judged(&self) -> u64 {
        self.judged.load(Ordering::Relaxed)
    }

    pub fn verdict(&self) -> Vec<String> {
        self.broken.lock().clone()
    }

    pub fn begin_read(&self, kind: Kind, client: usize, lane: usize) -> Expected {
        let key = self.lanes[lane].lock().clone();
        let floor = {
            let state = key.state.lock();
            match kind {
                Kind::Strong => {
                    state.strong_seen.max(state.acknowledged.len() as u64).max(state.seen[client])
                }
                _ => state.seen[client],
            }
        };
        Expected { key, kind, client, floor }
    }

    pub fn end_read(&self, read: Expected, kv: Option<&KeyValue>) {
        self.judged.fetch_add(1, Ordering::Relaxed);
        let Expected { key, kind, client, floor } = read;
        let now = Instant::now();
        let mut state = key.state.lock();
        let value = match kv {
            None => Some(0),
            Some(kv) => std::str::from_utf8(&kv.value).ok().and_then(|text| text.parse::<u64>().ok()),
        };
        let wrong = |words: String| {
            let name = &key.name;
            self.broken(format!("{kind:?} read of {name} by client {client} gave {kv:?}: {words}"));
        };
        let Some(value) = value else { return wrong("no value that was written".into()) };
        let floor = match kind {
            // What was acknowledged before the bound began.
            Kind::Bounded => {
                let old = state.acknowledged.partition_point(|(at, _)| *at + BOUND <= now) as u64;
                floor.max(old)
            }
            _ => floor,
        };
        if value < floor {
            wrong(format!("older than {floor}"));
        } else if value > state.begun {
            wrong(format!("newer than {}, the newest that was written", state.begun));
        } else if kv.is_some_and(|kv| kv.version != value as i64) {
            wrong("its version is not the number of writes".into());
        } else if let (Some(kv), Some((_, at))) =
            (kv, (value as usize).checked_sub(1).and_then(|at| state.acknowledged.get(at)))
            && kv.mod_revision != *at
        {
            wrong(format!("that value was acknowledged at revision {at}"));
        }
        state.seen[client] = state.seen[client].max(value);
        if kind == Kind::Strong {
            state.strong_seen = state.strong_seen.max(value);
        }
    }

    /// Begins the next write of a lane, unless one is under way.
    pub fn begin_write(&self, lane: usize) -> Option<Write> {
        let key = self.lanes[lane].lock().clone();
        let mut state = key.state.lock();
        if std::mem::replace(&mut state.is_writing, true) {
            return None;
        }
        let value = state.acknowledged.len() as u64 + 1;
        state.begun = value;
        drop(state);
        Some(Write { key, lane, value })
    }

    pub fn wrote(&self, write: Write, revision: Revision) {
        self.judged.fetch_add(1, Ordering::Relaxed);
        let mut state = write.key.state.lock();
        state.is_writing = false;
        if state.acknowledged.last().is_some_and(|(_, before)| *before >= revision) {
            self.broken(format!(
                "the write of {} was acknowledged at {revision}, not after the one before",
                write.key.name
            ));
        }
        state.acknowledged.push((Instant::now(), revision));
    }

    pub fn did_not_write(&self, write: Write, may_have_happened: bool) {
        let mut state = write.key.state.lock();
        if may_have_happened {
            state.is_retired = true;
            *self.lanes[write.lane].lock() = self.new_key(write.lane);
        } else {
            // The same value is written again: nobody may have seen it, and history will tell.
            state.is_writing = false;
        }
    }

    /// Every acknowledged write is in history once, at its revision; one in doubt at most once; nothing else.
    pub fn judge_history(&self, history: &[Event]) {
        let mut by_key: BTreeMap<&[u8], Vec<&KeyValue>> = BTreeMap::new();
        for event in history {
            if event.kind != EventKind::Put {
                self.broken(format!("{:?} was removed", event.kv.key));
            }
            by_key.entry(&event.kv.key).or_default().push(&event.kv);
        }
        for key in self.keys.lock().iter() {
            let state = key.state.lock();
            let told = by_key.remove(key.name.as_bytes()).unwrap_or_default();
            let sure = state.acknowledged.len();
            if told.len() < sure || told.len() > sure + usize::from(state.is_retired) {
                let doubt = if state.is_retired { " and one in doubt" } else { "" };
                self.broken(format!("{}: {} effects of {sure} writes{doubt}", key.name, told.len()));
            }
            for (i, kv) in told.iter().enumerate() {
                let value = (i + 1).to_string();
                if kv.value != value.as_bytes() || kv.version != i as i64 + 1 {
                    self.broken(format!("{}: effect {value} is {kv:?}", key.name));
                } else if state.acknowledged.get(i).is_some_and(|(_, at)| *at != kv.mod_revision) {
                    self.broken(format!(
                        "{}: {value} was acknowledged at another revision than {kv:?}",
                        key.name
                    ));
                }
            }
        }
        for key in by_key.keys() {
            self.broken(format!("{} was never written", String::from_utf8_lossy(key)));
        }
    }
}

/// Whether what was told is what the filter lets through of history, in order, each once.
pub fn compare(told: &[Event], history: &[Event], filter: &Filter) -> Result<(), String> {
    let mut wanted = history.iter().filter(|event| filter.matches(event));
    for (i, event) in told.iter().enumerate() {
        match wanted.next() {
            Some(next) if next.kv == event.kv && next.kind == event.kind => {}
            Some(next) => {
                return Err(format!(
                    "event {i} is {} of {:?}, and {} of {:?} should come",
                    event.kv.mod_revision, event.kv.key, next.kv.mod_revision, next.kv.key
                ));
            }
            None => {
                return Err(format!(
                    "event {i}, {} of {:?}, is too many",
                    event.kv.mod_revision, event.kv.key
                ));
            }
        }
    }
    match wanted.count() {
        0 => Ok(()),
        missing => Err(format!("the last {missing} events are missing")),
    }
}

/// Shows the judge lies that it must see through, so that its silence means something.
///
/// # Panics
/// When it believes one.
pub fn prove() {
    let kv = |value: u64, version: i64, at: i64| KeyValue {
        key: "chaos/00-0000".into(),
        value: value.to_string().into(),
        create_revision: Revision(11),
        mod_revision: Revision(at),
        version,
        lease: mainstay::types::LeaseId::NONE,
    };
    // Value n is acknowledged at revision n + 10.
    let book_of = |writes: u64| {
        let book = Book::new(1, 2);
        for n in 1..=writes {
            book.wrote(book.begin_write(0).expect("one writer"), Revision(n as i64 + 10));
        }
        book
    };
    let read = |kind, given: Option<KeyValue>| {
        let book = book_of(3);
        book.end_read(book.begin_read(Kind::Eventual, 1, 0), Some(&kv(2, 2, 12)));
        book.end_read(book.begin_read(kind, 1, 0), given.as_ref());
        book.verdict().len()
    };
    assert_eq!(read(Kind::Strong, Some(kv(3, 3, 13))), 0, "the truth");
    assert_eq!(read(Kind::Strong, Some(kv(2, 2, 12))), 1, "older than acknowledged");
    assert_eq!(read(Kind::Strong, None), 1, "a key that is lost");
    assert_eq!(read(Kind::Eventual, Some(kv(2, 2, 12))), 0, "old, but not backwards");
    assert_eq!(read(Kind::Eventual, Some(kv(1, 1, 11))), 1, "backwards");
    assert_eq!(read(Kind::Bounded, Some(kv(2, 2, 12))), 0, "within the bound");
    assert_eq!(read(Kind::Eventual, Some(kv(4, 4, 14))), 1, "from the future");
    assert_eq!(read(Kind::Eventual, Some(kv(3, 4, 13))), 1, "written twice");
    assert_eq!(read(Kind::Eventual, Some(kv(3, 3, 14))), 1, "at another revision");

    let book = book_of(1);
    book.lanes[0].lock().state.lock().acknowledged[0].0 -= 2 * BOUND;
    book.end_read(book.begin_read(Kind::Bounded, 0, 0), None);
    assert_eq!(book.verdict().len(), 1, "older than the bound");

    let event = |kv| Event { space: mainstay::types::Space::User, kind: EventKind::Put, kv, prev: None };
    let all = [event(kv(1, 1, 11)), event(kv(2, 2, 12)), event(kv(3, 3, 13))];
    let history = |events: &[Event]| {
        let book = book_of(3);
        book.judge_history(events);
        book.verdict().len()
    };
    assert_eq!(history(&all), 0, "the truth");
    assert_ne!(history(&all[..2]), 0, "a write is lost");
    assert_ne!(history(&[&all[..], &[event(kv(3, 4, 14))]].concat()), 0, "a write took effect twice");

    let everything = Filter::prefix("chaos/");
    assert!(compare(&all, &all, &everything).is_ok());
    assert!(compare(&all[..2], &all, &everything).is_err(), "the end is missing");
    assert!(compare(&all[1..], &all, &everything).is_err(), "a gap");
    let repeat = [&all[..2], &all[1..]].concat();
    assert!(compare(&repeat, &all, &everything).is_err(), "a repeat");
}
