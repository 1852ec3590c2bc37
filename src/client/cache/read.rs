//! Reading through a cache: what the levels have when that is current enough, and
//! otherwise the cluster, asked once for all who miss the same key.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::core::{Core, Local, Look, micros};
use super::flights::{Place, landed};
use super::record::Moment;
use super::{Answer, Cache, CacheError, Consistency, Level, Unproven};
use crate::client::ClientError;
use crate::telemetry;
use crate::types::{KeyRange, KeyValue, Revision};

/// One age of so many goes into the metric.
const AGES_OF: u64 = 64;

impl Cache {
    /// Reads one key.
    ///
    /// # Errors
    /// Those of the cluster when it has to be asked and does not answer;
    /// [`CacheError::NotProven`] for a bounded read then, or when it may not be asked.
    pub async fn get(&self, key: impl AsRef<[u8]>, consistency: Consistency) -> Result<Answer, ClientError> {
        let (core, key) = (self.core(), key.as_ref());
        if core.closed.load(Ordering::Relaxed) {
            return Err(CacheError::Closed.into());
        }
        if consistency != Consistency::Strong {
            let now = core.now();
            if let Look::Hit(local) = core.look(key, now)
                && core.suffices(&local, consistency, now)
            {
                return Ok(core.answer(local, now));
            }
        }
        core.get_slowly(Bytes::copy_from_slice(key), consistency).await
    }

    /// All keys with a prefix as of one revision, from what is here; `None` unless
    /// they are of a watched prefix and all here.
    pub(in crate::client) async fn whole(&self, prefix: &[u8]) -> Option<(Revision, Vec<KeyValue>)> {
        let core = self.core();
        let scope = core.scope_of(prefix)?;
        let revision = scope.revision();
        let mut kvs = Vec::new();
        for key in scope.keys().into_iter().filter(|key| key.starts_with(prefix)) {
            kvs.push(core.find(&key).await?.kv?);
        }
        let is_whole = revision.0 > 0 && scope.revision() == revision;
        (is_whole && kvs.iter().all(|kv| kv.mod_revision <= revision)).then_some((revision, kvs))
    }

    /// Brings all keys with a prefix into the cache, those of a watched prefix from
    /// the disk as far as it has them; as much of it as fits stays. Gives how many.
    ///
    /// # Errors
    /// Those of the cluster, if it has to be asked and does not answer.
    pub async fn warm(&self, prefix: impl AsRef<[u8]>) -> Result<u64, ClientError> {
        let core = self.core();
        let prefix = Bytes::copy_from_slice(prefix.as_ref());
        if let Some(scope) = core.scope_of(&prefix)
            && scope.revision().0 > 0
        {
            let keys = scope.keys().into_iter().filter(|key| key.starts_with(&prefix));
            let mut warmed = 0;
            for key in keys {
                warmed += u64::from(self.get(&key, Consistency::Eventual).await?.kv.is_some());
            }
            return Ok(warmed);
        }
        let begun = core.now();
        // Also tells whether this is the right cluster.
        core.read(&Bytes::from_static(&[0]), true).await?;
        let range = match prefix.is_empty() {
            true => KeyRange::From(Bytes::from_static(&[0])),
            false => KeyRange::prefix(prefix),
        };
        let (revision, kvs) = core.source.scan(range).await?;
        let warmed = kvs.len() as u64;
        for kv in kvs {
            let key = Bytes::copy_from_slice(&kv.key);
            core.take_in(&key, Some(&kv), revision, begun).await;
        }
        Ok(warmed)
    }
}

impl Core {
    /// What is handed out for what a level had.
    fn answer(&self, local: Local, now: Moment) -> Answer {
        let stale = local.live.map_or_else(|| self.is_over(&local, now), |live| !live);
        let age = self.age(local.proved, now);
        if self.counts.answered(local.level).is_multiple_of(AGES_OF)
            && let Some(age) = age
        {
            metrics::histogram!(telemetry::CLIENT_CACHE_AGE_SECONDS).record(age.as_secs_f64());
        }
        Answer { kv: local.kv, revision: local.revision, age, level: local.level, stale }
    }

