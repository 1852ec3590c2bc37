//! Keys: read from the published view, written through the node.
//!
//! A linearizable read waits for the read barrier and then reads the newest
//! view; a serializable one reads the view at once. A transaction that only
//! reads is a read. Nothing here holds a view for longer than one piece of work.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use metrics::Counter;
use tonic::{Request, Response, Status};

use super::context::{Caller, Guarded, Rpc, Shared};
use super::disk;
use super::error::ServeError;
use crate::machine::{is_read_only, read_txn};
use crate::mvcc::{self, ReadError, View};
use crate::telemetry;
use crate::types::{
    KeyRange, KeyValue, Operation, Outcome, RangeQuery, RangeReply, Reply, Revision, SortOrder, Space, Txn,
};
use crate::wire::etcdserverpb::kv_server::Kv;
use crate::wire::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, RangeStreamResponse, RequestOp, TxnRequest, TxnResponse, request_op,
};
use crate::wire::{self, convert};

/// Keys and values in one message of a RangeStream: far below what any client
/// takes, far above what a message costs.
const STREAM_PIECE_BYTES: usize = 1 << 20;

/// The KV service.
pub(crate) struct KvService {
    shared: Arc<Shared>,
    read: ReadCounters,
}

/// What reads gave. Looked up once, because every read counts.
struct ReadCounters {
    keys: Counter,
    bytes: Counter,
}

impl ReadCounters {
    fn new() -> ReadCounters {
        ReadCounters {
            keys: metrics::counter!(telemetry::RANGE_KEYS),
            bytes: metrics::counter!(telemetry::RANGE_BYTES),
        }
    }

    fn count(&self, reply: &RangeReply) {
        let bytes: usize = reply.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
        self.keys.increment(reply.kvs.len() as u64);
        self.bytes.increment(bytes as u64);
    }
}

impl KvService {
    pub(crate) fn new(shared: Arc<Shared>) -> KvService {
        KvService { shared, read: ReadCounters::new() }
    }

    /// Reads where the call runs if that takes little time.
    async fn look_up(&self, query: RangeQuery) -> Result<(Revision, RangeReply), ServeError> {
        let budget = self.shared.options.max_range_bytes;
        if !disk::turn_waited_enough() {
            let short =
                |view: &View| mvcc::range_if_short(&view.data, view.marks(Space::User), &query, budget);
            if let (revision, Some(reply)) = read_here(&self.shared, short)? {
                return Ok((revision, reply));
            }
        }
        let read = move |view: &View| mvcc::range(&view.data, view.marks(Space::User), &query, budget);
        read_view(&self.shared, read).await
    }

    async fn txn_from_view(
        &self,
        txn: Txn,
        serializable: bool,
        caller: &Caller,
    ) -> Result<Reply, ServeError> {
        if !serializable {
            self.shared.barrier(caller).await?;
        }
        let budget = self.shared.options.max_range_bytes;
        let (revision, reply) = read_view(&self.shared, move |view| read_txn(view, &txn, budget)).await?;
        Ok(Reply { revision, outcome: Ok(Outcome::Txn(reply)) })
    }
}

/// Reads from the newest view what is quick to read, and says at which revision.
pub(super) fn read_here<T>(
    shared: &Shared,
    read: impl FnOnce(&View) -> Result<T, ReadError>,
) -> Result<(Revision, T), ServeError> {
    let view = shared.view()?;
    let value = shared
        .disk
        .read(&*shared.env, || read(&view))
        .map_err(|error| ServeError::of_read(&shared.node, error))?;
    Ok((view.revision, value))
}

/// The same for what may walk many keys: it leaves the threads that serve everyone else.
pub(super) async fn read_view<T: Send + 'static>(
    shared: &Arc<Shared>,
    read: impl FnOnce(&View) -> Result<T, ReadError> + Send + 'static,
) -> Result<(Revision, T), ServeError> {
    let own = shared.clone();
    let read = tokio::task::spawn_blocking(move || read_here(&own, read));
    read.await.map_err(ServeError::of_join)?
}

