//! What filters match, what they cover, and how they refuse.

use proptest::prelude::*;

use super::*;
use crate::types::{KeyValue, LeaseId, Revision, Space};

fn parsed(text: &str) -> Filter {
    text.parse().expect("a filter")
}

fn refusal(text: &str) -> String {
    text.parse::<Filter>().expect_err("it cannot be").to_string()
}

fn event(key: &str, kind: EventKind) -> Event {
    let kv = KeyValue {
        key: Bytes::copy_from_slice(key.as_bytes()),
        create_revision: Revision(1),
        mod_revision: Revision(1),
        version: 1,
        lease: LeaseId::NONE,
        value: Bytes::new(),
    };
    Event { space: Space::User, kind, kv, prev: None }
}

#[test]
fn each_kind_matches_what_it_says() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("key:a/b", &["a/b"], &["a/bc", "a/"]),
        ("prefix:a/", &["a/", "a/b"], &["a", "b"]),
        ("prefix:", &["a", "\0"], &[]),
        ("suffix:.tmp", &[".tmp", "a.tmp"], &["a.tmp2"]),
        ("contains:/x/", &["a/x/b", "/x/"], &["a/x", "xx"]),
        ("glob:a/*/c", &["a/b/c", "a//c"], &["a/b/b/c", "a/c", "xa/b/c", "a/b/cd"]),
        ("glob:a/**/c", &["a/b/c", "a/b/b/c", "a//c"], &["a/c"]),
        ("glob:**.json", &["a/b.json", ".json"], &["a/b.jsonx"]),
        ("glob:a?c", &["abc", "aéc"], &["a/c", "ac", "abbc"]),
        (r"glob:a\*c", &["a*c"], &["abc"]),
        ("glob:*a*b*", &["ab", "xaxbx"], &["ba", "a/b"]),
        ("regex:^svc/[a-z]+/limit$", &["svc/a/limit"], &["svc/1/limit", "xsvc/a/limit"]),
        ("regex:b", &["abc"], &["ac"]),
        ("not:suffix:x", &["a"], &["ax"]),
        ("not:not:key:a", &["a"], &["b"]),
    ];
    for (text, yes, no) in cases {
        let filter = parsed(text);
        yes.iter().for_each(|key| assert!(filter.matches_key(key.as_bytes()), "{text} {key:?}"));
        no.iter().for_each(|key| assert!(!filter.matches_key(key.as_bytes()), "{text} {key:?}"));
    }
}

#[test]
fn kinds_of_change_are_told_apart_and_snapshots_pass() {
    let filter = Filter::prefix("a") & Filter::deletes();
    assert!(filter.matches(&event("a", EventKind::Delete)));
    assert!(!filter.matches(&event("a", EventKind::Put)));
    assert!(filter.matches_key(b"a") && !filter.matches_key(b"b"));
    assert!(parsed("put").matches(&event("a", EventKind::Put)));
    assert!(!parsed("not:put").matches(&event("a", EventKind::Put)));
}

#[test]
fn keys_are_bytes_and_a_regex_is_about_text() {
    let key = b"a/\xff\x00/b";
    assert!(parsed("prefix:a/").matches_key(key) && parsed("suffix:/b").matches_key(key));
    assert!(Filter::contains(&b"\xff\x00"[..]).expect("a part").matches_key(key));
    assert!(parsed("glob:a/??/b").matches_key(key), "a byte that is no character counts as one");
    assert!(!parsed("regex:.*").matches_key(key) && parsed("not:regex:.*").matches_key(key));
}

#[test]
fn what_cannot_be_is_refused_with_its_name_and_place() {
    assert_eq!(refusal("suffix:"), "filter suffix ``: the pattern is empty");
    assert_eq!(refusal("key:"), "filter key ``: the pattern is empty");
    assert_eq!(refusal("glob:"), "filter glob ``: the pattern is empty");
    assert!(refusal("regex:a(b").starts_with("filter regex `a(b`: "), "{}", refusal("regex:a(b"));
    assert!(refusal("regex:(a{1000}){1000}").contains("size"), "{}", refusal("regex:(a{1000}){1000}"));
    assert_eq!(refusal("glob:a\\"), "filter glob `a\\`: nothing stands after the `\\` at its end");
    assert!(refusal("wild:a").contains("write put, delete"), "{}", refusal("wild:a"));
    assert!(refusal("a").contains("write put, delete"));
    assert!(refusal(&format!("contains:{}", "x".repeat(5_000))).contains("longer than 4 KiB"));
    let inverted = KeyRange::Span { start: "b".into(), end: "a".into() };
    let refused = Filter::range(inverted).expect_err("inverted").to_string();
    assert_eq!(refused, "filter range `b..a`: the end is not above the start, so no key is in it");
    let refused = "suffix:".parse::<Filter>().expect_err("empty");
    assert!(matches!(ClientError::from(refused), ClientError::BadOption { option: "filter", .. }));
}

