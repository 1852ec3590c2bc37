//! Deletes in the background what compaction made unreadable, in small steps
//! with pauses between, so that nobody else waits for the disk.

use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::start::Ears;
use super::tasks::Tasks;
use crate::env::off_thread;
use crate::mvcc::{SweepProgress, Walked, sweep};
use crate::raft::LiveState;
use crate::storage::StorageError;
use crate::types::{Revision, Space};

/// Changes looked at in one step, which is one write that others wait for.
const STEP_CHANGES: usize = 500;
/// The least pause between two steps,
const STEP_PAUSE_MIN: Duration = Duration::from_millis(10);
/// and how many times as long as the step before it: sweeping takes a tenth of a core and of the disk.
const STEP_PAUSE_FACTOR: u32 = 9;

/// Starts the task.
pub(super) fn start(core: &Arc<Core>, live: &LiveState, ears: Arc<Ears>, tasks: &Tasks) {
    let (core, live) = (core.clone(), live.clone());
    tasks.start("sweep", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = run(&core, &live, &ears) => {} }
    });
}

async fn run(core: &Core, live: &LiveState, ears: &Ears) {
    let mut spaces = [Space::User, Space::System].map(|space| (space, Walked::default()));
    loop {
        // Also at the start: a sweep may have been cut off by a crash.
        for (space, walked) in &mut spaces {
            let space = *space;
            let mark = core.view().compacted(space);
            if mark.0 > 0 && !sweep_to(core, live, space, mark, walked).await {
                return;
            }
            core.swept.send_modify(|swept| *swept.of(space) = mark);
        }
        ears.compacted.notified().await;
    }
}

/// False when the node has to stop.
async fn sweep_to(core: &Core, live: &LiveState, space: Space, mark: Revision, walked: &mut Walked) -> bool {
    loop {
        let db = live.db();
        let started = core.env.monotonic();
        let mut taken = std::mem::take(walked);
        let step = off_thread(&core.env, move || {
            let done = sweep(&db, space, mark, STEP_CHANGES, &mut taken);
            (done, taken)
        });
        let done: Result<SweepProgress, StorageError> = match step.await {
            Ok((done, taken)) => {
                *walked = taken;
                done
            }
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
                tokio::time::sleep((took * STEP_PAUSE_FACTOR).max(STEP_PAUSE_MIN)).await;
            }
            Err(error) => {
                core.fail(error);
                return false;
            }
        }
    }
}
