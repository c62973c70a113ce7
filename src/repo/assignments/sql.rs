//! The statements of [`Assignments`](super::Assignments).

use tokio_postgres::types::Type;

use crate::repo::experiments::decider_columns;
use crate::scope::Statement;

macro_rules! columns {
    () => {
        "experiment_id, user_id, variant, price, currency AS quote_currency, book, phase AS quote_phase, \
         reason, assigned_at, valid_until"
    };
}

pub(in crate::repo) const STATEMENTS: &[&Statement] = &[&READ, &INSERT, &RENEW, &GET, &LIST_BY_USER];

// The experiment, once per stored quote of these users, or once without any; its variants and list with the first row
// only. LIMIT keeps it at one look-up per user: as a plain join, a plan made for an average experiment reads all quotes
// of this one.
pub(super) static READ: Statement = Statement::read(
    "assignments.read",
    concat!(
        "SELECT ",
        decider_columns!(
            "CASE WHEN row_number() OVER () = 1 THEN e.variants END AS variants,
             CASE WHEN row_number() OVER () = 1 THEN e.forced END AS forced"
        ),
        ", a.experiment_id, a.user_id, a.variant, a.price, a.currency AS quote_currency, a.book,
            a.phase AS quote_phase, a.reason, a.assigned_at, a.valid_until,
            COALESCE(a.valid_until < now() + e.quote_validity * interval '0.5 second', a.valid_until IS NOT NULL) AS runs_out
     FROM {s}.experiments e
     JOIN {s}.tenants t ON t.id = $1
     LEFT JOIN LATERAL (
       SELECT a.* FROM unnest($3, $4) AS x (user_id, account_id) CROSS JOIN LATERAL (
         SELECT * FROM {s}.assignments a
         WHERE a.tenant_id = $1 AND a.experiment_id = $2
           AND a.user_id = CASE e.unit WHEN 'account' THEN x.account_id ELSE x.user_id END LIMIT 1) a) a ON true
     WHERE e.tenant_id = $1 AND e.id = $2"
    ),
    &[Type::UUID, Type::UUID, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
);

// The row is the quote: prices are copied from the configuration by the database itself.
pub(super) static INSERT: Statement = Statement::write(
    "assignments.insert",
    concat!(
        "INSERT INTO {s}.assignments (tenant_id, experiment_id, user_id, variant, price, currency, book, phase, reason, assigned_at, valid_until)
         SELECT e.tenant_id, e.id, x.user_id, e.variants -> x.variant ->> 'name',
                CASE WHEN scale(p.price) > 6 THEN round(p.price, 6) ELSE p.price END, e.currency,
                COALESCE(e.variants -> x.variant -> 'prices', '[]'), e.phase, x.reason,
                LEAST(x.shown_at, now()), now() + e.quote_validity * interval '1 second'
         FROM {s}.experiments e, unnest($4, $5, $6, $7) AS x (user_id, variant, reason, shown_at),
              LATERAL (SELECT (e.variants -> x.variant ->> 'price')::numeric AS price) p
         WHERE e.tenant_id = $1 AND e.id = $2 AND e.status = 'active' AND e.phase = $3
         ORDER BY x.user_id
         ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::UUID, Type::INT4, Type::TEXT_ARRAY, Type::INT4_ARRAY, Type::TEXT_ARRAY, Type::TIMESTAMPTZ_ARRAY],
);

// Never for a shorter time than before: by a transaction that began earlier, say. Without a validity, for ever. As one value of the
// experiment's: Citus allows no clock beside a column otherwise.
pub(super) static RENEW: Statement = Statement::write(
    "assignments.renew",
        "UPDATE {s}.assignments a SET valid_until =
           (SELECT CASE WHEN e.quote_validity IS NOT NULL THEN GREATEST(a.valid_until, now() + e.quote_validity * interval '1 second') END
            FROM {s}.experiments e WHERE e.tenant_id = $1 AND e.id = $2)
         WHERE a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id = $3
           AND a.valid_until IS NOT NULL
         RETURNING a.experiment_id, a.user_id, a.variant, a.price, a.currency AS quote_currency, a.book,
                   a.phase AS quote_phase, a.reason, a.assigned_at, a.valid_until",
    &[Type::UUID, Type::UUID, Type::TEXT],
);

pub(super) static GET: Statement = Statement::read(
    "assignments.get",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.assignments WHERE tenant_id = $1 AND experiment_id = $2 AND user_id = $3"
    ),
    &[Type::UUID, Type::UUID, Type::TEXT],
);

pub(super) static LIST_BY_USER: Statement = Statement::read(
    "assignments.list_by_user",
    concat!(
        "SELECT ",
        columns!(),
        " FROM {s}.assignments WHERE tenant_id = $1 AND user_id = $2 AND experiment_id >= $3
         ORDER BY tenant_id, user_id, experiment_id LIMIT $4"
    ),
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);
