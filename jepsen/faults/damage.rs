//! Disks that forget or lie: a flipped bit, a tail of the log that was torn
//! off. On so few members that the others have a quorum.
//!
//! A damaged node may refuse to go on, at its start or when it meets the
//! damage; then it is replaced as an operator does it: removed, wiped, joined
//! anew. It may go on when it does not need what was damaged; then a flipped bit
//! is flipped back at the end. It must not crash, and what it serves is for the
//! judges. Seen to have taken effect: the file differs, and what the node then did.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tokio::time::Instant;

use super::catalogue::{Entry, Lock, Needs};
use super::membership::{join, remove};
use super::whom::Whom;
use super::{Deed, Fault};
use crate::context::Context;
use crate::hosts::{Host, Running};

const NEEDS: Needs = Needs { members: 3, spares: 0, abilities: &[] };
// A node that refuses is replaced: nobody else may change members meanwhile.
const LOCKS: &[Lock] = &[Lock::Members, Lock::Nodes];

/// The faults of this file.
pub const FAULTS: &[Entry] = &[
    Entry { name: "bit-flip", needs: NEEDS, locks: LOCKS, make: || Box::new(Damage::new("bit-flip", flip)) },
    Entry {
        name: "torn-tail",
        needs: NEEDS,
        locks: LOCKS,
        make: || Box::new(Damage::new("torn-tail", tear)),
    },
];

/// How long a damaged node may take to serve or to refuse.
const DECISION_TIME_MAX: Duration = Duration::from_secs(15);
/// With what a node ends that cannot go on with its disk: it could not be sure of its state, or an error at start.
const REFUSALS: [&str; 2] = ["exit status: 70", "exit status: 1"];

/// Damages a stopped node's data; says how, and what undoes it.
type Harm = fn(&Path, &mut StdRng) -> anyhow::Result<(String, Option<Flip>)>;

/// One host, and what was done to it.
struct Victim {
    index: usize,
    flip: Option<Flip>,
    log_from: u64,
}

struct Damage {
    name: &'static str,
    harm: Harm,
    victims: Vec<Victim>,
}

impl Damage {
    fn new(name: &'static str, harm: Harm) -> Damage {
        Damage { name, harm, victims: Vec::new() }
    }
}

impl Fault for Damage {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut seen = Vec::new();
            for index in Whom::Minority.draw(context, rng).await? {
                let host = &context.hosts.hosts[index];
                host.expect_exit(true);
                self.victims.push(Victim { index, flip: None, log_from: host.log_bytes() });
                host.kill().await?;
                let (done, flip) = (self.harm)(&host.data(), rng)?;
                if let Some(victim) = self.victims.last_mut() {
                    victim.flip = flip;
                }
                host.start().await?;
                let decided = decision(host).await.with_context(|| format!("{}: {done}", host.name))?;
                seen.push(format!("{}: {done}; {decided}", host.name));
            }
            Ok(seen.join("; "))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            for victim in std::mem::take(&mut self.victims) {
                let host = &context.hosts.hosts[victim.index];
                heal(context, host, &victim).await.with_context(|| host.name.clone())?;
                host.expect_exit(false);
            }
            Ok(())
        })
    }
}

