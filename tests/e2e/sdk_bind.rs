//! The SDK on real processes: bind.
