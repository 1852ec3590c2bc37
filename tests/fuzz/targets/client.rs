//! What clients ask, and what servers answer: etcd's messages and their meaning.

use bytes::Bytes;
use prost::Message;

use mainstay::types::{DeleteRange, KeyRange, Put, RangeQuery, RangeReply, Space, Txn, TxnOp, TxnReply};
use mainstay::wire::{self, InvalidRequest, convert, etcdserverpb as pb, mvccpb};

use super::wire_noise::{encode_noisily, noise};
use super::{BASE, Input, Target, Verdict};
use crate::draw::draw;
use crate::mutate::Rng;

/// etcd's default, and ours.
const TXN_OPS_MAX: usize = 128;

fn loose(kind: u8, bytes: &[u8]) -> Input {
    Input { bytes: [&[kind][..], bytes].concat(), is_whole: false }
}

pub const KV: Target = Target {
    name: "client_kv",
    what: "Range, RangeStream, Put, DeleteRange and Watch",
    draw: |rng| {
        let kind = rng.below(5) as u8;
        let bytes = match kind {
            0 | 1 => {
                let query: RangeQuery = draw(rng);
                let message = convert::range_request(query, rng.one_in(2));
                encode_noisily(rng, &message)
            }
            2 => {
                let message = convert::put_request(draw::<Put>(rng));
                encode_noisily(rng, &message)
            }
            3 => {
                let message = convert::delete_range_request(draw::<DeleteRange>(rng));
                encode_noisily(rng, &message)
            }
            _ => {
                let message = draw_watch(rng);
                encode_noisily(rng, &message)
            }
        };
        loose(kind, &bytes)
    },
    run: |bytes| {
        let Some((kind, body)) = bytes.split_first() else { return Verdict::Refused };
        match kind {
            0 | 1 => run_range(*kind, body),
            2 => {
                let Ok(message) = pb::PutRequest::decode(body) else { return Verdict::Refused };
                let Ok(put) = convert::put(message) else { return Verdict::Refused };
                assert!(put.space == Space::User && !put.key.is_empty());
                let again = convert::put_request(put.clone());
                assert_eq!(convert::put(again.clone()), Ok(put));
                Verdict::Accepted([&[*kind][..], &again.encode_to_vec()].concat())
            }
            3 => {
                let Ok(message) = pb::DeleteRangeRequest::decode(body) else { return Verdict::Refused };
                let Ok(delete) = convert::delete_range(message) else { return Verdict::Refused };
                check_range(delete.space, &delete.range);
                let again = convert::delete_range_request(delete.clone());
                assert_eq!(convert::delete_range(again.clone()), Ok(delete));
                Verdict::Accepted([&[*kind][..], &again.encode_to_vec()].concat())
            }
            4 => run_watch(*kind, body),
            _ => Verdict::Refused,
        }
    },
    ..BASE
};

fn run_range(kind: u8, body: &[u8]) -> Verdict {
    let Ok(message) = pb::RangeRequest::decode(body) else { return Verdict::Refused };
    let read = if kind == 0 { convert::range_query } else { convert::range_stream_query };
    let Ok(query) = read(message) else { return Verdict::Refused };
    check_range(query.space, &query.range);
    assert!(query.revision.0 >= 0);
    let again = convert::range_request(query.clone(), false);
    assert_eq!(read(again.clone()), Ok(query));
    Verdict::Accepted([&[kind][..], &again.encode_to_vec()].concat())
}

/// No request reaches another space, and none is for the empty key.
fn check_range(space: Space, range: &KeyRange) {
    assert_eq!(space, Space::User);
    assert!(!range.start().is_empty());
    if range.is_empty() {
        assert!(!range.contains(range.start()));
    } else {
        assert!(range.contains(range.start()));
    }
}

pub fn draw_watch(rng: &mut Rng) -> pb::WatchRequest {
    use pb::watch_request::RequestUnion;
    let union = match rng.below(4) {
        0 => RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id: rng.number() as i64 }),
        1 => RequestUnion::ProgressRequest(pb::WatchProgressRequest {}),
        _ => {
            let (key, range_end) = convert::wire_range(draw(rng));
            RequestUnion::CreateRequest(pb::WatchCreateRequest {
                key,
                range_end,
                start_revision: rng.number() as i64,
                progress_notify: rng.one_in(2),
                filters: (0..rng.below(3)).map(|_| rng.number() as i32).collect(),
                prev_kv: rng.one_in(2),
                watch_id: rng.number() as i64,
                fragment: rng.one_in(2),
            })
        }
    };
    pb::WatchRequest { request_union: Some(union) }
}

