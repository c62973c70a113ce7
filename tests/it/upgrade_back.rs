//! The way back from an upgrade: the original is as it was, to the last catalog row, and what would be lost is said before.

use lastprice::{
    Client, ConversionOutcome, IdempotencyKey, NewConversion, OrderId, SCHEMA_SQL, tokio_postgres,
};
use lastprice_testkit::TestDatabase;

use crate::schema_original::SQL;
use crate::support_repo::usd;
use crate::support_sql::*;
use crate::upgrade::{
    ACME, COPY, DATA, GLOBEX, MOVE, PRO, SEATS, experiment, lines, original, tenant, try_upgrade, upgrade,
    user,
};

const BACK: &str = include_str!("../../upgrade/back-to-original.sql");
const PARTITIONS: &str = include_str!("../../partition-views.sql");

/// What a host has around the original's tables, and what is set on these.
const HOST: &str = r#"
    ALTER TABLE experiments FORCE ROW LEVEL SECURITY;
    ALTER TABLE tenants ENABLE ROW LEVEL SECURITY;
    CREATE POLICY everybody ON tenants USING (true);
    GRANT SELECT, UPDATE (status) ON experiments TO lastprice_service WITH GRANT OPTION;
    GRANT SELECT ON views, experiment_metrics TO PUBLIC;
    GRANT USAGE ON SEQUENCE views_id_seq TO lastprice_service;
    REVOKE EXECUTE ON FUNCTION refresh_experiment_metrics() FROM PUBLIC;
    COMMENT ON TABLE usage IS 'what is billed';
    ALTER TABLE views SET (fillfactor = 70), ALTER user_id SET STATISTICS 300, ADD CONSTRAINT seen CHECK (id > 0) NOT VALID;
    CREATE TABLE invoices (id serial PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants, page jsonb);
    INSERT INTO invoices (tenant_id) SELECT id FROM tenants;
    CREATE VIEW sold AS SELECT e.name, c.revenue FROM experiments e JOIN conversions c ON c.experiment_id = e.id;
    CREATE FUNCTION tenants_guard(text) RETURNS bigint LANGUAGE sql AS 'SELECT 5::bigint';
    CREATE FUNCTION last_sale() RETURNS SETOF conversions LANGUAGE sql AS 'SELECT * FROM conversions ORDER BY id DESC LIMIT 1';
"#;

/// All that a catalog says of what is not the system's or an extension's, and every row, in whichever schema.
async fn picture(database: &TestDatabase) -> Vec<String> {
    let superuser = database.connect_superuser().await.unwrap();
    superuser.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    let mut picture = lines(&superuser, CATALOG).await;
    let tables = "SELECT oid::regclass FROM pg_class WHERE relkind IN ('r', 'm', 'S') AND oid >= 16384
                  AND relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname ~ '^pg_|^information_schema$')";
    for table in lines(&superuser, tables).await {
        let sum = format!(
            "SELECT '{table}', count(*), md5(string_agg(x::text, '' ORDER BY x::text)) FROM (SELECT * FROM {table}) x"
        );
        picture.extend(lines(&superuser, &sum).await);
    }
    picture.sort();
    picture
}

/// Says what differs, and not all the rest.
async fn assert_picture(database: &TestDatabase, before: &[String], when: &str) {
    let after = picture(database).await;
    let not_in = |these: &[String], those: &[String]| {
        these.iter().filter(|line| !those.contains(line)).cloned().collect::<Vec<_>>()
    };
    let (gone, new) = (not_in(before, &after), not_in(&after, before));
    assert!(gone.is_empty() && new.is_empty(), "{when}: gone is {gone:#?} and new is {new:#?}");
}

