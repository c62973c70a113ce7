//! The price that the data speaks for.

use rust_decimal::prelude::{FromPrimitive, ToPrimitive};
use rust_decimal::{Decimal, RoundingStrategy};
use serde_json::json;
use twox_hash::XxHash3_64;

use super::compare::{Comparison, baseline_in, current};
use super::health::{Finding, Severity};
use super::prices::PriceAnalysis;
use super::report::Report;
use crate::error::Error;
use crate::money::Money;
use crate::repo::{Cohort, NewRecommendation, Objective, PriceBounds, PrimaryMetric};
use crate::stats::{BetaPosterior, BetaPrior, DemandCurve, NotEstimable};

/// Why no price is recommended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoRecommendation {
    /// The numbers cannot be believed yet.
    #[error("the data is not sound: {}", .0.iter().map(|f| f.message.as_str()).collect::<Vec<_>>().join("; "))]
    Unhealthy(Vec<Finding>),
    /// The data does not tell.
    #[error(transparent)]
    NotEstimable(#[from] NotEstimable),
    /// No price that was tested, or lies between two that were, is both within the bounds and likelier than not to be better than
    /// the one in force.
    #[error("no tested price within the bounds is likely to be better than the one in force")]
    NothingBetter,
    /// The plan judges by margin, and two prices tell of nothing else; three tell of revenue by a demand curve.
    #[error("the plan judges by margin, so revenue is known from three prices only")]
    OfMargin,
    /// The bounds leave out all prices that were tested.
    #[error("the bounds leave out all tested prices, which are from {least} to {most}")]
    OutOfBounds {
        /// The lowest tested price.
        least: Money,
        /// The highest tested price.
        most: Money,
    },
    /// Profit is revenue without costs, and the plan has none.
    #[error("the plan does not judge by margin over a unit cost, so profit is not known")]
    NoUnitCost,
    /// The bounds are none.
    #[error(transparent)]
    Bounds(#[from] Error),
}

/// A price, and how it compares with the one in force.
struct Choice {
    price: Decimal,
    /// The probability of being better.
    confidence: f64,
    /// Revenue per 1,000 users.
    revenue: f64,
    /// How it came about.
    method: &'static str,
}

impl Report {
    /// The price that the data speaks for, within bounds, to be [stored](crate::Recommendations::store) and approved by somebody.
    ///
    /// From three prices on it is the best one on the demand curve, between the lowest and the highest that were tested; with
    /// two, or a curve that does not fit (p below 0.01), the better one of those that were tested. It keeps the plan's guardrail of
    /// lost buyers, and does not wait for its [verdict](Report::verdict): that is whoever approves to do.
    ///
    /// `confidence` is the probability of being better than the price in force by the objective, from a flat prior, given that demand
    /// follows the curve: not protected against peeking. `expected_revenue` is net revenue per 1,000 assigned users within the
    /// window, as much above or below the curve as the tested prices were.
    ///
    /// - [`Revenue`](Objective::Revenue): the highest net revenue.
    /// - [`Profit`](Objective::Profit): the highest margin over the plan's unit cost.
    /// - [`Conversion`](Objective::Conversion): the most buyers, which is the lowest price.
    /// - [`MarketShare`](Objective::MarketShare): the most buyers at a price that earns no less than today's with a probability
    ///   of 0.8, which is then its confidence.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> Result<(), Box<dyn std::error::Error>> {
    /// use lastprice::{Money, Objective, PriceBounds};
    ///
    /// let report = tenant.metrics().report(id).await?;
    /// let bounds = PriceBounds::new().ceiling(Money::new("49", "USD")?);
    /// let recommendation = tenant.recommendations().store(&report.recommend(Objective::Revenue, &bounds)?).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NoRecommendation`], which says what is missing.
    pub fn recommend(
        &self,
        objective: Objective,
        bounds: &PriceBounds,
    ) -> Result<NewRecommendation, NoRecommendation> {
        let blocking = self.findings.iter().filter(|finding| finding.severity == Severity::Blocking);
        let blocking: Vec<Finding> = blocking.cloned().collect();
        if !blocking.is_empty() {
            return Err(NoRecommendation::Unhealthy(blocking));
        }
        let nothing = NotEstimable::TooFew { what: "prices", needed: 2, got: 0 };
        let prices = self.prices.as_ref().ok_or(nothing)?;
        let in_force = current(&self.results).find(|arm| arm.variant == self.results.baseline);
        let in_force = in_force.ok_or(nothing)?.price;
        let cost = self.results.plan.unit_cost.to_f64().unwrap_or_default();
        if objective == Objective::Profit
            && (cost <= 0.0 || self.results.plan.metric != PrimaryMetric::Margin)
        {
            return Err(NoRecommendation::NoUnitCost);
        }
        let range = bounds.range(in_force)?;
        let tested = || self.of_tested(prices, objective, in_force, range);
        let choice = match prices.curve().filter(|curve| curve.optimal_price(0.0, self.alpha()).is_ok()) {
            Some(curve) => match self.on_curve(curve, prices, objective, in_force, cost, range) {
                Err(NoRecommendation::NothingBetter) => tested()?,
                choice => choice?,
            },
            None => tested()?,
        };
        let currency = self.results.currency;
        if choice.price == in_force.amount() || choice.confidence.is_nan() || choice.confidence <= 0.5 {
            return Err(NoRecommendation::NothingBetter);
        }
        let simulation = json!({
            "method": choice.method,
            "price_in_force": in_force,
            "allowed": [range.0, range.1],
            "window_days": self.results.plan.window_days,
            "points": prices.points,
            "best_price": prices.best_price.as_ref().ok(),
            "fit_p": prices.demand.as_ref().ok().map(|curve| curve.fit_p),
        });
        let price = Money::of(choice.price, currency)?;
        let new = NewRecommendation::new(self.results.experiment_id, price, choice.confidence, objective)
            .simulation(simulation)
            .source("lastprice")
            .model_version(concat!("lastprice ", env!("CARGO_PKG_VERSION")))
            .inputs_hash(self.inputs_hash());
        let revenue = Decimal::from_f64(choice.revenue).map(|revenue| revenue.round_dp(2));
        Ok(match revenue.and_then(|revenue| Money::of(revenue, currency).ok()) {
            Some(revenue) => new.expected_revenue(revenue),
            None => new,
        })
    }

    /// Net revenue per 1,000 assigned users that a variant has brought within the window: what a recommendation of its price is
    /// [scored](crate::Recommendations::score) by. `None` while none of its users is judged.
    #[must_use]
    pub fn observed_revenue(&self, variant: &str) -> Option<Money> {
        let arms = self.results.arms.iter().filter(|arm| arm.variant == variant);
        let mature = arms.map(|arm| arm.mature()).max_by_key(Cohort::users)?;
        let revenue = Decimal::from_f64(per_thousand(&mature)?)?.round_dp(2);
        Money::of(revenue, self.results.currency).ok()
    }

    fn on_curve(
        &self,
        curve: &DemandCurve,
        prices: &PriceAnalysis,
        objective: Objective,
        in_force: Money,
        cost: f64,
        (low, high): (Decimal, Decimal),
    ) -> Result<Choice, NoRecommendation> {
        let (alpha, number) = (self.alpha(), |amount: Decimal| amount.to_f64().unwrap_or_default());
        let tested =
            |pick: fn(Money, Money) -> Money| prices.points.iter().map(|point| point.price).reduce(pick);
        let least = tested(|a, b| if a.amount() <= b.amount() { a } else { b });
        let most = tested(|a, b| if a.amount() >= b.amount() { a } else { b });
        let (Some(least), Some(most)) = (least, most) else { return Err(NoRecommendation::NothingBetter) };
        let now = number(in_force.amount());
        let digits = self.results.currency.minor_digits();
        let round = |amount: Decimal, how| amount.round_dp_with_strategy(digits, how);
        // Prices that can be charged; a tested one can be.
        let low = round(low, RoundingStrategy::AwayFromZero).max(least.amount());
        let high = round(high, RoundingStrategy::ToZero).min(most.amount());
        if low > high {
            return Err(NoRecommendation::OutOfBounds { least, most });
        }
        // A dearer price loses buyers: no more than the plan allows.
        let high = match self.results.plan.max_conversion_drop {
            Some(limit) if number(high) > now => {
                let least = curve.rate_at(now, alpha)?.estimate * (1.0 - limit);
                let dearest = highest_that_keeps(least, now, number(high), |at| {
                    Ok(curve.rate_at(at, alpha)?.estimate)
                })?;
                round(Decimal::from_f64(dearest).ok_or(NotEstimable::OutOfRange)?, RoundingStrategy::ToZero)
            }
            _ => high,
        };
        if low > high {
            return Err(NoRecommendation::NothingBetter);
        }
        // What is earned rises up to the best price, and falls from there.
        let best = |cost: f64| Ok::<_, NotEstimable>(curve.optimal_price(cost, alpha)?.price);
        let earned = |at: f64, cost: f64| curve.margin_at(at, cost, alpha).map(|at| at.estimate);
        let wanted = match objective {
            Objective::Profit => best(cost)?,
            Objective::Conversion => number(low),
            Objective::MarketShare => {
                let as_sure = |at: f64| Ok(curve.margin_beyond(at, now, cost)?.chance_above(0.0));
                lowest_that_is_as_sure(number(low), best(cost)?.clamp(number(low), number(high)), as_sure)?
            }
            _ => best(0.0)?,
        };
        // Upwards, where less would earn less than it must.
        let rounding = match objective {
            Objective::MarketShare => RoundingStrategy::AwayFromZero,
            _ => RoundingStrategy::MidpointAwayFromZero,
        };
        let rounded = Decimal::from_f64(wanted).ok_or(NotEstimable::OutOfRange)?;
        let price = round(rounded, rounding).clamp(low, high);
        if price == in_force.amount() {
            return Err(NoRecommendation::NothingBetter);
        }
        let at = number(price);
        let better = match objective {
            Objective::Revenue => curve.margin_beyond(at, now, 0.0)?,
            Objective::Profit | Objective::MarketShare => curve.margin_beyond(at, now, cost)?,
            _ => curve.rate_beyond(at, now)?,
        };
        if objective == Objective::MarketShare && price > in_force.amount() {
            return Err(NoRecommendation::NothingBetter);
        }
        let revenue = earned(at, 0.0)? * self.beyond_curve(prices, |at| earned(at, 0.0));
        Ok(Choice { price, confidence: better.chance_above(0.0), revenue, method: "demand_curve" })
    }

    /// How much more the tested prices brought than the curve says, which knows of one sale at the price: renewals, quantities,
    /// refunds.
    fn beyond_curve(&self, prices: &PriceAnalysis, earned: impl Fn(f64) -> Result<f64, NotEstimable>) -> f64 {
        let (mut brought, mut expected) = (0.0, 0.0);
        for arm in self.results.arms.iter().filter(|arm| arm.phase == prices.phase) {
            let mature = arm.mature();
            let price = arm.price.amount().to_f64().unwrap_or_default();
            if let Ok(earned) = earned(price) {
                brought += mature.revenue;
                expected += earned * mature.users() as f64 / 1000.0;
            }
        }
        if expected > 0.0 { brought / expected } else { 1.0 }
    }

    /// The arm that is the likeliest to be better than the baseline.
    fn of_tested(
        &self,
        prices: &PriceAnalysis,
        objective: Objective,
        in_force: Money,
        (low, high): (Decimal, Decimal),
    ) -> Result<Choice, NoRecommendation> {
        let plan = &self.results.plan;
        let mut best: Option<Choice> = None;
        for arm in self.results.arms.iter().filter(|arm| arm.phase == prices.phase) {
            let is_compared =
                |c: &&Comparison| c.variant == arm.variant && c.price == arm.price && c.has_enough;
            let Some(comparison) = self.comparisons.iter().find(is_compared) else { continue };
            let Some(control) = baseline_in(&self.results, arm.phase) else { continue };
            let (control, mature, price) = (control.mature(), arm.mature(), arm.price.amount());
            let Some(revenue) = per_thousand(&mature).filter(|_| (low..=high).contains(&price)) else {
                continue;
            };
            let more_buyers = buyers(&mature).chance_above(&buyers(&control));
            // The metric is the plan's, and no other one is known.
            let Ok(of_metric) = comparison.chance_to_win else { continue };
            let drop = comparison.conversion_drop.unwrap_or(0.0);
            if plan.max_conversion_drop.is_some_and(|limit| drop > limit) {
                continue;
            }
            let confidence = match objective {
                Objective::Conversion => more_buyers,
                Objective::MarketShare if price > in_force.amount() || of_metric < SURE_ENOUGH => continue,
                Objective::Revenue if plan.metric != PrimaryMetric::NetRevenue => {
                    return Err(NoRecommendation::OfMargin);
                }
                _ => of_metric,
            };
            if price != in_force.amount() && best.as_ref().is_none_or(|best| confidence > best.confidence) {
                best = Some(Choice { price, confidence, revenue, method: "tested_prices" });
            }
        }
        best.ok_or(NoRecommendation::NothingBetter)
    }

    /// Of what the recommendation is made of, whenever it is made.
    fn inputs_hash(&self) -> String {
        let inputs = (&self.results.experiment_id, &self.results.plan, &self.results.arms);
        let json = serde_json::to_vec(&inputs).unwrap_or_default();
        format!("xxh3:{:016x}", XxHash3_64::oneshot(&json))
    }
}

/// How sure it is to be that a lower price earns no less.
const SURE_ENOUGH: f64 = 0.8;

/// Between `low` and the price that earns most, the lowest that is likely enough to earn no less than today; else the latter.
fn lowest_that_is_as_sure(
    low: f64,
    best: f64,
    chance: impl Fn(f64) -> Result<f64, NotEstimable>,
) -> Result<f64, NotEstimable> {
    let (mut below, mut above) = (low, best);
    // Of the price in force itself nothing is surer than that it earns as much.
    if chance(low).is_ok_and(|chance| chance >= SURE_ENOUGH) || !chance(best).is_ok_and(|c| c >= SURE_ENOUGH)
    {
        return Ok(if chance(low).is_ok_and(|chance| chance >= SURE_ENOUGH) { low } else { best });
    }
    for _ in 0..100 {
        let middle = 0.5 * (below + above);
        if chance(middle)? >= SURE_ENOUGH { above = middle } else { below = middle }
    }
    Ok(above)
}

/// Between `now` and `high`, the highest price that keeps a rate.
fn highest_that_keeps(
    least: f64,
    now: f64,
    high: f64,
    rate: impl Fn(f64) -> Result<f64, NotEstimable>,
) -> Result<f64, NotEstimable> {
    let (mut kept, mut lost) = (now, high);
    if rate(high)? >= least {
        return Ok(high);
    }
    for _ in 0..100 {
        let middle = 0.5 * (kept + lost);
        if rate(middle)? >= least { kept = middle } else { lost = middle }
    }
    Ok(kept)
}

fn buyers(cohort: &Cohort) -> BetaPosterior {
    BetaPosterior::of(cohort.conversion(), BetaPrior::Jeffreys)
}

fn per_thousand(cohort: &Cohort) -> Option<f64> {
    (cohort.users() > 0).then(|| 1000.0 * cohort.revenue / cohort.users() as f64)
}
