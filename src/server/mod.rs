//! (scaffold)

pub mod peer;
