//! Chance, and the damage done by it: a seeded generator, and the ways in which
//! an input becomes another.

/// SplitMix64: small, and the same on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 when `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    /// A length below two to the power of `bits`; short ones are as likely as long ones.
    fn length(&mut self, bits: usize) -> usize {
        let end = 1 << self.below(bits);
        self.below(end)
    }

    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A number as decoders meet them: mostly small, often at an edge.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0..=3 => self.next() % 8,
            4 => self.next() % 1000,
            5 => *self.pick(&EDGES),
            6 => (1u64 << self.below(64)).wrapping_sub(self.next() % 2),
            _ => self.next(),
        }
    }

    /// Few bytes, of few kinds, so that keys meet each other.
    pub fn bytes(&mut self) -> Vec<u8> {
        let longest = if self.one_in(40) { 600 } else { 6 };
        (0..self.below(longest + 1)).map(|_| *self.pick(b"abk/\0\x01\xff\x7fz")).collect()
    }

    pub fn text(&mut self) -> String {
        let longest = if self.one_in(40) { 300 } else { 8 };
        (0..self.below(longest + 1))
            .map(|_| *self.pick(&['a', 'b', '0', '-', '.', '/', ':', 'é', '\0', '"', '\u{1f600}']))
            .collect()
    }
}

const EDGES: [u64; 12] = [
    0,
    1,
    250,
    251,
    u8::MAX as u64,
    u16::MAX as u64,
    u32::MAX as u64,
    i32::MAX as u64,
    i64::MAX as u64,
    i64::MIN as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// Damages `input` in one to eight ways. `other` is another input to borrow from.
pub fn mutate(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8], bytes_max: usize) {
    for _ in 0..1 << rng.below(4) {
        once(rng, input, other);
        input.truncate(bytes_max);
    }
}

fn once(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8]) {
    let at = rng.below(input.len() + 1);
    if at == input.len() {
        match rng.below(3) {
            0 => input.extend_from_slice(&other[rng.below(other.len() + 1)..]),
            1 => input.push(rng.next() as u8),
            _ => {}
        }
        return;
    }
    let span = at..input.len().min(at + 1 + rng.length(9));
    match rng.below(12) {
        0 | 1 => input[at] ^= 1 << rng.below(8),
        2 => input[at] = rng.next() as u8,
        3 => input[at] = *rng.pick(&[0, 1, 2, 0x7f, 0x80, 250, 251, 252, 253, 254, 255]),
        4 => input[at] = input[at].wrapping_add(rng.below(9) as u8).wrapping_sub(4),
        5 => drop(input.drain(span)),
        6 => input.truncate(at),
        7 => {
            let copy = input[span].to_vec();
            let to = rng.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        8 => {
            let from = rng.below(other.len() + 1);
            let borrowed = &other[from..other.len().min(from + span.len())];
            input.splice(at..at, borrowed.iter().copied());
        }
        9 => {
            let from = rng.below(other.len() + 1);
            let borrowed = &other[from..other.len().min(from + span.len())];
            input.splice(span, borrowed.iter().copied());
        }
        10 => write_number(rng, input, at),
        // The same few bytes many times over: nesting, long lists.
        _ => {
            let copy = input[span].to_vec();
            let times = 1 + rng.length(10);
            input.splice(at..at, copy.repeat(times.min(1 + 65_536 / copy.len().max(1))));
        }
    }
}

/// Writes a number over what is there, in one of the encodings in use.
fn write_number(rng: &mut Rng, input: &mut Vec<u8>, at: usize) {
    let number = rng.number();
    let encoded = match rng.below(5) {
        0 => number.to_le_bytes().to_vec(),
        1 => number.to_be_bytes().to_vec(),
        2 => (number as u32).to_le_bytes().to_vec(),
        3 => varint(number),
        // As bincode writes one that does not fit a byte.
        _ => [&[253][..], &number.to_le_bytes()].concat(),
    };
    let end = input.len().min(at + if rng.one_in(2) { encoded.len() } else { 1 });
    input.splice(at..end, encoded);
}

/// As protobuf writes numbers.
pub fn varint(mut number: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
    out
}

/// A copy of `bytes` with one, two or three bits turned over: what CRC-32C
/// finds for certain, in records of any size met here.
pub fn flip_bits(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    let mut places: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(bytes.len() * 8)).collect();
    places.sort_unstable();
    places.dedup();
    for place in places {
        damaged[place / 8] ^= 1 << (place % 8);
    }
    damaged
}
