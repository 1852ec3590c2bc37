//! The layout, held by a test: which room may name which, who passes which
//! door, how files begin and how long they get, metric names, banned words.
//!
//! It reads the sources as text and links nothing, so it runs in milliseconds.
//! It knows no exceptions by file name, except where a room's door is a file.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// The rooms by rank. A room names only rooms of a lower rank.
const RANKS: &[&[&str]] = &[
    &["types", "telemetry", "env", "resilience", "load", "mutant"],
    &["wire", "storage"],
    &["client", "mvcc", "lease", "auth"],
    &["machine", "watch"],
    &["raft"],
    &["node"],
    &["server"],
    &["settings"],
    &["cli"],
];

/// Which crates pass through which doors: only these paths may name them.
const DOORS: &[(&str, &[&str])] = &[
    ("rocksdb", &["src/storage/"]),
    ("openraft", &["src/raft/", "src/node/"]),
    ("tonic", &["src/wire/", "src/server/", "src/client/", "src/raft/network"]),
    ("bincode", &["src/storage/codec.rs"]),
];

/// The longest file, its `mod tests` and whole test files not counted.
const FILE_LINES_MAX: usize = 550;
/// The longest function; tests may tell longer stories.
const FUNCTION_LINES_MAX: usize = 85;
const LINE_CHARS_MAX: usize = 120;

/// Words that mark unfinished or careless work; assembled, so that this file does not contain them.
fn banned() -> Vec<String> {
    [
        ("TO", "DO"),
        ("FIX", "ME"),
        ("XX", "X"),
        ("HA", "CK"),
        ("for ", "now"),
        ("to", "do!("),
        ("unimple", "mented!("),
    ]
    .iter()
    .map(|(a, b)| format!("{a}{b}"))
    .collect()
}

struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The room the file belongs to.
    fn room(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let first = inside.split('/').next()?;
        let name = first.strip_suffix(".rs").unwrap_or(first);
        RANKS.iter().flat_map(|rank| rank.iter()).copied().find(|room| *room == name)
    }

    fn is_generated(&self) -> bool {
        self.path.starts_with("src/wire/gen/")
    }

    fn is_test(&self) -> bool {
        !self.path.starts_with("src/") || self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// The lines before a closing `mod tests`, comments and all.
    fn code(&self) -> Vec<&str> {
        let lines: Vec<&str> = self.text.lines().collect();
        let end =
            lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests"));
        lines[..end.unwrap_or(lines.len())].to_vec()
    }
}

fn sources() -> Vec<Source> {
    let mut open: Vec<PathBuf> = ["src", "tests", "benches", "examples"].map(PathBuf::from).into();
    let mut found = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(Source {
                    path: path.to_string_lossy().into_owned(),
                    text: fs::read_to_string(&path).expect("readable source"),
                });
            }
        }
    }
    assert!(found.iter().any(|source| source.path == "src/lib.rs"), "the sources are not here");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn rank(room: &str) -> usize {
    RANKS.iter().position(|rank| rank.contains(&room)).expect("a room")
}

/// A line without its comment. Good enough: no source holds `//` in a string that matters here.
fn uncommented(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

/// Whether `text` names `word` as a path (`word::`), as a `use` or as an extern crate.
fn names_crate(text: &str, word: &str) -> bool {
    let path = format!("{word}::");
    text.match_indices(&path).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') || text[..at].ends_with("use ::")
    }) || text.trim_start().starts_with(&format!("use {word};"))
}

