//! What is wrong with a cluster, in words, and what to do about it.
//!
//! A pure function from what was seen to what follows from it: it asks nobody.
//! `doctor` gathers the facts and prints the findings.

use std::collections::BTreeMap;

use super::output::bytes_text;

/// A member whose applied index is this far behind the furthest one is lagging.
const LAG_ENTRIES_WARN: u64 = 5_000;
/// A member that has applied this much less than it knows to be committed does not keep up with its disk.
const BACKLOG_ENTRIES_WARN: u64 = 5_000;
/// Above this share of the quota, act.
const QUOTA_SHARE_WARN: f64 = 0.8;
/// Clocks that differ by more make expiry times and audit stamps hard to read.
const CLOCK_SKEW_MS_WARN: i64 = 2_000;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something does not work now.
    Problem,
    /// Something will not work when one more thing goes wrong.
    Warning,
    /// Good to know.
    Note,
}

impl Severity {
    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Severity::Problem => "problem",
            Severity::Warning => "warning",
            Severity::Note => "note",
        }
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is the case.
    pub what: String,
    /// What to do.
    pub advice: String,
}

/// What a member that answered said of itself.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    /// The leader it follows, 0 if none.
    pub leader: u64,
    /// The last index it knows to be in the log.
    pub raft_index: u64,
    /// The last index it has applied.
    pub applied_index: u64,
    /// Bytes in use of them.
    pub db_live_bytes: u64,
    /// The quota in bytes, 0 if it is not known.
    pub quota_bytes: u64,
    /// The version it runs.
    pub version: String,
    /// What it complains about itself.
    pub errors: Vec<String>,
    /// Its hash at [`Facts::hash_revision`], if it could say.
    pub hash: Option<Hash>,
    /// How far its clock is ahead of ours, in ms, if it could be measured.
    pub clock_ahead_ms: Option<i64>,
    /// Free bytes on its disk, if it could be measured.
    pub disk_free_bytes: Option<u64>,
}

/// A member's content at a revision, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hash {
    /// The revision hashed.
    pub revision: i64,
    /// History up to here is not part of the hash.
    pub compact_revision: i64,
    /// The hash.
    pub hash: u32,
}

/// A member, from the list and from itself.
#[derive(Clone, Debug)]
pub struct MemberFacts {
    /// Its id.
    pub id: u64,
    /// Its name; empty if it has never started.
    pub name: String,
    /// Whether it does not vote.
    pub is_learner: bool,
    /// Where it serves clients; empty if it has never started.
    pub client_urls: Vec<String>,
    /// What it said, or why it said nothing.
    pub probe: Result<Probe, String>,
}

impl MemberFacts {
    fn label(&self) -> String {
        if self.name.is_empty() { format!("{:x}", self.id) } else { format!("{} ({:x})", self.name, self.id) }
    }
}

/// An alarm that stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AlarmFacts {
    /// The member it is about.
    pub member: u64,
    /// `NOSPACE` or `CORRUPT`.
    pub kind: String,
}

/// Everything that was seen.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The members, as a member that answered lists them.
    pub members: Vec<MemberFacts>,
    /// Given endpoints that did not answer, with the reason.
    pub silent_endpoints: Vec<(String, String)>,
    /// Alarms, if they could be read.
    pub alarms: Vec<AlarmFacts>,
    /// Whether a read that needs a quorum worked, with the reason if not.
    pub quorum_read: Option<Result<(), String>>,
}

/// What follows from the facts, the worst first.
pub fn diagnose(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    reachability(facts, &mut findings);
    if !facts.members.is_empty() {
        leadership(facts, &mut findings);
        alarms(facts, &mut findings);
        progress(facts, &mut findings);
        content(facts, &mut findings);
        space(facts, &mut findings);
        shape(facts, &mut findings);
        versions(facts, &mut findings);
        clocks(facts, &mut findings);
    }
    findings.sort_by_key(|finding| finding.severity);
    findings
}

fn push(findings: &mut Vec<Finding>, severity: Severity, what: String, advice: impl Into<String>) {
    findings.push(Finding { severity, what, advice: advice.into() });
}

