//! From the values that were given to every room's options, with the checks
//! that need more than one value.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::memory;
use super::units::{self, Url};
use super::{Given, Origin, Settings, SettingsError, Values};
use crate::node::{AutoCompaction, Bootstrap, InitialMember, NodeOptions};
use crate::raft::PEER_MESSAGE_BYTES_MAX;
use crate::server::{ListenAddress, ServerOptions};
use crate::storage::StateOptions;
use crate::telemetry::{LogFormat, LogOptions, check_log_level};
use crate::types::MemberKind;
use crate::watch::HubOptions;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// etcd refuses longer ones: nobody waits so long for a leader on purpose.
const ELECTION_TIMEOUT_MAX: Duration = Duration::from_secs(50);
/// An entry of the log goes to the other members in one message, and must fit with room to spare.
const REQUEST_BYTES_MAX: u64 = PEER_MESSAGE_BYTES_MAX as u64 / 2;

type Result<T> = std::result::Result<T, SettingsError>;

/// Composes every room's options of what was given.
pub(super) fn settings(mut values: Values) -> Result<Settings> {
    let log = log(&values)?;
    let urls = urls(&mut values)?;
    let node = node(&mut values, &urls)?;
    let server = server(&values, &urls, &node)?;
    let watch = watch(&values, &node)?;
    node.check().map_err(|error| SettingsError::Conflict(error.to_string()))?;
    Ok(Settings { node, watch, server, log, warnings: values.warnings })
}

struct Urls {
    listen_client: Vec<Url>,
    listen_peer: Vec<Url>,
    advertise_client: Vec<Url>,
    advertise_peer: Vec<Url>,
}

impl Values {
    fn text(&self, key: &'static str) -> Option<&Given> {
        debug_assert!(super::keys::KEYS.contains(&key), "{key} is not in the list of settings");
        self.given.get(key).filter(|given| !given.text.trim().is_empty())
    }

    fn refuse(&self, key: &'static str, reason: impl Into<String>) -> SettingsError {
        let origin = self.given.get(key).map_or(Origin::Default, |given| given.origin.clone());
        SettingsError::Value { key, origin, reason: reason.into() }
    }

    /// The value of `key` as `parse` understands it, or `default`.
    fn parsed<T>(
        &self,
        key: &'static str,
        default: T,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        match self.text(key) {
            None => Ok(default),
            Some(given) => parse(&given.text).map_err(|reason| self.refuse(key, reason)),
        }
    }

    fn bytes(&self, key: &'static str, default: u64, min: u64) -> Result<u64> {
        let value = self.parsed(key, default, units::bytes)?;
        match value < min {
            true => Err(self.refuse(key, format!("{value} bytes is too little; it must be at least {min}"))),
            false => Ok(value),
        }
    }

    fn count(&self, key: &'static str, default: u64) -> Result<u64> {
        match self.parsed(key, default, units::count)? {
            0 => Err(self.refuse(key, "it must be above zero")),
            value => Ok(value),
        }
    }

    fn duration(&self, key: &'static str, default: Duration, bare: Duration) -> Result<Duration> {
        self.parsed(key, default, |text| units::duration(text, bare))
    }

