//! The statements of results.

use tokio_postgres::types::Type;

use crate::scope::Statement;

pub(in crate::repo::metrics) const STATEMENTS: &[&Statement] =
    &[&SETUP, &COUNTS, &COHORTS, &TOTALS, &RECENT_VIEWS];

pub(super) static SETUP: Statement = Statement::report(
    "results.setup",
    concat!(
        "SELECT ",
        crate::repo::experiments::columns!(),
        ", past_phases, now() AS as_of FROM {s}.experiments WHERE tenant_id = $1 AND id = $2"
    ),
    &[Type::UUID, Type::UUID],
);

pub(super) static COUNTS: Statement = Statement::report(
    "results.counts",
    "SELECT phase, variant, reason, currency, sum(assignments)::bigint AS assignments, sum(views)::bigint AS views,
            sum(conversions)::bigint AS conversions, sum(renewals)::bigint AS renewals, sum(refunds)::bigint AS refunds,
            sum(revenue) AS revenue, sum(pending)::bigint AS pending
     FROM (SELECT phase, variant, reason, currency, assignments, views, conversions, renewals, refunds, revenue, 0 AS pending
           FROM {s}.metric_totals WHERE tenant_id = $1 AND experiment_id = $2
           UNION ALL
           SELECT phase, variant, reason, currency, assignments, views, conversions, renewals, refunds, revenue, 1
           FROM {s}.metric_deltas WHERE tenant_id = $1 AND experiment_id = $2) live
     GROUP BY phase, variant, reason, currency",
    &[Type::UUID, Type::UUID],
);

// What each user brought within the window, by the parameters of the cohorts: the WITH of two statements.
macro_rules! by_user {
    () => {
        "WITH plan AS (
       SELECT make_interval(hours => $3) AS window_length, $4[1] AS currency, $8 <> 0 OR cardinality($6) > 0 AS has_costs
     ), ledger AS (
       SELECT c.user_id, c.phase, c.variant, c.kind, c.quote_mismatch, c.assigned_at,
              c.occurred_at < c.assigned_at + (SELECT window_length FROM plan) AS counts,
              CASE WHEN c.currency = (SELECT currency FROM plan) THEN c.revenue
                   ELSE c.revenue * $5[array_position($4, c.currency)] END AS revenue,
              CASE WHEN (SELECT has_costs FROM plan) AND c.kind IN ('sale', 'renewal')
                   THEN c.quantity * COALESCE($7[array_position($6, c.item)], $8) END AS cost
       FROM {s}.conversions c
       WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.reason = 'randomised' ORDER BY c.user_id
     ), by_user AS (
       SELECT min(phase) AS phase, min(variant COLLATE \"C\") AS variant, max(variant COLLATE \"C\") AS other,
              (min(assigned_at) AT TIME ZONE interval '0')::date AS day,
              sum(CASE WHEN cost IS NULL THEN revenue ELSE revenue - cost END) FILTER (WHERE counts) AS total,
              sum(revenue) FILTER (WHERE (SELECT has_costs FROM plan) AND counts) AS revenue,
              count(*) FILTER (WHERE counts AND kind = 'sale') AS sales,
              count(*) FILTER (WHERE counts AND kind = 'renewal') AS renewals,
              count(*) FILTER (WHERE counts AND kind IN ('refund', 'chargeback')) AS refunds,
              count(*) FILTER (WHERE counts AND kind = 'chargeback_reversal') AS reversals,
              count(*) FILTER (WHERE quote_mismatch) AS mismatches, count(*) FILTER (WHERE revenue IS NULL) AS unconverted
       FROM ledger GROUP BY user_id
     )"
    };
}

