//! Each strategy on endpoints that exist only as numbers.

use std::cell::Cell;

use proptest::prelude::{ProptestConfig, any, prop};
use proptest::{prop_assert, proptest};

use super::super::hash;
use super::super::tables::{MAGLEV_ENTRIES, Node};
use super::*;

/// What one endpoint is said to be.
struct Fake {
    id: u64,
    penalty: u8,
    weight: u32,
    load: Cell<u32>,
    latency_ns: f64,
    account: AtomicI64,
}

struct Fakes {
    all: Vec<Fake>,
    ring: Ring,
    maglev: Maglev,
}

fn fake(id: u64, weight: u32) -> Fake {
    Fake { id, penalty: 0, weight, load: Cell::new(0), latency_ns: 1e6, account: AtomicI64::new(0) }
}

impl Fakes {
    fn of(all: Vec<Fake>) -> Fakes {
        let nodes: Vec<Node> = (0u16..)
            .zip(&all)
            .map(|(index, fake)| Node { index, id_hash: hash::of_member(fake.id), weight: fake.weight })
            .collect();
        Fakes { all, ring: Ring::new(&nodes, 512), maglev: Maglev::new(&nodes) }
    }

    fn even(ids: impl IntoIterator<Item = u64>) -> Fakes {
        Fakes::of(ids.into_iter().map(|id| fake(id, 1)).collect())
    }

    fn weighted(weights: &[u32]) -> Fakes {
        Fakes::of((1..).zip(weights).map(|(id, weight)| fake(id, *weight)).collect())
    }

    /// How often each is taken in `count` choices, each with another key.
    fn shares(&self, strategy: &Strategy, count: u64) -> Vec<f64> {
        let chooser = Chooser::new(strategy);
        let mut taken = vec![0.0; self.all.len()];
        for n in 0..count {
            taken[self.take(&chooser, n)] += 1.0;
        }
        taken.iter().map(|taken| taken / count as f64).collect()
    }

    fn take(&self, chooser: &Chooser, n: u64) -> usize {
        let draw =
            Draw { key: Some(hash::of_bytes(&n.to_le_bytes())), turn: n as usize, random: &|| random(n) };
        chooser.choose(self, &draw)
    }

    /// The id that a key goes to.
    fn owner(&self, chooser: &Chooser, key: u64) -> u64 {
        self.all[self.take(chooser, key)].id
    }
}

/// The `n`th number of a fixed random sequence.
fn random(n: u64) -> u64 {
    hash::of_bytes(&n.to_be_bytes())
}

impl View for Fakes {
    fn count(&self) -> usize {
        self.all.len()
    }
    fn penalty(&self, at: usize) -> u8 {
        self.all[at].penalty
    }
    fn id_hash(&self, at: usize) -> u64 {
        hash::of_member(self.all[at].id)
    }
    fn weight(&self, at: usize) -> u32 {
        self.all[at].weight
    }
    fn load(&self, at: usize) -> u32 {
        self.all[at].load.get()
    }
    fn latency_ns(&self, at: usize) -> f64 {
        self.all[at].latency_ns
    }
    fn account(&self, at: usize) -> &AtomicI64 {
        &self.all[at].account
    }
    fn is_even(&self) -> bool {
        self.all.iter().all(|fake| fake.weight == self.all[0].weight)
    }
    fn ring(&self) -> Option<&Ring> {
        Some(&self.ring)
    }
    fn maglev(&self) -> Option<&Maglev> {
        Some(&self.maglev)
    }
}

const FREE: f64 = f64::INFINITY;

fn hashing() -> [Strategy; 3] {
    [
        Strategy::Rendezvous { load_bound: FREE },
        Strategy::Ring { points: 512, load_bound: FREE },
        Strategy::Maglev { load_bound: FREE },
    ]
}

fn every() -> Vec<Strategy> {
    let mut all = hashing().to_vec();
    all.extend([Strategy::rendezvous(), Strategy::RoundRobin, Strategy::WeightedRoundRobin]);
    all.extend([Strategy::WeightedRandom, Strategy::LeastInFlight, Strategy::PeakEwma, Strategy::Sticky]);
    all
}

#[test]
fn every_strategy_spreads_evenly_over_equals() {
    for strategy in every() {
        for count in [2u64, 3, 5, 20] {
            let fair = 1.0 / count as f64;
            let slack = if matches!(strategy, Strategy::Ring { .. }) { 0.15 } else { 0.08 };
            for share in Fakes::even(1..=count).shares(&strategy, 60_000) {
                assert!((share / fair - 1.0).abs() < slack, "{strategy:?} of {count}: {share}");
            }
        }
    }
}

