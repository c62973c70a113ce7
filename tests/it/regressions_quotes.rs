//! What a reviewer once broke of quotes and of who is certain: each test failed before its cause was mended.

use lastprice::bucketing::Share;
use lastprice::chrono::{self, Utc};
use lastprice::{AssignmentUnit, Eligibility, NewPhase, Reason, Subject, Variants};

use crate::support_repo::*;
use crate::support_sql::as_tenant;

/// A customer of old was shown, and stored, the baseline; then cancels (or another user of the account asks).
#[tokio::test]
async fn certain_though_grandfathered_before() {
    let two = two_tenants().await;
    let new = new_experiment("x").eligibility(Eligibility::NewCustomersOnly);
    let id = two.acme.experiments().create(new).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let assigner = two.client.assigner(two.id).await.unwrap();
    let long_ago = Utc::now() - chrono::Duration::days(400);
    let mut wrong = Vec::new();
    for n in 0..50 {
        let who = user(n);
        assigner.quote("x", Subject::new(&who).customer_since(long_ago)).await.unwrap();
        let now = Subject::new(&who).not_a_customer();
        let (decision, quote) = (assigner.assign("x", now).unwrap(), assigner.quote("x", now).await.unwrap());
        if decision.is_certain() && decision.price() != quote.price() {
            wrong.push(format!("{who}: certain of {}, the quote is {}", decision.price(), quote.price()));
        }
    }
    assert!(wrong.is_empty(), "{} of 50, {}", wrong.len(), wrong[0]);
}

/// The same by account, with facts that never change: two users of one account, one a customer of old.
#[tokio::test]
async fn certain_though_the_account_is_grandfathered() {
    let two = two_tenants().await;
    let new = new_experiment("x").eligibility(Eligibility::NewCustomersOnly).unit(AssignmentUnit::Account);
    let id = two.acme.experiments().create(new).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let assigner = two.client.assigner(two.id).await.unwrap();
    let long_ago = Utc::now() - chrono::Duration::days(400);
    let (anna, bob) = (user(1), user(2));
    let mut wrong = Vec::new();
    for n in 100..150 {
        let account = user(n);
        let of_anna = Subject::new(&anna).account(&account).customer_since(long_ago);
        let of_bob = Subject::new(&bob).account(&account).not_a_customer();
        assigner.quote("x", of_anna).await.unwrap();
        let decision = assigner.assign("x", of_bob).unwrap();
        let quote = assigner.quote("x", of_bob).await.unwrap();
        if decision.is_certain() && decision.price() != quote.price() {
            wrong.push(format!("certain of {}, the quote is {}", decision.price(), quote.price()));
        }
    }
    assert!(wrong.is_empty(), "{} of 50, {}", wrong.len(), wrong[0]);
}

/// `Forced` is always certain; but a stored quote of the same variant wins, at the price of then.
#[tokio::test]
async fn forced_is_certain_of_another_price_than_the_stored_one() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let live = active(&two.acme, "x").await;
    let assigner = two.client.assigner(two.id).await.unwrap();
    let who = user(1);
    experiments.force(live.id, &who, Some("39")).await.unwrap();
    assert_eq!(assigner.quote("x", &who).await.unwrap().price(), usd("39"));
    let live = experiments.get(live.id).await.unwrap().unwrap();
    let dearer = Variants::new().add("29", 1, 29).add("39", 1, 45);
    experiments.new_phase(live.id, live.revision, NewPhase::new(dearer)).await.unwrap();
    assigner.confirm().await.unwrap();
    let (decision, quote) = (assigner.assign("x", &who).unwrap(), assigner.quote("x", &who).await.unwrap());
    assert_eq!(decision.reason(), Reason::Forced);
    assert!(
        !decision.is_certain() || decision.price() == quote.price(),
        "certain of {}, the quote is {}",
        decision.price(),
        quote.price()
    );
}

/// Same in phase 1, with an imported quote of that variant.
#[tokio::test]
async fn forced_is_certain_though_imported_at_another_price() {
    let two = two_tenants().await;
    let live = active(&two.acme, "x").await;
    let assigner = two.client.assigner(two.id).await.unwrap();
    let who = user(1);
    let sql = "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason)
               VALUES ($1, $2, $3, '19', 18, 'USD', 'imported')";
    two.owner.execute(sql, &[&two.id.uuid(), &live.id.uuid(), &who.as_str()]).await.unwrap();
    two.acme.experiments().force(live.id, &who, Some("19")).await.unwrap();
    assigner.confirm().await.unwrap();
    let (decision, quote) = (assigner.assign("x", &who).unwrap(), assigner.quote("x", &who).await.unwrap());
    assert!(
        !decision.is_certain() || decision.price() == quote.price(),
        "certain of {}, the quote is {}",
        decision.price(),
        quote.price()
    );
}

