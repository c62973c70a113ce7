//! What callers do, over and over: mostly what a shop does, and a look at whether it is so.

mod ledger;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lastprice::{
    AssignOutcome, Client, ErrorKind, ExperimentId, ExperimentStatus, NewAssignment, NewView, NotTakenReason,
    RecorderHandle, Result, Tracked, UsageOutcome, ViewOutcome, chrono::Utc,
};

use lastprice_testkit::TestDatabase;

use crate::oracle::Oracle;
use crate::shop::{Fate, MAIN, Shop, What, experiment};
use crate::table::{Table, count};

/// Of each shop.
const USERS: u64 = 3000;

pub(crate) struct Load {
    pub(crate) shops: Arc<[Shop]>,
    pub(crate) client: Client,
    pub(crate) database: Arc<TestDatabase>,
    pub(crate) events: RecorderHandle,
    pub(crate) oracle: Arc<Oracle>,
    pub(crate) table: Arc<Table>,
}

/// What a caller gets to know.
pub(crate) enum Answer<T> {
    Done(T),
    /// An error that says that nothing was written.
    NotDone,
    /// The connection broke, or the future was dropped.
    Open,
}

/// Of something that is stored once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stored {
    Now,
    Before,
    Refused,
    /// A bug.
    Wrong,
}

impl Load {
    pub(crate) async fn run(self: Arc<Self>, seed: u64, stop: Arc<AtomicBool>) {
        let mut dice = Dice(seed);
        while !stop.load(Ordering::Relaxed) {
            let shop = &self.shops[dice.below(self.shops.len() as u64) as usize];
            match dice.below(100) {
                0..=14 => self.assign(shop, &mut dice).await,
                15..=24 => self.decide(shop, &mut dice),
                25..=31 => self.read_quote(shop, &mut dice).await,
                32..=51 => self.view(shop, &mut dice).await,
                52..=64 => self.sell(shop, &mut dice).await,
                65..=67 => self.sell_for_another_price(shop, &mut dice).await,
                68..=72 => self.refund(shop, &mut dice).await,
                73..=77 => self.renew(shop, &mut dice).await,
                78..=81 => self.report(shop, &mut dice).await,
                82 => self.process_reports(shop, &mut dice).await,
                83..=87 => self.r#use(shop, &mut dice).await,
                88..=91 => self.read_metrics(shop, &mut dice).await,
                92..=95 => self.transact(shop, &mut dice).await,
                96 => self.transact_within(shop, &mut dice).await,
                97 | 98 => self.look_at_others(shop, &mut dice).await,
                _ => self.churn(shop, &stop).await,
            }
            tokio::time::sleep(Duration::from_micros(dice.below(8_000))).await;
        }
    }

    /// Calls, and of sixteen drops one at a random moment.
    async fn call<T>(&self, dice: &mut Dice, what: &str, call: impl Future<Output = Result<T>>) -> Answer<T> {
        let (began, limit) = (Instant::now(), Duration::from_micros(dice.below(8_000)));
        let answer = match dice.below(16) {
            0 => match tokio::time::timeout(limit, call).await {
                Ok(answer) => answer,
                Err(_) => {
                    count(&self.table.dropped);
                    count(&self.table.open);
                    return Answer::Open;
                }
            },
            _ => call.await,
        };
        match answer.map_err(|error| (error.kind(), error)) {
            Ok(answer) => {
                self.table.done(began.elapsed());
                Answer::Done(answer)
            }
            Err((ErrorKind::Unavailable | ErrorKind::Timeout, _)) => {
                count(&self.table.failed);
                Answer::NotDone
            }
            Err((kind, error)) => {
                count(&self.table.open);
                if kind != ErrorKind::OutcomeUnknown {
                    self.oracle.broken(format!("{what}: {error:?}"));
                }
                Answer::Open
            }
        }
    }

