//! The judge: histories, and one checker for each claim.
//!
//! It shares no code with the product and does no I/O, so that a bug in one
//! cannot hide in the other. Its own tests are the target `judge`; the harness
//! uses it as a module.

pub mod history;
pub mod verdict;
