//! The SDK measured: push.

/// Runs it.
pub fn run() {}
