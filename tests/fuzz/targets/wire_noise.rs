//! Bytes that are protobuf, and of no message in particular: fields with small
//! numbers, with numbers, text and messages in them.

use prost::Message;

use crate::mutate::{Rng, varint};

/// Some fields, nested a few levels deep.
pub fn noise(rng: &mut Rng, depth: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..rng.below(6) {
        let field = 1 + rng.below(14) as u64;
        match rng.below(8) {
            0..=2 => {
                out.extend(varint(field << 3));
                out.extend(varint(rng.number()));
            }
            3 => {
                out.extend(varint(field << 3 | if rng.one_in(2) { 1 } else { 5 }));
                out.extend(rng.number().to_le_bytes());
            }
            4 | 5 => length_delimited(&mut out, field, &rng.bytes()),
            _ if depth > 0 => {
                let inside = noise(rng, depth - 1);
                length_delimited(&mut out, field, &inside);
            }
            _ => {}
        }
    }
    out
}

fn length_delimited(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    out.extend(varint(field << 3 | 2));
    out.extend(varint(bytes.len() as u64));
    out.extend_from_slice(bytes);
}

/// A message's bytes, sometimes with noise around them: unknown fields, and
/// known ones a second time.
pub fn encode_noisily(rng: &mut Rng, message: &impl Message) -> Vec<u8> {
    let mut bytes = message.encode_to_vec();
    if rng.one_in(3) {
        let more = noise(rng, 2);
        if rng.one_in(2) { bytes.extend(more) } else { bytes.splice(0..0, more).for_each(drop) }
    }
    bytes
}
