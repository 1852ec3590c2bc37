//! Whose turn it is: what Lock and Election share.
//!
//! Each contender puts a key of its own, `NAME/LEASE-IN-HEX`, under one prefix;
//! the one with the least create revision has its turn, and the others wait for
//! the key just before theirs to go. The keys hang on leases, so a contender
//! that dies leaves the queue by itself. The form is that of etcd's
//! `concurrency` package, so that its clients and ours meet in one queue.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use super::context::{Caller, Shared};
use super::error::ServeError;
use super::kv::read_view;
use crate::mvcc::{self, View};
use crate::node::{NodeError, ProposeContext};
use crate::types::{
    Compare, CompareOp, CompareTarget, DeleteRange, EventKind, KeyRange, KeyValue, LeaseId, Operation,
    Outcome, Put, RangeQuery, RangeReply, Revision, SortOrder, SortTarget, Space, Txn, TxnOp, TxnOpReply,
    TxnReply,
};
use crate::watch::{WatchMessageKind, WatchSpec, WatchStream};

/// The lease of a contender that brought none, as in etcd.
const LEASE_TTL_S: i64 = 60;
/// Bytes of keys and values that one look at a queue may collect.
const QUEUE_BYTES_MAX: usize = 64 << 20;

/// The keys of one queue.
pub(super) fn prefix(name: &[u8]) -> Bytes {
    let mut prefix = BytesMut::with_capacity(name.len() + 1);
    prefix.put_slice(name);
    prefix.put_u8(b'/');
    prefix.freeze()
}

/// The key of the contender with this lease. Go writes a negative number in
/// hexadecimal with a minus sign, and so do we, to meet its clients.
fn key_of(prefix: &[u8], lease: LeaseId) -> Bytes {
    let sign = if lease.0 < 0 { "-" } else { "" };
    let mut key = prefix.to_vec();
    key.extend_from_slice(format!("{sign}{:x}", lease.0.unsigned_abs()).as_bytes());
    key.into()
}

pub(super) fn created(key: &Bytes, op: CompareOp, revision: Revision) -> Compare {
    let range = KeyRange::Single(key.clone());
    Compare { space: Space::User, range, op, target: CompareTarget::Create(revision.0) }
}

