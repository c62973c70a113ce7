//! How results are judged, said before there are any.

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::money::{Currency, Money};

/// What an experiment is to raise, per assigned user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PrimaryMetric {
    /// Net revenue, without tax.
    #[default]
    NetRevenue,
    /// Net revenue without the [unit cost](AnalysisPlan::unit_cost) of what was sold. What is refunded has cost it
    /// nevertheless.
    Margin,
}

/// When an experiment is decided. One rule, chosen before there are numbers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DecisionRule {
    /// When the confidence sequence excludes zero: it may be looked at as often as one likes.
    #[default]
    Sequential,
    /// Once, when the [target sample size](AnalysisPlan::target_sample_size) is reached: by Welch's test, corrected for
    /// several variants by Holm.
    FixedHorizon,
    /// When the expected loss of choosing the best variant is below this share of the baseline's mean. Not protected
    /// against peeking.
    ExpectedLoss(f64),
}

/// How the results of an experiment are judged: frozen when it is activated. Its numbers are checked when the experiment is
/// created or edited.
///
/// ```
/// use lastprice::{AnalysisPlan, Currency, PrimaryMetric};
///
/// let plan = AnalysisPlan::default()
///     .window_days(30)
///     .minimum_effect(0.03)
///     .target_sample_size(40_000)
///     .margin(4) // what one costs us, in the experiment's currency
///     .exchange_rate(Currency::EUR, "1.08".parse().unwrap());
/// assert_eq!(plan.metric, PrimaryMetric::Margin);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
#[must_use]
pub struct AnalysisPlan {
    /// What is to be raised. Default: net revenue.
    pub metric: PrimaryMetric,
    /// For how many days after their assignment users are looked at; only users at least that old are. Default: 14.
    pub window_days: u16,
    /// The relative effect upon the metric that is worth acting upon: 0.05, the default, is 5 %.
    pub minimum_effect: f64,
    /// At how many users, of all variants, a decision is hoped for: the confidence sequence is the narrowest there, and a
    /// fixed horizon is decided there. Default: 10,000.
    pub target_sample_size: u64,
    /// How often a difference may be found where there is none. Default: 0.05.
    pub alpha: f64,
    /// When it is decided. Default: sequential.
    pub rule: DecisionRule,
    /// Guardrail: by how much, relative to the baseline, the share of buyers may fall. Default: not limited, as a dearer
    /// price that earns more has fewer buyers.
    pub max_conversion_drop: Option<f64>,
    /// Guardrail: the share of buyers who got money back. Default: 0.1.
    pub max_refund_rate: Option<f64>,
    /// What one unit costs, in the experiment's currency; for items that have no cost of their own. Default: 0.
    pub unit_cost: Decimal,
    /// What one unit costs, by item.
    pub unit_costs: BTreeMap<String, Decimal>,
    /// What one unit of another currency is worth in the experiment's. Without a rate, sales in it are shown, but in no
    /// statistic.
    pub exchange_rates: BTreeMap<Currency, Decimal>,
    /// The percentile above which a user's total is taken for that percentile, pooled over variants and phases: 0.99, say. It
    /// costs one statement more, which reads each buyer's total. Where fewer users buy than are above it, it is 0 and takes all:
    /// of 2 % buyers, 0.99 leaves something. Default: none.
    pub winsorise_at: Option<f64>,
}

impl Default for AnalysisPlan {
    fn default() -> Self {
        AnalysisPlan {
            metric: PrimaryMetric::NetRevenue,
            window_days: 14,
            minimum_effect: 0.05,
            target_sample_size: 10_000,
            alpha: 0.05,
            rule: DecisionRule::Sequential,
            max_conversion_drop: None,
            max_refund_rate: Some(0.1),
            unit_cost: Decimal::ZERO,
            unit_costs: BTreeMap::new(),
            exchange_rates: BTreeMap::new(),
            winsorise_at: None,
        }
    }
}

impl AnalysisPlan {
    /// Another window, from 1 to 730 days.
    pub fn window_days(mut self, days: u16) -> Self {
        self.window_days = days;
        self
    }

    /// Another effect that is worth acting upon: relative, above 0, at most 1.
    pub fn minimum_effect(mut self, relative: f64) -> Self {
        self.minimum_effect = relative;
        self
    }

    /// Another number of users at which a decision is hoped for: from 100.
    pub fn target_sample_size(mut self, users: u64) -> Self {
        self.target_sample_size = users;
        self
    }

    /// How often a difference may be found where there is none: from 0.0001 to 0.5.
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Another rule.
    pub fn rule(mut self, rule: DecisionRule) -> Self {
        self.rule = rule;
        self
    }