    /// Stores an entry by one of the ways; if the outcome is open, perhaps again.
    async fn store<F: Future<Output = Result<Stored>>>(
        &self,
        shop: &Shop,
        dice: &mut Dice,
        n: u32,
        what: &str,
        store: impl Fn() -> F,
    ) {
        let mut is_first = true;
        loop {
            match self.call(dice, what, store()).await {
                Answer::Done(Stored::Now) => return shop.books().set(n, Fate::Done),
                Answer::Done(Stored::Before) => {
                    if is_first {
                        self.oracle.broken(format!("{what} {n}: a duplicate of itself"));
                    }
                    return shop.books().set(n, Fate::Done);
                }
                Answer::Done(Stored::Wrong) => return,
                // Of an earlier attempt nothing is known yet.
                Answer::Done(Stored::Refused) | Answer::NotDone if !is_first => return,
                Answer::Done(Stored::Refused) | Answer::NotDone => return shop.books().set(n, Fate::NotDone),
                Answer::Open if dice.below(3) == 0 => return,
                Answer::Open => is_first = false,
            }
        }
    }

    fn stored(&self, what: &str, tracked: &Tracked) -> Stored {
        match tracked {
            Tracked::Written => Stored::Now,
            Tracked::Duplicate => Stored::Before,
            other => {
                self.oracle.broken(format!("{what}: {other:?}"));
                Stored::Wrong
            }
        }
    }

    async fn assign(&self, shop: &Shop, dice: &mut Dice) {
        let n = dice.below(USERS) as u32;
        let user = shop.user(n);
        if dice.below(3) == 0 {
            let event = NewAssignment::new(shop.main, user);
            if let Answer::Done(tracked) =
                self.call(dice, "track", self.events.track(shop.tenant.tenant_id(), event)).await
            {
                self.stored("an assignment", &tracked);
            }
            return;
        }
        match self.call(dice, "assign", shop.tenant.assignments().assign(shop.main, &user)).await {
            Answer::Done(AssignOutcome::Assigned { quote, .. }) => self.quoted(shop, n, quote.price),
            Answer::Done(outside) => {
                self.oracle.broken(format!("outside of an active experiment: {outside:?}"))
            }
            Answer::NotDone | Answer::Open => {}
        }
    }

    fn quoted(&self, shop: &Shop, user: u32, price: lastprice::Money) {
        let before = shop.books().quoted(user, price.minor().unwrap_or(-1));
        if let Some(before) = before {
            self.oracle.broken(format!("shop {}: user {user} is re-priced from {before}", shop.number));
        }
    }

    /// The stored quote of a user who has one.
    async fn read_quote(&self, shop: &Shop, dice: &mut Dice) {
        let Some((n, _)) = self.somebody(shop, dice) else { return };
        let user = shop.user(n);
        match self.call(dice, "get", shop.tenant.assignments().get(shop.main, &user)).await {
            Answer::Done(Some(quote)) => self.quoted(shop, n, quote.price),
            Answer::Done(None) => {
                self.oracle.broken(format!("shop {}: the quote of user {n} is lost", shop.number))
            }
            Answer::NotDone | Answer::Open => {}
        }
    }

    /// From memory.
    fn decide(&self, shop: &Shop, dice: &mut Dice) {
        for _ in 0..20 {
            let n = dice.below(USERS) as u32;
            let known = shop.books().quotes.get(&n).copied();
            let decision = shop.assigner.assign(MAIN, &shop.user(n));
            let says = decision.as_ref().map(|decision| (decision.price().minor(), decision.is_certain()));
            count(&self.table.decisions);
            let fits = says
                .is_some_and(|(cents, certain)| !certain || known.is_none_or(|known| cents == Some(known)));
            if !fits {
                self.oracle
                    .broken(format!("shop {}: the assigner says {says:?} to {n}, of {known:?}", shop.number));
            }
        }
    }

    /// Somebody who was quoted a price, and how much.
    fn somebody(&self, shop: &Shop, dice: &mut Dice) -> Option<(u32, i64)> {
        let books = shop.books();
        let user = *books.users.get(dice.below(books.users.len().max(1) as u64) as usize)?;
        Some((user, books.quotes[&user]))
    }

