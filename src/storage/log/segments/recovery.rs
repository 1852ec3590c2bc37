//! What the files say when they are opened, and what a crash left at their end.
//!
//! Each segment begins with a checkpoint that tells where the records of the one
//! before are, so only the newest is read from end to end: opening costs the
//! same for a gigabyte as for a megabyte. What must agree (ids, sequences, the
//! extent of the log at each checkpoint) is compared, and what does not is damage.
//!
//! The newest segment ends at its first frame that is not whole. That frame was
//! never acknowledged unless it had been synced; and each later frame says up to
//! where everything had been synced when it was written. So a later frame that
//! vouches for the broken one proves damage; without one it is what a crash
//! leaves, and it is overwritten with zeros before anything else is written.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::super::{StorageError, corrupt, first_after};
use super::files::{Directory, Segment, SegmentRef};
use super::format::{
    ALIGNMENT, Checkpoint, FRAME_HEADER_BYTES, Frame, FrameHead, HEADER_BYTES, Kind, Placed, Position,
    Standing, Step, Summary, header, parse_checkpoint, parse_frame, parse_header, parse_records, push_frame,
};

use super::index::{Index, RUN_BYTES};

/// The segment that is written to.
pub struct Tail {
    /// The segment.
    pub segment: SegmentRef,
    /// Where the next frame goes.
    pub offset: u64,
    /// Everything below is durable.
    pub synced: u64,
    /// The file's length: everything from `offset` to here is zero.
    pub zeroed: u64,
    /// What happened in it to the records.
    pub steps: Vec<Step>,
}

/// A log that was opened.
pub struct Opened {
    /// Where it stands.
    pub standing: Standing,
    /// Where its records are.
    pub index: Index,
    /// Its segments, the newest included.
    pub segments: VecDeque<SegmentRef>,
    /// The newest.
    pub tail: Tail,
}

/// One segment and how it begins.
struct Begun {
    segment: SegmentRef,
    checkpoint: Checkpoint,
    /// Where the frames after the checkpoint begin.
    frames: u64,
}

impl Tail {
    /// Begins the segment `sequence`, durably, with zeros up to `length`.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn create(
        directory: &Directory,
        sequence: u64,
        id: u64,
        checkpoint: &Checkpoint,
        length: u64,
    ) -> Result<Tail, StorageError> {
        let mut content = header(sequence, id).to_vec();
        let encoded = crate::storage::codec::encode(checkpoint);
        let at = Position { id, offset: 0, synced: 0 };
        push_frame(&mut content, at, Kind::Checkpoint, 0, |payload| payload.extend_from_slice(&encoded));
        let offset = content.len() as u64;
        let zeroed = offset.max(length);
        content.resize(zeroed as usize, 0);
        let file = directory.create(sequence, &content)?;
        let segment = Arc::new(Segment { sequence, id, file });
        Ok(Tail { segment, offset, synced: offset, zeroed, steps: Vec::new() })
    }

    /// Takes note of a step, joined with the one before where that loses nothing.
    pub fn note(&mut self, step: &Step) {
        let joined = match (self.steps.last_mut(), step) {
            (Some(Step::Records(last)), Step::Records(next)) => last.extend(next, RUN_BYTES),
            _ => false,
        };
        if !joined {
            self.steps.push(step.clone());
        }
    }

    /// What the next segment says of this one.
    pub fn summary(&mut self) -> Summary {
        Summary { id: self.segment.id, end: self.offset, steps: std::mem::take(&mut self.steps) }
    }
}

