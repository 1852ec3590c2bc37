//! Whom a fault hits.

use anyhow::ensure;
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::leader_or_any;
use crate::context::Context;

/// How many, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// Any member, every other time the leader.
    One,
    Leader,
    /// So few that the others have a quorum, every other time with the leader.
    Minority,
    /// So many that the others have none, every other time with the leader.
    Majority,
    All,
}

impl Whom {
    /// Draws hosts among the members.
    ///
    /// # Errors
    /// When there are too few members.
    pub async fn draw(self, context: &Context, rng: &mut StdRng) -> anyhow::Result<Vec<usize>> {
        let mut members = context.hosts.members();
        // Drawn in every case, so that what is drawn later does not depend on who leads.
        members.shuffle(rng);
        let with_leader = rng.random_bool(0.5) || self == Whom::Leader;
        let count = match self {
            Whom::One | Whom::Leader => 1,
            Whom::Minority => members.len().saturating_sub(1) / 2,
            Whom::Majority => members.len() / 2 + 1,
            Whom::All => members.len(),
        };
        ensure!((1..=members.len()).contains(&count), "{self:?} of {} members", members.len());
        if with_leader && self != Whom::All {
            let leader = leader_or_any(context, &members).await;
            members.retain(|member| *member != leader);
            members.insert(0, leader);
        }
        members.truncate(count);
        members.sort_unstable();
        Ok(members)
    }
}
