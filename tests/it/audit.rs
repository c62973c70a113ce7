//! Each hazard, made on purpose: the audit names it and nothing else, and what it proposes mends it.

use lastprice::{Client, ErrorKind, Hazard, IsolationReport};
use lastprice_testkit::{PrivateCluster, TestDatabase};

use crate::support_sql::{A, B, as_tenant, two_tenants, version_num};

/// Where it is: the login `svc` unless said otherwise, the SQL of a superuser, and what is to be found.
struct Fixture(&'static str, &'static [(&'static str, &'static str)]);

fn audit_of(database: &TestDatabase, role: &str) -> Client {
    Client::builder().url(database.url_for(role)).require_app_role().build().unwrap()
}

async fn report(database: &TestDatabase, role: &str) -> IsolationReport {
    audit_of(database, role).verify_isolation().await.unwrap()
}

async fn audit_schema(database: &TestDatabase, schema: &str) -> IsolationReport {
    let client = Client::builder().url(database.app_url()).schema(schema).build().unwrap();
    client.verify_isolation().await.unwrap()
}

fn found(report: &IsolationReport) -> Vec<(&str, &str)> {
    report.findings().iter().map(|f| (f.hazard.as_str(), f.object.as_str())).collect()
}

/// Every finding by name and by object, nothing else; and nothing after its SQL has run.
async fn check(cluster: &PrivateCluster, fixtures: &[Fixture]) {
    let first = cluster.database().await.unwrap(); // dropped, it would end its connections
    let server = first.connect_superuser().await.unwrap();
    server.batch_execute("CREATE ROLE svc LOGIN IN ROLE lastprice_app").await.unwrap();
    let version = version_num(&server).await;
    assert_eq!(found(&report(&first, "svc").await), [], "before all");
    for Fixture(sql, expected) in fixtures {
        // The role is there since PostgreSQL 14, and the views since 15.
        if version < 140_000 && sql.contains("pg_read_all_data")
            || version < 150_000 && sql.contains("security_invoker")
        {
            continue;
        }
        let database = cluster.database().await.unwrap();
        let superuser = database.connect_superuser().await.unwrap();
        let sql = sql.replace("{db}", database.name());
        superuser.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        let bad = report(&database, "svc").await;
        let expected: Vec<_> =
            expected.iter().map(|(h, o)| (*h, o.replace("{db}", database.name()))).collect();
        let expected: Vec<_> = expected.iter().map(|(h, o)| (*h, o.as_str())).collect();
        assert_eq!(found(&bad), expected, "{sql}\n{bad}");
        for finding in bad.findings() {
            superuser.batch_execute(&finding.fix).await.unwrap_or_else(|e| panic!("{}: {e:?}", finding.fix));
        }
        let after = report(&database, "svc").await;
        assert!(after.is_clean(), "{sql}\n{bad}\n{after}");
    }
}