    /// By how much the share of buyers may fall, relative to the baseline: 0.2 is from 10 % to 8 %.
    pub fn max_conversion_drop(mut self, relative: f64) -> Self {
        self.max_conversion_drop = Some(relative);
        self
    }

    /// Which share of buyers may get money back; `None` for no limit.
    pub fn max_refund_rate(mut self, share: impl Into<Option<f64>>) -> Self {
        self.max_refund_rate = share.into();
        self
    }

    /// Judges by margin: what one unit costs, in the experiment's currency, whatever the item.
    pub fn margin(mut self, unit_cost: impl Into<Decimal>) -> Self {
        self.metric = PrimaryMetric::Margin;
        self.unit_cost = unit_cost.into();
        self
    }

    /// What one unit of an item costs: judges by margin.
    pub fn item_cost(mut self, item: impl Into<String>, unit_cost: impl Into<Decimal>) -> Self {
        self.metric = PrimaryMetric::Margin;
        self.unit_costs.insert(item.into(), unit_cost.into());
        self
    }

    /// What one unit of another currency is worth in the experiment's, fixed for the experiment. That something may be charged in
    /// it is another matter: see [`Variants::book`](crate::Variants::book) and [`NewConversion::item`](crate::NewConversion::item).
    pub fn exchange_rate(mut self, currency: Currency, rate: Decimal) -> Self {
        self.exchange_rates.insert(currency, rate);
        self
    }

    /// Takes totals above this percentile of all users, from 0.5 to 1, for that percentile.
    pub fn winsorise_at(mut self, percentile: f64) -> Self {
        self.winsorise_at = Some(percentile);
        self
    }

    /// What one costs, by item and of all others: nothing, if it is revenue that is judged.
    pub(crate) fn costs(&self) -> (Vec<&str>, Vec<Decimal>, Decimal) {
        if self.metric == PrimaryMetric::NetRevenue {
            return Default::default();
        }
        let (items, costs) = self.unit_costs.iter().map(|(item, cost)| (item.as_str(), *cost)).unzip();
        (items, costs, self.unit_cost)
    }

    /// `own` is the experiment's currency, if it is known.
    pub(crate) fn check(&self, own: Option<Currency>) -> Result<()> {
        let rule = |holds: bool, field, rule: &'static str| {
            if holds { Ok(()) } else { Err(Error::invalid(field, rule)) }
        };
        let share = |value: f64| value > 0.0 && value <= 1.0;
        rule((1..=730).contains(&self.window_days), "window_days", "is not from 1 to 730")?;
        rule(share(self.minimum_effect), "minimum_effect", "is not above 0 and at most 1")?;
        rule(
            (100..=1_000_000_000_000).contains(&self.target_sample_size),
            "target_sample_size",
            "is not from 100 to 10^12",
        )?;
        rule((0.0001..=0.5).contains(&self.alpha), "alpha", "is not from 0.0001 to 0.5")?;
        if let DecisionRule::ExpectedLoss(loss) = self.rule {
            rule(share(loss), "rule", "has an expected loss that is not above 0 and at most 1")?;
        }
        rule(
            self.max_conversion_drop.is_none_or(share),
            "max_conversion_drop",
            "is not above 0 and at most 1",
        )?;
        rule(
            self.max_refund_rate.is_none_or(|r| (0.0..=1.0).contains(&r)),
            "max_refund_rate",
            "is not from 0 to 1",
        )?;
        rule(
            self.winsorise_at.is_none_or(|p| (0.5..=1.0).contains(&p)),
            "winsorise_at",
            "is not from 0.5 to 1",
        )?;
        let cost = |cost: &Decimal| *cost >= Decimal::ZERO && Money::of(*cost, Currency::USD).is_ok();
        rule(
            cost(&self.unit_cost),
            "unit_cost",
            "is not from 0 to 10^12 with at most 6 digits after the point",
        )?;
        rule(self.unit_costs.len() <= 1000, "unit_costs", "are more than 1000")?;
        for (item, of_item) in &self.unit_costs {
            let is_item = !item.contains('\0') && (1..=128).contains(&item.chars().count());
            rule(is_item, "unit_costs", "have an item that is not 1 to 128 characters")?;
            rule(
                cost(of_item),
                "unit_costs",
                "have one that is not from 0 to 10^12 with at most 6 digits after the point",
            )?;
        }
        let needs_none = own.is_none_or(|own| !self.exchange_rates.contains_key(&own));
        rule(needs_none, "exchange_rates", "have one of the experiment's own currency")?;
        rule(
            self.exchange_rates.values().all(|r| *r > Decimal::ZERO && *r < Decimal::from(1_000_000_000)),
            "exchange_rates",
            "are not above 0 and below 10^9",
        )
    }
}
