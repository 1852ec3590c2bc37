//! How much memory there is for this process.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes for one of the store's two caches, if nothing is set. A store that does not fit there pays for every
/// read, or for every write, with a block to be fetched, checked and unpacked.
pub(super) fn for_a_cache() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups)
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    eighth(limits.chain(machine).min())
}

/// Where the limits of this process's control group and of those around it stand, by what
/// `/proc/self/cgroup` says. A container sees its own as the root.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let of = |controllers: &str| match controllers {
        "" => Some(("/sys/fs/cgroup", "memory.max")),
        _ if controllers.split(',').any(|one| one == "memory") => {
            Some(("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))
        }
        _ => None,
    };
    // A container's own, even when it cannot tell its group.
    let mut files: Vec<_> =
        ["", "memory"].into_iter().filter_map(of).map(|(root, name)| Path::new(root).join(name)).collect();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let Some((root, name)) = of(controllers) else { continue };
        let groups =
            Path::new(group.trim_start_matches('/')).ancestors().filter(|group| *group != Path::new(""));
        files.extend(groups.map(|group| Path::new(root).join(group).join(name)));
    }
    files
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
        assert!((64 << 20..=512 << 20).contains(&for_a_cache()));
    }

    #[test]
    fn the_limits_of_a_group_and_of_those_around_it_count() {
        let of = |groups: &str| {
            limit_files(groups).iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        let own = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
        assert_eq!(of("0::/\n"), own);
        assert_eq!(
            of("0::/system.slice/store.service\n")[2..],
            ["system.slice/store.service", "system.slice"]
                .map(|at| format!("/sys/fs/cgroup/{at}/memory.max"))
        );
        for controllers in ["memory", "hugetlb,memory"] {
            let groups = format!("9:name=systemd:/\n4:{controllers}:/pod\n1:cpu:/pod\n");
            assert_eq!(of(&groups)[2..], ["/sys/fs/cgroup/memory/pod/memory.limit_in_bytes"]);
        }
        assert_eq!(of("nonsense"), own);
    }

    #[test]
    fn the_total_is_found_among_the_rest() {
        assert_eq!(total("MemTotal:       24689812 kB\nMemFree:  1 kB\n"), Some(24_689_812 << 10));
        assert_eq!(total("MemFree:  1 kB\n"), None);
        assert_eq!(total("MemTotal: many kB\n"), None);
    }
}
