//! The data directory: its layout, its lock, and the space it stands on.
//!
//! | name | what |
//! |---|---|
//! | `IDENTITY` | whose disk this is (`identity`) |
//! | `LOCK` | held by the one process that uses the directory |
//! | `raft/` | the log |
//! | `state/CURRENT` | the number of the live state database |
//! | `state/<n>/` | the state database; others are left-overs |
//! | `snapshots/<index>/` | snapshots; `*.tmp` are left-overs |
//! | `ballast` | space that is given back when the disk is full |
//!
//! What a crash left half made is removed at open, and nothing else ever is: a
//! directory with content that is not ours is refused.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::StorageError;
use super::identity::{Identity, Standing, replace_file, sync_dir};
use super::log::is_log;
use crate::env::EnvRef;

const IDENTITY: &str = "IDENTITY";
const LOCK: &str = "LOCK";
const RAFT: &str = "raft";
const STATE: &str = "state";
const CURRENT: &str = "CURRENT";
const SNAPSHOTS: &str = "snapshots";
const BALLAST: &str = "ballast";

/// What the operator may tune of the data directory.
#[derive(Clone, Debug)]
pub struct DataDirOptions {
    /// Bytes kept aside for the day when the disk is full; 0 for none.
    pub ballast_bytes: u64,
}

impl Default for DataDirOptions {
    fn default() -> Self {
        DataDirOptions { ballast_bytes: 128 << 20 }
    }
}

/// The space of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that this process may still use.
    pub free_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
}

/// A data directory, locked for this process until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    options: DataDirOptions,
    identity: Mutex<Identity>,
    /// Number of the live state database.
    state: Mutex<u64>,
    /// Holds the lock, which ends with the process whatever its end.
    _lock: File,
}

impl DataDir {
    /// Opens the data directory `path`, or makes one of an absent or empty
    /// directory, and locks it. `env` draws the id of a new disk.
    ///
    /// # Errors
    /// [`StorageError::Refused`], with what to do, when the directory is not
    /// usable, not ours, in use, or has lost what its marker says it holds.
    /// [`StorageError::Io`] when the system refuses otherwise.
    pub fn open(path: &Path, options: DataDirOptions, env: &EnvRef) -> Result<DataDir, StorageError> {
        create(path)?;
        let lock = lock(path)?;
        remove_if_there(&path.join(format!("{IDENTITY}.tmp")))?;
        let identity = match Identity::read(&path.join(IDENTITY))? {
            Some(identity) => identity,
            None => {
                check_is_empty(path)?;
                // 0 would mean "not claimed yet".
                let fresh = Identity { disk: env.random_u64().max(1), standing: Standing::Unclaimed };
                fresh.write(&path.join(IDENTITY))?;
                fresh
            }
        };
        check_is_whole(path, &identity)?;
        for name in [RAFT, STATE, SNAPSHOTS] {
            make_dir(&path.join(name))?;
        }
        sync_dir(path)?;
        let state = open_current(&path.join(STATE))?;
        remove_temporaries(&path.join(SNAPSHOTS))?;
        let dir = DataDir {
            path: path.to_owned(),
            options,
            identity: Mutex::new(identity),
            state: Mutex::new(state),
            _lock: lock,
        };
        dir.remove_other_states()?;
        if let Err(error) = dir.restore_ballast() {
            // A node on a full disk must still start, to be read and repaired.
            tracing::warn!(%error, "no space could be set aside for a full disk");
        }
        Ok(dir)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose disk this is.
    pub fn identity(&self) -> Identity {
        *self.identity.lock()
    }

    /// Records durably what the node has become to a cluster.
    ///
    /// # Errors
    /// [`StorageError::Refused`] when the disk is another node's;
    /// [`StorageError::Io`] when the marker cannot be written.
    pub fn set_standing(&self, standing: Standing) -> Result<(), StorageError> {
        let mut identity = self.identity.lock();
        let next = identity.advance(standing)?;
        if next != *identity {
            next.write(&self.path.join(IDENTITY))?;
            *identity = next;
        }
        Ok(())
    }

    /// Where the log is.
    pub fn raft_path(&self) -> PathBuf {
        self.path.join(RAFT)
    }

    /// Where the live state database is.
    pub fn state_path(&self) -> PathBuf {
        self.state_path_of(*self.state.lock())
    }

    /// Where the next state database is to be made ready. Whatever an earlier
    /// attempt left there is removed.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn next_state_path(&self) -> Result<PathBuf, StorageError> {
        let path = self.state_path_of(*self.state.lock() + 1);
        remove_tree(&path)?;
        Ok(path)
    }

