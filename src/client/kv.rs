//! Reading and writing keys.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};

use super::answer::Answer;
use super::call::Call;
use super::{Client, ClientError};
use crate::types::{
    Compare, DeleteRange, KeyRange, KeyValue, LeaseId, Put, RangeQuery, RangeReply, Revision, SortOrder,
    SortTarget, Space, Txn, TxnOp, TxnReply,
};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::kv_client::KvClient;
use crate::wire::{convert, key_value_from_wire, range_reply_from_wire, txn_reply_from_wire};

/// Which keys to read, and how.
#[derive(Clone, Debug)]
pub struct GetOptions {
    query: RangeQuery,
    serializable: bool,
}

impl GetOptions {
    /// One key.
    pub fn key(key: impl Into<Bytes>) -> GetOptions {
        GetOptions::keys(KeyRange::Single(key.into()))
    }

    /// All keys that begin with `prefix`; all keys when it is empty.
    pub fn prefix(prefix: impl Into<Bytes>) -> GetOptions {
        GetOptions::keys(prefix_range(prefix.into()))
    }

    /// The keys of a range.
    pub fn keys(range: KeyRange) -> GetOptions {
        GetOptions { query: RangeQuery::all(Space::User, range), serializable: false }
    }

    /// Read as of this revision.
    pub fn revision(mut self, revision: Revision) -> Self {
        self.query.revision = revision;
        self
    }

    /// Return at most so many keys; 0 is all.
    pub fn limit(mut self, limit: u64) -> Self {
        self.query.limit = limit;
        self
    }

    /// Leave values out.
    pub fn keys_only(mut self) -> Self {
        self.query.keys_only = true;
        self
    }

    /// Return only the count.
    pub fn count_only(mut self) -> Self {
        self.query.count_only = true;
        self
    }

    /// Sort.
    pub fn sort(mut self, target: SortTarget, order: SortOrder) -> Self {
        self.query.sort_target = target;
        self.query.sort_order = order;
        self
    }

    /// Keep keys last set from `min` to `max`; 0 is no bound.
    pub fn mod_revisions(mut self, min: Revision, max: Revision) -> Self {
        self.query.min_mod_revision = min;
        self.query.max_mod_revision = max;
        self
    }

    /// Keep keys created from `min` to `max`; 0 is no bound.
    pub fn create_revisions(mut self, min: Revision, max: Revision) -> Self {
        self.query.min_create_revision = min;
        self.query.max_create_revision = max;
        self
    }

    /// Let the asked member answer from its own state, which may be behind.
    pub fn serializable(mut self) -> Self {
        self.serializable = true;
        self
    }

    /// What reading them is, as a call.
    pub(super) fn call(&self) -> Call {
        let key = Some(self.query.range.start().clone());
        if self.serializable { Call::serializable(key) } else { Call::read(key) }
    }

    pub(super) fn into_request(self) -> pb::RangeRequest {
        convert::range_request(self.query, self.serializable)
    }
}

/// On the wire a range cannot start at the empty key; the first key that can
/// exist is a zero byte.
fn prefix_range(prefix: Bytes) -> KeyRange {
    if prefix.is_empty() { KeyRange::From(Bytes::from_static(&[0])) } else { KeyRange::prefix(prefix) }
}

/// How to set a key.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutOptions {
    /// The lease to attach the key to.
    pub lease: LeaseId,
    /// Return what was there before.
    pub prev_kv: bool,
    /// Keep the value that is there; the one given must be empty.
    pub ignore_value: bool,
    /// Keep the lease that is there; the one given must be none.
    pub ignore_lease: bool,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct RangeResult {
    /// The store's revision at the answer.
    pub revision: Revision,
    /// The keys.
    pub reply: RangeReply,
}

/// A key was set.
#[derive(Clone, Debug)]
pub struct PutReply {
    /// The revision of the put.
    pub revision: Revision,
    /// The key before, if that was asked for.
    pub prev: Option<KeyValue>,
}

/// Keys were removed.
#[derive(Clone, Debug)]
pub struct DeleteReply {
    /// The store's revision after the delete.
    pub revision: Revision,
    /// How many keys there were.
    pub deleted: u64,
    /// The keys before, if that was asked for.
    pub prev: Vec<KeyValue>,
}

/// What a transaction gave.
#[derive(Clone, Debug)]
pub struct TxnResult {
    /// The store's revision after the transaction.
    pub revision: Revision,
    /// Which branch was done, and what it gave.
    pub reply: TxnReply,
}

/// Comparisons for [`TxnBuilder::when`].
pub mod compare {
    use bytes::Bytes;

    use crate::types::{Compare, CompareOp, CompareTarget, KeyRange, Revision, Space};

    /// Compares a field of one key.
    pub fn field(key: impl Into<Bytes>, op: CompareOp, target: CompareTarget) -> Compare {
        Compare { space: Space::User, range: KeyRange::Single(key.into()), op, target }
    }

