//! The one way values become bytes: `[format][crc32c of the rest, little endian][bincode]`.
//!
//! Formats are never reused, and golden bytes below hold each one still. The
//! encoding is bincode 2's standard configuration with a limit of 16 MiB.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StorageError;

/// bincode's standard configuration, bounded so that a damaged length cannot
/// make a reader allocate without end.
const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<{ 16 << 20 }>,
> = bincode::config::standard().with_limit::<{ 16 << 20 }>();

/// The first byte of every value written today.
const FORMAT: u8 = 1;
/// Bytes before the encoded value.
const HEADER_BYTES: usize = 5;

/// Encodes `value` into its envelope.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FORMAT, 0, 0, 0, 0];
    bincode::serde::encode_into_std_write(value, &mut bytes, CONFIG)
        .expect("our own types always encode: no field is skipped, untagged or of unknown length");
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..]);
    bytes[1..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
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
    let (value, consumed) =
        bincode::serde::decode_from_slice(body, CONFIG).map_err(|error| corrupt(error.to_string()))?;
    if consumed != body.len() {
        return Err(corrupt(format!("{} bytes follow the value", body.len() - consumed)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::{Command, LeaseId, Operation, Put, Space};

    fn put() -> Command {
        Command::internal(Operation::Put(Put {
            space: Space::User,
            key: Bytes::from_static(b"k"),
            value: Bytes::from_static(b"v"),
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
