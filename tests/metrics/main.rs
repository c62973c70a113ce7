//! What an exporter is told, with the feature `metrics`. A binary of its own, so that the big one need not be built twice.

#[path = "../it/support_docs.rs"]
#[allow(dead_code)]
mod support_docs;
#[path = "../it/support_sql.rs"]
#[allow(dead_code)]
mod support_sql;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lastprice::{
    Admin, Client, Currency, ExperimentId, NewAssignment, NewExperiment, NewTenant, NewUsage, NewView,
    RefresherOptions, TenantHandle, UserId, Variants,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use metrics::{
    Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit,
};
use support_docs::{names, table};

const LONG: Duration = Duration::from_secs(60);

/// Keeps everything, for the thread on which it is the default.
#[derive(Default)]
struct Exporter {
    /// Kind and labels' names of what was told, by name.
    told: Mutex<BTreeMap<String, (&'static str, BTreeSet<String>)>>,
    /// Kind and unit.
    described: Mutex<BTreeMap<String, (&'static str, &'static str)>>,
    cells: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
}

/// Counts what is recorded.
struct Count(Arc<AtomicU64>);

impl HistogramFn for Count {
    fn record(&self, value: f64) {
        assert!(value.is_finite() && value >= 0.0);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Exporter {
    fn cell(&self, key: &Key, kind: &'static str) -> Arc<AtomicU64> {
        let labels = key.labels().map(|label| label.key().to_owned());
        let mut told = self.told.lock().unwrap();
        let (was, known) = told.entry(key.name().to_owned()).or_insert((kind, BTreeSet::new()));
        assert_eq!(*was, kind);
        known.extend(labels);
        let values: Vec<&str> = key.labels().map(Label::value).collect();
        let cell = [&[key.name()], values.as_slice()].concat().join(" ");
        Arc::clone(self.cells.lock().unwrap().entry(cell).or_default())
    }

    fn describe(&self, name: KeyName, kind: &'static str, unit: Option<Unit>, text: SharedString) {
        assert!(!text.is_empty());
        let unit = unit.unwrap().as_str();
        self.described.lock().unwrap().insert(name.as_str().to_owned(), (kind, unit));
    }

    fn bits(&self, cell: &str) -> u64 {
        self.cells.lock().unwrap().get(cell).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }

    /// A gauge holds the bits of its number.
    fn gauge(&self, name: &str) -> f64 {
        f64::from_bits(self.bits(&format!("lastprice_{name}")))
    }

    fn pool(&self) -> [f64; 4] {
        self.pool_of("primary")
    }

    fn pool_of(&self, server: &str) -> [f64; 4] {
        ["max", "size", "available", "waiting"].map(|of| self.gauge(&format!("pool_{of} {server}")))
    }
}

impl Recorder for Exporter {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe(name, "counter", unit, text);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe(name, "gauge", unit, text);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe(name, "histogram", unit, text);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.cell(key, "counter"))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.cell(key, "gauge"))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Count(self.cell(key, "histogram"))))
    }
}

async fn tenant(client: &Client, name: &str) -> TenantHandle {
    let new = NewTenant::managed(name, format!("{name}@example.com"));
    client.tenant(client.create_tenant(new).await.unwrap().id)
}

fn user(n: usize) -> UserId {
    UserId::new(format!("user-{n}")).unwrap()
}

fn usage(n: usize) -> NewUsage {
    let key = lastprice::IdempotencyKey::new(format!("use:{n}")).unwrap();
    NewUsage::new("api_calls", lastprice::chrono::Utc::now().date_naive(), 1, key)
}

async fn until(mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.expect("it did not come to be");
}

/// What came of reads that a replica might have answered.
async fn work_with_a_replica(exporter: &Exporter) {
    let primary = PrivateCluster::builder().start().await.unwrap();
    let database = primary.database().await.unwrap();
    let standby = primary.standby().await.unwrap();
    let builder = Client::builder().url(database.app_url()).require_app_role();
    let replica = standby.url_for("lastprice_service", database.name());
    let client = builder.replica(replica).max_staleness(LONG).pool_size(2).build().unwrap();
    let acme = tenant(&client, "acme").await;
    let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00");
    let new = NewExperiment::new("x", "X", Currency::USD, variants);
    let id = acme.experiments().create(new).await.unwrap().id;
    let reads = |outcome: &str| exporter.bits(&format!("lastprice_replica_reads_total {outcome}"));
    let status = || client.replica_status().unwrap();
    let deadline = std::time::Instant::now() + LONG;
    while status().answered == 0 {
        acme.metrics().by_variant(id).await.unwrap();
        assert!(std::time::Instant::now() < deadline);
    }
    acme.metrics().by_variant(ExperimentId::new()).await.unwrap_err();
    assert!(status().stale > 0 && status().empty > 0);
    assert_eq!(exporter.pool_of("replica"), [2.0, 1.0, 1.0, 0.0]);
    assert!((0.0..60.0).contains(&exporter.gauge("replica_staleness_seconds")));
    standby.kill().await.unwrap();
    acme.metrics().by_variant(id).await.unwrap();
    assert!(status().failed > 0);
    let told = ["answered", "empty", "stale", "failed"].map(reads);
    assert_eq!(told, [status().answered, status().empty, status().stale, status().failed]);
    client.close().await;
    drop((client, acme));
    assert_eq!(exporter.pool_of("replica"), [0.0; 4]);
}