    async fn view(&self, shop: &Shop, dice: &mut Dice) {
        let Some((user, _)) = self.somebody(shop, dice) else { return };
        let n = shop.books().note(What::View, user, 0, false);
        let view = NewView::new(shop.main, shop.user(user)).id(Shop::view(n));
        let tenant = shop.tenant.tenant_id();
        match dice.below(3) {
            0 => {
                let fate = match self.events.record(tenant, view) {
                    Ok(()) => Fate::Promised,
                    Err(not_taken) => {
                        if !matches!(not_taken.reason(), NotTakenReason::Full) {
                            self.oracle.broken(format!("{not_taken:?}"));
                        }
                        Fate::NotDone
                    }
                };
                shop.books().set(n, fate);
            }
            1 => {
                let track =
                    || async { Ok(self.stored("a view", &self.events.track(tenant, view.clone()).await?)) };
                self.store(shop, dice, n, "a tracked view", track).await;
            }
            _ => {
                let record = || async {
                    Ok(match shop.tenant.views().record(&view).await? {
                        ViewOutcome::Recorded => Stored::Now,
                        ViewOutcome::Duplicate => Stored::Before,
                        other => {
                            self.oracle.broken(format!("a view of somebody with a quote: {other:?}"));
                            Stored::Wrong
                        }
                    })
                };
                self.store(shop, dice, n, "a view", record).await;
            }
        }
    }