fn reachability(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.members.is_empty() {
        let reasons: Vec<String> =
            facts.silent_endpoints.iter().map(|(endpoint, why)| format!("{endpoint}: {why}")).collect();
        push(
            findings,
            Severity::Problem,
            format!("no endpoint answered ({})", reasons.join("; ")),
            "check that the nodes run and that --endpoints (or MAINSTAY_ENDPOINTS) names their client URLs",
        );
        return;
    }
    for (endpoint, why) in &facts.silent_endpoints {
        // A member that is known by this URL is reported below, with its name.
        if !facts.members.iter().any(|member| member.client_urls.contains(endpoint)) {
            push(
                findings,
                Severity::Warning,
                format!("the endpoint {endpoint} does not answer ({why}) and belongs to no member"),
                "remove it from --endpoints, or start the node that should be there",
            );
        }
    }
    for member in &facts.members {
        if member.client_urls.is_empty() {
            push(
                findings,
                Severity::Warning,
                format!("member {} was added but has never started", member.label()),
                format!(
                    "start it with --initial-cluster-state existing or --join, or take it back with \
                     `mainstay member remove {:x}`",
                    member.id
                ),
            );
        } else if let Err(why) = &member.probe {
            push(
                findings,
                Severity::Problem,
                format!(
                    "member {} does not answer at {} ({why})",
                    member.label(),
                    member.client_urls.join(", ")
                ),
                format!(
                    "start it again; if its disk is lost, `mainstay member remove {:x}` and add a new member",
                    member.id
                ),
            );
        }
        for error in member.probe.iter().flat_map(|probe| &probe.errors) {
            push(
                findings,
                Severity::Problem,
                format!("member {} reports: {error}", member.label()),
                "see its log for the moment this began",
            );
        }
    }
}

fn leadership(facts: &Facts, findings: &mut Vec<Finding>) {
    let voters = facts.members.iter().filter(|member| !member.is_learner).count();
    let answering = facts.members.iter().filter(|member| !member.is_learner && member.probe.is_ok()).count();
    let quorum = voters / 2 + 1;
    let mut leaders: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for member in &facts.members {
        if let Ok(probe) = &member.probe {
            leaders.entry(probe.leader).or_default().push(member.label());
        }
    }
    if voters > 0 && answering < quorum {
        push(
            findings,
            Severity::Problem,
            format!(
                "the quorum is lost: {answering} of {voters} voting members answer and {quorum} are needed; \
                 nothing can be written, and only serializable reads work"
            ),
            "start the missing members again; only if their disks are gone for ever, stop every node and run \
             `mainstay recover --force-new-cluster` on the one with the newest data",
        );
    } else if let Some(without) = leaders.get(&0) {
        if leaders.len() == 1 {
            push(
                findings,
                Severity::Problem,
                "there is no leader".to_owned(),
                "wait two election timeouts and look again; if it stays so, the members cannot reach each other's \
                 peer URLs: compare `mainstay member list` with what they listen on, and look for firewalls",
            );
        } else {
            push(
                findings,
                Severity::Problem,
                format!("{} see no leader while others do", without.join(", ")),
                "they are cut off from their peers or have just started; check their peer URLs and logs",
            );
        }
    }
    let named: Vec<&u64> = leaders.keys().filter(|leader| **leader != 0).collect();
    if named.len() > 1 {
        let names: Vec<String> = named.iter().map(|id| format!("{id:x}")).collect();
        push(
            findings,
            Severity::Warning,
            format!("members name different leaders ({})", names.join(", ")),
            "an election may be under way: look again in a few seconds; if it stays so, the network is split",
        );
    }
    if let Some(Err(why)) = &facts.quorum_read
        && answering >= quorum
    {
        push(
            findings,
            Severity::Problem,
            format!("a linearizable read failed ({why})"),
            "the leader cannot reach a majority in time; look at the network and the disks of the members",
        );
    }
}

