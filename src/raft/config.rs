//! The times and sizes of Raft: what an operator may set, what openraft is told.
//!
//! Nothing here is negotiated: members may differ in these for a while, which
//! costs availability and never safety. Bad values are refused, not repaired.

use std::time::Duration;

use openraft::{Config, SnapshotPolicy};

use crate::types::ClusterId;

/// The most bytes one message between peers may have. Appends are cut far
/// below it (the log reader caps a batch at a few MiB), so that only a single
/// huge entry can come near.
pub const PEER_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Messages waiting for the core of Raft; beyond, senders wait.
const API_QUEUE: u64 = 16_384;
/// Entries in one append on the network.
const PAYLOAD_ENTRIES_MAX: u64 = 1024;
/// Entries in one write of the log.
const APPEND_ENTRIES_MAX: u64 = 4096;
/// Entries purged at a time: frequent small purges slow the log's writer down.
const PURGE_BATCH: u64 = 10_000;

/// What an operator may set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftOptions {
    /// Between two heartbeats of a leader.
    pub heartbeat_interval: Duration,
    /// How long without a leader until an election begins, at the least; up to
    /// a fifth more at random. At least five heartbeat intervals.
    pub election_timeout: Duration,
    /// Entries between two snapshots.
    pub snapshot_count: u64,
    /// Entries kept in the log although a snapshot holds them, so that a
    /// follower that was away for a while needs no snapshot.
    pub log_entries_kept: u64,
    /// An append that is not answered for this long breaks its stream, which is
    /// then opened again.
    pub append_timeout: Duration,
    /// A snapshot's transfer without progress for this long is given up.
    pub snapshot_idle_timeout: Duration,
    /// How long a snapshot that has arrived may take to be installed.
    pub snapshot_install_timeout: Duration,
}

impl Default for RaftOptions {
    fn default() -> Self {
        RaftOptions {
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1000),
            snapshot_count: 100_000,
            log_entries_kept: 500_000,
            append_timeout: Duration::from_secs(3),
            snapshot_idle_timeout: Duration::from_secs(10),
            snapshot_install_timeout: Duration::from_secs(60),
        }
    }
}

/// Why options were refused; the message names the setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct OptionsError {
    /// The setting, as the operator spells it.
    pub setting: &'static str,
    /// What is wrong with it, and what would not be.
    pub reason: String,
}

impl RaftOptions {
    /// What openraft is told.
    ///
    /// A follower waits for the leader's lease (openraft takes the longest
    /// election timeout for it) *plus* a random election timeout. So that an
    /// election begins `election_timeout` to 1.2 times that after the leader
    /// was last heard of, openraft's own timeouts are 0.4 and 0.6 of it.
    ///
    /// # Errors
    /// [`OptionsError`] for values that do not fit each other.
    pub fn openraft(&self, cluster: ClusterId) -> Result<Config, OptionsError> {
        let refuse = |setting, reason: String| Err(OptionsError { setting, reason });
        let heartbeat_ms = self.heartbeat_interval.as_millis() as u64;
        let election_ms = self.election_timeout.as_millis() as u64;
        if heartbeat_ms < 5 {
            return refuse("heartbeat-interval", format!("{heartbeat_ms} ms is below the least, 5 ms"));
        }
        if election_ms < 5 * heartbeat_ms {
            let least = 5 * heartbeat_ms;
            return refuse(
                "election-timeout",
                format!("{election_ms} ms is below five heartbeat intervals, {least} ms"),
            );
        }
        if election_ms > 50_000 {
            return refuse("election-timeout", format!("{election_ms} ms is above the most, 50000 ms"));
        }
        if self.snapshot_count == 0 {
            return refuse("snapshot-count", "0 would take a snapshot after every entry".to_owned());
        }
        let election_timeout_max = election_ms * 6 / 10;
        let config = Config {
            cluster_name: format!("{cluster:x}"),
            heartbeat_interval: heartbeat_ms,
            // An acknowledged append proves as much as a heartbeat.
            heartbeat_min_interval: Some(heartbeat_ms / 2),
            election_timeout_min: election_ms * 4 / 10,
            election_timeout_max,
            // A leader that only part of the cluster hears falls silent for as
            // long as the others need to elect one they all hear (openraft #2080).
            quorum_loss_probe_interval: Some(2 * election_timeout_max),
            enable_pre_vote: Some(true),
            // A restarted leader asks for votes like everyone else: what it had
            // applied and not flushed is not there any more.
            enable_leader_restore: Some(false),
            max_payload_entries: PAYLOAD_ENTRIES_MAX,
            max_append_entries: Some(APPEND_ENTRIES_MAX),
            api_channel_size: Some(API_QUEUE),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_count),
            max_in_snapshot_log_to_keep: self.log_entries_kept,
            purge_batch_size: PURGE_BATCH.min(self.snapshot_count),
            replication_lag_threshold: self.log_entries_kept.max(self.snapshot_count),
            // Slower installs would be sent again and queue up at the follower.
            install_snapshot_timeout: self.snapshot_install_timeout.as_millis() as u64,
            ..Config::default()
        };
        config
            .validate()
            .map_err(|error| OptionsError { setting: "election-timeout", reason: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elections_begin_when_the_operator_says() {
        let config = RaftOptions::default().openraft(7).unwrap();
        let lease = config.election_timeout_max;
        assert_eq!((lease + config.election_timeout_min, lease + config.election_timeout_max), (1000, 1200));
        assert!(config.quorum_loss_probe_interval.unwrap() >= 2 * config.election_timeout_max);
        assert_eq!(config.enable_pre_vote, Some(true));
        assert_eq!(config.enable_leader_restore, Some(false));
    }

    #[test]
    fn every_permitted_pair_of_times_satisfies_openraft() {
        for heartbeat in [5, 7, 10, 33, 100, 499, 1000, 10_000] {
            for election in [5 * heartbeat, 6 * heartbeat, 10 * heartbeat] {
                let options = RaftOptions {
                    heartbeat_interval: Duration::from_millis(heartbeat),
                    election_timeout: Duration::from_millis(election),
                    ..Default::default()
                };
                if election <= 50_000 {
                    options.openraft(1).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_refusal_names_the_setting() {
        let options = RaftOptions { election_timeout: Duration::from_millis(300), ..Default::default() };
        assert_eq!(options.openraft(1).unwrap_err().setting, "election-timeout");
    }
}
