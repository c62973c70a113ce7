//! One payment, recorded by the checkout under a key of its own, and reported by a webhook that names none: in each order, and at once.

use lastprice::bucketing::Share;
use lastprice::{
    ConversionOutcome, Currency, ExperimentId, MergePolicy, NewConversion, Result, SubscriptionId,
    TenantChange, TenantHandle, TenantScope, WebhookOutcome,
};

use crate::support_ledger::{net, one_price, order, renewal, subscription};
use crate::support_repo::*;
use crate::webhooks::{delivery, event, invoiced, receive, recorded, sold};

pub(crate) type Outcome = Result<ConversionOutcome>;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Door {
    Authorise,
    Settle,
}

pub(crate) const DOORS: [Door; 2] = [Door::Authorise, Door::Settle];

impl Door {
    pub(crate) async fn record(self, scope: &TenantScope<'_>, entry: &NewConversion) -> Outcome {
        match self {
            Door::Authorise => scope.conversions().authorise(entry).await,
            Door::Settle => scope.conversions().settle(entry).await,
        }
    }
}

/// As the checkout says it.
pub(crate) fn bought(id: ExperimentId, n: usize, o: &str, amount: &str, k: &str) -> NewConversion {
    NewConversion::sale(id, user(n), usd(amount), key(k)).order(order(o))
}

/// As the webhook says it.
fn told(e: &str, id: ExperimentId, n: usize, o: &str, amount: &str) -> String {
    sold(e, id, o, amount).replace("\"user-1\"", &format!("\"user-{n}\""))
}

