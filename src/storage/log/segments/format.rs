//! What stands in a segment file, byte by byte. It reads and writes no file.
//!
//! A file begins with a header of 32 bytes, all numbers little endian:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | [`FORMAT`]; never reused |
//! | 4 | CRC-32C of the other 28 bytes |
//! | 8 | sequence: the number in the file's name |
//! | 8 | id, drawn at random: no frame of another file is ever taken for one of this |
//!
//! Frames follow, each at a multiple of 8 and filled up with zeros to the next:
//!
//! | bytes | field |
//! |---|---|
//! | 4 | CRC-32C of the segment's id, the frame's offset and the other 28 bytes |
//! | 4 | CRC-32C of the payload |
//! | 4 | length of the payload |
//! | 4 | [`Kind`]; never reused |
//! | 8 | up to which offset of the file everything had been synced when this was written |
//! | 8 | an index, see [`Kind`] |
//!
//! The first frame is a checkpoint. Zeros follow the last.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::Extent;
use super::super::StorageError;
use crate::storage::codec;

/// How every segment file begins.
pub const MAGIC: [u8; 8] = *b"mainslog";
/// The format of the files that this version reads and writes.
pub const FORMAT: u32 = 1;
/// Bytes of a file's header.
pub const HEADER_BYTES: usize = 32;
/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 32;
/// Frames begin at multiples of this.
pub const ALIGNMENT: usize = 8;
/// A record in a frame stands behind its length.
pub const LENGTH_BYTES: usize = 4;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Records, each behind its length; the index is that of the first.
    Records = 1,
    /// The vote.
    Vote = 2,
    /// Records from the index on are gone.
    Truncate = 3,
    /// Records up to the index are purged; the payload says which entry stood there.
    Purge = 4,
    /// What is known to be committed.
    Committed = 5,
    /// Where the log stood when the segment was begun; a [`Checkpoint`].
    Checkpoint = 6,
    /// The log goes on in the next segment.
    Sealed = 7,
}

impl Kind {
    fn of(number: u32) -> Option<Kind> {
        use Kind::{Checkpoint, Committed, Purge, Records, Sealed, Truncate, Vote};
        let all = [Records, Vote, Truncate, Purge, Committed, Checkpoint, Sealed];
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// Where the log stands, beside its records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Which indexes there are.
    pub extent: Extent,
    /// Which entry stood at the purge mark.
    pub purge_position: Bytes,
    /// The vote.
    pub vote: Option<Bytes>,
    /// What is known to be committed.
    pub committed: Option<Bytes>,
}

/// How a segment begins: with all that older segments still had to say, but for
/// their records, so that they can be removed whole.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Where the log stood at the end of the previous segment.
    pub standing: Standing,
    /// The previous segment, if there ever was one.
    pub previous: Option<Summary>,
}

/// A segment that is complete.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Its id.
    pub id: u64,
    /// Where it ends. Bytes behind that mean nothing.
    pub end: u64,
    /// What happened in it to the records.
    pub steps: Vec<Step>,
}

/// What frames do to the records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Records were added.
    Records(Placed),
    /// Records from here on were taken away.
    Truncate(u64),
    /// Records up to here were purged.
    Purge(u64),
}

/// Records, and where their frames are. Frames of other kinds may stand between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// The records.
    pub indexes: Range<u64>,
    /// Bytes of the records themselves.
    pub bytes: u64,
    /// Offsets in the file.
    pub place: Range<u64>,
}

impl Placed {
    /// Makes one of two that follow each other, unless the first is `bytes_max`
    /// long already. Whether it did.
    pub fn extend(&mut self, next: &Placed, bytes_max: u64) -> bool {
        let follows = self.indexes.end == next.indexes.start && self.place.end <= next.place.start;
        let fits = self.place.end - self.place.start < bytes_max;
        if follows && fits {
            self.indexes.end = next.indexes.end;
            self.place.end = next.place.end;
            self.bytes += next.bytes;
        }
        follows && fits
    }
}

/// A file's header.
pub fn header(sequence: u64, id: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24..].copy_from_slice(&id.to_le_bytes());
    let sum = header_sum(&bytes);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The id in the header of the segment with this sequence.
///
/// # Errors
/// What is wrong with the header.
pub fn parse_header(bytes: &[u8], sequence: u64) -> Result<u64, String> {
    let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Err(format!("{} bytes are too short for the header of a segment", bytes.len()));
    };
    if bytes[..8] != MAGIC {
        return Err("it does not begin as a segment of the log does".to_owned());
    }
    let format = number_u32(bytes, 8);
    if format != FORMAT {
        return Err(format!("format {format} was written by another version; this one reads {FORMAT}"));
    }
    if number_u32(bytes, 12) != header_sum(bytes) {
        return Err("the checksum of its header is wrong".to_owned());
    }
    match number_u64(bytes, 16) {
        written if written == sequence => Ok(number_u64(bytes, 24)),
        written => Err(format!("it was written as segment {written}")),
    }
}

fn header_sum(bytes: &[u8; HEADER_BYTES]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..])
}

/// Where frames are written: what binds them to their place.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The segment's id.
    pub id: u64,
    /// The offset in the file of the buffer that frames are added to.
    pub offset: u64,
    /// Up to which offset the file is synced.
    pub synced: u64,
}

