//! How entries, votes and memberships become bytes: for the log on disk, for
//! the network, and for the manifest of a snapshot alike.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | format, [`FORMAT`]; never reused |
//! | 4 | CRC-32C of everything after it, little endian |
//! | 1 | kind: 0 blank, 1 command, 2 membership; never reused |
//! | 8 each | term, node, index, time_ms, little endian |
//! | rest | nothing, the command's bytes, or a membership by `storage::codec` |
//!
//! openraft's own serialisation is not used: it promises no stable format.
//! Nothing here panics on damaged bytes, wherever they came from.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::types::{Entry, EntryPayload, LogId, Membership, Proposal, StoredMembership, Vote};
use crate::storage::layout::LogPosition;
use crate::storage::{StorageError, codec};
use crate::types::{Member, NodeId};

/// The first byte of every record written today.
pub const FORMAT: u8 = 1;
/// Bytes of a record before its body.
pub const HEADER_BYTES: usize = 38;
/// Bytes before the part that the checksum covers.
const COVERED_FROM: usize = 5;

const KIND_BLANK: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;

/// A record's bytes, as every log, stream and manifest carries the entry.
pub fn encode_entry(entry: &Entry) -> Bytes {
    let membership;
    let (kind, time_ms, body): (u8, u64, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, 0, &[]),
        EntryPayload::Normal(proposal) => (KIND_COMMAND, proposal.time_ms, &proposal.body),
        EntryPayload::Membership(value) => {
            membership = encode_membership(value);
            (KIND_MEMBERSHIP, 0, &membership)
        }
    };
    let position = LogPosition::from(&entry.log_id);
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + body.len());
    bytes.put_u8(FORMAT);
    bytes.put_u32_le(0);
    bytes.put_u8(kind);
    bytes.put_u64_le(position.term);
    bytes.put_u64_le(position.node);
    bytes.put_u64_le(position.index);
    bytes.put_u64_le(time_ms);
    bytes.put_slice(body);
    let crc = crc32c::crc32c(&bytes[COVERED_FROM..]);
    bytes[1..COVERED_FROM].copy_from_slice(&crc.to_le_bytes());
    bytes.freeze()
}

/// The entry of a record. A command's body is a slice of `bytes`, not a copy.
///
/// # Errors
/// [`StorageError::Corrupt`] for an unknown format or kind, a wrong checksum, or
/// a body that its kind does not have.
pub fn decode_entry(bytes: &Bytes) -> Result<Entry, StorageError> {
    let header = check(bytes)?;
    let body = bytes.slice(HEADER_BYTES..);
    let payload = match header.kind {
        KIND_BLANK if body.is_empty() => EntryPayload::Blank,
        KIND_COMMAND => EntryPayload::Normal(Proposal { time_ms: header.time_ms, body }),
        KIND_MEMBERSHIP => EntryPayload::Membership(decode_membership(&body)?),
        kind => {
            let reason = format!("kind {kind} with a body of {} bytes is unknown here", body.len());
            return Err(corrupt(header.position.index, reason));
        }
    };
    Ok(Entry { log_id: LogId::from(header.position), payload })
}

/// Where the entry of a record stands in the log. Checks the whole record.
///
/// # Errors
/// [`StorageError::Corrupt`] as for [`decode_entry`], except that the body of a
/// membership is not decoded.
pub fn position_of(bytes: &[u8]) -> Result<LogPosition, StorageError> {
    check(bytes).map(|header| header.position)
}

/// Checks that `bytes` are the record of `index`: what the log engine is given
/// to tell damage by.
///
/// # Errors
/// [`StorageError::Corrupt`] when they are not.
pub fn verify(index: u64, bytes: &[u8]) -> Result<(), StorageError> {
    let position = position_of(bytes)?;
    if position.index != index {
        return Err(corrupt(index, format!("it holds the entry of index {}", position.index)));
    }
    Ok(())
}

struct Header {
    kind: u8,
    position: LogPosition,
    time_ms: u64,
}

