//! What went wrong with merged users once, each with the test that shows it.

use lastprice::{
    AssignmentReason, ConversionKind, ConversionOutcome, Currency, Experiment, ExperimentId, MergePolicy,
    NewConversion, NewExperiment, UserId, Variants, WebhookOutcome,
};

use crate::erasure::delivery;
use crate::identity::{assigned_before, buys, exact, id_of, of_variant, population};
use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_retention::{completed, with_history};

use MergePolicy::{Exclude, FirstQuoteWins};

/// Everybody gets `a`, at 29.
async fn everybody(two: &TwoTenants, k: &str) -> ExperimentId {
    let variants = Variants::new().add("a", 1, "29").add("b", 0, "39");
    let new = NewExperiment::new(k, k, Currency::USD, variants);
    let draft = two.acme.experiments().create(new).await.unwrap();
    two.acme.experiments().activate(draft.id).await.unwrap().id
}

fn sold(x: ExperimentId, user: &UserId, k: &str) -> NewConversion {
    NewConversion::sale(x, user.clone(), usd("29"), key(k)).order(order(k)).subscription(subscription(k))
}

async fn merged(two: &TwoTenants, anonymous: &UserId, known: &UserId) {
    two.acme.users().merge(anonymous, known, FirstQuoteWins).await.unwrap();
}

/// In experiments that neither was in, an old id is a user of its own. Its payments are the person's all the same.
#[tokio::test]
async fn a_payment_under_the_old_id_in_a_new_experiment_counts_once() {
    let two = two_tenants().await;
    let [cookie, phone, account] = ["cookie", "phone", "account"].map(id_of);
    merged(&two, &cookie, &account).await;
    merged(&two, &phone, &account).await;
    let y = everybody(&two, "y").await;
    two.acme.assignments().assign(y, &cookie).await.unwrap();
    let sale = sold(y, &cookie, "o1");
    assert_eq!(settled(&two.acme, &sale).await.user_id, cookie);
    for (n, user) in [&cookie, &account, &phone].into_iter().enumerate() {
        let body = format!(
            r#"{{"id":"e{n}","type":"subscription.created","data":{{"customer_id":"{user}","order_id":"o1","subscription_id":"o1",
                "amount":29,"metadata":{{"experiment_id":"{y}"}}}}}}"#
        );
        let outcome = two.acme.webhooks().receive(&delivery(&body)).await.unwrap();
        let is_same = matches!(outcome, WebhookOutcome::Processed(ConversionOutcome::Duplicate(_)));
        assert!(is_same, "{user}: {outcome:?}");
        // And by the key of the checkout.
        let again = two.acme.conversions().settle(&sold(y, user, "o1")).await.unwrap();
        assert!(matches!(again, ConversionOutcome::Duplicate(_)), "{user}: {again:?}");
    }
    let stranger = two.acme.conversions().settle(&sold(y, &id_of("stranger"), "o1")).await.unwrap();
    assert!(matches!(stranger, ConversionOutcome::Conflict { fields, .. } if fields == ["user_id"]));
    assert_eq!(net(&two, y, Currency::USD).await, usd("29"));
    exact(&two).await;
}

/// However many cookies an account has.
#[tokio::test]
async fn sales_of_a_hundred_and_one_cookies_are_known_again() {
    let two = two_tenants().await;
    let y = everybody(&two, "y").await;
    let mut sales = Vec::new();
    for n in 0..101 {
        let cookie = id_of(&format!("cookie-{n}"));
        two.acme.assignments().assign(y, &cookie).await.unwrap();
        sales.push(sold(y, &cookie, &n.to_string()));
        settled(&two.acme, sales.last().unwrap()).await;
        merged(&two, &cookie, &id_of("account")).await;
    }
    let again = two.acme.conversions().settle_many(&sales).await.unwrap();
    assert!(again.iter().all(|one| matches!(one, ConversionOutcome::Duplicate(_))), "{again:?}");
    exact(&two).await;
}

