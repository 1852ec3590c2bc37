//! The names of all settings, once: as flags of `mainstay serve`, as keys of
//! the settings file and (in capitals, after `MAINSTAY_`) as variables. Also
//! etcd's flags that have no meaning here, with what to do instead.

use std::path::PathBuf;

macro_rules! settings {
    ($($field:ident $key:literal <$value:literal> $default:literal $help:literal;)*) => {
        /// The flags of `mainstay serve`. Values are kept as text: they are
        /// understood together with the file's and the environment's.
        #[derive(Clone, Debug, Default, clap::Args)]
        pub struct ServeFlags {
            /// The settings file (TOML, with the names of the flags as keys) [default: none]
            #[arg(long, value_name = "FILE")]
            pub config_file: Option<PathBuf>,
            $(
                #[doc = concat!($help, " [default: ", $default, "]")]
                // Said again, because clap reads only comments that are literal.
                #[arg(long = $key, value_name = $value, help_heading = "Settings", allow_hyphen_values = true,
                    help = concat!($help, " [default: ", $default, "]"))]
                pub $field: Option<String>,
            )*
            #[allow(missing_docs)]
            #[command(flatten)]
            pub foreign: ForeignFlags,
        }

        impl ServeFlags {
            /// The settings given as flags, by key.
            pub(super) fn given(&self) -> Vec<(&'static str, &str)> {
                let all = [$(($key, &self.$field)),*];
                all.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?))).collect()
            }
        }

        /// The key of every setting.
        pub(super) const KEYS: &[&str] = &[$($key),*];
    };
}

settings! {
    name "name" <"NAME"> "default" "This node's name, unique in the cluster";
    data_dir "data-dir" <"DIR"> "NAME.mainstay" "Where this node keeps its data";
    listen_client_urls "listen-client-urls" <"URLS"> "http://localhost:2379" "Where clients are served";
    advertise_client_urls "advertise-client-urls" <"URLS"> "as listened on" "Where clients reach this node";
    listen_peer_urls "listen-peer-urls" <"URLS"> "http://localhost:2380" "Where peers are served";
    initial_advertise_peer_urls "initial-advertise-peer-urls" <"URLS"> "as listened on" "Where peers reach this node";
    initial_cluster "initial-cluster" <"NAME=URL,...">
        "this node alone" "The members of a new cluster, or the known members of an existing one";
    initial_cluster_state "initial-cluster-state" <"new|existing">
        "new" "Whether the cluster is new, or this node was added to it with MemberAdd";
    initial_cluster_token "initial-cluster-token" <"TOKEN">
        "mainstay-cluster" "Keeps new clusters with equal members apart";
    join "join" <"URL,..."> "none" "Join the cluster of the members at these URLs (client or peer), instead of initial-cluster";
    kind "kind" <"voter|learner|observer"> "voter" "What to become with --join";
    heartbeat_interval "heartbeat-interval" <"TIME"> "100ms" "How often a leader shows that it lives";
    election_timeout "election-timeout" <"TIME"> "1s" "How long a lost leader goes unnoticed";
    request_timeout "request-timeout" <"TIME">
        "5s + 2 election timeouts" "How long a request may take when its client sets no deadline";
    quota_backend_bytes "quota-backend-bytes" <"SIZE">
        "2GiB" "What the store may hold before writes are refused; -1 is no limit";
    disk_reserve_bytes "disk-reserve-bytes" <"SIZE"> "256MiB" "Free disk space below which writes are refused";
    max_request_bytes "max-request-bytes" <"SIZE"> "1.5MiB" "The largest request";
    max_txn_ops "max-txn-ops" <"N"> "128" "The most operations of a transaction";
    max_range_bytes "max-range-bytes" <"SIZE"> "128MiB" "Memory of one read; larger ones use limits or RangeStream";
    max_inflight_bytes "max-inflight-bytes" <"SIZE"> "64MiB" "Bytes of writes in flight on this node";
    max_inflight_requests "max-inflight-requests" <"N"> "5000" "Writes in flight on this node";
    max_concurrent_streams "max-concurrent-streams" <"N"> "no limit" "Requests and streams open on one connection";
    grpc_keepalive_interval "grpc-keepalive-interval" <"TIME"> "2h" "How often an idle client is pinged; 0 is never";
    grpc_keepalive_timeout "grpc-keepalive-timeout" <"TIME"> "20s" "How long a ping may go unanswered";
    watch_progress_notify_interval "watch-progress-notify-interval" <"TIME">
        "10m" "How often a quiet watch with progress_notify hears of progress";
    watch_ring_bytes "watch-ring-bytes" <"SIZE"> "32MiB" "Recent changes kept in memory for watchers";
    auto_compaction_mode "auto-compaction-mode" <"periodic|revision">
        "periodic" "What auto-compaction-retention counts";
    auto_compaction_retention "auto-compaction-retention" <"TIME|N">
        "24h" "History to keep: a time (a bare number is hours) or a number of revisions; 0 keeps all";
    snapshot_count "snapshot-count" <"N"> "100000" "Log entries between two snapshots";
    log_retention_entries "log-retention-entries" <"N"> "500000" "Log entries kept for slow followers";
    log_retention_bytes "log-retention-bytes" <"SIZE"> "4GiB" "Bytes of log kept for slow followers";
    lease_reads "lease-reads" <"BOOL"> "false" "Serve linearizable reads by the leader's lease: faster, and trusts clocks";
    block_cache_bytes "block-cache-bytes" <"SIZE">
        "an eighth of the memory, 64MiB to 512MiB" "Cache of the store's blocks";
    record_cache_bytes "record-cache-bytes" <"SIZE">
        "an eighth of the memory, 64MiB to 512MiB" "Cache of the records that writes look up";
    write_buffer_bytes "write-buffer-bytes" <"SIZE"> "32MiB" "Writes kept in memory before they are flushed";
    stop_timeout "stop-timeout" <"TIME"> "2s" "How long requests may take to finish when the node stops";
    warning_unary_request_duration "warning-unary-request-duration" <"TIME">
        "300ms" "Requests that take longer are logged";
    log_level "log-level" <"LEVEL"> "info" "debug, info, warn or error, or directives (info,mainstay::raft=debug)";
    log_format "log-format" <"text|json"> "text" "The form of the log";
}

