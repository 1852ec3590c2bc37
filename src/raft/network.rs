//! The transport over gRPC: connections to the members' peer listeners, and
//! what goes over them.
//!
//! Each lane of each member has a connection of its own, made when it is first
//! used and made anew when the member's URLs change. Where a member is, is
//! looked up at the moment of connecting. Nothing is tried twice here, and
//! nothing waits without a limit.

use std::collections::HashMap;
use std::error::Error as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};

use super::config::PEER_MESSAGE_BYTES_MAX;
use super::peers::Directory;
use super::transport::{
    AppendRequest, AppendResult, BoxStream, Envelope, PeerError, PeerFuture, Refusal, SnapshotTimeouts,
    TransferLeaderRequest, TransferLeaderResult, Transport, VoteRequest, VoteResponse,
};
use super::types::Vote;
use super::wire;
use crate::storage::snapshot::StoredSnapshot;
use crate::types::NodeId;
use crate::wire::peer_v1::raft_client::RaftClient;
use crate::wire::peer_v1::{self as peer, snapshot_chunk, snapshot_progress};

/// How long a TCP connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes in flight on one stream, and on one connection, before the peer must
/// have read some.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Chunks of a snapshot read ahead of the network.
const SNAPSHOT_READ_AHEAD: usize = 2;

/// Metadata of every call: see raft.proto.
const CLUSTER_ID: &str = "mainstay-cluster-id";
const TARGET_ID: &str = "mainstay-target-id";
const TARGET_DISK: &str = "mainstay-target-disk";
const SENDER_ID: &str = "mainstay-sender-id";
const REFUSAL: &str = "mainstay-refusal";

/// What a connection carries. None delays another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lane {
    /// Heartbeats, votes and transfers.
    Lifeline,
    Append,
    Snapshot,
    Control,
}

/// The transport over gRPC.
pub struct GrpcTransport {
    directory: Arc<Directory>,
    keep_alive: Duration,
    channels: Mutex<HashMap<(NodeId, Lane), Open>>,
}

struct Open {
    generation: u64,
    channel: Channel,
}

impl GrpcTransport {
    /// Reaches the members where `directory` says they are. A connection on
    /// which nothing comes back for twice `keep_alive` is given up.
    pub fn new(directory: Arc<Directory>, keep_alive: Duration) -> GrpcTransport {
        GrpcTransport { directory, keep_alive, channels: Mutex::default() }
    }

    /// The connection to a member for a lane. Connects when it is first used.
    fn channel(&self, target: NodeId, lane: Lane) -> Channel {
        let generation = self.directory.generation(target);
        let mut channels = self.channels.lock();
        if let Some(open) = channels.get(&(target, lane))
            && open.generation == generation
        {
            return open.channel.clone();
        }
        let channel = open_peer_channel(&self.directory, target, self.keep_alive);
        channels.insert((target, lane), Open { generation, channel: channel.clone() });
        channel
    }

    fn client(&self, target: NodeId, lane: Lane) -> RaftClient<Channel> {
        RaftClient::new(self.channel(target, lane))
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
    }
}

/// Every connection to a peer begins here, so that TLS has one place to come in.
fn open_peer_channel(directory: &Arc<Directory>, target: NodeId, keep_alive: Duration) -> Channel {
    // Only a name for the `:authority` header; the address is looked up below.
    let endpoint = Endpoint::from_shared(format!("http://{target:x}.peer.mainstay"))
        .expect("hexadecimal digits and letters make a host name")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(keep_alive)
        .keep_alive_timeout(keep_alive)
        .keep_alive_while_idle(true);
    let directory = directory.clone();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (urls, _) = directory.urls(target);
        async move { connect(urls).await.map(TokioIo::new) }
    }))
}

/// No connection came about: nothing was sent.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {address}: {reason}")]
struct ConnectError {
    address: String,
    reason: String,
}