/// What the original's own commands say, and that they change nothing in the end.
async fn answers(owner: &tokio_postgres::Client) -> Vec<String> {
    let mut answers = Vec::new();
    owner.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{ACME}'")).await.unwrap();
    for sql in SQL {
        owner.batch_execute("SAVEPOINT command").await.unwrap();
        answers.push(match rows(owner, sql).await {
            Ok(_) if sql.starts_with("EXPLAIN") => "a plan".to_owned(),
            Ok(mut rows) => {
                rows.sort();
                format!("{rows:?}")
            }
            Err(error) => {
                owner.batch_execute("ROLLBACK TO command").await.unwrap();
                error.as_db_error().unwrap().message().to_owned()
            }
        });
    }
    owner.batch_execute("ROLLBACK").await.unwrap();
    answers
}

async fn back(owner: &tokio_postgres::Client) -> Result<(), tokio_postgres::Error> {
    owner.batch_execute(BACK).await
}

/// It refuses with these words, and nothing has changed.
async fn stops(database: &TestDatabase, owner: &tokio_postgres::Client, first: &str, words: &str) {
    let before = picture(database).await;
    owner.batch_execute(&format!("BEGIN; {first}")).await.unwrap();
    let refused = back(owner).await;
    owner.batch_execute("ROLLBACK").await.unwrap();
    let error = refused.expect_err(&format!("it went on: {words}"));
    let db = error.as_db_error().unwrap();
    let said = format!("{}\n{}", db.message(), db.detail().unwrap_or_default());
    assert!(said.contains(words), "{said}");
    assert_picture(database, &before, words).await;
}

#[tokio::test]
async fn there_and_back_is_as_if_nothing_had_been() {
    let Some((database, owner)) = original(&format!("{DATA}; {HOST}")).await else { return };
    let (before, said) = (picture(&database).await, answers(&owner).await);
    assert!(before.len() > 150 && said.iter().any(|answer| answer.contains("Pro plan")), "{said:?}");
    for partitions in ["", PARTITIONS, ""] {
        upgrade(&database, &owner).await;
        assert_ne!(picture(&database).await, before);
        owner.batch_execute(partitions).await.unwrap();
        back(&owner).await.unwrap();
        assert_picture(&database, &before, "back").await;
        assert_eq!(answers(&owner).await, said);
    }
    stops(&database, &owner, "", "nothing was upgraded here").await;
}

