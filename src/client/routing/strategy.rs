//! Choosing one of several endpoints, as a pure function of what is known of
//! them. It neither waits nor locks nor allocates.
//!
//! What speaks against an endpoint is its *penalty*, a number whose bits are
//! reasons, the worst one the highest. A choice is made among those with the
//! least penalty only, so that there always is one, however bad things are.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use super::hash::mixed;
use super::options::Strategy;
use super::tables::{Maglev, Ring};

/// Reasons not to take an endpoint.
pub mod penalty {
    /// It is known to refuse such calls, or must not be asked.
    pub const UNFIT: u8 = 1 << 7;
    /// This call has failed there already.
    pub const TRIED: u8 = 1 << 6;
    /// It is out because calls or health checks fail.
    pub const EJECTED: u8 = 1 << 5;
    /// It is a given address, and members are there to be used.
    pub const SPARE: u8 = 1 << 4;
    /// The leader is wanted.
    pub const NOT_LEADER: u8 = 1 << 3;
    /// It is not in the client's zone.
    pub const FAR: u8 = 1 << 2;
}

/// The endpoints as a strategy sees them; places are below [`View::count`].
pub trait View {
    /// How many there are; never 0.
    fn count(&self) -> usize;
    /// What speaks against it.
    fn penalty(&self, at: usize) -> u8;
    /// Its name, hashed.
    fn id_hash(&self, at: usize) -> u64;
    /// Its weight; at least 1.
    fn weight(&self, at: usize) -> u32;
    /// What this client has under way there, of the kind of call in question.
    fn load(&self, at: usize) -> u32;
    /// How long an answer takes, in nanoseconds; 0 when nobody knows.
    fn latency_ns(&self, at: usize) -> f64;
    /// Its account in the smooth weighted round.
    fn account(&self, at: usize) -> &AtomicI64;
    /// Whether all weights are the same.
    fn is_even(&self) -> bool;
    /// The ring, if a strategy needs one.
    fn ring(&self) -> Option<&Ring>;
    /// The maglev table, if a strategy needs one.
    fn maglev(&self) -> Option<&Maglev>;
}

/// What one choice goes by, besides the endpoints.
pub struct Draw<'a> {
    /// The hash of what the call is about, if it is about one key or prefix.
    pub key: Option<u64>,
    /// The turn of whoever sticks to an endpoint.
    pub turn: usize,
    /// A source of random numbers.
    pub random: &'a dyn Fn() -> u64,
}

/// How one kind of calls chooses: a strategy without its wrappers.
#[derive(Debug)]
pub struct Chooser {
    base: Strategy,
    /// Whether the leader comes first.
    pub wants_leader: bool,
    /// Whether the client's zone comes first.
    pub wants_zone: bool,
    round: AtomicUsize,
}

/// An endpoint is never too loaded for hashing below this many calls or streams:
/// with few under way, a bound near the average would move keys about for nothing.
pub const LOAD_FLOOR: u32 = 8;

/// The load of an endpoint that has answered nothing yet, as if it were this slow.
const UNKNOWN_LATENCY_NS: f64 = 1e9;

impl Chooser {
    /// Takes the wrappers off.
    pub fn new(strategy: &Strategy) -> Chooser {
        let (mut wants_leader, mut wants_zone, mut base) = (false, false, strategy);
        loop {
            match base {
                Strategy::LeaderFirst(inner) => (wants_leader, base) = (true, inner),
                Strategy::ZoneLocal(inner) => (wants_zone, base) = (true, inner),
                _ => break,
            }
        }
        Chooser { base: base.clone(), wants_leader, wants_zone, round: AtomicUsize::new(0) }
    }