async fn connect(urls: Vec<String>) -> Result<TcpStream, ConnectError> {
    let mut error =
        ConnectError { address: "the member".to_owned(), reason: "it has no peer URL".to_owned() };
    for url in urls {
        let authority = url.parse::<Uri>().ok().and_then(|uri| uri.authority().cloned());
        let attempt = async {
            let authority = authority.ok_or_else(|| "it is no URL with a host".to_owned())?;
            let host = authority.host().trim_matches(['[', ']']);
            let port = authority.port_u16().unwrap_or(2380);
            let stream = TcpStream::connect((host, port)).await.map_err(|error| error.to_string())?;
            stream.set_nodelay(true).map_err(|error| error.to_string())?;
            Ok::<_, String>(stream)
        };
        let reason = match tokio::time::timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {CONNECT_TIMEOUT:?}"),
        };
        error = ConnectError { address: url, reason };
    }
    Err(error)
}

impl Transport for GrpcTransport {
    fn append(
        &self,
        to: Envelope,
        requests: BoxStream<AppendRequest>,
        timeout: Duration,
    ) -> PeerFuture<BoxStream<Result<AppendResult, PeerError>>> {
        let client = self.client(to.target, Lane::Append);
        let requests = addressed(AppendRequests(requests), &to);
        open_append(client, requests, timeout).boxed()
    }

    fn heartbeat(&self, to: Envelope, request: AppendRequest, timeout: Duration) -> PeerFuture<AppendResult> {
        let mut client = self.client(to.target, Lane::Lifeline);
        async move {
            let request = timed(addressed(wire::append_request(&request), &to), timeout);
            let answer = client.heartbeat(request).await;
            wire::parse_append_response(unary(answer, timeout)?)
        }
        .boxed()
    }

    fn vote(&self, to: Envelope, request: VoteRequest, timeout: Duration) -> PeerFuture<VoteResponse> {
        let mut client = self.client(to.target, Lane::Lifeline);
        async move {
            let request = timed(addressed(wire::vote_request(&request), &to), timeout);
            wire::parse_vote_response(unary(client.vote(request).await, timeout)?)
        }
        .boxed()
    }

    fn pre_vote(&self, to: Envelope, request: VoteRequest, timeout: Duration) -> PeerFuture<VoteResponse> {
        let mut client = self.client(to.target, Lane::Lifeline);
        async move {
            let request = timed(addressed(wire::vote_request(&request), &to), timeout);
            wire::parse_vote_response(unary(client.pre_vote(request).await, timeout)?)
        }
        .boxed()
    }

    fn transfer_leader(
        &self,
        to: Envelope,
        request: TransferLeaderRequest,
        timeout: Duration,
    ) -> PeerFuture<TransferLeaderResult> {
        let mut client = self.client(to.target, Lane::Lifeline);
        async move {
            let request = timed(addressed(wire::transfer_request(&request), &to), timeout);
            wire::parse_transfer_response(unary(client.transfer_leader(request).await, timeout)?)
        }
        .boxed()
    }

    fn snapshot(
        &self,
        to: Envelope,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
        timeouts: SnapshotTimeouts,
    ) -> PeerFuture<Vote> {
        let client = self.client(to.target, Lane::Snapshot);
        send_snapshot(client, to, leader, snapshot, timeouts).boxed()
    }

    fn call(&self, to: Envelope, path: &'static str, body: Bytes, timeout: Duration) -> PeerFuture<Bytes> {
        let channel = self.channel(to.target, Lane::Control);
        async move {
            let mut grpc = ready(channel, timeout).await?;
            let request = timed(addressed(body, &to), timeout);
            unary(grpc.unary(request, PathAndQuery::from_static(path), RawCodec).await, timeout)
        }
        .boxed()
    }

    fn call_stream(
        &self,
        to: Envelope,
        path: &'static str,
        bodies: BoxStream<Bytes>,
        timeout: Duration,
    ) -> PeerFuture<BoxStream<Result<Bytes, PeerError>>> {
        let channel = self.channel(to.target, Lane::Control);
        async move {
            let mut grpc = ready(channel, timeout).await?;
            let request = addressed(bodies, &to);
            let opened = grpc.streaming(request, PathAndQuery::from_static(path), RawCodec).await;
            let answers = unary(opened, timeout)?;
            Ok(answers.map(move |answer| answer.map_err(|status| peer_error(&status, timeout))).boxed())
        }
        .boxed()
    }
}

