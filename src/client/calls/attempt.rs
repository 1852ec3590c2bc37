//! One attempt of a call: the choice of its endpoint, its message, its limit, and
//! what its outcome says about the endpoint and to the calls after it.

use std::future::Future;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::{Calls, stamp};
use crate::client::answer::Answer;
use crate::client::call::{Call, Limit};
use crate::client::policy::WriteId;
use crate::client::routing::Route;
use crate::client::trace::Attempt;
use crate::client::trail::Trail;
use crate::client::{ClientError, ErrorClass};
use crate::telemetry;

/// An attempt without an answer.
pub(in crate::client) struct Failure {
    pub error: ClientError,
    pub address: String,
    /// What the server said about trying again.
    pub(super) pushback: Option<Pushback>,
}

/// A server's word on when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushback {
    After(Duration),
    Never,
}

impl Calls {
    /// One attempt; of a read, if that is on and it takes long, a second one beside it.
    pub(super) async fn attempt<M, R, F>(
        &self,
        call: &Call,
        message: &M,
        send: &impl Fn(Channel, Request<M>) -> F,
        limit: Option<Duration>,
        id: Option<&WriteId>,
        trail: &mut Trail,
    ) -> Result<(R, Route), Failure>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let route = self.pick(call, trail);
        let hedge = self.shared.options.hedge.filter(|_| call.is_plain_read());
        let Some(delay) = hedge.and_then(|hedge| self.shared.experience.hedge_delay(hedge)) else {
            return self.once(call, route, message.clone(), send, limit, id).await;
        };
        let first_address = route.address().to_owned();
        let first = self.once(call, route, message.clone(), send, limit, id);
        tokio::pin!(first);
        tokio::select! {
            biased;
            answer = &mut first => return answer,
            () = tokio::time::sleep(delay) => {}
        }
        let route = self.pick(call, trail);
        if route.address() == first_address || !self.shared.experience.pay_for_hedge() {
            return first.await;
        }
        metrics::counter!(telemetry::CLIENT_HEDGES).increment(1);
        tracing::debug!(address = route.address(), ?delay, "asking a second endpoint as well");
        let rest = limit.map(|limit| limit.saturating_sub(delay));
        let second = self.once(call, route, message.clone(), send, rest, id);
        tokio::pin!(second);
        // The first answer wins; a failure waits for the other.
        let failure = tokio::select! {
            answer = &mut first => match answer {
                Ok(answer) => return Ok(answer),
                Err(failure) => { trail.add(failure); second.await }
            },
            answer = &mut second => match answer {
                Ok(answer) => return Ok(answer),
                Err(failure) => { trail.add(failure); first.await }
            },
        };
        failure
    }

    fn pick(&self, call: &Call, trail: &mut Trail) -> Route {
        let route = self.shared.router.pick(call.kind, call.key.as_deref(), trail.tried());
        trail.visit(route.address());
        route
    }

    /// One message to one endpoint, and what its outcome says about the endpoint.
    async fn once<M, R, F>(
        &self,
        call: &Call,
        route: Route,
        message: M,
        send: &impl Fn(Channel, Request<M>) -> F,
        limit: Option<Duration>,
        id: Option<&WriteId>,
    ) -> Result<(R, Route), Failure>
    where
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        if let Some(error) = route.refusal() {
            return Err(Failure { error, address: route.address().to_owned(), pushback: None });
        }
        let mut request = self.request(message);
        if let Some(id) = id {
            stamp(request.metadata_mut(), id.id);
        }
        // The time of a stream's opening must not travel: it would end the stream.
        if let Some(limit) = limit.filter(|_| call.limit == Limit::Request) {
            request.set_timeout(limit);
        }
        if call.limit == Limit::None {
            route.is_waiting();
        }
        let sent_at = self.shared.env.monotonic();
        let sent = send(route.channel(), request);
        let answer = match limit {
            None => Some(sent.await),
            Some(limit) => tokio::time::timeout(limit, sent).await.ok(),
        };
        let time = self.shared.env.monotonic().saturating_sub(sent_at);
        let (error, pushback) = match answer {
            Some(Ok(response)) => {
                let answer = response.into_inner();
                match self.check(&answer, &route) {
                    Ok(()) => {
                        self.note_answer(call, &route, time, sent_at, id);
                        self.write_down(call, &route, time, None);
                        return Ok((answer, route));
                    }
                    Err(error) => (error, None),
                }
            }
            Some(Err(status)) => {
                let pushback = pushback(&status);
                (ClientError::from_status(status, call.writes()), pushback)
            }
            None => (ClientError::timeout(limit.unwrap_or_default(), call.writes()), None),
        };
        self.note_failure(call, &route, &error, pushback);
        self.write_down(call, &route, time, Some(&error));
        Err(Failure { error, address: route.address().to_owned(), pushback })
    }

    fn note_answer(
        &self,
        call: &Call,
        route: &Route,
        time: Duration,
        sent_at: Duration,
        id: Option<&WriteId>,
    ) {
        route.worked();
        if let Some(id) = id {
            id.was_alive(sent_at);
        }
        self.shared.experience.worked(call.is_plain_read().then_some(time));
        if call.limit == Limit::Request {
            self.shared.gate.worked();
        }
        metrics::counter!(telemetry::CLIENT_ATTEMPTS, "kind" => call.kind_name(), "class" => "ok")
            .increment(1);
    }

    fn write_down(&self, call: &Call, route: &Route, time: Duration, error: Option<&ClientError>) {
        if let Some(trace) = &self.trace {
            let (address, key) = (route.address().to_owned(), call.key.clone());
            trace.add(Attempt { address, kind: call.kind, key, time, error: error.cloned() });
        }
    }

    fn note_failure(&self, call: &Call, route: &Route, error: &ClientError, pushback: Option<Pushback>) {
        let class = error.class();
        metrics::counter!(telemetry::CLIENT_ATTEMPTS, "kind" => call.kind_name(), "class" => class.name())
            .increment(1);
        tracing::debug!(address = route.address(), %error, class = class.name(), "an attempt failed");
        if pushback.is_some() || (class == ErrorClass::Overloaded && error.may_retry()) {
            self.shared.gate.pushed_back();
        }
        match error.may_retry() {
            // One that has too much to do is not sick.
            true if class == ErrorClass::Overloaded => {}
            true => {
                // Said of the leader; whoever leads next is to be found out.
                if error.is_about_the_leader() {
                    route.leader_lost();
                }
                route.failed();
            }
            false => route.worked(),
        }
    }
}

/// gRPC's word for it: milliseconds to wait; anything else means not to try again.
fn pushback(status: &Status) -> Option<Pushback> {
    let value = status.metadata().get("grpc-retry-pushback-ms")?;
    let ms = value.to_str().ok().and_then(|text| text.parse::<u32>().ok());
    Some(ms.map_or(Pushback::Never, |ms| Pushback::After(Duration::from_millis(u64::from(ms)))))
}