/// Why an etcd flag is not taken.
const TLS: &str = "TLS is not served yet; remove it, and keep the listeners on a network you trust";
const DISCOVERY: &str = "discovery services are not served; use initial-cluster or join";
const AUTH: &str = "authentication is not served yet";
const GATEWAY: &str = "the JSON gateway is not served yet";
const SAME_PORT: &str = "metrics and health are served at listen-client-urls";

macro_rules! foreign {
    ($($field:ident $key:literal $reason:expr;)* @without_effect $($idle:ident $idle_key:literal $why:literal;)*) => {
        /// etcd's flags that mean nothing here; taken so that they can be
        /// answered by name.
        #[derive(Clone, Debug, Default, clap::Args)]
        pub struct ForeignFlags {
            $(
                #[arg(long = $key, hide = true, num_args = 0..=1, default_missing_value = "true")]
                $field: Option<String>,
            )*
            $(
                #[arg(long = $idle_key, hide = true, num_args = 0..=1, default_missing_value = "true")]
                $idle: Option<String>,
            )*
        }

        impl ForeignFlags {
            /// The ones given, by key.
            pub(super) fn given(&self) -> Vec<(&'static str, &str)> {
                let all = [$(($key, &self.$field),)* $(($idle_key, &self.$idle),)*];
                all.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?))).collect()
            }
        }

        /// What to do instead of a flag of etcd's that is refused.
        pub(super) const REFUSED: &[(&str, &str)] = &[$(($key, $reason)),*];
        /// Why a flag of etcd's changes nothing.
        pub(super) const WITHOUT_EFFECT: &[(&str, &str)] = &[$(($idle_key, $why)),*];
    };
}

