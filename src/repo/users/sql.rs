//! The statements of [`Users`](super::Users).

use tokio_postgres::types::Type;

use crate::scope::Statement;

pub(in crate::repo) const STATEMENTS: &[&Statement] = &[&ERASE, &ERASURES, &KNOWN, &MERGE, &MERGED, &MERGES];

// The functions work for the tenant that is bound, which is $1.
pub(super) static ERASE: Statement = Statement::write(
    "users.erase",
    "SELECT e.id, e.pseudonym, e.counts, e.erased_at, e.erased_by FROM {s}.erase_user($2, $3) e WHERE e.tenant_id = $1",
    &[Type::UUID, Type::TEXT, Type::UUID],
);

pub(super) static ERASURES: Statement = Statement::read(
    "users.erasures",
    "SELECT id, pseudonym, counts, erased_at, erased_by FROM {s}.erasures
     WHERE tenant_id = $1 AND id >= $2 ORDER BY tenant_id, id LIMIT $3",
    &[Type::UUID, Type::UUID, Type::INT8],
);

pub(super) static MERGE: Statement = Statement::write(
    "users.merge",
    "SELECT m.outcome, (m.merged).id, (m.merged).user_id, (m.merged).known_id, (m.merged).policy, (m.merged).report,
            (m.merged).merged_at, (m.merged).merged_by
     FROM {s}.merge_users($2, $3, $4, $5) m WHERE (m.merged).tenant_id = $1",
    &[Type::UUID, Type::TEXT, Type::TEXT, Type::TEXT, Type::UUID],
);

pub(super) static KNOWN: Statement = Statement::read(
    "users.known",
    "SELECT user_id, known_id FROM {s}.identities WHERE tenant_id = $1 AND user_id = ANY ($2)",
    &[Type::UUID, Type::TEXT_ARRAY],
);

pub(super) static MERGED: Statement = Statement::read(
    "users.merged",
    "SELECT id, user_id, known_id, policy, report, merged_at, merged_by FROM {s}.identities WHERE tenant_id = $1 AND user_id = $2",
    &[Type::UUID, Type::TEXT],
);

pub(super) static MERGES: Statement = Statement::read(
    "users.merges",
    "SELECT id, user_id, known_id, policy, report, merged_at, merged_by FROM {s}.identities
     WHERE tenant_id = $1 AND id >= $2 ORDER BY tenant_id, id LIMIT $3",
    &[Type::UUID, Type::UUID, Type::INT8],
);
