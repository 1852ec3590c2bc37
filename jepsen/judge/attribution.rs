//! Who may have made a revision that no answer claims: calls without an answer,
//! retries, and calls that change keys as a side effect (locks, revoked leases).
//! It finds the likely ones by what they would write; the model decides.

use std::collections::{BTreeSet, HashMap};

use super::calls::Done;
use super::event_log;
use super::history::{Action, Body, Call, Event, EventKind, Revision, Span};
use super::model::Store;
use super::revision_order::changed;

/// A call that may have made a revision.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Its place among the calls.
    pub place: usize,
    /// Its revision is higher than this one.
    pub after: Revision,
    /// Its revision is not higher than this one.
    pub until: Revision,
    /// It certainly made one.
    pub must: bool,
}

/// All candidates, by what they may write.
#[derive(Debug, Default)]
pub struct Candidates<'a> {
    all: Vec<Candidate>,
    puts: HashMap<(&'a str, &'a str), Vec<usize>>,
    deletes: HashMap<&'a str, Vec<usize>>,
    spans: Vec<(&'a Span, usize)>,
    /// By lease.
    revokes: HashMap<i64, Vec<usize>>,
    /// By the lock's name.
    locks: HashMap<&'a str, Vec<usize>>,
}

/// Keys and values that a call may put.
pub fn puts(call: &Call) -> Vec<(&str, &str)> {
    let mut puts = Vec::new();
    for action in actions(call) {
        if let Action::Put { key, value, .. } = action {
            puts.push((key.as_str(), value.as_str()));
        }
    }
    puts
}

fn actions(call: &Call) -> Vec<&Action> {
    match call {
        Call::Single { action, .. } => vec![action],
        Call::Txn(txn) => txn.success.iter().chain(&txn.failure).collect(),
        _ => Vec::new(),
    }
}

impl<'a> Candidates<'a> {
    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn get(&self, number: usize) -> &Candidate {
        &self.all[number]
    }

    pub fn all(&self) -> impl Iterator<Item = &Candidate> {
        self.all.iter()
    }

    /// Takes in a call that began after revision `after` was known, if it may change anything.
    pub fn take(&mut self, call: &Done<'a>, place: usize, after: Revision) {
        let number = self.all.len();
        let until = call.reply().map_or(Revision::MAX, |reply| reply.revision);
        let must = call.body().is_some_and(changed);
        let candidate = Candidate { place, after, until, must };
        let mut may_change = false;
        // Of an answered call, only what it says it changed.
        let written = if call.body().is_some() && !must { Vec::new() } else { actions(&call.op.call) };
        for action in written {
            match action {
                Action::Put { key, value, .. } => self.puts.entry((key, value)).or_default().push(number),
                Action::Delete { span, .. } if span.end.is_none() => {
                    self.deletes.entry(&span.key).or_default().push(number)
                }
                Action::Delete { span, .. } => self.spans.push((span, number)),
                Action::Range { .. } => continue,
            }
            may_change = true;
        }
        match &call.op.call {
            Call::LeaseRevoke { id } => self.revokes.entry(*id).or_default().push(number),
            Call::Unlock { key } => self.deletes.entry(key).or_default().push(number),
            Call::Lock { name, .. } => {
                // It may put its key and, when nobody waits for the answer any more, delete it again.
                self.locks.entry(name).or_default().extend([number, number + 1]);
                self.all.push(candidate);
            }
            _ if may_change => {}
            _ => return,
        }
        self.all.push(candidate);
    }

    /// Who may have made these events of a store, by a first look.
    pub fn likely(&self, store: &Store, events: &[Event]) -> Vec<usize> {
        let Some(first) = events.first() else { return Vec::new() };
        let key = first.kv.key.as_str();
        let mut found: Vec<usize> = Vec::new();
        match first.kind {
            EventKind::Put => {
                found.extend(self.puts.get(&(key, first.kv.value.as_str())).into_iter().flatten())
            }
            EventKind::Delete => {
                let lease = store.get(key).map_or(0, |kv| kv.lease);
                found.extend(self.revokes.get(&lease).into_iter().flatten());
                found.extend(self.deletes.get(key).into_iter().flatten());
                found.extend(
                    self.spans.iter().filter(|(span, _)| span.contains(key)).map(|(_, number)| number),
                );
            }
        }
        if let Some((name, _)) = key.rsplit_once('/') {
            found.extend(self.locks.get(name).into_iter().flatten());
        }
        found
    }
}

