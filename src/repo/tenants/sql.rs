//! The statements. Secrets are parameters and columns here as sealed text only.

use tokio_postgres::types::Type;

use crate::scope::Statement;

macro_rules! columns {
    () => {
        "id, name, email, mode, plan, holdout, salt, metadata, created_at, updated_at, updated_by"
    };
}
pub(crate) const COLUMNS: &str = columns!();

pub(in crate::repo) const STATEMENTS: &[&Statement] = &[&CREATE, &GET, &SECRETS, &UPDATE];

pub(super) static CREATE: Statement = Statement::write(
    "tenants.create",
    concat!(
        "INSERT INTO {s}.tenants (id, name, email, mode, plan, paid_api_key, metadata, webhook_secret)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::JSONB, Type::TEXT],
);

pub(super) static GET: Statement = Statement::read(
    "tenants.get",
    concat!("SELECT ", columns!(), " FROM {s}.tenants WHERE id = $1"),
    &[Type::UUID],
);

pub(super) static SECRETS: Statement = Statement::read(
    "tenants.secrets",
    "SELECT mode, paid_api_key, webhook_secret FROM {s}.tenants WHERE id = $1",
    &[Type::UUID],
);

pub(super) static UPDATE: Statement = Statement::write(
    "tenants.update",
    concat!(
        "UPDATE {s}.tenants SET
           name = COALESCE($2, name), mode = COALESCE($3, mode), plan = COALESCE($4, plan),
           paid_api_key = CASE WHEN $3 = 'managed' THEN NULL ELSE COALESCE($5, paid_api_key) END,
           metadata = COALESCE($6, metadata), holdout = COALESCE($7, holdout),
           webhook_secret = CASE WHEN $8 = '' THEN NULL ELSE COALESCE($8, webhook_secret) END
         WHERE id = $1 RETURNING ",
        columns!()
    ),
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::JSONB, Type::INT4, Type::TEXT],
);
