//! A user who is forgotten, and what else says the id: bodies that PostgreSQL cannot read, keys, numbers, parts of texts, actors.

use lastprice::serde_json::json;
use lastprice::{
    Actor, ConversionOutcome, MergePolicy, NewConversion, TenantHandle, UserId, WebhookOutcome, WebhookStatus,
};

use crate::erasure::delivery;
use crate::support_ledger::*;
use crate::support_repo::*;

fn id_of(name: &str) -> UserId {
    UserId::new(name).unwrap()
}

async fn receive(tenant: &TenantHandle, body: &str) -> WebhookOutcome {
    tenant.webhooks().receive(&delivery(body)).await.unwrap()
}

/// What is left of the body of a delivery.
async fn left_of(two: &TwoTenants, id: &str) -> String {
    let sql = "SELECT encode(body, 'escape') FROM webhook_events WHERE tenant_id = $1 AND id = $2";
    two.owner.query_one(sql, &[&two.id.uuid(), &id]).await.unwrap().get(0)
}

/// Stored, as if it had been received and come to this.
async fn stored(two: &TwoTenants, status: &str, bodies: &[(&str, &str)]) {
    let sql = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash, status, processed_at)
               SELECT $1, $2, gen_random_uuid(), b, sha256(b), $4, now() FROM convert_to($3, 'UTF8') b";
    for (id, body) in bodies {
        two.owner.execute(sql, &[&two.id.uuid(), id, body, &status]).await.unwrap();
    }
}

