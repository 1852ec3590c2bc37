//! Which keys are loaded: numbers written out under a prefix, and which of them is next.

use bytes::Bytes;

/// A space of keys: `<prefix>00000042`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
    digits: usize,
    count: u64,
}

impl Keys {
    /// `count` keys below `prefix`, each `key_bytes` long with the prefix.
    ///
    /// # Errors
    /// In words, when there are none, or so many that their numbers do not fit.
    pub fn new(prefix: &str, key_bytes: usize, count: u64) -> Result<Keys, String> {
        let digits = key_bytes.saturating_sub(prefix.len());
        let needed = count.saturating_sub(1).checked_ilog10().map_or(1, |log| log as usize + 1);
        match (count, digits) {
            (0, _) => Err("there must be at least one key".to_owned()),
            (_, digits) if digits < needed => Err(format!(
                "{count} keys below `{prefix}` need keys of {} bytes, not {key_bytes}",
                prefix.len() + needed
            )),
            _ => Ok(Keys { prefix: prefix.to_owned(), digits, count }),
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The key of a number. Numbers past the end begin again.
    pub fn key(&self, number: u64) -> Bytes {
        Bytes::from(format!("{}{:0digits$}", self.prefix, number % self.count, digits = self.digits))
    }

    /// The key of a number that ends a range: past the last key it is behind all of them.
    pub fn end(&self, number: u64) -> Bytes {
        match number < self.count {
            true => self.key(number),
            false => self.range().1,
        }
    }

    /// The range that has them all.
    pub fn range(&self) -> (Bytes, Bytes) {
        let last = self.key(self.count - 1);
        (self.key(0), Bytes::from([&last[..], &[0]].concat()))
    }
}

/// Numbers in no order, the same ones in every run: two stores get the same load.
#[derive(Clone, Debug)]
pub(super) struct Draw(u64);

impl Draw {
    /// The numbers of one client.
    pub(super) fn new(client: u64) -> Draw {
        Draw(client.wrapping_mul(0xa076_1d64_78bd_642f))
    }

    /// The next one, below `end`, which is not 0. (SplitMix64; the bias of the remainder is far below
    /// what a load can show.)
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// A value of this many bytes that does not compress.
pub fn value(bytes: usize) -> Bytes {
    let mut draw = Draw::new(1);
    (0..bytes).map(|_| draw.below(256) as u8).collect()
}
