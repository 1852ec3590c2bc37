//! From a tree to a `T`: text is read as the type wants it, documents mean what
//! they say. Errors know the path of the field they are about.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::fmt::Display;
use std::str::FromStr;

use serde::de::value::StringDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};

use super::document::{Node, SyntaxError, json};
use super::error::short;

/// The most of a value that an error quotes, in characters.
const QUOTE_CHARS_MAX: usize = 40;

/// Why a tree is no `T`.
#[derive(Clone, Debug)]
pub(super) struct Mismatch {
    /// From the field outwards: turned round before it is shown.
    path: Vec<String>,
    pub reason: String,
    /// A value that had to be JSON and is none.
    pub syntax: Option<SyntaxError>,
}

impl Mismatch {
    fn new(reason: impl Display) -> Mismatch {
        Mismatch { path: Vec::new(), reason: short(reason), syntax: None }
    }

    fn inside(mut self, name: String) -> Mismatch {
        self.path.push(name);
        self
    }

    /// The field's path, from the outermost name on.
    pub(super) fn path(&self) -> Vec<String> {
        self.path.iter().rev().cloned().collect()
    }
}

impl From<SyntaxError> for Mismatch {
    fn from(error: SyntaxError) -> Mismatch {
        Mismatch { path: Vec::new(), reason: error.reason.clone(), syntax: Some(error) }
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Mismatch {}

impl de::Error for Mismatch {
    fn custom<M: Display>(message: M) -> Mismatch {
        Mismatch::new(message)
    }
}

/// A number or a truth value from text.
fn scalar<N: FromStr<Err: Display>>(text: &str, kind: &str) -> Result<N, Mismatch> {
    text.trim().parse().map_err(|error| {
        let quoted: String = text.trim().chars().take(QUOTE_CHARS_MAX).collect();
        Mismatch::new(format_args!("`{quoted}` is no {kind}: {error}"))
    })
}

/// What text in quotes stands for.
fn unquoted(text: String) -> String {
    if !text.trim_start().starts_with('"') {
        return text;
    }
    serde_json::from_str(&text).unwrap_or(text)
}

/// The position that a name in a folder stands for, if it is one.
fn position(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number: &u64| number.to_string() == name)
}

macro_rules! scalars {
    ($($method:ident $visit:ident $scalar:ty;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
            match self {
                Node::Auto(text) | Node::Plain(text) => {
                    visitor.$visit(scalar::<$scalar>(&text, stringify!($scalar))?)
                }
                other => other.deserialize_any(visitor),
            }
        })*
    };
}

macro_rules! texts {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
            match self {
                Node::Auto(text) => visitor.visit_string(unquoted(text)),
                other => other.deserialize_any(visitor),
            }
        })*
    };
}

