//! Who was promised which price.

use std::collections::HashMap;

use lastprice::bucketing::{Allocation, Unit};
use lastprice::{
    AssignOutcome, AssignmentReason, Currency, ErrorKind, Experiment, ExperimentId, Money, NewExperiment,
    Reason, UserId, Variants,
};

use crate::support_repo::*;

fn by_the_algorithm(experiment: &Experiment, user: &UserId) -> String {
    let weights: Vec<u32> = experiment.variants.iter().map(|v| v.weight).collect();
    let chosen = Allocation::new(&experiment.salt, &weights).unwrap().variant(Unit::of(user)) as usize;
    experiment.variants[chosen].name.clone()
}

#[tokio::test]
async fn the_variant_is_that_of_the_algorithm() {
    let two = two_tenants().await;
    let weights = [0, 1, 5, 0, 3, 0];
    let variants =
        weights.iter().enumerate().fold(Variants::new(), |v, (n, w)| v.add(format!("v{n}"), *w, n as u32));
    let new = NewExperiment::new("weights", "Weights", Currency::JPY, variants);
    let id = two.acme.experiments().create(new).await.unwrap().id;
    let experiment = two.acme.experiments().activate(id).await.unwrap();
    let odd = [
        "ß",
        "日本語",
        " ",
        "\t\n",
        "'; DROP TABLE assignments; --",
        "\\",
        "\"",
        "{a,b}",
        "NULL",
        &"é".repeat(256),
    ];
    let mut everyone = users(0..500);
    everyone.extend(odd.map(|id| UserId::new(id).unwrap()));
    let outcomes = two.acme.assignments().assign_many(id, &everyone).await.unwrap();
    for (user, outcome) in everyone.iter().zip(&outcomes) {
        assert_eq!(outcome.variant(), by_the_algorithm(&experiment, user));
        let stored = outcome.quote().unwrap();
        assert_eq!((&stored.user_id, stored.experiment_id, stored.phase), (user, id, 1));
        assert_eq!((stored.reason, outcome.is_new()), (AssignmentReason::Randomised, true));
        assert_eq!(stored.price.to_string(), format!("{} JPY", &stored.variant[1..]));
        assert_eq!(two.acme.assignments().get(id, user).await.unwrap().as_ref(), Some(stored));
    }
    let mut counts: HashMap<&str, usize> = HashMap::new();
    outcomes.iter().for_each(|o| *counts.entry(o.variant()).or_default() += 1);
    assert_eq!(counts.len(), 3, "{counts:?}: only arms with a weight");
    assert!(counts["v2"] > counts["v4"] && counts["v4"] > counts["v1"], "{counts:?}");

    // Again, one by one: the same rows, none of them new.
    for (user, first) in everyone.iter().zip(&outcomes).step_by(20) {
        let again = two.acme.assignments().assign(id, user).await.unwrap();
        assert_eq!((again.quote(), again.is_new()), (first.quote(), false));
    }
    assert_eq!(two.count("assignments").await, 510);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn the_stored_row_is_the_quote() {
    let two = two_tenants().await;
    let euro = |amount| Money::new(amount, "EUR").unwrap();
    let variants =
        Variants::new().add("only", 1, "19.90").add("nobody", 0, "1").book("only", "annual", euro("199.000"));
    let new = NewExperiment::new("quote", "Quote", Currency::GBP, variants);
    let id = two.acme.experiments().create(new).await.unwrap().id;
    two.acme.experiments().activate(id).await.unwrap();
    let outcome = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    assert_eq!(outcome.price().to_string(), "19.90 GBP");
    assert_eq!(outcome.book().price("annual", Currency::EUR).unwrap().to_string(), "199.000 EUR");

    // Whatever somebody does to the configuration, the quote stands.
    let sql = r#"ALTER TABLE experiments DISABLE TRIGGER experiments_guard;
                 UPDATE experiments SET currency = 'USD', variants = '[{"name": "only", "weight": 1, "price": "99"}]';
                 ALTER TABLE experiments ENABLE TRIGGER experiments_guard"#;
    let sql = sql.replace("]';", &format!("]' WHERE id = '{id}';"));
    two.owner.batch_execute(&sql).await.unwrap();
    let again = two.acme.assignments().assign(id, &user(1)).await.unwrap();
    assert_eq!((again.quote(), again.is_new()), (outcome.quote(), false));
    assert_eq!((again.price(), again.book()), (outcome.price(), outcome.book()));
    let later = two.acme.assignments().assign(id, &user(2)).await.unwrap();
    assert_eq!(later.price().to_string(), "99 USD");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn outside_is_the_baseline_and_no_row_and_quotes_stick() {
    let two = two_tenants().await;
    let (experiments, assignments) = (two.acme.experiments(), two.acme.assignments());
    let id = draft(&two.acme, "x").await.id;
    let outside = |outcome: AssignOutcome, why| {
        let AssignOutcome::Outside { variant, price, book, reason } = &outcome else { panic!("{outcome:?}") };
        assert_eq!((variant.as_str(), *price, *reason), ("29", usd("29.00"), why));
        assert!(book.is_empty() && outcome.quote().is_none() && !outcome.is_new());
        assert_eq!((outcome.variant(), outcome.price()), ("29", usd("29")));
    };
    outside(assignments.assign(id, &user(1)).await.unwrap(), Reason::Draft);
    assert_eq!(two.count("assignments").await, 0);

    experiments.activate(id).await.unwrap();
    let first = assignments.assign(id, &user(1)).await.unwrap();
    for (status, why) in [("paused", Reason::Paused), ("completed", Reason::Completed)] {
        match status {
            "paused" => experiments.pause(id).await.unwrap(),
            _ => experiments.complete(id, Some("39")).await.unwrap(),
        };
        // Known and unknown users in one call, in their order.
        let asked = [user(2), user(1), user(3)];
        let [new, known, newer] = assignments.assign_many(id, &asked).await.unwrap().try_into().unwrap();
        outside(new, why);
        outside(newer, why);
        assert_eq!((known.quote(), known.is_new()), (first.quote(), false));
    }
    assert_eq!(two.count("assignments").await, 1);
    assert_eq!(assignments.get(id, &user(2)).await.unwrap(), None);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn many_users_at_once() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let assignments = two.acme.assignments();
    assert_eq!(assignments.assign_many(id, &[]).await.unwrap(), []);
    is_kind(assignments.assign_many(ExperimentId::new(), &[]).await, ErrorKind::NotFound);
    // Who is named twice is new, in both places, and there is one row.
    let asked = [user(3), user(1), user(3), user(2), user(1)];
    let outcomes = assignments.assign_many(id, &asked).await.unwrap();
    for (user, outcome) in asked.iter().zip(&outcomes) {
        assert_eq!(outcome.quote().unwrap().user_id, *user);
        assert!(outcome.is_new());
    }
    assert_eq!(outcomes[0], outcomes[2]);
    assert_eq!(two.count("assignments").await, 3);

    let outcomes = assignments.assign_many(id, &users(0..1000)).await.unwrap();
    assert_eq!(outcomes.iter().filter(|o| o.is_new()).count(), 997);
    assert_eq!(two.count("assignments").await, 1000);
    refused(assignments.assign_many(id, &users(0..1001)).await, "users");
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_tasks_assign_the_same_users() {
    let two = two_tenants().await;
    let id = active(&two.acme, "race").await.id;
    warm_up(&two).await;
    let tasks = (0..16).map(|n| {
        let (client, tenant) = (two.client.clone(), two.id);
        tokio::spawn(async move {
            let tenant = client.tenant(tenant);
            if n % 2 == 0 {
                // Each its own order.
                let mut asked = users(0..50);
                asked.rotate_left(n * 3);
                if n % 4 == 0 {
                    asked.reverse();
                }
                return tenant.assignments().assign_many(id, &asked).await.unwrap();
            }
            let mut outcomes = Vec::new();
            for user in users(0..50) {
                outcomes.push(tenant.assignments().assign(id, &user).await.unwrap());
            }
            outcomes
        })
    });
    let mut new: HashMap<UserId, usize> = HashMap::new();
    let mut quotes: HashMap<UserId, lastprice::Quote> = HashMap::new();
    for outcomes in futures_util::future::join_all(tasks).await {
        for outcome in outcomes.unwrap() {
            let quote = outcome.quote().unwrap().clone();
            *new.entry(quote.user_id.clone()).or_default() += usize::from(outcome.is_new());
            let first = quotes.entry(quote.user_id.clone()).or_insert_with(|| quote.clone());
            assert_eq!(*first, quote, "one quote, whoever asks");
        }
    }
    assert!(new.len() == 50 && new.values().all(|n| *n == 1), "{new:?}");
    assert_eq!(two.count("assignments").await, 50);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().assignments, 50);
    two.bystander_saw_nothing().await;
}

/// Opens all connections and prepares their statements, so that what follows meets.
async fn warm_up(two: &TwoTenants) {
    let other = active(&two.acme, "warm-up").await.id;
    let transactions = (0..15).map(|_| two.acme.begin());
    for transaction in futures_util::future::join_all(transactions).await {
        let transaction = transaction.unwrap();
        transaction.assignments().assign(other, &user(1)).await.unwrap();
        transaction.rollback().await.unwrap();
    }
    two.acme.experiments().complete(other, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_second_takes_what_the_first_has_stored() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let first = two.acme.begin().await.unwrap();
    let [one, three] = [user(1), user(3)];
    let stored = first.assignments().assign_many(id, &[one, three]).await.unwrap();
    assert!(stored.iter().all(|o| o.is_new()));
    // Sees none of it, and waits for it at the unique key.
    let (client, tenant) = (two.client.clone(), two.id);
    let second = tokio::spawn(async move {
        client.tenant(tenant).assignments().assign_many(id, &users(0..5)).await.unwrap()
    });
    let waiting = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
                   WHERE NOT granted AND datname = current_database()";
    while two.owner.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(!second.is_finished(), "it did not wait");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    first.commit().await.unwrap();
    let outcomes = second.await.unwrap();
    assert_eq!(outcomes.iter().map(|o| o.is_new()).collect::<Vec<_>>(), [true, false, true, false, true]);
    assert_eq!((outcomes[1].quote(), outcomes[3].quote()), (stored[0].quote(), stored[1].quote()));
    assert_eq!(two.count("assignments").await, 5);
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pausing_meanwhile_never_leaves_an_answer_that_is_not_stored() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await;
    let id = experiment.id;
    let (client, tenant) = (two.client.clone(), two.id);
    let switching = tokio::spawn(async move {
        let tenant = client.tenant(tenant);
        for _ in 0..60 {
            tenant.experiments().pause(id).await.unwrap();
            tenant.experiments().resume(id).await.unwrap();
        }
        tenant.experiments().pause(id).await.unwrap();
    });
    let assigning = (0..8).map(|task| {
        let (client, tenant) = (two.client.clone(), two.id);
        tokio::spawn(async move {
            let tenant = client.tenant(tenant);
            let mut answers = Vec::new();
            for n in 0..60 {
                let asked = users(task * 100 + n..task * 100 + n + 3);
                match tenant.assignments().assign_many(id, &asked).await {
                    Ok(outcomes) => answers.extend(asked.into_iter().zip(outcomes)),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Conflict, "{e:?}"),
                }
            }
            answers
        })
    });
    let answers = futures_util::future::join_all(assigning).await;
    switching.await.unwrap();
    let (mut inside, mut outside) = (0, 0);
    for (user, outcome) in answers.into_iter().flat_map(|answers| answers.unwrap()) {
        match &outcome {
            AssignOutcome::Assigned { quote, .. } => {
                inside += 1;
                assert_eq!(quote.variant, by_the_algorithm(&experiment, &user));
                let stored = two.acme.assignments().get(id, &user).await.unwrap();
                assert_eq!(stored.as_ref(), Some(quote));
            }
            AssignOutcome::Outside { reason, .. } => {
                outside += 1;
                assert_eq!(*reason, Reason::Paused);
            }
            _ => unreachable!(),
        }
    }
    assert!(inside > 0 && outside > 0, "{inside} inside, {outside} outside: nothing was tried");
    // Paused for good: nobody is added any more.
    let before = two.count("assignments").await;
    assign(&two.acme, id, 5000..5100).await;
    assert_eq!(two.count("assignments").await, before);
    two.bystander_saw_nothing().await;
}

/// The insert looks at the status once more: what was read may be old.
#[tokio::test]
async fn a_pause_between_read_and_insert_stores_nothing() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let (name, insert, types) = lastprice::internals::statements()
        .into_iter()
        .find(|(name, ..)| *name == "assignments.insert")
        .expect("assignments.insert");
    two.acme.experiments().pause(id).await.unwrap();
    let app = two.database.connect_app().await.unwrap();
    app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{}'", two.id)).await.unwrap();
    let insert = app.prepare_typed(&insert.replace("{s}", "public"), types).await.unwrap();
    let (users, variants, reasons) = (vec!["u"], vec![0], vec!["randomised"]);
    let now = vec![None::<lastprice::chrono::DateTime<lastprice::chrono::Utc>>];
    let (tenant, experiment) = (two.id.uuid(), id.uuid());
    let stored =
        app.query(&insert, &[&tenant, &experiment, &1, &users, &variants, &reasons, &now]).await.unwrap();
    assert!(stored.is_empty(), "{name} stored for a paused experiment");
    app.batch_execute("COMMIT").await.unwrap();
    two.acme.experiments().resume(id).await.unwrap();
    app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{}'", two.id)).await.unwrap();
    let stored =
        app.query(&insert, &[&tenant, &experiment, &2, &users, &variants, &reasons, &now]).await.unwrap();
    assert!(stored.is_empty(), "{name} stored for another phase");
    let stored =
        app.query(&insert, &[&tenant, &experiment, &1, &users, &variants, &reasons, &now]).await.unwrap();
    assert_eq!(stored.len(), 1);
    app.batch_execute("ROLLBACK").await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn all_quotes_of_a_user_in_pages() {
    let two = two_tenants().await;
    let mut expected = Vec::new();
    for n in 0..7 {
        let id = active(&two.acme, &format!("x{n}")).await.id;
        assign(&two.acme, id, 0..3).await;
        expected.push(id);
    }
    for limit in [1, 2, 3, 7, 1000] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = two.acme.assignments().list_by_user(&user(1), limit, after).await.unwrap();
            assert!(page.items.iter().all(|a| a.user_id == user(1)));
            seen.extend(page.items.iter().map(|a| a.experiment_id));
            let Some(next) = page.next else { break };
            after = Some(next);
        }
        assert_eq!(seen, expected, "{limit}");
    }
    let nobody = two.acme.assignments().list_by_user(&user(9), 10, None).await.unwrap();
    assert!(nobody.items.is_empty() && nobody.next.is_none());
    refused(two.acme.assignments().list_by_user(&user(1), 0, None).await, "limit");
    refused(two.acme.assignments().list_by_user(&user(1), 1001, None).await, "limit");
    two.bystander_saw_nothing().await;
}