fn check(bytes: &[u8]) -> Result<Header, StorageError> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(corrupt(0, format!("{} bytes are too short for a record", bytes.len())));
    };
    let number = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let position = LogPosition { term: number(6), node: number(14), index: number(22) };
    if header[0] != FORMAT {
        return Err(corrupt(position.index, format!("format {} is unknown to this version", header[0])));
    }
    let stored = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let computed = crc32c::crc32c(&bytes[COVERED_FROM..]);
    if stored != computed {
        let reason = format!("checksum is {computed:08x}, the record says {stored:08x}");
        return Err(corrupt(position.index, reason));
    }
    Ok(Header { kind: header[5], position, time_ms: number(30) })
}

fn corrupt(index: u64, reason: String) -> StorageError {
    StorageError::Corrupt { what: format!("log record {index}"), reason }
}

/// What a membership looks like on disk and on the wire.
#[derive(Debug, Serialize, Deserialize)]
struct MembershipRecord {
    /// The voters of each configuration: one, or two while a change is under way.
    configs: Vec<BTreeSet<NodeId>>,
    /// Every member, voting or not.
    members: BTreeMap<NodeId, Member>,
}

/// A membership with the entry that brought it; `None` before any.
#[derive(Debug, Serialize, Deserialize)]
struct StoredMembershipRecord {
    position: Option<LogPosition>,
    membership: MembershipRecord,
}

/// A vote.
#[derive(Debug, Serialize, Deserialize)]
struct VoteRecord {
    term: u64,
    node: NodeId,
    committed: bool,
}

impl From<&Membership> for MembershipRecord {
    fn from(membership: &Membership) -> MembershipRecord {
        let members = membership.nodes().map(|(id, member)| (*id, member.clone()));
        MembershipRecord { configs: membership.get_joint_config().clone(), members: members.collect() }
    }
}

impl TryFrom<MembershipRecord> for Membership {
    type Error = StorageError;

    fn try_from(record: MembershipRecord) -> Result<Membership, StorageError> {
        Membership::new(record.configs, record.members).map_err(|error| StorageError::Corrupt {
            what: "membership".to_owned(),
            reason: error.to_string(),
        })
    }
}

/// A membership's bytes.
pub fn encode_membership(membership: &Membership) -> Vec<u8> {
    codec::encode(&MembershipRecord::from(membership))
}

/// What [`encode_membership`] encoded.
///
/// # Errors
/// [`StorageError::Corrupt`], also for a membership that no cluster can have.
pub fn decode_membership(bytes: &[u8]) -> Result<Membership, StorageError> {
    codec::decode::<MembershipRecord>("membership", bytes)?.try_into()
}

/// The bytes of a membership and of the id of the entry that brought it.
pub fn encode_stored_membership(stored: &StoredMembership) -> Vec<u8> {
    codec::encode(&StoredMembershipRecord {
        position: stored.log_id().as_ref().map(LogPosition::from),
        membership: MembershipRecord::from(stored.membership()),
    })
}

/// What [`encode_stored_membership`] encoded.
///
/// # Errors
/// [`StorageError::Corrupt`], also for a membership that no cluster can have.
pub fn decode_stored_membership(bytes: &[u8]) -> Result<StoredMembership, StorageError> {
    let record: StoredMembershipRecord = codec::decode("stored membership", bytes)?;
    Ok(StoredMembership::new(record.position.map(LogId::from), record.membership.try_into()?))
}

/// A vote's bytes.
pub fn encode_vote(vote: &Vote) -> Vec<u8> {
    let leader = vote.leader_id();
    codec::encode(&VoteRecord { term: leader.term, node: leader.node_id, committed: vote.is_committed() })
}

/// What [`encode_vote`] encoded.
///
/// # Errors
/// [`StorageError::Corrupt`].
pub fn decode_vote(bytes: &[u8]) -> Result<Vote, StorageError> {
    let record: VoteRecord = codec::decode("vote", bytes)?;
    Ok(match record.committed {
        true => Vote::new_committed(record.term, record.node),
        false => Vote::new(record.term, record.node),
    })
}

/// A log position's bytes, `None` included.
pub fn encode_position(id: Option<&LogId>) -> Vec<u8> {
    codec::encode(&id.map(LogPosition::from))
}

