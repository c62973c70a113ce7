//! Two tenants in one database: the one that a test works on, and a bystander with data of its own, who must neither
//! see anything of it nor be changed by it.

use std::fmt::Debug;

use lastprice::secrecy::ExposeSecret;
use lastprice::{
    AssignOutcome, Client, Currency, Error, ErrorKind, Experiment, ExperimentId, IdempotencyKey, KeyRing,
    Money, NewConversion, NewExperiment, NewRecommendation, NewTenant, NewUsage, NewView, Objective,
    PaidCredentials, Plan, Result, TenantHandle, TenantId, UserId, Variants, chrono,
};
use lastprice_testkit::TestDatabase;

/// Views as partitions by month.
pub(crate) const PARTITION_VIEWS: &str = include_str!("../../partition-views.sql");

pub(crate) struct TwoTenants {
    pub(crate) database: TestDatabase,
    pub(crate) client: Client,
    /// Acme: the tenant under test. Empty at first.
    pub(crate) id: TenantId,
    pub(crate) acme: TenantHandle,
    /// Globex: the bystander.
    pub(crate) other_id: TenantId,
    pub(crate) globex: TenantHandle,
    pub(crate) owner: lastprice::tokio_postgres::Client,
    others: ExperimentId,
    before: String,
}

pub(crate) async fn two_tenants() -> TwoTenants {
    two_tenants_in(TestDatabase::new().await.unwrap()).await
}

/// The key of all secrets of a test.
pub(crate) fn ring() -> KeyRing {
    KeyRing::new("test", [7; 32]).unwrap()
}

/// A tenant's own key; `None` if it uses the platform's.
pub(crate) async fn own_key(tenant: &TenantHandle) -> Option<String> {
    match tenant.tenants().paid_credentials().await.unwrap() {
        PaidCredentials::Byok(key) => Some(key.expose_secret().to_owned()),
        PaidCredentials::Managed(_) => None,
    }
}

/// In a database that holds nobody yet.
pub(crate) async fn two_tenants_in(database: TestDatabase) -> TwoTenants {
    // Every test that has two tenants can be run so.
    if std::env::var_os("TEST_PARTITIONED_VIEWS").is_some() {
        database.connect_owner().await.unwrap().batch_execute(PARTITION_VIEWS).await.unwrap();
    }
    let builder = Client::builder().url(database.app_url()).pool_size(16).require_app_role();
    let client = builder.keys(ring()).paid_api_key("the platform's key").build().unwrap();
    let id = client
        .create_tenant(NewTenant::managed("Acme", "ops@acme.example").plan(Plan::Enterprise))
        .await
        .unwrap()
        .id;
    let byok = NewTenant::byok("Globex", "it@globex.example", "globex's key").plan(Plan::Enterprise);
    let other_id = client.create_tenant(byok).await.unwrap().id;
    let globex = client.tenant(other_id);
    // Everything that the tests use for Acme is taken at Globex: keys, users, orders, metrics.
    let others = active(&globex, "pro-plan").await.id;
    assign(&globex, others, 0..20).await;
    globex.views().record(&NewView::new(others, user(0))).await.unwrap();
    let sale = NewConversion::sale(others, user(0), usd("1234.50"), key("charge:0"))
        .order(lastprice::OrderId::new("order-0").unwrap());
    globex.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
    globex.usage().add(&NewUsage::new("api_calls", today(), 7, key("charge:0"))).await.unwrap();
    let recommended = NewRecommendation::new(others, usd("29"), 0.5, Objective::Revenue);
    globex.recommendations().store(&recommended).await.unwrap();

    let owner = database.connect_owner().await.unwrap();
    let before = fingerprint(&owner, other_id).await;
    let acme = client.tenant(id);
    TwoTenants { database, client, id, acme, other_id, globex, owner, others, before }
}

impl TwoTenants {
    /// Another client, whose assigners poll at this interval.
    pub(crate) fn client_that_polls(&self, interval: std::time::Duration) -> Client {
        let builder = Client::builder().url(self.database.app_url()).require_app_role();
        builder.poll_interval(interval).build().unwrap()
    }