    /// Makes the database in [`DataDir::next_state_path`] the live one, durably:
    /// its files are synced first. The old one stays until
    /// [`DataDir::remove_other_states`].
    ///
    /// # Errors
    /// [`StorageError::Io`]; the pointer is then where it was, or unknown until
    /// the next start: the node must stop.
    pub fn switch_state(&self) -> Result<(), StorageError> {
        let mut state = self.state.lock();
        let next = *state + 1;
        sync_tree(&self.state_path_of(next))?;
        sync_dir(&self.path.join(STATE))?;
        write_current(&self.path.join(STATE), next)?;
        *state = next;
        Ok(())
    }

    /// Removes the state databases that are not live.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn remove_other_states(&self) -> Result<(), StorageError> {
        let live = self.state.lock().to_string();
        for (name, path) in entries(&self.path.join(STATE))? {
            if name != live && name != CURRENT {
                remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Where snapshots are.
    pub fn snapshots_path(&self) -> PathBuf {
        self.path.join(SNAPSHOTS)
    }

    /// The space left where the directory is.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn space(&self) -> Result<DiskSpace, StorageError> {
        let stat = rustix::fs::statvfs(&self.path).map_err(|errno| io_error(&self.path, errno.into()))?;
        Ok(DiskSpace {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// Gives the ballast back to the file system. The bytes that it had.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn release_ballast(&self) -> Result<u64, StorageError> {
        let path = self.path.join(BALLAST);
        let bytes = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        remove_if_there(&path)?;
        sync_dir(&self.path)?;
        Ok(bytes)
    }

    /// Sets the ballast aside again, if there is room for it twice: it must not
    /// be what fills the disk. Whether it is there now.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn restore_ballast(&self) -> Result<bool, StorageError> {
        let path = self.path.join(BALLAST);
        let wanted = self.options.ballast_bytes;
        let present = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if wanted == present {
            return Ok(wanted > 0);
        }
        remove_if_there(&path)?;
        if wanted == 0 || self.space()?.free_bytes < wanted.saturating_mul(2) {
            return Ok(false);
        }
        let reserved = reserve(&path, wanted);
        if reserved.is_err() {
            remove_if_there(&path)?;
        }
        reserved.map_err(|source| io_error(&path, source))?;
        sync_dir(&self.path)?;
        Ok(true)
    }

    fn state_path_of(&self, number: u64) -> PathBuf {
        self.path.join(STATE).join(number.to_string())
    }
}

fn io_error(path: &Path, source: std::io::Error) -> StorageError {
    StorageError::Io { path: path.to_owned(), source }
}

/// Turns what the system says of the directory into what the operator can do.
fn unusable(path: &Path, source: std::io::Error) -> StorageError {
    let path_text = path.display();
    match source.kind() {
        ErrorKind::PermissionDenied => StorageError::Refused(format!(
            "the data directory {path_text} cannot be read and written by user {}; give it to that user \
             (chown) or name another with --data-dir",
            rustix::process::geteuid().as_raw()
        )),
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            StorageError::Refused(format!("{path_text} is not a directory; name one with --data-dir"))
        }
        ErrorKind::ReadOnlyFilesystem => StorageError::Refused(format!(
            "the data directory {path_text} is on a read-only file system; mount it writable or name \
             another with --data-dir"
        )),
        _ => io_error(path, source),
    }
}

fn create(path: &Path) -> Result<(), StorageError> {
    let absent = path.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
    let absent: Vec<&Path> = absent.collect();
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| std::fs::read_dir(path).map(drop)).map_err(|source| unusable(path, source))?;
    // Each new name is an entry of its parent, and durable only with it.
    for parent in absent.iter().filter_map(|path| path.parent()) {
        let here = Path::new(".");
        sync_dir(if parent.as_os_str().is_empty() { here } else { parent })?;
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<(), StorageError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| unusable(path, source))
}

fn lock(path: &Path) -> Result<File, StorageError> {
    let lock_path = path.join(LOCK);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock_path);
    let mut file = opened.map_err(|source| unusable(path, source))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner);
            let owner = owner.trim();
            let owner = if owner.is_empty() { "unknown" } else { owner };
            return Err(StorageError::Refused(format!(
                "the data directory {} is in use by another process (pid {owner}); stop that one, or give \
                 this node a directory of its own with --data-dir",
                path.display()
            )));
        }
        Err(errno) => return Err(io_error(&lock_path, errno.into())),
    }
    // Only for the message above: the lock is the flock, not the content.
    let mut note = || {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    if let Err(error) = note() {
        tracing::debug!(%error, "the lock file does not tell who holds it");
    }
    Ok(file)
}

