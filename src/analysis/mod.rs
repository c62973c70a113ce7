//! From numbers to a decision: pure, but for where they are read.

mod compare;
mod health;
#[cfg(feature = "report")]
mod html;
mod prices;
mod recommend;
#[cfg(test)]
mod recommend_tests;
#[cfg(test)]
mod regressions;
mod report;
#[cfg(test)]
mod tests;
mod text;
mod verdict;

pub use self::compare::{Chance, Comparison, Estimated};
pub use self::health::{Check, Finding, Severity};
pub use self::prices::{PriceAnalysis, PricePoint, PriceStep};
pub use self::recommend::NoRecommendation;
pub use self::report::{DailyMean, Report};
pub use self::verdict::Verdict;
use crate::error::Result;
use crate::id::ExperimentId;
use crate::repo::Metrics;

impl Metrics<'_> {
    /// What the experiment has shown: a verdict by its [plan](crate::AnalysisPlan), what it rests on, and what stands in its way.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> lastprice::Result<()> {
    /// let report = tenant.metrics().report(id).await?;
    /// println!("{report}");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is no such experiment.
    pub async fn report(self, id: ExperimentId) -> Result<Report> {
        Report::of(self.results(id).await?)
    }
}
