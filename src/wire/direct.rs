//! A connection with nothing between the caller and the stubs: what load is put on a store with.
//!
//! No retry, no other endpoint, no cache, so that what is measured is the store. Streams are one for
//! each watch and lease, as separate programs would have them.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

use super::channel::{ChannelOptions, NotConnected, connect_now};
use super::etcdserverpb::{
    Compare, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest, RangeRequest,
    RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, WatchResponse, compare, kv_client::KvClient,
    lease_client::LeaseClient, request_op, watch_client::WatchClient, watch_request,
};
use crate::load::{Failure, Lease, Read, Store, Watch, WatchFrom};

/// The past may come in messages larger than usual.
const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// One connection. Clones share it.
#[derive(Clone, Debug)]
pub struct Direct {
    kv: KvClient<Channel>,
    watch: WatchClient<Channel>,
    lease: LeaseClient<Channel>,
    request_timeout: Duration,
}

impl Direct {
    /// Connects. A call, or a stream's answer that is waited for, fails after `request_timeout`.
    ///
    /// # Errors
    /// [`NotConnected`].
    pub async fn connect(
        address: &str,
        options: &ChannelOptions,
        request_timeout: Duration,
    ) -> Result<Direct, NotConnected> {
        let channel = connect_now(address, options).await?;
        Ok(Direct {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            lease: LeaseClient::new(channel),
            request_timeout,
        })
    }
}

/// The answer, unless it fails or comes too late.
async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(failure(&status)),
        Err(_) => Err(failure(&Status::deadline_exceeded(format!("no answer in {limit:?}")))),
    }
}

async fn message_within<T>(limit: Duration, stream: &mut Streaming<T>) -> Result<T, Failure> {
    within(limit, async { stream.message().await.map(Response::new) }).await?.ok_or_else(ended)
}

fn failure(status: &Status) -> Failure {
    // The transport's own words hold addresses and ports; the code says enough to count by.
    match status.code() {
        Code::Unknown if status.message().contains("transport") => Failure("connection lost".to_owned()),
        code => Failure(format!("{code:?}: {}", status.message())),
    }
}

fn ended() -> Failure {
    Failure("the stream ended".to_owned())
}

fn put(key: Bytes, value: Bytes) -> PutRequest {
    PutRequest { key, value, ..PutRequest::default() }
}

fn put_op(key: Bytes, value: Bytes) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestPut(put(key, value))) }
}

fn get_op(key: Bytes) -> RequestOp {
    let range = RangeRequest { key, ..RangeRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestRange(range)) }
}

impl Store for Direct {
    type Watch = DirectWatch;
    type Lease = DirectLease;

    async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        within(self.request_timeout, self.kv.put(put(key, value))).await?;
        Ok(())
    }

    async fn put_all(&mut self, keys: Vec<Bytes>, value: Bytes) -> Result<(), Failure> {
        let success = keys.into_iter().map(|key| put_op(key, value.clone())).collect();
        let txn = TxnRequest { success, ..TxnRequest::default() };
        within(self.request_timeout, self.kv.txn(txn)).await?;
        Ok(())
    }

    async fn range(&mut self, read: Read) -> Result<u64, Failure> {
        let request = RangeRequest {
            key: read.key,
            range_end: read.end,
            serializable: read.serializable,
            ..RangeRequest::default()
        };
        Ok(within(self.request_timeout, self.kv.range(request)).await?.kvs.len() as u64)
    }

    async fn txn(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        let is_there = Compare {
            result: compare::CompareResult::Greater.into(),
            target: compare::CompareTarget::Version.into(),
            key: key.clone(),
            range_end: Bytes::new(),
            target_union: Some(compare::TargetUnion::Version(0)),
        };
        let put = put_op(key.clone(), value);
        let txn = TxnRequest {
            compare: vec![is_there],
            success: vec![put.clone(), get_op(key)],
            failure: vec![put],
        };
        within(self.request_timeout, self.kv.txn(txn)).await?;
        Ok(())
    }

    async fn watch(&mut self, from: WatchFrom) -> Result<DirectWatch, Failure> {
        let create = WatchCreateRequest {
            key: from.key,
            range_end: from.end,
            start_revision: from.revision,
            ..WatchCreateRequest::default()
        };
        let union = Some(watch_request::RequestUnion::CreateRequest(create));
        let (requests, queue) = mpsc::channel(1);
        requests.send(WatchRequest { request_union: union }).await.map_err(|_| ended())?;
        let mut answers = within(self.request_timeout, self.watch.watch(ReceiverStream::new(queue))).await?;
        let first = message_within(self.request_timeout, &mut answers).await?;
        match first.created && !first.canceled {
            true => Ok(DirectWatch { answers, _requests: requests }),
            false => Err(Failure(format!("no watch: {}", first.cancel_reason))),
        }
    }

    async fn lease(&mut self, ttl_s: i64) -> Result<DirectLease, Failure> {
        let request = LeaseGrantRequest { ttl: ttl_s, id: 0 };
        let granted = within(self.request_timeout, self.lease.lease_grant(request)).await?;
        let (requests, queue) = mpsc::channel(1);
        // Servers send the stream's headers with the first answer, so the first request comes first.
        requests.send(LeaseKeepAliveRequest { id: granted.id }).await.map_err(|_| ended())?;
        let stream = self.lease.lease_keep_alive(ReceiverStream::new(queue));
        let answers = within(self.request_timeout, stream).await?;
        let mut lease =
            DirectLease { id: granted.id, requests, answers, request_timeout: self.request_timeout };
        lease.renewed().await?;
        Ok(lease)
    }
}

/// A watch on a stream of its own.
#[derive(Debug)]
pub struct DirectWatch {
    answers: Streaming<WatchResponse>,
    /// Dropping it would end the stream.
    _requests: mpsc::Sender<WatchRequest>,
}

impl Watch for DirectWatch {
    async fn next(&mut self, each: &mut (dyn FnMut(&[u8]) + Send)) -> Result<(), Failure> {
        match self.answers.message().await {
            Ok(Some(answer)) if answer.canceled => {
                Err(Failure(format!("watch canceled: {}", answer.cancel_reason)))
            }
            Ok(Some(answer)) => {
                let values = answer.events.iter().map(|event| event.kv.as_ref().map(|kv| &kv.value[..]));
                values.for_each(|value| each(value.unwrap_or_default()));
                Ok(())
            }
            Ok(None) => Err(ended()),
            Err(status) => Err(failure(&status)),
        }
    }
}

/// A lease with a stream of its own.
#[derive(Debug)]
pub struct DirectLease {
    id: i64,
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
    request_timeout: Duration,
}

impl DirectLease {
    async fn renewed(&mut self) -> Result<(), Failure> {
        match message_within(self.request_timeout, &mut self.answers).await?.ttl > 0 {
            true => Ok(()),
            false => Err(Failure("the lease is gone".to_owned())),
        }
    }
}

impl Lease for DirectLease {
    async fn keep(&mut self) -> Result<(), Failure> {
        self.requests.send(LeaseKeepAliveRequest { id: self.id }).await.map_err(|_| ended())?;
        self.renewed().await
    }
}
