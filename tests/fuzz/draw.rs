//! A random value of any type that can be read: a deserializer that, asked for
//! a number, draws one.
//!
//! So every type that goes to disk or to a peer has a generator the day it is
//! written, and none can fall behind its type.

use std::fmt;

use serde::de::value::U32Deserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use crate::mutate::Rng;

/// Draws a value.
pub fn draw<T: DeserializeOwned>(rng: &mut Rng) -> T {
    T::deserialize(Draw { rng, depth: 0 }).expect("every type that is fuzzed can be drawn")
}

/// Lists grow shorter on the way down, so that a type that holds itself ends.
struct Draw<'r> {
    rng: &'r mut Rng,
    depth: usize,
}

impl Draw<'_> {
    fn below(&mut self) -> Draw<'_> {
        Draw { rng: self.rng, depth: self.depth + 1 }
    }

    fn length(&mut self) -> usize {
        match self.depth {
            0..=4 => self.rng.below(4),
            5..=9 => self.rng.below(3),
            10..=14 => self.rng.below(2),
            _ => 0,
        }
    }
}

#[derive(Debug)]
pub struct NotDrawn(String);

impl fmt::Display for NotDrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotDrawn {}

impl serde::de::Error for NotDrawn {
    fn custom<T: fmt::Display>(message: T) -> NotDrawn {
        NotDrawn(message.to_string())
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
            visitor.$visit(self.rng.number() as $type)
        }
    )*};
}

impl<'de> Deserializer<'de> for Draw<'_> {
    type Error = NotDrawn;

    numbers!(
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64
    );

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NotDrawn> {
        Err(NotDrawn("a type that does not say what it is".to_owned()))
    }

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_bool(self.rng.one_in(2))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_string(self.rng.text())
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_string(self.rng.text())
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_byte_buf(self.rng.bytes())
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_byte_buf(self.rng.bytes())
    }

    fn deserialize_option<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, NotDrawn> {
        match self.rng.one_in(2) {
            true => visitor.visit_some(self.below()),
            false => visitor.visit_none(),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, NotDrawn> {
        visitor.visit_newtype_struct(self.below())
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, NotDrawn> {
        let left = self.length();
        visitor.visit_seq(Items { draw: self.below(), left })
    }

    fn deserialize_tuple<V: Visitor<'de>>(mut self, left: usize, visitor: V) -> Result<V::Value, NotDrawn> {
        visitor.visit_seq(Items { draw: self.below(), left })
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, NotDrawn> {
        let left = self.length();
        visitor.visit_map(Items { draw: self.below(), left })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NotDrawn> {
        self.deserialize_tuple(fields.len(), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NotDrawn> {
        let variant = self.rng.below(variants.len());
        visitor.visit_enum(Choice { draw: self, variant: variant as u32 })
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char unit_struct tuple_struct identifier ignored_any
    }
}

struct Items<'r> {
    draw: Draw<'r>,
    left: usize,
}

impl Items<'_> {
    fn one<'de, T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, NotDrawn> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        self.left = left;
        seed.deserialize(self.draw.below()).map(Some)
    }
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = NotDrawn;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, NotDrawn> {
        self.one(seed)
    }
}

impl<'de> MapAccess<'de> for Items<'_> {
    type Error = NotDrawn;

    fn next_key_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, NotDrawn> {
        self.one(seed)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, NotDrawn> {
        seed.deserialize(self.draw.below())
    }
}

struct Choice<'r> {
    draw: Draw<'r>,
    variant: u32,
}

impl<'de, 'r> EnumAccess<'de> for Choice<'r> {
    type Error = NotDrawn;
    type Variant = Draw<'r>;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Draw<'r>), NotDrawn> {
        let number: U32Deserializer<NotDrawn> = self.variant.into_deserializer();
        Ok((seed.deserialize(number)?, self.draw))
    }
}

impl<'de> VariantAccess<'de> for Draw<'_> {
    type Error = NotDrawn;

    fn unit_variant(self) -> Result<(), NotDrawn> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(mut self, seed: T) -> Result<T::Value, NotDrawn> {
        seed.deserialize(self.below())
    }

    fn tuple_variant<V: Visitor<'de>>(self, fields: usize, visitor: V) -> Result<V::Value, NotDrawn> {
        self.deserialize_tuple(fields, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NotDrawn> {
        self.deserialize_tuple(fields.len(), visitor)
    }
}
