//! How cost grows: with keys, with watchers, with nodes. Each point is a row of its own, measured and
//! resumed like any other; a curve says how points are drawn together and in which words.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mainstay::load::{Audience, Plan, Requests, Until, Verb, value};

use crate::bench::{Bench, KEYS, Meter, Side, VALUE_BYTES, connections, figures, foreign, keys, measure};
use crate::chart::{self, Course};
use crate::cluster::Cluster;
use crate::figures::{Figures, number};
use crate::kept::{self, Content};
use crate::rows::{BOTH, Row};

const CONNECTIONS: usize = 100;
const CLIENTS: usize = 256;
const READ: Verb = Verb::Range { keys: 1, serializable: false };
/// Events per second that all watchers see together, however many they are.
const EVENTS_PER_S: f64 = 20_000.0;
/// What is filled before the measurement has to be flushed and merged first.
const SETTLE: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(300);
const OURS: &[Side] = &[Side::Mainstay];

/// The median of a row's figure on a side, if it was measured.
pub type Median<'a> = &'a dyn Fn(&str, Side, &str) -> Option<f64>;

/// Points that are drawn together.
#[derive(Debug)]
pub struct Curve {
    /// The name of its section.
    pub title: &'static str,
    name: &'static str,
    /// What the points count, and what is measured at each.
    axis: &'static str,
    load: &'static str,
    points: &'static [Point],
    /// A figure of the points, in words.
    costs: &'static [(&'static str, &'static str)],
    /// What is to be known to read it.
    reading: &'static str,
}

#[derive(Debug)]
struct Point {
    at: &'static str,
    row: Row,
}

pub const ALL: &[Curve] = &[
    Curve {
        title: "Keys",
        name: "keys",
        axis: "keys of 256 B",
        load: "256 clients, 100 connections, three nodes; keys drawn evenly",
        points: &[
            point("10,000", "curve-keys-10000", BOTH, |bench| Box::pin(with_keys(bench, 10_000))),
            point("100,000", "curve-keys-100000", BOTH, |bench| Box::pin(with_keys(bench, 100_000))),
            point("1,000,000", "curve-keys-1000000", BOTH, |bench| Box::pin(with_keys(bench, 1_000_000))),
        ],
        costs: &[("put", "put_cpu_us"), ("read", "read_cpu_us")],
        reading: "A put or a read that looks its key up in a tree may grow with the logarithm of their \
                  number, and once more where the keys no longer fit the cache of decompressed blocks.",
    },
    Curve {
        title: "Watchers",
        name: "watchers",
        axis: "watchers of one prefix",
        load: "100 connections, three nodes; puts at the rate that makes 20,000 events per second for all \
               watchers together; per event delivered",
        points: &[
            point("100", "curve-watchers-100", BOTH, |bench| Box::pin(with_watchers(bench, 100))),
            point("1,000", "curve-watchers-1000", BOTH, |bench| Box::pin(with_watchers(bench, 1_000))),
            point("10,000", "curve-watchers-10000", BOTH, |bench| Box::pin(with_watchers(bench, 10_000))),
        ],
        costs: &[("event", "cpu_us_per_op")],
        reading: "The put is part of it: a hundred watchers share its cost, ten thousand hardly feel it, so \
                  a curve that is flat to the right is a constant cost per event.",
    },
    Curve {
        title: "Nodes",
        name: "nodes",
        axis: "voters, + observers",
        load: "256 clients on 100 connections, spread over all nodes; CPU of all nodes together",
        points: &[
            point("1", "curve-nodes-1", BOTH, |bench| Box::pin(with_nodes(bench, 1, 0))),
            point("3", "curve-nodes-3", BOTH, |bench| Box::pin(with_nodes(bench, 3, 0))),
            point("5", "curve-nodes-5", BOTH, |bench| Box::pin(with_nodes(bench, 5, 0))),
            point("3+1", "curve-nodes-3-1", OURS, |bench| Box::pin(with_nodes(bench, 3, 1))),
            point("3+3", "curve-nodes-3-3", OURS, |bench| Box::pin(with_nodes(bench, 3, 3))),
        ],
        costs: &[("put", "put_cpu_us"), ("read", "read_cpu_us")],
        reading: "Every node logs, applies and stores every put, so a put's cost over all nodes grows with \
                  their number; a read is served by one node, and asks the leader where it was sent to \
                  another one.",
    },
];

const fn point(at: &'static str, name: &'static str, sides: &'static [Side], run: crate::rows::Run) -> Point {
    Point { at, row: Row { name, load: "a point of a curve", sides, goals: &[], limit: LIMIT, run } }
}

/// All points, as rows.
pub fn points() -> Vec<Row> {
    ALL.iter().flat_map(|curve| curve.points).map(|point| point.row).collect()
}

