mod model;
mod sql;

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::experiments::{Arm, Decided, Decider, ExperimentStatus, Reason};
use super::page::{Cursor, MAX_PAGE, Page, rows_for};
use super::row::{Fields, rules};
use super::subject::Subject;
use crate::error::{Error, Result};
use crate::id::{ExperimentId, UserId};
use crate::money::Money;
use crate::repo::variants::PriceBook;
use crate::scope::{Params, TenantScope};
pub use model::{AssignOutcome, AssignmentReason, NewAssignment, Quote};
pub(super) use sql::STATEMENTS;
use sql::{GET, INSERT, LIST_BY_USER, READ, RENEW};

/// Who was promised which price.
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Assignments<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Assignments<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Assignments { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// The price of a user: a forced variant, or else the stored quote if there is one, or else what the
    /// configuration says of the user ([`Reason`] has the order), by algorithm `v1` (see [`bucketing`](crate::bucketing)).
    /// Whoever is in the experiment by it gets a quote, which is stored.
    ///
    /// One round trip for a user who has a quote or stays outside, two for a new one.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let user = lastprice::UserId::new("user-42")?;
    /// let outcome = tenant.assignments().assign(id, &user).await?;
    /// println!("{} sees {}", user, outcome.price());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]. Calling again gives the same answer.
    pub async fn assign<'s>(
        self,
        experiment: ExperimentId,
        subject: impl Into<Subject<'s>>,
    ) -> Result<AssignOutcome> {
        let subject = subject.into();
        let mut outcomes = self.assign_all(experiment, &[subject], AssignmentReason::Randomised).await?;
        outcomes.pop().ok_or_else(|| Error::internal("one user has no outcome"))
    }

    /// [`assign`](Assignments::assign) for up to 1000 users, in at most three round trips; the outcomes are in
    /// the users' order. A user who is named twice is stored once.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, users: Vec<lastprice::UserId>) -> lastprice::Result<()> {
    /// let outcomes = tenant.assignments().assign_many(id, &users).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`assign`](Assignments::assign), and [`InvalidInput`](crate::ErrorKind::InvalidInput) for more than
    /// 1000 users.
    pub async fn assign_many<'s, S: Into<Subject<'s>>>(
        self,
        experiment: ExperimentId,
        subjects: impl IntoIterator<Item = S>,
    ) -> Result<Vec<AssignOutcome>> {
        let subjects: Vec<Subject<'s>> = subjects.into_iter().map(Into::into).collect();
        self.assign_all(experiment, &subjects, AssignmentReason::Randomised).await
    }

    /// [`assign_many`](Assignments::assign_many), where the sale comes first: whom the hash takes is marked as late.
    pub(crate) async fn assign_late(
        self,
        experiment: ExperimentId,
        users: &[&UserId],
    ) -> Result<Vec<AssignOutcome>> {
        // Not in experiments by account: nobody says whether the id is an account's.
        let subjects: Vec<_> = users.iter().map(|user| Subject::new(user)).collect();
        self.assign_all(experiment, &subjects, AssignmentReason::Late).await
    }

    /// The prices that [`assign_late`](Assignments::assign_late) would show a user, and until when; stores nothing.
    pub(crate) async fn show_late(
        self,
        experiment: ExperimentId,
        user: &UserId,
    ) -> Result<(Money, PriceBook, Option<DateTime<Utc>>)> {
        let subject = Subject::new(user);
        let (decider, stored, _) = self.read(experiment, &[subject]).await?;
        Ok(match Shown::of(&decider, &subject, &stored, AssignmentReason::Late) {
            Shown::Quote(id) => {
                let quote = stored.get(id).ok_or_else(|| Error::internal("a quote is not there"))?;
                (quote.price, quote.book.clone(), quote.valid_until)
            }
            Shown::New(_, decided, _) | Shown::Unstored(_, decided) => {
                let arm = decider.arm(decided);
                (arm.price, arm.book.clone(), None)
            }
        })
    }

    async fn assign_all(
        self,
        experiment: ExperimentId,
        subjects: &[Subject<'_>],
        by_hash: AssignmentReason,
    ) -> Result<Vec<AssignOutcome>> {
        if subjects.len() > MAX_PAGE as usize {
            return Err(Error::invalid("users", format_args!("are more than {MAX_PAGE}")));
        }
        subjects.iter().filter_map(|s| s.shown_at).try_for_each(|time| rules::time("shown_at", time))?;
        // What one statement has read of an active experiment's phase holds for the next, unless it is paused, or the
        // phase ends, in between: the insert looks at that once more.
        let mut is_new = HashSet::new();
        for _ in 0..3 {
            let read = self.read(experiment, subjects).await;
            let untouched = |e| if is_new.is_empty() { e } else { self.scope.after_writing(e) };
            let (decider, mut stored, run_out) = read.map_err(untouched)?;
            if !run_out.is_empty() && by_hash != AssignmentReason::Late {
                stored.extend(self.renew(experiment, &run_out).await?);
            }
            let shown = |s| Shown::of(&decider, s, &stored, by_hash);
            let shown: Vec<Shown<'_>> = subjects.iter().map(shown).collect();
            for quote in self.insert(&decider, subjects, &shown).await? {
                is_new.insert(quote.user_id.clone());
                stored.insert(quote.user_id.clone(), quote);
            }
            let outcome = |shown: &Shown<'_>| shown.outcome(&decider, &stored, &is_new);
            if let Some(outcomes) = shown.iter().map(outcome).collect() {
                return Ok(outcomes);
            }
            // Somebody else assigned some of them meanwhile, or the experiment changed: look again.
        }
        Err(Error::conflict("the experiment was changed again and again meanwhile"))
    }

    /// The experiment, what is stored for these users, and whose promise runs out.
    async fn read(
        self,
        experiment: ExperimentId,
        subjects: &[Subject<'_>],
    ) -> Result<(Decider, Stored, Vec<UserId>)> {
        let users: Vec<&str> = subjects.iter().map(|s| s.user.id.as_str()).collect();
        let accounts: Vec<Option<&str>> =
            subjects.iter().map(|s| s.account.map(|account| account.id.as_str())).collect();
        let rows = self.scope.query(&READ, &[&self.tenant(), &experiment.uuid(), &users, &accounts]).await?;
        let decider = Decider::from_row(rows.first().ok_or_else(|| Error::not_found("experiment"))?)?;
        let (mut stored, mut run_out) = (Stored::with_capacity(rows.len()), Vec::new());
        for row in &rows {
            if row.field::<Option<&str>>("user_id")?.is_some() {
                let quote = Quote::from_row(row)?;
                if row.field::<Option<bool>>("runs_out")? == Some(true) {
                    run_out.push(quote.user_id.clone());
                }
                stored.insert(quote.user_id.clone(), quote);
            }
        }
        Ok((decider, stored, run_out))
    }

    /// Promises the same prices anew.
    async fn renew(self, experiment: ExperimentId, users: &[UserId]) -> Result<Stored> {
        let mut renewed = Stored::with_capacity(users.len());
        // One by one: it is rare, and a list of them would be looked up by reading all quotes of the experiment.
        for user in users {
            let params: Params<'_> = &[&self.tenant(), &experiment.uuid(), &user.as_str()];
            if let Some(row) = self.scope.query_opt(&RENEW, params).await? {
                renewed.insert(user.clone(), Quote::from_row(&row)?);
            }
        }
        Ok(renewed)
    }

    async fn insert(
        self,
        decider: &Decider,
        subjects: &[Subject<'_>],
        shown: &[Shown<'_>],
    ) -> Result<Vec<Quote>> {
        let each = shown.iter().zip(subjects);
        let mut new: Vec<New<'_>> = each.filter_map(|(shown, subject)| shown.to_insert(subject)).collect();
        if new.is_empty() {
            return Ok(Vec::new());
        }
        // Each once, in one order, so that two callers with the same users wait for each other in it.
        new.sort_by_key(|new| new.id);
        new.dedup_by_key(|new| new.id);
        let users: Vec<&str> = new.iter().map(|new| new.id).collect();
        let variants: Vec<i32> = new.iter().map(|new| new.variant).collect();
        let reasons: Vec<&str> = new.iter().map(|new| new.reason).collect();
        let times: Vec<Option<DateTime<Utc>>> = new.iter().map(|new| new.shown_at).collect();
        let (tenant, experiment) = (self.tenant(), decider.id.uuid());
        let rows = self
            .scope
            .query(&INSERT, &[&tenant, &experiment, &decider.phase, &users, &variants, &reasons, &times])
            .await?;
        rows.iter().map(Quote::from_row).collect()
    }

    /// The stored quote of a user, if there is one.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let quoted = tenant.assignments().get(id, &user).await?.map(|quote| quote.price);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn get(self, experiment: ExperimentId, user: &UserId) -> Result<Option<Quote>> {
        let row = self.scope.query_opt(&GET, &[&self.tenant(), &experiment.uuid(), &user.as_str()]).await?;
        row.map(|row| Quote::from_row(&row)).transpose()
    }

    /// All quotes of a user, by experiment; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, user: lastprice::UserId) -> lastprice::Result<()> {
    /// let quotes = tenant.assignments().list_by_user(&user, 100, None).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn list_by_user(self, user: &UserId, limit: u32, after: Option<Cursor>) -> Result<Page<Quote>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&LIST_BY_USER, &[&self.tenant(), &user.as_str(), &after, &rows]).await?;
        let items = rows.iter().map(Quote::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |a: &Quote| a.experiment_id.uuid()))
    }
}

