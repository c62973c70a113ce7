//! Who is one person, and who is forgotten.

mod model;
mod sql;

use std::collections::HashMap;

use tokio_postgres::Row;
use uuid::Uuid;

use super::page::{Cursor, Page, rows_for};
use super::row::Fields;
use crate::error::{Error, Result};
use crate::id::UserId;
use crate::scope::TenantScope;
pub(super) use model::is_pseudonym;
pub use model::{ErasedCounts, Erasure, MergePolicy, UserMerge};
pub(super) use sql::STATEMENTS;
use sql::{ERASE, ERASURES, KNOWN, MERGE, MERGED, MERGES};

const NOT_READ_COMMITTED: &str =
    "the host's transaction is not READ COMMITTED, and would not see what was merged meanwhile";

/// What concerns a user as a person: [one person by two ids](Users::merge), and [the right to be forgotten](Users::erase).
///
/// A dropped call: see [cancel safety](TenantScope#cancel-safety).
#[derive(Debug, Clone, Copy)]
pub struct Users<'a> {
    scope: &'a TenantScope<'a>,
}

impl<'a> Users<'a> {
    pub(crate) fn new(scope: &'a TenantScope<'a>) -> Self {
        Users { scope }
    }

    fn tenant(&self) -> Uuid {
        self.scope.tenant_id().uuid()
    }

    /// Forgets a user: wherever the id is stored there is a pseudonym afterwards, random and the same in all tables, so
    /// that counts, sums and what each user brought stay as they are to the last digit. With it go the ids that were
    /// [merged](Users::merge) into it. `None` if nothing is stored of it, or nothing any more but what stays (below).
    ///
    /// What becomes of what is stored:
    ///
    /// - quotes, views and ledger entries get the pseudonym; metadata of views and entries becomes empty, also of one that waits for
    ///   its sale and says the id: as a text, a number or the name of a member of its JSON, which is the id and nothing else;
    /// - bodies of webhooks that became one of those entries, or say the id in this way, become empty. So an
    ///   [ignored](crate::WebhookStatus::Ignored) one is gone: to [retry](crate::Webhooks::retry) it later fails with `body`. Of one that is
    ///   still [pending](crate::WebhookStatus::Pending), or has failed and may be tried again, only the `customer_id` is
    ///   replaced, since money may be in it: process it, and then erase [the pseudonym](Erasure::pseudonym); or
    ///   [discard](crate::Webhooks::discard) it, and erase the user again;
    /// - the id is taken off the [lists](crate::Experiments::force) of experiments;
    /// - ids of orders and subscriptions, idempotency keys and ids of deliveries stay: they are the tenant's records, and
    ///   what makes a repeated report count once. So does a text that has the id in it, as "Invoice for alice". [How often](ErasedCounts::naming)
    ///   is reported, where it was looked at, and is no reason for an erasure;
    /// - who made changes ([`Actor`](crate::Actor)) stays as well, but for what is written here: whoever asks for his own
    ///   erasure stands there by the pseudonym. So does what you have written into metadata of experiments and tenants, or into the
    ///   reasons of recommendations.
    ///
    /// Not looked at is what is written of **other** users: metadata, orders and keys of their entries and views, such as a gift's
    /// recipient. Nor are the tables of the original Last Price after an upgrade (schema `original`): they keep whoever is
    /// in them until they are dropped.
    ///
    /// An id that was merged stands for the person: erasing either erases both. Ids of accounts are ids, too: in experiments by
    /// [account](crate::AssignmentUnit::Account) it is the account of this name that is forgotten, so let no account have a user's.
    ///
    /// A backup still knows the user: keep the requests that you were given, outside of this database, for as long as your backups, and
    /// erase again what you restore.
    ///
    /// The id is that of a new user afterwards, who is assigned and counted anew. This holds for what arrives later, such as the events
    /// that a [`Recorder`](crate::Recorder) has yet to write ([flush](crate::RecorderHandle::flush) it before), and for what another transaction was writing
    /// at this moment: erasing again forgets that, too. Renewals and refunds of the erased user's orders stay with the pseudonym.
    ///
    /// One round trip. It reads all views, webhooks and reported usage of the tenant, which takes a second or more for a million of
    /// them: give it a client with a [`statement_timeout`](crate::ClientBuilder::statement_timeout) that is long enough. What is written
    /// of the user meanwhile (a quote, a sale, a webhook that names the user) waits until it has ended, and so do changes of experiments
    /// whose list has the user; nobody else does. That somebody was erased is [kept](Users::erasures), and not who.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, user: lastprice::UserId) -> lastprice::Result<()> {
    /// if let Some(erasure) = tenant.users().erase(&user).await? {
    ///     println!("{} entries are of {} now", erasure.counts.entries, erasure.pseudonym);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Conflict`](crate::ErrorKind::Conflict) in a host's transaction that is not READ COMMITTED;
    /// [`Timeout`](crate::ErrorKind::Timeout) if it takes longer than
    /// [`statement_timeout`](crate::ClientBuilder::statement_timeout); then nothing was changed.
    ///
    /// # Cancel safety
    ///
    /// All of it happens or nothing. After an unknown outcome call again: `None` says that it has happened (what stays is
    /// no reason to do it again), and [`erasures`](Users::erasures) has what it did.
    pub async fn erase(self, user: &UserId) -> Result<Option<Erasure>> {
        let params = &[&self.tenant() as _, &user.as_str() as _, &Uuid::now_v7() as _];
        let Some(row) = self.scope.query_opt(&ERASE, params).await? else { return Ok(None) };
        if row.field::<&str>("pseudonym")?.is_empty() {
            return Err(Error::conflict(NOT_READ_COMMITTED));
        }
        Erasure::from_row(&row).map(Some)
    }