/// The original in a schema that has to be quoted; ours somewhere else, where the application has a right already.
#[tokio::test]
async fn everything_goes_to_where_it_was() {
    let Some((database, owner)) = original("").await else { return };
    let superuser = database.connect_superuser().await.unwrap();
    if rows(&owner, "SELECT FROM pg_roles WHERE rolname = 'lastprice_app'").await.unwrap().is_empty() {
        superuser.batch_execute("CREATE ROLE lastprice_app NOLOGIN").await.ok(); // or another test has just done it
    }
    owner
        .batch_execute(&format!(
            r#"CREATE SCHEMA "Old shop"; CREATE SCHEMA pricing; CREATE SCHEMA prices; CREATE SCHEMA original;
               GRANT USAGE ON SCHEMA prices TO lastprice_app;
               DROP MATERIALIZED VIEW experiment_metrics;
               ALTER TABLE tenants SET SCHEMA "Old shop"; ALTER TABLE experiments SET SCHEMA "Old shop";
               ALTER TABLE assignments SET SCHEMA "Old shop"; ALTER TABLE views SET SCHEMA "Old shop";
               ALTER TABLE conversions SET SCHEMA "Old shop"; ALTER TABLE usage SET SCHEMA "Old shop";
               DROP TABLE recommendations;
               SET search_path = "Old shop", public; {DATA}"#,
            DATA = &DATA[..DATA.find("INSERT INTO recommendations").unwrap()]
        ))
        .await
        .unwrap();
    let before = picture(&database).await;
    for ours in ["pricing", "prices", r#""Old shop""#] {
        owner.batch_execute("BEGIN; SET LOCAL lastprice.currency = 'USD'").await.unwrap();
        owner.batch_execute(MOVE).await.unwrap();
        owner.batch_execute(&format!("SET LOCAL search_path = {ours}, public")).await.unwrap();
        owner.batch_execute(SCHEMA_SQL).await.unwrap();
        owner.batch_execute(COPY).await.unwrap();
        owner.batch_execute("COMMIT; SET search_path = public").await.unwrap();
        assert_eq!(lines(&owner, &format!("SELECT count(*) FROM {ours}.audit_trail")).await.len(), 1);
        back(&owner).await.unwrap();
        owner.batch_execute(r#"SET search_path = "Old shop", public"#).await.unwrap();
        assert_picture(&database, &before, ours).await;
    }
}

#[tokio::test]
async fn what_came_after_the_upgrade_is_not_lost_unasked() {
    let Some((database, owner)) = original(DATA).await else { return };
    let before = picture(&database).await;
    upgrade(&database, &owner).await;
    let one = |sql: &str| format!("INSERT INTO {sql}");
    let webhook = |status: &str, at: &str| {
        one(&format!(
            "webhook_events (tenant_id, id, seq, body, body_hash, status, processed_at)
             VALUES ('{GLOBEX}', 'e', gen_random_uuid(), '', sha256(''), '{status}', {at})"
        ))
    };
    let sale = |key: &str| {
        one(&format!(
            "conversions (tenant_id, experiment_id, user_id, variant, reason, kind, revenue, currency, idempotency_key)
             VALUES ('{GLOBEX}', '{SEATS}', 'user-1', 'b', 'imported', 'sale', 7, 'USD', '{key}')"
        ))
    };
    for (first, words) in [
        (sale("of ours"), "upgrade: 1 entries of the ledger\n"),
        (sale("original:of nobody"), "upgrade: 1 entries of the ledger\n"),
        (
            one(&format!(
                "waiting_conversions VALUES ('{ACME}', 'k', gen_random_uuid(), 'refund', 'o/1', '{{}}', now())"
            )),
            "upgrade: 1 entries that wait\n",
        ),
        (webhook("pending", "NULL"), "upgrade: 1 webhooks that are not processed\n"),
        (webhook("failed", "now()"), "upgrade: 1 webhooks that are not processed\n"),
        (
            one(&format!(
                "assignments (tenant_id, experiment_id, user_id, variant, price, currency)
                 VALUES ('{ACME}', '{PRO}', 'x', 'high', 29.5, 'USD'), ('{ACME}', '{PRO}', 'y', 'high', 29.5, 'USD')"
            )),
            "upgrade: 2 quotes\n",
        ),
        (
            one(&format!("usage (tenant_id, metric, day, value) VALUES ('{ACME}', 'calls', '2026-01-01', 1)")),
            "upgrade: 1 amounts of usage\n",
        ),
        (
            format!(
                "WITH t AS (INSERT INTO tenants (name, email) VALUES ('T', 't@example.com') RETURNING id)
                 INSERT INTO experiments (tenant_id, key, name, variants) SELECT id, 'x', 'X', '{ARMS}' FROM t"
            ),
            "upgrade: 1 tenants, 1 experiments\n",
        ),
        (
            format!("SELECT app_set_tenant('{ACME}'); SELECT erase_user('user-1')"),
            "upgrade: 1 erasures of users\n",
        ),
    ] {
        stops(&database, &owner, &first, words).await;
        let denied = format!("{first}; SET LOCAL lastprice.discard = 'no'");
        stops(&database, &owner, &denied, words).await;
    }

    // As services do it: a sale of each tenant, one of them to somebody who is new.
    let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
    for (of, id, who, paid) in [(ACME, PRO, "somebody new", None), (GLOBEX, SEATS, "user-1", Some("7"))] {
        let (scope, id, who) = (client.tenant(tenant(of)), experiment(id), user(who));
        let price = match paid {
            Some(paid) => usd(paid),
            None => scope.assignments().assign(id, &who).await.unwrap().price(),
        };
        let key = IdempotencyKey::new("new").unwrap();
        let sale = NewConversion::sale(id, who, price, key).order(OrderId::new("o").unwrap());
        let outcome = scope.conversions().settle(&sale).await.unwrap();
        assert!(matches!(outcome, ConversionOutcome::Recorded(_)), "{outcome:?}");
    }
    stops(&database, &owner, "", "upgrade: 2 entries of the ledger, 1 quotes\n").await;
    owner.batch_execute("SET lastprice.discard = 'yes'").await.unwrap();
    back(&owner).await.unwrap();
    assert_picture(&database, &before, "back").await;
    owner.batch_execute("RESET lastprice.discard").await.unwrap();
    try_upgrade(&owner).await.unwrap();
    owner.batch_execute(&webhook("processed", "now()")).await.unwrap(); // what became of it is in the ledger, or nothing
    back(&owner).await.unwrap();
    assert_picture(&database, &before, "back").await;
}

/// A service that was not stopped: what it commits while the way back waits for it is seen.
#[tokio::test]
async fn a_sale_on_its_way_is_waited_for() {
    let Some((database, owner)) = original(DATA).await else { return };
    upgrade(&database, &owner).await;
    let service = database.connect_app().await.unwrap();
    let sale = format!(
        "BEGIN; SELECT app_set_tenant('{GLOBEX}');
         INSERT INTO conversions (tenant_id, experiment_id, user_id, variant, reason, kind, revenue, currency, idempotency_key)
         VALUES ('{GLOBEX}', '{SEATS}', 'user-1', 'b', 'imported', 'sale', 7, 'USD', 'of ours')"
    );
    service.batch_execute(&sale).await.unwrap();
    let going = tokio::spawn(async move { (back(&owner).await, owner) });
    let superuser = database.connect_superuser().await.unwrap();
    let waiting =
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while rows(&superuser, waiting).await.unwrap().is_empty() {
        assert!(!going.is_finished(), "it did not wait");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    service.batch_execute("COMMIT").await.unwrap();
    let (refused, owner) = going.await.unwrap();
    let (_, _, message) = refusal(refused);
    assert!(message.ends_with("after the upgrade: 1 entries of the ledger"), "{message}");
    let first = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ";
    stops(&database, &owner, first, "with an older snapshot").await;
}

#[tokio::test]
async fn nothing_of_the_hosts_is_dropped() {
    let Some((database, owner)) = original(DATA).await else { return };
    let before = picture(&database).await;
    upgrade(&database, &owner).await;
    for (theirs, words) in [
        (
            "CREATE TABLE carts (tenant_id uuid CONSTRAINT cart_of REFERENCES tenants)",
            "constraint cart_of on table carts depends on table tenants",
        ),
        ("CREATE VIEW money AS SELECT revenue FROM conversions", "view money depends on table conversions"),
        ("CREATE VIEW today AS SELECT * FROM tenant_usage", "view today depends on view tenant_usage"),
        (
            "CREATE TABLE notes (t uuid); CREATE POLICY own ON notes USING (t = app_tenant_id())",
            "policy own on table notes depends on function app_tenant_id()",
        ),
        (
            "CREATE FUNCTION sales() RETURNS SETOF conversions LANGUAGE sql AS 'SELECT * FROM conversions'",
            "function sales() depends on type conversions",
        ),
        (
            "CREATE VIEW why AS SELECT reason FROM original.upgrade_log",
            "view why depends on table original.upgrade_log",
        ),
        (
            "CREATE FUNCTION lastprice_schema_version(integer) RETURNS integer LANGUAGE sql AS 'SELECT 2';
             CREATE OR REPLACE FUNCTION lastprice_schema_version() RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT 2'",
            "holds version 2 of lastprice",
        ),
        ("ALTER TABLE tenants RENAME TO customers", "relation \"tenants\" does not exist"),
        ("CREATE TABLE idx_views_time (n int)", "relation \"idx_views_time\" already exists"),
    ] {
        stops(&database, &owner, theirs, words).await;
    }

    // What is on its own stays: also what is in the schema that the move has made.
    let own = "CREATE TABLE public.carts AS SELECT 1 AS n; CREATE TABLE original.kept AS TABLE original.upgrade_log";
    owner.batch_execute(own).await.unwrap();
    back(&owner).await.unwrap();
    assert!(lines(&owner, "SELECT count(*) FROM original.kept").await[0].parse::<i32>().unwrap() > 10);
    owner.batch_execute("DROP TABLE carts; DROP SCHEMA original CASCADE").await.unwrap();
    assert_picture(&database, &before, "back").await;
}

/// Objects with their identity, definition, owner and rights; what PostgreSQL would grant by itself is written out.
const CATALOG: &str = "
    WITH mine AS (SELECT oid, nspname, nspowner, nspacl FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema')
    SELECT 'schema', nspname, nspowner::regrole, a::text FROM mine, LATERAL (
      SELECT string_agg(x::text, ' ' ORDER BY x::text) AS a FROM aclexplode(COALESCE(nspacl, acldefault('n', nspowner))) x) acl
    UNION ALL SELECT 'relation', c.oid::text || ' ' || c.oid::regclass, relowner::regrole, concat_ws(' ', relkind, relfilenode, reltablespace, relpersistence,
        relrowsecurity, relforcerowsecurity, relreplident, relispopulated, reloptions, relacl, obj_description(c.oid, 'pg_class'),
        CASE relkind WHEN 'i' THEN pg_get_indexdef(c.oid) WHEN 'v' THEN pg_get_viewdef(c.oid) WHEN 'm' THEN pg_get_viewdef(c.oid) END)
      FROM pg_class c JOIN mine ON mine.oid = relnamespace
    UNION ALL SELECT 'column', attrelid::regclass || '.' || attname, '0'::regrole, concat_ws(' ', attnum, format_type(atttypid, atttypmod), attnotnull, attstorage,
        attstattarget, attisdropped, attacl, attoptions, attidentity, pg_get_expr(adbin, adrelid), col_description(attrelid, attnum))
      FROM pg_attribute JOIN pg_class c ON c.oid = attrelid AND relkind <> 'i' JOIN mine ON mine.oid = relnamespace
      LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attnum > 0
    UNION ALL SELECT 'constraint', k.oid::text || ' ' || conrelid::regclass || '.' || conname, '0', concat_ws(' ', convalidated, pg_get_constraintdef(k.oid))
      FROM pg_constraint k JOIN mine ON mine.oid = connamespace
    UNION ALL SELECT 'trigger', t.oid::text || ' ' || tgname, '0', concat_ws(' ', tgenabled, pg_get_triggerdef(t.oid))
      FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid JOIN mine ON mine.oid = relnamespace
    UNION ALL SELECT 'policy', polname || ' ' || polrelid::regclass, '0', concat_ws(' ', polcmd, polpermissive, polroles,
        pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
      FROM pg_policy JOIN pg_class c ON c.oid = polrelid JOIN mine ON mine.oid = relnamespace
    UNION ALL SELECT 'function', p.oid::text || ' ' || p.oid::regprocedure, proowner::regrole, concat_ws(' ', proacl, CASE WHEN prokind <> 'a' THEN pg_get_functiondef(p.oid) END)
      FROM pg_proc p JOIN mine ON mine.oid = pronamespace
    UNION ALL SELECT 'type', t.oid::text || ' ' || t.oid::regtype, typowner::regrole, concat_ws(' ', typtype, typacl)
      FROM pg_type t JOIN mine ON mine.oid = typnamespace
    UNION ALL SELECT 'sequence', seqrelid::regclass::text, '0', concat_ws(' ', seqstart, seqincrement, seqmax, refobjid::regclass, refobjsubid)
      FROM pg_sequence JOIN pg_depend ON objid = seqrelid AND classid = 'pg_class'::regclass AND deptype IN ('a', 'i')
    UNION ALL SELECT 'extension', extname, extowner::regrole, extnamespace::regnamespace::text FROM pg_extension
    UNION ALL SELECT 'default', defaclobjtype::text, defaclrole::regrole, defaclacl::text FROM pg_default_acl
    UNION ALL SELECT 'event trigger', evtname, evtowner::regrole, NULL FROM pg_event_trigger";
