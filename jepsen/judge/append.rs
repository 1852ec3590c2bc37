//! Appending transactions are strictly serializable: judged by the lists they
//! read, whose elements are unique and so tell who wrote what after whom
//! (Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies", 2020).
//!
//! A list that was read holds its versions in order. From that follow who wrote
//! after whom, who read from whom, and who read before whom wrote; with real
//! time they must have no cycle. Revisions are not looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::calls::{self, Done};
use super::cycles::{Cycle, Edge, Graph, Why};
use super::describe;
use super::history::{Action, ActionReply, Body, Call, History, Kv, Outcome, Relation, Span, Txn};
use super::verdict::Verdict;

const CLAIM: &str = "appending transactions are strictly serializable";

/// Judges list-append. A key holds its elements as `"1,2,3"`. A transaction is one `Txn` of the workload: in the
/// branch taken, a range of one key reads a list, and a put of `old + "," + element` appends the last element
/// of its value, guarded by comparisons that hold only while the key is still `old`. A branch without puts is
/// a transaction that only reads; so is a linearizable range. Elements are unique per key.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let (txns, foreign) = transactions(history, workload);
    let checked = txns.iter().filter(|txn| txn.fate == Fate::Committed).count();
    let findings = anomalies(&txns, &|txn| describe::call(history, txn.index));
    let doubt = (!foreign.is_empty()).then(|| describe::some(foreign).join("; "));
    vec![Verdict::unless(CLAIM, checked, describe::some(findings), doubt)]
}

/// A list's elements.
pub type List = Vec<u64>;

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Micro {
    Read(String, List),
    Append(String, u64),
}

/// Whether a transaction was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    Committed,
    Unknown,
    Aborted,
}

/// One transaction on lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendTxn {
    /// The place of its call in the history.
    pub index: usize,
    pub process: u64,
    pub invoked_ns: u64,
    pub returned_ns: u64,
    pub fate: Fate,
    pub micro: Vec<Micro>,
}

/// The transactions of a workload, in the order of their invocation, and the calls that are none.
pub fn transactions(history: &History, workload: &str) -> (Vec<AppendTxn>, Vec<String>) {
    let mut reader = Reader { keys: BTreeSet::new(), txns: Vec::new(), foreign: Vec::new() };
    let of_workload = || history.ops.iter().enumerate().filter(|(_, op)| op.workload == workload);
    for (_, op) in of_workload() {
        match &op.call {
            Call::Txn(txn) => reader.keys.extend(txn.success.iter().filter_map(key_of)),
            Call::Single { action, .. } => reader.keys.extend(key_of(action)),
            _ => {}
        }
    }
    for call in calls::done(history).iter().filter(|call| call.op.workload == workload) {
        reader.done(call);
    }
    for (index, op) in of_workload().filter(|(_, op)| matches!(op.outcome, Outcome::Failed(_))) {
        let call = Done { index, op, invoked_ns: op.invoked_ns, returned_ns: Some(op.returned_ns) };
        if let Call::Txn(txn) = &op.call {
            reader.take(&call, Fate::Aborted, txn, &txn.success, None);
        }
    }
    let mut txns = reader.txns;
    txns.sort_by_key(|txn| txn.invoked_ns);
    (txns, reader.foreign)
}

fn key_of(action: &Action) -> Option<&str> {
    match action {
        Action::Put { key, .. } => Some(key),
        Action::Range { span, .. } => span.end.is_none().then_some(&span.key),
        Action::Delete { .. } => None,
    }
}

/// The elements of a value, if it is a list.
pub fn elements(value: &str) -> Option<List> {
    value.split(',').map(|element| element.parse().ok()).collect()
}

struct Reader<'a> {
    /// All keys, which a range of many finds empty when it does not return them.
    keys: BTreeSet<&'a str>,
    txns: Vec<AppendTxn>,
    foreign: Vec<String>,
}