/// What [`encode_position`] encoded.
///
/// # Errors
/// [`StorageError::Corrupt`].
pub fn decode_position(bytes: &[u8]) -> Result<Option<LogId>, StorageError> {
    Ok(codec::decode::<Option<LogPosition>>("log position", bytes)?.map(LogId::from))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(term: u64, node: u64, index: u64) -> LogId {
        LogPosition { term, node, index }.into()
    }

    fn membership() -> Membership {
        let member = |id| Member { id, name: format!("n{id}"), disk: id + 100, ..Member::default() };
        let members = BTreeMap::from([(1, member(1)), (2, member(2)), (3, member(3))]);
        Membership::new(vec![BTreeSet::from([1, 2]), BTreeSet::from([1])], members).unwrap()
    }

    fn entries() -> impl Strategy<Value = Entry> {
        let payload = prop_oneof![
            Just(EntryPayload::Blank),
            Just(EntryPayload::Membership(membership())),
            (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(time_ms, body)| EntryPayload::Normal(Proposal { time_ms, body: body.into() })),
        ];
        (any::<u64>(), any::<u64>(), any::<u64>(), payload)
            .prop_map(|(term, node, index, payload)| Entry { log_id: at(term, node, index), payload })
    }

    proptest! {
        #[test]
        fn entries_round_trip(entry in entries()) {
            let bytes = encode_entry(&entry);
            prop_assert_eq!(position_of(&bytes).unwrap(), LogPosition::from(&entry.log_id));
            prop_assert!(verify(entry.log_id.index, &bytes).is_ok());
            prop_assert!(verify(entry.log_id.index ^ 1, &bytes).is_err());
            prop_assert_eq!(decode_entry(&bytes).unwrap(), entry);
        }

        #[test]
        fn a_flipped_bit_or_a_cut_is_found(entry in entries(), bit: prop::sample::Index, cut: prop::sample::Index) {
            let bytes = encode_entry(&entry);
            let bit = bit.index(bytes.len() * 8);
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_entry(&damaged.into()).is_err());
            prop_assert!(decode_entry(&bytes.slice(..cut.index(bytes.len()))).is_err());
        }

        #[test]
        fn no_bytes_make_a_decoder_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..120), seal: bool,
        ) {
            // With a valid checksum, so that the part behind it is reached too.
            if seal && bytes.len() >= HEADER_BYTES {
                bytes[0] = FORMAT;
                bytes[5] %= 4;
                let crc = crc32c::crc32c(&bytes[COVERED_FROM..]);
                bytes[1..COVERED_FROM].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = decode_membership(&bytes);
            let _ = decode_stored_membership(&bytes);
            let _ = decode_vote(&bytes);
            let _ = decode_position(&bytes);
            let _ = decode_entry(&bytes.into());
        }
    }

    #[test]
    fn the_format_of_a_record_holds_still() {
        let proposal = Proposal { time_ms: 4, body: Bytes::from_static(b"ab") };
        let entry = Entry { log_id: at(1, 2, 3), payload: EntryPayload::Normal(proposal) };
        let bytes = encode_entry(&entry);
        assert_eq!(bytes.len(), HEADER_BYTES + 2);
        assert_eq!(bytes[0], 1);
        let mut covered = vec![1];
        for number in [1u64, 2, 3, 4] {
            covered.extend_from_slice(&number.to_le_bytes());
        }
        covered.extend_from_slice(b"ab");
        assert_eq!(bytes[5..], covered);
        assert_eq!(bytes[1..5], crc32c::crc32c(&covered).to_le_bytes());
    }

    #[test]
    fn votes_and_memberships_round_trip() {
        for vote in [Vote::new(3, 7), Vote::new_committed(u64::MAX, 1)] {
            assert_eq!(decode_vote(&encode_vote(&vote)).unwrap(), vote);
        }
        for stored in [StoredMembership::default(), StoredMembership::new(Some(at(1, 2, 3)), membership())] {
            assert_eq!(decode_stored_membership(&encode_stored_membership(&stored)).unwrap(), stored);
        }
        for id in [None, Some(at(0, 0, 0)), Some(at(5, 6, 7))] {
            assert_eq!(decode_position(&encode_position(id.as_ref())).unwrap(), id);
        }
    }

    #[test]
    fn a_membership_whose_voter_has_no_record_is_refused() {
        let record = MembershipRecord { configs: vec![BTreeSet::from([9])], members: BTreeMap::new() };
        assert!(decode_membership(&codec::encode(&record)).is_err());
    }
}
