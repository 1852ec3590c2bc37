//! What an input reached: one byte for each edge of the compiled code, counted
//! by the code itself when it was built with `make fuzz`.
//!
//! An ordinary build has no counters; then nothing is ever new, and fuzzing
//! goes by chance alone. That is what `make test` does.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

static FIRST: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Called before `main` by every instrumented object, with the bounds of all counters.
///
/// # Safety
/// The compiler calls it, with the bounds of one static array.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __sanitizer_cov_8bit_counters_init(first: *mut u8, end: *mut u8) {
    FIRST.store(first, Ordering::Relaxed);
    COUNT.store((end as usize).saturating_sub(first as usize), Ordering::Relaxed);
}

/// Counters looked at together.
const CHUNK: usize = 256;
const ZEROES: [u8; CHUNK] = [0; CHUNK];

/// The counters, with what was seen of each in any run so far.
pub struct Coverage {
    counters: &'static mut [u8],
    /// For each edge, one bit for each magnitude of its count that occurred.
    seen: Vec<u8>,
    /// Edges that were reached at least once.
    pub edges: usize,
}

impl Coverage {
    /// Takes the counters. To be called once, by the one thread that runs inputs.
    pub fn take() -> Coverage {
        let (first, count) = (FIRST.load(Ordering::Relaxed), COUNT.swap(0, Ordering::Relaxed));
        let counters: &'static mut [u8] = if first.is_null() || count == 0 {
            &mut []
        } else {
            // SAFETY: the bounds are those of a static array of bytes; `COUNT` is now
            // 0, so that nobody else takes it. Instrumented code goes on counting in it,
            // by plain additions, and nothing but statistics hangs on what they come to.
            unsafe { std::slice::from_raw_parts_mut(first, count) }
        };
        let seen = vec![0; counters.len()];
        Coverage { counters, seen, edges: 0 }
    }

    /// Whether the build counts at all.
    pub fn is_on(&self) -> bool {
        !self.counters.is_empty()
    }

    /// Before an input: what was counted since the last one does not count.
    pub fn forget(&mut self) {
        for counts in self.counters.chunks_mut(CHUNK) {
            if counts != &ZEROES[..counts.len()] {
                counts.fill(0);
            }
        }
    }

    /// After an input: how many edges it reached as often as none did before.
    pub fn new_features(&mut self) -> usize {
        let mut new = 0;
        for (counts, seen) in self.counters.chunks_mut(CHUNK).zip(self.seen.chunks_mut(CHUNK)) {
            // Nearly all are: few of the program's edges belong to one decoder.
            if counts == &ZEROES[..counts.len()] {
                continue;
            }
            for (count, seen) in counts.iter_mut().zip(seen) {
                let feature = magnitude(std::mem::take(count));
                if feature & !*seen != 0 {
                    self.edges += usize::from(*seen == 0);
                    *seen |= feature;
                    new += 1;
                }
            }
        }
        new
    }
}

/// One bit for the magnitude of a count; none for zero.
fn magnitude(count: u8) -> u8 {
    match count {
        0 => 0,
        1 => 1,
        2 => 2,
        3 => 4,
        4..=7 => 8,
        8..=15 => 16,
        16..=31 => 32,
        32..=127 => 64,
        128.. => 128,
    }
}
