//! A user is forgotten: nowhere is the id any more, and every number is as it was.

use hmac::{Hmac, KeyInit, Mac};
use lastprice::chrono::Utc;
use lastprice::secrecy::SecretString;
use lastprice::serde_json::json;
use lastprice::webhook::{Delivery, Verifier};
use lastprice::{
    Actor, ConversionOutcome, ErrorKind, ExperimentId, MergePolicy, NewConversion, NewView, Results,
    TenantHandle, UserId, ViewOutcome, WebhookOutcome, WebhookStatus,
};

use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_sql::assert_exact;

const ANNA: &str = "anna@example.com";

fn anna() -> UserId {
    UserId::new(ANNA).unwrap()
}

/// Of a sender who signs the body only.
pub(crate) fn delivery(body: &str) -> Delivery {
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(b"a secret").unwrap();
    mac.update(body.as_bytes());
    let signature: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let verifier = Verifier::new([SecretString::from("a secret")]).unwrap();
    verifier.sha256(&format!("sha256={signature}"), body.as_bytes(), Utc::now()).unwrap()
}

fn sold(event: &str, user: &str, experiment: ExperimentId, order: &str) -> String {
    format!(
        r#"{{"id":"{event}","type":"subscription.created","data":{{"customer_id":"{user}","subscription_id":"s-{order}","order_id":"{order}","amount":"29.00",
            "metadata":{{"experiment_id":"{experiment}","{user}":1}}}}}}"#
    )
}

async fn receive(tenant: &TenantHandle, body: &str) -> WebhookOutcome {
    tenant.webhooks().receive(&delivery(body)).await.unwrap()
}

/// What is left of a body.
async fn left_of(two: &TwoTenants, body: &str) -> String {
    let sql = "SELECT convert_from(body, 'UTF8') FROM webhook_events
               WHERE tenant_id = $1 AND body_hash = sha256(convert_to($2, 'UTF8'))";
    two.owner.query_one(sql, &[&two.id.uuid(), &body]).await.unwrap().get(0)
}

/// In how many rows of a tenant, of whatever table, a text is.
async fn rows_with(two: &TwoTenants, tenant: lastprice::TenantId, text: &str) -> Vec<String> {
    let tables = "SELECT c.relname::text FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                  WHERE a.attname = 'tenant_id' AND c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace ORDER BY 1";
    let mut found = Vec::new();
    for table in two.owner.query(tables, &[]).await.unwrap() {
        let table: String = table.get(0);
        let row = match table.as_str() {
            "webhook_events" => "x::text || encode(body, 'escape')",
            _ => "x::text",
        };
        let sql =
            format!("SELECT count(*) FROM {table} x WHERE tenant_id = $1 AND position($2 IN {row}) > 0");
        let rows: i64 = two.owner.query_one(&sql, &[&tenant.uuid(), &text]).await.unwrap().get(0);
        if rows > 0 {
            found.push(format!("{table} {rows}"));
        }
    }
    found
}

/// All that is counted and computed, but for when.
async fn numbers(two: &TwoTenants, id: ExperimentId) -> (Results, String) {
    let mut results = two.acme.metrics().results(id).await.unwrap();
    results.as_of = Default::default();
    let sql = "SELECT string_agg(s, E'\\n' ORDER BY s) FROM (
                 SELECT concat_ws(' ', experiment_id, variant, phase, reason, kind, currency, count(*), count(DISTINCT user_id), sum(revenue)) s
                 FROM conversions WHERE tenant_id = $1 GROUP BY experiment_id, variant, phase, reason, kind, currency
                 UNION ALL
                 SELECT concat_ws(' ', 'views', n, count(*)) FROM (
                   SELECT count(*) n FROM views WHERE tenant_id = $1 GROUP BY user_id) v GROUP BY n) x";
    (results, two.owner.query_one(sql, &[&two.id.uuid()]).await.unwrap().get(0))
}