impl Reader<'_> {
    fn done(&mut self, call: &Done<'_>) {
        let nothing = Txn::default();
        match (&call.op.call, call.body()) {
            (Call::Single { serializable: true, .. }, _) => {}
            (Call::Single { action, .. }, Some(Body::Single(reply))) => {
                let (actions, replies) = (std::slice::from_ref(action), std::slice::from_ref(reply));
                self.take(call, Fate::Committed, &nothing, actions, Some(replies));
            }
            (Call::Single { action: Action::Range { .. }, .. }, None) => {}
            (Call::Single { action, .. }, None) => {
                self.take(call, Fate::Unknown, &nothing, std::slice::from_ref(action), None);
            }
            (Call::Txn(txn), Some(Body::Txn { succeeded, replies })) => {
                let actions = if *succeeded { &txn.success } else { &txn.failure };
                self.take(call, Fate::Committed, txn, actions, Some(replies));
                if !succeeded {
                    self.take(call, Fate::Aborted, txn, &txn.success, None);
                }
            }
            (Call::Txn(txn), None) => {
                self.take(call, Fate::Unknown, txn, &txn.success, None);
                if txn.failure.iter().any(|action| !matches!(action, Action::Range { .. })) {
                    self.foreign.push(foreign(call));
                }
            }
            _ => {}
        }
    }

    fn take(
        &mut self,
        call: &Done<'_>,
        fate: Fate,
        txn: &Txn,
        actions: &[Action],
        replies: Option<&[ActionReply]>,
    ) {
        let mut micro = Vec::new();
        for (number, action) in actions.iter().enumerate() {
            let reply = replies.and_then(|replies| replies.get(number));
            let is_known = match (action, reply) {
                (Action::Range { span, revision: 0, limit: 0 }, Some(ActionReply::Range { kvs, .. })) => {
                    self.read(span, kvs, &mut micro)
                }
                (Action::Range { revision: 0, limit: 0, .. }, None) if fate != Fate::Committed => true,
                (Action::Put { key, value, .. }, _) if guarded(txn, key) => append(key, value, &mut micro),
                _ => false,
            };
            if !is_known {
                return self.foreign.push(foreign(call));
            }
        }
        let (invoked_ns, returned_ns) = (call.invoked_ns, call.returned_ns.unwrap_or(u64::MAX));
        let (index, process) = (call.index, call.op.process);
        self.txns.push(AppendTxn { index, process, invoked_ns, returned_ns, fate, micro });
    }

    fn read(&self, span: &Span, kvs: &[Kv], micro: &mut Vec<Micro>) -> bool {
        let found: BTreeMap<&str, &str> = kvs.iter().map(|kv| (kv.key.as_str(), kv.value.as_str())).collect();
        let empty = self.keys.iter().filter(|key| span.contains(key) && !found.contains_key(**key));
        micro.extend(empty.map(|key| Micro::Read((*key).to_owned(), List::new())));
        found.into_iter().all(|(key, value)| {
            let list = elements(value);
            list.map(|list| micro.push(Micro::Read(key.to_owned(), list))).is_some()
        })
    }
}

fn foreign(call: &Done<'_>) -> String {
    format!("#{} is no transaction on lists: {}", call.index, call.op)
}

/// Whether a comparison for equality holds the key where it was.
fn guarded(txn: &Txn, key: &str) -> bool {
    txn.compares.iter().any(|compare| compare.key == key && compare.relation == Relation::Equal)
}

/// A guarded put read the list that it extends.
fn append(key: &str, value: &str, micro: &mut Vec<Micro>) -> bool {
    let Some(mut list) = elements(value) else { return false };
    let Some(element) = list.pop() else { return false };
    micro.push(Micro::Read(key.to_owned(), list));
    micro.push(Micro::Append(key.to_owned(), element));
    true
}

/// What contradicts strict serializability; `name` puts a transaction into words.
pub fn anomalies(txns: &[AppendTxn], name: &dyn Fn(&AppendTxn) -> String) -> Vec<String> {
    let mut inference = Inference { txns, name, keys: BTreeMap::new(), findings: Vec::new() };
    inference.gather();
    let graph = inference.graph();
    let keys: Vec<&str> = inference.keys.keys().copied().collect();
    let mut findings = inference.findings;
    findings.extend(graph.cycles().iter().map(|cycle| tell(cycle, txns, &keys, name)));
    findings
}

