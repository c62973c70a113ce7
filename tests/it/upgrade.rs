//! From the original's tables, filled through its own SQL, to ours: what is taken is as it was, what is not is said.

use chrono::NaiveDate;
use lastprice::secrecy::ExposeSecret;
use lastprice::{
    Admin, Client, Currency, ExperimentId, ExperimentStatus, SCHEMA_SQL, SecretKeys, TenantId, UserId,
    tokio_postgres,
};
use lastprice_testkit::TestDatabase;

use crate::support_repo::{own_key, ring, usd};
use crate::support_sql::*;

pub(crate) const ORIGINAL: &str = include_str!("original/schema.sql");
pub(crate) const DATA: &str = include_str!("original/data.sql");
pub(crate) const MOVE: &str = include_str!("../../upgrade/move-original.sql");
pub(crate) const COPY: &str = include_str!("../../upgrade/from-original.sql");

pub(crate) const ACME: &str = "aaaaaaaa-0000-4000-8000-000000000000";
pub(crate) const GLOBEX: &str = "bbbbbbbb-0000-4000-8000-000000000000";
const COMPANY: &str = "cccccccc-0000-4000-8000-000000000000";
pub(crate) const PRO: &str = "aaaaaaaa-0000-4000-8000-000000000001";
const AGAIN: &str = "aaaaaaaa-0000-4000-8000-000000000002";
pub(crate) const SEATS: &str = "bbbbbbbb-0000-4000-8000-000000000001";

/// The original's, in a database of its owner's; `None` without pgcrypto, which the original needs.
pub(crate) async fn original(data: &str) -> Option<(TestDatabase, tokio_postgres::Client)> {
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let superuser = database.connect_superuser().await.unwrap();
    if superuser.batch_execute("CREATE EXTENSION IF NOT EXISTS pgcrypto").await.is_err() {
        skipped("pgcrypto is not installed");
        return None;
    }
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute(ORIGINAL).await.unwrap();
    owner.batch_execute(data).await.unwrap();
    Some((database, owner))
}

/// All of it, in one transaction, as psql does it by -1.
pub(crate) async fn upgrade(database: &TestDatabase, owner: &tokio_postgres::Client) {
    try_upgrade(owner).await.unwrap();
    login(database).await;
}

/// The service's role is a member of the group, which the schema has just made, if nobody else had.
pub(crate) async fn login(database: &TestDatabase) {
    let superuser = database.connect_superuser().await.unwrap();
    superuser.batch_execute("GRANT lastprice_app TO lastprice_service").await.ok(); // or another test has just done it
}

pub(crate) async fn try_upgrade(owner: &tokio_postgres::Client) -> Result<(), tokio_postgres::Error> {
    owner.batch_execute("BEGIN; SET LOCAL lastprice.currency = 'USD'").await?;
    for file in [MOVE, SCHEMA_SQL, COPY] {
        if let Err(e) = owner.batch_execute(file).await {
            owner.batch_execute("ROLLBACK").await?;
            return Err(e);
        }
    }
    owner.batch_execute("COMMIT").await
}

/// Rows as lines, their columns parted by spaces.
pub(crate) async fn lines(owner: &tokio_postgres::Client, sql: &str) -> Vec<String> {
    let line = |row: &Vec<Option<String>>| row.iter().flatten().cloned().collect::<Vec<_>>().join(" ");
    rows(owner, sql).await.unwrap().iter().map(line).collect()
}

pub(crate) fn tenant(id: &str) -> TenantId {
    id.parse().unwrap()
}

pub(crate) fn experiment(id: &str) -> ExperimentId {
    id.parse().unwrap()
}

fn day(year: i32) -> NaiveDate {
    NaiveDate::from_ymd_opt(year, 1, 1).unwrap()
}

pub(crate) fn user(name: &str) -> UserId {
    UserId::new(name).unwrap()
}

