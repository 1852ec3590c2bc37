//! Which changes a subscription is about.
//!
//! A [`Filter`] answers two questions: whether a change matches, and which
//! range of keys covers all that can. The server sends that range; the rest is
//! sorted out here. Invariant: a key that matches is in the covering range.
//!
//! Keys are bytes, and so are keys, prefixes, suffixes, parts and wildcards. A
//! regular expression is about text: it never matches a key that is not UTF-8.

use std::str::FromStr;

use bytes::Bytes;
use regex_lite::{Regex, RegexBuilder};
use thiserror::Error;

use super::glob::Glob;
use crate::client::ClientError;
use crate::types::{Event, EventKind, KeyRange};

/// The longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 4 << 10;
/// The most memory that a compiled regular expression takes, in bytes.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// A filter that cannot be: which part of it, and what is wrong there.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("filter {part} `{pattern}`: {reason}")]
pub struct FilterError {
    /// The kind of filter: `regex`, `suffix` and so on.
    pub part: &'static str,
    /// What was given.
    pub pattern: String,
    /// What is wrong, with the place where that is known.
    pub reason: String,
}

impl From<FilterError> for ClientError {
    fn from(error: FilterError) -> ClientError {
        ClientError::BadOption { option: "filter", reason: error.to_string() }
    }
}

/// Which changes a subscription is about.
///
/// As text (`Filter::from_str`, `mainstay watch --filter`) it is a kind, a
/// colon and a pattern: `key:`, `prefix:`, `suffix:`, `contains:`, `glob:`,
/// `regex:`, or `not:` before another filter; or one of the words `put` and
/// `delete`.
///
/// ```
/// use mainstay::client::Filter;
///
/// let settings = Filter::prefix("svc/") & !Filter::suffix(".tmp")?;
/// assert!(settings.matches_key(b"svc/checkout/limit"));
/// assert!(!settings.matches_key(b"svc/checkout/limit.tmp"));
/// assert!("glob:svc/*/limit".parse::<Filter>()?.matches_key(b"svc/checkout/limit"));
/// # Ok::<(), mainstay::client::FilterError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Filter {
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Keys(KeyRange),
    Suffix(Bytes),
    Contains(Bytes),
    Glob(Glob),
    Regex { regex: Regex, prefix: String },
    Kind(EventKind),
    All(Vec<Test>),
    Any(Vec<Test>),
    Not(Box<Test>),
}

impl Filter {
    /// Every change.
    pub fn everything() -> Filter {
        Filter::prefix("")
    }

    /// One key.
    pub fn key(key: impl Into<Bytes>) -> Filter {
        Filter::of(Test::Keys(KeyRange::Single(key.into())))
    }

    /// All keys that begin with `prefix`; every key when it is empty.
    pub fn prefix(prefix: impl Into<Bytes>) -> Filter {
        Filter::of(Test::Keys(KeyRange::prefix(prefix.into())))
    }

    /// The keys of a range.
    ///
    /// # Errors
    /// When no key can be in it, because it ends where it starts or before.
    pub fn range(range: KeyRange) -> Result<Filter, FilterError> {
        if let KeyRange::Span { start, end } = &range
            && range.is_empty()
        {
            let pattern = format!("{}..{}", start.escape_ascii(), end.escape_ascii());
            let reason = "the end is not above the start, so no key is in it".to_owned();
            return Err(FilterError { part: "range", pattern, reason });
        }
        Ok(Filter::of(Test::Keys(range)))
    }

    /// All keys that end with `suffix`.
    ///
    /// # Errors
    /// When it is empty or longer than 4 KiB.
    pub fn suffix(suffix: impl Into<Bytes>) -> Result<Filter, FilterError> {
        Ok(Filter::of(Test::Suffix(checked("suffix", suffix.into())?)))
    }

    /// All keys that have `part` somewhere.
    ///
    /// # Errors
    /// When it is empty or longer than 4 KiB.
    pub fn contains(part: impl Into<Bytes>) -> Result<Filter, FilterError> {
        Ok(Filter::of(Test::Contains(checked("contains", part.into())?)))
    }

    /// All keys that a pattern with wildcards describes from end to end: `*` is
    /// any run within one segment of a path (without `/`), `**` any run at all,
    /// `?` one character that is not `/`; `\` takes the meaning from the
    /// character after it. All else stands for itself.
    ///
    /// # Errors
    /// When it is empty, longer than 4 KiB, or ends with `\`.
    pub fn glob(pattern: &str) -> Result<Filter, FilterError> {
        checked("glob", Bytes::copy_from_slice(pattern.as_bytes()))?;
        let wrong = |reason| FilterError { part: "glob", pattern: pattern.to_owned(), reason };
        Ok(Filter::of(Test::Glob(Glob::parse(pattern).map_err(wrong)?)))
    }

