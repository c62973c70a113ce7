//! What a tenant used: reported, and metered by the database.

use lastprice::chrono::{NaiveDate, TimeDelta, Utc};
use lastprice::{Admin, ConversionKind, ErrorKind, NewConversion, NewUsage, OrderId, UsageOutcome, UserId};

use crate::support_repo::*;
use crate::support_sql::skipped;

const SIGNALS: &str = "signals";

async fn signals(two: &TwoTenants) -> u64 {
    two.acme.usage().total(SIGNALS, today(), today()).await.unwrap()
}

fn day(text: &str) -> NaiveDate {
    text.parse().unwrap()
}

#[tokio::test]
async fn assignments_and_sales_are_signals() {
    let two = two_tenants().await;
    assert_eq!(signals(&two).await, 0);
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..10).await;
    assign(&two.acme, id, 5..12).await;
    assert_eq!(signals(&two).await, 12, "who has a quote is not assigned again");
    two.acme.views().record(&lastprice::NewView::new(id, user(0))).await.unwrap();
    assert_eq!(signals(&two).await, 12, "a view is none");

    let order = OrderId::new("order-0").unwrap();
    let sold = sale(id, 0, "19").order(order.clone());
    for _ in 0..2 {
        let _ = two.acme.conversions().settle(&sold).await.unwrap();
        assert_eq!(signals(&two).await, 13, "a repeated sale is none");
    }
    let back = NewConversion::refund(order, usd("1"), key("back"));
    let back = two.acme.conversions().settle(&back).await.unwrap().entry().unwrap().unwrap();
    assert_eq!((back.kind, signals(&two).await), (ConversionKind::Refund, 13), "a refund is none");
    // A sale of who was not assigned assigns: two signals. On the day on which it happened.
    let yesterday = Utc::now() - TimeDelta::days(1);
    let late = sale(id, 50, "19").at(yesterday);
    two.acme.conversions().settle(&late).await.unwrap().entry().unwrap().unwrap();
    let both = two.acme.usage().total(SIGNALS, yesterday.date_naive(), today()).await.unwrap();
    assert_eq!(both, 15);

    // The host adds nothing to what is metered. Of its own metrics folding changes nothing.
    for metered in [SIGNALS, "experiments", "active_experiments"] {
        refused(two.acme.usage().add(&NewUsage::new(metered, today(), 1, key("own"))).await, "metric");
    }
    let own = NewUsage::new("original.signals", today(), 100, key("own"));
    assert_eq!(two.acme.usage().add(&own).await.unwrap(), UsageOutcome::Added);
    let owns = async || two.acme.usage().total("original.signals", today(), today()).await.unwrap();
    let days =
        async || two.acme.usage().by_day(SIGNALS, today() - TimeDelta::days(9), today()).await.unwrap();
    let before = days().await;
    assert_eq!(before.iter().map(|day| day.amount).sum::<u64>(), 15);
    assert_eq!(owns().await, 100);
    assert!(two.acme.metrics().fold().await.unwrap() > 0);
    assert_eq!((&before, owns().await), (&days().await, 100));
    let folded = "SELECT count(*) FROM usage_totals WHERE tenant_id = $1 AND metric = 'original.signals' AND value = 100";
    assert_eq!(two.owner.query_one(folded, &[&two.id.uuid()]).await.unwrap().get::<_, i64>(0), 1);
    let twice = two.acme.usage().add(&own).await.unwrap();
    assert_eq!((twice, owns().await), (UsageOutcome::Duplicate, 100), "its key is kept");

    let experiments = two.acme.usage().total("experiments", today(), today()).await.unwrap();
    let theirs = two.globex.usage().total(SIGNALS, today() - TimeDelta::days(1), today()).await.unwrap();
    assert_eq!((experiments, theirs), (1, 21));
    two.bystander_saw_nothing().await;
}

