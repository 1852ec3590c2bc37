//! A client: one connection to one node, a deadline for each call, and what
//! became of the call.
//!
//! It never tries again by itself and never goes to another node by itself. A
//! process number stands for one connection with no call in doubt: a call whose
//! outcome is unknown and a new connection each take a new number. Only what
//! the server promises not to have done is `Failed`; see [`certainly_not_done`].

mod translate;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay::wire::etcdserverpb as pb;
use mainstay::wire::etcdserverpb::cluster_client::ClusterClient;
use mainstay::wire::etcdserverpb::kv_client::KvClient;
use mainstay::wire::etcdserverpb::lease_client::LeaseClient;
use mainstay::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use mainstay::wire::mainstay_v1::OpenRequest;
use mainstay::wire::mainstay_v1::sessions_client::SessionsClient;
use mainstay::wire::metadata as names;
use mainstay::wire::v3lockpb::lock_client::LockClient;
use mainstay::wire::v3lockpb::{LockRequest, UnlockRequest};
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::context::Context;
use crate::judge::history::{Action, Body, Call, Op, Outcome, Reply};
use translate::Nonsense;
pub use translate::{end as wire_end, event as event_of_wire};

/// How long a call may take unless its client says otherwise.
pub const DEADLINE: Duration = Duration::from_secs(1);
/// How long connecting may take. Nothing is sent before it is done.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Calls without an answer in a row after which the connection is given up.
const SILENT_CALLS_MAX: u32 = 2;

/// Names one write, so that a retry of it is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId {
    pub session: u64,
    pub sequence: u64,
    /// Every sequence up to this one has been answered and will not be retried.
    pub acknowledged: u64,
}

/// One connection to one node.
pub struct Client {
    context: Arc<Context>,
    workload: &'static str,
    node: usize,
    process: u64,
    channel: Option<Channel>,
    /// Whether there was a connection under this process number.
    connected: bool,
    silent_calls: u32,
    deadline: Duration,
    /// Half of the clients let the server know their deadline; what the others
    /// gave up may still be done long afterwards.
    tells_deadline: bool,
}

impl Client {
    /// A client of the node on host `node`. It connects with its first call.
    pub fn new(context: &Arc<Context>, workload: &'static str, node: usize) -> Client {
        let process = context.process();
        Client {
            context: Arc::clone(context),
            workload,
            node,
            process,
            channel: None,
            connected: false,
            silent_calls: 0,
            deadline: DEADLINE,
            tells_deadline: process.is_multiple_of(2),
        }
    }

    pub fn with_deadline(mut self, deadline: Duration) -> Client {
        self.deadline = deadline;
        self
    }

    /// The index of the host whose node it asks.
    pub fn node(&self) -> usize {
        self.node
    }

    /// Goes to another node, if it is another.
    pub fn turn_to(&mut self, node: usize) {
        if node != self.node {
            self.node = node;
            self.channel = None;
        }
    }

    /// Makes one call and records it.
    pub async fn call(&mut self, call: Call) -> Outcome {
        self.call_with_id(call, None).await
    }

    /// Makes one call, as the write that `id` names, and records it.
    pub async fn call_with_id(&mut self, call: Call, id: Option<RequestId>) -> Outcome {
        let invoked_ns = self.context.now_ns();
        let outcome = match self.connect().await {
            Err(error) => Outcome::Failed(format!("not connected: {error}")),
            Ok(channel) => self.ask(channel, &call, id).await,
        };
        self.context.record(Op {
            process: self.process,
            node: self.node,
            workload: self.workload,
            call,
            request_id: id.map(|id| format!("{}/{}", id.session, id.sequence)),
            invoked_ns,
            returned_ns: self.context.now_ns(),
            outcome: outcome.clone(),
        });
        if matches!(outcome, Outcome::Unknown(_)) {
            self.process = self.context.process();
        }
        outcome
    }

    /// One action as a call of its own, reads linearizable.
    pub async fn act(&mut self, action: Action) -> Outcome {
        self.call(Call::Single { action, serializable: false }).await
    }

