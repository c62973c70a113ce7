//! Nothing: the benchmarks are the crate.