/// Appends as the wire has them. A type of its own, because the compiler cannot
/// prove that a future which holds the boxed stream may change threads.
struct AppendRequests(BoxStream<AppendRequest>);

impl Stream for AppendRequests {
    type Item = peer::AppendRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context).map(|next| next.map(|request| wire::append_request(&request)))
    }
}

async fn open_append(
    mut client: RaftClient<Channel>,
    requests: Request<AppendRequests>,
    timeout: Duration,
) -> Result<BoxStream<Result<AppendResult, PeerError>>, PeerError> {
    let answers = unary(client.append(requests).await, timeout)?;
    let answers = answers.map(move |answer| match answer {
        Ok(answer) => wire::parse_append_response(answer),
        Err(status) => Err(peer_error(&status, timeout)),
    });
    Ok(answers.boxed())
}

async fn ready(channel: Channel, timeout: Duration) -> Result<tonic::client::Grpc<Channel>, PeerError> {
    let mut grpc = tonic::client::Grpc::new(channel)
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX);
    match grpc.ready().await {
        Ok(()) => Ok(grpc),
        Err(error) => Err(peer_error(&Status::from_error(Box::new(error)), timeout)),
    }
}

/// Sends a snapshot and follows its progress. Reading is done by a blocking
/// task that ends when nobody takes its chunks.
async fn send_snapshot(
    mut client: RaftClient<Channel>,
    to: Envelope,
    leader: Vote,
    snapshot: Arc<StoredSnapshot>,
    timeouts: SnapshotTimeouts,
) -> Result<Vote, PeerError> {
    let header = peer::SnapshotHeader {
        ballot: Some(wire::ballot(&leader)),
        manifest: snapshot.manifest().encode().into(),
    };
    let (chunks, queue) = tokio::sync::mpsc::channel(SNAPSHOT_READ_AHEAD);
    let disk_error = Arc::new(Mutex::new(None));
    let failed = disk_error.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let mut reader = snapshot.reader();
        let first = snapshot_chunk::Part::Header(header);
        let mut next = Some(first);
        while let Some(part) = next {
            if chunks.blocking_send(peer::SnapshotChunk { part: Some(part) }).is_err() {
                return;
            }
            next = match reader.next() {
                Ok(content) => content.map(snapshot_chunk::Part::Content),
                Err(error) => {
                    *failed.lock() = Some(PeerError::Disk(error.to_string()));
                    return;
                }
            };
        }
    });
    let requests = tokio_stream::wrappers::ReceiverStream::new(queue);
    let outcome = follow_snapshot(&mut client, addressed(requests, &to), timeouts).await;
    // The connection lets go of the queue with the call, so the reader ends.
    drop(client);
    let _ = reading.await;
    match disk_error.lock().take() {
        Some(error) => Err(error),
        None => outcome,
    }
}

async fn follow_snapshot(
    client: &mut RaftClient<Channel>,
    request: Request<tokio_stream::wrappers::ReceiverStream<peer::SnapshotChunk>>,
    timeouts: SnapshotTimeouts,
) -> Result<Vote, PeerError> {
    let opened = timeout(timeouts.idle, client.install_snapshot(request)).await?;
    let mut progress = unary(opened, timeouts.idle)?;
    let mut installing = false;
    loop {
        let limit = if installing { timeouts.install } else { timeouts.idle };
        let news = timeout(limit, progress.message()).await?;
        let news = news.map_err(|status| peer_error(&status, limit))?;
        match news {
            None => return Err(PeerError::Failed("the transfer ended without an answer".to_owned())),
            Some(peer::SnapshotProgress { state: Some(snapshot_progress::State::Done(ballot)) }) => {
                return wire::parse_ballot(Some(ballot));
            }
            Some(peer::SnapshotProgress { state: Some(snapshot_progress::State::Installing(_)) }) => {
                installing = true;
            }
            Some(_) => {}
        }
    }
}

async fn timeout<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, PeerError> {
    tokio::time::timeout(limit, work).await.map_err(|_| PeerError::Timeout(limit))
}

