//! The judge: histories, and one checker for each claim.
//!
//! It shares no code with the product and does no I/O, so that a bug in one
//! cannot hide in the other. Its own tests are the target `judge`; the harness
//! uses it as a module.

pub mod history;
pub mod verdict;

mod attribution;
mod calls;
mod cycles;
mod describe;
mod event_log;
mod model;
mod random;
mod simulator;

pub mod append;
pub mod bank;
pub mod convergence;
pub mod lease;
pub mod linearizable;
pub mod lock;
pub mod member_lists;
pub mod membership;
pub mod request_ids;
pub mod revision_order;
pub mod serializable;
pub mod set;
pub mod watch;

pub mod edn;
