//! Why a call gave no answer, and the two questions a caller has then: may I
//! try again, and may it have happened? The class says what kind of trouble it
//! was; it answers neither question.

use std::time::Duration;

use thiserror::Error;
use tonic::{Code, Status};

use super::cache::CacheError;
use crate::wire::channel::BadAddress;

/// What kind of trouble an error is, for counting, alerting and falling back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorClass {
    /// There was no connection, or it broke.
    Network,
    /// No answer came in time.
    Timeout,
    /// A server answered that it cannot serve at present.
    Unavailable,
    /// There is too much to do: said by the server, or by this client's own limits.
    Overloaded,
    /// The state of the store stands against it.
    Conflict,
    /// The caller may not do it.
    Denied,
    /// The request or a setting is wrong, and will be next time too.
    Invalid,
    /// The server does not know such calls.
    Unsupported,
    /// The server failed in a way that it should not, or cannot be understood.
    Internal,
}

impl ErrorClass {
    /// Its name, as metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::Network => "network",
            ErrorClass::Timeout => "timeout",
            ErrorClass::Unavailable => "unavailable",
            ErrorClass::Overloaded => "overloaded",
            ErrorClass::Conflict => "conflict",
            ErrorClass::Denied => "denied",
            ErrorClass::Invalid => "invalid",
            ErrorClass::Unsupported => "unsupported",
            ErrorClass::Internal => "internal",
        }
    }
}

