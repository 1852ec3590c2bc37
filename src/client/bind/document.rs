//! One value's text, read in its format. It decides what text means and knows
//! neither keys nor the type that is wanted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::error::short;

/// How values are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// By the key's extension: `.toml`, `.json`, `.yaml` and `.yml` are whole
    /// documents, and stand at the path without the extension. Any other value
    /// is text that is read as the field wants it: a number or a `bool` from the
    /// text without the white space around it; a list or a struct from JSON;
    /// `None` from `null`; a `String` from the text as it is, unless it is one
    /// JSON string in quotes, which stands for what is in them. Where the field
    /// takes anything, text that is JSON is what it says and other text is a string.
    #[default]
    Auto,
    /// Text and nothing else: numbers and `bool`s are read from it, lists and
    /// structs are not. Extensions are part of the name.
    Plain,
    /// Each value is a TOML document.
    Toml,
    /// Each value is a JSON document.
    Json,
    /// Each value is a YAML document. Needs the cargo feature `yaml`; without
    /// it every value is refused by an error that says so.
    Yaml,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Auto => "value",
            Format::Plain => "plain text",
            Format::Toml => "TOML",
            Format::Json => "JSON",
            Format::Yaml => "YAML",
        })
    }
}

impl Format {
    /// The format that a file name's extension names, and the name without it.
    pub(super) fn of_name(name: &str) -> Option<(&str, Format)> {
        let (stem, extension) = name.rsplit_once('.')?;
        let format = match extension {
            "toml" => Format::Toml,
            "json" => Format::Json,
            "yaml" | "yml" => Format::Yaml,
            _ => return None,
        };
        (!stem.is_empty()).then_some((stem, format))
    }

    /// Reads a value.
    pub(super) fn read(self, text: String) -> Result<Node, SyntaxError> {
        match self {
            Format::Auto => Ok(Node::Auto(text)),
            Format::Plain => Ok(Node::Plain(text)),
            Format::Toml => toml(&text),
            Format::Json => json(&text),
            Format::Yaml => yaml(&text),
        }
    }
}

/// A piece of a binding's content.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// A document's nothing.
    Null,
    /// A document's truth value.
    Bool(bool),
    /// A document's negative whole number.
    Signed(i64),
    /// A document's whole number.
    Unsigned(u64),
    /// A document's other number.
    Float(f64),
    /// A document's string.
    String(String),
    /// A key's value, read as its reader wants.
    Auto(String),
    /// A key's value that is text.
    Plain(String),
    /// A document's list.
    List(Vec<Node>),
    /// A document's table.
    Table(BTreeMap<String, Node>),
    /// What keys with slashes make.
    Folder(BTreeMap<String, Node>),
}

/// Why a value is not what its format says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub line: Option<usize>,
    pub column: Option<usize>,
    pub reason: String,
}

/// Reads JSON; a name twice in one object is refused.
pub(super) fn json(text: &str) -> Result<Node, SyntaxError> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let reason = error.to_string();
        let reason = reason.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&reason);
        SyntaxError {
            line: (line > 0).then_some(line),
            column: (line > 0).then_some(column),
            reason: short(reason),
        }
    })
}

fn toml(text: &str) -> Result<Node, SyntaxError> {
    let table: toml::Table = toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.map(|before| before.matches('\n').count() + 1);
        let column = before.map(|before| before.chars().rev().take_while(|c| *c != '\n').count() + 1);
        SyntaxError { line, column, reason: short(error.message()) }
    })?;
    Ok(from_toml(toml::Value::Table(table)))
}

/// TOML's dates become text: whoever wants one reads it from text.
fn from_toml(value: toml::Value) -> Node {
    match value {
        toml::Value::String(text) => Node::String(text),
        toml::Value::Integer(number) => u64::try_from(number).map_or(Node::Signed(number), Node::Unsigned),
        toml::Value::Float(number) => Node::Float(number),
        toml::Value::Boolean(truth) => Node::Bool(truth),
        toml::Value::Datetime(at) => Node::String(at.to_string()),
        toml::Value::Array(items) => Node::List(items.into_iter().map(from_toml).collect()),
        toml::Value::Table(table) => {
            Node::Table(table.into_iter().map(|(name, value)| (name, from_toml(value))).collect())
        }
    }
}

#[cfg(feature = "yaml")]
fn yaml(text: &str) -> Result<Node, SyntaxError> {
    serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location();
        let number = |n: u64| usize::try_from(n).ok();
        SyntaxError {
            line: place.and_then(|place| number(place.line())),
            column: place.and_then(|place| number(place.column())),
            reason: short(error.without_snippet()),
        }
    })
}

#[cfg(not(feature = "yaml"))]
fn yaml(_text: &str) -> Result<Node, SyntaxError> {
    let reason = "this program is built without mainstay's cargo feature `yaml`".to_owned();
    Err(SyntaxError { line: None, column: None, reason })
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, truth: bool) -> Result<Node, E> {
        Ok(Node::Bool(truth))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Node, E> {
        Ok(u64::try_from(number).map_or(Node::Signed(number), Node::Unsigned))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Node, E> {
        Ok(Node::Unsigned(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Node, E> {
        Ok(Node::Float(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Node, E> {
        Ok(Node::String(text))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut table = BTreeMap::new();
        while let Some(name) = access.next_key::<Node>()? {
            // YAML's names may be numbers.
            let name = match name {
                Node::String(name) => name,
                Node::Bool(truth) => truth.to_string(),
                Node::Signed(number) => number.to_string(),
                Node::Unsigned(number) => number.to_string(),
                _ => return Err(A::Error::custom("a name is a string, a whole number or a truth value")),
            };
            match table.entry(name) {
                Entry::Vacant(free) => free.insert(access.next_value()?),
                Entry::Occupied(taken) => {
                    return Err(A::Error::custom(format_args!("the name `{}` stands twice", taken.key())));
                }
            };
        }
        Ok(Node::Table(table))
    }
}
