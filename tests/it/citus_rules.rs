//! The rules that Citus has for statements and for the schema, looked up in their texts, so that they hold where there is no cluster
//! to ask. What breaks one is on a list with its reason, and a list has nothing that does not.

use std::collections::BTreeSet;

use crate::support_sql::schema_sql;

/// Statements of every sale, view, assignment and unit of usage.
const HOT: [&str; 8] = [
    "assignments.insert",
    "assignments.read",
    "conversions.follow",
    "conversions.open",
    "conversions.open_outside",
    "experiments.config_version",
    "usage.add",
    "views.record",
];

/// Each word flat and in lower case, without what `--` says.
fn flat(sql: &str) -> String {
    let lines = sql.lines().map(|line| line.split("--").next().unwrap_or_default());
    let words: Vec<String> = lines.flat_map(str::split_whitespace).map(|word| word.to_lowercase()).collect();
    words.join(" ")
}

fn statements() -> Vec<(&'static str, String)> {
    lastprice::internals::statements().into_iter().map(|(name, sql, _)| (name, flat(sql))).collect()
}

/// Those that break a rule are those on its list.
#[track_caller]
fn only(rule: &str, breaks: impl Fn(&str, &str) -> bool, known: &[(&str, &str)]) {
    let found: BTreeSet<&str> =
        statements().iter().filter(|(name, sql)| breaks(name, sql)).map(|(name, _)| *name).collect();
    let known: BTreeSet<&str> = known.iter().map(|(name, _reason)| *name).collect();
    assert_eq!(found, known, "{rule}");
}

fn schema() -> String {
    std::fs::read_to_string(schema_sql()).unwrap()
}

fn citus() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/citus.sql")).unwrap()
}

fn body_of(function: &str) -> &str {
    function.split("$$;").next().unwrap_or_default()
}

#[test]
fn each_table_is_read_for_the_tenant_of_the_first_parameter() {
    only(
        "a table without its tenant would be read on all nodes",
        |_, sql| {
            let tables = ["from {s}.", "join {s}.", "update {s}.", "using {s}."];
            let tables = tables.iter().map(|words| sql.matches(words).count()).sum::<usize>();
            let bound = ["tenant_id = $1", " id = $1", "t.id = $1"];
            tables > bound.iter().map(|words| sql.matches(words).count()).sum()
        },
        &[],
    );
}

#[test]
fn a_batch_comes_from_a_row_of_its_tenant() {
    let of_tenant = |sql: &str| sql.contains("tenant_id = $1") || sql.contains("t.id = $1");
    only(
        "rows that are inserted take their tenant from one that was found, so that all go to its node",
        |_, sql| sql.contains("insert into") && !(sql.contains(" select ") && of_tenant(sql)),
        &[("tenants.create", "there is none before it; the table is on every node")],
    );
}

#[test]
fn an_upsert_does_not_ask_for_the_time() {
    let clock = ["now()", "current_date", "current_timestamp", "statement_timestamp()", "clock_timestamp()"];
    only(
        "DO UPDATE SET takes what the nodes would compute each for itself from `excluded`",
        |_, sql| {
            sql.split_once("do update set")
                .is_some_and(|(_, set)| clock.iter().any(|word| set.contains(word)))
        },
        &[],
    );
}

#[test]
fn no_case_computes_what_differs_by_node() {
    let unstable =
        ["now()", "clock_timestamp()", "statement_timestamp()", "jsonb_build_object(", "to_jsonb("];
    only(
        "a change has no CASE or COALESCE around a function that is not immutable",
        |_, sql| {
            let Some((_, set)) = sql.split_once(" set ").filter(|_| sql.contains("update {s}.")) else {
                return false;
            };
            let set = set.split(" where ").next().unwrap_or_default();
            let mut parts = set.split("case ").skip(1).chain(set.split("coalesce(").skip(1));
            parts.any(|part| {
                let part = part.split(" end").next().unwrap_or_default();
                unstable.iter().any(|word| part.contains(word))
            })
        },
        &[("assignments.renew", "a value of one row, which a SELECT of its own computes")],
    );
}

#[test]
fn nothing_hot_changes_rows_in_a_with() {
    let changes = |sql: &str| {
        let with = sql.starts_with("with ");
        with && ["( insert into", "( update ", "( delete from", "(insert into", "(update ", "(delete from"]
            .iter()
            .any(|words| sql.contains(words))
    };
    only("WITH … AS (INSERT …) goes through the coordinator", |_, sql| changes(sql), IN_A_WITH);
    for (name, _) in IN_A_WITH {
        assert!(!HOT.contains(name), "{name}");
    }
}