/// Whether all reads of a transaction may be stale; etcd asks every one of them.
fn is_serializable(txn: &TxnRequest) -> bool {
    let all = |ops: &[RequestOp]| {
        ops.iter().all(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => range.serializable,
            Some(request_op::Request::RequestTxn(inner)) => is_serializable(inner),
            _ => false,
        })
    };
    // One without any range still compares, and must not compare stale values.
    let reads = !(txn.success.is_empty() && txn.failure.is_empty());
    reads && all(&txn.success) && all(&txn.failure)
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let serializable = request.get_ref().serializable;
        let rpc = if serializable { Rpc::Everywhere } else { Rpc::Member };
        let caller = self.shared.caller(&request, rpc)?;
        let query = convert::range_query(request.into_inner()).map_err(ServeError::from)?;
        if !serializable {
            self.shared.barrier(&caller).await?;
        }
        let (revision, reply) = self.look_up(query).await?;
        self.read.count(&reply);
        Ok(Response::new(wire::range_response(self.shared.header(revision), reply)))
    }

    type RangeStreamStream = Guarded<RangeStreamResponse>;

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let serializable = request.get_ref().serializable;
        let query = convert::range_stream_query(request.into_inner()).map_err(ServeError::from)?;
        if !serializable {
            self.shared.barrier(&caller).await?;
        }
        let pieces = pieces(self.shared.clone(), query);
        Ok(Response::new(self.shared.guarded(&caller, "RangeStream", pieces)))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let put = convert::put(request.into_inner()).map_err(ServeError::from)?;
        let reply = self.shared.propose(Operation::Put(put), &caller).await?;
        let outcome = reply.outcome.map_err(ServeError::from)?;
        let header = self.shared.header(reply.revision);
        Ok(Response::new(wire::put_response(header, outcome).map_err(ServeError::from)?))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let delete = convert::delete_range(request.into_inner()).map_err(ServeError::from)?;
        let reply = self.shared.propose(Operation::DeleteRange(delete), &caller).await?;
        let outcome = reply.outcome.map_err(ServeError::from)?;
        let header = self.shared.header(reply.revision);
        Ok(Response::new(wire::delete_range_response(header, outcome).map_err(ServeError::from)?))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let request = request.into_inner();
        let serializable = is_serializable(&request);
        let txn = convert::txn(request, self.shared.options.max_txn_ops).map_err(ServeError::from)?;
        let reply = match is_read_only(&txn) {
            true => self.txn_from_view(txn, serializable, &caller).await?,
            false => self.shared.propose(Operation::Txn(txn), &caller).await?,
        };
        let outcome = reply.outcome.map_err(ServeError::from)?;
        let header = self.shared.header(reply.revision);
        Ok(Response::new(wire::txn_response(header, outcome).map_err(ServeError::from)?))
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let CompactionRequest { revision, physical } = request.into_inner();
        let revision = Revision(revision);
        let operation = Operation::Compact { space: Space::User, revision };
        let reply = self.shared.propose(operation, &caller).await?;
        reply.outcome.map_err(ServeError::from)?;
        if physical {
            caller.within(self.shared.node.swept(Space::User, revision)).await?;
        }
        Ok(Response::new(CompactionResponse { header: Some(self.shared.header(reply.revision)) }))
    }
}

/// Where a RangeStream stands.
struct Cursor {
    query: RangeQuery,
    /// The revision of the first piece, told in the last one.
    header: Option<Revision>,
    /// Keys sent.
    sent: u64,
    /// The client's limit; 0 is none.
    limit: u64,
    done: bool,
}

/// The messages of a RangeStream. Each is read from a view of its own at the
/// revision of the first, so that a slow client pins no files; a compaction
/// beyond that revision ends the stream with etcd's error.
fn pieces(
    shared: Arc<Shared>,
    query: RangeQuery,
) -> impl Stream<Item = Result<RangeStreamResponse, ServeError>> + Send + 'static {
    let limit = query.limit;
    let cursor = Cursor { query, header: None, sent: 0, limit, done: false };
    futures_util::stream::try_unfold((shared, cursor), |(shared, mut cursor)| async move {
        if cursor.done {
            return Ok(None);
        }
        let message = cursor.next(&shared).await?;
        Ok(Some((message, (shared, cursor))))
    })
}

