//! Auth, which is off: status says so, and everything that needs it on answers
//! as etcd does then. What would prepare or turn it on says that it cannot,
//! rather than pretend to protect anything.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::context::{Rpc, Shared};
use super::error::ServeError;
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::auth_server::Auth;

/// The Auth service.
pub(crate) struct AuthService {
    shared: Arc<Shared>,
}

impl AuthService {
    pub(crate) fn new(shared: Arc<Shared>) -> AuthService {
        AuthService { shared }
    }

    fn not_enabled<Q, A>(&self, request: &Request<Q>) -> Result<Response<A>, Status> {
        self.shared.caller(request, Rpc::Member)?;
        Err(ServeError::AuthNotEnabled.into())
    }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        request: Request<pb::AuthEnableRequest>,
    ) -> Result<Response<pb::AuthEnableResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        Err(ServeError::NotSupported { what: "authentication" }.into())
    }

    // etcd answers a disable of what is off with success.
    async fn auth_disable(
        &self,
        request: Request<pb::AuthDisableRequest>,
    ) -> Result<Response<pb::AuthDisableResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        Ok(Response::new(pb::AuthDisableResponse { header: Some(self.shared.header_now()) }))
    }

    async fn auth_status(
        &self,
        request: Request<pb::AuthStatusRequest>,
    ) -> Result<Response<pb::AuthStatusResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        // 1 is the revision of an auth store that was never changed.
        let response = pb::AuthStatusResponse {
            header: Some(self.shared.header_now()),
            enabled: false,
            auth_revision: 1,
        };
        Ok(Response::new(response))
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_add(
        &self,
        request: Request<pb::AuthUserAddRequest>,
    ) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_get(
        &self,
        request: Request<pb::AuthUserGetRequest>,
    ) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_list(
        &self,
        request: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_delete(
        &self,
        request: Request<pb::AuthUserDeleteRequest>,
    ) -> Result<Response<pb::AuthUserDeleteResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_change_password(
        &self,
        request: Request<pb::AuthUserChangePasswordRequest>,
    ) -> Result<Response<pb::AuthUserChangePasswordResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_grant_role(
        &self,
        request: Request<pb::AuthUserGrantRoleRequest>,
    ) -> Result<Response<pb::AuthUserGrantRoleResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn user_revoke_role(
        &self,
        request: Request<pb::AuthUserRevokeRoleRequest>,
    ) -> Result<Response<pb::AuthUserRevokeRoleResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_add(
        &self,
        request: Request<pb::AuthRoleAddRequest>,
    ) -> Result<Response<pb::AuthRoleAddResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_get(
        &self,
        request: Request<pb::AuthRoleGetRequest>,
    ) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_list(
        &self,
        request: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_delete(
        &self,
        request: Request<pb::AuthRoleDeleteRequest>,
    ) -> Result<Response<pb::AuthRoleDeleteResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_grant_permission(
        &self,
        request: Request<pb::AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<pb::AuthRoleGrantPermissionResponse>, Status> {
        self.not_enabled(&request)
    }

    async fn role_revoke_permission(
        &self,
        request: Request<pb::AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<pb::AuthRoleRevokePermissionResponse>, Status> {
        self.not_enabled(&request)
    }
}
