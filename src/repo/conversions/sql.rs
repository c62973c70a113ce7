//! The statements of the ledger.

use tokio_postgres::types::Type;

use crate::scope::Statement;

pub(crate) const STATEMENTS: &[&Statement] = &[
    &OPEN,
    &OPEN_OUTSIDE,
    &FOLLOW,
    &BY_KEYS,
    &WAITING_KEYS,
    &LOCKED_PRICE,
    &LEFT,
    &BY_USER,
    &BY_ORDER,
    &BY_SUBSCRIPTION,
];

macro_rules! columns {
    () => {
        "id, experiment_id, user_id, variant, reason, kind, revenue, currency, item, list_price, quantity, discount, proration, \
         tax, settled, quote_mismatch, flags, order_id, subscription_id, period, sale_id, idempotency_key, occurred_at, metadata"
    };
}

/// The names of the columns that all entries have, `Columns` their values, and `types` their types.
macro_rules! given {
    () => {
        "id, kind, experiment_id, revenue, currency, item, list_price, quantity, discount, proration, tax, order_id, \
         subscription_id, idempotency_key, occurred_at, metadata"
    };
}

/// Of the tenant, of whether it is settled, of the columns that all entries have, and of what a statement takes besides.
macro_rules! types {
    ($($more:expr),*) => {
        &[
            Type::UUID,
            Type::BOOL,
            Type::UUID_ARRAY,
            Type::TEXT_ARRAY,
            Type::UUID_ARRAY,
            Type::NUMERIC_ARRAY,
            Type::TEXT_ARRAY,
            Type::TEXT_ARRAY,
            Type::NUMERIC_ARRAY,
            Type::INT4_ARRAY,
            Type::NUMERIC_ARRAY,
            Type::NUMERIC_ARRAY,
            Type::NUMERIC_ARRAY,
            Type::TEXT_ARRAY,
            Type::TEXT_ARRAY,
            Type::TEXT_ARRAY,
            Type::TIMESTAMPTZ_ARRAY,
            Type::JSONB_ARRAY,
            $($more),*
        ]
    };
}

// A sale or the start of a trial, by whoever the user is by now: `a` is the quote, and what does not agree with it is flagged, or not
// written if it is not settled ($2); what does not agree where the quotes are gone (archived) cannot be told, and its list price is what
// was paid. In the order in which the database locks subscriptions and orders, then of the keys: two batches with the same ones wait for
// each other in one order. Of one key's entries the first is written, and none if something waits under it.
macro_rules! open {
    ($more:literal, $quote:literal, $is_gone:literal) => {
        concat!(
            "INSERT INTO {s}.conversions (tenant_id, id, experiment_id, user_id, variant, phase, reason, assigned_at, kind, revenue, currency,
                item, list_price, quantity, discount, proration, tax, settled, quote_mismatch, flags, order_id, subscription_id,
                idempotency_key, occurred_at, metadata)
             SELECT a.tenant_id, x.id, a.experiment_id, COALESCE(a.merged_into, a.user_id), a.variant, a.phase, a.reason, a.assigned_at, x.kind, x.revenue,
                COALESCE(x.currency, a.currency), x.item, COALESCE(x.list_price, CASE WHEN u.is_unknown
                  THEN GREATEST(round((x.revenue + x.discount - x.proration) / x.quantity, 6), 0) ELSE q.quoted END),
                x.quantity, x.discount, x.proration, x.tax, $2,
                CASE WHEN x.kind = 'sale' AND NOT u.is_unknown THEN l.broken <> '{}' END,
                CASE WHEN u.is_unknown THEN '{}' ELSE l.broken END, x.order_id, x.subscription_id,
                x.idempotency_key, x.occurred_at, x.metadata
             FROM unnest($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19",
            $more,
            ") WITH ORDINALITY AS x (",
            given!(),
            ", user_id",
            $quote,
            " CROSS JOIN LATERAL (
                SELECT {s}.quoted_price(a.price, a.currency, a.book, x.item, COALESCE(x.currency, a.currency)) AS quoted) q
              CROSS JOIN LATERAL (
                SELECT CASE x.kind WHEN 'sale' THEN {s}.broken_price_rules(x.list_price, q.quoted, x.quantity, x.discount,
                  x.proration, x.revenue, CASE WHEN $2 THEN x.occurred_at ELSE clock_timestamp() END > a.valid_until) ELSE '{}' END AS broken) l
              CROSS JOIN LATERAL (SELECT $2 AND l.broken <> '{}' AND ",
            $is_gone,
            " AS is_unknown) u
             WHERE ($2 OR l.broken = '{}') AND (SELECT w.id FROM {s}.waiting_conversions w
               WHERE w.tenant_id = $1 AND w.idempotency_key = x.idempotency_key LIMIT 1) IS NULL
             ORDER BY x.subscription_id, x.order_id, x.idempotency_key, x.n
             ON CONFLICT DO NOTHING RETURNING ",
            columns!()
        )
    };
}

// Whoever merges or erases the user at this moment waits, or is seen: the entry is that of who the user is by then. But not of testers
// who are shown something else than their quote. LIMIT keeps it at one look-up per entry, here and below, whatever the planner knows.
pub(super) static OPEN: Statement = Statement::write(
    "conversions.open",
    open!(
        "",
        ", n) CROSS JOIN LATERAL (
            SELECT * FROM {s}.assignments a WHERE a.tenant_id = $1 AND a.experiment_id = x.experiment_id AND a.user_id = x.user_id
              AND a.variant = COALESCE((SELECT e.forced ->> x.user_id FROM {s}.experiments e
                                        WHERE e.tenant_id = $1 AND e.id = x.experiment_id), a.variant)
            LIMIT 1 FOR KEY SHARE) a",
        "false"
    ),
    types!(Type::TEXT_ARRAY),
);

