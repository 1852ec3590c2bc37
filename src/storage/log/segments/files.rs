//! The files of the log: named, created, written, synced and removed here and
//! nowhere else. What is in them is for others to say.
//!
//! A file appears under its name only when its beginning is durable, and its
//! name is durable before it is used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::StorageError;
use crate::storage::identity::sync_dir;

const ENDING: &str = "log";
const UNFINISHED: &str = "unfinished";

/// Whether a directory holds any part of a log.
pub fn is_log(path: &Path) -> bool {
    fs::read_dir(path)
        .is_ok_and(|mut names| names.any(|entry| entry.is_ok_and(|e| number(&e.path()).is_some())))
}

/// The directory of the log.
#[derive(Clone)]
pub struct Directory {
    path: PathBuf,
    #[cfg(test)]
    pub tap: super::tests::Tap,
}

/// One segment's file.
pub struct SegmentFile {
    path: PathBuf,
    file: File,
    #[cfg(test)]
    tap: super::tests::Tap,
}

impl Directory {
    /// The log in `path`.
    pub fn new(path: &Path) -> Directory {
        Directory {
            path: path.to_owned(),
            #[cfg(test)]
            tap: None,
        }
    }

    /// The sequences of the segments that are there, in order. Makes the
    /// directory if it is absent, and removes what a crash left unfinished.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn list(&self) -> Result<Vec<u64>, StorageError> {
        fs::create_dir_all(&self.path).map_err(|source| self.failed(&self.path, source))?;
        let entries = fs::read_dir(&self.path).map_err(|source| self.failed(&self.path, source))?;
        let mut sequences = Vec::new();
        for entry in entries {
            let path = entry.map_err(|source| self.failed(&self.path, source))?.path();
            if path.extension().is_some_and(|ending| ending == UNFINISHED) {
                fs::remove_file(&path).map_err(|source| self.failed(&path, source))?;
            }
            sequences.extend(number(&path));
        }
        sequences.sort_unstable();
        Ok(sequences)
    }

    /// Makes the segment `sequence` of these bytes, durably.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn create(&self, sequence: u64, content: &[u8]) -> Result<SegmentFile, StorageError> {
        let path = self.path_of(sequence);
        let unfinished = path.with_extension(UNFINISHED);
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&unfinished);
        let file = opened.map_err(|source| self.failed(&unfinished, source))?;
        let write = || -> io::Result<()> {
            file.write_all_at(content, 0)?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)
        };
        write().map_err(|source| self.failed(&unfinished, source))?;
        let file = self.segment(path, file);
        #[cfg(test)]
        file.tell(super::tests::Happened::Created(content.to_vec()));
        self.sync()?;
        Ok(file)
    }

    /// Opens the segment `sequence`.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn open(&self, sequence: u64) -> Result<SegmentFile, StorageError> {
        let path = self.path_of(sequence);
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let file = opened.map_err(|source| self.failed(&path, source))?;
        Ok(self.segment(path, file))
    }

    /// Removes a segment's name, not durably.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn remove(&self, sequence: u64) -> Result<(), StorageError> {
        let path = self.path_of(sequence);
        fs::remove_file(&path).map_err(|source| self.failed(&path, source))?;
        #[cfg(test)]
        super::tests::tell(&self.tap, &path, super::tests::Happened::Removed);
        Ok(())
    }

    /// Makes names durable.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn sync(&self) -> Result<(), StorageError> {
        sync_dir(&self.path)?;
        #[cfg(test)]
        super::tests::tell(&self.tap, &self.path, super::tests::Happened::NamesSynced);
        Ok(())
    }

    /// The path of a segment.
    pub fn path_of(&self, sequence: u64) -> PathBuf {
        self.path.join(format!("{sequence:016}.{ENDING}"))
    }

    fn segment(&self, path: PathBuf, file: File) -> SegmentFile {
        SegmentFile {
            path,
            file,
            #[cfg(test)]
            tap: self.tap.clone(),
        }
    }

    fn failed(&self, path: &Path, source: io::Error) -> StorageError {
        StorageError::Io { path: path.to_owned(), source }
    }
}

impl SegmentFile {
    /// Writes bytes.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.file.write_all_at(bytes, offset).map_err(|source| self.failed(source))?;
        #[cfg(test)]
        self.tell(super::tests::Happened::Written(offset, bytes.to_vec()));
        Ok(())
    }

    /// Writes zeros as far as there is room; whether all of them.
    ///
    /// # Errors
    /// [`StorageError::Io`], except for a full disk.
    pub fn write_if_room(&self, zeros: &[u8], offset: u64) -> Result<bool, StorageError> {
        match self.write(zeros, offset) {
            Ok(()) => Ok(true),
            Err(StorageError::Io { source, .. })
                if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn sync(&self) -> Result<(), StorageError> {
        self.file.sync_data().map_err(|source| self.failed(source))?;
        #[cfg(test)]
        self.tell(super::tests::Happened::Synced);
        Ok(())
    }

    /// Reads `length` bytes, or what there is of them.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, StorageError> {
        let mut bytes = vec![0; length];
        let mut read = 0;
        while read < length {
            match self.file.read_at(&mut bytes[read..], offset + read as u64) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(source)),
            }
        }
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn length(&self) -> Result<u64, StorageError> {
        Ok(self.file.metadata().map_err(|source| self.failed(source))?.len())
    }

    /// An error that says where damage is.
    pub fn corrupt(&self, offset: u64, reason: impl std::fmt::Display) -> StorageError {
        StorageError::Corrupt {
            what: format!("log: {}", self.path.display()),
            reason: format!("at offset {offset}: {reason}"),
        }
    }

    fn failed(&self, source: io::Error) -> StorageError {
        StorageError::Io { path: self.path.clone(), source }
    }

    #[cfg(test)]
    fn tell(&self, happened: super::tests::Happened) {
        super::tests::tell(&self.tap, &self.path, happened);
    }
}

fn number(path: &Path) -> Option<u64> {
    let digits = path.file_stem()?.to_str().filter(|digits| digits.len() >= 16)?;
    if path.extension()? != ENDING || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// A segment of the log, shared by the writer and by those who read.
pub struct Segment {
    /// The number in its name.
    pub sequence: u64,
    /// What its frames are bound to.
    pub id: u64,
    /// Its file.
    pub file: SegmentFile,
}

/// A shared [`Segment`].
pub type SegmentRef = Arc<Segment>;
