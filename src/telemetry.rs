//! Log setup and the name of every metric.