fn check_is_empty(path: &Path) -> Result<(), StorageError> {
    let foreign = entries(path)?.into_iter().map(|(name, _)| name).find(|name| {
        let harmless = [LOCK, BALLAST, "lost+found"].contains(&name.as_str());
        !harmless && !name.starts_with('.')
    });
    match foreign {
        None => Ok(()),
        Some(name) => Err(StorageError::Refused(format!(
            "the data directory {} has no {IDENTITY} marker but is not empty (it has {name:?}); name an empty \
             directory with --data-dir, or restore the marker from where it was lost",
            path.display()
        ))),
    }
}

fn check_is_whole(path: &Path, identity: &Identity) -> Result<(), StorageError> {
    let Standing::Member { cluster, node } = identity.standing else {
        return Ok(());
    };
    let (raft, state) = (path.join(RAFT), path.join(STATE).join(CURRENT));
    let log = format!("the log in {}", raft.display());
    for (needed, is_there) in [(log, is_log(&raft)), (state.display().to_string(), state.exists())] {
        if !is_there {
            return Err(StorageError::Refused(format!(
                "{needed} is missing: the data directory was of node {node:x} in cluster {cluster:x} and has lost \
                 what that node has acknowledged; restore it, or remove the member and let it join again \
                 with an empty data directory"
            )));
        }
    }
    Ok(())
}

/// The number in `state/CURRENT`; a new pointer in a new directory.
fn open_current(states: &Path) -> Result<u64, StorageError> {
    let path = states.join(CURRENT);
    remove_if_there(&states.join(format!("{CURRENT}.tmp")))?;
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| StorageError::Corrupt {
            what: path.display().to_string(),
            reason: format!("{:?} is not the number of a state database", text.trim()),
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if let Some((name, _)) = entries(states)?.into_iter().next() {
                return Err(StorageError::Corrupt {
                    what: path.display().to_string(),
                    reason: format!("it is missing, but there is a state database {name:?}"),
                });
            }
            write_current(states, 1)?;
            Ok(1)
        }
        Err(source) => Err(io_error(&path, source)),
    }
}

fn write_current(states: &Path, number: u64) -> Result<(), StorageError> {
    replace_file(&states.join(CURRENT), format!("{number}\n").as_bytes())
}

fn entries(path: &Path) -> Result<Vec<(String, PathBuf)>, StorageError> {
    let list = || -> std::io::Result<Vec<(String, PathBuf)>> {
        std::fs::read_dir(path)?
            .map(|entry| entry.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())))
            .collect()
    };
    let mut entries = list().map_err(|source| unusable(path, source))?;
    entries.sort();
    Ok(entries)
}

fn remove_temporaries(path: &Path) -> Result<(), StorageError> {
    for (name, path) in entries(path)? {
        if name.ends_with(".tmp") {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

fn remove_tree(path: &Path) -> Result<(), StorageError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => remove_if_there(path),
        Err(source) => Err(io_error(path, source)),
    }
}

fn remove_if_there(path: &Path) -> Result<(), StorageError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(io_error(path, source)),
        _ => Ok(()),
    }
}

/// Syncs every file below `path`, and the directories that name them. The
/// database there may be open already, and its compactions remove files: one
/// that is gone when its turn comes is not needed any more.
fn sync_tree(path: &Path) -> Result<(), StorageError> {
    for (_, entry) in entries(path)? {
        if entry.is_dir() {
            sync_tree(&entry)?;
            continue;
        }
        match File::open(&entry).and_then(|file| file.sync_all()) {
            Err(source) if source.kind() != ErrorKind::NotFound => return Err(io_error(&entry, source)),
            _ => {}
        }
    }
    sync_dir(path)
}

