//! What the commands ask of a cluster: the client SDK with the waiting times of
//! the command line, and its wire messages turned into plain values.
//!
//! No other file of this room names the SDK's calls, but `explain`, which is about them. Nothing is decided here.

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use super::args::GlobalArgs;
use super::error::CliError;
use crate::client::{
    Client, ClientError, ClientOptions, GetOptions, LeaseKeeper, PutOptions, SnapshotPiece, Watch,
};
use crate::types::{
    DeleteRange, KeyValue, LeaseId, MemberKind, Put, RangeQuery, RangeReply, Revision, Txn, TxnReply,
};
use crate::wire::etcdserverpb::{self as pb, AlarmType};
use crate::wire::v3electionpb::LeaderKey;

/// A cluster, or one member of it.
#[derive(Clone, Debug)]
pub struct Api {
    client: Client,
}

/// A member, from the list.
#[derive(Clone, Debug)]
pub struct MemberInfo {
    /// Its id.
    pub id: u64,
    /// Its name; empty if it has never started.
    pub name: String,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where it serves clients; empty if it has never started.
    pub client_urls: Vec<String>,
    /// Whether it does not vote.
    pub is_learner: bool,
}

/// Where a member stands.
#[derive(Clone, Debug)]
pub struct Status {
    /// The cluster's id.
    pub cluster: u64,
    /// The member's id.
    pub member: u64,
    /// Its store's revision.
    pub revision: Revision,
    /// The version it reports.
    pub version: String,
    /// Bytes of its store.
    pub db_bytes: u64,
    /// Bytes in use of them.
    pub db_live_bytes: u64,
    /// Its quota in bytes; 0 if it does not say.
    pub quota_bytes: u64,
    /// The leader it follows; 0 if none.
    pub leader: u64,
    /// Its term.
    pub term: u64,
    /// The last index it knows of.
    pub raft_index: u64,
    /// The last index it has applied.
    pub applied_index: u64,
    /// What it complains about.
    pub errors: Vec<String>,
    /// Whether it does not vote.
    pub is_learner: bool,
}

/// A member's content in short.
#[derive(Clone, Copy, Debug)]
pub struct HashKv {
    /// The hash.
    pub hash: u32,
    /// The revision hashed.
    pub revision: Revision,
    /// History up to here is not part of it.
    pub compact_revision: Revision,
}

/// What a lease has left.
#[derive(Clone, Debug)]
pub struct LeaseInfo {
    /// Seconds left; -1 when it does not exist.
    pub ttl_s: i64,
    /// Its full time to live in seconds.
    pub granted_ttl_s: i64,
    /// Its keys, if they were asked for.
    pub keys: Vec<Bytes>,
}

/// A lock or a leadership that is held.
#[derive(Clone, Debug)]
pub struct Held {
    /// The key that stands for it.
    pub key: Bytes,
    /// The key's create revision: what to guard writes with.
    pub revision: Revision,
    leader: Option<LeaderKey>,
}

