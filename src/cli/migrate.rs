//! `import --from-etcd`: another cluster's keys, values and leases, as they
//! were at one revision.
//!
//! Keys are read page by page at the revision of the first page, so that what
//! arrives is one moment's state however long it takes. A lease is recreated
//! under its own id with the time it has left, so that a client that keeps it
//! alive goes on doing so after it has moved.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::json;

use super::Context;
use super::api::Api;
use super::args::prefix_range;
use super::error::CliError;
use super::import::Writer;
use super::output::{bytes_text, say};
use super::progress;
use crate::types::{KeyRange, KeyValue, LeaseId, RangeQuery, Revision, Space};

/// Keys asked for at once; fewer when the page is too large for one message.
pub const PAGE_KEYS: u64 = 500;

/// Reads a range page by page at one revision.
pub struct Pages {
    api: Api,
    range: KeyRange,
    revision: Revision,
    limit: u64,
    done: bool,
    /// Keys in the range, known after the first page.
    pub count: Option<u64>,
}

impl Pages {
    /// The pages of `range` at `revision`; 0 is the newest, fixed by the first page.
    pub fn new(api: Api, range: KeyRange, revision: Revision) -> Pages {
        Pages { api, range, revision, limit: PAGE_KEYS, done: false, count: None }
    }

    /// The revision read at; 0 before the first page.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The next page; empty at the end.
    pub async fn next(&mut self) -> Result<Vec<KeyValue>, CliError> {
        if self.done {
            return Ok(Vec::new());
        }
        let (revision, reply) = loop {
            let query = RangeQuery {
                revision: self.revision,
                limit: self.limit,
                ..RangeQuery::all(Space::User, self.range.clone())
            };
            match self.api.range(&query, false).await {
                Ok(answer) => break answer,
                // A page that does not fit into a message: ask for fewer keys.
                Err(error) if error.is_too_large() && self.limit > 1 => self.limit = (self.limit / 4).max(1),
                Err(error) => return Err(error),
            }
        };
        if self.revision == Revision(0) {
            self.revision = revision;
        }
        self.count.get_or_insert(reply.count);
        self.done = !reply.more;
        if let Some(last) = reply.kvs.last() {
            self.range = after(&self.range, &last.key);
        } else {
            self.done = true;
        }
        Ok(reply.kvs)
    }
}

/// The rest of `range` after `key`.
fn after(range: &KeyRange, key: &Bytes) -> KeyRange {
    let start = Bytes::from([&key[..], &[0]].concat());
    match range {
        KeyRange::Single(_) => KeyRange::Span { start: start.clone(), end: start },
        KeyRange::Span { end, .. } => KeyRange::Span { start, end: end.clone() },
        KeyRange::From(_) => KeyRange::From(start),
    }
}

/// What became of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// It exists here under this id.
    To(LeaseId),
    /// It ran out before it could be moved: its keys have gone with it.
    Expired,
}

/// Runs `import --from-etcd`.
pub async fn migrate(context: &Context, url: &str, prefix: Bytes) -> Result<(), CliError> {
    let begun = context.env.monotonic();
    let url = super::args::parse_endpoint(url).map_err(CliError::Usage)?;
    if context.global.endpoints.contains(&url) {
        return Err(CliError::Usage(format!(
            "{url} is the cluster to import into; --from-etcd names another one"
        )));
    }
    let source = context.api_at(std::slice::from_ref(&url)).await?;
    let target = context.api().await?;
    if source.status().await?.cluster == target.status().await?.cluster {
        return Err(CliError::Usage(format!(
            "{url} belongs to the cluster to import into; name another one"
        )));
    }
    let mut leases = BTreeMap::new();
    if prefix.is_empty() {
        // Leases without keys move too; those with keys are found by their keys in any case.
        for id in source.leases().await? {
            move_lease(&source, &target, id, &mut leases).await?;
        }
    }
    let bar = progress::items(0, "keys");
    let mut writer = Writer::new(context, bar.clone(), false).await?;
    let mut pages = Pages::new(source.clone(), prefix_range(prefix), Revision(0));
    let mut expired = 0_u64;
    loop {
        let page = pages.next().await?;
        if page.is_empty() {
            break;
        }
        bar.set_length(pages.count.unwrap_or(0));
        for kv in page {
            let lease = if kv.lease.is_some() {
                move_lease(&source, &target, kv.lease, &mut leases).await?
            } else {
                Moved::To(LeaseId::NONE)
            };
            match lease {
                Moved::To(lease) => writer.put(kv.key, kv.value, lease).await?,
                Moved::Expired => expired += 1,
            }
        }
    }
    let imported = writer.finish().await?;
    bar.finish_and_clear();
    let moved = leases.values().filter(|moved| matches!(moved, Moved::To(_))).count();
    let revision = pages.revision();
    let took = context.env.monotonic().saturating_sub(begun);
    if expired > 0 {
        say(format!("{expired} keys were left out: their leases ran out in the meantime"));
    }
    context.out.either(
        || {
            json!({
                "keys": imported.keys, "bytes": imported.bytes, "transactions": imported.txns,
                "leases": moved, "expired_keys": expired, "source_revision": revision.0,
                "took_ms": took.as_millis() as u64,
            })
        },
        format!(
            "imported {} keys, {}, and {moved} leases, as they were at revision {revision} of {url}, in {:.1} s",
            imported.keys,
            bytes_text(imported.bytes),
            took.as_secs_f64()
        ),
    )
}

/// Recreates a lease with the time it has left, once.
async fn move_lease(
    source: &Api,
    target: &Api,
    id: LeaseId,
    leases: &mut BTreeMap<LeaseId, Moved>,
) -> Result<Moved, CliError> {
    if let Some(moved) = leases.get(&id) {
        return Ok(*moved);
    }
    let remaining = source.lease_time_to_live(id, false).await?.ttl_s;
    let moved = if remaining < 0 {
        Moved::Expired
    } else {
        match target.lease_grant(id, remaining.max(1)).await {
            Ok((granted, _)) => Moved::To(granted),
            // A repeated import, or an unknown outcome that was a success: it is there.
            Err(error) if error.is_lease_exists() => {
                target.lease_keeper(id).keep().await?;
                Moved::To(id)
            }
            Err(error) => return Err(error),
        }
    };
    leases.insert(id, moved);
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_range_begins_right_after_the_last_key() {
        let key = Bytes::from_static(b"a");
        let all = KeyRange::From(Bytes::from_static(b"\0"));
        assert_eq!(after(&all, &key), KeyRange::From(Bytes::from_static(b"a\0")));
        let span = prefix_range(Bytes::from_static(b"a"));
        assert!(after(&span, &key).contains(b"a\0"));
        assert!(!after(&span, &key).contains(b"a"));
        assert!(after(&KeyRange::Single(key.clone()), &key).is_empty());
    }
}
