//! What a row costs on disk, as docs/scaling.md says it: that page is computed from what is measured here.

use std::fmt::Write as _;
use std::time::Instant;

use lastprice::tokio_postgres::Client as Sql;
use lastprice::uuid::Uuid;
use lastprice::{Event, NewConversion, NewView, OrderId, RecorderOptions, TenantHandle, UserId};
use lastprice_testkit::PrivateCluster;

use crate::support::Dice;
use crate::support_repo::*;
use crate::support_sql::skipped;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scaling.md");
const RESULTS: &str = include_str!("../../benches/RESULTS.md");

/// Enough that a page more or less is no matter.
const ROWS: usize = 6000;

/// Bytes of a row, in the table and in its indexes, and how many there were in a second.
struct Cost {
    what: &'static str,
    table: &'static str,
    heap: f64,
    indexes: f64,
    per_second: Option<f64>,
}

impl Cost {
    fn total(&self) -> f64 {
        self.heap + self.indexes
    }
}

/// With `LASTPRICE_SIZING=write`, as `scripts/sizing` has it, the page is written; else it has to say what is measured, within a fifth.
/// Times are written, and never asserted.
#[tokio::test]
async fn the_page_says_what_a_row_costs() {
    let costs = measure().await;
    let page = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = page.split_once("<!-- sizing -->\n").unwrap();
    let (said, after) = rest.split_once("<!-- /sizing -->").unwrap();
    if std::env::var("LASTPRICE_SIZING").is_ok_and(|how| how == "write") {
        let page = format!("{before}<!-- sizing -->\n{}<!-- /sizing -->{after}", tables(&costs));
        std::fs::write(DOCUMENT, page).unwrap();
        return;
    }
    // Another version may have smaller indexes.
    if !said.starts_with(&format!("PostgreSQL {},", major())) {
        skipped("the page was measured with another version of PostgreSQL");
        return;
    }
    for cost in &costs {
        let row = said.lines().find(|line| line.starts_with(&format!("| {} |", cost.what)));
        let row = row.unwrap_or_else(|| panic!("the page does not say what {} costs", cost.what));
        let columns: Vec<f64> = row.split('|').filter_map(|cell| cell.trim().parse().ok()).collect();
        for (column, measured) in
            [(columns[0], cost.heap), (columns[1], cost.indexes), (columns[2], cost.total())]
        {
            // How full the pages of an index are depends on which of two connections comes first: 113 to 134 bytes of a view.
            let is_right = (column - measured).abs() <= measured.mul_add(0.2, 2.0);
            assert!(
                is_right,
                "{}: {measured:.0} bytes, and the page says {column}: run scripts/sizing",
                cost.what
            );
        }
    }
    // What is computed from it is computed from what it says.
    let views = said.lines().find(|line| line.contains("`record`")).unwrap();
    assert!(views.contains(&recorder_views()), "{views}: benches/RESULTS.md says otherwise");
}