/// What was rolled back was not used; what was committed was.
#[tokio::test]
async fn metering_is_part_of_the_transaction() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    for (commit, expected) in [(false, 0), (true, 1)] {
        let transaction = two.acme.begin().await.unwrap();
        transaction.assignments().assign(id, &user(1)).await.unwrap();
        assert_eq!(
            transaction.usage().total(SIGNALS, today(), today()).await.unwrap(),
            1,
            "seen from within"
        );
        assert_eq!(signals(&two).await, 0, "not from elsewhere");
        if commit {
            transaction.commit().await.unwrap()
        } else {
            transaction.rollback().await.unwrap()
        }
        assert_eq!(signals(&two).await, expected);
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_was_used_stays_used_when_an_experiment_is_deleted() {
    let two = two_tenants().await;
    let used = async || {
        let usage = two.acme.usage();
        let (from, to) = (today() - TimeDelta::days(5), today());
        (usage.by_day(SIGNALS, from, to).await.unwrap(), usage.by_day("experiments", from, to).await.unwrap())
    };
    // Of each a part is in the totals; of the second one the rest is pending. Of two days.
    for name in ["x", "y"] {
        let id = active(&two.acme, name).await.id;
        assign(&two.acme, id, 0..10).await;
        two.acme.metrics().fold().await.unwrap();
        assign(&two.acme, id, 10..15).await;
        let earlier = NewConversion::sale(id, user(1), usd("19"), key(name));
        let earlier = earlier.at(Utc::now() - TimeDelta::days(2));
        two.acme.conversions().settle(&earlier).await.unwrap().entry().unwrap().unwrap();
    }
    let draft = draft(&two.acme, "z").await.id;
    let before = used().await;
    assert_eq!(before.0.iter().map(|day| day.amount).collect::<Vec<_>>(), [2, 30]);
    let activated: Vec<(NaiveDate, u64)> = before.1.iter().map(|of| (of.day, of.amount)).collect();
    assert_eq!(activated, [(today(), 2)]);

    two.acme.experiments().delete_draft(draft).await.unwrap();
    let delete = "DELETE FROM experiments WHERE tenant_id = $1 AND key = $2";
    assert_eq!(two.owner.execute(delete, &[&two.id.uuid(), &"y"]).await.unwrap(), 1);
    assert_eq!(before, used().await);
    two.acme.metrics().fold().await.unwrap();
    assert_eq!(before, used().await);
    // Nor does a recount forget it.
    two.owner.execute(delete, &[&two.id.uuid(), &"x"]).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    admin.recount_metrics().await.unwrap();
    assert!(admin.refresh_metrics().await.unwrap());
    assert_eq!(before, used().await);

    // With its tenant everything goes, an experiment that used something as well.
    let last = active(&two.acme, "last").await.id;
    assign(&two.acme, last, 0..10).await;
    assert!(admin.tenants().delete(two.id).await.unwrap());
    for table in ["usage", "usage_totals", "tenant_limits", "experiments"] {
        assert_eq!(two.count(table).await, 0, "{table}");
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn billing_periods() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let usage = two.acme.usage();
    for (n, date) in ["2024-01-31", "2024-02-14", "2024-02-15", "2024-02-29", "2024-03-14", "2024-03-15"]
        .iter()
        .enumerate()
    {
        let amount = 10u64.pow(n as u32);
        let _ = usage.add(&NewUsage::new("exports", day(date), amount, key(date))).await.unwrap();
    }
    let period = async |of: &str| {
        let period = two.acme.usage().in_period("exports", day(of)).await.unwrap();
        (period.first_day.to_string(), period.last_day.to_string(), period.amount)
    };
    let expect = |first: &str, last: &str, amount| (first.to_owned(), last.to_owned(), amount);
    assert_eq!(period("2024-02-01").await, expect("2024-02-01", "2024-02-29", 1110));
    assert_eq!(period("2024-02-29").await, expect("2024-02-01", "2024-02-29", 1110));
    assert_eq!(period("2024-01-31").await, expect("2024-01-01", "2024-01-31", 1));
    admin.limits().set_billing_day(two.id, 15).await.unwrap();
    assert_eq!(period("2024-02-15").await, expect("2024-02-15", "2024-03-14", 11100));
    assert_eq!(period("2024-03-14").await, expect("2024-02-15", "2024-03-14", 11100));
    assert_eq!(period("2024-02-14").await, expect("2024-01-15", "2024-02-14", 11));
    admin.limits().set_billing_day(two.id, 28).await.unwrap();
    assert_eq!(period("2024-02-29").await, expect("2024-02-28", "2024-03-27", 111_000));
    assert_eq!(period("2023-02-27").await, expect("2023-01-28", "2023-02-27", 0));
    // The database reckons the same for today as the library for any day.
    for billing_day in [1, 2, 15, 27, 28] {
        admin.limits().set_billing_day(two.id, billing_day).await.unwrap();
        let (quota, period) = (usage.check_quota("exports").await, usage.in_period("exports", today()).await);
        let (quota, period) = (quota.unwrap(), period.unwrap());
        assert_eq!(quota.first_day, Some(period.first_day), "{billing_day}");
        let reset = quota.resets_at.unwrap();
        assert_eq!(reset.date_naive(), period.last_day.succ_opt().unwrap(), "{billing_day}");
        assert_eq!(reset.time(), lastprice::chrono::NaiveTime::MIN);
    }
    for bad in [0, 29, u32::MAX] {
        refused(admin.limits().set_billing_day(two.id, bad).await, "day");
    }
    is_kind(admin.limits().set_billing_day(lastprice::TenantId::new(), 3).await, ErrorKind::NotFound);
    is_kind(
        two.client.tenant(lastprice::TenantId::new()).usage().in_period("exports", today()).await,
        ErrorKind::NotFound,
    );
    refused(usage.in_period("Exports", today()).await, "metric");
    refused(usage.in_period("exports", day("1969-12-31")).await, "day");
    two.bystander_saw_nothing().await;
}

/// However much waits, a fold takes a part of it, and every sum between two folds is right.
#[tokio::test]
async fn what_waits_is_folded_in_parts() {
    let two = two_tenants().await;
    let reported = "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
                    SELECT $1, 'calls', $2, 2, 'k' || n FROM generate_series(1, 120000) n";
    two.owner.execute(reported, &[&two.id.uuid(), &today()]).await.unwrap();
    let waits = async |id: lastprice::TenantId| -> i64 {
        let waits = "SELECT count(*) FROM usage WHERE tenant_id = $1 AND NOT folded";
        two.owner.query_one(waits, &[&id.uuid()]).await.unwrap().get(0)
    };
    for left in [70_000, 20_000, 0] {
        let before = two.acme.usage().total("calls", today(), today()).await.unwrap(); // which folds afterwards
        assert_eq!((before, waits(two.id).await), (240_000, left));
    }
    assert_eq!(two.acme.usage().total("calls", today(), today()).await.unwrap(), 240_000);
    assert_eq!(waits(two.other_id).await, 1, "a tenant folds its own");
    two.bystander_saw_nothing().await;

    // Who folds hears how many it were. Of all tenants together it is no more in one turn, and a refresh takes as many turns as it needs.
    for id in [two.id, two.other_id] {
        let more = "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
                    SELECT $1, 'more', $2, 1, 'k' || n FROM generate_series(1, 30000) n";
        two.owner.execute(more, &[&id.uuid(), &today()]).await.unwrap();
    }
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let folded = two.owner.query_one("SELECT fold_metric_deltas(NULL)", &[]).await.unwrap().get::<_, i64>(0);
    assert!((50_000..50_100).contains(&folded), "{folded}: and deltas of metrics");
    assert_eq!(waits(two.id).await + waits(two.other_id).await, 10_001);
    for id in [two.id, two.other_id] {
        let more = "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
                    SELECT $1, 'yet.more', $2, 1, 'k' || n FROM generate_series(1, 60000) n";
        two.owner.execute(more, &[&id.uuid(), &today()]).await.unwrap();
    }
    assert!(admin.refresh_metrics().await.unwrap());
    assert_eq!(waits(two.id).await + waits(two.other_id).await, 0);
    for tenant in [&two.acme, &two.globex] {
        assert_eq!(tenant.usage().total("more", today(), today()).await.unwrap(), 30_000);
    }
}

/// Who only adds leaves no more behind than a fold takes, though nobody reads.
#[tokio::test]
async fn who_adds_much_has_it_folded() {
    let two = two_tenants().await;
    let waits = async |id: lastprice::TenantId| -> i64 {
        let waits = "SELECT count(*) FROM usage WHERE tenant_id = $1 AND NOT folded";
        two.owner.query_one(waits, &[&id.uuid()]).await.unwrap().get(0)
    };
    let report = async |n: usize| {
        let calls = (0..1000).map(|i| NewUsage::new("calls", today(), 2, key(&format!("{n}-{i}"))));
        let _ = two.acme.usage().add_many(&calls.collect::<Vec<_>>()).await.unwrap();
    };
    for n in 0..24 {
        report(n).await;
    }
    for _ in 0..3 {
        report(23).await; // what was there already is not counted
    }
    assert_eq!(waits(two.id).await, 24_000);
    report(24).await;
    for _ in 0..200 {
        if waits(two.id).await == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!((waits(two.id).await, waits(two.other_id).await), (0, 1));
    report(25).await;
    assert_eq!(waits(two.id).await, 1000, "it counts anew");
    assert_eq!(two.acme.usage().total("calls", today(), today()).await.unwrap(), 52_000);
    two.bystander_saw_nothing().await;
}

/// Writers of signals and usage, folds, refreshes and readers at once: every reader sees a sum that was true, and nothing is lost.
#[tokio::test]
async fn nothing_is_lost_while_it_is_folded() {
    const WRITERS: usize = 6;
    const EACH: usize = 25;
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut others = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (tenant, stopped) = (two.client.tenant(two.id), stopped.clone());
        others.spawn(async move {
            let mut last = (0, 0);
            while !*stopped.borrow() {
                let _ = tenant.metrics().fold().await.unwrap();
                let usage = tenant.usage();
                let now = (
                    usage.total(SIGNALS, today(), today()).await.unwrap(),
                    usage.total("calls", today(), today()).await.unwrap(),
                );
                assert!(now.0 >= last.0 && now.1 >= last.1, "{now:?} after {last:?}");
                last = now;
            }
        });
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let tenant = two.client.tenant(two.id);
        writers.spawn(async move {
            for n in 0..EACH {
                let name = format!("{writer}-{n}");
                tenant.assignments().assign(id, &UserId::new(name.clone()).unwrap()).await.unwrap();
                let _ = tenant.usage().add(&NewUsage::new("calls", today(), 3, key(&name))).await.unwrap();
            }
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    stop.send(true).unwrap();
    while let Some(other) = others.join_next().await {
        other.unwrap();
    }
    let all = (WRITERS * EACH) as u64;
    assert_eq!(signals(&two).await, all);
    assert_eq!(two.acme.usage().total("calls", today(), today()).await.unwrap(), 3 * all);
    two.bystander_saw_nothing().await;
}

/// What the function of quotas reads, it finds by the days of the period: not a year of all experiments.
#[tokio::test]
async fn a_quota_reads_its_period_only() {
    let two = two_tenants().await;
    let (client, mut connection) =
        tokio_postgres::connect(&two.database.superuser_url(), tokio_postgres::NoTls).await.unwrap();
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|c| connection.poll_message(c)).await {
            if let tokio_postgres::AsyncMessage::Notice(notice) = message {
                let _ = sender.send(notice.message().to_owned());
            }
        }
    });
    if client.batch_execute("LOAD 'auto_explain'").await.is_err() {
        skipped("auto_explain is not installed beside the server");
        return;
    }
    let ask = format!(
        "SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on; SET client_min_messages = log;
         BEGIN; SET LOCAL ROLE lastprice_app; SET LOCAL app.tenant_id = '{0}'; SET LOCAL plan_cache_mode = force_generic_plan;
         SELECT usage_quota('{0}', 'signals'); COMMIT",
        two.id
    );
    client.batch_execute(&ask).await.unwrap();
    drop(client);
    let mut plans = String::new();
    while let Some(plan) = heard.recv().await {
        plans += &plan;
    }
    for searched in
        ["(day + 0) >=", "(day >= ", "usage_totals_pkey", "usage_pending_idx", "metric_deltas_pkey"]
    {
        assert!(plans.contains(searched), "{searched}: {plans}");
    }
    assert!(!plans.contains("Seq Scan"), "{plans}");
}
