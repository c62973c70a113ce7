//! What becomes of a recommendation: who may decide what, when, and within which bounds.

use std::time::Duration;

use lastprice::chrono::{DateTime, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::{
    Actor, Client, Currency, ErrorKind, ExperimentEdit, FollowUp, Money, NewRecommendation, Objective,
    PriceBounds, RecommendationId, RecommendationStatus as Status, StatementMode, Variants,
};

use crate::support_recommend::*;
use crate::support_repo::*;
use crate::wire::{Hold, Wire};

#[tokio::test]
async fn from_a_proposal_to_a_score() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await;
    let anna = two.client.tenant(two.id).with_actor(Actor::new("anna").unwrap());
    let recommendations = anna.recommendations();
    let until = "2999-12-31T23:59:59Z".parse::<DateTime<Utc>>().unwrap();
    let new = proposal(experiment.id)
        .source("jale")
        .model_version("2026-11")
        .inputs_hash("sha256:00")
        .expires_at(until);
    let stored = recommendations.store(&new).await.unwrap();
    let said = (stored.source.as_deref(), stored.model_version.as_deref(), stored.inputs_hash.as_deref());
    assert_eq!(said, (Some("jale"), Some("2026-11"), Some("sha256:00")));
    assert_eq!((stored.status, stored.expires_at, stored.decided_at), (Status::Proposed, Some(until), None));
    assert_eq!(recommendations.get(stored.id).await.unwrap(), Some(stored.clone()));

    let approved = approve(&anna, stored.id).await.unwrap();
    assert_eq!((approved.status, approved.decided_by.as_deref()), (Status::Approved, Some("anna")));
    assert!(approved.decided_at.unwrap() >= stored.created_at);
    let mut decided = stored.clone();
    decided.status = Status::Approved;
    (decided.decided_at, decided.decided_by) = (approved.decided_at, approved.decided_by.clone());
    assert_eq!(decided, approved, "nothing else changed");
    assert_eq!(two.count("experiments").await, 1, "nothing is tried yet");

    let ben = two.client.tenant(two.id).with_actor(Actor::new("ben").unwrap());
    let draft = ben.recommendations().apply(stored.id, &FollowUp::new("x-2")).await.unwrap();
    let applied = recommendations.get(stored.id).await.unwrap().unwrap();
    assert_eq!((applied.status, applied.follow_up_id), (Status::Applied, Some(draft.id)));
    assert_eq!((applied.decided_by.as_deref(), applied.applied_by.as_deref()), (Some("anna"), Some("ben")));
    assert!(applied.applied_at >= applied.decided_at);
    assert_eq!((applied.deviation(), applied.scored_at), (None, None));

    let scored = recommendations.score(stored.id, usd("2565")).await.unwrap();
    assert_eq!((scored.observed_revenue, scored.deviation()), (Some(usd("2565")), Some(Decimal::new(-5, 2))));
    assert!(scored.scored_at >= applied.applied_at);
    assert_eq!(recommendations.score(stored.id, usd("2565.00")).await.unwrap(), scored, "the same again");
    conflicts(recommendations.score(stored.id, usd("2565.01")).await, "observed_revenue");
    assert_eq!(recommendations.get(stored.id).await.unwrap(), Some(scored));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn bounds_are_looked_at_when_it_is_approved() {
    let two = two_tenants().await;
    // In force are 29, the baseline's.
    let experiment = active(&two.acme, "x").await.id;
    let recommendations = two.acme.recommendations();
    let id = store(&two.acme, experiment).await;
    let new = PriceBounds::new();
    for (bounds, field, limit) in [
        (new.floor(usd("31.500001")), "floor", "31.500001 USD"),
        (new.ceiling(usd("31.49")), "ceiling", "31.49 USD"),
        (new.max_change(percent(8)), "max_change", "8 %"),
    ] {
        let said = conflicts(recommendations.approve(id, &bounds).await, field);
        assert!(said.contains(limit), "{said}");
    }
    let eur = Money::new("30", "EUR").unwrap();
    refused(recommendations.approve(id, &new.floor(eur)).await, "floor");
    refused(recommendations.approve(id, &new.ceiling(eur)).await, "ceiling");
    refused(recommendations.approve(id, &new.floor(usd("-1"))).await, "floor");
    refused(recommendations.approve(id, &new.floor(usd("2")).ceiling(usd("1"))).await, "ceiling");
    assert_eq!(recommendations.get(id).await.unwrap().unwrap().status, Status::Proposed);
    let within = new.floor(usd("31.5")).ceiling(usd("31.5")).max_change(percent(9));
    assert_eq!(recommendations.approve(id, &within).await.unwrap().status, Status::Approved);
    is_kind(recommendations.approve(RecommendationId::new(), &within).await, ErrorKind::NotFound);

    // The price in force is what the experiment says at this moment, by hand with zeros that an amount has not.
    let y = draft(&two.acme, "y").await;
    let id = store(&two.acme, y.id).await;
    let ten_percent = new.max_change(percent(10));
    let other = Variants::new().add("29", 1, "20").add("39", 1, "39");
    let edit = ExperimentEdit::new().variants(Currency::USD, other);
    two.acme.experiments().edit(y.id, y.revision, edit).await.unwrap();
    conflicts(recommendations.approve(id, &ten_percent).await, "max_change");
    let zeros = "UPDATE experiments SET variants = '[{\"name\": \"29\", \"weight\": 1, \"price\": 29.00000000000000000000000000000000}]' WHERE id = $1";
    two.owner.execute(zeros, &[&y.id.uuid()]).await.unwrap();
    recommendations.approve(id, &ten_percent).await.unwrap();

    // Neither bounds nor a draft make sense of another currency.
    let id = recommendations
        .store(&NewRecommendation::new(experiment, eur, 0.5, Objective::Profit))
        .await
        .unwrap()
        .id;
    let said = conflicts(approve(&two.acme, id).await, "currency");
    assert!(said.contains("EUR") && said.contains("USD"), "{said}");
    two.bystander_saw_nothing().await;
}

/// The price in force changes at any point of an approval: what is approved was within the bounds when it was.
#[tokio::test]
async fn bounds_hold_for_the_price_of_that_moment() {
    let two = two_tenants().await;
    let wire = Wire::before(&two.database.app_url()).await;
    let client =
        Client::builder().url(wire.url()).pool_size(1).statement_mode(StatementMode::Typed).build().unwrap();
    client.ready().await.unwrap();
    let tenant = client.tenant(two.id);
    let bounds = PriceBounds::new().max_change(percent(10));
    let mut seen = Vec::new();
    for n in 0.. {
        let draft = draft(&two.acme, &format!("x-{n}")).await;
        let id = store(&two.acme, draft.id).await;
        wire.hold(Hold::Request(n));
        let mut approve = Box::pin(tenant.recommendations().approve(id, &bounds));
        let held = tokio::select! {
            biased;
            done = &mut approve => { done.unwrap(); false }
            () = wire.held() => true,
        };
        if !held {
            break;
        }
        // From 29 to 20, of which 31.5 is far away.
        let cheaper = Variants::new().add("29", 1, 20).add("39", 1, 39);
        let edit = ExperimentEdit::new().variants(Currency::USD, cheaper);
        two.acme.experiments().edit(draft.id, draft.revision, edit).await.unwrap();
        wire.let_go();
        seen.push(match approve.await {
            Ok(_) => "approved",
            Err(error) => error.conflicting_fields()[0],
        });
        let is_approved =
            two.acme.recommendations().get(id).await.unwrap().unwrap().status == Status::Approved;
        assert_eq!(is_approved, seen.last() == Some(&"approved"));
    }
    // Before it was looked at, between that and the approval, and perhaps after it.
    assert!(seen[0] == "max_change" && seen.contains(&"experiment"), "{seen:?}");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn time_is_over_by_the_clock_of_the_database() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let recommendations = two.acme.recommendations();
    let now: DateTime<Utc> = two.owner.query_one("SELECT now()", &[]).await.unwrap().get(0);
    let soon = now + Duration::from_millis(2000);
    let mut ids = Vec::new();
    for n in 0..3 {
        let id = recommendations.store(&proposal(experiment).expires_at(soon)).await.unwrap().id;
        if n > 0 {
            approve(&two.acme, id).await.unwrap();
        }
        ids.push(id);
    }
    let forever = store(&two.acme, experiment).await;
    let later = recommendations
        .store(&proposal(experiment).expires_at(now + Duration::from_secs(9999)))
        .await
        .unwrap()
        .id;
    assert_eq!(recommendations.expire_due().await.unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    conflicts(approve(&two.acme, ids[0]).await, "expires_at");
    conflicts(recommendations.apply(ids[1], &follow_up()).await, "expires_at");
    recommendations.reject(ids[2], "too late").await.unwrap();
    // Each tenant's own.
    assert_eq!(two.globex.recommendations().expire_due().await.unwrap(), 0);
    assert_eq!(recommendations.expire_due().await.unwrap(), 2);
    assert_eq!(recommendations.expire_due().await.unwrap(), 0);
    for (id, status) in [
        (ids[0], Status::Expired),
        (ids[1], Status::Expired),
        (ids[2], Status::Rejected),
        (forever, Status::Proposed),
        (later, Status::Proposed),
    ] {
        assert_eq!(recommendations.get(id).await.unwrap().unwrap().status, status);
    }
    assert_eq!(two.count("experiments").await, 1);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn rejections_lists_and_what_is_no_input() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let other = draft(&two.acme, "y").await.id;
    let recommendations = two.acme.recommendations();
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(store(&two.acme, if n % 2 == 0 { experiment } else { other }).await);
    }
    for text in ["", " \n", "a\0b", &"x".repeat(1001)] {
        refused(recommendations.reject(ids[0], text).await, "reason");
    }
    let why = "é".repeat(1000);
    let rejected = two.client.tenant(two.id).with_actor(Actor::new("anna").unwrap());
    let rejected = rejected.recommendations().reject(ids[0], &why).await.unwrap();
    assert_eq!((rejected.rejection_reason, rejected.decided_by), (Some(why), Some("anna".to_owned())));
    let page = recommendations.list_by_status(Status::Proposed, 3, None).await.unwrap();
    assert_eq!(page.items.iter().map(|r| r.id).collect::<Vec<_>>(), ids[1..4]);
    let page = recommendations.list_by_status(Status::Proposed, 3, page.next).await.unwrap();
    assert_eq!((page.items.len(), page.items[0].id, page.next), (1, ids[4], None));
    assert_eq!(recommendations.list_by_status(Status::Rejected, 3, None).await.unwrap().items.len(), 1);
    refused(recommendations.list_by_status(Status::Applied, 0, None).await, "limit");

    for text in ["", "a\0b", &"x".repeat(201)] {
        refused(recommendations.store(&proposal(experiment).source(text)).await, "source");
        refused(recommendations.store(&proposal(experiment).model_version(text)).await, "model_version");
        refused(recommendations.store(&proposal(experiment).inputs_hash(text)).await, "inputs_hash");
    }
    let far = DateTime::<Utc>::MAX_UTC;
    refused(recommendations.store(&proposal(experiment).expires_at(far)).await, "expires_at");

    // Scores.
    let id = approved(&two.acme, experiment, "31.5").await;
    conflicts(recommendations.score(id, usd("1")).await, "status");
    recommendations.apply(id, &follow_up()).await.unwrap();
    refused(recommendations.score(id, Money::new("1", "EUR").unwrap()).await, "observed");
    refused(recommendations.score(id, Money::from_minor(i64::MAX, Currency::USD)).await, "observed");
    is_kind(two.globex.recommendations().score(id, usd("1")).await, ErrorKind::NotFound);
    assert_eq!(two.globex.recommendations().get(id).await.unwrap(), None);
    let silent = NewRecommendation::new(experiment, usd("30"), 0.5, Objective::Conversion);
    let silent = recommendations.store(&silent).await.unwrap().id;
    approve(&two.acme, silent).await.unwrap();
    recommendations.apply(silent, &follow_up()).await.unwrap();
    conflicts(recommendations.score(silent, usd("1")).await, "expected_revenue");
    for (expected, observed, deviation) in
        [("-100", "-150", Some("-0.5")), ("-100", "50", Some("1.5")), ("0", "5", None), ("3", "4", None)]
    {
        let new = proposal(experiment).expected_revenue(usd(expected));
        let id = recommendations.store(&new).await.unwrap().id;
        approve(&two.acme, id).await.unwrap();
        recommendations.apply(id, &follow_up()).await.unwrap();
        let scored = recommendations.score(id, usd(observed)).await.unwrap();
        if expected == "3" {
            let third = scored.deviation().unwrap() * Decimal::from(3) - Decimal::ONE;
            assert!(third.abs() < Decimal::new(1, 20), "{third}");
            continue;
        }
        assert_eq!(scored.deviation(), deviation.map(|d| d.parse().unwrap()), "{observed} of {expected}");
    }
    two.bystander_saw_nothing().await;
}
