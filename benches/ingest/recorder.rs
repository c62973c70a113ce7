//! The recorder: one for the process, which shares commits among whoever waits.

use std::sync::Arc;

use lastprice::RecorderOptions;

use crate::callers::Way;
use crate::turns::Contestant;
use crate::world::World;
use crate::{Failure, ours};

/// One for each of its lanes.
const CONNECTIONS: usize = 2;

/// Many views at once: handed over one by one, then waited for together.
pub(crate) fn record(world: &World) -> Result<Contestant, Failure> {
    let recorder = Arc::new(ours::client(world, CONNECTIONS)?.recorder());
    Ok(Contestant::new("recorder: `record`, then `flush`", move |events| {
        let recorder = Arc::clone(&recorder);
        // Made ahead, as for the others.
        let views: Result<Vec<_>, Failure> =
            events.into_iter().map(|event| Ok((event.tenant, ours::view(event)?))).collect();
        async move {
            for (tenant, view) in views? {
                recorder.record(tenant, view)?;
            }
            recorder.flush().await;
            Ok(())
        }
    }))
}

/// One view, waited for until it is committed.
pub(crate) fn track(world: &World, connections: usize) -> Result<Way, Failure> {
    let options = RecorderOptions::new().lanes(u32::try_from(connections)?);
    let recorder = Arc::new(ours::client(world, connections)?.recorder_with(options)?);
    Ok(Way::new(&format!("recorder: `track`, connections: {connections}"), move |event| {
        let recorder = Arc::clone(&recorder);
        async move {
            let tenant = event.tenant;
            match recorder.track(tenant, ours::view(event)?).await? {
                lastprice::Tracked::Written => Ok(()),
                other => Err(format!("{other:?}").into()),
            }
        }
    }))
}
