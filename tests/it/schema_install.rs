//! Installing: by `psql -f schema.sql` and by `Admin::migrate()`, over nothing, over itself, over something else.

use std::fs;
use std::process::Command;

use lastprice::{
    Admin, Client, Currency, ErrorKind, NewConversion, NewExperiment, NewTenant, NewView, UserId, Variants,
};
use lastprice_testkit::TestDatabase;

use crate::support_sql::*;

#[tokio::test]
async fn psql_and_migrate_install_the_same() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let by_psql = TestDatabase::builder().empty().create().await.unwrap();
    let by_migrate = TestDatabase::builder().empty().create().await.unwrap();
    let file = |db: &TestDatabase| psql(&psql_path, &db.owner_url(), "", &["-f", schema_sql()]);

    file(&by_psql).expect_ok();
    let migrated = Admin::connect(&by_migrate.owner_url()).await.unwrap().migrate().await.unwrap();
    assert_eq!((migrated.from, migrated.to), (None, 1));
    let definition = definitions(&pg_dump, &by_psql.owner_url());
    assert!(definition.contains("CREATE MATERIALIZED VIEW public.experiment_metrics"));
    assert!(!definition.contains("@example.com"), "no demo tenants unless asked for");
    assert_eq!(definition, definitions(&pg_dump, &by_migrate.owner_url()));

    // Each over the other, and over itself.
    for db in [&by_psql, &by_migrate] {
        let again = Admin::connect(&db.owner_url()).await.unwrap().migrate().await.unwrap();
        assert_eq!((again.from, again.to), (Some(1), 1));
        let ran = file(db);
        assert!(ran.err.contains("version 1 of lastprice already: nothing to do"), "{}", ran.err);
        ran.expect_ok();
        assert_eq!(definition, definitions(&pg_dump, &db.owner_url()));
        let tenants = db.connect_owner().await.unwrap().query("SELECT FROM tenants", &[]).await.unwrap();
        assert!(tenants.is_empty());
    }
}

#[test]
fn schema_sql_is_what_the_script_makes() {
    let root = env!("CARGO_MANIFEST_DIR");
    let copy = TemporaryDir::new("script");
    for dir in ["scripts", "migrations"] {
        fs::create_dir_all(copy.0.join(dir)).unwrap();
    }
    fs::copy(format!("{root}/scripts/schema"), copy.file("scripts/schema")).unwrap();
    for entry in fs::read_dir(format!("{root}/migrations")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.0.join("migrations").join(entry.file_name())).unwrap();
    }
    run(Command::new("sh").arg(copy.file("scripts/schema"))).expect_ok();
    let made = fs::read_to_string(copy.file("schema.sql")).unwrap();
    assert!(
        made == fs::read_to_string(schema_sql()).unwrap(),
        "schema.sql is out of date: run scripts/schema"
    );
    assert!(made == lastprice::SCHEMA_SQL);
    assert!(!made.lines().any(|line| line.starts_with('\\')), "no psql commands: drivers run it, too");
}

#[tokio::test]
async fn over_another_version_it_stops() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    for version in ["0", "99"] {
        let replace = format!(
            "CREATE OR REPLACE FUNCTION lastprice_schema_version() RETURNS integer
             LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT {version}'"
        );
        owner.batch_execute(&replace).await.unwrap();
        let before = definitions(&pg_dump, &db.owner_url());
        let ran = psql(&psql_path, &db.owner_url(), "-c lastprice.demo=on", &["-f", schema_sql()]);
        ran.expect_refusal(&[&format!("holds version {version} of lastprice"), "installs version 1"]);
        let error = Admin::connect(&db.owner_url()).await.unwrap().migrate().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SchemaMismatch);
        assert!(error.to_string().contains(&format!("version {version}")), "{error}");
        assert_eq!(before, definitions(&pg_dump, &db.owner_url()));
    }
    assert_eq!(value(&rows(&owner, "SELECT count(*) FROM tenants").await.unwrap()), "0");
}

