//! Which files of a directory are configuration worth importing: regular text
//! files that anyone may read, below a size. It reads directories and files
//! and changes nothing.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::CliError;

/// A file larger than this stays out.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a file was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skip {
    /// It has a NUL byte or is not UTF-8.
    Binary,
    /// It is larger than [`FILE_BYTES_MAX`].
    TooLarge,
    /// Not everybody may read it, or a directory above it.
    NotWorldReadable,
    /// A symbolic link: what it points to is imported where it lies.
    Link,
    /// A socket, a pipe or a device.
    Special,
    /// The system refused to read it, or it went away.
    Unreadable,
}

impl Skip {
    /// In words, as in "3 binary".
    pub fn words(self) -> &'static str {
        match self {
            Skip::Binary => "binary",
            Skip::TooLarge => "larger than 1 MiB",
            Skip::NotWorldReadable => "not world-readable",
            Skip::Link => "symbolic links",
            Skip::Special => "sockets, pipes or devices",
            Skip::Unreadable => "unreadable",
        }
    }
}

/// How many were left out, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped(BTreeMap<Skip, u64>);

impl Skipped {
    /// Counts one.
    pub fn add(&mut self, why: Skip) {
        *self.0.entry(why).or_default() += 1;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Each reason with its count.
    pub fn reasons(&self) -> impl Iterator<Item = (Skip, u64)> + '_ {
        self.0.iter().map(|(why, count)| (*why, *count))
    }
}

/// One file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Where it lies.
    pub path: PathBuf,
    /// Its name below the root, with `/` between the parts.
    pub name: Vec<u8>,
    /// Its size when it was listed.
    pub bytes: u64,
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Walk {
    /// What to read, in order of names.
    pub files: Vec<Candidate>,
    /// What was left out so far.
    pub skipped: Skipped,
    /// What was left out, by path, for those who want to see it.
    pub skipped_paths: Vec<(PathBuf, Skip)>,
}

impl Walk {
    fn skip(&mut self, path: PathBuf, why: Skip) {
        self.skipped.add(why);
        self.skipped_paths.push((path, why));
    }
}

/// Lists what lies below `root`. With `private`, what only some may read is listed too.
pub fn walk(root: &Path, private: bool) -> Result<Walk, CliError> {
    let mut walk = Walk::default();
    let meta = std::fs::metadata(root).map_err(|e| not_found_or_io(root, e))?;
    if !meta.is_dir() {
        return Err(CliError::Usage(format!("{}: not a directory", root.display())));
    }
    // Each directory by path and name; the root's own error is the user's to see, others are counted.
    let mut pending = vec![(root.to_path_buf(), Vec::new())];
    let mut is_root = true;
    while let Some((directory, name)) = pending.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(source) if is_root => return Err(CliError::file(directory, source)),
            Err(_) => {
                walk.skip(directory, Skip::Unreadable);
                continue;
            }
        };
        is_root = false;
        for entry in entries {
            let Ok(entry) = entry else {
                walk.skip(directory.clone(), Skip::Unreadable);
                continue;
            };
            let mut child_name = name.clone();
            if !child_name.is_empty() {
                child_name.push(b'/');
            }
            child_name.extend_from_slice(entry.file_name().as_bytes());
            let path = entry.path();
            // Of the entry itself: a link is not followed.
            match entry.metadata() {
                Err(_) => walk.skip(path, Skip::Unreadable),
                Ok(meta) => match classify(&meta, private) {
                    Err(why) => walk.skip(path, why),
                    Ok(Kind::Directory) => pending.push((path, child_name)),
                    Ok(Kind::File) => {
                        walk.files.push(Candidate { path, name: child_name, bytes: meta.len() });
                    }
                },
            }
        }
    }
    walk.files.sort_by(|a, b| a.name.cmp(&b.name));
    walk.skipped_paths.sort();
    Ok(walk)
}

enum Kind {
    Directory,
    File,
}

