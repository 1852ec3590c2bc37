//! Keys and values of the state database, a snapshot's manifest, and the marker
//! of a data directory.

use bytes::Bytes;

use mainstay::storage::layout::{
    self, Change, LeaseRecord, LogPosition, Record, SessionKey, SessionRecord, VersionRef, WriteRecord,
};
use mainstay::storage::snapshot::Manifest;
use mainstay::storage::{Identity, Standing};
use mainstay::types::{Alarm, LeaseId, Revision, Space};

use super::log::seal_chosen;
use super::{BASE, Target, Verdict, draw_value, flips_are_found, run_value, seal_value, whole};
use crate::draw::draw;
use crate::mutate::Rng;

/// One arm for each type of value that the catalogue has; the number stands
/// before the value in the input.
macro_rules! values {
    ($($number:literal $type:ty),*) => {
        fn draw_chosen(rng: &mut Rng) -> Vec<u8> {
            let kind = rng.below([$($number),*].len()) as u8;
            let value = match kind {
                $($number => draw_value::<$type>(rng),)*
                _ => unreachable!("the numbers have no holes"),
            };
            [&[kind][..], &value].concat()
        }

        fn run_chosen(bytes: &[u8]) -> Verdict {
            let Some((kind, value)) = bytes.split_first() else { return Verdict::Refused };
            let verdict = match kind {
                $($number => run_value::<$type>(value),)*
                _ => Verdict::Refused,
            };
            match verdict {
                Verdict::Accepted(again) => Verdict::Accepted([&[*kind][..], &again].concat()),
                Verdict::Refused => Verdict::Refused,
            }
        }
    };
}

values!(
    0u8 Record, 1u8 Change, 2u8 VersionRef, 3u8 LeaseRecord, 4u8 SessionRecord, 5u8 WriteRecord,
    6u8 LogPosition, 7u8 Revision, 8u8 Vec<Alarm>, 9u8 u32, 10u8 u64, 11u8 (u64, Bytes)
);

pub const VALUE: Target = Target {
    name: "value",
    what: "a value of the state database or the log's marks, from disk or a snapshot",
    draw: |rng| whole(draw_chosen(rng)),
    seal: |bytes| seal_chosen(bytes),
    run: run_chosen,
    ..BASE
};

pub const KEY: Target = Target {
    name: "key",
    what: "a key of the state database, from disk or a snapshot",
    draw: |rng| {
        let (space, revision) = (draw::<Space>(rng), Revision(rng.number() as i64));
        let (number, key) = (rng.number(), rng.bytes());
        let kind = rng.below(6) as u8;
        let laid = match kind {
            0 => layout::history(revision, rng.number() as u32).to_vec(),
            1 => layout::version(space, &key, revision),
            2 => layout::lease(LeaseId(number as i64)).to_vec(),
            3 => layout::lease_key(LeaseId(number as i64), space, &key),
            4 => layout::session(number).to_vec(),
            _ => layout::session_write(number, rng.number()).to_vec(),
        };
        whole([&[kind.min(4)][..], &laid].concat())
    },
    run: run_key,
    ..BASE
};

/// What is read from a key lays the same key again: no two keys mean one thing.
fn run_key(bytes: &[u8]) -> Verdict {
    let Some((kind, key)) = bytes.split_first() else { return Verdict::Refused };
    let again = match kind {
        0 => layout::parse_history(key).map(|(revision, sub)| layout::history(revision, sub).to_vec()),
        1 => layout::parse_version(key).map(|(space, key, revision)| layout::version(space, &key, revision)),
        2 => layout::parse_lease(key).map(|id| layout::lease(id).to_vec()),
        3 => layout::parse_lease_key(key).map(|(space, rest)| {
            let id = i64::from_be_bytes(key[1..9].try_into().expect("8 bytes"));
            layout::lease_key(LeaseId(id), space, rest)
        }),
        4 => layout::parse_session(key).map(|key| match key {
            SessionKey::Session(id) => layout::session(id).to_vec(),
            SessionKey::Write(id, sequence) => layout::session_write(id, sequence).to_vec(),
        }),
        _ => None,
    };
    match again {
        Some(again) => {
            assert_eq!(again, key, "another key means the same");
            Verdict::Accepted(bytes.to_vec())
        }
        None => Verdict::Refused,
    }
}

pub const MANIFEST: Target = Target {
    name: "manifest",
    what: "a snapshot's manifest, from disk, the leader or an operator's file",
    draw: |rng| {
        let mut manifest: Manifest = draw(rng);
        for (place, file) in manifest.files.iter_mut().enumerate() {
            file.name = format!("{place:06}.sst");
            file.size_bytes /= 4;
        }
        whole(manifest.encode())
    },
    seal: |bytes| seal_value(bytes),
    run: |bytes| {
        let Ok(manifest) = Manifest::decode(bytes) else { return Verdict::Refused };
        // Sums what decoding promised to be summable.
        let _ = manifest.size_bytes();
        for file in &manifest.files {
            let inside = std::path::Path::new("/root").join(&file.name);
            assert_eq!(inside.parent(), Some("/root".as_ref()), "{:?} leaves its directory", file.name);
        }
        let again = manifest.encode();
        assert_eq!(Manifest::decode(&again).expect("what was just written is read"), manifest);
        flips_are_found(bytes, |damaged| Manifest::decode(damaged).is_err());
        Verdict::Accepted(again)
    },
    ..BASE
};

pub const IDENTITY: Target = Target {
    name: "identity",
    what: "the marker of a data directory",
    draw: |rng| {
        let mut id = || rng.number().max(1);
        let (disk, cluster, node) = (id(), id(), id());
        let standing = match rng.below(3) {
            0 => Standing::Unclaimed,
            1 => Standing::Joining { cluster, node },
            _ => Standing::Member { cluster, node },
        };
        whole(Identity { disk, standing }.encode())
    },
    seal: |bytes| {
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
        let crc = crc32c::crc32c(&bytes[..end]);
        bytes.truncate(end);
        bytes.extend_from_slice(format!("\ncrc32c {crc:08x}\n").as_bytes());
    },
    run: |bytes| {
        let Ok(identity) = Identity::decode(bytes) else { return Verdict::Refused };
        let again = identity.encode().into_bytes();
        // It is replaced as a whole, and believed only as it was written.
        assert_eq!(
            String::from_utf8_lossy(bytes),
            String::from_utf8_lossy(&again),
            "another marker is believed"
        );
        Verdict::Accepted(again)
    },
    bytes_max: 1024,
    ..BASE
};
