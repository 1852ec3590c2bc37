//! The numbers that consistent hashing stands on.
//!
//! Every client of every version, on every machine, computes the same ones, so
//! that all of them send a key to the same endpoint, whose caches are warm for
//! it. They must never change: the tests hold golden values.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// "mainstay" in ASCII. Fixed for ever.
const SEED: u64 = 0x6d61_696e_7374_6179;

/// The hash of a key, a prefix or an address.
pub fn of_bytes(bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, SEED)
}

/// The hash of a member's id.
pub fn of_member(id: u64) -> u64 {
    of_bytes(&id.to_be_bytes())
}

/// Mixes two hashes into one that tells nothing of either: how much a key likes
/// an endpoint, or where a point of an endpoint lies.
pub fn mixed(a: u64, b: u64) -> u64 {
    // Two rounds of multiply and shift (the finalizer of MurmurHash3).
    let mut hash = a ^ b.rotate_left(32);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first five are the C library's XXH3_64bits_withSeed, too.
    #[test]
    fn the_hashes_are_the_same_in_every_version() {
        assert_eq!(of_bytes(b""), 0x4054_7764_0d92_05c7);
        assert_eq!(of_bytes(b"a"), 0xeedd_5eed_1e39_2ecb);
        assert_eq!(of_bytes(b"svc/checkout/limits"), 0xd678_ab71_7e48_4e5b);
        assert_eq!(of_bytes("http://10.0.0.1:2379".as_bytes()), 0x456c_9688_48e4_0431);
        assert_eq!(of_member(0x8e9e_05c5_2164_694d), 0xb9c1_17a1_d478_e169);
        assert_eq!(mixed(of_bytes(b"a"), of_member(1)), 0x8948_dab4_b050_7146);
    }
}
