//! What is kept of a key, and its packed form, in which it lies in the second
//! level and on disk.
//!
//! A packed record begins with a checksum of its key and of everything behind it,
//! so that a record that was damaged, or that lies under another key, is not read.

use bytes::{Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

use crate::types::{KeyValue, Revision};

/// A moment in microseconds of the monotonic clock; below zero before it began.
/// [`Moment::MIN`] is never.
pub(super) type Moment = i64;

/// What is known of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The key; `None` if it does not exist.
    pub kv: Option<KeyValue>,
    /// The key's state was this at this revision.
    pub as_of: Revision,
    /// The key's state was this at some moment not before this one.
    pub proved: Moment,
    /// When it came into the first level; [`Moment::MIN`] for not known.
    pub stored: Moment,
}

impl Entry {
    /// The more recent knowledge of two, with the better proof: what is newer is
    /// also proven by whatever proved the older.
    pub fn merge(self, other: &Entry) -> Entry {
        let proved = self.proved.max(other.proved);
        let newer = if other.as_of > self.as_of { other.clone() } else { self };
        Entry { proved, ..newer }
    }

    /// What it counts for in memory, in bytes.
    pub fn footprint(&self, key: &[u8]) -> u32 {
        let held = self.kv.as_ref().map_or(0, |kv| kv.key.len() + kv.value.len());
        // The cache's own node, the key and the pointers to them.
        u32::try_from(key.len() + held + size_of::<Entry>() + 160).unwrap_or(u32::MAX)
    }
}

/// A copy with memory of its own. What a client receives shares the memory of the
/// whole message, which one small key would keep alive.
pub(super) fn own(kv: &KeyValue) -> KeyValue {
    let mut both = BytesMut::with_capacity(kv.key.len() + kv.value.len());
    both.extend_from_slice(&kv.key);
    both.extend_from_slice(&kv.value);
    let mut key = both.freeze();
    let value = key.split_off(kv.key.len());
    KeyValue { key, value, ..kv.clone() }
}

const PRESENT: u8 = 1;
const COMPRESSED: u8 = 2;
/// Checksum, flags, six numbers, length.
const HEAD: usize = 8 + 1 + 6 * 8 + 4;
/// Values shorter than this are not worth compressing.
const COMPRESS_MIN: usize = 64;
/// No server takes a value near this; a length beyond it is damage.
const VALUE_MAX: usize = 1 << 30;

/// The packed form of an entry of `key`.
pub(super) fn pack(key: &[u8], entry: &Entry) -> Vec<u8> {
    let empty = KeyValue {
        key: Bytes::new(),
        create_revision: Revision(0),
        mod_revision: Revision(0),
        version: 0,
        lease: Default::default(),
        value: Bytes::new(),
    };
    let kv = entry.kv.as_ref().unwrap_or(&empty);
    let mut flags = if entry.kv.is_some() { PRESENT } else { 0 };
    let compressed = (kv.value.len() >= COMPRESS_MIN).then(|| lz4_flex::block::compress(&kv.value));
    let payload = match &compressed {
        Some(smaller) if smaller.len() < kv.value.len() => {
            flags |= COMPRESSED;
            &smaller[..]
        }
        _ => &kv.value[..],
    };
    let mut record = Vec::with_capacity(HEAD + payload.len());
    record.extend_from_slice(&[0; 8]);
    record.push(flags);
    let numbers =
        [entry.as_of.0, entry.proved, kv.create_revision.0, kv.mod_revision.0, kv.version, kv.lease.0];
    for number in numbers {
        record.extend_from_slice(&number.to_le_bytes());
    }
    record.extend_from_slice(&(kv.value.len() as u32).to_le_bytes());
    record.extend_from_slice(payload);
    let sum = checksum(key, &record[8..]);
    record[..8].copy_from_slice(&sum.to_le_bytes());
    record
}

