//! The SDK measured: routing. How evenly the hashing strategies spread keys, what
//! a look-up costs, and how many keys move when an endpoint joins or leaves.

use std::hint::black_box;
use std::time::Duration;

use mainstay::client::{Placement, Strategy};
use tokio::time::Instant;

const KEYS: usize = 1_000_000;
/// Look-ups are timed in turns, so that a busy moment hits all strategies alike.
const ROUNDS: usize = 9;
const LOOKUPS: usize = 200_000;

/// Runs it.
pub fn run() {
    let keys: Vec<String> =
        (0..KEYS).map(|n| format!("svc/team-{}/service-{}/key-{n}", n % 17, n % 251)).collect();
    println!("{KEYS} keys; ideal is what must move. A look-up includes hashing the key.\n");
    println!(
        "| endpoints | strategy | max/avg | min/avg | ns/look-up | moved on join (ideal) | moved on leave (ideal) |"
    );
    println!("|---|---|---|---|---|---|---|");
    for count in [3u64, 5, 50] {
        let members = members(1..=count);
        let times = lookup_ns(&members, &keys);
        for ((name, strategy), ns) in strategies().into_iter().zip(times) {
            let owners = owners(&strategy, &members, &keys);
            let (max, min) = balance(&owners, count);
            let joined = moved(&owners, &strategy, &self::members(1..=count + 1), &keys);
            // The one in the middle, which is as good as any.
            let left = self::members((1..=count).filter(|id| *id != count.div_ceil(2)));
            let left = moved(&owners, &strategy, &left, &keys);
            let (join_ideal, leave_ideal) = (1.0 / (count + 1) as f64, 1.0 / count as f64);
            println!(
                "| {count} | {name} | {max:.3} | {min:.3} | {ns:.1} | {joined:.4} ({join_ideal:.4}) | {left:.4} ({leave_ideal:.4}) |"
            );
        }
    }
    println!();
}

fn strategies() -> [(&'static str, Strategy); 4] {
    let free = f64::INFINITY;
    [
        ("rendezvous, load bound 1.25 (default)", Strategy::rendezvous()),
        ("rendezvous", Strategy::Rendezvous { load_bound: free }),
        ("ring, 512 points each", Strategy::Ring { points: 512, load_bound: free }),
        ("maglev, 65537 entries", Strategy::Maglev { load_bound: free }),
    ]
}

/// Ids as clusters draw them: any 64 bits.
fn members(numbers: impl Iterator<Item = u64>) -> Vec<(u64, u32)> {
    numbers.map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15), 1)).collect()
}

fn owners(strategy: &Strategy, members: &[(u64, u32)], keys: &[String]) -> Vec<u64> {
    let placement = Placement::new(strategy, members);
    keys.iter().map(|key| placement.owner(key.as_bytes())).collect()
}

/// The largest and the smallest share, against the average.
fn balance(owners: &[u64], count: u64) -> (f64, f64) {
    let mut shares = std::collections::HashMap::new();
    owners.iter().for_each(|owner| *shares.entry(*owner).or_insert(0u64) += 1);
    assert_eq!(shares.len() as u64, count, "everybody has keys");
    let average = owners.len() as f64 / count as f64;
    let share = |found: Option<&u64>| found.copied().unwrap_or(0) as f64 / average;
    (share(shares.values().max()), share(shares.values().min()))
}

fn moved(before: &[u64], strategy: &Strategy, members: &[(u64, u32)], keys: &[String]) -> f64 {
    let after = owners(strategy, members, keys);
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    moved as f64 / keys.len() as f64
}

/// The median time of a look-up for each strategy.
fn lookup_ns(members: &[(u64, u32)], keys: &[String]) -> Vec<f64> {
    let placements: Vec<Placement> =
        strategies().iter().map(|(_, strategy)| Placement::new(strategy, members)).collect();
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); placements.len()];
    for round in 0..ROUNDS {
        for (placement, times) in placements.iter().zip(&mut times) {
            let from = (round * LOOKUPS) % (keys.len() - LOOKUPS);
            let began = Instant::now();
            for key in &keys[from..from + LOOKUPS] {
                black_box(placement.owner(black_box(key.as_bytes())));
            }
            times.push(began.elapsed());
        }
    }
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_nanos() as f64 / LOOKUPS as f64
    };
    times.into_iter().map(median).collect()
}
