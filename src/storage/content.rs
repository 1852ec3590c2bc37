//! What a snapshot is made of: a manifest, and files whose content is one
//! stream in the manifest's order, each known by its size and SHA-256.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::layout::LogPosition;
use super::{StorageError, codec};
use crate::types::{ClusterId, Revision};

/// One file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name, without any directory.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its SHA-256.
    pub sha256: [u8; 32],
}

/// What a snapshot holds. The content of a snapshot, wherever it is written as
/// one stream, is that of the files in the order of `files`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The cluster it was taken of.
    pub cluster: ClusterId,
    /// The last entry applied to it.
    pub last: LogPosition,
    /// The last membership in it, as the raft room encodes it; empty before
    /// there was one.
    pub membership: Bytes,
    /// The store's revision in it.
    pub revision: Revision,
    /// The files of the checkpoint, sorted by name.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// Bytes of all files.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size_bytes).sum()
    }

    /// The manifest as bytes.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// A manifest from its bytes.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] for damage, and for names that could leave the
    /// snapshot's directory.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, StorageError> {
        let manifest: Manifest = codec::decode("snapshot manifest", bytes)?;
        let mut names = HashSet::new();
        let mut total = 0u64;
        for file in &manifest.files {
            let plain = !file.name.is_empty()
                && !file.name.starts_with('.')
                && file.name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            if !plain || !names.insert(&file.name) {
                return Err(corrupt(format!("{:?} is no name of a file, or stands there twice", file.name)));
            }
            total = total
                .checked_add(file.size_bytes)
                .ok_or_else(|| corrupt("the sizes of its files overflow".to_owned()))?;
        }
        Ok(manifest)
    }
}

/// Writes a content, given in pieces of any size, into the files of a manifest.
pub(super) struct FileSink {
    dir: PathBuf,
    files: std::vec::IntoIter<FileEntry>,
    open: Option<(FileEntry, OpenFile)>,
}

impl FileSink {
    pub(super) fn new(dir: PathBuf, files: Vec<FileEntry>) -> FileSink {
        FileSink { dir, files: files.into_iter(), open: None }
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), StorageError> {
        while !bytes.is_empty() {
            let Some((entry, mut open)) = self.next_file()? else {
                return Err(corrupt("more bytes came than its manifest names".to_owned()));
            };
            let (now, later) = bytes.split_at(bytes.len().min(open.left as usize));
            let path = self.dir.join(&entry.name);
            open.file.write_all(now).map_err(|error| io(&path, error))?;
            open.hasher.update(now);
            open.left -= now.len() as u64;
            bytes = later;
            if open.left > 0 {
                self.open = Some((entry, open));
            } else {
                close(&path, &entry, open)?;
            }
        }
        Ok(())
    }

    /// Everything was written and is durable.
    pub(super) fn finish(mut self) -> Result<(), StorageError> {
        if let Some((entry, open)) = self.next_file()? {
            return Err(corrupt(format!("{} ends {} bytes too early", entry.name, open.left)));
        }
        sync(&self.dir)
    }

    /// The file that the next byte belongs to. Empty files on the way there
    /// are complete as soon as they exist.
    fn next_file(&mut self) -> Result<Option<(FileEntry, OpenFile)>, StorageError> {
        if self.open.is_some() {
            return Ok(self.open.take());
        }
        for entry in self.files.by_ref() {
            let path = self.dir.join(&entry.name);
            let file = File::create_new(&path).map_err(|error| io(&path, error))?;
            let open = OpenFile { file, hasher: Sha256::new(), left: entry.size_bytes };
            if open.left > 0 {
                return Ok(Some((entry, open)));
            }
            close(&path, &entry, open)?;
        }
        Ok(None)
    }
}

fn close(path: &Path, entry: &FileEntry, open: OpenFile) -> Result<(), StorageError> {
    let found: [u8; 32] = open.hasher.finalize().into();
    if found != entry.sha256 {
        return Err(mismatch(path));
    }
    open.file.sync_all().map_err(|error| io(path, error))
}

/// A file that is being read or written, with the bytes that are still to come.
pub(super) struct OpenFile {
    pub file: File,
    pub hasher: Sha256,
    pub left: u64,
}

/// The SHA-256 of a file. `rest` is called after each piece of it.
pub(super) fn digest(path: &Path, rest: &mut dyn FnMut()) -> Result<[u8; 32], StorageError> {
    let mut file = File::open(path).map_err(|error| io(path, error))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 256 << 10];
    loop {
        let read = file.read(&mut chunk).map_err(|error| io(path, error))?;
        if read == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&chunk[..read]);
        rest();
    }
}

/// Makes a file's content, or a directory's entries, durable.
pub(super) fn sync(path: &Path) -> Result<(), StorageError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io(path, error))
}

pub(super) fn mismatch(path: &Path) -> StorageError {
    corrupt(format!("{} is not what its manifest says (SHA-256)", path.display()))
}

pub(super) fn corrupt(reason: String) -> StorageError {
    StorageError::Corrupt { what: "snapshot".to_owned(), reason }
}

pub(super) fn io(path: &Path, source: std::io::Error) -> StorageError {
    StorageError::Io { path: path.to_owned(), source }
}
