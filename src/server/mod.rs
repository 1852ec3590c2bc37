//! (scaffold)

pub mod control;
pub mod peer;
pub mod watch;