    /// Opens a session for request ids. It is not a call of the history: a session opened in vain expires.
    pub async fn open_session(&mut self, ttl_s: u64) -> Result<u64, String> {
        let channel = self.connect().await?;
        let opening = async { SessionsClient::new(channel).open(OpenRequest { ttl_s }).await };
        let opened = answered_within(self.deadline, opening).await;
        opened.map(|response| response.session).map_err(|status| status.to_string())
    }

    /// The connection there is, or a new one.
    async fn connect(&mut self) -> Result<Channel, String> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        if self.connected {
            self.process = self.context.process();
            self.connected = false;
        }
        let channel = dial(&self.context.hosts.hosts[self.node].client_url()).await?;
        self.connected = true;
        self.silent_calls = 0;
        self.channel = Some(channel.clone());
        Ok(channel)
    }

    async fn ask(&mut self, channel: Channel, call: &Call, id: Option<RequestId>) -> Outcome {
        let envelope = Envelope { deadline: self.tells_deadline.then_some(self.deadline), id };
        let answer = tokio::time::timeout(self.deadline, send(channel, &envelope, call)).await;
        let silent = match &answer {
            Err(_) => true,
            Ok(Err(Trouble::Status(status))) => has_cause::<tonic::TimeoutExpired>(status),
            Ok(_) => false,
        };
        if silent {
            self.silent_calls += 1;
            if self.silent_calls >= SILENT_CALLS_MAX {
                self.channel = None;
            }
            return Outcome::Unknown(format!("no answer within {:?}", self.deadline));
        }
        self.silent_calls = 0;
        match answer.expect("an answer, as it was not silence") {
            Ok(reply) => Outcome::Ok(reply),
            Err(Trouble::Nonsense(Nonsense(what))) => Outcome::Unknown(format!("nonsense: {what}")),
            Err(Trouble::Status(status)) => {
                // Only what came about on this side of the wire has a source.
                if std::error::Error::source(&status).is_some() {
                    self.channel = None;
                }
                let text = format!("{:?}: {}", status.code(), status.message());
                if certainly_not_done(call, &status) { Outcome::Failed(text) } else { Outcome::Unknown(text) }
            }
        }
    }
}

/// Opens a connection that is not made anew when it breaks: calls on it then fail.
///
/// # Errors
/// In words, when there is none within [`CONNECT_TIMEOUT`]; nothing was sent.
pub async fn dial(url: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|error| error.to_string())?
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true);
    let used = Arc::new(AtomicBool::new(false));
    let once = tower::service_fn(move |uri: tonic::transport::Uri| {
        let used = used.swap(true, Ordering::Relaxed);
        async move {
            let address = uri.authority().map(ToString::to_string).unwrap_or_default();
            if used {
                return Err(std::io::Error::other("the connection broke"));
            }
            let stream = tokio::net::TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(hyper_util::rt::TokioIo::new(stream))
        }
    });
    match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(once)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(with_causes(&error)),
        Err(_) => Err(format!("nothing within {CONNECT_TIMEOUT:?}")),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What a request says beside its message.
struct Envelope {
    deadline: Option<Duration>,
    id: Option<RequestId>,
}

impl Envelope {
    fn around<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline);
        }
        if let Some(id) = self.id {
            let metadata = request.metadata_mut();
            metadata.insert(names::SESSION, AsciiMetadataValue::from(id.session));
            metadata.insert(names::SEQUENCE, AsciiMetadataValue::from(id.sequence));
            metadata.insert(names::ACKNOWLEDGED, AsciiMetadataValue::from(id.acknowledged));
        }
        request
    }
}

/// Why a call has no reply.
enum Trouble {
    Status(Status),
    Nonsense(Nonsense),
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Trouble {
        Trouble::Status(status)
    }
}

impl From<Nonsense> for Trouble {
    fn from(nonsense: Nonsense) -> Trouble {
        Trouble::Nonsense(nonsense)
    }
}

