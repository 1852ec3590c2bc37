//! What members say to each other: protobuf messages with records and values
//! of `storage::codec` inside, and what they mean.

use bytes::Bytes;
use prost::Message;

use mainstay::node::carrier;
use mainstay::node::control::{Answer, Ask, ForwardOutcome, ForwardResult};
use mainstay::raft;
use mainstay::raft::{Entry, LogId};
use mainstay::storage::codec;
use mainstay::storage::layout::LogPosition;
use mainstay::types::{Command, Reply};
use mainstay::wire::peer_v1 as pb;

use super::log::{draw_entry, draw_vote};
use super::wire_noise::{encode_noisily, noise};
use super::{BASE, Input, Target, Verdict};
use crate::draw::draw;
use crate::mutate::Rng;

fn loose(bytes: Vec<u8>) -> Input {
    Input { bytes, is_whole: false }
}

fn draw_log_id(rng: &mut Rng) -> pb::LogId {
    pb::LogId { term: rng.number(), node: rng.number(), index: rng.number() }
}

fn draw_ballot(rng: &mut Rng) -> Option<pb::Ballot> {
    (!rng.one_in(20)).then(|| raft::ballot(&draw_vote(rng)))
}

fn maybe_log_id(rng: &mut Rng) -> Option<pb::LogId> {
    rng.one_in(2).then(|| draw_log_id(rng))
}

pub const APPEND: Target = Target {
    name: "peer_append",
    what: "a leader's entries and heartbeats",
    draw: |rng| {
        let previous = maybe_log_id(rng);
        let first = previous.map_or(0, |id| id.index.wrapping_add(1));
        let entries = (0..rng.below(4) as u64).map(|place| {
            let entry = draw_entry(rng);
            let index = if rng.one_in(20) { rng.number() } else { first.wrapping_add(place) };
            let position = LogPosition { index, ..LogPosition::from(&entry.log_id) };
            raft::record::encode_entry(&Entry { log_id: LogId::from(position), ..entry })
        });
        let entries = entries.collect();
        let (ballot, leader_commit) = (draw_ballot(rng), maybe_log_id(rng));
        let message = pb::AppendRequest { ballot, previous, entries, leader_commit };
        loose(encode_noisily(rng, &message))
    },
    run: |bytes| {
        let Ok(message) = pb::AppendRequest::decode(bytes) else { return Verdict::Refused };
        let Ok(request) = raft::parse_append_request(message) else { return Verdict::Refused };
        let first = request.prev_log_id.map_or(0, |id| id.index + 1);
        for (place, entry) in request.entries.iter().enumerate() {
            assert_eq!(entry.log_id.index, first + place as u64, "a hole was let through");
        }
        let again = raft::append_request(&request);
        let parsed = raft::parse_append_request(again.clone()).expect("what was just written is read");
        assert_eq!(format!("{parsed:?}"), format!("{request:?}"));
        Verdict::Accepted(again.encode_to_vec())
    },
    ..BASE
};

pub const RAFT: Target = Target {
    name: "peer_raft",
    what: "votes, transfers of leadership, answers and a snapshot's chunks",
    draw: |rng| {
        let kind = rng.below(6) as u8;
        let (ballot, last_log_id) = (draw_ballot(rng), maybe_log_id(rng));
        let bytes = match kind {
            0 => {
                let leadership_transfer = rng.one_in(2);
                encode_noisily(rng, &pb::VoteRequest { ballot, last_log_id, leadership_transfer })
            }
            1 => {
                let granted = rng.one_in(2);
                encode_noisily(rng, &pb::VoteResponse { ballot, granted, last_log_id })
            }
            2 => {
                let to_node = rng.number();
                let message = pb::TransferLeaderRequest { from_leader: ballot, to_node, last_log_id };
                encode_noisily(rng, &message)
            }
            3 => {
                let manifest = Bytes::from(rng.bytes());
                let header = pb::SnapshotHeader { ballot, manifest };
                let part = Some(pb::snapshot_chunk::Part::Header(header));
                encode_noisily(rng, &pb::SnapshotChunk { part })
            }
            4 => {
                use pb::append_response::Result as Answer;
                let result = match rng.below(3) {
                    0 => Answer::Matching(pb::Matching { last: last_log_id }),
                    1 => Answer::Conflict(draw_log_id(rng)),
                    _ => Answer::HigherBallot(ballot.unwrap_or_default()),
                };
                encode_noisily(rng, &pb::AppendResponse { result: Some(result) })
            }
            _ => {
                use pb::transfer_leader_response::{
                    Accepted, BallotChanged, LogNotFlushed, Result as Answer,
                };
                let result = match rng.below(3) {
                    0 => Answer::Accepted(Accepted {}),
                    1 => Answer::BallotChanged(BallotChanged { expected: ballot, actual: draw_ballot(rng) }),
                    _ => Answer::LogNotFlushed(LogNotFlushed {
                        expected: last_log_id,
                        actual: maybe_log_id(rng),
                    }),
                };
                encode_noisily(rng, &pb::TransferLeaderResponse { result: Some(result) })
            }
        };
        loose([&[kind][..], &bytes].concat())
    },
    run: run_raft,
    ..BASE
};