foreign! {
    cert_file "cert-file" TLS;
    key_file "key-file" TLS;
    client_cert_file "client-cert-file" TLS;
    client_key_file "client-key-file" TLS;
    client_cert_auth "client-cert-auth" TLS;
    client_crl_file "client-crl-file" TLS;
    client_cert_allowed_hostname "client-cert-allowed-hostname" TLS;
    trusted_ca_file "trusted-ca-file" TLS;
    auto_tls "auto-tls" TLS;
    peer_cert_file "peer-cert-file" TLS;
    peer_key_file "peer-key-file" TLS;
    peer_client_cert_file "peer-client-cert-file" TLS;
    peer_client_key_file "peer-client-key-file" TLS;
    peer_client_cert_auth "peer-client-cert-auth" TLS;
    peer_trusted_ca_file "peer-trusted-ca-file" TLS;
    peer_auto_tls "peer-auto-tls" TLS;
    peer_crl_file "peer-crl-file" TLS;
    peer_cert_allowed_cn "peer-cert-allowed-cn" TLS;
    peer_cert_allowed_hostname "peer-cert-allowed-hostname" TLS;
    peer_skip_client_san_verification "peer-skip-client-san-verification" TLS;
    self_signed_cert_validity "self-signed-cert-validity" TLS;
    cipher_suites "cipher-suites" TLS;
    tls_min_version "tls-min-version" TLS;
    tls_max_version "tls-max-version" TLS;
    discovery "discovery" DISCOVERY;
    discovery_endpoints "discovery-endpoints" DISCOVERY;
    discovery_token "discovery-token" DISCOVERY;
    discovery_srv "discovery-srv" DISCOVERY;
    discovery_srv_name "discovery-srv-name" DISCOVERY;
    auth_token "auth-token" AUTH;
    auth_token_ttl "auth-token-ttl" AUTH;
    bcrypt_cost "bcrypt-cost" AUTH;
    cors "cors" GATEWAY;
    host_whitelist "host-whitelist" GATEWAY;
    listen_client_http_urls "listen-client-http-urls" SAME_PORT;
    listen_metrics_urls "listen-metrics-urls" SAME_PORT;
    wal_dir "wal-dir" "the log is kept in data-dir, under raft/; mount a device there";
    unsafe_no_fsync "unsafe-no-fsync" "a log that is not synced loses acknowledged writes";
    force_new_cluster "force-new-cluster" "stop the node and run `mainstay recover --force-new-cluster`";
    @without_effect
    pre_vote "pre-vote" "pre-vote is always on";
    strict_reconfig_check "strict-reconfig-check" "changes that would lose the quorum are always refused";
    enable_grpc_gateway "enable-grpc-gateway" "the JSON gateway is not served yet";
    initial_election_tick_advance "initial-election-tick-advance" "there are no ticks here";
    max_snapshots "max-snapshots" "one snapshot is kept";
    max_wals "max-wals" "the log is bounded by log-retention-entries and log-retention-bytes";
    snapshot_catchup_entries "snapshot-catchup-entries" "see log-retention-entries";
    backend_batch_interval "backend-batch-interval" "writes are batched by load";
    backend_batch_limit "backend-batch-limit" "writes are batched by load";
    backend_bbolt_freelist_type "backend-bbolt-freelist-type" "there is no free list here";
    bootstrap_defrag_threshold_megabytes "bootstrap-defrag-threshold-megabytes" "space is reclaimed as the store runs";
    compaction_batch_limit "compaction-batch-limit" "the sweep limits itself";
    compaction_sleep_interval "compaction-sleep-interval" "the sweep limits itself";
    grpc_keepalive_min_time "grpc-keepalive-min-time" "clients may ping as often as they like";
    memory_mlock "memory-mlock" "memory is not locked";
    metrics "metrics" "all metrics are always exported";
    logger "logger" "see log-format and log-level";
    log_outputs "log-outputs" "the log goes to standard error";
    enable_log_rotation "enable-log-rotation" "the log goes to standard error";
    log_rotation_config_json "log-rotation-config-json" "the log goes to standard error";
    enable_pprof "enable-pprof" "there is no profiler to serve";
}
