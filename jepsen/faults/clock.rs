//! Clocks that jump, and clocks that run too slow or too fast.
//!
//! A small library that is preloaded into every node of the run (clock.c) tells
//! it the time by a page that is written here. Nobody else's clock is touched.
//! The library writes back what it told, and that is the evidence.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::catalogue::{Entry, Lock, Needs};
use super::{Deed, Fault, leader_or_any, within};
use crate::context::Context;
use crate::hosts::{Host, Hosts, command};
use crate::probe::Ability;

pub const FAULTS: &[Entry] =
    &[entry("clock-jump", || Box::new(Jump::default())), entry("clock-rate", || Box::new(Rate::default()))];

const fn entry(name: &'static str, make: fn() -> Box<dyn Fault>) -> Entry {
    let needs = Needs { members: 1, spares: 0, abilities: &[Ability::ClockShim] };
    Entry { name, needs, locks: &[Lock::Clocks], make }
}

const SOURCE: &str = include_str!("clock.c");
/// Where the library and the pages of the hosts are.
const DIRECTORY: &str = "clock";
const PAGE_BYTES: u64 = 4096;
const MAGIC: u64 = 0x636c_6f63_6b30_3031;
/// A rate in the library's unit.
const MILLION: i64 = 1_000_000;
/// How far ahead a change of the rate is announced, so that no reader meets the two rates in the wrong order.
const NOTICE_NS: i64 = 5_000_000;
/// How far a wall clock jumps.
const JUMP_S: i64 = 300;
/// How long a node may take to ask for the time again.
const EFFECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Compiles the library into a directory; gives its path.
///
/// # Errors
/// When there is no C compiler, or it does not like the source.
pub async fn compile(directory: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    let (source, library) = (directory.join("clock.c"), directory.join("clock.so"));
    std::fs::write(&source, SOURCE)?;
    let words = [command::word(&source)?, "-o", command::word(&library)?, "-ldl"];
    let words: Vec<&str> = ["-shared", "-fPIC", "-O2"].into_iter().chain(words).collect();
    command::run("cc", &words).await?;
    Ok(library)
}

/// Runs a program by a clock that is far ahead, built for this in a directory; gives what it printed.
///
/// # Errors
/// When the library cannot be built, or the program fails with it.
pub async fn try_out(directory: &Path, program: &str, words: &[&str]) -> anyhow::Result<String> {
    let library = compile(directory).await?;
    let page = Page { path: directory.join("page") };
    page.create()?;
    page.change(|setting| Setting { shift: JUMP_S * 1_000_000_000, ..setting })?;
    let environment =
        [format!("LD_PRELOAD={}", library.display()), format!("CLOCK_PAGE={}", page.path.display())];
    let all: Vec<&str> =
        environment.iter().map(String::as_str).chain([program]).chain(words.iter().copied()).collect();
    command::run("env", &all).await
}

/// Gives every host's node a clock that can be moved, from its next start on.
///
/// # Errors
/// When the library cannot be built.
pub async fn prepare(hosts: &Hosts) -> anyhow::Result<()> {
    let directory = Path::new(crate::hosts::isolation::ROOT).join(DIRECTORY);
    let library = compile(&directory).await?;
    for host in &hosts.hosts {
        let page = Page::of(host);
        page.create()?;
        host.set_environment("LD_PRELOAD", Some(command::word(&library)?));
        host.set_environment("CLOCK_PAGE", Some(command::word(&page.path)?));
    }
    Ok(())
}

/// What a clock tells, as a function of the real one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Setting {
    from: i64,
    drift_at: i64,
    rate_before: i64,
    rate_after: i64,
    shift: i64,
}

impl Setting {
    const TRUE: Setting =
        Setting { from: 0, drift_at: 0, rate_before: MILLION, rate_after: MILLION, shift: 0 };

    /// Told minus real time, of the monotonic clock.
    fn drift(&self, at: i64) -> i64 {
        let rate = if at < self.from { self.rate_before } else { self.rate_after };
        self.drift_at
            + i64::try_from(i128::from(at - self.from) * i128::from(rate - MILLION) / 1_000_000)
                .expect("a run is shorter than a century")
    }

    /// The same clock, at another speed from a moment on.
    fn turned(&self, at: i64, rate: i64) -> Setting {
        Setting {
            from: at,
            drift_at: self.drift(at),
            rate_before: self.rate_after,
            rate_after: rate,
            ..*self
        }
    }
}

/// What the library told last.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    wall_reads: u64,
    wall_error: i64,
    mono_reads: u64,
    mono_error: i64,
}

/// The page of one host's clock. Its layout stands in clock.c too.
struct Page {
    path: PathBuf,
}

impl Page {
    fn of(host: &Host) -> Page {
        Page { path: Path::new(crate::hosts::isolation::ROOT).join(DIRECTORY).join(&host.name) }
    }

    fn create(&self) -> anyhow::Result<()> {
        let file = File::create(&self.path)?;
        file.set_len(PAGE_BYTES)?;
        file.write_all_at(&MAGIC.to_ne_bytes(), 0)?;
        self.write(&file, 0, Setting::TRUE)
    }

