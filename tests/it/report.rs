//! From the first price shown to the score of a recommendation.

use lastprice::chrono::{DateTime, TimeDelta, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::{
    AnalysisPlan, AssignOutcome, Check, ErrorKind, ExperimentId, FollowUp, NewConversion, Objective,
    PriceBounds, RecommendationStatus, Severity, Subject, TenantHandle, Verdict,
};

use crate::support_ledger::*;
use crate::support_repo::*;

/// With a salt that is the same in every run, since chance may look unlike itself.
async fn fixed(two: &TwoTenants, key: &str, plan: &AnalysisPlan) -> ExperimentId {
    let id = ExperimentId::new();
    let variants = r#"[{"name": "10", "weight": 1, "price": "10"}, {"name": "20", "weight": 1, "price": "20"},
                       {"name": "30", "weight": 1, "price": "30"}]"#;
    let sql = "INSERT INTO experiments (tenant_id, id, key, name, variants, salt, plan)
               VALUES ($1, $2, $3, 'An experiment', $4, 'a fixed salt', $5)";
    let variants: lastprice::serde_json::Value = lastprice::serde_json::from_str(variants).unwrap();
    let plan = lastprice::serde_json::to_value(plan).unwrap();
    two.owner.execute(sql, &[&two.id.uuid(), &id.uuid(), &key, &variants, &plan]).await.unwrap();
    two.acme.experiments().activate(id).await.unwrap().id
}

/// Shows users their prices, and sells to so many of 100 as `buys` says of a price.
async fn sell(
    tenant: &TenantHandle,
    id: ExperimentId,
    numbers: std::ops::Range<usize>,
    at: DateTime<Utc>,
    buys: impl Fn(i64) -> usize,
) {
    let users = users(numbers.clone());
    let mut sales = Vec::new();
    for (users, numbers) in users.chunks(500).zip(numbers.collect::<Vec<_>>().chunks(500)) {
        let subjects = users.iter().map(|user| Subject::new(user).shown_at(at));
        let outcomes = tenant.assignments().assign_many(id, subjects).await.unwrap();
        for ((user, n), outcome) in users.iter().zip(numbers).zip(outcomes) {
            let AssignOutcome::Assigned { quote, .. } = outcome else { panic!("{outcome:?}") };
            let price = quote.price.amount().trunc().mantissa() as i64;
            if n * 7919 % 100 < buys(price) {
                let k = key(&format!("{id} {n}"));
                let sale =
                    NewConversion::sale(id, user.clone(), quote.price, k).order(order(&format!("{id} {n}")));
                sales.push(sale.at(at + TimeDelta::hours(1)));
            }
        }
    }
    for sales in sales.chunks(500) {
        tenant.conversions().settle_many(sales).await.unwrap();
    }
}

fn demand(price: i64) -> usize {
    match price {
        0..=10 => 40,
        11..=20 => 28,
        _ => 14,
    }
}

