//! What an operator sets, and what every room is told because of it.
//!
//! A flag wins over a `MAINSTAY_*` variable, a variable over the settings file,
//! the file over the default. All three use one list of names (`keys`). What is
//! unknown, malformed or impossible is an error that names the key, where it
//! was set, and the fix; nothing is silently repaired. Reads no file, variable
//! or flag itself: its [`Sources`] are given, so that tests can give others.

mod compose;
mod keys;
mod memory;
mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use keys::{ForeignFlags, ServeFlags};

use crate::node::NodeOptions;
use crate::server::ServerOptions;
use crate::telemetry::LogOptions;
use crate::watch::HubOptions;

/// Variables with the prefix that are no settings: the commands read them themselves.
const CLIENT_VARIABLES: &[&str] = &["MAINSTAY_ENDPOINTS", "MAINSTAY_CONFIG_FILE"];

/// Everything `mainstay serve` needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For the node.
    pub node: NodeOptions,
    /// For its watches.
    pub watch: HubOptions,
    /// For its services and listeners.
    pub server: ServerOptions,
    /// For its log.
    pub log: LogOptions,
    /// What the operator should know, to be logged once the log is there.
    pub warnings: Vec<String>,
}

/// Where settings come from.
pub struct Sources<'a> {
    /// The flags.
    pub flags: &'a ServeFlags,
    /// The environment.
    pub variables: Vec<(String, String)>,
    /// Reads the settings file.
    pub read_file: &'a dyn Fn(&Path) -> std::io::Result<String>,
}

/// Where one value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `--key`.
    Flag,
    /// `MAINSTAY_KEY`.
    Variable,
    /// The settings file.
    File(PathBuf),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag => f.write_str("set by a flag"),
            Origin::Variable => f.write_str("set by a MAINSTAY_ variable"),
            Origin::File(path) => write!(f, "set in {}", path.display()),
            Origin::Default => f.write_str("the default"),
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// A key nobody knows.
    #[error("{key} is not a setting ({origin}){hint}")]
    Unknown {
        /// The key as written.
        key: String,
        /// Where it was.
        origin: Origin,
        /// What may have been meant, or nothing.
        hint: String,
    },
    /// A flag of etcd's that cannot be honoured.
    #[error("{key} is not served ({origin}): {reason}")]
    Refused {
        /// The key.
        key: &'static str,
        /// Where it was.
        origin: Origin,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A value that cannot be understood or is out of bounds.
    #[error("{key} ({origin}): {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Where it was.
        origin: Origin,
        /// What is wrong, and what to write.
        reason: String,
    },
    /// Two settings that do not go together.
    #[error("{0}")]
    Conflict(String),
    /// The settings file cannot be read.
    #[error("settings file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The settings file is not TOML, or a value in it is of no usable type.
    #[error("settings file {path}: {reason}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
}

/// One value, as text.
#[derive(Clone, Debug)]
struct Given {
    text: String,
    origin: Origin,
}

/// The values that were given, each from its strongest source.
#[derive(Debug, Default)]
struct Values {
    given: BTreeMap<&'static str, Given>,
    warnings: Vec<String>,
}

impl Settings {
    /// Reads all sources and composes every room's options.
    ///
    /// # Errors
    /// [`SettingsError`] for the first thing that is wrong.
    pub fn load(sources: &Sources<'_>) -> Result<Settings, SettingsError> {
        let mut values = Values::default();
        if let Some(path) = config_file(sources) {
            values.read_file(&path, sources.read_file)?;
        }
        values.read_variables(&sources.variables)?;
        let flags = sources.flags.given().into_iter().chain(sources.flags.foreign.given());
        for (key, text) in flags {
            values.set(key, text.to_owned(), Origin::Flag)?;
        }
        compose::settings(values)
    }
}

