//! A host's disk: an ext4 image in memory behind a loop device.
//!
//! The journal is committed every ten minutes unless somebody syncs, so what a
//! node did not sync is not on the image, and a power failure loses it. Not
//! modelled: drives that lie about their cache, and sectors written out of order.
#![allow(unsafe_code, reason = "one ioctl")]

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use tokio::time::Instant;

use super::command::{self, word};

/// `FS_IOC_SHUTDOWN`: from now on the filesystem reaches its device no more.
const SHUTDOWN: Opcode = opcode::read::<u32>(b'X', 125);
/// Not even its journal does.
const NO_LOG_FLUSH: u32 = 2;
/// How long one step on a disk may take.
const STEP_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two attempts to unmount a disk that is busy.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);

const SYNCED: &str = ".synced";
const UNSYNCED: &str = ".unsynced";

/// One disk.
#[derive(Clone, Debug)]
pub struct Disk {
    pub image: PathBuf,
    pub mount: PathBuf,
    pub bytes: u64,
}

impl Disk {
    /// Makes an empty disk and mounts it.
    ///
    /// # Errors
    /// When a tool or a loop device is missing.
    pub async fn make(&self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.mount)?;
        // Removed first: the blocks that an older filesystem used must not stay in memory.
        let _ = fs::remove_file(&self.image);
        File::create(&self.image)?.set_len(self.bytes)?;
        command::run("mkfs.ext4", &["-q", "-F", "-m", "0", word(&self.image)?]).await?;
        self.mount().await?;
        self.mark()
    }

    /// Leaves a synced file that must be there after the next power failure.
    fn mark(&self) -> anyhow::Result<()> {
        let mut file = File::create(self.mount.join(SYNCED))?;
        file.write_all(format!("{:016x}", rand::random::<u64>()).as_bytes())?;
        file.sync_all()?;
        Ok(File::open(&self.mount)?.sync_all()?)
    }

    /// Mounts what is on the image, replaying its journal. The loop device goes away with the mount.
    async fn mount(&self) -> anyhow::Result<()> {
        let words = ["-o", "loop,commit=600", word(&self.image)?, word(&self.mount)?];
        command::run("mount", &words).await.map(drop)
    }

    /// A process that is just being started holds copies of its parent's files for a moment, so a disk may be busy
    /// a little longer than anybody uses it.
    async fn detach(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + STEP_TIME_MAX;
        loop {
            match command::run("umount", &[word(&self.mount)?]).await {
                Err(error) if Instant::now() < deadline && error.to_string().contains("busy") => {
                    tokio::time::sleep(BUSY_INTERVAL).await;
                }
                other => return other.map(drop),
            }
        }
    }

    /// An empty disk instead of this one, which nobody may use.
    ///
    /// # Errors
    /// When it is in use.
    pub async fn wipe(&self) -> anyhow::Result<()> {
        self.detach().await?;
        self.make().await
    }

    /// The power fails: whatever was not synced is gone afterwards. Nobody may use the disk. Says how it was seen.
    ///
    /// # Errors
    /// When a step fails, or when it turns out that nothing was lost, or too much.
    pub async fn power_fail(&self) -> anyhow::Result<String> {
        let token = format!("{:016x}", rand::random::<u64>());
        let (mount, content) = (self.mount.clone(), token.clone());
        let synced = command::aside("shutting a disk down", STEP_TIME_MAX, move || {
            let synced = fs::read_to_string(mount.join(SYNCED))?;
            // Nothing is synced here: that would also commit what the node left uncommitted.
            fs::write(mount.join(UNSYNCED), content.as_bytes())?;
            let directory = File::open(&mount)?;
            // SAFETY: the kernel reads one u32 for this opcode and keeps no pointer to it.
            unsafe { ioctl(&directory, Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH)) }?;
            Ok(synced)
        })
        .await?;
        self.detach().await?;
        self.mount().await?;
        let content = |name: &str| fs::read_to_string(self.mount.join(name)).unwrap_or_default();
        ensure!(content(SYNCED) == synced, "a synced file of {} did not outlive it", self.image.display());
        ensure!(content(UNSYNCED) != token, "an unsynced file of {} outlived it", self.image.display());
        self.mark()?;
        Ok("an unsynced file is gone, a synced one stayed".to_owned())
    }

    /// The device as control groups write it: `7:0`.
    ///
    /// # Errors
    /// When it is not mounted.
    pub fn device(&self) -> anyhow::Result<String> {
        let device = rustix::fs::stat(&self.mount)?.st_dev;
        Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
    }

    /// Free bytes.
    ///
    /// # Errors
    /// When it is not mounted.
    pub fn free(&self) -> anyhow::Result<u64> {
        let stat = rustix::fs::statvfs(&self.mount).context("asking for free space")?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}
