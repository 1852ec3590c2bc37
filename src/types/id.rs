//! Newtypes for the numbers that must not be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A member's id: random-looking, never reused, printed as etcd prints it
/// (lower-case hexadecimal without leading zeros). Zero is no member.
pub type NodeId = u64;

/// The cluster's id, in the header of every answer.
pub type ClusterId = u64;

/// The identity of one data directory, drawn at random when it is first used.
///
/// A member record names the disk that holds the member's vote and log, so a
/// wiped disk cannot come back under its old node id. Zero is "not claimed
/// yet": a member that was added but has never started.
pub type DiskId = u64;

/// A point in the store's history. 1 is the empty store; every transaction
/// that changes something adds one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Revision(pub i64);

impl Revision {
    /// The revision of an empty store, as etcd counts.
    pub const FIRST: Revision = Revision(1);

    /// The revision after this one.
    pub fn next(self) -> Revision {
        Revision(self.0 + 1)
    }

    /// The revision before this one.
    pub fn prev(self) -> Revision {
        Revision(self.0 - 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease's id, chosen by the client or drawn by the node that proposes it.
/// Zero means "no lease" wherever it stands on a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// No lease.
    pub const NONE: LeaseId = LeaseId(0);

    /// Whether this names a lease at all.
    pub fn is_some(self) -> bool {
        self.0 != 0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}