/// The entry of `key` in a packed record; `None` if the record is damaged.
pub(super) fn unpack(key: &[u8], record: &[u8]) -> Option<Entry> {
    let flags = *record.get(8).filter(|_| is_sound(key, record))?;
    let number = |at: usize| -> Option<i64> {
        let from = 9 + 8 * at;
        Some(i64::from_le_bytes(record.get(from..from + 8)?.try_into().ok()?))
    };
    let length = u32::from_le_bytes(record.get(HEAD - 4..HEAD)?.try_into().ok()?) as usize;
    let payload = &record[HEAD..];
    if length > VALUE_MAX {
        return None;
    }
    let value = |payload: &[u8]| -> Option<Vec<u8>> {
        match flags & COMPRESSED != 0 {
            true => lz4_flex::block::decompress(payload, length).ok().filter(|value| value.len() == length),
            false => (payload.len() == length).then(|| payload.to_vec()),
        }
    };
    let kv = match flags & PRESENT != 0 {
        true => Some(KeyValue {
            key: Bytes::copy_from_slice(key),
            create_revision: Revision(number(2)?),
            mod_revision: Revision(number(3)?),
            version: number(4)?,
            lease: crate::types::LeaseId(number(5)?),
            value: value(payload)?.into(),
        }),
        false => None,
    };
    Some(Entry { kv, as_of: Revision(number(0)?), proved: number(1)?, stored: Moment::MIN })
}

/// The mod revision in a packed record of a key that exists; `None` if the record
/// is damaged.
pub(super) fn mod_revision(key: &[u8], record: &[u8]) -> Option<Revision> {
    let present = record.get(8).is_some_and(|flags| flags & PRESENT != 0);
    let number = record.get(33..41).filter(|_| present && is_sound(key, record))?;
    Some(Revision(i64::from_le_bytes(number.try_into().ok()?)))
}

fn is_sound(key: &[u8], record: &[u8]) -> bool {
    let Some((sum, rest)) = record.split_first_chunk::<8>() else { return false };
    record.len() >= HEAD && u64::from_le_bytes(*sum) == checksum(key, rest)
}

fn checksum(key: &[u8], rest: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(key.len() as u64);
    hash.update(key);
    hash.update(rest);
    hash.digest()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::LeaseId;

    fn entry(value: Option<Vec<u8>>, numbers: [i64; 5]) -> Entry {
        let [create, modified, version, lease, proved] = numbers;
        let kv = value.map(|value| KeyValue {
            key: "key".into(),
            create_revision: Revision(create),
            mod_revision: Revision(modified),
            version,
            lease: LeaseId(lease),
            value: value.into(),
        });
        Entry { kv, as_of: Revision(modified), proved, stored: Moment::MIN }
    }

    fn values() -> impl Strategy<Value = Option<Vec<u8>>> {
        let runs = (any::<u8>(), 0..2000usize).prop_map(|(byte, count)| vec![byte; count]);
        prop_oneof![
            Just(None),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(Some),
            runs.prop_map(Some)
        ]
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(value in values(), numbers in any::<[i64; 5]>()) {
            let entry = entry(value, numbers);
            let record = pack(b"key", &entry);
            prop_assert_eq!(unpack(b"key", &record), Some(entry.clone()));
            prop_assert_eq!(unpack(b"kex", &record), None, "a record of another key");
            let modified = mod_revision(b"key", &record);
            prop_assert_eq!(modified, entry.kv.map(|kv| kv.mod_revision));
        }

        #[test]
        fn damage_is_noticed(
            value in values(),
            at in any::<prop::sample::Index>(),
            flip in 1..=255u8,
            cut in any::<bool>(),
        ) {
            let mut record = pack(b"key", &entry(value, [1, 2, 3, 4, 5]));
            let at = at.index(record.len());
            if cut { record.truncate(at) } else { record[at] ^= flip }
            prop_assert_eq!(unpack(b"key", &record), None);
            prop_assert_eq!(mod_revision(b"key", &record), None);
        }
    }

    #[test]
    fn a_copy_shares_nothing() {
        let message = Bytes::from(vec![b'x'; 1000]);
        let kv = KeyValue {
            key: message.slice(..3),
            value: message.slice(3..6),
            ..entry(Some(vec![]), [0; 5]).kv.unwrap()
        };
        let copy = own(&kv);
        assert_eq!(copy, kv);
        drop(kv);
        assert!(message.is_unique(), "the message can be freed");
    }
}