impl Candidate {
    /// Whether the call, done now, has exactly these events and its answer.
    pub fn explains(&self, call: &Done<'_>, store: &Store, told: &[Event]) -> bool {
        match &call.op.call {
            Call::Lock { name, lease } => explains_lock(name, *lease, call.body().is_some(), told),
            Call::Unlock { key } => {
                matches!(told, [event] if event.kind == EventKind::Delete && event.kv.key == *key)
            }
            Call::LeaseRevoke { id } => {
                let gone: BTreeSet<&str> = told.iter().map(|event| event.kv.key.as_str()).collect();
                told.iter().all(|event| event.kind == EventKind::Delete) && store.lease_keys(*id).eq(gone)
            }
            other => {
                let Some(done) = store.execute(other) else { return false };
                let fits = match call.body() {
                    Some(body @ (Body::Single(_) | Body::Txn { .. })) => *body == done.body,
                    _ => true,
                };
                fits && event_log::same(told, &done.events)
            }
        }
    }
}

fn explains_lock(name: &str, lease: i64, is_answered: bool, told: &[Event]) -> bool {
    let [event] = told else { return false };
    let Some(hex) = event.kv.key.strip_prefix(name).and_then(|rest| rest.strip_prefix('/')) else {
        return false;
    };
    let of_lease = i64::from_str_radix(hex, 16).is_ok_and(|found| lease == 0 || found == lease);
    match event.kind {
        EventKind::Put => of_lease && event.kv.value.is_empty() && format!("{:x}", event.kv.lease) == hex,
        EventKind::Delete => of_lease && !is_answered,
    }
}

/// Gives each item one of its choices so that no choice is given twice, as many of the choices in `must` as
/// possible are given, and then as many items as possible have one (augmenting paths, Kuhn's algorithm, first
/// from the choices and then from the items: what has a partner keeps having one).
pub fn assign(items: &[&[usize]], choices: usize, must: &[usize]) -> Vec<Option<usize>> {
    let mut wanted_by: Vec<Vec<usize>> = vec![Vec::new(); choices];
    for (item, wanted) in items.iter().enumerate() {
        wanted.iter().for_each(|choice| wanted_by[*choice].push(item));
    }
    let wanted_by: Vec<&[usize]> = wanted_by.iter().map(|items| &items[..]).collect();
    let mut chosen = vec![None; items.len()];
    let mut tried = vec![usize::MAX; items.len()];
    for choice in must {
        give(*choice, &wanted_by, &mut chosen, &mut tried, *choice);
    }
    let mut owner = vec![None; choices];
    for (item, choice) in chosen.iter().enumerate() {
        if let Some(choice) = choice {
            owner[*choice] = Some(item);
        }
    }
    let mut tried = vec![usize::MAX; choices];
    for item in (0..items.len()).filter(|item| chosen[*item].is_none()) {
        give(item, items, &mut owner, &mut tried, item);
    }
    let mut chosen = vec![None; items.len()];
    for (choice, item) in owner.into_iter().enumerate() {
        if let Some(item) = item {
            chosen[item] = Some(choice);
        }
    }
    chosen
}

/// Finds `one` a partner among its `edges`, moving others to other partners where that makes room.
fn give(
    one: usize,
    edges: &[&[usize]],
    owner: &mut [Option<usize>],
    tried: &mut [usize],
    round: usize,
) -> bool {
    for partner in edges[one] {
        if tried[*partner] == round {
            continue;
        }
        tried[*partner] = round;
        if owner[*partner].is_none_or(|other| give(other, edges, owner, tried, round)) {
            owner[*partner] = Some(one);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_items_as_possible_get_a_choice_of_their_own() {
        assert_eq!(assign(&[&[0, 1], &[0]], 2, &[]), [Some(1), Some(0)]);
        assert_eq!(assign(&[&[0], &[0], &[]], 1, &[]), [Some(0), None, None]);
        assert_eq!(assign(&[&[0, 1], &[0, 2], &[0]], 3, &[]), [Some(1), Some(2), Some(0)]);
    }

    #[test]
    fn a_choice_that_must_be_given_comes_before_one_that_may() {
        assert_eq!(assign(&[&[0, 1]], 2, &[1]), [Some(1)]);
        assert_eq!(assign(&[&[0, 1], &[1, 2]], 3, &[0, 2]), [Some(0), Some(2)]);
        assert_eq!(assign(&[&[0, 1], &[1]], 2, &[0]), [Some(0), Some(1)], "and no item goes without");
        assert_eq!(assign(&[&[0, 1]], 2, &[0, 1]).len(), 1, "more musts than items");
    }
}
