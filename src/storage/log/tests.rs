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

fn open(path: &Path) -> Result<RocksLog, StorageError> {
    let fatal: FatalHook = Arc::new(|error| panic!("the log failed: {error}"));
    RocksLog::open(path, &RocksLogOptions::default(), SystemEnv::shared(), fatal)
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

fn files(path: &Path, extension: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    paths
}

fn largest(path: &Path, extension: &str) -> PathBuf {
    files(path, extension).into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 0x10;
    fs::write(path, bytes).unwrap();
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
    let wal = largest(image.path(), "log");
    let bytes = fs::metadata(&wal).unwrap().len();
    fs::File::options().write(true).open(&wal).unwrap().set_len(bytes - 50).unwrap();
    let recovered = recover(image.path(), 0).unwrap();
    assert_eq!(last_index(&recovered), Some(18));
}

#[test]
fn a_flipped_byte_in_the_middle_of_the_wal_is_an_error_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    (0..20).for_each(|index| append(&log, index..index + 1));
    let image = killed(dir.path());
    let wal = largest(image.path(), "log");
    flip(&wal, fs::metadata(&wal).unwrap().len() / 2);
    let error = recover(image.path(), 0).unwrap_err();
    assert!(matches!(error, StorageError::Engine(_)), "{error}");
}

/// A log whose records are in a table: a reopened database flushes its WAL.
fn in_a_table(dir: &Path) {
    append(&open(dir).unwrap(), 0..2000);
    drop(open(dir).unwrap());
    assert!(!files(dir, "sst").is_empty());
}

#[test]
fn a_flipped_byte_in_a_table_is_an_error_before_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    in_a_table(dir.path());
    let table = largest(dir.path(), "sst");
    // In the midst of the data: opening reads the first and the last record.
    flip(&table, fs::metadata(&table).unwrap().len() / 3);
    recover(dir.path(), 0).unwrap_err();
    // Above the damage nothing is wrong, and the log opens; the damaged
    // record is an error when it is read.
    let log = open(dir.path()).unwrap();
    assert_eq!(last_index(&log.recover(1990, &verify).unwrap()), Some(1999));
    assert!(log.read(0..1990, usize::MAX).is_err());
    assert_eq!(log.read(1990..2000, usize::MAX).unwrap().len(), 10);
}

#[test]
fn a_missing_table_is_an_error_at_open() {
    let dir = tempfile::tempdir().unwrap();
    in_a_table(dir.path());
    fs::remove_file(largest(dir.path(), "sst")).unwrap();
    assert!(matches!(recover(dir.path(), 0), Err(StorageError::Engine(_))));
}

/// A killed log with two live WALs, the older of which holds the vote.
fn with_two_wals() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let fatal: FatalHook = Arc::new(|error| panic!("the log failed: {error}"));
    let options = RocksLogOptions { write_buffer_bytes: 64 << 10, ..RocksLogOptions::default() };
    let log = RocksLog::open(dir.path(), &options, SystemEnv::shared(), fatal).unwrap();
    log.submit(LogOp::SaveVote { vote: Bytes::from_static(b"vote"), done: Box::new(|_| ()) });
    let mut index = 0;
    while files(dir.path(), "log").len() < 2 {
        append(&log, index..index + 10);
        index += 10;
    }
    append(&log, index..index + 10);
    killed(dir.path())
}

#[test]
fn an_older_wal_that_is_missing_or_cut_is_an_error_at_open() {
    let image = with_two_wals();
    assert!(recover(image.path(), 0).unwrap().vote.is_some());

    let image = with_two_wals();
    fs::remove_file(&files(image.path(), "log")[0]).unwrap();
    assert!(matches!(recover(image.path(), 0), Err(StorageError::Engine(_))));

    let image = with_two_wals();
    let older = &files(image.path(), "log")[0];
    let bytes = fs::metadata(older).unwrap().len();
    fs::File::options().write(true).open(older).unwrap().set_len(bytes / 2).unwrap();
    assert!(matches!(recover(image.path(), 0), Err(StorageError::Engine(_))));
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
    let log = RocksLog::open(dir.path(), &RocksLogOptions::default(), SystemEnv::shared(), fatal).unwrap();
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