/// One key: who wrote its elements, and who read which list.
#[derive(Default)]
struct Lists<'a> {
    /// Of each element, the transaction and whether it is its last one for the key.
    writers: HashMap<u64, (usize, bool)>,
    /// By the transactions' own first looks.
    reads: Vec<(usize, &'a [u64])>,
    longest: &'a [u64],
}

struct Inference<'a> {
    txns: &'a [AppendTxn],
    name: &'a dyn Fn(&AppendTxn) -> String,
    keys: BTreeMap<&'a str, Lists<'a>>,
    findings: Vec<String>,
}

impl<'a> Inference<'a> {
    fn gather(&mut self) {
        for (number, txn) in self.txns.iter().enumerate() {
            self.writes(number, txn);
        }
        let observed = self.observed();
        for (number, txn) in self.txns.iter().enumerate() {
            // What a guarded append read is true if the append was done.
            if txn.fate == Fate::Committed || observed[number] {
                self.reads(number, txn);
            }
        }
        let keys = std::mem::take(&mut self.keys);
        for (key, lists) in &keys {
            self.judge_lists(key, lists);
        }
        self.keys = keys;
    }

    fn writes(&mut self, number: usize, txn: &'a AppendTxn) {
        let mut last: HashMap<&str, u64> = HashMap::new();
        for micro in &txn.micro {
            let Micro::Append(key, element) = micro else { continue };
            let writers = &mut self.keys.entry(key).or_default().writers;
            if let Some(before) = last.insert(key, *element)
                && let Some(writer) = writers.get_mut(&before)
                && writer.0 == number
            {
                writer.1 = false;
            }
            // Of several that tried an element, the one that was done is its writer, else one that may have been.
            let other = writers.get(element).map(|(other, _)| self.txns[*other].fate);
            if other == Some(Fate::Committed) && txn.fate == Fate::Committed {
                self.findings
                    .push(format!("{key}: element {element} was appended twice: {}", (self.name)(txn)));
            }
            if other.is_none_or(|other| txn.fate < other) {
                writers.insert(*element, (number, true));
            }
        }
    }

    /// Which transactions wrote an element that somebody read.
    fn observed(&self) -> Vec<bool> {
        let mut observed = vec![false; self.txns.len()];
        for txn in self.txns.iter().filter(|txn| txn.fate == Fate::Committed) {
            for micro in &txn.micro {
                let Micro::Read(key, list) = micro else { continue };
                let writers = self.keys.get(key.as_str()).map(|lists| &lists.writers);
                for (number, _) in list.iter().filter_map(|element| writers?.get(element)) {
                    observed[*number] = self.txns[*number].fate != Fate::Aborted;
                }
            }
        }
        observed
    }

    fn reads(&mut self, number: usize, txn: &'a AppendTxn) {
        let mut own: HashMap<&str, List> = HashMap::new();
        for micro in &txn.micro {
            match micro {
                Micro::Append(key, element) => own.entry(key).or_default().push(*element),
                Micro::Read(key, list) => {
                    let expected = own.get(key.as_str());
                    if expected.is_some_and(|expected| expected != list) {
                        let txn = (self.name)(txn);
                        self.findings
                            .push(format!("internal: {key} is {list:?} after {expected:?} in {txn}"));
                    }
                    let lists = self.keys.entry(key).or_default();
                    if expected.is_none() {
                        lists.reads.push((number, list));
                    }
                    if list.len() > lists.longest.len() {
                        lists.longest = list;
                    }
                    own.insert(key, list.clone());
                }
            }
        }
    }