    /// The place of the endpoint to take.
    pub fn choose(&self, view: &impl View, draw: &Draw<'_>) -> usize {
        if view.count() == 1 {
            return 0;
        }
        let random = || (draw.random)();
        let key = || draw.key.unwrap_or_else(random);
        let field = || Field::new(view);
        match &self.base {
            Strategy::Rendezvous { load_bound } => field().rendezvous(key(), *load_bound),
            Strategy::Ring { load_bound, .. } => {
                let key = key();
                walk(view, view.ring().map(|ring| ring.walk(key)), key, *load_bound)
            }
            Strategy::Maglev { load_bound } => {
                let key = key();
                walk(view, view.maglev().map(|table| table.walk(key)), key, *load_bound)
            }
            Strategy::RoundRobin => field().round_robin(self.round.fetch_add(1, Ordering::Relaxed)),
            Strategy::WeightedRoundRobin => field().weighted_round_robin(),
            Strategy::WeightedRandom => field().weighted_random(random()),
            Strategy::LeastInFlight => field().least_in_flight(random()),
            Strategy::PeakEwma => field().faster_of_two(random()),
            // The wrappers have been taken off.
            Strategy::Sticky | Strategy::LeaderFirst(_) | Strategy::ZoneLocal(_) => field().sticky(draw.turn),
        }
    }
}

/// The first endpoint of a table's walk that may be used, or the best ranked one
/// if the table has none.
fn walk<V: View>(view: &V, places: Option<impl Iterator<Item = usize>>, key: u64, load_bound: f64) -> usize {
    let unbounded = load_bound.is_infinite();
    let mut places = places.into_iter().flatten();
    // Nearly always the first one is well, and nothing else needs to be looked at.
    let first = places.next();
    if let Some(first) = first
        && unbounded
        && view.penalty(first) == 0
    {
        return first;
    }
    let field = Field::new(view);
    let bound = Bound::new(&field, load_bound);
    let mut fits = |at: &usize| field.has(*at) && bound.allows(&field, *at);
    let found = first.filter(&mut fits).or_else(|| places.find(&mut fits));
    found.unwrap_or_else(|| field.rendezvous(key, load_bound))
}

/// The endpoints with the least penalty.
struct Field<'a, V> {
    view: &'a V,
    least: u8,
    count: usize,
}

/// How much load an endpoint may have, so that none has much more than its share.
struct Bound {
    /// For each unit of weight; infinite when there is no bound.
    per_weight: f64,
}

impl Bound {
    fn new<V: View>(field: &Field<'_, V>, factor: f64) -> Bound {
        if factor.is_infinite() {
            return Bound { per_weight: f64::INFINITY };
        }
        let (mut load, mut weight) = (1u64, 0u64);
        for at in field.places() {
            load += u64::from(field.view.load(at));
            weight += u64::from(field.view.weight(at));
        }
        Bound { per_weight: factor * load as f64 / weight.max(1) as f64 }
    }

    /// Whether one more fits in. At least one endpoint always has room, because
    /// the bounds of all together are above the load of all together.
    fn allows<V: View>(&self, field: &Field<'_, V>, at: usize) -> bool {
        let load = field.view.load(at);
        load < LOAD_FLOOR || f64::from(load) < (self.per_weight * f64::from(field.view.weight(at))).ceil()
    }
}