/// Every row that the original has, in whichever schema.
async fn fingerprint(owner: &tokio_postgres::Client, schema: &str) -> Vec<String> {
    let tables =
        ["tenants", "experiments", "assignments", "views", "conversions", "usage", "recommendations"];
    let each = tables.map(|t| {
        format!("SELECT '{t}', count(*), md5(string_agg(x::text, '' ORDER BY x::text)) FROM {schema}.{t} x")
    });
    lines(owner, &each.join(" UNION ALL ")).await
}

#[tokio::test]
async fn what_the_original_collected_is_here_and_what_is_not_is_said() {
    let Some((database, owner)) = original(DATA).await else { return };
    let before = fingerprint(&owner, "public").await;
    upgrade(&database, &owner).await;
    assert_eq!(fingerprint(&owner, "original").await, before, "nothing of the original is lost or changed");
    let said = "SELECT rtrim(left(of, 2) || right(of, 2)), what, original, lastprice, why FROM original.reconciliation
                WHERE original <> 0 OR lastprice <> 0 ORDER BY of COLLATE \"C\", what COLLATE \"C\"";
    assert_eq!(
        lines(&owner, said).await,
        [
            " experiments 5 4 -1: a variant has no price that can be read",
            " tenants 3 3",
            "?? recommendations 1 0 -1: it is of no experiment that was taken",
            "aa00 usage 117 120 3: its amount is no whole number from 0 to 10^12",
            "aa01 assignments 305 302 -1: its time is none; -1: its user has an earlier one in the experiment; \
                 -2: its user id is empty or has more than 512 bytes; -1: its variant is none of its experiment, so it has no price; \
                 2: of the first view or conversion of a user without one",
            "aa01 conversions 8 6 -1: its revenue is negative: a refund; -1: its revenue is no number",
            "aa01 recommendations 1 1",
            "aa01 revenue in USD 103.5000004 103.500000 -0.0000004: its revenue has more than 6 decimals: rounded",
            "aa01 views 503 502 -1: its user id is empty or has more than 512 bytes",
            "aa02 assignments 0 1 1: of the first view or conversion of a user without one",
            "aa02 views 1 1",
            "aa03 assignments 1 0 -1: its experiment was not taken",
            "aa03 conversions 1 0 -1: its experiment was not taken",
            "aa03 revenue in USD 8 0 -8: its experiment was not taken",
            "aa03 views 1 0 -1: its experiment was not taken",
            "bb00 usage 7 7",
            "bb01 assignments 2 2",
            "bb01 conversions 2 1 -1: its revenue has more than 12 digits",
            "bb01 revenue in USD 10000000000007 7 -10000000000000: its revenue has more than 12 digits",
            "bb01 views 1 1",
            "ff01 conversions 1 0 -1: there is no such experiment",
            "ff01 revenue in USD 8 0 -8: there is no such experiment",
            "ff01 views 1 0 -1: there is no such experiment",
        ]
    );
    let log = "SELECT left(key, 2) || right(key, 2), fate, reason FROM original.upgrade_log WHERE source IN ('tenants', 'experiments') ORDER BY 1, 3";
    assert_eq!(
        lines(&owner, log).await,
        [
            "aa00 changed its plan is none of free, starter, pro and enterprise: free",
            "aa02 changed a price has more than 6 decimals: rounded",
            "aa02 changed it ends before it starts: without an end",
            "aa02 changed its status running is paused",
            "aa02 changed its weights cannot be read: all are 1",
            "aa03 rejected a variant has no price that can be read",
        ]
    );
    assert_exact(&database.connect_superuser().await.unwrap(), "after the upgrade").await;

    // The crate's own numbers are those of the reconciliation; and of the row at once, since it is refreshed.
    let client = Client::builder().url(database.app_url()).require_app_role().keys(ring()).build().unwrap();
    let (acme, globex) = (client.tenant(tenant(ACME)), client.tenant(tenant(GLOBEX)));
    let counts = acme.metrics().experiment(experiment(PRO)).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions, counts.refunds), (302, 502, 6, 1));
    assert_eq!(counts.revenue(Currency::USD), usd("103.5"));
    let counts = globex.metrics().experiment(experiment(SEATS)).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions), (2, 1, 1));
    assert_eq!(counts.revenue(Currency::USD), usd("7"));
    // What is metered by itself is what was imported, and not what the original had counted of it on top.
    let (first, last) = (day(2000), day(2100));
    for (tenant, metered) in [(&acme, 303 + 6), (&globex, 2 + 1)] {
        assert_eq!(tenant.usage().total("signals", first, last).await.unwrap(), metered);
    }
    assert_eq!(globex.usage().total("original.signals", first, last).await.unwrap(), 7);
    let shown = acme.metrics().refreshed(10, None).await.unwrap().items;
    assert_eq!(shown.iter().map(|row| row.views).sum::<u64>(), 503);

    // Each sees its own, and only that; and the database is as isolated as any.
    assert_eq!(acme.experiments().list(None, 10, None).await.unwrap().items.len(), 2);
    assert_eq!(globex.experiments().list(None, 10, None).await.unwrap().items.len(), 2);
    assert!(globex.experiments().get(experiment(PRO)).await.unwrap().is_none());
    assert!(globex.conversions().list_by_user(&user("user-3"), 10, None).await.unwrap().items.is_empty());
    let report = client.verify_isolation().await.unwrap();
    assert!(report.findings().is_empty(), "{report:?}");
    let app = database.connect_app().await.unwrap();
    assert!(
        refusal(rows(&app, "SELECT FROM original.tenants").await).2.contains("permission denied for schema")
    );

    // The experiments, by what the events call their variants.
    let pro = acme.experiments().get(experiment(PRO)).await.unwrap().unwrap();
    assert_eq!(
        (pro.key.as_str(), pro.status, pro.baseline.as_str()),
        ("pro-plan-price", ExperimentStatus::Active, "control")
    );
    let arms: Vec<_> =
        pro.variants.iter().map(|v| (v.name.as_str(), v.weight, v.price.to_string())).collect();
    assert_eq!(arms, [("control", 334, "19".to_owned()), ("high", 666, "29.50".to_owned())]);
    assert_eq!(pro.metadata["original"]["description"], "what shall it cost");
    let again = acme.experiments().get(experiment(AGAIN)).await.unwrap().unwrap();
    assert_eq!((again.key.len(), again.status), ("x-pro-plan-price-".len() + 36, ExperimentStatus::Paused));

    // Who had a price has it; by the hash some would have the other one. Who is new gets one by the hash.
    for n in [1, 2, 3, 300] {
        let outcome = acme.assignments().assign(pro.id, &user(&format!("user-{n}"))).await.unwrap();
        let price = if n % 3 == 0 { "19 USD" } else { "29.50 USD" };
        assert_eq!((outcome.is_new(), outcome.price().to_string()), (false, price.to_owned()), "user-{n}");
        assert_eq!(outcome.quote().unwrap().reason.as_str(), "imported");
    }
    let saw = acme.assignments().get(pro.id, &user("user-unassigned")).await.unwrap().unwrap();
    assert_eq!((saw.variant.as_str(), saw.price.to_string()), ("control", "19 USD".to_owned()));
    assert!(acme.assignments().assign(pro.id, &user("somebody new")).await.unwrap().is_new());
    let bought = acme.conversions().list_by_user(&user("user-1"), 10, None).await.unwrap().items;
    let keys: Vec<_> = bought.iter().map(|c| c.idempotency_key.as_str().to_owned()).collect();
    let first = "original:aaaaaaaa-0000-4000-8000-0000000000c1";
    assert!(
        keys.len() == 2 && keys.iter().any(|key| key == first),
        "one webhook twice, or two sales: {keys:?}"
    );

    // The trail says where all that is from.
    let trail = acme.audit_trail().of_experiment(pro.id, 10, None).await.unwrap().items;
    let who: Vec<_> =
        trail.iter().map(|e| (e.actor.as_deref(), e.role.as_str(), e.action.as_str())).collect();
    assert_eq!(
        who,
        [(Some("upgrade/from-original.sql"), "lastprice_owner", "created"); 2],
        "and its recommendation"
    );

    // A second time, it refuses.
    let (_, _, message) =
        refusal(owner.batch_execute(&format!("SET lastprice.currency = 'USD'; {COPY}")).await);
    assert!(message.contains("this was done before"), "{message}");
}