/// The rooms a piece of code names through `crate::`, also in braces: `use crate::{env, types::Key}`.
fn rooms_named(code: &str) -> Vec<String> {
    let mut named = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c == '$' || c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(inside) = rest.strip_prefix('{') {
            let (mut depth, mut word, mut fresh) = (1, String::new(), true);
            for c in inside.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => fresh = true,
                    c if depth == 1 && fresh && (c.is_alphanumeric() || c == '_') => {
                        word.push(c);
                        continue;
                    }
                    c if c.is_whitespace() => {}
                    _ => {}
                }
                if !word.is_empty() {
                    named.push(std::mem::take(&mut word));
                    fresh = false;
                }
                if c == ',' && depth == 1 {
                    fresh = true;
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            named.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    named.retain(|name| RANKS.iter().any(|rank| rank.contains(&name.as_str())));
    named
}

#[test]
fn the_reader_of_paths_reads_them() {
    assert_eq!(rooms_named("use crate::types::Key;"), ["types"]);
    assert_eq!(rooms_named("use crate::{env::EnvRef, node, types::{Key, mvcc}};"), ["env", "node", "types"]);
    assert_eq!(rooms_named("$crate::types::X; mycrate::types::Y"), Vec::<String>::new());
    assert!(names_crate("use tonic::Status;", "tonic"));
    assert!(names_crate("fn a() -> tonic::Status", "tonic"));
    assert!(!names_crate("use mytonic::X; tonic_health::Y", "tonic"));
    assert!(!names_crate("crate::wire::tonic::X", "tonic"));
}

fn complain(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn rooms_name_only_rooms_below_them() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !source.is_generated()) {
        let Some(room) = source.room() else { continue };
        let code: String = source.code().iter().map(|line| format!("{}\n", uncommented(line))).collect();
        for named in rooms_named(&code) {
            if named != room && rank(&named) >= rank(room) {
                found.push(format!(
                    "{} ({room}, rank {}) names {named} (rank {})",
                    source.path,
                    rank(room),
                    rank(&named)
                ));
            }
        }
    }
    found.dedup();
    complain("a room may name only rooms of a lower rank", found);
}

#[test]
fn every_folder_and_file_of_the_library_is_a_room() {
    let mut found = Vec::new();
    for source in sources() {
        let inside = source.path.strip_prefix("src/");
        if inside.is_some_and(|path| path != "lib.rs" && path != "main.rs") && source.room().is_none() {
            found.push(source.path);
        }
    }
    complain("not in a room of the list in this file", found);
}

#[test]
fn foreign_crates_pass_only_through_their_doors() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/")) {
        let code: String = source.code().iter().map(|line| format!("{}\n", uncommented(line))).collect();
        for (name, doors) in DOORS {
            let is_door = doors.iter().any(|door| source.path.starts_with(door));
            let family = ["", "_prost", "_health", "_reflection", "_macros", "_rt"];
            if !is_door && family.iter().any(|end| names_crate(&code, &format!("{name}{end}"))) {
                found.push(format!("{} names {name}; its doors are {doors:?}", source.path));
            }
        }
    }
    complain("a crate outside its door", found);
}

#[test]
fn no_room_passes_on_what_belongs_to_another() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/") && !source.is_generated())
    {
        for (number, line) in source.code().iter().enumerate() {
            let line = uncommented(line).trim();
            let public = line.starts_with("pub use ") || line.starts_with("pub(crate) use ");
            if public
                && (line.contains("crate::")
                    || DOORS.iter().any(|(name, _)| line.contains(&format!(" {name}::"))))
            {
                found.push(format!("{}:{}: {line}", source.path, number + 1));
            }
        }
    }
    complain("`pub use` across rooms", found);
}

#[test]
fn every_file_says_first_what_it_is() {
    let generated = |source: &Source| source.is_generated();
    let missing =
        sources().into_iter().filter(|s| !generated(s) && !s.text.starts_with("//! ")).map(|s| s.path);
    complain("the first line is no `//!` sentence", missing.collect());
}

