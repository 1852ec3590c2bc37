//! Where the records are: runs of them, each in one stretch of one file. It
//! knows one run for each [`RUN_BYTES`], not each record, so that 4 GiB of log
//! are 32,768 runs; who reads finds a record by reading its run.
//!
//! Invariants: the runs are consecutive in their indexes and ordered in their
//! segments; records in a run's place beyond its indexes were taken away.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;

use super::super::{HeldBytes, StorageError, corrupt};
use super::files::SegmentRef;
use super::format::{Kind, Placed, Step, parse_frame, parse_records};

/// A run is closed when it has this many bytes.
pub const RUN_BYTES: u64 = 128 << 10;

/// Records in one stretch of a file.
#[derive(Clone)]
pub struct Run {
    segment: SegmentRef,
    placed: Placed,
}

/// Where all records are.
#[derive(Default)]
pub struct Index {
    runs: VecDeque<Run>,
    /// Nothing is added to the newest run any more: it holds records in the
    /// file that are not in it.
    closed: bool,
    /// How many bytes.
    pub held: HeldBytes,
}

impl Index {
    /// Takes note of what frames of `segment` did.
    pub fn apply(&mut self, segment: &SegmentRef, step: &Step) {
        match step {
            Step::Records(placed) => self.add(segment, placed),
            Step::Truncate(from) => self.truncate(*from),
            Step::Purge(upto) => self.purge(*upto),
        }
    }

    fn add(&mut self, segment: &SegmentRef, placed: &Placed) {
        self.held.append_all(placed.indexes.clone(), placed.bytes);
        let open =
            self.runs.back_mut().filter(|run| !self.closed && run.segment.sequence == segment.sequence);
        if !open.is_some_and(|run| run.placed.extend(placed, RUN_BYTES)) {
            self.runs.push_back(Run { segment: segment.clone(), placed: placed.clone() });
        }
        self.closed = false;
    }

    fn truncate(&mut self, from: u64) {
        self.held.truncate_from(from);
        self.closed = true;
        while let Some(back) = self.runs.back_mut() {
            back.placed.indexes.end = back.placed.indexes.end.min(from);
            if !back.placed.indexes.is_empty() {
                break;
            }
            self.runs.pop_back();
        }
    }

    fn purge(&mut self, upto: u64) {
        self.held.purge(upto);
        while let Some(front) = self.runs.front_mut() {
            front.placed.indexes.start = front.placed.indexes.start.max(upto.saturating_add(1));
            if !front.placed.indexes.is_empty() {
                break;
            }
            self.runs.pop_front();
        }
    }

    /// The first record's index.
    pub fn first(&self) -> Option<u64> {
        self.runs.front().map(|run| run.placed.indexes.start)
    }

    /// The oldest segment that holds a record.
    pub fn oldest_segment(&self) -> Option<u64> {
        self.runs.front().map(|run| run.segment.sequence)
    }

    /// The run with the record `index`; `None` beyond the end.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when only a later record is there that is below `end`.
    pub fn run_of(&self, index: u64, end: u64) -> Result<Option<Run>, StorageError> {
        let at = self.runs.partition_point(|run| run.placed.indexes.end <= index);
        match self.runs.get(at) {
            Some(run) if run.placed.indexes.start <= index => Ok(Some(run.clone())),
            Some(run) if run.placed.indexes.start < end => {
                let next = run.placed.indexes.start;
                Err(corrupt(format!("record {index} is missing; the next one is {next}")))
            }
            _ => Ok(None),
        }
    }
}

impl Run {
    /// Adds this run's records of `range` to `records`, until they have more than
    /// `limit_bytes` together with `bytes`, which grows by them.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] for damage, [`StorageError::Io`].
    pub fn read(
        &self,
        range: Range<u64>,
        limit_bytes: usize,
        bytes: &mut usize,
        records: &mut Vec<(u64, Bytes)>,
    ) -> Result<(), StorageError> {
        let Placed { indexes, place, .. } = &self.placed;
        let (segment, file) = (&self.segment, &self.segment.file);
        let wanted = range.start.max(indexes.start)..range.end.min(indexes.end);
        let content = Bytes::from(file.read(place.start, (place.end - place.start) as usize)?);
        let mut next = wanted.start;
        let mut at = 0;
        while at < content.len() && next < wanted.end && *bytes < limit_bytes {
            let offset = place.start + at as u64;
            let frame = parse_frame(&content[at..], segment.id, offset);
            let frame = frame.map_err(|reason| file.corrupt(offset, reason))?;
            if frame.head.kind == Kind::Records {
                let placed = parse_records(frame.payload).map_err(|reason| file.corrupt(offset, reason))?;
                let end = frame.head.index.saturating_add(placed.len() as u64);
                for (index, record) in (frame.head.index..end).zip(placed) {
                    if index == next && next < wanted.end && *bytes < limit_bytes {
                        *bytes += record.len();
                        records.push((index, content.slice_ref(&frame.payload[record])));
                        next += 1;
                    }
                }
            }
            at += frame.span();
        }
        match next < wanted.end && *bytes < limit_bytes {
            true => Err(file.corrupt(place.start, format_args!("record {next} is missing"))),
            false => Ok(()),
        }
    }
}
