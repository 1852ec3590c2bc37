//! Runs one target: the kept corpus first, then inputs made of it and inputs
//! drawn anew, until the time is over or one of them fails.
//!
//! What counts as a failure is the same for every target and stands in [`judge`]:
//! a panic, a broken promise (an assertion of the target's own), too much
//! memory, too much time. A process that dies or stands still is the
//! supervisor's to see; it finds the input in the file of [`Current`].

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::coverage::Coverage;
use crate::memory;
use crate::mutate::{Rng, mutate};
use crate::targets::{Input, Target, Verdict};

/// The longest an input may take. One that seems to take longer is run again, and
/// only what its thread works then counts: the machine may have other things to do.
const INPUT_TIME_MAX: Duration = Duration::from_secs(1);
/// Bytes of corpus kept in memory beyond the files; the newest replace the oldest.
const CORPUS_INPUTS_MAX: usize = 20_000;

/// What to do.
pub struct Job<'a> {
    pub target: &'a Target,
    pub seed: u64,
    pub duration: Duration,
    /// Where new inputs of a counting build are kept for the next run.
    pub work_dir: &'a Path,
    /// Where the input that is being run stands.
    pub current: &'a Current,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub executions: u64,
    pub accepted: u64,
    pub corpus: usize,
    pub edges: usize,
    pub counting: bool,
    pub slowest: Duration,
    pub peak_bytes: usize,
    /// What the last input did that none may do.
    pub failure: Option<String>,
}

/// The input that is being run, in a file, for whoever finds the process dead.
pub struct Current {
    file: File,
}

impl Current {
    pub fn open(path: &Path) -> io::Result<Current> {
        Ok(Current { file: File::options().create(true).truncate(false).read(true).write(true).open(path)? })
    }

    fn set(&self, number: u64, input: &[u8]) {
        let mut record = Vec::with_capacity(16 + input.len());
        record.extend_from_slice(&number.to_le_bytes());
        record.extend_from_slice(&(input.len() as u64).to_le_bytes());
        record.extend_from_slice(input);
        self.file.write_all_at(&record, 0).expect("the file of the current input can be written");
    }

    /// How many inputs were begun.
    pub fn begun(&self) -> io::Result<u64> {
        let mut number = [0; 8];
        // Nothing stands there yet when the process is new.
        self.file.read_at(&mut number, 0)?;
        Ok(u64::from_le_bytes(number))
    }

    /// The last input that was begun. To be asked when the process has ended, because
    /// what it is just writing cannot be read.
    pub fn input(&self) -> io::Result<Vec<u8>> {
        let bytes = self.whole()?;
        let Some((head, input)) = bytes.split_first_chunk::<16>() else { return Ok(Vec::new()) };
        let length = u64::from_le_bytes(head[8..].try_into().expect("8 bytes"));
        Ok(input[..input.len().min(length as usize)].to_vec())
    }

    fn whole(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.file.metadata()?.len() as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// The inputs kept with the sources.
pub fn kept_dir(target: &Target) -> PathBuf {
    Path::new("tests/fuzz/corpus").join(target.name)
}

/// The files of a directory, in the order of their names; none when it is not there.
pub fn inputs_in(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}

/// A file name that says nothing but which input it is.
pub fn name_of(input: &[u8]) -> String {
    format!("{:08x}{:08x}", crc32c::crc32c(input), input.len())
}

struct Run<'a> {
    job: &'a Job<'a>,
    coverage: Coverage,
    corpus: Vec<Vec<u8>>,
    outcome: Outcome,
}

/// Does the job.
pub fn fuzz(job: &Job<'_>) -> Outcome {
    let coverage = Coverage::take();
    let outcome = Outcome { counting: coverage.is_on(), ..Outcome::default() };
    let mut run = Run { job, coverage, corpus: Vec::new(), outcome };
    let begun = Instant::now();
    let failure = run.replay().and_then(|()| run.search(begun)).err();
    run.outcome.failure = failure;
    run.outcome.corpus = run.corpus.len();
    run.outcome.edges = run.coverage.edges;
    run.outcome
}

impl Run<'_> {
    fn replay(&mut self) -> Result<(), String> {
        let kept = inputs_in(&kept_dir(self.job.target));
        // Something to damage, while a new target has no corpus.
        let first = (self.job.target.draw)(&mut Rng::new(self.job.seed));
        self.corpus.push(first.bytes);
        for bytes in kept.into_iter().chain(inputs_in(self.job.work_dir)) {
            let input = Input { bytes, is_whole: false };
            self.run(&input)?;
            self.corpus.push(input.bytes);
        }
        Ok(())
    }

    fn search(&mut self, begun: Instant) -> Result<(), String> {
        let mut rng = Rng::new(self.job.seed);
        while begun.elapsed() < self.job.duration {
            for _ in 0..16 {
                let input = self.make(&mut rng);
                if self.run(&input)? > 0 {
                    self.keep(input.bytes, &mut rng);
                }
            }
        }
        Ok(())
    }