fn run_watch(kind: u8, body: &[u8]) -> Verdict {
    let Ok(message) = pb::WatchRequest::decode(body) else { return Verdict::Refused };
    if let Some(pb::watch_request::RequestUnion::CreateRequest(create)) = message.request_union.clone() {
        let range = convert::watch_range(create.key, create.range_end);
        check_range(Space::User, &range);
        let (key, end) = convert::wire_range(range.clone());
        assert_eq!(convert::watch_range(key, end), range);
    }
    Verdict::Accepted([&[kind][..], &message.encode_to_vec()].concat())
}

pub const TXN: Target = Target {
    name: "client_txn",
    what: "Txn: nested, compared, and changing no key twice",
    draw: |rng| {
        let bytes = match rng.below(60) {
            0..=4 => noise(rng, 6),
            5 => crowd(rng).encode_to_vec(),
            _ => {
                let message = convert::txn_request(draw::<Txn>(rng));
                encode_noisily(rng, &message)
            }
        };
        Input { bytes, is_whole: false }
    },
    run: |bytes| {
        let Ok(message) = pb::TxnRequest::decode(bytes) else { return Verdict::Refused };
        let expected = (bytes.len() < MODEL_BYTES_MAX).then(|| clashes(&message));
        let txn = match convert::txn(message, TXN_OPS_MAX) {
            Ok(txn) => txn,
            Err(refusal) => {
                let duplicate = refusal == InvalidRequest::DuplicateKey;
                assert!(!duplicate || expected != Some(false), "refused, though it changes no key twice");
                return Verdict::Refused;
            }
        };
        assert!(expected != Some(true), "it changes a key twice");
        check_txn(&txn);
        let again = convert::txn_request(txn.clone());
        assert_eq!(convert::txn(again.clone(), TXN_OPS_MAX), Ok(txn));
        Verdict::Accepted(again.encode_to_vec())
    },
    bytes_max: 1 << 20,
    ..BASE
};

/// The longest request that the model is asked about; it takes the square of it.
const MODEL_BYTES_MAX: usize = 2048;

/// What a step does to keys: sets one, or removes a range.
type Effect = (bool, KeyRange);

/// Whether a transaction changes a key twice, as the rule says it: no two steps
/// of any list may both touch a key, unless both remove it.
fn clashes(txn: &pb::TxnRequest) -> bool {
    effects(&txn.success).is_none() || effects(&txn.failure).is_none()
}

/// Everything that a list may do; `None` when two of its steps clash.
fn effects(steps: &[pb::RequestOp]) -> Option<Vec<Effect>> {
    use pb::request_op::Request;
    let mut all: Vec<Vec<Effect>> = Vec::new();
    for step in steps {
        let done = match &step.request {
            Some(Request::RequestPut(put)) => vec![(true, KeyRange::Single(put.key.clone()))],
            Some(Request::RequestDeleteRange(delete)) => {
                vec![(false, KeyRange::from_wire(delete.key.clone(), delete.range_end.clone()))]
            }
            Some(Request::RequestTxn(txn)) => [effects(&txn.success)?, effects(&txn.failure)?].concat(),
            Some(Request::RequestRange(_)) | None => Vec::new(),
        };
        for earlier in all.iter().flatten() {
            let clash = |(sets, range): &Effect| match (earlier.0, *sets) {
                (true, _) => range.contains(earlier.1.start()),
                (false, true) => earlier.1.contains(range.start()),
                (false, false) => false,
            };
            if done.iter().any(clash) {
                return None;
            }
        }
        all.push(done);
    }
    Some(all.concat())
}

fn check_txn(txn: &Txn) {
    txn.compare.iter().for_each(|compare| check_range(compare.space, &compare.range));
    for step in txn.success.iter().chain(&txn.failure) {
        match step {
            TxnOp::Range(query) => check_range(query.space, &query.range),
            TxnOp::Put(put) => assert!(put.space == Space::User && !put.key.is_empty()),
            TxnOp::DeleteRange(delete) => check_range(delete.space, &delete.range),
            TxnOp::Txn(txn) => check_txn(txn),
        }
    }
}

