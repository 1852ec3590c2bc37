//! Who may go first when not all may go at once: four priorities, queued fairly.
//!
//! Invariants: never more in flight than the limit; a waiter goes before those
//! of its own priority that came after it; while a priority has waiters it gets
//! its share of the turns (8, 4, 2 and 1 of 15), so that none starves; the queue
//! is bounded. Overflow: the newest waiter of a lower priority gives its place
//! up, and without one the newcomer is refused. Who could not go before its
//! deadline is refused at once, and who waited past it is passed over.

use std::collections::VecDeque;
use std::time::Duration;

use super::RateLimit;

/// How much a call matters when not all can be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// What the service cannot go on without.
    Critical,
    /// What somebody waits for.
    High,
    /// Everything else.
    #[default]
    Normal,
    /// What can wait: sweeps, warm-ups, reports.
    Low,
}

impl Priority {
    /// All of them, the most urgent first.
    pub const ALL: [Priority; 4] = [Priority::Critical, Priority::High, Priority::Normal, Priority::Low];

    /// Its name, as metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Priority::Critical => "critical",
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }

    /// How far one turn moves its queue: the reciprocal of its share.
    fn stride(self) -> u64 {
        1 << (self as u64)
    }
}

/// Names one waiter, for giving up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    priority: Priority,
    number: u64,
}

/// Why a newcomer may neither go nor wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateRefusal {
    /// The queue is full of what is as urgent or more.
    Full,
    /// Its turn would come after its deadline.
    TooLate,
}

/// What became of a newcomer.
#[derive(Debug)]
pub enum Entry<T> {
    /// It goes; [`Gate::leave`] is to be called when it is done.
    Admitted,
    /// It waits. Whoever had to make room for it is in `evicted`.
    Queued {
        /// Its ticket.
        ticket: Ticket,
        /// The waiter that lost its place.
        evicted: Option<T>,
    },
}

struct Waiter<T> {
    number: u64,
    deadline: Option<Duration>,
    value: T,
}

/// A gate. `T` is what a waiter is told by that it may go.
pub struct Gate<T> {
    limit: usize,
    queue_max: usize,
    rate: Option<RateLimit>,
    in_flight: usize,
    queues: [VecDeque<Waiter<T>>; 4],
    /// How far each priority's turns have come; the least goes next.
    turns: [u64; 4],
    /// Where the newest turn was: who was idle starts from here.
    turn: u64,
    next_number: u64,
}

impl<T> Gate<T> {
    /// A gate that lets `limit` calls be in flight (at least 1), `rate` of them
    /// begin, and `queue_max` wait.
    pub fn new(limit: usize, queue_max: usize, rate: Option<RateLimit>) -> Gate<T> {
        Gate {
            limit: limit.max(1),
            queue_max,
            rate,
            in_flight: 0,
            queues: std::array::from_fn(|_| VecDeque::new()),
            turns: [0; 4],
            turn: 0,
            next_number: 0,
        }
    }

    /// A call wants to go at `now`, and is of no use after `deadline`.
    ///
    /// # Errors
    /// [`GateRefusal`] when it may neither go nor wait.
    pub fn enter(
        &mut self,
        priority: Priority,
        deadline: Option<Duration>,
        now: Duration,
        value: T,
    ) -> Result<Entry<T>, GateRefusal> {
        if self.queued() == 0 && self.may_go(now) {
            self.in_flight += 1;
            return Ok(Entry::Admitted);
        }
        let at_least = self.wait_behind(now, self.queues[priority as usize].len());
        if deadline.is_some_and(|deadline| now + at_least > deadline) {
            return Err(GateRefusal::TooLate);
        }
        let evicted = match self.queued() < self.queue_max {
            true => None,
            false => Some(self.evict(priority).ok_or(GateRefusal::Full)?),
        };
        let queue = &mut self.queues[priority as usize];
        if queue.is_empty() {
            // What it did not use while it was away is not saved up.
            self.turns[priority as usize] = self.turns[priority as usize].max(self.turn);
        }
        let number = self.next_number;
        self.next_number += 1;
        queue.push_back(Waiter { number, deadline, value });
        Ok(Entry::Queued { ticket: Ticket { priority, number }, evicted })
    }