#[test]
fn files_and_functions_and_lines_have_an_end() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !source.is_generated()) {
        let code = source.code();
        if !source.is_test() && code.len() > FILE_LINES_MAX {
            found.push(format!("{}: {} lines, at most {FILE_LINES_MAX}", source.path, code.len()));
        }
        for (number, line) in source.text.lines().enumerate() {
            if line.chars().count() > LINE_CHARS_MAX && !line.contains("http") && !line.contains('"') {
                found.push(format!("{}:{}: {} characters", source.path, number + 1, line.chars().count()));
            }
        }
        if source.is_test() {
            continue;
        }
        let mut open: Option<(usize, usize)> = None;
        for (number, line) in code.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let starts = ["fn ", "pub fn ", "async fn ", "pub async fn ", "pub(crate) fn ", "pub(super) fn "];
            if open.is_none() && starts.iter().any(|start| line.trim_start().starts_with(start)) {
                open = Some((number, indent));
            }
            if let Some((from, at)) = open
                && indent == at
                && (line.trim_end() == format!("{}}}", " ".repeat(at))
                    || (number == from && line.ends_with('}'))
                    || line.ends_with(';'))
            {
                if number - from + 1 > FUNCTION_LINES_MAX {
                    found.push(format!(
                        "{}:{}: a function of {} lines",
                        source.path,
                        from + 1,
                        number - from + 1
                    ));
                }
                open = None;
            }
        }
    }
    complain("too long", found);
}

#[test]
fn every_metric_has_one_name_in_one_place() {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut stray = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/") && !source.is_test()) {
        let home = source.room() == Some("telemetry");
        for (number, line) in source.code().iter().enumerate() {
            let line = uncommented(line);
            for name in quoted(line).into_iter().filter(|name| is_metric(name)) {
                let at = format!("{}:{}", source.path, number + 1);
                if home {
                    names.entry(name).or_default().push(at)
                } else {
                    stray.push(format!("{at}: {name}"))
                }
            }
        }
    }
    complain("a metric named outside telemetry", stray);
    let twice =
        names.into_iter().filter(|(_, places)| places.len() > 1).map(|(name, at)| format!("{name}: {at:?}"));
    complain("one metric, declared twice", twice.collect());
}

fn is_metric(name: &str) -> bool {
    let rest = name.strip_prefix("mainstay_").unwrap_or("");
    !rest.is_empty() && rest.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn quoted(line: &str) -> Vec<String> {
    line.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn no_word_of_unfinished_work_stays() {
    let banned = banned();
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !source.is_generated()) {
        for (number, line) in source.text.lines().enumerate() {
            for word in banned.iter().filter(|word| line.contains(word.as_str())) {
                found.push(format!("{}:{}: {word}", source.path, number + 1));
            }
        }
    }
    complain("say what holds, or finish it", found);
}

#[test]
fn only_env_reads_the_clock_and_draws_at_random() {
    let mut found = Vec::new();
    let outside = ["SystemTime::now", "std::time::Instant", "rand::random", "rand::rng(", "thread_rng"];
    // The tool and the supervisor of local nodes wait for people and processes, not for the cluster.
    let excused = |source: &Source| matches!(source.room(), Some("env" | "cli" | "resilience") | None);
    for source in sources().iter().filter(|s| s.path.starts_with("src/") && !s.is_test() && !excused(s)) {
        for (number, line) in source.code().iter().enumerate() {
            for word in outside.iter().filter(|word| uncommented(line).contains(**word)) {
                found.push(format!("{}:{}: {word}", source.path, number + 1));
            }
        }
    }
    complain("time and chance come from env", found);
}

#[test]
fn processes_end_in_one_place() {
    let mut found = Vec::new();
    for source in
        sources().iter().filter(|s| s.path.starts_with("src/") && !s.is_test() && s.path != "src/main.rs")
    {
        for (number, line) in source.code().iter().enumerate() {
            let line = uncommented(line);
            let unbounded = line.contains("unbounded_channel") || line.contains("mpsc::unbounded");
            if unbounded {
                found.push(format!("{}:{}: an unbounded queue", source.path, number + 1));
            }
        }
    }
    complain("queues are bounded", found);
}