/// Anna has something of everything, in either tenant, among others.
async fn something_of_everything(tenant: &TenantHandle, id: ExperimentId) {
    let mut people = users(100..120);
    people.push(anna());
    for (n, user) in people.iter().enumerate() {
        tenant.assignments().assign(id, user).await.unwrap();
        for _ in 0..=n % 3 {
            let view = NewView::new(id, user.clone()).metadata(json!({ "who": user.as_str() }));
            assert_eq!(tenant.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
        }
        let quoted = tenant.assignments().get(id, user).await.unwrap().unwrap().price;
        let sale = NewConversion::sale(id, user.clone(), quoted, key(&format!("sale-{n}")));
        let sale = sale.order(order(&format!("order-{n}"))).subscription(subscription(&format!("sub-{n}")));
        settled(tenant, &sale.metadata(json!({ "mail": user.as_str() }))).await;
    }
    settled(tenant, &refund("order-20", "4.05", "refund-of-anna")).await;
    let outside = NewConversion::sale(id, anna(), usd("29"), key(&format!("{ANNA}: by hand")));
    let _ = tenant.conversions().settle(&outside).await.unwrap();
    tenant.experiments().force(id, &anna(), Some("29")).await.unwrap();
    tenant.experiments().force(id, &user(101), Some("29")).await.unwrap();
}

#[tokio::test]
async fn nothing_has_the_id_and_no_number_changes() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let theirs = active(&two.globex, "x").await.id;
    something_of_everything(&two.acme, id).await;
    something_of_everything(&two.globex, theirs).await;
    // As a hand would write it: it says whose it is before there is a sale.
    let waiting = "INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry)
                   SELECT $1, 'w', gen_random_uuid(), 'refund', 'o/none', jsonb_build_object('user_id', $2::text, 'metadata', '{\"a\": 1}'::jsonb)";
    two.owner.execute(waiting, &[&two.id.uuid(), &ANNA]).await.unwrap();
    let processed = receive(&two.acme, &sold("e1", ANNA, id, "order-by-webhook")).await;
    assert!(matches!(processed, WebhookOutcome::Processed(_)), "{processed:?}");
    two.acme.metrics().fold().await.unwrap(); // half of it is counted as totals
    let view = NewView::new(id, anna());
    assert_eq!(two.acme.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
    let (before, theirs_before) = (numbers(&two, id).await, rows_with(&two, two.other_id, ANNA).await);
    assert!(rows_with(&two, two.id, ANNA).await.len() >= 6);

    let by = two.client.tenant(two.id).with_actor(Actor::new("dpo").unwrap());
    let erasure = by.users().erase(&anna()).await.unwrap().unwrap();
    let counts = erasure.counts;
    assert_eq!((counts.quotes, counts.views, counts.entries, counts.naming), (1, 4, 4, 1));
    assert_eq!((counts.waiting, counts.webhooks, counts.pending_webhooks), (1, 1, 0));
    assert_eq!((counts.forced, counts.merges, erasure.erased_by.as_deref()), (1, 0, Some("dpo")));

    assert_eq!(rows_with(&two, two.id, ANNA).await, ["conversions 1"], "an idempotency key of the host's");
    let superuser = two.database.connect_superuser().await.unwrap();
    assert_exact(&superuser, "after an erasure").await;
    assert_eq!(numbers(&two, id).await, before);
    two.acme.metrics().fold().await.unwrap();
    assert_eq!(numbers(&two, id).await, before);
    // One pseudonym in all tables, which has all of hers.
    let hers = erasure.pseudonym.clone();
    assert_eq!(two.acme.assignments().list_by_user(&hers, 10, None).await.unwrap().items.len(), 1);
    assert_eq!(two.acme.conversions().list_by_user(&hers, 10, None).await.unwrap().items.len(), 4);
    assert!(two.acme.experiments().get(id).await.unwrap().unwrap().forced.contains_key("user-101"));
    // Others are as they were, here and there.
    assert!(!rows_with(&two, two.id, "user-105").await.is_empty());
    assert_eq!(rows_with(&two, two.other_id, ANNA).await, theirs_before);

    // Again: there is nobody any more. And whoever comes by that name is new.
    assert_eq!(two.acme.users().erase(&anna()).await.unwrap(), None);
    assert_eq!(two.acme.users().erasures(10, None).await.unwrap().items, [erasure]);
    assert_eq!(two.globex.users().erasures(10, None).await.unwrap().items, []);
    settled(
        &two.acme,
        &renewal("sub-20", "2026-12", before.0.arms[0].price.to_string().split(' ').next().unwrap(), "late"),
    )
    .await;
    let late = two.acme.conversions().by_key(&key("late")).await.unwrap().unwrap();
    assert_eq!(late.user_id, hers, "what belongs to her orders stays with them");
    assert!(two.acme.assignments().assign(id, &anna()).await.unwrap().is_new());
}

#[tokio::test]
async fn what_is_reported_again_counts_once() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    two.acme.assignments().assign(id, &anna()).await.unwrap();
    let sale = NewConversion::sale(id, anna(), usd("29"), key("charge")).order(order("o"));
    settled(&two.acme, &sale).await;
    let body = sold("e1", ANNA, id, "o2");
    let _ = receive(&two.acme, &body).await;
    two.acme.users().erase(&anna()).await.unwrap().unwrap();
    let again = two.acme.conversions().settle(&sale).await.unwrap();
    assert!(matches!(again, ConversionOutcome::Duplicate(_)), "{again:?}");
    assert_eq!(receive(&two.acme, &body).await, WebhookOutcome::Duplicate(WebhookStatus::Processed));
    // By another delivery, without a key that it would be known by.
    for order in ["o", "o2"] {
        let other = receive(&two.acme, &sold(&format!("e-{order}"), ANNA, id, order)).await;
        assert!(matches!(other, WebhookOutcome::Processed(ConversionOutcome::Duplicate(_))), "{other:?}");
    }
    assert_eq!(net(&two, id, lastprice::Currency::USD).await, usd("58"));
    let conflict = two.acme.conversions().settle(&sale.tax(usd("1"))).await.unwrap();
    assert!(matches!(conflict, ConversionOutcome::Conflict { fields, .. } if fields == ["tax"]));
    two.bystander_saw_nothing().await;
}