#[tokio::test]
async fn the_documented_metrics_are_all_there_are() {
    let exporter = Exporter::default();
    let _here = metrics::set_default_local_recorder(&exporter);
    work_with_a_replica(&exporter).await;
    until(|| exporter.pool() == [0.0; 4]).await;
    let database = TestDatabase::new().await.unwrap();
    let client = Client::builder().url(database.app_url()).require_app_role().pool_size(1).build().unwrap();
    let (acme, globex) = (tenant(&client, "acme").await, tenant(&client, "globex").await);
    let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00");
    let new = NewExperiment::new("x", "X", Currency::USD, variants);
    let id = acme.experiments().create(new).await.unwrap().id;
    acme.experiments().activate(id).await.unwrap();
    let assigner = client.assigner(acme.tenant_id()).await.unwrap();
    until(|| assigner.status().is_listening).await;
    assert_eq!(exporter.gauge("assigner_listening"), 1.0);
    assert!(exporter.bits("lastprice_assigner_reloads_total ok") > 0);

    let recorder = client.recorder();
    for n in 0..3 {
        assert!(recorder.track(acme.tenant_id(), NewAssignment::new(id, user(n))).await.unwrap().is_stored());
        assert!(recorder.track(globex.tenant_id(), usage(n)).await.unwrap().is_stored());
    }
    let stats = recorder.shutdown(LONG).await.stats;
    let recorded = |name: &str| exporter.bits(&format!("lastprice_recorder_{name}_total"));
    assert_eq!((recorded("accepted"), recorded("written")), (stats.accepted, stats.written));
    assert_eq!((stats.written, exporter.gauge("recorder_pending_events")), (6, 0.0));

    let every = RefresherOptions::new().every(Duration::from_millis(100));
    let refresher = Admin::connect(&database.owner_url()).await.unwrap().refresher_with(every).unwrap();
    until(|| refresher.status().refreshed > 0).await;
    refresher.shutdown(LONG).await;
    assert!(exporter.bits("lastprice_refresher_turns_total refreshed") > 0);

    // A statement, and one that is sent again after its table has changed.
    let seconds = |operation: &str| exporter.bits(&format!("lastprice_statement_seconds {operation}"));
    acme.tenants().get().await.unwrap().unwrap();
    let owner = database.connect_owner().await.unwrap();
    owner.batch_execute("ALTER TABLE tenants ALTER COLUMN name TYPE varchar(300)").await.unwrap();
    let before = seconds("tenants.get");
    acme.tenants().get().await.unwrap().unwrap();
    assert_eq!(seconds("tenants.get"), before + 1);
    assert_eq!(exporter.bits("lastprice_statement_retries_total tenants.get"), 1);

    // The only connection is in use, and somebody waits for it, and gives up.
    drop(assigner);
    until(|| exporter.pool() == [1.0, 1.0, 1.0, 0.0]).await;
    let holder = acme.begin().await.unwrap();
    assert_eq!(exporter.pool(), [1.0, 1.0, 0.0, 0.0]);
    let views = acme.views();
    let view = NewView::new(id, user(0));
    {
        let mut waiting = std::pin::pin!(views.record(&view));
        tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.unwrap_err();
        assert_eq!(exporter.pool(), [1.0, 1.0, 0.0, 1.0]);
    }
    assert_eq!(exporter.bits("lastprice_statement_errors_total views.record dropped"), 1);
    drop(holder);
    assert_eq!(exporter.pool(), [1.0, 1.0, 1.0, 0.0]);
    owner.batch_execute("REVOKE INSERT ON usage FROM lastprice_app").await.unwrap();
    globex.usage().add(&usage(9)).await.unwrap_err();
    let refused = exporter.bits("lastprice_statement_errors_total usage.add isolation_not_enforced");
    assert_eq!(refused, 1);

    // Of two clients the gauges are the sum, and of a closed one nothing remains.
    let other = Client::builder().url(database.app_url()).require_app_role().pool_size(3).build().unwrap();
    other.ready().await.unwrap();
    assert_eq!(exporter.pool()[0], 4.0);
    other.close().await;
    assert_eq!(exporter.pool(), [1.0, 1.0, 1.0, 0.0]);
    client.close().await;
    drop((client, acme, globex));
    until(|| exporter.gauge("assigner_listening") == 0.0).await;
    assert_eq!(exporter.pool(), [0.0; 4]);

    let documented: BTreeMap<String, (String, String, Vec<String>)> = table("Metrics")
        .iter()
        .map(|row| (names(&row[0]).concat(), (row[1].clone(), row[2].clone(), names(&row[3]))))
        .collect();
    let described: BTreeMap<_, _> = exporter.described.lock().unwrap().clone();
    let kinds = |of: &BTreeMap<String, (String, String, Vec<String>)>| -> BTreeMap<String, (String, String)> {
        of.iter().map(|(name, (kind, unit, _))| (name.clone(), (kind.clone(), unit.clone()))).collect()
    };
    let described = described.into_iter().map(|(name, (kind, unit))| (name, (kind.into(), unit.into())));
    assert_eq!(described.collect::<BTreeMap<String, (String, String)>>(), kinds(&documented));
    let told: BTreeMap<String, (String, Vec<String>)> = exporter
        .told
        .lock()
        .unwrap()
        .iter()
        .map(|(name, (kind, labels))| (name.clone(), ((*kind).to_owned(), labels.iter().cloned().collect())))
        .collect();
    let expected = documented.into_iter().map(|(name, (kind, _, labels))| (name, (kind, labels)));
    assert_eq!(told, expected.collect());
}
