//! One integration binary; each test has a database of its own.

mod quick;