async fn with_keys(bench: &Bench, count: usize) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3).flag("quota-backend-bytes", 16u64 << 30)).await;
    cost(bench, &cluster, bench.scaled(count)).await
}

async fn with_watchers(bench: &Bench, count: usize) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let stores = foreign(connections(&cluster, CONNECTIONS).await);
    let count = bench.scaled(count);
    let audience = Audience::come(&stores, count, &keys(KEYS), &Arc::default()).await;
    let audience = audience.context("opening the watches")?;
    let plan = |time| Plan { rate: Some(EVENTS_PER_S / count as f64), until: Until::Time(time) };
    let value = value(VALUE_BYTES);
    audience.watch(&stores, 16, &value, &plan(bench.warm_up())).await;
    let meter = Meter::start(&cluster);
    let outcome = audience.watch(&stores, 16, &value, &plan(bench.time())).await;
    figures(&outcome, &meter, &cluster)
}

async fn with_nodes(bench: &Bench, voters: usize, observers: usize) -> Result<Figures> {
    let mut cluster = bench.cluster(bench.spec(voters)).await;
    for i in 0..observers {
        let known = cluster.nodes[0].peer_url();
        let added = cluster.extra_node(&format!("o{}", i + 1));
        let flags = &mut cluster.nodes[added].flags;
        flags.extend([format!("--join={known}"), "--kind=observer".to_owned()]);
        cluster.nodes[added].start();
        cluster.wait_node_ready(added).await;
    }
    cost(bench, &cluster, KEYS as usize).await
}

/// What a read and a put cost on a store that holds `count` keys.
async fn cost(bench: &Bench, cluster: &Cluster, count: usize) -> Result<Figures> {
    let clients = connections(cluster, CONNECTIONS).await;
    let content = Content { keys: count, value_bytes: VALUE_BYTES, per_txn: 100, ..Content::default() };
    kept::fill(&clients, content).await?;
    tokio::time::sleep(SETTLE).await;
    let (stores, keys, value) = (foreign(clients), keys(count as u64), value(VALUE_BYTES));
    let workers = |verb| Requests::clients(&stores, CLIENTS, verb, &keys, &value);
    let read = measure(bench, cluster, workers(READ)).await.context("reading")?;
    let put = measure(bench, cluster, workers(Verb::Put)).await.context("writing")?;
    let figure = |figures: &Figures, name| figures.get(name).unwrap_or(f64::NAN);
    Ok(Figures { rss_mib: put.rss_mib, errors: read.errors + put.errors, ..Figures::default() }
        .with("put_cpu_us", figure(&put, "cpu_us_per_op"))
        .with("put_per_s", figure(&put, "ops_per_s"))
        .with("read_cpu_us", figure(&read, "cpu_us_per_op"))
        .with("read_per_s", figure(&read, "ops_per_s")))
}

impl Curve {
    /// The name of its chart's file.
    pub fn file(&self) -> String {
        format!("curve-{}.svg", self.name)
    }

    /// One course for each cost and side that was measured.
    fn courses(&self, median: Median<'_>) -> Vec<Course> {
        let course = |words: &str, metric: &str, side: Side| Course {
            label: format!("{words}, {}", side.name()),
            ours: side == Side::Mainstay,
            values: self.points.iter().map(|point| median(point.row.name, side, metric)).collect(),
        };
        let all = self
            .costs
            .iter()
            .flat_map(|(words, metric)| BOTH.iter().map(|side| course(words, metric, *side)));
        all.filter(|course| course.values.iter().any(Option::is_some)).collect()
    }

    /// Its chart; `None` while nothing of it is measured.
    pub fn chart(&self, median: Median<'_>) -> Option<String> {
        let courses = self.courses(median);
        let at: Vec<&str> = self.points.iter().map(|point| point.at).collect();
        let title = format!("CPU µs per operation, by {}", self.axis);
        (!courses.is_empty()).then(|| chart::courses(&title, &at, &courses))
    }

    /// Its part of the report; `None` while nothing of it is measured.
    pub fn section(&self, median: Median<'_>) -> Option<String> {
        let courses = self.courses(median);
        if courses.is_empty() {
            return None;
        }
        let mut text = format!("### {}\n\n{}. {}\n\n", self.title, capital(self.load), self.reading);
        let head: Vec<&str> = self.points.iter().map(|point| point.at).collect();
        let rule = "--:|".repeat(head.len() + 1);
        let _ = writeln!(text, "| CPU µs by {} | {} | grows |\n|---|{rule}", self.axis, head.join(" | "));
        for course in &courses {
            let values: Vec<String> =
                course.values.iter().map(|value| value.map_or("–".to_owned(), number)).collect();
            let _ = writeln!(text, "| {} | {} | {} |", course.label, values.join(" | "), course.growth());
        }
        let _ = writeln!(text, "\n![{}](charts/{})", self.title, self.file());
        Some(text)
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}
