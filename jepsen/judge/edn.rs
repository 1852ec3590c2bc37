//! Histories as Jepsen's EDN, one operation a line, for Knossos, Elle and
//! others. Each call is an invocation and, if it was answered or certainly
//! failed, a completion; a call in doubt ends as `:info`, after which its
//! process is not seen again. It judges nothing and leaves out what the format
//! of a checker has no word for.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::append::{self, AppendTxn, Fate, Micro};
use super::history::{Action, ActionReply, Body, Call, History, Kv, Op, Operand, Outcome, Txn};

/// Calls of a register workload, values as `[key value]`, for Knossos with independent keys.
pub fn register(history: &History, workload: &str) -> String {
    lines(history, workload, |op| {
        let (key, f, asked, told) = match &op.call {
            Call::Single { serializable: true, .. } => return None,
            Call::Single { action: Action::Range { span, revision: 0, .. }, .. } if span.end.is_none() => {
                (&span.key, ":read", "nil".to_owned(), first_range(op).map(|kvs| text(kvs.first())))
            }
            Call::Single { action: Action::Put { key, value, .. }, .. } => {
                (key, ":write", quoted(value), None)
            }
            Call::Single { action: Action::Delete { span, .. }, .. } if span.end.is_none() => {
                (&span.key, ":write", "nil".to_owned(), None)
            }
            Call::Txn(Txn { compares, success, .. }) => match (&compares[..], &success[..]) {
                ([compare], [Action::Put { key, value, .. }]) => {
                    let old = match &compare.operand {
                        Operand::Value(value) => quoted(value),
                        _ => "nil".to_owned(),
                    };
                    (key, ":cas", format!("[{old} {}]", quoted(value)), None)
                }
                _ => return None,
            },
            _ => return None,
        };
        let keyed = |value: &str| format!("[{} {value}]", quoted(key));
        Some(Line { f, asked: keyed(&asked), told: keyed(&told.unwrap_or(asked)), is_refused: refused(op) })
    })
}

/// Additions and reads of sets, values as `[key element]` and `[key [elements]]`, for Jepsen's set checkers.
pub fn set(history: &History, workload: &str) -> String {
    lines(history, workload, |op| match &op.call {
        Call::Single { action: Action::Range { span, revision: 0, .. }, serializable: false }
            if span.end.is_none() =>
        {
            let list =
                first_range(op).and_then(|kvs| append::elements(&kvs.first()?.value)).unwrap_or_default();
            let key = quoted(&span.key);
            let told = format!("[{key} {}]", numbers(&list));
            Some(Line { f: ":read", asked: format!("[{key} nil]"), told, is_refused: false })
        }
        Call::Txn(Txn { success, .. }) => match &success[..] {
            [Action::Put { key, value, .. }] => {
                let asked = format!("[{} {}]", quoted(key), append::elements(value)?.last()?);
                Some(Line { f: ":add", told: asked.clone(), asked, is_refused: refused(op) })
            }
            _ => None,
        },
        _ => None,
    })
}

/// Reads of all accounts as `{account balance}`, and transfers with the balances they leave, for Jepsen's bank.
pub fn bank(history: &History, workload: &str) -> String {
    let balances = |pairs: Vec<(&str, &str)>| {
        let pair = |(key, value): (&str, &str)| {
            format!("{} {}", quoted(key), value.split(':').next().unwrap_or("nil"))
        };
        format!("{{{}}}", pairs.into_iter().map(pair).collect::<Vec<_>>().join(", "))
    };
    lines(history, workload, |op| match &op.call {
        Call::Single { action: Action::Range { span, limit: 0, .. }, .. } if span.end.is_some() => {
            let kvs = first_range(op).unwrap_or_default();
            let told = balances(kvs.iter().map(|kv| (kv.key.as_str(), kv.value.as_str())).collect());
            Some(Line { f: ":read", asked: "nil".to_owned(), told, is_refused: false })
        }
        Call::Txn(_) => {
            let asked = balances(super::attribution::puts(&op.call));
            Some(Line { f: ":transfer", told: asked.clone(), asked, is_refused: refused(op) })
        }
        _ => None,
    })
}

/// Every call of a workload, in words.
pub fn generic(history: &History, workload: &str) -> String {
    lines(history, workload, |op| {
        let f = match &op.call {
            Call::Single { action: Action::Range { .. }, .. } => ":range",
            Call::Single { action: Action::Put { .. }, .. } => ":put",
            Call::Single { action: Action::Delete { .. }, .. } => ":delete",
            Call::Txn(_) => ":txn",
            _ => ":other",
        };
        let told = match &op.outcome {
            Outcome::Ok(reply) => reply.to_string(),
            Outcome::Failed(why) | Outcome::Unknown(why) => why.clone(),
        };
        Some(Line { f, asked: quoted(&op.call.to_string()), told: quoted(&told), is_refused: false })
    })
}

