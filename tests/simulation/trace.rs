//! What happened in a run: a digest over everything, the lines for a reader,
//! the counters that say what the run reached, and the first claim that failed.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a run has to tell. Shared by everything in it.
pub struct Trace {
    print: bool,
    now_ms: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    digest: u64,
    lines: u64,
    coverage: BTreeMap<&'static str, u64>,
    violation: Option<String>,
}

impl Trace {
    /// Nothing has happened yet. With `print` every line goes to standard output.
    pub fn new(print: bool) -> Trace {
        Trace { print, now_ms: AtomicU64::new(0), inner: Mutex::default() }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Virtual milliseconds since the beginning.
    pub fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    /// Moves the clock of the lines.
    pub fn set_now_ms(&self, now_ms: u64) {
        self.now_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Something happened: it is part of the digest, and of what is printed.
    pub fn line(&self, line: impl std::fmt::Display) {
        let line = format!("{:>7} {line}", self.now_ms());
        let mut inner = self.inner();
        inner.lines += 1;
        let mut digest = inner.digest;
        for byte in line.bytes() {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        }
        inner.digest = digest;
        drop(inner);
        if self.print {
            println!("{line}");
        }
    }

    /// Part of the digest, but of no interest to a reader.
    pub fn fold(&self, number: u64) {
        let mut inner = self.inner();
        inner.digest = (inner.digest ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    /// Counts that the run reached something.
    pub fn count(&self, what: &'static str) {
        *self.inner().coverage.entry(what).or_default() += 1;
    }

    /// A claim does not hold. The first one stands.
    pub fn violation(&self, what: impl std::fmt::Display) {
        let what = format!("at {} ms: {what}", self.now_ms());
        self.line(format_args!("VIOLATION {what}"));
        self.inner().violation.get_or_insert(what);
    }

    /// The claim that failed, if one did.
    pub fn failed(&self) -> Option<String> {
        self.inner().violation.clone()
    }

    /// The digest and the number of lines.
    pub fn digest(&self) -> (u64, u64) {
        let inner = self.inner();
        (inner.digest, inner.lines)
    }

    /// What the run reached.
    pub fn coverage(&self) -> BTreeMap<&'static str, u64> {
        self.inner().coverage.clone()
    }
}
