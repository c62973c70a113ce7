//! Run pricing experiments from a backend, on the PostgreSQL that the backend already has.
//!
//! A service asks *which price does this user see*, shows it, and later records what was paid; a tenant's owner asks
//! *which price is better*. `lastprice` is the data layer of that: typed repositories over pooled
//! tokio-postgres connections, isolated by tenant with row-level security.
//!
//! ```
//! use lastprice::*;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let database = lastprice_testkit::TestDatabase::new().await?;
//! # let url = database.app_url();
//! let client = Client::builder().url(url).require_app_role().build()?;
//! let acme = client.create_tenant(NewTenant::managed("Acme", "ops@acme.example")).await?;
//! let tenant = client.tenant(acme.id);
//!
//! // Three prices, a third of new users each.
//! let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00").add("39", 1, "39.00");
//! let draft = NewExperiment::new("pro-plan", "Price of the Pro plan", Currency::USD, variants);
//! let draft = tenant.experiments().create(draft).await?;
//! let experiment = tenant.experiments().activate(draft.id).await?;
//!
//! // Which price does this user see? The same one, for ever.
//! let user = UserId::new("user-42")?;
//! let quote = tenant.assignments().assign(experiment.id, &user).await?;
//! tenant.views().record(&NewView::new(experiment.id, user.clone())).await?;
//!
//! // What was paid, counted once however often it is reported under its key.
//! let key = IdempotencyKey::new("order-1001:paid")?;
//! let sale = NewConversion::sale(experiment.id, user, quote.price(), key).order(OrderId::new("order-1001")?);
//! tenant.conversions().authorise(&sale).await?.entry()?; // refused, if it is not what was quoted
//! tenant.conversions().settle(&sale).await?.entry()?;
//!
//! let counts = tenant.metrics().experiment(experiment.id).await?;
//! assert_eq!((counts.assignments, counts.views, counts.conversions), (1, 1, 1));
//! assert_eq!(counts.revenue(Currency::USD), quote.price());
//! # Ok(()) }
//! ```
//!
//! # Three ideas
//!
//! 1. **[`TenantScope`]**: the only way to tenant data. A guard that binds one tenant to one transaction, in three
//!    forms with the same repositories: each call alone ([`Client::tenant`], one round trip), several calls together
//!    ([`TenantHandle::begin`]), or inside a transaction of your own ([`TenantScope::within`]).
//! 2. **The assigner** ([`Client::assigner`]): for a fixed configuration, the variant is a pure function of user and
//!    experiment ([`bucketing`]), answered from memory. [`Assignments::assign`] stores it as a quote, and the stored
//!    quote always wins.
//! 3. **The ledger**: what was quoted, seen and paid is written exactly once ([`Assignments`], [`Views`],
//!    [`Conversions`]), one by one or in the background ([`Recorder`]), and every number ([`Metrics`]) is derived from it,
//!    up to a [`Report`]: which price is better, by a [plan](AnalysisPlan) that was made before there were numbers, and whether
//!    the data is sound enough to say so.
//!
//! # What is guaranteed
//!
//! - Through this API no row of another tenant is read or written: the database enforces it, every statement names its
//!   tenant as well, and a client refuses to work where the database would not enforce it (or becomes the role for
//!   which it does): see [`ClientBuilder::require_app_role`].
//! - A user's stored quote never changes, whatever becomes of the experiment.
//! - Nothing is [authorised](Conversions::authorise) that is not as quoted, or goes back beyond its sale; what is
//!   [settled](Conversions::settle) against a [rule](LedgerRule) is flagged.
//! - After `pause` or `complete` has returned, no [`Assigner`] that has [confirmed](Assigner::confirm) its snapshot since gives new
//!   users a variant, and none anywhere stores a quote of one.
//! - An id (views) or idempotency key (ledger, usage) counts once; repeating any call after an unknown outcome is safe. The
//!   ledger's sums are the same in whatever order its entries arrive.
//! - What a [`Recorder`] has acknowledged is committed; what it has not, is reported. Its numbers add up at every moment.
//! - Every change of a tenant, an experiment or a recommendation is in the [audit trail](AuditTrail), with who made it and without a
//!   secret, whoever makes it; a service can only read it.
//! - Live numbers are exact: totals plus pending deltas equal a recount of the events, always.
//! - A dropped future leaves no transaction open, no tenant bound and no stray cancel behind.
//! - Errors and logs hold no parameter, no row and no secret; `Debug` output holds no key and no password.
//! - Secrets of tenants are encrypted before they leave the program ([`ClientBuilder::keys`]), each for its tenant and column; the
//!   server never sees one, nor a key.
//!
//! # What is not
//!
//! - Raw SQL that a host runs on its own connection may bind any tenant: who can run SQL is trusted.
//! - Table sizes, statistics and timing are visible to every role of a database.
//! - That an e-mail address is taken can be seen by every tenant.
//! - Counts ([`Metrics`]) have everybody who is stored: testers and existing customers as well as the randomised.
//! - What was only [recorded](RecorderHandle::record) is lost with its process; [track](RecorderHandle::track) what must not be.
//! - User ids decide the price. Issue them on the server: whoever may choose an id may look for a cheaper variant.
//! - Rates and revenue per user of [`MetricCounts`] do not say how sure they are; a [`Report`] does.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `migrate` | yes | [`Admin::migrate`]: installs and upgrades the schema from the program |
//! | `tls` | yes | TLS by rustls, with libpq's `sslmode` values; without it only `disable` and `prefer` (in plain) |
//! | `metrics` | no | numbers of statements, pools, recorders and assigners by the crate `metrics`, under `lastprice_…`: see `docs/observability.md` |
//! | `report` | no | `Report::to_html`: a [`Report`] as one self-contained page with charts |
//!
//! # Dependencies in the interface
//!
//! Types of `tokio_postgres`, `uuid`, `chrono`, `rust_decimal`, `secrecy` and `serde_json` are part of this crate's
//! interface and are re-exported; a major release of theirs is one of ours.