#[tokio::test]
async fn each_role_that_escapes_is_found_and_mended() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    check(
        &cluster,
        &[
            Fixture("ALTER ROLE svc SUPERUSER", &[("role_is_superuser", "svc")]),
            Fixture("ALTER ROLE svc BYPASSRLS", &[("role_bypasses_rls", "svc")]),
            Fixture("ALTER ROLE svc CREATEROLE", &[("role_creates_roles", "svc")]),
            Fixture("ALTER ROLE svc REPLICATION", &[("role_replicates", "svc")]),
            Fixture("REVOKE lastprice_app FROM svc", &[("role_lacks_app_role", "svc")]),
            Fixture(
                "GRANT lastprice_owner TO svc",
                &[("role_may_become_owner", "svc may become lastprice_owner")],
            ),
            Fixture(
                "ALTER ROLE svc NOINHERIT; GRANT lastprice_owner TO svc",
                &[("role_may_become_owner", "svc may become lastprice_owner")],
            ),
            Fixture(
                "CREATE ROLE granter; GRANT lastprice_owner TO granter WITH ADMIN OPTION;
                 SET ROLE granter; GRANT lastprice_owner TO svc; RESET ROLE",
                &[("role_may_become_owner", "svc may become lastprice_owner")],
            ),
            Fixture(
                "CREATE ROLE middle IN ROLE lastprice_owner; GRANT middle TO svc",
                &[("role_may_become_owner", "svc may become lastprice_owner")],
            ),
            Fixture(
                "CREATE ROLE \"By Pass\" BYPASSRLS; GRANT \"By Pass\" TO svc",
                &[("role_may_bypass_rls", "svc may become By Pass")],
            ),
            Fixture(
                "CREATE ROLE super SUPERUSER; GRANT super TO svc",
                &[("role_may_bypass_rls", "svc may become super")],
            ),
            Fixture("ALTER ROLE lastprice_app SUPERUSER", &[("role_is_superuser", "lastprice_app")]),
            Fixture("ALTER ROLE lastprice_app BYPASSRLS", &[("role_bypasses_rls", "lastprice_app")]),
            Fixture(
                "GRANT super TO lastprice_app",
                &[("role_may_bypass_rls", "lastprice_app may become super")],
            ),
            Fixture(
                "REVOKE lastprice_app FROM lastprice_owner CASCADE; GRANT lastprice_owner TO lastprice_app",
                &[("role_may_become_owner", "lastprice_app may become lastprice_owner")],
            ),
            Fixture(
                "GRANT lastprice_app TO lastprice_owner; GRANT pg_read_all_data TO svc",
                &[("role_reads_around_rls", "svc may become pg_read_all_data")],
            ),
            Fixture(
                "GRANT pg_read_server_files TO svc",
                &[("role_reads_around_rls", "svc may become pg_read_server_files")],
            ),
            Fixture(
                "GRANT pg_execute_server_program TO svc",
                &[("role_reads_around_rls", "svc may become pg_execute_server_program")],
            ),
            Fixture(
                "ALTER TABLE usage OWNER TO svc; REVOKE ALL ON usage FROM svc",
                &[("role_is_owner", "svc owns public.usage")],
            ),
            Fixture(
                "ALTER FUNCTION app_tenant_id() OWNER TO svc",
                &[("role_is_owner", "svc owns public.app_tenant_id()")],
            ),
            Fixture("ALTER ROLE svc SET app.tenant_id = 'x'", &[("tenant_bound_by_default", "role svc")]),
            Fixture(
                "ALTER ROLE svc IN DATABASE {db} SET app.tenant_id = 'x'",
                &[("tenant_bound_by_default", "role svc in database {db}")],
            ),
            Fixture(
                "ALTER DATABASE {db} SET app.tenant_id = 'x'",
                &[("tenant_bound_by_default", "database {db}")],
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn each_table_that_does_not_isolate_is_found_and_mended() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    check(&cluster, &[
        Fixture("ALTER TABLE views DISABLE ROW LEVEL SECURITY", &[("rls_disabled", "public.views")]),
        Fixture("DROP POLICY tenant_isolation ON views", &[("policy_missing", "public.views")]),
        Fixture("ALTER POLICY tenant_isolation ON views USING (true)", &[("policy_does_not_isolate", "tenant_isolation on public.views")]),
        Fixture("ALTER POLICY tenant_isolation ON tenants WITH CHECK (true)", &[("policy_does_not_isolate", "tenant_isolation on public.tenants")]),
        Fixture("ALTER POLICY tenant_isolation ON views TO lastprice_owner", &[("policy_for_other_roles", "tenant_isolation on public.views")]),
        Fixture("DROP POLICY tenant_isolation ON views; CREATE POLICY tenant_isolation ON views FOR SELECT USING (tenant_id = app_tenant_id())", &[("policy_covers_part", "tenant_isolation on public.views")]),
        Fixture("CREATE POLICY \"More\" ON views USING (true)", &[("policy_second", "More on public.views")]),
        Fixture("CREATE SCHEMA evil; CREATE FUNCTION evil.app_tenant_id() RETURNS uuid LANGUAGE sql AS 'SELECT NULL::uuid';
                 ALTER POLICY tenant_isolation ON views USING (tenant_id = evil.app_tenant_id())", &[("policy_does_not_isolate", "tenant_isolation on public.views")]),
        Fixture("DROP POLICY only_drafts_are_deleted ON experiments", &[("guard_policy_missing", "only_drafts_are_deleted on public.experiments")]),
        Fixture("ALTER POLICY no_past_at_first ON experiments WITH CHECK (true)", &[("guard_policy_missing", "no_past_at_first on public.experiments")]),
        Fixture("CREATE TABLE \"Orders\" (tenant_id uuid, id int); GRANT SELECT ON \"Orders\" TO svc", &[("rls_disabled", "public.\"Orders\""), ("policy_missing", "public.\"Orders\"")]),
        Fixture("CREATE TABLE private (tenant_id uuid, id int)", &[]),
        Fixture("ALTER TABLE views ADD CONSTRAINT once UNIQUE (id)", &[("key_without_tenant", "once on public.views")]),
        Fixture("CREATE UNIQUE INDEX once ON conversions (lower(order_id))", &[("key_without_tenant", "once on public.conversions")]),
        Fixture("CREATE UNIQUE INDEX once ON conversions (order_id) INCLUDE (tenant_id)", &[("key_without_tenant", "once on public.conversions")]),
        Fixture("ALTER TABLE experiments ADD CONSTRAINT once UNIQUE (id); ALTER TABLE views ADD CONSTRAINT loose FOREIGN KEY (experiment_id) REFERENCES experiments (id)",
                &[("foreign_key_without_tenant", "loose on public.views"), ("key_without_tenant", "once on public.experiments")]),
        Fixture("CREATE TABLE old_views () INHERITS (views); GRANT SELECT ON old_views TO lastprice_app", &[("partition_granted", "public.old_views to lastprice_app")]),
        Fixture("ALTER TABLE conversions DISABLE TRIGGER conversions_follow", &[("trigger_disabled", "conversions_follow on public.conversions")]),
        Fixture("CREATE RULE spy AS ON INSERT TO views DO ALSO NOTIFY spy", &[("rule_on_table", "spy on public.views")]),
    ])
    .await;
}

#[tokio::test]
async fn each_right_in_excess_is_found_and_revoked() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    check(&cluster, &[
        Fixture("GRANT SELECT ON experiment_metrics TO lastprice_app", &[("materialized_view_granted", "SELECT on public.experiment_metrics to lastprice_app")]),
        Fixture("GRANT SELECT (revenue) ON experiment_metrics TO svc", &[("materialized_view_granted", "SELECT (revenue) on public.experiment_metrics to svc")]),
        Fixture("GRANT INSERT ON metric_totals TO lastprice_app", &[("metric_tables_writable", "INSERT on public.metric_totals to lastprice_app")]),
        Fixture("GRANT SELECT ON metric_baselines TO lastprice_app", &[("granted_in_excess", "SELECT on public.metric_baselines to lastprice_app")]),
        Fixture("CREATE ROLE team; GRANT team TO svc; GRANT UPDATE ON conversions TO team", &[("ledger_writable", "UPDATE on public.conversions to team")]),
        Fixture("GRANT DELETE ON conversions TO svc", &[("ledger_writable", "DELETE on public.conversions to svc")]),
        Fixture("GRANT UPDATE (price) ON assignments TO lastprice_app", &[("ledger_writable", "UPDATE (price) on public.assignments to lastprice_app")]),
        Fixture("GRANT TRUNCATE ON views TO lastprice_app", &[("table_right_of_owner", "TRUNCATE on public.views to lastprice_app")]),
        Fixture("GRANT TRIGGER ON views TO svc", &[("table_right_of_owner", "TRIGGER on public.views to svc")]),
        Fixture("GRANT REFERENCES (id) ON tenants TO svc", &[("table_right_of_owner", "REFERENCES (id) on public.tenants to svc")]),
        Fixture("GRANT UPDATE ON tenants TO lastprice_app", &[("granted_in_excess", "UPDATE on public.tenants to lastprice_app")]),
        Fixture("GRANT UPDATE ON recommendations TO lastprice_app", &[("granted_in_excess", "UPDATE on public.recommendations to lastprice_app")]),
        Fixture("GRANT SELECT ON tenants TO PUBLIC", &[("granted_to_public", "SELECT on public.tenants to PUBLIC")]),
        Fixture("GRANT SELECT ON views TO svc WITH GRANT OPTION", &[("granted_in_excess", "SELECT on public.views to svc")]),
        Fixture("GRANT SELECT ON views TO svc", &[]),
        Fixture("GRANT CREATE ON SCHEMA public TO PUBLIC", &[("schema_create", "public to PUBLIC")]),
        Fixture("ALTER SCHEMA public OWNER TO svc", &[("schema_create", "public, which svc owns")]),
        Fixture("ALTER DEFAULT PRIVILEGES FOR ROLE lastprice_owner GRANT SELECT ON TABLES TO PUBLIC", &[("default_privileges", "tables of lastprice_owner to PUBLIC")]),
        Fixture("ALTER DEFAULT PRIVILEGES FOR ROLE lastprice_owner IN SCHEMA public GRANT SELECT ON TABLES TO lastprice_app", &[("default_privileges", "tables of lastprice_owner in public to lastprice_app")]),
    ])
    .await;
}

#[tokio::test]
async fn each_view_and_function_that_leaks_is_found_and_mended() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    check(&cluster, &[
        Fixture("CREATE VIEW \"All\" AS SELECT * FROM views; GRANT SELECT ON \"All\" TO svc", &[("view_leaks", "public.\"All\"")]),
        Fixture("CREATE VIEW inner_one AS SELECT * FROM experiment_metrics; CREATE VIEW outer_one AS SELECT * FROM inner_one; GRANT SELECT ON outer_one TO PUBLIC", &[("view_leaks", "public.outer_one")]),
        Fixture("CREATE MATERIALIZED VIEW kept AS SELECT * FROM conversions; GRANT SELECT ON kept TO lastprice_app", &[("view_leaks", "public.kept")]),
        Fixture("CREATE VIEW fine WITH (security_invoker) AS SELECT * FROM views; GRANT SELECT ON fine TO svc", &[]),
        Fixture("ALTER VIEW tenant_experiment_metrics RESET (security_barrier)", &[("barrier_view_broken", "public.tenant_experiment_metrics")]),
        Fixture("CREATE OR REPLACE VIEW tenant_experiment_metrics WITH (security_barrier) AS SELECT * FROM experiment_metrics", &[("barrier_view_broken", "public.tenant_experiment_metrics")]),
        Fixture("ALTER VIEW tenant_variant_metrics SET (security_barrier = false)", &[("barrier_view_broken", "public.tenant_variant_metrics")]),
        Fixture("CREATE FUNCTION leak() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT count(*) FROM public.views'", &[("definer_without_search_path", "public.leak()")]),
        Fixture("CREATE FUNCTION leak(int) RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = pg_temp, public AS 'SELECT 1::bigint'", &[("definer_without_search_path", "public.leak(integer)")]),
        Fixture("CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO PUBLIC; CREATE FUNCTION other.leak() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = \"$user\", pg_temp AS 'SELECT 1::bigint'", &[("definer_without_search_path", "other.leak()")]),
        Fixture("CREATE SCHEMA shared; GRANT USAGE, CREATE ON SCHEMA shared TO lastprice_app; CREATE FUNCTION leak(text) RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = shared, public, pg_temp AS 'SELECT 1::bigint'", &[("definer_without_search_path", "public.leak(text)")]),
        Fixture("CREATE SCHEMA \"His own\" AUTHORIZATION svc; CREATE FUNCTION leak(text) RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = public, \"His own\", pg_temp AS 'SELECT 1::bigint'", &[("definer_without_search_path", "public.leak(text)")]),
        Fixture("CREATE SCHEMA hosts; CREATE FUNCTION fine() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = hosts, public, pg_temp AS 'SELECT 1::bigint'", &[]),
        Fixture("ALTER FUNCTION fold_experiment_metrics() RESET search_path", &[("definer_without_search_path", "public.fold_experiment_metrics()")]),
        Fixture("GRANT EXECUTE ON FUNCTION recount_experiment_metrics() TO PUBLIC", &[("internal_function_granted", "public.recount_experiment_metrics() to PUBLIC")]),
        Fixture("GRANT EXECUTE ON FUNCTION fold_metric_deltas(uuid) TO lastprice_app", &[("internal_function_granted", "public.fold_metric_deltas(uuid) to lastprice_app")]),
        Fixture("CREATE OR REPLACE FUNCTION app_tenant_id() RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT COALESCE(NULLIF(current_setting('app.tenant_id', true), '')::uuid, gen_random_uuid()) $$", &[("tenant_function_replaced", "public.app_tenant_id()")]),
    ])
    .await;
}

#[tokio::test]
async fn several_hazards_are_all_found_and_the_result_names_them() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    two_tenants(&owner).await;
    let client = audit_of(&database, "lastprice_service");
    let clean = client.verify_isolation().await.unwrap();
    assert!(clean.is_clean(), "{clean}");
    clean.into_result().unwrap();

    owner.batch_execute("ALTER TABLE tenants DISABLE ROW LEVEL SECURITY; GRANT SELECT ON experiment_metrics TO lastprice_app").await.unwrap();
    let app = database.connect_app().await.unwrap();
    let all = as_tenant(&app, A, "SELECT id FROM tenants ORDER BY 1").await.unwrap();
    assert_eq!(all, [[Some(A.to_owned())], [Some(B.to_owned())]], "the hazard is one");
    let bad = client.verify_isolation().await.unwrap();
    let hazards: Vec<_> = bad.findings().iter().map(|f| f.hazard).collect();
    assert_eq!(hazards, [Hazard::RlsDisabled, Hazard::MaterializedViewGranted]);
    let json = lastprice::serde_json::to_value(&bad).unwrap();
    assert_eq!(json["findings"][0]["hazard"], "rls_disabled");
    assert!(bad.to_string().contains("ALTER TABLE public.tenants ENABLE ROW LEVEL SECURITY"), "{bad}");
    let refused = bad.into_result().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::IsolationNotEnforced);
    assert!(refused.to_string().ends_with("materialized_view_granted, rls_disabled"), "{refused}");
}

