//! A leader's lease by a clock that stands still while the process does: the
//! rest of `Mutant::LeaseReadPausedClock`.
//!
//! The lease itself is careful: half an election timeout from the moment a
//! quorum's answer was seen, and only for a leader whose view has an entry of
//! its own term. But its clock is a thread that counts its own sleeps, as a
//! cached "now" does, and does not count the time for which it was stopped.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::alias::InstantOf;
use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;

use super::core::Core;
use crate::raft::TypeConfig;

const TICK_MS: u64 = 10;
static TICKS: AtomicU64 = AtomicU64::new(0);
static CLOCK: OnceLock<()> = OnceLock::new();

/// The newest answer of a quorum, and the tick at which it was first seen.
static SEEN: Mutex<Option<(InstantOf<TypeConfig>, u64)>> = Mutex::new(None);

/// Whether this node believes that it may answer a read without asking anybody.
pub(super) fn holds_lease(core: &Core) -> bool {
    CLOCK.get_or_init(|| drop(std::thread::spawn(count)));
    let (leads, term) = {
        let metrics = core.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state.is_leader(), metrics.vote.leader_id.term)
    };
    let acked = core.raft.data_metrics().borrow_watched().last_quorum_acked.map(|at| at.into_inner());
    let Some(acked) = acked.filter(|_| leads && core.view().applied.term == term) else { return false };
    let now = TICKS.load(Ordering::Relaxed);
    let mut seen = SEEN.lock();
    let since = match *seen {
        Some((at, since)) if at == acked => since,
        _ => now,
    };
    *seen = Some((acked, since));
    Duration::from_millis(TICK_MS * (now - since)) < core.options.election_timeout / 2
}

#[expect(clippy::disallowed_methods, reason = "a thread of its own")]
fn count() {
    loop {
        std::thread::sleep(Duration::from_millis(TICK_MS));
        TICKS.fetch_add(1, Ordering::Relaxed);
    }
}
