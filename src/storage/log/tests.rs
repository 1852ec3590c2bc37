//! The engines themselves: what a kill, a torn tail and each kind of damage
//! give, and that the accounting of bytes holds.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use proptest::prelude::*;

use super::*;
use crate::env::SystemEnv;

/// A record that says its own index and is long enough to be damaged anywhere.
fn record(index: u64) -> Bytes {
    let mut bytes = index.to_be_bytes().to_vec();
    bytes.extend((0..200u64).map(|at| (at * 31 + index * 7) as u8));
    bytes.into()
}

fn verify(index: u64, bytes: &[u8]) -> Result<(), StorageError> {
    match *bytes == *record(index) {
        true => Ok(()),
        false => Err(corrupt(format!("record {index} is damaged"))),
    }
}

fn open(path: &Path) -> Result<SegmentLog, StorageError> {
    open_with(path, &SegmentLogOptions::default())
}

fn open_with(path: &Path, options: &SegmentLogOptions) -> Result<SegmentLog, StorageError> {
    let fatal: FatalHook = Arc::new(|error| panic!("the log failed: {error}"));
    SegmentLog::open(path, options, SystemEnv::shared(), fatal)
}

/// Opens and verifies, as a node does.
fn recover(path: &Path, verify_from: u64) -> Result<Recovered, StorageError> {
    open(path)?.recover(verify_from, &verify)
}

fn append(log: &dyn LogEngine, indexes: Range<u64>) {
    let (tell, told) = mpsc::sync_channel(2);
    let records = indexes.map(|index| (index, record(index))).collect();
    let done = Box::new(move |result| tell.send(result).unwrap());
    log.submit(LogOp::Append { records, done });
    told.recv().unwrap().unwrap();
}

fn last_index(recovered: &Recovered) -> Option<u64> {
    recovered.last.as_ref().map(|(index, _)| *index)
}

/// What the disk of a killed process looks like: the files as the system has
/// them, without anything a closing database would still do.
fn killed(log: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(log).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Where what was written ends, and the zeros begin.
fn end_of(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
}

fn cut(path: &Path, length: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn is_corrupt(result: Result<Recovered, StorageError>) -> bool {
    matches!(result, Err(StorageError::Corrupt { .. }))
}

#[test]
fn a_killed_process_loses_nothing_that_was_called_back() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    append(&log, 0..50);
    log.submit(LogOp::TruncateAfter { last: Some(39) });
    append(&log, 40..60);
    let image = killed(dir.path());
    let recovered = recover(image.path(), 0).unwrap();
    assert_eq!(last_index(&recovered), Some(59));
}

#[test]
fn a_torn_tail_is_dropped_and_the_rest_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    (0..20).for_each(|index| append(&log, index..index + 1));
    let image = killed(dir.path());
    let newest = &files(image.path())[0];
    cut(newest, end_of(newest) - 50);
    let recovered = recover(image.path(), 0).unwrap();
    assert_eq!(last_index(&recovered), Some(18));
}

#[test]
fn a_flipped_byte_in_the_middle_of_the_newest_segment_is_an_error_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    (0..20).for_each(|index| append(&log, index..index + 1));
    let image = killed(dir.path());
    let newest = &files(image.path())[0];
    flip(newest, end_of(newest) / 2);
    let error = recover(image.path(), 0).unwrap_err().to_string();
    assert!(error.contains("0000000000000001.log: at offset "), "{error}");
    assert!(error.contains("was synced before"), "{error}");
}

/// A killed log of three segments and more, the oldest of which holds the vote.
fn with_older_segments() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = SegmentLogOptions { segment_bytes: 64 << 10, ..SegmentLogOptions::default() };
    let log = open_with(dir.path(), &options).unwrap();
    log.submit(LogOp::SaveVote { vote: Bytes::from_static(b"vote"), done: Box::new(|_| ()) });
    (0..100).for_each(|step| append(&log, step * 10..step * 10 + 10));
    let image = killed(dir.path());
    assert!(files(image.path()).len() >= 3);
    assert!(recover(image.path(), 0).unwrap().vote.is_some());
    image
}

#[test]
fn a_flipped_byte_in_an_older_segment_is_an_error_before_it_is_served() {
    let dir = with_older_segments();
    let oldest = &files(dir.path())[0];
    flip(oldest, end_of(oldest) / 3);
    assert!(is_corrupt(recover(dir.path(), 0)));
    // Above the damage nothing is wrong, and the log opens; the damaged
    // record is an error when it is read.
    let log = open(dir.path()).unwrap();
    assert_eq!(last_index(&log.recover(990, &verify).unwrap()), Some(999));
    assert!(log.read(0..990, usize::MAX).is_err());
    assert_eq!(log.read(990..1000, usize::MAX).unwrap().len(), 10);
}

#[test]
fn a_segment_that_is_missing_or_cut_is_an_error_at_open() {
    let count = files(with_older_segments().path()).len();
    for damaged in 0..count {
        let image = with_older_segments();
        fs::remove_file(&files(image.path())[damaged]).unwrap();
        let error = recover(image.path(), 1000).unwrap_err();
        assert!(matches!(error, StorageError::Corrupt { .. }), "without segment {damaged}: {error}");
    }
    for damaged in 0..count - 1 {
        let image = with_older_segments();
        let older = &files(image.path())[damaged];
        cut(older, end_of(older) / 2);
        assert!(is_corrupt(recover(image.path(), 1000)), "with segment {damaged} cut");
    }
    // In another's place.
    let image = with_older_segments();
    let all = files(image.path());
    fs::copy(&all[0], &all[1]).unwrap();
    assert!(is_corrupt(recover(image.path(), 1000)));
}

