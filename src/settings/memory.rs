//! How much memory there is for this process.

use std::fs;

/// Where a control group's limit stands, in its two layouts, as a container sees it.
const LIMITS: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Bytes for the cache of the store's blocks, if nothing is set. A store that does not fit there pays for
/// every read with a block to be fetched, checked and unpacked.
pub(super) fn for_blocks() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let limits = LIMITS.iter().filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    eighth(limits.chain(machine).min())
}

/// An eighth of the memory, within bounds; the least where the system does not say.
fn eighth(memory_bytes: Option<u64>) -> u64 {
    (memory_bytes.unwrap_or(0) / 8).clamp(64 << 20, 512 << 20)
}

/// What `/proc/meminfo` says.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_an_eighth_within_bounds() {
        let gib = 1 << 30;
        assert_eq!(
            [None, Some(gib / 4), Some(2 * gib), Some(64 * gib)].map(eighth),
            [64, 64, 256, 512].map(|mib| mib << 20)
        );
        assert!((64 << 20..=512 << 20).contains(&for_blocks()));
    }

    #[test]
    fn the_total_is_found_among_the_rest() {
        assert_eq!(total("MemTotal:       24689812 kB\nMemFree:  1 kB\n"), Some(24_689_812 << 10));
        assert_eq!(total("MemFree:  1 kB\n"), None);
        assert_eq!(total("MemTotal: many kB\n"), None);
    }
}
