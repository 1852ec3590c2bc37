//! `export`: keys become JSON lines, or files of a directory, as they were at
//! one revision.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::Context;
use super::args::{bytes_of, prefix_range};
use super::error::{CliError, stdout_error};
use super::migrate::Pages;
use super::output::{bytes_text, kv_json, say};
use super::progress;
use crate::types::{KeyValue, Revision};

/// `mainstay export`.
#[derive(Clone, Debug, Args)]
pub struct ExportCommand {
    /// A file for JSON lines, `-` for standard output, or with --tree a directory.
    #[arg(value_name = "PATH", default_value = "-")]
    path: PathBuf,

    /// Export the keys that begin with this.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: OsString,

    /// Write each value into a file of its own, named by its key without the prefix, below PATH, which must be empty
    /// or not exist.
    #[arg(long)]
    tree: bool,

    /// Export the keys as they were at this revision; 0 is the newest.
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    rev: i64,
}

/// Runs `export`.
pub async fn export(context: &Context, command: ExportCommand) -> Result<(), CliError> {
    if command.rev < 0 {
        return Err(CliError::Usage("--rev counts from 1; 0 is the newest".to_owned()));
    }
    let to_stdout = command.path == Path::new("-");
    if command.tree && to_stdout {
        return Err(CliError::Usage("--tree needs a directory to write to".to_owned()));
    }
    let prefix = bytes_of(&command.prefix);
    let mut pages = Pages::new(context.api().await?, prefix_range(prefix.clone()), Revision(command.rev));
    let mut sink = Sink::open(&command, to_stdout)?;
    let bar = progress::items(0, "keys");
    let (mut keys, mut bytes) = (0_u64, 0_u64);
    loop {
        let page = pages.next().await?;
        if page.is_empty() {
            break;
        }
        bar.set_length(pages.count.unwrap_or(0));
        for kv in &page {
            if sink.write(kv, prefix.len())? {
                keys += 1;
                bytes += kv.value.len() as u64;
            }
            bar.inc(1);
        }
    }
    let left_out = sink.close()?;
    bar.finish_and_clear();
    let revision = pages.revision();
    if to_stdout {
        return Ok(());
    }
    context.out.either(
        || {
            json!({
                "keys": keys, "bytes": bytes, "left_out": left_out, "revision": revision.0,
                "path": command.path.display().to_string(),
            })
        },
        format!(
            "exported {keys} keys, {}, as of revision {revision}, to {}",
            bytes_text(bytes),
            command.path.display()
        ),
    )?;
    match left_out {
        0 => Ok(()),
        n => Err(CliError::Conflict(format!(
            "{n} keys cannot be file names below a directory and were left out"
        ))),
    }
}

/// Where keys go.
enum Sink {
    Lines { out: Box<dyn Write>, path: PathBuf },
    Tree { root: PathBuf, directories: BTreeSet<PathBuf>, left_out: u64 },
}

