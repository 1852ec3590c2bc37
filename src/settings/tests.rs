//! Sources in, options or a named error out.

use std::path::Path;
use std::time::Duration;

use clap::Parser;

use super::*;
use crate::node::{AutoCompaction, Bootstrap};
use crate::types::MemberKind;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    flags: ServeFlags,
}

fn load(flags: &str, variables: &[(&str, &str)], file: Option<&str>) -> Result<Settings, SettingsError> {
    let words = std::iter::once("serve").chain(flags.split_whitespace());
    let mut flags = Command::try_parse_from(words).unwrap().flags;
    flags.config_file = file.map(|_| "m.toml".into());
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let read_file = |path: &Path| {
        assert_eq!(path, Path::new("m.toml"));
        Ok(file.unwrap_or_default().to_owned())
    };
    Settings::load(&Sources { flags: &flags, variables, read_file: &read_file })
}

fn error(flags: &str) -> String {
    load(flags, &[], None).unwrap_err().to_string()
}

#[test]
fn a_flag_wins_over_a_variable_over_the_file() {
    let file = "name = 'file'\nheartbeat-interval = 50\nmax-txn-ops = 7\n";
    let variables = [("MAINSTAY_NAME", "variable"), ("MAINSTAY_HEARTBEAT_INTERVAL", "60ms"), ("HOME", "/")];
    let settings = load("--name flag", &variables, Some(file)).unwrap();
    assert_eq!(settings.node.name, "flag");
    assert_eq!(settings.node.heartbeat_interval, Duration::from_millis(60));
    assert_eq!(settings.server.max_txn_ops, 7);
    assert_eq!(settings.node.data_dir, Path::new("flag.mainstay"));
}

#[test]
fn nothing_given_is_one_node_on_loopback() {
    let settings = load("", &[], None).unwrap();
    let Bootstrap::Initial { members, .. } = &settings.node.bootstrap else { panic!("{settings:?}") };
    assert_eq!(members.len(), 1);
    assert_eq!(members[0].peer_urls, ["http://localhost:2380"]);
    assert_eq!(settings.node.client_urls, ["http://localhost:2379"]);
    assert_eq!(settings.node.auto_compaction, AutoCompaction::Periodic(Duration::from_secs(86_400)));
    assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
}

#[test]
fn an_etcd_unit_file_needs_little_else() {
    let settings = load(
        "--name m1 --data-dir /var/lib/m1 --listen-client-urls http://10.0.0.1:2379,http://127.0.0.1:2379 \
         --advertise-client-urls http://10.0.0.1:2379 --listen-peer-urls http://10.0.0.1:2380 \
         --initial-advertise-peer-urls http://10.0.0.1:2380 --initial-cluster-token t \
         --initial-cluster m1=http://10.0.0.1:2380,m2=http://10.0.0.2:2380,m3=http://10.0.0.3:2380 \
         --initial-cluster-state new --quota-backend-bytes=8589934592 --max-request-bytes 1572864 \
         --max-txn-ops 256 --snapshot-count 10000 --heartbeat-interval 100 --election-timeout 1000 \
         --auto-compaction-mode periodic --auto-compaction-retention 1 --log-level warn \
         --pre-vote=true --strict-reconfig-check --logger zap",
        &[],
        None,
    )
    .unwrap();
    assert_eq!(settings.node.quota_bytes, 8 << 30);
    assert_eq!(settings.node.auto_compaction, AutoCompaction::Periodic(Duration::from_secs(3600)));
    assert_eq!(settings.server.client_listeners.len(), 2);
    let warned = |part: &str| settings.warnings.iter().any(|warning| warning.contains(part));
    assert!(warned("10.0.0.1:2379 can be reached from other machines"), "{:?}", settings.warnings);
    assert!(warned("logger"), "{:?}", settings.warnings);
    assert!(!warned("pre-vote"), "{:?}", settings.warnings);
}

#[test]
fn unknown_keys_are_named_wherever_they_are() {
    let text = load("", &[("MAINSTAY_HEARTBEAT_INTERVALL", "1")], None).unwrap_err().to_string();
    assert!(text.contains("MAINSTAY_HEARTBEAT_INTERVALL"), "{text}");
    assert!(text.contains("did you mean heartbeat-interval?"), "{text}");
    let text = load("", &[], Some("data_dir = 'x'")).unwrap_err().to_string();
    assert!(text.contains("data_dir is not a setting (set in m.toml); did you mean data-dir?"), "{text}");
    let text = load("", &[], Some("[name]\nx = 1")).unwrap_err().to_string();
    assert!(text.contains("m.toml: name is a table"), "{text}");
    assert!(load("", &[], Some("name = ")).unwrap_err().to_string().contains("m.toml"));
}

