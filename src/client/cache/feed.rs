//! A cache's tasks: one follows each watched prefix, one asks the cluster now and
//! then for its revision and keeps the books.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::DiskState;
use super::core::Core;
use super::record::Moment;
use super::scope::Scope;
use crate::client::MirrorUpdate;
use crate::telemetry;

/// How long one question for the revision may take.
const VERIFY_LIMIT: Duration = Duration::from_secs(5);
/// The least time between two questions, however many bounded reads ask for one.
const VERIFY_GAP: Duration = Duration::from_millis(10);
/// How often the time of the last proof is written down for the next start.
const MARK_EVERY: Moment = 30_000_000;
/// Waits between questions of how far a watch is, as long as nothing comes. A
/// question interrupts a snapshot that is being read, so they become rare.
const ASK_WAIT_MIN: Moment = 50_000;
const ASK_WAIT_MAX: Moment = 120_000_000;
/// The wait after a watch was refused.
const REFUSED_WAIT: Duration = Duration::from_secs(1);
/// Entries that move to another policy before other work gets its turn.
const MOVE_AT_ONCE: usize = 128;

/// Follows one prefix for as long as the cache lives.
pub(super) async fn follow(core: Arc<Core>, scope: Arc<Scope>) {
    // Nothing is taken in before it is clear that this is the cluster.
    let mut state = core.state.subscribe();
    if state.wait_for(|state| state.online).await.is_err() {
        return;
    }
    let mut feed = core.source.follow(scope.range.clone(), scope.resume());
    let (mut ask_at, mut ask_wait) = (Moment::MIN, ASK_WAIT_MIN);
    loop {
        if let Some(disk) = &core.disk {
            disk.ready().await;
        }
        tokio::select! {
            update = feed.next() => match update {
                Ok(update) => {
                    (ask_at, ask_wait) = (Moment::MIN, ASK_WAIT_MIN);
                    if let MirrorUpdate::Snapshot { revision, kvs } = &update {
                        tracing::info!(prefix = ?scope.prefix, %revision, keys = kvs.len(), "the cache has read a prefix whole");
                        metrics::counter!(telemetry::CLIENT_CACHE_RESYNCS).increment(1);
                    }
                    core.apply(&scope, &update).await;
                    core.tell_state();
                }
                Err(error) => {
                    tracing::warn!(prefix = ?scope.prefix, %error, "the cache cannot follow a prefix");
                    tokio::time::sleep(REFUSED_WAIT).await;
                }
            },
            () = scope.wanted.notified() => {
                let now = core.now();
                if scope.revision().0 > 0 && now >= ask_at {
                    feed.request_progress();
                    (ask_at, ask_wait) = (now + ask_wait, (2 * ask_wait).min(ASK_WAIT_MAX));
                }
            }
        }
    }
}

/// Verifies, and keeps the books.
pub(super) async fn verify(core: Arc<Core>) {
    let mut marked = core.now();
    let mut said = Said::default();
    loop {
        let proven = core.verify(VERIFY_LIMIT).await;
        let outcome = if proven { "proven" } else { "failed" };
        metrics::counter!(telemetry::CLIENT_CACHE_VERIFICATIONS, "outcome" => outcome).increment(1);
        if core.now() - marked >= MARK_EVERY && proven {
            marked = core.now();
            core.mark_proofs();
        }
        said.publish(&core);
        tokio::time::sleep(VERIFY_GAP).await;
        // While the cluster is away nobody can ask it more often than this.
        let asked = async {
            match proven {
                true => core.verify_now.notified().await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(core.options.verify_interval) => {}
            () = asked => {}
        }
    }
}

/// Moves the content whenever the policy has changed.
pub(super) async fn move_over(core: Arc<Core>) {
    loop {
        core.move_over.notified().await;
        while core.memory.move_over(MOVE_AT_ONCE) {
            tokio::task::yield_now().await;
        }
    }
}

/// What was already published of the counters. Several caches of a process add up.
#[derive(Default)]
struct Said([u64; 9]);

impl Said {
    fn publish(&mut self, core: &Core) {
        let counts = &core.counts;
        let hits = |level: &'static str| metrics::counter!(telemetry::CLIENT_CACHE_HITS, "level" => level);
        let counters = [
            (&counts.l1_hits, hits("l1")),
            (&counts.l2_hits, hits("l2")),
            (&counts.l3_hits, hits("l3")),
            (&counts.misses, metrics::counter!(telemetry::CLIENT_CACHE_MISSES)),
            (&counts.promotions, metrics::counter!(telemetry::CLIENT_CACHE_PROMOTIONS)),
            (&counts.demotions, metrics::counter!(telemetry::CLIENT_CACHE_DEMOTIONS)),
            (&counts.evictions, metrics::counter!(telemetry::CLIENT_CACHE_EVICTIONS)),
            (&counts.checksum_failures, metrics::counter!(telemetry::CLIENT_CACHE_CHECKSUM_FAILURES)),
            (&counts.policy_switches, metrics::counter!(telemetry::CLIENT_CACHE_POLICY_SWITCHES)),
        ];
        for ((count, counter), said) in counters.into_iter().zip(&mut self.0) {
            let now = count.load(Ordering::Relaxed);
            counter.increment(now - *said);
            *said = now;
        }
        let (_, l1, l2) = core.memory.usage();
        let l3 = core.disk.as_ref().map_or(0, |disk| disk.bytes());
        for (level, bytes) in [("l1", l1), ("l2", l2), ("l3", l3)] {
            metrics::gauge!(telemetry::CLIENT_CACHE_BYTES, "level" => level).set(bytes as f64);
        }
        let state = core.state.borrow();
        metrics::gauge!(telemetry::CLIENT_CACHE_LIVE).set(f64::from(u8::from(state.is_live())));
        let failed = matches!(state.disk, DiskState::Failed { .. });
        metrics::gauge!(telemetry::CLIENT_CACHE_DISK_FAILED).set(f64::from(u8::from(failed)));
    }
}