    /// All keys that a regular expression finds something in; `^` and `$` tie it
    /// to the ends. It takes time in proportion to the key, whatever the
    /// pattern. A pattern that begins with `^` and plain characters has the
    /// server send only keys that begin so.
    ///
    /// # Errors
    /// When it is empty, longer than 4 KiB, does not compile or grows too large.
    pub fn regex(pattern: &str) -> Result<Filter, FilterError> {
        checked("regex", Bytes::copy_from_slice(pattern.as_bytes()))?;
        let wrong = |error: regex_lite::Error| FilterError {
            part: "regex",
            pattern: pattern.to_owned(),
            reason: error.to_string(),
        };
        let regex = RegexBuilder::new(pattern).size_limit(REGEX_BYTES_MAX).build().map_err(wrong)?;
        Ok(Filter::of(Test::Regex { regex, prefix: literal_prefix(pattern) }))
    }

    /// Keys being set. What a snapshot brings counts as set.
    pub fn puts() -> Filter {
        Filter::of(Test::Kind(EventKind::Put))
    }

    /// Keys being removed. A snapshot passes it whole, because what is not in
    /// the snapshot was removed.
    pub fn deletes() -> Filter {
        Filter::of(Test::Kind(EventKind::Delete))
    }

    /// What all of these match; everything when there is none.
    pub fn all(filters: impl IntoIterator<Item = Filter>) -> Filter {
        Filter::of(Test::All(filters.into_iter().map(|filter| filter.test).collect()))
    }

    /// What any of these matches; nothing when there is none.
    pub fn any(filters: impl IntoIterator<Item = Filter>) -> Filter {
        Filter::of(Test::Any(filters.into_iter().map(|filter| filter.test).collect()))
    }

    /// Whether a change matches.
    pub fn matches(&self, event: &Event) -> bool {
        self.test.matches(&event.kv.key, event.kind)
    }

    /// Whether some change of this key matches.
    pub fn matches_key(&self, key: &[u8]) -> bool {
        [EventKind::Put, EventKind::Delete].iter().any(|kind| self.test.matches(key, *kind))
    }

    /// The smallest range that has every key that can match; `None` when none can.
    pub fn covering_range(&self) -> Option<KeyRange> {
        let Cover { start, end } = self.test.cover();
        // There is no empty key, and on the wire no range begins with it.
        let start = start.max(Bytes::from_static(&[0]));
        match end {
            Some(end) if start >= end => None,
            Some(end) if end.strip_suffix(&[0]) == Some(&start[..]) => Some(KeyRange::Single(start)),
            Some(end) => Some(KeyRange::Span { start, end }),
            None => Some(KeyRange::From(start)),
        }
    }

    /// Whether changes of this kind can match.
    pub fn wants(&self, kind: EventKind) -> bool {
        self.test.wants(kind)
    }

    fn of(test: Test) -> Filter {
        Filter { test }
    }
}

impl std::ops::BitAnd for Filter {
    type Output = Filter;

    fn bitand(self, other: Filter) -> Filter {
        Filter::all([self, other])
    }
}

impl std::ops::BitOr for Filter {
    type Output = Filter;

    fn bitor(self, other: Filter) -> Filter {
        Filter::any([self, other])
    }
}

impl std::ops::Not for Filter {
    type Output = Filter;

    fn not(self) -> Filter {
        Filter::of(Test::Not(Box::new(self.test)))
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Filter, FilterError> {
        if let Some(rest) = text.strip_prefix("not:") {
            return Ok(!rest.parse::<Filter>()?);
        }
        let pattern = |rest: &str| rest.to_owned();
        match text.split_once(':') {
            None if text == "put" => Ok(Filter::puts()),
            None if text == "delete" => Ok(Filter::deletes()),
            Some(("key", "")) => Err(checked("key", Bytes::new()).expect_err("it is empty")),
            Some(("key", rest)) => Ok(Filter::key(pattern(rest))),
            Some(("prefix", rest)) => Ok(Filter::prefix(pattern(rest))),
            Some(("suffix", rest)) => Filter::suffix(pattern(rest)),
            Some(("contains", rest)) => Filter::contains(pattern(rest)),
            Some(("glob", rest)) => Filter::glob(rest),
            Some(("regex", rest)) => Filter::regex(rest),
            _ => Err(FilterError {
                part: "kind",
                pattern: text.to_owned(),
                reason:
                    "write put, delete, or key:, prefix:, suffix:, contains:, glob: or regex: and a pattern, \
                         each after not: to turn it round"
                        .to_owned(),
            }),
        }
    }
}

impl Test {
    fn matches(&self, key: &[u8], kind: EventKind) -> bool {
        match self {
            Test::Keys(range) => range.contains(key),
            Test::Suffix(suffix) => key.ends_with(suffix),
            Test::Contains(part) => key.windows(part.len()).any(|window| window == part),
            Test::Glob(glob) => glob.matches(key),
            Test::Regex { regex, .. } => std::str::from_utf8(key).is_ok_and(|key| regex.is_match(key)),
            Test::Kind(wanted) => *wanted == kind,
            Test::All(tests) => tests.iter().all(|test| test.matches(key, kind)),
            Test::Any(tests) => tests.iter().any(|test| test.matches(key, kind)),
            Test::Not(test) => !test.matches(key, kind),
        }
    }