/// As many steps as nesting allows: puts in one branch, removals in the other.
fn crowd(rng: &mut Rng) -> pb::TxnRequest {
    let widths: &[usize] = if rng.one_in(50) { &[42, 40, 20] } else { &[12, 10, 8] };
    let mut number = 0u32;
    let puts = tree(widths, &mut || {
        number += 1;
        let key = Bytes::copy_from_slice(&number.to_be_bytes());
        pb::request_op::Request::RequestPut(pb::PutRequest { key, ..Default::default() })
    });
    let removals = tree(widths, &mut || {
        let (key, range_end) = (Bytes::from_static(&[0]), Bytes::from_static(&[1]));
        pb::request_op::Request::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end, prev_kv: false })
    });
    let inside = pb::TxnRequest { compare: Vec::new(), success: puts, failure: removals };
    let step = pb::RequestOp { request: Some(pb::request_op::Request::RequestTxn(inside)) };
    pb::TxnRequest { compare: Vec::new(), success: vec![step], failure: Vec::new() }
}

/// A tree of transactions with this many steps at each level, and leaves below.
fn tree(widths: &[usize], leaf: &mut impl FnMut() -> pb::request_op::Request) -> Vec<pb::RequestOp> {
    let Some((width, below)) = widths.split_first() else {
        return vec![pb::RequestOp { request: Some(leaf()) }];
    };
    let mut steps = Vec::new();
    for _ in 0..*width {
        if below.is_empty() {
            steps.push(pb::RequestOp { request: Some(leaf()) });
            continue;
        }
        let inside = pb::TxnRequest { success: tree(below, leaf), ..Default::default() };
        steps.push(pb::RequestOp { request: Some(pb::request_op::Request::RequestTxn(inside)) });
    }
    steps
}

pub const REPLIES: Target = Target {
    name: "client_replies",
    what: "what a server answers to the client",
    draw: |rng| {
        let kind = rng.below(3) as u8;
        let header = pb::ResponseHeader::default();
        let bytes = match kind {
            0 => {
                let message = wire::range_response(header, draw::<RangeReply>(rng));
                encode_noisily(rng, &message)
            }
            1 => {
                let outcome = mainstay::types::Outcome::Txn(draw::<TxnReply>(rng));
                let message = wire::txn_response(header, outcome).expect("a transaction's outcome");
                encode_noisily(rng, &message)
            }
            _ => {
                let kv = |rng: &mut Rng| wire::key_value(draw(rng));
                let event = |rng: &mut Rng| mvccpb::Event {
                    r#type: rng.number() as i32,
                    kv: (!rng.one_in(8)).then(|| kv(rng)),
                    prev_kv: rng.one_in(2).then(|| kv(rng)),
                };
                let events = (0..rng.below(4)).map(|_| event(rng)).collect();
                encode_noisily(rng, &pb::WatchResponse { events, ..Default::default() })
            }
        };
        loose(kind, &bytes)
    },
    run: |bytes| {
        let Some((kind, body)) = bytes.split_first() else { return Verdict::Refused };
        let header = pb::ResponseHeader::default();
        let again = match kind {
            0 => {
                let Ok(message) = pb::RangeResponse::decode(body) else { return Verdict::Refused };
                let reply = wire::range_reply_from_wire(message);
                let again = wire::range_response(header, reply.clone());
                assert_eq!(wire::range_reply_from_wire(again.clone()), reply);
                again.encode_to_vec()
            }
            1 => {
                let Ok(message) = pb::TxnResponse::decode(body) else { return Verdict::Refused };
                let Some(reply) = wire::txn_reply_from_wire(message) else { return Verdict::Refused };
                let outcome = mainstay::types::Outcome::Txn(reply.clone());
                let again = wire::txn_response(header, outcome).expect("a transaction's outcome");
                assert_eq!(wire::txn_reply_from_wire(again.clone()), Some(reply));
                again.encode_to_vec()
            }
            2 => {
                let Ok(message) = pb::WatchResponse::decode(body) else { return Verdict::Refused };
                for event in message.events.iter().cloned() {
                    let Some(event) = wire::event_from_wire(event) else { continue };
                    assert_eq!(wire::event_from_wire(wire::event(&event, true)), Some(event));
                }
                message.encode_to_vec()
            }
            _ => return Verdict::Refused,
        };
        Verdict::Accepted([&[*kind][..], &again].concat())
    },
    ..BASE
};
