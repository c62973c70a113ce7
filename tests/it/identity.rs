//! Two ids turn out to be one person: one user, one price, and every payment once.

use lastprice::chrono::{TimeDelta, Utc};
use lastprice::{
    AssignmentReason, ConversionOutcome, Currency, Decision, ErrorKind, Experiment, ExperimentId,
    MergePolicy, NewConversion, NewView, UserId, ViewOutcome,
};

use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_sql::assert_exact;

use MergePolicy::{Exclude, FirstQuoteWins};

pub(crate) fn id_of(name: &str) -> UserId {
    UserId::new(name).unwrap()
}

/// A user `prefix-n` who gets this variant.
pub(crate) async fn of_variant(two: &TwoTenants, x: &Experiment, prefix: &str, variant: &str) -> UserId {
    let assigner = two.client.assigner(two.id).await.unwrap();
    let gets = |user: &UserId| assigner.assign(&x.key, user).map(|d: Decision<'_>| d.variant() == variant);
    (0..1000).map(|n| id_of(&format!("{prefix}-{n}"))).find(|user| gets(user) == Some(true)).unwrap()
}

pub(crate) async fn assigned_before(two: &TwoTenants, x: ExperimentId, user: &UserId, days: i64) {
    two.acme.assignments().assign(x, user).await.unwrap();
    let sql = "UPDATE assignments SET assigned_at = $4 WHERE tenant_id = $1 AND experiment_id = $2 AND user_id = $3";
    let time = Utc::now() - TimeDelta::days(days);
    two.owner.execute(sql, &[&two.id.uuid(), &x.uuid(), &user.as_str(), &time]).await.unwrap();
}

pub(crate) async fn buys(two: &TwoTenants, x: ExperimentId, user: &UserId, k: &str) -> NewConversion {
    let price = two.acme.assignments().get(x, user).await.unwrap().unwrap().price;
    let sale =
        NewConversion::sale(x, user.clone(), price, key(k)).order(order(k)).subscription(subscription(k));
    settled(&two.acme, &sale).await;
    sale
}

/// Users who count, and how many of them are randomised; what they bought.
pub(crate) async fn population(two: &TwoTenants, x: ExperimentId) -> (u64, u64, lastprice::Money) {
    let results = two.acme.metrics().results(x).await.unwrap();
    let randomised = results.arms.iter().flat_map(|arm| &arm.days).map(|day| day.cohort.users()).sum();
    let all = two.acme.metrics().experiment(x).await.unwrap();
    (all.assignments, randomised, all.revenue(Currency::USD))
}

pub(crate) async fn exact(two: &TwoTenants) {
    assert_exact(&two.database.connect_superuser().await.unwrap(), "after a merge").await;
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_quote_of_one_is_the_quote_of_both() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let y = active(&two.acme, "y").await;
    let cookie = id_of("cookie");
    let account = of_variant(&two, &x, "account", "39").await;
    assigned_before(&two, x.id, &cookie, 40).await;
    assigned_before(&two, y.id, &account, 20).await;
    let _ = two.acme.views().record(&NewView::new(x.id, cookie.clone())).await.unwrap();
    let sale = buys(&two, x.id, &cookie, "first").await;
    let quoted = two.acme.assignments().get(x.id, &cookie).await.unwrap().unwrap();
    let before = (population(&two, x.id).await, population(&two, y.id).await);

    let merge = two.acme.users().merge(&cookie, &account, FirstQuoteWins).await.unwrap();
    assert_eq!((merge.taken_over, merge.shared, merge.entries), (1, 0, 1));
    assert!(merge.crossovers.is_empty() && merge.excluded.is_empty());
    assert_eq!((population(&two, x.id).await, population(&two, y.id).await), before, "one user, as before");
    for user in [&cookie, &account] {
        for x in [x.id, y.id] {
            let outcome = two.acme.assignments().assign(x, user).await.unwrap();
            assert!(!outcome.is_new() && outcome.quote().unwrap().reason == AssignmentReason::Randomised);
        }
        let outcome = two.acme.assignments().assign(x.id, user).await.unwrap();
        assert_eq!((outcome.variant(), outcome.price()), (quoted.variant.as_str(), quoted.price));
        assert_eq!(outcome.quote().unwrap().assigned_at, quoted.assigned_at);
    }
    // What comes in late under the old id is the user's.
    let late = NewConversion::sale(x.id, cookie.clone(), quoted.price, key("late"));
    assert_eq!(settled(&two.acme, &late).await.user_id, account);
    assert_eq!(settled(&two.acme, &refund("first", "1", "back")).await.user_id, account);
    let view = NewView::new(x.id, cookie.clone());
    assert_eq!(two.acme.views().record_many(&[view.clone(), view]).await.unwrap()[0], ViewOutcome::Recorded);
    let entries = two.acme.conversions().list_by_user(&account, 10, None).await.unwrap().items;
    assert_eq!(entries.len(), 3);
    assert!(entries.iter().all(|e| e.variant == quoted.variant));
    // Reported again by the id of then, it is the same; other content is not.
    for again in [&sale, &late] {
        let again = two.acme.conversions().settle(again).await.unwrap();
        assert!(matches!(again, ConversionOutcome::Duplicate(_)), "{again:?}");
    }
    let stranger = NewConversion::sale(x.id, id_of("stranger"), quoted.price, key("late"));
    let conflict = two.acme.conversions().settle(&stranger).await.unwrap();
    assert!(matches!(conflict, ConversionOutcome::Conflict { fields, .. } if fields == ["user_id"]));
    assert_eq!(population(&two, x.id).await.1, 1);
    exact(&two).await;
}

#[tokio::test]
async fn who_saw_one_price_by_two_ids_is_one_user_from_the_first_on() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let cookie = of_variant(&two, &x, "cookie", "29").await;
    let account = of_variant(&two, &x, "account", "29").await;
    assigned_before(&two, x.id, &cookie, 10).await;
    assigned_before(&two, x.id, &account, 5).await;
    let _ = buys(&two, x.id, &cookie, "one").await;
    let _ = buys(&two, x.id, &account, "other").await;
    assert_eq!(population(&two, x.id).await, (2, 2, usd("58")));
    let merge = two.acme.users().merge(&cookie, &account, FirstQuoteWins).await.unwrap();
    assert_eq!((merge.taken_over, merge.shared, merge.entries), (0, 1, 1));
    assert!(merge.crossovers.is_empty() && merge.excluded.is_empty());
    assert_eq!(population(&two, x.id).await, (1, 1, usd("58")));
    let results = two.acme.metrics().results(x.id).await.unwrap();
    let arm = results.arms.iter().find(|arm| arm.variant == "29").unwrap();
    let [day] = arm.days.as_slice() else { panic!("{:?}", arm.days) };
    let first = (Utc::now() - TimeDelta::days(10)).date_naive();
    assert_eq!((day.day, day.cohort.buyers, day.cohort.sales), (first, 1, 2), "a window from the first on");
    assert_eq!((results.crossovers, results.others.len()), (0, 0));
    exact(&two).await;
}