/// Transactions of an append workload, for Elle's list-append.
pub fn append(history: &History, workload: &str) -> String {
    let (txns, _) = append::transactions(history, workload);
    // A call that was refused by its guard is a transaction that read, and then one that failed.
    let mut by_call: BTreeMap<usize, Vec<&AppendTxn>> = BTreeMap::new();
    for txn in &txns {
        by_call.entry(txn.index).or_default().push(txn);
    }
    let mut moments = Vec::new();
    for (index, mut txns) in by_call {
        txns.sort_by_key(|txn| txn.fate);
        for (number, txn) in txns.into_iter().enumerate().filter(|(_, txn)| !txn.micro.is_empty()) {
            let op = &history.ops[index];
            let from_ns = if number == 0 { op.invoked_ns } else { op.returned_ns };
            let how = match txn.fate {
                Fate::Committed => ":ok",
                Fate::Unknown => ":info",
                Fate::Aborted => ":fail",
            };
            let told = micros(&txn.micro, txn.fate == Fate::Committed);
            moments.push((from_ns, 2 * number, op.process, ":invoke", ":txn", micros(&txn.micro, false)));
            moments.push((op.returned_ns, 2 * number + 1, op.process, how, ":txn", told));
        }
    }
    write_lines(moments)
}

/// One call's words.
struct Line {
    f: &'static str,
    asked: String,
    told: String,
    /// It was answered, but did nothing.
    is_refused: bool,
}

/// A time, the order within it, process, type, function and value of a line.
type Moment<'a> = (u64, usize, u64, &'a str, &'a str, String);

fn lines(history: &History, workload: &str, words: impl Fn(&Op) -> Option<Line>) -> String {
    let mut moments = Vec::new();
    for op in history.ops.iter().filter(|op| op.workload == workload) {
        let Some(Line { f, asked, told, is_refused }) = words(op) else { continue };
        let (how, told) = match &op.outcome {
            Outcome::Ok(_) if is_refused => (":fail", asked.clone()),
            Outcome::Ok(_) => (":ok", told),
            Outcome::Failed(_) => (":fail", asked.clone()),
            Outcome::Unknown(_) => (":info", asked.clone()),
        };
        moments.push((op.invoked_ns, 0, op.process, ":invoke", f, asked));
        moments.push((op.returned_ns, 1, op.process, how, f, told));
    }
    write_lines(moments)
}

/// In the order of time; at the same moment invocations come first, which makes calls concurrent.
fn write_lines(mut moments: Vec<Moment<'_>>) -> String {
    moments.sort_by_key(|(time, order, ..)| (*time, *order));
    let mut edn = String::new();
    for (index, (time, _, process, how, f, value)) in moments.into_iter().enumerate() {
        let write = writeln!(
            edn,
            "{{:index {index}, :time {time}, :process {process}, :type {how}, :f {f}, :value {value}}}"
        );
        write.expect("a string takes everything");
    }
    edn
}

fn refused(op: &Op) -> bool {
    matches!(op.reply().map(|reply| &reply.body), Some(Body::Txn { succeeded: false, .. }))
}

fn first_range(op: &Op) -> Option<&[Kv]> {
    match &op.reply()?.body {
        Body::Single(ActionReply::Range { kvs, .. }) => Some(kvs),
        _ => None,
    }
}

fn text(kv: Option<&Kv>) -> String {
    kv.map_or("nil".to_owned(), |kv| quoted(&kv.value))
}

/// A string in EDN, which knows fewer escapes than Rust does.
fn quoted(text: &str) -> String {
    let mut edn = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => edn.extend(['\\', c]),
            '\n' => edn.push_str("\\n"),
            '\r' => edn.push_str("\\r"),
            '\t' => edn.push_str("\\t"),
            c if c.is_control() => write!(edn, "\\u{:04x}", c as u32).expect("a string takes everything"),
            c => edn.push(c),
        }
    }
    edn + "\""
}

fn numbers(list: &[u64]) -> String {
    format!("[{}]", list.iter().map(u64::to_string).collect::<Vec<_>>().join(" "))
}

