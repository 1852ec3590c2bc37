//! The generator on virtual time: what counts as latency, when it ends, what it counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;

use super::{Failure, Keys, Plan, Tally, Until, Work, drive};

/// Takes 1 ms a time, except that the calls number `stall` to `stall + clients` take a second.
struct Stalls(Arc<AtomicU64>, u64);

impl Work for Stalls {
    async fn once(&mut self) -> Result<(), Failure> {
        let stalls = self.0.fetch_add(1, Ordering::Relaxed) == self.1;
        sleep(Duration::from_millis(if stalls { 1_000 } else { 1 })).await;
        Ok(())
    }
}

struct Fails;

impl Work for Fails {
    async fn once(&mut self) -> Result<(), Failure> {
        Err(Failure("no".to_owned()))
    }
}

fn stalls(clients: usize, at: u64) -> Vec<Stalls> {
    let calls = Arc::new(AtomicU64::new(0));
    (0..clients).map(|_| Stalls(calls.clone(), at)).collect()
}

#[tokio::test(start_paused = true)]
async fn at_a_fixed_rate_a_stall_counts_for_everything_that_was_due_in_it() {
    let plan = Plan { rate: Some(100.0), until: Until::Time(Duration::from_secs(10)) };
    let (outcome, _) = drive(stalls(1, 200), &plan, &Arc::default()).await;
    assert_eq!((outcome.ops(), outcome.late), (1_000, 0));
    // A hundred operations fell due during the second: half of them waited for more than half of it.
    assert!((900.0..=1_010.0).contains(&outcome.quantile_ms(0.991)), "{}", outcome.quantile_ms(0.991));
    assert!((400.0..=650.0).contains(&outcome.quantile_ms(0.95)), "{}", outcome.quantile_ms(0.95));
    assert!(outcome.quantile_ms(0.5) < 3.0, "{}", outcome.quantile_ms(0.5));
}

#[tokio::test(start_paused = true)]
async fn without_a_rate_clients_call_one_after_the_other() {
    let plan = Plan::for_time(Duration::from_secs(1));
    let (outcome, workers) = drive(stalls(4, u64::MAX), &plan, &Arc::default()).await;
    assert_eq!(workers.len(), 4);
    // Timers have a grain of a millisecond, so each takes one to two.
    assert!((2_000..=4_010).contains(&outcome.ops()), "{}", outcome.ops());
    assert!(outcome.max_ms() <= 2.0, "{}", outcome.max_ms());
}

#[tokio::test(start_paused = true)]
async fn a_rate_that_is_too_high_is_said_to_be() {
    let plan = Plan { rate: Some(10_000.0), until: Until::Time(Duration::from_secs(1)) };
    let (outcome, _) = drive(stalls(2, u64::MAX), &plan, &Arc::default()).await;
    assert_eq!(outcome.ops() + outcome.late, 10_000);
    assert!(outcome.late > 7_000, "{}", outcome.late);
    assert!(outcome.took < Duration::from_millis(1_100), "{:?}", outcome.took);
}

#[tokio::test(start_paused = true)]
async fn a_number_of_operations_is_kept_to() {
    let plan = Plan { rate: None, until: Until::Ops(1_234) };
    let (outcome, _) = drive(stalls(7, u64::MAX), &plan, &Arc::default()).await;
    assert_eq!((outcome.ops(), outcome.errors()), (1_234, 0));
    let spread: u64 = outcome.doubling().iter().map(|(_, count)| count).sum();
    assert_eq!(spread, 1_234);
}

#[tokio::test(start_paused = true)]
async fn failures_are_counted_by_what_they_say_and_do_not_go_in_circles() {
    let plan = Plan::for_time(Duration::from_secs(1));
    let (outcome, _) = drive(vec![Fails, Fails], &plan, &Arc::default()).await;
    assert_eq!(outcome.ops(), 0);
    assert!((2..=220).contains(&outcome.failures["no"]), "{:?}", outcome.failures);
    let tally = Tally::default();
    (0..100).for_each(|i| tally.failed(&Failure(i.to_string())));
    let outcome = tally.take(Duration::from_secs(1));
    assert_eq!((outcome.errors(), outcome.failures.len()), (100, 17));
    assert_eq!(tally.take(Duration::from_secs(1)).errors(), 0, "it begins anew");
}

#[test]
fn keys_are_as_long_as_asked_and_end_where_they_should() {
    let keys = Keys::new("b/", 6, 10_000).unwrap();
    assert_eq!((&keys.key(7)[..], &keys.key(10_007)[..]), (&b"b/0007"[..], &b"b/0007"[..]));
    assert_eq!((&keys.end(10_000)[..], &keys.range().1[..]), (&b"b/9999\0"[..], &b"b/9999\0"[..]));
    assert!(Keys::new("b/", 5, 10_000).unwrap_err().contains("6 bytes"));
    assert!(Keys::new("b/", 5, 1_000).is_ok());
    assert!(Keys::new("b/", 5, 0).is_err());
}