    fn make(&self, rng: &mut Rng) -> Input {
        let target = self.job.target;
        if rng.one_in(6) {
            return (target.draw)(rng);
        }
        // What was found last was explored least.
        let newest = self.corpus.len().saturating_sub(100);
        let parent = match rng.one_in(2) {
            true => rng.below(self.corpus.len()),
            false => newest + rng.below(self.corpus.len() - newest),
        };
        let mut bytes = self.corpus[parent].clone();
        let other = &self.corpus[rng.below(self.corpus.len())];
        mutate(rng, &mut bytes, other, target.bytes_max);
        if !rng.one_in(8) {
            (target.seal)(&mut bytes);
        }
        Input { bytes, is_whole: false }
    }

    fn keep(&mut self, input: Vec<u8>, rng: &mut Rng) {
        // The next run begins with it. Without the file it would have to find it again, no more.
        let _ = fs::write(self.job.work_dir.join(name_of(&input)), &input);
        if self.corpus.len() < CORPUS_INPUTS_MAX {
            self.corpus.push(input);
        } else {
            let place = rng.below(self.corpus.len());
            self.corpus[place] = input;
        }
    }

    /// Runs one input; returns how much new it reached.
    fn run(&mut self, input: &Input) -> Result<usize, String> {
        self.outcome.executions += 1;
        self.job.current.set(self.outcome.executions, &input.bytes);
        self.coverage.forget();
        let seen = judge(self.job.target, input);
        let new = self.coverage.new_features();
        self.outcome.slowest = self.outcome.slowest.max(seen.took);
        self.outcome.peak_bytes = self.outcome.peak_bytes.max(seen.peak_bytes);
        self.outcome.accepted += u64::from(seen.accepted);
        match seen.failure {
            Some(reason) => Err(reason),
            None => Ok(new),
        }
    }
}

/// What one input did.
pub struct Seen {
    pub accepted: bool,
    pub took: Duration,
    pub peak_bytes: usize,
    pub failure: Option<String>,
}

/// Runs one input and says whether it did what none may do.
pub fn judge(target: &Target, input: &Input) -> Seen {
    let attempt = || {
        let begun = Instant::now();
        let run = || std::panic::catch_unwind(AssertUnwindSafe(|| (target.run)(&input.bytes)));
        let (verdict, peak_bytes) = memory::peak_of(run);
        (verdict, peak_bytes, begun.elapsed())
    };
    let (verdict, peak_bytes, mut took) = attempt();
    if took > INPUT_TIME_MAX && verdict.is_ok() {
        let before = worked();
        drop(attempt());
        took = took.min(worked().saturating_sub(before));
    }
    let allowed = (target.memory)(input.bytes.len());
    let (accepted, failure) = match verdict {
        Err(panic) => (false, Some(format!("panic: {}", message_of(&*panic)))),
        Ok(_) if took > INPUT_TIME_MAX => (false, Some(format!("it takes {took:?}"))),
        Ok(_) if peak_bytes > allowed => {
            let given = input.bytes.len();
            (false, Some(format!("{given} bytes made it hold {peak_bytes}, and {allowed} are allowed")))
        }
        Ok(Verdict::Refused) if input.is_whole => (false, Some("what was written is refused".to_owned())),
        Ok(Verdict::Accepted(again)) if input.is_whole && again != input.bytes => {
            (true, Some("what was written, read and written again is something else".to_owned()))
        }
        Ok(verdict) => (matches!(verdict, Verdict::Accepted(_)), None),
    };
    Seen { accepted, took, peak_bytes, failure }
}

/// How long this thread has been on a processor.
pub fn worked() -> Duration {
    let figures = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = figures.split(' ').next().and_then(|figure| figure.parse().ok());
    Duration::from_nanos(nanoseconds.expect("Linux tells how long a thread has run"))
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// The fewest inputs found that reach all that the corpus reaches, the smallest
/// first; at most `count_max`.
pub fn smallest_corpus(target: &Target, mut inputs: Vec<Vec<u8>>, count_max: usize) -> Vec<Vec<u8>> {
    let mut coverage = Coverage::take();
    if !coverage.is_on() {
        // Nobody knows what they reach: any will do.
        inputs.truncate(count_max);
        return inputs;
    }
    inputs.sort_by_key(Vec::len);
    inputs.dedup();
    let mut reached = Vec::new();
    for bytes in inputs {
        let input = Input { bytes, is_whole: false };
        coverage.forget();
        let seen = judge(target, &input);
        let new = coverage.new_features();
        if new > 0 && seen.failure.is_none() {
            reached.push((new, input.bytes));
        }
    }
    // Those that brought the most.
    reached.sort_by_key(|(new, bytes)| (usize::MAX - new, bytes.len()));
    reached.truncate(count_max);
    reached.into_iter().map(|(_, bytes)| bytes).collect()
}
