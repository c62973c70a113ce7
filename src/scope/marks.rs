//! How far a primary's log was, and when: what tells how old a standby's data is.

use std::collections::VecDeque;
use std::sync::Weak;
use std::time::{Duration, Instant};

use futures_util::TryFutureExt;
use futures_util::future::BoxFuture;
use tokio::time::timeout;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::health::REST;
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};

/// A database: the standbys of its cluster have the same one. (The log is the cluster's, and says nothing of databases.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) cluster: u64,
    /// Its oid.
    pub(super) database: u32,
}

/// How far the log of a cluster was at some moment, as seen from one of its databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) origin: Origin,
    lsn: u64,
}

/// How far the primary was, after some moment of our clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    pub(super) taken: Instant,
    place: Place,
}

/// The newest last.
#[derive(Default)]
pub(super) struct Marks(VecDeque<Mark>);

impl Marks {
    /// One that is older than that is kept, which says how far behind a standby is.
    pub(super) fn push(&mut self, mark: Mark, max_age: Duration) {
        let Marks(marks) = self;
        // A primary that is less far than it was is another one.
        if marks
            .back()
            .is_some_and(|last| last.place.origin != mark.place.origin || last.place.lsn > mark.place.lsn)
        {
            marks.clear();
        }
        while marks.get(1).is_some_and(|second| mark.taken.duration_since(second.taken) > max_age) {
            marks.pop_front();
        }
        marks.push_back(mark);
    }

    /// The last one that a standby at this place has reached.
    pub(super) fn reached(&self, place: Place) -> Option<Mark> {
        let reached = |mark: &&Mark| mark.place.origin == place.origin && mark.place.lsn <= place.lsn;
        self.0.iter().rev().find(reached).copied()
    }

    pub(super) fn oldest(&self) -> Option<Mark> {
        self.0.front().copied()
    }
}

/// By a connection of its own: when the pool is exhausted, the replica is needed most.
pub(super) async fn keep_marking(primary: Weak<Session>) {
    let mut line = None;
    loop {
        let Some(session) = primary.upgrade() else { return };
        let Some(replica) = &session.replica else { return };
        let (beat, taken) = (replica.beat(), Instant::now());
        let limit = beat.max(REST);
        let opening = line.is_none().then(|| (session.another)(None));
        drop(session); // nobody is kept alive by being waited for
        let place = timeout(limit, look(&mut line, opening)).await;
        match (place, primary.upgrade()) {
            (Ok(Ok(place)), Some(session)) => {
                if let Some(replica) = &session.replica {
                    replica.has_mark(Mark { taken, place });
                }
            }
            (failed, _) => {
                line = None;
                if let Ok(Err(error)) = failed {
                    tracing::debug!(%error, "it cannot be known how far the replica is");
                }
            }
        }
        tokio::time::sleep(beat.saturating_sub(taken.elapsed())).await;
    }
}

/// Opens a connection.
type Opening = BoxFuture<'static, Option<Result<Client, tokio_postgres::Error>>>;

/// How far the primary is: by a connection that is there, or that has to be opened.
async fn look(line: &mut Option<Client>, opening: Option<Opening>) -> Result<Place> {
    if let Some(opening) = opening {
        let late = || Error::new(ErrorKind::Timeout, "connecting took longer than `connect_timeout`");
        *line = Some(opening.await.ok_or_else(late)?.map_err(Error::from_connecting)?);
    }
    let client = line.as_ref().ok_or_else(|| Error::internal("a connection was not opened"))?;
    let said = client.simple_query(INSERTED).map_err(|e| Error::from_driver(e, false)).await?;
    Place::said(&said)
}

/// The database that a connection leads to.
pub(super) async fn origin_of(connection: &Client) -> Result<Origin> {
    let said = connection.simple_query(ORIGIN).await.map_err(|e| Error::from_driver(e, false))?;
    Ok(Place::said(&said)?.origin)
}

