//! What completed experiments need no longer: their events become counts, batch by batch.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::{Admin, Param, column};
use crate::error::{Error, Result};
use crate::repo::{AnalysisPlan, SUSPECT_VIEWS, recent_views};

/// The options of [`Admin::archive_completed`]. Setters never fail; the call does, and names the option.
///
/// ```
/// use std::time::Duration;
/// use lastprice::ArchiveOptions;
///
/// let options = ArchiveOptions::new().older_than(Duration::from_secs(180 * 86_400)).batch(1000);
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct ArchiveOptions {
    older_than: Duration,
    batch: u32,
}

impl Default for ArchiveOptions {
    fn default() -> Self {
        ArchiveOptions::new()
    }
}

impl ArchiveOptions {
    /// The defaults.
    pub fn new() -> Self {
        ArchiveOptions { older_than: Duration::from_secs(90 * 86_400), batch: 5000 }
    }

    /// How long ago an experiment must have been completed, at most 100 years. Default: 90 days. Whatever is said here, an experiment
    /// is not archived while the window of one of its users may be open.
    pub fn older_than(mut self, age: Duration) -> Self {
        self.older_than = age;
        self
    }

    /// How many rows a transaction looks at, from 1 to 100,000. Default: 5000.
    pub fn batch(mut self, rows: u32) -> Self {
        self.batch = rows;
        self
    }

    fn check(&self) -> Result<()> {
        check_age(self.older_than)?;
        if !(1..=100_000).contains(&self.batch) {
            return Err(Error::invalid("batch", "is not from 1 to 100000"));
        }
        Ok(())
    }
}

/// How far [`Admin::archive_completed`] is: after each batch, and at its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArchiveProgress {
    /// Experiments that this call is done with: nothing of them is left to remove.
    pub experiments: u64,
    /// Experiments of which something is left for the next call, because a transaction that is still open had them, or rows of them
    /// that would have been removed. The archive waits for nobody. What is in use night after night is a transaction that never ends.
    pub in_use: u64,
    /// Experiments of which nothing is left but assignments whose price is promised for a time that is not over: for the first call
    /// after it.
    pub promised: u64,
    /// Views that were removed.
    pub views: u64,
    /// Assignments that were removed.
    pub assignments: u64,
    /// Assignments that were looked at and stay: of users with an entry in the ledger, or whose price is promised for a time that is
    /// not over, or which were in use.
    pub kept: u64,
    /// In what is returned at the end: completed experiments that are not due yet, since they were completed less than `older_than` ago, or
    /// the window of one of their users may be open, whose assignment may also be younger than `end_date` says.
    pub not_due: u64,
}

