//! COPY by a superuser, and sqlx.

use std::pin::pin;
use std::sync::Arc;

use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, Postgres, QueryBuilder};
use tokio::task::JoinSet;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use crate::Failure;
use crate::ours::batches;
use crate::turns::Contestant;
use crate::world::{Event, World};

/// As many as the protocol has parameters for.
pub(crate) const SQLX_ROWS: usize = u16::MAX as usize / 9;

pub(crate) const BIND: &str = "SELECT set_config('app.tenant_id', $1, true)";
const COPY: &str = "
    COPY views (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata) FROM STDIN BINARY";

/// In transactions of `batch` rows, whosesoever they are: row-level security does not bind a superuser, who also knows each
/// variant.
pub(crate) async fn copy(world: &World, connections: usize, batch: usize) -> Result<Contestant, Failure> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        let (client, connection) =
            tokio_postgres::connect(&world.database.superuser_url(), tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        let statement = client.prepare(COPY).await?;
        clients.push(Arc::new((client, statement)));
    }
    let rows = if batch == usize::MAX { "all at once".to_owned() } else { format!("{batch} rows") };
    let name = match connections {
        1 => format!("COPY BINARY, {rows}"),
        n => format!("COPY BINARY, {rows}, {n} connections"),
    };
    Ok(Contestant::new(name, move |events| {
        let each = events.len().div_ceil(connections);
        let lots: Vec<Vec<Event>> = events.chunks(each).map(<[Event]>::to_vec).collect();
        let clients = clients.clone();
        async move {
            let mut tasks = JoinSet::new();
            for (lot, client) in lots.into_iter().zip(clients) {
                tasks.spawn(async move {
                    for batch in lot.chunks(batch.min(lot.len())) {
                        copy_batch(&client.0, &client.1, batch).await?;
                    }
                    Ok::<(), Failure>(())
                });
            }
            tasks.join_all().await.into_iter().collect()
        }
    }))
}

async fn copy_batch(
    client: &tokio_postgres::Client,
    copy: &tokio_postgres::Statement,
    batch: &[Event],
) -> Result<(), Failure> {
    let types = [
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::INT4,
        Type::TEXT,
        Type::TIMESTAMPTZ,
        Type::JSONB,
    ];
    let mut writer = pin!(BinaryCopyInWriter::new(client.copy_in(copy).await?, &types));
    for e in batch {
        let tenant = e.tenant.uuid();
        let row: [&(dyn ToSql + Sync); 9] =
            [&tenant, &e.id, &e.experiment, &e.user, &e.variant, &1i32, &"randomised", &e.at, &e.metadata];
        writer.as_mut().write(&row).await?;
    }
    writer.finish().await?;
    Ok(())
}

