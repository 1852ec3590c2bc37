//! What the node does about its store without being asked: forgets history by
//! rule, watches its quota and its disk, keeps the log within its bytes, and
//! samples what the metrics tell.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;

use super::core::Core;
use super::membership::Health;
use super::options::AutoCompaction;
use super::propose::Proposer;
use super::tasks::Tasks;
use super::{MemberView, ProposeContext};
use crate::storage::CacheCounts;
use crate::telemetry;
use crate::types::{Alarm, AlarmAction, AlarmKind, MemberKind, Operation, Revision, Space};

/// How often space is looked at.
const SPACE_INTERVAL: Duration = Duration::from_millis(500);
/// How often the rule by revisions is applied, as etcd's.
const REVISIONS_INTERVAL: Duration = Duration::from_secs(300);
/// Samples of the revision in one retention period.
const PERIODIC_SAMPLES: u32 = 10;
/// How often the metrics are sampled.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Entries that stay when the log is cut for its bytes, for followers a moment behind.
const LOG_TAIL_ENTRIES: u64 = 10_000;

/// What only the start knows how to measure.
pub(super) trait Gauges: Send + Sync + 'static {
    /// Bytes of the store.
    fn store_bytes(&self) -> u64;
    /// Bytes in use of them.
    fn live_bytes(&self) -> u64;
    /// How the cache of the store's blocks does.
    fn cache(&self) -> CacheCounts;
    /// Bytes of the log.
    fn log_bytes(&self) -> u64;
    /// Sets space aside again for the day when the disk is full.
    fn space_is_back(&self);
}

/// Starts the tasks.
pub(super) fn start(core: &Arc<Core>, proposer: &Arc<Proposer>, gauges: &Arc<dyn Gauges>, tasks: &Tasks) {
    if core.options.auto_compaction != AutoCompaction::Off {
        let (own, proposer) = (core.clone(), proposer.clone());
        tasks.start("auto-compaction", |stop| async move {
            tokio::select! { () = stop.cancelled() => {}, () = compact(&own, &proposer) => {} }
        });
    }
    let (own, proposer, measured) = (core.clone(), proposer.clone(), gauges.clone());
    tasks.start("space", |stop| async move {
        let mut space = SpaceWatch::new(own, proposer, measured);
        tokio::select! { () = stop.cancelled() => {}, () = space.run() => {} }
    });
    let (own, measured) = (core.clone(), gauges.clone());
    tasks.start("log-retention", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = cut_log(&own, measured.as_ref()) => {} }
    });
    let (own, measured) = (core.clone(), gauges.clone());
    tasks.start("metrics", |stop| async move {
        tokio::select! { () = stop.cancelled() => {}, () = sample(&own, measured.as_ref()) => {} }
    });
}

/// Remembers the revision at each tick of the monotonic clock, so that a jump
/// of the wall clock forgets nothing. Every node remembers, so that a new
/// leader need not begin anew.
#[derive(Debug)]
struct Samples {
    retention: Duration,
    taken: VecDeque<(Duration, Revision)>,
}

impl Samples {
    fn new(retention: Duration) -> Samples {
        Samples { retention, taken: VecDeque::new() }
    }

    fn interval(&self) -> Duration {
        (self.retention / PERIODIC_SAMPLES).clamp(Duration::from_millis(100), Duration::from_secs(3600))
    }

    /// Takes a sample; the newest revision that is at least one retention old.
    fn take(&mut self, now: Duration, revision: Revision) -> Option<Revision> {
        self.taken.push_back((now, revision));
        let old = |(at, _): &(Duration, Revision)| now.saturating_sub(*at) >= self.retention;
        let mut found = None;
        while self.taken.front().is_some_and(old) {
            found = self.taken.pop_front().map(|(_, revision)| revision);
        }
        if let Some(revision) = found {
            // Kept, in case the proposal does not go through.
            self.taken.push_front((now.saturating_sub(self.retention), revision));
        }
        found
    }
}

async fn compact(core: &Core, proposer: &Proposer) {
    let mut samples = match core.options.auto_compaction {
        AutoCompaction::Periodic(retention) => Some(Samples::new(retention)),
        AutoCompaction::Off | AutoCompaction::Revisions(_) => None,
    };
    loop {
        tokio::time::sleep(samples.as_ref().map_or(REVISIONS_INTERVAL, Samples::interval)).await;
        let view = core.view();
        let (newest, compacted) = (view.revision, view.compacted_user);
        drop(view);
        let target = match (&mut samples, core.options.auto_compaction) {
            (Some(samples), _) => samples.take(core.env.monotonic(), newest),
            (None, AutoCompaction::Revisions(kept)) => {
                Some(Revision(newest.0.saturating_sub(i64::try_from(kept).unwrap_or(i64::MAX))))
            }
            (None, _) => None,
        };
        let Some(revision) = target.filter(|target| *target > compacted && target.0 > 0) else { continue };
        if !core.leadership().here {
            continue;
        }
        tracing::info!(%revision, "forgetting history by rule");
        if let Err(error) = proposer.propose_here(Operation::Compact { space: Space::User, revision }).await {
            tracing::warn!(%error, "could not compact; it is tried again");
        }
    }
}