    fn open(&self) -> anyhow::Result<File> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path);
        file.with_context(|| format!("the clock at {}", self.path.display()))
    }

    /// Writes between two sequence numbers, the first of which is odd: whoever reads meanwhile reads again.
    fn write(&self, file: &File, sequence: u64, setting: Setting) -> anyhow::Result<()> {
        file.write_all_at(&(sequence + 1).to_ne_bytes(), 8)?;
        let fields = [setting.from, setting.drift_at, setting.rate_before, setting.rate_after, setting.shift];
        file.write_all_at(&fields.map(i64::to_ne_bytes).concat(), 16)?;
        file.write_all_at(&(sequence + 2).to_ne_bytes(), 8)?;
        Ok(())
    }

    fn fields(file: &File) -> anyhow::Result<[i64; 11]> {
        let mut bytes = [0; 88];
        file.read_exact_at(&mut bytes, 0)?;
        let mut fields = [0; 11];
        for (field, bytes) in fields.iter_mut().zip(bytes.chunks_exact(8)) {
            *field = i64::from_ne_bytes(bytes.try_into()?);
        }
        Ok(fields)
    }

    fn change(&self, change: impl FnOnce(Setting) -> Setting) -> anyhow::Result<()> {
        let file = self.open()?;
        let [_, sequence, from, drift_at, rate_before, rate_after, shift, ..] = Page::fields(&file)?;
        let setting = change(Setting { from, drift_at, rate_before, rate_after, shift });
        self.write(&file, sequence.cast_unsigned(), setting)
    }

    fn told(&self) -> anyhow::Result<Told> {
        let [.., wall_reads, wall_error, mono_reads, mono_error] = Page::fields(&self.open()?)?;
        let (wall_reads, mono_reads) = (wall_reads.cast_unsigned(), mono_reads.cast_unsigned());
        Ok(Told { wall_reads, wall_error, mono_reads, mono_error })
    }
}

/// The machine's monotonic clock, which no page moves.
#[allow(unsafe_code, reason = "std shows no clock as a number, and the page needs one")]
fn real_ns() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    assert_eq!(result, 0, "Linux has a monotonic clock");
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// The wall clock of one node jumps, forth or back, and jumps back when healed.
#[derive(Default)]
struct Jump {
    victim: Option<usize>,
}

impl Fault for Jump {
    fn name(&self) -> &'static str {
        "clock-jump"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let drawn = members[rng.random_range(0..members.len())];
            let leads = rng.random_bool(0.5);
            let jump_s = if rng.random_bool(0.5) { JUMP_S } else { -JUMP_S };
            let victim = if leads { leader_or_any(context, &members).await } else { drawn };
            self.victim = Some(victim);
            let host = &context.hosts.hosts[victim];
            let page = Page::of(host);
            let before = page.told()?;
            page.change(|setting| Setting { shift: setting.shift + jump_s * 1_000_000_000, ..setting })?;
            within(EFFECT_TIME_MAX, || async {
                // A request makes it look at its clock, where nobody else asks for anything.
                let _ = host.status().await;
                let told = page.told()?;
                let (reads, error_s) = (told.wall_reads - before.wall_reads, told.wall_error / 1_000_000_000);
                ensure!(
                    reads > 0 && error_s.abs() >= JUMP_S - 10,
                    "{reads} looks at the clock, off by {error_s} s"
                );
                Ok(format!("{}: asked {reads} times since, it was told a time {error_s} s off", host.name))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move { set_true(context, self.victim.take()) })
    }
}

/// The clock of the leader runs at half or at double speed, its timers with it.
#[derive(Default)]
struct Rate {
    victim: Option<usize>,
}

impl Fault for Rate {
    fn name(&self) -> &'static str {
        "clock-rate"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let rate = if rng.random_bool(0.5) { MILLION / 2 } else { MILLION * 2 };
            let victim = leader_or_any(context, &context.hosts.members()).await;
            self.victim = Some(victim);
            let host = &context.hosts.hosts[victim];
            let page = Page::of(host);
            let (before, began) = (page.told()?, real_ns());
            page.change(|setting| setting.turned(real_ns() + NOTICE_NS, rate))?;
            within(EFFECT_TIME_MAX, || async {
                let _ = host.status().await;
                let (told, now) = (page.told()?, real_ns());
                let reads = told.mono_reads - before.mono_reads;
                let (real, gained) = (now - began, told.mono_error - before.mono_error);
                let wanted = (now - began - NOTICE_NS) / MILLION * (rate - MILLION);
                let near = (gained - wanted).abs() < wanted.abs() / 4;
                let (real, gained) = (real / 1_000_000, gained / 1_000_000);
                ensure!(
                    reads > 0 && real > 500 && near,
                    "{reads} looks at the clock, {gained} ms gained in {real} ms"
                );
                let speed = rate as f64 / MILLION as f64;
                Ok(format!(
                    "{} at speed {speed}: asked {reads} times, {gained} ms gained in {real} ms",
                    host.name
                ))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move { set_true(context, self.victim.take()) })
    }
}

/// The right speed and the right time of day from here on. What the monotonic clock is off by stays: it never goes
/// back, nor does it leap.
fn set_true(context: &Context, victim: Option<usize>) -> anyhow::Result<()> {
    let Some(victim) = victim else { return Ok(()) };
    Page::of(&context.hosts.hosts[victim]).change(|setting| {
        let at = real_ns() + NOTICE_NS;
        let turned = setting.turned(at, MILLION);
        Setting { shift: -turned.drift(at), ..turned }
    })
}
