//! Random operations against a model: the store's whole history judges every answer.
//!
//! An answer must be the key's state at the revision it names, no older than what
//! was handed out for the key before, and as young as it says and as was asked for.
//! Memory is so small that most reads go down through the levels.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::Index;

use super::store::{Dir, Store};
use crate::client::cache::{Cache, CacheOptions, CachePolicy, Consistency, Level, Unproven};

const KEYS: usize = 24;

#[derive(Clone, Debug)]
enum Op {
    Put(usize, usize),
    Delete(usize),
    Read(usize, Consistency),
    Wait(u64),
    Down(bool),
    Silent(bool),
    CutOff(bool),
    /// How far serializable reads are behind, if they are.
    Lag(Option<Index>),
    Compact,
    Settle,
    DamageSecond,
    Reopen,
    Warm,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let consistency = prop_oneof![
        1 => Just(Consistency::Strong),
        2 => (0..3000u64).prop_map(|ms| Consistency::Bounded(Duration::from_millis(ms))),
        4 => Just(Consistency::Eventual),
    ];
    let op = prop_oneof![
        12 => (0..KEYS, 0..6000usize).prop_map(|(key, size)| Op::Put(key, size)),
        4 => (0..KEYS).prop_map(Op::Delete),
        30 => (0..KEYS, consistency).prop_map(|(key, consistency)| Op::Read(key, consistency)),
        10 => prop_oneof![1..20u64, 1..5000u64].prop_map(Op::Wait),
        2 => any::<bool>().prop_map(Op::Down),
        2 => any::<bool>().prop_map(Op::Silent),
        2 => any::<bool>().prop_map(Op::CutOff),
        2 => proptest::option::of(any::<Index>()).prop_map(Op::Lag),
        1 => Just(Op::Compact),
        4 => Just(Op::Settle),
        1 => Just(Op::DamageSecond),
        1 => Just(Op::Reopen),
        1 => Just(Op::Warm),
    ];
    proptest::collection::vec(op, 1..150)
}

fn options() -> impl Strategy<Value = CacheOptions> {
    let policies = vec![
        CachePolicy::Lru,
        CachePolicy::Lfu,
        CachePolicy::Ttl(Duration::from_secs(2)),
        CachePolicy::Adaptive,
    ];
    let levels = (prop_oneof![Just(0), Just(8 << 10), Just(64 << 10)], any::<bool>(), any::<bool>());
    (levels, prop::sample::select(policies), any::<bool>()).prop_map(
        |((l2_bytes, disk, refuse), policy, watched)| CacheOptions {
            l1_bytes: 64 << 10,
            l2_bytes,
            dir: disk.then(|| "to be chosen".into()),
            l3_bytes: 1 << 20,
            policy,
            prefixes: if watched { vec!["a/".into()] } else { Vec::new() },
            ttl: Duration::from_secs(3),
            absent_ttl: Duration::from_secs(1),
            verify_interval: Duration::from_millis(700),
            unproven: if refuse { Unproven::Refuse } else { Unproven::Refresh },
            ..CacheOptions::default()
        },
    )
}

/// Half of the keys are watched, if anything is.
fn name(key: usize) -> String {
    if key.is_multiple_of(2) { format!("a/{key}") } else { format!("b/{key}") }
}

struct Run {
    store: Arc<Store>,
    cache: Cache,
    options: CacheOptions,
    /// By key: the beginning of the state that was handed out last.
    handed_out: HashMap<usize, i64>,
    random: u64,
}

