//! The one place that opens listeners, and the loop that serves them.
//!
//! Every port of the process is opened by [`Listeners::open`], so that a taken
//! port is told before anything else is touched, and so that TLS comes in at
//! one place. A connection speaks HTTP/1.1 or HTTP/2, whichever it begins with.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connection::{Calls, Gathered, Turns};
use super::context::Remote;
use super::front::Front;
use super::{ListenAddress, ServerOptions};
use crate::telemetry;

/// Connections that may wait to be accepted; the system refuses further ones.
const BACKLOG: i32 = 1024;
/// How long the system waits before it asks whether a silent peer is there.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// Pause after a failed accept, when the process has no file handles left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long an HTTP/1.1 client may take to send its headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Services and methods whose calls stay on their connection's task: what of them is heavy leaves it by
/// itself, and to wake a task for the rest costs as much as a fourth of a read.
const STAYING: &[&str] =
    &["/etcdserverpb.KV/", "/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive"];

/// Why a listener could not be opened.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The name means no address.
    #[error("{setting}: {address}: the host has no address ({reason}); name an address of this machine")]
    Unresolved {
        /// The setting.
        setting: &'static str,
        /// The address.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// Another process listens there.
    #[error("{setting}: {address} is in use by another process; stop it, or set {setting} to another port")]
    InUse {
        /// The setting.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// The address is another machine's.
    #[error("{setting}: {address} is not an address of this machine; set {setting} to one that is")]
    NotHere {
        /// The setting.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// The system refused for another reason.
    #[error("{setting}: cannot listen on {address}: {source}")]
    Io {
        /// The setting.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Open ports that nobody serves yet; who connects waits.
#[derive(Debug)]
pub struct Listeners {
    pub(super) client: Vec<TcpListener>,
    pub(super) peer: Vec<TcpListener>,
}

impl Listeners {
    /// Opens every port the options name.
    ///
    /// # Errors
    /// [`ListenError`] names the setting and the fix. Nothing stays open then.
    pub async fn open(options: &ServerOptions) -> Result<Listeners, ListenError> {
        let mut listeners = Listeners { client: Vec::new(), peer: Vec::new() };
        for address in &options.client_listeners {
            listeners.client.push(open(address).await?);
        }
        for address in &options.peer_listeners {
            listeners.peer.push(open(address).await?);
        }
        Ok(listeners)
    }

    /// Where clients connect to.
    pub fn client_addresses(&self) -> Vec<SocketAddr> {
        self.client.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Where peers connect to.
    pub fn peer_addresses(&self) -> Vec<SocketAddr> {
        self.peer.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }
}

async fn open(address: &ListenAddress) -> Result<TcpListener, ListenError> {
    let setting = address.setting;
    let unresolved =
        |reason: String| ListenError::Unresolved { setting, address: address.to_string(), reason };
    let found = tokio::net::lookup_host((address.host.as_str(), address.port)).await;
    let found: Vec<SocketAddr> = found.map_err(|error| unresolved(error.to_string()))?.collect();
    // "localhost" is often both; clients of the other protocols fall back to this one.
    let chosen = found.iter().find(|address| address.is_ipv4()).or(found.first());
    let Some(&chosen) = chosen else { return Err(unresolved("none found".to_owned())) };
    bind(chosen).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { setting, address: chosen },
        io::ErrorKind::AddrNotAvailable => ListenError::NotHere { setting, address: chosen },
        _ => ListenError::Io { setting, address: chosen, source },
    })
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restarted node must not wait for its old connections to be forgotten.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// How the connections of one listener are served.
#[derive(Clone, Debug)]
pub(super) struct ConnectionOptions {
    /// The listener's name in the metrics.
    pub name: &'static str,
    pub max_concurrent_streams: Option<u32>,
    pub keepalive_interval: Option<Duration>,
    pub keepalive_timeout: Duration,
    /// Bytes that may be on their way for one stream.
    pub stream_window_bytes: u32,
    /// Bytes that may be on their way for one connection.
    pub connection_window_bytes: u32,
}

impl ConnectionOptions {
    pub(super) fn client(options: &ServerOptions) -> ConnectionOptions {
        ConnectionOptions {
            name: "client",
            max_concurrent_streams: options.max_concurrent_streams,
            keepalive_interval: options.keepalive_interval,
            keepalive_timeout: options.keepalive_timeout,
            stream_window_bytes: 1 << 20,
            connection_window_bytes: 4 << 20,
        }
    }

    /// Peers send batches and snapshots: wide windows, and a dead peer is noticed soon.
    pub(super) fn peer() -> ConnectionOptions {
        ConnectionOptions {
            name: "peer",
            max_concurrent_streams: None,
            keepalive_interval: Some(Duration::from_secs(10)),
            keepalive_timeout: Duration::from_secs(5),
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 16 << 20,
        }
    }

    fn builder(&self, calls: Calls) -> Builder<Calls> {
        let mut builder = Builder::new(calls);
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        // The timer comes first: an interval without one panics.
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .initial_stream_window_size(self.stream_window_bytes)
            .initial_connection_window_size(self.connection_window_bytes)
            .max_concurrent_streams(self.max_concurrent_streams);
        builder
    }
}

/// Serves connections until `drain` is cancelled, then lets the open requests
/// finish. Dropping the future cuts them off.
pub(super) async fn serve(
    listener: TcpListener,
    front: Arc<Front>,
    options: ConnectionOptions,
    drain: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Of one connection that was gone again, or of the whole process
                // having no handles left; only the second needs the pause.
                tracing::warn!(%error, listener = options.name, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        prepare(&stream);
        let connection = serve_connection(stream, remote, front.clone(), options.clone(), drain.clone());
        connections.spawn(counted(options.name, connection));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

fn prepare(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
    // A connection without them is slower, or noticed dead later, and works.
    if let Err(error) = stream.set_nodelay(true).and_then(|()| socket.set_tcp_keepalive(&keepalive)) {
        tracing::debug!(%error, "a connection's options could not be set");
    }
}

async fn counted(name: &'static str, connection: impl Future<Output = ()>) {
    metrics::gauge!(telemetry::CONNECTIONS_OPEN, "listener" => name).increment(1.0);
    connection.await;
    metrics::gauge!(telemetry::CONNECTIONS_OPEN, "listener" => name).decrement(1.0);
}

async fn serve_connection(
    stream: TcpStream,
    remote: SocketAddr,
    front: Arc<Front>,
    options: ConnectionOptions,
    drain: CancellationToken,
) {
    let remote = Remote(remote.ip().to_string().into());
    let (calls, wire) = (Calls::default(), Gathered::new(stream));
    let service = service_fn({
        let calls = calls.clone();
        move |request: hyper::Request<Incoming>| {
            if STAYING.iter().any(|staying| request.uri().path().starts_with(staying)) {
                calls.keep_next();
            }
            front.clone().answer(request, remote.clone())
        }
    });
    let builder = options.builder(calls.clone());
    let connection = builder.serve_connection(TokioIo::new(wire.clone()), service);
    let mut connection = std::pin::pin!(connection);
    let mut turns = Turns::new(wire, calls);
    let result = tokio::select! {
        result = poll_fn(|context| turns.turn(connection.as_mut(), context)) => result,
        () = drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            poll_fn(|context| turns.turn(connection.as_mut(), context)).await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(address: ListenAddress) -> ServerOptions {
        ServerOptions { client_listeners: vec![address], peer_listeners: vec![], ..ServerOptions::default() }
    }

    #[tokio::test]
    async fn a_taken_port_is_told_with_its_setting() {
        let first = Listeners::open(&only(ListenAddress::client("127.0.0.1", 0))).await.unwrap();
        let port = first.client_addresses()[0].port();
        let error = Listeners::open(&only(ListenAddress::client("127.0.0.1", port))).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ListenError::InUse { .. }), "{text}");
        assert!(text.starts_with("listen-client-urls: 127.0.0.1:"), "{text}");
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_told_apart() {
        let error = Listeners::open(&only(ListenAddress::client("192.0.2.1", 0))).await.unwrap_err();
        assert!(matches!(error, ListenError::NotHere { .. }), "{error}");
        let error = Listeners::open(&only(ListenAddress::peer("no-such-host.invalid", 1))).await.unwrap_err();
        assert!(error.to_string().starts_with("listen-peer-urls: no-such-host.invalid:1"), "{error}");
    }
}
