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
/// How long a sweep may take: compactions are minutes apart, and the next one should find this one done.
const SWEEP_TIME: Duration = Duration::from_secs(300);
/// The least rest between two steps.
const REST_MIN: Duration = Duration::from_millis(10);
/// And the longest, however long the step took.
const REST_MAX: Duration = Duration::from_secs(2);
/// A rest is so many times as long as the step before it: sweeping takes a twentieth of a core if that is
/// enough, and half of one if it has to.
const RESTS: std::ops::RangeInclusive<u32> = 1..=19;
/// The same while somebody waits for the sweep: a quarter of a core. Less disturbs writers as much, for longer.
const RESTS_AWAITED: u32 = 3;

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
    let begun = core.env.monotonic();
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
                let now = core.env.monotonic();
                let steps_left = (mark.0 - walked.reached().0) as u64 / STEP_CHANGES as u64 + 1;
                let time_left = SWEEP_TIME.saturating_sub(now.saturating_sub(begun));
                let took = now.saturating_sub(started);
                let rest = match core.swept.receiver_count() {
                    0 => rest(took, time_left, steps_left),
                    _ => (took * RESTS_AWAITED).min(REST_MAX),
                };
                tokio::time::sleep(rest).await;
            }
            Err(error) => {
                core.fail(error);
                return false;
            }
        }
    }
}

/// The rest after a step that took so long, with so much time for the steps that are left.
fn rest(took: Duration, time_left: Duration, steps_left: u64) -> Duration {
    let share = time_left / u32::try_from(steps_left).unwrap_or(u32::MAX).max(1);
    let (least, most) = (took * *RESTS.start(), took * *RESTS.end());
    share.saturating_sub(took).clamp(least, most).clamp(REST_MIN, REST_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_rests_as_long_as_there_is_time_within_bounds() {
        let (step, all) = (Duration::from_millis(10), SWEEP_TIME);
        assert_eq!(rest(step, all, 100), step * 19, "little to do: a twentieth of a core");
        assert_eq!(rest(step, all, 6_000), Duration::from_millis(40), "50 ms for each step");
        assert_eq!(rest(step, all, 1_000_000), step, "more than there is time for: half a core");
        assert_eq!(rest(step, Duration::ZERO, 1), step, "late");
        assert_eq!(rest(Duration::ZERO, all, u64::MAX), REST_MIN);
        assert_eq!(rest(step * 1_000, all, 1), REST_MAX, "the machine stood still");
    }
}
