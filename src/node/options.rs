//! What one node is told at its start. Filled by `settings`; checked here where
//! the parts must agree.

use std::path::PathBuf;
use std::time::Duration;

use super::NodeError;
use crate::storage::StateOptions;
use crate::types::MemberKind;

/// etcd's longest lease, in seconds.
pub const LEASE_TTL_S_MAX: i64 = 9_000_000_000;

/// What one node is told at its start.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where its data lives.
    pub data_dir: PathBuf,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// How it comes into a cluster when its data directory is new.
    pub bootstrap: Bootstrap,
    /// How often a leader shows that it lives.
    pub heartbeat_interval: Duration,
    /// How long a lost leader goes unnoticed, as the user sees it.
    pub election_timeout: Duration,
    /// The largest encoded command.
    pub max_request_bytes: usize,
    /// Bytes of commands in flight on this node; beyond it `TooManyRequests`.
    pub in_flight_bytes: usize,
    /// Commands in flight on this node; beyond it `TooManyRequests`.
    pub in_flight_count: usize,
    /// How long a request may take; `None` is etcd's 5 s + 2 election timeouts.
    pub request_timeout: Option<Duration>,
    /// How much the store may hold before writes are refused; 0 is no limit.
    pub quota_bytes: u64,
    /// Free bytes of the file system below which writes are refused.
    pub disk_reserve_bytes: u64,
    /// When history is forgotten without being asked.
    pub auto_compaction: AutoCompaction,
    /// Log entries between two snapshots.
    pub snapshot_count: u64,
    /// Log entries kept behind a snapshot for slow followers.
    pub log_retained_entries: u64,
    /// Bytes of log kept; beyond it a snapshot is made and the log is cut.
    pub log_retained_bytes: u64,
    /// Serve linearizable reads by the leader's lease. Off: it trusts clocks.
    pub lease_reads: bool,
    /// What may be tuned of the state database.
    pub state: StateOptions,
}

impl Default for NodeOptions {
    fn default() -> NodeOptions {
        NodeOptions {
            name: "default".to_owned(),
            data_dir: PathBuf::from("default.mainstay"),
            peer_urls: vec!["http://localhost:2380".to_owned()],
            client_urls: vec!["http://localhost:2379".to_owned()],
            bootstrap: Bootstrap::Initial {
                members: vec![InitialMember {
                    name: "default".to_owned(),
                    peer_urls: vec!["http://localhost:2380".to_owned()],
                }],
                token: "etcd-cluster".to_owned(),
            },
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1000),
            max_request_bytes: 3 << 19,
            in_flight_bytes: 64 << 20,
            in_flight_count: 5_000,
            request_timeout: None,
            quota_bytes: 2 << 30,
            disk_reserve_bytes: 256 << 20,
            auto_compaction: AutoCompaction::Periodic(Duration::from_secs(24 * 3600)),
            snapshot_count: 100_000,
            log_retained_entries: 500_000,
            log_retained_bytes: 4 << 30,
            lease_reads: false,
            state: StateOptions::default(),
        }
    }
}

/// How a node with a new data directory comes into a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// Makes a new cluster together with the named members.
    Initial {
        /// All members, this one among them.
        members: Vec<InitialMember>,
        /// Keeps clusters with equal members apart.
        token: String,
    },
    /// Finds itself, by its peer URLs, among the members of a running cluster.
    Existing {
        /// Members as far as they are known, this one among them.
        members: Vec<InitialMember>,
    },
    /// Asks a running cluster to be let in.
    Join {
        /// Members' peer or client URLs, asked in turn; one that is removed or down
        /// meanwhile does no harm while another is there.
        addresses: Vec<String>,
        /// What it wants to be.
        kind: MemberKind,
    },
}

/// A member that `--initial-cluster` names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InitialMember {
    /// Its name.
    pub name: String,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
}

/// When history is forgotten without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Never.
    Off,
    /// What was replaced longer ago than this.
    Periodic(Duration),
    /// What is more than this many revisions ago.
    Revisions(u64),
}

impl NodeOptions {
    /// How long a request may take.
    pub fn request_timeout(&self) -> Duration {
        self.request_timeout.unwrap_or(Duration::from_secs(5) + 2 * self.election_timeout)
    }

    /// The shortest lease in seconds: ceil(1.5 election timeouts), as etcd's.
    pub fn lease_ttl_s_min(&self) -> i64 {
        let ms = self.election_timeout.as_millis().saturating_mul(3);
        i64::try_from(ms.div_ceil(2_000)).unwrap_or(LEASE_TTL_S_MAX).clamp(1, LEASE_TTL_S_MAX)
    }

    /// Whether the parts agree.
    ///
    /// # Errors
    /// [`NodeError::Invalid`] names the option and the fix.
    pub fn check(&self) -> Result<(), NodeError> {
        let invalid = |text: String| Err(NodeError::Invalid(text));
        if self.name.is_empty() {
            return invalid("name must not be empty".to_owned());
        }
        if self.peer_urls.is_empty() {
            return invalid("initial-advertise-peer-urls must name at least one URL".to_owned());
        }
        if self.heartbeat_interval.is_zero() {
            return invalid("heartbeat-interval must be above zero".to_owned());
        }
        if self.election_timeout < 5 * self.heartbeat_interval {
            return invalid(format!(
                "election-timeout ({} ms) must be at least five times heartbeat-interval ({} ms)",
                self.election_timeout.as_millis(),
                self.heartbeat_interval.as_millis()
            ));
        }
        if self.in_flight_bytes < self.max_request_bytes {
            return invalid(format!(
                "the bytes in flight ({}) must have room for one request of max-request-bytes ({})",
                self.in_flight_bytes, self.max_request_bytes
            ));
        }
        if self.in_flight_count == 0 || self.snapshot_count == 0 {
            return invalid("snapshot-count and the requests in flight must be above zero".to_owned());
        }
        match &self.bootstrap {
            Bootstrap::Initial { members, .. } | Bootstrap::Existing { members } => {
                self.check_members(members)
            }
            Bootstrap::Join { addresses, .. } if addresses.is_empty() => {
                invalid("join must name at least one member's address".to_owned())
            }
            Bootstrap::Join { .. } => Ok(()),
        }
    }

    fn check_members(&self, members: &[InitialMember]) -> Result<(), NodeError> {
        let invalid = |text: String| Err(NodeError::Invalid(text));
        let mut names = std::collections::BTreeSet::new();
        let mut urls = std::collections::BTreeSet::new();
        for member in members {
            if !names.insert(&member.name) {
                return invalid(format!("initial-cluster names {:?} twice", member.name));
            }
            if member.peer_urls.is_empty() {
                return invalid(format!("initial-cluster gives {:?} no URL", member.name));
            }
            for url in &member.peer_urls {
                if !urls.insert(url) {
                    return invalid(format!("initial-cluster has the URL {url} twice"));
                }
            }
        }
        let Some(own) = members.iter().find(|member| member.name == self.name) else {
            return invalid(format!("initial-cluster does not name this node, {:?}", self.name));
        };
        if sorted(&own.peer_urls) != sorted(&self.peer_urls) {
            return invalid(format!(
                "initial-cluster gives {:?} the URLs {}, initial-advertise-peer-urls says {}",
                self.name,
                own.peer_urls.join(","),
                self.peer_urls.join(",")
            ));
        }
        Ok(())
    }
}

/// URLs in an order that does not depend on how they were written down.
pub(super) fn sorted(urls: &[String]) -> Vec<String> {
    let mut sorted = urls.to_vec();
    sorted.sort();
    sorted
}
