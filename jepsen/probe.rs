//! What this machine can do to a cluster, found out by doing it.

/// Something that a fault needs from the kernel, from its tools or from the harness's rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ability {
    /// nft rules on a bridge.
    Nft,
    /// Packets handed to the harness by iptables.
    Nfqueue,
    /// A token bucket on a link.
    Tbf,
    /// `ss -K`: ending live connections of others.
    SocketKill,
    /// A C compiler, and a node that starts with the clock library loaded.
    ClockShim,
    /// cgroup limits on a block device.
    Throttle,
    /// Freezing a filesystem.
    Freeze,
    /// Shutting a filesystem down without flushing its journal.
    Shutdown,
    /// Making system calls of a running process fail.
    Strace,
}

impl Ability {
    /// Whether faults of the network need it.
    pub fn is_of_network(self) -> bool {
        matches!(self, Ability::Nft | Ability::Nfqueue | Ability::Tbf | Ability::SocketKill)
    }
}

/// What came of looking for an ability: how it was seen, or why it is not there.
pub type Found = (Ability, anyhow::Result<String>);

/// Looks for each of these.
pub async fn all(_abilities: &[Ability], _run: &str, _binary: &std::path::Path) -> Vec<Found> {
    Vec::new()
}
