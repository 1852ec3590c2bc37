//! What must be true: the committed log as the nodes have shown it, the model
//! that follows it, and every promise that a client was given.
//!
//! Entries are taken from the logs of nodes that have applied them. From there
//! on an entry is chosen: a node that applies another one in its place, a reply
//! that is not what the model says, an acknowledged command that is not there,
//! or is there twice, is a violation. Every operation carries a tag into the
//! log, so that it is found there whatever the client was told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use mainstay::mvcc::Marks;
use mainstay::raft::{EntryPayload, record};
use mainstay::storage::codec;
use mainstay::storage::layout::LogPosition;
use mainstay::types::{
    ApplyError, Command, EventKind, KeyRange, LeaseId, NodeId, RangeQuery, RangeReply, Reply,
};
use mainstay::watch::WatchEvent;

use crate::model::{Change, Model, Note};
use crate::trace::Trace;

/// Virtual time is cut into ticks and timers into milliseconds; no promise is
/// measured finer than this.
const SLACK_MS: u64 = 10;

/// What a client was told about a lease.
#[derive(Clone, Debug, Default)]
struct Promise {
    /// It must not run out before.
    until_ms: u64,
    expired_ms: Option<u64>,
}

/// Where a tag stands in the log.
struct Found {
    index: u64,
    reply: Reply,
}

/// What must be true.
pub struct Oracle {
    trace: Arc<Trace>,
    model: Model,
    /// Chosen entries, by index.
    chosen: BTreeMap<u64, Bytes>,
    /// Applied to the model up to here, not included.
    modelled: u64,
    tags: BTreeMap<String, Vec<Found>>,
    /// Tags of operations that were refused before they were proposed.
    refused: Vec<String>,
    /// The leader that wrote the newest entry: its term and id. Leaders rise in
    /// this order, and a term may have more than one (openraft's advanced ids).
    writer: (u64, NodeId),
    /// Who said that it leads, in each term.
    leaders: BTreeSet<(u64, NodeId)>,
    /// Everything up to here was acknowledged to somebody.
    floor: u64,
    leases: BTreeMap<LeaseId, Promise>,
    operations: u64,
}

