//! The report in sentences.

use std::fmt;

use super::compare::Comparison;
use super::health::Severity;
use super::report::Report;
use super::verdict::Verdict;
use crate::repo::{DecisionRule, PrimaryMetric};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let results = &self.results;
        let as_of = results.as_of.format("%Y-%m-%d %H:%M UTC");
        writeln!(f, "{} ({}), {}, as of {as_of}", results.name, results.key, results.status)?;
        writeln!(f, "Verdict: {}.", self.verdict)?;
        for finding in &self.findings {
            let mark = if finding.severity == Severity::Blocking { "in the way" } else { "to know" };
            writeln!(f, "  - {mark}: {finding}.")?;
        }
        if !self.is_healthy() {
            writeln!(f, "Until that is mended, the numbers below are not to be acted upon.")?;
        }
        self.write_plan(f)?;
        self.write_arms(f)?;
        for comparison in &self.comparisons {
            self.write_comparison(f, comparison)?;
        }
        self.write_chances(f)?;
        self.write_prices(f)?;
        self.write_others(f)
    }
}

impl Report {
    pub(super) fn metric(&self) -> &'static str {
        match self.results.plan.metric {
            PrimaryMetric::Margin => "margin",
            PrimaryMetric::NetRevenue => "net revenue",
        }
    }

    fn write_plan(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = &self.results.plan;
        let rule = match plan.rule {
            DecisionRule::Sequential => "by a confidence sequence, at any look".to_owned(),
            DecisionRule::FixedHorizon => format!("once, at {} users", plan.target_sample_size),
            DecisionRule::ExpectedLoss(loss) => {
                format!("at an expected loss below {:.2} % of the baseline's mean", loss * 100.0)
            }
        };
        writeln!(
            f,
            "Judged by {} per assigned user within {} days, {rule}, at a level of {:.0} %; {:.1} % more is worth it.",
            self.metric(),
            plan.window_days,
            (1.0 - plan.alpha) * 100.0,
            plan.minimum_effect * 100.0
        )?;
        match (plan.winsorise_at, self.results.winsorised_above) {
            (Some(at), Some(limit)) => writeln!(
                f,
                "A total above {limit:.4} {}, the percentile {} of all users, is taken for it.",
                self.results.currency,
                at * 100.0
            ),
            _ => Ok(()),
        }
    }

    fn write_arms(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let currency = self.results.currency;
        let several = self.results.arms.iter().any(|arm| arm.phase > 1);
        for arm in &self.results.arms {
            let (mature, all) = (arm.mature(), arm.counts.assignments);
            let phase = if several { format!(", phase {}", arm.phase) } else { String::new() };
            let baseline = if arm.variant == self.results.baseline { ", baseline" } else { "" };
            let share =
                mature.conversion().rate().map_or("-".to_owned(), |rate| format!("{:.2} %", rate * 100.0));
            writeln!(
                f,
                "  `{}` at {}{baseline}{phase}: {all} users, {} of them judged; {} bought ({share}); {:.4} {currency} per user.",
                arm.variant,
                arm.price,
                mature.users(),
                mature.buyers,
                mature.metric.mean()
            )?;
        }
        Ok(())
    }

    fn write_comparison(&self, f: &mut fmt::Formatter<'_>, comparison: &Comparison) -> fmt::Result {
        let Comparison { variant, .. } = comparison;
        let baseline = &self.results.baseline;
        match &self.deciding(comparison) {
            Ok(effect) => write!(
                f,
                "`{variant}` brings {:+.4} {} per user against `{baseline}`: between {:+.4} and {:+.4}",
                effect.estimate, self.results.currency, effect.interval.low, effect.interval.high
            )?,
            Err(reason) => write!(f, "`{variant}` cannot be compared with `{baseline}`: {reason}")?,
        }
        match &comparison.lift {
            Ok(lift) => writeln!(
                f,
                "; relative to it, {} (between {} and {}, at any look).",
                signed_percent(lift.estimate),
                signed_percent(lift.interval.low),
                signed_percent(lift.interval.high)
            )?,
            Err(_) => writeln!(f, ".")?,
        }
        if let Ok(conversion) = &comparison.conversion {
            writeln!(
                f,
                "  The share of buyers changes by {:+.2} points (between {:+.2} and {:+.2}).",
                conversion.difference * 100.0,
                conversion.interval.low * 100.0,
                conversion.interval.high * 100.0
            )?;
        }
        Ok(())
    }

    fn write_chances(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Ok(chances) = &self.chances {
            let each: Vec<String> =
                chances.iter().map(|c| format!("`{}` {:.1} %", c.variant, c.best * 100.0)).collect();
            writeln!(f, "Chances to be the best (not protected against peeking): {}.", each.join(", "))?;
        }
        let Verdict::Undecided = self.verdict else { return Ok(()) };
        let judged: u64 = self.results.arms.iter().map(|arm| arm.mature().users()).sum();
        let target = self.results.plan.target_sample_size;
        write!(f, "{judged} users are judged, of the {target} at which a decision was hoped for.")?;
        match self.users_needed {
            Some(users) => writeln!(f, " To find so small an effect takes about {users} users per variant."),
            None => writeln!(f),
        }
    }

    fn write_prices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(prices) = &self.prices else { return Ok(()) };
        for step in &prices.steps {
            match &step.elasticity {
                Ok(found) => write!(
                    f,
                    "From {} to {}: {:.1} % fewer buyers; 1 % more price changes their share by {:+.2} % (between {:+.2} and {:+.2}).",
                    step.from,
                    step.to,
                    step.drop.unwrap_or_default() * 100.0,
                    found.estimate,
                    found.interval.low,
                    found.interval.high
                )?,
                Err(reason) => {
                    write!(f, "From {} to {}: elasticity unknown, as {reason}.", step.from, step.to)?
                }
            }
            if let Ok(drop) = step.break_even_drop {
                write!(f, " The higher price pays while fewer than {:.1} % are lost.", drop * 100.0)?;
            }
            writeln!(f)?;
        }
        let currency = self.results.currency;
        match &prices.best_price {
            Ok(best) => {
                let caution = if best.extrapolated {
                    " It lies outside of the tested prices: a direction for the next experiment, no price to set."
                } else {
                    ""
                };
                writeln!(
                    f,
                    "By the demand curve, {} is highest at {:.2} {currency} (between {:.2} and {:.2}).{caution}",
                    self.metric(),
                    best.price,
                    best.interval.low,
                    best.interval.high
                )?;
                if prices.demand.as_ref().is_ok_and(|curve| curve.residual_df == 1) {
                    writeln!(f, "  Three prices hardly tell whether demand has this shape.")?;
                }
                Ok(())
            }
            Err(reason) if prices.points.len() > 1 => writeln!(f, "No best price is named, as {reason}."),
            Err(_) => Ok(()),
        }
    }

    fn write_others(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, counts) in &self.results.others {
            writeln!(
                f,
                "Not in these numbers: {}: {} users, {} sales.",
                why(reason),
                counts.assignments,
                counts.conversions
            )?;
        }
        Ok(())
    }
}

fn signed_percent(share: f64) -> String {
    format!("{:+.1} %", share * 100.0)
}

/// Who is not in the statistics, by the reason of the assignment.
pub(super) fn why(reason: &str) -> &str {
    match reason {
        "forced" => "testers",
        "grandfathered" => "existing customers",
        "late" => "buyers who were never shown a price",
        "outside" => "buyers who are not in the experiment",
        other => other,
    }
}
