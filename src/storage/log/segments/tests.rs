//! The log on disk against crashes that keep any part of what was not synced,
//! and against every damaged byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::{Extent, MemoryLog};
use super::format::{ALIGNMENT, FRAME_HEADER_BYTES, HEADER_BYTES, parse_frame, parse_header};
use super::*;
use crate::env::SystemEnv;

// ---- what happens to the files ----

/// What was done to the files, in order, each with the file's name.
pub type Tap = Option<Arc<Mutex<Vec<(String, Happened)>>>>;

/// What was done to a file.
#[derive(Clone, Debug)]
pub enum Happened {
    Created(Vec<u8>),
    Written(u64, Vec<u8>),
    Synced,
    Removed,
    NamesSynced,
    /// Not to a file: the log is open, and this many operations were acknowledged.
    Acknowledged(usize),
}

pub fn tell(tap: &Tap, path: &Path, happened: Happened) {
    if let Some(tap) = tap {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        tap.lock().push((name, happened));
    }
}

/// A disk of which is known what would outlive a power failure.
#[derive(Clone, Default)]
struct Disk {
    /// What is durable of each, and what was written since.
    files: BTreeMap<String, (Vec<u8>, Writes)>,
    names: BTreeSet<String>,
    /// Names that came (`true`) and went, and are not synced.
    unsynced_names: Vec<(String, bool)>,
}

/// Offsets and bytes.
type Writes = Vec<(u64, Vec<u8>)>;

const SECTOR: u64 = 512;

impl Disk {
    fn of(directory: &Path) -> Disk {
        let mut disk = Disk::default();
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            disk.files.insert(name.clone(), (fs::read(entry.path()).unwrap(), Vec::new()));
            disk.names.insert(name);
        }
        disk
    }

    fn happen(&mut self, name: &str, happened: &Happened) {
        match happened {
            Happened::Created(content) => {
                self.files.insert(name.to_owned(), (content.clone(), Vec::new()));
                self.unsynced_names.push((name.to_owned(), true));
            }
            Happened::Written(offset, bytes) => {
                self.files.get_mut(name).unwrap().1.push((*offset, bytes.clone()));
            }
            Happened::Synced => {
                let (content, unsynced) = self.files.get_mut(name).unwrap();
                unsynced.drain(..).for_each(|(offset, bytes)| put(content, offset, &bytes));
            }
            Happened::Removed => self.unsynced_names.push((name.to_owned(), false)),
            Happened::NamesSynced => {
                for (name, there) in std::mem::take(&mut self.unsynced_names) {
                    self.rename(name, there);
                }
            }
            Happened::Acknowledged(_) => {}
        }
    }

    fn rename(&mut self, name: String, there: bool) {
        match there {
            true => self.names.insert(name),
            false => self.names.remove(&name),
        };
    }

    /// The power fails: of what was not synced, each sector and each name is
    /// there or not, by `chance`.
    fn fail(mut self, chance: &mut StdRng, keep: f64) -> tempfile::TempDir {
        for (name, there) in std::mem::take(&mut self.unsynced_names) {
            if chance.random_bool(keep) {
                self.rename(name, there);
            }
        }
        let image = scratch();
        for (name, (mut content, unsynced)) in self.files {
            if !self.names.contains(&name) {
                continue;
            }
            for (offset, bytes) in unsynced {
                let mut at = 0;
                while at < bytes.len() {
                    let here = offset + at as u64;
                    let end = bytes.len().min(at + (SECTOR - here % SECTOR) as usize);
                    if chance.random_bool(keep) {
                        put(&mut content, here, &bytes[at..end]);
                    }
                    at = end;
                }
            }
            fs::write(image.path().join(name), content).unwrap();
        }
        image
    }
}

fn put(content: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    content.resize(content.len().max(end), 0);
    content[start..end].copy_from_slice(bytes);
}

/// In memory where that can be had: these tests sync thousands of times.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

