//! The log's twin in memory, for simulation and tests: it keeps what was synced
//! apart from what was only written, and a crash loses the difference.
//!
//! It has no thread and asks no clock: what it does is decided by its caller alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Change, Done, Extent, FatalHook, HeldBytes, LogEngine, LogOp, Recovered, VerifyRecord, corrupt};
use crate::storage::StorageError;

/// A log in memory. See [`MemoryLog::crash`].
pub struct MemoryLog {
    inner: Mutex<Inner>,
    fatal: FatalHook,
}

struct Inner {
    /// What reads see.
    written: Image,
    /// What a crash leaves.
    synced: Image,
    /// Operations in `written` and not in `synced`, oldest first.
    unsynced: Vec<(Change, Option<Done>)>,
    held: HeldBytes,
    condition: Condition,
}

enum Condition {
    /// Every operation is synced before `submit` returns.
    SyncsAtOnce,
    /// Operations wait for [`MemoryLog::sync`].
    SyncsWhenTold,
    /// The disk has failed; nothing is written any more.
    Failed(Arc<StorageError>),
    /// The machine has crashed; nobody is there to answer.
    Crashed,
}

#[derive(Clone, Default)]
struct Image {
    extent: Extent,
    records: BTreeMap<u64, Bytes>,
    purged: Option<(u64, Bytes)>,
    vote: Option<Bytes>,
    committed: Option<Bytes>,
}

impl Image {
    fn apply(&mut self, change: Change) -> Result<(), StorageError> {
        match change {
            Change::Append(records) => {
                self.extent.append(&records)?;
                self.records.extend(records);
            }
            Change::Vote(vote) => self.vote = Some(vote),
            Change::Truncate(last) => {
                for index in self.extent.truncate(last) {
                    self.records.remove(&index);
                }
            }
            Change::Purge(upto, position) => {
                if self.extent.purge(upto) {
                    self.records = self.records.split_off(&upto.saturating_add(1));
                    self.purged = Some((upto, position));
                }
            }
            Change::Committed(position) => self.committed = Some(position),
        }
        Ok(())
    }
}

impl MemoryLog {
    /// An empty log that syncs every operation before `submit` returns.
    pub fn new(fatal: FatalHook) -> MemoryLog {
        MemoryLog::from_image(Image::default(), fatal)
    }

    fn from_image(image: Image, fatal: FatalHook) -> MemoryLog {
        let mut held = HeldBytes::default();
        for (index, record) in &image.records {
            held.append(*index, record.len() as u64);
        }
        let inner = Inner {
            written: image.clone(),
            synced: image,
            unsynced: Vec::new(),
            held,
            condition: Condition::SyncsAtOnce,
        };
        MemoryLog { inner: Mutex::new(inner), fatal }
    }

    /// From now on operations are durable only after [`MemoryLog::sync`].
    pub fn sync_when_told(&self) {
        let mut inner = self.inner.lock();
        if let Condition::SyncsAtOnce = inner.condition {
            inner.condition = Condition::SyncsWhenTold;
        }
    }

    /// How many operations a crash would lose now.
    pub fn unsynced(&self) -> usize {
        self.inner.lock().unsynced.len()
    }

    /// Makes the oldest `operations` of those that wait durable, and calls back.
    pub fn sync(&self, operations: usize) {
        let callbacks = self.inner.lock().sync(operations);
        // Outside the lock: a callback may read the log.
        for done in callbacks {
            done(Ok(()));
        }
    }

    /// The disk as the next process finds it after a crash: everything synced,
    /// and the oldest `surviving` operations of the rest. This log is dead then:
    /// it answers nobody.
    pub fn crash(&self, surviving: usize) -> MemoryLog {
        let mut inner = self.inner.lock();
        let lost = inner.sync(surviving);
        let image = inner.synced.clone();
        inner.condition = Condition::Crashed;
        let waiting = std::mem::take(&mut inner.unsynced);
        drop(inner);
        // Dropped uncalled, and outside the lock.
        drop((lost, waiting));
        MemoryLog::from_image(image, self.fatal.clone())
    }