fn alarms(facts: &Facts, findings: &mut Vec<Finding>) {
    for alarm in &facts.alarms {
        let who = facts
            .members
            .iter()
            .find(|member| member.id == alarm.member)
            .map_or_else(|| format!("{:x}", alarm.member), MemberFacts::label);
        let advice = match alarm.kind.as_str() {
            "NOSPACE" => {
                "writes are refused until there is space: delete keys, `mainstay compact` old revisions, free the \
                 disk or raise --quota-backend-bytes; the alarm clears by itself then, or with etcdctl alarm disarm"
            }
            "CORRUPT" => {
                "the members disagree: find the odd one with `mainstay endpoint hashkv`, remove it, delete its data \
                 directory and add it anew"
            }
            _ => "see the log of that member",
        };
        push(findings, Severity::Problem, format!("alarm {} stands for member {who}", alarm.kind), advice);
    }
}

fn progress(facts: &Facts, findings: &mut Vec<Finding>) {
    let furthest = facts
        .members
        .iter()
        .filter_map(|m| m.probe.as_ref().ok())
        .map(|p| p.applied_index)
        .max()
        .unwrap_or(0);
    for member in &facts.members {
        let Ok(probe) = &member.probe else { continue };
        let behind = furthest.saturating_sub(probe.applied_index);
        if behind > LAG_ENTRIES_WARN {
            push(
                findings,
                Severity::Warning,
                format!("member {} is {behind} entries behind", member.label()),
                "it catches up by itself when its disk and network allow; watch mainstay_peer_lag_entries, and \
                 replace it if the gap grows",
            );
        } else if probe.raft_index.saturating_sub(probe.applied_index) > BACKLOG_ENTRIES_WARN {
            push(
                findings,
                Severity::Warning,
                format!(
                    "member {} has {} entries of its log still to apply",
                    member.label(),
                    probe.raft_index - probe.applied_index
                ),
                "its disk is slower than the writes; look at mainstay_apply_seconds and at what else uses the disk",
            );
        }
    }
}

fn content(facts: &Facts, findings: &mut Vec<Finding>) {
    // Hashes can be compared only at the same revision and the same compaction.
    let mut groups: BTreeMap<(i64, i64), BTreeMap<u32, Vec<String>>> = BTreeMap::new();
    for member in &facts.members {
        if let Ok(Probe { hash: Some(hash), .. }) = &member.probe {
            let group = groups.entry((hash.revision, hash.compact_revision)).or_default();
            group.entry(hash.hash).or_default().push(member.label());
        }
    }
    for ((revision, _), hashes) in groups {
        if hashes.len() > 1 {
            let sides: Vec<String> =
                hashes.iter().map(|(hash, who)| format!("{hash:08x}: {}", who.join(", "))).collect();
            push(
                findings,
                Severity::Problem,
                format!("members differ in content at revision {revision} ({})", sides.join("; ")),
                "take a snapshot of each; keep the majority's side, remove the odd member, delete its data directory \
                 and add it anew; and report it as a bug",
            );
        }
    }
}

fn space(facts: &Facts, findings: &mut Vec<Finding>) {
    for member in &facts.members {
        let Ok(probe) = &member.probe else { continue };
        if probe.quota_bytes > 0 && probe.db_live_bytes as f64 > probe.quota_bytes as f64 * QUOTA_SHARE_WARN {
            push(
                findings,
                Severity::Warning,
                format!(
                    "member {} uses {} of its quota of {}",
                    member.label(),
                    bytes_text(probe.db_live_bytes),
                    bytes_text(probe.quota_bytes)
                ),
                "compact old revisions, delete what is not needed, or raise --quota-backend-bytes on every member",
            );
        }
        if let Some(free) = probe.disk_free_bytes
            && free < 1 << 30
        {
            push(
                findings,
                Severity::Warning,
                format!("the disk of member {} has {} free", member.label(), bytes_text(free)),
                "free some: below --disk-reserve-bytes writes are refused",
            );
        }
    }
}

