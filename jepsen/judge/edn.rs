//! Histories as Jepsen's EDN, for Knossos, Elle and others.

use super::history::History;

/// Calls of a register workload, values as `[key value]`, for Knossos.
pub fn register(history: &History, workload: &str) -> String {
    let _ = (history, workload);
    String::new()
}

/// Transactions of an append workload, for Elle's list-append.
pub fn append(history: &History, workload: &str) -> String {
    let _ = (history, workload);
    String::new()
}

/// Every call of a workload, as maps.
pub fn generic(history: &History, workload: &str) -> String {
    let _ = (history, workload);
    String::new()
}