fn config_file(sources: &Sources<'_>) -> Option<PathBuf> {
    let variable = || {
        let (_, value) = sources.variables.iter().find(|(name, _)| name == "MAINSTAY_CONFIG_FILE")?;
        (!value.is_empty()).then(|| PathBuf::from(value))
    };
    sources.flags.config_file.clone().or_else(variable)
}

impl Values {
    fn read_file(
        &mut self,
        path: &Path,
        read: &dyn Fn(&Path) -> std::io::Result<String>,
    ) -> Result<(), SettingsError> {
        let text = read(path).map_err(|source| SettingsError::File { path: path.to_owned(), source })?;
        let toml = |reason: String| SettingsError::Toml { path: path.to_owned(), reason };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| toml(error.to_string()))?;
        for (key, value) in table {
            let text = plain_text(&value).ok_or_else(|| {
                toml(format!(
                    "{key} is a {}; use text, a number, true or false, or a list of texts",
                    value.type_str()
                ))
            })?;
            self.set(&key, text, Origin::File(path.to_owned()))?;
        }
        Ok(())
    }

    fn read_variables(&mut self, variables: &[(String, String)]) -> Result<(), SettingsError> {
        for (name, value) in variables {
            let Some(bare) = name.strip_prefix("MAINSTAY_") else { continue };
            if CLIENT_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let key = bare.to_ascii_lowercase().replace('_', "-");
            if find(&key).is_none() {
                let hint = hint(&key);
                return Err(SettingsError::Unknown { key: name.clone(), origin: Origin::Variable, hint });
            }
            self.set(&key, value.clone(), Origin::Variable)?;
        }
        Ok(())
    }

    /// Takes a value over what weaker sources gave.
    fn set(&mut self, key: &str, text: String, origin: Origin) -> Result<(), SettingsError> {
        match find(key) {
            Some(Key::Served(key)) => {
                self.given.insert(key, Given { text, origin });
                Ok(())
            }
            Some(Key::Refused(key, reason)) => Err(SettingsError::Refused { key, origin, reason }),
            Some(Key::WithoutEffect(key, why)) => {
                // Two of etcd's switches name guards that cannot be switched off.
                let guard = ["pre-vote", "strict-reconfig-check"].contains(&key);
                if guard && units::boolean(&text) != Ok(true) {
                    let reason = format!("{why}; remove it");
                    return Err(SettingsError::Value { key, origin, reason });
                }
                if !guard {
                    self.warnings.push(format!("{key} ({origin}) has no effect: {why}"));
                }
                Ok(())
            }
            None => Err(SettingsError::Unknown { key: key.to_owned(), origin, hint: hint(key) }),
        }
    }
}

enum Key {
    Served(&'static str),
    Refused(&'static str, &'static str),
    WithoutEffect(&'static str, &'static str),
}

fn find(key: &str) -> Option<Key> {
    let served = keys::KEYS.iter().find(|known| **known == key).map(|known| Key::Served(known));
    let in_list =
        |list: &'static [(&'static str, &'static str)]| list.iter().find(|(known, _)| *known == key);
    served
        .or_else(|| in_list(keys::REFUSED).map(|(key, reason)| Key::Refused(key, reason)))
        .or_else(|| in_list(keys::WITHOUT_EFFECT).map(|(key, why)| Key::WithoutEffect(key, why)))
}

/// The setting that `key` may have been meant to be.
fn hint(key: &str) -> String {
    let key = key.to_ascii_lowercase().replace('_', "-");
    let nearest = keys::KEYS.iter().map(|known| (distance(&key, known), known)).min();
    match nearest {
        Some((distance, known)) if distance <= 3 => format!("; did you mean {known}?"),
        _ => "; see `mainstay serve --help` for the list".to_owned(),
    }
}

/// How many letters must change to make one word the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A value of the settings file in the form a flag would have.
fn plain_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(value) => Some(value.to_string()),
        toml::Value::Array(items) => {
            let texts: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            Some(texts?.join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

#[cfg(test)]
mod tests;
