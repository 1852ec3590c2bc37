//! The durable level: what is to be written gathers in memory and is written in
//! batches by a thread of its own. Reads see what waits before what is written.
//!
//! When a write fails, or the disk takes none for long, nothing more is written.
//! The file then stays the state of one revision. Keys of watched prefixes are
//! still read, because their index tells which record is current; others are not.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::Notify;

use super::CacheError;
use super::file::{Batch, Content, File};
use super::record::Entry;
use crate::types::Revision;

/// Bytes that may wait to be written before whoever brings more has to wait.
const WAITING_BYTES_MAX: usize = 8 << 20;
/// Bytes that are written at once; less than that waits for company.
const COMPANY_BYTES: usize = 1 << 20;
/// How long a batch waits for company: each costs a sync of the disk.
const COMPANY_WAIT: Duration = Duration::from_millis(50);
/// A disk that takes no batch for so long is given up.
const STUCK_AFTER: Duration = Duration::from_secs(15);
/// What an entry counts for besides its bytes.
const ENTRY_OVERHEAD: usize = 128;

/// The durable level.
#[derive(Debug)]
pub(super) struct Disk {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    file: RwLock<File>,
    queue: Mutex<Queue>,
    /// Wakes the thread.
    work: Condvar,
    /// Wakes those who wait until less is waiting.
    written: Notify,
    bytes: AtomicU64,
    bytes_max: u64,
}

#[derive(Debug, Default)]
struct Queue {
    next: Batch,
    writing: Option<Arc<Batch>>,
    failed: Option<String>,
    closing: bool,
    ended: bool,
}

impl Disk {
    /// Opens the durable level of a directory; see [`File::open`].
    pub fn open(
        dir: &Path,
        prefixes: &[Bytes],
        cluster: u64,
        bytes_max: u64,
    ) -> Result<(Disk, Content), CacheError> {
        let (file, content) = File::open(dir, prefixes, cluster)?;
        let shared = Arc::new(Shared {
            file: RwLock::new(file),
            queue: Mutex::default(),
            work: Condvar::new(),
            written: Notify::new(),
            bytes: AtomicU64::new(content.bytes),
            bytes_max,
        });
        let own = shared.clone();
        let thread = std::thread::Builder::new()
            .name("cache-disk".into())
            .spawn(move || own.run())
            .map_err(|error| CacheError::Disk { path: dir.into(), reason: error.to_string() })?;
        Ok((Disk { shared, thread: Mutex::new(Some(thread)) }, content))
    }

    /// Waits until more may be brought. False if the disk has failed.
    pub async fn ready(&self) -> bool {
        let has_room = async {
            loop {
                let written = self.shared.written.notified();
                {
                    let queue = self.shared.queue.lock();
                    if queue.failed.is_some() || queue.next.weight < WAITING_BYTES_MAX {
                        return queue.failed.is_none();
                    }
                }
                written.await;
            }
        };
        match tokio::time::timeout(STUCK_AFTER, has_room).await {
            Ok(works) => works,
            Err(_) => {
                self.shared.fail(&mut self.shared.queue.lock(), format!("no write in {STUCK_AFTER:?}"));
                false
            }
        }
    }

    /// Brings changes of a watched prefix together with the revision they lead to.
    /// False if they were not taken because the disk has failed.
    pub fn push_scope(
        &self,
        prefix: &Bytes,
        keys: &[(Bytes, Option<Arc<Entry>>)],
        mark: (Revision, i64),
    ) -> bool {
        self.push(|batch| {
            for (key, entry) in keys {
                batch.weight += key.len() + ENTRY_OVERHEAD + value_bytes(entry.as_deref());
                batch.keys.insert(key.clone(), entry.clone());
            }
            batch.scopes.insert(prefix.clone(), mark);
        })
    }

    /// Brings knowledge of another key, whose proof is in milliseconds since 1970.
    pub fn push_other(&self, key: &Bytes, entry: Entry) {
        self.push(|batch| {
            let entry = match batch.others.get(key) {
                Some(known) => entry.merge(known),
                None => entry,
            };
            batch.weight += key.len() + ENTRY_OVERHEAD + value_bytes(Some(&entry));
            batch.others.insert(key.clone(), Arc::new(entry));
        });
    }

