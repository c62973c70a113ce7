use tokio_postgres::types::Type;

use crate::scope::Statement;

pub(in crate::repo) const STATEMENTS: &[&Statement] =
    &[&STORE, &LOCK, &MARK, &REOPEN, &DISCARD, &STATUS, &PENDING, &LIST];

pub(super) static STORE: Statement = Statement::write(
    "webhooks.store",
    "INSERT INTO {s}.webhook_events (tenant_id, id, seq, type, body, body_hash, received_at)
     SELECT t.id, $2, $3, $4, $5, $6, $7 FROM {s}.tenants t WHERE t.id = $1
     ON CONFLICT (tenant_id, id) DO NOTHING RETURNING id",
    &[Type::UUID, Type::TEXT, Type::UUID, Type::TEXT, Type::BYTEA, Type::BYTEA, Type::TIMESTAMPTZ],
);

/// Whoever else has the same delivery waits here until we are done with it.
pub(super) static LOCK: Statement = Statement::write(
    "webhooks.lock",
    "SELECT body, body_hash, received_at, status FROM {s}.webhook_events WHERE tenant_id = $1 AND id = $2 FOR UPDATE",
    &[Type::UUID, Type::TEXT],
);

pub(super) static MARK: Statement = Statement::write(
    "webhooks.mark",
    "UPDATE {s}.webhook_events
     SET status = $3, what = $4, idempotency_key = $5, attempts = LEAST(attempts, 2147483646) + 1,
         processed_at = now() + CASE WHEN $3 <> 'pending' THEN interval '0' END
     WHERE tenant_id = $1 AND id = $2 AND status = 'pending' RETURNING id",
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT],
);

pub(super) static REOPEN: Statement = Statement::write(
    "webhooks.reopen",
    "UPDATE {s}.webhook_events SET status = 'pending', what = NULL, processed_at = NULL
     WHERE tenant_id = $1 AND id = $2 AND status IN ('failed', 'ignored') RETURNING id",
    &[Type::UUID, Type::TEXT],
);

pub(super) static DISCARD: Statement = Statement::write(
    "webhooks.discard",
    "UPDATE {s}.webhook_events SET status = 'ignored', what = 'discarded', processed_at = now()
     WHERE tenant_id = $1 AND id = $2 AND status IN ('pending', 'failed') RETURNING status",
    &[Type::UUID, Type::TEXT],
);

pub(super) static STATUS: Statement = Statement::read(
    "webhooks.status",
    "SELECT status FROM {s}.webhook_events WHERE tenant_id = $1 AND id = $2",
    &[Type::UUID, Type::TEXT],
);

/// What was tried least comes first: one that cannot be processed yet holds up nothing.
pub(super) static PENDING: Statement = Statement::read(
    "webhooks.pending",
    "SELECT id FROM {s}.webhook_events WHERE tenant_id = $1 AND status = 'pending'
     ORDER BY tenant_id, attempts, seq LIMIT $2",
    &[Type::UUID, Type::INT8],
);

pub(super) static LIST: Statement = Statement::read(
    "webhooks.list",
    "SELECT id, seq, type, body, received_at, status, attempts, what, idempotency_key, processed_at
     FROM {s}.webhook_events WHERE tenant_id = $1 AND status = $2 AND seq >= $3
     ORDER BY tenant_id, status, seq LIMIT $4",
    &[Type::UUID, Type::TEXT, Type::UUID, Type::INT8],
);
