//! skeleton
use bytes::Bytes;
use super::args::GlobalArgs;
use super::error::CliError;
use crate::env::EnvRef;
use crate::types::*;
#[derive(Clone)]
pub struct Api;
pub struct Header { pub revision: Revision }
#[derive(Clone, Debug)]
pub struct WatchRequest { pub range: KeyRange, pub start: Revision, pub prev_kv: bool, pub only: Option<EventKind>, pub progress_notify: bool }
pub enum WatchItem { Created { revision: Revision }, Progress { revision: Revision }, Compacted { revision: Revision }, Events(Vec<Event>) }
pub struct WatchStream;
impl WatchStream { pub async fn next(&mut self) -> Result<WatchItem, CliError> { todo!() } }
pub struct ObserveStream;
impl ObserveStream { pub async fn next(&mut self) -> Result<KeyValue, CliError> { todo!() } }
pub struct SnapshotStream;
impl SnapshotStream { pub async fn next(&mut self) -> Result<Option<Bytes>, CliError> { todo!() } }
pub struct LeaseInfo { pub ttl_s: i64, pub granted_ttl_s: i64, pub keys: Vec<Bytes> }
#[derive(Clone, Debug)]
pub struct MemberInfo { pub id: u64, pub name: String, pub peer_urls: Vec<String>, pub client_urls: Vec<String>, pub is_learner: bool, pub kind: Option<MemberKind> }
#[derive(Clone, Debug)]
pub struct Status { pub cluster: u64, pub member: u64, pub revision: Revision, pub version: String, pub db_bytes: u64, pub db_live_bytes: u64, pub quota_bytes: u64, pub leader: u64, pub term: u64, pub raft_index: u64, pub applied_index: u64, pub errors: Vec<String>, pub is_learner: bool }
pub struct HashKv { pub hash: u32, pub revision: Revision, pub compact_revision: Revision }
pub struct Held { pub key: Bytes, pub revision: Revision }
impl Api {
    pub fn connect(_e: &[String], _g: &GlobalArgs, _env: &EnvRef) -> Result<Api, CliError> { todo!() }
    pub async fn range(&self, _q: &RangeQuery, _s: bool) -> Result<(Header, RangeReply), CliError> { todo!() }
    pub async fn put(&self, _p: Put) -> Result<(Revision, Option<KeyValue>), CliError> { todo!() }
    pub async fn delete(&self, _d: DeleteRange) -> Result<(Revision, u64, Vec<KeyValue>), CliError> { todo!() }
    pub async fn txn(&self, _t: Txn) -> Result<(Revision, TxnReply), CliError> { todo!() }
    pub async fn compact(&self, _r: Revision, _p: bool) -> Result<(), CliError> { todo!() }
    pub async fn watch(&self, _r: WatchRequest) -> Result<WatchStream, CliError> { todo!() }
    pub async fn lease_grant(&self, _i: LeaseId, _t: i64) -> Result<(LeaseId, i64), CliError> { todo!() }
    pub async fn lease_revoke(&self, _i: LeaseId) -> Result<(), CliError> { todo!() }
    pub async fn lease_keep_alive(&self, _i: LeaseId) -> Result<i64, CliError> { todo!() }
    pub async fn lease_time_to_live(&self, _i: LeaseId, _k: bool) -> Result<LeaseInfo, CliError> { todo!() }
    pub async fn leases(&self) -> Result<Vec<LeaseId>, CliError> { todo!() }
    pub async fn members(&self, _l: bool) -> Result<Vec<MemberInfo>, CliError> { todo!() }
    pub async fn member_add(&self, _u: Vec<String>, _k: MemberKind) -> Result<(MemberInfo, Vec<MemberInfo>), CliError> { todo!() }
    pub async fn member_remove(&self, _i: u64) -> Result<(), CliError> { todo!() }
    pub async fn member_update(&self, _i: u64, _u: Vec<String>) -> Result<(), CliError> { todo!() }
    pub async fn member_promote(&self, _i: u64) -> Result<(), CliError> { todo!() }
    pub async fn move_leader(&self, _i: u64) -> Result<(), CliError> { todo!() }
    pub async fn status(&self) -> Result<Status, CliError> { todo!() }
    pub async fn health(&self) -> Result<(), CliError> { todo!() }
    pub async fn hash_kv(&self, _r: Revision) -> Result<HashKv, CliError> { todo!() }
    pub async fn alarms(&self) -> Result<Vec<(u64, String)>, CliError> { todo!() }
    pub async fn snapshot(&self) -> Result<SnapshotStream, CliError> { todo!() }
    pub async fn lock(&self, _n: Bytes, _l: LeaseId) -> Result<Held, CliError> { todo!() }
    pub async fn unlock(&self, _h: &Held) -> Result<(), CliError> { todo!() }
    pub async fn campaign(&self, _n: Bytes, _v: Bytes, _l: LeaseId) -> Result<Held, CliError> { todo!() }
    pub async fn resign(&self, _h: &Held) -> Result<(), CliError> { todo!() }
    pub async fn observe(&self, _n: Bytes) -> Result<ObserveStream, CliError> { todo!() }
}
