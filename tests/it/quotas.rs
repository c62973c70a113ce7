//! Limits: who has which, taking from them, and how many experiments are active.

use std::time::Duration;

use lastprice::{
    Admin, Client, ConsumeOutcome, Error, ErrorKind, ExperimentId, IdempotencyKey, LimitPeriod, LimitSource,
    NewTenant, NewUsage, Plan, Quota, TenantChange, TenantHandle, TenantId, TenantScope,
};
use lastprice_testkit::PrivateCluster;

use crate::support_repo::*;

const ACTIVE: &str = "active_experiments";

async fn admin(two: &TwoTenants) -> Admin {
    Admin::connect(&two.database.owner_url()).await.unwrap()
}

/// Limit and use.
async fn quota(tenant: &TenantHandle, metric: &str) -> (Option<u64>, u64) {
    let quota = tenant.usage().check_quota(metric).await.unwrap();
    (quota.limit, quota.used)
}

#[track_caller]
fn exceeded(error: &Error, metric: &str, limit: u64, used: u64) {
    let quota = error.exceeded_quota().unwrap_or_else(|| panic!("{error:?}"));
    assert_eq!((error.kind(), error.kind().http_status()), (ErrorKind::QuotaExceeded, 429));
    assert_eq!((quota.metric.as_str(), quota.limit, quota.used), (metric, limit, used));
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_tenants_own_limit_goes_before_its_plans() {
    let two = two_tenants().await;
    let (admin, acme) = (admin(&two).await, &two.acme);
    let limits = admin.limits();
    assert_eq!(quota(acme, "signals").await, (None, 0), "an enterprise");
    for (plan, limit) in [(Plan::Free, 10_000), (Plan::Starter, 100_000), (Plan::Pro, 1_000_000)] {
        acme.tenants().update(TenantChange::new().plan(plan)).await.unwrap();
        assert_eq!(quota(acme, "signals").await, (Some(limit), 0), "{plan}");
    }
    assert_eq!(quota(acme, "exports").await, (None, 0), "what nobody limits");

    limits.set_plan(Plan::Pro, "signals", LimitPeriod::Day, Some(7)).await.unwrap();
    limits.set_plan(Plan::Free, "exports", LimitPeriod::Ever, Some(1)).await.unwrap();
    limits.set_plan(Plan::Free, "exports", LimitPeriod::Month, Some(0)).await.unwrap();
    let pro = limits.of_plan(Plan::Pro).await.unwrap();
    let pro: Vec<_> = pro.iter().map(|l| (l.metric.as_str(), l.period, l.limit)).collect();
    let expected = [
        (ACTIVE, LimitPeriod::Ever, Some(100)),
        ("api_calls", LimitPeriod::Month, Some(1_000_000)),
        ("signals", LimitPeriod::Day, Some(7)),
    ];
    assert_eq!(pro, expected);
    let free = limits.of_plan(Plan::Free).await.unwrap();
    assert_eq!(
        (free[2].metric.as_str(), free[2].period, free[2].limit),
        ("exports", LimitPeriod::Month, Some(0))
    );
    assert!(limits.of_plan(Plan::Enterprise).await.unwrap().is_empty());
    let signals = acme.usage().check_quota("signals").await.unwrap();
    assert_eq!((signals.period, signals.first_day), (LimitPeriod::Day, Some(today())));
    assert_eq!(signals.resets_at.unwrap().date_naive(), today().succ_opt().unwrap());

    limits.set_tenant(two.id, "signals", LimitPeriod::Ever, Some(u64::MAX / 2)).await.unwrap();
    let own = acme.usage().check_quota("signals").await.unwrap();
    assert_eq!((own.limit, own.period), (Some(u64::MAX / 2), LimitPeriod::Ever));
    assert_eq!((own.first_day, own.resets_at), (None, None));
    limits.set_plan(Plan::Pro, "exports", LimitPeriod::Day, None).await.unwrap();
    let all = limits.of_tenant(two.id).await.unwrap();
    let all: Vec<_> = all.iter().map(|l| (l.metric.as_str(), l.period, l.limit, l.source)).collect();
    let expected = [
        (ACTIVE, LimitPeriod::Ever, Some(100), LimitSource::BuiltIn),
        ("api_calls", LimitPeriod::Month, Some(1_000_000), LimitSource::BuiltIn),
        ("exports", LimitPeriod::Day, None, LimitSource::Plan),
        ("signals", LimitPeriod::Ever, Some(u64::MAX / 2), LimitSource::Tenant),
    ];
    assert_eq!(all, expected);
    assert!(limits.of_tenant(two.other_id).await.unwrap().is_empty(), "nothing of an enterprise");
    is_kind(limits.of_tenant(TenantId::new()).await, ErrorKind::NotFound);
    limits.set_tenant(two.id, "signals", LimitPeriod::Month, None).await.unwrap();
    assert_eq!(quota(acme, "signals").await, (None, 0), "unlimited, whatever the plan");
    assert!(limits.clear_tenant(two.id, "signals").await.unwrap());
    assert!(!limits.clear_tenant(two.id, "signals").await.unwrap());
    assert_eq!(quota(acme, "signals").await, (Some(7), 0));
    assert!(limits.clear_plan(Plan::Pro, "signals").await.unwrap());
    assert!(!limits.clear_plan(Plan::Pro, "signals").await.unwrap());
    assert_eq!(quota(acme, "signals").await, (Some(1_000_000), 0));

    let nobody = TenantId::new();
    is_kind(limits.set_tenant(nobody, "signals", LimitPeriod::Ever, None).await, ErrorKind::NotFound);
    is_kind(two.client.tenant(nobody).usage().check_quota("signals").await, ErrorKind::NotFound);
    is_kind(two.client.tenant(nobody).usage().check_quota(ACTIVE).await, ErrorKind::NotFound);
    is_kind(two.client.tenant(nobody).usage().try_consume("x", 1, &key("k")).await, ErrorKind::NotFound);
    refused(limits.set_plan(Plan::Pro, "Signals", LimitPeriod::Day, None).await, "metric");
    refused(limits.set_tenant(two.id, "x", LimitPeriod::Day, Some(u64::MAX)).await, "limit");
    refused(limits.clear_plan(Plan::Pro, "").await, "metric");
    refused(limits.clear_tenant(two.id, "").await, "metric");
    refused(acme.usage().check_quota("é").await, "metric");
    for metered in [ACTIVE, "signals", "experiments"] {
        refused(acme.usage().try_consume(metered, 1, &key("k")).await, "metric");
    }
    for period in [LimitPeriod::Day, LimitPeriod::Month] {
        refused(limits.set_plan(Plan::Pro, ACTIVE, period, Some(1)).await, "period");
        refused(limits.set_tenant(two.id, ACTIVE, period, Some(1)).await, "period");
    }
    refused(acme.usage().try_consume("x", 1_000_000_000_001, &key("k")).await, "amount");
    // Who is no owner sets nothing.
    let other = Admin::connect(&two.database.app_url()).await.unwrap();
    refused(other.limits().set_tenant(two.id, "x", LimitPeriod::Day, None).await, "owner_url");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_taken_is_taken_once() {
    let two = two_tenants().await;
    let (usage, limits) = (two.acme.usage(), admin(&two).await);
    limits.limits().set_tenant(two.id, "exports", LimitPeriod::Month, Some(10)).await.unwrap();
    let take = async |amount, k: &str| usage.try_consume("exports", amount, &key(k)).await;
    let first = take(4, "a").await.unwrap();
    assert!(
        matches!(&first, ConsumeOutcome::Consumed(q) if (q.used, q.remaining()) == (4, Some(6))),
        "{first:?}"
    );
    let again = take(4, "a").await.unwrap();
    assert!(
        matches!(&again, ConsumeOutcome::Duplicate { quota: q, day } if q.used == 4 && *day == today()),
        "{again:?}"
    );
    assert_eq!(again.into_result().unwrap().remaining(), Some(6));
    assert_eq!(is_kind(take(5, "a").await, ErrorKind::Conflict).conflicting_fields(), ["amount"]);
    // What is added counts, and is not refused; so there may be more than allowed.
    let add = async |amount, k| usage.add(&NewUsage::new("exports", today(), amount, key(k))).await.unwrap();
    let _ = add(5, "added").await;
    let over = take(2, "b").await.unwrap();
    assert!(
        matches!(&over, ConsumeOutcome::Exceeded(q) if (q.used, q.remaining()) == (9, Some(1))),
        "{over:?}"
    );
    let error = over.into_result().unwrap_err();
    exceeded(&error, "exports", 10, 9);
    let resets = error.exceeded_quota().unwrap().resets_at.unwrap();
    assert_eq!(error.exceeded_quota().unwrap().requested, 2);
    let said =
        format!("2 of `exports` were asked for, 1 of 10 is left until {} 00:00 UTC", resets.date_naive());
    assert_eq!(error.to_string(), said);
    assert!(resets > lastprice::chrono::Utc::now());
    assert!(matches!(take(1, "b").await.unwrap(), ConsumeOutcome::Consumed(q) if q.remaining() == Some(0)));
    refused(take(0, "nothing").await, "amount");
    let _ = add(90, "more").await;
    assert!(
        matches!(take(1, "none").await.unwrap(), ConsumeOutcome::Exceeded(q) if q.remaining() == Some(0))
    );
    assert!(matches!(take(5, "added").await.unwrap(), ConsumeOutcome::Duplicate { .. }), "a key is a key");
    // Of another period, and of the other tenant, nothing counts.
    let old = today() - lastprice::chrono::TimeDelta::days(40);
    let _ = usage.add(&NewUsage::new("exports", old, 1000, key("old"))).await.unwrap();
    assert_eq!(quota(&two.acme, "exports").await, (Some(10), 100));
    let again = take(1000, "old").await.unwrap();
    assert!(
        matches!(&again, ConsumeOutcome::Duplicate { quota: q, day } if q.used == 100 && *day == old),
        "{again:?}"
    );
    limits.limits().set_tenant(two.id, "exports", LimitPeriod::Ever, Some(10)).await.unwrap();
    assert_eq!(quota(&two.acme, "exports").await, (Some(10), 1100));
    assert_eq!(quota(&two.globex, "exports").await, (None, 0));
    // Signals are metered, and a limit of them refuses no quote and no sale.
    limits.limits().set_tenant(two.id, "signals", LimitPeriod::Day, Some(3)).await.unwrap();
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..5).await;
    two.acme.conversions().settle(&sale(id, 1, "19")).await.unwrap().entry().unwrap().unwrap();
    assert_eq!(quota(&two.acme, "signals").await, (Some(3), 6));
    // More than a number holds.
    for n in 0..3 {
        let unlimited = usage.try_consume("much", 1_000_000_000_000, &key(&n.to_string())).await.unwrap();
        assert_eq!((unlimited.quota().limit, unlimited.quota().used), (None, (n + 1) * 1_000_000_000_000));
    }
    let huge = "INSERT INTO usage_totals VALUES ($1, 'much', $2, 1e30)";
    two.owner.execute(huge, &[&two.id.uuid(), &today()]).await.unwrap();
    assert_eq!(quota(&two.acme, "much").await, (None, i64::MAX as u64));
    let more = usage.try_consume("much", 1, &key("more")).await.unwrap();
    assert_eq!(more.quota().used, i64::MAX as u64);
    two.bystander_saw_nothing().await;
}

/// Until it is known: of many who wait on a busy machine one may wait for a second.
async fn take_until_known(tenant: &TenantHandle, amount: u64, k: &IdempotencyKey) -> ConsumeOutcome {
    loop {
        match tenant.usage().try_consume("exports", amount, k).await {
            Err(error) if error.is_retryable() => {}
            known => return known.unwrap(),
        }
    }
}

/// 16 writers want more than there is, while others add, fold and look: exactly what there is is taken.
#[tokio::test]
async fn exact_with_sixteen_writers() {
    const LIMIT: u64 = 150;
    let two = two_tenants().await;
    let admin = admin(&two).await;
    admin.limits().set_tenant(two.id, "exports", LimitPeriod::Month, Some(LIMIT)).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..16u64 {
        let (client, id) = (two.client.clone(), two.id);
        writers.spawn(async move {
            let tenant = client.tenant(id);
            let (mut taken, mut refused) = (0, 0);
            for n in 0..20u64 {
                let (amount, k) = (1 + (writer + n) % 3, key(&format!("{writer}-{n}")));
                let outcome = take_until_known(&tenant, amount, &k).await;
                assert!(outcome.quota().used <= LIMIT, "{outcome:?}");
                match outcome {
                    ConsumeOutcome::Consumed(_) => taken += amount,
                    ConsumeOutcome::Exceeded(q) => {
                        assert!(q.used + amount > LIMIT, "{amount} refused of {q:?}");
                        refused += 1;
                    }
                    other => panic!("{other:?}"),
                }
                if n % 7 == 0 {
                    tenant.metrics().fold().await.unwrap();
                    let again = take_until_known(&tenant, amount, &k).await;
                    assert!(!matches!(again, ConsumeOutcome::Consumed(_)) || taken == 0, "{again:?}");
                }
            }
            (taken, refused)
        });
    }
    let (mut taken, mut refused) = (0, 0);
    while let Some(writer) = writers.join_next().await {
        let (t, r) = writer.unwrap();
        (taken, refused) = (taken + t, refused + r);
    }
    assert!(refused > 0);
    let last = two.acme.usage().try_consume("exports", 1, &key("last")).await.unwrap();
    assert!(matches!(last, ConsumeOutcome::Exceeded(_)), "amounts of 1 were asked for to the end");
    assert_eq!(taken, LIMIT);
    assert_eq!(quota(&two.acme, "exports").await, (Some(LIMIT), LIMIT));
    assert_eq!(quota(&two.globex, "exports").await, (None, 0));
    two.bystander_saw_nothing().await;
}

/// In a host's transaction: until that has ended, who else takes of it waits, and of another metric or tenant does not.
#[tokio::test]
async fn in_a_hosts_transaction() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    for metric in ["exports", "imports"] {
        admin.limits().set_tenant(two.id, metric, LimitPeriod::Month, Some(2)).await.unwrap();
    }
    let mut host = two.database.connect_app().await.unwrap();
    for commits in [false, true] {
        let transaction = host.transaction().await.unwrap();
        let scope = TenantScope::within(&transaction, two.id);
        let taken = scope.usage().try_consume("exports", 2, &key("host")).await.unwrap();
        assert!(matches!(taken, ConsumeOutcome::Consumed(_)), "{taken:?}");
        let over = scope.usage().try_consume("exports", 1, &key("host 2")).await.unwrap();
        exceeded(&over.into_result().unwrap_err(), "exports", 2, 2);
        is_kind(scope.usage().try_consume("exports", 1, &key("host")).await, ErrorKind::Conflict);
        let k = key(&format!("other {commits}"));
        let other = two.acme.usage().try_consume("imports", 1, &k).await.unwrap();
        assert!(matches!(other, ConsumeOutcome::Consumed(_)), "it does not wait");
        let (client, id) = (two.client.clone(), two.id);
        let waiter = tokio::spawn(async move {
            client.tenant(id).usage().try_consume("exports", 1, &key("waiter")).await.unwrap()
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waiter.is_finished(), "it knows what is not so yet");
        transaction.execute("SELECT 1", &[]).await.unwrap(); // which has outlived all refusals
        if commits {
            transaction.commit().await.unwrap()
        } else {
            transaction.rollback().await.unwrap()
        }
        let waited = waiter.await.unwrap();
        assert_eq!(matches!(waited, ConsumeOutcome::Exceeded(_)), commits, "{waited:?}");
        assert_eq!(matches!(waited, ConsumeOutcome::Consumed(_)), !commits, "{waited:?}");
        let forget = "DELETE FROM usage WHERE tenant_id = $1 AND metric = 'exports'";
        two.owner.execute(forget, &[&two.id.uuid()]).await.unwrap();
    }
    // With an older snapshot it would not see what others take, nor by which keys.
    let transaction = host.build_transaction().isolation_level(REPEATABLE_READ).start().await.unwrap();
    transaction.execute("SELECT 1", &[]).await.unwrap();
    for metric in ["exports", "free"] {
        assert!(two.acme.usage().try_consume(metric, 1, &key("newer")).await.unwrap().into_result().is_ok());
        let scope = TenantScope::within(&transaction, two.id);
        is_kind(scope.usage().try_consume(metric, 1, &key("newer")).await, ErrorKind::Conflict);
    }
    transaction.execute("SELECT 1", &[]).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(quota(&two.acme, "free").await, (None, 1));
    two.bystander_saw_nothing().await;
}

/// One tenant's transaction takes and stays open. Who else takes of it hears so in a second, and gives the connections back: more of
/// them than there are leave some to others.
#[tokio::test]
async fn who_keeps_a_quota_keeps_no_connections() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    admin.limits().set_tenant(two.id, "exports", LimitPeriod::Month, Some(5)).await.unwrap();
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, Some(2)).await.unwrap();
    let ids = drafts(&two.acme, 2).await;
    let client = Client::builder().url(two.database.app_url()).pool_size(4).build().unwrap();
    let open = client.tenant(two.id).begin().await.unwrap();
    let _ = open.usage().try_consume("exports", 1, &key("open")).await.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..12 {
        let tenant = client.tenant(two.id);
        callers.spawn(async move { tenant.usage().try_consume("exports", 1, &key(&n.to_string())).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await; // all the others have connections, or wait for them
    assert_eq!(quota(&client.tenant(two.other_id), "exports").await, (None, 0), "another tenant is served");
    while let Some(caller) = callers.join_next().await {
        assert!(is_kind(caller.unwrap(), ErrorKind::Unavailable).is_retryable());
    }
    // A place for an experiment is kept like that, too; who asks for it again in a transaction keeps that.
    open.experiments().activate(ids[0]).await.unwrap();
    is_kind(two.acme.experiments().activate(ids[1]).await, ErrorKind::Unavailable);
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let scope = TenantScope::within(&transaction, two.id);
    is_kind(scope.experiments().activate(ids[1]).await, ErrorKind::Unavailable);
    is_kind(scope.usage().try_consume("exports", 1, &key("late")).await, ErrorKind::Unavailable);
    open.commit().await.unwrap();
    scope.experiments().activate(ids[1]).await.unwrap();
    let _ = scope.usage().try_consume("exports", 1, &key("late")).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(quota(&two.acme, "exports").await, (Some(5), 2));
    assert_eq!(quota(&two.acme, ACTIVE).await, (Some(2), 2));
    two.bystander_saw_nothing().await;
}

/// The owner sees all tenants, but what is used only of the bound one: of another nothing is said, and nothing taken.
#[tokio::test]
async fn an_owner_without_the_tenant_is_told_nothing() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    admin.limits().set_tenant(two.id, "exports", LimitPeriod::Month, Some(3)).await.unwrap();
    let _ = two.acme.usage().try_consume("exports", 3, &key("all")).await.unwrap();
    for bound in [String::new(), two.other_id.to_string(), two.id.to_string()] {
        let is_bound = bound == two.id.to_string();
        two.owner.execute("SELECT set_config('app.tenant_id', $1, false)", &[&bound]).await.unwrap();
        let consume = "SELECT outcome, quota, used FROM consume_usage($1, 'exports', 2, 'owner')";
        let row = two.owner.query_one(consume, &[&two.id.uuid()]).await.unwrap();
        let taken: (Option<String>, Option<i64>, Option<i64>) = (row.get(0), row.get(1), row.get(2));
        let quota = "SELECT period, used FROM usage_quota($1, $2)";
        let of = async |metric| {
            let row = two.owner.query_one(quota, &[&two.id.uuid(), &metric]).await.unwrap();
            (row.get::<_, Option<String>>(0), row.get::<_, Option<i64>>(1))
        };
        if is_bound {
            assert_eq!(taken, (Some("exceeded".to_owned()), Some(3), Some(3)));
            assert_eq!(of("exports").await, (Some("month".to_owned()), Some(3)));
            assert_eq!(of(ACTIVE).await, (Some("ever".to_owned()), Some(0)));
        } else {
            assert_eq!(taken, (None, None, None), "{bound}");
            assert_eq!((of("exports").await, of(ACTIVE).await), ((None, None), (None, None)), "{bound}");
        }
    }
    two.owner.execute("RESET app.tenant_id", &[]).await.unwrap();
    assert_eq!(quota(&two.acme, "exports").await, (Some(3), 3));
    two.bystander_saw_nothing().await;
}

/// Two transactions take of two metrics in opposite order: neither is ended, and what they took before stays theirs.
#[tokio::test]
async fn two_that_wait_for_each_other_both_go_on() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    for metric in ["exports", "imports"] {
        admin.limits().set_tenant(two.id, metric, LimitPeriod::Month, Some(5)).await.unwrap();
    }
    let mut hosts = [two.database.connect_app().await.unwrap(), two.database.connect_app().await.unwrap()];
    let [first, second] = &mut hosts;
    let (first, second) = (first.transaction().await.unwrap(), second.transaction().await.unwrap());
    let take = async |transaction: &_, metric, k: &str| {
        TenantScope::within(transaction, two.id).usage().try_consume(metric, 1, &key(k)).await
    };
    let _ = take(&first, "exports", "first").await.unwrap();
    let _ = take(&second, "imports", "second").await.unwrap();
    let (a, b) = tokio::join!(take(&first, "imports", "first"), take(&second, "exports", "second"));
    is_kind(a, ErrorKind::Unavailable);
    is_kind(b, ErrorKind::Unavailable);
    second.commit().await.unwrap();
    let _ = take(&first, "imports", "first").await.unwrap();
    first.commit().await.unwrap();
    assert_eq!(quota(&two.acme, "exports").await, (Some(5), 1));
    assert_eq!(quota(&two.acme, "imports").await, (Some(5), 2));
    two.bystander_saw_nothing().await;
}