#[track_caller]
pub(crate) fn there(outcome: Outcome) -> lastprice::Conversion {
    match outcome.unwrap() {
        ConversionOutcome::Duplicate(entry) => entry,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
pub(crate) fn new(outcome: Outcome) -> lastprice::Conversion {
    match outcome.unwrap() {
        ConversionOutcome::Recorded(entry) => entry,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
pub(crate) fn differs(outcome: Outcome) -> Vec<&'static str> {
    match outcome.unwrap() {
        ConversionOutcome::Conflict { stored: Some(_), fields } => fields,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
pub(crate) fn was_there(outcome: Result<WebhookOutcome>) -> lastprice::Conversion {
    match outcome.unwrap() {
        WebhookOutcome::Processed(ConversionOutcome::Duplicate(entry)) => entry,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn one_after_the_other() {
    let two = two_tenants().await;
    let (x, y) = (one_price(&two.acme, "x").await, one_price(&two.acme, "y").await);
    let conflict = WebhookOutcome::Failed { reason: "conflict" };
    let mut n = 100;
    for door in DOORS {
        for is_quoted in [true, false] {
            // The webhook's key of the second is a hash.
            for o in [format!("{door:?}-{is_quoted}"), format!("{door:?}-{is_quoted}-{}", "o".repeat(230))] {
                n += 2;
                if is_quoted {
                    assign(&two.acme, x, n..n + 2).await;
                }
                let before = net(&two, x, Currency::USD).await.amount();
                let first = recorded(receive(&two, &told(&format!("e{n}"), x, n, &o, "29")).await);
                for k in ["own", "own", "another"] {
                    let entry = bought(x, n, &o, "29.00", &format!("{k}-{n}"));
                    assert_eq!(there(door.record(&two.acme, &entry).await), first, "{o}");
                }
                // Another amount is told and not counted, whatever was quoted.
                let wrong = bought(x, n, &o, "30", &format!("wrong-{n}"));
                assert_eq!(differs(door.record(&two.acme, &wrong).await), ["revenue"]);
                // So is another user; what he bought besides is another purchase.
                let other = bought(x, n + 1, &o, "29", &format!("friend-{n}"));
                assert_eq!(differs(door.record(&two.acme, &other).await), ["user_id"]);
                new(door.record(&two.acme, &bought(y, n, &o, "29", &format!("else-{n}"))).await);
                was_there(receive(&two, &told(&format!("again{n}"), x, n, &o, "29")).await);

                let back = format!("b{o}");
                let sale = bought(x, n, &back, "29", &format!("back-{n}"));
                let first = new(door.record(&two.acme, &sale).await);
                for e in ["b", "c"] {
                    let told = told(&format!("{e}{n}"), x, n, &back, "29");
                    assert_eq!(was_there(receive(&two, &told).await), first);
                }
                let wrong = receive(&two, &told(&format!("d{n}"), x, n, &back, "30")).await.unwrap();
                assert_eq!(wrong, conflict);
                let other = receive(&two, &told(&format!("f{n}"), x, n + 1, &back, "29")).await.unwrap();
                assert_eq!(other, conflict);
                there(door.record(&two.acme, &sale).await);
                let after = net(&two, x, Currency::USD).await.amount();
                assert_eq!(after - before, usd("58").amount(), "{o}");
            }
        }
    }
    two.bystander_saw_nothing().await;
}

/// An order of several sales, each with a key of its own: as before, whatever another order's webhook says.
#[tokio::test]
async fn several_sales_of_one_order_are_several() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    for door in DOORS {
        let o = format!("{door:?}");
        for k in ["a", "b", &format!("paid:sale:{o}"), "c"] {
            let k = if k.len() == 1 { format!("{o} {k}") } else { k.to_owned() };
            let item = bought(x, 1, &o, "29", &k);
            new(door.record(&two.acme, &item).await);
            there(door.record(&two.acme, &item).await);
        }
        // Sent along by the sender, a key means that and nothing else.
        let mine = format!(r#""experiment_id":"{x}","idempotency_key":"{o} own""#);
        let own = told(&format!("e{o}"), x, 1, &o, "29").replace(&format!(r#""experiment_id":"{x}""#), &mine);
        recorded(receive(&two, &own).await);
        new(door.record(&two.acme, &bought(x, 1, &o, "29", &format!("{o} d"))).await);
    }
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 12).to_string()));
    // In one call as well; of one key the first in the call counts, and of what was reported none.
    recorded(receive(&two, &told("z", x, 2, "z", "29")).await);
    let all = [
        bought(x, 3, "z2", "29", "k1"),
        bought(x, 3, "z1", "29", "k1"),
        bought(x, 2, "z", "29", "k2"),
        bought(x, 2, "z", "28", "k3"),
        bought(x, 3, "z1", "29", "k4"),
    ];
    for _ in 0..2 {
        let outcomes = two.acme.conversions().settle_many(&all).await.unwrap();
        let entry = |n: usize| outcomes[n].clone().entry().map(|e| e.unwrap().order_id.unwrap());
        assert_eq!(
            (entry(0).unwrap(), entry(2).unwrap(), entry(4).unwrap()),
            (order("z2"), order("z"), order("z1"))
        );
        assert_eq!(differs(Ok(outcomes[1].clone())), ["order_id"]);
        assert_eq!(differs(Ok(outcomes[3].clone())), ["revenue"]);
    }
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 15).to_string()));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn whoever_the_user_is_by_now() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    for (door, n) in DOORS.into_iter().zip([10, 20]) {
        // The webhook knows the cookie's id, or the account's; they were merged before it came, or after.
        for (at, (reported, bought_by, merged_first)) in
            [(n, n + 1, false), (n, n + 1, true), (n + 2, n + 3, false), (n + 3, n + 2, false)]
                .into_iter()
                .enumerate()
        {
            let o = format!("{door:?}-{at}");
            let (cookie, account) = (reported.min(bought_by), reported.max(bought_by));
            if !merged_first {
                assign(&two.acme, x, cookie..cookie + 1).await;
            }
            let first = recorded(receive(&two, &told(&format!("e{o}"), x, reported, &o, "29")).await);
            let own = bought(x, bought_by, &o, "29", &format!("own {o}"));
            // The second time they are merged already. Before, they are two people, who have not both paid for it.
            if at % 2 == 0 {
                assert_eq!(differs(door.record(&two.acme, &own).await), ["user_id"]);
            }
            two.acme.users().merge(&user(cookie), &user(account), MergePolicy::FirstQuoteWins).await.unwrap();
            let same = there(door.record(&two.acme, &own).await);
            assert_eq!((same.id, same.user_id), (first.id, user(account)));
            there(door.record(&two.acme, &bought(x, reported, &o, "29", &format!("too {o}"))).await);
        }
    }
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 8).to_string()));
    // The checkout came first, and the webhook knows another id.
    let first = new(two.acme.conversions().settle(&bought(x, 40, "late", "29", "late")).await);
    let webhook = receive(&two, &told("late", x, 41, "late", "29")).await.unwrap();
    assert_eq!(webhook, WebhookOutcome::Failed { reason: "conflict" });
    two.acme.users().merge(&user(41), &user(40), MergePolicy::FirstQuoteWins).await.unwrap();
    assert_eq!(was_there(two.acme.webhooks().retry("late").await), first);
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 9).to_string()));
    // Who was erased since.
    recorded(receive(&two, &told("erased", x, 50, "erased", "29")).await);
    two.acme.users().erase(&user(50)).await.unwrap();
    there(two.acme.conversions().settle(&bought(x, 50, "erased", "29", "erased")).await);
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 10).to_string()));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn trials_and_renewals() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    for door in DOORS {
        let s = format!("s{door:?}");
        let trial = |e: &str, s: &str| {
            let data = format!(
                r#""customer_id":"user-1","subscription_id":"{s}","metadata":{{"experiment_id":"{x}"}}"#
            );
            event(e, "trial.started", &data)
        };
        let started = |s: &str, k: &str| {
            NewConversion::trial_start(x, user(1), SubscriptionId::new(s).unwrap(), key(&format!("{s} {k}")))
        };
        let first = recorded(receive(&two, &trial(&format!("t1{s}"), &s)).await);
        assert_eq!(there(door.record(&two.acme, &started(&s, "own")).await), first);
        // It costs nothing, in any currency.
        let in_euros = |e: &str, s: &str| trial(e, s).replace(r#""sub"#, r#""currency":"EUR","sub"#);
        was_there(receive(&two, &in_euros(&format!("t3{s}"), &s)).await);
        let back = format!("back-{s}");
        let first = new(door.record(&two.acme, &started(&back, "own")).await);
        assert_eq!(was_there(receive(&two, &trial(&format!("t2{s}"), &back)).await), first);
        assert_eq!(was_there(receive(&two, &in_euros(&format!("t4{s}"), &back)).await), first);

        new(door.record(&two.acme, &bought(x, 1, &s, "29", &s).subscription(subscription(&s))).await);
        let invoice =
            |e: &str, o: &str, p: &str, amount: &str| invoiced(&format!("{e}{s}"), &s, o, p, amount);
        let (o2, o3) = (format!("{s}-2"), format!("{s}-3"));
        let paid = |o: &str, p: &str, amount: &str, k: &str| {
            renewal(&s, p, amount, &format!("{s} {k}")).order(order(o))
        };
        let second = recorded(receive(&two, &invoice("i2", &o2, "2", "29")).await);
        assert_eq!(there(door.record(&two.acme, &paid(&o2, "2", "29", "r2")).await), second);
        assert_eq!(differs(door.record(&two.acme, &paid(&o2, "2", "30", "r2 wrong")).await), ["revenue"]);
        let third = new(door.record(&two.acme, &paid(&o3, "3", "29", "r3")).await);
        assert_eq!(was_there(receive(&two, &invoice("i3", &o3, "3", "29")).await), third);
        let wrong = receive(&two, &invoice("i4", &o3, "3", "30")).await.unwrap();
        assert_eq!(wrong, WebhookOutcome::Failed { reason: "conflict" });
    }
    assert_eq!(
        (two.count("conversions").await, net(&two, x, Currency::USD).await),
        (10, usd(&(29 * 6).to_string()))
    );
    two.bystander_saw_nothing().await;
}