    fn wants(&self, kind: EventKind) -> bool {
        match self {
            Test::Kind(wanted) => *wanted == kind,
            Test::All(tests) => tests.iter().all(|test| test.wants(kind)),
            Test::Any(tests) => tests.iter().any(|test| test.wants(kind)),
            Test::Not(test) => match **test {
                Test::Kind(unwanted) => unwanted != kind,
                // The opposite of a maybe.
                _ => true,
            },
            _ => true,
        }
    }

    fn cover(&self) -> Cover {
        match self {
            Test::Keys(range) => Cover::of(range),
            Test::Glob(glob) => Cover::of(&glob.cover()),
            Test::Regex { prefix, .. } => Cover::of(&KeyRange::prefix(prefix.clone().into())),
            Test::Suffix(_) | Test::Contains(_) | Test::Kind(_) | Test::Not(_) => Cover::everything(),
            Test::All(tests) => tests.iter().map(Test::cover).fold(Cover::everything(), Cover::both),
            Test::Any(tests) => tests.iter().map(Test::cover).fold(Cover::nothing(), Cover::either),
        }
    }
}

/// `start <= key < end`; without an end it goes on for ever.
#[derive(Clone, Debug)]
struct Cover {
    start: Bytes,
    end: Option<Bytes>,
}

impl Cover {
    fn everything() -> Cover {
        Cover { start: Bytes::new(), end: None }
    }

    fn nothing() -> Cover {
        Cover { start: Bytes::new(), end: Some(Bytes::new()) }
    }

    fn of(range: &KeyRange) -> Cover {
        let end = match range {
            KeyRange::Single(key) => Some([key, &[0][..]].concat().into()),
            KeyRange::Span { end, .. } => Some(end.clone()),
            KeyRange::From(_) => None,
        };
        Cover { start: range.start().clone(), end }
    }

    fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    fn both(self, other: Cover) -> Cover {
        let end = match (self.end, other.end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Cover { start: self.start.max(other.start), end }
    }

    fn either(self, other: Cover) -> Cover {
        if self.is_empty() {
            return other;
        }
        if other.is_empty() {
            return self;
        }
        let end = self.end.zip(other.end).map(|(a, b)| a.max(b));
        Cover { start: self.start.min(other.start), end }
    }
}

fn checked(part: &'static str, pattern: Bytes) -> Result<Bytes, FilterError> {
    let wrong = |reason: &str| {
        let pattern = pattern.escape_ascii().to_string();
        Err(FilterError { part, pattern, reason: reason.to_owned() })
    };
    match pattern.len() {
        0 => wrong("the pattern is empty"),
        length if length > PATTERN_BYTES_MAX => wrong("the pattern is longer than 4 KiB"),
        _ => Ok(pattern),
    }
}

/// The characters that every match of a regular expression begins with. Empty
/// where that would take more than a look: it is then only slower.
fn literal_prefix(pattern: &str) -> String {
    let Some(rest) = pattern.strip_prefix('^') else { return String::new() };
    if has_alternatives(rest) || has_flags(rest) {
        return String::new();
    }
    let mut prefix = String::new();
    let mut chars = rest.chars().peekable();
    while let Some(char) = chars.next() {
        let literal = match char {
            // An escaped sign is the sign; an escaped letter or digit has a meaning.
            '\\' => chars.next().filter(|escaped| escaped.is_ascii_punctuation() && !"<>".contains(*escaped)),
            '.' | '[' | '(' | ')' | '$' | '^' | '|' | '*' | '+' | '?' | '{' => None,
            plain => Some(plain),
        };
        let Some(literal) = literal else { break };
        // It may be missing, if only because another sign follows the `+`.
        if matches!(chars.peek(), Some('*' | '+' | '?' | '{')) {
            break;
        }
        prefix.push(literal);
    }
    prefix
}

/// Whether `|` stands outside all groups, or may.
fn has_alternatives(pattern: &str) -> bool {
    if !pattern.contains('|') {
        return false;
    }
    let (mut depth, mut chars) = (0, pattern.chars());
    while let Some(char) = chars.next() {
        match char {
            '\\' => drop(chars.next()),
            // What a class may hold is for the library to know.
            '[' => return true,
            '(' => depth += 1,
            ')' => depth -= 1,
            '|' if depth == 0 => return true,
            _ => {}
        }
    }
    false
}

/// Whether flags change what characters mean.
fn has_flags(pattern: &str) -> bool {
    let groups = pattern.matches("(?").count();
    groups
        != pattern.matches("(?:").count() + pattern.matches("(?P<").count() + pattern.matches("(?<").count()
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