impl Oracle {
    /// Nothing has happened.
    pub fn new(trace: Arc<Trace>) -> Oracle {
        Oracle {
            trace,
            model: Model::new(),
            chosen: BTreeMap::new(),
            modelled: 0,
            tags: BTreeMap::new(),
            refused: Vec::new(),
            writer: (0, 0),
            leaders: BTreeSet::new(),
            floor: 0,
            leases: BTreeMap::new(),
            operations: 0,
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// A new operation's tag, and the index that it must come after.
    pub fn begin(&mut self) -> (String, u64) {
        self.operations += 1;
        (format!("op{}", self.operations), self.floor)
    }

    /// How many operations were begun.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// A node has applied the entry at `index`, and its log says that it is `record`.
    pub fn applied(&mut self, place: usize, index: u64, record: Option<Bytes>) {
        match (self.chosen.get(&index), record) {
            (Some(chosen), Some(record)) if *chosen != record => {
                let (one, other) = (describe(chosen), describe(&record));
                self.trace.violation(format_args!(
                    "n{} applied another entry {index}: {other}, and {one} was applied before",
                    place + 1
                ));
            }
            (None, Some(record)) => {
                self.chosen.insert(index, record);
            }
            // What came in a snapshot is in no log of this node.
            _ => {}
        }
    }

    /// The first index that the node should be asked for which is not known yet.
    pub fn chosen_up_to(&self) -> Option<u64> {
        self.chosen.last_key_value().map(|(index, _)| *index)
    }

    /// Applies what was chosen to the model.
    pub fn follow(&mut self) {
        while let Some(record) = self.chosen.get(&self.modelled).cloned() {
            let index = self.modelled;
            self.modelled += 1;
            let entry = match record::decode_entry(&record) {
                Ok(entry) => entry,
                Err(error) => return self.trace.violation(format_args!("entry {index}: {error}")),
            };
            let position = LogPosition::from(&entry.log_id);
            let writer = (position.term, position.node);
            if writer < self.writer {
                let before = self.writer;
                self.trace.violation(format_args!(
                    "entry {index} is of {writer:x?}, and the one before of {before:x?}"
                ));
            }
            self.writer = writer;
            if let EntryPayload::Normal(proposal) = entry.payload {
                match codec::decode::<Command>("a command", &proposal.body) {
                    Ok(command) => self.model_command(position, command),
                    Err(error) => self.trace.violation(format_args!("entry {index}: {error}")),
                }
            }
        }
    }

    fn model_command(&mut self, position: LogPosition, command: Command) {
        let tag = command.actor.as_ref().map(|actor| actor.to_string());
        let repeatable = command.request.is_some();
        let (reply, notes) = self.model.apply(position.index, position.term, command);
        for note in notes {
            self.note(note);
        }
        let Some(tag) = tag else { return };
        let found = self.tags.entry(tag.clone()).or_default();
        found.push(Found { index: position.index, reply });
        if found.len() > 1 && !repeatable {
            let places: Vec<u64> = found.iter().map(|found| found.index).collect();
            self.trace.violation(format_args!("{tag} was applied more than once: at {places:?}"));
        }
    }

    fn note(&mut self, note: Note) {
        let now_ms = self.trace.now_ms();
        match note {
            Note::Granted(..) => self.trace.count("leases granted"),
            Note::Revoked(_) => self.trace.count("leases revoked"),
            Note::Repeated => self.trace.count("retries recognised"),
            Note::SessionExpired => self.trace.count("sessions expired"),
            Note::Expired(id) => {
                self.trace.count("leases expired");
                let promise = self.leases.entry(id).or_default();
                promise.expired_ms = Some(now_ms);
                if promise.until_ms > now_ms + SLACK_MS {
                    let until_ms = promise.until_ms;
                    self.trace
                        .violation(format_args!("lease {id} ran out, and was promised until {until_ms} ms"));
                }
            }
        }
    }

    /// A client was told that a lease lives for `ttl_s` from when it asked.
    pub fn promised(&mut self, id: LeaseId, asked_ms: u64, ttl_s: i64) {
        let until_ms = asked_ms + u64::try_from(ttl_s).unwrap_or(0) * 1000;
        let promise = self.leases.entry(id).or_default();
        promise.until_ms = promise.until_ms.max(until_ms);
        if let Some(expired_ms) = promise.expired_ms
            && expired_ms + SLACK_MS < until_ms
        {
            self.trace.violation(format_args!(
                "lease {id} ran out at {expired_ms} ms, and its renewal promises it until {until_ms} ms"
            ));
        }
    }

    /// A client was told that a lease is gone, or as good as that.
    pub fn told_gone(&mut self, id: LeaseId) {
        let now_ms = self.trace.now_ms();
        let promise = self.leases.entry(id).or_default();
        if self.model.has_lease(id) && promise.until_ms > now_ms + SLACK_MS {
            let until_ms = promise.until_ms;
            self.trace.violation(format_args!(
                "lease {id} is said to be gone, and was promised until {until_ms} ms"
            ));
        }
    }

    /// A node says that it leads.
    pub fn leads(&mut self, node: NodeId, term: u64) {
        if self.leaders.insert((term, node)) {
            self.trace.count("leaders");
        }
    }

    /// A client was given a reply to what it began with this tag and floor.
    pub fn acknowledged(&mut self, tag: &str, floor: u64, reply: &Reply) {
        self.trace.count("operations acknowledged");
        let Some(found) = self.tags.get(tag) else {
            self.trace.violation(format_args!("{tag} was acknowledged with {reply:?} and is in no log"));
            return;
        };
        let Some(right) = found.iter().find(|found| found.reply == *reply) else {
            let expected: Vec<&Reply> = found.iter().map(|found| &found.reply).collect();
            self.trace
                .violation(format_args!("{tag} was answered {reply:?}, and should have been {expected:?}"));
            return;
        };
        let index = right.index;
        if index <= floor {
            self.trace.violation(format_args!(
                "{tag} stands at {index}, and entry {floor} was acknowledged before it began"
            ));
        }
        self.floor = self.floor.max(index);
    }

    /// A client was told that nothing was done.
    pub fn not_done(&mut self, tag: String) {
        self.trace.count("operations refused");
        self.refused.push(tag);
    }

    /// A client read `query` and got `reply` from the state after entry `index`.
    pub fn read(&mut self, what: &str, read: &ReadAnswer, linearizable_after: Option<u64>) {
        let ReadAnswer { index, marks, query, reply } = read;
        if let Some(floor) = linearizable_after {
            self.trace.count("linearizable reads");
            if *index < floor {
                self.trace.violation(format_args!(
                    "{what} read the state after entry {index}, and entry {floor} was acknowledged before it began"
                ));
            }
            self.floor = self.floor.max(*index);
        } else {
            self.trace.count("serializable reads");
        }
        if *index >= self.modelled {
            let last = self.modelled;
            return self
                .trace
                .violation(format_args!("{what} read entry {index}, and {last} is not committed"));
        }
        let compacted = self.model.compacted_at(*index);
        if marks.compacted.0 != compacted {
            self.trace
                .violation(format_args!("{what}: the compact mark is {marks:?}, and should be {compacted}"));
        }
        let expected = match query.revision.0 {
            asked if asked > marks.revision.0 => Err(ApplyError::FutureRevision),
            asked if asked > 0 && asked < compacted => Err(ApplyError::Compacted),
            asked if asked > 0 => Ok(self.model.range(query, asked)),
            _ => Ok(self.model.range(query, marks.revision.0)),
        };
        if *reply != expected {
            self.trace
                .violation(format_args!("{what}: {query:?} at {marks:?} gave {reply:?}, not {expected:?}"));
        }
    }

    /// A watcher of `range` was sent `events` for everything from `from` to `to`.
    pub fn watched(
        &self,
        what: &str,
        range: &KeyRange,
        wants: Wants,
        from: i64,
        to: i64,
        events: &[Arc<WatchEvent>],
    ) {
        if to > self.model.revision() {
            let newest = self.model.revision();
            return self
                .trace
                .violation(format_args!("{what} was sent revision {to}, and {newest} is the newest"));
        }
        let mut expected = self.model.changes(range, from, to);
        expected.retain(|change| wants.kind.is_none_or(|kind| change.kind == kind));
        let same = |change: &Change, event: &WatchEvent| {
            let event = event.event();
            let forgotten = change.kv.mod_revision.0 - 1 < self.model.compacted();
            let prev = !wants.prev || event.prev == change.prev || (event.prev.is_none() && forgotten);
            event.kind == change.kind && event.kv == change.kv && prev
        };
        let equal = expected.len() == events.len()
            && expected.iter().zip(events).all(|(change, event)| same(change, event));
        if !equal {
            let got: Vec<_> = events.iter().map(|event| event.event()).collect();
            self.trace.violation(format_args!(
                "{what} was sent {got:?} for revisions {from} to {to}, and should have been sent {expected:?}"
            ));
        }
    }

    /// A watcher that wanted revision `next` was told that it was compacted.
    pub fn compacted(&self, what: &str, next: i64, mark: i64) {
        if mark > self.model.compacted() || mark <= next {
            let newest = self.model.compacted();
            self.trace.violation(format_args!(
                "{what} wanted {next} and was told of the compact mark {mark}; the newest is {newest}"
            ));
        }
    }

    /// What can be said only when nothing is under way any more.
    pub fn at_the_end(&self) {
        for tag in &self.refused {
            if let Some(found) = self.tags.get(tag).and_then(|found| found.first()) {
                let index = found.index;
                self.trace
                    .violation(format_args!("{tag} was refused as not done, and is in the log at {index}"));
            }
        }
        let unsettled = self.chosen.keys().next_back().is_some_and(|last| *last >= self.modelled);
        if unsettled {
            self.trace.violation(format_args!("entry {} was applied by nobody that was seen", self.modelled));
        }
    }
}

/// A read's question, answer, and where it was answered.
#[derive(Clone, Debug)]
pub struct ReadAnswer {
    pub index: u64,
    pub marks: Marks,
    pub query: RangeQuery,
    pub reply: Result<RangeReply, ApplyError>,
}

/// What a watcher asked for beside its range.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants {
    pub prev: bool,
    /// Only events of this kind.
    pub kind: Option<EventKind>,
}

fn describe(record: &Bytes) -> String {
    match record::decode_entry(record) {
        Ok(entry) => {
            let position = LogPosition::from(&entry.log_id);
            let what = match &entry.payload {
                EntryPayload::Blank => "blank".to_owned(),
                EntryPayload::Membership(_) => "a membership".to_owned(),
                EntryPayload::Normal(proposal) => match codec::decode::<Command>("a command", &proposal.body)
                {
                    Ok(command) => format!("{command:?}"),
                    Err(error) => error.to_string(),
                },
            };
            format!("term {} by {:x}: {what}", position.term, position.node)
        }
        Err(error) => error.to_string(),
    }
}
