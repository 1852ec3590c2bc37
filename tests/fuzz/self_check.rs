//! Decoders that are wrong on purpose, one in each way that counts: each must be
//! caught, or the whole run means nothing. Every run of all targets begins here.

use std::hint::black_box;
use std::time::Duration;

use crate::engine::worked;
use crate::supervise::Worker;
use crate::targets::{BASE, Input, Target, Verdict};

/// How long these may work on one input; the true ones get longer.
const STANDSTILL: Duration = Duration::from_secs(5);
/// The first byte of the inputs that are mistreated.
const MARK: u8 = 7;

/// The wrong decoders, each with words that must be in what is said of it.
pub static WRONG: &[(Target, &str)] = &[
    (
        Target { name: "wrong_panic", run: |bytes| judged(bytes, || panic!("mistreated")), ..TEMPLATE },
        "panic: mistreated",
    ),
    (
        Target {
            name: "wrong_sum",
            run: |bytes| judged(bytes, || use_up(black_box(bytes[0]) - black_box(MARK + 1))),
            ..TEMPLATE
        },
        "overflow",
    ),
    (
        Target {
            name: "wrong_memory",
            run: |bytes| judged(bytes, || use_up(vec![1u8; 300 << 20])),
            ..TEMPLATE
        },
        "bytes made it hold",
    ),
    (Target { name: "wrong_time", run: |bytes| judged(bytes, busy), ..TEMPLATE }, "it takes"),
    (Target { name: "wrong_loop", run: |bytes| judged(bytes, endless), ..TEMPLATE }, "it did not end"),
    (
        Target {
            name: "wrong_stack",
            run: |bytes| judged(bytes, || use_up(descend(black_box(1 << 40)))),
            ..TEMPLATE
        },
        "the process ended",
    ),
    (Target { name: "wrong_refusal", run: |_| Verdict::Refused, ..TEMPLATE }, "what was written is refused"),
    (
        Target { name: "wrong_writing", run: |_| Verdict::Accepted(vec![0; 9]), ..TEMPLATE },
        "is something else",
    ),
];

const TEMPLATE: Target = Target {
    what: "a decoder that is wrong on purpose",
    draw: |rng| Input { bytes: vec![rng.below(16) as u8], is_whole: true },
    ..BASE
};

/// Accepts everything, and mistreats what is marked.
fn judged(bytes: &[u8], mistreat: impl FnOnce()) -> Verdict {
    if bytes.first() == Some(&MARK) {
        mistreat();
    }
    Verdict::Accepted(bytes.to_vec())
}

/// Keeps the compiler from seeing that nobody needs it.
fn use_up<T>(value: T) {
    let _ = black_box(value);
}

fn busy() {
    let begun = worked();
    while worked() - begun < Duration::from_millis(1500) {}
}

fn endless() {
    while black_box(true) {}
}

/// Deep enough for any stack.
fn descend(levels: u64) -> u64 {
    let frame = black_box([levels; 64]);
    if levels == 0 { 0 } else { descend(levels - 1) + frame[(levels % 64) as usize] }
}

/// Runs the wrong decoders; returns what went unnoticed.
pub fn unnoticed(jobs: usize) -> std::io::Result<Vec<String>> {
    let mut waiting = WRONG.iter();
    let mut running = Vec::new();
    let mut unnoticed = Vec::new();
    loop {
        while running.len() < jobs
            && let Some((target, words)) = waiting.next()
        {
            let worker = Worker::start(target, 1, Duration::from_secs(60), STANDSTILL, true)?;
            running.push((worker, target, *words));
        }
        if running.is_empty() {
            return Ok(unnoticed);
        }
        let mut still = Vec::new();
        for (mut worker, target, words) in running {
            match worker.poll()? {
                None => still.push((worker, target, words)),
                Some(report) => match report.failure {
                    Some((_, reason)) if reason.contains(words) => {}
                    Some((_, reason)) => unnoticed.push(format!("{}: said {reason:?}", target.name)),
                    None => unnoticed.push(format!("{}: said nothing", target.name)),
                },
            }
        }
        running = still;
        std::thread::sleep(Duration::from_millis(20));
    }
}
