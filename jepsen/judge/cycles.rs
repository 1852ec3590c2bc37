//! Cycles of dependencies between transactions, by the weakest kind of edges
//! that closes them (Adya, "Weak Consistency", 1999; the names are those of
//! Kingsbury and Alvaro, "Elle", 2020). A graph without cycles, with edges of
//! real time among them, is a strictly serializable order.

use std::collections::VecDeque;

/// Why one transaction must come before another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The other wrote the next version.
    Ww,
    /// The other read what it wrote.
    Wr,
    /// The other wrote the version after the one it read.
    Rw,
    /// It had ended before the other began.
    Realtime,
}

/// An edge to `to`; `key` is where it comes from, by number (none for real time).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    pub to: usize,
    pub why: Why,
    pub key: usize,
}

/// Transactions by number, with their edges.
#[derive(Debug)]
pub struct Graph {
    edges: Vec<Vec<Edge>>,
}

/// A cycle: each transaction with the edge to the next, the last one's back to the first.
#[derive(Debug, PartialEq, Eq)]
pub struct Cycle {
    pub name: &'static str,
    pub steps: Vec<(usize, Edge)>,
}

/// Kinds of cycles, the weakest first: the edges they are made of, and whether exactly one `Rw` comes on top.
const KINDS: [(&str, &[Why], bool); 8] = [
    ("G0", &[Why::Ww], false),
    ("G1c", &[Why::Ww, Why::Wr], false),
    ("G-single", &[Why::Ww, Why::Wr], true),
    ("G2", &[Why::Ww, Why::Wr, Why::Rw], false),
    ("G0-realtime", &[Why::Ww, Why::Realtime], false),
    ("G1c-realtime", &[Why::Ww, Why::Wr, Why::Realtime], false),
    ("G-single-realtime", &[Why::Ww, Why::Wr, Why::Realtime], true),
    ("G2-realtime", &[Why::Ww, Why::Wr, Why::Rw, Why::Realtime], false),
];

/// Beginnings that are tried for the shortest cycle of a component. It need not be the shortest of all.
const TRIES_MAX: usize = 500;

impl Graph {
    pub fn new(transactions: usize) -> Graph {
        Graph { edges: vec![Vec::new(); transactions] }
    }

    /// An edge; one from a transaction to itself says nothing and is left out.
    pub fn add(&mut self, from: usize, to: usize, why: Why, key: usize) {
        if from != to {
            self.edges[from].push(Edge { to, why, key });
        }
    }

    /// Edges of real time between calls with these times. Only the ones that others do not follow from are
    /// added: from the calls that ended before this one began and before whose end no later call had begun
    /// and ended. `None` is a call without an end.
    pub fn add_realtime(&mut self, times: &[(u64, Option<u64>)]) {
        let mut moments: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * times.len());
        for (number, (invoked, returned)) in times.iter().enumerate() {
            moments.push((*invoked, false, number));
            moments.extend(returned.map(|at| (at, true, number)));
        }
        // At the same moment beginnings come first: such calls are concurrent.
        moments.sort_unstable();
        let mut ended: Vec<usize> = Vec::new();
        for (_, is_end, number) in moments {
            if !is_end {
                ended.iter().for_each(|before| self.add(*before, number, Why::Realtime, usize::MAX));
                continue;
            }
            let begun = times[number].0;
            ended.retain(|before| times[*before].1.is_none_or(|end| end >= begun));
            ended.push(number);
        }
    }

    /// One cycle of each component, of the weakest kind there is.
    pub fn cycles(&self) -> Vec<Cycle> {
        let all = |_: Why| true;
        let components = self.components(&(0..self.edges.len()).collect::<Vec<_>>(), all);
        components.iter().filter_map(|component| self.weakest(component)).collect()
    }

    fn weakest(&self, component: &[usize]) -> Option<Cycle> {
        KINDS.iter().find_map(|(name, allowed, one_rw)| {
            let steps =
                if *one_rw { self.with_one_rw(component, allowed) } else { self.within(component, allowed) };
            steps.map(|steps| Cycle { name, steps })
        })
    }

    /// A short cycle of the allowed edges alone.
    fn within(&self, nodes: &[usize], allowed: &[Why]) -> Option<Vec<(usize, Edge)>> {
        let component =
            self.components(nodes, |why| allowed.contains(&why)).into_iter().min_by_key(Vec::len)?;
        let inside = membership(self.edges.len(), &component);
        let tries = component.iter().take(TRIES_MAX);
        tries.filter_map(|node| self.path(*node, *node, &inside, allowed)).min_by_key(Vec::len)
    }

    /// A short cycle of one `Rw` edge and otherwise allowed ones.
    fn with_one_rw(&self, nodes: &[usize], allowed: &[Why]) -> Option<Vec<(usize, Edge)>> {
        let inside = membership(self.edges.len(), nodes);
        let rw = nodes.iter().flat_map(|node| self.edges[*node].iter().map(|edge| (*node, *edge)));
        let rw = rw.filter(|(_, edge)| edge.why == Why::Rw && inside[edge.to]).take(TRIES_MAX);
        let cycle = |(from, edge): (usize, Edge)| {
            let back = self.path(edge.to, from, &inside, allowed)?;
            Some(std::iter::once((from, edge)).chain(back).collect::<Vec<_>>())
        };
        rw.filter_map(cycle).min_by_key(Vec::len)
    }

    /// The shortest way of at least one edge.
    fn path(&self, from: usize, to: usize, inside: &[bool], allowed: &[Why]) -> Option<Vec<(usize, Edge)>> {
        let mut came: Vec<Option<(usize, Edge)>> = vec![None; self.edges.len()];
        let mut queue = VecDeque::from([from]);
        while let Some(node) = queue.pop_front() {
            for edge in self.edges[node].iter().filter(|edge| allowed.contains(&edge.why) && inside[edge.to])
            {
                if came[edge.to].is_none() {
                    came[edge.to] = Some((node, *edge));
                    queue.push_back(edge.to);
                }
            }
            if came[to].is_some() {
                break;
            }
        }
        let mut steps = vec![came[to]?];
        while steps.last().is_some_and(|(node, _)| *node != from) {
            steps.push(came[steps.last()?.0]?);
        }
        steps.reverse();
        Some(steps)
    }

    /// The strongly connected components of more than one node (Tarjan, without recursion).
    fn components(&self, nodes: &[usize], allowed: impl Fn(Why) -> bool) -> Vec<Vec<usize>> {
        const NEW: usize = usize::MAX;
        let inside = membership(self.edges.len(), nodes);
        let (mut index, mut low) = (vec![NEW; self.edges.len()], vec![0; self.edges.len()]);
        let mut on_stack = vec![false; self.edges.len()];
        let (mut stack, mut found, mut count) = (Vec::new(), Vec::new(), 0);
        for root in nodes {
            let mut path: Vec<(usize, usize)> = Vec::new();
            if index[*root] == NEW {
                path.push((*root, 0));
            }
            while let Some((node, at)) = path.pop() {
                if at == 0 {
                    (index[node], low[node]) = (count, count);
                    count += 1;
                    stack.push(node);
                    on_stack[node] = true;
                }
                let Some(edge) = self.edges[node].get(at) else {
                    if let Some((parent, _)) = path.last() {
                        low[*parent] = low[*parent].min(low[node]);
                    }
                    if low[node] == index[node] {
                        let start = stack.iter().rposition(|one| *one == node).expect("it is on the stack");
                        let component: Vec<usize> = stack.drain(start..).collect();
                        component.iter().for_each(|one| on_stack[*one] = false);
                        found.extend((component.len() > 1).then_some(component));
                    }
                    continue;
                };
                path.push((node, at + 1));
                if !allowed(edge.why) || !inside[edge.to] {
                    continue;
                }
                if index[edge.to] == NEW {
                    path.push((edge.to, 0));
                } else if on_stack[edge.to] {
                    low[node] = low[node].min(index[edge.to]);
                }
            }
        }
        found
    }
}

