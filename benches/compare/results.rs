//! The results file: one line of JSON for each measurement, written as soon as it is there.
//!
//! A measurement that stands in the file for the same programs and the same settings is not made
//! again, so a comparison can be made in parts. Lines are only ever added.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::figures::Figures;

/// What must be equal for two measurements to be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// etcd's version.
    pub etcd: String,
    /// Mainstay's version, with a hash of the program.
    pub mainstay: String,
    /// Seconds per figure.
    pub seconds: u64,
    /// The machine: cores, memory, kernel.
    pub machine: String,
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// The row's name.
    pub row: String,
    /// The side's name.
    pub side: String,
    /// The round, from 1.
    pub round: usize,
    /// Under what it was measured.
    #[serde(flatten)]
    pub setting: Setting,
    /// Seconds since 1970 when it was written.
    pub at: u64,
    /// What came out.
    pub figures: Figures,
}

/// The file and what it holds.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    lines: Vec<Line>,
}

impl Results {
    /// Reads the file; one that is not there is empty.
    ///
    /// # Errors
    /// When it cannot be read, or a line is none of ours.
    pub fn open(path: &Path) -> Result<Results> {
        let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let lines = lines.map(|(i, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1))
        });
        Ok(Results { path: path.to_owned(), lines: lines.collect::<Result<_>>()? })
    }

    /// The latest measurement of this row, side and round under this setting.
    pub fn find(&self, row: &str, side: &str, round: usize, setting: &Setting) -> Option<&Line> {
        self.lines.iter().rev().find(|line| {
            line.row == row && line.side == side && line.round == round && line.setting == *setting
        })
    }

    /// Adds a measurement, to the file first.
    pub fn add(&mut self, line: Line) -> Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        writeln!(file, "{}", serde_json::to_string(&line)?)?;
        self.lines.push(line);
        Ok(())
    }

    /// The setting of the newest line.
    pub fn newest(&self) -> Option<&Setting> {
        self.lines.last().map(|line| &line.setting)
    }

    /// Every line under a setting.
    pub fn of(&self, setting: &Setting) -> Vec<&Line> {
        self.lines.iter().filter(|line| line.setting == *setting).collect()
    }

    /// The measurements of a row on a side under a setting, one for each round.
    pub fn rounds(&self, row: &str, side: &str, setting: &Setting) -> Vec<&Line> {
        let highest = self.lines.iter().map(|line| line.round).max().unwrap_or(0);
        (1..=highest).filter_map(|round| self.find(row, side, round, setting)).collect()
    }
}
