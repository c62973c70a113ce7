//! Views as partitions: the same calls, numbers and isolation as with one table, and old ones go at once.

use std::time::Duration;

use lastprice::chrono::{DateTime, Utc};
use lastprice::tokio_postgres::Client as Sql;
use lastprice::uuid::Uuid;
use lastprice::{Admin, ArchiveOptions, Hazard, NewAssignment, NewView, TenantScope, ViewOutcome};
use tokio_postgres::error::SqlState;

use crate::support_recorder::{LONG, numbers, view};
use crate::support_repo::*;
use crate::support_retention::*;
use crate::support_sql::{as_tenant, assert_exact, refusal};

async fn value<T: for<'a> tokio_postgres::types::FromSql<'a>>(sql: &Sql, query: &str) -> T {
    sql.query_one(query, &[]).await.unwrap_or_else(|e| panic!("{query}: {e:?}")).get(0)
}

/// The partitions, in their order; the one of what was there is named by the month in which it ends.
async fn partitions(owner: &Sql) -> Vec<String> {
    let sql = "SELECT array_agg(inhrelid::regclass::text ORDER BY inhrelid::regclass::text COLLATE \"C\") FROM pg_inherits
               WHERE inhparent = 'views'::regclass";
    value(owner, sql).await
}

/// As a view of then: the id says when it was made.
fn seen_at(time: DateTime<Utc>, n: u64) -> Uuid {
    Uuid::from_u128(
        (u128::try_from(time.timestamp_millis()).unwrap() << 80) | (7 << 76) | (2 << 62) | u128::from(n),
    )
}

