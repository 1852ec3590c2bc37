//! The SDK, measured: `cargo bench --bench client -- routing|cache|push|chaos`; without a name all but
//! the last, which takes minutes.
#![cfg_attr(
    feature = "server",
    expect(
        clippy::disallowed_methods,
        reason = "the time that real processes take is measured on the real clock"
    )
)]

mod cache;
#[cfg(feature = "server")]
mod chaos;
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
    let parts: &[(&str, fn(), bool)] = &[
        ("routing", routing::run, true),
        ("cache", cache::run, true),
        ("push", push::run, true),
        #[cfg(feature = "server")]
        ("chaos", chaos::run, false),
    ];
    for (name, run, is_quick) in parts {
        if (names.is_empty() && *is_quick) || names.iter().any(|asked| asked == name) {
            println!("## {name}\n");
            run();
        }
    }
}
