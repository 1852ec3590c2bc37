//! Asking endpoints how they are, again and again, and whether the leader still
//! leads.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;

use super::discovery::spread;
use super::*;

/// Checks until the router is gone.
pub(super) async fn run(router: Weak<Router>, interval: Duration) {
    loop {
        let Some(strong) = router.upgrade() else { return };
        strong.check_health().await;
        let wait = spread(interval, strong.env.random_u64());
        drop(strong);
        tokio::time::sleep(wait).await;
    }
}

impl Router {
    /// Asks every endpoint once.
    pub(super) async fn check_health(&self) {
        let set = self.set.load_full();
        let checks = set.entries().iter().filter(|entry| entry.foreign.is_none()).map(|entry| async {
            let answer = self.ask.health(entry.endpoint.clone());
            let limit = self.options.probe_timeout;
            let health = tokio::time::timeout(limit, answer).await.unwrap_or(EndpointHealth::Unreachable);
            entry.endpoint.set_health(health)
        });
        let (news, ()) = futures_util::join!(join_all(checks), self.check_leader(&set));
        if news.contains(&true) {
            self.judge();
        }
    }

    /// Has the leader looked for when it no longer says that it leads: a leader
    /// that was moved still takes every call, so that no call would tell.
    async fn check_leader(&self, set: &EndpointSet) {
        let leader = self.leader.load(Ordering::Relaxed);
        let Some(entry) = set.entries().iter().find(|entry| leader != 0 && entry.member.id == leader) else {
            return;
        };
        let answer = self.ask.identity(entry.endpoint.clone());
        let identity = tokio::time::timeout(self.options.probe_timeout, answer).await.ok().flatten();
        if identity.is_none_or(|who| who.leader != leader) {
            self.forget_leader(leader);
        }
    }
}
