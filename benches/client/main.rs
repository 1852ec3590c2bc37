//! The SDK, measured: `cargo bench --bench client -- routing|cache|push`, or all without a name.

mod cache;
mod push;
mod routing;

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
