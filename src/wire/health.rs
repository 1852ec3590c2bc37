//! gRPC's own health service, `grpc.health.v1`, as far as a client asks it. The
//! server's side comes from a crate that the SDK does without.

use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::codec::Codec;

/// Which service is asked about.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HealthCheckRequest {
    /// Its full name; empty for the whole server.
    #[prost(string, tag = "1")]
    pub service: String,
}

/// How it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HealthCheckResponse {
    /// One of [`ServingStatus`].
    #[prost(enumeration = "ServingStatus", tag = "1")]
    pub status: i32,
}

/// Whether a service serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ServingStatus {
    /// Nobody knows.
    Unknown = 0,
    /// It does.
    Serving = 1,
    /// It does not.
    NotServing = 2,
    /// There is no such service; only in answers to `Watch`.
    ServiceUnknown = 3,
}

/// Asks how a service is; an empty name stands for the whole server.
///
/// # Errors
/// The server's: `NotFound` if it does not know the service, `Unimplemented` if
/// it tells nobody its health.
pub async fn check(channel: Channel, service: &str) -> Result<ServingStatus, Status> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = Request::new(HealthCheckRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec: Codec<HealthCheckRequest, HealthCheckResponse> = Codec::default();
    let response = grpc.unary(request, path, codec).await?;
    Ok(response.into_inner().status())
}
