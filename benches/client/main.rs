//! The SDK, measured: `cargo bench --bench client -- routing|cache|push`, or all without a name.
#![cfg_attr(
    feature = "server",
    expect(
        clippy::disallowed_methods,
        reason = "the time that real processes take is measured on the real clock"
    )
)]

mod cache;
mod push;
mod routing;

// The clusters of real processes that the end-to-end tests start.
#[cfg(feature = "server")]
#[path = "../../tests/e2e/cluster.rs"]
#[allow(dead_code)]
mod cluster;
#[cfg(feature = "server")]
#[path = "../../tests/e2e/process.rs"]
#[allow(dead_code)]
mod process;
#[cfg(feature = "server")]
#[path = "../../tests/e2e/target.rs"]
#[allow(dead_code)]
mod target;
#[cfg(feature = "server")]
#[path = "../usage.rs"]
#[allow(dead_code)]
mod usage;

fn main() {
    // Cargo passes flags of its own.
    let names: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let parts: [(&str, fn()); 3] = [("routing", routing::run), ("cache", cache::run), ("push", push::run)];
    for (name, run) in parts {
        if names.is_empty() || names.iter().any(|asked| asked == name) {
            println!("## {name}\n");
            run();
        }
    }
}