impl Cursor {
    async fn next(&mut self, shared: &Arc<Shared>) -> Result<RangeStreamResponse, ServeError> {
        if self.query.count_only {
            return self.count_only(shared).await;
        }
        let mut query = self.query.clone();
        if self.limit > 0 {
            query.limit = self.limit - self.sent;
        }
        let read = move |view: &View| {
            mvcc::range_piece(&view.data, view.marks(Space::User), &query, STREAM_PIECE_BYTES)
        };
        let (revision, piece) = read_view(shared, read).await?;
        let header = *self.header.get_or_insert(revision);
        if self.query.revision.0 <= 0 {
            self.query.revision = header;
        }
        ReadCounters::new().count(&piece);
        self.sent += piece.kvs.len() as u64;
        if let Some(last) = piece.kvs.last() {
            self.query.range = after(&self.query.range, &last.key);
        }
        let limited = self.limit > 0 && self.sent >= self.limit;
        self.done = !piece.more || limited;
        let mut reply = RangeReply { kvs: piece.kvs, more: self.done && piece.more, count: 0 };
        if self.done {
            reply.count = self.sent;
            if reply.more {
                reply.count += self.remaining(shared).await?;
            }
        }
        Ok(self.message(shared, reply))
    }

    async fn count_only(&mut self, shared: &Arc<Shared>) -> Result<RangeStreamResponse, ServeError> {
        let (revision, count) = self.count(shared).await?;
        self.header = Some(revision);
        self.done = true;
        Ok(self.message(shared, RangeReply { kvs: Vec::<KeyValue>::new(), more: false, count }))
    }

    /// How many keys of the range the limit cut off.
    async fn remaining(&self, shared: &Arc<Shared>) -> Result<u64, ServeError> {
        Ok(self.count(shared).await?.1)
    }

    async fn count(&self, shared: &Arc<Shared>) -> Result<(Revision, u64), ServeError> {
        let query =
            RangeQuery { count_only: true, limit: 0, sort_order: SortOrder::None, ..self.query.clone() };
        let read = move |view: &View| mvcc::range(&view.data, view.marks(Space::User), &query, usize::MAX);
        let (revision, reply) = read_view(shared, read).await?;
        Ok((revision, reply.count))
    }

    /// Header, count and `more` stand in the last message only.
    fn message(&self, shared: &Shared, reply: RangeReply) -> RangeStreamResponse {
        let revision = self.header.unwrap_or_default();
        let mut response = wire::range_response(shared.header(revision), reply);
        if !self.done {
            response.header = None;
        }
        RangeStreamResponse { range_response: Some(response) }
    }
}

/// What is left of `range` above `key`.
fn after(range: &KeyRange, key: &Bytes) -> KeyRange {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    let next = next.freeze();
    match range {
        // An empty span: the one key was sent.
        KeyRange::Single(_) => KeyRange::Span { start: next.clone(), end: next },
        KeyRange::Span { end, .. } => KeyRange::Span { start: next, end: end.clone() },
        KeyRange::From(_) => KeyRange::From(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(serializable: bool) -> RequestOp {
        let range = RangeRequest { key: Bytes::from_static(b"k"), serializable, ..Default::default() };
        RequestOp { request: Some(request_op::Request::RequestRange(range)) }
    }

    #[test]
    fn a_transaction_is_serializable_when_every_range_is() {
        let txn = |success: Vec<RequestOp>, failure: Vec<RequestOp>| TxnRequest {
            compare: vec![],
            success,
            failure,
        };
        assert!(is_serializable(&txn(vec![range(true)], vec![range(true)])));
        assert!(!is_serializable(&txn(vec![range(true)], vec![range(false)])));
        assert!(!is_serializable(&txn(vec![], vec![])), "its comparisons must not be stale");
        let nested =
            RequestOp { request: Some(request_op::Request::RequestTxn(txn(vec![range(false)], vec![]))) };
        assert!(!is_serializable(&txn(vec![nested], vec![])));
    }

    #[test]
    fn a_piece_is_followed_by_what_is_above_its_last_key() {
        let key = |text: &'static str| Bytes::from_static(text.as_bytes());
        assert_eq!(after(&KeyRange::From(key("a")), &key("b")), KeyRange::From(key("b\0")));
        let span = KeyRange::Span { start: key("a"), end: key("c") };
        assert_eq!(after(&span, &key("b")), KeyRange::Span { start: key("b\0"), end: key("c") });
        assert!(after(&KeyRange::Single(key("a")), &key("a")).is_empty());
    }
}
