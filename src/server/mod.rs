//! x
mod options;
pub use options::{ListenAddress, ServerOptions};