/// A phone that saw 19, and then a laptop that saw 39: the account is left out, by all of its ids, and all are shown one price.
#[tokio::test]
async fn a_third_id_changes_what_the_second_is_shown() {
    for (policy, laptop_first) in [(FirstQuoteWins, true), (FirstQuoteWins, false), (Exclude, true)] {
        let two = two_tenants().await;
        let x: Experiment = active(&two.acme, "x").await;
        let phone = of_variant(&two, &x, "phone", "19").await;
        let laptop = of_variant(&two, &x, "laptop", "39").await;
        let account = id_of("account");
        assigned_before(&two, x.id, &phone, 5).await;
        assigned_before(&two, x.id, &laptop, if laptop_first { 8 } else { 2 }).await;
        let _ = buys(&two, x.id, &phone, "before").await;
        merged(&two, &phone, &account).await;
        let merge = two.acme.users().merge(&laptop, &account, policy).await.unwrap();
        assert_eq!((&merge.crossovers, &merge.excluded), (&vec![x.id], &vec![x.id]));
        let [of_phone, of_laptop, of_account] = match (policy, laptop_first) {
            (Exclude, _) => ["19", "39", "19"],
            (_, true) => ["39"; 3],
            (_, false) => ["19"; 3],
        };
        for (user, price) in [(&phone, of_phone), (&laptop, of_laptop), (&account, of_account)] {
            let quote = two.acme.assignments().get(x.id, user).await.unwrap().unwrap();
            assert_eq!((quote.price, quote.reason), (usd(price), AssignmentReason::Merged), "{user}");
            let sale = NewConversion::sale(x.id, user.clone(), usd(price), key(user.as_str()));
            let entry = settled(&two.acme, &sale).await;
            assert_eq!((entry.user_id, entry.reason), (account.clone(), Some(AssignmentReason::Merged)));
            assert_eq!(entry.quote_mismatch, Some(false));
        }
        assert_eq!(population(&two, x.id).await.1, 0, "in no statistic");
        let results = two.acme.metrics().results(x.id).await.unwrap();
        assert_eq!(results.arms.iter().map(|arm| arm.counts.conversions).sum::<u64>(), 0);
        exact(&two).await;
    }
}

/// At one price: all ids are promised it as long as one of them was.
#[tokio::test]
async fn a_third_id_at_the_same_price_is_one_user_with_the_others() {
    let two = two_tenants().await;
    let y = everybody(&two, "y").await;
    let [phone, laptop, account] = ["phone", "laptop", "account"].map(id_of);
    assigned_before(&two, y, &phone, 5).await;
    assigned_before(&two, y, &laptop, 8).await;
    let until = "UPDATE assignments SET valid_until = now() + make_interval(days => CASE user_id WHEN 'laptop' THEN 9 ELSE 3 END)
                 WHERE tenant_id = $1";
    two.owner.execute(until, &[&two.id.uuid()]).await.unwrap();
    merged(&two, &phone, &account).await;
    merged(&two, &laptop, &account).await;
    let quotes = async |user| {
        let quote = two.acme.assignments().get(y, user).await.unwrap().unwrap();
        (quote.price, quote.reason, quote.assigned_at, quote.valid_until)
    };
    let of_account = quotes(&account).await;
    assert_eq!((quotes(&phone).await, quotes(&laptop).await), (of_account, of_account));
    assert_eq!(of_account.1, AssignmentReason::Randomised);
    assert!(of_account.3.unwrap() > lastprice::chrono::Utc::now() + lastprice::chrono::TimeDelta::days(8));
    settled(&two.acme, &sold(y, &phone, "sold")).await;
    assert_eq!(population(&two, y).await, (1, 1, usd("29")));
    exact(&two).await;
}

/// A sale under an id of a chain, while the chain gets longer; and under the known user's other id, while that one is left out.
#[tokio::test]
async fn a_sale_under_an_id_of_the_chain_at_the_same_moment() {
    for (anonymous, known, policy) in [("b", "a", FirstQuoteWins), ("a", "b", Exclude)] {
        let two = two_tenants().await;
        let y = everybody(&two, "y").await;
        for id in ["cookie", "a", "b"] {
            two.acme.assignments().assign(y, &id_of(id)).await.unwrap();
        }
        merged(&two, &id_of("cookie"), &id_of("b")).await;
        let open = two.acme.begin().await.unwrap();
        open.conversions().settle(&sold(y, &id_of("cookie"), "o")).await.unwrap().entry().unwrap().unwrap();
        let acme = two.client.tenant(two.id);
        let merge = tokio::spawn(async move {
            acme.users().merge(&id_of(anonymous), &id_of(known), policy).await.map(drop)
        });
        two.one_waits().await;
        open.commit().await.unwrap();
        merge.await.unwrap().unwrap();
        let entry = two.acme.conversions().by_key(&key("o")).await.unwrap().unwrap();
        let reason = if policy == Exclude { AssignmentReason::Merged } else { AssignmentReason::Randomised };
        assert_eq!((entry.user_id, entry.reason), (id_of(known), Some(reason)));
        exact(&two).await;
    }
}

