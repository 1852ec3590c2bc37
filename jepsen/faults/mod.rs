//! What is done to the cluster.
//!
//! A fault says how it was seen to have taken effect, or why not: a fault that
//! had none proves nothing. Healing leaves the cluster as it was.

pub mod catalogue;

use std::pin::Pin;
use std::sync::Arc;

use rand::rngs::StdRng;

use crate::context::Context;

/// What a fault does in its own time.
pub type Deed<'a, T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send + 'a>>;

/// One kind of fault, with what it must remember to heal.
pub trait Fault: Send {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Begins it and confirms it; returns whom it hit and how that was seen.
    /// What it draws, it draws from `rng` alone.
    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String>;

    /// Ends it. Called once after `inject`, whether that worked or not.
    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()>;
}
