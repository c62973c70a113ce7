//! What went wrong with merged users once, each with the test that shows it.

use lastprice::{
    ConversionOutcome, Currency, ExperimentId, MergePolicy, NewConversion, NewExperiment, UserId, Variants,
    WebhookOutcome,
};

use crate::erasure::delivery;
use crate::identity::{exact, id_of};
use crate::support_ledger::*;
use crate::support_repo::*;

use MergePolicy::FirstQuoteWins;

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
