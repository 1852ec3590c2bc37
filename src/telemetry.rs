//! What a node tells about itself: the set-up of its log, the recorder of its
//! metrics, and the name of every metric there is.
//!
//! A metric is named here and nowhere else; other rooms count with
//! `metrics::counter!(telemetry::PROPOSALS)` and the like. Nothing here decides
//! anything, and nothing here is needed for a node to run: without
//! [`metrics_recorder`] every count goes nowhere.
//!
//! Units stand in the names (`_seconds`, `_bytes`), counters end in `_total`.
//! Labels are few and bounded: a peer's id in hexadecimal, a method, a code;
//! never a key or a client.

use thiserror::Error;

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only rises.
    Counter,
    /// Stands somewhere.
    Gauge,
    /// Counts values by size.
    Histogram,
}

/// One line of the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name, as Prometheus shows it.
    pub name: &'static str,
    /// How it behaves.
    pub kind: MetricKind,
    /// What it counts, in words.
    pub description: &'static str,
}

macro_rules! catalogue {
    ($($kind:ident $constant:ident = $name:literal: $description:literal;)*) => {
        $(#[doc = $description] pub const $constant: &str = $name;)*

        /// Every metric there is, in the order of a request's way through a node.
        pub const CATALOGUE: &[Metric] = &[
            $(Metric { name: $name, kind: MetricKind::$kind, description: $description },)*
        ];
    };
}

catalogue! {
    // Requests at the client port.
    Counter REQUESTS = "mainstay_requests_total": "Requests answered, by method and gRPC code.";
    Histogram REQUEST_SECONDS = "mainstay_request_seconds": "Time from a unary request's arrival to its answer, by method.";
    Gauge REQUESTS_IN_FLIGHT = "mainstay_requests_in_flight": "Unary requests being served.";
    Gauge STREAMS_OPEN = "mainstay_streams_open": "Streaming requests being served, by method.";
    Gauge CONNECTIONS_OPEN = "mainstay_connections_open": "Open connections, by listener (client or peer).";

    // A write: admitted, forwarded, logged, committed, applied.
    Counter PROPOSALS = "mainstay_proposals_total": "Writes proposed on behalf of clients of this node.";
    Counter PROPOSALS_FAILED = "mainstay_proposals_failed_total": "Proposals without an answer from the state machine, by reason.";
    Counter PROPOSALS_REFUSED = "mainstay_proposals_refused_total": "Writes refused because too much was in flight.";
    Histogram PROPOSAL_SECONDS = "mainstay_proposal_seconds": "Time from admission of a write to its answer.";
    Counter PROPOSALS_FORWARDED = "mainstay_proposals_forwarded_total": "Writes sent on to the leader.";
    Histogram FORWARD_BATCH_ENTRIES = "mainstay_forward_batch_entries": "Writes sent to the leader in one message.";
    Histogram LOG_BATCH_ENTRIES = "mainstay_log_batch_entries": "Entries that one sync of the log made durable.";
    Histogram LOG_BATCH_BYTES = "mainstay_log_batch_bytes": "Bytes that one sync of the log made durable.";
    Histogram LOG_FSYNC_SECONDS = "mainstay_log_fsync_seconds": "Time to write and sync one batch of the log.";
    Counter LOG_APPENDED = "mainstay_log_appended_total": "Entries appended to the log.";
    Counter LOG_APPENDED_BYTES = "mainstay_log_appended_bytes_total": "Bytes appended to the log.";
    Gauge LOG_FIRST_INDEX = "mainstay_log_first_index": "Index of the first entry kept in the log.";
    Gauge LOG_LAST_INDEX = "mainstay_log_last_index": "Index of the last entry of the log.";
    Gauge LOG_SIZE_BYTES = "mainstay_log_size_bytes": "Bytes of the log kept on disk.";
    Counter LOG_TAIL_HITS = "mainstay_log_tail_hits_total": "Reads of log entries served from memory.";
    Counter LOG_TAIL_MISSES = "mainstay_log_tail_misses_total": "Reads of log entries that went to disk.";
    Histogram COMMIT_SECONDS = "mainstay_commit_seconds": "Time from a batch of proposals at the leader to its last entry being committed and applied there.";
    Gauge COMMITTED_INDEX = "mainstay_committed_index": "Index of the last entry known to be committed.";
    Gauge APPLIED_INDEX = "mainstay_applied_index": "Index of the last entry applied.";
    Counter APPLIED = "mainstay_applied_total": "Entries applied.";
    Histogram APPLY_SECONDS = "mainstay_apply_seconds": "Time to apply and publish one chunk of entries.";
    Histogram APPLY_CHUNK_ENTRIES = "mainstay_apply_chunk_entries": "Entries applied in one chunk.";

    // A read: confirmed, served.
    Counter READ_BARRIERS = "mainstay_read_barriers_total": "Linearizable reads that asked for confirmation.";
    Counter READ_BARRIERS_FAILED = "mainstay_read_barriers_failed_total": "Linearizable reads that could not be confirmed.";
    Counter READ_ROUNDS = "mainstay_read_rounds_total": "Confirmation rounds, each shared by all reads that wait for it.";
    Histogram READ_BARRIER_SECONDS = "mainstay_read_barrier_seconds": "Time a linearizable read waits before it may be served.";
    Counter RANGE_KEYS = "mainstay_range_keys_total": "Keys returned by reads.";
    Counter RANGE_BYTES = "mainstay_range_bytes_total": "Bytes of keys and values returned by reads.";
    Counter RANGES_TOO_LARGE = "mainstay_ranges_too_large_total": "Reads refused because they exceeded the memory of one request.";

    // Raft: who leads, and how far the others are.
    Gauge TERM = "mainstay_raft_term": "The current term.";
    Gauge IS_LEADER = "mainstay_is_leader": "1 on the leader, 0 elsewhere.";
    Gauge HAS_LEADER = "mainstay_has_leader": "1 when this node follows a leader or leads, 0 otherwise.";
    Counter LEADER_CHANGES = "mainstay_leader_changes_total": "Changes of the leader as this node saw them.";
    Gauge MEMBERS = "mainstay_members": "Members of the cluster, by kind (voter, learner or observer).";
    Gauge PEER_LAG_ENTRIES = "mainstay_peer_lag_entries": "Entries a peer's log is behind the leader's, by peer.";
    Histogram PEER_RTT_SECONDS = "mainstay_peer_rtt_seconds": "Time of one heartbeat to a peer and back, by peer.";
    Counter PEER_FAILURES = "mainstay_peer_failures_total": "Calls to a peer that failed, by peer.";
    Counter PEER_RETRIES = "mainstay_peer_retries_total": "Calls to a peer that were made again, by peer.";
    Gauge PEER_BREAKER_STATE = "mainstay_peer_breaker_state": "A peer's breaker: 0 closed, 1 half-open, 2 open, by peer.";
    Counter PEER_BREAKER_OPENED = "mainstay_peer_breaker_opened_total": "Times a peer's breaker opened, by peer.";
    Counter SNAPSHOTS_BUILT = "mainstay_snapshots_built_total": "Snapshots of the state built for the log.";
    Counter SNAPSHOTS_SENT = "mainstay_snapshots_sent_total": "Snapshots sent to a peer, by peer.";
    Counter SNAPSHOT_SENT_BYTES = "mainstay_snapshot_sent_bytes_total": "Bytes of snapshots sent to peers.";
    Counter SNAPSHOTS_INSTALLED = "mainstay_snapshots_installed_total": "Snapshots received and installed.";

    // Watches, leases, sessions.
    Gauge WATCH_STREAMS = "mainstay_watch_streams": "Open watch streams.";
    Gauge WATCHERS = "mainstay_watchers": "Watchers of all streams.";
    Gauge WATCHERS_SLOW = "mainstay_watchers_slow": "Watchers that read history from disk because they are behind the ring.";
    Counter WATCH_EVENTS = "mainstay_watch_events_total": "Events handed to watchers.";
    Counter WATCH_CATCH_UPS = "mainstay_watch_catch_ups_total": "Pieces of history read from disk for watchers.";
    Gauge WATCH_RING_BYTES = "mainstay_watch_ring_bytes": "Bytes of recent changes shared by all watchers.";
    Gauge LEASES = "mainstay_leases": "Leases that exist.";
    Counter LEASES_GRANTED = "mainstay_leases_granted_total": "Leases granted.";
    Counter LEASES_ENDED = "mainstay_leases_ended_total": "Leases that were revoked or ran out.";
    Counter LEASE_KEEP_ALIVES = "mainstay_lease_keep_alives_total": "Keep-alives answered by this node as leader.";
    Gauge SESSIONS = "mainstay_sessions": "Sessions for request ids that are open.";

    // Subscriptions of the client.
    Gauge CLIENT_SUBSCRIPTIONS = "mainstay_client_subscriptions": "Subscriptions that are open.";
    Counter CLIENT_SUBSCRIPTION_DELIVERED = "mainstay_client_subscription_delivered_total": "Events that subscriptions handed out.";
    Histogram CLIENT_SUBSCRIPTION_BATCH = "mainstay_client_subscription_batch_entries": "Events in one batch of a subscription.";
    Counter CLIENT_SUBSCRIPTION_FILTERED = "mainstay_client_subscription_filtered_total": "Events that came from the server and did not match their subscription.";
    Counter CLIENT_SUBSCRIPTION_MERGED = "mainstay_client_subscription_merged_total": "Queued events replaced by newer ones of their keys.";
    Counter CLIENT_SUBSCRIPTION_DROPPED = "mainstay_client_subscription_dropped_total": "Queued events dropped because their queue was full.";
    Counter CLIENT_SUBSCRIPTION_RESUMES = "mainstay_client_subscription_resumes_total": "Times a subscription's watch was begun again where it was.";
    Counter CLIENT_SUBSCRIPTION_SNAPSHOTS = "mainstay_client_subscription_snapshots_total": "Snapshots that subscriptions got.";
    Counter CLIENT_SUBSCRIPTION_PANICS = "mainstay_client_subscription_panics_total": "Callbacks of subscriptions that panicked.";
    // Typed bindings of the SDK.
    Counter CLIENT_BIND_LOADS = "mainstay_client_bind_loads_total": "Values that typed bindings took, the first one of each included.";
    Counter CLIENT_BIND_REFUSALS = "mainstay_client_bind_refusals_total": "Changes that typed bindings did not take: the last good value stayed.";
    Gauge CLIENT_BINDINGS_BEHIND = "mainstay_client_bindings_behind": "Typed bindings that keep an older value because their newest keys are not good.";

    // The client's calls.
    Histogram CLIENT_CALL_SECONDS = "mainstay_client_call_seconds": "Time of a call of the client, all attempts and waits together, by kind.";
    Counter CLIENT_CALLS_FAILED = "mainstay_client_calls_failed_total": "Calls of the client that ended with an error, by kind and error class.";
    Counter CLIENT_ATTEMPTS = "mainstay_client_attempts_total": "Attempts of calls, by kind and error class (ok for an answer).";
    Counter CLIENT_RETRIES = "mainstay_client_retries_total": "Attempts that followed a failed one, by kind and the failure's class.";
    Counter CLIENT_HEDGES = "mainstay_client_hedges_total": "Reads that were sent to a second endpoint because the first took long.";
    Gauge CLIENT_BUDGET_TOKENS = "mainstay_client_budget_tokens": "Tokens of the retry budget; no retries at half of its size or below.";
    Histogram CLIENT_GATE_WAIT_SECONDS = "mainstay_client_gate_wait_seconds": "Time that calls waited for their turn, those that did not wait left out, by priority.";
    Counter CLIENT_GATE_REFUSED = "mainstay_client_gate_refused_total": "Calls that the client's own limits refused, by priority.";
    Gauge CLIENT_IN_FLIGHT_LIMIT = "mainstay_client_in_flight_limit": "Calls that may be in flight, as of the server's newest pushback.";
    Counter CLIENT_SESSIONS_OPENED = "mainstay_client_sessions_opened_total": "Sessions opened for request ids.";

    // The store and the machine below it.
    Gauge REVISION = "mainstay_revision": "The store's revision.";
    Gauge COMPACTED_REVISION = "mainstay_compacted_revision": "The compact mark of the user space.";
    Gauge STORE_SIZE_BYTES = "mainstay_store_size_bytes": "Bytes of the state on disk and in its write buffers.";
    Gauge STORE_LIVE_BYTES = "mainstay_store_live_bytes": "Estimated bytes of the state that a rewrite would keep.";
    Gauge STORE_QUOTA_BYTES = "mainstay_store_quota_bytes": "Bytes of the state at which writes are refused.";
    Counter CACHE_HITS = "mainstay_cache_hits_total": "Block cache hits of the state.";
    Counter CACHE_MISSES = "mainstay_cache_misses_total": "Block cache misses of the state.";
    Gauge CACHE_BYTES = "mainstay_cache_bytes": "Bytes in the block cache.";
    Gauge DISK_FREE_BYTES = "mainstay_disk_free_bytes": "Free bytes of the file system that holds the data directory.";
    Gauge ALARMS = "mainstay_alarms": "Raised alarms, by kind.";
    // A client's caches.
    Counter CLIENT_CACHE_HITS = "mainstay_client_cache_hits_total": "Reads that the cache answered, by level (l1, l2 or l3).";
    Counter CLIENT_CACHE_MISSES = "mainstay_client_cache_misses_total": "Reads that the cluster answered.";
    Counter CLIENT_CACHE_PROMOTIONS = "mainstay_client_cache_promotions_total": "Values that went up to the first level because they were read.";
    Counter CLIENT_CACHE_DEMOTIONS = "mainstay_client_cache_demotions_total": "Values that went down to the second level because the first was full.";
    Counter CLIENT_CACHE_EVICTIONS = "mainstay_client_cache_evictions_total": "Values that the memory levels dropped because they were full.";
    Counter CLIENT_CACHE_CHECKSUM_FAILURES = "mainstay_client_cache_checksum_failures_total": "Records that were damaged and dropped.";
    Counter CLIENT_CACHE_POLICY_SWITCHES = "mainstay_client_cache_policy_switches_total": "Changes of the live policy.";
    Counter CLIENT_CACHE_RESYNCS = "mainstay_client_cache_resyncs_total": "Watched prefixes that were read whole, at first or after a compaction.";
    Counter CLIENT_CACHE_VERIFICATIONS = "mainstay_client_cache_verifications_total": "Questions for the store's revision, by outcome (proven or failed).";
    Gauge CLIENT_CACHE_BYTES = "mainstay_client_cache_bytes": "Bytes held, by level (l1, l2 or l3).";
    Gauge CLIENT_CACHE_LIVE = "mainstay_client_cache_live": "1 while every watched prefix is up to date, 0 otherwise.";
    Gauge CLIENT_CACHE_DISK_FAILED = "mainstay_client_cache_disk_failed": "1 while the durable level is not written, 0 otherwise.";
    Histogram CLIENT_CACHE_AGE_SECONDS = "mainstay_client_cache_age_seconds": "Age of answers from the cache; one of 64 is counted.";

    Gauge BUILD_INFO = "mainstay_build_info": "Always 1; the version is in the label.";
    Gauge UPTIME_SECONDS = "mainstay_uptime_seconds": "Seconds since the node started.";

    // Clients: which endpoint calls go to.
    Counter CLIENT_PICKS = "mainstay_client_picks_total": "Endpoints chosen for calls and streams, by strategy.";
    Counter CLIENT_EJECTIONS = "mainstay_client_ejections_total": "Times an endpoint was left out because calls or health checks failed, by endpoint.";
    Counter CLIENT_DISCOVERY_FAILURES = "mainstay_client_discovery_failures_total": "Rounds of discovery that did not find the members and their leader.";
    Gauge CLIENT_ENDPOINT_EJECTED = "mainstay_client_endpoint_ejected": "1 while an endpoint is left out, 0 otherwise, by endpoint.";
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<LogFormat, TelemetryError> {
        match text {
            "text" | "console" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err(TelemetryError::Format { given: text.to_owned() }),
        }
    }
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// A level (etcd's names too), or directives such as `info,mainstay::raft=debug`.
    pub level: String,
    /// The form of a line.
    pub format: LogFormat,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// Why the log or the metrics could not be set up.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The level is no level and no directive.
    #[error(
        "log-level {given:?} is not understood: {reason}; use debug, info, warn or error, or directives such as \
         info,mainstay::raft=debug"
    )]
    Level {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The format is neither text nor JSON.
    #[error("log-format {given:?} is unknown; use text or json")]
    Format {
        /// What was given.
        given: String,
    },
    /// Another part of the process took the place.
    #[error("the {what} of this process is already set up")]
    AlreadySet {
        /// The log or the metrics.
        what: &'static str,
    },
}

