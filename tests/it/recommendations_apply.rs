//! The draft that tries a recommended price: made once, whoever calls, and whenever a call breaks off.

use std::time::Duration;

use futures_util::future::join_all;
use lastprice::serde_json::{json, to_value};
use lastprice::{
    AssignmentUnit, Client, Currency, Eligibility, ErrorKind, ExperimentStatus, FollowUp, Layer,
    NewExperiment, PriceBounds, RecommendationStatus, StatementMode, TenantScope, Variants,
};

use crate::support::{APPLICATION, poll_n};
use crate::support_recommend::approved;
use crate::support_repo::*;
use crate::wire::Wire;

#[tokio::test]
async fn the_draft_is_the_experiment_with_another_price() {
    let two = two_tenants().await;
    let recommendations = two.acme.recommendations();
    let variants = three().book("29", "annual", usd("290")).book("19", "annual", usd("190"));
    let new = NewExperiment::new("x", "n".repeat(200), Currency::USD, variants)
        .baseline("29")
        .traffic(percent(40))
        .layer(Layer::new("checkout", percent(10)..percent(60)).unwrap())
        .unit(AssignmentUnit::Account)
        .eligibility(Eligibility::NewCustomersOnly)
        .quotes_valid_for(Duration::from_secs(3600))
        .plan(lastprice::AnalysisPlan::default().window_days(30))
        .metadata(json!({"of": "the original"}));
    let original = two.acme.experiments().create(new).await.unwrap();
    two.acme.experiments().activate(original.id).await.unwrap();
    let id = approved(&two.acme, original.id, "31.50").await;
    let draft = recommendations.apply(id, &FollowUp::new("x-2").weights(9, 1)).await.unwrap();
    assert_eq!(two.acme.experiments().get(draft.id).await.unwrap(), Some(draft.clone()));
    assert_eq!((draft.status, draft.phase, draft.revision), (ExperimentStatus::Draft, 1, 1));
    assert_eq!((&*draft.key, draft.name), ("x-2", format!("{} (follow-up)", "n".repeat(188))));
    assert_eq!((draft.currency, &*draft.baseline), (Currency::USD, "29"));
    let book = json!([{"item": "annual", "currency": "USD", "price": "290"}]);
    assert_eq!(
        to_value(&draft.variants).unwrap(),
        json!([{"name": "29", "weight": 9, "price": "29.00", "prices": book},
               {"name": "recommended", "weight": 1, "price": "31.50", "prices": book}])
    );
    let kept = |e: &lastprice::Experiment| {
        (e.traffic, e.layer.clone(), e.unit, e.eligibility, e.quote_validity, e.plan.clone())
    };
    assert_eq!(
        (draft.traffic, draft.layer, draft.unit, draft.eligibility, draft.quote_validity, draft.plan),
        kept(&original)
    );
    assert_eq!((draft.metadata, draft.forced.len()), (json!({}), 0));
    assert_ne!(draft.salt, original.salt, "other users see it");

    // From there the next one; its baseline may have the name that would be taken.
    let name = "recommended";
    let new = NewExperiment::new("y", "Y", Currency::USD, Variants::new().add(name, 1, 5).add("b", 1, 6));
    let y = two.acme.experiments().create(new).await.unwrap().id;
    let id = approved(&two.acme, y, "7").await;
    refused(recommendations.apply(id, &FollowUp::new("y-2")).await, "variant");
    let named = FollowUp::new("y-2").variant("7").name("Seven").weights(0, 1);
    let draft = recommendations.apply(id, &named).await.unwrap();
    assert_eq!((&*draft.name, &*draft.baseline), ("Seven", name));
    assert_eq!(
        draft.variants.iter().map(|v| (&*v.name, v.weight)).collect::<Vec<_>>(),
        [(name, 0), ("7", 1)]
    );

    let id = approved(&two.acme, original.id, "8").await;
    for (wrong, field) in [
        (FollowUp::new("-"), "key"),
        (FollowUp::new("k").name(" "), "name"),
        (FollowUp::new("k").variant(""), "variant"),
        (FollowUp::new("k").variant("a\u{7}"), "variant"),
        (FollowUp::new("k").weights(0, 0), "weights"),
    ] {
        refused(recommendations.apply(id, &wrong).await, field);
    }
    for taken in [FollowUp::new("x"), FollowUp::new("k").id(original.id)] {
        let error = is_kind(recommendations.apply(id, &taken).await, ErrorKind::Conflict);
        assert_eq!(error.conflicting_fields(), ["follow_up"]);
    }
    // Keys and ids that only the other tenant has are free; and theirs is not ours to apply.
    is_kind(two.globex.recommendations().apply(id, &FollowUp::new("k")).await, ErrorKind::NotFound);
    recommendations.apply(id, &FollowUp::new("pro-plan").weights(u32::MAX, u32::MAX)).await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_at_once_one_applies_it() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    for round in 0..5 {
        // Each with a draft of its own: one wins, and the others hear what it is now.
        let id = approved(&two.acme, experiment, "31").await;
        let before = two.count("experiments").await;
        let apply = async |follow_up: FollowUp| {
            let tenant = two.client.tenant(two.id);
            tokio::spawn(async move { tenant.recommendations().apply(id, &follow_up).await }).await.unwrap()
        };
        let keys = (0..16).map(|n| format!("own-{round}-{n}"));
        let results = join_all(keys.map(|key| apply(FollowUp::new(key)))).await;
        let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(|r| r.is_ok());
        assert_eq!((won.len(), lost.len()), (1, 15));
        for error in lost {
            let error = is_kind(error, ErrorKind::Conflict);
            assert_eq!(error.conflicting_fields(), ["status"]);
            assert!(error.to_string().contains("applied"), "{error}");
        }
        assert_eq!(two.count("experiments").await, before + 1);
        let stored = two.acme.recommendations().get(id).await.unwrap().unwrap();
        assert_eq!(stored.follow_up_id, Some(won[0].as_ref().unwrap().id));

        // One call that is repeated: all find the same one.
        let id = approved(&two.acme, experiment, "31").await;
        let follow_up = FollowUp::new(format!("same-{round}"));
        let tenant = &two.acme;
        let again = (0..16).map(|_| tenant.recommendations().apply(id, &follow_up));
        let results = join_all(again).await;
        let first = results[0].as_ref().unwrap();
        assert!(results.iter().all(|r| r.as_ref().unwrap() == first));
        assert_eq!(two.count("experiments").await, before + 2);
    }
    // Whatever became of the draft meanwhile.
    let id = approved(&two.acme, experiment, "31").await;
    let follow_up = FollowUp::new("later");
    let draft = two.acme.recommendations().apply(id, &follow_up).await.unwrap();
    let active = two.acme.experiments().activate(draft.id).await.unwrap();
    assert_eq!(two.acme.recommendations().apply(id, &follow_up).await.unwrap(), active);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn in_all_three_forms_of_a_scope() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let status = async |id| two.acme.recommendations().get(id).await.unwrap().unwrap().status;
    let transaction = two.acme.begin().await.unwrap();
    let id = approved(&two.acme, experiment, "31").await;
    transaction.recommendations().apply(id, &FollowUp::new("a")).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!((status(id).await, two.count("experiments").await), (RecommendationStatus::Approved, 1));

    // What says no leaves the transaction usable.
    let transaction = two.acme.begin().await.unwrap();
    let recommendations = transaction.recommendations();
    is_kind(recommendations.apply(id, &FollowUp::new("x")).await, ErrorKind::Conflict);
    is_kind(recommendations.approve(id, &PriceBounds::new()).await, ErrorKind::Conflict);
    refused(recommendations.apply(id, &FollowUp::new("a").variant("29")).await, "variant");
    is_kind(recommendations.score(id, usd("1")).await, ErrorKind::Conflict);
    let draft = recommendations.apply(id, &FollowUp::new("a")).await.unwrap();
    is_kind(recommendations.reject(id, "too late").await, ErrorKind::Conflict);
    transaction.commit().await.unwrap();
    assert_eq!((status(id).await, two.count("experiments").await), (RecommendationStatus::Applied, 2));

    for commits in [false, true] {
        let id = approved(&two.acme, experiment, "32").await;
        let mut host = two.database.connect_app().await.unwrap();
        let transaction = host.transaction().await.unwrap();
        let scope = TenantScope::within(&transaction, two.id);
        is_kind(scope.recommendations().apply(id, &FollowUp::new("x")).await, ErrorKind::Conflict);
        scope.recommendations().apply(id, &FollowUp::new("h")).await.unwrap();
        let (expected, drafts) = if commits {
            transaction.commit().await.unwrap();
            (RecommendationStatus::Applied, 3)
        } else {
            transaction.rollback().await.unwrap();
            (RecommendationStatus::Approved, 2)
        };
        assert_eq!((status(id).await, two.count("experiments").await), (expected, drafts));
    }

    // A draft that nobody wants can be deleted. It stays applied, and makes no second one.
    two.acme.experiments().delete_draft(draft.id).await.unwrap();
    let left = two.acme.recommendations().get(id).await.unwrap().unwrap();
    assert_eq!((left.status, left.follow_up_id), (RecommendationStatus::Applied, None));
    is_kind(two.acme.recommendations().apply(id, &FollowUp::new("a")).await, ErrorKind::Conflict);
    two.bystander_saw_nothing().await;
    // And the tenant goes with everything, whichever of its rows goes first.
    two.owner.execute("DELETE FROM tenants WHERE id = $1", &[&two.id.uuid()]).await.unwrap();
    assert_eq!((two.count("recommendations").await, two.count("experiments").await), (0, 0));
    two.bystander_saw_nothing().await;
}