#[tokio::test]
async fn from_a_price_that_is_shown_to_one_that_is_scored() {
    let two = two_tenants().await;
    let id = fixed(&two, "x", &AnalysisPlan::default()).await;
    // Who came today is judged in two weeks.
    sell(&two.acme, id, 0..30, Utc::now(), demand).await;
    let report = two.acme.metrics().report(id).await.unwrap();
    assert_eq!(report.findings[0].check, Check::Maturity, "{report}");
    assert_eq!(report.verdict, Verdict::Withheld { findings: 1 });

    sell(&two.acme, id, 30..6030, Utc::now() - TimeDelta::days(30), demand).await;
    let report = two.acme.metrics().report(id).await.unwrap();
    assert_eq!(report.verdict, Verdict::Better { variant: "20".to_owned(), others: vec![] }, "{report}");
    assert!(report.findings.is_empty(), "{report}");
    is_kind(two.globex.metrics().report(id).await, ErrorKind::NotFound);
    // Whoever folds or refreshes changes nothing of it.
    lastprice::Admin::connect(&two.database.owner_url()).await.unwrap().refresh_metrics().await.unwrap();
    let again = two.acme.metrics().report(id).await.unwrap();
    assert_eq!((&again.comparisons, &again.results.arms), (&report.comparisons, &report.results.arms));

    let bounds = PriceBounds::new().ceiling(usd("19.50"));
    let proposal = report.recommend(Objective::Revenue, &bounds).unwrap();
    let recommendations = two.acme.recommendations();
    let stored = recommendations.store(&proposal).await.unwrap();
    assert_eq!((stored.price, stored.confidence), (proposal.price, proposal.confidence));
    assert!(stored.price.amount() <= Decimal::new(195, 1) && stored.confidence > 0.95, "{stored:?}");
    assert_eq!(stored.source.as_deref(), Some("lastprice"));
    recommendations.approve(stored.id, &bounds).await.unwrap();
    let draft = recommendations.apply(stored.id, &FollowUp::new("x-2")).await.unwrap();
    let follow_up = two.acme.experiments().activate(draft.id).await.unwrap();
    assert_eq!(follow_up.variant("recommended").unwrap().price, stored.price.amount());

    let nobody = two.acme.metrics().report(follow_up.id).await.unwrap();
    assert_eq!(nobody.observed_revenue("recommended"), None);
    sell(&two.acme, follow_up.id, 7000..7400, Utc::now() - TimeDelta::days(20), demand).await;
    let report = two.acme.metrics().report(follow_up.id).await.unwrap();
    let observed = report.observed_revenue("recommended").unwrap();
    let scored = recommendations.score(stored.id, observed).await.unwrap();
    assert_eq!((scored.status, scored.observed_revenue), (RecommendationStatus::Applied, Some(observed)));
    let expected = stored.expected_revenue.unwrap().amount();
    assert_eq!(scored.deviation().unwrap(), (observed.amount() - expected) / expected);
    two.bystander_saw_nothing().await;
}

/// As the database sees it: a phase that began within the window, a loss of users, and a price that nobody was quoted.
#[tokio::test]
async fn what_is_unsound_is_found_where_it_is() {
    let two = two_tenants().await;
    let id = fixed(&two, "x", &AnalysisPlan::default().window_days(3)).await;
    let past = Utc::now() - TimeDelta::days(30);
    sell(&two.acme, id, 0..1500, past, demand).await;
    let blocking = async || -> Vec<Check> {
        let report = two.acme.metrics().report(id).await.unwrap();
        report.findings.iter().filter(|f| f.severity == Severity::Blocking).map(|f| f.check).collect()
    };
    assert_eq!(blocking().await, []);
    let few = two.acme.metrics().report(id).await.unwrap();
    let few: Vec<_> = few.findings.iter().map(|f| (f.check, f.severity)).collect();
    assert_eq!(few, [(Check::SampleSize, Severity::Warning)], "70 of 500 bought at 30");
    sell(&two.acme, id, 1500..3600, past, demand).await;
    assert!(two.acme.metrics().report(id).await.unwrap().findings.is_empty());

    for n in 0..40 {
        let wrong = NewConversion::sale(id, user(n), usd("7"), key(&format!("wrong {n}"))).at(past);
        settled(&two.acme, &wrong).await;
    }
    assert_eq!(blocking().await, [Check::QuoteMismatch]);

    // Somebody removes users of one variant, who did not buy.
    let sql = "DELETE FROM assignments a WHERE tenant_id = $1 AND experiment_id = $2 AND variant = '30' AND NOT EXISTS (
                 SELECT FROM conversions c WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.user_id = a.user_id)
               AND hashtext(user_id) % 4 = 0";
    two.owner.execute(sql, &[&two.id.uuid(), &id.uuid()]).await.unwrap();
    assert_eq!(blocking().await, [Check::SampleRatio, Check::QuoteMismatch]);

    let live = two.acme.experiments().get(id).await.unwrap().unwrap();
    let variants = lastprice::Variants::new().add("10", 1, 10).add("20", 4, 20).add("30", 1, 30);
    two.acme.experiments().new_phase(id, live.revision, lastprice::NewPhase::new(variants)).await.unwrap();
    assert_eq!(blocking().await, [Check::SampleRatio, Check::QuoteMismatch, Check::Phases]);
    two.bystander_saw_nothing().await;
}
