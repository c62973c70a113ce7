//! What comes after the archive, and what else is removed by age.

use std::time::Duration;

use lastprice::chrono::{Days, Utc};
use lastprice::{
    Admin, ArchiveOptions, AssignOutcome, ConversionOutcome, Currency, NewConversion, NewUsage, NewView,
    Reason, TenantHandle, UsageOutcome, ViewOutcome,
};

use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_retention::*;
use crate::support_sql::assert_exact;

#[tokio::test]
async fn what_comes_late_is_neither_priced_wrongly_nor_counted_twice() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let id = with_history(&two, "old", 100).await;
    completed(&two, id, 100).await;
    // Promised for a time that is not over.
    let promise = "UPDATE assignments SET valid_until = now() + interval '1 hour' WHERE experiment_id = $1 AND user_id = 'user-3'";
    two.owner.execute(promise, &[&id.uuid()]).await.unwrap();
    let done = admin.archive_completed(ArchiveOptions::new(), |_| ()).await.unwrap();
    assert_eq!((done.assignments, done.kept, done.experiments, done.promised), (79, 21, 0, 1));
    let before = told(&two, id).await;
    let counts = async || {
        let results = two.acme.metrics().results(id).await.unwrap();
        let arms: u64 = results.arms.iter().map(|arm| arm.counts.conversions).sum();
        (arms, results.others.get("outside").map_or(0, |c| c.conversions), results.quote_mismatches)
    };
    let (arms, _, mismatches) = counts().await;

    // Gone, bought, promised: the baseline, and the quotes of then.
    let outcomes = assign(&two.acme, id, 1..6).await;
    let [gone, .., promised, _, bought] = &outcomes[..] else { panic!() };
    assert!(matches!(gone, AssignOutcome::Outside { reason: Reason::Completed, .. }), "{gone:?}");
    assert_eq!((gone.price(), promised.price(), bought.price()), (usd("29"), usd("39"), usd("29")));
    assert!(matches!(promised, AssignOutcome::Assigned { is_new: false, .. }), "{promised:?}");
    let decided = two.client.assigner(two.id).await.unwrap();
    let decision = decided.assign("old", &user(1));
    assert!(decision.as_ref().is_none_or(|d| !d.is_certain()), "only the database knows: {decision:?}");
    assert_eq!(two.acme.views().record(&NewView::new(id, user(1))).await.unwrap(), ViewOutcome::NotAssigned);
    assert_eq!(told(&two, id).await, before, "nobody was assigned anew");

    // user-2's quote was 29; user-7's was 39, which nobody knows any longer; user-6 pays what everyone outside pays.
    let late = NewConversion::sale(id, user(7), usd("78"), key("late"))
        .quantity(2)
        .order(order("late"))
        .subscription(subscription("late"));
    let entry = settled(&two.acme, &late).await;
    assert_eq!((entry.quote_mismatch, entry.flags.len()), (None, 0), "{entry:?}");
    assert_eq!((entry.list_price, entry.revenue), (Some(usd("39")), usd("78")));
    let again = two.acme.conversions().settle(&late).await.unwrap();
    assert!(matches!(again, ConversionOutcome::Duplicate(_)), "{again:?}");
    let entry = settled(&two.acme, &NewConversion::sale(id, user(6), usd("29"), key("as all"))).await;
    assert_eq!((entry.quote_mismatch, entry.list_price), (Some(false), Some(usd("29"))));
    let said = NewConversion::sale(id, user(8), usd("10"), key("said")).list_price(usd("11"));
    let entry = settled(&two.acme, &said).await;
    assert_eq!((entry.quote_mismatch, entry.list_price), (None, Some(usd("11"))));
    // Before the money moves, what everyone outside sees is the law.
    let asked = NewConversion::sale(id, user(9), usd("39"), key("asked"));
    let refusal = two.acme.conversions().authorise(&asked).await.unwrap();
    let ConversionOutcome::Refused(refusal) = refusal else { panic!("{refusal:?}") };
    assert_eq!(refusal.allowed, Some(usd("29")));
    let asked = NewConversion::sale(id, user(9), usd("29"), key("asked"));
    assert!(matches!(
        two.acme.conversions().authorise(&asked).await.unwrap(),
        ConversionOutcome::Recorded(_)
    ));
    assert_eq!(counts().await, (arms, 4, mismatches));

    // Renewals and refunds find their sale: of then, and of now.
    for (subscription, price, order_id) in
        [(format!("sub-15/{id}"), "39", format!("order-15/{id}")), ("late".into(), "39", "late".into())]
    {
        let renewed =
            settled(&two.acme, &renewal(&subscription, "next", price, &format!("r/{subscription}"))).await;
        assert_eq!((renewed.quote_mismatch, renewed.flags.len()), (Some(false), 0), "{renewed:?}");
        let back = settled(&two.acme, &refund(&order_id, "0.5", &format!("b/{order_id}"))).await;
        assert!(back.sale_id.is_some() && back.flags.is_empty(), "{back:?}");
    }
    let bystander =
        settled(&two.acme, &NewConversion::sale(id, user(10), usd("29"), key("of a buyer"))).await;
    assert_eq!(bystander.quote_mismatch, Some(false));
    assert_eq!(counts().await, (arms + 1, 4, mismatches));
    assert_exact(&superuser, "late").await;
    admin.recount_metrics().await.unwrap();
    assert_eq!(counts().await, (arms + 1, 4, mismatches));

    // A buyer still looks at a price: it counts, and is archived the next time; the first look at them all stands.
    let now = told(&two, id).await;
    assert_eq!(
        two.acme.views().record(&NewView::new(id, user(5)).at(Utc::now())).await.unwrap(),
        ViewOutcome::Recorded
    );
    let seen = told(&two, id).await;
    assert_ne!(seen, now);
    let done = admin.archive_completed(ArchiveOptions::new(), |_| ()).await.unwrap();
    // And the quote whose time is not limited any longer, since it was asked for once more.
    assert_eq!((done.experiments, done.promised, done.views, done.assignments), (1, 0, 1, 1));
    assert_eq!(told(&two, id).await, seen);
    assert_exact(&superuser, "once more").await;
    two.bystander_saw_nothing().await;
}

