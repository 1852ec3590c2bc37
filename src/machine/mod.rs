//! Applies one command to everything replicated, and publishes what it made.
//!
//! `Machine` is owned by the one thread that applies; everyone else reads
//! through the [`Published`] view. Nothing here waits, asks a clock or draws a random
//! number: equal commands make equal states on every replica.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use self::chunk::{Chunk, Transaction};
pub use self::observer::{Effect, Observer};
pub use self::read::{is_read_only, read_txn};
use self::session::{Sessions, Verdict};
use self::state::State;
use crate::lease;
use crate::mvcc::{Published, ReadError};
use crate::storage::layout::{self, Family, LeaseRecord, LogPosition, SessionRecord, meta};
use crate::storage::{StateDb, StorageError, codec};
use crate::types::{
    Alarm, AlarmAction, AlarmKind, ApplyError, Command, DeleteRange, KeyRange, LeaseId, Operation, Outcome,
    Reply, Revision, Space,
};

mod chunk;
mod observer;
mod read;
mod session;
mod state;
mod txn;

/// One committed entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// The leader's stamp, milliseconds since 1970; 0 for entries without a command.
    pub time_ms: u64,
    /// What it carries.
    pub payload: Payload,
}

/// What an entry carries.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Nothing: a new leader's first entry.
    Blank,
    /// A `types::Command` as `storage::codec` encoded it.
    Command(Bytes),
    /// A membership, as the raft room encoded it; kept, not understood.
    Membership(Bytes),
}

/// The most bytes of records that one command may return, in all its ranges
/// and previous records together, so that its reply fits into a message between
/// members; a record of the largest size fits. Part of what a command means, so
/// the same on every replica.
const REPLY_BYTES_MAX: usize = 40 << 20;

/// The batch size at which a chunk is written out before its end.
const CHUNK_BYTES_MAX: usize = 8 << 20;

/// The replicated state machine, owned by the thread that applies.
///
/// Invariants: `state` is what the disk would say once `chunk` is written out;
/// entries come in order and without a gap; nothing is published that was not
/// written.
pub struct Machine {
    db: StateDb,
    state: State,
    leases: HashMap<LeaseId, LeaseRecord>,
    sessions: Sessions,
    chunk: Chunk,
    published: Arc<Published>,
    observer: Option<Arc<dyn Observer>>,
}

/// Why a command was not applied.
enum ApplyFailure {
    /// Every replica refuses it.
    Refused(ApplyError),
    /// This one cannot go on.
    Storage(StorageError),
}

impl From<ApplyError> for ApplyFailure {
    fn from(error: ApplyError) -> Self {
        ApplyFailure::Refused(error)
    }
}

impl From<StorageError> for ApplyFailure {
    fn from(error: StorageError) -> Self {
        ApplyFailure::Storage(error)
    }
}

impl From<ReadError> for ApplyFailure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Refused(error) => ApplyFailure::Refused(error),
            ReadError::Storage(error) => ApplyFailure::Storage(error),
        }
    }
}

impl Machine {
    /// Opens the state machine over a database, as far as it was applied.
    ///
    /// # Errors
    /// When the disk fails or a record is damaged.
    pub fn open(db: StateDb) -> Result<Machine, StorageError> {
        let state = State::load(&db)?;
        let leases = lease::all(&db)?.into_iter().collect();
        let sessions = Sessions::load(&db)?;
        let published = Arc::new(Published::new(state.view(&db)));
        Ok(Machine { db, state, leases, sessions, chunk: Chunk::default(), published, observer: None })
    }

    /// Names who hears of every applied chunk from now on.
    pub fn observe(&mut self, observer: Arc<dyn Observer>) {
        self.observer = Some(observer);
    }

    /// Where views are published.
    pub fn published(&self) -> Arc<Published> {
        self.published.clone()
    }

    /// The database, for flushing, checkpoints and the sweep.
    pub fn db(&self) -> &StateDb {
        &self.db
    }

    /// The last applied entry; index 0 when there is none.
    pub fn applied(&self) -> LogPosition {
        self.state.applied
    }

    /// The last applied membership, as it was given in its entry.
    pub fn membership(&self) -> Option<&Bytes> {
        self.state.membership.as_ref()
    }