/// Raises this member's alarm when the store is over its quota or the disk
/// under its reserve. The quota's alarm waits for an operator, as etcd's; the
/// disk's clears by itself once space is back.
struct SpaceWatch {
    core: Arc<Core>,
    proposer: Arc<Proposer>,
    gauges: Arc<dyn Gauges>,
    /// The alarm that stands was raised for the disk, not for the quota.
    for_disk: bool,
}

/// What to do about the alarm.
#[derive(Debug, PartialEq, Eq)]
enum AlarmMove {
    Raise,
    Clear,
    Leave,
}

impl SpaceWatch {
    fn new(core: Arc<Core>, proposer: Arc<Proposer>, gauges: Arc<dyn Gauges>) -> SpaceWatch {
        // The reason outlives a restart in a file of no content: on a full disk
        // an empty file still has room.
        let for_disk = core.options.data_dir.join(DISK_ALARM_FILE).exists();
        SpaceWatch { core, proposer, gauges, for_disk }
    }

    async fn run(&mut self) {
        loop {
            tokio::time::sleep(SPACE_INTERVAL).await;
            let options = &self.core.options;
            let used = self.gauges.store_bytes();
            let free = free_bytes(&options.data_dir);
            let alarm = Alarm { member: self.core.id, kind: AlarmKind::NoSpace };
            let standing = self.core.view().alarms.contains(&alarm);
            let over_quota = options.quota_bytes > 0 && used > options.quota_bytes;
            // Twice the reserve must be free before the alarm clears, so that
            // it does not flutter.
            let reserve = options.disk_reserve_bytes;
            let disk_low = free.is_some_and(|free| free < reserve);
            let disk_well = free.is_some_and(|free| free >= reserve.saturating_mul(2));
            match next_move(standing, self.for_disk, over_quota, disk_low, disk_well) {
                AlarmMove::Leave => {}
                AlarmMove::Raise => {
                    tracing::error!(used, ?free, over_quota, disk_low, "out of space; writes are refused");
                    self.remember(disk_low && !over_quota);
                    self.propose(AlarmAction::Activate, alarm).await;
                }
                AlarmMove::Clear => {
                    tracing::info!(?free, "there is space again; writes are taken");
                    self.gauges.space_is_back();
                    if self.propose(AlarmAction::Deactivate, alarm).await {
                        self.remember(false);
                    }
                }
            }
        }
    }

    async fn propose(&self, action: AlarmAction, alarm: Alarm) -> bool {
        let operation = Operation::Alarm { action, alarm };
        match self.proposer.propose(operation, ProposeContext::default()).await {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%error, "could not change the alarm; it is tried again");
                false
            }
        }
    }

    fn remember(&mut self, for_disk: bool) {
        self.for_disk = for_disk;
        let path = self.core.options.data_dir.join(DISK_ALARM_FILE);
        let kept = if for_disk { std::fs::write(&path, b"") } else { std::fs::remove_file(&path) };
        if let Err(error) = kept
            && error.kind() != std::io::ErrorKind::NotFound
        {
            // Only the automatic clearing after a restart depends on it.
            tracing::warn!(%error, path = %path.display(), "cannot keep the alarm's reason");
        }
    }
}

/// Says that the standing alarm was raised for the disk.
const DISK_ALARM_FILE: &str = "DISK-ALARM";

fn next_move(standing: bool, for_disk: bool, over_quota: bool, disk_low: bool, disk_well: bool) -> AlarmMove {
    match (standing, over_quota || disk_low) {
        (false, true) => AlarmMove::Raise,
        (true, false) if for_disk && disk_well => AlarmMove::Clear,
        _ => AlarmMove::Leave,
    }
}

/// Free bytes of the file system that `path` is on, for others than root.
fn free_bytes(path: &Path) -> Option<u64> {
    let stats = rustix::fs::statvfs(path).ok()?;
    Some(stats.f_bavail.saturating_mul(stats.f_frsize))
}

/// A lagging follower that stays connected holds the log back; beyond its bytes
/// a snapshot is made and the log is cut all the same.
async fn cut_log(core: &Core, gauges: &dyn Gauges) {
    loop {
        tokio::time::sleep(SAMPLE_INTERVAL * 5).await;
        if gauges.log_bytes() <= core.options.log_retained_bytes {
            continue;
        }
        let (snapshot, applied, purged) = {
            let metrics = core.raft.metrics();
            let metrics = metrics.borrow_watched();
            let index = |id: &Option<crate::raft::LogId>| id.as_ref().map_or(0, |id| id.index);
            (index(&metrics.snapshot), index(&metrics.last_applied), index(&metrics.purged))
        };
        let upto = snapshot.min(applied.saturating_sub(LOG_TAIL_ENTRIES));
        let trigger = core.raft.trigger();
        let triggered = if upto > purged {
            tracing::info!(upto, "the log is over its bytes and is cut");
            trigger.purge_log(upto).await
        } else {
            trigger.snapshot().await
        };
        if let Err(fatal) = triggered {
            core.fail(fatal);
            return;
        }
    }
}

