//! Proof of the statistics: other implementations, properties, simulations.

mod properties;
mod random;
mod simulations;
mod vectors;
