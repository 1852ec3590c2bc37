//! What the log holds: records, and the commands, memberships, votes and
//! replies in and around them.

use bytes::Bytes;

use mainstay::raft::record;
use mainstay::raft::{Entry, EntryPayload, LogId, Membership, Proposal, StoredMembership, Vote};
use mainstay::storage::codec;
use mainstay::storage::layout::LogPosition;
use mainstay::types::{Command, Member, Reply};

use super::{BASE, Input, Target, Verdict, draw_value, flips_are_found, run_value, seal_value, whole};
use crate::draw::draw;
use crate::mutate::Rng;

pub const LOG_RECORD: Target = Target {
    name: "log_record",
    what: "a record of the log, from disk or from the leader",
    draw: |rng| whole(record::encode_entry(&draw_entry(rng))),
    seal: |bytes| seal_record(bytes),
    run: |bytes| {
        let bytes = Bytes::copy_from_slice(bytes);
        let position = record::position_of(&bytes);
        let Ok(entry) = record::decode_entry(&bytes) else { return Verdict::Refused };
        let position = position.expect("what can be read has a position");
        assert_eq!(position, LogPosition::from(&entry.log_id));
        assert!(record::verify(position.index, &bytes).is_ok());
        assert!(record::verify(position.index ^ 1, &bytes).is_err());
        let again = record::encode_entry(&entry);
        assert_eq!(record::decode_entry(&again).expect("what was just written is read"), entry);
        flips_are_found(&bytes, |damaged| record::position_of(damaged).is_err());
        Verdict::Accepted(again.to_vec())
    },
    ..BASE
};

/// Where the checksum of a record stands, and what it covers.
const CHECKSUM: std::ops::Range<usize> = 1..5;

/// Makes the record's checksum right, and that of a membership in it.
fn seal_record(bytes: &mut [u8]) {
    if bytes.len() < record::HEADER_BYTES {
        return;
    }
    bytes[0] = record::FORMAT;
    bytes[CHECKSUM.end] %= 4;
    if bytes[CHECKSUM.end] == 2 {
        seal_value(&mut bytes[record::HEADER_BYTES..]);
    }
    let crc = crc32c::crc32c(&bytes[CHECKSUM.end..]);
    bytes[CHECKSUM].copy_from_slice(&crc.to_le_bytes());
}

fn draw_log_id(rng: &mut Rng) -> LogId {
    LogId::from(draw::<LogPosition>(rng))
}

pub fn draw_entry(rng: &mut Rng) -> Entry {
    let payload = match rng.below(5) {
        0 => EntryPayload::Blank,
        1 => EntryPayload::Membership(draw_membership(rng)),
        2 => EntryPayload::Normal(Proposal { time_ms: rng.number(), body: rng.bytes().into() }),
        _ => EntryPayload::Normal(Proposal {
            time_ms: rng.number(),
            body: codec::encode(&draw::<Command>(rng)).into(),
        }),
    };
    Entry { log_id: draw_log_id(rng), payload }
}

/// One that a cluster can have: every voter has a record.
pub fn draw_membership(rng: &mut Rng) -> Membership {
    let members: Vec<Member> = (0..1 + rng.below(4)).map(|_| draw(rng)).collect();
    let mut configs = Vec::new();
    for _ in 0..1 + rng.below(2) {
        let mut voters: std::collections::BTreeSet<u64> =
            members.iter().filter(|_| rng.one_in(2)).map(|member| member.id).collect();
        voters.insert(members[0].id);
        configs.push(voters);
    }
    let members = members.into_iter().map(|member| (member.id, member));
    Membership::new(configs, members.collect::<std::collections::BTreeMap<_, _>>())
        .expect("every voter has a record")
}

pub const MEMBERSHIP: Target = Target {
    name: "membership",
    what: "a membership, a vote or a position, from disk, an entry or a manifest",
    draw: |rng| {
        let kind = rng.below(4) as u8;
        let value = match kind {
            0 => record::encode_membership(&draw_membership(rng)),
            1 => {
                let at = rng.one_in(4).then(|| draw_log_id(rng));
                record::encode_stored_membership(&StoredMembership::new(at, draw_membership(rng)))
            }
            2 => record::encode_vote(&draw_vote(rng)),
            _ => {
                let at = rng.one_in(2).then(|| draw_log_id(rng));
                record::encode_position(at.as_ref())
            }
        };
        whole([&[kind][..], &value].concat())
    },
    seal: |bytes| seal_chosen(bytes),
    run: |bytes| {
        let Some((kind, value)) = bytes.split_first() else { return Verdict::Refused };
        macro_rules! run {
            ($decode:ident, $encode:expr) => {{
                let Ok(read) = record::$decode(value) else { return Verdict::Refused };
                let again = $encode(&read);
                assert_eq!(record::$decode(&again).expect("what was just written is read"), read);
                flips_are_found(value, |damaged| record::$decode(damaged).is_err());
                Verdict::Accepted([&[*kind][..], &again].concat())
            }};
        }
        match kind {
            0 => run!(decode_membership, record::encode_membership),
            1 => run!(decode_stored_membership, record::encode_stored_membership),
            2 => run!(decode_vote, record::encode_vote),
            3 => run!(decode_position, |id: &Option<LogId>| record::encode_position(id.as_ref())),
            _ => Verdict::Refused,
        }
    },
    ..BASE
};

pub fn draw_vote(rng: &mut Rng) -> Vote {
    let (term, node) = (rng.number(), rng.number());
    if rng.one_in(2) { Vote::new_committed(term, node) } else { Vote::new(term, node) }
}

/// For inputs whose first byte says which type the rest is.
pub fn seal_chosen(bytes: &mut [u8]) {
    if let Some((_, value)) = bytes.split_first_mut() {
        seal_value(value);
    }
}

pub const COMMAND: Target = Target {
    name: "command",
    what: "a command, from an entry of the log or from a member that forwards it",
    draw: |rng| whole(draw_value::<Command>(rng)),
    seal: |bytes| seal_value(bytes),
    run: run_value::<Command>,
    ..BASE
};

pub const REPLY: Target = Target {
    name: "reply",
    what: "a reply, from the leader or from a session's row",
    draw: |rng| -> Input { whole(draw_value::<Reply>(rng)) },
    seal: |bytes| seal_value(bytes),
    run: run_value::<Reply>,
    ..BASE
};