async fn measure() -> Vec<Cost> {
    let cluster = PrivateCluster::builder().setting("fsync", "on").setting("full_page_writes", "on");
    let cluster = cluster.start().await.unwrap();
    let two = two_tenants_in(cluster.database().await.unwrap()).await;
    let (acme, owner) = (&two.acme, &two.owner);
    let id = active(acme, "pro").await.id;
    // Ids as most services have them, in no order; the same in every run.
    let mut dice = Dice(7);
    let mut id_of_somebody = || Uuid::from_u64_pair(dice.below(u64::MAX), dice.below(u64::MAX)).to_string();
    let users: Vec<UserId> = (0..ROWS).map(|_| UserId::new(id_of_somebody()).unwrap()).collect();
    let mut costs = Vec::new();

    let (size, started) = (Size::of(owner, "assignments").await, Instant::now());
    for batch in users.chunks(1000) {
        acme.assignments().assign_many(id, batch).await.unwrap();
    }
    let speed = ROWS as f64 / started.elapsed().as_secs_f64();
    costs.push(size.until(owner, "assignment", Some(speed)).await);

    let size = Size::of(owner, "views").await;
    let views = users.iter().map(|user| NewView::new(id, user.clone()).into());
    let speed = record(&two, views).await;
    costs.push(size.until(owner, "view", Some(speed)).await);

    let size = Size::of(owner, "conversions").await;
    let quotes = quotes(acme, id, &users).await;
    let sales = users.iter().zip(quotes).map(|(user, price)| {
        let sale = NewConversion::sale(id, user.clone(), price, key(&format!("{}:paid", id_of_somebody())));
        sale.order(OrderId::new(id_of_somebody()).unwrap()).into()
    });
    let speed = record(&two, sales).await;
    costs.push(size.until(owner, "sale", Some(speed)).await);

    let size = Size::of(owner, "usage").await;
    let insert = format!(
        "INSERT INTO usage (tenant_id, metric, day, value, idempotency_key)
         SELECT '{}', 'api_calls', '2026-01-01', 7, md5(n::text)::uuid::text FROM generate_series(1, {ROWS}) n",
        two.id
    );
    owner.batch_execute(&insert).await.unwrap();
    costs.push(size.until(owner, "reported usage", None).await);

    let size = Size::of(owner, "metric_totals").await;
    let insert = format!(
        "INSERT INTO metric_totals (tenant_id, experiment_id, phase, variant, reason, currency, day, assignments, views)
         SELECT '{}', '{id}', 1, 'variant-' || n % 3, 'randomised', 'XXX', '2000-01-01'::date + n / 3, 1000, 5000
         FROM generate_series(0, {ROWS} - 1) n",
        two.id
    );
    owner.batch_execute(&insert).await.unwrap();
    costs.push(size.until(owner, "variant and day, in the metrics", None).await);

    let size = Size::of(owner, "experiments").await;
    let insert = format!(
        "INSERT INTO experiments (tenant_id, key, name, variants)
         SELECT tenant_id, 'key-' || n, name, variants FROM experiments, generate_series(1, {ROWS}) n WHERE id = '{id}'"
    );
    owner.batch_execute(&insert).await.unwrap();
    costs.push(size.until(owner, "experiment of three prices", None).await);

    let size = Size::of(owner, "tenants").await;
    let insert = format!(
        "INSERT INTO tenants (name, email) SELECT 'Tenant ' || n, 'billing@tenant-' || n || '.example' FROM generate_series(1, {ROWS}) n"
    );
    owner.batch_execute(&insert).await.unwrap();
    costs.push(size.until(owner, "tenant", None).await);
    costs
}

/// In the background, as a service does it: events in a second.
async fn record(two: &TwoTenants, events: impl Iterator<Item = Event>) -> f64 {
    let recorder = two.client.recorder_with(RecorderOptions::new().max_events(100_000)).unwrap();
    let started = Instant::now();
    for event in events {
        recorder.record(two.id, event).unwrap();
    }
    let report = recorder.shutdown(std::time::Duration::from_secs(120)).await;
    assert_eq!(report.stats.written, ROWS as u64, "{report:?}");
    ROWS as f64 / started.elapsed().as_secs_f64()
}

async fn quotes(
    tenant: &TenantHandle,
    id: lastprice::ExperimentId,
    users: &[UserId],
) -> Vec<lastprice::Money> {
    let mut prices = Vec::new();
    for batch in users.chunks(1000) {
        let quotes = tenant.assignments().assign_many(id, batch).await.unwrap();
        prices.extend(quotes.iter().map(lastprice::AssignOutcome::price));
    }
    prices
}

/// What a table has before rows come in.
struct Size {
    table: &'static str,
    rows: i64,
    heap: i64,
    indexes: i64,
}

