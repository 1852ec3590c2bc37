//! etcd's Watch service: one stream of requests in, one of responses out, any
//! number of watchers between.
//!
//! It turns requests into the hub's terms and the hub's messages into
//! responses, and decides nothing else. Responses are made only when the
//! connection asks for one, so a client that does not read costs its cursors
//! and no more. An event is encoded once; its bytes are spliced into every
//! response that carries it, which is why the codec here is our own.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::task::AtomicWaker;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::watch;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic::codegen::{Body, Service, StdError, http};
use tonic::metadata::AsciiMetadataValue;
use tonic::{Status, Streaming};

use crate::node::{Node, NodeError};
use crate::types::{ApplyError, ClusterId, Event, EventKind, KeyValue, NodeId, Revision, Space};
use crate::watch::{Hub, WatchMessage, WatchMessageKind, WatchSpec, WatchStream};
use crate::wire::convert::watch_range;
use crate::wire::etcdserverpb::watch_create_request::FilterType;
use crate::wire::etcdserverpb::watch_request::RequestUnion;
use crate::wire::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse};
use crate::wire::{metadata as names, mvccpb};

/// What the operator may tune of the service.
#[derive(Clone, Debug)]
pub struct WatchServiceOptions {
    /// The largest request accepted, in bytes.
    pub request_bytes_max: usize,
    /// How long a node may be without a leader before it ends the streams that
    /// asked for one. An election alone should not: it costs less than all
    /// clients reconnecting. etcd waits three election timeouts.
    pub leaderless_grace: Duration,
}

impl Default for WatchServiceOptions {
    fn default() -> Self {
        let leaderless_grace = Duration::from_millis(3 * 600);
        WatchServiceOptions { request_bytes_max: (1536 + 512) << 10, leaderless_grace }
    }
}

/// What the service needs to know of the node.
struct Surroundings {
    hub: Arc<Hub>,
    cluster_id: ClusterId,
    member_id: NodeId,
    term: Box<dyn Fn() -> u64 + Send + Sync>,
    leader: watch::Receiver<NodeId>,
    options: WatchServiceOptions,
}

/// The service. Clones share it.
#[derive(Clone)]
pub struct WatchService {
    surroundings: Arc<Surroundings>,
}

impl WatchService {
    /// The service over a node's hub.
    pub fn new(node: &Node, options: WatchServiceOptions) -> WatchService {
        let surroundings = Surroundings {
            hub: node.hub().clone(),
            cluster_id: node.cluster_id(),
            member_id: node.id(),
            term: Box::new({
                let node = node.clone();
                move || node.leadership().term
            }),
            leader: node.leader_changes(),
            options,
        };
        WatchService { surroundings: Arc::new(surroundings) }
    }
}

impl tonic::server::NamedService for WatchService {
    const NAME: &'static str = "etcdserverpb.Watch";
}

impl<B> Service<http::Request<B>> for WatchService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        if request.uri().path() != "/etcdserverpb.Watch/Watch" {
            return Box::pin(async { Ok(Status::unimplemented("").into_http()) });
        }
        let method = WatchMethod { surroundings: self.surroundings.clone() };
        let request_bytes_max = self.surroundings.options.request_bytes_max;
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(FrameCodec)
                .apply_max_message_size_config(Some(request_bytes_max), None);
            Ok(grpc.streaming(method, request).await)
        })
    }
}

/// The one method, as tonic calls it.
struct WatchMethod {
    surroundings: Arc<Surroundings>,
}

impl tonic::server::StreamingService<WatchRequest> for WatchMethod {
    type Response = Frame;
    type ResponseStream = Session;
    type Future = BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<WatchRequest>>) -> Self::Future {
        let surroundings = self.surroundings.clone();
        Box::pin(async move {
            let wants_leader = request.metadata().get("hasleader").is_some_and(|value| value == "true");
            let session = Session::new(surroundings, request.into_inner(), wants_leader)?;
            let mut response = tonic::Response::new(session);
            response.metadata_mut().insert(names::EXACT_PROGRESS, AsciiMetadataValue::from_static("true"));
            Ok(response)
        })
    }
}

/// One stream of one client.
struct Session {
    surroundings: Arc<Surroundings>,
    watchers: WatchStream,
    requests: Requests,
    /// Ready when the node was without a leader for too long; never when the client
    /// asked for none.
    leaderless: Option<BoxFuture<'static, ()>>,
    /// The last word was said.
    ended: bool,
}

