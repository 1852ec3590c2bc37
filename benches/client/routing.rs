//! The SDK measured: routing.

/// Runs it.
pub fn run() {}
