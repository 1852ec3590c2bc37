//! The language of `mainstay txn`: etcdctl's, line by line.
//!
//! Three sections, each ended by an empty line (or by the end of the input):
//! comparisons, what to do when all of them hold, what to do otherwise. It
//! reads text and makes values; it asks nobody and does nothing.

use bytes::Bytes;
use clap::Parser;

use super::args::{GetArgs, bytes_of, os_string, parse_lease};
use super::error::CliError;
use super::kv::{DelOpArgs, PutOpArgs};
use crate::types::{Compare, CompareOp, CompareTarget, DeleteRange, KeyRange, Put, Space, TxnOp};

/// One operation of a transaction, read by the same rules as the command line.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_help_subcommand = true)]
enum OpLine {
    /// Set a key.
    Put(PutOpArgs),
    /// Read keys.
    Get(GetArgs),
    /// Remove keys.
    Del(DelOpArgs),
}

/// Reads a comparison: `mod("key") > "0"`.
pub fn parse_compare(line: &str) -> Result<Compare, CliError> {
    let wrong = |why: &str| {
        CliError::Usage(format!(
            "`{line}`: {why}; a comparison is target(\"key\") op \"value\", \
             with value, version, create, mod or lease as target and =, !=, < or > as op"
        ))
    };
    let (target, rest) = line.split_once('(').ok_or_else(|| wrong("`(` is missing"))?;
    let mut rest = rest.trim_start();
    let key = take_quoted(&mut rest).map_err(|why| wrong(&why))?;
    if key.is_empty() {
        return Err(wrong("the key is empty"));
    }
    rest = rest
        .trim_start()
        .strip_prefix(')')
        .ok_or_else(|| wrong("`)` is missing after the key"))?
        .trim_start();
    let (op, after) = [
        ("!=", CompareOp::NotEqual),
        ("=", CompareOp::Equal),
        ("<", CompareOp::Less),
        (">", CompareOp::Greater),
    ]
    .into_iter()
    .find_map(|(sign, op)| rest.strip_prefix(sign).map(|after| (op, after)))
    .ok_or_else(|| wrong("the operator is missing"))?;
    rest = after.trim_start();
    let value = take_quoted(&mut rest).map_err(|why| wrong(&why))?;
    if !rest.trim().is_empty() {
        return Err(wrong("there is something after the value"));
    }
    let number = || {
        std::str::from_utf8(&value)
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .ok_or_else(|| wrong("the value is no whole number"))
    };
    let target = match target.trim() {
        "ver" | "version" => CompareTarget::Version(number()?),
        "c" | "create" => CompareTarget::Create(number()?),
        "m" | "mod" => CompareTarget::Mod(number()?),
        "val" | "value" => CompareTarget::Value(value.into()),
        "lease" => {
            let id = std::str::from_utf8(&value).ok().and_then(|text| parse_lease(text).ok());
            CompareTarget::Lease(id.ok_or_else(|| wrong("the value is no lease id"))?.0)
        }
        other => return Err(wrong(&format!("`{other}` is no target"))),
    };
    Ok(Compare { space: Space::User, range: KeyRange::Single(key.into()), op, target })
}

/// Reads an operation: `put`, `get` or `del` as on the command line.
pub fn parse_op(line: &str) -> Result<TxnOp, CliError> {
    let words = words(line).map_err(|why| CliError::Usage(format!("`{line}`: {why}")))?;
    let parsed = OpLine::try_parse_from(words.into_iter().map(os_string)).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        CliError::Usage(format!("`{line}`: {first}; an operation is put KEY VALUE, get KEY or del KEY"))
    })?;
    Ok(match parsed {
        OpLine::Put(args) => {
            let value = match (&args.value, args.ignore_value) {
                (Some(value), false) => bytes_of(value),
                (None, true) => Bytes::new(),
                _ => {
                    return Err(CliError::Usage(format!("`{line}`: give either a value or --ignore-value")));
                }
            };
            TxnOp::Put(Put { value, ..args.put()? })
        }
        OpLine::Get(args) => TxnOp::Range(args.query()?),
        OpLine::Del(args) => TxnOp::DeleteRange(DeleteRange {
            space: Space::User,
            range: args.keys.range()?,
            prev_kv: args.prev_kv,
        }),
    })
}

/// Splits a line into words: bare, 'single-quoted' (as it stands) or "double-quoted" (with escapes).
fn words(line: &str) -> Result<Vec<Vec<u8>>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = match first {
            '"' | '`' => take_quoted(&mut rest)?,
            '\'' => {
                let end = rest[1..].find('\'').ok_or("a single quote is not closed")?;
                let word = rest.as_bytes()[1..=end].to_vec();
                rest = &rest[end + 2..];
                word
            }
            _ => {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                // --lease="12ab" and the like: a quoted piece inside a bare word.
                let word = unquote_tail(&rest[..end])?;
                rest = &rest[end..];
                word
            }
        };
        words.push(word);
        rest = rest.trim_start();
    }
    Ok(words)
}

/// Undoes the quotes of `--flag="value"`.
fn unquote_tail(word: &str) -> Result<Vec<u8>, String> {
    if let Some((flag, mut value)) = word.split_once('=')
        && flag.starts_with("--")
        && value.starts_with('"')
    {
        let mut bytes = format!("{flag}=").into_bytes();
        bytes.extend(take_quoted(&mut value)?);
        return Ok(bytes);
    }
    Ok(word.as_bytes().to_vec())
}