mod admin;
mod analysis;
mod assigner;
mod audit;
pub mod bucketing;
mod client;
mod connect;
mod error;
mod id;
mod money;
mod record;
mod repo;
mod scope;
mod secrets;
pub mod stats;
mod telemetry;
pub mod webhook;

#[cfg(feature = "migrate")]
pub use admin::Migration;
pub use admin::{
    Admin, AdminLimits, AdminTenants, LimitSource, Refresher, RefresherOptions, RefresherStatus, UsageLimit,
};
pub use admin::{ArchiveOptions, ArchiveProgress};
pub use admin::{RewrapFailure, RewrapProgress, RewrapReport};
pub use analysis::{
    Chance, Check, Comparison, DailyMean, Estimated, Finding, NoRecommendation, PriceAnalysis, PricePoint,
    PriceStep, Report, Severity, Verdict,
};
pub use assigner::{Assigner, AssignerStatus, AssignerView, Decision};
pub use audit::{Hazard, IsolationFinding, IsolationReport};
pub use client::{Client, ClientBuilder, PoolStatus, ReplicaStatus};
pub use connect::SslMode;
pub use error::{Error, ErrorKind, ExceededQuota, Result};
pub use id::{
    Actor, ConversionId, ExperimentId, IdempotencyKey, OrderId, Period, RecommendationId, SubscriptionId,
    TenantId, UserId, ViewId,
};
pub use money::{Currency, Money};
pub use record::{
    Event, NotTaken, NotTakenReason, Recorder, RecorderHandle, RecorderOptions, RecorderReport,
    RecorderStats, Rejection, Tracked,
};
pub use repo::*;
pub use scope::{SlowStatement, StatementMode, TenantHandle, TenantScope, TenantTransaction};
pub use secrets::{DataKey, KeyContext, KeyFuture, KeyProvider, KeyRefused, KeyRing, SecretKeys};

/// The crates whose types are in this crate's interface, in the versions that it was built with.
pub use {chrono, rust_decimal, secrecy, serde_json, tokio_postgres, uuid};

/// The whole current schema, as `psql -f schema.sql` installs it: one statement, no psql commands.
pub static SCHEMA_SQL: &str = include_str!("../schema.sql");

/// For this crate's own tests and benchmarks.
#[doc(hidden)]
pub mod internals {
    /// Replaces the experiments of a fixed assigner, as a change replaces those of another.
    pub fn swap(
        assigner: &crate::Assigner,
        experiments: impl IntoIterator<Item = crate::NewExperiment>,
    ) -> crate::Result<()> {
        assigner.swap_fixed(experiments)
    }

    /// The statements that a replica may answer, by name.
    pub fn replicated() -> Vec<&'static str> {
        crate::repo::statements().filter(|s| s.may_be_stale).map(|s| s.name).collect()
    }

    /// Every statement that the crate can send: name, text with `{s}` for the schema, parameter types.
    pub fn statements() -> Vec<(&'static str, &'static str, &'static [tokio_postgres::types::Type])> {
        crate::repo::statements().map(|s| (s.name, s.sql, s.params)).collect()
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/statistics.md")]
struct Statistics;

#[cfg(doctest)]
#[doc = include_str!("../docs/observability.md")]
struct Observability;

#[cfg(doctest)]
#[doc = include_str!("../docs/security.md")]
struct Security;

#[cfg(doctest)]
#[doc = include_str!("../docs/upgrade.md")]
struct Upgrade;

#[cfg(doctest)]
#[doc = include_str!("../docs/scaling.md")]
struct Scaling;

#[cfg(doctest)]
#[doc = include_str!("../docs/retention.md")]
struct Retention;
