//! Calls and events in words, so that a person can follow a finding. It names
//! each call by its place in the history, its process, node and times.

use std::fmt;

use super::history::{Action, ActionReply, Body, Call, Event, EventKind, History, Kv, Op, Operand, Outcome};
use super::history::{Relation, Reply, Span, Txn};

/// The most findings that one claim reports; the rest is counted.
const FINDINGS_MAX: usize = 10;
/// The most characters of one description.
const CHARS_MAX: usize = 400;

/// The call at `index` of the history.
pub fn call(history: &History, index: usize) -> String {
    let op = &history.ops[index];
    let (from, to) = (seconds(op.invoked_ns), seconds(op.returned_ns));
    let head = format!("#{index} (process {}, node {}, {from} to {to} s)", op.process, op.node);
    short(format!("{head}: {op}"))
}

/// Events in a row.
pub fn events(events: &[Event]) -> String {
    short(events.iter().map(Event::to_string).collect::<Vec<_>>().join(", "))
}

/// A time of the run.
pub fn seconds(ns: u64) -> String {
    format!("{:.6}", ns as f64 / 1e9)
}

/// The first findings, and how many more there are.
pub fn some(mut findings: Vec<String>) -> Vec<String> {
    if findings.len() > FINDINGS_MAX {
        let more = findings.len() - (FINDINGS_MAX - 1);
        findings.truncate(FINDINGS_MAX - 1);
        findings.push(format!("and {more} more"));
    }
    findings
}

pub fn short(text: String) -> String {
    match text.char_indices().nth(CHARS_MAX) {
        None => text,
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join("; ")
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.call)?;
        if let Some(id) = &self.request_id {
            write!(f, " [id {id}]")?;
        }
        match &self.outcome {
            Outcome::Ok(reply) => write!(f, " -> {reply}"),
            Outcome::Failed(why) => write!(f, " -> failed: {why}"),
            Outcome::Unknown(why) => write!(f, " -> unknown: {why}"),
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Single { action, serializable: true } => write!(f, "serializable {action}"),
            Call::Single { action, serializable: false } => write!(f, "{action}"),
            Call::Txn(txn) => write!(f, "{txn}"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for Txn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compares: Vec<String> = self
            .compares
            .iter()
            .map(|compare| {
                let relation = match compare.relation {
                    Relation::Equal => "=",
                    Relation::NotEqual => "!=",
                    Relation::Greater => ">",
                    Relation::Less => "<",
                };
                let (what, value) = match &compare.operand {
                    Operand::Value(value) => ("value", value.clone()),
                    Operand::Version(version) => ("version", version.to_string()),
                    Operand::CreateRevision(revision) => ("create", revision.to_string()),
                    Operand::ModRevision(revision) => ("mod", revision.to_string()),
                    Operand::Lease(lease) => ("lease", lease.to_string()),
                };
                format!("{what}({}) {relation} {value:?}", compare.key)
            })
            .collect();
        write!(f, "txn if {} then {}", compares.join(" and "), list(&self.success))?;
        if self.failure.is_empty() { Ok(()) } else { write!(f, " else {}", list(&self.failure)) }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            None => write!(f, "{}", self.key),
            Some(end) => write!(f, "{}..{}", self.key, end.escape_debug()),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Range { span, revision: 0, .. } => write!(f, "get {span}"),
            Action::Range { span, revision, .. } => write!(f, "get {span} at {revision}"),
            Action::Put { key, value, lease: 0, .. } => write!(f, "put {key}={value:?}"),
            Action::Put { key, value, lease, .. } => write!(f, "put {key}={value:?} lease {lease}"),
            Action::Delete { span, .. } => write!(f, "delete {span}"),
        }
    }
}

impl fmt::Display for Kv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kv { key, value, create_revision, mod_revision, version, lease } = self;
        write!(f, "{key}={value:?} (mod {mod_revision}, create {create_revision}, version {version}")?;
        if *lease == 0 { write!(f, ")") } else { write!(f, ", lease {lease})") }
    }
}

impl fmt::Display for ActionReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActionReply::Range { kvs, count, more } => {
                write!(f, "[{}] of {count}{}", list(kvs), if *more { " and more" } else { "" })
            }
            ActionReply::Put { prev: None } => write!(f, "put"),
            ActionReply::Put { prev: Some(kv) } => write!(f, "put over {kv}"),
            ActionReply::Delete { deleted, prev } => write!(f, "deleted {deleted} [{}]", list(prev)),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {}, {}", self.revision, self.body)
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Body::Single(reply) => write!(f, "{reply}"),
            Body::Txn { succeeded, replies } => {
                write!(f, "{} [{}]", if *succeeded { "then" } else { "else" }, list(replies))
            }
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::Put => write!(f, "put {}", self.kv)?,
            EventKind::Delete => write!(f, "delete {} (mod {})", self.kv.key, self.kv.mod_revision)?,
        }
        self.prev.as_ref().map_or(Ok(()), |prev| write!(f, " over {prev}"))
    }
}