#[tokio::test]
async fn what_is_there_stays_and_every_call_works() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = with_history(&two, "old", 60).await;
    let before = told(&two, id).await;
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    assert_eq!(told(&two, id).await, before);
    assert_exact(&superuser, "partitioned").await;
    let names = partitions(&two.owner).await;
    assert_eq!(names.len(), 5, "{names:?}");
    assert_eq!(names.iter().filter(|n| *n == "views_other" || n.starts_with("views_until_")).count(), 2);

    // Whoever writes.
    let running = active(&two.acme, "running").await.id;
    assign(&two.acme, running, 0..20).await;
    let seen = view(running, 1);
    assert_eq!(two.acme.views().record(&seen).await.unwrap(), ViewOutcome::Recorded);
    assert_eq!(two.acme.views().record(&seen).await.unwrap(), ViewOutcome::Duplicate);
    assert_eq!(two.acme.views().record(&view(running, 99)).await.unwrap(), ViewOutcome::NotAssigned);
    let month = |n: i64| Utc::now() + lastprice::chrono::TimeDelta::days(30 * n);
    let many: Vec<NewView> =
        (0..20).map(|n| view(running, n as usize).id(seen_at(month(n as i64 - 5), n).into())).collect();
    for outcome in [ViewOutcome::Recorded, ViewOutcome::Duplicate] {
        assert_eq!(two.acme.views().record_many(&many).await.unwrap(), vec![outcome; 20]);
    }
    let spread: i64 = value(&two.owner, "SELECT count(DISTINCT tableoid) FROM views").await;
    assert_eq!(spread, 5);
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = TenantScope::within(&transaction, two.id);
    assert_eq!(within.views().record(&view(running, 2)).await.unwrap(), ViewOutcome::Recorded);
    transaction.commit().await.unwrap();
    let recorder = two.client.recorder();
    for n in 20..70 {
        recorder.record(two.id, NewAssignment::new(running, user(n))).unwrap();
        recorder.record(two.id, view(running, n)).unwrap();
    }
    recorder.flush().await;
    assert_eq!(numbers(recorder.stats()), [100, 100, 0, 0, 0, 0]);
    assert_eq!(recorder.shutdown(LONG).await.in_doubt, 0);
    let plain = format!(
        "INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES ('{}', '{running}', 'user-1', '29') RETURNING id::text, tableoid::regclass::text",
        two.id
    );
    let app = two.database.connect_app().await.unwrap();
    let row = as_tenant(&app, &two.id.to_string(), &plain).await.unwrap().remove(0);
    let (made, into) = (row[0].clone().unwrap(), row[1].clone().unwrap());
    let made = Uuid::parse_str(&made).unwrap();
    assert!(made.get_version_num() == 7 && into.starts_with("views_until_"), "{made} in {into}");
    let (seconds, _) = made.get_timestamp().unwrap().to_unix();
    assert!(seconds.abs_diff(Utc::now().timestamp().unsigned_abs()) < 60);
    let counts = two.acme.metrics().experiment(running).await.unwrap();
    assert_eq!((counts.assignments, counts.views), (70, 73));
    assert_eq!(two.acme.metrics().report(running).await.unwrap().results.recent_views.views, 73);
    assert_exact(&superuser, "written").await;

    // Isolation is as it was, and nobody has a right on a partition.
    let report = two.client.verify_isolation().await.unwrap();
    assert!(report.findings().is_empty(), "{:?}", report.findings());
    for name in &names {
        let denied = as_tenant(&app, &two.id.to_string(), &format!("SELECT FROM {name}")).await;
        assert_eq!(refusal(denied).0, SqlState::INSUFFICIENT_PRIVILEGE, "{name}");
        two.owner.batch_execute(&format!("GRANT SELECT, INSERT ON {name} TO lastprice_app")).await.unwrap();
        let report = two.client.verify_isolation().await.unwrap();
        let found: Vec<_> = report.findings().iter().map(|f| (f.hazard, f.object.clone())).collect();
        assert_eq!(found, [(Hazard::PartitionGranted, format!("public.{name} to lastprice_app"))]);
        // And if it has: there is no policy that would let a row through.
        let open = as_tenant(&app, &two.id.to_string(), &format!("SELECT FROM {name}")).await.unwrap();
        assert!(open.is_empty(), "{name}");
        two.owner.batch_execute(&report.findings()[0].fix).await.unwrap();
    }
    for call in [
        "create_view_partitions(3)",
        "empty_view_partition('views_other')",
        "drop_view_partition('views_other')",
    ] {
        let denied = as_tenant(&app, &two.id.to_string(), &format!("SELECT {call}")).await;
        assert_eq!(refusal(denied).0, SqlState::INSUFFICIENT_PRIVILEGE, "{call}");
    }

    // The archive, a draft's deletion, and the owner's.
    completed(&two, id, 100).await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let before = told(&two, id).await;
    let done = admin.archive_completed(ArchiveOptions::new().batch(100), |_| ()).await.unwrap();
    assert_eq!((done.views, done.assignments), (60 * 3 + 297, 48));
    assert_eq!(told(&two, id).await, before);
    let draft = draft(&two.acme, "draft").await.id;
    let plain = plain.replace(&running.to_string(), &draft.to_string());
    as_tenant(&app, &two.id.to_string(), &plain).await.unwrap();
    two.acme.experiments().delete_draft(draft).await.unwrap();
    assert_exact(&superuser, "a draft less").await;
    two.owner.batch_execute("DELETE FROM experiments WHERE status = 'completed'").await.unwrap();
    admin.recount_metrics().await.unwrap();
    assert_exact(&superuser, "an experiment less").await;
    assert_eq!(two.count("views").await, 73);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn an_old_partition_goes_and_its_views_stay_counted() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..50).await;
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let next = partitions(&two.owner).await.remove(1);
    let future = Utc::now() + lastprice::chrono::TimeDelta::days(45);
    let record = async |from: u64, time: DateTime<Utc>| {
        let views: Vec<NewView> =
            (from..from + 50).map(|n| view(id, (n % 50) as usize).id(seen_at(time, n).into())).collect();
        let recorded = two.acme.views().record_many(&views).await.unwrap();
        assert_eq!(recorded, vec![ViewOutcome::Recorded; 50]);
    };
    record(0, Utc::now()).await;
    record(100, future).await;
    let until = partitions(&two.owner).await.into_iter().find(|n| n.starts_with("views_until_")).unwrap();
    // Both tenants' views of that time.
    assert_eq!(value::<i64>(&two.owner, &format!("SELECT count(*) FROM {until}")).await, 51);
    let told = async || {
        let metrics = two.acme.metrics();
        (metrics.by_day(id, today(), today()).await.unwrap(), metrics.by_variant(id).await.unwrap())
    };

    // While others write: views of other times do not wait, one of that time does, and stays.
    let owner = &two.owner;
    let call = async |call: &str| -> i64 { value(owner, &format!("SELECT {call}::bigint")).await };
    owner.batch_execute("BEGIN").await.unwrap();
    assert_eq!(call(&format!("empty_view_partition('{until}')")).await, 51);
    record(200, future).await;
    let late = view(id, 3);
    let (waited, ()) = tokio::join!(two.acme.views().record(&late), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(
            two.acme.views().record(&late.clone().id(seen_at(future, 999).into())).await.unwrap(),
            ViewOutcome::Recorded
        );
        owner.batch_execute("COMMIT").await.unwrap();
    });
    assert_eq!(waited.unwrap(), ViewOutcome::Recorded);
    assert_exact(&superuser, "emptied").await;
    // It is not empty any longer: not dropped, nothing lost. Then once more.
    let before = told().await;
    let drop = format!("drop_view_partition('{until}')::int");
    assert_eq!(
        (call(&drop).await, call(&format!("empty_view_partition('{until}')")).await, call(&drop).await),
        (0, 1, 1)
    );
    assert!(!partitions(&two.owner).await.contains(&until));
    assert_eq!(told().await, before);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 152);
    assert_exact(&superuser, "dropped").await;
    admin.recount_metrics().await.unwrap();
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 152);
    assert_exact(&superuser, "recounted").await;
    // Views of a time that has no partition any longer are not refused.
    record(300, Utc::now()).await;
    assert_eq!(value::<i64>(owner, "SELECT count(*) FROM views_other").await, 50);
    // The bystander's view was of that time as well, and is counted as before.
    let others = two.globex.experiments().list(None, 2, None).await.unwrap().items;
    let theirs = two.globex.metrics().experiment(others[0].id).await.unwrap();
    assert_eq!((others.len(), theirs.assignments, theirs.views, theirs.conversions), (1, 20, 1, 1));

    for wrong in ["views", "experiments"] {
        for call in ["empty", "drop"] {
            let refused = owner.query(&format!("SELECT {call}_view_partition('{wrong}')"), &[]).await;
            assert_eq!(refused.unwrap_err().code(), Some(&SqlState::WRONG_OBJECT_TYPE), "{call} {wrong}");
        }
    }
    assert!(owner.query("SELECT drop_view_partition('views_other')", &[]).await.is_err());
    assert!(partitions(owner).await.contains(&next));
}

