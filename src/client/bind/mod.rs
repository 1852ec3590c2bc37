//! Typed bindings: the keys below a prefix as a value of a type, kept up to date.
//!
//! A binding follows its keys. At each change it reads all of them into a new
//! `T`, has it checked, and swaps it in; what cannot be read or is refused never
//! replaces what was good, and is told by [`Binding::status`],
//! [`Binding::changed`], a warning in the log and a metric. A change is a whole
//! revision: no reader sees half of a transaction.

mod de;
mod document;
mod error;
mod follow;
mod tree;

#[cfg(test)]
mod tests;

pub use document::Format;
pub use error::BindError;

use std::future::IntoFuture;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::follow::{Reader, Shared};
use self::tree::Place;
use super::Client;
use crate::types::{KeyRange, Revision};

/// How often a wait for a revision asks again how far the keys are known.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A binding to be; it begins when it is awaited.
///
/// # Keys are paths
/// Below the prefix `svc/checkout/`, the key `svc/checkout/db/host` is the field
/// `host` of the field `db`. A prefix stands for a folder, so a slash at its end
/// is added if it is missing. Empty segments count as none: `a//b` is `a/b`.
/// Two keys at one path are refused, and so is a key that is a value where
/// another needs a folder; the error names both. A key that ends with a slash
/// and has no value is taken for a folder's mark and left out. A folder whose
/// names are numbers can be read as a list, in the order of the numbers.
///
/// Values are read by their [`Format`].
///
/// # Offline
/// A client with a cache that watches the prefix, or one that it lies within,
/// binds also while the cluster does not answer: after a second, to the last
/// state that the cache has, and [`BindStatus::is_stale`] says so until the
/// cluster has answered.
///
/// # Examples
/// ```no_run
/// use mainstay::client::{BindError, Client};
/// use serde::Deserialize;
///
/// #[derive(Deserialize)]
/// struct Settings {
///     port: u16,              // svc/checkout/port = 8080
///     #[serde(default)]
///     debug: bool,            // svc/checkout/debug = true, or no such key
///     limits: Limits,         // svc/checkout/limits.toml, or svc/checkout/limits/...
/// }
///
/// #[derive(Deserialize)]
/// struct Limits {
///     orders_max: u32,
/// }
///
/// # async fn example(client: Client) -> Result<(), BindError> {
/// let mut settings = client
///     .bind::<Settings>("svc/checkout/")
///     .check(|settings| match settings.limits.orders_max {
///         0 => Err("limits.orders_max must not be 0".to_owned()),
///         _ => Ok(()),
///     })
///     .await?;
/// println!("listening at {}", settings.load().port);
/// loop {
///     match settings.changed().await {
///         Ok(new) => println!("debug is {} from here on", new.debug),
///         Err(error) => eprintln!("the settings stay as they were: {error}"),
///     }
/// }
/// # }
/// ```
#[must_use = "a binding begins when it is awaited"]
pub struct Bind<T> {
    client: Client,
    place: Place,
    reader: Reader<T>,
    start_limit: Duration,
}

impl Client {
    /// Binds the keys below a prefix to a value; [`Bind`] says how keys
    /// make one. Await it:
    ///
    /// ```no_run
    /// # use mainstay::client::{BindError, Client};
    /// # async fn example(client: Client) -> Result<(), BindError> {
    /// let flags = client.bind::<std::collections::HashMap<String, bool>>("flags/").or_default().await?;
    /// println!("{} flags", flags.load().len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn bind<T>(&self, prefix: impl AsRef<str>) -> Bind<T>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.bind_place(Place::below(prefix.as_ref()))
    }

    /// Binds one key, whose value is the whole document; its extension tells the
    /// format as below a prefix.
    ///
    /// ```no_run
    /// # use mainstay::client::{BindError, Client};
    /// # #[derive(serde::Deserialize)] struct Settings { port: u16 }
    /// # async fn example(client: Client) -> Result<(), BindError> {
    /// let settings = client.bind_key::<Settings>("svc/checkout.toml").await?;
    /// println!("listening at {}", settings.load().port);
    /// # Ok(())
    /// # }
    /// ```
    pub fn bind_key<T>(&self, key: impl AsRef<str>) -> Bind<T>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.bind_place(Place::key(key.as_ref()))
    }

    fn bind_place<T>(&self, place: Place) -> Bind<T> {
        let reader = Reader {
            place: place.clone(),
            format: Format::Auto,
            default: None,
            check: None,
            reads: PhantomData,
        };
        Bind { client: self.clone(), place, reader, start_limit: self.calls.options().request_timeout }
    }
}

impl<T> Bind<T> {
    /// Reads every value in this format; [`Format::Auto`] unless it is said.
    pub fn format(mut self, format: Format) -> Self {
        self.reader.format = format;
        self
    }

    /// Takes `T::default()` while there is no key at all. Otherwise a binding
    /// without keys is refused, and one whose keys all go keeps its last value.
    pub fn or_default(mut self) -> Self
    where
        T: Default,
    {
        self.reader.default = Some(T::default);
        self
    }

