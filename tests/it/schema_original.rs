//! Every command of the original description runs, as it stands there. The exceptions: the policy, which is there
//! already, and 'uuid', which stands for an id.

use std::path::Path;
use std::process::Command;

use lastprice_testkit::PrivateCluster;

use crate::support_sql::*;

pub(crate) const SQL: [&str; 11] = [
    "INSERT INTO tenants (name, email, mode, paid_api_key)
VALUES ('Company', 'email@example.com', 'byok', 
        pgp_sym_encrypt('actual_api_key', 'encryption_passphrase'));",
    "SELECT 
  id, 
  name, 
  pgp_sym_decrypt(paid_api_key::bytea, 'encryption_passphrase') as api_key
FROM tenants;",
    "ALTER TABLE experiments ENABLE ROW LEVEL SECURITY;",
    "SELECT refresh_experiment_metrics();",
    "DELETE FROM experiments 
WHERE status = 'completed' 
  AND end_date < now() - INTERVAL '90 days';",
    "ANALYZE tenants;
ANALYZE experiments;
ANALYZE assignments;
ANALYZE views;
ANALYZE conversions;",
    "EXPLAIN ANALYZE
SELECT * FROM experiments 
WHERE tenant_id = 'aaaaaaaa-0000-4000-8000-000000000000' AND status = 'active';",
    "SELECT mode, COUNT(*) FROM tenants GROUP BY mode;",
    "SELECT t.name, COUNT(e.id) as active_experiments
FROM tenants t
LEFT JOIN experiments e ON t.id = e.tenant_id AND e.status = 'active'
GROUP BY t.name;",
    "SELECT 
  e.name as experiment,
  c.variant,
  COUNT(DISTINCT v.user_id) as views,
  COUNT(DISTINCT c.user_id) as conversions,
  CAST(COUNT(DISTINCT c.user_id) AS DECIMAL) / NULLIF(COUNT(DISTINCT v.user_id), 0) as conversion_rate
FROM experiments e
JOIN views v ON e.id = v.experiment_id
LEFT JOIN conversions c ON e.id = c.experiment_id AND v.user_id = c.user_id
GROUP BY e.name, c.variant;",
    "SELECT * FROM experiment_metrics;",
];

const SHELL: [&str; 6] = [
    "createdb lastprice",
    "psql -d lastprice -f schema.sql",
    r#"psql -d lastprice -c "SELECT refresh_experiment_metrics();""#,
    "pg_dump -d lastprice -F c -f lastprice_backup_$(date +%Y%m%d).dump",
    "pg_dump -d lastprice --schema-only -f lastprice_schema.sql",
    "pg_dump -d lastprice --data-only -f lastprice_data.sql",
];

/// A shell in which the programs find the server, as some role.
fn shell(cluster: &PrivateCluster, bindir: &Path, dir: &TemporaryDir, role: &str, command: &str) -> Ran {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut sh = Command::new("sh");
    sh.arg("-c").arg(command).current_dir(&dir.0);
    sh.env("PATH", format!("{}:{path}", bindir.display()));
    sh.env("PGHOST", cluster.socket_dir()).env("PGPORT", cluster.port().to_string()).env("PGUSER", role);
    run(&mut sh)
}

