//! Subscriptions: filtered, batched and bounded streams of events.