/// Users with a quote, without one, and in no experiment: each is written in another way.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Who {
    Quoted,
    New,
    Outside,
}

async fn ready(two: &TwoTenants, x: ExperimentId, who: Who, n: usize) {
    if who == Who::Quoted {
        assign(&two.acme, x, n..n + 1).await;
    }
    let holdout = if who == Who::Outside { Share::ALL } else { Share::NONE };
    two.acme.tenants().update(TenantChange::new().holdout(holdout)).await.unwrap();
}

/// All that was written; of those outside of an experiment nothing is in the metrics.
pub(crate) async fn written(two: &TwoTenants) -> String {
    let sql = "SELECT COALESCE(sum(revenue), 0)::text FROM conversions WHERE tenant_id = $1";
    two.owner.query_one(sql, &[&two.id.uuid()]).await.unwrap().get(0)
}

/// The checkout's transaction is open when the webhook comes.
#[tokio::test]
async fn a_webhook_while_the_checkout_is_open() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let (mut n, mut sum) = (100, 0);
    for who in [Who::Quoted, Who::New, Who::Outside] {
        for door in DOORS {
            for (amount, commits) in [("29", true), ("30", true), ("29", false)] {
                n += 1;
                ready(&two, x, who, n).await;
                let o = format!("o{n}");
                let mut host = two.database.connect_app().await.unwrap();
                let open = host.transaction().await.unwrap();
                let sale = bought(x, n, &o, "29", &format!("own-{n}"));
                new(door.record(&TenantScope::within(&open, two.id), &sale).await);
                let acme: TenantHandle = two.client.tenant(two.id);
                let delivery = delivery(&two, &told(&format!("e{n}"), x, n, &o, amount)).await;
                let webhook = tokio::spawn(async move { acme.webhooks().receive(&delivery).await });
                two.one_waits().await;
                if commits {
                    open.commit().await.unwrap()
                } else {
                    open.rollback().await.unwrap()
                }
                let outcome = webhook.await.unwrap();
                match (amount, commits) {
                    (_, false) => drop(recorded(outcome)),
                    ("29", true) => drop(was_there(outcome)),
                    _ => assert_eq!(outcome.unwrap(), WebhookOutcome::Failed { reason: "conflict" }),
                }
                sum += 29;
                assert_eq!(written(&two).await, sum.to_string(), "{who:?} {door:?} {amount}");
                there(door.record(&two.acme, &sale).await);
            }
        }
    }
    two.bystander_saw_nothing().await;
}