/// Where nothing is archived, all is compared.
#[tokio::test]
async fn outside_of_an_archive_a_wrong_price_is_flagged() {
    let two = two_tenants().await;
    let id = with_history(&two, "old", 10).await;
    completed(&two, id, 100).await;
    let entry = settled(&two.acme, &NewConversion::sale(id, user(999), usd("39"), key("a"))).await;
    assert_eq!((entry.quote_mismatch, entry.flags.len()), (Some(true), 1));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_was_dealt_with_is_pruned() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    // More than two batches, of both tenants; the old and the young in turn.
    let sql = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash, received_at, status, processed_at)
               SELECT t, 'e-' || n, gen_random_uuid(), 'x', sha256('x'), now() - age, s, CASE WHEN s <> 'pending' THEN now() - age END
               FROM generate_series(1, 6000) n, unnest(ARRAY[$1, $2]::uuid[]) t,
                    LATERAL (SELECT (ARRAY['processed', 'ignored', 'failed', 'pending'])[1 + n % 4] AS s, make_interval(days => 20 * (1 + n / 4 % 2)) AS age) x";
    let tenants: [&(dyn lastprice::tokio_postgres::types::ToSql + Sync); 2] =
        [&two.id.uuid(), &two.other_id.uuid()];
    two.owner.execute(sql, &tenants).await.unwrap();
    let waiting = "INSERT INTO waiting_conversions (tenant_id, idempotency_key, id, kind, ref, entry, received_at)
                   SELECT t, 'w-' || n, gen_random_uuid(), 'refund', 'o/never', '{}', now() - make_interval(days => n % 2 * 400)
                   FROM generate_series(1, 6000) n, unnest(ARRAY[$1, $2]::uuid[]) t";
    two.owner.execute(waiting, &tenants).await.unwrap();
    let month = Duration::from_secs(30 * 86_400);
    assert_eq!(admin.prune_webhooks(month).await.unwrap(), 3000);
    let left = "SELECT string_agg(DISTINCT status || ' ' || (processed_at < now() - interval '30 days'), ', ') FROM webhook_events";
    assert_eq!(
        two.owner.query_one(left, &[]).await.unwrap().get::<_, &str>(0),
        "failed false, failed true, ignored false, processed false"
    );
    assert_eq!(two.count("webhook_events").await, 3000 + 1500);
    assert_eq!(admin.prune_webhooks(month).await.unwrap(), 0);
    assert_eq!(admin.prune_waiting_conversions(Duration::from_secs(365 * 86_400)).await.unwrap(), 6000);
    assert_eq!(two.count("waiting_conversions").await, 3000);
    refused(admin.prune_usage(Duration::MAX).await, "older_than");
    refused(admin.prune_webhooks(Duration::MAX).await, "older_than");
    refused(admin.prune_waiting_conversions(Duration::MAX).await, "older_than");
    two.bystander_saw_nothing().await;
}

