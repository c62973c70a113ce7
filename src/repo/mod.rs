//! One room per resource: its rows, its inputs, its repository, its SQL.

mod assignments;
mod audit_trail;
mod conversions;
mod experiments;
mod metrics;
mod page;
mod recommendations;
mod row;
mod subject;
mod tenants;
mod usage;
mod users;
mod variants;
mod views;
mod webhooks;

pub use assignments::{AssignOutcome, AssignmentReason, Assignments, NewAssignment, Quote};
pub use audit_trail::{AuditAction, AuditChange, AuditEntry, AuditObject, AuditTrail};
pub use conversions::{
    Conversion, ConversionKind, ConversionOutcome, Conversions, Difference, HostOrder, LedgerRule,
    NewConversion, OrderAmount, Reconciliation, Refusal,
};
pub use experiments::{
    AnalysisPlan, AssignmentUnit, DecisionRule, Eligibility, Experiment, ExperimentEdit, ExperimentStatus,
    Experiments, Layer, NewExperiment, NewPhase, PrimaryMetric, Reason,
};
pub(crate) use experiments::{Config, Decided, Decider, LISTEN, PROBE};
pub use metrics::{
    ArmResults, Cohort, CohortDay, CurrencySales, DayMetrics, ExperimentSummary, MetricCounts, Metrics,
    RecentViews, Results, VariantMetrics,
};
pub(crate) use metrics::{FULL_FOLD, SUSPECT_VIEWS, fold_all, recent_views};
pub(crate) use page::rows_for;
pub use page::{Cursor, Page};
pub use recommendations::{
    FollowUp, NewRecommendation, Objective, PriceBounds, Recommendation, RecommendationStatus,
    Recommendations,
};
pub use subject::Subject;
pub(crate) use tenants::{COLUMNS as TENANT_COLUMNS, PAID_API_KEY, WEBHOOK_SECRET, check_email};
pub use tenants::{NewTenant, PaidCredentials, Plan, Tenant, TenantChange, TenantMode, Tenants};
pub(crate) use usage::{ACTIVE_EXPERIMENTS, check_metric};
pub use usage::{ConsumeOutcome, LimitPeriod, NewUsage, Quota, Usage, UsageDay, UsageOutcome, UsagePeriod};
pub use users::{ErasedCounts, Erasure, MergePolicy, UserMerge, Users};
pub use variants::{BookPrice, PriceBook, Variant, Variants};
pub use views::{NewView, ViewOutcome, Views};
pub use webhooks::{WebhookEvent, WebhookOutcome, WebhookStatus, Webhooks};

use crate::scope::{Statement, TenantScope};

/// All statements of all repositories.
pub(crate) fn statements() -> impl Iterator<Item = &'static Statement> {
    [
        tenants::STATEMENTS,
        experiments::STATEMENTS,
        experiments::LIFE_STATEMENTS,
        experiments::LIVE_STATEMENTS,
        experiments::CONFIG_STATEMENTS,
        assignments::STATEMENTS,
        views::STATEMENTS,
        conversions::STATEMENTS,
        conversions::RECONCILE_STATEMENTS,
        usage::STATEMENTS,
        usage::QUOTA_STATEMENTS,
        users::STATEMENTS,
        recommendations::STATEMENTS,
        recommendations::LIFE_STATEMENTS,
        recommendations::FOLLOW_UP_STATEMENTS,
        webhooks::STATEMENTS,
        audit_trail::STATEMENTS,
        metrics::STATEMENTS,
        metrics::RESULTS_STATEMENTS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

impl TenantScope<'_> {
    /// The tenant itself.
    #[must_use]
    pub fn tenants(&self) -> Tenants<'_> {
        Tenants::new(self)
    }

    /// The tenant's experiments.
    #[must_use]
    pub fn experiments(&self) -> Experiments<'_> {
        Experiments::new(self)
    }

    /// Who was promised which price.
    #[must_use]
    pub fn assignments(&self) -> Assignments<'_> {
        Assignments::new(self)
    }

    /// Who saw a price.
    #[must_use]
    pub fn views(&self) -> Views<'_> {
        Views::new(self)
    }

    /// The ledger of what was paid.
    #[must_use]
    pub fn conversions(&self) -> Conversions<'_> {
        Conversions::new(self)
    }

    /// What the tenant used, by metric and day.
    #[must_use]
    pub fn usage(&self) -> Usage<'_> {
        Usage::new(self)
    }

    /// Users as persons: who is one by two ids, and who is forgotten.
    #[must_use]
    pub fn users(&self) -> Users<'_> {
        Users::new(self)
    }

    /// Recommended prices, and what becomes of them.
    #[must_use]
    pub fn recommendations(&self) -> Recommendations<'_> {
        Recommendations::new(self)
    }

    /// Verified webhooks, and what became of them.
    #[must_use]
    pub fn webhooks(&self) -> Webhooks<'_> {
        Webhooks::new(self)
    }

    /// Who changed what.
    #[must_use]
    pub fn audit_trail(&self) -> AuditTrail<'_> {
        AuditTrail::new(self)
    }

    /// Exact numbers, live.
    #[must_use]
    pub fn metrics(&self) -> Metrics<'_> {
        Metrics::new(self)
    }
}
