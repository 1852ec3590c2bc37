//! The options that several commands share, and how their values are read.
//!
//! Spelled as etcdctl spells them. Keys and values are bytes: what the shell
//! passes goes to the store unchanged, UTF-8 or not.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};

use super::error::CliError;
use super::output::Format;
use crate::types::{KeyRange, LeaseId, RangeQuery, Revision, SortOrder, SortTarget, Space};

/// Where the cluster is, how long to wait, how to print.
#[derive(Clone, Debug, Args)]
pub struct GlobalArgs {
    /// Where the members serve clients: URLs or host:port, separated by commas.
    #[arg(
        long,
        global = true,
        env = "MAINSTAY_ENDPOINTS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379",
        value_name = "URL,...",
        value_parser = parse_endpoint,
        help_heading = "Global options"
    )]
    pub endpoints: Vec<String>,

    /// How to print results.
    #[arg(
        short = 'o',
        long = "output",
        visible_short_alias = 'w',
        visible_alias = "write-out",
        global = true,
        value_enum,
        default_value_t = Format::Auto,
        value_name = "FORMAT",
        help_heading = "Global options"
    )]
    pub output: Format,

    /// How long to try to connect.
    #[arg(
        long,
        global = true,
        default_value = "2s",
        value_name = "DURATION",
        value_parser = parse_duration,
        help_heading = "Global options"
    )]
    pub dial_timeout: Duration,

    /// How long one request may take. Long-running commands (watch, lock, import) set it per request.
    #[arg(
        long,
        global = true,
        default_value = "5s",
        value_name = "DURATION",
        value_parser = parse_duration,
        help_heading = "Global options"
    )]
    pub command_timeout: Duration,
}

/// One key, or many.
#[derive(Clone, Debug, Args)]
pub struct RangeArgs {
    /// The key, or the first key.
    #[arg(value_name = "KEY")]
    pub key: OsString,

    /// The end of the range, exclusive.
    #[arg(value_name = "RANGE_END", conflicts_with_all = ["prefix", "from_key"])]
    pub range_end: Option<OsString>,

    /// All keys that begin with KEY; an empty KEY is every key.
    #[arg(long, conflicts_with = "from_key")]
    pub prefix: bool,

    /// All keys from KEY on, in byte order; an empty KEY is every key.
    #[arg(long)]
    pub from_key: bool,
}

impl RangeArgs {
    /// The keys meant. An empty key is refused unless it stands for all keys.
    pub fn range(&self) -> Result<KeyRange, CliError> {
        let key = bytes_of(&self.key);
        if self.prefix {
            return Ok(prefix_range(key));
        }
        if self.from_key {
            return Ok(prefix_start(key));
        }
        if key.is_empty() {
            return Err(CliError::Usage("the key is empty; for all keys use --prefix \"\"".to_owned()));
        }
        Ok(match &self.range_end {
            Some(end) => KeyRange::from_wire(key, bytes_of(end)),
            None => KeyRange::Single(key),
        })
    }
}

/// All keys that begin with `prefix`. The empty key is no key on etcd's wire, so "all keys" starts at `\0`.
pub fn prefix_range(prefix: Bytes) -> KeyRange {
    match KeyRange::prefix(prefix) {
        KeyRange::From(key) => prefix_start(key),
        range => range,
    }
}

/// All keys from `key` on.
fn prefix_start(key: Bytes) -> KeyRange {
    if key.is_empty() { KeyRange::From(Bytes::from_static(&[0])) } else { KeyRange::From(key) }
}

/// The field to sort by, in etcdctl's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum SortBy {
    /// By key.
    #[default]
    Key,
    /// By version.
    Version,
    /// By create revision.
    Create,
    /// By mod revision.
    Modify,
    /// By value.
    Value,
}

/// The direction of sorting, in etcdctl's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum Order {
    /// Least first.
    Ascend,
    /// Greatest first.
    Descend,
}

/// How current a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// Linearizable: it sees everything acknowledged before it.
    Strong,
    /// No older than this.
    Bounded(Duration),
    /// What the cache or the member that answers has; works without a leader.
    Eventual,
}

/// A consistency, in the words of etcdctl too: `l` and `s`.
pub fn parse_consistency(text: &str) -> Result<Consistency, String> {
    match text.split_once('=') {
        None if ["l", "linearizable", "strong"].contains(&text) => Ok(Consistency::Strong),
        None if ["s", "serializable", "eventual"].contains(&text) => Ok(Consistency::Eventual),
        Some(("bounded", bound)) => parse_duration(bound).map(Consistency::Bounded),
        _ => Err(format!("`{text}` is no consistency; write strong (or l), bounded=5s, or eventual (or s)")),
    }
}

/// What `get` takes, also inside a transaction.
#[derive(Clone, Debug, Args)]
pub struct GetArgs {
    /// The keys.
    #[command(flatten)]
    pub keys: RangeArgs,

    /// The most keys to return; 0 is all.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub limit: u64,

    /// Read at this revision; 0 is the newest.
    #[arg(long, default_value_t = 0, value_name = "REVISION", allow_negative_numbers = true)]
    pub rev: i64,

    /// The direction of sorting.
    #[arg(long, value_enum, ignore_case = true)]
    pub order: Option<Order>,

    /// The field to sort by.
    #[arg(long, value_enum, ignore_case = true)]
    pub sort_by: Option<SortBy>,

