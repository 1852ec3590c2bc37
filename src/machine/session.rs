//! Sessions of request ids: a write repeated with the same id is applied once.
//!
//! The table is part of the state, and its mirror in memory is read from disk
//! when a state is opened. It is bounded: so many sessions, so many writes of
//! each that were not acknowledged, and replies only up to a size; beyond it a
//! retry learns that, and when, its write was applied.

use std::collections::{BTreeMap, HashMap};

use super::Effect;
use super::chunk::Chunk;
use crate::storage::layout::{self, Family, SessionKey, SessionRecord, WriteRecord};
use crate::storage::{Read, StateDb, StorageError, codec};
use crate::types::{ApplyError, Outcome, Reply, RequestId, SequenceOutcome};

/// The most sessions at a time.
const SESSIONS_MAX: usize = 10_000;
/// The most writes of one session that were not acknowledged.
const UNACKNOWLEDGED_MAX: usize = 1_024;
/// The largest reply that is kept, encoded.
const REPLY_BYTES_MAX: usize = 64 << 10;

/// All sessions.
#[derive(Default)]
pub(super) struct Sessions {
    sessions: HashMap<u64, Session>,
}

struct Session {
    record: SessionRecord,
    writes: BTreeMap<u64, WriteRecord>,
}

/// Whether a write is to be applied, or was.
pub(super) enum Verdict {
    /// It was not seen before: apply it, then `record` its reply.
    Apply,
    /// It was applied, and this was its reply; or it cannot be.
    Answer(Result<Reply, ApplyError>),
}

impl Sessions {
    /// Reads the table of a state.
    pub fn load(db: &StateDb) -> Result<Sessions, StorageError> {
        let mut sessions = Sessions::default();
        let mut cursor = db.scan(Family::Session, b"s", None);
        cursor.seek_to_first();
        while let Some((key, value)) = cursor.item()? {
            match layout::parse_session(key) {
                Some(SessionKey::Session(id)) => {
                    let record = codec::decode("session", value)?;
                    sessions.sessions.insert(id, Session { record, writes: BTreeMap::new() });
                }
                Some(SessionKey::Write(id, sequence)) => {
                    // Sessions sort before writes, so each write finds its own.
                    if let Some(session) = sessions.sessions.get_mut(&id) {
                        session.writes.insert(sequence, codec::decode("session write", value)?);
                    }
                }
                None => {
                    let reason = format!("key {key:02x?} is not one of the catalogue");
                    return Err(StorageError::Corrupt { what: "session".to_owned(), reason });
                }
            }
            cursor.next();
        }
        Ok(sessions)
    }

    /// The ids of all sessions with their records, by id.
    pub fn records(&self) -> Vec<(u64, SessionRecord)> {
        let mut records: Vec<_> = self.sessions.iter().map(|(id, session)| (*id, session.record)).collect();
        records.sort_unstable_by_key(|(id, _)| *id);
        records
    }