fn reserve(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP) => {
            std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file)?;
        }
        Err(errno) => return Err(errno.into()),
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::env::SystemEnv;

    fn open(path: &Path) -> Result<DataDir, StorageError> {
        DataDir::open(path, DataDirOptions { ballast_bytes: 1 << 20 }, &SystemEnv::shared())
    }

    fn refusal(path: &Path) -> String {
        match open(path) {
            Err(StorageError::Refused(message)) => message,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_new_directory_keeps_its_identity_and_its_layout() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let dir = open(&path).unwrap();
        let identity = dir.identity();
        assert_eq!(identity.standing, Standing::Unclaimed);
        assert_eq!(dir.state_path(), path.join("state/1"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        dir.set_standing(Standing::Joining { cluster: 1, node: 2 }).unwrap();
        drop(dir);
        let again = open(&path).unwrap().identity();
        assert_eq!(again.disk, identity.disk);
        assert_eq!(again.standing, Standing::Joining { cluster: 1, node: 2 });
    }

    #[test]
    fn only_one_at_a_time_may_use_it() {
        let parent = tempfile::tempdir().unwrap();
        let dir = open(parent.path()).unwrap();
        let message = refusal(parent.path());
        assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
        drop(dir);
        open(parent.path()).unwrap();
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(refusal(&file).contains("is not a directory"));
        let foreign = parent.path().join("foreign");
        std::fs::create_dir_all(foreign.join("member/wal")).unwrap();
        assert!(refusal(&foreign).contains("\"member\""));
        assert!(foreign.join("member/wal").exists());
    }

    #[test]
    fn a_directory_without_permissions_is_refused_by_name() {
        // Root may do everything, so only the message itself can be tested there.
        let path = Path::new("/data");
        let denied = unusable(path, ErrorKind::PermissionDenied.into()).to_string();
        assert!(denied.contains("/data") && denied.contains("chown"), "{denied}");
        if rustix::process::geteuid().is_root() {
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o500)).unwrap();
        assert!(refusal(parent.path()).contains("chown"));
    }

    #[test]
    fn a_member_does_not_start_without_its_log_or_its_state() {
        let parent = tempfile::tempdir().unwrap();
        let dir = open(parent.path()).unwrap();
        let segment = dir.raft_path().join("0000000000000001.log");
        std::fs::write(&segment, "").unwrap();
        dir.set_standing(Standing::Member { cluster: 1, node: 2 }).unwrap();
        drop(dir);
        drop(open(parent.path()).unwrap());
        std::fs::remove_file(segment).unwrap();
        let message = refusal(parent.path());
        assert!(message.contains("raft is missing") && message.contains("join again"), "{message}");
    }

    #[test]
    fn the_live_state_is_switched_by_one_pointer() {
        let parent = tempfile::tempdir().unwrap();
        let dir = open(parent.path()).unwrap();
        std::fs::create_dir(dir.state_path()).unwrap();
        let next = dir.next_state_path().unwrap();
        std::fs::create_dir(&next).unwrap();
        std::fs::write(next.join("data"), "new").unwrap();
        drop(dir);
        // Without the switch the new one is a left-over.
        let dir = open(parent.path()).unwrap();
        assert!(!next.exists() && dir.state_path().exists());
        let next = dir.next_state_path().unwrap();
        std::fs::create_dir(&next).unwrap();
        // A name that is listed and has nothing behind it, as when a compaction removes a table meanwhile.
        std::os::unix::fs::symlink("gone", next.join("000022.sst")).unwrap();
        dir.switch_state().unwrap();
        assert_eq!(dir.state_path(), next);
        std::fs::create_dir(dir.snapshots_path().join("7.tmp")).unwrap();
        std::fs::create_dir(dir.snapshots_path().join("5")).unwrap();
        drop(dir);
        let dir = open(parent.path()).unwrap();
        assert_eq!(dir.state_path(), next);
        assert!(!parent.path().join("state/1").exists());
        assert!(!dir.snapshots_path().join("7.tmp").exists() && dir.snapshots_path().join("5").exists());
        drop(dir);
        std::fs::remove_file(parent.path().join("state/CURRENT")).unwrap();
        assert!(matches!(open(parent.path()), Err(StorageError::Corrupt { .. })));
    }

    #[test]
    fn ballast_is_released_and_restored() {
        let parent = tempfile::tempdir().unwrap();
        let dir = open(parent.path()).unwrap();
        assert_eq!(std::fs::metadata(parent.path().join(BALLAST)).unwrap().len(), 1 << 20);
        assert_eq!(dir.release_ballast().unwrap(), 1 << 20);
        assert!(!parent.path().join(BALLAST).exists());
        assert!(dir.restore_ballast().unwrap());
        let space = dir.space().unwrap();
        assert!(space.free_bytes > 0 && space.free_bytes <= space.total_bytes);
    }
}
