//! The main job from end to end, on a PostgreSQL that it starts itself: `cargo run --example quickstart`.
//!
//! With `DATABASE_URL` set it uses that database instead: it installs the schema there and leaves two tenants.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lastprice::chrono::Utc;
use lastprice::rust_decimal::Decimal;
use lastprice::uuid::Uuid;
use lastprice::{
    Admin, Assigner, Client, Currency, Decision, ErrorKind, Experiment, IdempotencyKey, KeyRing, Money,
    NewAssignment, NewConversion, NewExperiment, NewTenant, NewView, Plan, Reason, RecorderStats,
    TenantHandle, TenantId, UserId, Variants,
};
use lastprice_testkit::TestDatabase;

const USERS: u64 = 12_000;
/// They come over some weeks that are past, since who is judged has had the window of two weeks to buy.
const FIRST: Duration = Duration::from_secs(40 * 86_400);
const LAST: Duration = Duration::from_secs(16 * 86_400);
/// The demand that the users follow: of those who see price p, 1 / (1 + exp(-(INTERCEPT + SLOPE p))) buy.
const INTERCEPT: f64 = 0.4;
const SLOPE: f64 = -0.08;

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let started = Instant::now();
    let step = |text: &str| println!("[{:5.2} s] {text}", started.elapsed().as_secs_f64());

    // Two logins: the owner of the tables migrates, the service works as an ordinary role, bound by row-level security.
    let (owner_url, service_url, database) = match std::env::var("DATABASE_URL") {
        Ok(url) => (url.clone(), url, None),
        Err(_) => {
            step("starting a PostgreSQL of our own ...");
            let database = TestDatabase::builder().empty().create().await?;
            (database.owner_url(), database.app_url(), Some(database))
        }
    };
    let admin = Admin::connect(&owner_url).await?;
    let migration = admin.migrate().await?;
    if let Some(database) = &database {
        // The one thing that an installation does by hand: the service's login becomes a member of the group role.
        let superuser = database.connect_superuser().await?;
        superuser.batch_execute("GRANT lastprice_app TO lastprice_service").await?;
    }
    step(&format!("schema version {} is there (before: {:?})", migration.to, migration.from));

    // Encrypts the secrets of tenants. A service has it from its environment: LASTPRICE_KEYS. This one is forgotten at the end.
    let random = [Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat();
    let keys = KeyRing::new("quickstart", random.try_into().map_err(|_| "32 bytes")?)?;
    let client = Client::builder().url(&service_url).keys(keys).build()?;
    client.ready().await?;
    let run = TenantId::new();
    let acme = NewTenant::managed("Acme", format!("acme-{run}@example.com")).plan(Plan::Pro);
    let acme = client.create_tenant(acme).await?;
    let globex = NewTenant::byok(
        "Globex",
        format!("globex-{run}@example.com"),
        "their key, which is encrypted before it is stored",
    );
    let globex = client.create_tenant(globex).await?;
    step(&format!("two tenants: {} ({}) and {} ({})", acme.name, acme.mode, globex.name, globex.mode));

    let tenant = client.tenant(acme.id);
    let variants = Variants::new().add("9", 1, "9.00").add("19", 1, "19.00").add("29", 1, "29.00");
    let new = NewExperiment::new("pro-plan", "Price of the Pro plan", Currency::USD, variants);
    let draft = tenant.experiments().create(new).await?;
    let experiment = tenant.experiments().activate(draft.id).await?;
    step(&format!("experiment `{}` is {}", experiment.key, experiment.status));

    // The tenant's experiments in memory: which price a user sees is decided without the database.
    let assigner = client.assigner(acme.id).await?;
    let generated = sell(&client, acme.id, &assigner, &experiment, step).await?;

    step("Globex tries to read Acme's experiment ...");
    let stranger = client.tenant(globex.id);
    assert!(stranger.experiments().get(experiment.id).await?.is_none());
    assert!(stranger.experiments().list(None, 10, None).await?.items.is_empty());
    let refused = stranger.metrics().by_variant(experiment.id).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    step(&format!("... and gets nothing: no experiment, no list, and \"{refused}\""));

    let exact = compare(&tenant, &experiment, &generated).await?;
    let report = tenant.metrics().report(experiment.id).await?;
    step("what it means:");
    println!("\n{report}");
    #[cfg(feature = "report")]
    {
        let page = std::env::temp_dir().join(format!("lastprice-report-{}.html", std::process::id()));
        std::fs::write(&page, report.to_html())?;
        step(&format!("the same with charts: {}", page.display()));
    }

    let paused = Instant::now();
    tenant.experiments().pause(experiment.id).await?;
    let newcomer = UserId::new("newcomer")?;
    while decide(&assigner, &experiment, &newcomer)?.reason() != Reason::Paused {
        tokio::task::yield_now().await;
    }
    let known = assigner.quote(&experiment.key, &UserId::new("user-7")?).await?;
    step(&format!(
        "paused: {:.1} ms later the assigner shows newcomers {}; user-7 keeps {}",
        paused.elapsed().as_secs_f64() * 1e3,
        decide(&assigner, &experiment, &newcomer)?.price(),
        known.price()
    ));
    admin.refresh_metrics().await?;
    client.close().await;
    if !exact {
        return Err("the numbers differ from what was generated".into());
    }
    step("every number is exact");
    println!(
        "\nNext:\n  \
         - the report as a page with charts: --features report, or Report::to_html\n  \
         - put `lastprice` into your service: the README's 20 lines; `cargo doc --open` has the rest\n  \
         - your own database: DATABASE_URL=postgres://owner@host/db cargo run --example quickstart\n  \
         - your own tests: the crate `lastprice-testkit` gives each test a database like this one"
    );
    Ok(())
}