#[tokio::test]
async fn the_secrets_are_encrypted_afterwards() {
    let Some((database, owner)) = original(DATA).await else { return };
    upgrade(&database, &owner).await;
    let keys = SecretKeys::from(ring()).legacy_passphrase("encryption_passphrase");
    let admin = Admin::connect(&database.owner_url()).await.unwrap();
    let report = admin.rewrap_secrets(&keys, |_| ()).await.unwrap();
    assert_eq!((report.total.tenants, report.total.rewrapped, report.total.failed), (3, 3, 0));

    // Without the passphrase.
    let client = Client::builder()
        .url(database.app_url())
        .require_app_role()
        .keys(ring())
        .paid_api_key("ours")
        .build()
        .unwrap();
    assert_eq!(own_key(&client.tenant(tenant(GLOBEX))).await.as_deref(), Some("pk_of_globex"));
    assert_eq!(own_key(&client.tenant(tenant(COMPANY))).await.as_deref(), Some("actual_api_key"));
    let webhooks = client.tenant(tenant(ACME)).tenants().webhook_secrets().await.unwrap();
    assert_eq!(webhooks.iter().map(|s| s.expose_secret()).collect::<Vec<_>>(), ["whsec_of_acme"]);
    let stored =
        "SELECT count(*) FROM public.tenants WHERE paid_api_key !~ '^lp1:' OR webhook_secret !~ '^lp1:'
                  OR metadata::text ~ 'pk_of|actual|whsec'";
    assert_eq!(lines(&owner, stored).await, ["0"]);
    let told = "SELECT count(*) FROM original.upgrade_log l WHERE l::text ~ 'pk_of|actual|whsec'";
    assert_eq!(lines(&owner, told).await, ["0"]);
}

