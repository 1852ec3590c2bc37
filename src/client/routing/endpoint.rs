//! One endpoint as this client lives with it: its channel, what is under way
//! there, how fast it answers and whether it is well.
//!
//! Picks read atomics only. What changes together (the breaker, the health, the
//! latency) stands behind a lock that is held for a few instructions, when a
//! call has ended.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tonic::transport::Channel;

use super::CallKind;
use crate::client::ClientError;
use crate::resilience::{Admission, Breaker, BreakerOptions, BreakerState};
use crate::wire::channel::{self, ChannelOptions};

/// What the last health check of an endpoint said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndpointHealth {
    /// It has not been asked.
    #[default]
    Unknown,
    /// It serves.
    Serving,
    /// It answers, and says that it does not serve: it has no leader, or stops.
    NotServing,
    /// It gave no answer.
    Unreachable,
    /// It is of another cluster, and is never used.
    WrongCluster,
}

/// The latency that a call without an answer counts as, at least. An endpoint
/// that fails at once must not look fast.
const FAILURE_LATENCY: Duration = Duration::from_secs(1);

/// No time for a probe is set.
const NEVER: u64 = u64::MAX;

/// One server address.
#[derive(Debug)]
pub struct Endpoint {
    address: String,
    /// Whether a person gave it; otherwise a member list did.
    given: bool,
    channel: Channel,
    /// Calls and streams under way.
    calls: AtomicU32,
    streams: AtomicU32,
    picks: AtomicU64,
    /// Its account in the smooth weighted round.
    account: AtomicI64,
    /// Written with `vitals` locked: the moving average in nanoseconds (0 before
    /// the first answer), and when it was that.
    latency_ns: AtomicU64,
    latency_at_ns: AtomicU64,
    /// When a call may find out whether the breaker can close; [`NEVER`] while
    /// there is nothing to find out.
    probe_at_ns: AtomicU64,
    /// Left out of choices. Set for all endpoints together: see [`super::ejection`].
    ejected: AtomicBool,
    vitals: Mutex<Vitals>,
}

#[derive(Debug)]
struct Vitals {
    breaker: Option<Breaker>,
    health: EndpointHealth,
}

