//! The decoders, one target each: how to write an input that is whole, how to
//! make its checksums right again after damage, and what must hold of one that
//! is accepted.

mod client;
mod disk;
mod files;
mod log;
mod peer;
mod segments;
mod state;
mod text;
mod wire_noise;

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use mainstay::storage::codec;

use crate::draw::draw;
use crate::mutate::{Rng, flip_bits};

/// One decoder under test.
pub struct Target {
    pub name: &'static str,
    /// Where its bytes come from.
    pub what: &'static str,
    /// Writes an input.
    pub draw: fn(&mut Rng) -> Input,
    /// Makes checksums right, so that what stands behind them is reached too.
    pub seal: fn(&mut Vec<u8>),
    /// Reads an input. Panics when a promise is broken.
    pub run: fn(&[u8]) -> Verdict,
    /// The longest input.
    pub bytes_max: usize,
    /// The most bytes that reading an input of this length may hold.
    pub memory: fn(usize) -> usize,
}

/// An input, and whether it is as something was written: then it must be
/// accepted, and writing what was read must give the same bytes.
pub struct Input {
    pub bytes: Vec<u8>,
    pub is_whole: bool,
}

/// What reading gave.
pub enum Verdict {
    /// It means something; the bytes are that, written again.
    Accepted(Vec<u8>),
    Refused,
}

/// Every target.
pub static TARGETS: &[Target] = &[
    log::LOG_RECORD,
    log::MEMBERSHIP,
    log::COMMAND,
    log::REPLY,
    segments::SEGMENTS,
    disk::VALUE,
    disk::KEY,
    disk::MANIFEST,
    disk::IDENTITY,
    files::ARCHIVE,
    peer::APPEND,
    peer::RAFT,
    peer::CONTROL,
    peer::FORWARD,
    client::KV,
    client::TXN,
    client::REPLIES,
    text::IMPORT,
    text::SETTINGS,
    state::WATCH,
    state::APPLY,
];

/// What most targets start from.
pub const BASE: Target = Target {
    name: "",
    what: "",
    draw: |_| Input { bytes: Vec::new(), is_whole: false },
    seal: |_| (),
    run: |_| Verdict::Refused,
    bytes_max: 64 << 10,
    memory: modest,
};

/// A few times what came, beside what one damaged length may ask for before it
/// is found out: 16 MiB by the codec's limit, or 1 MiB for each list that is
/// open at the time.
fn modest(input_bytes: usize) -> usize {
    (96 << 20) + 256 * input_bytes
}

fn whole(bytes: impl Into<Vec<u8>>) -> Input {
    Input { bytes: bytes.into(), is_whole: true }
}

/// A value of a type in the envelope of `storage::codec`.
fn draw_value<T: Serialize + DeserializeOwned>(rng: &mut Rng) -> Vec<u8> {
    codec::encode(&draw::<T>(rng))
}

/// Makes the envelope of `storage::codec` right: its format and its checksum.
fn seal_value(bytes: &mut [u8]) {
    if bytes.len() >= 5 {
        bytes[0] = 1;
        let crc = crc32c::crc32c(&bytes[5..]);
        bytes[1..5].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Reads a value in its envelope. What is accepted reads the same when it is
/// written again, and three flipped bits in it are found.
fn run_value<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Verdict {
    let Ok(value) = codec::decode::<T>("fuzz", bytes) else { return Verdict::Refused };
    let again = codec::encode(&value);
    assert_eq!(codec::decode::<T>("fuzz", &again).expect("what was just written is read"), value);
    flips_are_found(bytes, |damaged| codec::decode::<T>("fuzz", damaged).is_err());
    Verdict::Accepted(again)
}

/// Flips bits at places that follow from the bytes themselves, so that the input
/// alone repeats it.
fn flips_are_found(bytes: &[u8], is_refused: impl Fn(&[u8]) -> bool) {
    let mut rng = Rng::new(u64::from(crc32c::crc32c(bytes)));
    let damaged = flip_bits(&mut rng, bytes);
    // Two flips in one place undo each other.
    assert!(damaged == bytes || is_refused(&damaged), "flipped bits went unnoticed: {damaged:02x?}");
}
