//! The network of a run: a bridge where the harness runs, and a namespace for
//! each host that is plugged into it.
//!
//! Host `n1` is the namespace `n1`; its end of the cable is `eth0`, the bridge's
//! end is `p1`. The addresses need not differ between runs, since no run sees
//! another's network.

use std::net::Ipv4Addr;

use super::command;

/// The bridge.
pub const BRIDGE: &str = "br0";

/// The address of a host.
pub fn address(index: usize) -> Ipv4Addr {
    let host = u8::try_from(index + 1).expect("a run has few hosts");
    Ipv4Addr::new(10, 77, 0, host)
}

/// Makes the bridge, with an address for the clients.
///
/// # Errors
/// When the kernel cannot.
pub async fn make_bridge() -> anyhow::Result<()> {
    command::line(&format!("ip link add {BRIDGE} type bridge")).await?;
    command::line(&format!("ip addr add 10.77.0.254/24 dev {BRIDGE}")).await?;
    command::line(&format!("ip link set {BRIDGE} up")).await?;
    Ok(())
}

/// Makes a host's namespace and plugs it in.
///
/// # Errors
/// When the kernel cannot.
pub async fn make_host(index: usize, name: &str) -> anyhow::Result<()> {
    let port = format!("p{}", index + 1);
    command::line(&format!("ip netns add {name}")).await?;
    command::line(&format!("ip link add {port} type veth peer name eth0 netns {name}")).await?;
    command::line(&format!("ip link set {port} master {BRIDGE} up")).await?;
    command::line(&format!("ip -n {name} addr add {}/24 dev eth0", address(index))).await?;
    command::line(&format!("ip -n {name} link set lo up")).await?;
    command::line(&format!("ip -n {name} link set eth0 up")).await?;
    Ok(())
}