    fn judge_lists(&mut self, key: &str, lists: &Lists<'_>) {
        let mut seen = BTreeSet::new();
        for element in lists.longest.iter().filter(|element| !seen.insert(**element)) {
            self.findings.push(format!("duplicate: {key} holds element {element} twice"));
        }
        let txn = |number: usize| (self.name)(&self.txns[number]);
        for (reader, list) in &lists.reads {
            if !lists.longest.starts_with(list) {
                let longest = lists.longest;
                let told = txn(*reader);
                self.findings
                    .push(format!("incompatible orders: {key} was {list:?} and {longest:?}: {told}"));
            }
            for element in *list {
                match lists.writers.get(element).map(|(writer, _)| *writer) {
                    None => self
                        .findings
                        .push(format!("invented: {key} held element {element} for {}", txn(*reader))),
                    Some(writer) if self.txns[writer].fate == Fate::Aborted => self.findings.push(format!(
                        "G1a: {key} held element {element} of {} for {}",
                        txn(writer),
                        txn(*reader)
                    )),
                    Some(_) => {}
                }
            }
            if let Some((writer, false)) = list.last().and_then(|last| lists.writers.get(last)) {
                self.findings.push(format!("G1b: {key} was read amid {} by {}", txn(*writer), txn(*reader)));
            }
        }
        for (element, writer) in self.unread(lists) {
            let after = |(reader, _): &&(usize, &[u64])| {
                self.txns[*reader].invoked_ns > self.txns[writer].returned_ns && *reader != writer
            };
            if let Some((reader, _)) = lists.reads.iter().find(after) {
                self.findings.push(format!(
                    "lost: {key} has no element {element} of {} for {}",
                    txn(writer),
                    txn(*reader)
                ));
            }
        }
    }

    /// Elements that were certainly appended, but that nobody read.
    fn unread(&self, lists: &Lists<'_>) -> Vec<(u64, usize)> {
        let read: BTreeSet<u64> = lists.longest.iter().copied().collect();
        let committed =
            lists.writers.iter().filter(|(_, (writer, _))| self.txns[*writer].fate == Fate::Committed);
        let mut unread: Vec<(u64, usize)> = committed
            .map(|(element, (writer, _))| (*element, *writer))
            .filter(|(element, _)| !read.contains(element))
            .collect();
        unread.sort_unstable();
        unread
    }

    fn graph(&self) -> Graph {
        let mut graph = Graph::new(self.txns.len());
        for (key, lists) in self.keys.values().enumerate() {
            let writer = |element: &u64| lists.writers.get(element).map(|(writer, _)| *writer);
            let unread = self.unread(lists);
            for pair in lists.longest.windows(2) {
                if let (Some(one), Some(next)) = (writer(&pair[0]), writer(&pair[1])) {
                    graph.add(one, next, Why::Ww, key);
                }
            }
            // What nobody read came after everything that somebody read.
            for (_, late) in &unread {
                if let Some(last) = lists.longest.last().and_then(writer) {
                    graph.add(last, *late, Why::Ww, key);
                }
            }
            for (reader, list) in &lists.reads {
                if let Some(from) = list.last().and_then(writer) {
                    graph.add(from, *reader, Why::Wr, key);
                }
                match lists.longest.get(list.len()).map(writer) {
                    Some(next) => next.into_iter().for_each(|next| graph.add(*reader, next, Why::Rw, key)),
                    None => unread.iter().for_each(|(_, next)| graph.add(*reader, *next, Why::Rw, key)),
                }
            }
        }
        // A transaction that may not have been done has no time of its own.
        let times: Vec<(u64, Option<u64>)> = self
            .txns
            .iter()
            .map(|txn| (txn.invoked_ns, (txn.fate == Fate::Committed).then_some(txn.returned_ns)))
            .collect();
        graph.add_realtime(&times);
        graph
    }
}