/// What has waited for long costs a refresh nothing but once a day: then, what two transactions of hours did not see of each other comes
/// together as well.
#[tokio::test]
async fn a_refresh_looks_at_what_is_new_and_once_a_day_at_all() {
    let two = two_tenants().await;
    let id = one_price(&two.acme, "x").await;
    assign(&two.acme, id, 0..2).await;
    let mut host = two.database.connect_app().await.unwrap();
    let refresh = async || two.owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    refresh().await;
    for n in 0..2 {
        let order_id = format!("o{n}");
        let transaction = repeatable(&mut host).await;
        let waits =
            two.acme.conversions().settle(&refund(&order_id, "5", &format!("back {n}"))).await.unwrap();
        assert_eq!(waits, ConversionOutcome::Waiting);
        let sale = NewConversion::sale(id, user(n), usd("29"), key(&order_id)).order(order(&order_id));
        let within = two.client.within(&transaction, two.id);
        within.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        drop(within);
        transaction.commit().await.unwrap();
    }
    let long_ago =
        "UPDATE waiting_conversions SET received_at = now() - interval '3 hours' WHERE ref = 'o/o0'";
    two.owner.batch_execute(long_ago).await.unwrap();
    refresh().await;
    assert_eq!((net(&two, id, Currency::USD).await, two.count("waiting_conversions").await), (usd("53"), 1));
    // The first one of a day: the last one was yesterday.
    let yesterday = "ALTER MATERIALIZED VIEW experiment_metrics RENAME TO was;
        CREATE MATERIALIZED VIEW experiment_metrics AS
        SELECT tenant_id, experiment_id, refreshed_at - interval '1 day' AS refreshed_at FROM was;
        CREATE UNIQUE INDEX ON experiment_metrics (tenant_id, experiment_id)";
    two.owner.batch_execute(yesterday).await.unwrap();
    refresh().await;
    assert_eq!((net(&two, id, Currency::USD).await, two.count("waiting_conversions").await), (usd("48"), 0));
    two.bystander_saw_nothing().await;
}

/// The reports go, the numbers stay.
#[tokio::test]
async fn reports_of_usage_are_pruned_once_they_are_added_up() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let reports = "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key, created_at)
                   SELECT t, m, (now() - age)::date, n, 'u-' || n, now() - age
                   FROM generate_series(1, 3000) n, unnest(ARRAY[$1, $2]::uuid[]) t, unnest(ARRAY['a', 'b']) m,
                        LATERAL (SELECT make_interval(days => n % 2 * 40) AS age) x";
    two.owner.execute(reports, &[&two.id.uuid(), &two.other_id.uuid()]).await.unwrap();
    let month = Duration::from_secs(30 * 86_400);
    assert_eq!(admin.prune_usage(month).await.unwrap(), 0, "what is not added up stays");
    let used = async |tenant: &TenantHandle| {
        let all = (today() - Days::new(100), today());
        (
            tenant.usage().by_day("a", all.0, all.1).await.unwrap(),
            tenant.usage().total("b", all.0, all.1).await.unwrap(),
        )
    };
    let before = (used(&two.acme).await, used(&two.globex).await);
    assert_eq!(before.0.1, 3000 * 3001 / 2);
    admin.refresh_metrics().await.unwrap();
    assert_eq!(admin.prune_usage(month).await.unwrap(), 4 * 1500);
    assert_eq!(two.count("usage").await, 2 * 1500);
    assert_eq!((used(&two.acme).await, used(&two.globex).await), before);
    admin.recount_metrics().await.unwrap();
    assert_eq!((used(&two.acme).await, used(&two.globex).await), before, "after a recount");
    assert_eq!(admin.prune_usage(month).await.unwrap(), 0);
    // The young ones are still known by their keys.
    let again = NewUsage::new("a", today(), 2, key("u-2"));
    assert!(matches!(two.acme.usage().add(&again).await.unwrap(), UsageOutcome::Duplicate));
    assert_eq!(used(&two.acme).await, before.0);
}
