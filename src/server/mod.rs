//! (scaffold)
mod watch;