#[test]
fn weighted_strategies_follow_the_weights() {
    let fakes = Fakes::weighted(&[1, 2, 5]);
    let mut strategies = hashing().to_vec();
    strategies.extend([Strategy::WeightedRoundRobin, Strategy::WeightedRandom]);
    for strategy in strategies {
        let shares = fakes.shares(&strategy, 40_000);
        for (share, weight) in shares.iter().zip([1.0, 2.0, 5.0]) {
            assert!((share * 8.0 / weight - 1.0).abs() < 0.12, "{strategy:?}: {shares:?}");
        }
    }
}

#[test]
fn the_weighted_round_is_smooth() {
    let fakes = Fakes::weighted(&[5, 1, 1]);
    let chooser = Chooser::new(&Strategy::WeightedRoundRobin);
    let round: Vec<usize> = (0..7).map(|n| fakes.take(&chooser, n)).collect();
    assert_eq!(round, [0, 0, 1, 0, 2, 0, 0]);
}

#[test]
fn nobody_takes_a_worse_one_while_there_is_a_better() {
    for strategy in every() {
        let mut fakes = Fakes::even(1..=5);
        for at in [0, 2] {
            fakes.all[at].penalty = penalty::EJECTED;
        }
        fakes.all[3].penalty = penalty::TRIED;
        let shares = fakes.shares(&strategy, 10_000);
        assert_eq!((shares[0], shares[2], shares[3]), (0.0, 0.0, 0.0), "{strategy:?}");
        let fair = if strategy == Strategy::Sticky { 0.15 } else { 0.45 };
        assert!(shares[1].min(shares[4]) > fair, "{strategy:?}: {shares:?}");
    }
}

#[test]
fn the_best_of_bad_ones_is_taken() {
    for strategy in every() {
        let mut fakes = Fakes::even(1..=3);
        for (fake, penalty) in fakes.all.iter_mut().zip([penalty::TRIED, penalty::EJECTED, penalty::UNFIT]) {
            fake.penalty = penalty;
        }
        assert_eq!(fakes.shares(&strategy, 100)[1], 1.0, "{strategy:?}");
    }
}

#[test]
fn the_faster_of_two_is_preferred() {
    let mut fakes = Fakes::even(1..=3);
    fakes.all[0].latency_ns = 10e6;
    let shares = fakes.shares(&Strategy::PeakEwma, 9_000);
    assert_eq!(shares[0], 0.0, "it loses against either of the others");
    fakes.all[0].latency_ns = 1e6;
    fakes.all[1].load.set(20);
    assert_eq!(fakes.shares(&Strategy::PeakEwma, 9_000)[1], 0.0, "a long queue is slow too");
    fakes.all[2].latency_ns = 0.0;
    assert!(fakes.shares(&Strategy::PeakEwma, 9_000)[2] > 0.6, "the unknown one is tried");
    fakes.all[2].load.set(1);
    assert_eq!(fakes.shares(&Strategy::PeakEwma, 9_000)[2], 0.0, "by one call at a time");
}

#[test]
fn the_least_loaded_is_taken_by_its_weight() {
    let fakes = Fakes::weighted(&[1, 4]);
    fakes.all[0].load.set(2);
    fakes.all[1].load.set(6);
    assert_eq!(fakes.shares(&Strategy::LeastInFlight, 100), [0.0, 1.0]);
}

#[test]
fn sticking_goes_on_from_where_it_failed() {
    let mut fakes = Fakes::even(1..=3);
    let chooser = Chooser::new(&Strategy::Sticky);
    assert_eq!((fakes.take(&chooser, 1), fakes.take(&chooser, 1), fakes.take(&chooser, 2)), (1, 1, 2));
    fakes.all[1].penalty = penalty::TRIED;
    assert_eq!(fakes.take(&chooser, 1), 2);
}

#[test]
fn a_ring_has_its_points_and_a_maglev_table_its_entries() {
    let node = |id, weight| Node { index: id as u16, id_hash: hash::of_member(id), weight };
    assert_eq!(Ring::new(&[node(1, 1)], 16).len(), 1_024);
    assert_eq!(Ring::new(&[node(1, 1), node(2, 3)], 512).len(), 2_048);
    assert!(Ring::new(&[node(1, 100), node(2, 100)], 4_096 * 4).len() <= 1 << 20);
    assert_eq!(Maglev::new(&[node(1, 1), node(2, 1)]).len(), MAGLEV_ENTRIES);
    assert_eq!(Maglev::new(&[]).walk(7).count(), 0);
    assert_eq!(Ring::new(&[], 512).walk(7).count(), 0);
}

