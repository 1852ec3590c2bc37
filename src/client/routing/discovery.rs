//! Finding the members and their leader, again and again.
//!
//! A round asks every endpoint who it is, one of them for the members, and each
//! member's addresses who answers there. An address from a member list is used
//! only after the right member has answered there: what a member tells may be
//! good only in its own network. Addresses that were given stay: as a member's
//! endpoint if that is who answers and there is no other way to it, and
//! otherwise as a spare, for when no member can be used.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;

use super::ask::{Identity, Listed};
use super::set::Member;
use super::*;

/// The least time between two rounds, however much fails.
pub(super) const ROUNDS_APART: Duration = Duration::from_secs(1);
/// The most addresses that are tried in a round beside those known already.
const NEW_ADDRESSES_MAX: usize = 256;

/// Discovers until the router is gone.
pub(super) async fn run(router: Weak<Router>, interval: Duration) {
    let mut incomplete = 0u32;
    loop {
        let Some(strong) = router.upgrade() else { return };
        let is_complete = strong.discover().await;
        strong.rounds.send_modify(|rounds| *rounds += 1);
        if is_complete {
            incomplete = 0;
        } else {
            incomplete = incomplete.saturating_add(1);
            metrics::counter!(telemetry::CLIENT_DISCOVERY_FAILURES).increment(1);
        }
        let wait = match incomplete {
            0 => spread(interval, strong.env.random_u64()),
            // Sooner while the members or the leader are not known, but less and less so.
            rounds => ROUNDS_APART.saturating_mul(1 << rounds.min(10)).min(interval),
        };
        let wake = strong.wake.clone();
        drop(strong);
        tokio::time::sleep(ROUNDS_APART).await;
        tokio::select! {
            () = tokio::time::sleep(wait.saturating_sub(ROUNDS_APART)) => {}
            () = wake.notified() => {}
        }
    }
}

/// The interval, give or take a tenth, so that clients do not ask all at once.
pub(super) fn spread(interval: Duration, random: u64) -> Duration {
    let part = f64::from(random as u32) / f64::from(u32::MAX);
    interval.mul_f64(0.9 + 0.2 * part)
}

/// An endpoint, and who answered there in this round.
struct Found {
    endpoint: Arc<Endpoint>,
    identity: Option<Identity>,
}

impl Router {
    /// One round. Returns whether members and leader are known by it.
    pub(super) async fn discover(&self) -> bool {
        let before = self.set.load_full();
        let endpoints = before.entries().iter().map(|entry| entry.endpoint.clone());
        let mut found = self.identify(endpoints).await;
        let Some(first) = found.iter().find_map(|found| found.identity) else { return false };
        let cluster = self.pin_cluster(first.cluster);
        let said_to_lead = leader(&found, cluster);
        let Some(listed) = self.list(&found, cluster, said_to_lead).await else {
            self.follow(said_to_lead, &found, cluster);
            let kept = before.entries().iter().zip(&found);
            let entries = kept.map(|(entry, found)| found.kept(entry, cluster, &self.options)).collect();
            self.replace(EndpointSet::new(entries, &self.options));
            return false;
        };
        let unknown = unknown_addresses(&listed, &found);
        let opened = unknown.iter().filter_map(|address| self.open(address).ok());
        found.extend(self.identify(opened).await);
        let leader = self.follow(said_to_lead, &found, cluster);
        let read_only = self.read_only(&listed, &found, cluster).await;
        let entries = assemble(&self.options, before.entries(), &listed, &read_only, &found, cluster);
        self.replace(EndpointSet::new(entries, &self.options));
        leader != 0
    }

    /// Takes over who leads, if that member answers and says so itself: for an election's
    /// time the others still name one that is dead. Gives 0 otherwise.
    fn follow(&self, leader: u64, found: &[Found], cluster: u64) -> u64 {
        let leads = |found: &Found| {
            found.is(leader, cluster) && found.identity.is_some_and(|who| who.leader == leader)
        };
        let leader = if found.iter().any(leads) { leader } else { 0 };
        self.leader.store(leader, Ordering::Relaxed);
        leader
    }

    fn open(&self, address: &str) -> Result<Arc<Endpoint>, ClientError> {
        let endpoint = Endpoint::new(address, false, &self.channel_options, self.options.ejection)?;
        Ok(Arc::new(endpoint))
    }

    /// Asks them all at once who they are.
    async fn identify(&self, endpoints: impl Iterator<Item = Arc<Endpoint>>) -> Vec<Found> {
        let ask = |endpoint: Arc<Endpoint>| async {
            let answer = self.ask.identity(endpoint.clone());
            let identity = tokio::time::timeout(self.options.probe_timeout, answer).await.ok().flatten();
            Found { endpoint, identity }
        };
        join_all(endpoints.map(ask)).await
    }

    /// The members as one endpoint knows them: the leader if possible, which is
    /// never behind.
    async fn list(&self, found: &[Found], cluster: u64, leader: u64) -> Option<Vec<Listed>> {
        let ours = |found: &&Found| found.identity.is_some_and(|who| who.cluster == cluster);
        let mut order: Vec<&Found> = found.iter().filter(ours).collect();
        order.sort_by_key(|found| found.identity.is_none_or(|who| who.member != leader));
        for found in order {
            let answer = self.ask.members(found.endpoint.clone());
            if let Ok(Some(listed)) = tokio::time::timeout(self.options.probe_timeout, answer).await
                && !listed.is_empty()
            {
                return Some(listed);
            }
        }
        None
    }