#[tokio::test]
async fn who_saw_two_prices_is_reported_and_in_no_statistic() {
    for policy in [FirstQuoteWins, Exclude] {
        for cookie_first in [true, false] {
            let two = two_tenants().await;
            let x = active(&two.acme, "x").await;
            let cookie = of_variant(&two, &x, "cookie", "19").await;
            let account = of_variant(&two, &x, "account", "39").await;
            assigned_before(&two, x.id, &cookie, if cookie_first { 5 } else { 2 }).await;
            assigned_before(&two, x.id, &account, 3).await;
            assigned_before(&two, x.id, &id_of("bystander"), 3).await;
            let _ = buys(&two, x.id, &cookie, "one").await;
            let _ = buys(&two, x.id, &account, "other").await;
            let revenue = net(&two, x.id, Currency::USD).await;
            let merge = two.acme.users().merge(&cookie, &account, policy).await.unwrap();
            assert_eq!((merge.shared, &merge.crossovers, &merge.excluded), (1, &vec![x.id], &vec![x.id]));
            assert_eq!(population(&two, x.id).await, (2, 1, revenue), "money is where it was");
            let prices = match (policy, cookie_first) {
                (FirstQuoteWins, true) => ["19", "19"],
                (FirstQuoteWins, false) => ["39", "39"],
                _ => ["19", "39"],
            };
            for (user, price) in [&cookie, &account].into_iter().zip(prices) {
                let quote = two.acme.assignments().get(x.id, user).await.unwrap().unwrap();
                assert_eq!((quote.price, quote.reason), (usd(price), AssignmentReason::Merged));
            }
            let results = two.acme.metrics().results(x.id).await.unwrap();
            assert_eq!(results.crossovers, 0, "they are left out");
            let merged = &results.others["merged"];
            assert_eq!(
                (merged.assignments, merged.conversions, merged.revenue(Currency::USD)),
                (1, 2, revenue)
            );
            // And so is what comes later.
            settled(&two.acme, &renewal("one", "2026-12", "19", "later")).await;
            let late = two.acme.assignments().get(x.id, &cookie).await.unwrap().unwrap().price;
            settled(&two.acme, &NewConversion::sale(x.id, cookie.clone(), late, key("late"))).await;
            let results = two.acme.metrics().results(x.id).await.unwrap();
            let merged = &results.others["merged"];
            assert_eq!((merged.conversions, merged.renewals), (3, 1));
            assert_eq!(results.arms.iter().map(|arm| arm.counts.conversions).sum::<u64>(), 0);
            exact(&two).await;
        }
    }
}

