//! A snapshot as one file, for an operator to carry away.
//!
//! `[magic 16][manifest length u64][manifest][files in the manifest's order]
//! [zeros up to a multiple of 512][SHA-256 of everything before]`, numbers
//! little endian. The size is therefore 32 beyond a multiple of 512, which is
//! how etcd's tools see that a snapshot carries its hash. Everything streams
//! in bounded memory.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::content::{FileSink, Manifest, corrupt, io};
use super::layout::{Family, LogPosition};
use super::snapshot::{CHUNK_BYTES, SnapshotReader, StoredSnapshot, describe_state};
use super::{Read, StateDb, StateOptions, StorageError};
use crate::types::{ClusterId, Revision, Space};

/// What an archive begins with; the digit is its format.
const MAGIC: [u8; 16] = *b"MAINSTAY-SNAP-1\n";
/// The most bytes a manifest may have: what its codec reads.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;
/// Archives are padded to whole blocks of this size before their hash.
const BLOCK_BYTES: u64 = 512;
/// Bytes of the hash at the end.
const HASH_BYTES: u64 = 32;

/// What an archive holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveStatus {
    /// The cluster it was taken of.
    pub cluster: ClusterId,
    /// The last entry applied to it.
    pub last: LogPosition,
    /// The store's revision in it.
    pub revision: Revision,
    /// Keys that exist in it, of the user space.
    pub total_keys: u64,
    /// Bytes of the archive.
    pub size_bytes: u64,
    /// The first four bytes of its SHA-256.
    pub hash: u32,
}

/// A snapshot as an archive, made while it is read: nothing of it is written here.
pub struct Packing {
    /// What comes before the content.
    head: Option<Bytes>,
    /// `None` when all of it was read.
    content: Option<SnapshotReader>,
    padding_bytes: usize,
    hasher: Sha256,
    size_bytes: u64,
}

impl Packing {
    /// Of a snapshot whose files were all read for its manifest just now.
    pub fn new(snapshot: &Arc<StoredSnapshot>) -> Packing {
        let manifest = snapshot.manifest().encode();
        let head = [&MAGIC[..], &(manifest.len() as u64).to_le_bytes(), &manifest].concat();
        let content_bytes = snapshot.manifest().size_bytes();
        let bytes = head.len() as u64 + content_bytes;
        let padded = bytes.next_multiple_of(BLOCK_BYTES);
        Packing {
            head: Some(head.into()),
            content: Some(snapshot.unchecked_reader()),
            padding_bytes: (padded - bytes) as usize,
            hasher: Sha256::new(),
            size_bytes: padded + HASH_BYTES,
        }
    }

    /// Bytes of the whole archive.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The next piece, of at most about [`CHUNK_BYTES`]; `None` at the end.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the disk fails.
    #[allow(clippy::should_implement_trait, reason = "an iterator's end and its errors read worse here")]
    pub fn next(&mut self) -> Result<Option<Bytes>, StorageError> {
        let Some(content) = &mut self.content else { return Ok(None) };
        let piece = match self.head.take() {
            Some(head) => Some(head),
            None => content.next()?,
        };
        if let Some(piece) = piece {
            self.hasher.update(&piece);
            return Ok(Some(piece));
        }
        self.content = None;
        let mut end = vec![0; self.padding_bytes];
        self.hasher.update(&end);
        end.extend(std::mem::take(&mut self.hasher).finalize());
        Ok(Some(end.into()))
    }
}

/// Reads an archive from end to end and checks every byte of it.
///
/// # Errors
/// [`StorageError::Corrupt`] when it is damaged, cut off, or no archive of
/// ours; [`StorageError::Io`] when it cannot be read.
pub fn verify(path: &Path) -> Result<Manifest, StorageError> {
    let mut archive = Archive::open(path)?;
    archive.check_hash()?;
    let manifest = archive.manifest()?;
    Ok(manifest)
}

/// Checks an archive and writes its files into `target`, a database directory
/// that is created and must not exist. Durable on return.
///
/// # Errors
/// As [`verify`]; `target` is then removed.
pub fn unpack(path: &Path, target: &Path) -> Result<Manifest, StorageError> {
    let mut archive = Archive::open(path)?;
    archive.check_hash()?;
    fs::create_dir(target).map_err(|error| io(target, error))?;
    let unpacked = archive.unpack(target);
    if unpacked.is_err() {
        // Best effort: the first error is the one worth reporting.
        let _ = fs::remove_dir_all(target);
    }
    unpacked
}