/// Why a call gave no answer.
#[derive(Clone, Debug, Error)]
pub enum ClientError {
    /// The server looked at the request and refused it; nothing changed.
    #[error("{message}")]
    Refused {
        /// The gRPC code.
        code: Code,
        /// The server's words, as etcd has them.
        message: String,
    },
    /// The request surely had no effect: no server took it up.
    #[error("{message}")]
    NotDone {
        /// What stood in the way.
        message: String,
        /// What kind of trouble that is.
        class: ErrorClass,
    },
    /// Nobody knows: the connection or the time ran out under the request.
    #[error("{message}")]
    Unknown {
        /// What happened.
        message: String,
        /// Whether the request could change anything.
        write: bool,
        /// What kind of trouble that is.
        class: ErrorClass,
    },
    /// No endpoint could be reached; nothing was sent.
    #[error("no endpoint can be reached: {}", listed(.endpoints))]
    Unreachable {
        /// Each address that was tried, with the newest reason.
        endpoints: Vec<(String, String)>,
    },
    /// This client holds the request back: its own limits are used up. Nothing
    /// was sent.
    #[error("held back by the client's own limits: {reason}")]
    Overloaded {
        /// Which limit.
        reason: &'static str,
    },
    /// The write was carried out once, by an earlier attempt, and its answer
    /// was too large to be kept.
    #[error("{message}")]
    AnswerLost {
        /// The server's words.
        message: String,
    },
    /// Another cluster answers at an endpoint. Its answer was not used; a write
    /// may have been carried out there.
    #[error("{address} belongs to cluster {actual:x}, not to {expected:x}; take it off the endpoints")]
    WrongCluster {
        /// The cluster that this client belongs to.
        expected: u64,
        /// The cluster that answered.
        actual: u64,
        /// The endpoint.
        address: String,
    },
    /// The history that a watch asked for is forgotten.
    #[error("the history before revision {compact_revision} is no longer there; read the keys anew")]
    Compacted {
        /// The oldest revision that can still be watched from.
        compact_revision: i64,
    },
    /// The server ended a watch for another reason.
    #[error("the watch was canceled: {reason}")]
    WatchCanceled {
        /// The server's words.
        reason: String,
    },
    /// There is no such lease, or it has run out.
    #[error("lease {id:x} does not exist or has run out")]
    LeaseGone {
        /// The lease.
        id: i64,
    },
    /// The server's answer cannot be understood.
    #[error("the server's answer cannot be understood: {0}")]
    Protocol(&'static str),
    /// The server does not have what was asked for; only Mainstay does.
    #[error("the server does not support {what}; Mainstay does")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// An endpoint is not an address.
    #[error(transparent)]
    BadAddress(#[from] BadAddress),
    /// The cache has no answer, or cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No endpoints were given.
    #[error("no endpoints were given")]
    NoEndpoints,
    /// An option has a value that cannot work.
    #[error("{option}: {reason}")]
    BadOption {
        /// The option, as `routing.probe_timeout`.
        option: &'static str,
        /// What is wrong with its value, and what it takes.
        reason: String,
    },
    /// A piece of metadata, such as the actor's name, is not printable ASCII.
    #[error("`{value}` cannot be sent as {name}: only printable ASCII can")]
    BadMetadata {
        /// The metadata's name.
        name: &'static str,
        /// The value.
        value: String,
    },
}

impl ClientError {
    /// Whether the same call could work if it were made again. It says nothing
    /// about whether that is safe: see [`ClientError::may_have_happened`].
    pub fn may_retry(&self) -> bool {
        use ClientError::{NotDone, Overloaded, Unknown, Unreachable, WrongCluster};
        match self {
            NotDone { .. }
            | Unknown { .. }
            | Unreachable { .. }
            | Overloaded { .. }
            | WrongCluster { .. } => true,
            ClientError::Cache(error) => error.may_retry(),
            _ => false,
        }
    }

    /// Whether the call may have changed the store. A write for which this is
    /// true is safe to repeat only if it carries a request id or is harmless
    /// twice.
    pub fn may_have_happened(&self) -> bool {
        use ClientError::{AnswerLost, Protocol, Unknown, WrongCluster};
        matches!(self, Unknown { write: true, .. } | Protocol(_) | AnswerLost { .. } | WrongCluster { .. })
    }

    /// Whether a server said that nobody leads, or somebody else than before.
    pub(super) fn is_about_the_leader(&self) -> bool {
        let (ClientError::NotDone { message, .. } | ClientError::Unknown { message, .. }) = self else {
            return false;
        };
        matches!(&message[..], "etcdserver: no leader" | "etcdserver: leader changed")
    }

    /// What kind of trouble it is.
    pub fn class(&self) -> ErrorClass {
        match self {
            ClientError::Refused { code, message } => refusal_class(*code, message),
            ClientError::NotDone { class, .. } | ClientError::Unknown { class, .. } => *class,
            ClientError::Unreachable { .. } => ErrorClass::Network,
            ClientError::Overloaded { .. } => ErrorClass::Overloaded,
            ClientError::Compacted { .. } | ClientError::LeaseGone { .. } => ErrorClass::Conflict,
            ClientError::WatchCanceled { .. } => ErrorClass::Unavailable,
            ClientError::Unsupported { .. } => ErrorClass::Unsupported,
            ClientError::Cache(error) => error.class(),
            ClientError::AnswerLost { .. } | ClientError::Protocol(_) => ErrorClass::Internal,
            ClientError::WrongCluster { .. }
            | ClientError::BadOption { .. }
            | ClientError::BadAddress(_)
            | ClientError::NoEndpoints
            | ClientError::BadMetadata { .. } => ErrorClass::Invalid,
        }
    }

    /// Whether there was no connection to send the request over.
    pub(super) fn never_left(&self) -> bool {
        matches!(self, ClientError::NotDone { class: ErrorClass::Network, .. })
    }

    /// No answer came within `limit`.
    pub(super) fn timeout(limit: Duration, write: bool) -> ClientError {
        let message = format!("no answer within {limit:?}");
        ClientError::Unknown { message, write, class: ErrorClass::Timeout }
    }

    /// The connection ended before the answer.
    pub(super) fn lost(message: &str, write: bool) -> ClientError {
        ClientError::Unknown { message: message.to_owned(), write, class: ErrorClass::Network }
    }

    /// Sorts what a call gave into what the caller can do next.
    pub(super) fn from_status(status: Status, write: bool) -> ClientError {
        let message = status.message().to_owned();
        let not_done = |class| ClientError::NotDone { message: message.clone(), class };
        if let Some(reason) = never_sent(&status) {
            return ClientError::NotDone { message: reason, class: ErrorClass::Network };
        }
        match (status.code(), &message[..]) {
            // Said by a server before it proposes.
            (Code::Unavailable, "etcdserver: no leader") => not_done(ErrorClass::Unavailable),
            (Code::ResourceExhausted, "etcdserver: too many requests") => not_done(ErrorClass::Overloaded),
            // Another member can.
            (Code::FailedPrecondition, "etcdserver: rpc not supported for learner") => {
                not_done(ErrorClass::Unavailable)
            }
            (Code::AlreadyExists, words) if words.starts_with("mainstay: the request was applied before") => {
                ClientError::AnswerLost { message }
            }
            // etcd gives what its locks and elections refuse no code of its own.
            (Code::Unknown, refusal)
                if refusal.starts_with("election: ") || refusal.starts_with("mutex: ") =>
            {
                ClientError::Refused { code: Code::Unknown, message }
            }
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted, _)
            | (Code::Unknown | Code::Internal, _) => {
                let class = doubt_class(&status);
                ClientError::Unknown { message: whole_message(&status), write, class }
            }
            (code, _) => ClientError::Refused { code, message },
        }
    }
}

fn refusal_class(code: Code, message: &str) -> ErrorClass {
    match code {
        Code::Unauthenticated | Code::PermissionDenied => ErrorClass::Denied,
        Code::ResourceExhausted => ErrorClass::Overloaded,
        Code::Unimplemented => ErrorClass::Unsupported,
        Code::FailedPrecondition | Code::NotFound | Code::AlreadyExists | Code::Unknown => {
            ErrorClass::Conflict
        }
        // etcd gives who is not let in the code of bad requests in two cases.
        Code::InvalidArgument if message.contains("authentication failed") => ErrorClass::Denied,
        Code::InvalidArgument if message == "etcdserver: revision of auth store is old" => ErrorClass::Denied,
        // etcd has one code for revisions that are gone or yet to come and for bad numbers.
        Code::OutOfRange if message.contains("revision") => ErrorClass::Conflict,
        // etcd refuses to change what is not there with the code of bad requests.
        Code::InvalidArgument if message == "etcdserver: key not found" => ErrorClass::Conflict,
        Code::InvalidArgument | Code::OutOfRange => ErrorClass::Invalid,
        _ => ErrorClass::Internal,
    }
}

/// What kind of trouble leaves a call in doubt.
fn doubt_class(status: &Status) -> ErrorClass {
    let source = std::error::Error::source(status);
    if source.is_some_and(|source| source.is::<tonic::TimeoutExpired>()) {
        return ErrorClass::Timeout;
    }
    let timed_out = ["request timed out", "deadline exceeded", "Timeout expired"];
    match status.code() {
        Code::DeadlineExceeded => ErrorClass::Timeout,
        _ if timed_out.iter().any(|words| status.message().contains(words)) => ErrorClass::Timeout,
        // A status that a server sent has no cause on this side.
        _ if source.is_some() => ErrorClass::Network,
        Code::Unavailable | Code::Cancelled | Code::Aborted => ErrorClass::Unavailable,
        _ => ErrorClass::Internal,
    }
}

/// The message with its innermost cause, which says what really happened.
fn whole_message(status: &Status) -> String {
    match root_cause(status) {
        Some(root) if root != status.message() => format!("{}: {root}", status.message()),
        _ => status.message().to_owned(),
    }
}

fn root_cause(status: &Status) -> Option<String> {
    let mut root = std::error::Error::source(status)?;
    while let Some(cause) = root.source() {
        root = cause;
    }
    Some(root.to_string())
}

fn listed(endpoints: &[(String, String)]) -> String {
    let lines: Vec<String> =
        endpoints.iter().map(|(address, reason)| format!("{address} ({reason})")).collect();
    lines.join(", ")
}

/// Why the request never left, if it did not because there was no connection.
fn never_sent(status: &Status) -> Option<String> {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return Some(root_cause(status).unwrap_or_else(|| error.to_string()));
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What servers say of a write: code, words, class, may it be retried, may it have happened.
    #[rustfmt::skip]
    const TABLE: &[(Code, &str, ErrorClass, bool, bool)] = {
        use Code::*;
        use ErrorClass as Class;
        &[
            (Unavailable, "etcdserver: no leader", Class::Unavailable, true, false),
            (ResourceExhausted, "etcdserver: too many requests", Class::Overloaded, true, false),
            (FailedPrecondition, "etcdserver: rpc not supported for learner", Class::Unavailable, true, false),
            (Unavailable, "etcdserver: leader changed", Class::Unavailable, true, true),
            (Unavailable, "etcdserver: server stopped", Class::Unavailable, true, true),
            (Unavailable, "etcdserver: unhealthy cluster", Class::Unavailable, true, true),
            (Unavailable, "etcdserver: request timed out", Class::Timeout, true, true),
            (Unavailable, "etcdserver: request timed out, possibly due to previous leader failure", Class::Timeout, true, true),
            (Unavailable, "etcdserver: request timed out, possibly due to connection lost", Class::Timeout, true, true),
            (Unavailable, "etcdserver: request timed out, leader transfer took too long", Class::Timeout, true, true),
            (DeadlineExceeded, "etcdserver: context deadline exceeded", Class::Timeout, true, true),
            (DeadlineExceeded, "", Class::Timeout, true, true),
            (Unknown, "context deadline exceeded", Class::Timeout, true, true),
            (Cancelled, "Timeout expired", Class::Timeout, true, true),
            (Unknown, "raft: stopped", Class::Internal, true, true),
            (Internal, "mainstay: internal error: a task panicked", Class::Internal, true, true),
            (Unknown, "election: no leader", Class::Conflict, false, false),
            (Unknown, "election: not leader", Class::Conflict, false, false),
            (Unknown, "mutex: session is expired", Class::Conflict, false, false),
            (OutOfRange, "etcdserver: mvcc: required revision has been compacted", Class::Conflict, false, false),
            (OutOfRange, "etcdserver: mvcc: required revision is a future revision", Class::Conflict, false, false),
            (InvalidArgument, "etcdserver: key not found", Class::Conflict, false, false),
            (NotFound, "etcdserver: requested lease not found", Class::Conflict, false, false),
            (FailedPrecondition, "etcdserver: lease already exists", Class::Conflict, false, false),
            (NotFound, "etcdserver: member not found", Class::Conflict, false, false),
            (FailedPrecondition, "etcdserver: not leader", Class::Conflict, false, false),
            (FailedPrecondition, "etcdserver: authentication is not enabled", Class::Conflict, false, false),
            (FailedPrecondition, "mainstay: session 7 is unknown or has expired; open a new one", Class::Conflict, false, false),
            (ResourceExhausted, "etcdserver: mvcc: database space exceeded", Class::Overloaded, false, false),
            (ResourceExhausted, "mainstay: too many sessions; the limit is 10000", Class::Overloaded, false, false),
            (InvalidArgument, "etcdserver: key is not provided", Class::Invalid, false, false),
            (InvalidArgument, "etcdserver: request is too large", Class::Invalid, false, false),
            (InvalidArgument, "etcdserver: duplicate key given in txn request", Class::Invalid, false, false),
            (InvalidArgument, "etcdserver: too many operations in txn request", Class::Invalid, false, false),
            (InvalidArgument, "mainstay: sequence 3 was used before with another request", Class::Invalid, false, false),
            (OutOfRange, "etcdserver: too large lease TTL", Class::Invalid, false, false),
            (Unauthenticated, "etcdserver: invalid auth token", Class::Denied, false, false),
            (PermissionDenied, "etcdserver: permission denied", Class::Denied, false, false),
            (InvalidArgument, "etcdserver: authentication failed, invalid user ID or password", Class::Denied, false, false),
            (InvalidArgument, "etcdserver: revision of auth store is old", Class::Denied, false, false),
            (Unimplemented, "unknown service mainstay.v1.Sessions", Class::Unsupported, false, false),
            (DataLoss, "etcdserver: corrupt cluster", Class::Internal, false, false),
            (AlreadyExists, "mainstay: the request was applied before, at revision 9; its reply is no longer kept",
                Class::Internal, false, true),
        ]
    };

    #[test]
    fn what_servers_say_means_this() {
        for (code, words, class, may_retry, may_have_happened) in TABLE {
            let error = ClientError::from_status(Status::new(*code, *words), true);
            let means = (error.class(), error.may_retry(), error.may_have_happened());
            assert_eq!(means, (*class, *may_retry, *may_have_happened), "{code:?} {words}");
            assert!(error.to_string().contains(words), "{error}");
            // A read never happened, and is repeated in the same cases.
            let read = ClientError::from_status(Status::new(*code, *words), false);
            assert!(!read.may_have_happened() || matches!(read, ClientError::AnswerLost { .. }), "{words}");
            assert_eq!(read.may_retry(), *may_retry, "{words}");
        }
    }

    #[test]
    fn what_happened_on_this_side_means_this() {
        let unreachable = ClientError::Unreachable { endpoints: vec![("a:1".into(), "refused".into())] };
        let wrong = ClientError::WrongCluster { expected: 1, actual: 2, address: "a:1".into() };
        let table = [
            (ClientError::timeout(Duration::from_secs(1), true), ErrorClass::Timeout, true, true),
            (ClientError::timeout(Duration::from_secs(1), false), ErrorClass::Timeout, true, false),
            (ClientError::lost("gone", true), ErrorClass::Network, true, true),
            (ClientError::Overloaded { reason: "full" }, ErrorClass::Overloaded, true, false),
            (unreachable, ErrorClass::Network, true, false),
            (wrong, ErrorClass::Invalid, true, true),
            (ClientError::LeaseGone { id: 1 }, ErrorClass::Conflict, false, false),
            (ClientError::Compacted { compact_revision: 1 }, ErrorClass::Conflict, false, false),
            (ClientError::Protocol("odd"), ErrorClass::Internal, false, true),
            (ClientError::NoEndpoints, ErrorClass::Invalid, false, false),
        ];
        for (error, class, may_retry, may_have_happened) in table {
            let means = (error.class(), error.may_retry(), error.may_have_happened());
            assert_eq!(means, (class, may_retry, may_have_happened), "{error:?}");
        }
    }

    #[test]
    fn a_broken_connection_is_of_the_network() {
        let cause = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "reset by peer");
        let error = ClientError::from_status(Status::from_error(Box::new(cause)), true);
        assert!(
            matches!(error, ClientError::Unknown { write: true, class: ErrorClass::Network, .. }),
            "{error:?}"
        );
    }