/// Opens the log in `directory`, or begins one: `id` and `length` are those of
/// its first segment. What is there when this returns is durable.
///
/// # Errors
/// [`StorageError::Corrupt`], saying where, for what no crash leaves;
/// [`StorageError::Io`].
pub fn open(directory: &Directory, id: u64, length: u64) -> Result<Opened, StorageError> {
    let sequences = directory.list()?;
    if sequences.is_empty() {
        let tail = Tail::create(directory, 1, id, &Checkpoint::default(), length)?;
        let segments = VecDeque::from([tail.segment.clone()]);
        return Ok(Opened { standing: Standing::default(), index: Index::default(), segments, tail });
    }
    // What was seen under a name must still be there after a power failure.
    directory.sync()?;
    let connected = connected(&sequences);
    let begun = sequences[connected..].iter().map(|sequence| begin(directory, *sequence));
    let mut begun: Vec<Begun> = begun.collect::<Result<_, _>>()?;
    let mut index = Index::default();
    for pair in 0..begun.len() - 1 {
        let (older, newer) = begun.split_at_mut(pair + 1);
        replay(&older[pair], &mut newer[0], &mut index)?;
    }
    let segments = begun.iter().map(|begun| begun.segment.clone()).collect();
    let newest = begun.pop().ok_or_else(|| corrupt("it has no segment".to_owned()))?;
    let (tail, standing) = scan(newest, &mut index)?;
    let extent = standing.extent;
    let first = first_after(extent.purged);
    if extent.last.is_some() && index.first() != Some(first) {
        let (found, oldest) = (index.first(), sequences[connected]);
        let reason = format!(
            "it should begin at {first}, but the first record is {found:?}; the oldest segment is {oldest}"
        );
        return Err(corrupt(reason));
    }
    // Left over by a crash between two removals.
    sequences[..connected].iter().try_for_each(|sequence| directory.remove(*sequence))?;
    Ok(Opened { standing, index, segments, tail })
}

/// The place of the oldest segment from which on none is missing.
fn connected(sequences: &[u64]) -> usize {
    let gap = sequences.windows(2).rposition(|pair| pair[0] + 1 != pair[1]);
    gap.map_or(0, |gap| gap + 1)
}

fn begin(directory: &Directory, sequence: u64) -> Result<Begun, StorageError> {
    let file = directory.open(sequence)?;
    let frame_at = HEADER_BYTES as u64;
    let bytes = file.read(0, HEADER_BYTES + FRAME_HEADER_BYTES)?;
    let id = parse_header(&bytes, sequence).map_err(|reason| file.corrupt(0, reason))?;
    let broken = |reason: &str| file.corrupt(frame_at, format_args!("its checkpoint: {reason}"));
    let head = FrameHead::parse(&bytes[HEADER_BYTES..], id, frame_at).map_err(broken)?;
    if frame_at + head.span() as u64 > file.length()? {
        return Err(broken("the file ends within it"));
    }
    let bytes = file.read(frame_at, head.span())?;
    let frame = parse_frame(&bytes, id, frame_at).map_err(broken)?;
    if head.kind != Kind::Checkpoint {
        return Err(broken("it does not begin with one"));
    }
    let checkpoint = parse_checkpoint(frame.payload).map_err(|error| broken(&error.to_string()))?;
    let extent = checkpoint.standing.extent;
    if extent.last.is_some_and(|last| last == u64::MAX || last < first_after(extent.purged)) {
        return Err(broken(&format!("the log cannot be at {extent:?}")));
    }
    let frames = frame_at + head.span() as u64;
    Ok(Begun { segment: Arc::new(Segment { sequence, id, file }), checkpoint, frames })
}

/// Takes note of what happened in `older`, as `newer` tells it.
fn replay(older: &Begun, newer: &mut Begun, index: &mut Index) -> Result<(), StorageError> {
    let file = &newer.segment.file;
    let broken = |reason: String| file.corrupt(HEADER_BYTES as u64, format_args!("its checkpoint: {reason}"));
    let summary =
        newer.checkpoint.previous.take().ok_or_else(|| broken("it knows no older segment".to_owned()))?;
    if summary.id != older.segment.id {
        let (is, said) = (older.segment.id, summary.id);
        return Err(broken(format!("the segment before should be {said:x} and is {is:x}")));
    }
    let length = older.segment.file.length()?;
    if length < summary.end {
        let reason = format_args!("the file ends here, and should at {} or later", summary.end);
        return Err(older.segment.file.corrupt(length, reason));
    }
    let mut extent = older.checkpoint.standing.extent;
    for step in &summary.steps {
        match step {
            Step::Records(placed) => {
                let Placed { indexes, place, bytes } = placed;
                let sound = older.frames <= place.start
                    && place.start < place.end
                    && place.end <= summary.end
                    && *bytes <= place.end - place.start
                    && indexes.start < indexes.end;
                if !sound {
                    return Err(broken(format!("there is no room for {placed:?}")));
                }
                extent.extend(indexes.clone())?;
            }
            Step::Truncate(from) => drop(extent.truncate(from.checked_sub(1))),
            Step::Purge(upto) => drop(extent.purge(*upto)),
        }
        index.apply(&older.segment, step);
    }
    match newer.checkpoint.standing.extent {
        said if said == extent => Ok(()),
        said => Err(broken(format!("the log should be at {said:?} and is at {extent:?}"))),
    }
}