impl Admin {
    /// Removes what experiments that were completed long ago need no longer, for all tenants, and changes no number: counts, results
    /// and reports are the same before, afterwards, and at every moment in between.
    ///
    /// What stays: the experiment, its ledger, and the assignments of users who are in the ledger. Views, and the assignments of
    /// users who brought nothing, become counts.
    ///
    /// A user whose assignment is gone has no quote any longer, and is to the experiment as one who was never in it: sees the
    /// baseline, and a sale of theirs counts as `outside`. What they are charged, if it is not the baseline, is not compared with
    /// it ([`quote_mismatch`](crate::Conversion::quote_mismatch) is `None`), since nobody knows any more what they were quoted.
    /// Renewals and refunds find their sale as before.
    ///
    /// Each batch is a transaction of its own and waits for nobody's row: an experiment, an assignment or a view that an open
    /// transaction has is left for the next call ([`in_use`](ArchiveProgress::in_use)). Who needs a row that a batch is removing waits
    /// for that batch, and for nothing else. Services go on meanwhile. Call it again after whatever has ended it, and every night:
    /// what was in use, and views that were recorded since, are taken then. At the end it analyses the tables, so that the planner
    /// knows.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin) -> lastprice::Result<()> {
    /// use lastprice::ArchiveOptions;
    ///
    /// let done = admin.archive_completed(ArchiveOptions::new(), |so_far| println!("{} views", so_far.views)).await?;
    /// println!("{} experiments", done.experiments);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for an option; otherwise those of the connection. What was done stays done.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, what was done stays done, and one batch more may be.
    pub async fn archive_completed(
        &self,
        options: ArchiveOptions,
        mut progress: impl FnMut(&ArchiveProgress),
    ) -> Result<ArchiveProgress> {
        options.check()?;
        let (age, days) = (options.older_than.as_secs_f64(), i32::from(AnalysisPlan::default().window_days));
        let mut total = ArchiveProgress::default();
        let mut after = (Uuid::nil(), Uuid::nil());
        loop {
            let params: [Param<'_>; 5] = [
                (&age, Type::FLOAT8),
                (&days, Type::INT4),
                (&after.0, Type::UUID),
                (&after.1, Type::UUID),
                (&DUE_AT_ONCE, Type::INT8),
            ];
            let due = self.query(None, DUE, &params).await?;
            for row in &due {
                after = (column(row, 0)?, column(row, 1)?);
                let experiment = Archived { id: after, is_finished: column(row, 2)? };
                if !self.archive(experiment, options.batch, &mut total, &mut progress).await? {
                    total.in_use += 1;
                }
                progress(&total);
            }
            if (due.len() as i64) < DUE_AT_ONCE {
                break;
            }
        }
        if total.views + total.assignments > 0 {
            self.query(None, ANALYZE, &[]).await?;
        }
        let not_due = self.query(None, NOT_DUE, &[(&age, Type::FLOAT8), (&days, Type::INT4)]).await?;
        let not_due = not_due.first().ok_or_else(|| Error::internal("a count has no row"))?;
        total.not_due = column::<i64>(not_due, 0)?.unsigned_abs();
        Ok(total)
    }