#[test]
fn what_was_purged_goes_away_with_whole_files_and_the_vote_stays() {
    let dir = tempfile::tempdir().unwrap();
    let options = SegmentLogOptions { segment_bytes: 64 << 10, ahead_bytes: 16 << 10 };
    let log = open_with(dir.path(), &options).unwrap();
    log.submit(LogOp::SaveVote { vote: Bytes::from_static(b"vote"), done: Box::new(|_| ()) });
    for step in 0..200 {
        append(&log, step * 10..step * 10 + 10);
        if step % 20 == 0 {
            let position = Bytes::from_static(b"p");
            log.submit(LogOp::Purge { upto: step * 10, position });
        }
    }
    drop(log);
    let left: u64 = files(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(left < 4 * (64 << 10), "{left} bytes are left of 200 records");
    let recovered = recover(dir.path(), 0).unwrap();
    assert_eq!((recovered.first_index(), last_index(&recovered)), (1801, Some(1999)));
    assert_eq!(recovered.vote.as_deref(), Some(&b"vote"[..]));
}

#[test]
fn a_log_without_its_beginning_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    append(&open(dir.path()).unwrap(), 5..10);
    let error = recover(dir.path(), 9).unwrap_err().to_string();
    assert!(error.contains("begin at 0"), "{error}");
}

#[test]
fn a_swept_log_begins_above_its_mark() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    append(&log, 0..25_000);
    for upto in [10, 12_000, 24_000] {
        log.submit(LogOp::Purge { upto, position: Bytes::from_static(b"p") });
    }
    append(&log, 25_000..25_010);
    let held = log.held_bytes();
    assert!((208 * 1009..208 * 1011).contains(&held), "{held}");
    assert_eq!(log.read(24_001..u64::MAX, 1).unwrap()[0].0, 24_001);
    let image = killed(dir.path());
    let recovered = recover(image.path(), 0).unwrap();
    assert_eq!((recovered.first_index(), last_index(&recovered)), (24_001, Some(25_009)));
}

#[test]
fn an_append_that_would_leave_a_hole_fails_and_so_does_all_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let (tell, told) = mpsc::sync_channel(2);
    let fatal: FatalHook = Arc::new(move |error| tell.send(error.to_string()).unwrap());
    let log =
        SegmentLog::open(dir.path(), &SegmentLogOptions::default(), SystemEnv::shared(), fatal).unwrap();
    append(&log, 0..3);
    let (answer, answers) = mpsc::sync_channel(2);
    for index in [7, 3] {
        let answer = answer.clone();
        let done = Box::new(move |result: LogResult| answer.send(result.is_ok()).unwrap());
        log.submit(LogOp::Append { records: vec![(index, record(index))], done });
    }
    assert_eq!([answers.recv().unwrap(), answers.recv().unwrap()], [false, false]);
    assert!(told.recv().unwrap().contains("would leave a hole"));
    assert_eq!(told.try_recv().ok(), None);
    drop(log);
    assert_eq!(last_index(&recover(dir.path(), 0).unwrap()), Some(2));
}

proptest! {
    #[test]
    fn held_bytes_are_those_of_the_records_when_all_are_alike(
        appended in 1u64..5000, cut in 0u64..5000, purged in 0u64..5000, size in 1u64..4000,
    ) {
        let mut held = HeldBytes::default();
        (0..appended).for_each(|index| held.append(index, size));
        held.truncate_from(cut);
        held.purge(purged);
        let left = (purged + 1)..appended.min(cut);
        let count = if left.is_empty() { 0 } else { left.end - left.start };
        prop_assert_eq!(held.total, count * size);
        let floor = held.first_index_within(count / 2 * size);
        if count > 1 {
            prop_assert_eq!(floor, Some(left.end - count / 2));
        }
        prop_assert_eq!(held.first_index_within(u64::MAX), None);
    }

    #[test]
    fn an_extent_agrees_with_a_list_of_indexes(steps in proptest::collection::vec((0u8..3, 0u64..12), 0..40)) {
        let mut extent = Extent::default();
        let (mut list, mut begin): (Vec<u64>, u64) = (Vec::new(), 0);
        for (kind, number) in steps {
            match kind {
                0 => {
                    let end = begin + list.len() as u64;
                    let records: Vec<(u64, Bytes)> =
                        (end..end + number).map(|index| (index, Bytes::new())).collect();
                    extent.append(&records).unwrap();
                    list.extend(end..end + number);
                }
                1 => {
                    let keep = begin + number;
                    let dropped: Vec<u64> = extent.truncate(Some(keep)).collect();
                    let expected: Vec<u64> = list.iter().copied().filter(|index| *index > keep).collect();
                    prop_assert_eq!(dropped, expected);
                    list.retain(|index| *index <= keep);
                }
                _ => {
                    extent.purge(begin + number);
                    begin += number + 1;
                    list.retain(|index| *index >= begin);
                }
            }
            prop_assert_eq!(extent.last, list.last().copied());
        }
    }
}
