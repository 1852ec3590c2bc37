//! What every service needs: the node, the limits, the header of an answer, and
//! what a request says about itself in its metadata.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Request, Status};

use super::ServerOptions;
use super::disk::Disk;
use super::error::ServeError;
use crate::env::EnvRef;
use crate::mvcc::View;
use crate::node::{Bootstrap, Node, NodeError, ProposeContext};
use crate::telemetry;
use crate::types::{AlarmKind, ApplyError, MemberKind, Operation, Reply, RequestId, Revision};
use crate::wire::etcdserverpb::ResponseHeader;
use crate::wire::metadata as names;

/// The longest actor that is recorded, in bytes: it stands in every change.
const ACTOR_BYTES_MAX: usize = 256;

/// What this node is in its cluster, as far as requests are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Votes.
    Voter,
    /// Will vote; answers like etcd's learners until then.
    Learner,
    /// Never votes; serves reads and forwards writes.
    Observer,
}

/// What every service shares.
pub(crate) struct Shared {
    pub node: Node,
    pub options: ServerOptions,
    pub env: EnvRef,
    pub disk: Disk,
    /// Cancelled when the server stops: streams and waits end.
    pub stopping: CancellationToken,
    /// Work that outlives its request (a stream's source, the clean-up after a
    /// given-up lock). Waited for when the server stops.
    pub tasks: TaskTracker,
}

impl Shared {
    pub(crate) fn new(node: Node, options: ServerOptions, env: EnvRef) -> Arc<Shared> {
        let (disk, stopping, tasks) = Default::default();
        Arc::new(Shared { node, options, env, disk, stopping, tasks })
    }

    /// The header of an answer made at `revision`.
    pub(crate) fn header(&self, revision: Revision) -> ResponseHeader {
        ResponseHeader {
            cluster_id: self.node.cluster_id(),
            member_id: self.node.id(),
            revision: revision.0,
            raft_term: self.node.leadership().term,
        }
    }

    /// The header of an answer that is about no particular revision.
    pub(crate) fn header_now(&self) -> ResponseHeader {
        self.header(self.node.view().revision)
    }

    /// What this node is now.
    pub(crate) fn role(&self) -> Role {
        match (self.node.own_kind(), &self.node.options().bootstrap) {
            (Some((_, true)), _) => Role::Voter,
            (Some((MemberKind::Observer, false)), _) => Role::Observer,
            (Some((_, false)), _) => Role::Learner,
            // Not in any membership yet: nobody has elected anybody either.
            (None, Bootstrap::Initial { .. }) => Role::Voter,
            // Let in by a membership that has not reached this node yet.
            (None, Bootstrap::Join { kind: MemberKind::Observer, .. }) => Role::Observer,
            (None, Bootstrap::Join { .. } | Bootstrap::Existing { .. }) => Role::Learner,
        }
    }

    /// What a request says about itself.
    ///
    /// # Errors
    /// Metadata that cannot be used, no leader where one is asked for, and a
    /// learner that does not serve `rpc`.
    pub(crate) fn caller<T>(&self, request: &Request<T>, rpc: Rpc) -> Result<Caller, ServeError> {
        let caller = Caller::of(request.metadata(), request.extensions())?;
        if self.role() == Role::Learner && rpc == Rpc::Member {
            return Err(NodeError::NotSupportedForLearner.into());
        }
        if caller.has_leader && self.node.leadership().leader == 0 {
            return Err(NodeError::NoLeader.into());
        }
        Ok(caller)
    }

    /// Proposes on behalf of a caller.
    pub(crate) async fn propose(&self, operation: Operation, caller: &Caller) -> Result<Reply, ServeError> {
        let limit = self.options.request_timeout;
        let context = ProposeContext {
            actor: caller.actor.clone(),
            request: caller.request,
            timeout: Some(caller.timeout.map_or(limit, |asked| asked.min(limit))),
        };
        Ok(self.node.propose(operation, context).await?)
    }

    /// Waits until reads of this node are linearizable.
    pub(crate) async fn barrier(&self, caller: &Caller) -> Result<(), ServeError> {
        caller.within(self.node.read_barrier()).await
    }

    /// The newest view, unless the members disagree about the content.
    pub(crate) fn view(&self) -> Result<Arc<View>, ServeError> {
        let view = self.node.view();
        match view.alarms.iter().any(|alarm| alarm.kind == AlarmKind::Corrupt) {
            true => Err(ApplyError::Corrupt.into()),
            false => Ok(view),
        }
    }