fn micros(micros: &[Micro], are_read: bool) -> String {
    let one = |micro: &Micro| match micro {
        Micro::Append(key, element) => format!("[:append {} {element}]", quoted(key)),
        Micro::Read(key, list) if are_read => format!("[:r {} {}]", quoted(key), numbers(list)),
        Micro::Read(key, _) => format!("[:r {} nil]", quoted(key)),
    };
    format!("[{}]", micros.iter().map(one).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::Span;
    use crate::judge::simulator::{Script, cas, delete, get, put, putting, range, registers};

    #[test]
    fn a_register_is_written_with_its_keys() {
        let mut script = Script::new("test");
        script.call(0, 10, 20, put("k", "1"));
        script.call(1, 15, 30, cas("k", Some("1"), "2"));
        script.call(0, 30, 40, cas("k", Some("1"), "3"));
        script.unknown(0, 50, 60, put("k", "4"), false);
        script.call(1, 55, 65, get("k"));
        script.call(1, 70, 80, delete(Span::key("k")));
        let expected = r#"{:index 0, :time 10, :process 0, :type :invoke, :f :write, :value ["k" "1"]}
{:index 1, :time 15, :process 1, :type :invoke, :f :cas, :value ["k" ["1" "2"]]}
{:index 2, :time 20, :process 0, :type :ok, :f :write, :value ["k" "1"]}
{:index 3, :time 30, :process 0, :type :invoke, :f :cas, :value ["k" ["1" "3"]]}
{:index 4, :time 30, :process 1, :type :ok, :f :cas, :value ["k" ["1" "2"]]}
{:index 5, :time 40, :process 0, :type :fail, :f :cas, :value ["k" ["1" "3"]]}
{:index 6, :time 50, :process 0, :type :invoke, :f :write, :value ["k" "4"]}
{:index 7, :time 55, :process 1, :type :invoke, :f :read, :value ["k" nil]}
{:index 8, :time 60, :process 0, :type :info, :f :write, :value ["k" "4"]}
{:index 9, :time 65, :process 1, :type :ok, :f :read, :value ["k" "2"]}
{:index 10, :time 70, :process 1, :type :invoke, :f :write, :value ["k" nil]}
{:index 11, :time 80, :process 1, :type :ok, :f :write, :value ["k" nil]}
"#;
        assert_eq!(register(&script.history(), "test"), expected);
    }

    #[test]
    fn lists_are_written_for_elle() {
        let mut script = Script::new("test");
        script.call(0, 10, 20, cas("x", None, "1"));
        script.call(1, 30, 40, cas("x", None, "2"));
        script.unknown(2, 50, 60, cas("x", Some("1"), "1,3"), true);
        let expected = r#"{:index 0, :time 10, :process 0, :type :invoke, :f :txn, :value [[:r "x" nil] [:append "x" 1]]}
{:index 1, :time 20, :process 0, :type :ok, :f :txn, :value [[:r "x" []] [:append "x" 1]]}
{:index 2, :time 30, :process 1, :type :invoke, :f :txn, :value [[:r "x" nil]]}
{:index 3, :time 40, :process 1, :type :ok, :f :txn, :value [[:r "x" [1]]]}
{:index 4, :time 40, :process 1, :type :invoke, :f :txn, :value [[:r "x" nil] [:append "x" 2]]}
{:index 5, :time 40, :process 1, :type :fail, :f :txn, :value [[:r "x" nil] [:append "x" 2]]}
{:index 6, :time 50, :process 2, :type :invoke, :f :txn, :value [[:r "x" nil] [:append "x" 3]]}
{:index 7, :time 60, :process 2, :type :info, :f :txn, :value [[:r "x" nil] [:append "x" 3]]}
"#;
        assert_eq!(append(&script.history(), "test"), expected);
    }

    #[test]
    fn sets_and_banks_are_written_for_jepsens_own_checkers() {
        let mut script = Script::new("test");
        script.call(0, 10, 20, cas("s", None, "1"));
        script.call(0, 30, 40, get("s"));
        let both = vec![putting("b/1", "3:x"), putting("b/2", "7:y")];
        script.call(0, 50, 60, Call::Txn(Txn { success: both, ..Txn::default() }));
        script.call(0, 70, 80, range(Span::prefix("b/")));
        let history = script.history();
        assert!(set(&history, "test").contains(r#":type :ok, :f :add, :value ["s" 1]"#));
        assert!(set(&history, "test").contains(r#":type :ok, :f :read, :value ["s" [1]]"#));
        assert!(bank(&history, "test").contains(r#":type :ok, :f :transfer, :value {"b/1" 3, "b/2" 7}"#));
        assert!(bank(&history, "test").contains(r#":type :ok, :f :read, :value {"b/1" 3, "b/2" 7}"#));
        assert!(generic(&history, "test").contains(r#":f :range, :value "get b/..b0""#));
    }

    #[test]
    fn strings_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd\u{1}é"), r#""a\"b\\c\nd\u0001é""#);
    }

    #[test]
    fn every_process_has_one_call_at_a_time_and_none_after_a_doubt() {
        let edn = register(&registers(3, 1, 300, 10), "register");
        let mut state: BTreeMap<&str, &str> = BTreeMap::new();
        for (number, line) in edn.lines().enumerate() {
            let field = |name: &str| {
                line.split(name).nth(1).and_then(|rest| rest.split([',', '}']).next()).expect("a field")
            };
            assert_eq!(field(":index "), number.to_string());
            let (process, how) = (field(":process "), field(":type "));
            let before = state.insert(process, how).unwrap_or(":ok");
            match how {
                ":invoke" => assert!(matches!(before, ":ok" | ":fail"), "{line}"),
                _ => assert_eq!(before, ":invoke", "{line}"),
            }
        }
        assert_eq!(edn.lines().count(), 600);
    }
}
