//! `record_many`, as an ordinary role.

use std::sync::Arc;

use lastprice::{Client, ExperimentId, NewView, TenantId, UserId, ViewId, ViewOutcome};
use tokio::task::JoinSet;

use crate::Failure;
use crate::turns::Contestant;
use crate::world::{Event, World};

pub(crate) fn client(world: &World, connections: usize) -> Result<Client, Failure> {
    let builder = Client::builder().url(world.database.app_url()).pool_size(connections);
    Ok(builder.require_app_role().build()?)
}

pub(crate) fn view(event: Event) -> Result<NewView, Failure> {
    let view = NewView::new(ExperimentId::from(event.experiment), UserId::new(event.user)?);
    Ok(view.id(ViewId::from(event.id)).at(event.at).metadata(event.metadata))
}

/// By tenant, in batches.
pub(crate) fn batches(events: Vec<Event>, size: usize) -> Vec<(TenantId, Vec<Event>)> {
    let mut batches: Vec<(TenantId, Vec<Event>)> = Vec::new();
    let mut open = std::collections::HashMap::new();
    for event in events {
        let tenant = event.tenant;
        match open.get(&tenant).map(|i: &usize| &mut batches[*i].1) {
            Some(batch) if batch.len() < size => batch.push(event),
            _ => {
                open.insert(tenant, batches.len());
                batches.push((tenant, vec![event]));
            }
        }
    }
    batches
}

pub(crate) fn record_many(world: &World, connections: usize, batch: usize) -> Result<Contestant, Failure> {
    let client = Arc::new(client(world, connections)?);
    let name = match connections {
        1 => "`record_many`".to_owned(),
        n => format!("`record_many`, {n} connections"),
    };
    Ok(Contestant::new(name, move |events| {
        let mut lots: Vec<Vec<(TenantId, Vec<NewView>)>> = vec![Vec::new(); connections];
        let views = batches(events, batch).into_iter().map(|(tenant, batch)| {
            Ok((tenant, batch.into_iter().map(view).collect::<Result<Vec<_>, Failure>>()?))
        });
        let views: Result<Vec<_>, Failure> = views.collect();
        let client = Arc::clone(&client);
        if let Ok(views) = &views {
            for (i, batch) in views.iter().enumerate() {
                lots[i % connections].push(batch.clone());
            }
        }
        async move {
            views?;
            let mut tasks = JoinSet::new();
            for lot in lots {
                let client = Arc::clone(&client);
                tasks.spawn(async move {
                    for (tenant, views) in lot {
                        let outcomes = client.tenant(tenant).views().record_many(&views).await?;
                        if outcomes.iter().any(|outcome| *outcome != ViewOutcome::Recorded) {
                            return Err("not all were recorded".into());
                        }
                    }
                    Ok::<(), Failure>(())
                });
            }
            tasks.join_all().await.into_iter().collect()
        }
    }))
}
