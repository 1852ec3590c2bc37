//! Reads that wait for the disk. Most are answered from memory within microseconds, where they were asked;
//! a thread that waits for a disk meanwhile serves nobody. So once a read has waited for the disk, the next
//! ones let another thread serve in the place of theirs, and wait for it side by side. Those of one connection
//! do so one after the other, as its calls run on one task, and all else on it waits with them: so a turn of it
//! may wait a few times, and reads beyond that are tasks for themselves.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

use crate::env::Env;

/// A read that took less did not wait for a disk.
const SUSPICIOUS: Duration = Duration::from_micros(50);
/// How long after a read from the disk others are expected to come from there, too. Short, so that a rare one
/// does not send many away from memory.
const EXPECTED: Duration = Duration::from_millis(5);

/// Reads of one turn of a connection that may wait for the disk where they are.
const TURN_WAITS: u32 = 4;

thread_local! {
    /// Reads that may have waited for the disk in the turn of a connection that this thread is at.
    static WAITS: Cell<u32> = const { Cell::new(0) };
}

/// A connection begins a turn on this thread.
pub(super) fn turn_begins() {
    WAITS.set(0);
}

/// Whether a read that may have to wait for the disk should be a task for itself.
pub(super) fn turn_waited_enough() -> bool {
    WAITS.get() >= TURN_WAITS
}

/// What reads have found out.
#[derive(Default)]
pub(crate) struct Disk {
    /// In microseconds of the monotonic clock.
    expected_until: AtomicU64,
}

impl Disk {
    /// Reads, and lets others be served meanwhile if that may have to wait for the disk.
    pub(super) fn read<T>(&self, env: &dyn Env, read: impl FnOnce() -> T) -> T {
        let begun = env.monotonic();
        let expected_until = self.expected_until.load(Ordering::Relaxed);
        let found = match micros(begun) < expected_until && can_be_replaced() {
            true => {
                WAITS.set(WAITS.get().saturating_add(1));
                tokio::task::block_in_place(read)
            }
            false => read(),
        };
        let now = env.monotonic();
        let due = || micros(now + EXPECTED / 2) > expected_until;
        // Time alone does not tell: on a busy machine threads lose their core.
        if now.saturating_sub(begun) >= SUSPICIOUS && due() && this_thread_read() {
            self.expected_until.store(micros(now + EXPECTED), Ordering::Relaxed);
        }
        found
    }
}

/// Whether another thread can serve in the place of this one.
fn can_be_replaced() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread)
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

/// Whether this thread had the disk read anything since it was last asked; not, if it never was. Where the
/// system does not say, it is believed to have.
fn this_thread_read() -> bool {
    thread_local! {
        static BEFORE: Cell<Option<u64>> = const { Cell::new(None) };
    }
    let text = std::fs::read_to_string("/proc/thread-self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: "));
    let Some(bytes) = line.and_then(|bytes| bytes.parse::<u64>().ok()) else { return true };
    BEFORE.replace(Some(bytes)).is_some_and(|before| before != bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::SystemEnv;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_turn_waits_for_a_few_reads_only() {
        let env = SystemEnv::shared();
        let disk = Disk::default();
        let reads = |count| (0..count).for_each(|_| disk.read(&*env, || ()));
        turn_begins();
        reads(100);
        assert!(!turn_waited_enough(), "from memory");
        disk.expected_until.store(u64::MAX, Ordering::Relaxed);
        reads(TURN_WAITS - 1);
        assert!(!turn_waited_enough());
        reads(1);
        assert!(turn_waited_enough());
        turn_begins();
        assert!(!turn_waited_enough());
    }

    #[test]
    fn only_a_slow_read_of_the_disk_lets_others_expect_it() {
        let env = SystemEnv::shared();
        let disk = Disk::default();
        let slow = |work: &dyn Fn()| {
            disk.read(&*env, || {
                work();
                let begun = env.monotonic();
                while env.monotonic().saturating_sub(begun) < SUSPICIOUS {}
            });
            disk.expected_until.load(Ordering::Relaxed) > 0
        };
        // What this thread read before; then nothing more, unless the system does not say.
        this_thread_read();
        if this_thread_read() {
            return;
        }
        assert!(!slow(&|| ()), "slow, but not for the disk");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 1 << 20]).unwrap();
        file.as_file().sync_all().unwrap();
        let from_disk = || {
            rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
            assert_eq!(std::fs::read(file.path()).unwrap().len(), 1 << 20);
        };
        from_disk();
        // A file system without a disk has nothing to show.
        if this_thread_read() {
            assert!(slow(&from_disk), "from the disk");
        }
    }
}