    /// Ends when this node has followed no leader for the grace that streams have.
    pub(crate) async fn leader_lost(&self) {
        let mut leader = self.node.leader_changes();
        loop {
            if leader.wait_for(|leader| *leader == 0).await.is_err() {
                return;
            }
            let found = leader.wait_for(|leader| *leader != 0);
            if tokio::time::timeout(self.options.leaderless_grace, found).await.is_err() {
                return;
            }
        }
    }

    /// A stream that also ends when the server stops or, if the caller asked for
    /// that, when there is no leader for long.
    pub(crate) fn guarded<T>(
        self: &Arc<Self>,
        caller: &Caller,
        method: &'static str,
        stream: impl Stream<Item = Result<T, ServeError>> + Send + 'static,
    ) -> Guarded<T> {
        let shared = self.clone();
        let has_leader = caller.has_leader;
        let end = Box::pin(async move {
            tokio::select! {
                () = shared.stopping.cancelled() => NodeError::Stopped.into(),
                () = shared.leader_lost(), if has_leader => NodeError::NoLeader.into(),
            }
        });
        Guarded { stream: Box::pin(stream), end: Some(end), _open: OpenStream::new(method) }
    }
}

/// Whether a learner serves a request, as etcd's do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rpc {
    /// Every member serves it.
    Everywhere,
    /// Learners refuse it.
    Member,
}

/// What a request says about itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// Who asks: as the client says, or where it comes from.
    pub actor: Option<Arc<str>>,
    /// Makes a retry of a write apply once.
    pub request: Option<RequestId>,
    /// How long the client will wait.
    pub timeout: Option<Duration>,
    /// The client wants an error rather than an answer without a leader.
    pub has_leader: bool,
}

/// The address a connection comes from, put beside each of its requests.
#[derive(Clone, Debug)]
pub(crate) struct Remote(pub Arc<str>);

impl Caller {
    fn of(metadata: &MetadataMap, extensions: &Extensions) -> Result<Caller, ServeError> {
        let has_leader = metadata.get(names::REQUIRE_LEADER).is_some_and(|value| value.as_bytes() == b"true");
        let actor = match text(metadata, names::ACTOR)? {
            Some(actor) if actor.is_empty() || actor.len() > ACTOR_BYTES_MAX => {
                let reason = format!("it must have 1 to {ACTOR_BYTES_MAX} bytes, and has {}", actor.len());
                return Err(ServeError::Metadata { name: names::ACTOR, reason });
            }
            Some(actor) => Some(Arc::from(actor)),
            None => extensions.get::<Remote>().map(|remote| remote.0.clone()),
        };
        Ok(Caller { actor, request: request_id(metadata)?, timeout: timeout(metadata), has_leader })
    }

    /// What `future` gives, unless the client's deadline comes first.
    pub(crate) async fn within<T, E>(
        &self,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ServeError>
    where
        ServeError: From<E>,
    {
        match self.timeout {
            None => Ok(future.await?),
            Some(timeout) => match tokio::time::timeout(timeout, future).await {
                Ok(result) => Ok(result?),
                Err(_) => Err(ServeError::DeadlineExceeded),
            },
        }
    }
}

fn text<'a>(metadata: &'a MetadataMap, name: &'static str) -> Result<Option<&'a str>, ServeError> {
    let Some(value) = metadata.get(name) else { return Ok(None) };
    match value.to_str() {
        Ok(text) => Ok(Some(text.trim())),
        Err(_) => Err(ServeError::Metadata { name, reason: "it must be visible ASCII".to_owned() }),
    }
}

fn number(metadata: &MetadataMap, name: &'static str) -> Result<Option<u64>, ServeError> {
    let Some(text) = text(metadata, name)? else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(ServeError::Metadata { name, reason: format!("{text:?} is not a decimal number") }),
    }
}

/// The request id, all of it or none.
fn request_id(metadata: &MetadataMap) -> Result<Option<RequestId>, ServeError> {
    use names::{ACKNOWLEDGED, SEQUENCE, SESSION};
    let session = number(metadata, SESSION)?;
    let sequence = number(metadata, SEQUENCE)?;
    let acknowledged = number(metadata, ACKNOWLEDGED)?;
    let refuse = |name, reason: &str| Err(ServeError::Metadata { name, reason: reason.to_owned() });
    match (session, sequence, acknowledged) {
        (None, None, None) => Ok(None),
        (None, _, _) => refuse(SESSION, "it is missing; a request id needs session and sequence"),
        (_, None, _) => refuse(SEQUENCE, "it is missing; a request id needs session and sequence"),
        (Some(0), _, _) => refuse(SESSION, "0 is no session; open one"),
        (_, Some(0), _) => refuse(SEQUENCE, "sequences begin at 1"),
        (_, Some(sequence), Some(acknowledged)) if acknowledged >= sequence => {
            refuse(ACKNOWLEDGED, "it must be below the sequence of the request itself")
        }
        (Some(session), Some(sequence), acknowledged) => {
            Ok(Some(RequestId { session, sequence, acknowledged: acknowledged.unwrap_or(0) }))
        }
    }
}