impl<'a, V: View> Field<'a, V> {
    fn new(view: &'a V) -> Field<'a, V> {
        let (mut least, mut count) = (u8::MAX, 0);
        for at in 0..view.count() {
            match view.penalty(at) {
                penalty if penalty < least => (least, count) = (penalty, 1),
                penalty if penalty == least => count += 1,
                _ => {}
            }
        }
        Field { view, least, count }
    }

    fn has(&self, at: usize) -> bool {
        // Health may change while a choice is made; what has become better is welcome.
        self.view.penalty(at) <= self.least
    }

    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.view.count()).filter(|at| self.has(*at))
    }

    /// The `n`th of them, counted around.
    fn nth(&self, n: usize) -> usize {
        let n = n % self.count.max(1);
        let mut last = 0;
        for (seen, at) in self.places().enumerate() {
            last = at;
            if seen == n {
                break;
            }
        }
        last
    }

    /// Highest random weight: each endpoint has a score for the key, and the
    /// highest score with room wins. Without one, its keys go to the second best
    /// of each, and nobody else's keys move.
    fn rendezvous(&self, key: u64, load_bound: f64) -> usize {
        let bound = Bound::new(self, load_bound);
        let score = |at| mixed(key, self.view.id_hash(at));
        let places = self.places().filter(|at| bound.allows(self, *at));
        let best = if self.view.is_even() {
            places.max_by_key(|at| score(*at))
        } else {
            // -w / ln(u) for u in (0, 1): the share of keys is the share of weight.
            let weighted = |at: usize| {
                let unit = (score(at) as f64 + 1.0) / (u64::MAX as f64 + 2.0);
                f64::from(self.view.weight(at)) / -unit.ln()
            };
            places.max_by(|a, b| weighted(*a).total_cmp(&weighted(*b)))
        };
        best.unwrap_or_else(|| self.nth(key as usize))
    }

    fn round_robin(&self, turn: usize) -> usize {
        self.nth(turn)
    }

    /// Each turn, everyone's account grows by its weight, the richest is taken
    /// and pays for all: the heavy ones come often, and never in one row.
    fn weighted_round_robin(&self) -> usize {
        let (mut total, mut best) = (0, (i64::MIN, self.nth(0)));
        for at in self.places() {
            let weight = i64::from(self.view.weight(at));
            total += weight;
            let account = self.view.account(at).fetch_add(weight, Ordering::Relaxed) + weight;
            if account > best.0 {
                best = (account, at);
            }
        }
        self.view.account(best.1).fetch_sub(total, Ordering::Relaxed);
        best.1
    }

    fn weighted_random(&self, random: u64) -> usize {
        let total: u64 = self.places().map(|at| u64::from(self.view.weight(at))).sum();
        let mut left = random % total.max(1);
        for at in self.places() {
            let weight = u64::from(self.view.weight(at));
            if left < weight {
                return at;
            }
            left -= weight;
        }
        self.nth(0)
    }

    /// The least load for its weight; among equals, any.
    fn least_in_flight(&self, random: u64) -> usize {
        let (mut best, mut equals) = (f64::INFINITY, 0u64);
        let mut taken = self.nth(0);
        for at in self.places() {
            let load = f64::from(self.view.load(at)) / f64::from(self.view.weight(at));
            if load < best {
                (best, equals, taken) = (load, 1, at);
            } else if load == best {
                equals += 1;
                // The n-th equal replaces the one before with a chance of 1 in n.
                if mixed(random, equals).is_multiple_of(equals) {
                    taken = at;
                }
            }
        }
        taken
    }

    /// Two at random, and the one of them that promises the earlier answer.
    fn faster_of_two(&self, random: u64) -> usize {
        if self.count < 2 {
            return self.nth(0);
        }
        let (high, low) = ((random >> 32) as usize, random as u32 as usize);
        let first = high % self.count;
        let second = (first + 1 + low % (self.count - 1)) % self.count;
        let (first, second) = (self.nth(first), self.nth(second));
        match self.cost(second) < self.cost(first) {
            true => second,
            false => first,
        }
    }

    /// What a call costs there: the latency, times the calls that share it. An
    /// endpoint that nobody knows is tried once; while that is under way, it
    /// counts as slow.
    fn cost(&self, at: usize) -> f64 {
        let load = self.view.load(at);
        let latency = match self.view.latency_ns(at) {
            0.0 if load > 0 => UNKNOWN_LATENCY_NS,
            known => known,
        };
        latency * (f64::from(load) + 1.0) / f64::from(self.view.weight(at))
    }

    /// The first from `turn` on.
    fn sticky(&self, turn: usize) -> usize {
        let count = self.view.count();
        (0..count).map(|step| (turn.wrapping_add(step)) % count).find(|at| self.has(*at)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
