//! Rows of one kind, and the one statement that writes them.

use std::collections::HashSet;

use super::event::{Rejection, Tracked};
use crate::error::Result;
use crate::id::ExperimentId;
use crate::repo::{
    AssignOutcome, ConversionOutcome, NewAssignment, NewConversion, NewUsage, NewView, Subject, UsageOutcome,
    ViewOutcome,
};
use crate::scope::TenantHandle;

/// Rows of one kind; assignments also of one experiment.
#[derive(Debug)]
pub(super) enum Rows {
    Assignments(ExperimentId, Vec<NewAssignment>),
    Views(Vec<NewView>),
    Conversions(Vec<NewConversion>),
    Usage(Vec<NewUsage>),
}

impl Rows {
    /// Those from `at` on.
    pub(super) fn split_off(&mut self, at: usize) -> Rows {
        match self {
            Rows::Assignments(experiment, rows) => Rows::Assignments(*experiment, rows.split_off(at)),
            Rows::Views(rows) => Rows::Views(rows.split_off(at)),
            Rows::Conversions(rows) => Rows::Conversions(rows.split_off(at)),
            Rows::Usage(rows) => Rows::Usage(rows.split_off(at)),
        }
    }

    /// Their kind, in the log.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Rows::Assignments(..) => "assignments",
            Rows::Views(_) => "views",
            Rows::Conversions(_) => "conversions",
            Rows::Usage(_) => "usage",
        }
    }

    /// Writes them, and commits. The outcomes are in the rows' order.
    pub(super) async fn write(&self, tenant: &TenantHandle) -> Result<Vec<Tracked>> {
        match self {
            Rows::Assignments(experiment, rows) => {
                let subjects: Vec<Subject<'_>> = rows.iter().map(NewAssignment::subject).collect();
                let outcomes = tenant.assignments().assign_many(*experiment, subjects).await?;
                let mut seen = HashSet::new();
                let tracked = outcomes.into_iter().map(|outcome| match outcome {
                    // Who is named twice is stored once.
                    AssignOutcome::Assigned { quote, is_new: true } if seen.insert(quote.user_id.clone()) => {
                        Tracked::Written
                    }
                    AssignOutcome::Assigned { .. } => Tracked::Duplicate,
                    AssignOutcome::Outside { reason, .. } => Tracked::Rejected(Rejection::Outside(reason)),
                });
                Ok(tracked.collect())
            }
            Rows::Views(rows) => {
                let tracked = |outcome| match outcome {
                    ViewOutcome::Recorded => Tracked::Written,
                    ViewOutcome::Duplicate => Tracked::Duplicate,
                    ViewOutcome::NotAssigned => Tracked::Rejected(Rejection::NotAssigned),
                };
                Ok(tenant.views().record_many(rows).await?.into_iter().map(tracked).collect())
            }
            Rows::Conversions(rows) => {
                let outcomes = tenant.conversions().settle_many(rows).await?;
                Ok(outcomes.into_iter().map(of_entry).collect())
            }
            Rows::Usage(rows) => {
                let outcomes = tenant.usage().add_many(rows).await?;
                let tracked = |(row, outcome): (&NewUsage, _)| match outcome {
                    UsageOutcome::Added => Tracked::Written,
                    UsageOutcome::Duplicate => Tracked::Duplicate,
                    UsageOutcome::Conflict { day, amount } => {
                        Tracked::Rejected(Rejection::Refused(row.conflict(day, amount)))
                    }
                };
                Ok(rows.iter().zip(outcomes).map(tracked).collect())
            }
        }
    }
}

fn of_entry(outcome: ConversionOutcome) -> Tracked {
    match outcome {
        ConversionOutcome::Recorded(_) | ConversionOutcome::Waiting => Tracked::Written,
        ConversionOutcome::Duplicate(_) => Tracked::Duplicate,
        other => match other.entry() {
            Err(error) => Tracked::Rejected(Rejection::Refused(error)),
            Ok(_) => Tracked::Duplicate,
        },
    }
}
