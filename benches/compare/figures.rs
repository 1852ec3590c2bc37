//! What one measurement says, by name, so that a goal, a table and a line of the results file all
//! mean the same thing by the same word. It knows units and nothing of rows.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The figures of one row on one side in one round. What a row does not have is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Operations completed per second (of the clock).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_per_s: Option<f64>,
    /// Median latency in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<f64>,
    /// 99th percentile in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<f64>,
    /// 99.9th percentile in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p999_ms: Option<f64>,
    /// CPU microseconds of all server nodes together, per operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_op: Option<f64>,
    /// Resident memory of all server nodes together, in MiB, at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_mib: Option<f64>,
    /// Operations that failed.
    pub errors: u64,
    /// Whatever else the row has to say. The unit is the end of the name: `gap_ms`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, f64>,
}

impl Figures {
    /// The figure of this name, one of the row's own included.
    pub fn get(&self, metric: &str) -> Option<f64> {
        match metric {
            "ops_per_s" => self.ops_per_s,
            "p50_ms" => self.p50_ms,
            "p99_ms" => self.p99_ms,
            "p999_ms" => self.p999_ms,
            "cpu_us_per_op" => self.cpu_us_per_op,
            "rss_mib" => self.rss_mib,
            "errors" => Some(self.errors as f64),
            own => self.extra.get(own).copied(),
        }
    }

    /// Adds a figure of the row's own. What is no number is left out.
    pub fn with(mut self, metric: &str, value: f64) -> Figures {
        if value.is_finite() {
            self.extra.insert(metric.to_owned(), value);
        }
        self
    }

    /// Every figure there is, with its name, in the order of the table.
    pub fn all(&self) -> Vec<(&str, f64)> {
        let named = ["ops_per_s", "p50_ms", "p99_ms", "p999_ms", "cpu_us_per_op", "rss_mib"];
        let own = self.extra.iter().map(|(name, value)| (name.as_str(), *value));
        named.into_iter().filter_map(|name| Some((name, self.get(name)?))).chain(own).collect()
    }
}

/// A number for people: three significant digits, thousands apart.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 || v == 0.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut apart = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            apart.push(',');
        }
        apart.push(digit);
    }
    format!("{sign}{apart}{rest}")
}
