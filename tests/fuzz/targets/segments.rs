//! The files of the log: what a disk may make of the newest two.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;

use mainstay::env::Env;
use mainstay::raft::{LogId, record};
use mainstay::storage::StorageError;
use mainstay::storage::layout::LogPosition;
use mainstay::storage::log::{Done, LogEngine, LogOp, Recovered, SegmentLog, SegmentLogOptions};

use super::log::draw_entry;
use super::{BASE, Input, Target, Verdict, seal_value};
use crate::mutate::Rng;
use crate::scratch::scratch;

pub const SEGMENTS: Target = Target {
    name: "segments",
    what: "the files of the log, from disk",
    draw: draw_files,
    seal: |bytes| {
        let (first, second) = split(bytes);
        let (first, second) = (sealed(first, 1), sealed(second, 2));
        *bytes = join(&first, &second);
    },
    run: |bytes| {
        let dir = empty_dir();
        let (first, second) = split(bytes);
        fs::write(path_of(&dir, 1), first).expect("the scratch file is written");
        if !second.is_empty() {
            fs::write(path_of(&dir, 2), second).expect("the scratch file is written");
        }
        let Ok((recovered, records)) = read_all(&dir) else { return Verdict::Refused };
        for ((index, bytes), expected) in records.iter().zip(recovered.first_index()..) {
            assert_eq!(*index, expected);
            record::verify(*index, bytes).expect("what is read was verified");
        }
        assert_eq!(records.last(), recovered.last.as_ref());
        let again = (recovered, records);
        let files = (content_of(&dir, 1), content_of(&dir, 2));
        assert_eq!(read_all(&dir).expect("what was accepted is accepted again"), again);
        Verdict::Accepted(join(&files.0, &files.1))
    },
    ..BASE
};

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 32;
/// The kind of frame that holds a value in the envelope of `storage::codec`.
const CHECKPOINT: u32 = 6;

fn empty_dir() -> PathBuf {
    let dir = scratch().join("log");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).expect("the scratch directory is made");
    dir
}

fn path_of(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("{sequence:016}.log"))
}

fn content_of(dir: &Path, sequence: u64) -> Vec<u8> {
    fs::read(path_of(dir, sequence)).unwrap_or_default()
}

fn open(dir: &Path) -> Result<SegmentLog, StorageError> {
    // Rarely another segment, and few zeros.
    let options = SegmentLogOptions { segment_bytes: 1500, ahead_bytes: 128 };
    let fatal = Arc::new(|error: &StorageError| panic!("the log failed: {error}"));
    SegmentLog::open(dir, &options, Arc::new(SameIds), fatal)
}

type Content = (Recovered, Vec<(u64, Bytes)>);

fn read_all(dir: &Path) -> Result<Content, StorageError> {
    let log = open(dir)?;
    let recovered = log.recover(0, &record::verify)?;
    let records = log.read(recovered.first_index()..u64::MAX, usize::MAX)?;
    Ok((recovered, records))
}

/// What a log writes that is given a few operations, up to its second file.
fn draw_files(rng: &mut Rng) -> Input {
    let dir = empty_dir();
    let log = open(&dir).expect("an empty log can be opened");
    let (mut first, mut next) = (0, 0);
    for number in 0..rng.below(10) as u64 {
        let held = next - first;
        match rng.below(7) {
            0 if held > 0 => {
                next -= 1 + rng.below(held as usize) as u64;
                log.submit(LogOp::TruncateAfter { last: next.checked_sub(1) });
            }
            1 if held > 0 => {
                let upto = first + rng.below(held as usize) as u64;
                log.submit(LogOp::Purge { upto, position: position(upto) });
                first = upto + 1;
            }
            2 => log.submit(LogOp::SaveCommitted { position: position(number) }),
            3 => wait(|done| log.submit(LogOp::SaveVote { vote: position(number), done })),
            _ => {
                let end = next + 1 + rng.below(3) as u64;
                let records = (next..end).map(|index| (index, draw_record(rng, index))).collect();
                wait(|done| log.submit(LogOp::Append { records, done }));
                next = end;
            }
        }
        if path_of(&dir, 2).exists() {
            break;
        }
    }
    drop(log);
    let (oldest, newest) = (content_of(&dir, 1), content_of(&dir, 2));
    Input { is_whole: !oldest.is_empty(), bytes: join(&oldest, &newest) }
}

fn draw_record(rng: &mut Rng, index: u64) -> Bytes {
    let mut entry = draw_entry(rng);
    entry.log_id = LogId::from(LogPosition { term: 1, node: 1, index });
    record::encode_entry(&entry)
}

fn position(index: u64) -> Bytes {
    record::encode_position(Some(&LogId::from(LogPosition { term: 1, node: 1, index }))).into()
}

/// Does what calls back, and waits until it has.
fn wait(work: impl FnOnce(Done)) {
    let (tell, told) = mpsc::sync_channel(1);
    work(Box::new(move |result| tell.send(result).expect("it is waited for")));
    told.recv().expect("it answers").expect("it can be written");
}

/// Two files as one input: the first behind its length.
fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    [&(first.len() as u32).to_le_bytes()[..], first, second].concat()
}

fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return (&[], &[]) };
    rest.split_at(rest.len().min(u32::from_le_bytes(*length) as usize))
}

/// Makes the checksums of a file right, as far as it can be read.
fn sealed(file: &[u8], sequence: u64) -> Vec<u8> {
    let mut file = file.to_vec();
    if file.len() < HEADER_BYTES {
        return file;
    }
    file[..8].copy_from_slice(b"mainslog");
    file[8..12].copy_from_slice(&1u32.to_le_bytes());
    file[16..24].copy_from_slice(&sequence.to_le_bytes());
    let sum = crc32c::crc32c(&[&file[..12], &file[16..HEADER_BYTES]].concat());
    file[12..16].copy_from_slice(&sum.to_le_bytes());
    let id = file[24..HEADER_BYTES].to_vec();
    let mut at = HEADER_BYTES;
    while let Some(frame) = file.get_mut(at..).filter(|frame| frame.len() >= FRAME_HEADER_BYTES) {
        let (header, rest) = frame.split_at_mut(FRAME_HEADER_BYTES);
        if *header == [0; FRAME_HEADER_BYTES] {
            break;
        }
        let length = u32_at(header, 8) as usize % (rest.len() + 1);
        header[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        let kind = if at == HEADER_BYTES { CHECKPOINT } else { u32_at(header, 12) % 8 };
        header[12..16].copy_from_slice(&kind.to_le_bytes());
        let payload = &mut rest[..length];
        if kind == CHECKPOINT {
            seal_value(payload);
        }
        header[4..8].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        let covered = [&id, &(at as u64).to_le_bytes()[..], &header[4..]].concat();
        header[..4].copy_from_slice(&crc32c::crc32c(&covered).to_le_bytes());
        at += (FRAME_HEADER_BYTES + length).next_multiple_of(8);
    }
    file
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Ids that are always the same, so that a seed repeats a run.
struct SameIds;

impl Env for SameIds {
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn wall_ms(&self) -> u64 {
        0
    }

    fn random_u64(&self) -> u64 {
        7
    }
}