/// By the policy, even if the two agree.
#[tokio::test]
async fn excluded_though_the_quotes_agree() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let cookie = of_variant(&two, &x, "cookie", "29").await;
    let account = of_variant(&two, &x, "account", "29").await;
    let third = of_variant(&two, &x, "third", "29").await;
    for user in [&cookie, &account, &third] {
        two.acme.assignments().assign(x.id, user).await.unwrap();
    }
    let merge = two.acme.users().merge(&cookie, &account, Exclude).await.unwrap();
    assert_eq!((merge.crossovers.len(), merge.excluded.as_slice()), (0, [x.id].as_slice()));
    // For good: whoever is merged with them is left out as well.
    let merge = two.acme.users().merge(&account, &third, FirstQuoteWins).await.unwrap();
    assert_eq!((merge.crossovers.len(), merge.excluded.as_slice()), (0, [x.id].as_slice()));
    assert_eq!(population(&two, x.id).await, (1, 0, usd("0")));
    exact(&two).await;
}

#[tokio::test]
async fn again_in_chains_and_in_circles() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let y = active(&two.acme, "y").await;
    let [a, b, c, d] = ["a", "b", "c", "d"].map(id_of);
    let users = two.acme.users();
    refused(users.merge(&a, &a, Exclude).await, "known");
    two.acme.assignments().assign(x.id, &a).await.unwrap();
    let quoted = two.acme.assignments().assign(x.id, &a).await.unwrap().price();
    let _ = buys(&two, x.id, &a, "of a").await;
    let first = users.merge(&a, &b, FirstQuoteWins).await.unwrap();
    assert_eq!(users.merge(&a, &b, FirstQuoteWins).await.unwrap(), first);
    assert_eq!(users.merged(&a).await.unwrap(), Some(first.clone()));
    assert_eq!(users.merged(&b).await.unwrap(), None);

    let conflict = async |from: &UserId, to: &UserId, policy| {
        let error = is_kind(users.merge(from, to, policy).await, ErrorKind::Conflict);
        (error.conflicting_fields().to_vec(), error.to_string())
    };
    assert_eq!(conflict(&a, &b, Exclude).await.0, ["policy"]);
    assert_eq!(conflict(&a, &c, FirstQuoteWins).await.0, ["known"]);
    assert_eq!(conflict(&b, &a, FirstQuoteWins).await.0, ["known"]);

    // b is c: so is a. And d, who is said to be a, is c.
    users.merge(&b, &c, FirstQuoteWins).await.unwrap();
    assert_eq!(users.merged(&a).await.unwrap().unwrap().known, c);
    assert_eq!(users.merge(&a, &b, FirstQuoteWins).await.unwrap().known, c);
    assert_eq!(users.merge(&a, &c, FirstQuoteWins).await.unwrap().known, c);
    assert_eq!(conflict(&c, &a, FirstQuoteWins).await.0, ["known"]);
    let last = users.merge(&d, &a, FirstQuoteWins).await.unwrap();
    assert_eq!((last.known, last.taken_over), (c.clone(), 0));
    for (n, user) in [&a, &b, &c, &d].into_iter().enumerate() {
        assert_eq!(two.acme.assignments().assign(x.id, user).await.unwrap().price(), quoted);
        let sale = NewConversion::sale(x.id, user.clone(), quoted, key(&format!("late {n}")));
        assert_eq!(settled(&two.acme, &sale).await.user_id, c);
    }
    assert_eq!(population(&two, x.id).await.0, 1);
    assert_eq!(two.acme.conversions().list_by_user(&c, 10, None).await.unwrap().items.len(), 5);
    // In another experiment they were nobody: whoever is asked for counts. Merged once more, they are one there, too.
    two.acme.assignments().assign(y.id, &a).await.unwrap();
    assert_eq!(users.merge(&a, &c, FirstQuoteWins).await.unwrap().taken_over, first.taken_over + 1);
    assert_eq!(population(&two, y.id).await.0, 1);
    let all = users.merges(2, None).await.unwrap();
    let rest = users.merges(2, all.next).await.unwrap();
    let of = |page: &[lastprice::UserMerge]| page.iter().map(|m| m.anonymous.clone()).collect::<Vec<_>>();
    assert_eq!((of(&all.items), of(&rest.items)), (vec![a, b], vec![d]));
    let nowhere = two.client.tenant(lastprice::TenantId::new());
    is_kind(nowhere.users().merge(&c, &id_of("e"), Exclude).await, ErrorKind::NotFound);
    assert_eq!(two.globex.users().merges(10, None).await.unwrap().items, []);
    exact(&two).await;
}

