//! Which service answers a request. Nearly all requests are calls of KV, and those
//! go straight to it; everything else finds its way through the router, whose
//! layers and boxes cost some microseconds each time.

use std::convert::Infallible;

use axum::Router;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tonic::server::NamedService;
use tower::Service;

use super::context::Remote;
use super::kv::KvService;
use super::requests::CountRequests;
use crate::wire::etcdserverpb::kv_server::KvServer;

/// The body of an answer.
pub(super) type AnswerBody = Either<tonic::body::Body, axum::body::Body>;

/// Everything that one port serves.
#[derive(Clone)]
pub(super) struct Front {
    kv: Option<(KvServer<KvService>, CountRequests)>,
    router: Router,
}

impl Front {
    /// The client port. `router` has no KV.
    pub(super) fn client(kv: KvServer<KvService>, counts: CountRequests, router: Router) -> Front {
        Front { kv: Some((kv, counts)), router }
    }

    /// A port without KV.
    pub(super) fn peer(router: Router) -> Front {
        Front { kv: None, router }
    }

    /// Answers a request that came from `remote`.
    pub(super) async fn answer(
        self,
        mut request: Request<Incoming>,
        remote: Remote,
    ) -> Result<Response<AnswerBody>, Infallible> {
        request.extensions_mut().insert(remote);
        let Front { kv, mut router } = self;
        match kv {
            Some((mut kv, counts)) if is_call_of(KvServer::<KvService>::NAME, request.uri().path()) => {
                let path = request.uri().path().to_owned();
                Ok(counts.count(path, kv.call(request)).await?.map(Either::Left))
            }
            // Boxed, so that its size is not every request's.
            _ => Ok(Box::pin(router.call(request)).await?.map(Either::Right)),
        }
    }
}

/// Whether `path` is that of a method of `service`.
fn is_call_of(service: &str, path: &str) -> bool {
    let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    method.is_some_and(|method| method.starts_with('/'))
}
