//! The members of the cluster, as replicated in Raft's membership.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DiskId, NodeId};

/// What a member is, or is to become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberKind {
    /// Votes, or is a learner that the leader promotes once it has caught up.
    #[default]
    Voter,
    /// Receives the log and is promoted only by MemberPromote.
    Learner,
    /// Receives the log, serves reads and watches, and is never promoted.
    Observer,
}

impl fmt::Display for MemberKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemberKind::Voter => "voter",
            MemberKind::Learner => "learner",
            MemberKind::Observer => "observer",
        })
    }
}

/// One member: who it is and where it is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id; never reused.
    pub id: NodeId,
    /// Its name; empty until it has started once.
    pub name: String,
    /// Where its peers reach it, as URLs (`http://host:port`).
    pub peer_urls: Vec<String>,
    /// Where clients reach it, as URLs; empty until it has started once.
    pub client_urls: Vec<String>,
    /// What it is, or is to become. Whether it votes today is Raft's to say.
    pub kind: MemberKind,
    /// The data directory that holds its vote; 0 until it has started once.
    pub disk: DiskId,
}