type Stored = HashMap<UserId, Quote>;

/// What a user is shown, before anything new is stored.
enum Shown<'s> {
    /// What is stored under this id.
    Quote(&'s UserId),
    /// This, and it is to be stored under this id.
    New(&'s UserId, Decided, AssignmentReason),
    /// This, and nothing is stored; unless something is, meanwhile, under this id.
    Unstored(Option<&'s UserId>, Decided),
}

/// A quote to store.
struct New<'s> {
    id: &'s str,
    variant: i32,
    reason: &'static str,
    shown_at: Option<DateTime<Utc>>,
}

impl<'s> Shown<'s> {
    fn of(decider: &Decider, subject: &Subject<'s>, stored: &Stored, by_hash: AssignmentReason) -> Self {
        let unit = decider.unit(subject);
        let forced = decider.forced(unit);
        let Some(unit) = unit else { return Shown::Unstored(None, decider.decide(subject, None)) };
        let quote = stored.get(unit.id);
        if let Some(forced) = forced {
            return match quote {
                // What is stored stands, but this tester is shown something else.
                Some(quote) if quote.variant != decider.arm(forced).name => Shown::Unstored(None, forced),
                Some(_) => Shown::Quote(unit.id),
                None if decider.status == ExperimentStatus::Active => {
                    Shown::New(unit.id, forced, AssignmentReason::Forced)
                }
                None => Shown::Unstored(None, forced),
            };
        }
        if quote.is_some() {
            return Shown::Quote(unit.id);
        }
        let decided = decider.decide(subject, Some(unit));
        match decided.reason {
            Reason::Randomised => Shown::New(unit.id, decided, by_hash),
            Reason::Grandfathered => Shown::New(unit.id, decided, AssignmentReason::Grandfathered),
            _ => Shown::Unstored(Some(unit.id), decided),
        }
    }

    fn to_insert(&self, subject: &Subject<'_>) -> Option<New<'s>> {
        let Shown::New(id, decided, reason) = self else { return None };
        let (variant, reason) = (decided.variant as i32, reason.as_str());
        Some(New { id: id.as_str(), variant, reason, shown_at: subject.shown_at })
    }

    /// `None` if what was to be stored is not.
    fn outcome(&self, decider: &Decider, stored: &Stored, new: &HashSet<UserId>) -> Option<AssignOutcome> {
        let assigned = |id: &UserId| {
            let quote = stored.get(id)?.clone();
            Some(AssignOutcome::Assigned { quote, is_new: new.contains(id) })
        };
        match *self {
            Shown::Quote(id) | Shown::New(id, ..) => assigned(id),
            // By another user of the same account, in this very call.
            Shown::Unstored(Some(id), _) if stored.contains_key(id) => assigned(id),
            Shown::Unstored(_, decided) => {
                let Arm { name, price, book } = decider.arm(decided);
                let (variant, price, book) = (name.clone(), *price, book.clone());
                Some(AssignOutcome::Outside { variant, price, book, reason: decided.reason })
            }
        }
    }
}
