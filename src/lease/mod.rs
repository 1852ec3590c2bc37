//! What leases mean to the replicated state: their records, and the keys that
//! go with them.
//!
//! Knows no time: when a lease has expired is the leader's to say, through the
//! log. Writing belongs to `machine`.

use bytes::Bytes;

use crate::storage::layout::{self, Family, LeaseRecord};
use crate::storage::{Read, StorageError, codec};
use crate::types::{LeaseId, Space};

/// The record of a lease, if it exists.
///
/// # Errors
/// When the disk fails or the record is damaged.
pub fn get<R: Read>(data: &R, id: LeaseId) -> Result<Option<LeaseRecord>, StorageError> {
    let bytes = data.get(Family::Lease, &layout::lease(id))?;
    bytes.map(|bytes| codec::decode("lease", &bytes)).transpose()
}

/// All leases, by id.
///
/// # Errors
/// When the disk fails or a record is damaged.
pub fn all<R: Read>(data: &R) -> Result<Vec<(LeaseId, LeaseRecord)>, StorageError> {
    let mut leases = Vec::new();
    let mut cursor = data.scan(Family::Lease, b"r", Some(b"s"));
    cursor.seek_to_first();
    while let Some((key, value)) = cursor.item()? {
        let id = layout::parse_lease(key).ok_or_else(|| unknown_key(key))?;
        leases.push((id, codec::decode("lease", value)?));
        cursor.next();
    }
    Ok(leases)
}

/// The keys attached to a lease, in order of space and key.
///
/// # Errors
/// When the disk fails.
pub fn keys<R: Read>(data: &R, id: LeaseId) -> Result<Vec<(Space, Bytes)>, StorageError> {
    let prefix = layout::lease_keys(id);
    let mut keys = Vec::new();
    let upper = layout::prefix_end(&prefix);
    let mut cursor = data.scan(Family::Lease, &prefix, Some(&upper));
    cursor.seek_to_first();
    while let Some((key, _)) = cursor.item()? {
        let (space, key) = layout::parse_lease_key(key).ok_or_else(|| unknown_key(key))?;
        keys.push((space, Bytes::copy_from_slice(key)));
        cursor.next();
    }
    Ok(keys)
}

fn unknown_key(key: &[u8]) -> StorageError {
    StorageError::Corrupt {
        what: "lease".to_owned(),
        reason: format!("key {key:02x?} is not one of the catalogue"),
    }
}