/// Takes a string in double quotes (with the escapes of Go and C) or back quotes (as it stands).
fn take_quoted(rest: &mut &str) -> Result<Vec<u8>, String> {
    let text = *rest;
    if let Some(raw) = text.strip_prefix('`') {
        let end = raw.find('`').ok_or("a back quote is not closed")?;
        *rest = &raw[end + 1..];
        return Ok(raw.as_bytes()[..end].to_vec());
    }
    let body = text.strip_prefix('"').ok_or("a string in double quotes is expected")?;
    let mut out = Vec::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                *rest = &body[at + 1..];
                return Ok(out);
            }
            '\\' => unescape(&mut chars, &mut out)?,
            c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Err("a double quote is not closed".to_owned())
}

/// Reads what stands after a backslash.
fn unescape(chars: &mut std::str::CharIndices<'_>, out: &mut Vec<u8>) -> Result<(), String> {
    let (_, c) = chars.next().ok_or("a backslash ends the line")?;
    let mut digits = |count: usize, radix: u32, first: Option<char>| -> Result<u32, String> {
        let mut number = first.map_or(0, |c| c.to_digit(radix).unwrap_or(0));
        for _ in 0..count {
            let digit = chars.next().and_then(|(_, c)| c.to_digit(radix));
            number = number * radix + digit.ok_or("an escape has too few digits")?;
        }
        Ok(number)
    };
    let byte = match c {
        'a' => 0x07,
        'b' => 0x08,
        'f' => 0x0c,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 0x0b,
        '\\' | '"' | '\'' => c as u8,
        'x' => digits(2, 16, None)? as u8,
        '0'..='7' => u8::try_from(digits(2, 8, Some(c))?).map_err(|_| "an octal escape is above \\377")?,
        'u' | 'U' => {
            let number = digits(if c == 'u' { 4 } else { 8 }, 16, None)?;
            let c = char::from_u32(number).ok_or("an escape is no Unicode character")?;
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            return Ok(());
        }
        other => return Err(format!("`\\{other}` is no escape")),
    };
    out.push(byte);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LeaseId, Revision};

    #[test]
    fn comparisons_are_read_as_etcdctl_reads_them() {
        let compare = parse_compare(r#"mod("key1") > "0""#).unwrap();
        assert_eq!(compare.op, CompareOp::Greater);
        assert_eq!(compare.target, CompareTarget::Mod(0));
        assert_eq!(compare.range, KeyRange::Single(Bytes::from_static(b"key1")));
        assert_eq!(
            parse_compare(r#"val("a\x00b") = "x\ny""#).unwrap().target,
            CompareTarget::Value(Bytes::from_static(b"x\ny"))
        );
        assert_eq!(parse_compare(r#"lease("a") = "1f""#).unwrap().target, CompareTarget::Lease(0x1f));
        assert_eq!(parse_compare(r#"c("a")!="3""#).unwrap().op, CompareOp::NotEqual);
    }

    #[test]
    fn a_wrong_comparison_says_what_is_wrong() {
        for (line, why) in [
            ("mod key > 1", "`(` is missing"),
            (r#"mod("k" > "1""#, "`)` is missing"),
            (r#"mod("k") "1""#, "the operator is missing"),
            (r#"mod("k") > 1"#, "a string in double quotes is expected"),
            (r#"mod("k") > "x""#, "no whole number"),
            (r#"size("k") > "1""#, "`size` is no target"),
            (r#"mod("k") > "1" and"#, "something after"),
            (r#"mod("") > "1""#, "the key is empty"),
            (r#"val("k") = "a"#, "not closed"),
            (r#"val("k") = "\q""#, "no escape"),
        ] {
            let message = parse_compare(line).unwrap_err().to_string();
            assert!(message.contains(why), "{line}: {message}");
        }
    }

    #[test]
    fn operations_are_command_lines() {
        let TxnOp::Put(put) = parse_op(r#"put key1 "a b" --lease=1f --prev-kv"#).unwrap() else { panic!() };
        assert_eq!((&put.key[..], &put.value[..]), (&b"key1"[..], &b"a b"[..]));
        assert_eq!((put.lease, put.prev_kv), (LeaseId(0x1f), true));
        let TxnOp::Put(put) = parse_op("put 'my key' 'it stands \\n'").unwrap() else { panic!() };
        assert_eq!((&put.key[..], &put.value[..]), (&b"my key"[..], &b"it stands \\n"[..]));
        let TxnOp::Range(query) = parse_op("get --prefix a --rev 7").unwrap() else { panic!() };
        assert_eq!(query.revision, Revision(7));
        let TxnOp::DeleteRange(delete) = parse_op("del a b").unwrap() else { panic!() };
        assert!(delete.range.contains(b"aa"));
    }

    #[test]
    fn a_wrong_operation_says_what_is_wrong() {
        for line in ["watch a", "put a", "get", "put \"a", "put a b c", "put a b --lease=q", ""] {
            let message = parse_op(line).unwrap_err().to_string();
            assert!(message.starts_with(&format!("`{line}`")), "{message}");
        }
    }

    #[test]
    fn any_text_is_read_without_a_panic() {
        for line in ["'", "\"", "\\", "`", "put \"\\", "put \"\\x", "put \"\\u12", "ü(", "(((", "put '' ü'"]
        {
            let _ = parse_compare(line);
            let _ = parse_op(line);
        }
    }
}