impl Endpoint {
    /// An endpoint without a connection. Must be called inside a Tokio runtime.
    pub fn new(
        address: &str,
        given: bool,
        options: &ChannelOptions,
        ejection: Option<BreakerOptions>,
    ) -> Result<Endpoint, ClientError> {
        Ok(Endpoint {
            address: address.to_owned(),
            given,
            channel: channel::connect(address, options)?,
            calls: AtomicU32::new(0),
            streams: AtomicU32::new(0),
            picks: AtomicU64::new(0),
            account: AtomicI64::new(0),
            latency_ns: AtomicU64::new(0),
            latency_at_ns: AtomicU64::new(0),
            probe_at_ns: AtomicU64::new(NEVER),
            ejected: AtomicBool::new(false),
            vitals: Mutex::new(Vitals {
                breaker: ejection.map(Breaker::new),
                health: EndpointHealth::default(),
            }),
        })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn is_given(&self) -> bool {
        self.given
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A call of this kind begins.
    pub fn begin(&self, kind: CallKind) {
        self.picks.fetch_add(1, Relaxed);
        self.under_way(kind).fetch_add(1, Relaxed);
    }

    /// A call of this kind is over, however it went.
    pub fn end(&self, kind: CallKind) {
        self.under_way(kind).fetch_sub(1, Relaxed);
    }

    /// Streams last and cost little, so they are no measure of how busy an
    /// endpoint is with calls, nor the other way round.
    fn under_way(&self, kind: CallKind) -> &AtomicU32 {
        if kind == CallKind::Stream { &self.streams } else { &self.calls }
    }

    /// What of this kind is under way.
    pub fn load(&self, kind: CallKind) -> u32 {
        self.under_way(kind).load(Relaxed)
    }

    pub fn picks(&self) -> u64 {
        self.picks.load(Relaxed)
    }

    pub fn account(&self) -> &AtomicI64 {
        &self.account
    }

    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    /// Returns whether that changed anything.
    pub fn set_ejected(&self, ejected: bool) -> bool {
        self.ejected.swap(ejected, Relaxed) != ejected
    }

    /// The average latency in nanoseconds, as far as it is not forgotten; 0 when
    /// there is none.
    pub fn latency_ns(&self, now: Duration, decay: Duration) -> f64 {
        let age = nanos(now).saturating_sub(self.latency_at_ns.load(Relaxed));
        self.latency_ns.load(Relaxed) as f64 * faded(age, decay)
    }

    /// An answer came after `latency` (`None`: it says nothing, as a stream's).
    /// Returns whether the endpoint is well by it that was not before.
    pub fn on_success(&self, now: Duration, latency: Option<Duration>, decay: Duration) -> bool {
        let mut vitals = self.vitals.lock();
        if let Some(latency) = latency {
            self.note_latency(now, latency, decay);
        }
        let Some(breaker) = &mut vitals.breaker else { return false };
        let was = breaker.state();
        if was == BreakerState::Closed {
            // A closed one admits everything, and counts successes as of then.
            breaker.admit(now);
        }
        breaker.on_success();
        if was != BreakerState::Closed {
            self.probe_at_ns.store(NEVER, Relaxed);
        }
        was != BreakerState::Closed
    }

    /// No answer came, or one that blames the server. Returns whether the
    /// endpoint is unwell by it that was well before.
    pub fn on_failure(&self, now: Duration, random: u64, latency: Option<Duration>, decay: Duration) -> bool {
        let mut vitals = self.vitals.lock();
        if let Some(latency) = latency {
            self.note_latency(now, latency.max(FAILURE_LATENCY), decay);
        }
        let Some(breaker) = &mut vitals.breaker else { return false };
        let was = breaker.state();
        breaker.on_failure(now, random);
        if breaker.state() == BreakerState::Open && was != BreakerState::Open {
            self.set_probe_time(breaker, now);
        }
        was == BreakerState::Closed && breaker.state() != BreakerState::Closed
    }

    /// A peak counts at once; a lower value only as much as time has passed.
    fn note_latency(&self, now: Duration, latency: Duration, decay: Duration) {
        let (latency, now_ns) = (latency.as_nanos() as f64, nanos(now));
        let average = self.latency_ns.load(Relaxed) as f64;
        let age = now_ns.saturating_sub(self.latency_at_ns.load(Relaxed));
        let keeps = faded(age, decay);
        let next = if latency >= average { latency } else { average * keeps + latency * (1.0 - keeps) };
        // 0 means that there is none.
        self.latency_ns.store((next as u64).max(1), Relaxed);
        self.latency_at_ns.store(now_ns, Relaxed);
    }

    /// Whether the time has come for a call to find out if an open breaker can
    /// close. A glance at one atomic, for picks.
    pub fn is_probe_due(&self, now: Duration) -> bool {
        self.probe_at_ns.load(Relaxed) <= nanos(now)
    }

    /// Takes the probe for the caller, whose call then decides. Only one caller
    /// gets it, and none while health checks say that it would fail.
    pub fn take_probe(&self, now: Duration) -> bool {
        let mut vitals = self.vitals.lock();
        if is_ill(vitals.health) {
            return false;
        }
        let Some(breaker) = &mut vitals.breaker else { return false };
        let taken = breaker.admit(now) == Admission::Probe;
        self.set_probe_time(breaker, now);
        taken
    }

    fn set_probe_time(&self, breaker: &mut Breaker, now: Duration) {
        let at = match breaker.admit(now) {
            Admission::Refuse { retry_after } => nanos(now + retry_after),
            Admission::Pass | Admission::Probe => NEVER,
        };
        self.probe_at_ns.store(at, Relaxed);
    }

    /// What a health check found. Returns whether it is news.
    pub fn set_health(&self, health: EndpointHealth) -> bool {
        let mut vitals = self.vitals.lock();
        let was = std::mem::replace(&mut vitals.health, health);
        // Calls failed there because it was away, and it is back: no need to wait
        // until the breaker's time has come.
        if was == EndpointHealth::Unreachable
            && !is_ill(health)
            && let Some(breaker) = &mut vitals.breaker
        {
            breaker.on_success();
            self.probe_at_ns.store(NEVER, Relaxed);
        }
        was != health
    }

    pub fn health(&self) -> EndpointHealth {
        self.vitals.lock().health
    }

    pub fn breaker(&self) -> BreakerState {
        self.vitals.lock().breaker.as_ref().map_or(BreakerState::Closed, Breaker::state)
    }

    /// Whether nothing speaks against it.
    pub fn is_well(&self) -> bool {
        let vitals = self.vitals.lock();
        !is_ill(vitals.health)
            && vitals.breaker.as_ref().is_none_or(|breaker| breaker.state() == BreakerState::Closed)
    }
}

/// Whether calls there would fail.
fn is_ill(health: EndpointHealth) -> bool {
    !matches!(health, EndpointHealth::Unknown | EndpointHealth::Serving)
}

/// What is left of something after `age_ns`, of 1.
fn faded(age_ns: u64, decay: Duration) -> f64 {
    (-(age_ns as f64) / (decay.as_nanos() as f64).max(1.0)).exp()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECAY: Duration = Duration::from_secs(10);
    const SECOND: Duration = Duration::from_secs(1);

    fn endpoint() -> Endpoint {
        let ejection = BreakerOptions { failures_max: 2, ..BreakerOptions::default() };
        Endpoint::new("a:1", true, &ChannelOptions::default(), Some(ejection)).expect("an address")
    }

    fn open(endpoint: &Endpoint) {
        assert!(!endpoint.on_failure(SECOND, 0, None, DECAY));
        assert!(endpoint.on_failure(SECOND, 0, None, DECAY), "the second failure opens it");
    }

    #[tokio::test]
    async fn a_peak_counts_at_once_and_is_forgotten_slowly() {
        let endpoint = endpoint();
        let ms = Duration::from_millis;
        let latency = |now| (endpoint.latency_ns(now, DECAY) / 1e6).round() as u64;
        assert_eq!(latency(SECOND), 0);
        endpoint.on_success(SECOND, Some(ms(10)), DECAY);
        endpoint.on_success(SECOND, Some(ms(100)), DECAY);
        assert_eq!(latency(SECOND), 100);
        endpoint.on_success(SECOND, Some(ms(10)), DECAY);
        assert_eq!(latency(SECOND), 100, "no time has passed");
        endpoint.on_success(SECOND * 11, Some(ms(10)), DECAY);
        assert_eq!(latency(SECOND * 11), 43);
        assert_eq!(latency(SECOND * 21), 16);
    }

    #[tokio::test]
    async fn failing_fast_does_not_look_fast() {
        let endpoint = endpoint();
        endpoint.on_failure(SECOND, 0, Some(Duration::from_millis(1)), DECAY);
        assert_eq!(endpoint.latency_ns(SECOND, DECAY), 1e9);
    }

    #[tokio::test]
    async fn one_caller_gets_the_probe_and_decides() {
        let endpoint = endpoint();
        assert!(!endpoint.is_probe_due(SECOND * 100));
        open(&endpoint);
        assert!(!endpoint.is_well());
        assert!(!endpoint.is_probe_due(SECOND));
        assert!(endpoint.is_probe_due(SECOND * 2));
        assert!(endpoint.take_probe(SECOND * 2));
        assert!(!endpoint.is_probe_due(SECOND * 2), "it is taken");
        assert!(!endpoint.take_probe(SECOND * 2));
        assert!(endpoint.on_success(SECOND * 2, None, DECAY));
        assert!(endpoint.is_well());
        assert!(!endpoint.is_probe_due(SECOND * 100));
    }

    #[tokio::test]
    async fn a_lost_probe_is_given_again() {
        let endpoint = endpoint();
        open(&endpoint);
        assert!(endpoint.take_probe(SECOND * 2));
        let later = SECOND * 2 + BreakerOptions::default().probe_timeout;
        assert!(endpoint.is_probe_due(later) && endpoint.take_probe(later));
    }

    #[tokio::test]
    async fn there_is_no_probe_where_health_says_that_it_would_fail() {
        let endpoint = endpoint();
        open(&endpoint);
        assert!(endpoint.set_health(EndpointHealth::NotServing));
        assert!(!endpoint.take_probe(SECOND * 2));
        assert!(endpoint.set_health(EndpointHealth::Serving));
        assert!(!endpoint.is_well(), "calls failed while it said that it serves");
        assert!(endpoint.take_probe(SECOND * 2));
    }

    #[tokio::test]
    async fn who_was_away_and_is_back_is_well() {
        let endpoint = endpoint();
        open(&endpoint);
        endpoint.set_health(EndpointHealth::Unreachable);
        assert!(!endpoint.is_well());
        endpoint.set_health(EndpointHealth::Serving);
        assert!(endpoint.is_well());
    }
}
