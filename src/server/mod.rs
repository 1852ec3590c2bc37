//! (scaffold)

pub mod control;
pub mod peer;
