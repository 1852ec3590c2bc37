//! Why a call gave no answer, and the two questions a caller has then: may I
//! try again, and may it have happened?

use thiserror::Error;
use tonic::{Code, Status};

use super::cache::CacheError;
use crate::wire::channel::BadAddress;

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
    },
    /// Nobody knows: the connection or the time ran out under the request.
    #[error("{message}")]
    Unknown {
        /// What happened.
        message: String,
        /// Whether the request could change anything.
        write: bool,
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
    /// An endpoint is not an address.
    #[error(transparent)]
    BadAddress(#[from] BadAddress),
    /// The cache has no answer, or cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No endpoints were given.
    #[error("no endpoints were given")]
    NoEndpoints,
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
        match self {
            ClientError::NotDone { .. } | ClientError::Unknown { .. } => true,
            ClientError::Cache(error) => error.may_retry(),
            _ => false,
        }
    }

    /// Whether the call may have changed the store. A write for which this is
    /// true is safe to repeat only if it carries a request id or is harmless
    /// twice.
    pub fn may_have_happened(&self) -> bool {
        matches!(self, ClientError::Unknown { write: true, .. } | ClientError::Protocol(_))
    }

    /// Sorts what a call gave into what the caller can do next.
    pub(super) fn from_status(status: Status, write: bool) -> ClientError {
        let message = status.message().to_owned();
        if never_sent(&status) {
            return ClientError::NotDone { message };
        }
        match (status.code(), &message[..]) {
            // Said by a server before it proposes.
            (Code::Unavailable, "etcdserver: no leader")
            | (Code::ResourceExhausted, "etcdserver: too many requests") => ClientError::NotDone { message },
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted, _)
            | (Code::Unknown | Code::Internal, _) => ClientError::Unknown { message, write },
            (code, _) => ClientError::Refused { code, message },
        }
    }
}

/// Whether the request never left, because there was no connection.
fn never_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
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