fn shape(facts: &Facts, findings: &mut Vec<Finding>) {
    let voters = facts.members.iter().filter(|member| !member.is_learner).count();
    if voters == 1 {
        push(
            findings,
            Severity::Warning,
            "there is a single voting member: when it is lost, everything is".to_owned(),
            "add two members with `mainstay serve --join`, or take snapshots regularly",
        );
    } else if voters > 0 && voters.is_multiple_of(2) {
        push(
            findings,
            Severity::Warning,
            format!(
                "{voters} voting members survive the loss of {}, no more than {} would, and need one more to agree",
                (voters - 1) / 2,
                voters - 1
            ),
            "add or remove one: an odd number is better",
        );
    } else if voters > 7 {
        push(
            findings,
            Severity::Note,
            format!("{voters} voting members: every write waits for {} of them", voters / 2 + 1),
            "use observers (`member add --kind observer`) to scale reads",
        );
    }
    for member in facts.members.iter().filter(|member| member.is_learner) {
        push(
            findings,
            Severity::Note,
            format!("member {} does not vote: it is a learner or an observer", member.label()),
            format!("a learner that has caught up gets a vote by `mainstay member promote {:x}`", member.id),
        );
    }
    let mut hosts: BTreeMap<&str, usize> = BTreeMap::new();
    for member in facts.members.iter().filter(|member| !member.is_learner) {
        if let Some(host) = member.client_urls.first().and_then(|url| host_of(url)) {
            *hosts.entry(host).or_default() += 1;
        }
    }
    for (host, count) in hosts {
        if count > voters / 2 && voters > 1 {
            push(
                findings,
                Severity::Note,
                format!(
                    "{count} of {voters} voting members are on {host}: when it fails, the quorum is lost"
                ),
                "fine for trying things out; in production put each member on a machine of its own",
            );
        }
    }
}

fn host_of(url: &str) -> Option<&str> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.rsplit_once(':').map(|(host, _)| host)
}

fn versions(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut versions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for member in &facts.members {
        if let Ok(probe) = &member.probe {
            versions.entry(&probe.version).or_default().push(member.label());
        }
    }
    if versions.len() > 1 {
        let parts: Vec<String> =
            versions.iter().map(|(version, who)| format!("{version}: {}", who.join(", "))).collect();
        push(
            findings,
            Severity::Note,
            format!("members run different versions ({})", parts.join("; ")),
            "finish the upgrade: until then the cluster keeps to what the oldest understands",
        );
    }
}