    /// The disk fails: everything unsynced and all that comes is answered with
    /// `error`, and the fatal hook is called.
    pub fn fail(&self, error: StorageError) {
        self.fail_with(error, None);
    }

    fn fail_with(&self, error: StorageError, newest: Option<Done>) {
        let error = Arc::new(error);
        let waiting = {
            let mut inner = self.inner.lock();
            inner.condition = Condition::Failed(error.clone());
            std::mem::take(&mut inner.unsynced)
        };
        (self.fatal)(&error);
        for done in waiting.into_iter().filter_map(|(_, done)| done).chain(newest) {
            done(Err(error.clone()));
        }
    }
}

impl Inner {
    fn sync(&mut self, operations: usize) -> Vec<Done> {
        let operations = operations.min(self.unsynced.len());
        let mut callbacks = Vec::new();
        for (change, done) in self.unsynced.drain(..operations) {
            self.synced.apply(change).expect("it was applied to what was written before");
            callbacks.extend(done);
        }
        callbacks
    }

    fn write(&mut self, change: Change, done: Option<Done>) -> Result<(), (StorageError, Option<Done>)> {
        if let Err(error) = self.written.apply(change.clone()) {
            return Err((error, done));
        }
        match &change {
            Change::Append(records) => {
                records.iter().for_each(|(index, record)| self.held.append(*index, record.len() as u64));
            }
            Change::Truncate(last) => self.held.truncate_from(last.map_or(0, |last| last.saturating_add(1))),
            Change::Purge(upto, _) => self.held.purge(*upto),
            Change::Vote(_) | Change::Committed(_) => {}
        }
        self.unsynced.push((change, done));
        Ok(())
    }
}

impl LogEngine for MemoryLog {
    fn recover(&self, verify_from: u64, verify: VerifyRecord<'_>) -> Result<Recovered, StorageError> {
        let inner = self.inner.lock();
        let image = &inner.written;
        let recovered = Recovered {
            last: image.records.last_key_value().map(|(index, record)| (*index, record.clone())),
            purged: image.purged.clone(),
            vote: image.vote.clone(),
            committed: image.committed.clone(),
        };
        for (expected, (index, record)) in (recovered.first_index()..).zip(&image.records) {
            if *index != expected {
                return Err(corrupt(format!("record {expected} is missing; the next one is {index}")));
            }
            if *index >= verify_from {
                verify(*index, record)?;
            }
        }
        Ok(recovered)
    }

    fn submit(&self, op: LogOp) {
        let (change, done) = op.split();
        let mut inner = self.inner.lock();
        match &inner.condition {
            Condition::Crashed => {}
            Condition::Failed(error) => {
                let error = error.clone();
                drop(inner);
                if let Some(done) = done {
                    done(Err(error));
                }
            }
            Condition::SyncsAtOnce | Condition::SyncsWhenTold => {
                let at_once = matches!(inner.condition, Condition::SyncsAtOnce);
                let outcome = inner.write(change, done);
                drop(inner);
                match outcome {
                    Ok(()) if at_once => self.sync(usize::MAX),
                    Ok(()) => {}
                    Err((error, done)) => self.fail_with(error, done),
                }
            }
        }
    }

    fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<(u64, Bytes)>, StorageError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let inner = self.inner.lock();
        let mut bytes = 0;
        let mut records = Vec::new();
        for (expected, (index, record)) in range.clone().zip(inner.written.records.range(range)) {
            if *index != expected {
                return Err(corrupt(format!("record {expected} is missing; the next one is {index}")));
            }
            bytes += record.len();
            records.push((*index, record.clone()));
            if bytes >= limit_bytes {
                break;
            }
        }
        Ok(records)
    }

    fn read_may_block(&self) -> bool {
        false
    }

    fn held_bytes(&self) -> u64 {
        self.inner.lock().held.total
    }

    fn first_index_within(&self, keep_bytes: u64) -> Option<u64> {
        self.inner.lock().held.first_index_within(keep_bytes)
    }
}
