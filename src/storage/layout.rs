//! The one catalogue of on-disk keys.
//!
//! Keys are laid by hand, big-endian, so that byte order is meaning. A tag is
//! never reused.
//!
//! | family | key | value (`codec`) |
//! |---|---|---|
//! | `current` | space, key | [`Record`] |
//! | `history` | revision u64, sub u32 | [`Change`] |
//! | `versions` | space, escaped key, !revision u64 | [`VersionRef`] |
//! | `lease` | `r`, lease id u64 | [`LeaseRecord`] |
//! | `lease` | `k`, lease id u64, space, key | empty |
//! | `session` | `s`, session u64 | [`SessionRecord`] |
//! | `session` | `w`, session u64, sequence u64 | [`WriteRecord`] |
//! | `meta` | one of [`meta`]'s names | see there |

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::types::{EventKind, LeaseId, Reply, Revision, Space};

/// The column families of the state database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Family {
    /// The newest value of every key.
    Current = 0,
    /// Every change, by revision.
    History = 1,
    /// Where each key's changes are, newest first.
    Versions = 2,
    /// Leases and the keys attached to them.
    Lease = 3,
    /// Users and roles.
    Auth = 4,
    /// Sessions of request ids, and the replies kept for them.
    Session = 5,
    /// Single values: what was applied, the revision, the marks.
    Meta = 6,
}

impl Family {
    /// All families, in the order of their numbers.
    pub const ALL: [Family; 7] = [
        Family::Current,
        Family::History,
        Family::Versions,
        Family::Lease,
        Family::Auth,
        Family::Session,
        Family::Meta,
    ];

    /// The column family's name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Family::Current => "current",
            Family::History => "history",
            Family::Versions => "versions",
            Family::Lease => "lease",
            Family::Auth => "auth",
            Family::Session => "session",
            Family::Meta => "meta",
        }
    }
}

/// Names in the `meta` family.
pub mod meta {
    /// [`super::AppliedRecord`]: the last applied entry.
    pub const APPLIED: &[u8] = b"applied";
    /// Bytes of the raft room: the last membership, with its log id.
    pub const MEMBERSHIP: &[u8] = b"membership";
    /// `Revision`: the store's revision.
    pub const REVISION: &[u8] = b"revision";
    /// `Revision`: the compact mark of the user space.
    pub const COMPACTED_USER: &[u8] = b"compacted/u";
    /// `Revision`: the compact mark of the system space.
    pub const COMPACTED_SYSTEM: &[u8] = b"compacted/s";
    /// `Vec<Alarm>`: raised alarms, sorted.
    pub const ALARMS: &[u8] = b"alarms";
    /// `u32`: the cluster version.
    pub const CLUSTER_VERSION: &[u8] = b"cluster-version";
    /// `u64`: the highest time stamp applied, in milliseconds since 1970.
    pub const STAMP: &[u8] = b"stamp";
    /// `Revision`, local to this node and not part of its logical content: the
    /// compact mark up to which the user space's old versions were deleted.
    pub const SWEPT_USER: &[u8] = b"local/swept/u";
    /// The same for the system space.
    pub const SWEPT_SYSTEM: &[u8] = b"local/swept/s";
}

/// The newest value of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Revision that created it.
    pub create: Revision,
    /// Revision of this value.
    pub modified: Revision,
    /// Puts since it was created, from 1.
    pub version: i64,
    /// Attached lease, or none.
    pub lease: LeaseId,
    /// The value.
    pub value: Bytes,
}

/// One change, as history keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Space of the key.
    pub space: Space,
    /// Set or removed.
    pub kind: EventKind,
    /// The key.
    pub key: Bytes,
    /// The record after a put; `None` after a removal.
    pub record: Option<Record>,
    /// Who asked.
    pub actor: Option<Arc<str>>,
    /// The leader's stamp, milliseconds since 1970.
    pub time_ms: u64,
}

/// One version of a key: where its change is, and enough to hash it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRef {
    /// Place inside the revision.
    pub sub: u32,
    /// Whether this version is a removal.
    pub tombstone: bool,
    /// CRC-32C of value, version, create revision and lease.
    pub digest: u32,
}

/// The last applied entry, in openraft's terms but our own bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogPosition {
    /// Term of the leader that wrote it.
    pub term: u64,
    /// The leader that wrote it.
    pub node: u64,
    /// Its index.
    pub index: u64,
}

/// What `meta/applied` holds.
pub type AppliedRecord = LogPosition;

/// A lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Granted time to live in seconds.
    pub ttl_s: i64,
    /// Remaining seconds at the last checkpoint; 0 when none was made.
    pub remaining_s: i64,
}

/// A session of request ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// How long it lives without renewal, in seconds.
    pub ttl_s: u64,
    /// Log index of the newest renewal.
    pub renewed: u64,
    /// Every sequence up to here was answered.
    pub acknowledged: u64,
}

/// A write of a session that may be asked for again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteRecord {
    /// CRC-32C of the operation, to recognise a reused sequence.
    pub fingerprint: u32,
    /// The revision it was applied at.
    pub revision: Revision,
    /// The reply, unless it was too large to keep.
    pub reply: Option<Reply>,
}

/// Key of `current`.
pub fn current(space: Space, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + key.len());
    out.push(space.tag());
    out.extend_from_slice(key);
    out
}

/// Key of `history`.
pub fn history(revision: Revision, sub: u32) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&(revision.0 as u64).to_be_bytes());
    out[8..].copy_from_slice(&sub.to_be_bytes());
    out
}

