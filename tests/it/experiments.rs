//! The life of an experiment.

use std::collections::BTreeSet;

use lastprice::serde_json::json;
use lastprice::uuid::Uuid;
use lastprice::{
    Actor, Currency, ErrorKind, Experiment, ExperimentEdit, ExperimentId, ExperimentStatus as Status, Money,
    NewExperiment, NewRecommendation, NewView, Objective, Result, TenantHandle, Variants,
};

use crate::support_repo::*;

fn two_arms() -> Variants {
    Variants::new().add("a", 1, "19").add("b", 1, "29")
}

#[tokio::test]
async fn a_draft_is_created_and_read_by_id_and_key() {
    let two = two_tenants().await;
    let id = ExperimentId::from(Uuid::from_u128(7));
    let metadata = json!({"why": "\u{1F600} ünïcode", "n": [1, 2.5, null]});
    let new = new_experiment("A.b_c:d/e-9").id(id).metadata(metadata.clone());
    let created = two.acme.experiments().create(new).await.unwrap();
    assert_eq!((created.id, created.status, created.currency), (id, Status::Draft, Currency::USD));
    assert_eq!((created.baseline.as_str(), created.winner.as_deref()), ("29", None));
    assert_eq!((created.revision, created.phase, created.start_date, created.end_date), (1, 1, None, None));
    assert_eq!(created.metadata, metadata);
    assert_eq!(created.variants.iter().map(|v| v.weight).collect::<Vec<_>>(), [1, 2, 1]);
    assert_eq!(created.variant("39").unwrap().price.to_string(), "39.00");
    let by_key = two.acme.experiments().by_key("A.b_c:d/e-9").await.unwrap();
    assert_eq!(by_key.as_ref(), Some(&created));
    assert_eq!(two.acme.experiments().get(id).await.unwrap(), by_key);
    // Keys are compared by case; the salt is random.
    assert_eq!(two.acme.experiments().by_key("a.b_c:d/e-9").await.unwrap(), None);
    let other = draft(&two.acme, "other").await;
    assert_ne!(other.salt, created.salt);
    // The first is the baseline unless something else is said.
    let new = NewExperiment::new("first", "First", Currency::EUR, two_arms());
    assert_eq!(two.acme.experiments().create(new).await.unwrap().baseline, "a");

    // The other tenant has the key `pro-plan`; ours is free, once.
    let ours = draft(&two.acme, "pro-plan").await;
    let taken = two.acme.experiments().create(new_experiment("pro-plan")).await;
    let taken = is_kind(taken, ErrorKind::Conflict);
    let same_id = two.acme.experiments().create(new_experiment("another").id(ours.id)).await;
    assert_eq!(is_kind(same_id, ErrorKind::Conflict).to_string(), taken.to_string());
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_breaks_a_rule_is_named() {
    let two = two_tenants().await;
    let with = |variants| NewExperiment::new("key", "Name", Currency::USD, variants);
    let named = |key: &str, name: &str| NewExperiment::new(key, name, Currency::USD, two_arms());
    let dollar = || Money::new("1", "USD").unwrap();
    let long = "x".repeat(129);
    let too_long = format!("0.1{}1", "0".repeat(40));
    let huge_book = (0..20_000).fold(two_arms(), |v, n| v.book("a", format!("item {n}"), dollar()));
    let cases: Vec<(NewExperiment, &str)> = vec![
        (named("", "Name"), "key"),
        (named("-a", "Name"), "key"),
        (named("a b", "Name"), "key"),
        (named("ä", "Name"), "key"),
        (named("a\n", "Name"), "key"),
        (named(&long, "Name"), "key"),
        (named("key", " "), "name"),
        (named("key", &"x".repeat(201)), "name"),
        (with(Variants::new()), "variants"),
        (with(Variants::new().add("a", 1, 1)), "variants"),
        (with((0..1001).fold(Variants::new(), |v, n| v.add(n.to_string(), 1, 1))), "variants"),
        (with(two_arms().add("a", 1, 1)), "variants"),
        (with(two_arms().add(&long, 1, 1)), "variants"),
        (with(two_arms().add("a\u{7}", 1, 1)), "variants"),
        (with(two_arms().add("a\u{2028}b", 1, 1)), "variants"),
        (with(two_arms().add("c", 1, f64::NAN)), "variants"),
        (with(two_arms().add("c", 1, f64::INFINITY)), "variants"),
        (with(two_arms().add("c", 1, 1e300)), "variants"),
        (with(two_arms().add("c", 1, -0.01)), "variants"),
        (with(two_arms().add("c", 1, 0.1 + 0.2)), "variants"),
        (with(two_arms().add("c", 1, "19.0000001")), "variants"),
        (with(two_arms().add("c", 1, too_long.as_str())), "variants"),
        (with(two_arms().add("c", 1, "1000000000000")), "variants"),
        (with(Variants::new().add("a", 0, 1).add("b", 0, 1)), "variants"),
        (with(two_arms().book("c", "annual", dollar())), "book"),
        (with(two_arms().book("a", "", dollar())), "book"),
        (with(two_arms().book("a", "x\0", dollar())), "book"),
        (with(two_arms().book("a", "x", Money::new("-1", "USD").unwrap())), "book"),
        (with(two_arms().book("a", "x", dollar()).book("a", "x", dollar())), "book"),
        (with(two_arms().book("a", "x", Money::from_minor(i64::MAX, Currency::USD))), "book"),
        (with(huge_book), "book"),
        (with(two_arms()).baseline("c"), "baseline"),
        (with(two_arms()).baseline("a\0"), "baseline"),
        (with(two_arms()).metadata(json!([1])), "metadata"),
        (with(two_arms()).metadata(json!({"a": "\0"})), "metadata"),
    ];
    let stored = draft(&two.acme, "stored").await;
    for (new, field) in cases {
        refused(two.acme.experiments().create(new).await, field);
    }
    let edit = |edit| async { two.acme.experiments().edit(stored.id, stored.revision, edit).await };
    refused(edit(ExperimentEdit::new().name("")).await, "name");
    refused(edit(ExperimentEdit::new().metadata(json!(1))).await, "metadata");
    refused(edit(ExperimentEdit::new().variants(Currency::EUR, Variants::new())).await, "variants");
    refused(edit(ExperimentEdit::new().baseline("none")).await, "baseline");
    refused(edit(ExperimentEdit::new().baseline("29\0")).await, "baseline");
    // The stored baseline is none of the new arms.
    refused(edit(ExperimentEdit::new().variants(Currency::EUR, two_arms())).await, "baseline");
    let listed = two.acme.experiments().list(None, 10, None).await.unwrap();
    assert_eq!(listed.items, [stored]);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn price_books_survive_to_the_digit() {
    let two = two_tenants().await;
    let money = |amount, currency| Money::new(amount, currency).unwrap();
    let variants = Variants::new()
        .add("\"quoted\\ 'name' — ünï", 1, "19.00")
        .add("least", u32::MAX, "0.000001")
        .add("most", 0, "999999999999.999999")
        .add("zero", 1, 0)
        .book("least", "annual", money("290.10", "EUR"))
        .book("least", "annual", money("31000", "JPY"))
        .book("least", "seat \"x\"", money("0.000010", "EUR"))
        .book("least", "nothing", money("-0.00", "EUR"))
        .book("most", "annual", money("999999999999.999999", "KWD"));
    let new = NewExperiment::new("books", "Books", Currency::USD, variants);
    let created = two.acme.experiments().create(new).await.unwrap();
    let read = two.acme.experiments().get(created.id).await.unwrap().unwrap();
    assert_eq!(read, created);
    let prices: Vec<String> = read.variants.iter().map(|v| v.price.to_string()).collect();
    assert_eq!(prices, ["19.00", "0.000001", "999999999999.999999", "0"]);
    assert_eq!(read.variants[1].weight, u32::MAX);
    assert_eq!(read.baseline, "\"quoted\\ 'name' — ünï");
    let book = &read.variant("least").unwrap().book;
    let price = |item, currency: &str| book.price(item, currency.parse().unwrap()).map(|p| p.to_string());
    assert_eq!(price("annual", "EUR").as_deref(), Some("290.10 EUR"));
    assert_eq!(price("annual", "JPY").as_deref(), Some("31000 JPY"));
    assert_eq!(price("seat \"x\"", "EUR").as_deref(), Some("0.000010 EUR"));
    assert_eq!(price("nothing", "EUR").as_deref(), Some("0.00 EUR"));
    assert_eq!(price("annual", "USD"), None);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn arms_written_by_sql_are_read() {
    let two = two_tenants().await;
    let sql = r#"INSERT INTO experiments (tenant_id, key, name, variants) VALUES ($1, 'sql', 'By SQL',
      '[{"name": "a", "weight": 50.0, "price": 19.90, "note": "unknown members are let be"}, {"name": "b", "weight": 1e1, "price": "29"}]')"#;
    two.owner.execute(sql, &[&two.id.uuid()]).await.unwrap();
    let read = two.acme.experiments().by_key("sql").await.unwrap().unwrap();
    assert_eq!((read.variants[0].weight, read.variants[1].weight), (50, 10));
    assert_eq!((read.variants[0].price.to_string().as_str(), read.baseline.as_str()), ("19.90", "a"));
    two.acme.experiments().activate(read.id).await.unwrap();
    assert_eq!(assign(&two.acme, read.id, 0..5).await.len(), 5);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn pages_skip_and_repeat_nothing_while_others_insert() {
    let two = two_tenants().await;
    // Ids anywhere among all possible ones, the first and the last included.
    let ids = [0, 1, 2, 1 << 64, 1 << 100, u128::MAX - 1, u128::MAX]
        .map(|n| ExperimentId::from(Uuid::from_u128(n)));
    for (n, id) in ids.iter().rev().enumerate() {
        two.acme.experiments().create(new_experiment(&format!("old-{n}")).id(*id)).await.unwrap();
    }
    for status in [None, Some(Status::Draft)] {
        for limit in [1, 2, 3, 7, 1000] {
            let (mut seen, mut after, mut n) = (Vec::new(), None, 0u128);
            loop {
                let page = two.acme.experiments().list(status, limit, after).await.unwrap();
                assert!(page.items.len() <= limit as usize);
                seen.extend(page.items.iter().map(|e| e.id));
                // New ones before, between and behind.
                for at in if n < 10 { [10, 1 << 70, 1 << 120].as_slice() } else { &[] } {
                    let id = Uuid::from_u128(
                        at + n * 1000 + u128::from(limit) * 100_000 + u128::from(status.is_some()),
                    );
                    let new = new_experiment(&format!("new-{id}")).id(id.into());
                    two.acme.experiments().create(new).await.unwrap();
                }
                n += 1;
                let Some(next) = page.next else { break };
                after = Some(next);
            }
            assert!(seen.is_sorted(), "{seen:?}");
            let distinct: BTreeSet<_> = seen.iter().collect();
            assert_eq!(distinct.len(), seen.len(), "repeated");
            assert!(ids.iter().all(|id| distinct.contains(id)), "skipped {status:?} {limit}: {seen:?}");
            two.owner.execute("DELETE FROM experiments WHERE key LIKE 'new-%'", &[]).await.unwrap();
        }
    }
    two.acme.experiments().activate(ids[3]).await.unwrap();
    let acme = &two.acme;
    let listed = |status| async move { acme.experiments().list(status, 10, None).await.unwrap().items };
    assert_eq!(listed(Some(Status::Active)).await.iter().map(|e| e.id).collect::<Vec<_>>(), [ids[3]]);
    assert_eq!(listed(Some(Status::Draft)).await.len(), 6);
    assert_eq!(listed(Some(Status::Completed)).await.len(), 0);
    refused(two.acme.experiments().list(None, 0, None).await, "limit");
    refused(two.acme.experiments().list(None, 1001, None).await, "limit");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn of_two_editors_one_is_told() {
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(Actor::new("ann").unwrap());
    let bob = two.client.tenant(two.id).with_actor(Actor::new("bob").unwrap());
    let read = draft(&two.acme, "draft").await;
    let edit = ExperimentEdit::new().name("Ann's").variants(Currency::EUR, two_arms()).baseline("b");
    let edited = ann.experiments().edit(read.id, read.revision, edit).await.unwrap();
    assert_eq!(
        (edited.name.as_str(), edited.currency, edited.baseline.as_str()),
        ("Ann's", Currency::EUR, "b")
    );
    assert_eq!((edited.revision, edited.updated_by.as_deref()), (2, Some("ann")));
    assert_eq!((&edited.key, &edited.salt, &edited.metadata), (&read.key, &read.salt, &read.metadata));
    let late = bob.experiments().edit(read.id, read.revision, ExperimentEdit::new().name("Bob's")).await;
    is_kind(late, ErrorKind::Conflict);
    for revision in [i64::MIN, -1, 0, 3, i64::MAX] {
        let edit = bob.experiments().edit(read.id, revision, ExperimentEdit::new().name("Bob's")).await;
        is_kind(edit, ErrorKind::Conflict);
    }
    assert_eq!(two.acme.experiments().get(read.id).await.unwrap(), Some(edited.clone()));

    // At the same time: exactly one of 16.
    let editors = (0..16).map(|n| {
        let (client, id) = (two.client.clone(), two.id);
        tokio::spawn(async move {
            let edit = ExperimentEdit::new().name(format!("Editor {n}"));
            client.tenant(id).experiments().edit(read.id, 2, edit).await
        })
    });
    assert_eq!(winners(futures_util::future::join_all(editors).await), 1);
    ann.experiments().activate(read.id).await.unwrap();
    is_kind(ann.experiments().edit(read.id, 4, ExperimentEdit::new().name("X")).await, ErrorKind::Conflict);
    is_kind(ann.experiments().edit(ExperimentId::new(), 1, ExperimentEdit::new()).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}

fn winners(results: Vec<Result<Result<Experiment>, tokio::task::JoinError>>) -> usize {
    let results: Vec<_> = results.into_iter().map(|joined| joined.unwrap()).collect();
    for lost in results.iter().filter_map(|r| r.as_ref().err()) {
        assert_eq!(lost.kind(), ErrorKind::Conflict, "{lost:?}");
    }
    results.iter().filter(|r| r.is_ok()).count()
}

/// An experiment in a status.
async fn in_status(tenant: &TenantHandle, key: &str, status: Status) -> ExperimentId {
    let id = draft(tenant, key).await.id;
    let experiments = tenant.experiments();
    if status != Status::Draft {
        experiments.activate(id).await.unwrap();
    }
    match status {
        Status::Paused => drop(experiments.pause(id).await.unwrap()),
        Status::Completed => drop(experiments.complete(id, None).await.unwrap()),
        _ => {}
    }
    id
}

#[tokio::test]
async fn every_transition_from_every_status() {
    use Status::{Active, Completed, Draft, Paused};
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(Actor::new("ann").unwrap());
    let allowed = [
        ("activate", vec![(Draft, Active)]),
        ("pause", vec![(Active, Paused)]),
        ("resume", vec![(Paused, Active)]),
        ("complete", vec![(Active, Completed), (Paused, Completed)]),
    ];
    for (method, allowed) in &allowed {
        for from in [Draft, Active, Paused, Completed] {
            let id = in_status(&two.acme, &format!("{method}-{from}"), from).await;
            let before = two.acme.experiments().get(id).await.unwrap().unwrap();
            let result = match *method {
                "activate" => ann.experiments().activate(id).await,
                "pause" => ann.experiments().pause(id).await,
                "resume" => ann.experiments().resume(id).await,
                _ => ann.experiments().complete(id, None).await,
            };
            let stored = two.acme.experiments().get(id).await.unwrap().unwrap();
            match allowed.iter().find(|(of, _)| *of == from) {
                Some((_, to)) => {
                    let after = result.unwrap();
                    assert_eq!((after.status, after.revision), (*to, before.revision + 1), "{method} {from}");
                    assert_eq!(after.updated_by.as_deref(), Some("ann"));
                    assert!(after.start_date.is_some() && after.end_date.is_some() == (*to == Completed));
                    assert!(before.start_date.is_none() || before.start_date == after.start_date);
                    assert_eq!(stored, after);
                }
                None => {
                    let error = is_kind(result, ErrorKind::Conflict);
                    assert!(error.to_string().contains(from.as_str()), "{error}");
                    assert_eq!(stored, before, "{method} {from}");
                }
            }
        }
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_sixteen_callers_one_wins() {
    let two = two_tenants().await;
    let id = draft(&two.acme, "race").await.id;
    for step in ["activate", "pause", "resume", "complete"] {
        let calls = (0..16).map(|_| {
            let (client, tenant) = (two.client.clone(), two.id);
            tokio::spawn(async move {
                let tenant = client.tenant(tenant);
                match step {
                    "activate" => tenant.experiments().activate(id).await,
                    "pause" => tenant.experiments().pause(id).await,
                    "resume" => tenant.experiments().resume(id).await,
                    _ => tenant.experiments().complete(id, Some("29")).await,
                }
            })
        });
        assert_eq!(winners(futures_util::future::join_all(calls).await), 1, "{step}");
    }
    let stored = two.acme.experiments().get(id).await.unwrap().unwrap();
    assert_eq!((stored.revision, stored.winner.as_deref()), (5, Some("29")));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_winner_is_one_of_the_variants() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let id = active(&two.acme, "x").await.id;
    let quoted = "'; DROP TABLE experiments; --";
    for winner in ["", "30", "29\0", "29 ", "\\", quoted, &"x".repeat(1 << 20)] {
        let error = refused(experiments.complete(id, Some(winner)).await, "winner");
        assert!(winner.len() < 3 || !format!("{error:?}").contains(winner));
    }
    let done = experiments.complete(id, Some("39")).await.unwrap();
    assert_eq!((done.status, done.winner.as_deref()), (Status::Completed, Some("39")));
    assert!(done.end_date >= done.start_date);
    is_kind(experiments.complete(id, Some("30")).await, ErrorKind::Conflict);
    let without = active(&two.acme, "y").await.id;
    assert_eq!(experiments.complete(without, None).await.unwrap().winner, None);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_long_transaction_completes_what_was_activated_after_its_begin() {
    let two = two_tenants().await;
    let id = draft(&two.acme, "x").await.id;
    let transaction = two.acme.begin().await.unwrap();
    transaction.tenants().get().await.unwrap(); // BEGIN: `now()` is this moment until it ends
    two.acme.experiments().activate(id).await.unwrap();
    let done = transaction.experiments().complete(id, None).await.unwrap();
    assert!(done.end_date >= done.start_date);
    transaction.commit().await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn only_a_draft_without_sales_is_deleted() {
    let two = two_tenants().await;
    for status in [Status::Active, Status::Paused, Status::Completed] {
        let id = in_status(&two.acme, status.as_str(), status).await;
        is_kind(two.acme.experiments().delete_draft(id).await, ErrorKind::Conflict);
        assert!(two.acme.experiments().get(id).await.unwrap().is_some());
    }
    let id = draft(&two.acme, "draft").await.id;
    is_kind(two.globex.experiments().delete_draft(id).await, ErrorKind::NotFound);
    two.acme.experiments().delete_draft(id).await.unwrap();
    is_kind(two.acme.experiments().delete_draft(id).await, ErrorKind::NotFound);
    // A ledger that somebody imported holds a draft.
    let id = draft(&two.acme, "imported").await.id;
    let sql = "INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency)
               VALUES ($1, $2, 'u', '29', 29, 'USD')";
    two.owner.execute(sql, &[&two.id.uuid(), &id.uuid()]).await.unwrap();
    is_kind(two.acme.experiments().delete_draft(id).await, ErrorKind::Conflict);
    assert_eq!(two.count("conversions").await, 1);
    two.bystander_saw_nothing().await;
}

/// Everything that can be asked about an experiment, by its id.
async fn probe(tenant: &TenantHandle, id: ExperimentId) -> Vec<String> {
    let experiments = tenant.experiments();
    let new = NewRecommendation::new(id, usd("29"), 0.5, Objective::Profit);
    vec![
        format!("{:?}", experiments.get(id).await),
        format!("{:?}", experiments.edit(id, 1, ExperimentEdit::new().name("X")).await),
        format!("{:?}", experiments.edit(id, 2, ExperimentEdit::new().baseline("none")).await),
        format!("{:?}", experiments.activate(id).await),
        format!("{:?}", experiments.pause(id).await),
        format!("{:?}", experiments.resume(id).await),
        format!("{:?}", experiments.complete(id, None).await),
        format!("{:?}", experiments.complete(id, Some("29")).await),
        format!("{:?}", experiments.delete_draft(id).await),
        format!("{:?}", tenant.assignments().assign(id, &user(1)).await),
        format!("{:?}", tenant.assignments().assign_many(id, &[]).await),
        format!("{:?}", tenant.assignments().assign_many(id, &users(0..3)).await),
        format!("{:?}", tenant.assignments().get(id, &user(1)).await),
        format!("{:?}", tenant.views().record(&NewView::new(id, user(1))).await),
        format!("{:?}", tenant.conversions().settle(&sale(id, 1, "29")).await),
        format!("{:?}", tenant.recommendations().store(&new).await),
        format!("{:?}", tenant.recommendations().latest(id).await),
        format!("{:?}", tenant.recommendations().list(id, 10, None).await),
        format!("{:?}", tenant.metrics().experiment(id).await),
        format!("{:?}", tenant.metrics().by_variant(id).await),
        format!("{:?}", tenant.metrics().by_day(id, today(), today()).await),
    ]
}

#[tokio::test]
async fn another_tenants_id_is_an_unknown_one() {
    let two = two_tenants().await;
    // Acme's experiment has everything, and Globex is the one who asks.
    let id = active(&two.acme, "rich").await.id;
    assign(&two.acme, id, 0..10).await;
    two.acme.views().record(&NewView::new(id, user(1))).await.unwrap();
    two.acme.conversions().settle(&sale(id, 1, "29")).await.unwrap().entry().unwrap().unwrap();
    let new = NewRecommendation::new(id, usd("29"), 0.5, Objective::Profit);
    let stored = two.acme.recommendations().store(&new).await.unwrap();
    let draft = draft(&two.acme, "draft").await.id;

    let before = two.acme.experiments().get(id).await.unwrap();
    for foreign in [id, draft] {
        let answers = probe(&two.globex, foreign).await;
        assert_eq!(answers, probe(&two.globex, ExperimentId::new()).await);
        assert!(answers.iter().all(|a| !a.contains("Ok(Some")), "{answers:#?}");
    }
    // Ids of rows that Acme has are free for Globex: keys start with the tenant.
    assert_eq!(two.acme.experiments().get(id).await.unwrap(), before);
    assert!(two.acme.experiments().get(draft).await.unwrap().is_some());
    assert_eq!(two.acme.recommendations().latest(id).await.unwrap(), Some(stored));
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().assignments, 10);
    two.bystander_saw_nothing().await;
}
