//! Signed bodies, as a sender would send them, end to end.

use lastprice::chrono::Utc;
use lastprice::secrecy::SecretString;
use lastprice::webhook::{Delivery, Verifier};
use lastprice::{
    ConversionOutcome, Currency, ErrorKind, ExperimentId, NewConversion, OrderId, Result, TenantHandle,
    WebhookOutcome, WebhookStatus,
};

use crate::support::poll_n;
use crate::support_ledger::{net, one_price, order};
use crate::support_repo::*;

const SECRET: &str = "it's a secret";

/// What a sender does, by an implementation of its own: HMAC out of SHA-256 by RFC 2104, in the database's words.
pub(crate) async fn delivery(two: &TwoTenants, body: &str) -> Delivery {
    let hmac = "WITH k AS (SELECT rpad(encode(convert_to($1, 'UTF8'), 'hex'), 128, '0') AS hex),
          pads AS (SELECT decode(string_agg(lpad(to_hex(get_byte(decode(hex, 'hex'), n) # 54), 2, '0'), '' ORDER BY n), 'hex') AS i,
                          decode(string_agg(lpad(to_hex(get_byte(decode(hex, 'hex'), n) # 92), 2, '0'), '' ORDER BY n), 'hex') AS o
                   FROM k, generate_series(0, 63) n)
        SELECT 'v1,' || encode(sha256(o || sha256(i || convert_to($2, 'UTF8'))), 'base64') FROM pads";
    // The sender's name of a message is that of its event here; of what has none, it is "message".
    let id = body.strip_prefix(r#"{"id":""#).and_then(|rest| rest.split('"').next()).unwrap_or("message");
    let now = Utc::now();
    let time = now.timestamp().to_string();
    let signed = format!("{id}.{time}.{body}");
    let signature: String = two.owner.query_one(hmac, &[&SECRET, &signed]).await.unwrap().get(0);
    let verifier = Verifier::new([SecretString::from("an older one"), SecretString::from(SECRET)]).unwrap();
    let headers = [("webhook-id", id), ("webhook-timestamp", &time), ("webhook-signature", &signature)];
    let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
    verifier.standard(header, body.as_bytes(), now).unwrap()
}

pub(crate) fn event(id: &str, kind: &str, data: &str) -> String {
    format!(r#"{{"id":"{id}","type":"{kind}","data":{{{data}}}}}"#)
}

pub(crate) fn sold(id: &str, experiment: ExperimentId, order: &str, amount: &str) -> String {
    let metadata = format!(r#""metadata":{{"experiment_id":"{experiment}"}}"#);
    let data = format!(
        r#""customer_id":"user-1","order_id":"{order}","amount":{amount},"subscription_id":"s-{order}",{metadata}"#
    );
    event(id, "subscription.created", &data)
}

pub(crate) fn invoiced(id: &str, subscription: &str, order: &str, period: &str, amount: &str) -> String {
    let data = format!(
        r#""subscription_id":"{subscription}","period":"{period}","order_id":"{order}","amount":{amount},"currency":"USD""#
    );
    event(id, "invoice.paid", &data)
}

pub(crate) async fn receive(two: &TwoTenants, body: &str) -> Result<WebhookOutcome> {
    two.acme.webhooks().receive(&delivery(two, body).await).await
}

#[track_caller]
pub(crate) fn recorded(outcome: Result<WebhookOutcome>) -> lastprice::Conversion {
    match outcome.unwrap() {
        WebhookOutcome::Processed(ConversionOutcome::Recorded(entry)) => entry,
        other => panic!("{other:?}"),
    }
}

async fn of_status(tenant: &TenantHandle, status: WebhookStatus) -> Vec<(String, Option<String>, u32)> {
    let page = tenant.webhooks().list(status, 1000, None).await.unwrap();
    page.items.into_iter().map(|e| (e.id, e.reason, e.attempts)).collect()
}

#[tokio::test]
async fn an_order_counts_once_however_often_and_under_how_many_ids() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let body = sold("evt_1", id, "o1", "29.00");
    let entry = recorded(receive(&two, &body).await);
    assert_eq!((entry.revenue, entry.quote_mismatch), (usd("29"), Some(false)));
    assert_eq!(entry.idempotency_key.as_str(), "paid:sale:o1");
    // Delivered again; and reported by another event.
    let again = receive(&two, &body).await.unwrap();
    assert_eq!(again, WebhookOutcome::Duplicate(WebhookStatus::Processed));
    let other = receive(&two, &sold("evt_2", id, "o1", "\"29\"")).await.unwrap();
    assert!(matches!(other, WebhookOutcome::Processed(ConversionOutcome::Duplicate(_))), "{other:?}");
    // Another amount for the same order is not lost.
    let wrong = receive(&two, &sold("evt_3", id, "o1", "30")).await.unwrap();
    assert_eq!(wrong, WebhookOutcome::Failed { reason: "conflict" });
    assert_eq!((two.count("conversions").await, net(&two, id, Currency::USD).await), (1, usd("29")));
    assert_eq!(
        of_status(&two.acme, WebhookStatus::Failed).await,
        [("evt_3".into(), Some("conflict".into()), 1)]
    );
    let kept = two.acme.webhooks().list(WebhookStatus::Processed, 1, None).await.unwrap();
    assert_eq!((kept.items[0].body.as_slice(), kept.items.len()), (body.as_bytes(), 1));
    let rest = two.acme.webhooks().list(WebhookStatus::Processed, 1, kept.next).await.unwrap();
    assert_eq!((rest.items[0].id.as_str(), rest.next), ("evt_2", None));
    assert!(!format!("{kept:?}").contains("user-1"), "a body is nothing for a log");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn each_kind_of_event_and_out_of_order() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let back = |e: &str, kind: &str, own: &str, amount: &str| {
        event(e, kind, &format!(r#"{own}"order_id":"o1","amount":"{amount}","currency":"USD""#))
    };
    let refund = back("e1", "payment.refunded", r#""refund_id":"r1","#, "4.05");
    let early = receive(&two, &refund).await.unwrap();
    assert_eq!(early, WebhookOutcome::Processed(ConversionOutcome::Waiting));
    // Reported twice under one refund, and another one of the same order.
    let twice = back("e2", "refund.created", r#""refund_id":"r1","#, "4.05");
    assert_eq!(receive(&two, &twice).await.unwrap(), WebhookOutcome::Processed(ConversionOutcome::Waiting));
    let other = receive(&two, &back("e3", "charge.refunded", "", "1")).await.unwrap();
    assert_eq!(other, WebhookOutcome::Processed(ConversionOutcome::Waiting));
    recorded(receive(&two, &sold("e4", id, "o1", "29")).await);
    assert_eq!(net(&two, id, Currency::USD).await, usd("23.95"));
    recorded(receive(&two, &back("e5", "dispute.created", r#""dispute_id":"d","#, "10")).await);
    assert_eq!(net(&two, id, Currency::USD).await, usd("13.95"));
    recorded(receive(&two, &back("e6", "dispute.won", r#""dispute_id":"d","#, "10")).await);
    recorded(receive(&two, &invoiced("e7", "s-o1", "o2", "2", "29")).await);
    assert_eq!(net(&two, id, Currency::USD).await, usd("52.95"));
    let trial =
        format!(r#""customer_id":"user-2","subscription_id":"t","metadata":{{"experiment_id":"{id}"}}"#);
    recorded(receive(&two, &event("e8", "trial.started", &trial)).await);
    assert_eq!(receive(&two, &event("e9", "customer.created", "")).await.unwrap(), WebhookOutcome::Ignored);
    let ignored = two.acme.webhooks().list(WebhookStatus::Ignored, 10, None).await.unwrap();
    assert_eq!(ignored.items[0].event_type.as_deref(), Some("customer.created"));
    // Not as quoted: flagged, not lost.
    let other = recorded(receive(&two, &sold("e10", id, "o3", "19.90")).await);
    assert_eq!((other.quote_mismatch, other.revenue.to_string()), (Some(true), "19.90 USD".into()));
    two.bystander_saw_nothing().await;
}

/// The checkout has written the sale itself, under a key of its own that it sent along, or under ours.
#[tokio::test]
async fn what_the_checkout_has_settled_is_not_counted_again() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    for (own, sent_along) in [("checkout-1", r#","idempotency_key":"checkout-1""#), ("paid:sale:o-2", "")] {
        let order = OrderId::new(own.trim_start_matches("paid:sale:")).unwrap();
        let sale = NewConversion::sale(id, user(1), usd("29"), key(own)).order(order.clone());
        two.acme.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        let data = format!(
            r#""customer_id":"user-1","order_id":"{}","amount":29,"created_at":"2026-01-01T00:00:00Z","metadata":{{"experiment_id":"{id}"{sent_along}}}"#,
            order.as_str()
        );
        let outcome = receive(&two, &event(own, "subscription.created", &data)).await.unwrap();
        assert!(
            matches!(outcome, WebhookOutcome::Processed(ConversionOutcome::Duplicate(_))),
            "{own}: {outcome:?}"
        );
    }
    assert_eq!(net(&two, id, Currency::USD).await, usd("58"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_cannot_be_processed_is_kept_with_its_reason() {
    let two = two_tenants().await;
    let later = ExperimentId::new();
    let body = sold("early", later, "o1", "29");
    let unknown = WebhookOutcome::Pending { reason: "unknown_experiment" };
    assert_eq!(receive(&two, &body).await.unwrap(), unknown);
    for (body, reason) in [
        ("not json".to_owned(), "body"),
        (
            r#"{"id":"user","type":"subscription.created","data":{"customer_id":"a\u0000b","order_id":"o","amount":1}}"#
                .into(),
            "data.customer_id",
        ),
        (sold("exponent", later, "o", "1e2"), "data.amount"),
        (event("no-currency", "refund.created", r#""order_id":"o","amount":1"#), "data.currency"),
        (
            event(
                "nul",
                "refund.created",
                r#""order_id":"o","amount":1,"currency":"USD","refund_id":"a\u0000b""#,
            ),
            "idempotency_key",
        ),
    ] {
        let outcome = receive(&two, &body).await.unwrap();
        assert_eq!(outcome, WebhookOutcome::Failed { reason }, "{body}");
    }
    assert_eq!(two.count("webhook_events").await, 6, "all are kept");
    let tried = two.acme.webhooks().process_pending(10).await.unwrap();
    assert_eq!(tried.iter().find(|(id, _)| id == "early").unwrap().1, unknown);
    let pending = of_status(&two.acme, WebhookStatus::Pending).await;
    assert!(pending.contains(&("early".into(), Some("unknown_experiment".into()), 2)), "{pending:?}");
    // The experiment comes into being, and what waited for it counts.
    let make = "INSERT INTO experiments (tenant_id, id, key, name, currency, variants) VALUES ($1, $2, 'late', 'Late', 'USD',
        '[{\"name\": \"a\", \"weight\": 1, \"price\": \"29\"}, {\"name\": \"b\", \"weight\": 1, \"price\": \"29\"}]')";
    two.owner.execute(make, &[&two.id.uuid(), &later.uuid()]).await.unwrap();
    two.acme.experiments().activate(later).await.unwrap();
    let done = two.acme.webhooks().process_pending(10).await.unwrap();
    let early = done.into_iter().find(|(id, _)| id == "early").unwrap().1;
    recorded(Ok(early));
    assert_eq!(net(&two, later, Currency::USD).await, usd("29"));
    // By hand, once more; and what nobody has sent.
    let again = two.acme.webhooks().retry("exponent").await.unwrap();
    assert_eq!(again, WebhookOutcome::Failed { reason: "data.amount" });
    is_kind(two.acme.webhooks().retry("nobody's").await, ErrorKind::NotFound);
    refused(two.acme.webhooks().process_pending(0).await, "limit");
    // Given up; but not what is in the ledger, nor by somebody else.
    is_kind(two.globex.webhooks().discard("exponent").await, ErrorKind::NotFound);
    is_kind(two.acme.webhooks().discard("nobody's\0").await, ErrorKind::NotFound);
    for _ in 0..2 {
        assert_eq!(two.acme.webhooks().discard("exponent").await.unwrap(), WebhookStatus::Ignored);
    }
    let ignored = of_status(&two.acme, WebhookStatus::Ignored).await;
    assert!(ignored.contains(&("exponent".into(), Some("discarded".into()), 2)), "{ignored:?}");
    assert_eq!(two.acme.webhooks().discard("early").await.unwrap(), WebhookStatus::Processed);
    assert_eq!(net(&two, later, Currency::USD).await, usd("29"));
    let again = two.acme.webhooks().retry("exponent").await.unwrap();
    assert_eq!(again, WebhookOutcome::Failed { reason: "data.amount" });
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn another_body_under_the_same_id_is_a_conflict_and_another_tenants_is_not() {
    let two = two_tenants().await;
    let (ours, theirs) = (one_price(&two.acme, "x").await, one_price(&two.globex, "x").await);
    let first = sold("evt", ours, "o1", "29");
    recorded(receive(&two, &first).await);
    let error = is_kind(receive(&two, &sold("evt", ours, "o1", "30")).await, ErrorKind::Conflict);
    assert_eq!(error.conflicting_fields(), ["body"]);
    let kept: Vec<u8> = two.owner.query_one("SELECT body FROM webhook_events", &[]).await.unwrap().get(0);
    assert_eq!(kept, first.as_bytes());
    // The same id for somebody else; nobody sees the other's.
    assert!(two.globex.webhooks().list(WebhookStatus::Processed, 10, None).await.unwrap().items.is_empty());
    is_kind(two.globex.webhooks().retry("evt").await, ErrorKind::NotFound);
    let delivery = delivery(&two, &sold("evt", theirs, "o1", "29")).await;
    recorded(two.globex.webhooks().receive(&delivery).await);
    // An event for the other one's experiment is of an unknown one.
    let outcome = receive(&two, &sold("evt2", theirs, "o2", "29")).await.unwrap();
    assert_eq!(outcome, WebhookOutcome::Pending { reason: "unknown_experiment" });
    assert_eq!((two.count("webhook_events").await, two.count("conversions").await), (2, 1));
    let nobody = two.client.tenant(lastprice::TenantId::new());
    is_kind(nobody.webhooks().receive(&delivery).await, ErrorKind::NotFound);
}

#[tokio::test]
async fn received_at_once_by_many_it_counts_once() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let delivery = delivery(&two, &sold("evt", id, "o1", "29")).await;
    let all = (0..16).map(|_| two.acme.webhooks().receive(&delivery));
    let outcomes = futures_util::future::join_all(all).await;
    let is_recorded = |o: &&Result<WebhookOutcome>| {
        matches!(o, Ok(WebhookOutcome::Processed(ConversionOutcome::Recorded(_))))
    };
    assert_eq!(outcomes.iter().filter(is_recorded).count(), 1, "{outcomes:?}");
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!((two.count("conversions").await, net(&two, id, Currency::USD).await), (1, usd("29")));
    assert_eq!(of_status(&two.acme, WebhookStatus::Processed).await, [("evt".into(), None, 1)]);
    two.bystander_saw_nothing().await;
}

/// Whenever a process dies, what it had stored is completed by another, once.
#[tokio::test]
async fn dropped_at_every_point_it_is_completed_and_counts_once() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let (mut left_pending, mut lost) = (0, 0);
    for n in 0.. {
        let delivery = delivery(&two, &sold(&format!("evt-{n}"), id, &format!("o-{n}"), "29")).await;
        let done = poll_n(n, two.acme.webhooks().receive(&delivery)).await;
        if done.is_none() {
            // A dropped statement may still be under way for a moment.
            let (mut stored, mut processed) = (false, false);
            for _ in 0..4 {
                left_pending += of_status(&two.acme, WebhookStatus::Pending).await.len();
                two.acme.webhooks().process_pending(10).await.unwrap();
                let page = two.acme.webhooks().list(WebhookStatus::Processed, 1000, None).await.unwrap();
                processed = page.items.iter().any(|e| e.id == delivery.id());
                stored |= processed;
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            lost += usize::from(!stored);
            if !processed {
                // Not stored: the sender had no answer, and sends it again.
                recorded(two.acme.webhooks().receive(&delivery).await);
            }
        }
        let entries =
            two.acme.conversions().list_by_order(&order(&format!("o-{n}")), 10, None).await.unwrap();
        assert_eq!(entries.items.len(), 1, "dropped after {n} polls");
        if let Some(done) = done {
            recorded(done);
            assert!(n > 4, "it never waited");
            break;
        }
    }
    assert!(left_pending > 0 && lost > 0, "{left_pending} were left pending, {lost} not stored");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn in_a_transaction_it_is_stored_with_the_rest_or_not_at_all() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let delivery = delivery(&two, &sold("evt", id, "o1", "29")).await;
    let transaction = two.acme.begin().await.unwrap();
    recorded(transaction.webhooks().receive(&delivery).await);
    transaction.rollback().await.unwrap();
    assert_eq!((two.count("webhook_events").await, two.count("conversions").await), (0, 0));
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = lastprice::TenantScope::within(&transaction, two.id);
    recorded(within.webhooks().receive(&delivery).await);
    assert!(within.webhooks().process_pending(10).await.unwrap().is_empty());
    transaction.commit().await.unwrap();
    assert_eq!((two.count("webhook_events").await, two.count("conversions").await), (1, 1));
    two.bystander_saw_nothing().await;
}

/// A database that fails between storing and processing loses nothing.
#[tokio::test]
async fn a_failure_of_the_ledger_leaves_it_pending() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let body = sold("evt", id, "o1", "29");
    let fail = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '53100'; END $$;
                CREATE TRIGGER fail BEFORE INSERT ON conversions FOR EACH ROW EXECUTE FUNCTION fail()";
    two.owner.batch_execute(fail).await.unwrap();
    let outcome = receive(&two, &body).await.unwrap();
    assert_eq!(outcome, WebhookOutcome::Pending { reason: "database" });
    assert_eq!(
        of_status(&two.acme, WebhookStatus::Pending).await,
        [("evt".into(), Some("database".into()), 1)]
    );
    two.owner.batch_execute("DROP TRIGGER fail ON conversions").await.unwrap();
    // The sender's own retry completes it.
    recorded(receive(&two, &body).await);
    two.bystander_saw_nothing().await;
}

/// One that the database refuses in words that nobody knows stays pending, and the others go on.
#[tokio::test]
async fn one_that_always_fails_holds_up_no_other() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let fail = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
                CREATE TRIGGER fail BEFORE INSERT ON conversions FOR EACH ROW WHEN (NEW.order_id = 'bad') EXECUTE FUNCTION fail()";
    two.owner.batch_execute(fail).await.unwrap();
    let stays = WebhookOutcome::Pending { reason: "database" };
    assert_eq!(receive(&two, &sold("evt-bad", id, "bad", "29")).await.unwrap(), stays);
    // Stored by a process that died then.
    let good = sold("evt-good", id, "good", "29");
    let store = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash)
        VALUES ($1, 'evt-good', 'ffffffff-0000-7000-8000-000000000000', $2, sha256($2))";
    two.owner.execute(store, &[&two.id.uuid(), &good.as_bytes()]).await.unwrap();
    for _ in 0..2 {
        let done = two.acme.webhooks().process_pending(10).await.unwrap();
        assert!(done.contains(&("evt-bad".to_owned(), stays.clone())), "{done:?}");
    }
    assert_eq!(net(&two, id, Currency::USD).await, usd("29"));
    assert_eq!(
        of_status(&two.acme, WebhookStatus::Pending).await,
        [("evt-bad".into(), Some("database".into()), 3)]
    );
}

/// Senders report the first payment of a subscription by two events: the subscription, and its invoice.
#[tokio::test]
async fn the_first_invoice_is_the_sale() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let sale = recorded(receive(&two, &sold("e1", id, "o1", "29")).await);
    let first = receive(&two, &invoiced("e2", "s-o1", "o1", "1", "29.00")).await.unwrap();
    assert_eq!(first, WebhookOutcome::Processed(ConversionOutcome::Duplicate(sale)));
    let other = receive(&two, &invoiced("e3", "s-o1", "o1", "1", "30")).await.unwrap();
    assert_eq!(other, WebhookOutcome::Failed { reason: "conflict" });
    assert_eq!(net(&two, id, Currency::USD).await, usd("29"));
    recorded(receive(&two, &invoiced("e4", "s-o1", "o2", "2", "29")).await);
    assert_eq!(net(&two, id, Currency::USD).await, usd("58"));
    two.bystander_saw_nothing().await;
}

/// And in the other order: the invoice waits for the sale, and is it then.
#[tokio::test]
async fn the_first_invoice_before_its_sale_counts_once() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let first = receive(&two, &invoiced("e1", "s-o1", "o1", "1", "29")).await.unwrap();
    assert_eq!(first, WebhookOutcome::Pending { reason: "unknown_subscription" });
    let sale = recorded(receive(&two, &sold("e2", id, "o1", "29")).await);
    let done = two.acme.webhooks().process_pending(10).await.unwrap();
    assert_eq!(done, [("e1".into(), WebhookOutcome::Processed(ConversionOutcome::Duplicate(sale)))]);
    assert_eq!((two.count("conversions").await, net(&two, id, Currency::USD).await), (1, usd("29")));
    two.bystander_saw_nothing().await;
}

/// The checkout has settled the payment under a key that the sender does not know.
#[tokio::test]
async fn a_sale_under_another_key_is_the_same_sale() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    let sale = NewConversion::sale(id, user(1), usd("29"), key("own")).order(order("o1"));
    let sale = two.acme.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
    let told = receive(&two, &sold("e1", id, "o1", "29.00")).await.unwrap();
    assert_eq!(told, WebhookOutcome::Processed(ConversionOutcome::Duplicate(sale)));
    let other = receive(&two, &sold("e2", id, "o1", "30")).await.unwrap();
    assert_eq!(other, WebhookOutcome::Failed { reason: "conflict" });
    let other = receive(&two, &sold("e3", id, "o1", "29").replace("user-1", "user-2")).await.unwrap();
    assert_eq!(other, WebhookOutcome::Failed { reason: "conflict" });
    recorded(receive(&two, &sold("e4", id, "o2", "29")).await);
    assert_eq!(net(&two, id, Currency::USD).await, usd("58"));
    two.bystander_saw_nothing().await;
}