/// What belongs to a sale is whoever the sale is of, though it is written at the moment in which that changes.
#[tokio::test]
async fn a_refund_and_a_renewal_at_the_same_moment() {
    for (kind, who) in [
        (ConversionKind::Refund, "cookie"),
        (ConversionKind::Renewal, "cookie"),
        (ConversionKind::Refund, "account"),
        (ConversionKind::Renewal, "erased"),
    ] {
        let two = two_tenants().await;
        let y = everybody(&two, "y").await;
        for id in ["cookie", "account", "erased"] {
            two.acme.assignments().assign(y, &id_of(id)).await.unwrap();
        }
        settled(&two.acme, &sold(y, &id_of(who), "o")).await;
        let open = two.acme.begin().await.unwrap();
        let later = match kind {
            ConversionKind::Refund => refund("o", "29", "later"),
            _ => renewal("o", "2026-12", "29", "later"),
        };
        open.conversions().settle(&later).await.unwrap().entry().unwrap().unwrap();
        let acme = two.client.tenant(two.id);
        let other = tokio::spawn(async move {
            match who {
                "erased" => acme.users().erase(&id_of("erased")).await.map(drop),
                _ => acme.users().merge(&id_of("cookie"), &id_of("account"), Exclude).await.map(drop),
            }
        });
        two.one_waits().await;
        open.commit().await.unwrap();
        other.await.unwrap().unwrap();
        let [sale, later] = ["o", "later"].map(key);
        let sale = two.acme.conversions().by_key(&sale).await.unwrap().unwrap();
        let later = two.acme.conversions().by_key(&later).await.unwrap().unwrap();
        assert_eq!((&later.user_id, later.reason), (&sale.user_id, sale.reason), "{kind:?} of {who}");
        match who {
            "erased" => assert!(sale.user_id.as_str().starts_with("erased-"), "{sale:?}"),
            _ => assert_eq!((sale.user_id, sale.reason), (id_of("account"), Some(AssignmentReason::Merged)),),
        }
        exact(&two).await;
    }
}

/// The archive begins while a merge is under way: the merge sees it, and leaves what is archived as it is.
#[tokio::test]
async fn an_archive_that_begins_at_the_same_moment() {
    let two = two_tenants().await;
    let old = with_history(&two, "old", 40).await;
    completed(&two, old, 100).await;
    let (a, b) = (id_of("user-5"), id_of("user-6"));
    merged(&two, &id_of("user-1"), &id_of("user-2")).await; // so that there are exceptions
    let state = async || {
        let sql =
            "SELECT string_agg((a.*)::text, ' ' ORDER BY user_id) FROM assignments a WHERE tenant_id = $1";
        two.owner.query_one(sql, &[&two.id.uuid()]).await.unwrap().get::<_, String>(0)
    };
    let before = state().await;
    // As the archive does it: the experiment's row, and the mark.
    let mut owner = two.database.connect_owner().await.unwrap();
    let archive = owner.transaction().await.unwrap();
    let params: [&(dyn lastprice::tokio_postgres::types::ToSql + Sync); 2] = [&two.id.uuid(), &old.uuid()];
    for sql in [
        "SELECT FROM experiments WHERE tenant_id = $1 AND id = $2 FOR NO KEY UPDATE",
        "INSERT INTO archived_experiments (tenant_id, experiment_id, views, viewers, suspects, views_of_suspects) VALUES ($1, $2, 0, 0, 0, 0)",
    ] {
        archive.execute(sql, &params).await.unwrap();
    }
    let acme = two.client.tenant(two.id);
    let merge = tokio::spawn(async move { acme.users().merge(&a, &b, Exclude).await });
    two.one_waits().await;
    archive.commit().await.unwrap();
    let merge = merge.await.unwrap().unwrap();
    assert_eq!((merge.shared, merge.taken_over, merge.entries), (0, 0, 0));
    assert_eq!(state().await, before);
    exact(&two).await;
}