    /// Opens the session that the entry at `index` asks for; its id is the index.
    pub fn open(
        &mut self,
        db: &StateDb,
        chunk: &mut Chunk,
        index: u64,
        ttl_s: u64,
    ) -> Result<Outcome, ApplyError> {
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(ApplyError::SessionLimit { what: "sessions".into(), limit: SESSIONS_MAX as u64 });
        }
        let record = SessionRecord { ttl_s: ttl_s.max(1), renewed: index, acknowledged: 0 };
        self.sessions.insert(index, Session { record, writes: BTreeMap::new() });
        write_session(db, chunk, index, &record);
        Ok(Outcome::Session { id: index })
    }

    /// Keeps a session alive.
    pub fn renew(
        &mut self,
        db: &StateDb,
        chunk: &mut Chunk,
        index: u64,
        id: u64,
    ) -> Result<Outcome, ApplyError> {
        let session = self.sessions.get_mut(&id).ok_or(ApplyError::SessionNotFound { session: id })?;
        session.record.renewed = index;
        write_session(db, chunk, id, &session.record);
        Ok(Outcome::Done)
    }

    /// Forgets a session, unless it was renewed after the renewal that ran out.
    pub fn expire(&mut self, db: &StateDb, chunk: &mut Chunk, id: u64, renewed: u64) {
        if self.sessions.get(&id).is_none_or(|session| session.record.renewed != renewed) {
            return;
        }
        if let Some(session) = self.sessions.remove(&id) {
            for sequence in session.writes.into_keys() {
                chunk.batch.delete(db, Family::Session, &layout::session_write(id, sequence));
            }
            chunk.batch.delete(db, Family::Session, &layout::session(id));
            chunk.effects.push(Effect::SessionGone(id));
        }
    }

    /// Whether the write named by `request`, with this content, is to be applied.
    /// Drops what the client acknowledges, and counts as a renewal.
    pub fn admit(
        &mut self,
        db: &StateDb,
        chunk: &mut Chunk,
        index: u64,
        request: RequestId,
        fingerprint: u32,
    ) -> Verdict {
        let id = request.session;
        let Some(session) = self.sessions.get_mut(&id) else {
            return Verdict::Answer(Err(ApplyError::SessionNotFound { session: id }));
        };
        if let Some(write) = session.writes.get(&request.sequence) {
            return Verdict::Answer(write.answer(request.sequence, fingerprint));
        }
        if request.sequence <= session.record.acknowledged {
            return Verdict::Answer(Err(ApplyError::SequenceAcknowledged { sequence: request.sequence }));
        }
        // A client may not acknowledge the very write it asks for.
        let acknowledged = request.acknowledged.min(request.sequence.saturating_sub(1));
        if acknowledged > session.record.acknowledged {
            session.record.acknowledged = acknowledged;
            let kept = session.writes.split_off(&(acknowledged + 1));
            for sequence in std::mem::replace(&mut session.writes, kept).into_keys() {
                chunk.batch.delete(db, Family::Session, &layout::session_write(id, sequence));
            }
        }
        if session.writes.len() >= UNACKNOWLEDGED_MAX {
            let what = "unacknowledged writes in the session".into();
            return Verdict::Answer(Err(ApplyError::SessionLimit { what, limit: UNACKNOWLEDGED_MAX as u64 }));
        }
        session.record.renewed = index;
        write_session(db, chunk, id, &session.record);
        Verdict::Apply
    }

    /// Keeps the reply of an admitted write for its retries.
    pub fn record(
        &mut self,
        db: &StateDb,
        chunk: &mut Chunk,
        request: RequestId,
        fingerprint: u32,
        reply: &Reply,
    ) {
        let encoded_bytes = codec::encode(reply).len();
        let kept = (encoded_bytes <= REPLY_BYTES_MAX).then(|| reply.clone());
        let write = WriteRecord { fingerprint, revision: reply.revision, reply: kept };
        let key = layout::session_write(request.session, request.sequence);
        chunk.batch.put_encoded(db, Family::Session, &key, &write);
        let session = self.sessions.get_mut(&request.session).expect("admitted, so the session exists");
        session.writes.insert(request.sequence, write);
    }
}

impl WriteRecord {
    /// The answer to a retry of this write: the first one's, with its revision.
    fn answer(&self, sequence: u64, fingerprint: u32) -> Result<Reply, ApplyError> {
        if self.fingerprint != fingerprint {
            return Err(ApplyError::SequenceReused { sequence });
        }
        let revision = self.revision;
        let lost = || Outcome::AppliedBefore(SequenceOutcome { revision });
        Ok(self.reply.clone().unwrap_or_else(|| Reply { revision, outcome: Ok(lost()) }))
    }
}

fn write_session(db: &StateDb, chunk: &mut Chunk, id: u64, record: &SessionRecord) {
    chunk.batch.put_encoded(db, Family::Session, &layout::session(id), record);
    chunk.effects.push(Effect::SessionRenewed(id, record.ttl_s, record.renewed));
}
