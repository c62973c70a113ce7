//! What the tables of `docs/observability.md` say.

/// The rows of the first table below a heading, without its head; cells as they stand there.
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