const REPEATABLE_READ: lastprice::tokio_postgres::IsolationLevel =
    lastprice::tokio_postgres::IsolationLevel::RepeatableRead;

/// The server is killed while 8 writers take: what was acknowledged is there, what is repeated counts once, and it is never
/// more than allowed.
#[tokio::test]
async fn exact_after_a_crash() {
    const LIMIT: u64 = 5000;
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = Client::builder().url(database.app_url()).pool_size(8).build().unwrap();
    let mut tenants = Vec::new();
    for name in ["acme", "globex"] {
        let new = NewTenant::managed(name, format!("ops@{name}.example"));
        tenants.push(client.create_tenant(new).await.unwrap().id);
    }
    let admin = Admin::connect(&database.owner_url()).await.unwrap();
    admin.limits().set_tenant(tenants[0], "exports", LimitPeriod::Month, Some(LIMIT)).await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (client, id, stopped) = (client.clone(), tenants[n % 2], stopped.clone());
        writers.spawn(async move {
            let tenant = client.tenant(id);
            let (mut mine, mut failed, mut turn) = (0, 0, 0);
            // 7 of a time, so that the limit is met by the sum only.
            while !*stopped.borrow() {
                turn += 1;
                let k: IdempotencyKey = key(&format!("{n}-{turn}"));
                let outcome = loop {
                    match tenant.usage().try_consume("exports", 7, &k).await {
                        Ok(outcome) => break outcome,
                        Err(e) => {
                            let kinds = [ErrorKind::Unavailable, ErrorKind::OutcomeUnknown];
                            assert!(kinds.contains(&e.kind()), "{e:?}");
                            failed += 1;
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                };
                mine += if outcome.into_result().is_ok() { 7 } else { 0 };
            }
            (n % 2, mine, failed)
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(80)).await;
        cluster.kill().await.unwrap();
        cluster.start_again().await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(80)).await;
    stop.send(true).unwrap();
    let (mut sums, mut failures) = ([0, 0], 0);
    while let Some(writer) = writers.join_next().await {
        let (of, mine, failed) = writer.unwrap();
        sums[of] += mine;
        failures += failed;
    }
    assert!(failures > 0, "the crashes hit nobody");
    assert!(sums[0] <= LIMIT && sums[0] > 0, "{sums:?}");
    assert_eq!(quota(&client.tenant(tenants[0]), "exports").await, (Some(LIMIT), sums[0]));
    assert_eq!(quota(&client.tenant(tenants[1]), "exports").await, (None, sums[1]));
}

async fn drafts(tenant: &TenantHandle, many: usize) -> Vec<ExperimentId> {
    let mut ids = Vec::new();
    for n in 0..many {
        ids.push(draft(tenant, &format!("x{n}")).await.id);
    }
    ids
}

#[tokio::test]
async fn only_so_many_experiments_are_active() {
    let two = two_tenants().await;
    let (admin, experiments) = (admin(&two).await, two.acme.experiments());
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, Some(2)).await.unwrap();
    let ids = drafts(&two.acme, 4).await;
    for (n, id) in ids[..2].iter().enumerate() {
        experiments.activate(*id).await.unwrap();
        assert_eq!(quota(&two.acme, ACTIVE).await, (Some(2), n as u64 + 1));
    }
    let Quota { period, resets_at, .. } = two.acme.usage().check_quota(ACTIVE).await.unwrap();
    assert_eq!((period, resets_at), (LimitPeriod::Ever, None), "it is no use of a period");
    let error = experiments.activate(ids[2]).await.unwrap_err();
    exceeded(&error, ACTIVE, 2, 2);
    assert_eq!(error.to_string(), "1 of `active_experiments` was asked for, 0 of 2 are left");
    // A paused one makes room, and then has to find some itself.
    experiments.pause(ids[0]).await.unwrap();
    experiments.activate(ids[2]).await.unwrap();
    exceeded(&experiments.resume(ids[0]).await.unwrap_err(), ACTIVE, 2, 2);
    // What is not allowed anyway is said first.
    is_kind(experiments.activate(ids[1]).await, ErrorKind::Conflict);
    is_kind(experiments.activate(ExperimentId::new()).await, ErrorKind::NotFound);
    experiments.pause(ids[1]).await.unwrap();
    experiments.resume(ids[0]).await.unwrap();
    experiments.complete(ids[1], None).await.unwrap();
    experiments.complete(ids[0], None).await.unwrap();
    experiments.activate(ids[3]).await.unwrap();

    // Less than there are: nobody is ended, and nobody comes.
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, Some(0)).await.unwrap();
    assert_eq!(quota(&two.acme, ACTIVE).await, (Some(0), 2));
    experiments.pause(ids[3]).await.unwrap();
    exceeded(&experiments.resume(ids[3]).await.unwrap_err(), ACTIVE, 0, 1);
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, None).await.unwrap();
    experiments.resume(ids[3]).await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn of_those_who_ask_for_the_last_place_one_gets_it() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, Some(4)).await.unwrap();
    let ids = drafts(&two.acme, 3).await;
    for id in &ids {
        two.acme.experiments().activate(*id).await.unwrap();
    }
    for round in 0..5 {
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..8 {
            let id = draft(&two.acme, &format!("round-{round}-{n}")).await.id;
            let (client, tenant) = (two.client.clone(), two.id);
            calls.spawn(async move {
                loop {
                    match client.tenant(tenant).experiments().activate(id).await {
                        Err(error) if error.is_retryable() => {}
                        known => return known,
                    }
                }
            });
        }
        let (mut won, mut lost) = (Vec::new(), 0);
        while let Some(call) = calls.join_next().await {
            match call.unwrap() {
                Ok(experiment) => won.push(experiment.id),
                Err(error) => {
                    exceeded(&error, ACTIVE, 4, 4);
                    lost += 1;
                }
            }
        }
        assert_eq!((won.len(), lost), (1, 7), "round {round}");
        two.acme.experiments().complete(won[0], None).await.unwrap();
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_hosts_transaction_outlives_a_refused_activation() {
    let two = two_tenants().await;
    let admin = admin(&two).await;
    admin.limits().set_tenant(two.id, ACTIVE, LimitPeriod::Ever, Some(1)).await.unwrap();
    let ids = drafts(&two.acme, 3).await;
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let scope = TenantScope::within(&transaction, two.id);
    scope.experiments().activate(ids[0]).await.unwrap();
    exceeded(&scope.experiments().activate(ids[1]).await.unwrap_err(), ACTIVE, 1, 1);
    // Another one waits for this transaction, and loses when it commits; in a transaction of its own, which goes on.
    let (client, id, second) = (two.client.clone(), two.id, ids[2]);
    let waiter = tokio::spawn(async move {
        let transaction = client.tenant(id).begin().await.unwrap();
        let refused = transaction.experiments().activate(second).await.unwrap_err();
        let renamed = transaction.experiments().get(second).await.unwrap().unwrap();
        transaction.commit().await.unwrap();
        (refused, renamed.status)
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiter.is_finished());
    transaction.execute("SELECT 1", &[]).await.unwrap();
    transaction.commit().await.unwrap();
    let (error, status) = waiter.await.unwrap();
    exceeded(&error, ACTIVE, 1, 1);
    assert_eq!(status, lastprice::ExperimentStatus::Draft);

    two.acme.experiments().complete(ids[0], None).await.unwrap();
    let transaction = host.build_transaction().isolation_level(REPEATABLE_READ).start().await.unwrap();
    let scope = TenantScope::within(&transaction, two.id);
    is_kind(scope.experiments().activate(ids[1]).await, ErrorKind::Conflict);
    transaction.execute("SELECT 1", &[]).await.unwrap();
    transaction.commit().await.unwrap();
    two.acme.experiments().activate(ids[1]).await.unwrap();
    two.bystander_saw_nothing().await;
}
