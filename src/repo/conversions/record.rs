//! How an entry gets into the ledger: written if it can be in one statement; what was not written is looked at again, and `unwritten`
//! says why it was not.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::columns::Columns;
use super::model::{Conversion, ConversionKind, OUTSIDE};
use super::new::NewConversion;
use super::outcome::ConversionOutcome;
use super::reported;
use super::sql::{BY_KEYS, FOLLOW, OPEN, OPEN_OUTSIDE};
use super::unwritten::refusal;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ConversionId, ExperimentId, IdempotencyKey, Period, UserId};
use crate::repo::experiments::Reason;
use crate::repo::users::Persons;
use crate::repo::{AssignOutcome, AssignmentReason};
use crate::scope::{Params, Statement, TenantScope};

/// Before the money moves, or after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    Authorise,
    Settle,
}

/// One call: the entries, and what is known of what became of them.
pub(super) struct Recording<'s> {
    pub(super) scope: &'s TenantScope<'s>,
    pub(super) door: Door,
    pub(super) entries: &'s [NewConversion],
    /// What stands under each key. Of one key's entries in the call the first is written.
    standing: HashMap<IdempotencyKey, Conversion>,
    /// Who was merged, of the users of those and of the entries, where the two differ.
    persons: Persons,
    /// What this call has written.
    ours: HashSet<ConversionId>,
    /// What is known otherwise, by the entry's place.
    pub(super) known: HashMap<usize, ConversionOutcome>,
}

impl<'s> Recording<'s> {
    pub(super) async fn run(
        scope: &'s TenantScope<'s>,
        door: Door,
        entries: &'s [NewConversion],
    ) -> Result<Vec<ConversionOutcome>> {
        let (standing, ours, known) = (HashMap::new(), HashSet::new(), HashMap::new());
        let persons = Persons::default();
        let mut this = Recording { scope, door, entries, standing, persons, ours, known };
        match this.work().await {
            Ok(()) => Ok((0..entries.len()).map(|at| this.outcome(at)).collect()),
            Err(error) if this.ours.is_empty() => Err(error),
            Err(error) => Err(scope.after_writing(error)),
        }
    }

    async fn work(&mut self) -> Result<()> {
        let (scope, entries) = (self.scope, self.entries);
        let (followers, openers): (Vec<usize>, Vec<usize>) =
            (0..entries.len()).partition(|&at| entries[at].follows());
        // What others may belong to comes first.
        if !openers.is_empty() {
            let rows = self.open(scope, &openers, None).await?;
            self.wrote(&rows)?;
            let mut unwritten = self.missing(&openers).await?;
            if self.door == Door::Authorise {
                unwritten = self.refuse(unwritten).await?;
            }
            if !unwritten.is_empty() {
                self.open_late(&unwritten).await?;
            }
        }
        let is_renewal = |at: &usize| entries[*at].kind == ConversionKind::Renewal;
        let (renewals, backs): (Vec<usize>, Vec<usize>) = followers.into_iter().partition(is_renewal);
        for followers in [renewals, backs] {
            if followers.is_empty() {
                continue;
            }
            let rows = self.follow(&followers).await?;
            self.wrote(&rows)?;
            let unmatched = self.missing(&followers).await?;
            if !unmatched.is_empty() {
                self.explain(&unmatched).await?;
            }
        }
        self.look_who().await
    }