    /// Refuses values that `check` says no to, with its reason.
    pub fn check(mut self, check: impl Fn(&T) -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.reader.check = Some(Box::new(check));
        self
    }

    /// How long to wait for the first value; the client's request timeout
    /// unless it is said.
    pub fn start_limit(mut self, limit: Duration) -> Self {
        self.start_limit = limit;
        self
    }
}

impl<T> std::fmt::Debug for Bind<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bind").field("place", &self.place).finish_non_exhaustive()
    }
}

impl<T> IntoFuture for Bind<T>
where
    T: DeserializeOwned + Send + Sync + 'static,
{
    type Output = Result<Binding<T>, BindError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let range = match &self.place.start {
            key if self.place.is_key => KeyRange::Single(key.clone().into()),
            // On the wire a range cannot start at the empty key.
            prefix if prefix.is_empty() => KeyRange::From(vec![0].into()),
            prefix => KeyRange::prefix(prefix.clone().into()),
        };
        let source = self.client.mirror(range, Revision(0));
        let env = self.client.calls.env().clone();
        let last_good = self.client.cache().cloned().map(|cache| -> BoxFuture<'static, _> {
            let prefix = self.place.start;
            Box::pin(async move { cache.whole(prefix.as_bytes()).await })
        });
        Box::pin(follow::start(source, last_good, self.reader, self.start_limit, env))
    }
}

/// How a binding stands.
#[derive(Clone, Debug)]
pub struct BindStatus {
    /// Up to this revision the keys are known.
    pub known: Revision,
    /// What [`Binding::load`] gives is how the keys were at this revision; older
    /// than `known` while the newest keys are not good.
    pub loaded: Revision,
    /// How many values were taken; 1 for the first.
    pub loads: u64,
    /// How many changes were not.
    pub refusals: u64,
    /// Why the newest keys are not what [`Binding::load`] gives; `None` when they are.
    pub problem: Option<BindError>,
    /// It began with what the client's cache had, and the cluster has not answered since.
    pub is_stale: bool,
}

impl BindStatus {
    fn judged(&self) -> u64 {
        self.loads + self.refusals
    }
}

/// A value that follows its keys. Clones share it; each hears of every change.
/// The keys are followed until the last clone is dropped.
pub struct Binding<T> {
    shared: Arc<Shared<T>>,
    status: watch::Receiver<BindStatus>,
    /// What [`Binding::changed`] has told of.
    judged: u64,
    task: Arc<Task>,
}

/// Ends with its last owner.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Binding<T> {
    /// The last good value. Takes no lock and never waits.
    pub fn load(&self) -> Arc<T> {
        self.shared.loaded.load().value.clone()
    }

    /// The last good value and the revision at which the keys were so.
    pub fn load_with_revision(&self) -> (Arc<T>, Revision) {
        // In this order: a value that comes in between brings its own revision.
        let known = self.status.borrow().loaded;
        let loaded = self.shared.loaded.load();
        (loaded.value.clone(), loaded.revision.max(known))
    }

    /// The revision that the last good value is known to hold at.
    pub fn revision(&self) -> Revision {
        self.status.borrow().loaded
    }

    /// How it stands.
    pub fn status(&self) -> BindStatus {
        self.status.borrow().clone()
    }

    /// Waits for the next change of the keys; gives the new value, or why it was
    /// not taken. Of several changes since the last call only the newest is told.
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// Why the newest keys are not taken; [`Binding::load`] gives the last good
    /// value on. [`BindError::Ended`] when there will be no more.
    pub async fn changed(&mut self) -> Result<Arc<T>, BindError> {
        let judged = self.judged;
        let status = self.status.wait_for(|status| status.judged() != judged).await;
        let (judged, problem) = match &status {
            Ok(status) => (status.judged(), status.problem.clone()),
            Err(_) => return Err(BindError::Ended),
        };
        drop(status);
        self.judged = judged;
        match problem {
            Some(problem) => Err(problem),
            None => Ok(self.load()),
        }
    }

    /// Waits until the keys are known up to this revision: that of a write of
    /// one's own, for example.
    ///
    /// # Errors
    /// Why the newest keys are not taken; [`BindError::Ended`].
    pub async fn wait_for(&self, revision: Revision) -> Result<Arc<T>, BindError> {
        let mut status = self.status.clone();
        loop {
            // Keys that do not change make no event: ask how far they are known.
            self.shared.ask.notify_one();
            let reached = status.wait_for(|status| status.known >= revision);
            let problem = match tokio::time::timeout(ASK_AGAIN, reached).await {
                Err(_) => continue,
                Ok(Err(_)) => return Err(BindError::Ended),
                Ok(Ok(status)) => status.problem.clone(),
            };
            return match problem {
                Some(problem) => Err(problem),
                None => Ok(self.load()),
            };
        }
    }
}

impl<T> Clone for Binding<T> {
    fn clone(&self) -> Self {
        Binding {
            shared: self.shared.clone(),
            status: self.status.clone(),
            judged: self.judged,
            task: self.task.clone(),
        }
    }
}

impl<T> std::fmt::Debug for Binding<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding").field("status", &*self.status.borrow()).field("task", &self.task).finish()
    }
}
