use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Admin, Param, column};
use crate::error::{Error, Result};
use crate::id::TenantId;
use crate::repo::{ACTIVE_EXPERIMENTS, LimitPeriod, Plan, check_metric};

/// What a plan or a tenant is allowed of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UsageLimit {
    /// What is limited.
    pub metric: String,
    /// For how long.
    pub period: LimitPeriod,
    /// How much is allowed in a period; `None` is unlimited.
    pub limit: Option<u64>,
    /// Who says so.
    pub source: LimitSource,
}

/// Where a limit is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LimitSource {
    /// Built in, for the plan.
    BuiltIn,
    /// [Set for the plan](AdminLimits::set_plan).
    Plan,
    /// [Set for the tenant](AdminLimits::set_tenant).
    Tenant,
}

/// What plans and tenants may use. A tenant's own limit goes before that of its plan, and what is set here before what is built
/// in:
///
/// | | `active_experiments` | `signals` a month | `api_calls` a month |
/// |---|--:|--:|--:|
/// | free | 10 | 10,000 | 10,000 |
/// | starter | 25 | 100,000 | 100,000 |
/// | pro | 100 | 1,000,000 | 1,000,000 |
/// | enterprise | unlimited | unlimited | unlimited |
///
/// What no limit names is unlimited. Of these only `active_experiments` is enforced by the library
/// ([`activate`](crate::Experiments::activate)): no user goes without a price, and no sale unrecorded, for a limit of `signals`. What
/// is to be refused is the host's to ask: [`check_quota`](crate::Usage::check_quota), [`try_consume`](crate::Usage::try_consume).
///
/// A change counts for what is asked after it, with what was used before. A tenant's own limits are in its
/// [audit trail](crate::AuditTrail); those of plans are nobody's, and who set which is for the host to write down.
#[derive(Debug, Clone, Copy)]
pub struct AdminLimits<'a> {
    admin: &'a Admin,
}

impl<'a> AdminLimits<'a> {
    pub(super) fn new(admin: &'a Admin) -> Self {
        AdminLimits { admin }
    }

