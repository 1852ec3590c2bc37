//! Which service answers a request. Nearly all requests are calls of KV, and those
//! go straight to it; so do watches, which pass all they say through what lies
//! between. Everything else finds its way through the router, whose layers and
//! boxes cost some microseconds each time.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tonic::server::NamedService;
use tower::Service;

use super::context::Remote;
use super::kv::KvService;
use super::requests::CountRequests;
use super::watch::WatchService;
use crate::wire::etcdserverpb::kv_server::KvServer;

/// The body of an answer.
pub(super) type AnswerBody = Either<tonic::body::Body, axum::body::Body>;

/// Everything that one port serves.
pub(super) struct Front {
    direct: Option<Direct>,
    router: Router,
}

/// What is served without the router.
pub(super) struct Direct {
    pub kv: KvServer<KvService>,
    pub watch: WatchService,
    pub counts: CountRequests,
}

impl Front {
    /// The client port. `router` has nothing of `direct`.
    pub(super) fn client(direct: Direct, router: Router) -> Front {
        Front { direct: Some(direct), router }
    }

    /// The peer port.
    pub(super) fn peer(router: Router) -> Front {
        Front { direct: None, router }
    }

    /// Answers a request that came from `remote`.
    pub(super) async fn answer(
        self: Arc<Front>,
        mut request: Request<Incoming>,
        remote: Remote,
    ) -> Result<Response<AnswerBody>, Infallible> {
        request.extensions_mut().insert(remote);
        let path = request.uri().path();
        match &self.direct {
            Some(Direct { kv, counts, .. }) if is_call_of(KvServer::<KvService>::NAME, path) => {
                let path = path.to_owned();
                Ok(counts.count(path, kv.clone().call(request)).await?.map(Either::Left))
            }
            Some(Direct { watch, counts, .. }) if is_call_of(WatchService::NAME, path) => {
                let path = path.to_owned();
                Ok(counts.count(path, watch.clone().call(request)).await?.map(Either::Left))
            }
            // Boxed, so that its size is not every request's.
            _ => Ok(Box::pin(self.router.clone().call(request)).await?.map(Either::Right)),
        }
    }
}

/// Whether `path` is that of a method of `service`.
fn is_call_of(service: &str, path: &str) -> bool {
    let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    method.is_some_and(|method| method.starts_with('/'))
}