async fn sample(core: &Core, gauges: &dyn Gauges) {
    loop {
        tokio::time::sleep(SAMPLE_INTERVAL).await;
        let view = core.view();
        let leadership = core.leadership();
        metrics::gauge!(telemetry::REVISION).set(view.revision.0 as f64);
        metrics::gauge!(telemetry::STORE_SIZE_BYTES).set(gauges.store_bytes() as f64);
        metrics::gauge!(telemetry::COMPACTED_REVISION).set(view.compacted_user.0 as f64);
        metrics::gauge!(telemetry::STORE_LIVE_BYTES).set(gauges.live_bytes() as f64);
        metrics::gauge!(telemetry::STORE_QUOTA_BYTES).set(core.options.quota_bytes as f64);
        if let Some(free) = free_bytes(&core.options.data_dir) {
            metrics::gauge!(telemetry::DISK_FREE_BYTES).set(free as f64);
        }
        metrics::gauge!(telemetry::LOG_SIZE_BYTES).set(gauges.log_bytes() as f64);
        let cache = gauges.cache();
        metrics::counter!(telemetry::CACHE_HITS).absolute(cache.hits);
        metrics::counter!(telemetry::CACHE_MISSES).absolute(cache.misses);
        metrics::gauge!(telemetry::CACHE_BYTES).set(cache.size_bytes as f64);
        metrics::gauge!(telemetry::APPLIED_INDEX).set(view.applied.index as f64);
        metrics::gauge!(telemetry::TERM).set(leadership.term as f64);
        metrics::gauge!(telemetry::IS_LEADER).set(f64::from(u8::from(leadership.here)));
        metrics::gauge!(telemetry::HAS_LEADER).set(f64::from(u8::from(leadership.leader != 0)));
        metrics::gauge!(telemetry::ALARMS).set(view.alarms.len() as f64);
        sample_members(core);
        let (first, last, committed) = {
            let metrics = core.raft.metrics();
            let metrics = metrics.borrow_watched();
            let index = |id: &Option<crate::raft::LogId>| id.as_ref().map_or(0, |id| id.index);
            (index(&metrics.purged) + 1, metrics.last_log_index.unwrap_or(0), index(&metrics.local_committed))
        };
        metrics::gauge!(telemetry::LOG_FIRST_INDEX).set(first as f64);
        metrics::gauge!(telemetry::LOG_LAST_INDEX).set(last as f64);
        metrics::gauge!(telemetry::COMMITTED_INDEX).set(committed as f64);
    }
}

fn sample_members(core: &Core) {
    let roster = core.roster();
    for (kind, voters) in
        [(MemberKind::Voter, true), (MemberKind::Learner, false), (MemberKind::Observer, false)]
    {
        let is = |view: &&MemberView| match kind {
            MemberKind::Observer => view.member.kind == kind,
            _ => view.is_voter == voters && view.member.kind != MemberKind::Observer,
        };
        let count = roster.members.values().filter(is).count();
        metrics::gauge!(telemetry::MEMBERS, "kind" => kind.to_string()).set(count as f64);
    }
    if core.leadership().here {
        for (id, lag) in Health::of(core).lag {
            metrics::gauge!(telemetry::PEER_LAG_ENTRIES, "peer" => format!("{id:x}")).set(lag as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_forgotten_one_retention_after_it_was_seen() {
        let at = Duration::from_secs;
        let mut samples = Samples::new(at(100));
        assert_eq!(samples.interval(), at(10));
        assert_eq!(samples.take(at(0), Revision(5)), None);
        assert_eq!(samples.take(at(50), Revision(9)), None);
        assert_eq!(samples.take(at(100), Revision(20)), Some(Revision(5)));
        assert_eq!(samples.take(at(110), Revision(21)), Some(Revision(5)), "kept until it goes through");
        assert_eq!(samples.take(at(150), Revision(30)), Some(Revision(9)));
    }

    #[test]
    fn the_quota_alarm_waits_for_an_operator_and_the_disks_does_not() {
        assert_eq!(next_move(false, false, true, false, true), AlarmMove::Raise);
        assert_eq!(next_move(true, false, false, false, true), AlarmMove::Leave);
        assert_eq!(next_move(true, true, false, false, true), AlarmMove::Clear);
        assert_eq!(next_move(true, true, false, false, false), AlarmMove::Leave, "not yet twice the reserve");
        assert_eq!(next_move(true, true, true, false, true), AlarmMove::Leave, "the quota is over now");
    }
}