impl Run {
    async fn step(&mut self, op: &Op) {
        match op {
            Op::Put(key, size) => {
                let value = self.noise(*size);
                self.store.set(&name(*key), Some(value));
            }
            Op::Delete(key) => drop(self.store.set(&name(*key), None)),
            Op::Read(key, consistency) => self.read(*key, *consistency).await,
            Op::Wait(ms) => tokio::time::sleep(Duration::from_millis(*ms)).await,
            Op::Down(down) => self.store.with(|store| store.down = *down),
            Op::Silent(silent) => self.store.with(|store| store.silent = *silent),
            Op::CutOff(cut) => self.store.with(|store| store.cut_off_at = cut.then_some(store.revision)),
            Op::Lag(lag) => self.store.with(|store| {
                store.lagging_at = lag.map(|lag| 1 + lag.index(store.revision as usize) as i64);
            }),
            Op::Compact => self.store.with(|store| store.compacted = store.revision),
            Op::Settle => self.cache.core().memory.settle(),
            Op::DamageSecond => self.cache.core().memory.damage_second(),
            Op::Reopen => {
                self.cache.close().await;
                self.cache = self.store.open(self.options.clone()).await;
                // What was ahead of the watch is not kept; an offline start says that it is stale.
                self.handed_out.clear();
            }
            Op::Warm => drop(self.cache.warm("b/").await),
        }
    }

    /// Bytes that do not compress.
    fn noise(&mut self, size: usize) -> Bytes {
        let mut next = || {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random as u8
        };
        (0..size).map(|_| next()).collect()
    }

    async fn read(&mut self, key: usize, consistency: Consistency) {
        let name = name(key);
        let answer = self.cache.get(&name, consistency).await;
        let now = self.store.env.monotonic();
        let store = self.store.inner.lock();
        let Ok(answer) = answer else {
            let refused =
                self.options.unproven == Unproven::Refuse && matches!(consistency, Consistency::Bounded(_));
            assert!(store.down || refused, "{name}: {consistency:?} failed for no reason: {answer:?}");
            return;
        };
        let what = format!("{name}, {consistency:?}: {answer:?}");
        assert_eq!(answer.kv, store.state(name.as_bytes(), answer.revision.0), "a wrong value: {what}");
        let changes = store.history.get(name.as_bytes());
        let began =
            changes.into_iter().flatten().map(|(at, ..)| *at).filter(|at| *at <= answer.revision.0).max();
        let began = began.unwrap_or(0);
        let before = self.handed_out.insert(key, began).unwrap_or(0);
        assert!(began >= before, "back from {before} to {began}: {what}");
        // How long ago the state ended, if it did.
        let old = store.ended(name.as_bytes(), began).map_or(Duration::ZERO, |ended| now - ended);
        if let Some(age) = answer.age {
            assert!(old <= age, "out of date for {old:?}: {what}");
        }
        match consistency {
            Consistency::Strong => assert_eq!((old, answer.level), (Duration::ZERO, Level::Server), "{what}"),
            Consistency::Bounded(bound) => assert!(old <= bound, "out of date for {old:?}: {what}"),
            Consistency::Eventual => {}
        }
    }
}

async fn run(options: CacheOptions, ops: Vec<Op>) {
    let (store, dir) = (Store::new(), Dir::new());
    let options = CacheOptions { dir: options.dir.map(|_| dir.path().to_owned()), ..options };
    for key in 0..KEYS / 2 {
        store.put(&name(key), "first");
    }
    let cache = store.open(options.clone()).await;
    let mut run = Run { store, cache, options, handed_out: HashMap::new(), random: 88_172_645_463_325_252 };
    for op in &ops {
        run.step(op).await;
    }
    // When all is well again the cache is right about everything, by itself.
    run.store.with(|store| {
        (store.down, store.silent, store.cut_off_at, store.lagging_at) = (false, false, None, None);
    });
    let live = run.cache.wait_for(|state| state.is_live());
    let live = tokio::time::timeout(Duration::from_secs(60), live).await;
    assert!(live.is_ok(), "it does not catch up: {:?}", run.cache.state());
    tokio::time::sleep(Duration::from_secs(5)).await;
    for key in 0..KEYS {
        run.read(key, Consistency::Bounded(Duration::from_secs(1))).await;
        let answer = run.cache.get(name(key), Consistency::Eventual).await.expect("the store is up");
        let current = run.store.inner.lock().state(name(key).as_bytes(), i64::MAX);
        if key.is_multiple_of(2) && !run.options.prefixes.is_empty() {
            assert_eq!(answer.kv, current, "{}", name(key));
        }
    }
    run.cache.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_time: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_true_of_its_revision_and_none_goes_back(options in options(), ops in ops()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(run(options, ops));
    }
}