impl<'de> Deserializer<'de> for Node {
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self {
            Node::Null => visitor.visit_unit(),
            Node::Bool(truth) => visitor.visit_bool(truth),
            Node::Signed(number) => visitor.visit_i64(number),
            Node::Unsigned(number) => visitor.visit_u64(number),
            Node::Float(number) => visitor.visit_f64(number),
            Node::String(text) | Node::Plain(text) => visitor.visit_string(text),
            Node::Auto(text) => match json(&text) {
                Ok(node) => node.deserialize_any(visitor),
                Err(_) => visitor.visit_string(text),
            },
            Node::List(items) => {
                let items = items.into_iter().enumerate().map(|(at, item)| (at.to_string(), item));
                visitor.visit_seq(Items { left: items.collect::<Vec<_>>().into_iter() })
            }
            Node::Table(fields) | Node::Folder(fields) => {
                visitor.visit_map(Fields { left: fields.into_iter(), value: None })
            }
        }
    }

    scalars! {
        deserialize_bool visit_bool bool;
        deserialize_i8 visit_i8 i8;
        deserialize_i16 visit_i16 i16;
        deserialize_i32 visit_i32 i32;
        deserialize_i64 visit_i64 i64;
        deserialize_i128 visit_i128 i128;
        deserialize_u8 visit_u8 u8;
        deserialize_u16 visit_u16 u16;
        deserialize_u32 visit_u32 u32;
        deserialize_u64 visit_u64 u64;
        deserialize_u128 visit_u128 u128;
        deserialize_f32 visit_f32 f32;
        deserialize_f64 visit_f64 f64;
    }

    texts! { deserialize_char deserialize_str deserialize_string deserialize_identifier }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.deserialize_byte_buf(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self {
            Node::Auto(text) | Node::Plain(text) | Node::String(text) => {
                visitor.visit_byte_buf(text.into_bytes())
            }
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self {
            Node::Null => visitor.visit_none(),
            Node::Auto(text) if text.trim() == "null" => visitor.visit_none(),
            other => visitor.visit_some(other),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.deserialize_any(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self {
            Node::Auto(text) => json(&text)?.deserialize_any(visitor),
            Node::Folder(entries) => {
                let numbered = |(name, node): (String, Node)| match position(&name) {
                    Some(position) => Ok((position, (name, node))),
                    None => Err(Mismatch::new(format_args!(
                        "a list's keys are numbers, and `{}` is none",
                        short(name)
                    ))),
                };
                let sorted = entries.into_iter().map(numbered).collect::<Result<BTreeMap<_, _>, _>>()?;
                visitor.visit_seq(Items { left: sorted.into_values().collect::<Vec<_>>().into_iter() })
            }
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, Mismatch> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self {
            Node::Auto(text) => json(&text)?.deserialize_any(visitor),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        match self {
            Node::Auto(text) if text.trim_start().starts_with('{') => {
                json(&text)?.deserialize_enum(name, variants, visitor)
            }
            Node::Auto(text) => {
                visitor.visit_enum(Variant { name: unquoted(text).trim().to_owned(), content: None })
            }
            Node::Plain(text) => visitor.visit_enum(Variant { name: text.trim().to_owned(), content: None }),
            Node::String(name) => visitor.visit_enum(Variant { name, content: None }),
            Node::Table(mut fields) | Node::Folder(mut fields) => match (fields.pop_first(), fields.len()) {
                (Some((name, content)), 0) => visitor.visit_enum(Variant { name, content: Some(content) }),
                _ => Err(Mismatch::new(format_args!(
                    "one of {} is wanted, with its content",
                    variants.join(", ")
                ))),
            },
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_unit()
    }
}

/// The fields that a table still has.
struct Fields {
    left: btree_map::IntoIter<String, Node>,
    value: Option<(String, Node)>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = Mismatch;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Mismatch> {
        let Some((name, node)) = self.left.next() else { return Ok(None) };
        self.value = Some((name.clone(), node));
        // A map's names may be numbers to the reader, like any text.
        seed.deserialize(Node::Plain(name.clone())).map(Some).map_err(|error| error.inside(name))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Mismatch> {
        let Some((name, node)) = self.value.take() else {
            return Err(Mismatch::new("a value was asked for before its name"));
        };
        seed.deserialize(node).map_err(|error| error.inside(name))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

/// The items that a list still has, with their positions.
struct Items {
    left: std::vec::IntoIter<(String, Node)>,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Mismatch;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Mismatch> {
        let Some((at, node)) = self.left.next() else { return Ok(None) };
        seed.deserialize(node).map(Some).map_err(|error| error.inside(at))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.len())
    }
}

/// One of several kinds, by its name.
struct Variant {
    name: String,
    content: Option<Node>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = Mismatch;
    type Variant = VariantContent;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, VariantContent), Mismatch> {
        let name: StringDeserializer<Mismatch> = self.name.clone().into_deserializer();
        Ok((seed.deserialize(name)?, VariantContent { name: self.name, content: self.content }))
    }
}

struct VariantContent {
    name: String,
    content: Option<Node>,
}

impl VariantContent {
    fn read<T>(self, read: impl FnOnce(Node) -> Result<T, Mismatch>) -> Result<T, Mismatch> {
        match self.content {
            Some(content) => read(content).map_err(|error| error.inside(self.name)),
            None => Err(Mismatch::new(format_args!("`{}` wants content", self.name))),
        }
    }
}

impl<'de> VariantAccess<'de> for VariantContent {
    type Error = Mismatch;

    fn unit_variant(self) -> Result<(), Mismatch> {
        match self.content {
            None | Some(Node::Null) => Ok(()),
            Some(_) => Err(Mismatch::new(format_args!("`{}` has no content", self.name))),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Mismatch> {
        self.read(|content| seed.deserialize(content))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, Mismatch> {
        self.read(|content| content.deserialize_seq(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        self.read(|content| content.deserialize_map(visitor))
    }
}