    /// Remembers the cluster that the content is of.
    pub fn push_cluster(&self, cluster: u64) {
        self.push(|batch| batch.cluster = Some(cluster));
    }

    fn push(&self, add: impl FnOnce(&mut Batch)) -> bool {
        let mut queue = self.shared.queue.lock();
        if queue.failed.is_some() || queue.closing {
            return false;
        }
        let before = queue.next.weight;
        let was_empty = queue.next.is_empty();
        add(&mut queue.next);
        if was_empty || (before < COMPANY_BYTES && queue.next.weight >= COMPANY_BYTES) {
            self.shared.work.notify_one();
        }
        true
    }

    /// Reads what is known of a key. `Err` says that there is a record and it is damaged,
    /// or that the file cannot be read. Blocks.
    pub fn read(&self, key: &[u8], watched: bool) -> Result<Option<Arc<Entry>>, ()> {
        {
            let queue = self.shared.queue.lock();
            if queue.failed.is_some() && !watched {
                return Ok(None);
            }
            for batch in std::iter::once(&queue.next).chain(queue.writing.as_deref()) {
                let waiting = match watched {
                    true => batch.keys.get(key).cloned(),
                    false => batch.others.get(key).cloned().map(Some),
                };
                if let Some(waiting) = waiting {
                    return Ok(waiting);
                }
            }
        }
        Ok(self.shared.file.read().read(key, watched)?.map(Arc::new))
    }

    /// Why nothing is written any more.
    pub fn failure(&self) -> Option<String> {
        self.shared.queue.lock().failed.clone()
    }

    /// Bytes of keys and records in the file.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Has everything that waits written and the file closed, by and by.
    pub fn close(&self) {
        self.shared.queue.lock().closing = true;
        self.shared.work.notify_one();
    }

    /// Waits until the file is closed, after [`Disk::close`].
    pub async fn closed(&self) {
        loop {
            let written = self.shared.written.notified();
            if self.shared.queue.lock().ended {
                break;
            }
            written.await;
        }
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            // It has nothing left to do but to return.
            let _ = thread.join();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}

fn value_bytes(entry: Option<&Entry>) -> usize {
    entry.and_then(|entry| entry.kv.as_ref()).map_or(0, |kv| kv.value.len())
}

impl Shared {
    fn run(&self) {
        while let Some(batch) = self.next_batch() {
            let bytes = self.bytes.load(Ordering::Relaxed);
            let result = self.file.read().commit(&batch, bytes, self.bytes_max);
            let mut queue = self.queue.lock();
            match result {
                Ok(bytes) => {
                    self.bytes.store(bytes, Ordering::Relaxed);
                    queue.writing = None;
                }
                // What waited stays at hand for reads.
                Err(reason) => {
                    self.fail(&mut queue, reason);
                    drop(queue);
                    self.file.write().reopen();
                }
            }
            self.written.notify_waiters();
        }
        self.file.write().close();
        self.queue.lock().ended = true;
        self.written.notify_waiters();
    }

    /// Waits for something to write, and a little for more. `None` at the end.
    fn next_batch(&self) -> Option<Arc<Batch>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.failed.is_some() || queue.next.is_empty() {
                if queue.closing {
                    return None;
                }
                self.work.wait(&mut queue);
                continue;
            }
            if queue.next.weight < COMPANY_BYTES && !queue.closing {
                self.work.wait_for(&mut queue, COMPANY_WAIT);
            }
            if queue.failed.is_none() {
                let batch = Arc::new(std::mem::take(&mut queue.next));
                queue.writing = Some(batch.clone());
                return Some(batch);
            }
        }
    }

    fn fail(&self, queue: &mut Queue, reason: String) {
        if queue.failed.is_none() {
            tracing::warn!(%reason, "the cache's disk level is no longer written; memory goes on");
            queue.failed = Some(reason);
        }
        self.written.notify_waiters();
    }
}