    async fn r#use(&self, shop: &Shop, dice: &mut Dice) {
        let amount = 1 + dice.below(9);
        let n = shop.books().note(What::Usage, 0, amount as i64, false);
        let usage = lastprice::NewUsage::new("calls", Utc::now().date_naive(), amount, Shop::key(n));
        let (tracks, tenant) = (dice.below(2) == 0, shop.tenant.tenant_id());
        let add = || async {
            if tracks {
                return Ok(self.stored("usage", &self.events.track(tenant, usage.clone()).await?));
            }
            Ok(match shop.tenant.usage().add(&usage).await? {
                UsageOutcome::Added => Stored::Now,
                UsageOutcome::Duplicate => Stored::Before,
                other => {
                    self.oracle.broken(format!("usage: {other:?}"));
                    Stored::Wrong
                }
            })
        };
        self.store(shop, dice, n, "usage", add).await;
    }

    /// Live numbers have what was acknowledged before they were asked for, and nothing that was never sent.
    async fn read_metrics(&self, shop: &Shop, dice: &mut Dice) {
        let bounds = || {
            let books = shop.books();
            let [views, sold, reported] =
                [What::View, What::Sale, What::Reported].map(|what| books.count(what));
            [views, (sold.0 + reported.0, sold.1 + reported.1), (books.users.len() as u64, USERS)]
        };
        let before = bounds();
        let at_once = dice.below(2) == 0;
        let asking = async {
            Ok(match at_once {
                true => shop.tenant.metrics().experiment(shop.main).await?,
                false => {
                    let variants = shop.tenant.metrics().by_variant(shop.main).await?;
                    variants.into_iter().fold(
                        Default::default(),
                        |mut all: lastprice::MetricCounts, variant| {
                            all.views += variant.counts.views;
                            all.conversions += variant.counts.conversions;
                            all.assignments += variant.counts.assignments;
                            all
                        },
                    )
                }
            })
        };
        if let Answer::Done(counts) = self.call(dice, "metrics", asking).await {
            let after = bounds();
            for (n, live) in [counts.views, counts.conversions, counts.assignments].into_iter().enumerate() {
                if live < before[n].0 || live > after[n].1 {
                    let what = ["views", "sales", "assignments"][n];
                    self.oracle.broken(format!(
                        "shop {}: {live} {what}, and not {} to {}",
                        shop.number, before[n].0, after[n].1
                    ));
                }
            }
        }
    }

    /// Nothing of another shop is there for this one.
    async fn look_at_others(&self, shop: &Shop, dice: &mut Dice) {
        let other = &self.shops[(shop.number + 1) % self.shops.len()];
        let Some((user, _)) = self.somebody(other, dice) else { return };
        let (user, tenant) = (other.user(user), &shop.tenant);
        let looking = async {
            Ok([
                tenant.experiments().get(other.main).await?.is_some(),
                tenant.assignments().get(other.main, &user).await?.is_some(),
                !tenant.assignments().list_by_user(&user, 10, None).await?.items.is_empty(),
                !tenant.conversions().list_by_user(&user, 10, None).await?.items.is_empty(),
                tenant.metrics().experiment(other.main).await.is_ok(),
            ])
        };
        if let Answer::Done(seen) = self.call(dice, "another's", looking).await
            && seen != [false; 5]
        {
            self.oracle.broken(format!("shop {} sees something of another: {seen:?}", shop.number));
        }
    }

    /// An experiment's life: who was in it stays so, and who comes while it is paused is not.
    async fn churn(&self, shop: &Shop, stop: &AtomicBool) {
        let Ok(mut life) = shop.churn.try_lock() else { return };
        let (key, id) = (format!("churn-{life}"), ExperimentId::new());
        *life += 1;
        let experiments = || shop.tenant.experiments();
        let is = |status| async move {
            let found = shop.tenant.experiments().get(id).await?;
            Ok(found.is_some_and(|experiment| experiment.status == status))
        };
        let create = || async { experiments().create(experiment(&key).id(id)).await.map(drop) };
        self.surely("create", create, || is(ExperimentStatus::Draft)).await;
        let activate = || async { experiments().activate(id).await.map(drop) };
        self.surely("activate", activate, || is(ExperimentStatus::Active)).await;
        let (first, late) = (shop.user(u32::MAX), shop.user(u32::MAX - 1));
        let quote = self.until_done(|| async { shop.tenant.assignments().assign(id, &first).await }).await;
        let pause = || async { experiments().pause(id).await.map(drop) };
        self.surely("pause", pause, || is(ExperimentStatus::Paused)).await;
        for (user, was) in [(&first, Some(&quote)), (&late, None)] {
            let now = self.until_done(|| async { shop.tenant.assignments().assign(id, user).await }).await;
            let fits = match (&now, was) {
                (AssignOutcome::Assigned { quote: now, .. }, Some(AssignOutcome::Assigned { quote, .. })) => {
                    now.price == quote.price && now.variant == quote.variant
                }
                (AssignOutcome::Outside { .. }, None) => true,
                _ => false,
            };
            if !fits {
                self.oracle.broken(format!("of a paused experiment {now:?}, after {was:?}"));
            }
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let resume = || async { experiments().resume(id).await.map(drop) };
        self.surely("resume", resume, || is(ExperimentStatus::Active)).await;
        let complete = || async { experiments().complete(id, Some("29")).await.map(drop) };
        self.surely("complete", complete, || is(ExperimentStatus::Completed)).await;
    }

    /// Until it is so. What was refused because it is so already was done by an attempt whose outcome was open.
    async fn surely<F, G>(&self, what: &str, step: impl Fn() -> F, is_so: impl Fn() -> G)
    where
        F: Future<Output = Result<()>>,
        G: Future<Output = Result<bool>>,
    {
        let mut is_open = false;
        loop {
            match step().await.map_err(|error| (error.kind(), error)) {
                Ok(()) => return,
                Err((ErrorKind::Unavailable | ErrorKind::Timeout, _)) => {}
                Err((ErrorKind::OutcomeUnknown, _)) => is_open = true,
                Err((ErrorKind::Conflict, _)) if is_open && self.until_done(&is_so).await => return,
                Err((_, error)) => return self.oracle.broken(format!("{what}: {error:?}")),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// For what may be asked again and again.
    async fn until_done<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn() -> F) -> T {
        loop {
            if let Ok(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Numbers that look random and are the same in every run: splitmix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// From 0 to 1.
    pub(crate) fn share(&mut self) -> f64 {
        self.below(1 << 32) as f64 / (1u64 << 32) as f64
    }
}
