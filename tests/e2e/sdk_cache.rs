//! The SDK on real processes: cache.
