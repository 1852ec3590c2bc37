//! The SDK, measured: `cargo bench --bench client -- routing|cache|push|chaos`; without a name all but
//! the last, which takes minutes.

mod cache;
mod chaos;
mod push;
mod routing;

#[path = "../../tests/e2e/cluster.rs"]
#[allow(dead_code, clippy::disallowed_methods)]
mod cluster;
#[path = "../../tests/e2e/process.rs"]
#[allow(dead_code, clippy::disallowed_methods)]
mod process;
#[path = "../../tests/e2e/target.rs"]
#[allow(dead_code)]
mod target;

fn main() {
    // Cargo passes flags of its own.
    let names: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let parts: [(&str, fn(), bool); 4] = [
        ("routing", routing::run, true),
        ("cache", cache::run, true),
        ("push", push::run, true),
        ("chaos", chaos::run, false),
    ];
    for (name, run, is_quick) in parts {
        if (names.is_empty() && is_quick) || names.iter().any(|asked| asked == name) {
            println!("## {name}\n");
            run();
        }
    }
}
