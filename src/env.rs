//! The only clock and the only random source.
//!
//! Everything that behaves by time or by chance takes an [`EnvRef`], so that a
//! simulation can drive it on virtual time from a seed. Timers themselves are
//! tokio's, which the simulation pauses.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time and chance.
pub trait Env: Send + Sync + 'static {
    /// Time since some fixed moment. Never goes back; what intervals are measured with.
    fn monotonic(&self) -> Duration;

    /// Milliseconds since 1970. May jump; labels things and decides nothing.
    fn wall_ms(&self) -> u64;

    /// A random number.
    fn random_u64(&self) -> u64;

    /// Whether work that blocks is done where it is asked for, and not by the
    /// threads that are there for it: for a simulation, where one thread makes
    /// runs repeatable.
    fn blocks_in_place(&self) -> bool {
        false
    }
}

/// A shared [`Env`].
pub type EnvRef = Arc<dyn Env>;

/// Does work that blocks, where it holds nobody up.
///
/// # Errors
/// When the work panicked, or the runtime is going down.
pub async fn off_thread<T: Send + 'static>(
    env: &EnvRef,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    match env.blocks_in_place() {
        true => Ok(work()),
        false => tokio::task::spawn_blocking(work).await,
    }
}

/// The machine's clocks and its random source.
#[derive(Debug)]
pub struct SystemEnv {
    start: tokio::time::Instant,
}

impl SystemEnv {
    /// The machine's environment, as everyone shares it.
    pub fn shared() -> EnvRef {
        Arc::new(SystemEnv { start: tokio::time::Instant::now() })
    }
}

impl Env for SystemEnv {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    fn wall_ms(&self) -> u64 {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        since_1970.as_millis() as u64
    }

    fn random_u64(&self) -> u64 {
        rand::random()
    }
}
