//! What documents say: their commands and their tables.

use std::path::Path;
use std::process::Command;

use crate::support_sql::{Ran, run};

/// The blocks of one language in a document, from the top.
pub(crate) fn blocks<'d>(document: &'d str, language: &str) -> Vec<&'d str> {
    let opening = format!("```{language}\n");
    let parts = document.split(opening.as_str()).skip(1);
    parts.map(|rest| rest.split_once("\n```").expect("a block ends").0).collect()
}

/// All commands of a document and then `last`, in one shell that stops at the first that fails.
pub(crate) fn run_all(document: &str, last: &str, doctor: &Path, shell: &mut Command) -> Ran {
    // Ours: a call of cargo in a test would wait for the cargo that runs it. The example was built with the tests.
    let mut script = "set -eu\ncargo() { [ \"$*\" = 'run --example doctor' ] && \"$DOCTOR\"; }\n".to_owned();
    let commands = blocks(document, "sh");
    assert!(!commands.is_empty());
    for command in commands {
        script += &format!("{command}\n");
    }
    let ran = run(shell.env("DOCTOR", doctor).args(["-c", &format!("{script}{last}\necho 'all done'")]));
    assert!(ran.ok && ran.out.ends_with("all done\n"), "{}\n{}", ran.out, ran.err);
    ran
}

/// The rows of the first table of `docs/observability.md` below a heading, without its head; cells as they stand there.
pub(crate) fn table(heading: &str) -> Vec<Vec<String>> {
    let text = include_str!("../../docs/observability.md");
    let start = text.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("there is no {heading}"));
    let rows = text[start..].lines().skip_while(|line| !line.starts_with('|'));
    let cells =
        |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    rows.take_while(|line| line.starts_with('|')).skip(2).map(cells).collect()
}

/// The names in a cell, sorted.
pub(crate) fn names(cell: &str) -> Vec<String> {
    let mut names: Vec<String> = cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    names.sort();
    names
}