impl Session {
    fn new(
        surroundings: Arc<Surroundings>,
        requests: Streaming<WatchRequest>,
        wants_leader: bool,
    ) -> Result<Session, Status> {
        if wants_leader && *surroundings.leader.borrow() == 0 {
            return Err(no_leader());
        }
        let grace = surroundings.options.leaderless_grace;
        let leaderless = wants_leader.then(|| leaderless(surroundings.leader.clone(), grace).boxed());
        let watchers = surroundings.hub.stream();
        let requests = Requests::new(requests, watchers.task().clone());
        Ok(Session { surroundings, watchers, requests, leaderless, ended: false })
    }

    /// The next response; `None` when the client is gone.
    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame, Status>>> {
        loop {
            // One request between any two messages, so that a busy watcher can be
            // canceled, and a client that only asks is answered.
            if let Poll::Ready(request) = self.requests.poll()
                && self.on_request(request).is_none()
            {
                return Poll::Ready(None);
            }
            if let Some(leaderless) = &mut self.leaderless
                && leaderless.poll_unpin(context).is_ready()
            {
                return Poll::Ready(Some(Err(no_leader())));
            }
            match self.watchers.poll_next(context) {
                Poll::Ready(Some(message)) => return Poll::Ready(Some(Ok(self.frame(message)))),
                Poll::Ready(None) => {
                    return Poll::Ready(Some(Err(Status::unavailable(NodeError::Stopped.to_string()))));
                }
                // Looked at now that the task is registered to be told.
                Poll::Pending if self.requests.any() => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Does what the client asks; `None` when it is gone.
    fn on_request(&mut self, request: Result<WatchRequest, Status>) -> Option<()> {
        match request.ok()?.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create),
            Some(RequestUnion::CancelRequest(cancel)) => self.watchers.cancel(cancel.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.watchers.request_progress(),
            // Of a later version, perhaps; etcd ignores it too.
            None => {}
        }
        Some(())
    }

    fn create(&mut self, request: WatchCreateRequest) {
        if request.start_revision < 0 {
            return self.watchers.refuse(ApplyError::Compacted.to_string());
        }
        let id = Some(request.watch_id).filter(|id| *id != 0);
        if let Err(error) = self.watchers.create(id, watch_spec(request)) {
            self.watchers.refuse(error.to_string());
        }
    }

    fn frame(&self, message: WatchMessage) -> Frame {
        let header = ResponseHeader {
            cluster_id: self.surroundings.cluster_id,
            member_id: self.surroundings.member_id,
            revision: message.revision.0,
            raft_term: (self.surroundings.term)(),
        };
        let watch_id = message.watch_id;
        let mut head = WatchResponse { header: Some(header), watch_id, ..WatchResponse::default() };
        let mut spliced = Vec::new();
        match message.kind {
            WatchMessageKind::Created => head.created = true,
            WatchMessageKind::Canceled => head.canceled = true,
            WatchMessageKind::Progress => {}
            WatchMessageKind::Compacted { compact_revision } => {
                head.canceled = true;
                head.compact_revision = compact_revision.0;
            }
            WatchMessageKind::Refused(reason) => {
                (head.created, head.canceled) = (true, true);
                head.cancel_reason = reason;
            }
            WatchMessageKind::Events { events, prev_kv, fragment } => {
                head.fragment = fragment;
                spliced = events.iter().map(|event| event.encoded(prev_kv, encode_event)).collect();
            }
        }
        Frame { head, events: spliced }
    }
}

impl Stream for Session {
    type Item = Result<Frame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let turn = ready!(self.poll_turn(context));
        self.ended = !matches!(turn, Some(Ok(_)));
        Poll::Ready(turn)
    }
}

/// What the client asks, looked at only when there is something: a stream hears
/// of changes far more often than it is asked.
struct Requests {
    /// `None` when the client has closed its side: its watchers go on.
    stream: Option<Streaming<WatchRequest>>,
    news: Arc<News>,
    /// Of `news`.
    waker: Waker,
}

/// Whether there may be a request, and the task to tell of it: that of the watchers.
struct News {
    any: AtomicBool,
    task: Arc<AtomicWaker>,
}

impl Wake for News {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.any.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl Requests {
    fn new(stream: Streaming<WatchRequest>, task: Arc<AtomicWaker>) -> Requests {
        let news = Arc::new(News { any: AtomicBool::new(true), task });
        Requests { stream: Some(stream), waker: Waker::from(news.clone()), news }
    }

    /// Whether it is worth asking for one.
    fn any(&self) -> bool {
        self.stream.is_some() && self.news.any.load(Ordering::Acquire)
    }