/// What this program did, by variant: what the database is compared with.
#[derive(Default)]
struct Tally {
    assigned: u64,
    views: u64,
    sales: u64,
    revenue: Decimal,
}

fn decide(assigner: &Assigner, experiment: &Experiment, user: &UserId) -> Result<Decision<'static>, Failure> {
    assigner.assign(&experiment.key, user).ok_or_else(|| "the assigner knows no such experiment".into())
}

/// Shows each user a price one to three times, and sells to whom the demand curve says. Prices are decided from memory, and
/// all that happens is recorded in the background.
async fn sell(
    client: &Client,
    tenant: TenantId,
    assigner: &Assigner,
    experiment: &Experiment,
    step: impl Fn(&str),
) -> Result<BTreeMap<String, Tally>, Failure> {
    let recorder = client.recorder();
    let mut generated: BTreeMap<String, Tally> = BTreeMap::new();
    let now = Utc::now();
    for n in 0..USERS {
        let shown_at = now - FIRST + (FIRST - LAST).mul_f64(n as f64 / USERS as f64);
        let user = UserId::new(format!("user-{n}"))?;
        let shown = decide(assigner, experiment, &user)?;
        let tally = generated.entry(shown.variant().to_owned()).or_default();
        tally.assigned += 1;
        recorder.record(tenant, NewAssignment::new(experiment.id, user.clone()).shown_at(shown_at))?;
        for _ in 0..=chance(n, 1) {
            tally.views += 1;
            recorder.record(tenant, NewView::new(experiment.id, user.clone()).at(shown_at))?;
        }
        let price: f64 = shown.price().amount().try_into()?;
        if unit(n, 2) < 1.0 / (1.0 + (-(INTERCEPT + SLOPE * price)).exp()) {
            tally.sales += 1;
            tally.revenue += shown.price().amount();
            // A webhook that is delivered twice counts once.
            for _ in 0..2 {
                let key = IdempotencyKey::new(format!("charge:{n}"))?;
                let sale = NewConversion::sale(experiment.id, user.clone(), shown.price(), key);
                recorder.record(tenant, sale.at(shown_at + Duration::from_secs(3600)))?;
            }
        }
    }
    let handed_over = recorder.stats().accepted;
    step(&format!("{USERS} users were shown their prices; {handed_over} events are on their way ..."));
    let lost_after = Duration::from_secs(60);
    let RecorderStats { accepted, written, duplicate, .. } = recorder.shutdown(lost_after).await.stats;
    assert_eq!(accepted, written + duplicate);
    step(&format!("... {written} are committed; {duplicate} were reported twice, and count once"));
    Ok(generated)
}

async fn compare(
    tenant: &TenantHandle,
    experiment: &Experiment,
    generated: &BTreeMap<String, Tally>,
) -> Result<bool, Failure> {
    let usd = experiment.currency;
    println!("\n  price   assigned      views      sales     rate        revenue   per user   as generated");
    let mut exact = true;
    for variant in tenant.metrics().by_variant(experiment.id).await? {
        let (counts, expected) = (&variant.counts, &generated[&variant.variant]);
        let same = counts.assignments == expected.assigned
            && counts.views == expected.views
            && counts.conversions == expected.sales
            && counts.revenue(usd) == Money::of(expected.revenue, usd)?;
        exact &= same;
        println!(
            "  {:>5}   {:>8}   {:>8}   {:>8}   {:>5.1} %   {:>12}   {:>8.4}   {}",
            variant.variant,
            counts.assignments,
            counts.views,
            counts.conversions,
            counts.conversion_rate().unwrap_or(0.0) * 100.0,
            counts.revenue(usd).amount(),
            counts.revenue_per_user(usd).unwrap_or_default().round_dp(4), // a Decimal's {:.4} cuts off
            if same { "exactly" } else { "NO" },
        );
    }
    println!();
    Ok(exact)
}

/// A number from 0 to 1 that is the same in every run: splitmix64 of the user and what it is for.
fn unit(user: u64, purpose: u64) -> f64 {
    let mut z = (user * 4 + purpose).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// 0, 1 or 2.
fn chance(user: u64, purpose: u64) -> u64 {
    (unit(user, purpose) * 3.0) as u64
}
