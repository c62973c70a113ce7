//! What was counted.

use rust_decimal::Decimal;
use serde::Serialize;
use tokio_postgres::Row;

use crate::error::{Error, Result};
use crate::money::{Currency, Money};
use crate::repo::row::Fields;

/// What was counted: exact, and of this moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MetricCounts {
    /// Users who were assigned.
    pub assignments: u64,
    /// Views that were recorded.
    pub views: u64,
    /// Sales that were recorded.
    pub conversions: u64,
    /// Renewals that were recorded.
    pub renewals: u64,
    /// Refunds and chargebacks that were recorded.
    pub refunds: u64,
    /// Sales and revenue by currency, which are never added to each other; in the order of the codes.
    pub sales: Vec<CurrencySales>,
}

/// Sales in one currency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CurrencySales {
    /// How many sales.
    pub conversions: u64,
    /// Their net revenue, without tax, of all ledger entries.
    pub revenue: Money,
}

impl MetricCounts {
    /// Net revenue in a currency.
    #[must_use]
    pub fn revenue(&self, currency: Currency) -> Money {
        self.sales_in(currency).map_or(Money::zero(currency), |s| s.revenue)
    }

    /// Sales per assigned user; `None` without users. For display: it says nothing of its certainty.
    #[must_use]
    pub fn conversion_rate(&self) -> Option<f64> {
        (self.assignments > 0).then(|| self.conversions as f64 / self.assignments as f64)
    }

    /// Net revenue per assigned user, buyers or not, in a currency; `None` without users.
    #[must_use]
    pub fn revenue_per_user(&self, currency: Currency) -> Option<Decimal> {
        self.revenue(currency).amount().checked_div(self.assignments.into())
    }

    /// Net revenue per sale, in a currency; `None` without sales in it.
    #[must_use]
    pub fn average_order_value(&self, currency: Currency) -> Option<Decimal> {
        let sales = self.sales_in(currency)?;
        sales.revenue.amount().checked_div(sales.conversions.into())
    }

    fn sales_in(&self, currency: Currency) -> Option<&CurrencySales> {
        self.sales.iter().find(|s| s.revenue.currency() == currency)
    }

    /// Adds a group of the database's: one variant (and day), one currency.
    pub(super) fn add(&mut self, group: &Row) -> Result<()> {
        let Some(code) = group.field::<Option<&str>>("currency")? else {
            return Ok(()); // a variant without any event
        };
        self.assignments += group.count("assignments")?;
        self.views += group.count("views")?;
        let conversions = group.count("conversions")?;
        self.conversions += conversions;
        self.renewals += group.count("renewals")?;
        self.refunds += group.count("refunds")?;
        if code != NO_CURRENCY {
            self.add_sales(CurrencySales { conversions, revenue: group.money("revenue", "currency")? })?;
        }
        Ok(())
    }

    fn add_sales(&mut self, more: CurrencySales) -> Result<()> {
        let currency = more.revenue.currency();
        match self.sales.binary_search_by_key(&currency, |s| s.revenue.currency()) {
            Err(at) => self.sales.insert(at, more),
            Ok(at) => {
                let sales = &mut self.sales[at];
                let sum = sales.revenue.amount().checked_add(more.revenue.amount());
                let sum = sum.ok_or_else(|| Error::internal("revenue exceeds what a decimal holds"))?;
                sales.conversions += more.conversions;
                sales.revenue = Money::stored(sum, currency);
            }
        }
        Ok(())
    }

    pub(super) fn add_all(&mut self, other: &MetricCounts) -> Result<()> {
        self.assignments += other.assignments;
        self.views += other.views;
        self.conversions += other.conversions;
        self.renewals += other.renewals;
        self.refunds += other.refunds;
        other.sales.iter().try_for_each(|s| self.add_sales(*s))
    }
}

/// ISO 4217's code for "no currency": what assignments and views are counted under.
const NO_CURRENCY: &str = "XXX";