/// gRPC's own deadline. One that cannot be read is none, as in other servers:
/// the client enforces it anyway.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Counts an open stream for as long as it lives.
pub(crate) struct OpenStream {
    method: &'static str,
}

impl OpenStream {
    pub(crate) fn new(method: &'static str) -> OpenStream {
        metrics::gauge!(telemetry::STREAMS_OPEN, "method" => method).increment(1.0);
        OpenStream { method }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        metrics::gauge!(telemetry::STREAMS_OPEN, "method" => self.method).decrement(1.0);
    }
}

/// See [`Shared::guarded`].
pub(crate) struct Guarded<T> {
    stream: Pin<Box<dyn Stream<Item = Result<T, ServeError>> + Send>>,
    /// What ends the stream early; `None` once it has ended.
    end: Option<BoxFuture<'static, ServeError>>,
    _open: OpenStream,
}

impl<T> Stream for Guarded<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(end) = self.end.as_mut() else { return Poll::Ready(None) };
        if let Poll::Ready(error) = end.as_mut().poll(context) {
            self.end = None;
            return Poll::Ready(Some(Err(error.into())));
        }
        match self.stream.as_mut().poll_next(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(item))) => Poll::Ready(Some(Ok(item))),
            Poll::Ready(Some(Err(error))) => {
                self.end = None;
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                self.end = None;
                Poll::Ready(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (name, value) in pairs {
            metadata.insert(*name, value.parse().unwrap());
        }
        metadata
    }

    fn caller(pairs: &[(&'static str, &str)]) -> Result<Caller, String> {
        Caller::of(&metadata(pairs), &Extensions::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_request_id_is_whole_or_an_error_that_names_the_missing_part() {
        assert_eq!(caller(&[]).unwrap().request, None);
        let whole =
            caller(&[("mainstay-session", "7"), ("mainstay-sequence", "3"), ("mainstay-acknowledged", "2")]);
        assert_eq!(whole.unwrap().request, Some(RequestId { session: 7, sequence: 3, acknowledged: 2 }));
        for (pairs, name) in [
            (&[("mainstay-session", "7")][..], "mainstay-sequence"),
            (&[("mainstay-sequence", "7")], "mainstay-session"),
            (&[("mainstay-acknowledged", "7")], "mainstay-session"),
            (&[("mainstay-session", "x"), ("mainstay-sequence", "1")], "mainstay-session"),
            (&[("mainstay-session", "0"), ("mainstay-sequence", "1")], "mainstay-session"),
            (&[("mainstay-session", "1"), ("mainstay-sequence", "0")], "mainstay-sequence"),
            (
                &[("mainstay-session", "1"), ("mainstay-sequence", "2"), ("mainstay-acknowledged", "2")],
                "mainstay-acknowledged",
            ),
        ] {
            let text = caller(pairs).unwrap_err();
            assert!(text.starts_with(&format!("mainstay: metadata {name}: ")), "{pairs:?}: {text}");
        }
    }

    #[test]
    fn the_actor_is_what_the_client_says_or_where_it_comes_from() {
        let mut extensions = Extensions::default();
        extensions.insert(Remote("10.0.0.9".into()));
        let said = Caller::of(&metadata(&[("mainstay-actor", "ann")]), &extensions).unwrap();
        assert_eq!(said.actor.as_deref(), Some("ann"));
        let seen = Caller::of(&metadata(&[]), &extensions).unwrap();
        assert_eq!(seen.actor.as_deref(), Some("10.0.0.9"));
        assert!(caller(&[("mainstay-actor", &"x".repeat(257))]).unwrap_err().contains("257"));
    }

    #[test]
    fn grpc_timeouts() {
        let timeout = |text| caller(&[("grpc-timeout", text)]).unwrap().timeout;
        assert_eq!(timeout("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(timeout("123456789S"), None);
        assert_eq!(timeout("S"), None);
        assert_eq!(timeout("5x"), None);
        assert!(caller(&[("hasleader", "true")]).unwrap().has_leader);
    }
}