fn clocks(facts: &Facts, findings: &mut Vec<Finding>) {
    let ahead = facts.members.iter().filter_map(|m| Some((m, m.probe.as_ref().ok()?.clock_ahead_ms?)));
    let least = ahead.clone().min_by_key(|(_, ms)| *ms);
    let most = ahead.max_by_key(|(_, ms)| *ms);
    if let (Some((slow, least)), Some((fast, most))) = (least, most)
        && most - least > CLOCK_SKEW_MS_WARN
    {
        push(
            findings,
            Severity::Warning,
            format!(
                "the clocks of {} and {} differ by {:.1} s",
                slow.label(),
                fast.label(),
                (most - least) as f64 / 1000.0
            ),
            "run a time service (chrony, systemd-timesyncd) on the members; nothing is lost by it, but history and \
             logs carry wrong times",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, probe: Result<Probe, String>) -> MemberFacts {
        MemberFacts {
            id,
            name: format!("node{id}"),
            is_learner: false,
            client_urls: vec![format!("http://host{id}:2379")],
            probe,
        }
    }

    fn healthy(id: u64) -> MemberFacts {
        let hash = Hash { revision: 7, compact_revision: 1, hash: 0xabc };
        member(
            id,
            Ok(Probe {
                leader: 1,
                raft_index: 100,
                applied_index: 100,
                version: "3.7.0".to_owned(),
                hash: Some(hash),
                ..Probe::default()
            }),
        )
    }

    fn three() -> Facts {
        Facts {
            members: vec![healthy(1), healthy(2), healthy(3)],
            quorum_read: Some(Ok(())),
            ..Facts::default()
        }
    }

    fn probe(facts: &mut Facts, at: usize) -> &mut Probe {
        facts.members[at].probe.as_mut().unwrap()
    }

    #[track_caller]
    fn assert_finds(facts: &Facts, severity: Severity, piece: &str) {
        let findings = diagnose(facts);
        assert!(
            findings.iter().any(|finding| finding.severity == severity && finding.what.contains(piece)),
            "no {severity:?} with {piece:?} in {findings:#?}"
        );
        assert!(findings.iter().all(|finding| !finding.advice.is_empty()));
    }

    #[test]
    fn nothing_is_found_in_a_healthy_cluster() {
        assert_eq!(diagnose(&three()), []);
    }

    #[test]
    fn a_silent_cluster_says_how_to_reach_it() {
        let facts = Facts {
            silent_endpoints: vec![("http://a:1".to_owned(), "connection refused".to_owned())],
            ..Facts::default()
        };
        assert_finds(&facts, Severity::Problem, "no endpoint answered (http://a:1: connection refused)");
    }

    #[test]
    fn a_member_that_is_down_is_named_and_a_lost_quorum_is_a_problem_of_its_own() {
        let mut facts = three();
        facts.members[2] = member(3, Err("connection refused".to_owned()));
        assert_finds(&facts, Severity::Problem, "node3 (3) does not answer");
        assert!(!diagnose(&facts).iter().any(|finding| finding.what.contains("quorum")));
        facts.members[1] = member(2, Err("connection refused".to_owned()));
        assert_finds(&facts, Severity::Problem, "1 of 3 voting members answer and 2 are needed");
    }

    #[test]
    fn no_leader_and_half_a_leader_are_told_apart() {
        let mut facts = three();
        probe(&mut facts, 1).leader = 0;
        assert_finds(&facts, Severity::Problem, "node2 (2) see no leader while others do");
        for at in [0, 2] {
            probe(&mut facts, at).leader = 0;
        }
        assert_finds(&facts, Severity::Problem, "there is no leader");
        let mut facts = three();
        probe(&mut facts, 1).leader = 2;
        assert_finds(&facts, Severity::Warning, "different leaders (1, 2)");
    }

    #[test]
    fn differing_content_is_found_only_at_the_same_revision() {
        let mut facts = three();
        probe(&mut facts, 1).hash = Some(Hash { revision: 8, compact_revision: 1, hash: 0xdef });
        assert_eq!(diagnose(&facts), []);
        probe(&mut facts, 1).hash = Some(Hash { revision: 7, compact_revision: 1, hash: 0xdef });
        assert_finds(&facts, Severity::Problem, "differ in content at revision 7");
    }

    #[test]
    fn lag_alarms_space_versions_and_clocks_are_found() {
        let mut facts = three();
        probe(&mut facts, 0).applied_index = 1_000_000;
        probe(&mut facts, 0).raft_index = 1_000_000;
        assert_finds(&facts, Severity::Warning, "node2 (2) is 999900 entries behind");
        let mut facts = three();
        facts.alarms.push(AlarmFacts { member: 2, kind: "NOSPACE".to_owned() });
        assert_finds(&facts, Severity::Problem, "alarm NOSPACE stands for member node2 (2)");
        let mut facts = three();
        probe(&mut facts, 0).quota_bytes = 100;
        probe(&mut facts, 0).db_live_bytes = 90;
        probe(&mut facts, 1).version = "3.8.0".to_owned();
        probe(&mut facts, 1).clock_ahead_ms = Some(-4_000);
        probe(&mut facts, 2).clock_ahead_ms = Some(1_000);
        probe(&mut facts, 2).disk_free_bytes = Some(1 << 20);
        assert_finds(&facts, Severity::Warning, "uses 90 B of its quota of 100 B");
        assert_finds(&facts, Severity::Note, "different versions");
        assert_finds(&facts, Severity::Warning, "differ by 5.0 s");
        assert_finds(&facts, Severity::Warning, "1.0 MiB free");
    }

    #[test]
    fn shapes_that_survive_little_are_pointed_out() {
        let mut facts = three();
        facts.members.truncate(1);
        assert_finds(&facts, Severity::Warning, "a single voting member");
        let mut facts = three();
        facts.members.push(healthy(4));
        assert_finds(&facts, Severity::Warning, "4 voting members survive the loss of 1");
        facts.members[3].is_learner = true;
        assert_finds(&facts, Severity::Note, "node4 (4) does not vote");
        let mut facts = three();
        for member in &mut facts.members {
            member.client_urls = vec!["http://127.0.0.1:1".to_owned()];
        }
        assert_finds(&facts, Severity::Note, "3 of 3 voting members are on 127.0.0.1");
        facts.members[2].client_urls.clear();
        assert_finds(&facts, Severity::Warning, "added but has never started");
    }
}
