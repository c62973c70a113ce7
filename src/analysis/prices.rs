//! What the prices themselves tell.

use rust_decimal::prelude::ToPrimitive;
use serde::Serialize;

use super::compare::Estimated;
use crate::money::Money;
use crate::repo::{ArmResults, PrimaryMetric, Results};
use crate::stats::{self, Alpha, DemandCurve, Elasticity, Interval, NotEstimable, OptimalPrice, Proportion};

/// Where the curve is not believed: it misses the rates that it was fitted to.
const POOR_FIT: f64 = 0.01;

/// How demand answers to the price, of users whose window is over: of the phase that has most of them, as phases are not pooled.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PriceAnalysis {
    /// The phase.
    pub phase: i32,
    /// What one unit costs, of items without a cost of their own: those at the headline price; 0 if it is revenue that is
    /// judged.
    pub unit_cost: f64,
    /// The tested prices, the lowest first.
    pub points: Vec<PricePoint>,
    /// From each price to the next.
    pub steps: Vec<PriceStep>,
    /// Demand over the price; from three prices on.
    pub demand: Estimated<DemandCurve>,
    /// The price that brings most by that curve, revenue or margin; none where the curve misses the tested rates (p below 0.01).
    pub best_price: Estimated<OptimalPrice>,
}

/// One tested price.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PricePoint {
    /// The variant.
    pub variant: String,
    /// The price.
    pub price: Money,
    /// Buyers of users.
    pub conversion: Proportion,
    /// Where the share of buyers lies, by Wilson.
    pub interval: Estimated<Interval>,
    /// What 1,000 users brought, of the plan's metric: with renewals, quantities and refunds, where the demand curve has one
    /// sale at the price for each buyer.
    pub per_thousand: f64,
}

/// From one price to the next.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PriceStep {
    /// The lower price.
    pub from: Money,
    /// The higher price.
    pub to: Money,
    /// The share of the buyers that the higher price loses; `None` where nobody buys at the lower one.
    pub drop: Option<f64>,
    /// By how much demand falls, relative to the price.
    pub elasticity: Estimated<Elasticity>,
    /// The share of buyers that the higher price may lose and earn as much.
    pub break_even_drop: Estimated<f64>,
}

pub(super) fn analyse(results: &Results, alpha: Alpha) -> Option<PriceAnalysis> {
    let users = |phase: i32| -> u64 {
        results.arms.iter().filter(|arm| arm.phase == phase).map(|arm| arm.mature().users()).sum()
    };
    let phase = results.arms.iter().map(|arm| arm.phase).max_by_key(|phase| (users(*phase), *phase))?;
    let unit_cost = match results.plan.metric {
        PrimaryMetric::Margin => results.plan.unit_cost.to_f64().unwrap_or_default(),
        PrimaryMetric::NetRevenue => 0.0,
    };
    let mut points: Vec<PricePoint> = results
        .arms
        .iter()
        .filter(|arm| arm.phase == phase && arm.mature().users() > 0)
        .map(|arm| point(arm, alpha))
        .collect();
    points.sort_by_key(|point| point.price.amount());
    let number = |point: &PricePoint| point.price.amount().to_f64().unwrap_or_default();
    let steps = points
        .windows(2)
        .filter(|pair| pair[0].price != pair[1].price)
        .map(|pair| {
            let (from, to) = (number(&pair[0]), number(&pair[1]));
            let (before, after) = (pair[0].conversion, pair[1].conversion);
            PriceStep {
                from: pair[0].price,
                to: pair[1].price,
                drop: before
                    .rate()
                    .filter(|rate| *rate > 0.0)
                    .and_then(|rate| Some(1.0 - after.rate()? / rate)),
                elasticity: stats::arc_elasticity((from, before), (to, after), alpha),
                break_even_drop: stats::break_even_drop(from, to, unit_cost),
            }
        })
        .collect();
    let groups: Vec<(f64, Proportion)> =
        points.iter().map(|point| (number(point), point.conversion)).collect();
    let demand = stats::fit_demand(&groups);
    let best_price = match &demand {
        Ok(curve) if curve.fit_p < POOR_FIT => Err(NotEstimable::PoorFit),
        Ok(curve) => curve.optimal_price(unit_cost, alpha),
        Err(reason) => Err(*reason),
    };
    Some(PriceAnalysis { phase, unit_cost, points, steps, demand, best_price })
}

fn point(arm: &ArmResults, alpha: Alpha) -> PricePoint {
    let mature = arm.mature();
    PricePoint {
        variant: arm.variant.clone(),
        price: arm.price,
        conversion: mature.conversion(),
        interval: stats::wilson(mature.conversion(), alpha),
        per_thousand: mature.metric.mean() * 1000.0,
    }
}

impl PriceAnalysis {
    /// The demand curve, if it is believed.
    pub(super) fn curve(&self) -> Option<&DemandCurve> {
        self.demand.as_ref().ok().filter(|curve| curve.fit_p >= POOR_FIT)
    }

    /// What 1,000 users bring at a price, by the demand curve: revenue, or margin over the unit cost.
    ///
    /// # Errors
    ///
    /// Whatever keeps the curve from being known; [`Untested`](NotEstimable::Untested) outside of the tested prices.
    pub fn per_thousand_at(&self, price: f64, alpha: Alpha) -> Estimated<stats::AtPrice> {
        let curve = self.demand.as_ref().map_err(|reason| *reason)?;
        let at = self.curve().ok_or(NotEstimable::PoorFit).and(Ok(curve))?.margin_at(
            price,
            self.unit_cost,
            alpha,
        )?;
        if at.extrapolated { Err(NotEstimable::Untested) } else { Ok(at) }
    }
}