// ---- what is done to the log ----

/// An operation; can be given to any number of logs.
#[derive(Clone, Debug)]
enum Op {
    Append(u64, Vec<Bytes>),
    Vote(u64),
    Truncate(Option<u64>),
    Purge(u64),
    Committed(u64),
}

fn word(number: u64) -> Bytes {
    number.to_be_bytes().to_vec().into()
}

impl Op {
    /// One that the log can be asked for where it stands.
    fn draw(chance: &mut StdRng, extent: Extent, number: u64) -> Op {
        let first = first_after(extent.purged);
        let next = extent.last.map_or(first, |last| last + 1);
        match chance.random_range(0..10) {
            0..=4 => {
                let sizes = (0..chance.random_range(1..5)).map(|_| match chance.random_range(0..8) {
                    0 => chance.random_range(0..3000),
                    _ => chance.random_range(0..120),
                });
                // Another record for each time that an index is written.
                Op::Append(next, sizes.map(|size| vec![number as u8 | 1; size].into()).collect())
            }
            5 => Op::Vote(number),
            6 => Op::Truncate(next.checked_sub(chance.random_range(1..6))),
            7 => Op::Purge(first + chance.random_range(0..8)),
            _ => Op::Committed(number),
        }
    }

    fn op(&self, done: Done) -> LogOp {
        match self {
            Op::Append(first, records) => {
                LogOp::Append { records: (*first..).zip(records.iter().cloned()).collect(), done }
            }
            Op::Vote(number) => LogOp::SaveVote { vote: word(*number), done },
            Op::Truncate(last) => LogOp::TruncateAfter { last: *last },
            Op::Purge(upto) => LogOp::Purge { upto: *upto, position: word(*upto) },
            Op::Committed(number) => LogOp::SaveCommitted { position: word(*number) },
        }
    }

    fn is_acknowledged(&self) -> bool {
        matches!(self, Op::Append(..) | Op::Vote(_))
    }
}

/// What a log says of itself.
type Story = (Recovered, Vec<(u64, Bytes)>);

fn story(log: &dyn LogEngine) -> Result<Story, StorageError> {
    let recovered = log.recover(0, &|_, _| Ok(()))?;
    let first = recovered.first_index();
    Ok((recovered, log.read(first..u64::MAX, usize::MAX)?))
}

/// What a log says after each number of these operations.
fn stories(before: &[Op], ops: &[Op]) -> Vec<Story> {
    let twin = MemoryLog::new(Arc::new(|error| panic!("the twin failed: {error}")));
    before.iter().for_each(|op| twin.submit(op.op(Box::new(|_| ()))));
    let mut stories = vec![story(&twin).unwrap()];
    for op in ops {
        twin.submit(op.op(Box::new(|_| ())));
        stories.push(story(&twin).unwrap());
    }
    stories
}

fn fatal() -> FatalHook {
    Arc::new(|error| panic!("the log failed: {error}"))
}

fn open(path: &Path, options: &SegmentLogOptions) -> Result<SegmentLog, StorageError> {
    SegmentLog::open(path, options, SystemEnv::shared(), fatal())
}

/// Opens the log in `path` and does `ops`, some while others wait. What happened
/// to the files.
fn run(path: &Path, options: &SegmentLogOptions, ops: &[Op], chance: &mut StdRng) -> Vec<(String, Happened)> {
    let tap = Arc::new(Mutex::new(Vec::new()));
    let mut directory = Directory::new(path);
    directory.tap = Some(tap.clone());
    let log = SegmentLog::open_in(directory, options, SystemEnv::shared(), fatal()).unwrap();
    tap.lock().push((String::new(), Happened::Acknowledged(0)));
    let (tell, told) = mpsc::sync_channel(ops.len());
    let mut waiting = 0;
    for (number, op) in ops.iter().enumerate() {
        let (tap, tell) = (tap.clone(), tell.clone());
        log.submit(op.op(Box::new(move |result| {
            result.unwrap();
            tap.lock().push((String::new(), Happened::Acknowledged(number + 1)));
            tell.send(()).unwrap();
        })));
        waiting += usize::from(op.is_acknowledged());
        if chance.random_bool(0.5) {
            (0..std::mem::take(&mut waiting)).for_each(|_| told.recv().unwrap());
        }
    }
    drop(log);
    Arc::into_inner(tap).unwrap().into_inner()
}

