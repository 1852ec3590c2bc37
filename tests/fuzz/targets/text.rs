//! Text that people hand over: lines that `export` wrote, and the settings file.

use mainstay::cli::{exported_line, parse_exported_line};
use mainstay::settings::{ServeFlags, Settings, Sources};
use mainstay::types::KeyValue;

use super::{BASE, Input, Target, Verdict};
use crate::draw::draw;
use crate::mutate::Rng;

pub const IMPORT: Target = Target {
    name: "import",
    what: "a line of an exported file",
    draw: |rng| {
        let mut kv: KeyValue = draw(rng);
        if kv.key.is_empty() {
            kv.key = "k".into();
        }
        Input { bytes: exported_line(&kv).into_bytes(), is_whole: false }
    },
    run: |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
        let Ok((key, value)) = parse_exported_line(text) else { return Verdict::Refused };
        assert!(!key.is_empty(), "a key is never empty");
        let mut kv: KeyValue = draw(&mut Rng::new(1));
        (kv.key, kv.value) = (key.clone().into(), value.clone().into());
        let again = exported_line(&kv);
        assert_eq!(parse_exported_line(&again), Ok((key, value)));
        Verdict::Accepted(again.into_bytes())
    },
    ..BASE
};

/// Names of settings, and one that is none.
const KEYS: [&str; 16] = [
    "name",
    "data-dir",
    "listen-client-urls",
    "advertise-client-urls",
    "listen-peer-urls",
    "initial-cluster",
    "initial-cluster-state",
    "join",
    "kind",
    "heartbeat-interval",
    "election-timeout",
    "request-timeout",
    "quota-backend-bytes",
    "max-request-bytes",
    "max-txn-ops",
    "no-such-key",
];
const VALUES: [&str; 22] = [
    "''",
    "'m1'",
    "true",
    "0",
    "1",
    "100",
    "-1",
    "9223372036854775807",
    "'18446744073709551616'",
    "'1.5MiB'",
    "'99999999999GiB'",
    "'1e30GiB'",
    "'100ms'",
    "'1h30m'",
    "'99999999999999999h'",
    "'http://localhost:2379'",
    "'http://[::1]:2380,https://a'",
    "'m1=http://a:1,m2=http://b:2'",
    "'existing'",
    "'observer'",
    "['http://a:1', 'http://b:2']",
    "{a = 1}",
];

pub const SETTINGS: Target = Target {
    name: "settings",
    what: "the settings file",
    draw: |rng| {
        let mut text = String::new();
        for key in KEYS {
            if rng.one_in(5) {
                text.push_str(&format!("{key} = {}\n", rng.pick(&VALUES)));
            }
        }
        Input { bytes: text.into_bytes(), is_whole: false }
    },
    run: |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
        let flags = ServeFlags { config_file: Some("m.toml".into()), ..ServeFlags::default() };
        let read_file = |_: &std::path::Path| Ok(text.to_owned());
        let sources = Sources { flags: &flags, variables: Vec::new(), read_file: &read_file };
        match Settings::load(&sources) {
            Ok(settings) => {
                // A node refuses some of them, in its own words.
                let _ = settings.node.check();
                let _ = (settings.node.request_timeout(), settings.node.lease_ttl_s_min());
                Verdict::Accepted(Vec::new())
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                Verdict::Refused
            }
        }
    },
    bytes_max: 8 << 10,
    ..BASE
};