#[tokio::test]
async fn the_owner_and_the_first_superuser_are_findings_and_so_is_a_tenant_left_bound() {
    let database = TestDatabase::new().await.unwrap();
    let owner =
        Client::builder().url(database.owner_url()).build().unwrap().verify_isolation().await.unwrap();
    let hazards: Vec<_> = owner.findings().iter().map(|f| f.hazard).collect();
    assert_eq!(hazards, [Hazard::RoleCreatesRoles, Hazard::RoleIsOwner], "{owner}");
    let first = report(&database, "postgres").await;
    assert_eq!(found(&first), [("role_is_superuser", "postgres")], "{first}");

    let (url, name) = (database.app_url(), "options=-c%20app.tenant_id%3D");
    let url = format!("{url}{}{name}{A}", if url.contains('?') { '&' } else { '?' });
    let left = Client::builder().url(url).build().unwrap().verify_isolation().await.unwrap();
    assert_eq!(found(&left), [("tenant_left_bound", "lastprice_service")], "{left}");
}

#[tokio::test]
async fn a_schema_of_any_name_is_examined_and_one_that_is_not_there_is_an_error() {
    let cluster = PrivateCluster::builder().start().await.unwrap();
    let database = cluster.database_builder().empty().create().await.unwrap();
    let missing = audit_of(&database, "lastprice_service").verify_isolation().await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::SchemaMismatch, "{missing:?}");

    let superuser = database.connect_superuser().await.unwrap();
    let name = "Pri\"ces";
    superuser.batch_execute("CREATE SCHEMA \"Pri\"\"ces\" AUTHORIZATION lastprice_owner").await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute("SET search_path = \"Pri\"\"ces\"").await.unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
    let stranger = audit_schema(&database, name).await;
    assert_eq!(found(&stranger), [("role_lacks_app_role", "lastprice_service")], "{stranger}");
    superuser.batch_execute(&stranger.findings()[0].fix).await.unwrap();
    let client = Client::builder().url(database.app_url()).schema(name).build().unwrap();
    let clean = client.verify_isolation().await.unwrap();
    assert!(clean.is_clean(), "{clean}");
    owner.batch_execute("ALTER POLICY tenant_isolation ON views USING (true); ALTER VIEW tenant_variant_metrics RESET (security_barrier)").await.unwrap();
    let bad = client.verify_isolation().await.unwrap();
    assert_eq!(bad.findings().len(), 2, "{bad}");
    for finding in bad.findings() {
        owner.batch_execute(&finding.fix).await.unwrap();
    }
    assert!(client.verify_isolation().await.unwrap().is_clean());
}

