//! Health as `grpc.health.v1` tells it: serving while there is a leader to serve
//! with, the members agree, and the node is not stopping.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::context::Shared;
use crate::types::AlarmKind;

/// How often alarms are looked at; a change of the leader is told at once.
const LOOK: Duration = Duration::from_millis(100);

/// The name that stands for the whole server.
const WHOLE: &str = "";

/// Keeps health as it is, until the server stops.
pub(super) async fn run(shared: Arc<Shared>, reporter: HealthReporter, services: Vec<&'static str>) {
    let mut leader = shared.node.leader_changes();
    let mut told = None;
    loop {
        let now = status(&shared);
        if told != Some(now) {
            tracing::info!(status = %now, "health");
            report(&reporter, &services, now).await;
            told = Some(now);
        }
        tokio::select! {
            _ = leader.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
            () = shared.stopping.cancelled() => break,
        }
    }
    report(&reporter, &services, ServingStatus::NotServing).await;
}

fn status(shared: &Shared) -> ServingStatus {
    let corrupt = shared.node.view().alarms.iter().any(|alarm| alarm.kind == AlarmKind::Corrupt);
    match shared.node.leadership().leader != 0 && !corrupt {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    }
}

async fn report(reporter: &HealthReporter, services: &[&'static str], status: ServingStatus) {
    for service in std::iter::once(&WHOLE).chain(services) {
        reporter.set_service_status(*service, status).await;
    }
}
