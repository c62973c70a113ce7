//! What callers do with money.

use std::sync::atomic::{AtomicBool, Ordering};

use lastprice::{ConversionOutcome, NewConversion, NewView, Period, Result, WebhookOutcome, WebhookStatus};

use super::{Answer, Dice, Load, Stored};
use crate::shop::{Fate, Shop, What, usd};

/// What goes back at once, in cents.
const PART: i64 = 700;

impl Load {
    pub(super) async fn sell(&self, shop: &Shop, dice: &mut Dice) {
        let Some((user, cents)) = self.somebody(shop, dice) else { return };
        let n = shop.books().note(What::Sale, user, cents, false);
        self.enter(shop, dice, n, &sale(shop, n, user, cents)).await;
    }

    /// By one of the doors, or on its own way.
    async fn enter(&self, shop: &Shop, dice: &mut Dice, n: u32, entry: &NewConversion) {
        let (door, tenant) = (dice.below(3), shop.tenant.tenant_id());
        let enter = || async move {
            let ledger = shop.tenant.conversions();
            let outcome = match door {
                0 => ledger.authorise(entry).await?,
                1 => ledger.settle(entry).await?,
                _ => return Ok(self.stored("an entry", &self.events.track(tenant, entry.clone()).await?)),
            };
            match self.entered(outcome) {
                Stored::Refused => {
                    self.oracle.broken(format!("shop {}: entry {n} was refused", shop.number));
                    Ok(Stored::Wrong)
                }
                stored => Ok(stored),
            }
        };
        self.store(shop, dice, n, "an entry", enter).await;
    }

    fn entered(&self, outcome: ConversionOutcome) -> Stored {
        match outcome {
            ConversionOutcome::Recorded(_) => Stored::Now,
            ConversionOutcome::Duplicate(_) => Stored::Before,
            ConversionOutcome::Refused(_) => Stored::Refused,
            other => {
                self.oracle.broken(format!("an entry: {other:?}"));
                Stored::Wrong
            }
        }
    }

    /// Nobody is charged what was not quoted, whatever happens meanwhile.
    pub(super) async fn sell_for_another_price(&self, shop: &Shop, dice: &mut Dice) {
        let Some((user, cents)) = self.somebody(shop, dice) else { return };
        let n = shop.books().note(What::Sale, user, cents + 1, false);
        shop.books().set(n, Fate::NotDone);
        let wrong = sale(shop, n, user, cents + 1);
        if let Answer::Done(outcome) =
            self.call(dice, "authorise", shop.tenant.conversions().authorise(&wrong)).await
            && self.entered(outcome) != Stored::Refused
        {
            self.oracle
                .broken(format!("shop {}: another price than the quoted one was authorised", shop.number));
        }
    }

    /// A sale that was acknowledged, and what it came to.
    fn sold(&self, shop: &Shop, dice: &mut Dice, of: impl Fn(u32) -> bool) -> Option<(u32, u32, i64)> {
        let books = shop.books();
        let n = *books.sales.get(dice.below(books.sales.len().max(1) as u64) as usize)?;
        let entry = books.entries[n as usize];
        of(n).then_some((n, entry.user, entry.cents))
    }

    /// Of a sale there goes back what is left of it, in parts, and no more.
    pub(super) async fn refund(&self, shop: &Shop, dice: &mut Dice) {
        let Some((sale, user, _)) = self.sold(shop, dice, |_| true) else { return };
        let n = shop.books().note(What::Refund, user, -PART, false);
        let refund = NewConversion::refund(Shop::order(sale), usd(PART), Shop::key(n));
        let authorise = || async { Ok(self.entered(shop.tenant.conversions().authorise(&refund).await?)) };
        self.store(shop, dice, n, "a refund", authorise).await;
    }

    pub(super) async fn renew(&self, shop: &Shop, dice: &mut Dice) {
        let Some((sale, user, cents)) = self.sold(shop, dice, has_subscription) else { return };
        let n = shop.books().note(What::Renewal, user, cents, false);
        let period = Period::new(format!("period-{n}")).expect("it is short");
        let renewal = NewConversion::renewal(Shop::subscription(sale), period, usd(cents), Shop::key(n));
        self.enter(shop, dice, n, &renewal).await;
    }

