//! A removed member serves no linearizable read.

use super::history::History;
use super::verdict::{Held, Verdict};

/// Judges linearizable reads asked of a host between its removal (`Call::MemberRemove`, acknowledged) and its
/// next addition (`Call::MemberAdd`, invoked).
pub fn check(history: &History) -> Vec<Verdict> {
    let _ = (history);
    vec![Verdict::new("not judged", 0, Held::Undecided("not judged".into()))]
}
