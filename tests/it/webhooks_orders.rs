//! An order and its invoice, a webhook that sends our key along, and what the README shows of both: each payment counts once.

use lastprice::{Currency, ExperimentId, NewConversion, TenantScope, WebhookOutcome};

use crate::support_ledger::{net, one_price, order, renewal, subscription};
use crate::support_repo::*;
use crate::webhooks::{delivery, event, invoiced, receive, recorded};
use crate::webhooks_checkout::{DOORS, bought, differs, new, there, was_there, written};

/// What the provider sends of an order of a subscription: its activation, and its invoice.
fn of_subscription(e: &str, id: ExperimentId, s: &str, o: &str) -> [String; 2] {
    let data = format!(
        r#""customer_id":"user-1","subscription_id":"{s}","order_id":"{o}","amount":29,"currency":"USD","metadata":{{"experiment_id":"{id}"}}"#
    );
    let activated = event(&format!("a{e}"), "subscription.activated", &data);
    [activated, invoiced(&format!("i{e}"), s, o, o, "29")]
}

/// A subscription that is sold once more, as after an upgrade: an invoice could be a renewal of the older sale.
#[tokio::test]
async fn another_sale_of_a_subscription_and_its_invoice() {
    let two = two_tenants().await;
    let (x, y) = (one_price(&two.acme, "x").await, one_price(&two.acme, "y").await);
    let conflict = WebhookOutcome::Failed { reason: "conflict" };
    let mut orders = 0;
    for door in DOORS {
        // The later sale may be of another experiment, and need not name the subscription.
        for (of, names) in [(x, true), (y, true), (x, false)] {
            let s = format!("{door:?}-{}-{names}", of == x);
            let sale = |o: &str| {
                let sale = bought(of, 1, o, "29", &format!("own {o}"));
                if names { sale.subscription(subscription(&s)) } else { sale }
            };
            let first = format!("{s}-1");
            let opened = bought(x, 1, &first, "29", &first).subscription(subscription(&s));
            new(door.record(&two.acme, &opened).await);

            // The invoice first: it is in the ledger as a renewal, and the sale is told and not counted.
            let o = format!("{s}-2");
            let [activated, invoice] = of_subscription(&o, of, &s, &o);
            recorded(receive(&two, &invoice).await);
            let fields = differs(door.record(&two.acme, &sale(&o)).await);
            assert!(fields.contains(&"kind"), "{fields:?}");
            assert_eq!(receive(&two, &activated).await.unwrap(), conflict);

            // The sale first, by a webhook or the checkout: the invoice is that.
            let o = format!("{s}-3");
            let [activated, invoice] = of_subscription(&o, of, &s, &o);
            let third = recorded(receive(&two, &activated).await);
            there(door.record(&two.acme, &sale(&o)).await);
            assert_eq!(was_there(receive(&two, &invoice).await), third);
            let renewed = renewal(&s, "3", "29", &format!("again {o}")).order(order(&o));
            assert!(differs(door.record(&two.acme, &renewed).await).contains(&"kind"));
            let o = format!("{s}-4");
            let [_, invoice] = of_subscription(&o, of, &s, &o);
            let fourth = new(door.record(&two.acme, &sale(&o)).await);
            assert_eq!(was_there(receive(&two, &invoice).await), fourth);
            orders += 4;
        }
    }
    assert_eq!(two.count("conversions").await, orders);
    assert_eq!(written(&two).await, (29 * orders).to_string());
    two.bystander_saw_nothing().await;
}