// By user first: what counts is what a user brought. Users who brought nothing are known by how many were assigned that day, so
// that nothing reads one row for each of them; where assignments were removed by hand, buyers are users nevertheless. Hours, since a day of an interval may be one of 23 hours. Sums are exact until
// the end: in whatever order entries came, the numbers are the same.
//
// What it costs is what is done for each entry and buyer, so: entries come out of the index in the order of users, and nothing is
// sorted or kept (ORDER BY also keeps what is made of an entry from being made for each use of it); what is the same for all is
// looked up once (plan); most entries are in the experiment's own currency, and most plans know no cost. UTC is an interval,
// since the name of a time zone is looked up each time.
pub(super) static COHORTS: Statement = Statement::report(
    "results.cohorts",
    concat!(
        by_user!(),
        ", brought AS (
       SELECT phase, variant COLLATE \"default\" AS variant, day, sum(total) AS total, sum(total * total) AS squares,
              CASE WHEN (SELECT has_costs FROM plan) THEN sum(revenue) ELSE sum(total) END AS revenue,
              count(*) FILTER (WHERE sales > 0) AS buyers, count(*) FILTER (WHERE sales > 0 AND refunds > reversals) AS refunded, count(*) AS known,
              sum(sales) AS sales, sum(renewals) AS renewals, sum(refunds) AS refunds, sum(mismatches) AS mismatches,
              sum(unconverted) AS unconverted, count(*) FILTER (WHERE variant <> other) AS crossed
       FROM by_user GROUP BY phase, variant, day
     ), assigned AS (
       SELECT phase, variant, day, sum(assignments) AS users
       FROM (SELECT phase, variant, day, assignments FROM {s}.metric_totals
             WHERE tenant_id = $1 AND experiment_id = $2 AND reason = 'randomised' AND currency = 'XXX'
             UNION ALL
             SELECT phase, variant, day, assignments FROM {s}.metric_deltas
             WHERE tenant_id = $1 AND experiment_id = $2 AND reason = 'randomised' AND currency = 'XXX') live
       GROUP BY phase, variant, day HAVING sum(assignments) > 0
     )
     SELECT phase, variant, day, (day + 1)::timestamp AT TIME ZONE 'UTC' + make_interval(hours => $3) <= now() AS is_mature,
            GREATEST(users, known)::bigint AS users, COALESCE(total, 0)::float8 AS total, COALESCE(squares, 0)::float8 AS squares,
            COALESCE(revenue, 0)::float8 AS revenue, COALESCE(buyers, 0) AS buyers, COALESCE(refunded, 0) AS refunded,
            COALESCE(sales, 0)::bigint AS sales, COALESCE(renewals, 0)::bigint AS renewals, COALESCE(refunds, 0)::bigint AS refunds,
            COALESCE(mismatches, 0)::bigint AS mismatches, COALESCE(unconverted, 0)::bigint AS unconverted,
            COALESCE(crossed, 0) AS crossed
     FROM assigned LEFT JOIN brought USING (phase, variant, day)
     ORDER BY day, phase, variant"
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::INT4,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::NUMERIC,
    ],
);

// Each buyer's own, which sums do not tell; until the last day whose window was over for the cohorts.
pub(super) static TOTALS: Statement = Statement::report(
    "results.totals",
    concat!(
        by_user!(),
        " SELECT phase, variant COLLATE \"default\" AS variant, array_agg(total::float8) AS totals
     FROM by_user WHERE total <> 0 AND day <= $9 GROUP BY phase, variant"
    ),
    &[
        Type::UUID,
        Type::UUID,
        Type::INT4,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::TEXT_ARRAY,
        Type::NUMERIC_ARRAY,
        Type::NUMERIC,
        Type::DATE,
    ],
);

// Who looked lately; what is archived keeps it.
macro_rules! recent_views {
    () => {
        "SELECT COALESCE(sum(n), 0)::bigint AS views, count(*) AS viewers, count(*) FILTER (WHERE n > $3) AS suspects,
            COALESCE(sum(n) FILTER (WHERE n > $3), 0)::bigint AS views_of_suspects
     FROM (SELECT user_id, count(*) AS n
           FROM (SELECT user_id, reason FROM {s}.views WHERE tenant_id = $1 AND experiment_id = $2
                 ORDER BY tenant_id DESC, experiment_id DESC, occurred_at DESC LIMIT 10000) newest
           WHERE reason = 'randomised' GROUP BY user_id) by_user"
    };
}
pub(crate) use recent_views;

// The newest only: what it costs does not grow. As they were, where they were archived.
pub(super) static RECENT_VIEWS: Statement = Statement::report(
    "results.recent_views",
    concat!(
        "SELECT views, viewers, suspects, views_of_suspects
     FROM {s}.archived_experiments WHERE tenant_id = $1 AND experiment_id = $2
     UNION ALL ",
        recent_views!(),
        " HAVING NOT EXISTS (SELECT FROM {s}.archived_experiments WHERE tenant_id = $1 AND experiment_id = $2)"
    ),
    &[Type::UUID, Type::UUID, Type::INT8],
);
