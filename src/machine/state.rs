//! The single values of the replicated state: loaded once, kept in memory, written with every batch.
//!
//! What has many records (keys, leases, sessions) is not here.

use bytes::Bytes;
use std::sync::Arc;

use crate::mutant::{self, Mutant};
use crate::mvcc::View;
use crate::storage::layout::{Family, LogPosition, meta};
use crate::storage::{Batch, Read, StateDb, StorageError, codec};
use crate::types::{Alarm, Revision, Space};

/// The single values of the state.
#[derive(Clone)]
pub(super) struct State {
    pub(super) applied: LogPosition,
    pub(super) membership: Option<Bytes>,
    pub(super) revision: Revision,
    pub(super) compacted_user: Revision,
    pub(super) compacted_system: Revision,
    pub(super) alarms: Arc<[Alarm]>,
    pub(super) cluster_version: u32,
    pub(super) stamp_ms: u64,
}

impl State {
    pub(super) fn load(db: &StateDb) -> Result<State, StorageError> {
        fn value<T: serde::de::DeserializeOwned>(
            db: &StateDb,
            name: &[u8],
            default: T,
        ) -> Result<T, StorageError> {
            match db.get(Family::Meta, name)? {
                Some(bytes) => codec::decode("meta", &bytes),
                None => Ok(default),
            }
        }
        Ok(State {
            applied: value(db, meta::APPLIED, LogPosition::default())?,
            membership: db.get(Family::Meta, meta::MEMBERSHIP)?.map(|bytes| Bytes::copy_from_slice(&bytes)),
            revision: value(db, meta::REVISION, Revision::FIRST)?,
            compacted_user: value(db, meta::COMPACTED_USER, Revision(0))?,
            compacted_system: value(db, meta::COMPACTED_SYSTEM, Revision(0))?,
            alarms: value::<Vec<Alarm>>(db, meta::ALARMS, Vec::new())?.into(),
            cluster_version: value(db, meta::CLUSTER_VERSION, 0)?,
            stamp_ms: value(db, meta::STAMP, 0)?,
        })
    }

    /// Puts the single values, but for the membership, into a batch.
    pub(super) fn save(&self, db: &StateDb, batch: &mut Batch) {
        if !mutant::is(Mutant::ReplayNotIdempotent) || self.applied.index.is_multiple_of(2) {
            batch.put_encoded(db, Family::Meta, meta::APPLIED, &self.applied);
        }
        batch.put_encoded(db, Family::Meta, meta::REVISION, &self.revision);
        batch.put_encoded(db, Family::Meta, meta::COMPACTED_USER, &self.compacted_user);
        batch.put_encoded(db, Family::Meta, meta::COMPACTED_SYSTEM, &self.compacted_system);
        batch.put_encoded(db, Family::Meta, meta::ALARMS, &self.alarms);
        batch.put_encoded(db, Family::Meta, meta::CLUSTER_VERSION, &self.cluster_version);
        batch.put_encoded(db, Family::Meta, meta::STAMP, &self.stamp_ms);
    }

    pub(super) fn compacted(&self, space: Space) -> Revision {
        match space {
            Space::User => self.compacted_user,
            Space::System => self.compacted_system,
        }
    }

    /// The view of what the database holds now; whatever the state says must be written out by then.
    pub(super) fn view(&self, db: &StateDb) -> View {
        View {
            data: db.snapshot(),
            revision: self.revision,
            compacted_user: self.compacted_user,
            compacted_system: self.compacted_system,
            applied: self.applied,
            alarms: self.alarms.clone(),
            cluster_version: self.cluster_version,
        }
    }
}
