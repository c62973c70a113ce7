//! diesel-async's insert of many rows.

use std::sync::Arc;

use diesel::prelude::*;
use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
use tokio::sync::Mutex;

use crate::Failure;
use crate::ours::batches;
use crate::turns::Contestant;
use crate::world::World;

diesel::table! {
    views (tenant_id, id) {
        tenant_id -> Uuid,
        id -> Uuid,
        experiment_id -> Uuid,
        user_id -> Text,
        variant -> Text,
        phase -> Integer,
        reason -> Text,
        occurred_at -> Timestamptz,
        metadata -> Jsonb,
    }
}

/// One statement of many rows, in a transaction that binds the tenant.
pub(crate) async fn insert(world: &World, rows: usize) -> Result<Contestant, Failure> {
    let connection = AsyncPgConnection::establish(&world.database.app_url()).await?;
    let connection = Arc::new(Mutex::new(connection));
    Ok(Contestant::new(format!("diesel-async, {rows} rows"), move |events| {
        let (connection, batches) = (Arc::clone(&connection), batches(events, rows));
        async move {
            let mut connection = connection.lock().await;
            for (tenant, batch) in batches {
                let tenant = tenant.uuid();
                let rows = batch.iter().map(|e| {
                    (
                        views::tenant_id.eq(tenant),
                        views::id.eq(e.id),
                        views::experiment_id.eq(e.experiment),
                        views::user_id.eq(&e.user),
                        views::variant.eq(e.variant),
                        views::phase.eq(1),
                        views::reason.eq("randomised"),
                        views::occurred_at.eq(e.at),
                        views::metadata.eq(&e.metadata),
                    )
                });
                let rows: Vec<_> = rows.collect();
                let transaction = connection.transaction(async |connection| {
                    let bind = diesel::sql_query("SELECT set_config('app.tenant_id', $1, true)");
                    bind.bind::<diesel::sql_types::Text, _>(tenant.to_string()).execute(connection).await?;
                    let insert = diesel::insert_into(views::table).values(rows).on_conflict_do_nothing();
                    insert.execute(connection).await
                });
                transaction.await.map_err(|e: diesel::result::Error| e)?;
            }
            Ok(())
        }
    }))
}