#[tokio::test]
async fn every_command_runs_unchanged() {
    let (Some(psql_path), Some(_), Some(_)) = (program("psql"), program("pg_dump"), program("createdb"))
    else {
        return;
    };
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let superuser = connect(&cluster.superuser_url("postgres")).await;
    superuser.batch_execute("CREATE ROLE app_owner LOGIN CREATEDB CREATEROLE").await.unwrap();
    if version_num(&superuser).await < 130_000 {
        // Before PostgreSQL 13 only a superuser can create the extension: here, for all new databases.
        let template = cluster.superuser_url("template1");
        psql(&psql_path, &template, "", &["-c", "CREATE EXTENSION pgcrypto"]).expect_ok();
    }
    let dir = TemporaryDir::new("original");
    std::fs::copy(schema_sql(), dir.file("schema.sql")).unwrap();
    for command in SHELL {
        let ran = shell(&cluster, psql_path.parent().unwrap(), &dir, "app_owner", command);
        assert!(ran.ok && !ran.err.contains("ERROR"), "{command}\n{}", ran.err);
    }
    let written = std::fs::read_dir(&dir.0).unwrap().count();
    assert_eq!(written, 4, "schema.sql, and three backups");

    let owner = connect(&cluster.url_for("app_owner", "lastprice")).await;
    two_tenants(&owner).await;
    owner.batch_execute(&sample()).await.unwrap();
    let mut results = Vec::new();
    for sql in SQL {
        results.push(rows(&owner, sql).await.unwrap_or_else(|e| panic!("{sql}\n{e:?}")));
    }
    let text = |of: &[Vec<Option<String>>]| {
        let mut lines: Vec<_> = of
            .iter()
            .map(|row| row.iter().map(|v| v.as_deref().unwrap_or("-")).collect::<Vec<_>>().join(" "))
            .collect();
        lines.sort();
        lines.join("; ")
    };
    assert!(text(&results[1]).contains("Company actual_api_key"), "{}", text(&results[1]));
    assert_eq!(text(&results[7]), "byok 1; managed 2");
    assert_eq!(text(&results[8]), "A 1; B 1; Company 0");
    assert_eq!(
        text(&results[9]),
        "X of A - 1 0 0.00000000000000000000; X of A a 1 1 1.00000000000000000000; X of B b 1 1 1.00000000000000000000"
    );
    let stored = rows(&owner, "SELECT paid_api_key FROM tenants WHERE name = 'Company'").await.unwrap();
    assert!(value(&stored).starts_with("\\x"), "what is stored is not the key");

    // The archive took one experiment, the old one, with its events, and nothing of it is counted.
    assert_eq!(text(&rows(&owner, "SELECT key, count(*) FROM experiments GROUP BY 1").await.unwrap()), "x 2");
    assert_exact(&connect(&cluster.superuser_url("lastprice")).await, "after the archive").await;

    // The policy is there, and does what the description asks of it; reading it back with nothing set is no error.
    let policy = "CREATE POLICY tenant_isolation ON experiments
  USING (tenant_id = current_setting('app.tenant_id')::uuid);";
    assert!(refusal(owner.batch_execute(policy).await).2.contains("already exists"));
    superuser.batch_execute("CREATE ROLE app_user LOGIN IN ROLE lastprice_app").await.unwrap();
    let app = connect(&cluster.url_for("app_user", "lastprice")).await;
    assert_eq!(value(&rows(&app, "SELECT count(*) FROM experiments").await.unwrap()), "0");
    app.batch_execute(&format!("SET app.tenant_id = '{A}'")).await.unwrap();
    assert_eq!(text(&rows(&app, "SELECT name FROM experiments").await.unwrap()), "X of A");

    // The application cannot do the owner's work.
    let refused = shell(&cluster, psql_path.parent().unwrap(), &dir, "app_user", SHELL[2]);
    refused.expect_refusal(&["permission denied for function refresh_experiment_metrics"]);
}

/// Two users saw a price and one bought, in A; one saw and bought in B; and an experiment that ended long ago.
fn sample() -> String {
    let old = "aaaaaaaa-0000-4000-8000-0000000000ff";
    format!(
        "INSERT INTO experiments (tenant_id, id, key, name, status, variants, start_date, end_date) VALUES
           ('{A}', '{old}', 'old', 'Old', 'completed', '{ARMS}', now() - interval '200 days', now() - interval '100 days');
         INSERT INTO views (tenant_id, experiment_id, user_id, variant) VALUES
           ('{A}', '{XA}', 'u', 'a'), ('{A}', '{XA}', 'v', 'a'), ('{B}', '{XB}', 'u', 'b'), ('{A}', '{old}', 'u', 'b');
         INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, revenue, currency) VALUES
           ('{A}', '{XA}', 'u', 'a', 10, 'USD'), ('{B}', '{XB}', 'u', 'b', 12.5, 'USD'), ('{A}', '{old}', 'u', 'b', 1, 'USD')"
    )
}