#[test]
fn the_server_is_asked_for_no_more_than_it_must() {
    let cover = |filter: &str| parsed(filter).covering_range();
    let prefix = |prefix: &'static str| Some(KeyRange::prefix(prefix.into()));
    let everything = Some(KeyRange::From(Bytes::from_static(&[0])));
    assert_eq!(cover("key:a"), Some(KeyRange::Single("a".into())));
    assert_eq!(cover("prefix:a"), prefix("a"));
    assert_eq!(cover("prefix:"), everything);
    assert_eq!(cover("glob:a/*/c"), prefix("a/"));
    assert_eq!(cover("glob:a/b"), Some(KeyRange::Single("a/b".into())));
    assert_eq!(cover("suffix:a"), everything);
    for (regex, literal) in [
        ("^svc/a", "svc/a"),
        (r"^svc\.a/(b|c)/", "svc.a/"),
        ("^svc/x?y", "svc/"),
        ("^svc/x+y", "svc/"),
        ("^x+*", ""),
        ("^svc/x{0,2}", "svc/"),
        (r"^a\d", "a"),
        (r"^ab\bc", "ab"),
        ("^é*", ""),
        ("^a|b", ""),
        ("^(?i)a", ""),
        ("^a[|]b", ""),
        ("svc", ""),
    ] {
        assert_eq!(literal_prefix(regex), literal, "{regex}");
    }
    let both = Filter::prefix("a/") & Filter::suffix("x").expect("a suffix");
    assert_eq!(both.covering_range(), prefix("a/"));
    let either = Filter::key("a") | Filter::prefix("c");
    assert_eq!(either.covering_range(), Some(KeyRange::Span { start: "a".into(), end: "d".into() }));
    assert_eq!((Filter::prefix("a") & Filter::prefix("b")).covering_range(), None);
    assert_eq!(Filter::any([]).covering_range(), None);
    assert_eq!(Filter::key("").covering_range(), None, "there is no empty key");
}

#[test]
fn an_evil_pattern_takes_no_time() {
    let key = "a".repeat(2_000);
    assert!(!parsed(&format!("glob:{}b", "*a".repeat(50))).matches_key(key.as_bytes()));
    assert!(!parsed("regex:^(a*)*b$").matches_key(key.as_bytes()));
}

/// Globs by the definition, one character after the other.
fn glob_model(pattern: &[char], key: &[char]) -> bool {
    match pattern {
        [] => key.is_empty(),
        ['*', '*', rest @ ..] => (0..=key.len()).any(|n| glob_model(rest, &key[n..])),
        ['*', rest @ ..] => {
            let run = key.iter().take_while(|char| **char != '/').count();
            (0..=run).any(|n| glob_model(rest, &key[n..]))
        }
        ['?', rest @ ..] => key.first().is_some_and(|char| *char != '/') && glob_model(rest, &key[1..]),
        ['\\', char, rest @ ..] => key.first() == Some(char) && glob_model(rest, &key[1..]),
        [char, rest @ ..] => key.first() == Some(char) && glob_model(rest, &key[1..]),
    }
}

fn leaf() -> impl Strategy<Value = Filter> {
    let keys = prop::collection::vec(prop::sample::select(&b"ab/\xff\x00"[..]), 0..4);
    prop_oneof![
        keys.clone().prop_map(Filter::key),
        keys.clone().prop_map(Filter::prefix),
        (keys.clone(), keys.clone()).prop_map(|(start, end)| {
            let range = KeyRange::Span { start: start.into(), end: end.into() };
            Filter::range(range).unwrap_or_else(|_| Filter::everything())
        }),
        keys.clone().prop_map(|key| Filter::suffix(key).unwrap_or_else(|_| Filter::everything())),
        keys.prop_map(|key| Filter::contains(key).unwrap_or_else(|_| Filter::everything())),
        "[ab/*?\\\\]{0,5}".prop_map(|text| Filter::glob(&text).unwrap_or_else(|_| Filter::everything())),
        r"\^?[ab/.*+?|(){}\[\]\\^$1:,-]{0,7}"
            .prop_map(|text| Filter::regex(&text).unwrap_or_else(|_| Filter::everything())),
        Just(Filter::puts()),
        Just(Filter::deletes()),
    ]
}

fn filter() -> impl Strategy<Value = Filter> {
    leaf().prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::all),
            prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::any),
            inner.prop_map(|filter| !filter),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn a_key_that_matches_is_in_the_covering_range(
        filter in filter(),
        keys in prop::collection::vec(prop::collection::vec(prop::sample::select(&b"ab1/.|\xff\x00"[..]), 1..5), 20),
    ) {
        let range = filter.covering_range();
        for key in keys {
            let covered = range.as_ref().is_some_and(|range| range.contains(&key));
            prop_assert!(covered || !filter.matches_key(&key), "{:?} {:?} {:?}", filter, key, range);
            for kind in [EventKind::Put, EventKind::Delete] {
                prop_assert!(filter.wants(kind) || !filter.test.matches(&key, kind), "{:?} {:?}", filter, kind);
            }
        }
    }

    #[test]
    fn a_regex_finds_nothing_outside_its_literal_prefix(
        pattern in r"\^[ab]{0,2}[ab/.*+?|(){}\[\]\\^$]{0,6}",
        keys in prop::collection::vec("[ab/|]{1,4}", 20),
    ) {
        if let Ok(regex) = Regex::new(&pattern) {
            let prefix = literal_prefix(&pattern);
            for key in keys {
                prop_assert!(!regex.is_match(&key) || key.starts_with(&prefix), "{} {} {}", pattern, key, prefix);
            }
        }
    }

    #[test]
    fn a_glob_matches_what_its_definition_says(pattern in r"[aé/*?]{1,6}", key in "[aé/]{0,6}") {
        // Three stars say what two do.
        prop_assume!(!pattern.contains("***"));
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        let filter = Filter::glob(&pattern).expect("a pattern");
        prop_assert_eq!(filter.matches_key(key.as_bytes()), glob_model(&chars(&pattern), &chars(&key)));
    }
}