/// Which bodies name somebody, and what is left of them.
#[tokio::test]
async fn bodies_of_webhooks() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let bodies = [
        (r#"{"id":"plain","type":"x","data":{"who":"u\"1"}}"#, false),
        (r#"{"id":"escaped","type":"x","data":[1,{"deep":["\u0075\"1"]}]}"#, false),
        (r#"{"id":"member","type":"x","data":{"u\"1":"said"}}"#, false),
        (r#"{"id":"none","type":"x","data":{"who":"u\"12","mu\"1":"said u\"1"}}"#, true),
        (r#"{"id":"slash","type":"x","data":"\\"}"#, true),
        (r#"{"id":"nul","type":"x","data":"\u0000"}"#, true),
    ];
    for (body, _) in bodies {
        assert_eq!(receive(&two.acme, body).await, WebhookOutcome::Ignored);
    }
    // Not JSON: it fails, and nobody knows what it is.
    let raw = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash, status, processed_at)
               SELECT $1, i, gen_random_uuid(), b, sha256(b), 'failed', now()
               FROM (VALUES ('form', 'user=u\"1&x=1'::bytea), ('bytes', '\\xff5c')) v (i, b)";
    two.owner.execute(raw, &[&two.id.uuid()]).await.unwrap();
    // Still to be processed: there is no such experiment yet.
    let missing = ExperimentId::new();
    let pending = sold("later", r#"u\"1"#, missing, "o");
    assert!(matches!(receive(&two.acme, &pending).await, WebhookOutcome::Pending { .. }));
    let him = UserId::new("u\"1").unwrap();
    let erasure = two.acme.users().erase(&him).await.unwrap().unwrap();
    assert_eq!((erasure.counts.webhooks, erasure.counts.pending_webhooks, erasure.counts.naming), (3, 1, 3));
    for (body, is_left) in bodies {
        assert_eq!(left_of(&two, body).await, if is_left { body } else { "" });
    }
    assert_eq!(left_of(&two, "user=u\"1&x=1").await, "user=u\"1&x=1");
    let body = left_of(&two, &pending).await;
    assert!(body.contains(&format!(r#""customer_id": "{}""#, erasure.pseudonym)), "{body}");
    assert!(body.contains(r#""u\"1": 1"#), "names of members stay: {body}");

    // It becomes the pseudonym's, and goes with that.
    let new = new_experiment("later").id(missing);
    let draft = two.acme.experiments().create(new).await.unwrap();
    two.acme.experiments().activate(draft.id).await.unwrap();
    let outcomes = two.acme.webhooks().process_pending(10).await.unwrap();
    let [(_, WebhookOutcome::Processed(ConversionOutcome::Recorded(entry)))] = outcomes.as_slice() else {
        panic!("{outcomes:?}")
    };
    assert_eq!((entry.user_id.clone(), entry.revenue), (erasure.pseudonym.clone(), usd("29")));
    assert_eq!(receive(&two.acme, &pending).await, WebhookOutcome::Duplicate(WebhookStatus::Processed));
    let rest = two.acme.users().erase(&erasure.pseudonym).await.unwrap().unwrap();
    assert_eq!((rest.counts.entries, rest.counts.webhooks), (1, 1));
    assert_eq!(left_of(&two, &pending).await, "");
    assert_eq!(net(&two, id, lastprice::Currency::USD).await, usd("0"));
    two.bystander_saw_nothing().await;
}

/// JSON may write a slash in two ways, also that of an id that was merged into the one that is asked for.
#[tokio::test]
async fn bodies_that_name_who_was_merged() {
    let two = two_tenants().await;
    let [cookie, account] = ["tablet/anna", "account"].map(|id| UserId::new(id).unwrap());
    two.acme.users().merge(&cookie, &account, MergePolicy::FirstQuoteWins).await.unwrap();
    let body = r#"{"id":"escaped","type":"x","data":"tablet\/anna"}"#;
    assert_eq!(receive(&two.acme, body).await, WebhookOutcome::Ignored);
    two.acme.users().erase(&account).await.unwrap().unwrap();
    assert_eq!(left_of(&two, body).await, "");
    two.bystander_saw_nothing().await;
}

/// Everybody who was merged into somebody goes with them, by whichever of the ids they are asked for.
#[tokio::test]
async fn all_ids_of_a_person() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let ids: Vec<UserId> =
        ["cookie-of-anna", "tablet-of-anna", "account-of-anna"].map(|id| UserId::new(id).unwrap()).into();
    for cookie in &ids[..2] {
        two.acme.assignments().assign(id, cookie).await.unwrap();
        let _ = two.acme.views().record(&NewView::new(id, cookie.clone())).await.unwrap();
        let sale =
            NewConversion::sale(id, cookie.clone(), usd("29"), key(&format!("of {}", &cookie.as_str()[..6])));
        settled(&two.acme, &sale).await;
        two.acme.users().merge(cookie, &ids[2], MergePolicy::FirstQuoteWins).await.unwrap();
    }
    let before = numbers(&two, id).await;
    let erasure = two.acme.users().erase(&ids[0]).await.unwrap().unwrap();
    let counts = erasure.counts;
    assert_eq!((counts.quotes, counts.views, counts.entries, counts.merges), (3, 2, 2, 2));
    assert_eq!(rows_with(&two, two.id, "of-anna").await, Vec::<String>::new());
    assert_eq!(numbers(&two, id).await, before);
    assert_exact(&two.database.connect_superuser().await.unwrap(), "a person of three ids").await;
    for gone in &ids {
        assert_eq!(two.acme.users().erase(gone).await.unwrap(), None);
        assert_eq!(two.acme.users().merged(gone).await.unwrap(), None);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn within_a_transaction_of_the_hosts_it_is_undone_with_it() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    two.acme.assignments().assign(id, &anna()).await.unwrap();
    let mut host = crate::support_sql::connect(&two.database.app_url()).await;
    for commits in [false, true] {
        let transaction = host.transaction().await.unwrap();
        let scope = two.client.within(&transaction, two.id);
        assert!(scope.users().erase(&anna()).await.unwrap().is_some());
        assert!(scope.assignments().get(id, &anna()).await.unwrap().is_none());
        drop(scope);
        if commits {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
            assert!(two.acme.assignments().get(id, &anna()).await.unwrap().is_some());
        }
    }
    assert_eq!(two.acme.users().erasures(10, None).await.unwrap().items.len(), 1);
    // Dropped at each of its first polls: it has happened as a whole, or not at all.
    for n in 0..12 {
        two.acme.assignments().assign(id, &anna()).await.unwrap();
        crate::support::poll_n(n, two.acme.users().erase(&anna())).await;
        let there = rows_with(&two, two.id, ANNA).await;
        assert!(there.is_empty() || there == ["assignments 1"], "{n}: {there:?}");
    }
    two.bystander_saw_nothing().await;
}

/// While she is erased again and again she goes on looking and buying: nothing is lost, nothing counts twice, and in the end there is
/// nothing of her.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn at_once_with_events_of_the_user() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let buying = async |of: usize| {
        let tenant = two.client.tenant(two.id);
        let mut bought = 0;
        for n in 0..25 {
            // Erased between its looks thrice in a row, a call gives up: then it did nothing.
            let given_up =
                |error: lastprice::Error| assert_eq!(error.kind(), ErrorKind::Conflict, "{error:?}");
            let _ = tenant.assignments().assign(id, &anna()).await.map_err(given_up);
            let _ = tenant.views().record(&NewView::new(id, anna())).await.unwrap();
            let sale = NewConversion::sale(id, anna(), usd("29"), key(&format!("{of}-{n}")));
            let mut reports = 0;
            while reports < 2 {
                match tenant.conversions().settle(&sale).await.map_err(given_up) {
                    Ok(ConversionOutcome::Recorded(_)) => bought += 1,
                    Ok(ConversionOutcome::Duplicate(_)) => {}
                    Ok(other) => panic!("{other:?}"),
                    Err(()) => continue,
                }
                reports += 1;
            }
        }
        bought
    };
    let erasing = async || {
        let mut erased = 0;
        for _ in 0..30 {
            erased += u64::from(two.client.tenant(two.id).users().erase(&anna()).await.unwrap().is_some());
        }
        erased
    };
    let (a, b, c, erased, others) =
        futures_util::future::join5(buying(0), buying(1), buying(2), erasing(), erasing()).await;
    assert_eq!(a + b + c, 75, "each sale once");
    let rest = two.acme.users().erase(&anna()).await.unwrap();
    assert_eq!(rows_with(&two, two.id, ANNA).await, Vec::<String>::new());
    assert_exact(&two.database.connect_superuser().await.unwrap(), "erased while buying").await;
    assert_eq!(net(&two, id, lastprice::Currency::USD).await, usd("2175"));
    let listed = two.acme.users().erasures(1000, None).await.unwrap().items.len() as u64;
    assert_eq!(listed, erased + others + u64::from(rest.is_some()));
    assert!(erased + others > 2, "nothing happened at once");
    two.bystander_saw_nothing().await;
}
