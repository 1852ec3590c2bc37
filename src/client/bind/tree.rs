//! Keys below a prefix as one tree: segments between slashes are names, empty
//! segments count as none, and a place belongs to one key.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::document::{Node, SyntaxError};
use super::{BindError, Format};

/// The most segments a key may have below the prefix: reading goes as deep.
pub(super) const DEPTH_MAX: usize = 64;

/// What is bound: a prefix's keys, or one key alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The prefix with a slash at its end (empty for all keys), or the key.
    pub start: String,
    /// Whether it is one key.
    pub is_key: bool,
}

impl Place {
    pub(super) fn below(prefix: &str) -> Place {
        let slash = if prefix.is_empty() || prefix.ends_with('/') { "" } else { "/" };
        Place { start: format!("{prefix}{slash}"), is_key: false }
    }

    pub(super) fn key(key: &str) -> Place {
        Place { start: key.to_owned(), is_key: true }
    }

    /// Where a key's value stands, and how it is read. A key's extension counts
    /// only in [`Format::Auto`].
    fn path_of(&self, key: &str, format: Format) -> (Vec<String>, Format) {
        let below = if self.is_key { key } else { key.strip_prefix(&self.start).unwrap_or(key) };
        let mut path: Vec<String> =
            below.split('/').filter(|segment| !segment.is_empty()).map(str::to_owned).collect();
        let mut format = format;
        if let (Format::Auto, Some(last)) = (format, path.last_mut())
            && let Some((stem, named)) = Format::of_name(last)
        {
            format = named;
            *last = stem.to_owned();
        }
        if self.is_key {
            path.clear();
        }
        (path, format)
    }
}

/// The tree with the key of every place that one stands at.
#[derive(Debug)]
pub(super) struct Tree {
    root: Node,
    places: BTreeMap<Vec<String>, String>,
}

impl Tree {
    /// Builds the tree of these keys.
    ///
    /// A key that ends with a slash and has no value marks a folder, as tools
    /// that draw keys as files make them, and is left out.
    pub(super) fn build(
        place: &Place,
        format: Format,
        kvs: &BTreeMap<Bytes, Bytes>,
    ) -> Result<Tree, BindError> {
        let mut tree = Tree { root: Node::Folder(BTreeMap::new()), places: BTreeMap::new() };
        for (key, value) in kvs {
            let key = text(key, key, "name")?;
            if key.ends_with('/') && value.is_empty() && !place.is_key {
                continue;
            }
            let value = text(key.as_bytes(), value, "value")?;
            let (path, format) = place.path_of(key, format);
            if path.len() > DEPTH_MAX {
                return Err(BindError::TooDeep { key: key.to_owned(), depth: path.len(), max: DEPTH_MAX });
            }
            let node = format.read(value.to_owned()).map_err(|error| BindError::Syntax {
                key: key.to_owned(),
                format,
                line: error.line,
                column: error.column,
                reason: error.reason,
            })?;
            tree.insert(path, key, node)?;
        }
        Ok(tree)
    }

    /// Whether no key has a place in it.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Reads a `T` from it.
    pub(super) fn read<T: DeserializeOwned>(self) -> Result<T, BindError> {
        let Tree { root, places } = self;
        T::deserialize(root).map_err(|error| {
            let path = error.path();
            // The field is the key's, or inside of the key's document.
            let key = (0..=path.len()).find_map(|length| places.get(&path[..length]).cloned());
            match (error.syntax, key) {
                (Some(SyntaxError { line, column, reason }), Some(key)) => {
                    BindError::Syntax { key, format: Format::Json, line, column, reason }
                }
                (_, key) => BindError::Field { path: path.join("."), key, reason: error.reason },
            }
        })
    }

    fn insert(&mut self, path: Vec<String>, key: &str, node: Node) -> Result<(), BindError> {
        // The value that is in the way: at this path, at a folder above it, or below it.
        let above = (0..=path.len()).find_map(|length| self.places.get(&path[..length]));
        let below = || {
            let next = self.places.range(path.clone()..).next();
            next.filter(|(other, _)| other.starts_with(&path)).map(|(_, key)| key)
        };
        if let Some(taken) = above {
            return Err(BindError::Conflict { key: taken.clone(), other: key.to_owned() });
        }
        if let Some(taken) = below() {
            return Err(BindError::Conflict { key: key.to_owned(), other: taken.clone() });
        }
        let mut at = &mut self.root;
        for segment in &path {
            let Node::Folder(folder) = at else { return Ok(()) };
            at = folder.entry(segment.clone()).or_insert_with(|| Node::Folder(BTreeMap::new()));
        }
        *at = node;
        self.places.insert(path, key.to_owned());
        Ok(())
    }
}

fn text<'a>(key: &[u8], bytes: &'a [u8], what: &'static str) -> Result<&'a str, BindError> {
    std::str::from_utf8(bytes).map_err(|error| BindError::NotUtf8 {
        key: String::from_utf8_lossy(key).into_owned(),
        what,
        at: error.valid_up_to(),
    })
}