    /// The next waiter that may go at `now`; to be asked until there is none,
    /// after whatever could have made room. Waiters past their deadline are
    /// dropped on the way.
    pub fn next(&mut self, now: Duration) -> Option<T> {
        loop {
            let urgent =
                Priority::ALL.into_iter().filter(|priority| !self.queues[*priority as usize].is_empty());
            let priority = urgent.min_by_key(|priority| (self.turns[*priority as usize], *priority))?;
            let queue = &mut self.queues[priority as usize];
            if queue.front()?.deadline.is_some_and(|deadline| deadline < now) {
                queue.pop_front();
                continue;
            }
            if !self.may_go(now) {
                return None;
            }
            let waiter = self.queues[priority as usize].pop_front()?;
            self.turn = self.turns[priority as usize];
            self.turns[priority as usize] += priority.stride();
            self.in_flight += 1;
            return Some(waiter.value);
        }
    }

    /// A call that went is done.
    pub fn leave(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// A waiter gives up. Nothing happens if it is not waiting any more.
    pub fn give_up(&mut self, ticket: Ticket) {
        let queue = &mut self.queues[ticket.priority as usize];
        if let Ok(place) = queue.binary_search_by_key(&ticket.number, |waiter| waiter.number) {
            queue.remove(place);
        }
    }

    /// How long the rate keeps this waiter waiting at the least; `None` if
    /// only the limit does, or nothing.
    pub fn rate_wait(&self, ticket: Ticket, now: Duration) -> Option<Duration> {
        let queue = &self.queues[ticket.priority as usize];
        let place = queue.binary_search_by_key(&ticket.number, |waiter| waiter.number).ok()?;
        self.rate.as_ref().map(|_| self.wait_behind(now, place))
    }

    /// Lets `limit` calls be in flight from here on, at least 1.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.max(1);
    }

    /// The calls that went and are not done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The calls that wait.
    pub fn queued(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    /// Whether one more may go; takes what the rate asks for.
    fn may_go(&mut self, now: Duration) -> bool {
        self.in_flight < self.limit && self.rate.as_mut().is_none_or(|rate| rate.take(now).is_ok())
    }

    fn wait_behind(&self, now: Duration, ahead: usize) -> Duration {
        let place = u32::try_from(ahead + 1).unwrap_or(u32::MAX);
        self.rate.as_ref().map_or(Duration::ZERO, |rate| rate.wait_for(now, place))
    }

    fn evict(&mut self, newcomer: Priority) -> Option<T> {
        let lower = Priority::ALL.into_iter().rev().take_while(|priority| *priority > newcomer);
        lower
            .into_iter()
            .find_map(|priority| self.queues[priority as usize].pop_back())
            .map(|waiter| waiter.value)
    }
}

impl<T> std::fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (limit, in_flight) = (self.limit, self.in_flight);
        write!(f, "Gate({in_flight} of {limit} in flight, {} waiting)", self.queued())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resilience::RateLimitOptions;

    const MS: Duration = Duration::from_millis(1);
    const T0: Duration = Duration::from_secs(1);