    /// The next request. Pending for ever after the last one.
    fn poll(&mut self) -> Poll<Result<WatchRequest, Status>> {
        let Some(stream) = &mut self.stream else { return Poll::Pending };
        // Cleared before the stream is asked, so that what comes meanwhile is not missed.
        if !self.news.any.load(Ordering::Relaxed) || !self.news.any.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        match ready!(stream.poll_next_unpin(&mut Context::from_waker(&self.waker))) {
            Some(request) => {
                self.news.any.store(true, Ordering::Release);
                Poll::Ready(request)
            }
            None => {
                self.stream = None;
                Poll::Pending
            }
        }
    }
}

/// Returns when the node has been without a leader for the grace.
async fn leaderless(mut leader: watch::Receiver<NodeId>, grace: Duration) {
    loop {
        // The sender is gone when the node is stopping, and the hub will say so.
        if leader.wait_for(|leader| *leader == 0).await.is_err() {
            return std::future::pending().await;
        }
        if tokio::time::timeout(grace, leader.wait_for(|leader| *leader != 0)).await.is_err() {
            return;
        }
    }
}

fn no_leader() -> Status {
    Status::unavailable(NodeError::NoLeader.to_string())
}

/// What a request asks for, in the hub's terms. An empty key is the least key,
/// as in etcd; filters that are not known filter nothing.
pub fn watch_spec(request: WatchCreateRequest) -> WatchSpec {
    let has = |filter: FilterType| request.filters.contains(&(filter as i32));
    let (no_put, no_delete) = (has(FilterType::Noput), has(FilterType::Nodelete));
    WatchSpec {
        space: Space::User,
        range: watch_range(request.key, request.range_end),
        start: Revision(request.start_revision),
        prev_kv: request.prev_kv,
        no_put,
        no_delete,
        progress_notify: request.progress_notify,
        fragment: request.fragment,
    }
}

/// One response: its head as generated, and its events as bytes.
#[derive(Debug)]
struct Frame {
    /// Everything but the events.
    head: WatchResponse,
    /// Each with its field number and length before it.
    events: Vec<Bytes>,
}

/// `WatchResponse.events`, the response's last field.
const EVENTS_FIELD: u32 = 11;

/// An event as a field of a response.
fn encode_event(event: &Event, prev: bool) -> Bytes {
    let kind = match event.kind {
        EventKind::Put => mvccpb::event::EventType::Put,
        EventKind::Delete => mvccpb::event::EventType::Delete,
    };
    let prev = event.prev.as_ref().filter(|_| prev);
    // A removal's event holds the key and the revision, nothing of what was.
    let kv = match event.kind {
        EventKind::Put => key_value(&event.kv),
        EventKind::Delete => mvccpb::KeyValue {
            key: event.kv.key.clone(),
            mod_revision: event.kv.mod_revision.0,
            ..mvccpb::KeyValue::default()
        },
    };
    let message = mvccpb::Event { r#type: kind as i32, kv: Some(kv), prev_kv: prev.map(key_value) };
    let mut bytes = BytesMut::with_capacity(message.encoded_len() + 8);
    prost::encoding::message::encode(EVENTS_FIELD, &message, &mut bytes);
    bytes.freeze()
}

fn key_value(kv: &KeyValue) -> mvccpb::KeyValue {
    mvccpb::KeyValue {
        key: kv.key.clone(),
        create_revision: kv.create_revision.0,
        mod_revision: kv.mod_revision.0,
        version: kv.version,
        value: kv.value.clone(),
        lease: kv.lease.0,
    }
}

/// Ten thousand idle streams should not hold the 16 KiB of buffers each that is
/// tonic's default; they grow when they are used.
fn buffers() -> BufferSettings {
    BufferSettings::new(512, 32 << 10)
}

/// Decodes requests as generated, and splices responses together.
struct FrameCodec;

impl Codec for FrameCodec {
    type Encode = Frame;
    type Decode = WatchRequest;
    type Encoder = FrameEncoder;
    type Decoder = tonic_prost::ProstDecoder<WatchRequest>;

    fn encoder(&mut self) -> FrameEncoder {
        FrameEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        tonic_prost::ProstDecoder::new(buffers())
    }
}

struct FrameEncoder;

impl Encoder for FrameEncoder {
    type Item = Frame;
    type Error = Status;

    fn encode(&mut self, frame: Frame, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let events_bytes: usize = frame.events.iter().map(Bytes::len).sum();
        buffer.reserve(frame.head.encoded_len() + events_bytes);
        frame.head.encode_raw(buffer);
        frame.events.iter().for_each(|event| buffer.put_slice(event));
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