    /// Return keys without their values.
    #[arg(long)]
    pub keys_only: bool,

    /// Return only how many keys there are.
    #[arg(long)]
    pub count_only: bool,

    /// Return keys changed at this revision or later.
    #[arg(long, default_value_t = 0, value_name = "REVISION", hide_default_value = true)]
    pub min_mod_rev: i64,

    /// Return keys changed at this revision or earlier.
    #[arg(long, default_value_t = 0, value_name = "REVISION", hide_default_value = true)]
    pub max_mod_rev: i64,

    /// Return keys created at this revision or later.
    #[arg(long, default_value_t = 0, value_name = "REVISION", hide_default_value = true)]
    pub min_create_rev: i64,

    /// Return keys created at this revision or earlier.
    #[arg(long, default_value_t = 0, value_name = "REVISION", hide_default_value = true)]
    pub max_create_rev: i64,
}

impl GetArgs {
    /// The query meant.
    pub fn query(&self) -> Result<RangeQuery, CliError> {
        let target = match self.sort_by.unwrap_or_default() {
            SortBy::Key => SortTarget::Key,
            SortBy::Version => SortTarget::Version,
            SortBy::Create => SortTarget::Create,
            SortBy::Modify => SortTarget::Mod,
            SortBy::Value => SortTarget::Value,
        };
        let order = match self.order {
            Some(Order::Ascend) => SortOrder::Ascend,
            Some(Order::Descend) => SortOrder::Descend,
            None => SortOrder::None,
        };
        Ok(RangeQuery {
            revision: Revision(self.rev),
            limit: self.limit,
            keys_only: self.keys_only,
            count_only: self.count_only,
            sort_target: target,
            sort_order: order,
            min_mod_revision: Revision(self.min_mod_rev),
            max_mod_revision: Revision(self.max_mod_rev),
            min_create_revision: Revision(self.min_create_rev),
            max_create_revision: Revision(self.max_create_rev),
            ..RangeQuery::all(Space::User, self.keys.range()?)
        })
    }
}

/// The bytes of an argument.
pub fn bytes_of(text: &OsStr) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// An argument of these bytes.
pub fn os_string(bytes: Vec<u8>) -> OsString {
    OsString::from_vec(bytes)
}

/// A lease id as it is printed: hexadecimal.
pub fn parse_lease(text: &str) -> Result<LeaseId, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16)
        .map(|id| LeaseId(id as i64))
        .map_err(|_| "not a lease id; it is hexadecimal, as `lease list` prints it".to_owned())
}

/// A member id as it is printed: hexadecimal.
pub fn parse_member(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    match u64::from_str_radix(digits, 16) {
        Ok(id) if id != 0 => Ok(id),
        _ => Err("not a member id; it is hexadecimal, as `member list` prints it".to_owned()),
    }
}

/// A duration with its unit: `500ms`, `5s`, `2m`, `24h`, `1h30m`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write 500ms, 5s, 2m or 1h30m");
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        let after = &rest[digits..];
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let scale = match &after[..unit_len] {
            "ms" => 0.001,
            "s" | "" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        let part = Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = &after[unit_len..];
    }
    Ok(total)
}

/// An endpoint as a URL. `host:port` is taken as plain HTTP.
pub fn parse_endpoint(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("an endpoint is empty; write http://host:port".to_owned());
    }
    if text.starts_with("https://") {
        return Err(format!("{text}: TLS is not served yet; use http://"));
    }
    let rest = text.strip_prefix("http://").unwrap_or(text);
    if rest.contains("://") || rest.is_empty() {
        return Err(format!("{text}: not an endpoint; write http://host:port"));
    }
    Ok(format!("http://{}", rest.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
        for wrong in ["", "s", "5x", "-1s", "1..5s", "1e400s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn endpoints_are_urls() {
        assert_eq!(parse_endpoint("127.0.0.1:2379"), Ok("http://127.0.0.1:2379".to_owned()));
        assert_eq!(parse_endpoint("http://a:1/"), Ok("http://a:1".to_owned()));
        assert!(parse_endpoint("https://a:1").unwrap_err().contains("TLS"));
        assert!(parse_endpoint("").is_err());
        assert!(parse_endpoint("unix://x").is_err());
    }

    #[test]
    fn ids_are_hexadecimal_as_printed() {
        assert_eq!(parse_lease("694d77aa9e38260f"), Ok(LeaseId(0x694d77aa9e38260f)));
        assert_eq!(parse_lease("0x10"), Ok(LeaseId(16)));
        assert!(parse_lease("xyz").is_err());
        assert_eq!(parse_member("ff"), Ok(255));
        assert!(parse_member("0").is_err());
    }

    #[test]
    fn every_key_starts_at_the_least_key_there_is() {
        let args =
            |key: &str, prefix, from_key| RangeArgs { key: key.into(), range_end: None, prefix, from_key };
        assert_eq!(args("", true, false).range().unwrap(), KeyRange::From(Bytes::from_static(b"\0")));
        assert_eq!(args("", false, true).range().unwrap(), KeyRange::From(Bytes::from_static(b"\0")));
        assert!(args("", false, false).range().is_err());
        assert_eq!(args("a", false, false).range().unwrap(), KeyRange::Single(Bytes::from_static(b"a")));
    }
}