fn membership(nodes: usize, inside: &[usize]) -> Vec<bool> {
    let mut is_inside = vec![false; nodes];
    inside.iter().for_each(|node| is_inside[*node] = true);
    is_inside
}

#[cfg(test)]
mod tests {
    use super::Why::{Realtime, Rw, Wr, Ww};
    use super::*;

    fn kinds(edges: &[(usize, usize, Why)]) -> Vec<(&'static str, usize)> {
        let mut graph = Graph::new(10);
        edges.iter().for_each(|(from, to, why)| graph.add(*from, *to, *why, 0));
        graph.cycles().into_iter().map(|cycle| (cycle.name, cycle.steps.len())).collect()
    }

    #[test]
    fn a_cycle_has_the_name_of_the_weakest_edges_that_close_it() {
        assert_eq!(kinds(&[(0, 1, Ww), (1, 2, Wr), (0, 2, Rw), (2, 3, Realtime)]), []);
        assert_eq!(kinds(&[(0, 1, Ww), (1, 0, Ww)]), [("G0", 2)]);
        assert_eq!(kinds(&[(0, 1, Ww), (1, 2, Wr), (2, 0, Ww)]), [("G1c", 3)]);
        assert_eq!(kinds(&[(0, 1, Rw), (1, 2, Wr), (2, 0, Ww)]), [("G-single", 3)]);
        assert_eq!(kinds(&[(0, 1, Rw), (1, 0, Rw)]), [("G2", 2)]);
        assert_eq!(kinds(&[(0, 1, Ww), (1, 0, Realtime)]), [("G0-realtime", 2)]);
        assert_eq!(kinds(&[(0, 1, Wr), (1, 0, Realtime)]), [("G1c-realtime", 2)]);
        assert_eq!(kinds(&[(0, 1, Rw), (1, 0, Realtime)]), [("G-single-realtime", 2)]);
        assert_eq!(kinds(&[(0, 1, Rw), (1, 2, Rw), (2, 0, Realtime)]), [("G2-realtime", 3)]);
    }

    #[test]
    fn each_component_is_told_once_and_by_a_short_cycle() {
        let long: Vec<_> = (0..6).map(|node| (node, (node + 1) % 6, Ww)).collect();
        assert_eq!(kinds(&long), [("G0", 6)]);
        let short = [long, vec![(3, 2, Ww), (8, 9, Wr), (9, 8, Wr)]].concat();
        let mut found = kinds(&short);
        found.sort_unstable();
        assert_eq!(found, [("G0", 2), ("G1c", 2)]);
    }

    #[test]
    fn real_time_reaches_every_later_call_through_few_edges() {
        let times: Vec<(u64, Option<u64>)> = (0..200)
            .map(|number: u64| {
                (number * 7 % 400, (!number.is_multiple_of(9)).then_some(number * 7 % 400 + 1 + number % 23))
            })
            .collect();
        let mut graph = Graph::new(times.len());
        graph.add_realtime(&times);
        assert!(graph.edges.iter().map(Vec::len).sum::<usize>() < 5_000);
        let inside = vec![true; times.len()];
        for (one, (_, returned)) in times.iter().enumerate() {
            for (other, (invoked, _)) in times.iter().enumerate() {
                let is_before = returned.is_some_and(|at| at < *invoked);
                let reached = one != other && graph.path(one, other, &inside, &[Realtime]).is_some();
                assert_eq!(reached, is_before, "{one} and {other}");
            }
        }
    }
}