    fn urls(&self, key: &'static str, default: &[Url]) -> Result<Vec<Url>> {
        let Some(given) = self.text(key) else { return Ok(default.to_vec()) };
        let mut urls = Vec::new();
        for text in units::list(&given.text) {
            let url = units::url(&text).map_err(|reason| self.refuse(key, reason))?;
            match urls.contains(&url) && url.port != 0 {
                true => return Err(self.refuse(key, format!("{url} is given twice"))),
                false => urls.push(url),
            }
        }
        Ok(urls)
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn log(values: &Values) -> Result<LogOptions> {
    let level = values.text("log-level").map_or_else(|| "info".to_owned(), |given| given.text.clone());
    check_log_level(&level).map_err(|error| values.refuse("log-level", error.to_string()))?;
    let format = values.parsed("log-format", LogFormat::Text, |text| {
        text.parse().map_err(|error: crate::telemetry::TelemetryError| error.to_string())
    })?;
    Ok(LogOptions { level, format })
}

fn urls(values: &mut Values) -> Result<Urls> {
    let localhost = |port| [Url { host: "localhost".to_owned(), port }];
    let listen_client = values.urls("listen-client-urls", &localhost(2379))?;
    let listen_peer = values.urls("listen-peer-urls", &localhost(2380))?;
    for (key, urls) in [("listen-client-urls", &listen_client), ("listen-peer-urls", &listen_peer)] {
        if let Some(open) = urls.iter().find(|url| !url.is_loopback()) {
            let warning =
                format!("{key}: {open} can be reached from other machines, and TLS is not served yet");
            values.warnings.push(warning);
        }
    }
    if let Some(url) = listen_client.iter().find(|url| url.port != 0 && listen_peer.contains(url)) {
        let text =
            format!("listen-client-urls and listen-peer-urls both name {url}; give them different ports");
        return Err(SettingsError::Conflict(text));
    }
    let advertise_client = advertised(values, "advertise-client-urls", "listen-client-urls", &listen_client)?;
    let advertise_peer = advertised(values, "initial-advertise-peer-urls", "listen-peer-urls", &listen_peer)?;
    Ok(Urls { listen_client, listen_peer, advertise_client, advertise_peer })
}

/// The URLs others use: as given, or as listened on where that names one host.
fn advertised(values: &Values, key: &'static str, listen_key: &str, listen: &[Url]) -> Result<Vec<Url>> {
    let urls = values.urls(key, listen)?;
    if let Some(url) = urls.iter().find(|url| url.is_wildcard()) {
        let text = match values.text(key) {
            Some(_) => format!("{key}: {url} is every address of a machine; name the one others reach"),
            None => format!(
                "{listen_key} names {url}, which others cannot dial; set {key} to the address they reach"
            ),
        };
        return Err(SettingsError::Conflict(text));
    }
    if values.text(key).is_some() && urls.iter().any(|url| url.port == 0) {
        return Err(values.refuse(key, "port 0 cannot be dialled; name the port"));
    }
    Ok(urls)
}

fn node(values: &mut Values, urls: &Urls) -> Result<NodeOptions> {
    let values = &*values;
    let name = values.text("name").map_or("default", |given| given.text.trim()).to_owned();
    if name.contains([',', '=']) {
        return Err(values.refuse("name", "a name cannot contain a comma or an equals sign"));
    }
    let data_dir = match values.text("data-dir") {
        Some(given) => PathBuf::from(&given.text),
        None => PathBuf::from(format!("{name}.mainstay")),
    };
    let (heartbeat_interval, election_timeout) = timing(values)?;
    let max_request_bytes = values.bytes("max-request-bytes", 3 * MIB / 2, 1)?;
    if max_request_bytes > REQUEST_BYTES_MAX {
        return Err(values.refuse("max-request-bytes", format!("it must be at most {REQUEST_BYTES_MAX}")));
    }
    let texts = |urls: &[Url]| urls.iter().map(Url::to_string).collect::<Vec<_>>();
    let request_timeout = match values.text("request-timeout") {
        None => None,
        Some(_) => Some(values.duration("request-timeout", Duration::ZERO, Duration::from_secs(1))?),
    };
    let mut options = NodeOptions {
        bootstrap: bootstrap(values, &name, &texts(&urls.advertise_peer))?,
        name,
        data_dir,
        peer_urls: texts(&urls.advertise_peer),
        client_urls: texts(&urls.advertise_client),
        heartbeat_interval,
        election_timeout,
        max_request_bytes: size(max_request_bytes),
        in_flight_bytes: size(values.bytes("max-inflight-bytes", 64 * MIB, max_request_bytes)?),
        in_flight_count: size(values.count("max-inflight-requests", 5_000)?),
        request_timeout,
        quota_bytes: quota(values)?,
        disk_reserve_bytes: values.bytes("disk-reserve-bytes", 256 * MIB, 0)?,
        auto_compaction: auto_compaction(values)?,
        snapshot_count: values.count("snapshot-count", 100_000)?,
        log_retained_entries: values.count("log-retention-entries", 500_000)?,
        log_retained_bytes: values.bytes("log-retention-bytes", 4 * GIB, 64 * MIB)?,
        lease_reads: values.parsed("lease-reads", false, units::boolean)?,
        ..NodeOptions::default()
    };
    options.state = StateOptions {
        block_cache_bytes: size(values.bytes("block-cache-bytes", memory::for_a_cache(), MIB)?),
        record_cache_bytes: size(values.bytes("record-cache-bytes", memory::for_a_cache(), 0)?),
        write_buffer_bytes: size(values.bytes("write-buffer-bytes", 32 * MIB, MIB)?),
    };
    Ok(options)
}

fn watch(values: &Values, node: &NodeOptions) -> Result<HubOptions> {
    let progress_interval = values.duration(
        "watch-progress-notify-interval",
        Duration::from_secs(600),
        Duration::from_secs(1),
    )?;
    if progress_interval < Duration::from_millis(100) {
        return Err(values.refuse("watch-progress-notify-interval", "it must be at least 100ms"));
    }
    Ok(HubOptions {
        ring_bytes_max: size(values.bytes("watch-ring-bytes", 32 * MIB, MIB)?),
        progress_interval,
        fragment_bytes: node.max_request_bytes + (512 << 10),
        ..HubOptions::default()
    })
}

fn timing(values: &Values) -> Result<(Duration, Duration)> {
    let ms = Duration::from_millis(1);
    let heartbeat = values.duration("heartbeat-interval", 100 * ms, ms)?;
    let election = values.duration("election-timeout", 1000 * ms, ms)?;
    if heartbeat < 10 * ms {
        return Err(values.refuse("heartbeat-interval", "it must be at least 10ms"));
    }
    if election > ELECTION_TIMEOUT_MAX {
        return Err(values.refuse("election-timeout", "it must be at most 50s"));
    }
    if election < 5 * heartbeat {
        let text = format!(
            "election-timeout ({election:?}) must be at least five times heartbeat-interval ({heartbeat:?}); \
             raise the one or lower the other"
        );
        return Err(SettingsError::Conflict(text));
    }
    Ok((heartbeat, election))
}

/// Bytes; etcd writes 0 for its default and a negative number for no quota.
fn quota(values: &Values) -> Result<u64> {
    values.parsed("quota-backend-bytes", 2 * GIB, |text| match text.trim() {
        "0" => Ok(2 * GIB),
        negative if negative.starts_with('-') && units::count(&negative[1..]).is_ok() => Ok(0),
        text => units::bytes(text),
    })
}

fn auto_compaction(values: &Values) -> Result<AutoCompaction> {
    let key = "auto-compaction-retention";
    let hour = Duration::from_secs(3600);
    let mode = values.text("auto-compaction-mode").map_or("periodic", |given| given.text.trim());
    match mode {
        "periodic" => match values.duration(key, 24 * hour, hour)? {
            Duration::ZERO => Ok(AutoCompaction::Off),
            interval if interval < Duration::from_secs(1) => {
                Err(values.refuse(key, "it must be at least 1s"))
            }
            interval => Ok(AutoCompaction::Periodic(interval)),
        },
        "revision" => match values.text(key) {
            None => {
                Err(values.refuse(key, "with auto-compaction-mode revision, say how many revisions to keep"))
            }
            Some(_) => match values.parsed(key, 0, units::count)? {
                0 => Ok(AutoCompaction::Off),
                revisions => Ok(AutoCompaction::Revisions(revisions)),
            },
        },
        other => {
            Err(values
                .refuse("auto-compaction-mode", format!("{other:?} is unknown; use periodic or revision")))
        }
    }
}

fn bootstrap(values: &Values, name: &str, peer_urls: &[String]) -> Result<Bootstrap> {
    let kind = values.parsed("kind", MemberKind::Voter, member_kind)?;
    if let Some(join) = values.text("join") {
        for key in ["initial-cluster", "initial-cluster-state", "initial-cluster-token"] {
            if values.text(key).is_some() {
                let text = format!(
                    "join and {key} exclude each other: join asks a running cluster, {key} describes a cluster; \
                     remove one of them"
                );
                return Err(SettingsError::Conflict(text));
            }
        }
        let addresses = join.text.split(',').map(|text| units::url(text).map(|url| url.to_string()));
        let addresses = addresses.collect::<std::result::Result<_, _>>();
        let addresses = addresses.map_err(|reason| values.refuse("join", reason))?;
        return Ok(Bootstrap::Join { addresses, kind });
    }
    if values.text("kind").is_some() {
        let text = "kind goes with join; a member of initial-cluster is a voter".to_owned();
        return Err(SettingsError::Conflict(text));
    }
    let members = match values.text("initial-cluster") {
        Some(given) => initial_members(values, &given.text)?,
        None => vec![InitialMember { name: name.to_owned(), peer_urls: peer_urls.to_vec() }],
    };
    let token = values.text("initial-cluster-token").map_or("mainstay-cluster", |given| given.text.trim());
    match values.text("initial-cluster-state").map_or("new", |given| given.text.trim()) {
        "new" => Ok(Bootstrap::Initial { members, token: token.to_owned() }),
        "existing" if values.text("initial-cluster").is_none() => Err(SettingsError::Conflict(
            "initial-cluster-state existing needs initial-cluster, to know whom to ask; or use join"
                .to_owned(),
        )),
        "existing" => Ok(Bootstrap::Existing { members }),
        other => {
            Err(values.refuse("initial-cluster-state", format!("{other:?} is unknown; use new or existing")))
        }
    }
}

/// `name=url,name=url`; a name may come several times, once for each URL.
fn initial_members(values: &Values, text: &str) -> Result<Vec<InitialMember>> {
    let key = "initial-cluster";
    let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for part in units::list(text) {
        let Some((name, url)) = part.split_once('=') else {
            return Err(values.refuse(key, format!("{part:?} is not NAME=URL")));
        };
        let url = units::url(url).map_err(|reason| values.refuse(key, reason))?;
        if name.trim().is_empty() {
            return Err(values.refuse(key, format!("{url} has no name; write NAME={url}")));
        }
        if url.port == 0 || url.is_wildcard() {
            return Err(values
                .refuse(key, format!("{url} cannot be dialled; name the address and port others reach")));
        }
        let url = url.to_string();
        if let Some((owner, _)) = members.iter().find(|(_, urls)| urls.contains(&url)) {
            return Err(values.refuse(key, format!("{url} is given twice, for {owner} and {}", name.trim())));
        }
        members.entry(name.trim().to_owned()).or_default().push(url);
    }
    if members.is_empty() {
        return Err(values.refuse(key, "it names no member; write NAME=URL,NAME=URL"));
    }
    Ok(members.into_iter().map(|(name, peer_urls)| InitialMember { name, peer_urls }).collect())
}

fn member_kind(text: &str) -> std::result::Result<MemberKind, String> {
    match text.trim() {
        "voter" => Ok(MemberKind::Voter),
        "learner" => Ok(MemberKind::Learner),
        "observer" => Ok(MemberKind::Observer),
        other => Err(format!("{other:?} is unknown; use voter, learner or observer")),
    }
}

fn server(values: &Values, urls: &Urls, node: &NodeOptions) -> Result<ServerOptions> {
    let second = Duration::from_secs(1);
    let defaults = ServerOptions::default();
    let keepalive = values.duration("grpc-keepalive-interval", 7200 * second, second)?;
    let max_concurrent_streams = match values.text("max-concurrent-streams") {
        None => None,
        Some(_) => {
            let streams = values.count("max-concurrent-streams", 1)?;
            Some(u32::try_from(streams).unwrap_or(u32::MAX))
        }
    };
    let listen = |urls: &[Url], make: fn(&str, u16) -> ListenAddress| {
        urls.iter().map(|url| make(&url.host, url.port)).collect::<Vec<_>>()
    };
    let slow =
        values.duration("warning-unary-request-duration", defaults.slow_request, Duration::from_millis(1))?;
    Ok(ServerOptions {
        client_listeners: listen(&urls.listen_client, ListenAddress::client),
        peer_listeners: listen(&urls.listen_peer, ListenAddress::peer),
        max_request_bytes: node.max_request_bytes,
        max_txn_ops: size(values.count("max-txn-ops", 128)?),
        max_range_bytes: size(values.bytes("max-range-bytes", 128 * MIB, node.max_request_bytes as u64)?),
        max_concurrent_streams,
        keepalive_interval: (!keepalive.is_zero()).then_some(keepalive),
        keepalive_timeout: values.duration("grpc-keepalive-timeout", defaults.keepalive_timeout, second)?,
        slow_request: slow,
        stop_timeout: values.duration("stop-timeout", defaults.stop_timeout, second)?,
        request_timeout: node.request_timeout(),
        leaderless_grace: 3 * node.election_timeout,
    })
}