fn classify(meta: &Metadata, private: bool) -> Result<Kind, Skip> {
    let everyone = |bits: u32| private || meta.mode() & bits == bits;
    if meta.is_symlink() {
        Err(Skip::Link)
    } else if meta.is_dir() {
        if everyone(0o005) { Ok(Kind::Directory) } else { Err(Skip::NotWorldReadable) }
    } else if !meta.is_file() {
        Err(Skip::Special)
    } else if !everyone(0o004) {
        Err(Skip::NotWorldReadable)
    } else if meta.len() > FILE_BYTES_MAX {
        Err(Skip::TooLarge)
    } else {
        Ok(Kind::File)
    }
}

/// Reads a file as text, or says why it stays out. Never reads more than the limit, even if the file grows.
pub fn read_text(path: &Path) -> Result<Vec<u8>, Skip> {
    // A file that became a pipe since it was listed must not block us, nor a link lead elsewhere.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file: File = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .map_err(|_| Skip::Unreadable)?;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err(Skip::Special);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|_| Skip::Unreadable)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Skip::TooLarge);
    }
    if bytes.contains(&0) || std::str::from_utf8(&bytes).is_err() {
        return Err(Skip::Binary);
    }
    Ok(bytes)
}

/// A missing path is "not found", anything else is as the system says.
pub fn not_found_or_io(path: &Path, source: std::io::Error) -> CliError {
    if source.kind() == std::io::ErrorKind::NotFound {
        CliError::NotFound(format!("{}: no such file or directory", path.display()))
    } else {
        CliError::file(path, source)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(path: &Path, bytes: &[u8], mode: u32) {
        fs::write(path, bytes).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_small_world_readable_text_is_imported_and_the_rest_is_counted() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("conf.d")).unwrap();
        fs::create_dir(at("secret.d")).unwrap();
        put(&at("conf.d/b.conf"), b"b", 0o644);
        put(&at("a.conf"), b"a", 0o644);
        put(&at("empty"), b"", 0o644);
        put(&at("shadow"), b"s", 0o640);
        put(&at("cache.bin"), b"\0\x01", 0o644);
        put(&at("latin1"), b"gr\xfc\xdfe", 0o644);
        put(&at("large"), &vec![b'x'; FILE_BYTES_MAX as usize + 1], 0o644);
        put(&at("full"), &vec![b'x'; FILE_BYTES_MAX as usize], 0o644);
        put(&at("secret.d/key"), b"k", 0o644);
        fs::set_permissions(at("secret.d"), fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink("a.conf", at("link")).unwrap();
        std::os::unix::fs::symlink("..", at("conf.d/up")).unwrap();

        let found = walk(root.path(), false).unwrap();
        let names: Vec<&[u8]> = found.files.iter().map(|file| &file.name[..]).collect();
        let expected: [&[u8]; 6] = [b"a.conf", b"cache.bin", b"conf.d/b.conf", b"empty", b"full", b"latin1"];
        assert_eq!(names, expected);
        let skipped: Vec<(Skip, u64)> = found.skipped.reasons().collect();
        assert_eq!(skipped, [(Skip::TooLarge, 1), (Skip::NotWorldReadable, 2), (Skip::Link, 2)]);

        assert_eq!(read_text(&at("cache.bin")), Err(Skip::Binary));
        assert_eq!(read_text(&at("latin1")), Err(Skip::Binary));
        assert_eq!(read_text(&at("large")), Err(Skip::TooLarge));
        assert_eq!(read_text(&at("link")), Err(Skip::Unreadable));
        assert_eq!(read_text(&at("conf.d")), Err(Skip::Special));
        assert_eq!(read_text(&at("empty")), Ok(Vec::new()));
        assert_eq!(read_text(&at("full")).unwrap().len() as u64, FILE_BYTES_MAX);

        let private = walk(root.path(), true).unwrap();
        assert!(private.files.iter().any(|file| file.name == b"secret.d/key"));
    }

    #[test]
    fn a_root_that_is_no_directory_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("x");
        put(&file, b"x", 0o644);
        assert!(matches!(walk(&file, false), Err(CliError::Usage(_))));
        assert!(matches!(walk(&root.path().join("none"), false), Err(CliError::NotFound(_))));
    }
}