/// Whoever has looked at views may write one: nobody is killed for it, and nobody waits for long behind the owner who waits.
#[tokio::test]
async fn who_has_looked_at_views_may_write_one() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..3).await;
    two.acme.views().record(&view(id, 0)).await.unwrap();
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    let until = partitions(&two.owner).await.into_iter().find(|n| n.starts_with("views_until_")).unwrap();
    let empty = format!("SELECT empty_view_partition('{until}')");

    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let within = TenantScope::within(&transaction, two.id);
    assert_eq!(within.metrics().report(id).await.unwrap().results.recent_views.views, 1);
    let started = std::time::Instant::now();
    let (emptied, (written, others)) = tokio::join!(two.owner.query_one(&empty, &[]), async {
        let waits = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        soon(Duration::from_secs(2), async || value::<i64>(&superuser, waits).await == 1).await;
        // The host before the owner, and somebody else after him.
        let (v, w) = (view(id, 1), view(id, 2));
        let written = within.views().record(&v).await.unwrap();
        (written, two.acme.views().record(&w).await.unwrap())
    });
    assert_eq!(emptied.unwrap_err().code(), Some(&SqlState::LOCK_NOT_AVAILABLE));
    assert_eq!((written, others), (ViewOutcome::Recorded, ViewOutcome::Recorded));
    assert!(started.elapsed() < Duration::from_secs(5), "nobody waits for the host: {:?}", started.elapsed());
    transaction.commit().await.unwrap();
    // Nothing was done; and now it is.
    assert_exact(&superuser, "not emptied").await;
    assert_eq!(value::<i64>(&two.owner, &empty).await, 4);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 3);
    assert_exact(&superuser, "emptied").await;
    let timeout: String = value(&two.owner, "SHOW lock_timeout").await;
    assert_eq!(timeout, "0", "what is set for the function ends with it");
    let theirs = two
        .globex
        .metrics()
        .experiment(two.globex.experiments().list(None, 1, None).await.unwrap().items[0].id)
        .await
        .unwrap();
    assert_eq!(theirs.views, 1);
}