fn tell(cycle: &Cycle, txns: &[AppendTxn], keys: &[&str], name: &dyn Fn(&AppendTxn) -> String) -> String {
    let step = |(number, edge): &(usize, Edge)| {
        let why = match edge.why {
            Why::Ww => "which wrote before",
            Why::Wr => "which was read by",
            Why::Rw => "which read before the write of",
            Why::Realtime => "which ended before",
        };
        let key = keys.get(edge.key).map_or(String::new(), |key| format!(" (key {key})"));
        format!("{}, {why}{key} ", name(&txns[*number]))
    };
    let first = cycle.steps.first().map_or(0, |(number, _)| txns[*number].index);
    let told: String = cycle.steps.iter().map(step).collect();
    format!("{}: {told}#{first}", cycle.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Operand, Reply};
    use crate::judge::random::Random;
    use crate::judge::simulator::{Next, Plan, Seen, equal, putting, run};
    use crate::judge::verdict::Held;

    /// Steps as in "x:1,2 x+3 y:" at a time; a `?` before them is for an unknown, a `!` for an aborted fate.
    fn txn(index: usize, from: u64, to: u64, steps: &str) -> AppendTxn {
        let (fate, steps) = match steps.split_at(1) {
            ("?", rest) => (Fate::Unknown, rest),
            ("!", rest) => (Fate::Aborted, rest),
            _ => (Fate::Committed, steps),
        };
        let micro = steps.split_whitespace().map(|step| {
            if let Some((key, element)) = step.split_once('+') {
                return Micro::Append(key.into(), element.parse().expect("an element"));
            }
            let (key, list) = step.split_once(':').expect("a read");
            let list = if list.is_empty() { List::new() } else { elements(list).expect("a list") };
            Micro::Read(key.into(), list)
        });
        AppendTxn {
            index,
            process: index as u64,
            invoked_ns: from,
            returned_ns: to,
            fate,
            micro: micro.collect(),
        }
    }

    /// The kinds of anomalies of concurrent transactions, in the order in which they are told.
    fn found(steps: &[&str]) -> Vec<String> {
        in_time(&steps.iter().map(|steps| (1, 100, *steps)).collect::<Vec<_>>())
    }

    fn in_time(steps: &[(u64, u64, &str)]) -> Vec<String> {
        let number = |(index, (from, to, steps)): (usize, &(u64, u64, &str))| txn(index, *from, *to, steps);
        let txns: Vec<AppendTxn> = steps.iter().enumerate().map(number).collect();
        let findings = anomalies(&txns, &|txn| format!("#{}", txn.index));
        findings.iter().map(|finding| finding.split(':').next().expect("a kind").to_owned()).collect()
    }

    #[test]
    fn serial_histories_hold() {
        assert_eq!(found(&["x: x+1", "x:1 x+2 y+1", "x:1,2 y:1"]), [""; 0]);
        assert_eq!(found(&["x+1 x:1 x+2 x:1,2", "x:1,2"]), [""; 0]);
        assert_eq!(found(&["?x+1", "x:1", "?x+2", "!x+3"]), [""; 0]);
    }

    #[test]
    fn each_anomaly_has_its_name() {
        // G0: x has 1 before 2, y has 2 before 1.
        assert_eq!(found(&["x+1 y+1", "x+2 y+2", "x:1,2", "y:2,1"]), ["G0"]);
        assert_eq!(found(&["!x+1", "x:1"]), ["G1a"]);
        assert_eq!(found(&["x+1 x+2", "x:1", "x:1,2"])[0], "G1b");
        // Each read what the other appended.
        assert_eq!(found(&["x+1 y:2", "y+2 x:1"]), ["G1c"]);
        // One sees half of the other.
        assert_eq!(found(&["x+1 y+1", "x:1 y:", "y:1"]), ["G-single"]);
        // Write skew.
        assert_eq!(found(&["x: y+1", "y: x+2", "x:2 y:1"]), ["G2"]);
        assert_eq!(found(&["x+1 x:", "x:1"])[0], "internal");
        assert_eq!(found(&["x+1", "x+2", "x:1,2", "x:2"])[0], "incompatible orders");
        assert_eq!(found(&["x+1", "x:1,1"])[0], "duplicate");
        assert_eq!(found(&["x+1", "x:1,7"])[0], "invented");
        // A lost update: both read nothing and append.
        assert_eq!(found(&["x: x+1", "x: x+2", "x:1,2"]), ["G-single"]);
    }

    #[test]
    fn real_time_counts() {
        assert_eq!(in_time(&[(1, 2, "x+1"), (3, 4, "x:")]), ["lost", "G-single-realtime"]);
        assert_eq!(in_time(&[(1, 2, "x+1"), (3, 4, "x:"), (5, 6, "x:1")]), ["G-single-realtime"]);
        assert_eq!(in_time(&[(1, 2, "x:1"), (3, 4, "x+1")]), ["G1c-realtime"]);
        assert_eq!(in_time(&[(1, 2, "x+1"), (3, 4, "x+2"), (5, 6, "x:2,1")]), ["G0-realtime"]);
        assert_eq!(in_time(&[(1, 9, "x+1"), (3, 4, "x:")]), [""; 0]);
        assert_eq!(in_time(&[(1, 2, "?x+1"), (3, 4, "x:"), (5, 6, "x:1")]), [""; 0]);
    }

    /// What clients of the workload do: a read of two keys, or a guarded append to each of them.
    fn call(seen: Seen<'_>) -> Next {
        let Seen { number, store, random, .. } = seen;
        let first = random.below(3);
        let keys = [first, (first + 1 + random.below(2)) % 3].map(|key| format!("append/{key}"));
        let range = |key: &String| Action::Range { span: Span::key(key), revision: 0, limit: 0 };
        let reads: Vec<Action> = keys.iter().map(range).collect();
        if random.one_in(3) {
            return Next::Call(Call::Txn(Txn { success: reads, ..Txn::default() }));
        }
        let stale = i64::from(random.one_in(5));
        let mut txn = Txn { failure: reads, ..Txn::default() };
        for key in &keys {
            let old = store.get(key);
            let revision = old.map_or(0, |kv| kv.mod_revision) + stale;
            let value = old.map_or(number.to_string(), |kv| format!("{},{number}", kv.value));
            txn.compares.push(equal(key, Operand::ModRevision(revision)));
            txn.success.extend([range(key), putting(key, &value)]);
        }
        Next::Call(Call::Txn(txn))
    }

    fn held(history: &History) -> bool {
        check(history, "append")[0].held()
    }

    #[test]
    fn simulated_transactions_hold_and_every_planted_lie_is_found() {
        let mut planted = 0;
        for seed in 0..40 {
            let plan = Plan { seed, workload: "append", clients: 6, calls: 150, unknown_one_in: 12 };
            let history = run(plan, call).history();
            let verdict = check(&history, "append").remove(0);
            assert!(verdict.checked > 100 && verdict.outcome == Held::Yes, "seed {seed}: {verdict:?}");
            let mut random = Random::new(seed);
            for lie in 0..12 {
                let mut lying = history.clone();
                let op = &mut lying.ops[20 + random.below(80) as usize];
                let Outcome::Ok(Reply { body: Body::Txn { replies, succeeded }, .. }) = &mut op.outcome
                else {
                    continue;
                };
                let Some(ActionReply::Range { kvs, .. }) = replies.first_mut() else { continue };
                let Some(kv) = kvs.first_mut() else { continue };
                let mut list: Vec<&str> = kv.value.split(',').collect();
                match lie % 4 {
                    0 if list.len() > 2 => drop(list.remove(0)),
                    1 => list.push("999999"),
                    2 if list.len() > 12 => list.truncate(list.len() - 12),
                    3 if *succeeded && matches!(&op.call, Call::Txn(txn) if !txn.compares.is_empty()) => {
                        op.outcome = Outcome::Failed("refused".into());
                        planted += 1;
                        assert!(!held(&lying), "seed {seed}, lie {lie}");
                        continue;
                    }
                    _ => continue,
                }
                kv.value = list.join(",");
                planted += 1;
                assert!(!held(&lying), "seed {seed}, lie {lie}");
            }
        }
        assert!(planted > 200, "{planted}");
    }

    #[test]
    fn a_call_that_is_no_transaction_on_lists_makes_it_undecided() {
        let mut script = crate::judge::simulator::Script::new("append");
        script.call(0, 1, 2, crate::judge::simulator::put("append/0", "1"));
        assert!(matches!(check(&script.history(), "append")[0].outcome, Held::Undecided(_)));
    }
}