    /// The learners that take serializable reads only.
    async fn read_only(&self, listed: &[Listed], found: &[Found], cluster: u64) -> Vec<u64> {
        let learners = listed.iter().filter(|member| member.is_learner);
        let asked = learners.map(|member| async {
            let Some(found) = found.iter().find(|found| found.is(member.id, cluster)) else {
                return Some(member.id);
            };
            let answer = self.ask.serves_as_learner(found.endpoint.clone());
            let serves = tokio::time::timeout(self.options.probe_timeout, answer).await.unwrap_or(false);
            (!serves).then_some(member.id)
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Puts a new set in the place of the current one, if it differs.
    fn replace(&self, set: EndpointSet) {
        let before = self.set.load_full();
        for Entry { endpoint, foreign, .. } in set.entries() {
            let was_foreign = endpoint.health() == EndpointHealth::WrongCluster;
            if let Some(cluster) = foreign.filter(|_| !was_foreign) {
                endpoint.set_health(EndpointHealth::WrongCluster);
                tracing::warn!(
                    endpoint = endpoint.address(),
                    cluster,
                    "another cluster answers there; it is not used"
                );
            } else if foreign.is_none() && was_foreign {
                endpoint.set_health(EndpointHealth::Unknown);
            }
        }
        if set.is_like(&before) {
            return;
        }
        let names = |set: &EndpointSet| -> Vec<String> {
            set.entries().iter().map(|entry| entry.endpoint.address().to_owned()).collect()
        };
        tracing::info!(endpoints = ?names(&set), "the endpoints have changed");
        {
            let _nobody_judges = self.judging.lock();
            self.set.store(Arc::new(set));
        }
        for entry in before.entries() {
            // Those that are gone must not stand as left out for ever.
            let address = entry.endpoint.address().to_owned();
            metrics::gauge!(telemetry::CLIENT_ENDPOINT_EJECTED, "endpoint" => address).set(0.0);
            entry.endpoint.set_ejected(false);
        }
        self.judge();
    }
}

impl Found {
    /// Whether that member of our cluster answered there.
    fn is(&self, member: u64, cluster: u64) -> bool {
        self.identity.is_some_and(|who| who.member == member && who.cluster == cluster)
    }

    /// The other cluster that answered there, or did when `before` was found out
    /// and nobody has answered since.
    fn foreign(&self, before: Option<&Entry>, cluster: u64) -> Option<u64> {
        match self.identity {
            Some(who) => Some(who.cluster).filter(|actual| *actual != cluster),
            None => before.and_then(|entry| entry.foreign),
        }
    }

    /// Its entry when the members are not known: as it was, unless another
    /// cluster answered there.
    fn kept(&self, before: &Entry, cluster: u64, options: &RoutingOptions) -> Entry {
        match self.foreign(Some(before), cluster) {
            Some(actual) => Entry::foreign(self.endpoint.clone(), actual, options),
            None if before.foreign.is_some() => {
                Entry::new(self.endpoint.clone(), Member::default(), true, options)
            }
            None => before.clone(),
        }
    }

    fn is_at(&self, member: &Listed) -> bool {
        member.client_urls.iter().any(|url| same_address(url, self.endpoint.address()))
    }
}

/// The leader by those who know best; 0 when nobody knows.
fn leader(found: &[Found], cluster: u64) -> u64 {
    let answers = found.iter().filter_map(|found| found.identity).filter(|who| who.cluster == cluster);
    answers.filter(|who| who.leader != 0).max_by_key(|who| who.term).map_or(0, |who| who.leader)
}

/// The members' addresses that are no endpoints yet.
fn unknown_addresses(listed: &[Listed], found: &[Found]) -> Vec<String> {
    let urls = listed.iter().flat_map(|member| &member.client_urls);
    let is_known = |url: &str| found.iter().any(|found| same_address(found.endpoint.address(), url));
    let mut unknown: Vec<String> = urls.filter(|url| !is_known(url)).cloned().collect();
    unknown.sort();
    unknown.dedup();
    unknown.truncate(NEW_ADDRESSES_MAX);
    unknown
}

/// The endpoints by what a round has found out.
fn assemble(
    options: &RoutingOptions,
    before: &[Entry],
    listed: &[Listed],
    read_only: &[u64],
    found: &[Found],
    cluster: u64,
) -> Vec<Entry> {
    let was = |found: &Found| before.iter().find(|entry| Arc::ptr_eq(&entry.endpoint, &found.endpoint));
    let mut taken: Vec<&Found> = Vec::new();
    let mut entries: Vec<Entry> = Vec::new();
    let mut members: Vec<&Listed> = listed.iter().collect();
    members.sort_by_key(|member| member.id);
    for member in members {
        let silent = |found: &&Found| found.identity.is_none();
        let ways = [
            found.iter().find(|found| found.is(member.id, cluster) && found.is_at(member)),
            found.iter().find(|found| found.is(member.id, cluster)),
            // It is away, and was here before, or a person says that it is here.
            found.iter().filter(silent).find(|found| {
                was(found).is_some_and(|entry| entry.member.id == member.id)
                    || (found.is_at(member) && found.endpoint.is_given())
            }),
        ];
        let Some(way) =
            ways.into_iter().flatten().find(|way| taken.iter().all(|one| !std::ptr::eq(*one, *way)))
        else {
            continue;
        };
        taken.push(way);
        let is_read_only = read_only.contains(&member.id);
        let member = Member { id: member.id, name: member.name.clone(), is_read_only };
        entries.push(Entry::new(way.endpoint.clone(), member, false, options));
    }
    for rest in found {
        if !rest.endpoint.is_given() || taken.iter().any(|one| std::ptr::eq(*one, rest)) {
            continue;
        }
        entries.push(match rest.foreign(was(rest), cluster) {
            Some(actual) => Entry::foreign(rest.endpoint.clone(), actual, options),
            None => Entry::new(rest.endpoint.clone(), Member::default(), true, options),
        });
    }
    entries
}