// Of users who are in no experiment, at the price that they were shown.
pub(super) static OPEN_OUTSIDE: Statement = Statement::write(
    "conversions.open_outside",
    open!(
        ", $20, $21",
        ", variant, reason, n) CROSS JOIN LATERAL (
            SELECT e.tenant_id, e.id AS experiment_id, x.user_id, x.variant, e.phase, x.reason, (v ->> 'price')::numeric AS price,
                   e.currency, COALESCE(v -> 'prices', '[]') AS book, NULL::timestamptz AS valid_until, NULL::timestamptz AS assigned_at, NULL::text AS merged_into
            FROM (SELECT * FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = x.experiment_id LIMIT 1) e
            CROSS JOIN LATERAL jsonb_array_elements(e.variants) v WHERE v ->> 'name' = x.variant) a",
        "(SELECT r.began_at FROM {s}.archived_experiments r
          WHERE r.tenant_id = $1 AND r.experiment_id = a.experiment_id LIMIT 1) IS NOT NULL"
    ),
    types!(Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY),
);

// Who and what is filled in by the database, from what they belong to. From the tenant: one that is not there has no rows.
// In the order in which the database locks subscriptions and orders; a chargeback before its reversal.
pub(super) static FOLLOW: Statement = Statement::write(
    "conversions.follow",
    concat!(
        "INSERT INTO {s}.conversions (tenant_id, settled, ",
        given!(),
        ", period)
         SELECT t.id, $2, x.id, x.kind, x.experiment_id, x.revenue, x.currency, x.item, x.list_price, x.quantity, x.discount,
            x.proration, x.tax, x.order_id, x.subscription_id, x.idempotency_key, x.occurred_at, x.metadata, x.period
         FROM unnest($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19) WITH ORDINALITY AS x (",
        given!(),
        ", period, n)
         JOIN {s}.tenants t ON t.id = $1
         ORDER BY x.subscription_id, x.order_id, array_position('{chargeback,refund,chargeback_reversal}', x.kind),
                  x.idempotency_key, x.n
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    types!(Type::TEXT_ARRAY),
);

pub(super) static BY_KEYS: Statement = Statement::read(
    "conversions.by_keys",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.conversions WHERE tenant_id = $1 AND idempotency_key = ANY ($2)"
    ),
    &[Type::UUID, Type::TEXT_ARRAY],
);

pub(super) static WAITING_KEYS: Statement = Statement::read(
    "conversions.waiting_keys",
    "SELECT w.* FROM unnest($2) AS k (key) CROSS JOIN LATERAL (
       SELECT w.idempotency_key, w.kind, e.experiment_id, e.revenue, e.currency, e.item, e.list_price, e.quantity, e.discount,
              e.proration, e.tax, e.order_id, e.subscription_id, e.period
       FROM {s}.waiting_conversions w CROSS JOIN LATERAL jsonb_populate_record(NULL::{s}.conversions, w.entry) e
       WHERE w.tenant_id = $1 AND w.idempotency_key = k.key LIMIT 1) w",
    &[Type::UUID, Type::TEXT_ARRAY],
);

// What a subscription is locked at, and whether the period is paid.
pub(super) static LOCKED_PRICE: Statement = Statement::read(
    "conversions.locked_price",
    "SELECT c.list_price AS price, c.currency, EXISTS (
       SELECT FROM {s}.conversions r
       WHERE r.tenant_id = $1 AND r.subscription_id = $2 AND r.kind = 'renewal' AND r.period = $3) AS is_paid
     FROM {s}.conversions c WHERE c.tenant_id = $1 AND c.subscription_id = $2 AND c.kind = 'sale'
     ORDER BY c.occurred_at <= $4 DESC, c.occurred_at DESC, c.id DESC LIMIT 1",
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TIMESTAMPTZ],
);

// What may still go back of the sales and renewals of an order, and come back of its chargebacks; the largest first.
pub(super) static LEFT: Statement = Statement::read(
    "conversions.left",
    "SELECT c.currency, c.revenue + b.back AS left_of_sale, -b.banked AS left_of_chargeback
     FROM {s}.conversions c CROSS JOIN LATERAL (
       SELECT COALESCE(sum(b.revenue), 0) AS back, COALESCE(sum(b.revenue) FILTER (WHERE b.kind <> 'refund'), 0) AS banked
       FROM {s}.conversions b
       WHERE b.tenant_id = $1 AND b.sale_id = c.id AND b.currency = c.currency AND b.kind <> 'renewal') b
     WHERE c.tenant_id = $1 AND c.order_id = $2 AND c.kind IN ('sale', 'renewal')
       AND c.experiment_id = COALESCE($3, c.experiment_id)
     ORDER BY c.currency = $4 DESC, CASE WHEN $5 THEN -b.banked ELSE c.revenue + b.back END DESC, c.id LIMIT 1",
    &[Type::UUID, Type::TEXT, Type::UUID, Type::TEXT, Type::BOOL],
);

macro_rules! list {
    ($name:literal, $column:literal) => {
        Statement::read(
            $name,
            concat!(
                "SELECT ",
                columns!(),
                " FROM {s}.conversions WHERE tenant_id = $1 AND ",
                $column,
                " = $2 AND id >= $3 ORDER BY tenant_id, ",
                $column,
                ", id LIMIT $4"
            ),
            &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
        )
    };
}

pub(super) static BY_USER: Statement = list!("conversions.list_by_user", "user_id");
pub(super) static BY_ORDER: Statement = list!("conversions.list_by_order", "order_id");
pub(super) static BY_SUBSCRIPTION: Statement = list!("conversions.list_by_subscription", "subscription_id");