async fn send(channel: Channel, envelope: &Envelope, call: &Call) -> Result<Reply, Trouble> {
    match call {
        Call::Single { action, serializable } => send_action(channel, envelope, action, *serializable).await,
        Call::Txn(txn) => {
            let response = key_value(channel).txn(envelope.around(translate::txn(txn))).await?;
            Ok(translate::txn_reply(response.into_inner())?)
        }
        Call::Compact { revision } => {
            let message = pb::CompactionRequest { revision: *revision, physical: false };
            let response = key_value(channel).compact(envelope.around(message)).await?.into_inner();
            Ok(translate::reply(response.header, Body::Compact))
        }
        Call::LeaseGrant { .. }
        | Call::LeaseKeepAlive { .. }
        | Call::LeaseRevoke { .. }
        | Call::LeaseTimeToLive { .. } => send_lease(channel, envelope, call).await,
        Call::Lock { name, lease } => {
            let message = LockRequest { name: name.clone().into(), lease: *lease };
            let response = LockClient::new(channel).lock(envelope.around(message)).await?.into_inner();
            Ok(translate::reply(response.header, Body::Locked { key: translate::text(&response.key) }))
        }
        Call::Unlock { key } => {
            let message = UnlockRequest { key: key.clone().into() };
            let response = LockClient::new(channel).unlock(envelope.around(message)).await?.into_inner();
            Ok(translate::reply(response.header, Body::Unlocked))
        }
        Call::HashKv { revision } => {
            let message = pb::HashKvRequest { revision: *revision };
            let response = MaintenanceClient::new(channel).hash_kv(envelope.around(message)).await?;
            let response = response.into_inner();
            let (hash, hash_revision) = (response.hash, response.hash_revision);
            let compact_revision = response.compact_revision;
            Ok(translate::reply(response.header, Body::HashKv { hash, hash_revision, compact_revision }))
        }
        Call::MemberList => {
            let message = pb::MemberListRequest { linearizable: true };
            let response = ClusterClient::new(channel).member_list(envelope.around(message)).await?;
            let response = response.into_inner();
            let names = response.members.into_iter().map(|member| member.name).collect();
            Ok(translate::reply(response.header, Body::Members { names }))
        }
        // Several steps on several nodes; whoever takes them records them.
        Call::MemberAdd { .. } | Call::MemberRemove { .. } => {
            Err(Nonsense("not a call to one node".to_owned()).into())
        }
    }
}

/// Answers to large reads are taken whole.
fn key_value(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(usize::MAX)
}

async fn send_action(
    channel: Channel,
    envelope: &Envelope,
    action: &Action,
    serializable: bool,
) -> Result<Reply, Trouble> {
    let mut client = key_value(channel);
    match action {
        Action::Range { span, revision, limit } => {
            let message = translate::range(span, *revision, *limit, serializable);
            let mut response = client.range(envelope.around(message)).await?.into_inner();
            let header = response.header.take();
            Ok(translate::reply(header, Body::Single(translate::range_reply(response))))
        }
        Action::Put { key, value, lease, prev_kv } => {
            let message = translate::put(key, value, *lease, *prev_kv);
            let mut response = client.put(envelope.around(message)).await?.into_inner();
            let header = response.header.take();
            Ok(translate::reply(header, Body::Single(translate::put_reply(response))))
        }
        Action::Delete { span, prev_kv } => {
            let message = translate::delete(span, *prev_kv);
            let mut response = client.delete_range(envelope.around(message)).await?.into_inner();
            let header = response.header.take();
            Ok(translate::reply(header, Body::Single(translate::delete_reply(response))))
        }
    }
}

