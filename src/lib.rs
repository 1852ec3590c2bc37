//! Mainstay: a replicated configuration store with etcd's guarantees and etcd's
//! wire API.
//!
//! The folders are the architecture; ARCHITECTURE.md is their map. A room may
//! name only rooms of a lower rank, and the `mod` lines below stand in the
//! order of the ranks. With `default-features = false` the crate is the client
//! SDK alone.
#![deny(unsafe_code)]
#![warn(missing_docs)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

// Rank 0: values, the outside world, small parts.
pub mod env;
#[cfg(feature = "server")]
pub mod load;
#[cfg(feature = "server")]
pub mod mutant;
pub mod resilience;
pub mod telemetry;
pub mod types;

// Rank 1: the wire and the disk.
#[cfg(feature = "server")]
pub mod storage;
pub mod wire;

// Rank 2: the SDK, and what replicated commands mean.
pub mod client;
#[cfg(feature = "server")]
pub mod lease;
#[cfg(feature = "server")]
pub mod mvcc;

// Rank 3: one command applied to all of it, and who hears of it.
#[cfg(feature = "server")]
pub mod machine;
#[cfg(feature = "server")]
pub mod watch;

// Rank 4 to 8.
#[cfg(feature = "server")]
pub mod cli;
#[cfg(feature = "server")]
pub mod node;
#[cfg(feature = "server")]
pub mod raft;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
pub mod settings;