    /// The key has this value.
    pub fn value_is(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Compare {
        field(key, CompareOp::Equal, CompareTarget::Value(value.into()))
    }

    /// The key was last set at this revision.
    pub fn unchanged_since(key: impl Into<Bytes>, revision: Revision) -> Compare {
        field(key, CompareOp::Equal, CompareTarget::Mod(revision.0))
    }

    /// The key does not exist.
    pub fn missing(key: impl Into<Bytes>) -> Compare {
        field(key, CompareOp::Equal, CompareTarget::Create(0))
    }
}

/// Puts a transaction together.
///
/// ```no_run
/// # use mainstay::client::{Client, ClientError, TxnBuilder, compare};
/// # async fn example(client: Client) -> Result<(), ClientError> {
/// let txn = TxnBuilder::new().when(compare::missing("owner")).then_put("owner", "me").or_else_get("owner");
/// let result = client.txn(txn.build()).await?;
/// println!("mine: {}", result.reply.succeeded);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct TxnBuilder {
    txn: Txn,
}

impl TxnBuilder {
    /// An empty transaction, whose comparisons hold.
    pub fn new() -> TxnBuilder {
        TxnBuilder::default()
    }

    /// One more comparison that must hold.
    pub fn when(mut self, compare: Compare) -> Self {
        self.txn.compare.push(compare);
        self
    }

    /// One more step for when all hold.
    pub fn then(mut self, step: TxnOp) -> Self {
        self.txn.success.push(step);
        self
    }

    /// One more step for when not all hold.
    pub fn or_else(mut self, step: TxnOp) -> Self {
        self.txn.failure.push(step);
        self
    }

    /// Set a key when all hold.
    pub fn then_put(self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.then(TxnOp::Put(put(key.into(), value.into(), PutOptions::default())))
    }

    /// Remove keys when all hold.
    pub fn then_delete(self, range: KeyRange) -> Self {
        self.then(TxnOp::DeleteRange(DeleteRange { space: Space::User, range, prev_kv: false }))
    }

    /// Read a key when not all hold.
    pub fn or_else_get(self, key: impl Into<Bytes>) -> Self {
        self.or_else(TxnOp::Range(RangeQuery::all(Space::User, KeyRange::Single(key.into()))))
    }

    /// The transaction.
    pub fn build(self) -> Txn {
        self.txn
    }
}

fn put(key: Bytes, value: Bytes, options: PutOptions) -> Put {
    let PutOptions { lease, prev_kv, ignore_value, ignore_lease } = options;
    Put { space: Space::User, key, value, lease, prev_kv, ignore_value, ignore_lease }
}