#[cfg(feature = "server")]
pub use recorder::{MetricsHandle, check_log_level, init_log, metrics_recorder};

#[cfg(feature = "server")]
mod recorder {
    use std::sync::OnceLock;

    use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::util::SubscriberInitExt;

    use super::{CATALOGUE, LogFormat, LogOptions, MetricKind, TelemetryError};

    /// Times from a shared read round (tens of microseconds) to a stalled disk.
    const SECONDS_BUCKETS: &[f64] = &[
        0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
        5.0, 10.0,
    ];
    /// Batch sizes, by powers of four.
    const ENTRIES_BUCKETS: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0];
    /// Batch bytes, from one small entry to the largest batch.
    const BYTES_BUCKETS: &[f64] =
        &[256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

    /// Renders the metrics of the process.
    #[derive(Clone)]
    pub struct MetricsHandle {
        prometheus: PrometheusHandle,
    }

    impl std::fmt::Debug for MetricsHandle {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("MetricsHandle")
        }
    }

    impl MetricsHandle {
        /// Every metric in Prometheus' text format.
        pub fn render(&self) -> String {
            self.prometheus.render()
        }

        /// Folds what was counted since the last call into the histograms. To be
        /// called every few seconds: between two calls the samples take memory.
        pub fn upkeep(&self) {
            self.prometheus.run_upkeep();
        }
    }

    /// The recorder of this process, installed at the first call. Several nodes
    /// in one process (tests do that) share it, because the `metrics` crate
    /// knows only one.
    ///
    /// # Errors
    /// [`TelemetryError::AlreadySet`] when something else installed a recorder.
    pub fn metrics_recorder() -> Result<MetricsHandle, TelemetryError> {
        static INSTALLED: OnceLock<Option<MetricsHandle>> = OnceLock::new();
        let handle = INSTALLED.get_or_init(|| {
            let recorder = builder().build_recorder();
            let handle = MetricsHandle { prometheus: recorder.handle() };
            metrics::set_global_recorder(recorder).ok()?;
            describe();
            Some(handle)
        });
        handle.clone().ok_or(TelemetryError::AlreadySet { what: "metrics recorder" })
    }

    pub(super) fn builder() -> PrometheusBuilder {
        let suffix = |suffix: &str| Matcher::Suffix(suffix.to_owned());
        PrometheusBuilder::new()
            .set_buckets_for_metric(suffix("_seconds"), SECONDS_BUCKETS)
            .and_then(|builder| builder.set_buckets_for_metric(suffix("_entries"), ENTRIES_BUCKETS))
            .and_then(|builder| builder.set_buckets_for_metric(suffix("_bytes"), BYTES_BUCKETS))
            .expect("the bucket lists are constants and not empty")
    }

    pub(super) fn describe() {
        for metric in CATALOGUE {
            match metric.kind {
                MetricKind::Counter => metrics::describe_counter!(metric.name, metric.description),
                MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.description),
                MetricKind::Histogram => metrics::describe_histogram!(metric.name, metric.description),
            }
        }
    }

    /// Sends the log of this process to standard error.
    ///
    /// # Errors
    /// [`TelemetryError::Level`] for a bad level, [`TelemetryError::AlreadySet`]
    /// when the process has a log already.
    pub fn init_log(options: &LogOptions) -> Result<(), TelemetryError> {
        let filter = filter(&options.level)?;
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        let installed = match options.format {
            LogFormat::Text => builder.with_ansi(stderr_is_terminal()).finish().try_init(),
            LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
        };
        installed.map_err(|_| TelemetryError::AlreadySet { what: "log" })
    }

    /// Whether `level` would be understood by [`init_log`].
    ///
    /// # Errors
    /// [`TelemetryError::Level`] when it would not.
    pub fn check_log_level(level: &str) -> Result<(), TelemetryError> {
        filter(level).map(|_| ())
    }

    fn filter(level: &str) -> Result<EnvFilter, TelemetryError> {
        // etcd has three levels above error, for lines that end the process.
        let directives = match level {
            "dpanic" | "panic" | "fatal" => "error",
            other => other,
        };
        let failed = |reason: String| TelemetryError::Level { given: level.to_owned(), reason };
        // A bare word that is no level would be taken for the name of a module
        // and silence everything else.
        let is_level = |word: &str| word.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
        for directive in directives.split(',').map(str::trim) {
            let is_target = directive.contains(['=', '[']);
            if directive.is_empty() || (!is_target && !is_level(directive)) {
                return Err(failed(format!("{directive:?} is not a level")));
            }
        }
        // Libraries are quieter than the product: their info lines are about sockets.
        // openraft warns of every attempt to reach a peer; the peers tell of it
        // once. Who wants more asks for it: info,openraft=info.
        let quiet = "h2=warn,hyper=warn,tower=warn,tonic=warn,openraft=error";
        EnvFilter::try_new(format!("{quiet},{directives}")).map_err(|error| failed(error.to_string()))
    }

    fn stderr_is_terminal() -> bool {
        std::io::IsTerminal::is_terminal(&std::io::stderr())
    }
}

