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
        matches!(
            self,
            NotDone { .. } | Unknown { .. } | Unreachable { .. } | Overloaded { .. } | WrongCluster { .. }
        )
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
            ClientError::Cache(_) => ErrorClass::Internal,
            ClientError::AnswerLost { .. } | ClientError::Protocol(_) => ErrorClass::Internal,
            ClientError::WrongCluster { .. }
            | ClientError::BadOption { .. }
            | ClientError::BadAddress(_)
            | ClientError::NoEndpoints
            | ClientError::BadMetadata { .. } => ErrorClass::Invalid,
        }
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
            (Code::AlreadyExists, _) if write => ClientError::AnswerLost { message },
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
