//! What a read asks and what it gets.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{KeyRange, LeaseId, Revision, Space};

/// A key with its value and history marks, as etcd's `mvccpb.KeyValue`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The revision that created the key since it was last absent.
    pub create_revision: Revision,
    /// The revision of this value.
    pub mod_revision: Revision,
    /// 1 for a created key, +1 per put since. 0 only in a tombstone.
    pub version: i64,
    /// The lease the key is attached to.
    pub lease: LeaseId,
    /// The value.
    pub value: Bytes,
}

impl KeyValue {
    /// What it counts for where answers are limited, in bytes.
    pub fn footprint(&self) -> usize {
        self.key.len() + self.value.len() + size_of::<KeyValue>()
    }
}

/// etcd's Range: which keys, at which revision, filtered, sorted and cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeQuery {
    /// The space read.
    pub space: Space,
    /// The keys read.
    pub range: KeyRange,
    /// The revision read at; 0 is the newest.
    pub revision: Revision,
    /// The most keys to return, counted after filters and sorting; 0 is all.
    pub limit: u64,
    /// Leave values out.
    pub keys_only: bool,
    /// Return only the count.
    pub count_only: bool,
    /// The field to sort by.
    pub sort_target: SortTarget,
    /// The direction to sort in.
    pub sort_order: SortOrder,
    /// Keep keys with at least this mod revision; 0 is no bound.
    pub min_mod_revision: Revision,
    /// Keep keys with at most this mod revision; 0 is no bound.
    pub max_mod_revision: Revision,
    /// Keep keys with at least this create revision; 0 is no bound.
    pub min_create_revision: Revision,
    /// Keep keys with at most this create revision; 0 is no bound.
    pub max_create_revision: Revision,
}

impl RangeQuery {
    /// Everything in `range` at the newest revision.
    pub fn all(space: Space, range: KeyRange) -> RangeQuery {
        RangeQuery {
            space,
            range,
            revision: Revision(0),
            limit: 0,
            keys_only: false,
            count_only: false,
            sort_target: SortTarget::Key,
            sort_order: SortOrder::None,
            min_mod_revision: Revision(0),
            max_mod_revision: Revision(0),
            min_create_revision: Revision(0),
            max_create_revision: Revision(0),
        }
    }
}

/// The answer to a [`RangeQuery`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeReply {
    /// The keys, sorted and cut.
    pub kvs: Vec<KeyValue>,
    /// Whether the limit cut something off.
    pub more: bool,
    /// How many keys are in the range, whatever the limit and the filters.
    pub count: u64,
}

/// The field a range is sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SortTarget {
    /// By key.
    #[default]
    Key,
    /// By version.
    Version,
    /// By create revision.
    Create,
    /// By mod revision.
    Mod,
    /// By value.
    Value,
}

/// The direction of a sort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SortOrder {
    /// Key order; ascending when the target is another field.
    #[default]
    None,
    /// Least first.
    Ascend,
    /// Greatest first.
    Descend,
}

/// One condition of a transaction; true when it holds for every key in the
/// range. For a missing key, or a range with no key, a comparison of the value
/// is false and the others compare against zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// The space read.
    pub space: Space,
    /// The keys compared.
    pub range: KeyRange,
    /// How the key's field must relate to the target.
    pub op: CompareOp,
    /// The field and what it is compared with.
    pub target: CompareTarget,
}

/// How a field must relate to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareOp {
    /// Equal.
    Equal,
    /// Greater than the target.
    Greater,
    /// Less than the target.
    Less,
    /// Not equal.
    NotEqual,
}

/// The field that a comparison looks at, and the value it looks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareTarget {
    /// The version.
    Version(i64),
    /// The create revision.
    Create(i64),
    /// The mod revision.
    Mod(i64),
    /// The value, bytewise.
    Value(Bytes),
    /// The lease.
    Lease(i64),
}
