//! The hash that all members agree on at one revision.

use super::range::check_revision;
use super::{Marks, ReadError, parse_version};
use crate::storage::layout::{Family, Record, VersionRef};
use crate::storage::{Read, codec};
use crate::types::{Revision, Space};

/// What HashKV answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvHash {
    /// CRC-32C over every readable version of every key.
    pub hash: u32,
    /// The mark below which nothing was hashed.
    pub compacted: Revision,
    /// The revision hashed at.
    pub revision: Revision,
    /// How many versions were hashed.
    pub versions: u64,
}

/// What a version's reference remembers of its record.
pub fn digest(record: &Record) -> u32 {
    let mut crc = crc32c::crc32c(&record.value);
    for number in [record.create.0, record.version, record.lease.0] {
        crc = crc32c::crc32c_append(crc, &number.to_be_bytes());
    }
    crc
}

/// Hashes every version of the space that can be read or watched at `revision`
/// (0: the newest): those above the compact mark, and the newest of each key at
/// or below it. What the sweep has or has not deleted yet makes no difference.
///
/// # Errors
/// `Compacted` or `FutureRevision`, and storage errors.
pub fn hash_kv<R: Read>(
    data: &R,
    marks: Marks,
    space: Space,
    revision: Revision,
) -> Result<KvHash, ReadError> {
    check_revision(marks, revision)?;
    let at = if revision.0 <= 0 { marks.revision } else { revision };
    let mut result = KvHash { hash: 0, compacted: marks.compacted, revision: at, versions: 0 };
    let mut cursor = data.scan(Family::Versions, &[space.tag()], Some(&[space.tag() + 1]));
    cursor.seek_to_first();
    // The key whose newest version at or below the mark was already met.
    let mut settled: Option<Vec<u8>> = None;
    while let Some((found, value)) = cursor.item()? {
        let (key, version_revision) = parse_version(found)?;
        let version: VersionRef = codec::decode("version", value)?;
        let counts = if version_revision > at {
            false
        } else if version_revision > marks.compacted {
            true
        } else if settled.as_deref() == Some(&key) {
            false
        } else {
            settled = Some(key);
            // A tombstone at the mark can still be watched; an older one is gone.
            !version.tombstone || version_revision == marks.compacted
        };
        if counts {
            let tail = [version.tombstone as u8, version.sub as u8];
            result.hash = crc32c::crc32c_append(result.hash, found);
            result.hash = crc32c::crc32c_append(result.hash, &tail);
            result.hash = crc32c::crc32c_append(result.hash, &version.digest.to_be_bytes());
            result.versions += 1;
        }
        cursor.next();
    }
    Ok(result)
}
