//! The SDK on real processes: etcd.
