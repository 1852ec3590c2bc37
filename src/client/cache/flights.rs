//! Single flight: whoever misses a key that is being read already waits for that
//! read instead of making another.

use std::collections::HashMap;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::record::Moment;
use crate::client::{Answer, ClientError};

type Outcome = Option<Result<Answer, ClientError>>;

/// The reads on their way; as many at most as there are callers.
#[derive(Default)]
pub(super) struct Flights {
    flying: Mutex<HashMap<(Bytes, bool), Flight>>,
}

struct Flight {
    begun: Moment,
    outcome: watch::Receiver<Outcome>,
}

/// What a miss is to do.
pub(super) enum Place<'a> {
    /// Make the read, and land with what it gave.
    Lead(Lead<'a>),
    /// Wait for one that began then.
    Follow(Moment, watch::Receiver<Outcome>),
}

/// The read that others wait for. Dropping it sends them off to read themselves.
pub(super) struct Lead<'a> {
    flights: &'a Flights,
    key: (Bytes, bool),
    outcome: watch::Sender<Outcome>,
}

impl Flights {
    /// A place on a read of `key`: a linearizable one, or one that may be behind.
    pub fn join(&self, key: &Bytes, linearizable: bool, now: Moment) -> Place<'_> {
        let key = (key.clone(), linearizable);
        let mut flying = self.flying.lock();
        if let Some(flight) = flying.get(&key) {
            return Place::Follow(flight.begun, flight.outcome.clone());
        }
        let (outcome, receiver) = watch::channel(None);
        flying.insert(key.clone(), Flight { begun: now, outcome: receiver });
        Place::Lead(Lead { flights: self, key, outcome })
    }
}

impl Lead<'_> {
    /// Hands the outcome to all who wait.
    pub fn land(self, outcome: &Result<Answer, ClientError>) {
        // Nobody may be waiting.
        let _ = self.outcome.send(Some(outcome.clone()));
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.flights.flying.lock().remove(&self.key);
    }
}

/// Waits for somebody else's read; `None` if it was given up.
pub(super) async fn landed(mut outcome: watch::Receiver<Outcome>) -> Outcome {
    let landed = outcome.wait_for(|outcome| outcome.is_some()).await.ok()?;
    landed.clone()
}