/// Checks an archive and looks inside, in a temporary directory under `scratch`
/// that needs as much room as the archive has bytes.
///
/// # Errors
/// As [`verify`].
pub fn status(path: &Path, scratch: &Path) -> Result<ArchiveStatus, StorageError> {
    let dir = tempfile::tempdir_in(scratch).map_err(|error| io(scratch, error))?;
    let data = dir.path().join("data");
    let manifest = unpack(path, &data)?;
    let mut archive = Archive::open(path)?;
    let hash = archive.stored_hash()?;
    let db = StateDb::open_read_only(&data, &StateOptions::default())?;
    let tag = Space::User.tag();
    let mut cursor = db.scan(Family::Current, &[tag], Some(&[tag + 1]));
    cursor.seek_to_first();
    let mut total_keys = 0;
    while cursor.item()?.is_some() {
        total_keys += 1;
        cursor.next();
    }
    Ok(ArchiveStatus {
        cluster: manifest.cluster,
        last: manifest.last,
        revision: manifest.revision,
        total_keys,
        size_bytes: archive.size,
        hash: u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]),
    })
}

struct Archive<'a> {
    path: &'a Path,
    file: File,
    size: u64,
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path) -> Result<Archive<'a>, StorageError> {
        let file = File::open(path).map_err(|error| io(path, error))?;
        let size = file.metadata().map_err(|error| io(path, error))?.len();
        if size % BLOCK_BYTES != HASH_BYTES {
            let path = path.display();
            return Err(corrupt(format!("{path} carries no hash: it is cut off or something else")));
        }
        Ok(Archive { path, file, size })
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), StorageError> {
        self.file.read_exact(bytes).map_err(|error| io(self.path, error))
    }

    fn seek(&mut self, to: u64) -> Result<(), StorageError> {
        self.file.seek(SeekFrom::Start(to)).map_err(|error| io(self.path, error))?;
        Ok(())
    }

    fn stored_hash(&mut self) -> Result<[u8; 32], StorageError> {
        self.seek(self.size - HASH_BYTES)?;
        let mut stored = [0; 32];
        self.read(&mut stored)?;
        Ok(stored)
    }

    fn check_hash(&mut self) -> Result<(), StorageError> {
        let stored = self.stored_hash()?;
        self.seek(0)?;
        let mut hasher = Sha256::new();
        let mut left = self.size - HASH_BYTES;
        let mut chunk = vec![0; CHUNK_BYTES];
        while left > 0 {
            let now = left.min(CHUNK_BYTES as u64) as usize;
            self.read(&mut chunk[..now])?;
            hasher.update(&chunk[..now]);
            left -= now as u64;
        }
        let found: [u8; 32] = hasher.finalize().into();
        if found != stored {
            return Err(corrupt(format!("{} is damaged (SHA-256)", self.path.display())));
        }
        Ok(())
    }

    /// Reads the manifest, leaving the file at the first byte of the content.
    fn manifest(&mut self) -> Result<Manifest, StorageError> {
        self.seek(0)?;
        let mut magic = [0; MAGIC.len()];
        self.read(&mut magic)?;
        if magic != MAGIC {
            let path = self.path.display();
            return Err(corrupt(format!("{path} is no snapshot that this version of Mainstay reads")));
        }
        let mut length = [0; 8];
        self.read(&mut length)?;
        let length = u64::from_le_bytes(length);
        let header = MAGIC.len() as u64 + 8;
        if length > MANIFEST_BYTES_MAX || header + length + HASH_BYTES > self.size {
            return Err(corrupt(format!("its manifest claims {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes)?;
        let manifest = Manifest::decode(&bytes)?;
        let content = header.checked_add(length).and_then(|size| size.checked_add(manifest.size_bytes()));
        if content.and_then(|size| size.checked_next_multiple_of(BLOCK_BYTES)) != Some(self.size - HASH_BYTES)
        {
            return Err(corrupt("its size is not what its manifest says".to_owned()));
        }
        Ok(manifest)
    }

    fn unpack(&mut self, target: &Path) -> Result<Manifest, StorageError> {
        let manifest = self.manifest()?;
        let mut sink = FileSink::new(target.to_owned(), manifest.files.clone());
        let mut left = manifest.size_bytes();
        let mut chunk = vec![0; CHUNK_BYTES];
        while left > 0 {
            let now = left.min(CHUNK_BYTES as u64) as usize;
            self.read(&mut chunk[..now])?;
            sink.write(&chunk[..now])?;
            left -= now as u64;
        }
        sink.finish()?;
        let found = describe_state(target, manifest.cluster)?;
        if (found.last, found.revision) != (manifest.last, manifest.revision) {
            return Err(corrupt("its data is not what its manifest says".to_owned()));
        }
        Ok(manifest)
    }
}