impl Client {
    /// Reads one key; `None` if it does not exist.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<KeyValue>, ClientError> {
        Ok(self.range(GetOptions::key(key)).await?.reply.kvs.into_iter().next())
    }

    /// Reads keys.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn range(&self, options: GetOptions) -> Result<RangeResult, ClientError> {
        let response = self
            .calls
            .call(options.call(), options.into_request(), |channel, request| async move {
                KvClient::new(channel).max_decoding_message_size(usize::MAX).range(request).await
            })
            .await?;
        Ok(RangeResult { revision: response.revision(), reply: range_reply_from_wire(response) })
    }

    /// Reads keys in pieces, so that neither side holds all of them at once.
    /// The keys of all pieces are the answer; the last piece has the count. A
    /// stream that breaks ends with an error; read again from the last key, at
    /// the same revision.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn range_stream(
        &self,
        options: GetOptions,
    ) -> Result<impl Stream<Item = Result<RangeReply, ClientError>> + use<>, ClientError> {
        let call = options.call().opening();
        let (pieces, route) = self
            .calls
            .call_at(call, options.into_request(), |channel, request| async move {
                KvClient::new(channel).max_decoding_message_size(usize::MAX).range_stream(request).await
            })
            .await?;
        let calls = self.calls.clone();
        let error = |status| ClientError::from_status(status, false);
        Ok(pieces.map(move |piece| {
            let piece = piece.map_err(error)?;
            calls.check(&piece, &route).inspect_err(|_| route.failed())?;
            Ok(piece.range_response.map(range_reply_from_wire).unwrap_or_default())
        }))
    }

    /// Reads any number of keys, a page at a time, all as of one revision.
    /// Works with every server of etcd's API; sorting is not possible.
    pub fn pages(
        &self,
        range: KeyRange,
        page_keys: u64,
    ) -> impl Stream<Item = Result<RangeResult, ClientError>> + use<> {
        let first = Some((range, Revision(0)));
        let client = self.clone();
        stream::try_unfold(first, move |at| {
            let client = client.clone();
            async move {
                let Some((range, revision)) = at else { return Ok(None) };
                let options = GetOptions::keys(range.clone()).limit(page_keys.max(1)).revision(revision);
                let result = client.range(options).await?;
                let revision = if revision.0 == 0 { result.revision } else { revision };
                let rest = match result.reply.kvs.last() {
                    Some(last) if result.reply.more => Some((after(&range, &last.key), revision)),
                    _ => None,
                };
                Ok(Some((result, rest)))
            }
        })
        .boxed()
    }

    /// Sets a key.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<PutReply, ClientError> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Sets a key, with options.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_with(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
        options: PutOptions,
    ) -> Result<PutReply, ClientError> {
        let request = convert::put_request(put(key.into(), value.into(), options));
        let key = Some(request.key.clone());
        let response = self
            .calls
            .call(Call::write(key), request, |channel, request| async move {
                KvClient::new(channel).max_decoding_message_size(usize::MAX).put(request).await
            })
            .await?;
        Ok(PutReply { revision: response.revision(), prev: response.prev_kv.map(key_value_from_wire) })
    }

    /// Removes one key.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<DeleteReply, ClientError> {
        self.delete_range(KeyRange::Single(key.into()), false).await
    }

    /// Removes the keys of a range, and returns them if `prev_kv` asks for it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete_range(&self, range: KeyRange, prev_kv: bool) -> Result<DeleteReply, ClientError> {
        let key = Some(range.start().clone());
        let request = convert::delete_range_request(DeleteRange { space: Space::User, range, prev_kv });
        let response = self
            .calls
            .call(Call::write(key), request, |channel, request| async move {
                KvClient::new(channel).max_decoding_message_size(usize::MAX).delete_range(request).await
            })
            .await?;
        Ok(DeleteReply {
            revision: response.revision(),
            deleted: u64::try_from(response.deleted).unwrap_or(0),
            prev: response.prev_kvs.into_iter().map(key_value_from_wire).collect(),
        })
    }

    /// Compares, then does one of two lists of steps, all or nothing.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn txn(&self, txn: Txn) -> Result<TxnResult, ClientError> {
        let key = first_key(&txn);
        let call = if reads_only(&txn) { Call::read(key) } else { Call::write(key) };
        let response = self
            .calls
            .call(call, convert::txn_request(txn), |channel, request| async move {
                KvClient::new(channel).max_decoding_message_size(usize::MAX).txn(request).await
            })
            .await?;
        let revision = response.revision();
        let reply = txn_reply_from_wire(response)
            .ok_or(ClientError::Protocol("a response of the transaction is of an unknown kind"))?;
        Ok(TxnResult { revision, reply })
    }

    /// Forgets the history before `revision`. With `physical`, answers only
    /// when the space is free inside the store.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn compact(&self, revision: Revision, physical: bool) -> Result<(), ClientError> {
        let request = pb::CompactionRequest { revision: revision.0, physical };
        self.calls
            .call(Call::write(None), request, |channel, request| async move {
                KvClient::new(channel).compact(request).await
            })
            .await?;
        Ok(())
    }
}

/// What is left of a range after `last`.
fn after(range: &KeyRange, last: &[u8]) -> KeyRange {
    let mut start = last.to_vec();
    start.push(0);
    match range {
        KeyRange::Span { end, .. } => KeyRange::Span { start: start.into(), end: end.clone() },
        KeyRange::Single(_) | KeyRange::From(_) => KeyRange::From(start.into()),
    }
}

/// What a transaction is about, as far as one key can say.
fn first_key(txn: &Txn) -> Option<Bytes> {
    let compared = txn.compare.first().map(|compare| compare.range.start().clone());
    compared.or_else(|| {
        txn.success.iter().chain(&txn.failure).find_map(|step| match step {
            TxnOp::Range(query) => Some(query.range.start().clone()),
            TxnOp::Put(put) => Some(put.key.clone()),
            TxnOp::DeleteRange(delete) => Some(delete.range.start().clone()),
            TxnOp::Txn(inner) => first_key(inner),
        })
    })
}

fn reads_only(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).all(|step| match step {
        TxnOp::Range(_) => true,
        TxnOp::Put(_) | TxnOp::DeleteRange(_) => false,
        TxnOp::Txn(inner) => reads_only(inner),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_prefix_is_every_key() {
        let request = GetOptions::prefix("").into_request();
        assert_eq!((&request.key[..], &request.range_end[..]), (&[0][..], &[0][..]));
        let request = GetOptions::prefix("a").limit(3).keys_only().serializable().into_request();
        assert_eq!((&request.key[..], &request.range_end[..]), (&b"a"[..], &b"b"[..]));
        assert!(request.serializable && request.keys_only && request.limit == 3);
    }

    #[test]
    fn the_next_page_starts_after_the_last_key() {
        let rest = after(&KeyRange::prefix("a".into()), b"ab");
        assert!(!rest.contains(b"ab") && rest.contains(b"ab\0") && !rest.contains(b"b"));
        assert!(after(&KeyRange::From("a".into()), b"x").contains(b"\xff"));
    }

    #[test]
    fn a_transaction_that_may_write_is_a_write() {
        let read = TxnBuilder::new().when(compare::missing("a")).or_else_get("a").build();
        assert!(reads_only(&read));
        let inner = TxnBuilder::new().then_put("a", "b").build();
        assert!(!reads_only(&TxnBuilder::new().then(TxnOp::Txn(inner)).build()));
    }
}
