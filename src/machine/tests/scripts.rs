//! Stories of the state machine, in `src/machine/testscripts`.
//!
//! One word a step: `put k v`, `del k [end]`, `range k [end]`, `compact rev`,
//! `txn "version(k)=0" then "put k v" else "range k"`, `grant id ttl`, `revoke id`,
//! `expire id term=T`, `events from`, `leases`, `sweep`, `hash`, `alarm on|off`.

use std::error::Error;
use std::fmt::Write as _;

use goldenscript::{Argument, Command as Line, Context, Runner};

use super::*;
use crate::storage::Read;
use crate::types::{SortOrder, SortTarget, TxnOpReply, TxnReply};

#[test]
fn stories() {
    for entry in std::fs::read_dir("src/machine/testscripts").unwrap() {
        let mut teller = Teller { rig: Rig::new() };
        goldenscript::run(&mut teller, entry.unwrap().path()).unwrap();
    }
}

struct Teller {
    rig: Rig,
}

impl Runner for Teller {
    type Command = Line;

    fn run(&mut self, line: &Line, _: &Context) -> Result<String, Box<dyn Error>> {
        let words: Vec<String> = line
            .args
            .iter()
            .map(|arg| match arg {
                Argument::KeyValue(key, value) => format!("{key}={value}"),
                Argument::Positional(word) => word.clone(),
                _ => unreachable!("there is no third kind"),
            })
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let number = |at: usize| words[at].parse::<i64>();
        match line.name.as_str() {
            "txn" => {
                let txn = txn(&words)?;
                Ok(told(&self.rig.one(Operation::Txn(txn))))
            }
            "range" => self.range(&words),
            "compact" => {
                let revision = Revision(number(0)?);
                Ok(told(&self.rig.one(Operation::Compact { space: Space::User, revision })))
            }
            "grant" => {
                let (id, ttl_s) = (LeaseId(number(0)?), number(1)?);
                Ok(told(&self.rig.one(Operation::LeaseGrant { id, ttl_s })))
            }
            "revoke" => Ok(told(&self.rig.one(Operation::LeaseRevoke { id: LeaseId(number(0)?) }))),
            "expire" => {
                let term = words[1].trim_start_matches("term=").parse()?;
                let ids = vec![LeaseId(number(0)?)];
                Ok(told(&self.rig.one(Operation::LeaseExpire { term, ids })))
            }
            "alarm" => {
                let action = if words[0] == "on" { AlarmAction::Activate } else { AlarmAction::Deactivate };
                let alarm = Alarm { member: 1, kind: AlarmKind::NoSpace };
                Ok(told(&self.rig.one(Operation::Alarm { action, alarm })))
            }
            "events" => self.events(number(0)?),
            "sweep" => {
                let mark = self.rig.view().compacted_user;
                let mut walked = mvcc::Walked::default();
                while mvcc::sweep(self.rig.machine.db(), Space::User, mark, 1, &mut walked)?
                    == SweepProgress::More
                {}
                self.rig.one(Operation::SessionRenew { session: 0 });
                let rows = |family| {
                    let view = self.rig.view();
                    let mut cursor = view.data.scan(family, b"", None);
                    cursor.seek_to_first();
                    let mut rows = 0;
                    while cursor.item().unwrap().is_some() {
                        rows += 1;
                        cursor.next();
                    }
                    rows
                };
                Ok(format!("history {} versions {}\n", rows(Family::History), rows(Family::Versions)))
            }
            "leases" => {
                let mut out = String::new();
                for (id, record) in lease::all(self.rig.machine.db())? {
                    let keys = lease::keys(self.rig.machine.db(), id)?;
                    let keys: Vec<_> = keys.iter().map(|(_, key)| text(key)).collect();
                    writeln!(out, "lease {id} ttl {} keys {keys:?}", record.ttl_s)?;
                }
                Ok(out)
            }
            _ => match txn_op(&[&[line.name.as_str()], &words[..]].concat())? {
                TxnOp::Put(put) => Ok(told(&self.rig.one(Operation::Put(put)))),
                TxnOp::DeleteRange(delete) => Ok(told(&self.rig.one(Operation::DeleteRange(delete)))),
                _ => Err(format!("unknown step {}", line.name).into()),
            },
        }
    }
}