/// What COPY costs an ordinary role that wants what `record_many` does: row-level security, the variant from the assignment, and
/// each id once.
pub(crate) async fn staged_copy(world: &World, batch: usize) -> Result<Contestant, Failure> {
    let (client, connection) =
        tokio_postgres::connect(&world.database.app_url(), tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute(STAGE).await?;
    client.batch_execute(BY_INDEX).await?;
    let (bind, copy) = (client.prepare(BIND).await?, client.prepare(COPY_TO_STAGE).await?);
    let insert = client.prepare(&format!("{INSERT_CHECKED} stage x {JOIN}")).await?;
    let state = Arc::new((client, [bind, copy, insert]));
    let name = format!("COPY BINARY into a temporary table, then `INSERT … SELECT` as ours, {batch} rows");
    Ok(Contestant::new(name, move |events| {
        let (state, batches) = (Arc::clone(&state), batches(events, batch));
        async move {
            let (client, [bind, copy, insert]) = &*state;
            let types = [Type::UUID, Type::UUID, Type::TEXT, Type::TIMESTAMPTZ, Type::JSONB];
            for (tenant, batch) in batches {
                let tenant = tenant.uuid();
                client.batch_execute("BEGIN").await?;
                client.query_one(bind, &[&tenant.to_string()]).await?;
                let mut writer = pin!(BinaryCopyInWriter::new(client.copy_in(copy).await?, &types));
                for e in &batch {
                    writer.as_mut().write(&[&e.id, &e.experiment, &e.user, &e.at, &e.metadata]).await?;
                }
                writer.finish().await?;
                client.execute(insert, &[&tenant]).await?;
                client.batch_execute("COMMIT").await?;
            }
            Ok(())
        }
    }))
}

/// Of a thousand rows whose number it sees, the planner may read all assignments, which ours never does: not their fault.
const BY_INDEX: &str = "SET enable_hashjoin = off; SET enable_mergejoin = off";
const STAGE: &str = "
    CREATE TEMP TABLE stage (id uuid, experiment_id uuid, user_id text, occurred_at timestamptz, metadata jsonb)
    ON COMMIT DELETE ROWS";
const COPY_TO_STAGE: &str = "COPY stage FROM STDIN BINARY";
const INSERT_CHECKED: &str = "
    INSERT INTO views (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata)
    SELECT a.tenant_id, x.id, a.experiment_id, a.user_id, a.variant, a.phase, a.reason, x.occurred_at, x.metadata
    FROM";
const JOIN: &str = "
    JOIN assignments a ON a.tenant_id = $1 AND a.experiment_id = x.experiment_id AND a.user_id = x.user_id
    ORDER BY x.id ON CONFLICT DO NOTHING";

/// sqlx's rows, joined as ours are.
pub(crate) async fn sqlx_checked(world: &World, rows: usize) -> Result<Contestant, Failure> {
    let pool = pool(world, 1).await?;
    sqlx::raw_sql(BY_INDEX).execute(&pool).await?;
    Ok(push_values(
        format!("sqlx `push_values`, joined as ours, {rows} rows"),
        pool,
        rows,
        |tenant, batch| {
            // Names the tenant first, since that is `$1` in what follows.
            let mut insert = QueryBuilder::<Postgres>::new("WITH bound AS (SELECT ");
            insert.push_bind(tenant).push(")").push(INSERT_CHECKED).push(" (");
            insert.push_values(batch, |mut row, e| {
                row.push_bind(e.id).push_bind(e.experiment).push_bind(&e.user);
                row.push_bind(e.at).push_bind(&e.metadata);
            });
            insert.push(") x (id, experiment_id, user_id, occurred_at, metadata)").push(JOIN);
            insert
        },
    ))
}

pub(crate) async fn pool(world: &World, connections: u32) -> Result<PgPool, Failure> {
    let options = PgPoolOptions::new().min_connections(connections).max_connections(connections);
    Ok(options.connect(&world.database.app_url()).await?)
}

/// One statement of many rows, which are told everything.
pub(crate) async fn sqlx(world: &World, rows: usize) -> Result<Contestant, Failure> {
    let pool = pool(world, 1).await?;
    Ok(push_values(format!("sqlx `push_values`, {rows} rows"), pool, rows, |tenant, batch| {
        let mut insert = QueryBuilder::<Postgres>::new(
            "INSERT INTO views
             (tenant_id, id, experiment_id, user_id, variant, phase, reason, occurred_at, metadata) ",
        );
        insert.push_values(batch, |mut row, e| {
            row.push_bind(tenant).push_bind(e.id).push_bind(e.experiment).push_bind(&e.user);
            row.push_bind(e.variant).push_bind(1i32).push_bind("randomised");
            row.push_bind(e.at).push_bind(&e.metadata);
        });
        insert.push(" ON CONFLICT DO NOTHING");
        insert
    }))
}

/// A statement for each batch, in a transaction that binds the tenant.
fn push_values(
    name: String,
    pool: PgPool,
    rows: usize,
    insert: fn(Uuid, &[Event]) -> QueryBuilder<Postgres>,
) -> Contestant {
    Contestant::new(name, move |events| {
        let (pool, batches) = (pool.clone(), batches(events, rows));
        async move {
            for (tenant, batch) in batches {
                let tenant = tenant.uuid();
                let mut transaction = pool.begin().await?;
                sqlx::query(BIND).bind(tenant.to_string()).execute(&mut *transaction).await?;
                insert(tenant, &batch).build().execute(&mut *transaction).await?;
                transaction.commit().await?;
            }
            Ok(())
        }
    })
}