#[tokio::test]
async fn an_assigner_is_not_certain_where_users_were_merged() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let _y = active(&two.acme, "y").await;
    let cookie = of_variant(&two, &x, "cookie", "19").await;
    let account = of_variant(&two, &x, "account", "39").await;
    let (mine, theirs) =
        (two.client.assigner(two.id).await.unwrap(), two.client.assigner(two.other_id).await.unwrap());
    two.acme.assignments().assign(x.id, &cookie).await.unwrap();
    assert!(mine.assign("x", &account).unwrap().is_certain());
    let before = mine.version();
    two.acme.users().merge(&cookie, &account, FirstQuoteWins).await.unwrap();
    assert_ne!(mine.confirm().await.unwrap(), before);
    assert!(!mine.assign("x", &account).unwrap().is_certain());
    assert!(mine.assign("y", &account).unwrap().is_certain());
    theirs.confirm().await.unwrap();
    assert!(theirs.assign("pro-plan", &account).unwrap().is_certain());
    for user in [&cookie, &account] {
        assert_eq!(mine.quote("x", user).await.unwrap().price(), usd("19"));
    }
    exact(&two).await;
}

/// The same login twice, others of the same person, and sales meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once() {
    let two = two_tenants().await;
    let variants = lastprice::Variants::new().add("a", 1, "29").add("b", 0, "39");
    let x = lastprice::NewExperiment::new("x", "Everybody gets a", Currency::USD, variants);
    let x = two.acme.experiments().create(x).await.unwrap().id;
    two.acme.experiments().activate(x).await.unwrap();
    let y = active(&two.acme, "y").await.id;
    let cookies: Vec<UserId> = (0..8).map(|n| id_of(&format!("cookie-{n}"))).collect();
    let account = id_of("account");
    for cookie in &cookies {
        for x in [x, y] {
            two.acme.assignments().assign(x, cookie).await.unwrap();
        }
    }
    let merging = cookies.iter().chain(&cookies).map(async |cookie| {
        two.client.tenant(two.id).users().merge(cookie, &account, FirstQuoteWins).await.unwrap()
    });
    let buying = cookies.iter().enumerate().map(async |(n, cookie)| {
        for sale in 0..5 {
            let sale = NewConversion::sale(x, cookie.clone(), usd("29"), key(&format!("{n} {sale}")));
            settled(&two.client.tenant(two.id), &sale).await;
        }
    });
    let (merges, _) = futures_util::future::join(
        futures_util::future::join_all(merging),
        futures_util::future::join_all(buying),
    )
    .await;
    assert_eq!(merges.len(), 16);
    // What was under way at that moment is taken over by the next call.
    for cookie in &cookies {
        two.acme.users().merge(cookie, &account, FirstQuoteWins).await.unwrap();
    }
    assert_eq!(two.acme.conversions().list_by_user(&account, 100, None).await.unwrap().items.len(), 40);
    assert_eq!(population(&two, x).await, (1, 1, usd("1160")));
    assert_eq!(population(&two, y).await.0, 1);
    exact(&two).await;
}

