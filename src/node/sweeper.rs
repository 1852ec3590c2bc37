//! Deletes in the background what compaction made unreadable, in small steps
//! with pauses between, so that nobody else waits for the disk.

use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::start::Ears;
use super::tasks::Tasks;
use crate::env::off_thread;
use crate::mvcc::{SweepProgress, sweep};
use crate::raft::LiveState;
use crate::storage::StorageError;
use crate::types::{Revision, Space};

/// Changes looked at in one step.
const STEP_CHANGES: usize = 2_000;
/// The least pause between two steps; a step that took longer is followed by a
/// pause as long as itself, so that sweeping takes half the disk at most.
const STEP_PAUSE_MIN: Duration = Duration::from_millis(10);

/// Starts the task.
pub(super) fn start(core: &Arc<Core>, live: &LiveState, ears: Arc<Ears>, tasks: &Tasks) {
    let (core, live) = (core.clone(), live.clone());
    tasks.start("sweep", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = run(&core, &live, &ears) => {} }
    });
}

async fn run(core: &Core, live: &LiveState, ears: &Ears) {
    loop {
        // Also at the start: a sweep may have been cut off by a crash.
        for space in [Space::User, Space::System] {
            let mark = core.view().compacted(space);
            if mark.0 > 0 && !sweep_to(core, live, space, mark).await {
                return;
            }
            core.swept.send_modify(|swept| *swept.of(space) = mark);
        }
        ears.compacted.notified().await;
    }
}

/// False when the node has to stop.
async fn sweep_to(core: &Core, live: &LiveState, space: Space, mark: Revision) -> bool {
    loop {
        let db = live.db();
        let started = core.env.monotonic();
        let step = off_thread(&core.env, move || sweep(&db, space, mark, STEP_CHANGES));
        let done: Result<SweepProgress, StorageError> = match step.await {
            Ok(done) => done,
            // The runtime is going down.
            Err(error) if error.is_cancelled() => return false,
            Err(error) => {
                core.fail(error);
                return false;
            }
        };
        match done {
            Ok(SweepProgress::Done) => return true,
            Ok(SweepProgress::More) => {
                let took = core.env.monotonic().saturating_sub(started);
                tokio::time::sleep(took.max(STEP_PAUSE_MIN)).await;
            }
            Err(error) => {
                core.fail(error);
                return false;
            }
        }
    }
}
