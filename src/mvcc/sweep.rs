//! Forgetting: deletes in the background what compaction made unreadable.
//!
//! A change at revision `r` made the version before it obsolete once the mark
//! reaches `r`. So a sweep walks the changes between the last sweep and the
//! mark and deletes each one's predecessor: its cost follows the changes, not
//! the keys. A tombstone below the mark goes too; one *at* the mark stays until
//! the next sweep, because a watch may still start there.

use std::collections::HashMap;

use bytes::Bytes;

use super::version_at;
use crate::mutant::{self, Mutant};
use crate::storage::layout::{self, Change, Family, meta};
use crate::storage::{Batch, Read, StateDb, StorageError, codec};
use crate::types::{Revision, Space};

/// How far a sweep has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweepProgress {
    /// Call again.
    More,
    /// Everything below the mark is gone.
    Done,
}

/// The newest change of each key that sweeps have come across, so that most predecessors need no
/// lookup. It may forget.
#[derive(Debug, Default)]
pub struct Walked {
    /// Where the walk ended. Who goes on from elsewhere, because the database became another one, must
    /// not believe the rest.
    reached: Revision,
    newest: HashMap<Bytes, (Revision, u32)>,
    bytes: usize,
}

/// Keys that are remembered have about so many bytes.
const WALKED_BYTES_MAX: usize = 16 << 20;
/// What a remembered key takes beside itself.
const WALKED_ENTRY_BYTES: usize = 64;

impl Walked {
    /// Up to which revision everything was swept.
    pub fn reached(&self) -> Revision {
        self.reached
    }

    /// Takes note of a change; the one before it, if it is remembered.
    fn replace(&mut self, key: &Bytes, revision: Revision, sub: u32) -> Option<(Revision, u32)> {
        if let Some(newest) = self.newest.get_mut(key) {
            return Some(std::mem::replace(newest, (revision, sub)));
        }
        if self.bytes > WALKED_BYTES_MAX {
            (self.newest, self.bytes) = Default::default();
        }
        self.bytes += WALKED_ENTRY_BYTES + key.len();
        // A copy, so that it does not keep what stood around it.
        self.newest.insert(Bytes::copy_from_slice(key), (revision, sub));
        None
    }
}

/// Deletes what the mark made unreadable, looking at up to `changes_max`
/// changes. Resumes by itself, also after a crash: progress is written together
/// with the deletions. Does not change what any reader can see. `walked` is that
/// of the step before in this space; a new one costs time only.
///
/// # Errors
/// Storage errors; the node must stop.
pub fn sweep(
    db: &StateDb,
    space: Space,
    mark: Revision,
    changes_max: usize,
    walked: &mut Walked,
) -> Result<SweepProgress, StorageError> {
    let name = match space {
        Space::User => meta::SWEPT_USER,
        Space::System => meta::SWEPT_SYSTEM,
    };
    let swept: Revision = match db.get(Family::Meta, name)? {
        Some(bytes) => codec::decode("meta/swept", &bytes)?,
        None => Revision(0),
    };
    if swept >= mark {
        return Ok(SweepProgress::Done);
    }
    if walked.reached != swept {
        *walked = Walked::default();
    }
    let mut batch = Batch::default();
    // The revision of the last sweep is walked again, for its tombstones.
    let lower = layout::history(swept, 0);
    let upper = layout::history(mark.next(), 0);
    let mut cursor = db.scan(Family::History, &lower, Some(&upper));
    cursor.seek_to_first();
    let mut looked_at = 0;
    let mut reached = mark;
    while let Some((key, value)) = cursor.item()? {
        let Some((revision, sub)) = layout::parse_history(key) else {
            return Err(StorageError::Corrupt {
                what: "history".to_owned(),
                reason: format!("key {key:02x?} is not one of the catalogue"),
            });
        };
        if looked_at >= changes_max && revision.prev() > swept {
            // A revision is swept whole or not at all.
            reached = revision.prev();
            break;
        }
        looked_at += 1;
        let change: Change = codec::decode("history", value)?;
        if change.space == space {
            let before = walked.replace(&change.key, revision, sub);
            let is_new = change.record.as_ref().is_some_and(|record| record.version == 1);
            match before {
                // The step before ended with it.
                Some((at, _)) if at == revision => {}
                Some((at, sub)) => forget(db, &mut batch, space, &change.key, at, sub),
                // Before it stood a tombstone or nothing, and tombstones go by themselves, below.
                None if is_new => {}
                None => forget_before(db, &mut batch, space, &change.key, revision)?,
            }
            if mutant::is(Mutant::CompactionDropsTombstone)
                && let Some((at, newest)) = version_at(db, space, &change.key, Revision(i64::MAX))?
                && newest.tombstone
            {
                forget(db, &mut batch, space, &change.key, at, newest.sub);
            }
            if change.record.is_none() && revision < mark {
                forget(db, &mut batch, space, &change.key, revision, sub);
            }
        }
        cursor.next();
    }
    batch.put_encoded(db, Family::Meta, name, &reached);
    db.write(batch)?;
    walked.reached = reached;
    Ok(if reached == mark { SweepProgress::Done } else { SweepProgress::More })
}

/// Deletes the version just before `revision`, if there is one.
fn forget_before(
    db: &StateDb,
    batch: &mut Batch,
    space: Space,
    key: &[u8],
    revision: Revision,
) -> Result<(), StorageError> {
    if let Some((at, version)) = version_at(db, space, key, revision.prev())? {
        forget(db, batch, space, key, at, version.sub);
    }
    Ok(())
}

fn forget(db: &StateDb, batch: &mut Batch, space: Space, key: &[u8], revision: Revision, sub: u32) {
    batch.delete(db, Family::Versions, &layout::version(space, key, revision));
    batch.delete(db, Family::History, &layout::history(revision, sub));
}