/// Dropped wherever it waits, there is the draft and the status that says so, or neither; and the same call again finds or
/// makes it.
#[tokio::test]
async fn dropped_anywhere() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let superuser = two.database.connect_superuser().await.unwrap();
    let wire = Wire::before(&two.database.app_url()).await;
    for mode in [StatementMode::Prepared, StatementMode::Typed] {
        let build = || {
            Client::builder()
                .url(wire.url())
                .application_name(APPLICATION)
                .pool_size(1)
                .statement_mode(mode)
                .build()
                .unwrap()
        };
        for warm in [false, true] {
            let (mut none, mut both) = (0, 0);
            for n in 0.. {
                let client = build();
                let tenant = client.tenant(two.id);
                if warm {
                    let id = approved(&two.acme, experiment, "31").await;
                    let follow_up = FollowUp::new(format!("warm-{mode:?}-{n}"));
                    tenant.recommendations().apply(id, &follow_up).await.unwrap();
                }
                let id = approved(&two.acme, experiment, "31").await;
                let before = two.count("experiments").await;
                let follow_up = FollowUp::new(format!("{mode:?}-{warm}-{n}"));
                let done = poll_n(n, tenant.recommendations().apply(id, &follow_up)).await;
                let is_over = done.is_some();
                if let Some(done) = done {
                    done.unwrap();
                }
                client.close().await;
                eventually("the end of its connections", async || {
                    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1";
                    superuser.query_one(sql, &[&APPLICATION]).await.unwrap().get::<_, i64>(0) == 0
                })
                .await;
                let stored = two.acme.recommendations().get(id).await.unwrap().unwrap();
                match (stored.status, stored.follow_up_id, two.count("experiments").await - before) {
                    (RecommendationStatus::Approved, None, 0) => none += 1,
                    (RecommendationStatus::Applied, Some(_), 1) => both += 1,
                    half => panic!("after {n} polls: {half:?}"),
                }
                let again = two.acme.recommendations().apply(id, &follow_up).await.unwrap();
                assert_eq!(
                    two.acme.recommendations().get(id).await.unwrap().unwrap().follow_up_id,
                    Some(again.id)
                );
                assert_eq!(two.count("experiments").await, before + 1);
                if is_over {
                    break;
                }
            }
            println!("{mode:?}, warm {warm}: {none} times nothing, {both} times both");
            assert!(none > 1 && both > 0, "it never waited");
        }
    }
    two.bystander_saw_nothing().await;
}
