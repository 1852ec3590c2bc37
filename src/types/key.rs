//! Spaces, and ranges of keys.

use std::ops::Bound;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The half of the key space a key lives in. The discriminant is the byte
/// that stands before every key on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Space {
    /// What etcd clients see.
    #[default]
    User = b'u',
    /// What belongs to the configuration layer; no etcd request reaches it.
    System = b's',
}

impl Space {
    /// The byte that stands before a key of this space on disk.
    pub fn tag(self) -> u8 {
        self as u8
    }

    /// The space with this tag.
    pub fn from_tag(tag: u8) -> Option<Space> {
        match tag {
            b'u' => Some(Space::User),
            b's' => Some(Space::System),
            _ => None,
        }
    }
}

/// One key, or all keys from `start` (inclusive) to an end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KeyRange {
    /// Exactly this key.
    Single(Bytes),
    /// `start <= key < end`.
    Span {
        /// The first key, inclusive.
        start: Bytes,
        /// The end, exclusive.
        end: Bytes,
    },
    /// `start <= key`, without an end (etcd's `range_end = "\0"`).
    From(Bytes),
}

impl KeyRange {
    /// The range that etcd's pair of `key` and `range_end` means.
    pub fn from_wire(key: Bytes, range_end: Bytes) -> KeyRange {
        match &range_end[..] {
            [] => KeyRange::Single(key),
            [0] => KeyRange::From(key),
            _ => KeyRange::Span { start: key, end: range_end },
        }
    }

    /// All keys that begin with `prefix`; every key when it is empty.
    pub fn prefix(prefix: Bytes) -> KeyRange {
        match prefix_end(&prefix) {
            Some(end) => KeyRange::Span { start: prefix, end },
            None => KeyRange::From(prefix),
        }
    }

    /// The first key that could be in the range.
    pub fn start(&self) -> &Bytes {
        match self {
            KeyRange::Single(key) | KeyRange::Span { start: key, .. } | KeyRange::From(key) => key,
        }
    }

    /// The upper bound.
    pub fn end(&self) -> Bound<&[u8]> {
        match self {
            KeyRange::Single(key) => Bound::Included(key),
            KeyRange::Span { end, .. } => Bound::Excluded(end),
            KeyRange::From(_) => Bound::Unbounded,
        }
    }

    /// Whether `key` is in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::Single(own) => own == key,
            KeyRange::Span { start, end } => start <= key && key < &end[..],
            KeyRange::From(start) => start <= key,
        }
    }

    /// Whether no key can be in the range.
    pub fn is_empty(&self) -> bool {
        matches!(self, KeyRange::Span { start, end } if start >= end)
    }
}

/// The least key above every key that begins with `prefix`, or `None` when
/// there is none (the prefix is empty or all 0xff).
fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ranges_end_after_the_last_key_of_the_prefix() {
        let range = |prefix: &'static [u8]| KeyRange::prefix(Bytes::from_static(prefix));
        assert_eq!(range(b"a").end(), Bound::Excluded(&b"b"[..]));
        assert_eq!(range(b"a\xff").end(), Bound::Excluded(&b"b"[..]));
        assert_eq!(range(b"\xff\xff").end(), Bound::Unbounded);
        assert_eq!(range(b"").end(), Bound::Unbounded);
        assert!(range(b"a\xff").contains(b"a\xff\xff"));
        assert!(!range(b"a\xff").contains(b"b"));
    }
}
