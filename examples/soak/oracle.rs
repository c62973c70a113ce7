//! The rules, and who watches that they hold.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lastprice::tokio_postgres::Client as Server;
use lastprice::{Currency, RecorderHandle, WebhookOutcome, uuid::Uuid};

use crate::load::Load;
use crate::shop::{Books, Entry, Fate, Shop, What, usd};
use crate::{APPLICATION, CONNECTIONS, Failure};

/// A server that runs answers somebody in this time.
const STALLED: Duration = Duration::from_secs(30);

pub(crate) struct Oracle {
    broken: Mutex<Vec<String>>,
    lost: AtomicU64,
}

impl Oracle {
    pub(crate) fn new() -> Oracle {
        Oracle { broken: Mutex::default(), lost: AtomicU64::new(0) }
    }

    /// A rule does not hold.
    pub(crate) fn broken(&self, what: impl Into<String>) {
        let what = what.into();
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if broken.len() < 50 {
            eprintln!("BROKEN: {what}");
        }
        broken.push(what);
    }

    pub(crate) fn count(&self) -> usize {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn is_lost(&self, how_many: usize, what: String) {
        self.lost.fetch_add(how_many as u64, Ordering::Relaxed);
        self.broken(what);
    }
}

/// Looks at the recorder's numbers all the time: they add up at every moment.
pub(crate) fn audit(events: RecorderHandle, oracle: Arc<Oracle>, calm: Arc<AtomicBool>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while !calm.load(Ordering::Relaxed) {
            let s = events.stats();
            if s.accepted != s.written + s.duplicate + s.rejected + s.dropped + s.pending {
                return oracle.broken(format!("the recorder's numbers do not add up: {s:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    })
}

/// Looks at the server every now and then, by connections that nobody cuts but a kill.
pub(crate) async fn watch(load: Arc<Load>, calm: Arc<AtomicBool>) {
    let (mut calls, mut moved) = (0, Instant::now());
    while !calm.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = load.table.calls();
        if now != calls {
            (calls, moved) = (now, Instant::now());
        } else if moved.elapsed() > STALLED {
            load.oracle.broken(format!("no call was answered for {STALLED:?}"));
            moved = Instant::now();
        }
        // Whatever fails here fails because the server is away.
        if let Ok(server) = load.database.connect_superuser().await {
            let _ = look(&load, &server).await;
        }
    }
}

async fn look(load: &Load, server: &Server) -> Result<(), Failure> {
    for shop in &*load.shops {
        let fresh = std::mem::take(&mut shop.books().fresh);
        let looked = fresh_are_there(load, shop, server, &fresh).await;
        if looked.is_err() {
            shop.books().fresh.extend(fresh);
            looked?;
        }
    }
    let wrong: i64 = server.query_one(MISCOUNTED, &[]).await?.get(0);
    if wrong > 0 {
        load.oracle.broken(format!("of {wrong} experiments totals and pending deltas are not the events"));
    }
    let idle: i64 = server.query_one(IDLE, &[&APPLICATION]).await?.get(0);
    if idle > 0 {
        load.oracle.broken(format!("{idle} connections are idle in a transaction"));
    }
    let pool = load.client.pool_status();
    if pool.size > CONNECTIONS {
        load.oracle.broken(format!("the pool is too large: {pool:?}"));
    }
    Ok(())
}

/// What was acknowledged is there.
async fn fresh_are_there(load: &Load, shop: &Shop, server: &Server, fresh: &[u32]) -> Result<(), Failure> {
    let (mut views, mut usage, mut ledger) = (Vec::new(), Vec::new(), Vec::new());
    {
        let books = shop.books();
        for n in fresh {
            match books.entries[*n as usize].what {
                What::View => views.push(Shop::view(*n).uuid()),
                What::Usage => usage.push(Shop::key(*n).as_str().to_owned()),
                What::Reported => ledger.push(reported_key(*n)),
                _ => ledger.push(Shop::key(*n).as_str().to_owned()),
            }
        }
    }
    let tenant = shop.tenant.tenant_id().uuid();
    let sql = "SELECT (SELECT count(*) FROM views WHERE tenant_id = $1 AND id = ANY ($2)),
                      (SELECT count(*) FROM usage WHERE tenant_id = $1 AND idempotency_key = ANY ($3)),
                      (SELECT count(*) FROM conversions WHERE tenant_id = $1 AND idempotency_key = ANY ($4))";
    let row = server.query_one(sql, &[&tenant, &views, &usage, &ledger]).await?;
    let there: i64 = (0..3).map(|column| row.get::<_, i64>(column)).sum();
    let lost = fresh.len().saturating_sub(usize::try_from(there)?);
    if lost > 0 {
        load.oracle.is_lost(lost, format!("shop {}: {lost} of {} are lost", shop.number, fresh.len()));
    }
    Ok(())
}

fn reported_key(n: u32) -> String {
    format!("paid:sale:{}", Shop::order(n))
}

/// At the end, when nothing moves any more: everything, to the last row.
pub(crate) async fn settle_accounts(load: &Load) -> Result<(), Failure> {
    for shop in &*load.shops {
        loop {
            let processed = shop.tenant.webhooks().process_pending(1000).await?;
            let failed =
                |(_, outcome): &&(String, WebhookOutcome)| !matches!(outcome, WebhookOutcome::Processed(_));
            if let Some(failed) = processed.iter().find(failed) {
                load.oracle.broken(format!("a webhook was not processed: {failed:?}"));
                break;
            }
            if processed.is_empty() {
                break;
            }
        }
    }
    let server = load.database.connect_superuser().await?;
    look(load, &server).await?;
    let (mut acknowledged, mut there) = (0, 0);
    for shop in &*load.shops {
        let rows = Rows::read(shop, &server).await?;
        acknowledged += rows.compare(load, shop, &shop.books());
        there += rows.entries.len();
        isolation(load, shop, &server).await?;
        let revenue = shop.tenant.metrics().experiment(shop.main).await?.revenue(Currency::USD);
        if revenue != usd(rows.cents()) {
            load.oracle.broken(format!(
                "shop {}: {revenue} by the metrics, {} by the ledger",
                shop.number,
                usd(rows.cents())
            ));
        }
    }
    for (sql, what) in [(OVERDRAWN, "more went back than was paid"), (WAITING, "an entry waits for its sale")]
    {
        let wrong: i64 = server.query_one(sql, &[]).await?.get(0);
        if wrong > 0 {
            load.oracle.broken(format!("{wrong} times: {what}"));
        }
    }
    println!(
        "{acknowledged} entries were acknowledged, {there} are there: the surplus was sent, and its answers were lost or not waited for"
    );
    nothing_is_left(load, &server).await
}

/// What is stored for a shop.
struct Rows {
    /// By number: what they are and what they come to.
    entries: HashMap<u32, (What, i64)>,
    quotes: HashMap<String, i64>,
    strangers: Vec<String>,
}

impl Rows {
    async fn read(shop: &Shop, server: &Server) -> Result<Rows, Failure> {
        let tenant = shop.tenant.tenant_id().uuid();
        let (mut entries, mut strangers) = (HashMap::new(), Vec::new());
        for row in server.query("SELECT id FROM views WHERE tenant_id = $1", &[&tenant]).await? {
            let id: Uuid = row.get(0);
            match u32::try_from(id.as_u128() >> 64) {
                Ok(n) => _ = entries.insert(n, (What::View, 0)),
                Err(_) => strangers.push(id.to_string()),
            }
        }
        let sql = "SELECT idempotency_key, CASE kind WHEN 'sale' THEN 0 WHEN 'refund' THEN 1 ELSE 2 END, (revenue * 100)::bigint
                   FROM conversions WHERE tenant_id = $1
                   UNION ALL SELECT idempotency_key, 3, value::bigint FROM usage WHERE tenant_id = $1";
        for row in server.query(sql, &[&tenant]).await? {
            let (key, kind, amount): (String, i32, i64) = (row.get(0), row.get(1), row.get(2));
            let (what, n) = match (kind, key.strip_prefix("paid:sale:order-")) {
                (0, Some(n)) => (What::Reported, Some(n)),
                (0, None) => (What::Sale, key.strip_prefix("entry-")),
                (1, _) => (What::Refund, key.strip_prefix("entry-")),
                (2, _) => (What::Renewal, key.strip_prefix("entry-")),
                _ => (What::Usage, key.strip_prefix("entry-")),
            };
            match n.and_then(|n| n.parse().ok()) {
                Some(n) if entries.insert(n, (what, amount)).is_none() => {}
                _ => strangers.push(key),
            }
        }
        let sql = "SELECT user_id, (price * 100)::bigint FROM assignments WHERE tenant_id = $1 AND experiment_id = $2";
        let quotes = server.query(sql, &[&tenant, &shop.main.uuid()]).await?;
        let quotes = quotes.iter().map(|row| (row.get(0), row.get(1))).collect();
        Ok(Rows { entries, quotes, strangers })
    }

    /// With the books; how many were acknowledged.
    fn compare(&self, load: &Load, shop: &Shop, books: &Books) -> u64 {
        let broken = |what: String| load.oracle.broken(format!("shop {}: {what}", shop.number));
        let mut acknowledged = 0;
        for (n, entry) in (0..).zip(&books.entries) {
            let Entry { what, fate, cents, has_twin, .. } = *entry;
            let there = self.entries.get(&n);
            acknowledged += u64::from(matches!(fate, Fate::Done | Fate::Promised));
            match (fate, there) {
                (Fate::Done | Fate::Promised, None) => {
                    load.oracle
                        .is_lost(1, format!("shop {}: {what:?} {n} was {fate:?} and is lost", shop.number));
                }
                (Fate::NotDone, Some(_)) => broken(format!("{what:?} {n} is there, and must not be")),
                (_, Some(there)) if *there != (what, cents) => {
                    broken(format!("{what:?} {n} of {cents} is {there:?}"))
                }
                _ => {}
            }
            if has_twin && there.is_some() != self.entries.contains_key(&(n + 1)) {
                broken(format!("of the transaction of {n} there is a half"));
            }
        }
        let unknown = self.entries.keys().filter(|n| books.entries.len() <= **n as usize).count();
        if unknown + self.strangers.len() > 0 {
            broken(format!("{unknown} rows are nobody's, and {:?}", self.strangers));
        }
        for (user, cents) in &books.quotes {
            if self.quotes.get(shop.user(*user).as_str()) != Some(cents) {
                broken(format!("user {user} was promised another price, or none"));
            }
        }
        acknowledged
    }

    fn cents(&self) -> i64 {
        self.entries.values().filter(|(what, _)| *what != What::Usage).map(|(_, cents)| cents).sum()
    }
}

/// No row of a shop is of another one's users, and the service sees the rows of the bound tenant only.
async fn isolation(load: &Load, shop: &Shop, server: &Server) -> Result<(), Failure> {
    let tenant = shop.tenant.tenant_id();
    let app = load.database.connect_app().await?;
    for table in ["assignments", "views", "conversions"] {
        let strangers = format!(
            "SELECT count(*) FROM {table} WHERE tenant_id = $1 AND user_id NOT LIKE 'shop{}-%'",
            shop.number
        );
        let strangers: i64 = server.query_one(&strangers, &[&tenant.uuid()]).await?.get(0);
        let others = format!("SELECT count(*) FROM {table} WHERE tenant_id <> $1");
        app.batch_execute(&format!("BEGIN; SET LOCAL app.tenant_id = '{tenant}'")).await?;
        let others: i64 = app.query_one(&others, &[&tenant.uuid()]).await?.get(0);
        app.batch_execute("ROLLBACK").await?;
        let unbound: i64 = app.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await?.get(0);
        if (strangers, others, unbound) != (0, 0, 0) {
            load.oracle.broken(format!(
                "shop {}, {table}: {strangers} rows of others' users, {others} of others are seen, {unbound} by nobody",
                shop.number
            ));
        }
    }
    Ok(())
}

/// All connections are back in the pool, and when the client is closed, none is left.
async fn nothing_is_left(load: &Load, server: &Server) -> Result<(), Failure> {
    let limit = Duration::from_secs(10);
    let back = async {
        loop {
            let pool = load.client.pool_status();
            if pool.available == pool.size && pool.waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(limit, back).await.is_err() {
        load.oracle.broken(format!("connections are not given back: {:?}", load.client.pool_status()));
    }
    let left = "SELECT count(*), count(xact_start) FROM pg_stat_activity WHERE application_name = $1";
    let busy: i64 = server.query_one(left, &[&APPLICATION]).await?.get(1);
    // One may be the assigners', which ask whether anything has changed.
    if busy > 1 {
        load.oracle.broken(format!("{busy} connections are in a transaction"));
    }
    if tokio::time::timeout(limit, load.client.close()).await.is_err() {
        load.oracle.broken("the client does not close");
    }
    let gone = async {
        while server.query_one(left, &[&APPLICATION]).await?.get::<_, i64>(0) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok::<(), Failure>(())
    };
    if tokio::time::timeout(limit, gone).await.is_err() {
        load.oracle.broken("connections outlive their client");
    }
    Ok(())
}

/// Experiments of which totals and pending deltas are not the events.
const MISCOUNTED: &str = "
    WITH live AS (
      SELECT tenant_id, experiment_id, sum(assignments) AS a, sum(views) AS v, sum(conversions) AS c, sum(renewals) AS n,
             sum(refunds) AS r, sum(revenue) AS m
      FROM (SELECT tenant_id, experiment_id, assignments, views, conversions, renewals, refunds, revenue FROM metric_totals
            UNION ALL
            SELECT tenant_id, experiment_id, assignments, views, conversions, renewals, refunds, revenue FROM metric_deltas) t
      GROUP BY 1, 2
    ), events AS (
      SELECT tenant_id, experiment_id, sum(a) AS a, sum(v) AS v, sum(c) AS c, sum(n) AS n, sum(r) AS r, sum(m) AS m
      FROM (SELECT tenant_id, experiment_id, count(*) AS a, 0 AS v, 0 AS c, 0 AS n, 0 AS r, 0::numeric AS m
            FROM assignments GROUP BY 1, 2
            UNION ALL
            SELECT tenant_id, experiment_id, 0, count(*), 0, 0, 0, 0 FROM views GROUP BY 1, 2
            UNION ALL
            SELECT tenant_id, experiment_id, 0, 0, count(*) FILTER (WHERE kind = 'sale'), count(*) FILTER (WHERE kind = 'renewal'),
                   count(*) FILTER (WHERE kind IN ('refund', 'chargeback')), sum(revenue)
            FROM conversions GROUP BY 1, 2) e
      GROUP BY 1, 2
    )
    SELECT count(*) FROM live FULL JOIN events USING (tenant_id, experiment_id)
    WHERE (live.a, live.v, live.c, live.n, live.r, live.m) IS DISTINCT FROM (events.a, events.v, events.c, events.n, events.r, events.m)";

const IDLE: &str = "SELECT count(*) FROM pg_stat_activity
    WHERE application_name = $1 AND state LIKE 'idle in transaction%' AND state_change < now() - interval '5 s'";

const OVERDRAWN: &str = "SELECT count(*) FROM (
    SELECT FROM conversions s JOIN conversions r ON r.tenant_id = s.tenant_id AND r.sale_id = s.id AND r.kind = 'refund'
    GROUP BY s.tenant_id, s.id, s.revenue HAVING sum(-r.revenue) > s.revenue) overdrawn";

const WAITING: &str = "SELECT count(*) FROM waiting_conversions";