fn unary<T>(answer: Result<Response<T>, Status>, timeout: Duration) -> Result<T, PeerError> {
    answer.map(Response::into_inner).map_err(|status| peer_error(&status, timeout))
}

/// A request that says whom it is for.
fn addressed<T>(message: T, to: &Envelope) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    for (name, value) in [
        (CLUSTER_ID, to.cluster),
        (TARGET_ID, to.target),
        (TARGET_DISK, to.target_disk),
        (SENDER_ID, to.sender),
    ] {
        let value = AsciiMetadataValue::try_from(format!("{value:x}"));
        metadata.insert(name, value.expect("hexadecimal digits are a metadata value"));
    }
    request
}

/// Lets the server give up when the caller has.
fn timed<T>(mut request: Request<T>, timeout: Duration) -> Request<T> {
    request.set_timeout(timeout);
    request
}

/// Whom a call is for, as `addressed` wrote it.
///
/// # Errors
/// A status that says which metadata is missing or malformed.
pub fn envelope_of(metadata: &MetadataMap) -> Result<Envelope, Status> {
    let number = |name: &'static str| {
        let value = metadata.get(name).and_then(|value| value.to_str().ok());
        value.and_then(|value| u64::from_str_radix(value, 16).ok()).ok_or_else(|| {
            Status::invalid_argument(format!("mainstay: the metadata {name} is missing or bad"))
        })
    };
    Ok(Envelope {
        cluster: number(CLUSTER_ID)?,
        target: number(TARGET_ID)?,
        target_disk: number(TARGET_DISK)?,
        sender: number(SENDER_ID)?,
    })
}

/// How a failed peer call is told to the caller.
pub fn status_of(error: &PeerError) -> Status {
    match error {
        PeerError::Refused(refusal) => {
            let (what, actual) = match *refusal {
                Refusal::WrongCluster { actual } => ("cluster", actual),
                Refusal::WrongNode { actual } => ("node", actual),
                Refusal::WrongDisk { actual } => ("disk", actual),
            };
            let mut status = Status::failed_precondition(format!("mainstay: refused: {refusal}"));
            if let Ok(value) = AsciiMetadataValue::try_from(format!("{what} {actual:x}")) {
                status.metadata_mut().insert(REFUSAL, value);
            }
            status
        }
        PeerError::Busy(reason) | PeerError::NotSent(reason) => Status::resource_exhausted(reason.clone()),
        PeerError::Timeout(_) => Status::deadline_exceeded(error.to_string()),
        PeerError::Lost(reason) => Status::unavailable(reason.clone()),
        PeerError::Failed(reason) | PeerError::Disk(reason) => Status::internal(reason.clone()),
    }
}

/// What a status means for a call that had `timeout` to be answered.
fn peer_error(status: &Status, timeout: Duration) -> PeerError {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<ConnectError>() {
            return PeerError::NotSent(error.to_string());
        }
        cause = error.source();
    }
    if let Some(refusal) = parse_refusal(status.metadata()) {
        return PeerError::Refused(refusal);
    }
    let reason = status.message().to_owned();
    match status.code() {
        Code::ResourceExhausted => PeerError::Busy(reason),
        Code::DeadlineExceeded | Code::Cancelled => PeerError::Timeout(timeout),
        Code::Unavailable | Code::Unknown => PeerError::Lost(reason),
        code => PeerError::Failed(format!("{code:?}: {reason}")),
    }
}

fn parse_refusal(metadata: &MetadataMap) -> Option<Refusal> {
    let (what, actual) = metadata.get(REFUSAL)?.to_str().ok()?.split_once(' ')?;
    let actual = u64::from_str_radix(actual, 16).ok()?;
    match what {
        "cluster" => Some(Refusal::WrongCluster { actual }),
        "node" => Some(Refusal::WrongNode { actual }),
        "disk" => Some(Refusal::WrongDisk { actual }),
        _ => None,
    }
}

/// Messages that are bytes already.
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = RawCodec;
    type Decoder = RawCodec;

    fn encoder(&mut self) -> RawCodec {
        RawCodec
    }

    fn decoder(&mut self) -> RawCodec {
        RawCodec
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
