//! All chance of a run, drawn from its seed: the harness's own numbers, and
//! what the program itself asks the operating system for.
//!
//! The second is what makes a seed repeatable. Election timeouts, the order in
//! which `select!` looks at its branches and the order of hash maps come from
//! `getrandom`; this binary defines that function itself, so they come from the
//! seed. For the same reason one process runs one seed: what a thread has drawn
//! before would show in the next run.

use std::sync::atomic::{AtomicU64, Ordering};

/// A stream of numbers. Small and quick; nothing here needs more.
#[derive(Clone, Debug)]
pub struct Chance {
    state: u64,
}

/// One step of SplitMix64: the state's increment is a constant, so that streams
/// with different beginnings stay apart.
fn mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Chance {
    /// The stream of a seed for one purpose: what one part draws does not shift
    /// what another one gets.
    pub fn new(seed: u64, purpose: &str) -> Chance {
        let mut state = mix(seed.wrapping_add(STEP));
        for byte in purpose.bytes() {
            state = mix(state ^ u64::from(byte)).wrapping_add(STEP);
        }
        Chance { state }
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// Below `end`, which is above zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// From `low` to `high`, both possible.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True so many times of a thousand.
    pub fn permille(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// Brings them into another order.
    pub fn shuffle<T>(&mut self, of: &mut [T]) {
        for place in (1..of.len()).rev() {
            of.swap(place, self.below(place as u64 + 1) as usize);
        }
    }
}

static SYSTEM: AtomicU64 = AtomicU64::new(0);
static ASKED: AtomicU64 = AtomicU64::new(0);

/// From here on the system's random numbers are those of `seed`. To be called
/// before anything draws.
pub fn seed_system(seed: u64) {
    SYSTEM.store(mix(seed ^ 0x5eed), Ordering::SeqCst);
}

/// How often the system was asked for random numbers.
pub fn asked() -> u64 {
    ASKED.load(Ordering::SeqCst)
}

/// Stands in the place of the C library's function of this name.
///
/// # Safety
/// `buffer` must be writable for `length` bytes, as for the function it replaces.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    ASKED.fetch_add(1, Ordering::SeqCst);
    let mut at = 0;
    while at < length {
        let number = mix(SYSTEM.fetch_add(STEP, Ordering::SeqCst)).to_le_bytes();
        let count = number.len().min(length - at);
        // SAFETY: `at + count <= length`, and the caller vouches for the buffer.
        unsafe { std::ptr::copy_nonoverlapping(number.as_ptr(), buffer.add(at), count) };
        at += count;
    }
    length as isize
}