/// What [`history`] made a key of.
pub fn parse_history(key: &[u8]) -> Option<(Revision, u32)> {
    let revision = u64::from_be_bytes(key.get(..8)?.try_into().ok()?);
    let sub = u32::from_be_bytes(key.get(8..)?.try_into().ok()?);
    Some((Revision(revision as i64), sub))
}

/// The part of a `versions` key that all versions of a key share: the space and
/// the key, escaped (0 becomes 0 255) and ended by 0 1, so that the order of
/// the keys is kept and no key's versions stand among another's.
pub fn versions_prefix(space: Space, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 11);
    out.push(space.tag());
    for byte in key {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 1]);
    out
}

/// Key of `versions`. Newer revisions sort first.
pub fn version(space: Space, key: &[u8], revision: Revision) -> Vec<u8> {
    let mut out = versions_prefix(space, key);
    out.extend_from_slice(&(!(revision.0 as u64)).to_be_bytes());
    out
}

/// What [`version`] made a key of: space, key and revision.
pub fn parse_version(bytes: &[u8]) -> Option<(Space, Vec<u8>, Revision)> {
    let (tag, rest) = bytes.split_first()?;
    let (escaped, revision) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
    let escaped = escaped.strip_suffix(&[0, 1])?;
    let mut key = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.iter();
    while let Some(byte) = bytes.next() {
        key.push(*byte);
        if *byte == 0 && bytes.next() != Some(&0xff) {
            return None;
        }
    }
    let revision = !u64::from_be_bytes(revision.try_into().ok()?);
    Some((Space::from_tag(*tag)?, key, Revision(revision as i64)))
}

/// Key of a lease's record.
pub fn lease(id: LeaseId) -> [u8; 9] {
    tagged(b'r', id.0 as u64)
}

/// What [`lease`] made a key of.
pub fn parse_lease(key: &[u8]) -> Option<LeaseId> {
    let id = key.strip_prefix(b"r")?;
    Some(LeaseId(u64::from_be_bytes(id.try_into().ok()?) as i64))
}

/// The part that all keys attached to a lease share.
pub fn lease_keys(id: LeaseId) -> [u8; 9] {
    tagged(b'k', id.0 as u64)
}

/// Key of one attachment.
pub fn lease_key(id: LeaseId, space: Space, key: &[u8]) -> Vec<u8> {
    let mut out = lease_keys(id).to_vec();
    out.push(space.tag());
    out.extend_from_slice(key);
    out
}

/// Space and key of an attachment.
pub fn parse_lease_key(bytes: &[u8]) -> Option<(Space, &[u8])> {
    let (_, rest) = bytes.strip_prefix(b"k")?.split_at_checked(8)?;
    let (tag, key) = rest.split_first()?;
    Some((Space::from_tag(*tag)?, key))
}

/// Key of a session.
pub fn session(id: u64) -> [u8; 9] {
    tagged(b's', id)
}

/// Key of a session's write.
pub fn session_write(id: u64, sequence: u64) -> [u8; 17] {
    let mut out = [0; 17];
    out[..9].copy_from_slice(&tagged(b'w', id));
    out[9..].copy_from_slice(&sequence.to_be_bytes());
    out
}

/// What a key of `session` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionKey {
    /// A session, as [`session`] made it.
    Session(u64),
    /// A session's write: the session and the sequence, as [`session_write`] made it.
    Write(u64, u64),
}

/// What a key of `session` names.
pub fn parse_session(key: &[u8]) -> Option<SessionKey> {
    let number = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_be_bytes);
    match key.split_first()? {
        (b's', id) => Some(SessionKey::Session(number(id)?)),
        (b'w', rest) => {
            let (id, sequence) = rest.split_at_checked(8)?;
            Some(SessionKey::Write(number(id)?, number(sequence)?))
        }
        _ => None,
    }
}

/// The least key above every key that begins with `prefix`.
///
/// # Panics
/// When `prefix` is all 0xff, which no tag of this catalogue is.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff).expect("no tag is 0xff");
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    end
}

fn tagged(tag: u8, number: u64) -> [u8; 9] {
    let mut out = [tag; 9];
    out[1..].copy_from_slice(&number.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn version_keys_round_trip_and_keep_the_order_of_keys(
            a in proptest::collection::vec(0u8..4, 0..6), b in proptest::collection::vec(0u8..4, 0..6),
            at in 1i64..1000, bt in 1i64..1000,
        ) {
            let encode = |key: &[u8], revision| version(Space::User, key, Revision(revision));
            prop_assert_eq!(parse_version(&encode(&a, at)), Some((Space::User, a.clone(), Revision(at))));
            let expected = a.cmp(&b).then(bt.cmp(&at));
            prop_assert_eq!(encode(&a, at).cmp(&encode(&b, bt)), expected);
        }

        #[test]
        fn history_and_lease_keys_round_trip(revision in 1i64.., sub: u32, id: i64, key: Vec<u8>) {
            prop_assert_eq!(parse_history(&history(Revision(revision), sub)), Some((Revision(revision), sub)));
            prop_assert_eq!(parse_lease(&lease(LeaseId(id))), Some(LeaseId(id)));
            let attached = lease_key(LeaseId(id), Space::System, &key);
            prop_assert_eq!(parse_lease_key(&attached), Some((Space::System, &key[..])));
        }
    }
}
