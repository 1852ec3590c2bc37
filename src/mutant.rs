//! Twelve deliberate bugs, for proving that the harness finds bugs.
//!
//! With the feature `mutants`, which no product is built with, one of them is
//! chosen when the process starts, by the variable [`VARIABLE`]; without a
//! choice the build behaves as the product does. Without the feature every
//! question here is a constant `false`, so nothing of it is compiled, and the
//! variable is refused like any other that is not a setting.
//!
//! A bug stands where a real one would stand, as one `if mutant::is(..)`. The
//! two that need more than a condition keep the rest in a file of their own,
//! compiled with the feature only (`raft/early.rs`, `node/paused.rs`).
//!
//! Of each: where it stands and what is broken; which workload and fault show it;
//! which claim it breaks.
//!
//! - **`log-not-synced`** `storage/log/segments.rs`: entries are written and not synced. *Shown by* set,
//!   register × power failure of all, or of a majority. *Breaks:* no acknowledged write is lost.
//! - **`vote-not-synced`** `storage/log/segments.rs`: a vote stays in memory and is not written.
//!   *Shown by* register × power failure or kill of all. *Breaks:* linearizability, every write has a
//!   revision of its own, writes flow after healing: terms begin anew below the log's.
//! - **`read-without-read-index`** `node/read.rs`: a linearizable read is answered from the local view.
//!   *Shown by* register × none (readers on followers), partitions. *Breaks:* linearizability.
//! - **`lease-read-trusting-paused-clock`** `node/read.rs`: the leader answers reads by a lease whose
//!   clock stands still while the process is stopped. *Shown by* register × pause of the leader, with
//!   more than one endpoint written to. *Breaks:* linearizability (a stale read just after the leader
//!   goes on).
//! - **`ack-before-quorum`** `raft/replication.rs`: an append counts as replicated once it is sent.
//!   *Shown by* set, register × leader alone, kill or power failure of the leader. *Breaks:* no
//!   acknowledged write is lost; linearizability.
//! - **`replay-not-idempotent`** `machine/state.rs`: the mark of what is applied falls behind the state
//!   it is written with. *Shown by* mixed KV × kill or rolling restart, with snapshots or a clean stop,
//!   which flush the state. *Breaks:* members are equal; replay in revision order.
//! - **`watch-skips-on-resume`** `watch/stream.rs`: a watcher that starts in the past begins one
//!   revision late. *Shown by* watch × anything that makes watchers reconnect. *Breaks:* a watch has no
//!   gap.
//! - **`progress-before-events`** `watch/stream.rs`: a request for progress is answered at once, with
//!   the store's revision. *Shown by* watch with requests for progress × load, slow watchers. *Breaks:*
//!   nothing at or below a promised revision follows.
//! - **`compaction-drops-tombstone`** `mvcc/sweep.rs`: a sweep forgets the deletion of a key that is
//!   dead now, above the compact mark too. *Shown by* watch × compaction with a rolling restart, after
//!   which watchers read the past from disk. *Breaks:* a watch has no gap; reads of the past; equal
//!   hashes.
//! - **`snapshot-install-silent`** `watch/hub.rs`: watchers go on behind an installed snapshot without
//!   what it brought. *Shown by* watch on a member cut off from its peers until it needs a snapshot.
//!   *Breaks:* a watch has no gap.
//! - **`lease-by-wall-clock`** `node/lessor.rs`: leases are timed by the wall clock. *Shown by* lease ×
//!   wall clock jumps by ±300 s on the leader. *Breaks:* no lease ends early; every lease ends in time.
//! - **`unsafe-membership-change`** `raft/transport.rs`, `node/bootstrap.rs`: another disk under a
//!   member's id is taken for the member. A, B, C become A, B, C' in one step, without removal, joint
//!   configuration and addition, and A, C' need not overlap with B, C. *Shown by* register, set × a
//!   follower wiped and started again while the one it shared the newest entries with is cut off.
//!   *Breaks:* no acknowledged write is lost; linearizability; members are equal.

/// The variable of the environment that chooses a bug by its name.
pub const VARIABLE: &str = "MAINSTAY_MUTANT";