    /// Whether nobody held something of it.
    async fn archive(
        &self,
        experiment: Archived,
        rows: u32,
        total: &mut ArchiveProgress,
        progress: &mut impl FnMut(&ArchiveProgress),
    ) -> Result<bool> {
        let (tenant, id) = &experiment.id;
        let (of, rows) = ([(tenant as _, Type::UUID), (id as _, Type::UUID)], i64::from(rows));
        // Before anything is removed: the newest views as they are.
        let begin: Vec<Param<'_>> = of.iter().cloned().chain([(&SUSPECT_VIEWS as _, Type::INT8)]).collect();
        self.query(None, BEGIN, &begin).await?;

        let (mut in_use, mut promised) = (0, 0);
        let mut from: Option<DateTime<Utc>> = None;
        loop {
            let more: [Param<'_>; 2] = [(&from, Type::TIMESTAMPTZ), (&rows, Type::INT8)];
            let Some(batch) = self.batch(VIEWS, &[of.as_slice(), &more].concat()).await? else {
                return Ok(false);
            };
            total.views += batch.removed;
            progress(total);
            if batch.seen < rows {
                break;
            }
            from = column(&batch.row, 2)?;
        }
        if !experiment.is_finished {
            let mut after = String::new();
            loop {
                let more: [Param<'_>; 2] = [(&after, Type::TEXT), (&rows, Type::INT8)];
                let Some(batch) = self.batch(ASSIGNMENTS, &[of.as_slice(), &more].concat()).await? else {
                    return Ok(false);
                };
                total.assignments += batch.removed;
                total.kept += batch.seen.unsigned_abs().saturating_sub(batch.removed);
                in_use += column::<i64>(&batch.row, 3)?.unsigned_abs().saturating_sub(batch.removed);
                promised += column::<i64>(&batch.row, 4)?;
                progress(total);
                if batch.seen < rows {
                    break;
                }
                after = column(&batch.row, 2)?;
            }
        }
        // What was counted for each batch becomes one total a day.
        self.query(None, "SELECT {s}.fold_metric_deltas($1)", &of[..1]).await?;
        match (in_use, promised) {
            (0, 0) => {
                self.query(None, FINISH, &of).await?;
                total.experiments += 1;
            }
            (0, _) => total.promised += 1,
            _ => {}
        }
        Ok(in_use == 0)
    }

    /// `None` if somebody has the experiment.
    async fn batch(&self, sql: &str, params: &[Param<'_>]) -> Result<Option<Batch>> {
        let row = self.query(None, sql, params).await?.pop();
        let row = row.ok_or_else(|| Error::internal("a batch has no counts"))?;
        let (seen, removed): (Option<i64>, i64) = (column(&row, 0)?, column(&row, 1)?);
        Ok(seen.map(|seen| Batch { seen, removed: removed.unsigned_abs(), row }))
    }
}

/// An experiment that is due; of a finished one only views that came later.
struct Archived {
    id: (Uuid, Uuid),
    is_finished: bool,
}

/// What a statement has looked at and removed; its third column is where the next one goes on, the fourth how many rows are to be
/// removed, and the fifth how many are not yet.
struct Batch {
    seen: i64,
    removed: u64,
    row: Row,
}

pub(super) fn check_age(age: Duration) -> Result<()> {
    match age <= Duration::from_secs(100 * 365 * 86_400) {
        true => Ok(()),
        false => Err(Error::invalid("older_than", "is more than 100 years")),
    }
}

const DUE_AT_ONCE: i64 = 100;

/// Completed; and whether for so long, and every user's window is over: the last one may have been assigned when it was completed, or,
/// whatever `end_date` was set to by hand, on the last day that has an assignment; and cohorts are whole days.
macro_rules! completed {
    ($columns:literal, $is:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM {s}.experiments e LEFT JOIN {s}.archived_experiments a ON a.tenant_id = e.tenant_id AND a.experiment_id = e.id
     WHERE e.status = 'completed' AND (COALESCE(e.end_date, e.updated_at) < now() - GREATEST(make_interval(secs => $1),
             make_interval(hours => 24 * (1 + COALESCE((e.plan ->> 'window_days')::numeric::integer, $2))))
       AND NOT EXISTS (SELECT FROM (
         SELECT t.day, t.assignments FROM {s}.metric_totals t WHERE t.tenant_id = e.tenant_id AND t.experiment_id = e.id
           AND t.day >= (now() AT TIME ZONE 'UTC')::date - COALESCE((e.plan ->> 'window_days')::numeric::integer, $2)
         UNION ALL
         SELECT d.day, d.assignments FROM {s}.metric_deltas d WHERE d.tenant_id = e.tenant_id AND d.experiment_id = e.id
           AND d.day >= (now() AT TIME ZONE 'UTC')::date - COALESCE((e.plan ->> 'window_days')::numeric::integer, $2)) m
         GROUP BY m.day HAVING sum(m.assignments) > 0)) ",
            $is
        )
    };
}

/// What was archived comes again when there are views.
const DUE: &str = completed!(
    "e.tenant_id, e.id, a.finished_at IS NOT NULL",
    "AND (e.tenant_id, e.id) > ($3, $4)
       AND (a.finished_at IS NULL
            OR EXISTS (SELECT FROM {s}.views v WHERE v.tenant_id = e.tenant_id AND v.experiment_id = e.id))
     ORDER BY e.tenant_id, e.id LIMIT $5"
);

const NOT_DUE: &str = completed!("count(*)", "IS NOT TRUE AND a.finished_at IS NULL");

/// A merge of users locks the experiments that it changes in the same way, and then looks which are archived: of the two, the second
/// sees what the first has done. It is not waited for.
const BEGIN: &str = concat!(
    "INSERT INTO {s}.archived_experiments (tenant_id, experiment_id, views, viewers, suspects, views_of_suspects)
     SELECT e.tenant_id, e.id, v.views, v.viewers, v.suspects, v.views_of_suspects
     FROM {s}.experiments e CROSS JOIN LATERAL (",
    recent_views!(),
    ") v WHERE e.tenant_id = $1 AND e.id = $2 FOR NO KEY UPDATE OF e SKIP LOCKED ON CONFLICT DO NOTHING"
);

/// A batch removes, counts what it removed in the baseline, and adds as a delta what the trigger takes off for it: in one statement,
/// so that nobody sees one without the other.
///
/// It waits for no row, since whoever needs one that it has removed already would wait as well. `held` comes before all: who deletes
/// the experiment waits for the batch, or there is none, nor while another call has one; then it does not say how many it has seen.
/// Rows that somebody has are passed over. Rows are removed by a list of their keys
/// or places (of one table: of views there may be partitions), and not by a join, which is planned by what was known of the tables:
/// with nothing known, a batch read all assignments for each row.
macro_rules! batch {
    ($page:literal, $gone:literal, $count:literal, $next:literal) => {
        concat!(
            "WITH held AS MATERIALIZED (
       SELECT a.began_at
       FROM {s}.experiments e JOIN {s}.archived_experiments a ON a.tenant_id = e.tenant_id AND a.experiment_id = e.id
       WHERE e.tenant_id = $1 AND e.id = $2 FOR KEY SHARE OF e SKIP LOCKED FOR NO KEY UPDATE OF a SKIP LOCKED
     ), page AS MATERIALIZED (",
            $page,
            "), gone AS (",
            $gone,
            "), counted AS (SELECT phase, variant, reason, day, count(*) AS n FROM gone WHERE counts GROUP BY phase, variant, reason, day), based AS (
       INSERT INTO {s}.metric_baselines AS b (tenant_id, experiment_id, phase, variant, reason, day, ",
            $count,
            ") SELECT $1, $2, phase, variant, reason, day, n FROM counted ORDER BY day, variant, phase, reason
       ON CONFLICT (tenant_id, experiment_id, day, variant, phase, reason) DO UPDATE SET ",
            $count,
            " = b.",
            $count,
            " + excluded.",
            $count,
            "), still AS (
       INSERT INTO {s}.metric_deltas (tenant_id, experiment_id, phase, variant, reason, currency, day, ",
            $count,
            ") SELECT $1, $2, phase, variant, reason, 'XXX', day, n FROM counted
     )
     SELECT CASE WHEN EXISTS (SELECT FROM held) THEN count(*) END, (SELECT count(*) FROM gone), max(",
            $next,
            "), count(*) FILTER (WHERE goes = 'now'), count(*) FILTER (WHERE goes = 'later') FROM page"
        )
    };
}

const VIEWS: &str = batch!(
    "SELECT v.id, v.occurred_at, 'now' AS goes FROM {s}.views v
       WHERE v.tenant_id = $1 AND v.experiment_id = $2 AND v.occurred_at >= COALESCE($3, '-infinity') AND EXISTS (SELECT FROM held)
       ORDER BY v.tenant_id, v.experiment_id, v.occurred_at LIMIT $4 FOR UPDATE OF v SKIP LOCKED",
    "DELETE FROM {s}.views v WHERE v.tenant_id = $1 AND v.id = ANY (ARRAY(SELECT p.id FROM page p))
       RETURNING v.phase, v.variant, v.reason, (v.occurred_at AT TIME ZONE 'UTC')::date AS day, true AS counts",
    "views",
    "occurred_at"
);

/// An id that turned out to be another user's goes and stays with that one, and is no user itself. Only what goes is locked; what was
/// changed since the page was read has another place by then, which the page's snapshot does not show: it stays for the next call.
const ASSIGNMENTS: &str = batch!(
    "SELECT a.ctid AS place, a.user_id, CASE WHEN (
         SELECT c.id FROM {s}.conversions c
         WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.user_id = COALESCE(a.merged_into, a.user_id) LIMIT 1) IS NOT NULL THEN 'never'
         WHEN a.valid_until > now() THEN 'later' ELSE 'now' END AS goes
       FROM {s}.assignments a
       WHERE a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id > $3 AND EXISTS (SELECT FROM held)
       ORDER BY a.tenant_id, a.experiment_id, a.user_id LIMIT $4",
    "DELETE FROM ONLY {s}.assignments a WHERE a.ctid = ANY (ARRAY(
         SELECT l.ctid FROM ONLY {s}.assignments l WHERE l.ctid = ANY (ARRAY(SELECT p.place FROM page p WHERE p.goes = 'now'))
         FOR UPDATE SKIP LOCKED))
       RETURNING a.phase, a.variant, a.reason, (a.assigned_at AT TIME ZONE 'UTC')::date AS day, a.merged_into IS NULL AS counts",
    "assignments",
    "user_id"
);

const FINISH: &str = "UPDATE {s}.archived_experiments SET finished_at = now()
     WHERE tenant_id = $1 AND experiment_id = $2 AND finished_at IS NULL";

const ANALYZE: &str = "ANALYZE {s}.views, {s}.assignments, {s}.metric_totals, {s}.metric_deltas";
