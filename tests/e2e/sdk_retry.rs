//! The SDK on real processes: retry.