const IN_A_WITH: &[(&str, &str)] =
    &[("recommendations.apply", "once for each recommendation: the follow-up is made and named, or neither")];

#[test]
fn nothing_hot_takes_an_advisory_lock() {
    only("an advisory lock is one node's", |_, sql| sql.contains("advisory"), &[]);
    let all: BTreeSet<&str> = statements().iter().map(|(name, _)| *name).collect();
    for name in HOT {
        assert!(all.contains(name), "there is no {name}");
    }
    // In the schema: who else activates an experiment of the layer, who folds, who refreshes. The first runs at the shard, where
    // all of the tenant's do; the others at the coordinator.
    let (schema, mut functions) = (schema(), BTreeSet::new());
    for function in schema.split("CREATE FUNCTION ").skip(1) {
        let body = body_of(function);
        if body.contains("advisory") {
            functions.insert(function.split('(').next().unwrap_or_default());
        }
    }
    // Who takes from a quota, or is one person, asks at the coordinator, all of them.
    let known = [
        "quota_lock",
        "locked_users",
        "experiments_layer_guard",
        "fold_metric_deltas",
        "recount_experiment_metrics",
        "refresh_experiment_metrics",
    ];
    assert_eq!(functions, BTreeSet::from(known));
}

#[test]
fn every_constraint_has_a_name() {
    for table in schema().split("CREATE TABLE ").skip(1) {
        let (name, body) = table.split_once(" (").unwrap();
        let body = body.split("\n)").next().unwrap();
        for line in body.lines().map(str::trim).filter(|line| !line.starts_with("--")) {
            let constrains = ["CHECK (", "PRIMARY KEY", "FOREIGN KEY", "UNIQUE"]
                .iter()
                .any(|words| line.starts_with(words));
            assert!(!constrains, "{name}: {line}");
            let inline =
                !line.starts_with("CONSTRAINT") && line.contains(" REFERENCES ") && line.contains(" text ");
            assert!(!inline, "{name}: {line}");
        }
    }
}

/// Whoever adds a table or a trigger to the schema says what becomes of it on a cluster.
#[test]
fn citus_sql_knows_every_table_and_every_trigger() {
    let (schema, citus) = (schema(), citus());
    let tables: BTreeSet<&str> = schema
        .split("CREATE TABLE ")
        .chain(schema.split("CREATE UNLOGGED TABLE "))
        .skip(1)
        .filter_map(|table| table.split_once(" (").map(|(name, _)| name))
        .filter(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
        .collect();
    assert!(tables.len() >= 12, "{tables:?}");
    for table in tables {
        assert!(citus.contains(&format!("'{table}'")), "citus.sql does not place the table {table}");
    }
    // What is run for each statement is dropped there; what is run for each row stays, and may look at other tables.
    let mut looked = BTreeSet::new();
    for trigger in schema.split("CREATE TRIGGER ").skip(1) {
        let text = trigger.split(';').next().unwrap();
        let name = text.split_whitespace().next().unwrap();
        let function = text.split("EXECUTE FUNCTION ").nth(1).unwrap().split('(').next().unwrap();
        if text.contains("FOR EACH STATEMENT") {
            assert!(citus.contains(&format!("DROP TRIGGER {name} ON")), "citus.sql does not drop {name}");
        }
        looked.insert((name.to_owned(), function.to_owned()));
    }
    for (name, function) in &looked {
        let head = format!("CREATE FUNCTION {function}() ");
        let Some(body) = schema.split(&head).nth(1).map(body_of) else { continue };
        let asks = ["FROM ", "UPDATE ", "INSERT INTO "].iter().any(|words| {
            body.replace("DISTINCT FROM ", "")
                .split(words)
                .skip(1)
                .any(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()))
        });
        let is_said =
            citus.contains(&format!("'{function}()'")) || citus.contains(&format!("DROP TRIGGER {name} ON"));
        assert!(!asks || is_said, "citus.sql says nothing of the trigger {name}, which asks other tables");
    }
    // And what it makes anew is still there to be replaced.
    for function in citus.split("CREATE OR REPLACE FUNCTION ").skip(1) {
        let name = function.split('(').next().unwrap();
        assert!(schema.contains(&format!("CREATE FUNCTION {name}(")), "{name}");
    }
}