fn draw_ops(chance: &mut StdRng, before: &[Op], count: usize) -> Vec<Op> {
    let mut ops = before.to_vec();
    let mut extent = Extent::default();
    for number in 0..before.len() + count {
        if number >= before.len() {
            ops.push(Op::draw(chance, extent, number as u64));
        }
        match &ops[number] {
            Op::Append(first, records) => extent.extend(*first..*first + records.len() as u64).unwrap(),
            Op::Truncate(last) => drop(extent.truncate(*last)),
            Op::Purge(upto) => drop(extent.purge(*upto)),
            Op::Vote(_) | Op::Committed(_) => {}
        }
    }
    ops.split_off(before.len())
}

/// Runs operations until some moment at which the process is killed or the power
/// fails, and checks that the log stands where a prefix of them leaves it that has
/// all that was acknowledged; then goes on from there.
fn crashes(chance: &mut StdRng, options: &SegmentLogOptions, generations: usize) {
    let (mut image, mut before) = (scratch(), Vec::new());
    let (mut disk, mut was_killed) = (Disk::default(), false);
    for _ in 0..generations {
        let count = chance.random_range(1..20);
        let ops = draw_ops(chance, &before, count);
        let stories = stories(&before, &ops);
        let events = run(image.path(), options, &ops, chance);
        let opened = events.iter().position(|(_, happened)| matches!(happened, Happened::Acknowledged(0)));
        let mut next = None;
        for _ in 0..8 {
            // What a kill left unsynced is safe once the log is open again, and not before.
            let earliest = if was_killed { opened.unwrap() + 1 } else { 0 };
            let moment = chance.random_range(earliest..=events.len());
            let (mut disk, mut acknowledged) = (disk.clone(), 0);
            for (name, happened) in &events[..moment] {
                disk.happen(name, happened);
                if let Happened::Acknowledged(count) = happened {
                    acknowledged = acknowledged.max(*count);
                }
            }
            let killed = chance.random_bool(0.3);
            let keep = if killed { 1.0 } else { [0.0, 0.1, 0.5, 0.9, 1.0][chance.random_range(0..5)] };
            let crashed = disk.clone().fail(chance, keep);
            let (copy, disk) =
                (copy_of(crashed.path()), if killed { disk } else { Disk::of(crashed.path()) });
            let found = open(crashed.path(), options).and_then(|log| story(&log));
            let found = found.unwrap_or_else(|error| panic!("moment {moment} of {events:?}: {error}"));
            let survived = (acknowledged..=ops.len()).rev().find(|count| stories[*count] == found);
            let Some(survived) = survived else {
                panic!(
                    "{found:?} is no prefix of {ops:?} that has {acknowledged}; moment {moment} of {events:?}"
                );
            };
            // Opened again, with nothing written, it says the same.
            assert_eq!(story(&open(crashed.path(), options).unwrap()).unwrap(), found);
            next = Some((copy, disk, killed, survived));
        }
        let survived;
        (image, disk, was_killed, survived) = next.expect("there were crashes");
        before.extend_from_slice(&ops[..survived]);
    }
}