/// In transactions that are not tried again: each order counts once, and nobody is stopped for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_sale_and_its_invoice_at_once() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..40 {
        let (s, o) = (format!("s{n}"), format!("o{n}"));
        let first = bought(x, 1, &format!("first-{o}"), "29", &format!("first-{n}"));
        new(two.acme.conversions().settle(&first.subscription(subscription(&s))).await);
        let sale = bought(x, 1, &o, "29", &format!("own-{n}")).subscription(subscription(&s));
        let [_, invoice] = of_subscription(&o, x, &s, &o);
        let (delivery, acme, id) = (delivery(&two, &invoice).await, two.client.tenant(two.id), two.id);
        let mut host = two.database.connect_app().await.unwrap();
        calls.spawn(async move {
            let transaction = host.transaction().await.unwrap();
            let outcome = TenantScope::within(&transaction, id).conversions().settle(&sale).await;
            transaction.commit().await.unwrap();
            drop(outcome.unwrap());
        });
        calls.spawn(async move {
            let open = acme.begin().await.unwrap();
            let outcome = open.webhooks().receive(&delivery).await.unwrap();
            assert!(matches!(outcome, WebhookOutcome::Processed(_)), "{outcome:?}");
            open.commit().await.unwrap();
        });
        while calls.len() > 6 {
            calls.join_next().await.unwrap().unwrap();
        }
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap();
    }
    assert_eq!((two.count("conversions").await, two.count("ledger_locks").await), (80, 0));
    assert_eq!(written(&two).await, (29 * 80).to_string());
    two.bystander_saw_nothing().await;
}

/// A key that the sender sends along says enough: a webhook knows of no quantity, discount or tax.
#[tokio::test]
async fn under_the_same_key_whatever_else_they_say() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    for door in DOORS {
        for checkout_first in [true, false] {
            let o = format!("{door:?}-{checkout_first}");
            let sale = bought(x, 1, &o, "82", &format!("{o}:paid")).quantity(3).discount(usd("5"));
            let sale = sale.subscription(subscription(&o));
            let told = |e: &str, amount: &str| {
                let metadata = format!(r#"{{"experiment_id":"{x}","idempotency_key":"{o}:paid"}}"#);
                let data = format!(
                    r#""customer_id":"user-1","order_id":"{o}","amount":{amount},"metadata":{metadata}"#
                );
                event(&format!("{e} {o}"), "subscription.created", &data)
            };
            if checkout_first {
                let first = new(door.record(&two.acme, &sale).await);
                assert_eq!(was_there(receive(&two, &told("e", "82.00")).await), first);
                // What the checkout itself says twice is held to all of it.
                assert_eq!(differs(door.record(&two.acme, &sale.clone().quantity(2)).await), ["quantity"]);
            } else {
                let first = recorded(receive(&two, &told("e", "82.00")).await);
                assert_eq!(there(door.record(&two.acme, &sale).await), first);
            }
            there(door.record(&two.acme, &sale).await);
            // So is the invoice of its order.
            let our_key = format!(r#""metadata":{{"idempotency_key":"{o}:paid"}},"currency""#);
            let invoice = invoiced(&format!("i {o}"), &o, &o, "1", "82").replace(r#""currency""#, &our_key);
            was_there(receive(&two, &invoice).await);
            let other = receive(&two, &told("other", "83")).await.unwrap();
            assert_eq!(other, WebhookOutcome::Failed { reason: "conflict" });
        }
    }
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(82 * 4).to_string()));
    two.bystander_saw_nothing().await;
}

/// As the README shows both: the body of a webhook, and the key of a refund.
#[tokio::test]
async fn as_the_readme_says() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let readme = include_str!("../../README.md");
    let body = readme.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let body = body.replace("0192f1a0-7c3e-7000-8000-000000000000", &x.to_string());
    let sale = recorded(two.acme.webhooks().receive(&delivery(&two, &body).await).await);
    assert_eq!((sale.idempotency_key, sale.revenue), (key("order-1001:paid"), usd("82")));
    for first in ["checkout", "webhook"] {
        let data = format!(r#""order_id":"order-1001","amount":10,"currency":"USD","refund_id":"{first}""#);
        let told = event(first, "charge.refunded", &data);
        let k = key(&format!("paid:refund:{first}"));
        let refund = NewConversion::refund(order("order-1001"), usd("10"), k);
        if first == "checkout" {
            new(two.acme.conversions().settle(&refund).await);
            was_there(receive(&two, &told).await);
        } else {
            recorded(receive(&two, &told).await);
            there(two.acme.conversions().settle(&refund).await);
        }
    }
    assert_eq!(net(&two, x, Currency::USD).await, usd("62"));
    two.bystander_saw_nothing().await;
}