/// A stream of values that should not end.
pub struct Endless<T>(BoxStream<'static, Result<T, ClientError>>);

impl<T> Endless<T> {
    /// Waits for the next one. The end of the stream is an error that may be retried.
    pub async fn next(&mut self) -> Result<T, CliError> {
        match self.0.next().await {
            Some(item) => Ok(item?),
            None => Err(CliError::Unavailable("the stream ended".to_owned())),
        }
    }
}

/// The pieces of a snapshot.
pub struct SnapshotStream(BoxStream<'static, Result<SnapshotPiece, ClientError>>);

impl SnapshotStream {
    /// Waits for the next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<SnapshotPiece>, CliError> {
        Ok(self.0.next().await.transpose()?)
    }
}

impl Api {
    /// The cluster at these endpoints. Connects with the first call.
    pub fn connect(endpoints: &[String], global: &GlobalArgs) -> Result<Api, CliError> {
        let mut options = ClientOptions::default();
        options.policy.request_timeout = global.command_timeout;
        options.channel.connect_timeout = global.dial_timeout;
        Ok(Api { client: Client::with_options(endpoints.iter().cloned(), options)? })
    }

    /// Reads keys; also returns the store's revision.
    pub async fn range(
        &self,
        query: &RangeQuery,
        serializable: bool,
    ) -> Result<(Revision, RangeReply), CliError> {
        let options = get_options(query, serializable);
        let result = self.client.range(options).await?;
        Ok((result.revision, result.reply))
    }

    /// Sets a key; returns the revision and what was there before, if that was asked for.
    pub async fn put(&self, put: Put) -> Result<(Revision, Option<KeyValue>), CliError> {
        let options = PutOptions {
            lease: put.lease,
            prev_kv: put.prev_kv,
            ignore_value: put.ignore_value,
            ignore_lease: put.ignore_lease,
        };
        let reply = self.client.put_with(put.key, put.value, options).await?;
        Ok((reply.revision, reply.prev))
    }

    /// Removes keys; returns the revision, how many there were, and what they were if that was asked for.
    pub async fn delete(&self, delete: DeleteRange) -> Result<(Revision, u64, Vec<KeyValue>), CliError> {
        let reply = self.client.delete_range(delete.range, delete.prev_kv).await?;
        Ok((reply.revision, reply.deleted, reply.prev))
    }

    /// Runs a transaction.
    pub async fn txn(&self, txn: Txn) -> Result<(Revision, TxnReply), CliError> {
        let result = self.client.txn(txn).await?;
        Ok((result.revision, result.reply))
    }

    /// Forgets old revisions.
    pub async fn compact(&self, revision: Revision, physical: bool) -> Result<(), CliError> {
        Ok(self.client.compact(revision, physical).await?)
    }

    /// Starts a watch; it is in place on return, and resumes by itself.
    pub async fn watch(&self, options: crate::client::WatchOptions) -> Result<Watch, CliError> {
        Ok(self.client.watch(options).await?)
    }

    /// Creates a lease; returns its id and time to live in seconds.
    pub async fn lease_grant(&self, id: LeaseId, ttl_s: i64) -> Result<(LeaseId, i64), CliError> {
        let granted = self.client.lease_grant(ttl_s, id).await?;
        Ok((granted.id, granted.ttl_s))
    }

    /// Removes a lease with its keys.
    pub async fn lease_revoke(&self, id: LeaseId) -> Result<(), CliError> {
        Ok(self.client.lease_revoke(id).await?)
    }

    /// What keeps a lease alive.
    pub fn lease_keeper(&self, id: LeaseId) -> LeaseKeeper {
        self.client.lease_keeper(id)
    }

    /// What a lease has left.
    pub async fn lease_time_to_live(&self, id: LeaseId, keys: bool) -> Result<LeaseInfo, CliError> {
        Ok(match self.client.lease_ttl(id, keys).await? {
            None => LeaseInfo { ttl_s: -1, granted_ttl_s: 0, keys: Vec::new() },
            Some(left) => LeaseInfo { ttl_s: left.ttl_s, granted_ttl_s: left.granted_ttl_s, keys: left.keys },
        })
    }

    /// All leases.
    pub async fn leases(&self) -> Result<Vec<LeaseId>, CliError> {
        Ok(self.client.lease_list().await?)
    }

    /// The members; unless linearizable, as the answering member knows them, which works without a leader.
    pub async fn members(&self, linearizable: bool) -> Result<Vec<MemberInfo>, CliError> {
        let list = if linearizable {
            self.client.member_list().await?
        } else {
            self.client.member_list_serializable().await?
        };
        Ok(list.members.into_iter().map(member).collect())
    }

    /// Adds a member; returns it and all members.
    pub async fn member_add(
        &self,
        peer_urls: Vec<String>,
        kind: MemberKind,
    ) -> Result<(MemberInfo, Vec<MemberInfo>), CliError> {
        let response = match kind {
            MemberKind::Voter => self.client.member_add(peer_urls).await?,
            MemberKind::Learner => self.client.member_add_learner(peer_urls).await?,
            MemberKind::Observer => self.client.member_add_observer(peer_urls).await?,
        };
        let added = response.member.ok_or(ClientError::Protocol("an added member that is not told"))?;
        Ok((member(added), response.members.into_iter().map(member).collect()))
    }

    /// Removes a member.
    pub async fn member_remove(&self, id: u64) -> Result<(), CliError> {
        self.client.member_remove(id).await?;
        Ok(())
    }

    /// Changes where peers reach a member.
    pub async fn member_update(&self, id: u64, peer_urls: Vec<String>) -> Result<(), CliError> {
        self.client.member_update(id, peer_urls).await?;
        Ok(())
    }

    /// Gives a learner a vote.
    pub async fn member_promote(&self, id: u64) -> Result<(), CliError> {
        self.client.member_promote(id).await?;
        Ok(())
    }

    /// Asks the leader, which this must be, to hand over.
    pub async fn move_leader(&self, target: u64) -> Result<(), CliError> {
        Ok(self.client.move_leader(target).await?)
    }

    /// Where the answering member stands.
    pub async fn status(&self) -> Result<Status, CliError> {
        let status = self.client.status().await?;
        let header = status.header.unwrap_or_default();
        let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
        Ok(Status {
            cluster: header.cluster_id,
            member: header.member_id,
            revision: Revision(header.revision),
            version: status.version,
            db_bytes: bytes(status.db_size),
            db_live_bytes: bytes(status.db_size_in_use),
            quota_bytes: bytes(status.db_size_quota),
            leader: status.leader,
            term: status.raft_term,
            raft_index: status.raft_index,
            applied_index: status.raft_applied_index,
            errors: status.errors,
            is_learner: status.is_learner,
        })
    }

    /// Whether a linearizable read works; which key is read does not matter.
    pub async fn health(&self) -> Result<(), CliError> {
        self.client.range(GetOptions::key("health").count_only()).await?;
        Ok(())
    }

    /// The answering member's hash at a revision; 0 is its newest.
    pub async fn hash_kv(&self, revision: Revision) -> Result<HashKv, CliError> {
        let response = self.client.hash_kv(revision).await?;
        let own = response.header.map_or(0, |header| header.revision);
        // etcd before 3.6 does not say which revision it hashed.
        let hashed = [response.hash_revision, revision.0, own].into_iter().find(|revision| *revision > 0);
        Ok(HashKv {
            hash: response.hash,
            revision: Revision(hashed.unwrap_or(0)),
            compact_revision: Revision(response.compact_revision),
        })
    }

    /// The alarms that stand: the member and the alarm's name.
    pub async fn alarms(&self) -> Result<Vec<(u64, String)>, CliError> {
        let alarms = self.client.alarm_list().await?;
        let name = |alarm: i32| {
            AlarmType::try_from(alarm)
                .map_or_else(|_| alarm.to_string(), |alarm| alarm.as_str_name().to_owned())
        };
        Ok(alarms.into_iter().map(|alarm| (alarm.member_id, name(alarm.alarm))).collect())
    }

    /// The answering member's whole content.
    pub async fn snapshot(&self) -> Result<SnapshotStream, CliError> {
        Ok(SnapshotStream(self.client.snapshot().await?.boxed()))
    }

    /// Waits for a lock.
    pub async fn lock(&self, name: Bytes, lease: LeaseId) -> Result<Held, CliError> {
        let key = self.client.lock(name, lease).await?;
        let kv = self.client.get(key.clone()).await?;
        let kv =
            kv.ok_or_else(|| CliError::Conflict("the lock was lost as soon as it was got".to_owned()))?;
        Ok(Held { key, revision: kv.create_revision, leader: None })
    }

    /// Waits to be elected.
    pub async fn campaign(&self, name: Bytes, value: Bytes, lease: LeaseId) -> Result<Held, CliError> {
        let leader = self.client.campaign(name, lease, value).await?;
        Ok(Held { key: leader.key.clone(), revision: Revision(leader.rev), leader: Some(leader) })
    }

    /// Gives back what is held.
    pub async fn release(&self, held: &Held) -> Result<(), CliError> {
        match &held.leader {
            None => self.client.unlock(held.key.clone()).await?,
            Some(leader) => self.client.resign(leader.clone()).await?,
        }
        Ok(())
    }

    /// Who is elected, now and after every change.
    pub async fn observe(&self, name: Bytes) -> Result<Endless<KeyValue>, CliError> {
        Ok(Endless(self.client.observe(name).await?.boxed()))
    }
}

fn member(member: pb::Member) -> MemberInfo {
    MemberInfo {
        id: member.id,
        name: member.name,
        peer_urls: member.peer_ur_ls,
        client_urls: member.client_ur_ls,
        is_learner: member.is_learner,
    }
}

/// The SDK's words for a query.
pub fn get_options(query: &RangeQuery, serializable: bool) -> GetOptions {
    let mut options = GetOptions::keys(query.range.clone())
        .revision(query.revision)
        .limit(query.limit)
        .sort(query.sort_target, query.sort_order)
        .mod_revisions(query.min_mod_revision, query.max_mod_revision)
        .create_revisions(query.min_create_revision, query.max_create_revision);
    if query.keys_only {
        options = options.keys_only();
    }
    if query.count_only {
        options = options.count_only();
    }
    if serializable {
        options = options.serializable();
    }
    options
}
