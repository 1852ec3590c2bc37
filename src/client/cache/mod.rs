//! Three levels of read cache behind one type.

mod answer;
mod options;

pub use answer::{Answer, CacheState, CacheStats, Consistency, DiskState, Level, Phase, ScopeState};
pub use options::{CacheError, CacheOptions, CachePolicy, OnTrouble, Unproven};
