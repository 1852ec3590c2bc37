//! The simplest store that gives the right answers: what every reply, read and
//! event is compared with.
//!
//! It applies the committed commands in their order to maps that forget
//! nothing. It shares no code with the product beyond the types of questions
//! and answers.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use mainstay::types::{
    Alarm, AlarmAction, ApplyError, Command, Compare, CompareOp, CompareTarget, EventKind, KeyRange,
    KeyValue, LeaseId, Operation, Outcome, Put, RangeQuery, RangeReply, Reply, RequestId, Revision, Space,
    Txn, TxnOp, TxnOpReply, TxnReply,
};

/// A change as a watcher must see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub kind: EventKind,
    pub kv: KeyValue,
    pub prev: Option<KeyValue>,
}

/// A session of request ids.
#[derive(Clone, Debug, Default)]
struct Session {
    renewed: u64,
    acknowledged: u64,
    writes: BTreeMap<u64, (Operation, Reply)>,
}

/// What one command did, beside its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A lease came into being.
    Granted(LeaseId, i64),
    /// A lease ended because its time was over.
    Expired(LeaseId),
    /// A lease ended because a client asked.
    Revoked(LeaseId),
    /// A retry was recognised.
    Repeated,
    /// A session ended because nobody renewed it.
    SessionExpired,
}

/// The store.
#[derive(Default)]
pub struct Model {
    revision: i64,
    /// Every version of every key, `None` for a removal.
    keys: BTreeMap<Bytes, Vec<(i64, Option<KeyValue>)>>,
    changes: BTreeMap<i64, Vec<Change>>,
    /// The compact marks, each with the index of the entry that set it.
    marks: Vec<(u64, i64)>,
    /// Leases with their keys.
    leases: BTreeMap<LeaseId, BTreeSet<Bytes>>,
    sessions: BTreeMap<u64, Session>,
    alarms: BTreeSet<Alarm>,
    /// Changes of the revision being made.
    making: Vec<Change>,
    notes: Vec<Note>,
}

impl Model {
    /// An empty store.
    pub fn new() -> Model {
        Model { revision: 1, ..Model::default() }
    }

    /// The newest revision.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The compact mark as of the entry at `index`.
    pub fn compacted_at(&self, index: u64) -> i64 {
        self.marks.iter().rev().find(|(at, _)| *at <= index).map_or(0, |(_, mark)| *mark)
    }

    /// The newest compact mark.
    pub fn compacted(&self) -> i64 {
        self.marks.last().map_or(0, |(_, mark)| *mark)
    }

