//! (scaffold)

pub mod peer;
mod watch;