#[cfg(all(test, feature = "server"))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_say_their_unit() {
        let names: BTreeSet<_> = CATALOGUE.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for metric in CATALOGUE {
            assert!(metric.name.starts_with("mainstay_"), "{}", metric.name);
            assert_eq!(
                metric.kind == MetricKind::Counter,
                metric.name.ends_with("_total"),
                "{}",
                metric.name
            );
            assert!(metric.description.ends_with('.'), "{}", metric.name);
            if metric.kind == MetricKind::Histogram {
                let known = ["_seconds", "_entries", "_bytes"].iter().any(|unit| metric.name.ends_with(unit));
                assert!(known, "{} has no buckets", metric.name);
            }
        }
    }

    /// A metric that nobody records is a promise to operators that is not kept.
    #[test]
    fn every_metric_is_recorded_somewhere() {
        fn read(folder: &std::path::Path, text: &mut String) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    read(&path, text);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    text.push_str(&std::fs::read_to_string(path).unwrap());
                }
            }
        }
        let own = include_str!("telemetry.rs");
        let mut sources = String::new();
        read("src".as_ref(), &mut sources);
        let lines = own.lines().skip_while(|line| !line.starts_with("catalogue! {"));
        let constants = lines.take_while(|line| *line != "}").filter_map(|line| {
            let (kind, rest) = line.trim().split_once(' ')?;
            let known = ["Counter", "Gauge", "Histogram"].contains(&kind);
            known.then(|| rest.split(' ').next().unwrap_or_default())
        });
        let mut seen = 0;
        for constant in constants {
            seen += 1;
            assert!(sources.contains(&format!("telemetry::{constant}")), "nobody records {constant}");
        }
        assert_eq!(seen, CATALOGUE.len());
    }

    #[test]
    fn levels_are_etcds_or_directives_and_nothing_else() {
        for level in ["debug", "info", "warn", "error", "fatal", "info,mainstay::raft=debug"] {
            check_log_level(level).unwrap();
        }
        for level in ["loud", "", "info,chatty"] {
            assert!(check_log_level(level).unwrap_err().to_string().contains("log-level"), "{level}");
        }
        assert!("xml".parse::<LogFormat>().is_err());
    }

    #[test]
    fn a_recorder_renders_descriptions_and_buckets() {
        let recorder = recorder::builder().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            recorder::describe();
            metrics::counter!(PROPOSALS).increment(3);
            metrics::histogram!(LOG_FSYNC_SECONDS).record(0.0004);
        });
        let text = handle.render();
        assert!(text.contains("# HELP mainstay_proposals_total Writes proposed"), "{text}");
        assert!(text.contains("mainstay_proposals_total 3"), "{text}");
        assert!(text.contains("mainstay_log_fsync_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
    }
}
