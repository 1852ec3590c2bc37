//! Patterns with wildcards, matched in time proportional to pattern times key.
//!
//! Bytes are compared with bytes; only `?` looks at characters, and takes a
//! single byte where the key is not UTF-8.

use bytes::Bytes;

use crate::types::KeyRange;

/// A pattern: `*`, `**`, `?`, `\` and what stands for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Glob {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    /// These bytes.
    Literal(Vec<u8>),
    /// One character that is not `/`.
    One,
    /// Any run without `/`.
    Segment,
    /// Any run.
    Path,
}

impl Glob {
    /// Reads a pattern; what is wrong with it otherwise.
    pub(super) fn parse(pattern: &str) -> Result<Glob, String> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut chars = pattern.chars().peekable();
        while let Some(char) = chars.next() {
            let literal = match char {
                '?' => {
                    pieces.push(Piece::One);
                    continue;
                }
                '*' => {
                    // More stars than two say no more than two.
                    let mut run = Piece::Segment;
                    while chars.next_if_eq(&'*').is_some() {
                        run = Piece::Path;
                    }
                    pieces.push(run);
                    continue;
                }
                '\\' => chars.next().ok_or("nothing stands after the `\\` at its end")?,
                plain => plain,
            };
            let mut bytes = [0; 4];
            let bytes = literal.encode_utf8(&mut bytes).as_bytes();
            match pieces.last_mut() {
                Some(Piece::Literal(run)) => run.extend_from_slice(bytes),
                _ => pieces.push(Piece::Literal(bytes.to_vec())),
            }
        }
        Ok(Glob { pieces })
    }

    /// Whether the pattern describes the whole key.
    pub(super) fn matches(&self, key: &[u8]) -> bool {
        // Where in the key what was looked at of the pattern may end.
        let mut ends = vec![false; key.len() + 1];
        ends[0] = true;
        for piece in &self.pieces {
            let mut next = vec![false; key.len() + 1];
            for at in (0..=key.len()).filter(|at| ends[*at]) {
                match piece {
                    Piece::Literal(bytes) if key[at..].starts_with(bytes) => next[at + bytes.len()] = true,
                    Piece::One if at < key.len() && key[at] != b'/' => {
                        next[at + char_bytes(&key[at..])] = true
                    }
                    Piece::Segment | Piece::Path => next[at] = true,
                    Piece::Literal(_) | Piece::One => {}
                }
            }
            if let Piece::Segment | Piece::Path = piece {
                for at in 1..=key.len() {
                    let goes_on = *piece == Piece::Path || key[at - 1] != b'/';
                    next[at] |= next[at - 1] && goes_on;
                }
            }
            ends = next;
        }
        ends[key.len()]
    }

    /// A range that has every key described.
    pub(super) fn cover(&self) -> KeyRange {
        match &self.pieces[..] {
            [Piece::Literal(key)] => KeyRange::Single(key.clone().into()),
            [Piece::Literal(prefix), ..] => KeyRange::prefix(prefix.clone().into()),
            _ => KeyRange::prefix(Bytes::new()),
        }
    }
}

/// How many bytes the first character has; 1 for what is no character.
fn char_bytes(key: &[u8]) -> usize {
    let length = match key[0] {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    };
    match key.get(..length) {
        Some(char) if std::str::from_utf8(char).is_ok() => length,
        _ => 1,
    }
}