/// Reads the newest segment, and repairs its end.
fn scan(newest: Begun, index: &mut Index) -> Result<(Tail, Standing), StorageError> {
    let Begun { segment, checkpoint, frames } = newest;
    let mut standing = checkpoint.standing;
    let (offset, zeroed) = (frames, segment.file.length()?);
    let mut tail = Tail { segment: segment.clone(), offset, synced: offset, zeroed, steps: Vec::new() };
    let (id, file) = (segment.id, &segment.file);
    let content = file.read(frames, zeroed.saturating_sub(frames) as usize)?;
    let mut at = 0;
    loop {
        match parse_frame(&content[at..], id, tail.offset) {
            Ok(frame) => {
                let step = read_frame(&frame, tail.offset, &mut standing);
                let step = step.map_err(|reason| file.corrupt(tail.offset, reason))?;
                if let Some(step) = step {
                    index.apply(&segment, &step);
                    tail.note(&step);
                }
                tail.synced = tail.synced.max(frame.head.synced);
                at += frame.span();
                tail.offset += frame.span() as u64;
            }
            Err(reason) => {
                if let Some(later) = vouched(&content[at..], id, tail.offset) {
                    let reason = format_args!(
                        "{reason}, though it was synced before what stands at {later} was written"
                    );
                    return Err(file.corrupt(tail.offset, reason));
                }
                break;
            }
        }
    }
    repair(&tail, &content, frames)?;
    tail.synced = tail.offset;
    Ok((tail, standing))
}

/// Where a frame stands that says that what is broken at `offset` was synced.
fn vouched(rest: &[u8], id: u64, offset: u64) -> Option<u64> {
    (ALIGNMENT..rest.len()).step_by(ALIGNMENT).find_map(|at| {
        // Most of what there is to see are zeros.
        if rest[at..].first_chunk::<ALIGNMENT>().is_some_and(|bytes| *bytes == [0; ALIGNMENT]) {
            return None;
        }
        let here = offset + at as u64;
        let head = FrameHead::parse(&rest[at..], id, here).ok()?;
        (head.synced > offset && head.synced <= here).then_some(here)
    })
}

/// Makes the end of the newest segment what it was just taken for: nobody knows
/// whether what was written last ever reached the disk, or what of it.
fn repair(tail: &Tail, content: &[u8], frames: u64) -> Result<(), StorageError> {
    let file = &tail.segment.file;
    let (synced, end) = ((tail.synced.min(tail.offset) - frames) as usize, (tail.offset - frames) as usize);
    let rest = &content[end..];
    let torn = rest.iter().any(|byte| *byte != 0);
    if torn {
        tracing::warn!(
            offset = tail.offset,
            "what a crash left half written at the end of the log is cut off"
        );
        file.write(&vec![0; rest.len()], tail.offset)?;
    }
    if synced < end {
        file.write(&content[synced..end], frames + synced as u64)?;
    }
    if torn || synced < end { file.sync() } else { Ok(()) }
}

/// Lets a frame take effect on where the log stands; what it does to the records.
fn read_frame(frame: &Frame<'_>, offset: u64, standing: &mut Standing) -> Result<Option<Step>, String> {
    let (index, payload) = (frame.head.index, frame.payload);
    match frame.head.kind {
        Kind::Records => {
            let records = parse_records(payload)?;
            let end = index.checked_add(records.len() as u64).ok_or("an index is too large")?;
            standing.extent.extend(index..end).map_err(|error| error.to_string())?;
            let bytes = records.iter().map(|record| record.len() as u64).sum();
            let place = offset..offset + frame.span() as u64;
            return Ok((!records.is_empty()).then_some(Step::Records(Placed {
                indexes: index..end,
                bytes,
                place,
            })));
        }
        Kind::Truncate => {
            standing.extent.truncate(index.checked_sub(1));
            return Ok(Some(Step::Truncate(index)));
        }
        Kind::Purge => {
            if standing.extent.purge(index) {
                standing.purge_position = Bytes::copy_from_slice(payload);
            }
            return Ok(Some(Step::Purge(index)));
        }
        Kind::Vote => standing.vote = Some(Bytes::copy_from_slice(payload)),
        Kind::Committed => standing.committed = Some(Bytes::copy_from_slice(payload)),
        Kind::Checkpoint => return Err("a checkpoint in the middle".to_owned()),
        Kind::Sealed => return Err("the log went on in the next segment, which is missing".to_owned()),
    }
    Ok(None)
}