#[tokio::test]
async fn over_tables_of_another_origin_it_stops() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    owner
        .batch_execute(
            "CREATE TABLE tenants (id uuid PRIMARY KEY, name varchar(255));
             CREATE TABLE experiments (id uuid PRIMARY KEY, tenant_id uuid REFERENCES tenants);
             CREATE TABLE views (id serial, variant text);
             CREATE MATERIALIZED VIEW experiment_metrics AS SELECT 1 AS n",
        )
        .await
        .unwrap();
    let before = definitions(&pg_dump, &db.owner_url());
    let found = "tables of another origin by our names: experiment_metrics, experiments, tenants, views";
    psql(&psql_path, &db.owner_url(), "", &["-f", schema_sql()]).expect_refusal(&[found]);
    let error = Admin::connect(&db.owner_url()).await.unwrap().migrate().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SchemaMismatch);
    assert!(error.to_string().contains(found), "{error}");
    assert_eq!(before, definitions(&pg_dump, &db.owner_url()));
}

/// The names need quoting, every other time; and a host's own table has the name of one of ours.
#[tokio::test]
async fn into_a_schema_of_its_own() {
    let (Some(psql_path), Some(pg_dump)) = (program("psql"), program("pg_dump")) else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    owner
        .batch_execute(
            r#"CREATE TABLE public.views (page text); INSERT INTO public.views VALUES ('home');
               CREATE SCHEMA pricing; CREATE SCHEMA "Pricing 2"; CREATE SCHEMA "Pricing 3""#,
        )
        .await
        .unwrap();
    let options = |path: &str| format!("-c search_path={}", path.replace(' ', "\\ "));
    let install = |path: &str| psql(&psql_path, &db.owner_url(), &options(path), &["-f", schema_sql()]);
    install("pricing,public").expect_ok();
    install(r#""Pricing 2""#).expect_ok();
    let third = Admin::connect_schema(&db.owner_url(), "Pricing 3").await.unwrap();
    assert_eq!(third.migrate().await.unwrap().from, None);
    assert_eq!(third.migrate().await.unwrap().from, Some(1));
    install(r#""Pricing 2""#).expect_ok();

    let whole = definitions(&pg_dump, &db.owner_url());
    assert_eq!(whole.matches("CREATE TABLE public.").count(), 1, "only the host's");
    for (name, quoted) in
        [("pricing", "pricing"), ("Pricing 2", r#""Pricing 2""#), ("Pricing 3", r#""Pricing 3""#)]
    {
        assert!(whole.contains(&format!("CREATE TABLE {quoted}.conversions")), "{name}");
        end_to_end(&db, name).await;
    }
    assert_eq!(value(&rows(&owner, "SELECT string_agg(page, ',') FROM public.views").await.unwrap()), "home");
}

/// Rights and settings are of our functions, and of no function of the host's that has the name of one.
#[tokio::test]
async fn a_hosts_function_stays_as_it_is() {
    let Some(psql_path) = program("psql") else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    let of_the_host = "CREATE FUNCTION erase_user(id int) RETURNS int LANGUAGE sql AS 'SELECT id'";
    owner.batch_execute(of_the_host).await.unwrap();
    let settings = "SELECT p.proconfig IS NULL AND p.proacl IS NULL FROM pg_proc p WHERE p.oid = 'erase_user(int)'::regprocedure";
    let is_untouched = async || owner.query_one(settings, &[]).await.unwrap().get::<_, bool>(0);
    assert!(is_untouched().await);
    psql(&psql_path, &db.owner_url(), "", &["-f", schema_sql()]).expect_ok();
    assert!(is_untouched().await);
}

/// The client works in a schema, and every function works from any search_path.
async fn end_to_end(db: &TestDatabase, schema: &str) {
    let client = Client::builder().url(db.app_url()).schema(schema).require_app_role().build().unwrap();
    let tenant = client.create_tenant(NewTenant::managed("T", "t@example.com")).await.unwrap();
    let handle = client.tenant(tenant.id);
    let usd = Currency::new("USD").unwrap();
    let arms = Variants::new().add("a", 1, "10").add("b", 1, "12.50");
    let x = handle.experiments().create(NewExperiment::new("x", "X", usd, arms)).await.unwrap();
    handle.experiments().activate(x.id).await.unwrap();
    let user = UserId::new("u").unwrap();
    let price = handle.assignments().assign(x.id, &user).await.unwrap().price();
    let _ = handle.views().record(&NewView::new(x.id, user.clone())).await.unwrap();
    let key = lastprice::IdempotencyKey::new("order-1").unwrap();
    let _ = handle.conversions().settle(&NewConversion::sale(x.id, user, price, key)).await.unwrap();
    assert_eq!(handle.metrics().experiment(x.id).await.unwrap().conversions, 1);
    assert_eq!(handle.metrics().fold().await.unwrap(), 3);

    let admin = Admin::connect_schema(&db.owner_url(), schema).await.unwrap();
    assert!(admin.refresh_metrics().await.unwrap());
    assert!(admin.recount_metrics().await.unwrap() > 0);

    let owner = db.connect_owner().await.unwrap();
    let s = format!("\"{schema}\"");
    for path in ["''", "public", "pg_catalog, public", "nowhere"] {
        let sql = format!(
            "SET search_path = {path};
             INSERT INTO {s}.views (tenant_id, experiment_id, user_id, variant) VALUES ('{0}', '{1}', 'v', 'a');
             UPDATE {s}.views SET variant = 'b' WHERE user_id = 'v'; DELETE FROM {s}.views WHERE user_id = 'v';
             UPDATE {s}.experiments SET name = 'Y' WHERE key = 'x'; UPDATE {s}.tenants SET name = 'Y';
             SELECT {s}.recount_experiment_metrics();
             SELECT {s}.fold_metric_deltas('{0}'); SELECT {s}.fold_metric_deltas(NULL);
             SELECT {s}.refresh_experiment_metrics();
             BEGIN; SELECT {s}.app_set_tenant('{0}'); SELECT {s}.fold_experiment_metrics(); COMMIT",
            tenant.id.uuid(),
            x.id.uuid()
        );
        owner.batch_execute(&sql).await.unwrap_or_else(|e| panic!("search_path {path}: {e:?}"));
    }
    let superuser = db.connect_superuser().await.unwrap();
    superuser.batch_execute(&format!("SET search_path = {s}")).await.unwrap();
    assert_exact(&superuser, schema).await;
    let row =
        rows(&superuser, "SELECT assignments, views, conversions FROM experiment_metrics").await.unwrap();
    assert_eq!(row, [["1", "1", "1"].map(|n| Some(n.to_owned()))]);
}

#[tokio::test]
async fn without_the_schema_it_says_so() {
    let Some(psql_path) = program("psql") else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    psql(&psql_path, &db.owner_url(), "-c search_path=nowhere", &["-f", schema_sql()])
        .expect_refusal(&["search_path (nowhere) names none that exists", "CREATE SCHEMA first"]);
    let error = Admin::connect_schema(&db.owner_url(), "nowhere").await.unwrap().migrate().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SchemaMismatch);
    assert!(error.to_string().contains(r#"there is no schema "nowhere""#), "{error}");
}

#[tokio::test]
async fn demo_tenants_only_when_asked_for() {
    let Some(psql_path) = program("psql") else { return };
    let db = TestDatabase::builder().empty().create().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    let query = "SELECT string_agg(email || ' ' || mode, ', ' ORDER BY mode DESC) FROM tenants";
    for (demo, tenants) in [
        ("", "NULL"),
        ("-c lastprice.demo=off", "NULL"),
        ("-c lastprice.demo=on", "demo@example.com managed, byok@example.com byok"),
        ("-c lastprice.demo=on", "demo@example.com managed, byok@example.com byok"),
    ] {
        psql(&psql_path, &db.owner_url(), demo, &["-f", schema_sql()]).expect_ok();
        assert_eq!(value(&rows(&owner, query).await.unwrap()), tenants, "{demo}");
    }
}

#[tokio::test]
async fn what_the_catalogue_must_say() {
    let db = TestDatabase::new().await.unwrap();
    let owner = db.connect_owner().await.unwrap();
    let none = async |what: &str, sql: &str| {
        let found = rows(&owner, sql).await.unwrap();
        assert!(found.is_empty(), "{what}: {found:?}");
    };

    // Distributed databases rename shards by the constraint, and errors are told apart by it.
    let names = rows(
        &owner,
        "SELECT conrelid::regclass::text, conname FROM pg_constraint
         WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')",
    );
    let names = names.await.unwrap();
    assert!(names.len() > 80, "{}", names.len());
    for name in names {
        let (table, name) = (name[0].as_deref().unwrap(), name[1].as_deref().unwrap());
        let rest = name.strip_prefix(table).unwrap_or_else(|| panic!("{name} does not begin with {table}"));
        assert!(["_pkey", "_fkey", "_key", "_check"].iter().any(|end| rest.ends_with(end)), "{name}");
        assert!(
            lastprice::SCHEMA_SQL.contains(&format!("CONSTRAINT {name} ")),
            "{name} is made up by PostgreSQL"
        );
    }

    none(
        "functions that run as the owner, and look for tables elsewhere",
        "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef
           AND (proconfig @> '{\"search_path=public, pg_temp\"}'::text[]) IS NOT TRUE",
    )
    .await;
    none(
        "functions of ours that run as the owner, open to everyone",
        "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef
           AND has_function_privilege('public', oid, 'EXECUTE')",
    )
    .await;
    let tables = rows(
        &owner,
        "SELECT c.relname FROM pg_class c LEFT JOIN pg_policy p ON p.polrelid = c.oid AND p.polname = 'tenant_isolation'
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relrowsecurity AND NOT c.relforcerowsecurity
           AND p.polpermissive AND p.polcmd = '*' AND p.polroles = '{0}'
           AND pg_get_expr(p.polqual, c.oid) = format('(%s = app_tenant_id())', CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END)
           AND pg_get_expr(p.polqual, c.oid) = pg_get_expr(p.polwithcheck, c.oid) ORDER BY 1",
    );
    let tables: Vec<_> = tables.await.unwrap().into_iter().map(|row| row[0].clone().unwrap()).collect();
    assert_eq!(
        tables.join(" "),
        "archived_experiments assignments audit_trail conversions erasures experiments identities ledger_locks metric_baselines metric_deltas metric_totals recommendations tenant_limits tenants usage \
         usage_totals views waiting_conversions webhook_events"
    );
    none(
        "tables without the policy",
        &format!(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
             AND relname NOT IN ('plan_limits', '{}')",
            tables.join("', '")
        ),
    )
    .await;
    none(
        "other permissive policies",
        "SELECT polname FROM pg_policy WHERE polpermissive AND polname <> 'tenant_isolation'",
    )
    .await;
    none(
        "unique indexes that do not begin with the tenant",
        "SELECT i.indexrelid::regclass FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
         LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
         WHERE c.relnamespace = 'public'::regnamespace AND i.indisunique AND a.attname IS DISTINCT FROM 'tenant_id'
           AND i.indexrelid NOT IN ('tenants_pkey'::regclass, 'tenants_email_key'::regclass, 'plan_limits_pkey'::regclass)",
    )
    .await;
    none(
        "foreign keys that do not begin with the tenant, on both sides",
        "SELECT conname FROM pg_constraint k
         JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]
         JOIN pg_attribute f ON f.attrelid = k.confrelid AND f.attnum = k.confkey[1]
         WHERE k.contype = 'f' AND k.connamespace = 'public'::regnamespace
           AND (a.attname <> 'tenant_id' OR f.attname <> CASE k.confrelid::regclass::text WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END)",
    )
    .await;
}
