//! From a call to its statements: the table of `docs/observability.md` has every call and every statement, and is right.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lastprice::{Admin, Client, NewConversion, NewUsage, NewView, OrderId, SlowStatement};

use crate::support_docs::{names, table};
use crate::support_repo::*;

/// What a row says is sent always, and all that it may.
struct Sends {
    calls: Vec<String>,
    always: BTreeSet<String>,
    all: BTreeSet<String>,
}

const OF_TRANSACTIONS: [&str; 2] = ["begin", "commit"];

fn documented() -> Vec<Sends> {
    let sends = |row: &Vec<String>| {
        let (always, more) = (names(&row[1]), names(&row[2]));
        // Not those of other calls.
        let is_name = |name: &&String| {
            !name.contains('(') && (name.contains('.') || OF_TRANSACTIONS.contains(&name.as_str()))
        };
        let all = always.iter().chain(&more).filter(is_name).cloned().collect();
        Sends { calls: names(&row[0]), always: always.iter().cloned().collect(), all }
    };
    table("Which call sends what").iter().map(sends).collect()
}

/// The methods that ask the database, by the folder or file of their repository.
fn methods() -> BTreeSet<String> {
    fn walk(path: &Path, repository: &str, found: &mut BTreeSet<String>) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                walk(&entry.unwrap().path(), repository, found);
            }
            return;
        }
        let text = std::fs::read_to_string(path).unwrap();
        for after in text.split("\n    pub async fn ").skip(1) {
            let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            found.insert(format!("{repository}().{name}"));
        }
    }
    let src = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(src.join("repo")).unwrap() {
        let path = entry.unwrap().path();
        let repository = path.file_stem().unwrap().to_str().unwrap().to_owned();
        walk(&path, &repository, &mut found);
    }
    walk(&src.join("analysis/mod.rs"), "metrics", &mut found);
    found
}

#[test]
fn the_table_has_every_call_and_every_statement() {
    let rows = documented();
    let calls: Vec<&String> =
        rows.iter().flat_map(|row| &row.calls).filter(|call| call.contains('.')).collect();
    let known: BTreeSet<String> = calls.iter().map(|call| (*call).clone()).collect();
    assert_eq!(known.len(), calls.len(), "a call has two rows");
    assert_eq!(known, methods());
    let sent: BTreeSet<String> =
        rows.iter().flat_map(|row| row.all.clone()).filter(|name| name.contains('.')).collect();
    let statements: BTreeSet<String> = Admin::statements().iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(sent, statements);
}

#[tokio::test]
async fn calls_send_what_the_table_says() {
    let two = two_tenants().await;
    let sent: Arc<Mutex<Vec<&'static str>>> = Arc::default();
    let kept = Arc::clone(&sent);
    let hook = move |slow: &SlowStatement| kept.lock().unwrap().push(slow.operation);
    let client = Client::builder().url(two.database.app_url()).require_app_role();
    let client = client.on_slow_statement(Duration::ZERO, hook).build().unwrap();
    let rows = documented();
    let check = |call: &str, exactly: &[&str]| {
        let row = rows.iter().find(|row| row.calls.iter().any(|known| known == call)).unwrap();
        let sent: BTreeSet<String> =
            std::mem::take(&mut *sent.lock().unwrap()).into_iter().map(str::to_owned).collect();
        assert!(row.always.is_subset(&sent) && sent.is_subset(&row.all), "{call}: {sent:?}");
        assert_eq!(sent, exactly.iter().map(|name| (*name).to_owned()).collect(), "{call}");
    };
    let acme = client.tenant(two.id);
    let new = new_experiment("pro");
    let id = acme.experiments().create(new).await.unwrap().id;
    check("experiments().create", &["experiments.create"]);
    acme.experiments().activate(id).await.unwrap();
    check("experiments().activate", &["experiments.transition"]);
    acme.experiments().activate(id).await.unwrap_err();
    check("experiments().activate", &["experiments.transition", "experiments.get"]);
    acme.assignments().assign(id, &user(0)).await.unwrap();
    check("assignments().assign", &["assignments.read", "assignments.insert"]);
    acme.assignments().assign(id, &user(0)).await.unwrap();
    check("assignments().assign", &["assignments.read"]);
    let view = NewView::new(id, user(0));
    for exactly in [&["views.record"][..], &["views.record", "views.existing"]] {
        let _ = acme.views().record(&view).await.unwrap();
        check("views().record", exactly);
    }

    let price = acme.assignments().get(id, &user(0)).await.unwrap().unwrap().price;
    check("assignments().get", &["assignments.get"]);
    let order = |n: usize| OrderId::new(format!("order-{n}")).unwrap();
    let of = |n: usize| NewConversion::sale(id, user(n), price, key(&format!("pay:{n}"))).order(order(n));
    acme.conversions().authorise(&of(0)).await.unwrap().entry().unwrap().unwrap();
    check("conversions().authorise", &["conversions.open"]);
    let _ = acme.conversions().authorise(&of(0)).await.unwrap();
    check("conversions().authorise", &["conversions.open", "conversions.by_keys"]);
    // Of a user who was never shown a price.
    let _ = acme.conversions().settle(&of(1)).await.unwrap();
    let late = [
        "conversions.open",
        "conversions.by_keys",
        "begin",
        "assignments.read",
        "assignments.insert",
        "commit",
    ];
    check("conversions().settle", &late);
    let too_much = NewConversion::refund(order(0), usd("100000"), key("back"));
    let _ = acme.conversions().authorise(&too_much).await.unwrap();
    let refused =
        ["conversions.follow", "conversions.by_keys", "conversions.waiting_keys", "conversions.left"];
    check("conversions().authorise", &refused);

    acme.metrics().experiment(id).await.unwrap();
    check("metrics().experiment", &["metrics.by_variant"]);
    acme.metrics().report(id).await.unwrap();
    let report = ["results.setup", "results.cohorts", "results.counts", "results.recent_views"];
    check("metrics().report", &report);
    for exactly in [&["usage.add"][..], &["usage.add", "usage.by_keys"]] {
        acme.usage().add(&NewUsage::new("seats", today(), 1, key("seat"))).await.unwrap();
        check("usage().add", exactly);
    }
    two.bystander_saw_nothing().await;
}