async fn send_lease(channel: Channel, envelope: &Envelope, call: &Call) -> Result<Reply, Trouble> {
    let mut client = LeaseClient::new(channel);
    match *call {
        Call::LeaseGrant { id, ttl_s } => {
            let message = pb::LeaseGrantRequest { id, ttl: ttl_s };
            let response = client.lease_grant(envelope.around(message)).await?.into_inner();
            let (id, ttl_s) = (response.id, response.ttl);
            let body = Body::Lease { id, ttl_s, granted_ttl_s: ttl_s, keys: Vec::new() };
            Ok(translate::reply(response.header, body))
        }
        Call::LeaseKeepAlive { id } => {
            let message = tokio_stream::once(pb::LeaseKeepAliveRequest { id });
            let mut answers = client.lease_keep_alive(envelope.around(message)).await?.into_inner();
            let response = answers.message().await?;
            let response = response.ok_or_else(|| Nonsense("the stream ended unanswered".to_owned()))?;
            let (id, ttl_s) = (response.id, response.ttl);
            let body = Body::Lease { id, ttl_s, granted_ttl_s: 0, keys: Vec::new() };
            Ok(translate::reply(response.header, body))
        }
        Call::LeaseRevoke { id } => {
            let response = client.lease_revoke(envelope.around(pb::LeaseRevokeRequest { id })).await?;
            Ok(translate::reply(response.into_inner().header, Body::LeaseRevoked))
        }
        Call::LeaseTimeToLive { id } => {
            let message = pb::LeaseTimeToLiveRequest { id, keys: true };
            let response = client.lease_time_to_live(envelope.around(message)).await?.into_inner();
            let keys = response.keys.iter().map(|key| translate::text(key)).collect();
            let (ttl_s, granted_ttl_s) = (response.ttl, response.granted_ttl);
            let body = Body::Lease { id: response.id, ttl_s, granted_ttl_s, keys };
            Ok(translate::reply(response.header, body))
        }
        _ => Err(Nonsense("not a lease's call".to_owned()).into()),
    }
}

/// What a server says before it proposes anything.
const NOT_PROPOSED: &[(Code, &str)] = &[
    (Code::Unavailable, "etcdserver: no leader"),
    (Code::ResourceExhausted, "etcdserver: too many requests"),
    (Code::InvalidArgument, "etcdserver: request is too large"),
    (Code::FailedPrecondition, "etcdserver: rpc not supported for learner"),
];

/// What applying a command says when it changed nothing, on any replica. What
/// a session says about an id is not here: an earlier attempt may have happened.
const REFUSED: &[(Code, &str)] = &[
    (Code::OutOfRange, "etcdserver: mvcc: required revision"),
    (Code::InvalidArgument, "etcdserver: "),
    (Code::NotFound, "etcdserver: requested lease not found"),
    (Code::FailedPrecondition, "etcdserver: lease already exists"),
    (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
    (Code::ResourceExhausted, "mainstay: the range of the transaction returns more than"),
];

/// Whether the call surely had no effect and never will.
///
/// Taking a lock and renewing a lease are several steps on the server, so that
/// an error may follow a step that was done: only a request that was never
/// sent is certain there.
fn certainly_not_done(call: &Call, status: &Status) -> bool {
    // The request never left, because there was no connection.
    if has_cause::<tonic::ConnectError>(status) {
        return true;
    }
    // What this side made up says nothing about the server.
    if std::error::Error::source(status).is_some() {
        return false;
    }
    let said = |table: &[(Code, &str)]| {
        table.iter().any(|(code, message)| status.code() == *code && status.message().starts_with(message))
    };
    match call {
        Call::Lock { .. } | Call::LeaseKeepAlive { .. } => false,
        _ => said(NOT_PROPOSED) || said(REFUSED),
    }
}

/// Whether an error of this type stands behind a status; it never does behind what a server said.
fn has_cause<E: std::error::Error + 'static>(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<E>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What `asking` gives, or that there was nothing in time.
async fn answered_within<T>(
    deadline: Duration,
    asking: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(deadline, asking).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {deadline:?}"))),
    }
}

/// The revision of the store now, after a quorum was asked through the node at `url`. Not recorded.
pub async fn revision(url: &str) -> anyhow::Result<i64> {
    let message = pb::RangeRequest { key: bytes::Bytes::from_static(b"\0"), ..Default::default() };
    let answer = answered_within(DEADLINE, key_value(dialled(url).await?).range(message)).await?;
    Ok(answer.header.map_or(0, |header| header.revision))
}

async fn dialled(url: &str) -> anyhow::Result<Channel> {
    dial(url).await.map_err(|error| anyhow::anyhow!("{url}: {error}"))
}
