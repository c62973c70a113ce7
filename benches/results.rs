//! The place of a benchmark's tables in RESULTS.md.

use std::io::{Error, Result};

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../RESULTS.md");

/// Puts the tables between the markers of this name.
pub(crate) fn write(name: &str, tables: &str) -> Result<()> {
    let document = std::fs::read_to_string(RESULTS)?;
    let (start, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) =
        document.split_once(&start).ok_or_else(|| Error::other("RESULTS.md has no place for the tables"))?;
    let (_, after) =
        rest.split_once(&end).ok_or_else(|| Error::other("the place for the tables has no end"))?;
    std::fs::write(RESULTS, format!("{before}{start}{tables}{end}{after}"))
}