/// In the host's transaction, of an experiment that is over, by ids that another tenant has as well; what is refused leaves the
/// transaction usable.
#[tokio::test]
async fn within_a_transaction_of_the_hosts() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let (cookie, account) = (user(0), user(1)); // Globex's have quotes, and one has bought
    let quoted = two.acme.assignments().assign(x.id, &cookie).await.unwrap().price();
    two.acme.experiments().complete(x.id, None).await.unwrap();
    let mut host = crate::support_sql::connect(&two.database.app_url()).await;
    for commits in [false, true] {
        let transaction = host.transaction().await.unwrap();
        let scope = two.client.within(&transaction, two.id);
        scope.users().merge(&cookie, &account, FirstQuoteWins).await.unwrap();
        is_kind(scope.users().merge(&cookie, &account, Exclude).await, ErrorKind::Conflict);
        is_kind(scope.users().merge(&account, &cookie, Exclude).await, ErrorKind::Conflict);
        let outcome = scope.assignments().assign(x.id, &account).await.unwrap();
        assert_eq!((outcome.price(), outcome.is_new()), (quoted, false));
        drop(scope);
        if commits {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
            assert_eq!(two.acme.users().merged(&cookie).await.unwrap(), None);
        }
    }
    let outcome = two.acme.assignments().assign(x.id, &account).await.unwrap();
    assert_eq!(outcome.quote().unwrap().price, quoted);
    assert_eq!(two.globex.users().merged(&cookie).await.unwrap(), None);
    exact(&two).await;
}

/// Between the authorisation and the webhook the customer logs in: it is one payment.
#[tokio::test]
async fn a_webhook_of_the_old_id_is_the_same_payment() {
    let two = two_tenants().await;
    let x = active(&two.acme, "x").await;
    let (cookie, account) = (id_of("cookie"), id_of("account"));
    two.acme.assignments().assign(x.id, &cookie).await.unwrap();
    let _ = buys(&two, x.id, &cookie, "o1").await;
    two.acme.users().merge(&cookie, &account, FirstQuoteWins).await.unwrap();
    let paid = net(&two, x.id, Currency::USD).await;
    let amount = paid.amount();
    for (n, user) in [&cookie, &account].into_iter().enumerate() {
        let body = format!(
            r#"{{"id":"e{n}","type":"subscription.created","data":{{"customer_id":"{user}","order_id":"o1","subscription_id":"o1",
                "amount":"{amount}","metadata":{{"experiment_id":"{}"}}}}}}"#,
            x.id
        );
        let outcome = two.acme.webhooks().receive(&crate::erasure::delivery(&body)).await.unwrap();
        let lastprice::WebhookOutcome::Processed(ConversionOutcome::Duplicate(entry)) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(entry.user_id, account);
    }
    assert_eq!(net(&two, x.id, Currency::USD).await, paid);
    exact(&two).await;
}