    /// What a plan allows, by metric: what was set, and what is built in.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// for limit in admin.limits().of_plan(lastprice::Plan::Pro).await? {
    ///     println!("{}: {:?} a {}", limit.metric, limit.limit, limit.period);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn of_plan(self, plan: Plan) -> Result<Vec<UsageLimit>> {
        self.of(OF_PLAN, (&plan.as_str(), Type::TEXT)).await
    }

    /// What a tenant is allowed now, by metric: its own limits, and those of its plan.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, acme: lastprice::TenantId) -> lastprice::Result<()> {
    /// for limit in admin.limits().of_tenant(acme).await? {
    ///     println!("{}: {:?} a {}, from {:?}", limit.metric, limit.limit, limit.period, limit.source);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn of_tenant(self, tenant: TenantId) -> Result<Vec<UsageLimit>> {
        self.of(OF_TENANT, (&tenant.uuid(), Type::UUID)).await
    }

    /// Sets what a plan allows of a metric in a period, for all its tenants; `None` is unlimited.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// use lastprice::{LimitPeriod, Plan};
    /// admin.limits().set_plan(Plan::Free, "exports", LimitPeriod::Day, Some(5)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric or the limit, or for a period of `active_experiments` that is
    /// not [`Ever`](LimitPeriod::Ever).
    pub async fn set_plan(
        self,
        plan: Plan,
        metric: &str,
        period: LimitPeriod,
        limit: Option<u64>,
    ) -> Result<()> {
        self.set(SET_PLAN, (&plan.as_str(), Type::TEXT), metric, period, limit).await.map(drop)
    }

    /// Lets what is built in count again for a plan's metric. Returns whether anything else had been set.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// let was_set = admin.limits().clear_plan(lastprice::Plan::Free, "exports").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric.
    pub async fn clear_plan(self, plan: Plan, metric: &str) -> Result<bool> {
        check_metric(metric)?;
        let of: [Param<'_>; 2] = [(&plan.as_str(), Type::TEXT), (&metric, Type::TEXT)];
        Ok(!self.admin.query(None, CLEAR_PLAN, &of).await?.is_empty())
    }

    /// Sets what one tenant is allowed of a metric in a period, whatever its plan says; `None` is unlimited.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, acme: lastprice::TenantId) -> lastprice::Result<()> {
    /// use lastprice::LimitPeriod;
    /// admin.limits().set_tenant(acme, "active_experiments", LimitPeriod::Ever, Some(50)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric or the limit, or for a period of `active_experiments` that is
    /// not [`Ever`](LimitPeriod::Ever),
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn set_tenant(
        self,
        tenant: TenantId,
        metric: &str,
        period: LimitPeriod,
        limit: Option<u64>,
    ) -> Result<()> {
        match self.set(SET_TENANT, (&tenant.uuid(), Type::UUID), metric, period, limit).await? {
            true => Ok(()),
            false => Err(Error::not_found("tenant")),
        }
    }

    /// Lets the plan count again for a tenant's metric. Returns whether the tenant had a limit of its own.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, acme: lastprice::TenantId) -> lastprice::Result<()> {
    /// let had_one = admin.limits().clear_tenant(acme, "active_experiments").await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the metric.
    pub async fn clear_tenant(self, tenant: TenantId, metric: &str) -> Result<bool> {
        check_metric(metric)?;
        let of: [Param<'_>; 2] = [(&tenant.uuid(), Type::UUID), (&metric, Type::TEXT)];
        Ok(!self.admin.query(None, CLEAR_TENANT, &of).await?.is_empty())
    }

    /// Sets the day of each month, 1 to 28 (UTC), with which a tenant's billing period begins. By default it is the first.
    ///
    /// It counts at once, and nothing of it is remembered: what was used is added up by the new day, now and in the past. In the
    /// middle of a period that may begin another one, in which a spent quota is there anew, or lengthen it by days that were in
    /// the one before; and [`in_period`](crate::Usage::in_period) of days that were billed has the new period's days and sum. So
    /// change it with the first day of a period, or keep what was billed.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, acme: lastprice::TenantId) -> lastprice::Result<()> {
    /// admin.limits().set_billing_day(acme, 15).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the day,
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    pub async fn set_billing_day(self, tenant: TenantId, day: u32) -> Result<()> {
        let billing_day = i32::try_from(day).ok().filter(|day| (1..=28).contains(day));
        let billing_day = billing_day
            .ok_or_else(|| Error::invalid("day", "is not between 1 and 28, which every month has"))?;
        let of: [Param<'_>; 2] = [(&tenant.uuid(), Type::UUID), (&billing_day, Type::INT4)];
        match self.admin.query(None, SET_BILLING_DAY, &of).await?.is_empty() {
            false => Ok(()),
            true => Err(Error::not_found("tenant")),
        }
    }

    async fn of(self, sql: &str, whose: Param<'_>) -> Result<Vec<UsageLimit>> {
        let rows = self.admin.query(None, sql, &[whose]).await?;
        if rows.is_empty() {
            return Err(Error::not_found("tenant"));
        }
        let limit = |row: &Row| {
            let Some(metric) = column(row, "metric")? else { return Ok(None) };
            Ok(Some(UsageLimit {
                metric,
                period: LimitPeriod::stored(&column::<String>(row, "period")?)?,
                limit: column::<Option<i64>>(row, "quota")?.map(i64::unsigned_abs),
                source: match column(row, "source")? {
                    0 => LimitSource::Tenant,
                    1 => LimitSource::Plan,
                    _ => LimitSource::BuiltIn,
                },
            }))
        };
        rows.iter().filter_map(|row| limit(row).transpose()).collect()
    }

    /// Whether whose it is was there.
    async fn set(
        self,
        sql: &str,
        whose: Param<'_>,
        metric: &str,
        period: LimitPeriod,
        limit: Option<u64>,
    ) -> Result<bool> {
        check_metric(metric)?;
        if metric == ACTIVE_EXPERIMENTS && period != LimitPeriod::Ever {
            return Err(Error::invalid(
                "period",
                "is not `ever`: how many experiments are active now is no use of a period",
            ));
        }
        let too_much = |_| Error::invalid("limit", "is more than 2^63 - 1: use none for unlimited");
        let quota = limit.map(i64::try_from).transpose().map_err(too_much)?;
        let params: [Param<'_>; 4] =
            [whose, (&metric, Type::TEXT), (&period.as_str(), Type::TEXT), (&quota, Type::INT8)];
        Ok(!self.admin.query(None, sql, &params).await?.is_empty())
    }
}

/// A row at least for who is there, without a metric if nothing is limited.
macro_rules! limits {
    ($whose:literal, $own:literal) => {
        concat!(
            "WITH whose AS (",
            $whose,
            ") SELECT DISTINCT ON (l.metric) l.metric, l.period, l.quota, l.source FROM whose LEFT JOIN LATERAL (",
            $own,
            "SELECT p.metric, p.period, p.quota, 1 AS source FROM {s}.plan_limits p WHERE p.plan = whose.plan
       UNION ALL SELECT d.metric, d.period, d.quota, 2 FROM {s}.default_plan_limits() d WHERE d.plan = whose.plan
     ) l ON true ORDER BY l.metric, l.source"
        )
    };
}

const OF_PLAN: &str = limits!("SELECT $1 AS plan", "");
const OF_TENANT: &str = limits!(
    "SELECT t.plan FROM {s}.tenants t WHERE t.id = $1",
    "SELECT o.metric, o.period, o.quota, 0 AS source FROM {s}.tenant_limits o WHERE o.tenant_id = $1 UNION ALL "
);
const SET_PLAN: &str = "
    INSERT INTO {s}.plan_limits (plan, metric, period, quota) VALUES ($1, $2, $3, $4)
    ON CONFLICT (plan, metric) DO UPDATE SET period = excluded.period, quota = excluded.quota RETURNING metric";
const CLEAR_PLAN: &str = "DELETE FROM {s}.plan_limits WHERE plan = $1 AND metric = $2 RETURNING metric";
const SET_TENANT: &str = "
    INSERT INTO {s}.tenant_limits (tenant_id, metric, period, quota) SELECT t.id, $2, $3, $4 FROM {s}.tenants t WHERE t.id = $1
    ON CONFLICT (tenant_id, metric) DO UPDATE SET period = excluded.period, quota = excluded.quota RETURNING metric";
const CLEAR_TENANT: &str =
    "DELETE FROM {s}.tenant_limits WHERE tenant_id = $1 AND metric = $2 RETURNING metric";
const SET_BILLING_DAY: &str = "UPDATE {s}.tenants SET billing_day = $2 WHERE id = $1 RETURNING id";
