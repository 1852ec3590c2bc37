//! What goes over the network: the generated messages and services, how they
//! become the crate's own values and back, and the one way to open a channel.
//!
//! It decides nothing about keys. A request that cannot mean anything is
//! refused here, in etcd's words, before it costs a proposal.

#[path = "gen/mod.rs"]
#[allow(missing_docs, unused_qualifications, unreachable_pub, clippy::all, rustdoc::all)]
mod generated;

pub mod channel;
pub mod codec;
pub mod convert;
mod convert_reply;
mod convert_txn;
#[cfg(feature = "server")]
pub mod direct;
pub mod health;
pub mod metadata;

pub use convert::InvalidRequest;
pub use convert_reply::{
    UnexpectedOutcome, delete_range_response, event, event_from_wire, key_value, key_value_from_wire,
    put_response, range_reply_from_wire, range_response, txn_reply_from_wire, txn_response,
};
pub use generated::*;