    /// Whether a lease exists.
    pub fn has_lease(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// All leases.
    pub fn leases(&self) -> Vec<LeaseId> {
        self.leases.keys().copied().collect()
    }

    /// How many keys are there.
    pub fn key_count(&self) -> usize {
        self.keys.values().filter(|versions| versions.last().is_some_and(|(_, kv)| kv.is_some())).count()
    }

    /// Applies the committed command at `index`, written in `term`.
    pub fn apply(&mut self, index: u64, term: u64, command: Command) -> (Reply, Vec<Note>) {
        self.notes.clear();
        let reply = match command.request {
            Some(request) => self.once(index, term, request, command.operation),
            None => Ok(self.plainly(index, term, command.operation)),
        };
        let reply = reply.unwrap_or_else(|error| self.reply(Err(error)));
        (reply, std::mem::take(&mut self.notes))
    }

    fn reply(&self, outcome: Result<Outcome, ApplyError>) -> Reply {
        Reply { revision: Revision(self.revision), outcome }
    }

    fn plainly(&mut self, index: u64, term: u64, operation: Operation) -> Reply {
        let outcome = self.operation(index, term, operation);
        self.reply(outcome)
    }

    fn once(
        &mut self,
        index: u64,
        term: u64,
        request: RequestId,
        operation: Operation,
    ) -> Result<Reply, ApplyError> {
        let RequestId { session: id, sequence, acknowledged } = request;
        let session = self.sessions.get_mut(&id).ok_or(ApplyError::SessionNotFound { session: id })?;
        if let Some((before, reply)) = session.writes.get(&sequence) {
            self.notes.push(Note::Repeated);
            return match *before == operation {
                // As it was, with the revision that it was done at.
                true => Ok(reply.clone()),
                false => Err(ApplyError::SequenceReused { sequence }),
            };
        }
        if sequence <= session.acknowledged {
            return Err(ApplyError::SequenceAcknowledged { sequence });
        }
        session.acknowledged = session.acknowledged.max(acknowledged.min(sequence.saturating_sub(1)));
        let acknowledged = session.acknowledged;
        session.writes.retain(|sequence, _| *sequence > acknowledged);
        session.renewed = index;
        let reply = self.plainly(index, term, operation.clone());
        if let Some(session) = self.sessions.get_mut(&id) {
            session.writes.insert(sequence, (operation, reply.clone()));
        }
        Ok(reply)
    }

    fn operation(&mut self, index: u64, term: u64, operation: Operation) -> Result<Outcome, ApplyError> {
        match operation {
            Operation::Put(put) => {
                self.check_put(&put)?;
                let prev = self.put(put);
                self.seal();
                Ok(Outcome::Put { prev })
            }
            Operation::DeleteRange(delete) => {
                let prev = self.delete(&delete.range);
                self.seal();
                let deleted = prev.len() as u64;
                Ok(Outcome::DeleteRange { deleted, prev: if delete.prev_kv { prev } else { Vec::new() } })
            }
            Operation::Txn(txn) => {
                let branch = self.decide(index, &txn)?;
                let reply = self.run(&branch);
                self.seal();
                Ok(Outcome::Txn(reply))
            }
            Operation::Compact { space, revision } => {
                assert_eq!(space, Space::User, "nothing else is compacted here");
                if revision.0 <= self.compacted() {
                    return Err(ApplyError::Compacted);
                }
                if revision.0 > self.revision {
                    return Err(ApplyError::FutureRevision);
                }
                self.marks.push((index, revision.0));
                Ok(Outcome::Done)
            }
            Operation::LeaseGrant { id, ttl_s } => {
                if self.leases.contains_key(&id) {
                    return Err(ApplyError::LeaseExists);
                }
                self.leases.insert(id, BTreeSet::new());
                self.notes.push(Note::Granted(id, ttl_s));
                Ok(Outcome::LeaseGrant { id, ttl_s })
            }
            Operation::LeaseRevoke { id } => {
                if !self.end_lease(id) {
                    return Err(ApplyError::LeaseNotFound);
                }
                self.notes.push(Note::Revoked(id));
                Ok(Outcome::Done)
            }
            other => Ok(self.housekeeping(index, term, other)),
        }
    }

    /// What the cluster does by itself, and sessions; none of it is refused.
    fn housekeeping(&mut self, index: u64, term: u64, operation: Operation) -> Outcome {
        match operation {
            Operation::LeaseExpire { term: of, ids } if of == term => {
                for id in ids {
                    if self.end_lease(id) {
                        self.notes.push(Note::Expired(id));
                    }
                }
                Outcome::Done
            }
            Operation::SessionOpen { .. } => {
                self.sessions.insert(index, Session { renewed: index, ..Session::default() });
                Outcome::Session { id: index }
            }
            Operation::SessionExpire { term: of, sessions } if of == term => {
                for (id, renewed) in sessions {
                    if self.sessions.get(&id).is_some_and(|session| session.renewed == renewed) {
                        self.sessions.remove(&id);
                        self.notes.push(Note::SessionExpired);
                    }
                }
                Outcome::Done
            }
            Operation::Alarm { action: AlarmAction::Activate, alarm } => {
                let new = self.alarms.insert(alarm);
                Outcome::Alarms(new.then_some(alarm).into_iter().collect())
            }
            Operation::Alarm { action: AlarmAction::Deactivate, .. } => Outcome::Alarms(Vec::new()),
            // Remaining times, versions, and a deposed leader's word: the store stays as it is.
            _ => Outcome::Done,
        }
    }

    fn end_lease(&mut self, id: LeaseId) -> bool {
        let Some(keys) = self.leases.remove(&id) else { return false };
        for key in keys {
            self.delete(&KeyRange::Single(key));
        }
        self.seal();
        true
    }

    fn newest(&self, key: &[u8]) -> Option<&KeyValue> {
        self.keys.get(key)?.last()?.1.as_ref()
    }

    fn check_put(&self, put: &Put) -> Result<(), ApplyError> {
        if (put.ignore_value || put.ignore_lease) && self.newest(&put.key).is_none() {
            return Err(ApplyError::KeyNotFound);
        }
        if put.lease.is_some() && !self.leases.contains_key(&put.lease) {
            return Err(ApplyError::LeaseNotFound);
        }
        Ok(())
    }

    /// Makes what was changed one revision, if anything was.
    fn seal(&mut self) {
        if !self.making.is_empty() {
            self.revision += 1;
            self.changes.insert(self.revision, std::mem::take(&mut self.making));
        }
    }

    fn put(&mut self, put: Put) -> Option<KeyValue> {
        let prev = self.newest(&put.key).cloned();
        let at = Revision(self.revision + 1);
        let mut kv = KeyValue {
            key: put.key.clone(),
            create_revision: prev.as_ref().map_or(at, |prev| prev.create_revision),
            mod_revision: at,
            version: prev.as_ref().map_or(0, |prev| prev.version) + 1,
            lease: put.lease,
            value: put.value,
        };
        if let Some(prev) = &prev {
            if put.ignore_value {
                kv.value = prev.value.clone();
            }
            if put.ignore_lease {
                kv.lease = prev.lease;
            }
        }
        self.change(put.key, Some(kv), prev.clone());
        prev.filter(|_| put.prev_kv)
    }

    fn delete(&mut self, range: &KeyRange) -> Vec<KeyValue> {
        let found: Vec<KeyValue> = self.at(range, i64::MAX).into_iter().cloned().collect();
        for kv in &found {
            self.change(kv.key.clone(), None, Some(kv.clone()));
        }
        found
    }

    fn change(&mut self, key: Bytes, now: Option<KeyValue>, prev: Option<KeyValue>) {
        let at = self.revision + 1;
        if let Some(lease) = prev.as_ref().and_then(|prev| self.leases.get_mut(&prev.lease)) {
            lease.remove(&key);
        }
        if let Some(lease) = now.as_ref().and_then(|now| self.leases.get_mut(&now.lease)) {
            lease.insert(key.clone());
        }
        let kind = if now.is_some() { EventKind::Put } else { EventKind::Delete };
        let gone = || KeyValue {
            key: key.clone(),
            create_revision: Revision(0),
            mod_revision: Revision(at),
            version: 0,
            lease: LeaseId::NONE,
            value: Bytes::new(),
        };
        let kv = now.clone().unwrap_or_else(gone);
        self.making.push(Change { kind, kv, prev });
        self.keys.entry(key).or_default().push((at, now));
    }

    /// The live keys of a range at a revision, in order.
    fn at(&self, range: &KeyRange, revision: i64) -> Vec<&KeyValue> {
        let from = self.keys.range::<Bytes, _>(range.start()..);
        let inside = from.filter(|(key, _)| range.contains(key));
        inside
            .filter_map(|(_, versions)| {
                versions.iter().rev().find(|(at, _)| *at <= revision).and_then(|(_, kv)| kv.as_ref())
            })
            .collect()
    }

    /// What a range query gives at `revision`; filters and sorting are not asked for here.
    pub fn range(&self, query: &RangeQuery, revision: i64) -> RangeReply {
        let found = self.at(&query.range, revision);
        let count = found.len() as u64;
        let limit = if query.limit == 0 { usize::MAX } else { query.limit as usize };
        let mut kvs: Vec<KeyValue> = found.into_iter().take(limit).cloned().collect();
        let more = count > kvs.len() as u64;
        if query.count_only {
            return RangeReply { kvs: Vec::new(), more: false, count };
        }
        if query.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        RangeReply { kvs, more, count }
    }

    /// The changes of a range from one revision to another, both included.
    pub fn changes(&self, range: &KeyRange, from: i64, to: i64) -> Vec<Change> {
        if from > to {
            return Vec::new();
        }
        let all = self.changes.range(from..=to).flat_map(|(_, changes)| changes);
        all.filter(|change| range.contains(&change.kv.key)).cloned().collect()
    }

    fn decide(&self, index: u64, txn: &Txn) -> Result<Branch, ApplyError> {
        let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
        let taken = if succeeded { &txn.success } else { &txn.failure };
        let mut steps = Vec::new();
        for op in taken {
            steps.push(match op {
                TxnOp::Range(query) if query.revision.0 > self.revision => {
                    return Err(ApplyError::FutureRevision);
                }
                TxnOp::Range(query)
                    if query.revision.0 > 0 && query.revision.0 < self.compacted_at(index) =>
                {
                    return Err(ApplyError::Compacted);
                }
                TxnOp::Put(put) => {
                    self.check_put(put)?;
                    Step::Plain(op.clone())
                }
                TxnOp::Txn(inner) => Step::Inner(self.decide(index, inner)?),
                _ => Step::Plain(op.clone()),
            });
        }
        Ok(Branch { succeeded, steps })
    }

    fn run(&mut self, branch: &Branch) -> TxnReply {
        let mut responses = Vec::new();
        for step in &branch.steps {
            responses.push(match step {
                Step::Inner(inner) => TxnOpReply::Txn(self.run(inner)),
                Step::Plain(TxnOp::Put(put)) => TxnOpReply::Put { prev: self.put(put.clone()) },
                Step::Plain(TxnOp::DeleteRange(delete)) => {
                    let prev = self.delete(&delete.range);
                    let deleted = prev.len() as u64;
                    TxnOpReply::DeleteRange { deleted, prev: if delete.prev_kv { prev } else { Vec::new() } }
                }
                Step::Plain(TxnOp::Range(query)) => {
                    let at = if query.revision.0 > 0 { query.revision.0 } else { i64::MAX };
                    TxnOpReply::Range(self.range(query, at))
                }
                Step::Plain(TxnOp::Txn(_)) => unreachable!("a transaction inside is an inner step"),
            });
        }
        TxnReply { succeeded: branch.succeeded, responses }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let found = self.at(&compare.range, i64::MAX);
        if found.is_empty() {
            return compare_one(compare, None);
        }
        found.into_iter().all(|kv| compare_one(compare, Some(kv)))
    }
}

/// The branch that a transaction takes.
struct Branch {
    succeeded: bool,
    steps: Vec<Step>,
}

enum Step {
    Plain(TxnOp),
    Inner(Branch),
}

fn compare_one(compare: &Compare, kv: Option<&KeyValue>) -> bool {
    use std::cmp::Ordering;
    let ordering = match &compare.target {
        CompareTarget::Version(target) => kv.map_or(0, |kv| kv.version).cmp(target),
        CompareTarget::Create(target) => kv.map_or(0, |kv| kv.create_revision.0).cmp(target),
        CompareTarget::Mod(target) => kv.map_or(0, |kv| kv.mod_revision.0).cmp(target),
        CompareTarget::Lease(target) => kv.map_or(0, |kv| kv.lease.0).cmp(target),
        CompareTarget::Value(target) => match kv {
            Some(kv) => kv.value.cmp(target),
            None => return false,
        },
    };
    match compare.op {
        CompareOp::Equal => ordering == Ordering::Equal,
        CompareOp::NotEqual => ordering != Ordering::Equal,
        CompareOp::Greater => ordering == Ordering::Greater,
        CompareOp::Less => ordering == Ordering::Less,
    }
}