    fn answers(status: Status) -> (bool, bool) {
        let error = ClientError::from_status(status, true);
        (error.may_retry(), error.may_have_happened())
    }

    #[test]
    fn a_refusal_did_not_happen_and_would_be_refused_again() {
        assert_eq!(answers(Status::invalid_argument("etcdserver: key is not provided")), (false, false));
        assert_eq!(
            answers(Status::resource_exhausted("etcdserver: mvcc: database space exceeded")),
            (false, false)
        );
    }

    #[test]
    fn what_no_server_took_up_did_not_happen() {
        assert_eq!(answers(Status::unavailable("etcdserver: no leader")), (true, false));
        assert_eq!(answers(Status::resource_exhausted("etcdserver: too many requests")), (true, false));
    }

    #[test]
    fn doubt_stays_doubt() {
        assert_eq!(answers(Status::unavailable("etcdserver: request timed out")), (true, true));
        assert_eq!(answers(Status::unavailable("etcdserver: leader changed")), (true, true));
        for (words, is) in [("no leader", true), ("leader changed", true), ("request timed out", false)] {
            let status = Status::unavailable(format!("etcdserver: {words}"));
            assert_eq!(ClientError::from_status(status, true).is_about_the_leader(), is, "{words}");
        }
        assert_eq!(answers(Status::deadline_exceeded("")), (true, true));
        let read = ClientError::from_status(Status::unavailable("connection reset"), false);
        assert_eq!((read.may_retry(), read.may_have_happened()), (true, false));
    }

    #[tokio::test]
    async fn a_refused_connection_is_surely_not_done() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        drop(listener);
        let channel = crate::wire::channel::connect(&address, &Default::default()).expect("an address");
        let status = crate::wire::etcdserverpb::kv_client::KvClient::new(channel)
            .put(crate::wire::etcdserverpb::PutRequest::default())
            .await
            .expect_err("nobody listens");
        let error = ClientError::from_status(status, true);
        assert!(matches!(error, ClientError::NotDone { .. }), "{error:?}");
    }
}
