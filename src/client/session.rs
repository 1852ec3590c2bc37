//! Sessions: writes that may be repeated and are applied once.

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::answer::Answer;
use super::call::Call;
use super::policy::{OpenSession, WriteId};
use super::{Client, ClientError};
use crate::types::RequestId;
use crate::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::wire::etcdserverpb::{ResponseHeader, StatusRequest};
use crate::wire::mainstay_v1 as pb;
use crate::wire::mainstay_v1::sessions_client::SessionsClient;

/// A session, which deals out request ids.
///
/// ```no_run
/// # use mainstay::client::{Client, ClientError};
/// # async fn example(client: Client) -> Result<(), ClientError> {
/// let session = client.open_session(60).await?;
/// let write = session.begin();
/// write.client().put("counter", "1").await?;
/// # Ok(())
/// # }
/// ```
///
/// A client with [`RequestIds::Auto`](super::RequestIds) does this by itself; a
/// session of one's own also says which id a write has.
#[derive(Clone, Debug)]
pub struct Session {
    client: Client,
    session: Arc<OpenSession>,
}

/// One write of a session. The server keeps its reply until this is dropped
/// and a later write says so.
#[derive(Debug)]
pub struct SessionWrite {
    client: Client,
    write: WriteId,
}

impl SessionWrite {
    /// The client to make the write with. Use it for this one write, again
    /// with the same content if the outcome is unknown.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The write's request id.
    pub fn id(&self) -> RequestId {
        self.write.id
    }
}

impl Session {
    /// The session's id.
    pub fn id(&self) -> u64 {
        self.session.id
    }

    /// Seconds it lives without [`Session::renew`].
    pub fn ttl_s(&self) -> u64 {
        self.session.ttl.as_secs()
    }

    /// Begins a write.
    pub fn begin(&self) -> SessionWrite {
        let write = self.session.begin();
        SessionWrite { client: self.client.with_request_id(write.id), write }
    }

    /// Keeps the session alive for another full time to live.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it has expired; then open a new one.
    pub async fn renew(&self) -> Result<(), ClientError> {
        let request = pb::RenewRequest { session: self.session.id };
        // Renewing twice is harmless, so it may be repeated like a read.
        self.client
            .calls
            .call(Call::change().harmless_twice(), request, |channel, request| async move {
                SessionsClient::new(channel).renew(request).await
            })
            .await?;
        Ok(())
    }
}

/// A session, and who gave it.
pub(super) struct Opened {
    header: Option<ResponseHeader>,
    pub session: pb::OpenResponse,
}

impl Answer for Opened {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header.as_ref()
    }
}

/// Opens a session where it is first asked which cluster that is: in another one
/// the same id may be somebody else's, whose writes ours would be taken for.
pub(super) async fn open(
    channel: Channel,
    request: Request<pb::OpenRequest>,
) -> Result<Response<Opened>, Status> {
    let status = MaintenanceClient::new(channel.clone()).status(StatusRequest {}).await?.into_inner();
    let session = SessionsClient::new(channel).open(request).await?.into_inner();
    Ok(Response::new(Opened { header: status.header, session }))
}

impl Client {
    /// Opens a session that lives `ttl_s` seconds without being renewed; 0
    /// lets the server choose.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open_session(&self, ttl_s: u64) -> Result<Session, ClientError> {
        // A session that was opened in vain expires by itself, so opening may
        // be repeated like a read.
        let asked_at = self.calls.env().monotonic();
        let call = Call::change().harmless_twice();
        let Opened { session: response, .. } = self.calls.call(call, pb::OpenRequest { ttl_s }, open).await?;
        let ttl = Duration::from_secs(response.ttl_s);
        Ok(Session { client: self.clone(), session: OpenSession::new(response.session, ttl, asked_at) })
    }
}
