//! How results reach stdout: as plain lines, as a table, or as JSON.
//!
//! Data goes to stdout and everything else to stderr, so that a pipe sees only
//! data. In JSON, text is text; bytes that are not UTF-8 are base64 with a
//! second field, `<name>_encoding: "base64"`, that says so.

use std::io::{IsTerminal, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use super::error::{CliError, stdout_error};
use crate::types::KeyValue;

/// The longest piece of a value that a table shows, in characters.
const TABLE_VALUE_CHARS_MAX: usize = 60;

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table on a terminal, plain lines otherwise.
    #[default]
    Auto,
    /// Plain lines, as etcdctl prints them.
    Simple,
    /// A table.
    Table,
    /// JSON: one document, or one line per event of a stream.
    Json,
}

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
    is_terminal: bool,
}

impl Output {
    /// Stdout, in this format.
    pub fn new(format: Format) -> Output {
        Output { format, is_terminal: std::io::stdout().is_terminal() }
    }

    /// Whether results are to be JSON.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Whether results are to be a table.
    pub fn is_table(&self) -> bool {
        match self.format {
            Format::Table => true,
            Format::Auto => self.is_terminal,
            Format::Simple | Format::Json => false,
        }
    }

    /// Writes bytes as they are.
    pub fn raw(&self, bytes: &[u8]) -> Result<(), CliError> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(stdout_error)
    }

    /// Writes one line.
    pub fn line(&self, text: impl AsRef<[u8]>) -> Result<(), CliError> {
        let mut bytes = text.as_ref().to_vec();
        bytes.push(b'\n');
        self.raw(&bytes)
    }

    /// Writes a JSON document: indented for a person, one line for a program.
    pub fn json(&self, value: &Value) -> Result<(), CliError> {
        let text = if self.is_terminal { format!("{value:#}") } else { value.to_string() };
        self.line(text)
    }

    /// Writes one JSON line of a stream.
    pub fn json_line(&self, value: &Value) -> Result<(), CliError> {
        self.line(value.to_string())
    }

    /// Writes rows: a table with headers, or lines with `, ` between the fields.
    pub fn rows(&self, headers: &[&str], rows: Vec<Vec<String>>) -> Result<(), CliError> {
        if self.is_table() {
            return self.line(table(headers, rows));
        }
        let mut text = String::new();
        for row in rows {
            text.push_str(&row.join(", "));
            text.push('\n');
        }
        self.raw(text.as_bytes())
    }

    /// Writes a result in the form that was asked for: `document` is its JSON, `lines` its plain text.
    pub fn either(&self, document: impl FnOnce() -> Value, lines: impl AsRef<str>) -> Result<(), CliError> {
        if self.is_json() { self.json(&document()) } else { self.line(lines.as_ref()) }
    }
}

/// A table as text. Pads and wraps to the width of the terminal.
fn table(headers: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(headers.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

/// Adds bytes to a JSON object: text as text, anything else as base64 with a marker.
pub fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            object.insert(name.to_owned(), json!(text));
        }
        Err(_) => {
            object.insert(name.to_owned(), json!(BASE64.encode(bytes)));
            object.insert(format!("{name}_encoding"), json!("base64"));
        }
    }
}

/// Reads what [`put_bytes`] wrote. `None` when the field is missing or not as written.
pub fn get_bytes(object: &Map<String, Value>, name: &str) -> Option<Vec<u8>> {
    let text = object.get(name)?.as_str()?;
    match object.get(&format!("{name}_encoding")).map(|encoding| encoding.as_str()) {
        None => Some(text.as_bytes().to_vec()),
        Some(Some("base64")) => BASE64.decode(text).ok(),
        Some(_) => None,
    }
}

/// A key with what belongs to it, as JSON.
pub fn kv_json(kv: &KeyValue, with_value: bool) -> Value {
    let mut object = Map::new();
    put_bytes(&mut object, "key", &kv.key);
    if with_value {
        put_bytes(&mut object, "value", &kv.value);
    }
    object.insert("create_revision".to_owned(), json!(kv.create_revision.0));
    object.insert("mod_revision".to_owned(), json!(kv.mod_revision.0));
    object.insert("version".to_owned(), json!(kv.version));
    if kv.lease.is_some() {
        object.insert("lease".to_owned(), json!(kv.lease.to_string()));
    }
    Value::Object(object)
}

/// Bytes for plain output: as they are, or as `\x68\x69` when hexadecimal was asked for.
pub fn plain(bytes: &[u8], hex: bool) -> Vec<u8> {
    if !hex {
        return bytes.to_vec();
    }
    bytes.iter().flat_map(|byte| format!("\\x{byte:02x}").into_bytes()).collect()
}

/// Bytes for a cell of a table: one line, shortened, nothing that moves the cursor.
pub fn cell(bytes: &[u8], hex: bool) -> String {
    let text = String::from_utf8_lossy(&plain(bytes, hex)).into_owned();
    let mut line: String = text
        .chars()
        .take(TABLE_VALUE_CHARS_MAX)
        .map(|c| match c {
            '\n' => '⏎',
            c if c.is_control() => '·',
            c => c,
        })
        .collect();
    if text.chars().count() > TABLE_VALUE_CHARS_MAX {
        line.push_str(&format!("… ({} bytes)", bytes.len()));
    }
    line
}

/// A number of bytes for a person.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Says something that is not data: to stderr, never to stdout. A closed stderr is no reason to stop.
pub fn say(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr().lock(), "{}", text.as_ref());
}

/// Says a table that is not data.
pub fn say_rows(headers: &[&str], rows: Vec<Vec<String>>) {
    say(table(headers, rows));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text_and_other_bytes_say_that_they_are_base64() {
        let mut object = Map::new();
        put_bytes(&mut object, "key", "größe".as_bytes());
        put_bytes(&mut object, "value", &[0xff, 0x00]);
        assert_eq!(object["key"], json!("größe"));
        assert_eq!(object["value"], json!("/wA="));
        assert_eq!(object["value_encoding"], json!("base64"));
        assert!(!object.contains_key("key_encoding"));
        assert_eq!(get_bytes(&object, "key"), Some("größe".as_bytes().to_vec()));
        assert_eq!(get_bytes(&object, "value"), Some(vec![0xff, 0x00]));
        assert_eq!(get_bytes(&object, "other"), None);
    }

    #[test]
    fn a_cell_is_one_line_and_says_how_much_it_hides() {
        assert_eq!(cell(b"a\nb\x1b[31m", false), "a⏎b·[31m");
        let long = vec![b'x'; 100];
        assert_eq!(cell(&long, false), format!("{}… (100 bytes)", "x".repeat(60)));
        assert_eq!(cell(b"hi", true), "\\x68\\x69");
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(bytes_text(0), "0 B");
        assert_eq!(bytes_text(1023), "1023 B");
        assert_eq!(bytes_text(1536), "1.5 KiB");
        assert_eq!(bytes_text(3 << 30), "3.0 GiB");
    }
}