#[tokio::test]
async fn new_months_come_while_others_write_and_strays_move() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..10).await;
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    // In 6 months: there is no partition yet.
    let ahead = Utc::now() + lastprice::chrono::TimeDelta::days(185);
    let stray = view(id, 1).id(seen_at(ahead, 1).into());
    assert_eq!(two.acme.views().record(&stray).await.unwrap(), ViewOutcome::Recorded);
    assert_eq!(value::<i64>(&two.owner, "SELECT count(*) FROM views_other").await, 1);
    let writes = async {
        for n in 0..60 {
            let recorded = two.acme.views().record(&view(id, n % 10)).await.unwrap();
            assert_eq!(recorded, ViewOutcome::Recorded);
        }
    };
    let grows = async {
        for months in [3, 4, 8, 8, 12] {
            let sql = format!("SELECT create_view_partitions({months})");
            two.owner.batch_execute(&sql).await.unwrap();
        }
    };
    tokio::join!(writes, grows);
    assert_eq!(partitions(&two.owner).await.len(), 2 + 12);
    assert_eq!(value::<i64>(&two.owner, "SELECT count(*) FROM views_other").await, 0);
    assert_eq!(two.acme.views().record(&stray).await.unwrap(), ViewOutcome::Duplicate);
    assert_eq!(two.acme.metrics().experiment(id).await.unwrap().views, 61);
    assert_exact(&superuser, "grown").await;
    assert!(two.client.verify_isolation().await.unwrap().findings().is_empty());
    assert!(two.owner.query("SELECT create_view_partitions(121)", &[]).await.is_err());
    two.bystander_saw_nothing().await;
}

/// A host's default privileges grant nothing on a partition; what is the host's own is not lost in silence.
#[tokio::test]
async fn what_is_of_the_host_is_kept_or_named() {
    let two = two_tenants().await;
    let hosts = "CREATE TABLE log (n int); CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
                 CREATE TRIGGER logs AFTER INSERT ON views EXECUTE FUNCTION logs(); CREATE VIEW seen AS SELECT * FROM views";
    two.owner.batch_execute(hosts).await.unwrap();
    let error = two.owner.batch_execute(PARTITION_VIEWS).await.unwrap_err();
    let message = error.as_db_error().unwrap().message().to_owned();
    assert!(message.contains("trigger logs") && message.contains("view seen"), "{message}");
    let kind: i8 = value(&two.owner, "SELECT relkind FROM pg_class WHERE oid = 'views'::regclass").await;
    assert_eq!(kind, b'r' as i8, "nothing was done");

    let mend = "DROP VIEW seen; DROP TRIGGER logs ON views; GRANT SELECT ON views TO lastprice_service WITH GRANT OPTION;
                ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO lastprice_app";
    two.owner.batch_execute(mend).await.unwrap();
    two.owner.batch_execute(PARTITION_VIEWS).await.unwrap();
    two.owner.batch_execute("SELECT create_view_partitions(6)").await.unwrap();
    let granted =
        "SELECT count(*) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid, aclexplode(c.relacl) a
                   WHERE i.inhparent = 'views'::regclass AND a.grantee <> c.relowner";
    assert_eq!(value::<i64>(&two.owner, granted).await, 0);
    let rights = "SELECT string_agg(pg_get_userbyid(a.grantee) || ' ' || a.privilege_type || CASE WHEN a.is_grantable THEN '*' ELSE '' END, ', '
                    ORDER BY pg_get_userbyid(a.grantee), a.privilege_type)
                  FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = 'views'::regclass AND a.grantee <> c.relowner";
    let rights: String = value(&two.owner, rights).await;
    assert_eq!(rights, "lastprice_app INSERT, lastprice_app SELECT, lastprice_service SELECT*");
    two.bystander_saw_nothing().await;
}