#[test]
fn flags_of_etcds_that_are_not_served_are_refused_by_name() {
    assert!(
        error("--cert-file a.pem").contains("cert-file is not served (set by a flag): TLS"),
        "{}",
        error("--cert-file a")
    );
    assert!(error("--client-cert-auth --name x").contains("client-cert-auth"));
    assert!(error("--discovery-srv x.org").contains("initial-cluster or join"));
    assert!(error("--pre-vote=false").contains("pre-vote is always on"));
    assert!(error("--force-new-cluster").contains("mainstay recover"));
    let text = load("", &[("MAINSTAY_TRUSTED_CA_FILE", "a")], None).unwrap_err().to_string();
    assert!(text.contains("trusted-ca-file") && text.contains("variable"), "{text}");
}

#[test]
fn bad_values_name_the_key_and_the_fix() {
    for (flags, parts) in [
        ("--quota-backend-bytes 2GX", &["quota-backend-bytes", "GiB"][..]),
        ("--heartbeat-interval soon", &["heartbeat-interval", "500ms"]),
        ("--heartbeat-interval 1ms", &["heartbeat-interval", "at least 10ms"]),
        ("--election-timeout 300", &["election-timeout", "five times heartbeat-interval"]),
        ("--election-timeout 2m", &["election-timeout", "at most 50s"]),
        ("--max-txn-ops 0", &["max-txn-ops", "above zero"]),
        ("--max-inflight-bytes 1MiB", &["max-inflight-bytes", "at least"]),
        ("--log-level loud", &["log-level", "loud"]),
        ("--log-format xml", &["log-format", "text or json"]),
        ("--auto-compaction-mode x", &["auto-compaction-mode", "periodic or revision"]),
        ("--auto-compaction-mode revision", &["auto-compaction-retention", "how many revisions"]),
        ("--listen-client-urls https://127.0.0.1:1", &["listen-client-urls", "TLS is not served yet"]),
        ("--listen-peer-urls http://127.0.0.1", &["listen-peer-urls", "port is missing"]),
        ("--listen-client-urls http://0.0.0.0:2379", &["advertise-client-urls", "others cannot dial"]),
        ("--listen-client-urls http://localhost:2380", &["listen-client-urls", "different ports"]),
        ("--initial-cluster a", &["initial-cluster", "NAME=URL"]),
        ("--initial-cluster a=http://h:1,b=http://h:1", &["initial-cluster", "given twice"]),
        ("--initial-cluster a=http://h:1", &["initial-cluster", "\"default\""]),
        ("--initial-cluster default=http://h:1", &["initial-advertise-peer-urls"]),
        ("--initial-cluster-state old", &["initial-cluster-state", "new or existing"]),
        ("--initial-cluster-state existing", &["initial-cluster", "join"]),
        (
            "--join http://h:1 --initial-cluster default=http://localhost:2380",
            &["join and initial-cluster exclude"],
        ),
        ("--join http://h:1,h:2", &["join", "write http://HOST:PORT"]),
        ("--kind observer", &["kind goes with join"]),
        ("--join http://h:1 --kind boss", &["kind", "voter, learner or observer"]),
        ("--name a,b", &["name", "comma"]),
    ] {
        let text = error(flags);
        for part in parts {
            assert!(text.contains(part), "{flags}: {text:?} does not say {part:?}");
        }
    }
}

#[test]
fn joining_keeps_the_kind_and_revision_compaction_the_count() {
    let settings = load(
        "--join http://10.0.0.1:2379,http://10.0.0.2:2379 --kind observer --auto-compaction-mode revision \
         --auto-compaction-retention 1000 --quota-backend-bytes -1",
        &[],
        None,
    )
    .unwrap();
    let addresses = vec!["http://10.0.0.1:2379".to_owned(), "http://10.0.0.2:2379".to_owned()];
    let expected = Bootstrap::Join { addresses, kind: MemberKind::Observer };
    assert_eq!(settings.node.bootstrap, expected);
    assert_eq!(settings.node.auto_compaction, AutoCompaction::Revisions(1000));
    assert_eq!(settings.node.quota_bytes, 0);
}

#[test]
fn every_flag_is_explained() {
    use clap::Args as _;
    let command = ServeFlags::augment_args(clap::Command::new("serve"));
    let silent: Vec<_> = command
        .get_arguments()
        .filter(|flag| !flag.is_hide_set() && flag.get_help().is_none_or(|help| help.to_string().is_empty()))
        .map(|flag| flag.get_id().to_string())
        .collect();
    assert_eq!(silent, Vec::<String>::new());
}