    /// Of entries that stand under another user than is reported now: whether they are one person.
    async fn look_who(&mut self) -> Result<()> {
        let pair = |entry: &'s NewConversion| {
            let (user, stored) = (entry.user_id.as_ref()?, self.stands(entry)?);
            (stored.user_id != *user && !self.is_ours(entry, stored)).then_some([user, &stored.user_id])
        };
        let users: Vec<&UserId> = self.entries.iter().filter_map(pair).flatten().collect();
        if !users.is_empty() {
            self.persons = self.scope.users().persons(users).await?;
        }
        Ok(())
    }

    pub(super) fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    fn wrote(&mut self, rows: &[Row]) -> Result<()> {
        for row in rows {
            let entry = Conversion::from_row(row)?;
            self.ours.insert(entry.id);
            self.standing.insert(entry.idempotency_key.clone(), entry);
        }
        Ok(())
    }

    fn outcome(&mut self, at: usize) -> ConversionOutcome {
        let entry = &self.entries[at];
        let Some(stored) = self.stands(entry).cloned() else {
            return self.known.remove(&at).unwrap_or(ConversionOutcome::Unknown);
        };
        if stored.id == entry.id && self.ours.remove(&entry.id) {
            return ConversionOutcome::Recorded(stored);
        }
        let mut fields = reported::differences(entry, &stored);
        // The user was merged, or erased, since it was recorded.
        if entry.user_id.as_ref().is_some_and(|user| self.persons.is_of(&stored.user_id, user)) {
            fields.retain(|field| *field != "user_id");
        }
        match fields.is_empty() {
            true => ConversionOutcome::Duplicate(stored),
            false => ConversionOutcome::Conflict { stored: Some(Box::new(stored)), fields },
        }
    }

    /// What the ledger has of the entry: under its key, or as a webhook has reported it.
    fn stands(&self, entry: &NewConversion) -> Option<&Conversion> {
        let reported = || {
            let mut standing = reported::keys_of(entry).filter_map(|key| self.standing.get(&key));
            standing.find(|stored| reported::is_same(entry, stored))
        };
        self.standing.get(&entry.idempotency_key).or_else(reported)
    }

    fn is_ours(&self, entry: &NewConversion, stored: &Conversion) -> bool {
        stored.id == entry.id && self.ours.contains(&stored.id)
    }

    /// Sales and trials: of users with a quote, or else, with what they were shown by `outside`.
    async fn open(
        &self,
        scope: &TenantScope<'_>,
        places: &[usize],
        outside: Option<&[(&str, &str)]>,
    ) -> Result<Vec<Row>> {
        // They are written in the order of subscriptions and orders. Of one key's the first in the call is.
        let mut first = HashMap::new();
        let places: Vec<usize> = places
            .iter()
            .copied()
            .filter(|&at| {
                let entry = &self.entries[at];
                let of = (&entry.order_id, &entry.subscription_id);
                *first.entry(&entry.idempotency_key).or_insert(of) == of
            })
            .collect();
        let places = places.as_slice();
        let users: Vec<&str> = self.of(places, |e| e.user_id.as_ref().map_or("", UserId::as_str));
        let Some(outside) = outside else { return self.write(scope, &OPEN, places, &[&users]).await };
        let (variants, reasons): (Vec<&str>, Vec<&str>) = outside.iter().copied().unzip();
        self.write(scope, &OPEN_OUTSIDE, places, &[&users, &variants, &reasons]).await
    }

    /// What belongs to an entry that is there before it.
    async fn follow(&self, places: &[usize]) -> Result<Vec<Row>> {
        let periods: Vec<Option<&str>> = self.of(places, |e| e.period.as_ref().map(Period::as_str));
        self.write(self.scope, &FOLLOW, places, &[&periods]).await
    }

    async fn write(
        &self,
        scope: &TenantScope<'_>,
        statement: &'static Statement,
        places: &[usize],
        more: Params<'_>,
    ) -> Result<Vec<Row>> {
        let (tenant, settled) = (self.tenant(), self.door == Door::Settle);
        let columns = Columns::of(places.iter().map(|&at| &self.entries[at]));
        let first: [&(dyn ToSql + Sync); 2] = [&tenant, &settled];
        scope.query(statement, &[&first, columns.params().as_slice(), more].concat()).await
    }

    pub(super) fn of<'e, T>(&self, places: &[usize], column: impl Fn(&'e NewConversion) -> T) -> Vec<T>
    where
        's: 'e,
    {
        let entries: &'s [NewConversion] = self.entries;
        places.iter().map(|&at| column(&entries[at])).collect()
    }

    /// Those under whose key nothing stands. Looks for what was there before, or was written by somebody else meanwhile.
    pub(super) async fn missing(&mut self, places: &[usize]) -> Result<Vec<usize>> {
        let missing = |this: &Self| -> Vec<usize> {
            places.iter().copied().filter(|&at| this.stands(&this.entries[at]).is_none()).collect()
        };
        let missed = missing(self);
        if missed.is_empty() {
            return Ok(missed);
        }
        let entries = missed.iter().map(|&at| &self.entries[at]);
        let reported: Vec<IdempotencyKey> = entries.clone().flat_map(reported::keys_of).collect();
        let keys: Vec<&str> =
            entries.map(|e| &e.idempotency_key).chain(&reported).map(IdempotencyKey::as_str).collect();
        for row in &self.scope.query(&BY_KEYS, &[&self.tenant(), &keys]).await? {
            let entry = Conversion::from_row(row)?;
            self.standing.insert(entry.idempotency_key.clone(), entry);
        }
        Ok(missing(self))
    }

    /// Those that may be authorised: of users who have no quote yet, at the price that they would be shown. Nobody gets a
    /// quote by being refused.
    async fn refuse(&mut self, places: Vec<usize>) -> Result<Vec<usize>> {
        let mut allowed = Vec::with_capacity(places.len());
        for at in places {
            let entry = &self.entries[at];
            let (Some(experiment), Some(user)) = (entry.experiment_id, &entry.user_id) else { continue };
            match self.scope.assignments().show_late(experiment, user).await {
                Ok((price, book, until)) => match refusal(entry, price, &book, until) {
                    Some(refusal) => drop(self.known.insert(at, ConversionOutcome::Refused(refusal))),
                    None => allowed.push(at),
                },
                Err(error) if error.kind() == ErrorKind::NotFound => {} // stays unknown
                Err(error) => return Err(error),
            }
        }
        Ok(allowed)
    }

    /// Sales of users who have no quote: they get one, if the experiment takes them, in the transaction of the sale.
    async fn open_late(&mut self, places: &[usize]) -> Result<()> {
        let mut places = places.to_vec();
        for _ in 0..3 {
            // Its statements hold locks until the end, so two of these may stop each other whatever the order.
            let (rows, quoted) = self.scope.unless_deadlocked(|| self.try_open_late(&places)).await?;
            self.wrote(&rows)?;
            // Somebody else's of the same key: there between our first look and now, or waiting.
            places = self.missing(&places).await?;
            if places.is_empty() {
                return Ok(());
            }
            self.waiting(&places).await?;
            // Or the user was erased between the look and the entry: then it is a new one's.
            places.retain(|at| quoted.contains(at) && !self.known.contains_key(at));
            if places.is_empty() {
                return Ok(());
            }
        }
        match places.iter().all(|&at| reported::is_report(&self.entries[at])) {
            true => Ok(()), // and whoever looks again finds why
            false => Err(Error::conflict("the user was erased again and again meanwhile")),
        }
    }

    /// What was written, and which of them are of users with a quote.
    async fn try_open_late(&self, places: &[usize]) -> Result<(Vec<Row>, Vec<usize>)> {
        // In one order, so that they mostly do not.
        let mut users: BTreeMap<ExperimentId, Vec<&UserId>> = BTreeMap::new();
        for &at in places {
            let entry = &self.entries[at];
            if let (Some(experiment), Some(user)) = (entry.experiment_id, &entry.user_id) {
                users.entry(experiment).or_default().push(user);
            }
        }
        let own = self.scope.begin_if_alone().await?;
        let scope: &TenantScope<'_> = own.as_deref().unwrap_or(self.scope);

        let mut shown: HashMap<(ExperimentId, &UserId), AssignOutcome> = HashMap::new();
        for (experiment, users) in users {
            match scope.assignments().assign_late(experiment, &users).await {
                Ok(outcomes) => {
                    shown.extend(users.into_iter().map(|user| (experiment, user)).zip(outcomes));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {} // stays unknown
                Err(error) => return Err(error),
            }
        }
        let of = |at: usize| {
            let entry = &self.entries[at];
            shown.get(&(entry.experiment_id?, entry.user_id.as_ref()?))
        };
        let (mut quoted, mut outside, mut shown_outside) = (Vec::new(), Vec::new(), Vec::new());
        for &at in places {
            match of(at) {
                Some(AssignOutcome::Assigned { .. }) => quoted.push(at),
                Some(AssignOutcome::Outside { variant, reason, .. }) => {
                    outside.push(at);
                    let is_forced = *reason == Reason::Forced;
                    let reason = if is_forced { AssignmentReason::Forced.as_str() } else { OUTSIDE };
                    shown_outside.push((variant.as_str(), reason));
                }
                None => {}
            }
        }
        let mut rows = Vec::new();
        if !quoted.is_empty() {
            rows.extend(self.open(scope, &quoted, None).await?);
        }
        if !outside.is_empty() {
            rows.extend(self.open(scope, &outside, Some(&shown_outside)).await?);
        }
        if let Some(own) = own {
            own.commit().await?;
        }
        Ok((rows, quoted))
    }
}
