//! What the services and listeners of one node are told at its start. Filled by
//! `settings`.

use std::fmt;
use std::time::Duration;

/// What the services and listeners are told.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where clients are served.
    pub client_listeners: Vec<ListenAddress>,
    /// Where peers are served.
    pub peer_listeners: Vec<ListenAddress>,
    /// The largest request in bytes.
    pub max_request_bytes: usize,
    /// The most operations of a transaction.
    pub max_txn_ops: usize,
    /// Bytes of keys and values that one read may collect.
    pub max_range_bytes: usize,
    /// Requests and streams open on one connection; `None` is no limit.
    pub max_concurrent_streams: Option<u32>,
    /// How often an idle client is pinged; `None` is never.
    pub keepalive_interval: Option<Duration>,
    /// How long a ping may go unanswered before the connection is closed.
    pub keepalive_timeout: Duration,
    /// Unary requests that take longer are logged.
    pub slow_request: Duration,
    /// How long requests may take to finish when the server stops.
    pub stop_timeout: Duration,
    /// How long a linearizable read, or a request without a deadline of its own,
    /// may wait (etcd's: 5 s and two election timeouts).
    pub request_timeout: Duration,
    /// How long a stream that asked for a leader is kept without one (etcd's:
    /// three election timeouts).
    pub leaderless_grace: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            client_listeners: vec![ListenAddress::client("localhost", 2379)],
            peer_listeners: vec![ListenAddress::peer("localhost", 2380)],
            max_request_bytes: 3 << 19,
            max_txn_ops: 128,
            max_range_bytes: 128 << 20,
            max_concurrent_streams: None,
            keepalive_interval: Some(Duration::from_secs(2 * 3600)),
            keepalive_timeout: Duration::from_secs(20),
            slow_request: Duration::from_millis(300),
            stop_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(7),
            leaderless_grace: Duration::from_secs(3),
        }
    }
}

/// Where one listener is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// The setting that named it, for errors.
    pub setting: &'static str,
    /// A name or an address, without brackets.
    pub host: String,
    /// The port; 0 lets the system choose one.
    pub port: u16,
}

impl ListenAddress {
    /// An address of `listen-client-urls`.
    pub fn client(host: &str, port: u16) -> ListenAddress {
        ListenAddress { setting: "listen-client-urls", host: host.to_owned(), port }
    }

    /// An address of `listen-peer-urls`.
    pub fn peer(host: &str, port: u16) -> ListenAddress {
        ListenAddress { setting: "listen-peer-urls", host: host.to_owned(), port }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}