/// The audit knows our tables and functions by name: one that the schema gets later must not be forgotten there.
#[tokio::test]
async fn every_table_and_function_of_the_schema_is_examined() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    let is_found = async |sql: String, back: String, hazard: &str, name: &str| {
        owner.batch_execute(&sql).await.unwrap();
        let report = report(&database, "lastprice_service").await;
        let is_it = |(h, object): &(&str, &str)| *h == hazard && object.contains(name);
        assert!(found(&report).iter().any(is_it), "{sql}: {report}");
        owner.batch_execute(&back).await.unwrap();
    };
    let tables =
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'";
    let tables = owner.query(tables, &[]).await.unwrap();
    assert!(tables.len() >= 12, "{}", tables.len());
    for table in &tables {
        let table: &str = table.get(0);
        let alter = |what: &str| format!("ALTER TABLE {table} {what} ROW LEVEL SECURITY");
        // What plans allow is the same for all tenants.
        if table != "plan_limits" {
            is_found(alter("DISABLE"), alter("ENABLE"), "rls_disabled", table).await;
        }
        let grant = format!("GRANT TRUNCATE ON {table} TO lastprice_service");
        let revoke = format!("REVOKE TRUNCATE ON {table} FROM lastprice_service");
        is_found(grant, revoke, "table_right_of_owner", table).await;
    }
    let functions =
        "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace
                     AND NOT has_function_privilege('lastprice_app', p.oid, 'EXECUTE')";
    let functions = owner.query(functions, &[]).await.unwrap();
    assert!(functions.len() >= 15, "{}", functions.len());
    for function in &functions {
        let function: &str = function.get(0);
        let grant = format!("GRANT EXECUTE ON FUNCTION {function} TO lastprice_app");
        let revoke = format!("REVOKE EXECUTE ON FUNCTION {function} FROM lastprice_app");
        is_found(grant, revoke, "internal_function_granted", function.split('(').next().unwrap()).await;
    }
    let definers = "SELECT p.oid::regprocedure::text FROM pg_proc p
                    WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef";
    let definers = owner.query(definers, &[]).await.unwrap();
    assert!(definers.len() >= 12, "{}", definers.len());
    for definer in &definers {
        let definer: &str = definer.get(0);
        let set = |path: &str| format!("ALTER FUNCTION {definer} SET search_path = {path}, pg_temp");
        is_found(set("elsewhere"), set("pg_catalog, public"), "definer_without_search_path", definer).await;
    }
    assert!(report(&database, "lastprice_service").await.is_clean());
}