    fn age(&self, proved: Moment, now: Moment) -> Option<std::time::Duration> {
        let ago = u64::try_from(now.saturating_sub(proved)).unwrap_or(0);
        (proved != Moment::MIN).then(|| std::time::Duration::from_micros(ago))
    }

    async fn get_slowly(&self, key: Bytes, consistency: Consistency) -> Result<Answer, ClientError> {
        let bound = match consistency {
            Consistency::Strong => return self.read(&key, true).await,
            Consistency::Bounded(bound) => Some(bound),
            Consistency::Eventual => None,
        };
        let local = self.find(&key).await;
        let now = self.now();
        if let Some(local) = &local
            && (self.suffices(local, consistency, now) || self.is_all_there_is(consistency))
        {
            return Ok(self.answer(local.clone(), now));
        }
        let not_proven = |source| {
            let age = local.as_ref().and_then(|local| self.age(local.proved, now));
            bound.map(|bound| ClientError::from(CacheError::NotProven { bound, age, source }))
        };
        if bound.is_some() {
            // The next ones will not have to ask.
            self.verify_now.notify_one();
            if self.options.unproven == Unproven::Refuse
                && let Some(refusal) = not_proven(None)
            {
                return Err(refusal);
            }
        }
        match self.read_together(&key, consistency).await {
            Ok(answer) => Ok(answer),
            Err(error) => match (local.clone(), bound) {
                (Some(local), None) => Ok(self.answer(local, self.now())),
                _ if error.may_retry() => Err(not_proven(Some(Box::new(error.clone()))).unwrap_or(error)),
                _ => Err(error),
            },
        }
    }

    /// Whether nothing better than what is there can be expected of the cluster.
    fn is_all_there_is(&self, consistency: Consistency) -> bool {
        consistency == Consistency::Eventual && !self.online.load(Ordering::Acquire)
    }

    /// Asks the cluster, together with others who ask for the same key.
    async fn read_together(&self, key: &Bytes, consistency: Consistency) -> Result<Answer, ClientError> {
        let asked = self.now();
        let bound = match consistency {
            Consistency::Bounded(bound) => Some(micros(bound)),
            _ => None,
        };
        let suffices =
            |begun: Moment| bound.is_none_or(|bound| begun >= asked || self.now() - begun <= bound);
        loop {
            match self.flights.join(key, bound.is_some(), self.now()) {
                Place::Lead(lead) => {
                    let outcome = self.read(key, bound.is_some()).await;
                    lead.land(&outcome);
                    return outcome;
                }
                Place::Follow(begun, outcome) if suffices(begun) => match landed(outcome).await {
                    Some(outcome) if suffices(begun) => {
                        self.counts.answered(Level::Server);
                        return outcome;
                    }
                    // It took too long for this bound, or was given up.
                    _ => {}
                },
                Place::Follow(..) => return self.read(key, true).await,
            }
        }
    }

    /// Asks the cluster for one key and takes the answer in.
    async fn read(&self, key: &Bytes, linearizable: bool) -> Result<Answer, ClientError> {
        self.counts.answered(Level::Server);
        let mut linearizable = linearizable;
        loop {
            let floor = self.floor.load(Ordering::Acquire);
            let begun = self.now();
            let seen = self.source.read(key.clone(), linearizable).await?;
            if !self.is_own(seen.cluster_id) {
                return Err(self.foreign(seen.cluster_id).into());
            }
            // A member that is behind what was seen already: its answer could be older
            // than one that was handed out.
            if !linearizable && seen.revision.0 < floor {
                linearizable = true;
                continue;
            }
            let proved = self.proved(seen.revision, if linearizable { begun } else { Moment::MIN });
            self.take_in(key, seen.kv.as_ref(), seen.revision, proved).await;
            let age = self.age(proved, self.now());
            return Ok(Answer {
                kv: seen.kv,
                revision: seen.revision,
                age,
                level: Level::Server,
                stale: false,
            });
        }
    }
}