impl Teller {
    fn range(&mut self, words: &[&str]) -> Result<String, Box<dyn Error>> {
        let query = query(words)?;
        let view = self.rig.view();
        let mut out = String::new();
        match mvcc::range(&view.data, view.marks(Space::User), &query, 1 << 20) {
            Ok(reply) => {
                reply.kvs.iter().for_each(|found| kv(&mut out, found));
                let more = if reply.more { ", more" } else { "" };
                writeln!(out, "count {}{more}", reply.count)?;
            }
            Err(error) => writeln!(out, "error: {error}")?,
        }
        Ok(out)
    }

    fn events(&mut self, from: i64) -> Result<String, Box<dyn Error>> {
        let view = self.rig.view();
        let range = KeyRange::From(Bytes::from_static(b"\0"));
        let query = EventQuery {
            space: Space::User,
            range: &range,
            from: Revision(from),
            to: view.revision,
            prev: true,
            budget_bytes: 1 << 20,
            budget_changes: 1 << 20,
        };
        let mut out = String::new();
        match mvcc::events(&view.data, view.marks(Space::User), &query) {
            Ok((revisions, next)) => {
                for event in revisions.iter().flat_map(|revision| &revision.events) {
                    let prev = event.prev.as_ref().map_or("-".to_owned(), |prev| text(&prev.value));
                    write!(out, "{:?} (was {prev}) ", event.kind)?;
                    kv(&mut out, &event.kv);
                }
                writeln!(out, "next {next}")?;
            }
            Err(error) => writeln!(out, "error: {error}")?,
        }
        Ok(out)
    }
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn kv(out: &mut String, kv: &KeyValue) {
    let (key, value) = (text(&kv.key), text(&kv.value));
    let (create, modified, version, lease) = (kv.create_revision, kv.mod_revision, kv.version, kv.lease);
    writeln!(out, "{key}={value} create {create} mod {modified} version {version} lease {lease}").unwrap();
}

fn told(reply: &Reply) -> String {
    let mut out = format!("revision {}", reply.revision);
    match &reply.outcome {
        Err(error) => writeln!(out, ", error: {error}").unwrap(),
        Ok(outcome) => {
            writeln!(out).unwrap();
            match outcome {
                Outcome::Put { prev: Some(prev) } => kv(&mut out, prev),
                Outcome::DeleteRange { deleted, prev } => {
                    writeln!(out, "deleted {deleted}").unwrap();
                    prev.iter().for_each(|prev| kv(&mut out, prev));
                }
                Outcome::Txn(reply) => told_txn(&mut out, reply),
                Outcome::Alarms(alarms) => writeln!(out, "changed {}", alarms.len()).unwrap(),
                _ => {}
            }
        }
    }
    out
}

fn told_txn(out: &mut String, reply: &TxnReply) {
    writeln!(out, "succeeded {}", reply.succeeded).unwrap();
    for response in &reply.responses {
        match response {
            TxnOpReply::Range(range) => {
                range.kvs.iter().for_each(|found| kv(out, found));
                writeln!(out, "count {}", range.count).unwrap();
            }
            TxnOpReply::Put { .. } => writeln!(out, "put").unwrap(),
            TxnOpReply::DeleteRange { deleted, .. } => writeln!(out, "deleted {deleted}").unwrap(),
            TxnOpReply::Txn(inner) => told_txn(out, inner),
        }
    }
}

fn query(words: &[&str]) -> Result<RangeQuery, Box<dyn Error>> {
    let plain: Vec<&str> = words.iter().copied().filter(|word| !word.contains('=')).collect();
    let bytes = |word: &str| Bytes::copy_from_slice(word.as_bytes());
    let end = plain.get(1).map_or(Bytes::new(), |end| bytes(end));
    let mut query = user(KeyRange::from_wire(bytes(plain[0]), end));
    for (name, value) in words.iter().filter_map(|word| word.split_once('=')) {
        match name {
            "rev" => query.revision = Revision(value.parse()?),
            "limit" => query.limit = value.parse()?,
            "min_mod" => query.min_mod_revision = Revision(value.parse()?),
            "order" => {
                query.sort_order = if value == "desc" { SortOrder::Descend } else { SortOrder::Ascend };
            }
            "by" => {
                query.sort_target = match value {
                    "value" => SortTarget::Value,
                    "mod" => SortTarget::Mod,
                    "version" => SortTarget::Version,
                    _ => return Err(format!("unknown sort target {value}").into()),
                };
            }
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(query)
}

fn txn_op(words: &[&str]) -> Result<TxnOp, Box<dyn Error>> {
    let has = |flag: &str| words.contains(&flag);
    match words[0] {
        "put" => {
            let lease = words.iter().find_map(|word| word.strip_prefix("lease="));
            Ok(TxnOp::Put(Put {
                prev_kv: has("prev"),
                ignore_value: has("ignore_value"),
                ignore_lease: has("ignore_lease"),
                ..put(words[1], words.get(2).unwrap_or(&""), lease.map_or(Ok(0), str::parse)?)
            }))
        }
        "del" => {
            let range = query(&words[1..])?.range;
            Ok(TxnOp::DeleteRange(DeleteRange { space: Space::User, range, prev_kv: false }))
        }
        "range" => Ok(TxnOp::Range(query(&words[1..])?)),
        "txn" => Ok(TxnOp::Txn(txn(&words[1..])?)),
        other => Err(format!("unknown step {other}").into()),
    }
}

/// `cond... then op... else op...`, each condition and operation one word.
fn txn(words: &[&str]) -> Result<Txn, Box<dyn Error>> {
    let mut txn = Txn::default();
    let mut part = 0;
    for word in words {
        match *word {
            "then" => part = 1,
            "else" => part = 2,
            word if part == 0 => txn.compare.push(compare(word)?),
            word => {
                let ops = if part == 1 { &mut txn.success } else { &mut txn.failure };
                // A nested transaction separates its words by semicolons.
                let separator = if word.starts_with("txn;") { ';' } else { ' ' };
                ops.push(txn_op(&word.split(separator).collect::<Vec<_>>())?);
            }
        }
    }
    Ok(txn)
}

fn compare(word: &str) -> Result<Compare, Box<dyn Error>> {
    let (field, rest) = word.split_once('(').ok_or("a condition is field(key)op target")?;
    let (key, rest) = rest.split_once(')').ok_or("a condition is field(key)op target")?;
    let (op, target) = match rest.split_at(1) {
        ("=", target) => (CompareOp::Equal, target),
        (">", target) => (CompareOp::Greater, target),
        ("<", target) => (CompareOp::Less, target),
        ("!", target) => (CompareOp::NotEqual, target),
        _ => return Err(format!("unknown comparison {rest}").into()),
    };
    let target = match field {
        "version" => CompareTarget::Version(target.parse()?),
        "create" => CompareTarget::Create(target.parse()?),
        "mod" => CompareTarget::Mod(target.parse()?),
        "lease" => CompareTarget::Lease(target.parse()?),
        "value" => CompareTarget::Value(Bytes::copy_from_slice(target.as_bytes())),
        _ => return Err(format!("unknown field {field}").into()),
    };
    let words: Vec<&str> = key.split(',').collect();
    Ok(Compare { space: Space::User, range: query(&words)?.range, op, target })
}