/// The webhook is being processed when the checkout comes, alone or in a transaction that goes on afterwards.
#[tokio::test]
async fn a_checkout_while_the_webhook_is_open() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let (mut n, mut sum) = (100, 0);
    for who in [Who::Quoted, Who::New, Who::Outside] {
        for door in DOORS {
            for (amount, commits, alone) in
                [("29", true, true), ("29", true, false), ("30", true, false), ("29", false, false)]
            {
                // What breaks the law is refused at once, and is not charged.
                if (door, amount) == (Door::Authorise, "30") {
                    continue;
                }
                n += 1;
                ready(&two, x, who, n).await;
                let o = format!("o{n}");
                let open = two.acme.begin().await.unwrap();
                let delivery = delivery(&two, &told(&format!("e{n}"), x, n, &o, "29")).await;
                recorded(open.webhooks().receive(&delivery).await);
                let (acme, id) = (two.client.tenant(two.id), two.id);
                let mut host = two.database.connect_app().await.unwrap();
                let sale = bought(x, n, &o, amount, &format!("own-{n}"));
                // What the host does besides stays.
                let next = bought(x, n, &format!("next-{o}"), "29", &format!("next-{n}"));
                let (again, more) = (sale.clone(), next.clone());
                let checkout = tokio::spawn(async move {
                    if alone {
                        return door.record(&acme, &sale).await;
                    }
                    let transaction = host.transaction().await.unwrap();
                    let scope = TenantScope::within(&transaction, id);
                    let outcome = door.record(&scope, &sale).await;
                    new(door.record(&scope, &next).await);
                    transaction.commit().await.unwrap();
                    outcome
                });
                two.one_waits().await;
                if commits {
                    open.commit().await.unwrap()
                } else {
                    open.rollback().await.unwrap()
                }
                let outcome = checkout.await.unwrap();
                match (amount, commits) {
                    (_, false) => drop(new(outcome)),
                    ("29", true) => drop(there(outcome)),
                    _ => assert_eq!(differs(outcome), ["revenue"]),
                }
                sum += if alone { 29 } else { 58 };
                assert_eq!(written(&two).await, sum.to_string(), "{who:?} {door:?} {amount}");
                if amount == "29" {
                    there(door.record(&two.acme, &again).await);
                }
                if !alone {
                    there(door.record(&two.acme, &more).await);
                }
            }
        }
    }
    two.bystander_saw_nothing().await;
}

/// Whoever is first: nobody waits for ever, and each order counts once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_at_once() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    assign(&two.acme, x, 0..30).await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..60 {
        let o = format!("o{n}");
        let delivery = delivery(&two, &told(&format!("e{n}"), x, n, &o, "29")).await;
        for at in 0..4 {
            let (acme, delivery) = (two.client.tenant(two.id), delivery.clone());
            let sale = bought(x, n, &o, "29", &format!("own-{n}"));
            calls.spawn(async move {
                let is_recorded = match (at + n) % 4 {
                    0 => matches!(
                        acme.conversions().authorise(&sale).await.unwrap(),
                        ConversionOutcome::Recorded(_)
                    ),
                    1 => matches!(
                        acme.conversions().settle(&sale).await.unwrap(),
                        ConversionOutcome::Recorded(_)
                    ),
                    2 => {
                        let many = acme.conversions().settle_many(&[sale]).await.unwrap();
                        matches!(many[0], ConversionOutcome::Recorded(_))
                    }
                    _ => {
                        let outcome = acme.webhooks().receive(&delivery).await.unwrap();
                        assert!(matches!(outcome, WebhookOutcome::Processed(_)), "{outcome:?}");
                        matches!(outcome, WebhookOutcome::Processed(ConversionOutcome::Recorded(_)))
                    }
                };
                usize::from(is_recorded)
            });
        }
    }
    let mut written = 0;
    while let Some(is_recorded) = calls.join_next().await {
        written += is_recorded.unwrap();
    }
    assert_eq!((written, two.count("conversions").await), (60, 60));
    assert_eq!(net(&two, x, Currency::USD).await, usd(&(29 * 60).to_string()));
    assert_eq!(two.count("ledger_locks").await, 0);
    two.bystander_saw_nothing().await;
}