    fn gate(limit: usize, queue_max: usize) -> Gate<&'static str> {
        Gate::new(limit, queue_max, None)
    }

    fn queue(gate: &mut Gate<&'static str>, priority: Priority, name: &'static str) -> Ticket {
        match gate.enter(priority, None, T0, name).expect("there is room") {
            Entry::Queued { ticket, evicted: None } => ticket,
            other => panic!("{name}: {other:?}"),
        }
    }

    fn fill(gate: &mut Gate<&'static str>) {
        while gate.in_flight() < gate.limit {
            assert!(matches!(gate.enter(Priority::Low, None, T0, "filler"), Ok(Entry::Admitted)));
        }
    }

    fn serve(gate: &mut Gate<&'static str>, turns: usize) -> Vec<&'static str> {
        let mut served = Vec::new();
        for _ in 0..turns {
            gate.leave();
            served.extend(gate.next(T0));
        }
        served
    }

    #[test]
    fn never_more_in_flight_than_the_limit() {
        let mut gate = gate(2, 10);
        fill(&mut gate);
        queue(&mut gate, Priority::Critical, "a");
        assert_eq!(gate.next(T0), None);
        gate.leave();
        assert_eq!(gate.next(T0), Some("a"));
        assert_eq!((gate.in_flight(), gate.queued()), (2, 0));
    }

    #[test]
    fn each_priority_gets_its_share_and_none_starves() {
        let mut gate = gate(1, 400);
        fill(&mut gate);
        for _ in 0..90 {
            for priority in Priority::ALL {
                queue(&mut gate, priority, priority.name());
            }
        }
        let served = serve(&mut gate, 150);
        let count = |name| served.iter().filter(|served| **served == name).count();
        let counts = [count("critical"), count("high"), count("normal"), count("low")];
        assert!((78..=82).contains(&counts[0]) && (8..=12).contains(&counts[3]), "{counts:?}");
        assert!(counts.is_sorted_by(|more, less| more > less), "{counts:?}");
    }

    #[test]
    fn in_one_priority_the_first_comes_first() {
        let mut gate = gate(1, 10);
        fill(&mut gate);
        for name in ["a", "b", "c"] {
            queue(&mut gate, Priority::High, name);
        }
        assert_eq!(serve(&mut gate, 3), ["a", "b", "c"]);
    }

    #[test]
    fn who_was_away_does_not_make_up_for_it() {
        let mut gate = gate(1, 200);
        fill(&mut gate);
        for _ in 0..60 {
            queue(&mut gate, Priority::Critical, "critical");
        }
        serve(&mut gate, 40);
        for _ in 0..20 {
            queue(&mut gate, Priority::Low, "low");
        }
        let served = serve(&mut gate, 10);
        assert!(served.iter().filter(|name| **name == "low").count() <= 3, "{served:?}");
    }

    #[test]
    fn a_full_queue_gives_way_to_the_more_urgent_only() {
        let mut gate = gate(1, 2);
        fill(&mut gate);
        queue(&mut gate, Priority::Low, "old");
        queue(&mut gate, Priority::Low, "new");
        assert_eq!(gate.enter(Priority::Low, None, T0, "x").err(), Some(GateRefusal::Full));
        let entry = gate.enter(Priority::High, None, T0, "urgent").expect("it makes room");
        assert!(matches!(entry, Entry::Queued { evicted: Some("new"), .. }), "{entry:?}");
        assert_eq!(gate.queued(), 2);
        assert_eq!(serve(&mut gate, 2), ["urgent", "old"]);
    }

    #[test]
    fn who_gave_up_or_is_too_late_is_passed_over() {
        let mut gate = gate(1, 10);
        fill(&mut gate);
        let gone = queue(&mut gate, Priority::Normal, "gone");
        gate.enter(Priority::Normal, Some(T0 + MS), T0, "late").expect("it may wait");
        queue(&mut gate, Priority::Normal, "here");
        gate.give_up(gone);
        gate.give_up(gone);
        gate.leave();
        assert_eq!(gate.next(T0 + MS * 2), Some("here"));
        assert_eq!(gate.queued(), 0);
    }

    #[test]
    fn a_rate_is_shared_by_priority_too_and_tells_how_long() {
        let rate = RateLimitOptions::TokenBucket { per_second: 100, burst: 1 };
        let mut gate = Gate::new(1_000, 100, Some(RateLimit::new(rate)));
        assert!(matches!(gate.enter(Priority::Low, None, T0, "first"), Ok(Entry::Admitted)));
        let low = queue(&mut gate, Priority::Low, "low");
        let low_2 = queue(&mut gate, Priority::Low, "low 2");
        queue(&mut gate, Priority::Critical, "critical");
        assert_eq!(gate.rate_wait(low, T0), Some(MS * 10));
        assert_eq!(gate.rate_wait(low_2, T0), Some(MS * 20));
        assert_eq!(gate.next(T0 + MS * 9), None);
        assert_eq!(gate.next(T0 + MS * 10), Some("critical"));
        assert_eq!(gate.next(T0 + MS * 10), None);
        assert_eq!(gate.next(T0 + MS * 20), Some("low"));
        assert_eq!(gate.rate_wait(low, T0), None, "it waits no more");
    }

    #[test]
    fn a_wait_that_must_end_too_late_is_refused_at_once() {
        let rate = RateLimitOptions::TokenBucket { per_second: 1, burst: 1 };
        let mut gate = Gate::new(1_000, 100, Some(RateLimit::new(rate)));
        assert!(matches!(gate.enter(Priority::Low, None, T0, "first"), Ok(Entry::Admitted)));
        let refused = gate.enter(Priority::Low, Some(T0 + MS * 500), T0, "second");
        assert_eq!(refused.err(), Some(GateRefusal::TooLate));
    }
}