/// Adds a frame to `buffer`, whose beginning is at `at`. `write` adds the payload.
pub fn push_frame(
    buffer: &mut Vec<u8>,
    at: Position,
    kind: Kind,
    index: u64,
    write: impl FnOnce(&mut Vec<u8>),
) {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    write(buffer);
    let payload = &buffer[start + FRAME_HEADER_BYTES..];
    let length = u32::try_from(payload.len()).expect("a batch is bounded far below 4 GiB");
    let payload_sum = crc32c::crc32c(payload);
    let mut header = [0; FRAME_HEADER_BYTES];
    header[4..8].copy_from_slice(&payload_sum.to_le_bytes());
    header[8..12].copy_from_slice(&length.to_le_bytes());
    header[12..16].copy_from_slice(&(kind as u32).to_le_bytes());
    header[16..24].copy_from_slice(&at.synced.to_le_bytes());
    header[24..].copy_from_slice(&index.to_le_bytes());
    let sum = frame_sum(&header, at.id, at.offset + start as u64);
    header[..4].copy_from_slice(&sum.to_le_bytes());
    buffer[start..start + FRAME_HEADER_BYTES].copy_from_slice(&header);
    buffer.resize(buffer.len().next_multiple_of(ALIGNMENT), 0);
}

/// A frame whose checksums are right.
#[derive(Debug)]
pub struct Frame<'b> {
    /// What it says.
    pub head: FrameHead,
    /// What it says it with.
    pub payload: &'b [u8],
}

impl Frame<'_> {
    /// Bytes up to the next one.
    pub fn span(&self) -> usize {
        self.head.span()
    }
}

/// A frame's header whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub struct FrameHead {
    /// What it is.
    pub kind: Kind,
    /// See [`Kind`].
    pub index: u64,
    /// Up to which offset everything had been synced when it was written.
    pub synced: u64,
    payload_sum: u32,
    length: usize,
}

impl FrameHead {
    /// Reads the header at the beginning of `bytes`, which is at `offset` of the
    /// segment `id`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8], id: u64, offset: u64) -> Result<FrameHead, &'static str> {
        let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
            return Err("the file ends within the header of a frame");
        };
        if number_u32(header, 0) != frame_sum(header, id, offset) {
            return Err("the checksum of a frame's header is wrong");
        }
        let kind =
            Kind::of(number_u32(header, 12)).ok_or("the kind of a frame is unknown to this version")?;
        Ok(FrameHead {
            kind,
            index: number_u64(header, 24),
            synced: number_u64(header, 16),
            payload_sum: number_u32(header, 4),
            length: number_u32(header, 8) as usize,
        })
    }

    /// Bytes of the frame with what fills it up.
    pub fn span(&self) -> usize {
        (FRAME_HEADER_BYTES + self.length).next_multiple_of(ALIGNMENT)
    }
}

/// Reads the frame at the beginning of `bytes`, which is at `offset` of the
/// segment `id`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_frame(bytes: &[u8], id: u64, offset: u64) -> Result<Frame<'_>, &'static str> {
    let head = FrameHead::parse(bytes, id, offset)?;
    let rest = bytes.get(FRAME_HEADER_BYTES..head.span()).ok_or("the file ends within a frame")?;
    let (payload, filling) = rest.split_at(head.length);
    if crc32c::crc32c(payload) != head.payload_sum {
        return Err("the checksum of a frame is wrong");
    }
    if filling.iter().any(|byte| *byte != 0) {
        return Err("the bytes between two frames are not zero");
    }
    Ok(Frame { head, payload })
}

/// Where the records of a payload are in it.
///
/// # Errors
/// What is wrong with it, though its checksum is right.
pub fn parse_records(payload: &[u8]) -> Result<Vec<Range<usize>>, &'static str> {
    let mut records = Vec::new();
    let mut at = 0;
    while at < payload.len() {
        let length = payload[at..].first_chunk::<LENGTH_BYTES>().ok_or("a record has no length")?;
        let start = at + LENGTH_BYTES;
        at = start + u32::from_le_bytes(*length) as usize;
        if at > payload.len() {
            return Err("a record is longer than its frame");
        }
        records.push(start..at);
    }
    Ok(records)
}

/// Adds records to a frame's payload.
pub fn push_records(payload: &mut Vec<u8>, records: &[(u64, Bytes)]) {
    for (_, record) in records {
        let length = u32::try_from(record.len()).expect("a record is bounded far below 4 GiB");
        payload.extend_from_slice(&length.to_le_bytes());
        payload.extend_from_slice(record);
    }
}

/// Reads a checkpoint.
///
/// # Errors
/// [`StorageError::Corrupt`].
pub fn parse_checkpoint(payload: &[u8]) -> Result<Checkpoint, StorageError> {
    codec::decode("checkpoint of a segment of the log", payload)
}

fn frame_sum(header: &[u8; FRAME_HEADER_BYTES], id: u64, offset: u64) -> u32 {
    let mut covered = [0; 8 + 8 + FRAME_HEADER_BYTES - 4];
    covered[..8].copy_from_slice(&id.to_le_bytes());
    covered[8..16].copy_from_slice(&offset.to_le_bytes());
    covered[16..].copy_from_slice(&header[4..]);
    crc32c::crc32c(&covered)
}

fn number_u32(bytes: &[u8; 32], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn number_u64(bytes: &[u8; 32], at: usize) -> u64 {
    u64::from(number_u32(bytes, at)) | u64::from(number_u32(bytes, at + 4)) << 32
}
