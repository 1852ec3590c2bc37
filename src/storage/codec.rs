//! The one way values become bytes: `[format][crc32c of the rest, little endian][bincode]`.
//!
//! Formats are never reused, and golden bytes below hold each one still. The
//! encoding is bincode 2's standard configuration, with a limit that grows with
//! what there is to read.

use std::cell::Cell;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StorageError;

/// bincode's standard configuration, bounded so that a damaged length cannot
/// make a reader allocate without end. A number counts as wide as its type
/// against the bound and takes one byte when it is small, so what fits in an
/// eighth of the bound can always be read.
type Config<const LIMIT_BYTES: usize> = bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<LIMIT_BYTES>,
>;

/// The bound for almost all values.
const LIMIT_BYTES: usize = 16 << 20;
/// The bound for values beyond an eighth of the other.
const LIMIT_BYTES_LARGE: usize = 8 * VALUE_BYTES_MAX;
/// The largest value that can be read: what a message between members holds.
const VALUE_BYTES_MAX: usize = 64 << 20;

/// The first byte of every value written today.
const FORMAT: u8 = 1;
/// Bytes before the encoded value.
const HEADER_BYTES: usize = 5;
/// The most that a thread keeps for encoding the next value.
const SCRATCH_BYTES_MAX: usize = 64 << 10;

/// Encodes `value` into its envelope.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    thread_local! {
        /// Where values are laid out before their size is known: growing each one's own vector byte by
        /// byte costs several times the encoding itself.
        static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    let mut scratch = SCRATCH.take();
    scratch.clear();
    encode_into(value, &mut scratch);
    if scratch.len() > SCRATCH_BYTES_MAX {
        return scratch;
    }
    let bytes = scratch.as_slice().to_vec();
    SCRATCH.set(scratch);
    bytes
}

/// Encodes `value` into its envelope, after what `out` holds already.
pub fn encode_into<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[FORMAT, 0, 0, 0, 0]);
    bincode::serde::encode_into_writer(value, Appender(out), Config::<LIMIT_BYTES>::default())
        .expect("our own types always encode: no field is skipped, untagged or of unknown length");
    let (header, body) = out[start..].split_at_mut(HEADER_BYTES);
    header[1..].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Writes to the end of a vector.
struct Appender<'a>(&'a mut Vec<u8>);

impl bincode::enc::write::Writer for Appender<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Decodes what [`encode`] made. `what` names the record in the error.
///
/// # Errors
/// [`StorageError::Corrupt`] for an unknown format, a wrong checksum, or bytes
/// that are not exactly one value.
pub fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, StorageError> {
    let corrupt = |reason: String| StorageError::Corrupt { what: what.to_owned(), reason };
    if bytes.len() < HEADER_BYTES {
        return Err(corrupt(format!("{} bytes are too short for an envelope", bytes.len())));
    }
    let (header, body) = bytes.split_at(HEADER_BYTES);
    if header[0] != FORMAT {
        return Err(corrupt(format!("format {} is unknown to this version", header[0])));
    }
    let stored = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let computed = crc32c::crc32c(body);
    if stored != computed {
        return Err(corrupt(format!("checksum is {computed:08x}, the record says {stored:08x}")));
    }
    if body.len() > VALUE_BYTES_MAX {
        return Err(corrupt(format!("{} bytes are more than any value has", body.len())));
    }
    let decoded = if body.len() <= LIMIT_BYTES / 8 {
        bincode::serde::decode_from_slice(body, Config::<LIMIT_BYTES>::default())
    } else {
        bincode::serde::decode_from_slice(body, Config::<LIMIT_BYTES_LARGE>::default())
    };
    let (value, consumed) = decoded.map_err(|error| corrupt(error.to_string()))?;
    if consumed != body.len() {
        return Err(corrupt(format!("{} bytes follow the value", body.len() - consumed)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::{Command, LeaseId, Operation, Put, Space, Txn, TxnOp};

    fn put() -> Command {
        put_of(Bytes::from_static(b"v"))
    }

    fn put_of(value: Bytes) -> Command {
        Command::internal(Operation::Put(Put {
            space: Space::User,
            key: Bytes::from_static(b"k"),
            value,
            lease: LeaseId(0),
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        }))
    }

    #[test]
    fn the_format_of_a_command_holds_still() {
        let golden = [1, 251, 31, 41, 17, 0, 0, 0, 0, 1, 107, 1, 118, 0, 0, 0, 0];
        let encoded = encode(&put());
        assert_eq!(encoded[0], golden[0]);
        assert_eq!(encoded[HEADER_BYTES..], golden[HEADER_BYTES..]);
        assert_eq!(decode::<Command>("test", &encoded).unwrap(), put());
    }

    #[test]
    fn the_largest_request_that_can_be_allowed_is_read_again() {
        let command = put_of(vec![7; 63 << 20].into());
        assert!(decode::<Command>("test", &encode(&command)).unwrap() == command);
    }

    #[test]
    fn many_small_numbers_are_read_again() {
        let numbers: Vec<u64> = vec![1; 2_000_000];
        assert!(decode::<Vec<u64>>("test", &encode(&numbers)).unwrap() == numbers);
        let numbers: Vec<u64> = vec![1; 10_000_000];
        assert!(decode::<Vec<u64>>("test", &encode(&numbers)).unwrap() == numbers);
    }

    #[test]
    fn a_transaction_nests_as_deep_as_a_request_can_and_no_deeper() {
        let nested = |levels: usize| {
            // By hand, because building a deep one and letting it go takes a deep stack as well:
            // neither request id nor actor, a transaction, in each of which is one more.
            let body = [&[0, 0, 2][..], &[0, 1, 3].repeat(levels), &[0, 0, 0], &vec![0; levels]].concat();
            [&[FORMAT][..], &crc32c::crc32c(&body).to_le_bytes(), &body].concat()
        };
        let inner = Txn { success: vec![TxnOp::Txn(Txn::default())], ..Txn::default() };
        assert_eq!(nested(1), encode(&Command::internal(Operation::Txn(inner))));
        assert!(decode::<Command>("test", &nested(64)).is_ok());
        assert!(decode::<Command>("test", &nested(65)).is_err());
        // Without a bound this one would run out of stack.
        assert!(decode::<Command>("test", &nested(5_000)).is_err());
        assert!(decode::<Command>("test", &nested(64)).is_ok(), "an error leaves nothing behind");
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found() {
        let encoded = encode(&put());
        for bit in 0..encoded.len() * 8 {
            let mut damaged = encoded.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<Command>("test", &damaged).is_err(), "bit {bit} went unnoticed");
        }
        assert!(decode::<Command>("test", &encoded[..encoded.len() - 1]).is_err());
    }
}