pub(super) fn put(key: &Bytes, value: Bytes, lease: LeaseId) -> TxnOp {
    TxnOp::Put(Put {
        space: Space::User,
        key: key.clone(),
        value,
        lease,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

pub(super) fn delete(key: &Bytes) -> DeleteRange {
    DeleteRange { space: Space::User, range: KeyRange::Single(key.clone()), prev_kv: false }
}

/// The contender whose turn it is.
pub(super) fn first_in(prefix: &Bytes) -> RangeQuery {
    RangeQuery {
        limit: 1,
        sort_target: SortTarget::Create,
        sort_order: SortOrder::Ascend,
        ..RangeQuery::all(Space::User, KeyRange::prefix(prefix.clone()))
    }
}

/// Does a transaction on behalf of a caller. The request id is left out: what
/// is done here is several writes, each harmless when repeated.
pub(super) async fn transact(
    shared: &Arc<Shared>,
    caller: &Caller,
    txn: Txn,
) -> Result<(Revision, TxnReply), ServeError> {
    let caller = Caller { request: None, ..caller.clone() };
    let reply = shared.propose(Operation::Txn(txn), &caller).await?;
    match reply.outcome? {
        Outcome::Txn(outcome) => Ok((reply.revision, outcome)),
        other => Err(NodeError::Internal(format!("a transaction was answered with {other:?}")).into()),
    }
}

/// Reads on behalf of a queue from the newest view.
pub(super) async fn look(
    shared: &Arc<Shared>,
    query: RangeQuery,
) -> Result<(Revision, RangeReply), ServeError> {
    let read = move |view: &View| mvcc::range(&view.data, view.marks(query.space), &query, QUEUE_BYTES_MAX);
    read_view(shared, read).await
}

/// What a stream of watchers says next; an error once the node stops.
pub(super) async fn message(stream: &mut WatchStream) -> Result<WatchMessageKind, ServeError> {
    let message = stream.next().await.ok_or(NodeError::Stopped)?;
    match message.kind {
        // Only a malformed range or an id in use is refused, and these are ours.
        WatchMessageKind::Refused(why) => Err(NodeError::Internal(format!("a watch: {why}")).into()),
        kind => Ok(kind),
    }
}

/// The lease to contend with: the caller's, or a new one.
pub(super) async fn lease_or_new(
    shared: &Arc<Shared>,
    caller: &Caller,
    lease: i64,
) -> Result<LeaseId, ServeError> {
    if lease != 0 {
        return Ok(LeaseId(lease));
    }
    let drawn = (shared.env.random_u64() & (u64::MAX >> 1)).max(1);
    let id = LeaseId(drawn as i64);
    let caller = Caller { request: None, ..caller.clone() };
    let reply = shared.propose(Operation::LeaseGrant { id, ttl_s: LEASE_TTL_S }, &caller).await?;
    reply.outcome?;
    Ok(id)
}

/// A contender in a queue. Dropped before [`Contender::keep`], as when the
/// client gives up, it leaves the queue.
pub(super) struct Contender {
    shared: Arc<Shared>,
    prefix: Bytes,
    pub key: Bytes,
    /// Create revision of the key; until it is known, the revision before it.
    pub create: Revision,
    known: bool,
    kept: bool,
}

/// How a contender entered.
pub(super) struct Entered {
    /// The store's revision then.
    pub revision: Revision,
    /// The key as it stood, if the lease was in the queue before.
    pub before: Option<KeyValue>,
    /// Whether its turn was there at once.
    pub first: bool,
}

impl Contender {
    /// Puts the contender's key, unless its lease is in the queue already.
    pub(super) async fn enter(
        shared: &Arc<Shared>,
        caller: &Caller,
        name: &[u8],
        lease: LeaseId,
        value: Bytes,
    ) -> Result<(Contender, Entered), ServeError> {
        let prefix = prefix(name);
        let key = key_of(&prefix, lease);
        let mut contender = Contender {
            shared: shared.clone(),
            prefix: prefix.clone(),
            key: key.clone(),
            create: shared.node.view().revision,
            known: false,
            kept: false,
        };
        let own = RangeQuery::all(Space::User, KeyRange::Single(key.clone()));
        let txn = Txn {
            compare: vec![created(&key, CompareOp::Equal, Revision(0))],
            success: vec![put(&key, value, lease), TxnOp::Range(first_in(&prefix))],
            failure: vec![TxnOp::Range(own), TxnOp::Range(first_in(&prefix))],
        };
        let (revision, reply) = match transact(shared, caller, txn).await {
            Ok(done) => done,
            // Refused for certain: there is nothing to clean up.
            Err(error @ ServeError::Node(NodeError::Refused(_))) => {
                contender.kept = true;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let mut ranges = reply.responses.into_iter().filter_map(|response| match response {
            TxnOpReply::Range(range) => Some(range.kvs.into_iter().next()),
            _ => None,
        });
        let before = if reply.succeeded { None } else { ranges.next().flatten() };
        let holder = ranges.next().flatten();
        contender.create = before.as_ref().map_or(revision, |kv| kv.create_revision);
        contender.known = true;
        let first = holder.is_none_or(|holder| holder.create_revision == contender.create);
        Ok((contender, Entered { revision, before, first }))
    }

    /// Waits until every key before the contender's own is gone. `Ok(None)`
    /// when the own key is gone first: the lease ran out.
    pub(super) async fn turn(&self) -> Result<Option<Revision>, ServeError> {
        loop {
            let before = RangeQuery {
                limit: 1,
                sort_target: SortTarget::Create,
                sort_order: SortOrder::Descend,
                max_create_revision: self.create.prev(),
                keys_only: true,
                ..RangeQuery::all(Space::User, KeyRange::prefix(self.prefix.clone()))
            };
            let (revision, found) = look(&self.shared, before).await?;
            let Some(ahead) = found.kvs.into_iter().next() else {
                return self.still_there().await;
            };
            if self.wait_for_delete(&ahead.key, revision.next()).await? {
                return self.still_there().await;
            }
        }
    }

    /// Waits until `ahead` is deleted (false) or the own key is (true). History
    /// compacted in between is a reason to look again, too.
    async fn wait_for_delete(&self, ahead: &Bytes, from: Revision) -> Result<bool, ServeError> {
        let mut stream = self.shared.node.hub().stream();
        for key in [ahead, &self.key] {
            let range = KeyRange::Single(key.clone());
            let spec = WatchSpec { no_put: true, ..WatchSpec::new(Space::User, range, from) };
            stream.create(None, spec).map_err(|error| NodeError::Internal(error.to_string()))?;
        }
        loop {
            match message(&mut stream).await? {
                WatchMessageKind::Events { events, .. } => {
                    let gone = |key: &Bytes| {
                        let mut events = events.iter().map(|watched| watched.event());
                        events.any(|event| event.kind == EventKind::Delete && event.kv.key == *key)
                    };
                    if gone(&self.key) {
                        return Ok(true);
                    }
                    if gone(ahead) {
                        return Ok(false);
                    }
                }
                WatchMessageKind::Compacted { .. } | WatchMessageKind::Canceled => return Ok(false),
                WatchMessageKind::Created | WatchMessageKind::Progress | WatchMessageKind::Refused(_) => {}
            }
        }
    }

    /// Whether the own key is still the one that was put, confirmed with the
    /// leader: this node's view may not know yet that the lease has run out.
    async fn still_there(&self) -> Result<Option<Revision>, ServeError> {
        self.shared.node.read_barrier().await?;
        let own = RangeQuery::all(Space::User, KeyRange::Single(self.key.clone()));
        let (revision, found) = look(&self.shared, own).await?;
        let there = found.kvs.first().is_some_and(|kv| kv.create_revision == self.create);
        Ok(there.then_some(revision))
    }

    /// The contender stays in the queue: its turn has come and was told.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // When it is not known whether the key was put, only one put after we
        // began is ours to take back: an older one is a turn that was granted.
        let op = if self.known { CompareOp::Equal } else { CompareOp::Greater };
        let txn = Txn {
            compare: vec![created(&self.key, op, self.create)],
            success: vec![TxnOp::DeleteRange(delete(&self.key))],
            failure: vec![],
        };
        let node = self.shared.node.clone();
        self.shared.tasks.spawn(async move {
            // Left to the lease if this fails: the key goes with it.
            if let Err(error) = node.propose(Operation::Txn(txn), ProposeContext::default()).await {
                tracing::debug!(%error, "a given-up contender stays in its queue until its lease ends");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_written_as_etcds_clients_write_them() {
        let prefix = prefix(b"locks");
        assert_eq!(key_of(&prefix, LeaseId(0x694d_7b3f)), "locks/694d7b3f");
        assert_eq!(key_of(&prefix, LeaseId(-1)), "locks/-1");
        let query = first_in(&prefix);
        assert_eq!((query.limit, query.sort_target), (1, SortTarget::Create));
        assert!(query.range.contains(b"locks/1") && !query.range.contains(b"locks0"));
    }
}