macro_rules! mutants {
    ($($variant:ident $name:literal: $what:literal;)*) => {
        /// A deliberate bug; the list at the top says what each breaks.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutant {
            $(#[doc = $what] $variant,)*
        }

        impl Mutant {
            /// Every bug there is.
            pub const ALL: &'static [Mutant] = &[$(Mutant::$variant,)*];

            /// Its name, as [`VARIABLE`] has it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Mutant::$variant => $name,)*
                }
            }
        }
    };
}

mutants! {
    LogNotSynced "log-not-synced": "Entries are acknowledged without a sync.";
    VoteNotSynced "vote-not-synced": "A vote is given without making it durable.";
    ReadWithoutReadIndex "read-without-read-index": "Linearizable reads ask nobody.";
    LeaseReadPausedClock "lease-read-trusting-paused-clock": "A lease outlives a stopped process.";
    AckBeforeQuorum "ack-before-quorum": "What was sent counts as replicated.";
    ReplayNotIdempotent "replay-not-idempotent": "Entries the state contains are applied again.";
    WatchSkipsOnResume "watch-skips-on-resume": "A resumed watcher misses its first revision.";
    ProgressBeforeEvents "progress-before-events": "Progress overtakes events.";
    CompactionDropsTombstone "compaction-drops-tombstone": "A deletion is forgotten too early.";
    SnapshotInstallSilent "snapshot-install-silent": "Watchers never hear what a snapshot brought.";
    LeaseByWallClock "lease-by-wall-clock": "Leases follow the wall clock.";
    UnsafeMembershipChange "unsafe-membership-change": "A wiped member goes on under its id.";
}

#[cfg(not(feature = "mutants"))]
mod chosen {
    use super::Mutant;

    /// Whether this bug was chosen: never, in the product.
    #[inline(always)]
    pub const fn is(_: Mutant) -> bool {
        false
    }

    /// Whether a variable of the environment is meant for this room: none is, in the product.
    pub const fn is_switch(_: &str) -> bool {
        false
    }

    /// Chooses nothing.
    ///
    /// # Errors
    /// None.
    pub const fn choose() -> Result<(), String> {
        Ok(())
    }
}

#[cfg(feature = "mutants")]
mod chosen {
    use std::sync::OnceLock;

    use super::{Mutant, VARIABLE};

    static CHOSEN: OnceLock<Option<Mutant>> = OnceLock::new();

    /// Whether this bug was chosen.
    pub fn is(mutant: Mutant) -> bool {
        CHOSEN.get().copied().flatten() == Some(mutant)
    }

    /// Whether a variable of the environment is meant for this room.
    pub fn is_switch(name: &str) -> bool {
        name == VARIABLE
    }

    /// Chooses the bug that the environment names, and says so in the log. To be
    /// called once, before a node starts.
    ///
    /// # Errors
    /// For a name that no bug has: a run that believes to test one must not
    /// test another.
    pub fn choose() -> Result<(), String> {
        let chosen = match std::env::var(VARIABLE) {
            Ok(name) => Some(find(&name)?),
            Err(std::env::VarError::NotPresent) => None,
            Err(error) => return Err(format!("{VARIABLE}: {error}")),
        };
        match CHOSEN.get_or_init(|| chosen) {
            Some(mutant) => tracing::warn!(
                mutant = mutant.name(),
                "THIS NODE HAS A BUG ON PURPOSE AND LOSES DATA; it is for testing the harness only"
            ),
            None => tracing::warn!("this build can have bugs on purpose; none was chosen"),
        }
        Ok(())
    }

    fn find(name: &str) -> Result<Mutant, String> {
        let found = Mutant::ALL.iter().find(|mutant| mutant.name() == name).copied();
        found.ok_or_else(|| {
            let names: Vec<&str> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
            format!("{VARIABLE}: there is no mutant {name:?}; there are {}", names.join(", "))
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_mutant_is_found_by_its_name_and_no_other_is() {
            for mutant in Mutant::ALL {
                assert_eq!(find(mutant.name()), Ok(*mutant));
                assert!(!is(*mutant), "nothing was chosen");
            }
            assert!(find("log-not-synced ").unwrap_err().contains("vote-not-synced"));
        }
    }
}

pub use chosen::{choose, is, is_switch};
