//! The SDK on real processes: subscribe.
