//! A recommendation to store.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde_json::Value;

use super::model::Objective;
use crate::error::{Error, Result};
use crate::id::{ExperimentId, RecommendationId};
use crate::money::Money;
use crate::repo::row::rules;

/// A recommendation to store.
///
/// ```
/// # fn f(experiment: lastprice::ExperimentId, hash: String) -> lastprice::Result<()> {
/// use lastprice::{Money, NewRecommendation, Objective};
///
/// let new = NewRecommendation::new(experiment, Money::new("29.00", "USD")?, 0.8, Objective::Revenue)
///     .expected_revenue(Money::new("2700", "USD")?) // per 1,000 assigned users
///     .source("jale")
///     .model_version("2026-11")
///     .inputs_hash(hash);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[must_use]
pub struct NewRecommendation {
    /// Its id.
    pub id: RecommendationId,
    /// The experiment that it is made from.
    pub experiment_id: ExperimentId,
    /// The price.
    pub price: Money,
    /// What the price is expected to bring: net revenue per 1,000 users who are assigned it.
    pub expected_revenue: Option<Money>,
    /// How sure the recommender is, from 0 to 1.
    pub confidence: f64,
    /// What it is meant to maximise.
    pub objective: Objective,
    /// What it was computed from.
    pub simulation: Value,
    /// Who made it.
    pub source: Option<String>,
    /// The version of the model that made it.
    pub model_version: Option<String>,
    /// A hash of what it was computed from.
    pub inputs_hash: Option<String>,
    /// From when on it cannot be approved or applied.
    pub expires_at: Option<DateTime<Utc>>,
}

impl NewRecommendation {
    /// A price for an experiment, with a confidence from 0 to 1.
    pub fn new(experiment: ExperimentId, price: Money, confidence: f64, objective: Objective) -> Self {
        NewRecommendation {
            id: RecommendationId::new(),
            experiment_id: experiment,
            price,
            expected_revenue: None,
            confidence,
            objective,
            simulation: Value::Object(Default::default()),
            source: None,
            model_version: None,
            inputs_hash: None,
            expires_at: None,
        }
    }

    /// Its id. Default: a new one.
    pub fn id(mut self, id: RecommendationId) -> Self {
        self.id = id;
        self
    }

    /// What the price is expected to bring, in the currency of the price: net revenue per 1,000 users who are assigned it.
    /// Without it the recommendation cannot be [scored](crate::Recommendations::score).
    pub fn expected_revenue(mut self, revenue: Money) -> Self {
        self.expected_revenue = Some(revenue);
        self
    }

    /// What it was computed from: a JSON object or array of at most 64 KiB.
    pub fn simulation(mut self, simulation: Value) -> Self {
        self.simulation = simulation;
        self
    }

    /// Who made it: at most 200 characters.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The version of the model that made it: at most 200 characters.
    pub fn model_version(mut self, version: impl Into<String>) -> Self {
        self.model_version = Some(version.into());
        self
    }

    /// A hash of what it was computed from, by any algorithm, so that it can be told whether that was the same as today: at
    /// most 200 characters.
    pub fn inputs_hash(mut self, hash: impl Into<String>) -> Self {
        self.inputs_hash = Some(hash.into());
        self
    }

    /// From when on it cannot be approved or applied any more, by the clock of the database. Default: never.
    pub fn expires_at(mut self, time: DateTime<Utc>) -> Self {
        self.expires_at = Some(time);
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.price.amount() < Decimal::ZERO
            || Money::of(self.price.amount(), self.price.currency()).is_err()
        {
            return Err(Error::invalid(
                "price",
                "is not from 0 to 10^12 with at most 6 digits after the point",
            ));
        }
        if let Some(revenue) = self.expected_revenue {
            check_revenue("expected_revenue", revenue)?;
            if revenue.currency() != self.price.currency() {
                return Err(Error::invalid("expected_revenue", "is not in the currency of the price"));
            }
        }
        if !(0.0..=1.0).contains(&self.confidence) {
            return Err(Error::invalid("confidence", "is not from 0 to 1"));
        }
        if !self.simulation.is_object() && !self.simulation.is_array() {
            return Err(Error::invalid("simulation", "is not a JSON object or array"));
        }
        rules::json("simulation", &self.simulation)?;
        for (field, text) in [
            ("source", &self.source),
            ("model_version", &self.model_version),
            ("inputs_hash", &self.inputs_hash),
        ] {
            text.as_deref().map_or(Ok(()), |text| rules::name(field, text))?;
        }
        self.expires_at.map_or(Ok(()), |time| rules::time("expires_at", time))
    }
}

pub(super) fn check_revenue(field: &'static str, revenue: Money) -> Result<()> {
    match Money::of(revenue.amount(), revenue.currency()) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::invalid(field, "is not below 10^12 with at most 6 digits after the point")),
    }
}