/// Each message that is accepted means the same when it is sent on.
fn run_raft(bytes: &[u8]) -> Verdict {
    let Some((kind, body)) = bytes.split_first() else { return Verdict::Refused };
    macro_rules! run {
        ($message:ident, $parse:ident, $write:ident) => {{
            let Ok(message) = pb::$message::decode(body) else { return Verdict::Refused };
            let Ok(parsed) = raft::$parse(message) else { return Verdict::Refused };
            let again = raft::$write(&parsed);
            let read = raft::$parse(again.clone()).expect("what was just written is read");
            assert_eq!(format!("{read:?}"), format!("{parsed:?}"));
            again.encode_to_vec()
        }};
    }
    let again = match kind {
        0 => run!(VoteRequest, parse_vote_request, vote_request),
        1 => run!(VoteResponse, parse_vote_response, vote_response),
        2 => run!(TransferLeaderRequest, parse_transfer_request, transfer_request),
        3 => {
            let Ok(chunk) = pb::SnapshotChunk::decode(body) else { return Verdict::Refused };
            let Some(pb::snapshot_chunk::Part::Header(header)) = chunk.part else { return Verdict::Refused };
            let Ok((vote, manifest)) = raft::parse_snapshot_header(header) else { return Verdict::Refused };
            let header = pb::SnapshotHeader { ballot: Some(raft::ballot(&vote)), manifest };
            header.encode_to_vec()
        }
        4 => run!(AppendResponse, parse_append_response, append_response),
        5 => run!(TransferLeaderResponse, parse_transfer_response, transfer_response),
        _ => return Verdict::Refused,
    };
    Verdict::Accepted([&[*kind][..], &again].concat())
}

/// A protobuf message that holds one value of `storage::codec`, whose checksum
/// is made right: `[kind][length of the value u16][noise]` would hide it, so the
/// input is the value, and the message is made around it.
pub const CONTROL: Target = Target {
    name: "peer_control",
    what: "a member's question and the leader's answer",
    draw: |rng| {
        let asks = rng.one_in(2);
        let value = if asks { codec::encode(&draw::<Ask>(rng)) } else { codec::encode(&draw::<Answer>(rng)) };
        super::whole([&[u8::from(asks)][..], &value].concat())
    },
    seal: |bytes| super::log::seal_chosen(bytes),
    run: |bytes| {
        let Some((kind, value)) = bytes.split_first() else { return Verdict::Refused };
        let again = match kind {
            1 => {
                let message = pb::ControlAskRequest { ask: Bytes::copy_from_slice(value) };
                let Ok(ask) = carrier::decode_ask(&message) else { return Verdict::Refused };
                let again = pb::ControlAskRequest { ask: codec::encode(&ask).into() };
                assert_eq!(carrier::decode_ask(&again).expect("what was just written is read"), ask);
                again.ask
            }
            0 => {
                let message = pb::ControlAskResponse { answer: Bytes::copy_from_slice(value) };
                let Ok(answer) = carrier::decode_answer(&message.encode_to_vec()) else {
                    return Verdict::Refused;
                };
                let again = carrier::encode_answer(&answer);
                let read = carrier::decode_answer(&again.encode_to_vec());
                assert_eq!(read.expect("what was just written is read"), answer);
                again.answer
            }
            _ => return Verdict::Refused,
        };
        Verdict::Accepted([&[*kind][..], &again].concat())
    },
    ..BASE
};

pub const FORWARD: Target = Target {
    name: "peer_forward",
    what: "forwarded proposals, what became of them, and a node's first words",
    draw: |rng| {
        let kind = rng.below(5) as u8;
        let bytes = match kind {
            0 => {
                let item = |rng: &mut Rng| pb::ControlForwardItem {
                    sequence: rng.number(),
                    body: codec::encode(&draw::<Command>(rng)).into(),
                };
                let items = (0..rng.below(4)).map(|_| item(rng)).collect();
                encode_noisily(rng, &pb::ControlForwardBatch { items })
            }
            1 => {
                let results = (0..rng.below(4)).map(|_| draw_result(rng)).collect();
                encode_noisily(rng, &carrier::encode_results(results))
            }
            _ => noise(rng, 3),
        };
        loose([&[kind][..], &bytes].concat())
    },
    run: |bytes| {
        let Some((kind, body)) = bytes.split_first() else { return Verdict::Refused };
        let again = match kind {
            0 => {
                let Ok(batch) = pb::ControlForwardBatch::decode(body) else { return Verdict::Refused };
                for item in &batch.items {
                    // What the leader asks before it takes one in.
                    let _ = codec::decode::<Command>("fuzz", &item.body);
                }
                batch.encode_to_vec()
            }
            1 => {
                let Ok(results) = carrier::decode_results(body) else { return Verdict::Refused };
                let again = carrier::encode_results(results.clone()).encode_to_vec();
                assert_eq!(carrier::decode_results(&again).expect("what was just written is read"), results);
                again
            }
            2 => return same::<pb::ControlProbeRequest>(*kind, body),
            3 => return same::<pb::ControlJoinRequest>(*kind, body),
            4 => return same::<pb::ControlProbeResponse>(*kind, body),
            _ => return Verdict::Refused,
        };
        Verdict::Accepted([&[*kind][..], &again].concat())
    },
    ..BASE
};

fn draw_result(rng: &mut Rng) -> ForwardResult {
    let outcome = match rng.below(3) {
        0 => {
            ForwardOutcome::Applied { index: rng.number(), reply: codec::encode(&draw::<Reply>(rng)).into() }
        }
        1 => ForwardOutcome::Rejected { leader: rng.number(), too_many: rng.one_in(2) },
        _ => ForwardOutcome::Unknown,
    };
    ForwardResult { sequence: rng.number(), outcome }
}

/// A message that is used as it is.
fn same<M: Message + Default + PartialEq + std::fmt::Debug>(kind: u8, body: &[u8]) -> Verdict {
    let Ok(message) = M::decode(body) else { return Verdict::Refused };
    let again = message.encode_to_vec();
    assert_eq!(M::decode(&again[..]).expect("what was just written is read"), message);
    Verdict::Accepted([&[kind][..], &again].concat())
}