impl Place {
    pub(super) fn said(messages: &[SimpleQueryMessage]) -> Result<Place> {
        let row = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let text = |column| row.and_then(|row| row.try_get(column).ok().flatten());
        let cluster = text(0).and_then(|cluster| cluster.parse().ok());
        let database = text(1).and_then(|database| database.parse().ok());
        let lsn = text(2).and_then(|lsn| lsn.parse::<PgLsn>().ok()).map(u64::from);
        let header = text(3).and_then(|header| header.parse().ok()).unwrap_or(0);
        let unsaid = |what: &'static str| move || Error::new(ErrorKind::Unavailable, what);
        let origin = cluster.zip(database).map(|(cluster, database)| Origin { cluster, database });
        Ok(Place {
            origin: origin.ok_or_else(unsaid("the server does not say which database it has"))?,
            lsn: lsn.ok_or_else(unsaid("the server is no standby, or none any more"))?.saturating_sub(header),
        })
    }
}

macro_rules! origin_and {
    ($lsn:literal $(, $from:literal)?) => {
        concat!(
            "SELECT system_identifier, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()), ",
            $lsn,
            " FROM pg_catalog.pg_control_system()"
            $(, $from)?
        )
    };
}

/// Not how far the log is written: what is committed without waiting for the disk is seen before.
///
/// It is where the next record will begin, so behind the header of a page that nothing is on yet, as after each switch of the log
/// file; a standby says where the last one ended. The last column is the length of such a header: 40 bytes in a file's first page,
/// 24 in the others (`SizeOfXLogLongPHD` and `SizeOfXLogShortPHD` of PostgreSQL's `xlog_internal.h`).
const INSERTED: &str = origin_and!(
    "lsn, CASE WHEN file_offset = 40 THEN 40
          WHEN file_offset % pg_catalog.current_setting('wal_block_size')::integer = 24 THEN 24 ELSE 0 END",
    ", pg_catalog.pg_current_wal_insert_lsn() lsn, LATERAL pg_catalog.pg_walfile_name_offset(lsn)"
);

/// NULL on a server that is no standby. On one that is none any more, what was replayed last would stay as it was: current for as long
/// as the primary, which it does not follow any more, has nothing to do.
pub(super) const REPLAYED: &str =
    origin_and!("CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() END");

const ORIGIN: &str = origin_and!("'0/0'");

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn place(cluster: u64, database: u32, lsn: u64) -> Place {
        Place { origin: Origin { cluster, database }, lsn }
    }

    fn mark(start: Instant, second: u64, cluster: u64, lsn: u64) -> Mark {
        Mark { taken: start + Duration::from_secs(second), place: place(cluster, 5, lsn) }
    }

    #[test]
    fn a_standby_has_what_was_committed_before_the_last_mark_it_reached() {
        let (start, mut marks) = (Instant::now(), Marks::default());
        let second_of = |marks: &Marks, cluster, lsn| {
            marks.reached(place(cluster, 5, lsn)).map(|mark| (mark.taken - start).as_secs())
        };
        assert_eq!(second_of(&marks, 1, u64::MAX), None);
        for second in 0..40 {
            // Nothing was written from the thirtieth on.
            marks.push(mark(start, second, 1, 100 * second.min(30)), LIMIT);
        }
        assert_eq!(second_of(&marks, 1, 2999), Some(29));
        assert_eq!(second_of(&marks, 1, 3000), Some(39), "it is idle, and not behind");
        assert_eq!(second_of(&marks, 1, 2799), None, "so old a mark is not kept");
        assert_eq!(second_of(&marks, 2, u64::MAX), None, "of another cluster");
        assert!(marks.reached(place(1, 6, u64::MAX)).is_none(), "of another database");
        assert!(marks.0.len() <= 12, "{}", marks.0.len());
        // Another primary, which was promoted before it had everything.
        marks.push(mark(start, 40, 1, 2900), LIMIT);
        assert_eq!((second_of(&marks, 1, 2899), second_of(&marks, 1, 2900)), (None, Some(40)));
    }

    #[test]
    fn a_place_is_what_both_ends_say() {
        let place = place(7, 5, 0x16_b374_d848);
        assert_eq!("16/B374D848".parse::<PgLsn>().map(u64::from).unwrap(), place.lsn);
        assert!(Place::said(&[]).is_err());
    }
}
