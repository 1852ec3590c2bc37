//! Opens every channel to an address, for clients and for nodes that know no more
//! of each other yet, so that what every connection needs (and TLS, once it is
//! served) stands in one place.
//!
//! Channels to members, whose addresses change while they last, are opened in
//! one place too: `raft/network.rs`.

use std::time::Duration;

use thiserror::Error;
use tonic::transport::{Channel, Endpoint};

/// What a connection is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelOptions {
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long an idle connection waits before it asks whether the other side
    /// lives. etcd's servers close connections that ask more often than every
    /// five seconds.
    pub keepalive_interval: Duration,
    /// How long the answer to that may take before the connection is closed.
    pub keepalive_timeout: Duration,
    /// Whether to ask also while no call is under way.
    pub keepalive_while_idle: bool,
    /// The most unread bytes of one stream.
    pub stream_window_bytes: u32,
    /// The most unread bytes of all streams of the connection.
    pub connection_window_bytes: u32,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        ChannelOptions {
            connect_timeout: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            keepalive_while_idle: true,
            stream_window_bytes: 2 << 20,
            connection_window_bytes: 8 << 20,
        }
    }
}

/// An address that no channel can be opened to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadAddress {
    /// It is not a URL.
    #[error("`{address}` is not an address; write it as http://host:port")]
    Malformed {
        /// The address.
        address: String,
    },
    /// It asks for something that this version does not speak.
    #[error("`{address}`: the scheme `{scheme}` is not supported; write http://host:port")]
    Scheme {
        /// The address.
        address: String,
        /// The scheme.
        scheme: String,
    },
}

/// Why no connection came about.
#[derive(Debug, Error)]
pub enum NotConnected {
    /// It cannot be tried.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// The other side refused, or was not found.
    #[error(transparent)]
    Failed(#[from] tonic::transport::Error),
    /// The time ran out.
    #[error("no connection within {0:?}")]
    Timeout(Duration),
}

/// Opens a channel to `address`: `http://host:port`, or `host:port` for short.
///
/// Returns at once and connects with the first call; a lost connection is made
/// anew with the next one. Must be called inside a Tokio runtime.
///
/// # Errors
/// Only for an address that cannot be one; a server that cannot be reached is
/// an error of the call.
pub fn connect(address: &str, options: &ChannelOptions) -> Result<Channel, BadAddress> {
    Ok(endpoint(address, options)?.connect_lazy())
}

/// Opens a channel as [`connect`] does, and waits until it is connected.
///
/// # Errors
/// [`NotConnected`]: no call was made, so nothing was sent.
pub async fn connect_now(address: &str, options: &ChannelOptions) -> Result<Channel, NotConnected> {
    let endpoint = endpoint(address, options)?;
    // The endpoint's own limit ends with TCP's part; this one covers HTTP/2's greeting too.
    match tokio::time::timeout(options.connect_timeout, endpoint.connect()).await {
        Ok(connected) => Ok(connected?),
        Err(_) => Err(NotConnected::Timeout(options.connect_timeout)),
    }
}

/// A channel to nowhere: each call on it fails at once, and surely was not sent.
/// For what must not be reached. Must be called inside a Tokio runtime.
pub fn refusing() -> Channel {
    // Nobody can listen on port 0.
    Endpoint::from_static("http://127.0.0.1:0").connect_lazy()
}

fn endpoint(address: &str, options: &ChannelOptions) -> Result<Endpoint, BadAddress> {
    let malformed = || BadAddress::Malformed { address: address.to_owned() };
    let url = match address.split_once("://") {
        None => format!("http://{address}"),
        Some(("http", _)) => address.to_owned(),
        Some((scheme, _)) => {
            return Err(BadAddress::Scheme { address: address.to_owned(), scheme: scheme.to_owned() });
        }
    };
    let endpoint = Endpoint::from_shared(url).map_err(|_| malformed())?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(malformed());
    }
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(options.keepalive_while_idle)
        .initial_stream_window_size(options.stream_window_bytes)
        .initial_connection_window_size(options.connection_window_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_urls_or_short_for_them() {
        let uri = |address: &str| {
            endpoint(address, &ChannelOptions::default()).map(|endpoint| endpoint.uri().to_string())
        };
        assert_eq!(uri("http://a:1").as_deref(), Ok("http://a:1/"));
        assert_eq!(uri("a:1").as_deref(), Ok("http://a:1/"));
        assert_eq!(uri("[::1]:2379").as_deref(), Ok("http://[::1]:2379/"));
        for wrong in ["", "http://", "a b", "http://:1"] {
            assert!(matches!(uri(wrong), Err(BadAddress::Malformed { .. })), "{wrong}");
        }
    }

    #[test]
    fn a_scheme_that_is_not_spoken_is_named() {
        let error = endpoint("https://a:1", &ChannelOptions::default()).err();
        assert!(error.is_some_and(|error| error.to_string().contains("`https`")));
    }
}