/// JSON with half of a pair, or a zero, is read by the ledger, and not by PostgreSQL. It is money all the same.
#[tokio::test]
async fn money_that_postgres_cannot_read() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let notes =
        [r"cut \ud83d", r"\ude00 cut", r"\u0000", r"\\u0000 \\\ud83d\ude00", r"\ud83d\ud83d\ude00\ude00"];
    for (n, note) in notes.iter().enumerate() {
        let body = format!(
            r#"{{"id":"e{n}","type":"invoice.paid","data":{{"customer_id":"alice","subscription_id":"s","period":"2026-1{n}",
                "order_id":"o{n}","amount":"29.00","currency":"USD","note":"{note}"}}}}"#
        );
        let outcome = receive(&two.acme, &body).await;
        assert!(matches!(outcome, WebhookOutcome::Pending { .. }), "{note}: {outcome:?}");
    }
    // A letter in Latin 1 where nobody looks: it cannot be changed, and is kept.
    let latin = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash)
                 SELECT $1, 'latin', gen_random_uuid(), b, sha256(b) FROM (SELECT
                   convert_to('{\"type\":\"invoice.paid\",\"note\":\"', 'UTF8') || '\\xe9' || convert_to('\",\"data\":{\"customer_id\":\"alice\",
                     \"subscription_id\":\"s\",\"period\":\"2027-01\",\"order_id\":\"o9\",\"amount\":\"29.00\",\"currency\":\"USD\"}}', 'UTF8') b) x";
    two.owner.execute(latin, &[&two.id.uuid()]).await.unwrap();

    let erasure = two.acme.users().erase(&id_of("alice")).await.unwrap().unwrap();
    let counts = erasure.counts;
    assert_eq!((counts.webhooks, counts.pending_webhooks, counts.naming), (0, 5, 1));
    for event in two.acme.webhooks().list(WebhookStatus::Pending, 100, None).await.unwrap().items {
        let body = String::from_utf8_lossy(&event.body).into_owned();
        assert_eq!(body.contains("alice"), event.id == "latin", "{body}");
        assert_eq!(body.contains(erasure.pseudonym.as_str()), event.id != "latin", "{body}");
    }
    let list = two.acme.webhooks().list(WebhookStatus::Pending, 100, None).await.unwrap().items;
    for (n, note) in notes.iter().enumerate() {
        let note = note.replace(r"\ud83d\ude00", "\u{1f600}");
        let body = list.iter().map(|event| String::from_utf8_lossy(&event.body)).find(|body| {
            body.contains(&format!("\"o{n}\"")) && body.contains(&format!(r#""note": "{note}""#))
        });
        assert!(body.is_some(), "{note}: {list:?}");
    }

    two.acme.assignments().assign(x, &user(1)).await.unwrap();
    let sale = NewConversion::sale(x, user(1), usd("29"), key("sale"))
        .order(order("o"))
        .subscription(subscription("s"));
    settled(&two.acme, &sale).await;
    for (id, outcome) in two.acme.webhooks().process_pending(10).await.unwrap() {
        assert!(matches!(outcome, WebhookOutcome::Processed(_)), "{id}: {outcome:?}");
    }
    assert_eq!(net(&two, x, lastprice::Currency::USD).await, usd("203"), "7 times 29");
    two.bystander_saw_nothing().await;
}

/// What is no text of JSON names somebody as well; and what has the id in it only is counted.
#[tokio::test]
async fn keys_numbers_and_parts() {
    let two = two_tenants().await;
    let gone = [
        ("key", r#"{"customers":[{"al/1":{"x":1}}]}"#),
        ("escaped", r#"{"a":"\u0061l\/1","b":"\ud83d"}"#),
        ("text", r#"{"a":[["al/1"]]}"#),
    ];
    let kept = [
        ("nested", r#"{"payload":"{\"customer\":\"al/1\"}"}"#),
        ("nested-line", r#"{"payload":"{\"to\":\"Dear\\nal/1\"}"}"#),
        ("line", r#"{"to":"Dear\nal\/1"}"#),
        ("part", r#"{"description":"Invoice for al/1"}"#),
        ("twice", r#"{"a":"al/1","a":"bob"}"#),
        ("of al/1", "{}"),
    ];
    let others = [("longer", r#"{"a":"al/12","b":"mal/1","mal/1":1}"#), ("other", r#"{"a":"al1"}"#)];
    for bodies in [&gone[..], &kept, &others] {
        stored(&two, "ignored", bodies).await;
    }
    let form = [("form", "user=al/1&x=1")];
    stored(&two, "failed", &form).await; // no JSON: no release understands it, but who knows
    let erasure = two.acme.users().erase(&id_of("al/1")).await.unwrap().unwrap();
    let counts = erasure.counts;
    assert_eq!((counts.webhooks, counts.pending_webhooks, counts.naming), (3, 0, 7));
    for (id, _) in gone {
        assert_eq!(left_of(&two, id).await, "");
    }
    for (id, body) in kept.iter().chain(&others).chain(&form) {
        assert_eq!(left_of(&two, id).await, body.replace('\\', r"\\"));
    }
    assert_eq!(two.acme.users().erase(&id_of("al/1")).await.unwrap(), None, "what stays is no reason");
    assert_eq!(two.acme.webhooks().discard("form").await.unwrap(), WebhookStatus::Ignored);
    assert_eq!(two.acme.users().erase(&id_of("al/1")).await.unwrap().unwrap().counts.webhooks, 1);
    let outcome = two.acme.webhooks().retry("key").await.unwrap();
    assert_eq!(outcome, WebhookOutcome::Failed { reason: "body" }, "it is gone");

    stored(
        &two,
        "ignored",
        &[("number", r#"{"data":{"customer_id":12345}}"#), ("amount", r#"{"a":123456}"#)],
    )
    .await;
    stored(
        &two,
        "failed",
        &[("failed", r#"{"type":"trial.started","data":{"customer_id":12345,"n":12345}}"#)],
    )
    .await;
    let erasure = two.acme.users().erase(&id_of("12345")).await.unwrap().unwrap();
    let counts = erasure.counts;
    assert_eq!((counts.webhooks, counts.pending_webhooks, counts.naming), (1, 1, 1));
    assert_eq!(
        (left_of(&two, "number").await.as_str(), left_of(&two, "amount").await.as_str()),
        ("", r#"{"a":123456}"#)
    );
    assert!(left_of(&two, "failed").await.contains(&format!(r#""customer_id": "{}""#, erasure.pseudonym)));
    assert_eq!(two.acme.users().erase(&id_of("12345")).await.unwrap(), None);
    two.bystander_saw_nothing().await;
}

/// A refund that waits belongs to nobody yet, but may say whose it is.
#[tokio::test]
async fn a_waiting_refund_that_names_its_user() {
    let two = two_tenants().await;
    let mail = "alice@example.com";
    for (n, metadata) in [json!({ "mail": mail }), json!({ "to": format!("for {mail}") }), json!({ "n": 1 })]
        .into_iter()
        .enumerate()
    {
        let refund = NewConversion::refund(order(&format!("o{n}")), usd("5"), key(&format!("r{n}")));
        let outcome = two.acme.conversions().settle(&refund.metadata(metadata)).await.unwrap();
        assert!(matches!(outcome, ConversionOutcome::Waiting), "{outcome:?}");
    }
    let erasure = two.acme.users().erase(&id_of(mail)).await.unwrap().unwrap();
    assert_eq!((erasure.counts.waiting, erasure.counts.naming), (1, 1));
    assert_eq!(two.acme.users().erase(&id_of(mail)).await.unwrap(), None);
    let left = "SELECT string_agg(entry ->> 'metadata', ' ' ORDER BY idempotency_key) FROM waiting_conversions WHERE tenant_id = $1";
    let left: String = two.owner.query_one(left, &[&two.id.uuid()]).await.unwrap().get(0);
    assert_eq!(left, r#"{} {"to": "for alice@example.com"} {"n": 1}"#);
    two.bystander_saw_nothing().await;
}

/// Who was never there is not erased, whatever else has those digits in it.
#[tokio::test]
async fn a_short_id() {
    let two = two_tenants().await;
    let usage = "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
                 SELECT $1, 'm', '2026-11-01', 1, k FROM unnest('{job-42,job-420,a42b}'::text[]) k";
    two.owner.execute(usage, &[&two.id.uuid()]).await.unwrap();
    stored(&two, "ignored", &[("delivery-42", "{}"), ("x", r#"{"a":"42.00"}"#)]).await;
    for _ in 0..2 {
        assert_eq!(two.acme.users().erase(&id_of("42")).await.unwrap(), None);
    }
    assert_eq!(two.acme.users().erasures(10, None).await.unwrap().items, []);
    // Her own are counted in the same way.
    let x = one_price(&two.acme, "x").await;
    two.acme.assignments().assign(x, &id_of("42")).await.unwrap();
    for n in ["o-42", "o-420"] {
        settled(
            &two.acme,
            &NewConversion::sale(x, id_of("42"), usd("29"), key(&format!("k{n}"))).order(order(n)),
        )
        .await;
    }
    let erasure = two.acme.users().erase(&id_of("42")).await.unwrap().unwrap();
    assert_eq!((erasure.counts.entries, erasure.counts.naming), (2, 4));
    two.bystander_saw_nothing().await;
}

/// Whoever asks for his own erasure is not beside the pseudonym.
#[tokio::test]
async fn by_oneself() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let (cookie, bob) = (id_of("cookie"), id_of("bob@example.com"));
    let himself = two.client.tenant(two.id).with_actor(Actor::new(bob.as_str()).unwrap());
    himself.assignments().assign(x, &bob).await.unwrap();
    two.acme.experiments().force(x, &bob, Some("b")).await.unwrap();
    himself.users().merge(&cookie, &bob, MergePolicy::FirstQuoteWins).await.unwrap();
    let dpo = two.client.tenant(two.id).with_actor(Actor::new("dpo").unwrap());
    dpo.users().merge(&id_of("tablet"), &bob, MergePolicy::FirstQuoteWins).await.unwrap();

    let erasure = himself.users().erase(&bob).await.unwrap().unwrap();
    assert_eq!(erasure.erased_by.as_deref(), Some(erasure.pseudonym.as_str()));
    let merged_by: Vec<_> = two
        .acme
        .users()
        .merges(10, None)
        .await
        .unwrap()
        .items
        .into_iter()
        .map(|m| m.merged_by.unwrap())
        .collect();
    assert_eq!(merged_by, [erasure.pseudonym.as_str(), "dpo"]);
    let said = "SELECT count(*) FROM audit_trail WHERE tenant_id = $1 AND actor = $2";
    let said: i64 = two.owner.query_one(said, &[&two.id.uuid(), &bob.as_str()]).await.unwrap().get(0);
    assert_eq!(said, 0);

    // And afterwards he is who he was.
    himself.assignments().assign(x, &bob).await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let set = "SELECT app_set_tenant($1), set_config('app.actor', $2, true)";
    transaction.execute(set, &[&two.id.uuid(), &bob.as_str()]).await.unwrap();
    let erase = "SELECT erased_by = pseudonym FROM erase_user($1)";
    assert!(transaction.query_one(erase, &[&bob.as_str()]).await.unwrap().get::<_, bool>(0));
    let actor = transaction.query_one("SELECT current_setting('app.actor')", &[]).await.unwrap();
    assert_eq!(actor.get::<_, &str>(0), bob.as_str());
    transaction.rollback().await.unwrap();
    two.bystander_saw_nothing().await;
}