/// "all of its users see one price", and "a user who is named twice is stored once".
#[tokio::test]
async fn one_call_shows_an_account_two_prices() {
    let two = two_tenants().await;
    let id =
        two.acme.experiments().create(new_experiment("x").unit(AssignmentUnit::Account)).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let (anna, bob) = (user(1), user(2));
    let no = |_: &str| false;
    let mut wrong = Vec::new();
    for n in 100..130 {
        let account = user(n);
        let asked =
            [Subject::new(&anna).account(&account).eligible_if(&no), Subject::new(&bob).account(&account)];
        let outcomes = two.acme.assignments().assign_many(id, asked).await.unwrap();
        let again = two.acme.assignments().assign_many(id, asked).await.unwrap();
        if outcomes[0].price() != outcomes[1].price() {
            wrong.push(format!(
                "first call: {} and {}; second call: {} and {}",
                outcomes[0].price(),
                outcomes[1].price(),
                again[0].price(),
                again[1].price()
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of 30 accounts; {}", wrong.len(), wrong[0]);
}

/// What the guard should hold against the application's own SQL: the mark of exceptions, and the start date by which
/// customers are told apart.
#[tokio::test]
async fn the_application_unmarks_exceptions_and_moves_the_start() {
    let two = two_tenants().await;
    let new = new_experiment("x").eligibility(Eligibility::NewCustomersOnly);
    let id = two.acme.experiments().create(new).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let app = two.database.connect_app().await.unwrap();
    two.acme.experiments().force(id, &user(1), Some("39")).await.unwrap();
    two.acme.experiments().force(id, &user(1), None).await.unwrap();
    let tenant = two.id.to_string();
    let mut allowed = Vec::new();
    for sql in
        ["UPDATE experiments SET start_date = '2000-01-01Z'", "UPDATE experiments SET start_date = NULL"]
    {
        if as_tenant(&app, &tenant, sql).await.is_ok() {
            allowed.push(sql);
        }
    }
    assert!(allowed.is_empty(), "{allowed:?}");
    as_tenant(&app, &tenant, "UPDATE experiments SET exceptions = false").await.unwrap();
    let marked = "SELECT exceptions FROM experiments WHERE id = $1";
    assert!(
        two.owner.query_one(marked, &[&id.uuid()]).await.unwrap().get::<_, bool>(0),
        "a mark is for good"
    );
}

/// Whoever is outside has no row; the baseline's name is frozen, its price is not.
#[tokio::test]
async fn a_new_phase_re_prices_everyone_outside() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let id = experiments.create(new_experiment("x").traffic(Share::NONE)).await.unwrap().id;
    let live = experiments.activate(id).await.unwrap();
    let assigner = two.client.assigner(two.id).await.unwrap();
    let before = assigner.assign("x", &user(1)).unwrap();
    assert!(before.is_certain());
    let variants = Variants::new().add("29", 1, 35).add("39", 1, 39);
    let changed = experiments.new_phase(id, live.revision, NewPhase::new(variants)).await;
    let after = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    assert!(changed.is_err() || after.price() == before.price(), "{} then {}", before.price(), after.price());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn futures_are_send_and_many_decisions_are_held() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let assigner = two.client.assigner(two.id).await.unwrap();
    let (handle, spawned) = (two.client.tenant(two.id), assigner.clone());
    tokio::spawn(async move {
        let (who, is_in) = (user(1), true);
        let predicate = move |_: &str| is_in;
        let subject = Subject::new(&who).eligible_if(&predicate);
        let held: Vec<_> = (0..40).map(|n| spawned.assign("x", &user(n)).unwrap()).collect();
        handle.assignments().assign(id, subject).await.unwrap();
        handle.experiments().pause(id).await.unwrap();
        spawned.confirm().await.unwrap();
        handle.experiments().resume(id).await.unwrap();
        spawned.quote("x", subject).await.unwrap();
        handle.assignments().assign_many(id, [subject, subject]).await.unwrap();
        assert!(held.iter().all(|d| d.reason() == Reason::Randomised));
        drop(spawned);
        drop(held);
    })
    .await
    .unwrap();
}

/// An id that the snapshot knows and the database no longer does.
#[tokio::test]
async fn quote_of_a_key_that_was_made_anew() {
    let two = two_tenants().await;
    let old = draft(&two.acme, "x").await;
    let assigner = two.client.assigner(two.id).await.unwrap();
    // In one transaction, so that there is an experiment of this key at all times.
    let transaction = two.acme.begin().await.unwrap();
    transaction.experiments().delete_draft(old.id).await.unwrap();
    let new = transaction.experiments().create(new_experiment("x")).await.unwrap();
    transaction.commit().await.unwrap();
    let quote = assigner.quote("x", &user(1)).await;
    assert!(quote.is_ok(), "{:?}; the tenant has {}", quote.unwrap_err().kind(), new.key);
}

/// Rows that the checks accept: each must be readable.
#[tokio::test]
async fn what_the_checks_accept_can_be_read() {
    let two = two_tenants().await;
    let app = two.database.connect_app().await.unwrap();
    let tenant = two.id.to_string();
    let zeros = "0".repeat(60);
    let many = (0..1000)
        .map(|n| format!(r#"{{"name": "v{n}", "weight": 4294967295, "price": {n}}}"#))
        .collect::<Vec<_>>();
    let arms = [
        ("scale", format!(r#"[{{"name": "a", "weight": 1.{zeros}, "price": 19.{zeros}}}]"#)),
        ("weight-e", r#"[{"name": "a", "weight": 1e3, "price": 1e3}, {"name": "b", "weight": 42949.67295e5, "price": 1e-6}]"#.to_owned()),
        ("many", format!("[{}]", many.join(","))),
        ("extra", r#"[{"name": "a", "weight": 1, "price": "000000000019.000000", "more": {"x": [1]}, "prices": []}]"#.to_owned()),
        ("book", r#"[{"name": "a", "weight": 1, "price": 1, "prices": [{"item": "i", "currency": "ZZZ", "price": 999999999999.999999}, {"item": "i", "currency": "ZZZ", "price": "1"}]}]"#.to_owned()),
        ("xxx", r#"[{"name": "a", "weight": 1, "price": -0}]"#.to_owned()),
        ("nested", r#"[[{"name": "a", "weight": 1, "price": 1}]]"#.to_owned()),
        ("unpriced", r#"[{"name": "a", "weight": 1, "price": 1, "prices": null}]"#.to_owned()),
        ("emoji", r#"[{"name": "\ud83d\ude00", "weight": 1, "price": 1}]"#.to_owned()),
    ];
    let mut accepted = Vec::new();
    for (key, arms) in &arms {
        let sql = format!(
            "INSERT INTO experiments (tenant_id, key, name, variants, status, currency) VALUES ('{tenant}', '{key}', 'N', '{arms}', 'active', 'QQQ')"
        );
        if as_tenant(&app, &tenant, &sql).await.is_ok() {
            accepted.push(*key);
        }
    }
    for (key, date) in [("far", "'200000-01-01Z'"), ("farther", "'290000-01-01Z'"), ("bc", "'4000-01-01 BC'")]
    {
        let sql = format!(
            "INSERT INTO experiments (tenant_id, key, name, variants, status, start_date, eligibility)
             VALUES ('{tenant}', '{key}', 'N', '{}', 'active', {date}, 'new_customers')",
            arms[5].1
        );
        if as_tenant(&app, &tenant, &sql).await.is_ok() {
            accepted.push(key);
        }
    }
    let assigner = two.client.assigner(two.id).await.unwrap();
    let who = user(1);
    let mut unreadable = Vec::new();
    for key in &accepted {
        let decision = assigner
            .assign(key, &who)
            .map(|d| (d.price(), d.variant().to_owned(), d.book().clone(), d.is_certain()));
        let quote = assigner.quote(key, &who).await;
        match (decision, quote) {
            (Some((price, variant, book, certain)), Ok(quote)) => {
                let same = price == quote.price() && variant == quote.variant() && book == *quote.book();
                if !same && certain {
                    unreadable.push(format!(
                        "{key}: {price} {variant}, then {} {}",
                        quote.price(),
                        quote.variant()
                    ));
                }
            }
            (decision, quote) => unreadable.push(format!(
                "{key}: {:?}, {:?}",
                decision.is_some(),
                quote.map(|_| ()).map_err(|e| e.kind())
            )),
        }
    }
    assert!(unreadable.is_empty(), "accepted {accepted:?}; {unreadable:#?}");
}