    /// A webhook of a sale. Once it is stored, it will be in the ledger.
    pub(super) async fn report(&self, shop: &Shop, dice: &mut Dice) {
        let Some((user, cents)) = self.somebody(shop, dice) else { return };
        let (n, entry) = {
            let mut books = shop.books();
            let n = books.note(What::Reported, user, cents, false);
            (n, books.entries[n as usize])
        };
        let delivery = shop.delivery(n, entry);
        let mut is_first = true;
        loop {
            match self.call(dice, "receive", shop.tenant.webhooks().receive(&delivery)).await {
                Answer::Done(WebhookOutcome::Processed(outcome)) => {
                    self.entered(outcome);
                    return shop.books().set(n, Fate::Done);
                }
                Answer::Done(WebhookOutcome::Duplicate(WebhookStatus::Processed)) => {
                    return shop.books().set(n, Fate::Done);
                }
                Answer::Done(
                    WebhookOutcome::Pending { .. } | WebhookOutcome::Duplicate(WebhookStatus::Pending),
                ) => {
                    return shop.books().set(n, Fate::Promised);
                }
                Answer::Done(other) => return self.oracle.broken(format!("a webhook: {other:?}")),
                Answer::NotDone if is_first => return shop.books().set(n, Fate::NotDone),
                Answer::NotDone => return,
                Answer::Open if dice.below(3) == 0 => return,
                Answer::Open => is_first = false,
            }
        }
    }

    pub(super) async fn process_reports(&self, shop: &Shop, dice: &mut Dice) {
        let processing = shop.tenant.webhooks().process_pending(100);
        if let Answer::Done(processed) = self.call(dice, "process", processing).await {
            for (id, outcome) in processed {
                let fits = matches!(
                    outcome,
                    WebhookOutcome::Processed(_)
                        | WebhookOutcome::Duplicate(WebhookStatus::Processed)
                        | WebhookOutcome::Pending { .. }
                );
                if !fits {
                    self.oracle.broken(format!("webhook {id}: {outcome:?}"));
                }
            }
        }
    }

    /// A view and a sale, both or neither; one transaction in four is not committed.
    pub(super) async fn transact(&self, shop: &Shop, dice: &mut Dice) {
        let Some((n, view, sale)) = self.pair(shop, dice) else { return };
        let (how, commits) = (dice.below(8), AtomicBool::new(false));
        let work = async {
            let transaction = shop.tenant.begin().await?;
            let _ = transaction.views().record(&view).await?;
            self.entered(transaction.conversions().settle(&sale).await?);
            match how {
                0 => drop(transaction),
                1 => transaction.rollback().await?,
                _ => {
                    commits.store(true, Ordering::Relaxed);
                    transaction.commit().await?;
                }
            }
            Result::Ok(())
        };
        let answer = self.call(dice, "a transaction", work).await;
        let fate = match answer {
            Answer::Done(()) if commits.load(Ordering::Relaxed) => Fate::Done,
            Answer::Open if commits.load(Ordering::Relaxed) => Fate::Open,
            Answer::Done(()) | Answer::NotDone | Answer::Open => Fate::NotDone,
        };
        shop.books().set(n, fate);
        shop.books().set(n + 1, fate);
    }

    /// The same in a transaction of the host's, on a connection of the host's.
    pub(super) async fn transact_within(&self, shop: &Shop, dice: &mut Dice) {
        let Ok(mut host) = self.database.connect_app().await else { return };
        let Ok(transaction) = host.transaction().await else { return };
        let Some((n, view, sale)) = self.pair(shop, dice) else { return };
        let ours = self.client.within(&transaction, shop.tenant.tenant_id());
        let work = async {
            let _ = ours.views().record(&view).await?;
            Ok(self.entered(ours.conversions().settle(&sale).await?))
        };
        let fate = match self.call(dice, "a host's transaction", work).await {
            Answer::Done(_) => transaction.commit().await.map_or(Fate::Open, |()| Fate::Done),
            Answer::NotDone | Answer::Open => Fate::NotDone,
        };
        shop.books().set(n, fate);
        shop.books().set(n + 1, fate);
    }

    /// A view and a sale of somebody's.
    fn pair(&self, shop: &Shop, dice: &mut Dice) -> Option<(u32, NewView, NewConversion)> {
        let (user, cents) = self.somebody(shop, dice)?;
        let mut books = shop.books();
        let n = books.note(What::View, user, 0, true);
        books.note(What::Sale, user, cents, false);
        let view = NewView::new(shop.main, shop.user(user)).id(Shop::view(n));
        Some((n, view, sale(shop, n + 1, user, cents)))
    }
}

/// Of four sales one begins a subscription.
fn has_subscription(n: u32) -> bool {
    n.is_multiple_of(4)
}

fn sale(shop: &Shop, n: u32, user: u32, cents: i64) -> NewConversion {
    let sale =
        NewConversion::sale(shop.main, shop.user(user), usd(cents), Shop::key(n)).order(Shop::order(n));
    if has_subscription(n) { sale.subscription(Shop::subscription(n)) } else { sale }
}