/// Tables of the host's that have other tenants than ours, or isolate them in words of his own, are in order.
#[tokio::test]
async fn what_the_host_isolates_in_his_own_words_is_not_found() {
    let database = TestDatabase::new().await.unwrap();
    let owner = database.connect_owner().await.unwrap();
    for sql in [
        "CREATE TABLE buildings (tenant_id bigint); GRANT SELECT ON buildings TO lastprice_app",
        "CREATE TABLE notes (tenant_id uuid); ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
         CREATE POLICY own ON notes USING (tenant_id = current_setting('app.tenant_id')::uuid);
         GRANT SELECT, INSERT ON notes TO lastprice_app",
    ] {
        owner.batch_execute(sql).await.unwrap();
    }
    let clean = report(&database, "lastprice_service").await;
    assert!(clean.is_clean(), "{clean}");
    owner.batch_execute("ALTER TABLE notes DISABLE ROW LEVEL SECURITY").await.unwrap();
    let bad = report(&database, "lastprice_service").await;
    assert_eq!(found(&bad), [("rls_disabled", "public.notes")]);
}

/// What is proposed for a function of the host's may not take its tables away.
#[tokio::test]
async fn a_hosts_function_still_finds_its_tables_when_it_is_mended() {
    let database = TestDatabase::new().await.unwrap();
    let superuser = database.connect_superuser().await.unwrap();
    let make = "CREATE SCHEMA shop; GRANT USAGE ON SCHEMA shop TO PUBLIC; CREATE TABLE shop.carts (id int);
        CREATE FUNCTION shop.in_its_own() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = shop, public
          AS 'BEGIN RETURN (SELECT count(*) FROM carts, tenants); END';
        CREATE FUNCTION shop.in_none() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
          AS 'BEGIN RETURN (SELECT count(*) FROM carts, tenants); END'";
    superuser.batch_execute(make).await.unwrap();
    let bad = report(&database, "lastprice_service").await;
    let hazard = "definer_without_search_path";
    assert_eq!(found(&bad), [(hazard, "shop.in_its_own()"), (hazard, "shop.in_none()")], "{bad}");
    for finding in bad.findings() {
        superuser.batch_execute(&finding.fix).await.unwrap();
        superuser.batch_execute(&format!("SELECT {}", finding.object)).await.unwrap();
    }
    assert!(report(&database, "lastprice_service").await.is_clean());
}

