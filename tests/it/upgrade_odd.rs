//! Originals whose columns are of other types than the description's, hold what was deleted, or secrets where nobody looks.

use crate::support_sql::refusal;
use crate::upgrade::{ACME, DATA, PRO, lines, original, try_upgrade, upgrade};

/// What the log says of a table.
async fn told(owner: &lastprice::tokio_postgres::Client, table: &str) -> Vec<String> {
    let log =
        "SELECT format('%s %s: %s', source, fate, reason) AS line FROM original.upgrade_log WHERE source = ";
    lines(owner, &format!("{log} '{table}' GROUP BY 1 ORDER BY 1")).await
}

#[tokio::test]
async fn variants_and_times_may_be_texts() {
    let Some((database, owner)) = original(DATA).await else { return };
    let texts = "DROP MATERIALIZED VIEW IF EXISTS experiment_metrics CASCADE;
                 ALTER TABLE experiments ALTER variants DROP DEFAULT, ALTER variants TYPE text USING variants::text;
                 ALTER TABLE views ALTER created_at DROP DEFAULT, ALTER created_at TYPE text USING created_at::text;
                 UPDATE views SET created_at = '' WHERE id = (SELECT min(id) FROM views);
                 UPDATE views SET created_at = 'yesterday, at noon or so' WHERE id = (SELECT max(id) FROM views)";
    owner.batch_execute(texts).await.unwrap();
    upgrade(&database, &owner).await;
    let taken = "SELECT format('%s %s', jsonb_array_length(variants), key) AS line FROM experiments WHERE id::text = ";
    assert_eq!(lines(&owner, &format!("{taken} '{PRO}'")).await.len(), 1);
    let views = told(&owner, "views").await;
    assert!(
        views.contains(&"views changed: it has no time: when its experiment began".to_owned()),
        "{views:?}"
    );
}

#[tokio::test]
async fn where_nothing_can_be_read_it_stops() {
    let numbers = "ALTER TABLE conversions ALTER revenue TYPE money USING CASE WHEN abs(revenue) < 1e9 THEN revenue::money END";
    let texts = "ALTER TABLE conversions ALTER revenue TYPE text USING 'about ' || revenue";
    let prices = "UPDATE experiments SET variants = '[]'";
    for (sql, words) in [
        (numbers, "original.conversions.revenue"),
        (texts, "not one revenue"),
        (prices, "not one experiment can be taken: its variants are no list of 1 to 1000"),
    ] {
        let Some((_database, owner)) = original(DATA).await else { return };
        owner.batch_execute("DROP MATERIALIZED VIEW IF EXISTS experiment_metrics CASCADE").await.unwrap();
        owner.batch_execute(sql).await.unwrap();
        let error = refusal(try_upgrade(&owner).await).2;
        assert!(error.contains(words), "{error}");
        assert!(
            refusal(owner.batch_execute("SELECT FROM original.tenants").await).2.contains("does not exist")
        );
    }
}

#[tokio::test]
async fn what_was_deleted_does_not_come_alive() {
    let Some((database, owner)) = original(DATA).await else { return };
    let sql = format!(
        "ALTER TABLE experiments ADD deleted_at timestamptz; ALTER TABLE conversions ADD status text;
         UPDATE experiments SET deleted_at = now() WHERE id::text = '{PRO}';
         UPDATE conversions SET status = 'void' WHERE id = (SELECT min(id::text) FROM conversions WHERE experiment_id::text = '{PRO}' AND revenue > 0)::uuid"
    );
    owner.batch_execute(&sql).await.unwrap();
    upgrade(&database, &owner).await;
    let status = format!("SELECT status AS line FROM experiments WHERE id::text = '{PRO}'");
    assert_eq!(lines(&owner, &status).await, ["completed"]);
    let experiments = told(&owner, "experiments").await;
    let deleted = "experiments changed: it was deleted, or its tenant was: completed".to_owned();
    assert!(experiments.contains(&deleted), "{experiments:?}");
    let conversions = told(&owner, "conversions").await;
    assert!(conversions.contains(&"conversions rejected: it was deleted".to_owned()), "{conversions:?}");
    let void = "SELECT format('%s', count(*)) AS line FROM conversions c JOIN original.conversions o ON c.idempotency_key = 'original:' || o.id
                WHERE o.status = 'void'";
    assert_eq!(lines(&owner, void).await, ["0"]);
}

#[tokio::test]
async fn secrets_stay_behind_at_any_depth() {
    let Some((database, owner)) = original(DATA).await else { return };
    let sql = format!(
        r#"ALTER TABLE tenants ADD settings jsonb; ALTER TABLE experiments ADD config jsonb;
           UPDATE tenants SET settings = '{{"colour": "red", "stripe": [{{"secret_key": "sk-1"}}]}}' WHERE id::text = '{ACME}';
           UPDATE experiments SET config = '{{"key": "stays", "hook": {{"apiKey": "sk-2"}}}}' WHERE id::text = '{PRO}'"#
    );
    owner.batch_execute(&sql).await.unwrap();
    upgrade(&database, &owner).await;
    let all = "SELECT format('%s', metadata) AS line FROM tenants UNION ALL SELECT format('%s', metadata) FROM experiments";
    let all = lines(&owner, all).await.join("\n");
    assert!(!all.contains("sk-") && all.contains("red") && all.contains("stays"), "{all}");
    for table in ["tenants", "experiments"] {
        let log = told(&owner, table).await;
        assert!(log.iter().any(|line| line.contains("credential is left out")), "{log:?}");
    }
}

/// Of two partitions, each of which has a first row.
#[tokio::test]
async fn views_may_be_partitions_without_ids() {
    let Some((database, owner)) = original(DATA).await else { return };
    let sql = "DROP MATERIALIZED VIEW IF EXISTS experiment_metrics CASCADE;
               ALTER TABLE views RENAME TO all_views;
               CREATE TABLE views (experiment_id uuid, user_id text, variant text, created_at timestamptz) PARTITION BY HASH (user_id);
               CREATE TABLE views_0 PARTITION OF views FOR VALUES WITH (MODULUS 2, REMAINDER 0);
               CREATE TABLE views_1 PARTITION OF views FOR VALUES WITH (MODULUS 2, REMAINDER 1);
               INSERT INTO views SELECT experiment_id, user_id, to_jsonb(v) ->> 'variant', created_at FROM all_views v; DROP TABLE all_views CASCADE";
    owner.batch_execute(sql).await.unwrap();
    upgrade(&database, &owner).await;
    let both = "SELECT format('%s', (SELECT count(*) FROM original.views) - (SELECT count(*) FROM views)
                                    - (SELECT count(*) FROM original.upgrade_log WHERE source = 'views' AND fate = 'rejected')) AS line";
    assert_eq!(lines(&owner, both).await, ["0"]);
}
