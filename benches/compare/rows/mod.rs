//! The rows of the table: what each loads, on whom, and what it has to reach.
//!
//! A row starts its own clusters, so that it owes nothing to those before it and can be measured
//! again alone; that takes two seconds.

mod bare;
mod disturbed;
mod failover;
mod leases;
mod memory;
mod requests;
mod restart;
mod watches;

pub use bare::serve as serve_bare;

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Result;

use crate::bench::{Bench, Side};
use crate::figures::Figures;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name in arguments and results; words joined by `-`.
    pub name: &'static str,
    /// What is done, for the table.
    pub load: &'static str,
    /// Who is measured, in turn.
    pub sides: &'static [Side],
    /// What has to be reached.
    pub goals: &'static [Goal],
    /// How long one measurement may take, beyond the time of its figure; then it has failed.
    pub limit: Duration,
    /// Measures once. Write it as `|bench| Box::pin(f(bench))`.
    pub run: Run,
}

/// What measures a row.
pub type Run = fn(&Bench) -> Pin<Box<dyn Future<Output = Result<Figures>> + '_>>;

/// Both stores.
pub const BOTH: &[Side] = &[Side::Etcd, Side::Mainstay];

/// Enough for most rows.
pub const LIMIT: Duration = Duration::from_secs(180);

/// One figure that Mainstay has to reach.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// The figure, by its name in [`Figures::get`].
    pub metric: &'static str,
    /// How far.
    pub bound: Bound,
}

/// How far a figure has to reach.
#[expect(clippy::enum_variant_names, reason = "`at most` and `at least` are how goals are said")]
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    /// At most this part of etcd's.
    AtMostOfEtcd(f64),
    /// At least this part of etcd's.
    AtLeastOfEtcd(f64),
    /// At most this, whatever etcd's is.
    AtMost(f64),
    /// At least this, whatever etcd's is.
    AtLeast(f64),
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtMostOfEtcd(part) => write!(f, "≤ {part} of etcd's"),
            Bound::AtLeastOfEtcd(times) => write!(f, "≥ {times} times etcd's"),
            Bound::AtMost(most) => write!(f, "≤ {most}"),
            Bound::AtLeast(least) => write!(f, "≥ {least}"),
        }
    }
}

/// CPU per operation at most `part` of etcd's.
pub const fn cpu(part: f64) -> Goal {
    Goal { metric: "cpu_us_per_op", bound: Bound::AtMostOfEtcd(part) }
}

/// Operations per second at least `times` etcd's.
pub const fn ops(times: f64) -> Goal {
    Goal { metric: "ops_per_s", bound: Bound::AtLeastOfEtcd(times) }
}

/// All rows, in the order of the table.
pub fn all() -> Vec<Row> {
    let loads = [requests::ROWS, watches::ROWS, leases::ROWS].concat();
    let operations = [disturbed::ROWS, restart::ROWS, memory::ROWS, failover::ROWS].concat();
    [loads, operations, bare::ROWS.to_vec()].concat()
}