    /// The highest time stamp applied, milliseconds since 1970.
    pub fn stamp_ms(&self) -> u64 {
        self.state.stamp_ms
    }

    /// The sessions of request ids, by id.
    pub fn sessions(&self) -> Vec<(u64, SessionRecord)> {
        self.sessions.records()
    }

    /// Replaces the whole state by another database, as when a snapshot is installed.
    ///
    /// # Errors
    /// When the database cannot be read; the old state stays.
    pub fn replace(&mut self, db: StateDb) -> Result<(), StorageError> {
        let opened = Machine::open(db)?;
        self.db = opened.db;
        self.state = opened.state;
        self.leases = opened.leases;
        self.sessions = opened.sessions;
        self.chunk = Chunk::default();
        self.chunk.effects.push(Effect::Replaced);
        self.publish();
        Ok(())
    }

    /// Applies a chunk of consecutive entries: one atomic batch (or several, at
    /// entry boundaries), then one published view, then the observer. One reply
    /// for each entry.
    ///
    /// # Errors
    /// Anything that not every replica would meet: the node must stop, for its
    /// memory is ahead of its disk.
    pub fn apply(&mut self, entries: Vec<Entry>) -> Result<Vec<Reply>, StorageError> {
        let mut replies = Vec::with_capacity(entries.len());
        for entry in entries {
            let reply = match entry.payload {
                Payload::Blank => {
                    self.begin(entry.position)?;
                    self.reply(Ok(Outcome::Done))
                }
                Payload::Membership(bytes) => {
                    self.begin(entry.position)?;
                    self.chunk.batch.put(&self.db, Family::Meta, meta::MEMBERSHIP, &bytes);
                    self.state.membership = Some(bytes);
                    self.reply(Ok(Outcome::Done))
                }
                Payload::Command(bytes) => {
                    let command: Command = codec::decode("command", &bytes)?;
                    if reads_disk(&command.operation) {
                        // Before this entry begins, so that the batch says truly how far it goes.
                        self.write_out()?;
                    }
                    self.begin(entry.position)?;
                    self.state.stamp_ms = self.state.stamp_ms.max(entry.time_ms);
                    self.command(entry.position, command)?
                }
            };
            replies.push(reply);
            if self.chunk.batch.size_bytes() > CHUNK_BYTES_MAX {
                self.write_out()?;
            }
        }
        self.write_out()?;
        self.publish();
        Ok(replies)
    }

    /// Steps to the next entry, which must be the next in the log.
    fn begin(&mut self, position: LogPosition) -> Result<(), StorageError> {
        let applied = self.state.applied;
        if position.index != applied.index + 1 && applied != LogPosition::default() {
            let reason = format!("entry {} follows entry {}", position.index, applied.index);
            return Err(StorageError::Corrupt { what: "applied log".to_owned(), reason });
        }
        self.state.applied = position;
        Ok(())
    }

    /// A reply as of the revision that the store has come to.
    fn reply(&self, outcome: Result<Outcome, ApplyError>) -> Reply {
        Reply { revision: self.state.revision, outcome }
    }

    /// Applies a command, or answers it from before when it is a retry.
    fn command(&mut self, position: LogPosition, command: Command) -> Result<Reply, StorageError> {
        let Command { request, actor, operation } = command;
        let Some(request) = request else {
            let outcome = self.operation(position, actor, operation)?;
            return Ok(self.reply(outcome));
        };
        let fingerprint = crc32c::crc32c(&codec::encode(&operation));
        let verdict = self.sessions.admit(&self.db, &mut self.chunk, position.index, request, fingerprint);
        if let Verdict::Answer(answer) = verdict {
            return Ok(answer.unwrap_or_else(|error| self.reply(Err(error))));
        }
        let outcome = self.operation(position, actor, operation)?;
        let reply = self.reply(outcome);
        self.sessions.record(&self.db, &mut self.chunk, request, fingerprint, &reply);
        Ok(reply)
    }

    fn operation(
        &mut self,
        position: LogPosition,
        actor: Option<Arc<str>>,
        operation: Operation,
    ) -> Result<Result<Outcome, ApplyError>, StorageError> {
        match self.dispatch(position, actor, operation) {
            Ok(outcome) => Ok(Ok(outcome)),
            Err(ApplyFailure::Refused(error)) => Ok(Err(error)),
            Err(ApplyFailure::Storage(error)) => Err(error),
        }
    }

