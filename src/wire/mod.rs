//! What goes over the network: the generated messages and services, how they
//! become the crate's own values and back, and the one way to open a channel.
//!
//! It decides nothing about keys. A request that cannot mean anything is
//! refused here, in etcd's words, before it costs a proposal.

#[path = "gen/mod.rs"]
#[allow(missing_docs, unused_qualifications, unreachable_pub, clippy::all, rustdoc::all)]
mod generated;

pub use generated::*;