fn copy_of(directory: &Path) -> tempfile::TempDir {
    let copy = scratch();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn options() -> impl Strategy<Value = SegmentLogOptions> {
    let segment_bytes = prop_oneof![Just(1), 100u64..4000, Just(1 << 20)];
    let ahead_bytes = prop_oneof![Just(0), Just(8), Just(512), Just(3000), Just(1 << 16)];
    (segment_bytes, ahead_bytes)
        .prop_map(|(segment_bytes, ahead_bytes)| SegmentLogOptions { segment_bytes, ahead_bytes })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_keeps_all_that_was_acknowledged_and_nothing_by_halves(seed: u64, options in options()) {
        crashes(&mut StdRng::seed_from_u64(seed), &options, 3);
    }

    #[test]
    fn a_log_closed_and_opened_says_the_same_wherever_segments_end(seed: u64, options in options()) {
        let mut chance = StdRng::seed_from_u64(seed);
        let (directory, mut done) = (scratch(), Vec::new());
        for _ in 0..4 {
            let count = chance.random_range(0..30);
            let ops = draw_ops(&mut chance, &done, count);
            run(directory.path(), &options, &ops, &mut chance);
            done.extend(ops);
            let log = open(directory.path(), &options).unwrap();
            let (recovered, records) = story(&log).unwrap();
            prop_assert_eq!(&(recovered.clone(), records.clone()), &stories(&done, &[])[0]);
            let held: usize = records.iter().map(|(_, record)| record.len()).sum();
            prop_assert!(log.held_bytes() > 0 || held == 0);
            // Any part of it can be read.
            let first = recovered.first_index();
            let from = first + chance.random_range(0..=records.len()) as u64;
            let to = from + chance.random_range(0..10);
            let expected: Vec<_> =
                records.into_iter().filter(|(index, _)| (from..to).contains(index)).collect();
            prop_assert_eq!(&log.read(from..to, usize::MAX).unwrap(), &expected);
            let limited = log.read(from..to, 1).unwrap();
            prop_assert!(expected.starts_with(&limited) && (limited.is_empty() == expected.is_empty()));
        }
    }

    #[test]
    fn arbitrary_bytes_for_files_never_panic(
        files in proptest::collection::vec((1u64..5, proptest::collection::vec(any::<u8>(), 0..300)), 0..4),
    ) {
        let directory = scratch();
        for (sequence, rest) in &files {
            let content = [&format::header(*sequence, 7)[..], rest].concat();
            fs::write(Directory::new(directory.path()).path_of(*sequence), content).unwrap();
        }
        prop_assert!(files.is_empty() || open(directory.path(), &SegmentLogOptions::default()).is_err());
    }
}

// ---- damage ----

/// A small log with something of everything, in three segments, as a kill leaves
/// it; and what it says after each operation.
fn small() -> (tempfile::TempDir, Vec<Story>) {
    let record = |byte: u8, length| Bytes::from(vec![byte; length]);
    let ops = [
        Op::Vote(1),
        Op::Append(0, vec![record(1, 30), record(2, 0), record(3, 70)]),
        Op::Append(3, vec![record(4, 200)]),
        Op::Committed(1),
        Op::Append(4, vec![record(5, 200), record(6, 60)]),
        Op::Truncate(Some(3)),
        Op::Append(4, vec![record(7, 201)]),
        Op::Purge(0),
        Op::Append(5, vec![record(8, 100)]),
        Op::Vote(9),
        Op::Append(6, vec![record(9, 100), record(10, 90), record(11, 80)]),
    ];
    let directory = scratch();
    let options = SegmentLogOptions { segment_bytes: 600, ahead_bytes: 512 };
    let log = open(directory.path(), &options).unwrap();
    for op in &ops {
        let (tell, told) = mpsc::sync_channel(1);
        log.submit(op.op(Box::new(move |result| tell.send(result).unwrap())));
        if op.is_acknowledged() {
            told.recv().unwrap().unwrap();
        }
    }
    drop(log);
    (directory, stories(&[], &ops))
}

fn contents(path: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut contents: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    contents.sort();
    contents
}

/// Where the frames of a file stand.
fn frames(content: &[u8], sequence: u64) -> Vec<Range<usize>> {
    let id = parse_header(content, sequence).unwrap();
    let mut at = HEADER_BYTES;
    let mut found = Vec::new();
    while let Ok(frame) = parse_frame(&content[at..], id, at as u64) {
        found.push(at..at + frame.span());
        at += frame.span();
    }
    found
}

fn restore(contents: &[(std::path::PathBuf, Vec<u8>)]) {
    contents.iter().for_each(|(path, content)| fs::write(path, content).unwrap());
}

#[test]
fn every_flipped_byte_is_found_or_was_not_acknowledged() {
    let (directory, stories) = small();
    let (whole, before_last) = (stories.last().unwrap(), &stories[stories.len() - 2]);
    let contents = contents(directory.path());
    assert_eq!(contents.len(), 3);
    let newest = &contents[2].1;
    let last_frame = frames(newest, 3).pop().unwrap();
    let (mut found, mut cut) = (0, 0);
    for (number, (path, content)) in contents.iter().enumerate() {
        for at in 0..content.len() {
            let mut damaged = content.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(path, damaged).unwrap();
            let said = open(directory.path(), &SegmentLogOptions::default()).and_then(|log| story(&log));
            match said {
                Err(StorageError::Corrupt { what, .. }) => {
                    assert!(what.contains(".log"), "byte {at} of {path:?}: {what}");
                    found += 1;
                }
                Err(error) => panic!("byte {at} of {path:?}: {error}"),
                Ok(said) if number == 2 && last_frame.contains(&at) => {
                    assert!(said == *before_last, "byte {at} of {path:?}: {said:?}");
                    cut += 1;
                }
                Ok(said) => assert!(said == *whole, "byte {at} of {path:?}: {said:?}"),
            }
            restore(&contents);
        }
    }
    // Both did happen, and only the frame that nothing vouches for was taken for torn.
    assert!(found > 1000 && cut == last_frame.len(), "{found} were found, {cut} cut");
}

#[test]
fn the_last_batch_is_there_whole_or_not_at_all_wherever_it_is_cut() {
    let (directory, stories) = small();
    let (whole, before_last) = (stories.last().unwrap(), &stories[stories.len() - 2]);
    let contents = contents(directory.path());
    let (path, newest) = &contents[2];
    let last = frames(newest, 3).pop().unwrap();
    for at in last.clone() {
        // The file ends there; or the rest is as it was before.
        let zeroed = [&newest[..at], &vec![0; newest.len() - at]].concat();
        for damaged in [newest[..at].to_vec(), zeroed] {
            let same = damaged == *newest;
            fs::write(path, damaged).unwrap();
            let log = open(directory.path(), &SegmentLogOptions::default()).unwrap();
            assert!(story(&log).unwrap() == *if same { whole } else { before_last }, "cut at {at}");
            drop(log);
            restore(&contents);
        }
    }
}

#[test]
fn what_was_cut_off_never_comes_back() {
    let directory = scratch();
    let options = SegmentLogOptions::default();
    let append = |log: &SegmentLog, index| {
        let (tell, told) = mpsc::sync_channel(1);
        let done = Box::new(move |result| tell.send(result).unwrap());
        log.submit(LogOp::Append { records: vec![(index, Bytes::from_static(b"record."))], done });
        told.recv().unwrap().unwrap();
    };
    let log = open(directory.path(), &options).unwrap();
    append(&log, 0);
    // Written together with the next and not synced, so that both may be torn; of one length.
    log.submit(LogOp::SaveCommitted { position: Bytes::from_static(b"length of 11") });
    log.submit(LogOp::SaveCommitted { position: Bytes::from_static(b"never again!") });
    drop(log);
    let path = Directory::new(directory.path()).path_of(1);
    let mut content = fs::read(&path).unwrap();
    let frames = frames(&content, 1);
    assert_eq!(frames.len(), 4);
    content[frames[2].clone()].fill(0);
    fs::write(&path, content).unwrap();
    let log = open(directory.path(), &options).unwrap();
    assert_eq!(log.recover(0, &|_, _| Ok(())).unwrap().committed, None);
    // As long as what was there.
    append(&log, 1);
    drop(log);
    let content = fs::read(&path).unwrap();
    assert!(content[frames[3].start..].iter().all(|byte| *byte == 0));
    let recovered = open(directory.path(), &options).unwrap().recover(0, &|_, _| Ok(())).unwrap();
    assert_eq!((recovered.committed, recovered.last.unwrap().0), (None, 1));
}

#[test]
fn a_purge_is_durable_before_what_it_frees_is_removed() {
    let directory = scratch();
    let options = SegmentLogOptions { segment_bytes: 1, ahead_bytes: 0 };
    let mut chance = StdRng::seed_from_u64(1);
    let append = |index| Op::Append(index, vec![word(index)]);
    run(directory.path(), &options, &[append(0), append(1), append(2)], &mut chance);
    // Alone, so that nothing else syncs it.
    let events = run(directory.path(), &options, &[Op::Purge(1)], &mut chance);
    let removed = events.iter().position(|(_, what)| matches!(what, Happened::Removed)).unwrap();
    let mut disk = Disk::default();
    events[..removed].iter().for_each(|(name, happened)| {
        if let Happened::Created(_) | Happened::Written(..) | Happened::Synced = happened {
            disk.files.entry(name.clone()).or_default();
        }
        disk.happen(name, happened);
    });
    let unsynced: Vec<_> = disk.files.iter().filter(|(_, (_, unsynced))| !unsynced.is_empty()).collect();
    // But for the note in an older segment that there is a next one, on which nothing rests.
    assert!(
        unsynced
            .iter()
            .all(|(_, (_, writes))| writes.iter().all(|(_, bytes)| bytes[12] == Kind::Sealed as u8)),
        "{unsynced:?}"
    );
    let log = open(directory.path(), &options).unwrap();
    assert_eq!(story(&log).unwrap().1, [(2, word(2))]);
}

#[test]
fn frames_are_bound_to_their_place() {
    let frame = |id, offset| {
        let mut bytes = Vec::new();
        push_frame(&mut bytes, Position { id, offset, synced: 0 }, Kind::Vote, 0, |to| to.push(7));
        bytes
    };
    let bytes = frame(1, 64);
    assert_eq!(bytes.len(), (FRAME_HEADER_BYTES + 1).next_multiple_of(ALIGNMENT));
    assert_eq!(parse_frame(&bytes, 1, 64).unwrap().payload, [7]);
    assert!(parse_frame(&bytes, 2, 64).is_err() && parse_frame(&bytes, 1, 72).is_err());
    assert!(parse_frame(&bytes[..bytes.len() - 1], 1, 64).is_err());
}

#[test]
fn the_format_of_a_segment_holds_still() {
    let header = format::header(2, 3);
    assert_eq!(header[..12], [b"mainslog", &[1, 0, 0, 0][..]].concat());
    assert_eq!(header[16..], [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    let mut frame = Vec::new();
    let at = Position { id: 3, offset: 64, synced: 5 };
    push_frame(&mut frame, at, Kind::Records, 9, |to| push_records(to, &[(9, Bytes::from_static(b"ab"))]));
    let mut covered = vec![6, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(frame[8..32], covered);
    assert_eq!(frame[32..], [2, 0, 0, 0, b'a', b'b', 0, 0]);
    assert_eq!(frame[4..8], crc32c::crc32c(&frame[32..38]).to_le_bytes());
    let place = [3u64.to_le_bytes(), 64u64.to_le_bytes()].concat();
    covered.splice(..0, [&place, &frame[4..8]].concat());
    assert_eq!(frame[..4], crc32c::crc32c(&covered).to_le_bytes());
}