impl Size {
    async fn of(owner: &Sql, table: &'static str) -> Size {
        let sql = format!(
            "SELECT (SELECT count(*) FROM {table}), pg_table_size('{table}'), pg_indexes_size('{table}')"
        );
        let row = owner.query_one(&sql, &[]).await.unwrap();
        Size { table, rows: row.get(0), heap: row.get(1), indexes: row.get(2) }
    }

    async fn until(self, owner: &Sql, what: &'static str, per_second: Option<f64>) -> Cost {
        let after = Size::of(owner, self.table).await;
        let rows = (after.rows - self.rows) as f64;
        assert!((rows - ROWS as f64).abs() < 1.0, "{what}: {rows} rows");
        let (heap, indexes) =
            ((after.heap - self.heap) as f64 / rows, (after.indexes - self.indexes) as f64 / rows);
        Cost { what, table: self.table, heap, indexes, per_second }
    }
}

fn major() -> String {
    lastprice_testkit::Server::find().unwrap().version().split('.').next().unwrap().to_owned()
}

/// What the benchmark of ingest has measured for the recorder, in a release build.
fn recorder_views() -> String {
    let line = RESULTS.lines().find(|line| line.starts_with("| recorder: `record`, then `flush` |")).unwrap();
    line.split('|').nth(2).unwrap().trim().to_owned()
}

fn tables(costs: &[Cost]) -> String {
    let mut page = format!(
        "PostgreSQL {}, {ROWS} rows of each kind, ids of users, orders and payments of 36 to 41 characters; times of a {} build.\n\n",
        major(),
        if cfg!(debug_assertions) { "development" } else { "release" }
    );
    page += "| one … | table, bytes | its indexes, bytes | together | rows in 100 GB, millions | in a second |\n|---|--:|--:|--:|--:|--:|\n";
    for cost in costs {
        let speed = cost.per_second.map_or("".to_owned(), |speed| format!("{:.0}", speed));
        let millions = 100e9 / cost.total() / 1e6;
        let (heap, indexes, total) = (cost.heap, cost.indexes, cost.total());
        let _ = writeln!(
            page,
            "| {} | {heap:.0} | {indexes:.0} | {total:.0} | {millions:.0} | {speed} |",
            cost.what
        );
        assert!(!cost.table.is_empty());
    }
    let of = |what: &str| costs.iter().find(|cost| cost.what == what).unwrap().total();
    let (user, view, sale, usage) = (of("assignment"), of("view"), of("sale"), of("reported usage"));
    let _ = writeln!(
        page,
        "\nThe benchmark of ingest, with nothing else on the machine and in a release build, has {} views a second by `record`.\n",
        recorder_views()
    );
    page += "A service whose users see a price five times, and of whom one in twenty buys:\n\n";
    page += "| new users in a day | events in a second, on average | GB in a year | years in 1 TB | of the measured views/s, at ten times the average |\n|--:|--:|--:|--:|--:|\n";
    let capacity: f64 = recorder_views().parse().unwrap();
    for users in [1e3, 1e4, 1e5, 1e6, 1e7] {
        let bytes = users * (user + 5.0 * view + 0.05 * sale) * 365.0;
        let events = users * 6.05 / 86_400.0;
        let share = 100.0 * 10.0 * events / capacity;
        let (gb, years) = (bytes / 1e9, 1e12 / bytes);
        let _ = writeln!(page, "| {users:.0} | {events:.1} | {gb:.1} | {years:.1} | {share:.1} % |");
    }
    let _ = writeln!(
        page,
        "\nA thousand reports of usage a second are {:.1} GB a day. Ten thousand tenants with ten experiments each, of three prices and a \
         year long, are {:.1} GB before their users.\n",
        1000.0 * 86_400.0 * usage / 1e9,
        1e4 * (of("tenant")
            + 10.0
                * (of("experiment of three prices")
                    + 3.0 * 2.0 * 365.0 * of("variant and day, in the metrics")))
            / 1e9
    );
    page
}
