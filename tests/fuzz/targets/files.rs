//! Files that an operator hands over: a snapshot as one file.

use std::io::Write as _;

use sha2::{Digest as _, Sha256};

use mainstay::storage::archive;
use mainstay::storage::layout::LogPosition;
use mainstay::storage::snapshot::{FileEntry, Manifest};
use mainstay::types::Revision;

use super::{BASE, Input, Target, Verdict, seal_value};
use crate::mutate::Rng;
use crate::scratch::scratch;

const MAGIC: &[u8] = b"MAINSTAY-SNAP-1\n";
/// Bytes before the manifest.
const HEADER_BYTES: usize = 24;

pub const ARCHIVE: Target = Target {
    name: "archive",
    what: "a snapshot as one file, from an operator",
    draw: |rng| Input { bytes: draw_archive(rng), is_whole: false },
    seal: seal_archive,
    run: |bytes| {
        let path = scratch().join("archive");
        std::fs::File::create(&path)
            .and_then(|mut file| file.write_all(bytes))
            .expect("the scratch file is written");
        let Ok(manifest) = archive::verify(&path) else { return Verdict::Refused };
        // Its files are no database, so unpacking writes and checks them all, and then refuses.
        let target = scratch().join("unpacked");
        let unpacked = archive::unpack(&path, &target);
        assert!(unpacked.is_err(), "files without a database were taken for one");
        assert!(!target.exists(), "what could not be unpacked was left there");
        Verdict::Accepted(manifest.encode())
    },
    // The hash is read in pieces of 1 MiB, and so are the files.
    ..BASE
};

fn draw_archive(rng: &mut Rng) -> Vec<u8> {
    let contents: Vec<Vec<u8>> = (0..rng.below(4)).map(|_| rng.bytes()).collect();
    let files = contents.iter().enumerate().map(|(place, content)| FileEntry {
        name: format!("{place:06}.sst"),
        size_bytes: content.len() as u64,
        sha256: Sha256::digest(content).into(),
    });
    let last = LogPosition { term: 1, node: 1, index: rng.number() };
    let manifest = Manifest {
        cluster: rng.number(),
        last,
        membership: rng.bytes().into(),
        revision: Revision(rng.number() as i64),
        files: files.collect(),
    };
    let manifest = manifest.encode();
    let mut bytes = [MAGIC, &(manifest.len() as u64).to_le_bytes(), &manifest, &contents.concat()].concat();
    seal_archive(&mut bytes);
    bytes
}

/// Makes the manifest's envelope, the size and the hash right.
fn seal_archive(bytes: &mut Vec<u8>) {
    let claimed =
        bytes.get(16..HEADER_BYTES).map(|field| u64::from_le_bytes(field.try_into().expect("8 bytes")));
    let end = claimed.and_then(|length| HEADER_BYTES.checked_add(usize::try_from(length).ok()?));
    if let Some(manifest) = end.and_then(|end| bytes.get_mut(HEADER_BYTES..end)) {
        seal_value(manifest);
    }
    // One that ends with a hash already gets another in its place.
    if bytes.len() % 512 == 32 {
        bytes.truncate(bytes.len() - 32);
    }
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let hash = Sha256::digest(&bytes[..]);
    bytes.extend_from_slice(&hash);
}