    fn dispatch(
        &mut self,
        position: LogPosition,
        actor: Option<Arc<str>>,
        operation: Operation,
    ) -> Result<Outcome, ApplyFailure> {
        self.refuse_by_alarm(&operation)?;
        match operation {
            Operation::Put(put) => {
                self.check_put(&put)?;
                self.transact(actor, |machine, tx| Ok(Outcome::Put { prev: machine.put(tx, put)? }))
            }
            Operation::DeleteRange(delete) => self.transact(actor, |machine, tx| {
                let (deleted, prev) = machine.delete_range(tx, &delete)?;
                Ok(Outcome::DeleteRange { deleted, prev })
            }),
            Operation::Txn(txn) => {
                let plan = self.plan(&txn)?;
                self.transact(actor, |machine, tx| Ok(Outcome::Txn(machine.execute(tx, txn, plan)?)))
            }
            Operation::Compact { space, revision } => self.compact(space, revision),
            Operation::LeaseGrant { id, ttl_s } => self.grant(id, ttl_s),
            Operation::LeaseRevoke { id } => self.revoke(actor, id),
            Operation::LeaseExpire { term, ids } if term == position.term => {
                for id in ids {
                    // One that was revoked meanwhile is gone already.
                    match self.revoke(None, id) {
                        Ok(_) | Err(ApplyFailure::Refused(ApplyError::LeaseNotFound)) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(Outcome::Done)
            }
            Operation::LeaseCheckpoint { term, remaining } if term == position.term => {
                self.checkpoint_leases(remaining);
                Ok(Outcome::Done)
            }
            Operation::SessionOpen { ttl_s } => {
                Ok(self.sessions.open(&self.db, &mut self.chunk, position.index, ttl_s)?)
            }
            Operation::SessionRenew { session } => {
                Ok(self.sessions.renew(&self.db, &mut self.chunk, position.index, session)?)
            }
            Operation::SessionExpire { term, sessions } if term == position.term => {
                for (id, renewed) in sessions {
                    self.sessions.expire(&self.db, &mut self.chunk, id, renewed);
                }
                Ok(Outcome::Done)
            }
            // A deposed leader's word on what has expired counts for nothing.
            Operation::LeaseExpire { .. }
            | Operation::LeaseCheckpoint { .. }
            | Operation::SessionExpire { .. } => Ok(Outcome::Done),
            Operation::Alarm { action, alarm } => Ok(self.alarm(action, alarm)),
            Operation::ClusterVersion { version } => {
                self.state.cluster_version = self.state.cluster_version.max(version);
                Ok(Outcome::Done)
            }
        }
    }

    /// A full store takes no new keys and leases; a corrupt one takes nothing.
    fn refuse_by_alarm(&self, operation: &Operation) -> Result<(), ApplyError> {
        let raised = |kind| self.state.alarms.iter().any(|alarm| alarm.kind == kind);
        let grows = match operation {
            Operation::Put(_) | Operation::LeaseGrant { .. } => true,
            Operation::Txn(txn) => txn::has_put(txn),
            _ => false,
        };
        if grows && raised(AlarmKind::NoSpace) {
            return Err(ApplyError::NoSpace);
        }
        let changes = matches!(
            operation,
            Operation::Put(_)
                | Operation::DeleteRange(_)
                | Operation::Txn(_)
                | Operation::Compact { .. }
                | Operation::LeaseGrant { .. }
                | Operation::LeaseRevoke { .. }
        );
        if changes && raised(AlarmKind::Corrupt) {
            return Err(ApplyError::Corrupt);
        }
        Ok(())
    }

    /// Makes the changes of one revision, or none of them.
    fn transact<T>(
        &mut self,
        actor: Option<Arc<str>>,
        make: impl FnOnce(&mut Machine, &mut Transaction) -> Result<T, ApplyFailure>,
    ) -> Result<T, ApplyFailure> {
        let mut tx = Transaction::new(self.state.revision.next(), actor, self.state.stamp_ms);
        let made = make(self, &mut tx);
        match &made {
            Ok(_) if !tx.is_empty() => {
                self.state.revision = tx.revision;
                tx.commit(&self.db, &mut self.chunk);
            }
            _ => tx.abandon(&mut self.chunk),
        }
        made
    }

    fn compact(&mut self, space: Space, revision: Revision) -> Result<Outcome, ApplyFailure> {
        if revision <= self.state.compacted(space) {
            return Err(ApplyError::Compacted.into());
        }
        if revision > self.state.revision {
            return Err(ApplyError::FutureRevision.into());
        }
        match space {
            Space::User => self.state.compacted_user = revision,
            Space::System => self.state.compacted_system = revision,
        }
        self.chunk.effects.push(Effect::Compacted(space, revision));
        Ok(Outcome::Done)
    }

    fn grant(&mut self, id: LeaseId, ttl_s: i64) -> Result<Outcome, ApplyFailure> {
        if self.leases.contains_key(&id) {
            return Err(ApplyError::LeaseExists.into());
        }
        let record = LeaseRecord { ttl_s, remaining_s: 0 };
        self.chunk.batch.put_encoded(&self.db, Family::Lease, &layout::lease(id), &record);
        self.leases.insert(id, record);
        self.chunk.effects.push(Effect::LeaseGranted(id, ttl_s));
        Ok(Outcome::LeaseGrant { id, ttl_s })
    }

    /// Removes a lease, and its keys in one revision. What earlier entries
    /// attached is on disk by now (`reads_disk`), and that is where it is read.
    fn revoke(&mut self, actor: Option<Arc<str>>, id: LeaseId) -> Result<Outcome, ApplyFailure> {
        if self.leases.remove(&id).is_none() {
            return Err(ApplyError::LeaseNotFound.into());
        }
        self.chunk.batch.delete(&self.db, Family::Lease, &layout::lease(id));
        let keys = lease::keys(&self.db, id)?;
        self.transact(actor, |machine, tx| {
            for (space, key) in keys {
                let range = KeyRange::Single(key);
                machine.delete_range(tx, &DeleteRange { space, range, prev_kv: false })?;
            }
            Ok(())
        })?;
        self.chunk.effects.push(Effect::LeaseGone(id));
        Ok(Outcome::Done)
    }

    fn checkpoint_leases(&mut self, remaining: Vec<(LeaseId, i64)>) {
        for (id, remaining_s) in remaining {
            if let Some(record) = self.leases.get_mut(&id) {
                record.remaining_s = remaining_s;
                self.chunk.batch.put_encoded(&self.db, Family::Lease, &layout::lease(id), record);
                self.chunk.effects.push(Effect::LeaseCheckpoint(id, remaining_s));
            }
        }
    }

    /// Raises or clears alarms; returns those that changed.
    fn alarm(&mut self, action: AlarmAction, alarm: Alarm) -> Outcome {
        let mut alarms = self.state.alarms.to_vec();
        let changed = match action {
            AlarmAction::Activate => match alarms.binary_search(&alarm) {
                Ok(_) => Vec::new(),
                Err(place) => {
                    alarms.insert(place, alarm);
                    vec![alarm]
                }
            },
            AlarmAction::Deactivate => {
                let meant =
                    |one: &Alarm| one.kind == alarm.kind && (alarm.member == 0 || one.member == alarm.member);
                alarms.extract_if(.., |one| meant(one)).collect()
            }
        };
        self.state.alarms = alarms.into();
        Outcome::Alarms(changed)
    }

    /// Writes what the chunk has so far: one atomic batch with the position it
    /// brings the state to.
    fn write_out(&mut self) -> Result<(), StorageError> {
        self.state.save(&self.db, &mut self.chunk.batch);
        self.chunk.forget(self.db.record_cache_bytes());
        self.db.write(self.chunk.take_writes())
    }

    /// Lets everyone see what was written.
    fn publish(&mut self) {
        let events = std::mem::take(&mut self.chunk.events);
        let effects = std::mem::take(&mut self.chunk.effects);
        self.published.publish(self.state.view(&self.db));
        if let Some(observer) = &self.observer {
            observer.on_chunk(&self.published.view(), events, effects);
        }
    }
}

/// Whether an operation scans families that the unwritten chunk does not cover.
fn reads_disk(operation: &Operation) -> bool {
    match operation {
        Operation::LeaseRevoke { .. } | Operation::LeaseExpire { .. } => true,
        Operation::Txn(txn) => txn::reads_past(txn),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