/// Of two installations in a database, each reads its own tables; neither is mended into the other's.
#[tokio::test]
async fn the_functions_of_another_installation_are_left_alone() {
    let database = TestDatabase::new().await.unwrap();
    let (superuser, owner) =
        (database.connect_superuser().await.unwrap(), database.connect_owner().await.unwrap());
    superuser.batch_execute("CREATE SCHEMA pricing AUTHORIZATION lastprice_owner").await.unwrap();
    owner.batch_execute("SET search_path = pricing").await.unwrap();
    owner.batch_execute(lastprice::SCHEMA_SQL).await.unwrap();
    for schema in ["public", "pricing"] {
        let clean = audit_schema(&database, schema).await;
        assert!(clean.is_clean(), "{clean}");
    }

    // As an earlier release proposed it: then it erases in the other one, and says that there is nobody.
    let mixed = "ALTER FUNCTION public.erase_user(text, uuid) SET search_path = pricing, pg_temp";
    superuser.batch_execute(mixed).await.unwrap();
    assert!(audit_schema(&database, "pricing").await.is_clean(), "it is not its own");
    let bad = audit_schema(&database, "public").await;
    let hazard = "definer_without_search_path";
    assert_eq!(found(&bad), [(hazard, "public.erase_user(text,uuid)")], "{bad}");
    let fix = "ALTER FUNCTION public.erase_user(text,uuid) SET search_path = public, pg_temp";
    assert_eq!(bad.findings()[0].fix, fix);
    superuser.batch_execute(fix).await.unwrap();
    assert!(audit_schema(&database, "public").await.is_clean());

    // Where the service may create in the other one, that is what is mended.
    superuser.batch_execute("GRANT CREATE ON SCHEMA public TO lastprice_app").await.unwrap();
    let bad = audit_schema(&database, "pricing").await;
    assert!(found(&bad).contains(&(hazard, "public.erase_user(text,uuid)")), "{bad}");
    for finding in bad.findings() {
        assert_eq!(finding.fix, "REVOKE CREATE ON SCHEMA public FROM lastprice_app");
    }
    superuser.batch_execute(&bad.findings()[0].fix).await.unwrap();
    for schema in ["public", "pricing"] {
        assert!(audit_schema(&database, schema).await.is_clean());
    }
}
