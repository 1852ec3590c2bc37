//! The SDK measured: cache.

/// Runs it.
pub fn run() {}