/// Waits until the node serves or has refused.
async fn decision(host: &Host) -> anyhow::Result<String> {
    let deadline = Instant::now() + DECISION_TIME_MAX;
    loop {
        if host.running() == Running::No {
            let end = host.exits().pop().map(|(end, _)| end).context("it ended")?;
            return Ok(format!("it refused: {end}"));
        }
        // Its own state says that it came up; a linearizable read would also need the others.
        if host.status().await.is_ok() {
            return Ok("it serves".to_owned());
        }
        ensure!(Instant::now() < deadline, "it neither serves nor refuses after {DECISION_TIME_MAX:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn heal(context: &Context, host: &Host, victim: &Victim) -> anyhow::Result<()> {
    if host.running() == Running::No {
        check_refusal(context, host, victim.log_from);
    } else {
        let Some(flip) = &victim.flip else { return Ok(()) };
        host.kill().await?;
        // Or the file is gone: then the node had no more use for what was damaged.
        flip.undo()?;
        return host.start().await;
    }
    remove(context, host).await?;
    join(context, host, false).await.context("joining again")
}

/// A refusal is a decision: no panic, no signal, and the log says why.
fn check_refusal(context: &Context, host: &Host, log_from: u64) {
    let log = host.log_since(log_from);
    let end = host.exits().pop().map_or_else(String::new, |(end, _)| end);
    if !REFUSALS.contains(&end.as_str()) || log.contains("panicked at") {
        context.hosts.complain(format!("{} met damage on its disk and crashed: {end}", host.name));
        // What it said last is why.
        context.hosts.complain(log.lines().rev().take(8).collect::<Vec<_>>().join(" < "));
    }
    if !log.contains("ERROR") {
        context.hosts.complain(format!("{} met damage on its disk and logged no error", host.name));
    }
}

// ---- a flipped bit ----

/// Where a bit was flipped.
struct Flip {
    file: PathBuf,
    at: u64,
    bit: u8,
    /// The bytes around it after that, to know it again by.
    around: Vec<u8>,
}

/// As many bytes on either side are remembered.
const AROUND: u64 = 16;

impl Flip {
    /// Flips the bit back, if the file is still there and nobody has written over it.
    fn undo(&self) -> anyhow::Result<()> {
        let Ok(file) = OpenOptions::new().read(true).write(true).open(&self.file) else { return Ok(()) };
        if around(&file, self.at)? == self.around {
            let mut byte = [0];
            file.read_exact_at(&mut byte, self.at)?;
            file.write_all_at(&[byte[0] ^ self.bit], self.at)?;
        }
        Ok(())
    }
}

/// The bytes around an offset, as far as there are any.
fn around(file: &File, at: u64) -> anyhow::Result<Vec<u8>> {
    let start = at.saturating_sub(AROUND);
    let end = file.metadata()?.len().min(at + AROUND + 1);
    let mut bytes = vec![0; end.saturating_sub(start) as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

/// Flips one bit in one file of the log or of the state.
fn flip(data: &Path, rng: &mut StdRng) -> anyhow::Result<(String, Option<Flip>)> {
    let places = [("raft", "log"), ("state", "sst")];
    let first = rng.random_range(0..places.len());
    let picked = (0..places.len()).find_map(|turn| {
        let (room, ending) = places[(first + turn) % places.len()];
        let files = files(&data.join(room), ending);
        (!files.is_empty()).then_some(files)
    });
    let files = picked.with_context(|| format!("there is nothing to damage below {}", data.display()))?;
    let path = files[rng.random_range(0..files.len())].clone();
    // Not in the zeros behind the end of the log, where nothing would notice.
    let content = fs::read(&path)?;
    let end = content.iter().rposition(|byte| *byte != 0).context("there is nothing in it")?;
    let at = rng.random_range(0..=end as u64);
    let bit = 1 << rng.random_range(0..8);
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    file.write_all_at(&[content[at as usize] ^ bit], at)?;
    file.sync_all()?;
    let shown = path.strip_prefix(data)?.display().to_string();
    let around = around(&file, at)?;
    Ok((format!("a bit flipped in byte {at} of {shown}"), Some(Flip { file: path, at, bit, around })))
}

/// Every file below a directory with this ending that is not empty, by name.
fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let mut open = vec![directory.to_owned()];
    let mut found = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let (path, Ok(metadata)) = (entry.path(), entry.metadata()) else { continue };
            if metadata.is_dir() {
                open.push(path);
            } else if metadata.len() > 0 && path.extension().is_some_and(|has| has == ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

// ---- a torn tail ----

/// The newest file of the log ends where it should not: behind its last frame is
/// the beginning of one that was never acknowledged, as a crash leaves it; or the
/// last bytes that were synced are gone, as no crash leaves it.
fn tear(data: &Path, rng: &mut StdRng) -> anyhow::Result<(String, Option<Flip>)> {
    let raft = data.join("raft");
    let newest =
        files(&raft, "log").pop().with_context(|| format!("there is no log in {}", raft.display()))?;
    let content = fs::read(&newest)?;
    let end = end_of_frames(&content);
    let file = OpenOptions::new().write(true).open(&newest)?;
    let cut = rng.random_bool(0.5);
    let bytes = rng.random_range(1..=64);
    if cut {
        file.set_len(end.saturating_sub(bytes))?;
    } else {
        let garbage: Vec<u8> = (0..bytes).map(|_| rng.random_range(1..=255)).collect();
        file.write_all_at(&garbage, end)?;
    }
    file.sync_all()?;
    ensure!(fs::read(&newest)? != content, "the log is as it was before");
    let done = if cut { "are missing at the end of" } else { "of a record that is not whole follow" };
    Ok((format!("{bytes} bytes {done} the log"), None))
}

/// Where the last frame of a segment ends: each says its length in its header, and zeros follow the last.
fn end_of_frames(content: &[u8]) -> u64 {
    let mut at = 32;
    while let Some(header) = content.get(at..at + 32)
        && header.iter().any(|byte| *byte != 0)
    {
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        at += (32 + length as usize).next_multiple_of(8);
    }
    at as u64
}