impl Sink {
    fn open(command: &ExportCommand, to_stdout: bool) -> Result<Sink, CliError> {
        let path = command.path.clone();
        if command.tree {
            std::fs::create_dir_all(&path).map_err(|e| CliError::file(&path, e))?;
            let mut entries = std::fs::read_dir(&path).map_err(|e| CliError::file(&path, e))?;
            if entries.next().is_some() {
                return Err(CliError::Conflict(format!(
                    "{} is not empty; name a new directory",
                    path.display()
                )));
            }
            return Ok(Sink::Tree { root: path, directories: BTreeSet::new(), left_out: 0 });
        }
        let out: Box<dyn Write> = if to_stdout {
            Box::new(BufWriter::new(std::io::stdout()))
        } else {
            let file = File::create_new(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    CliError::Conflict(format!("{} exists already; name a new file", path.display()))
                }
                _ => CliError::file(&path, e),
            })?;
            Box::new(BufWriter::new(file))
        };
        Ok(Sink::Lines { out, path })
    }

    /// Writes one key. `false` when it cannot be a file.
    fn write(&mut self, kv: &KeyValue, prefix_len: usize) -> Result<bool, CliError> {
        match self {
            Sink::Lines { out, path } => {
                writeln!(out, "{}", exported_line(kv)).map_err(|e| lines_error(path, e))?;
                Ok(true)
            }
            Sink::Tree { root, directories, left_out } => {
                let name = kv.key.get(prefix_len..).unwrap_or_default();
                let written = match relative(name) {
                    Some(relative) => write_file(root, &relative, &kv.value, directories)?,
                    None => false,
                };
                if !written {
                    say(format!("left out: the key {:?} cannot be a file", String::from_utf8_lossy(&kv.key)));
                    *left_out += 1;
                }
                Ok(written)
            }
        }
    }

    /// Makes sure that everything is written. Returns how many keys were left out.
    fn close(self) -> Result<u64, CliError> {
        match self {
            Sink::Lines { mut out, path } => out.flush().map_err(|e| lines_error(&path, e)).map(|()| 0),
            Sink::Tree { left_out, .. } => Ok(left_out),
        }
    }
}

/// A key as a line of JSON, which `import` reads.
pub fn exported_line(kv: &KeyValue) -> String {
    kv_json(kv, true).to_string()
}

fn lines_error(path: &Path, source: std::io::Error) -> CliError {
    if path == Path::new("-") { stdout_error(source) } else { CliError::file(path, source) }
}

/// A key as a path that stays below its directory, or `None`.
fn relative(name: &[u8]) -> Option<PathBuf> {
    let text = OsStr::from_bytes(name);
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    let normalized: PathBuf = path.components().collect();
    // `a//b`, `a/` and `a/./b` would become another key's file.
    let same = normalized.as_os_str() == text;
    (plain && same && !name.is_empty() && !name.contains(&0)).then(|| path.to_owned())
}

/// Writes a file that must not exist. `false` when another key needs its name for a directory, or the reverse.
fn write_file(
    root: &Path,
    relative: &Path,
    value: &[u8],
    directories: &mut BTreeSet<PathBuf>,
) -> Result<bool, CliError> {
    use std::io::ErrorKind::{AlreadyExists, InvalidFilename, IsADirectory, NotADirectory};
    let in_the_way = |e: &std::io::Error| {
        matches!(e.kind(), AlreadyExists | InvalidFilename | IsADirectory | NotADirectory)
    };
    let path = root.join(relative);
    if let Some(parent) = path.parent()
        && directories.insert(parent.to_owned())
    {
        match std::fs::create_dir_all(parent) {
            Ok(()) => {}
            Err(e) if in_the_way(&e) => return Ok(false),
            Err(e) => return Err(CliError::file(parent, e)),
        }
    }
    match File::create_new(&path).and_then(|mut file| file.write_all(value)) {
        Ok(()) => Ok(true),
        Err(e) if in_the_way(&e) => Ok(false),
        Err(e) => Err(CliError::file(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_becomes_a_file_only_below_the_directory_and_only_under_its_own_name() {
        assert_eq!(relative(b"ssh/sshd_config"), Some(PathBuf::from("ssh/sshd_config")));
        for key in [&b""[..], b"/etc", b"../x", b"a/../b", b"a//b", b"a/", b"./a", b"a/./b", b"a\0b"] {
            assert_eq!(relative(key), None, "{key:?}");
        }
    }

    #[test]
    fn a_name_that_is_a_directory_already_is_left_out_and_nothing_is_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let mut directories = BTreeSet::new();
        let mut put = |name: &str| write_file(root.path(), Path::new(name), b"v", &mut directories).unwrap();
        assert!(put("a/b"));
        assert!(!put("a"));
        assert!(!put("a/b/c"));
        assert!(!put("a/b"));
        assert!(put("c"));
        assert!(!put(&"x".repeat(300)));
    }
}