#[test]
fn keys_stay_where_they_are_in_every_version() {
    let fakes = Fakes::even([0x8e9e_05c5_2164_694d, 0xfd42_2379_fda5_0e48, 0x9172_4ba5_a3a2_9abd, 7, 8]);
    let owners = |strategy: &Strategy| -> Vec<usize> {
        let chooser = Chooser::new(strategy);
        (0..24).map(|key| fakes.take(&chooser, key)).collect()
    };
    let [rendezvous, ring, maglev] = hashing();
    assert_eq!(owners(&rendezvous), [2, 1, 0, 0, 4, 4, 1, 2, 0, 2, 4, 0, 0, 1, 3, 1, 3, 4, 3, 1, 4, 0, 4, 3]);
    assert_eq!(owners(&ring), [1, 0, 2, 1, 1, 3, 3, 0, 3, 1, 0, 1, 1, 4, 3, 0, 3, 1, 0, 0, 2, 2, 1, 2]);
    assert_eq!(owners(&maglev), [4, 3, 4, 2, 2, 4, 0, 0, 1, 3, 4, 1, 0, 3, 2, 4, 3, 1, 4, 1, 0, 1, 2, 1]);
}

#[test]
fn the_next_in_rank_takes_over_and_spreads() {
    let chooser = Chooser::new(&Strategy::Rendezvous { load_bound: FREE });
    let mut fakes = Fakes::even(1..=3);
    let before: Vec<usize> = (0..6_000).map(|key| fakes.take(&chooser, key)).collect();
    fakes.all[0].penalty = penalty::TRIED;
    let mut heirs = [0u32; 3];
    for (key, owner) in (0..).zip(before) {
        let now = fakes.take(&chooser, key);
        if owner == 0 {
            heirs[now] += 1;
        } else {
            assert_eq!(now, owner);
        }
    }
    assert!(heirs[0] == 0 && heirs[1] > 800 && heirs[2] > 800, "{heirs:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// When an endpoint joins, keys move to it and nowhere else, and no more than
    /// its share. Maglev may move a few more.
    #[test]
    fn a_joiner_takes_its_share_and_no_more(count in 1u64..12, joiner in 1_000u64..1_000_000) {
        const KEYS: u64 = 4_000;
        let before = Fakes::even(1..=count);
        let after = Fakes::even((1..=count).chain([joiner]));
        let ideal = 1.0 / (count + 1) as f64;
        for strategy in hashing() {
            let chooser = Chooser::new(&strategy);
            let exact = !matches!(strategy, Strategy::Maglev { .. });
            let mut moved = 0;
            for key in 0..KEYS {
                let (old, new) = (before.owner(&chooser, key), after.owner(&chooser, key));
                moved += u32::from(old != new);
                prop_assert!(!exact || old == new || new == joiner, "{strategy:?}");
            }
            let share = f64::from(moved) / KEYS as f64;
            let slack = if exact { 0.03 } else { 0.06 };
            prop_assert!((share - ideal).abs() < 0.2 * ideal + slack, "{strategy:?}: {share} of {ideal}");
        }
    }

    /// With a bound, no endpoint ever has more than the bound under way, and the
    /// best ranked one is taken while it has room.
    #[test]
    fn the_load_bound_is_never_exceeded(
        weights in prop::collection::vec(1u32..5, 2..8),
        calls in 50u64..600,
        hot in any::<bool>(),
        bound in 1.0f64..2.0,
    ) {
        let total_weight = f64::from(weights.iter().sum::<u32>());
        let strategies = [
            Strategy::Rendezvous { load_bound: bound },
            Strategy::Ring { points: 64, load_bound: bound },
            Strategy::Maglev { load_bound: bound },
        ];
        for strategy in strategies {
            let fakes = Fakes::weighted(&weights);
            let (bounded, free) = (Chooser::new(&strategy), Chooser::new(&unbounded(&strategy)));
            for n in 0..calls {
                let key = if hot { 1 } else { n };
                let at = fakes.take(&bounded, key);
                let limit = |at: usize| {
                    let share = (n + 1) as f64 * f64::from(weights[at]) / total_weight;
                    ((bound * share).ceil() as u32).max(LOAD_FLOOR)
                };
                let best = fakes.take(&free, key);
                prop_assert!(at == best || fakes.load(best) >= limit(best), "{strategy:?}");
                let load = &fakes.all[at].load;
                load.set(load.get() + 1);
                prop_assert!(load.get() <= limit(at), "{strategy:?}: {} of {}", load.get(), limit(at));
            }
        }
    }
}

fn unbounded(strategy: &Strategy) -> Strategy {
    match strategy.clone() {
        Strategy::Rendezvous { .. } => Strategy::Rendezvous { load_bound: FREE },
        Strategy::Ring { points, .. } => Strategy::Ring { points, load_bound: FREE },
        Strategy::Maglev { .. } => Strategy::Maglev { load_bound: FREE },
        other => other,
    }
}