    /// That users were erased, when and by whom; oldest first, at most 1000 a page. Nobody can change it or take it back.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// for erasure in tenant.users().erasures(100, None).await?.items {
    ///     println!("{}: {} views", erasure.erased_at, erasure.counts.views);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn erasures(self, limit: u32, after: Option<Cursor>) -> Result<Page<Erasure>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&ERASURES, &[&self.tenant(), &after, &rows]).await?;
        let items = rows.iter().map(Erasure::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |erasure: &Erasure| erasure.id))
    }

    /// Says that two ids are one person: after a login, say, the cookie's and the account's. Call it before the first price is
    /// asked for under the known id, and from then on use that one.
    ///
    /// In every experiment in which one of the two has a quote, both have it afterwards, and the person is **one** user: the
    /// known id's quote counts, with its reason and the time of its assignment; the other id leads to it, so that what is
    /// reported under it later is the known user's at the same price. Ids that were merged into one of the two before come along: whatever
    /// becomes of the person's price and place in the statistics holds for all of them. Ledger entries become the known user's, each once: no
    /// sum changes. Views stay with the id that saw them.
    ///
    /// Where **both** have a quote, [the policy](MergePolicy) says what becomes of it; whoever saw two prices is a crossover, is reported
    /// as one, and is in no statistic of that experiment any more (reason [`Merged`](crate::AssignmentReason::Merged)).
    ///
    /// Merged ids stay merged. Doing it again gives the same answer (and takes over what another transaction was
    /// writing meanwhile: sales to users whom the experiment does not take; other sales, renewals and refunds are waited for).
    /// Experiments that were [archived](crate::Admin::archive_completed) stay as they are. A chain is followed: if `known` was merged into a third id, that one is meant. In experiments that neither was in,
    /// an old id is a user of its own, until they are merged again; a payment counts once there, too, whichever of the person's ids reports it again.
    ///
    /// An [`Assigner`](crate::Assigner) is not [certain](crate::Decision::is_certain) of anybody in the experiments that a merge
    /// touched.
    ///
    /// One round trip, at the cost of what the two have. In a transaction of your own merge at most 1000 times, and commit: each merge keeps up
    /// to three of the server's locks until the end, of which it has `max_locks_per_transaction` × `max_connections` for everybody (6400, if
    /// nobody said otherwise).
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, cookie: lastprice::UserId, account: lastprice::UserId) -> lastprice::Result<()> {
    /// let merge = tenant.users().merge(&cookie, &account, lastprice::MergePolicy::FirstQuoteWins).await?;
    /// for experiment in merge.crossovers {
    ///     println!("{account} has seen two prices in {experiment}");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names `known` if it is the same id;
    /// [`Conflict`](crate::ErrorKind::Conflict) that names `known` if `anonymous` is somebody else's already or `known` was merged into it, and
    /// `policy` if the two were merged by another one, and in a host's transaction that is not READ COMMITTED; [`NotFound`](crate::ErrorKind::NotFound) if there is no such tenant.
    ///
    /// # Cancel safety
    ///
    /// See [`TenantScope`]: all of it happens or nothing. Calling again gives the same answer.
    pub async fn merge(self, anonymous: &UserId, known: &UserId, policy: MergePolicy) -> Result<UserMerge> {
        if anonymous == known {
            return Err(Error::invalid("known", "is the anonymous id itself"));
        }
        for (field, user) in [("anonymous", anonymous), ("known", known)] {
            if is_pseudonym(user) {
                return Err(Error::invalid(field, "is the pseudonym of a user who was erased"));
            }
        }
        let id = Uuid::now_v7();
        let params = &[
            &self.tenant() as _,
            &anonymous.as_str() as _,
            &known.as_str() as _,
            &policy.as_str() as _,
            &id as _,
        ];
        let row = self.scope.query_opt(&MERGE, params).await?;
        let row = row.ok_or_else(|| Error::not_found("tenant"))?;
        let conflict = |why, field| Err(Error::conflict(why).with_fields(vec![field]));
        match row.field("outcome")? {
            "merged" => UserMerge::from_row(&row),
            "elsewhere" => conflict("the anonymous id was merged into another one", "known"),
            "circle" => conflict("the known id was merged into the anonymous one", "known"),
            "isolation" => Err(Error::conflict(NOT_READ_COMMITTED)),
            "policy" => conflict("the ids were merged by another policy", "policy"),
            _ => Err(Error::internal("a merge has an outcome that this release does not know")),
        }
    }

    /// Into whom an id was merged; `None` if it was not.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, cookie: lastprice::UserId) -> lastprice::Result<()> {
    /// let person = tenant.users().merged(&cookie).await?.map_or(cookie, |merge| merge.known);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Only those of the connection: see [`ErrorKind`](crate::ErrorKind).
    pub async fn merged(self, user: &UserId) -> Result<Option<UserMerge>> {
        let row = self.scope.query_opt(&MERGED, &[&self.tenant(), &user.as_str()]).await?;
        row.map(|row| UserMerge::from_row(&row)).transpose()
    }

    /// All merges, oldest first; at most 1000 a page.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle) -> lastprice::Result<()> {
    /// let merges = tenant.users().merges(1000, None).await?;
    /// let crossovers: usize = merges.items.iter().map(|merge| merge.crossovers.len()).sum();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for the limit.
    pub async fn merges(self, limit: u32, after: Option<Cursor>) -> Result<Page<UserMerge>> {
        let (rows, after) = (rows_for(limit)?, Cursor::ascending(after));
        let rows = self.scope.query(&MERGES, &[&self.tenant(), &after, &rows]).await?;
        let items = rows.iter().map(UserMerge::from_row).collect::<Result<_>>()?;
        Ok(Page::new(items, limit, |merge: &UserMerge| merge.id))
    }

    /// Who these are by now: those who were merged, and into whom.
    pub(super) async fn persons<'u>(self, users: impl IntoIterator<Item = &'u UserId>) -> Result<Persons> {
        let users: Vec<&str> = users.into_iter().map(UserId::as_str).collect();
        let rows = self.scope.query(&KNOWN, &[&self.tenant(), &users]).await?;
        let known = |row: &Row| Ok((row.field("user_id")?, row.field("known_id")?));
        Ok(Persons(rows.iter().map(known).collect::<Result<_>>()?))
    }
}

/// Ids that were merged, and into whom.
#[derive(Default)]
pub(super) struct Persons(HashMap<String, String>);

impl Persons {
    /// Whether what is stored of the one is the other's: the same id, one person by two, or one who was erased, of whom nobody knows.
    pub(super) fn is_of(&self, stored: &UserId, user: &UserId) -> bool {
        stored == user || is_pseudonym(stored) || self.known(stored) == self.known(user)
    }

    fn known<'s>(&'s self, user: &'s UserId) -> &'s str {
        self.0.get(user.as_str()).map_or(user.as_str(), String::as_str)
    }
}