/// Other columns, other types, no ids, and what does not have to be there is not.
#[tokio::test]
async fn what_the_description_does_not_name_may_be_otherwise() {
    let id = "aaaaaaaa-0000-4000-8000-000000000001";
    let data = format!(
        "DROP TABLE recommendations;
         DROP MATERIALIZED VIEW experiment_metrics;
         DROP FUNCTION refresh_experiment_metrics();
         ALTER TABLE experiments FORCE ROW LEVEL SECURITY;
         ALTER TABLE experiments ADD currency text, ADD metadata jsonb;
         ALTER TABLE assignments DROP id;
         ALTER TABLE views DROP id, DROP variant, DROP created_at, ADD metadata jsonb;
         ALTER TABLE conversions ALTER revenue TYPE float8, ADD order_id text, ADD converted_at timestamp, ADD currency text;
         DROP TABLE usage;
         CREATE TABLE usage (tenant_id uuid, date date, api_calls int, signals int);
         INSERT INTO tenants (id, name, email) VALUES ('{ACME}', 'Acme', 'ops@acme.example'), ('{GLOBEX}', 'Globex', 'it@globex.example');
         SET row_security = on;
         ALTER TABLE experiments NO FORCE ROW LEVEL SECURITY;
         INSERT INTO experiments (id, tenant_id, name, status, variants, currency, metadata) VALUES
           ('{id}', '{ACME}', '  ', 'live', '{{\"plus\": 9.99, \"basic\": 4.99}}', 'eur', '{{\"a\": 1}}');
         ALTER TABLE experiments FORCE ROW LEVEL SECURITY;
         INSERT INTO assignments VALUES ('{id}', 'ann', 'plus', '2025-01-01Z'), ('{id}', 'ben', 'basic', '2025-01-01Z');
         INSERT INTO views (experiment_id, user_id, metadata, user_agent) VALUES ('{id}', 'ann', '{{\"page\": 1}}', 'M'), ('{id}', 'zoe', NULL, NULL);
         INSERT INTO conversions (experiment_id, user_id, variant, revenue, order_id, converted_at, currency) VALUES
           ('{id}', 'ann', 'plus', 9.99, 'o-1', '2025-01-02', NULL), ('{id}', 'ann', 'plus', 9.99, 'o-1', '2025-01-03', NULL),
           ('{id}', 'ann', 'plus', -4, 'o-1', '2025-01-04', NULL), ('{id}', 'ann', 'plus', -4, 'o-1', '2025-01-04', NULL), ('{id}', 'ben', 'basic', -1, 'o-of-old', '2025-01-04', NULL),
           ('{id}', 'ben', 'basic', 4.99, NULL, '2025-01-05', 'USD'), ('{id}', 'ben', 'basic', 'Infinity', NULL, '2025-01-05', NULL);
         INSERT INTO usage VALUES ('{ACME}', '2025-01-01', 5, 6), ('{GLOBEX}', '2025-01-01', 7, 0)"
    );
    let Some((database, owner)) = original(&data).await else { return };
    owner.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    upgrade(&database, &owner).await;
    let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
    let acme = client.tenant(tenant(ACME));
    let [live] = acme.experiments().list(None, 10, None).await.unwrap().items.try_into().unwrap();
    assert_eq!(
        (live.key.as_str(), live.name.as_str()),
        (format!("x-{id}").as_str(), format!("x-{id}").as_str())
    );
    assert_eq!(
        (live.status, live.currency),
        (ExperimentStatus::Paused, Currency::EUR),
        "weights that nobody knows give nobody a price"
    );
    assert_eq!(live.metadata["a"], 1);
    assert!(live.variants.iter().all(|v| v.weight == 1));
    let counts = acme.metrics().experiment(live.id).await.unwrap();
    assert_eq!((counts.assignments, counts.views, counts.conversions, counts.refunds), (2, 1, 2, 3));
    assert_eq!(counts.revenue(Currency::EUR).to_string(), "0.99 EUR");
    assert_eq!(counts.revenue(Currency::USD), usd("4.99"));
    let ledger = "SELECT kind, revenue, order_id, sale_id IS NOT NULL, flags, occurred_at FROM conversions ORDER BY occurred_at, revenue";
    assert_eq!(
        lines(&owner, ledger).await,
        [
            "sale 9.99 o-1 f {} 2025-01-02 00:00:00+00",
            "refund -4 o-1 t {} 2025-01-04 00:00:00+00",
            "refund -4 o-1 t {} 2025-01-04 00:00:00+00",
            "refund -1 f {} 2025-01-04 00:00:00+00",
            "sale 4.99 f {} 2025-01-05 00:00:00+00"
        ]
    );
    assert_eq!(
        lines(&owner, "SELECT variant, metadata FROM views").await,
        [r#"plus {"page": 1, "original": {"user_agent": "M"}}"#]
    );
    assert_eq!(
        lines(&owner, "SELECT left(tenant_id::text, 1), metric, value FROM usage ORDER BY 1, 2").await,
        ["a api_calls 5", "a original.signals 6", "b api_calls 7", "b original.signals 0"]
    );
    // Two assignments and two sales are metered, and the original's own count of them is not on top of that.
    let (first, last) = (day(2000), day(2100));
    assert_eq!(acme.usage().total("signals", first, last).await.unwrap(), 4);
    assert_eq!(acme.usage().total("original.signals", first, last).await.unwrap(), 6);
    assert_eq!(client.tenant(tenant(GLOBEX)).usage().total("signals", first, last).await.unwrap(), 0);
    let log = "SELECT left(of, 1), fate, reason, amount FROM original.upgrade_log WHERE source = 'usage' ORDER BY 1";
    assert_eq!(
        lines(&owner, log).await,
        [
            "a changed its metric is metered by itself: it is original.signals 6",
            "b changed its metric is metered by itself: it is original.signals 0"
        ]
    );
    let why = "SELECT what, why FROM original.reconciliation WHERE why IS NOT NULL ORDER BY what, why";
    assert_eq!(
        lines(&owner, why).await,
        [
            "conversions -1: its order and amount are those of an earlier one; -3: its revenue is negative: a refund; -1: its revenue is no number",
            "revenue in EUR -9.99: its order and amount are those of an earlier one",
            "views -1: it names no variant, and its user has none"
        ]
    );
    assert_exact(&database.connect_superuser().await.unwrap(), "after the upgrade").await;
}

#[tokio::test]
async fn whatever_is_in_the_way_stops_it_and_nothing_has_changed() {
    let Some((database, owner)) = original(DATA).await else { return };
    let before = fingerprint(&owner, "public").await;
    let stops = async |first: &str, files: &[&str], words: &str| {
        owner.batch_execute(&format!("BEGIN; {first}")).await.unwrap();
        let mut message = None;
        for file in files {
            if let Err(e) = owner.batch_execute(file).await {
                message = Some(e.as_db_error().unwrap().message().to_owned());
                break;
            }
        }
        owner.batch_execute("ROLLBACK").await.unwrap();
        let message = message.unwrap_or_else(|| panic!("it went on: {words}"));
        assert!(message.contains(words), "{message}");
        assert_eq!(fingerprint(&owner, "public").await, before);
    };
    let all = [MOVE, SCHEMA_SQL, COPY];
    let usd = "SET LOCAL lastprice.currency = 'USD'";
    for setting in [
        "SET LOCAL lastprice.currency = 'usd'",
        "SET LOCAL lastprice.currency = 'XXX'",
        "SET LOCAL lastprice.currency = ''",
    ] {
        stops(setting, &all, "lastprice.currency does not name a currency").await;
    }
    stops(usd, &[SCHEMA_SQL], "tables of another origin").await;
    stops(usd, &[COPY], "the schema original does not hold").await;
    stops(usd, &[MOVE, COPY], "does not hold version 1 of lastprice").await;
    stops(usd, &[MOVE, MOVE], "does not hold the original's tables").await;
    stops(usd, &[MOVE, SCHEMA_SQL, MOVE], "holds lastprice already").await;
    stops(
        "CREATE SCHEMA original; CREATE TABLE original.views (n int)",
        &all,
        "the schema original has tables by these names already: views",
    )
    .await;
    stops("ALTER TABLE experiments DROP variants", &all, "there is no experiments.variants").await;
    stops("SET LOCAL search_path = nowhere", &all, "does not begin with the schema").await;
    let email = |email: &str| format!("{usd}; INSERT INTO tenants (name, email) VALUES ('Other', '{email}')");
    stops(&email("OPS@acme.example"), &all, "an e-mail address that another one has").await;
    stops(&email("nobody"), &all, "no e-mail address").await;

    // Were a row to get lost on its way, nothing would be copied.
    let loses = "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
                 CREATE TRIGGER lose BEFORE INSERT ON views FOR EACH ROW WHEN (NEW.user_id = 'user-7') EXECUTE FUNCTION lose()";
    stops(
        usd,
        &[MOVE, SCHEMA_SQL, loses, COPY],
        "the numbers of both sides do not agree, so nothing is copied: views of aaaaaaaa",
    )
    .await;
    upgrade(&database, &owner).await;
}