    /// One session waits for a lock, which the test holds.
    pub(crate) async fn one_waits(&self) {
        let server = self.database.connect_superuser().await.unwrap();
        eventually("it waits", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
            server.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
    }

    /// Globex is as it was to the last byte, and sees what is its own only.
    pub(crate) async fn bystander_saw_nothing(&self) {
        assert_eq!(fingerprint(&self.owner, self.other_id).await, self.before, "the bystander was changed");
        let page = self.globex.experiments().list(None, 1000, None).await.unwrap();
        assert_eq!(page.items.iter().map(|e| e.id).collect::<Vec<_>>(), [self.others]);
        for n in 0..3 {
            let quotes = self.globex.assignments().list_by_user(&user(n), 1000, None).await.unwrap();
            assert!(quotes.items.iter().all(|a| a.experiment_id == self.others));
            let sales = self.globex.conversions().list_by_user(&user(n), 1000, None).await.unwrap();
            assert!(sales.items.iter().all(|c| c.experiment_id == self.others));
        }
        // Nor without our statements' `tenant_id = $1`: row-level security alone suffices.
        let app = self.database.connect_app().await.unwrap();
        let tables =
            ["experiments", "assignments", "views", "conversions", "usage", "recommendations", "audit_trail"];
        let tables =
            tables.into_iter().chain(["metric_totals", "metric_deltas", "tenant_experiment_metrics"]);
        let count =
            |column| move |t: &str| format!("SELECT count(*) FROM {t} WHERE {column} IS DISTINCT FROM $1");
        let mut queries: Vec<String> = tables.map(count("tenant_id")).collect();
        queries.push(count("id")("tenants"));
        let nobody = TenantId::new();
        for bound in [Some(self.other_id), None] {
            let set = bound.map_or(String::new(), |id| format!("; SET LOCAL app.tenant_id = '{id}'"));
            app.batch_execute(&format!("BEGIN{set}")).await.unwrap();
            let mine = bound.unwrap_or(nobody).uuid();
            for sql in &queries {
                assert_eq!(
                    app.query_one(sql, &[&mine]).await.unwrap().get::<_, i64>(0),
                    0,
                    "{bound:?}: {sql}"
                );
            }
            app.batch_execute("ROLLBACK").await.unwrap();
        }
        let metrics = self.globex.metrics().experiment(self.others).await.unwrap();
        assert_eq!((metrics.assignments, metrics.views, metrics.conversions), (20, 1, 1));
        assert_eq!(metrics.revenue(Currency::USD), usd("1234.50"));
    }

    /// The rows that a table holds for Acme, whoever may see them.
    pub(crate) async fn count(&self, table: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {table} WHERE tenant_id = $1");
        self.owner.query_one(&sql, &[&self.id.uuid()]).await.unwrap().get(0)
    }
}

/// All that is stored for a tenant. Deltas and totals are added up: a fold moves them, and changes nothing.
async fn fingerprint(owner: &lastprice::tokio_postgres::Client, tenant: TenantId) -> String {
    let mut all = String::new();
    // Whether a report is added to a total already is no part of it.
    let usage = "(SELECT tenant_id, metric, day, value, idempotency_key, created_at FROM usage)";
    for table in [
        "tenants",
        "experiments",
        "assignments",
        "views",
        "conversions",
        usage,
        "recommendations",
        "audit_trail",
        "identities",
        "erasures",
    ] {
        let column = if table == "tenants" { "id" } else { "tenant_id" };
        let sql = format!(
            "SELECT COALESCE(string_agg(x::text, E'\\n' ORDER BY x::text), '') FROM {table} x WHERE {column} = $1"
        );
        all += &owner.query_one(&sql, &[&tenant.uuid()]).await.unwrap().get::<_, String>(0);
        all += "\n--\n";
    }
    let sql = "SELECT COALESCE(string_agg(x::text, E'\\n' ORDER BY x::text), '') FROM (
                 SELECT experiment_id, phase, variant, reason, currency, day, sum(assignments), sum(views),
                        sum(conversions), sum(renewals), sum(refunds), sum(revenue)
                 FROM (SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views,
                              conversions, renewals, refunds, revenue FROM metric_totals
                       UNION ALL
                       SELECT tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views,
                              conversions, renewals, refunds, revenue FROM metric_deltas) m
                 WHERE tenant_id = $1 GROUP BY 1, 2, 3, 4, 5, 6) x";
    all + &owner.query_one(sql, &[&tenant.uuid()]).await.unwrap().get::<_, String>(0)
}

/// 19, 29, 39, the middle one twice as often.
pub(crate) fn three() -> Variants {
    Variants::new().add("19", 1, "19.00").add("29", 2, "29.00").add("39", 1, "39.00")
}

pub(crate) fn new_experiment(key: &str) -> NewExperiment {
    NewExperiment::new(key, format!("Experiment {key}"), Currency::USD, three()).baseline("29")
}

pub(crate) async fn draft(tenant: &TenantHandle, key: &str) -> Experiment {
    tenant.experiments().create(new_experiment(key)).await.unwrap()
}

pub(crate) async fn active(tenant: &TenantHandle, key: &str) -> Experiment {
    let draft = draft(tenant, key).await;
    tenant.experiments().activate(draft.id).await.unwrap()
}

pub(crate) fn user(n: usize) -> UserId {
    UserId::new(format!("user-{n}")).unwrap()
}

pub(crate) fn users(numbers: std::ops::Range<usize>) -> Vec<UserId> {
    numbers.map(user).collect()
}

pub(crate) async fn assign(
    tenant: &TenantHandle,
    experiment: ExperimentId,
    numbers: std::ops::Range<usize>,
) -> Vec<AssignOutcome> {
    tenant.assignments().assign_many(experiment, &users(numbers)).await.unwrap()
}

pub(crate) fn key(text: &str) -> IdempotencyKey {
    IdempotencyKey::new(text).unwrap()
}

pub(crate) fn usd(amount: &str) -> Money {
    Money::new(amount, "USD").unwrap()
}

pub(crate) fn sale(experiment: ExperimentId, n: usize, amount: &str) -> NewConversion {
    NewConversion::sale(experiment, user(n), usd(amount), key(&format!("charge:{n}")))
}

pub(crate) fn today() -> chrono::NaiveDate {
    chrono::Utc::now().date_naive()
}

/// Whatever is wrong with an input is named by its field.
#[track_caller]
pub(crate) fn refused<T: Debug>(result: Result<T>, field: &str) -> Error {
    let error = result.expect_err(field);
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some(field)), "{error:?}");
    error
}

#[track_caller]
pub(crate) fn is_kind<T: Debug>(result: Result<T>, kind: ErrorKind) -> Error {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error:?}");
    error
}

pub(crate) fn percent(n: u32) -> lastprice::bucketing::Share {
    lastprice::bucketing::Share::percent(n).unwrap()
}

/// Half a minute is long enough on any machine.
pub(crate) async fn eventually(what: &str, is_so: impl AsyncFnMut() -> bool) {
    assert!(soon(std::time::Duration::from_secs(30), is_so).await, "it did not come to be: {what}");
}

/// Whether it comes to be in time.
pub(crate) async fn soon(limit: std::time::Duration, mut is_so: impl AsyncFnMut() -> bool) -> bool {
    let deadline = std::time::Instant::now() + limit;
    while !is_so().await {
        if std::time::Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    true
}
