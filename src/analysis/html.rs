//! A report as a page.

mod chart;
mod demand;
mod figures;
mod page;
mod terms;
#[cfg(test)]
mod tests;
mod text;

use super::Report;

impl Report {
    /// The report as one HTML page with charts, for people who decide about prices: to be stored, mailed or printed.
    ///
    /// The page is complete: no script, no font, nothing that is loaded, and a policy in it that forbids all of that. It shows
    /// what is in the report, which has sums and no users. Names of the host are text in it, whatever they are made of. The same
    /// report gives the same bytes.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, id: lastprice::ExperimentId) -> Result<(), Box<dyn std::error::Error>> {
    /// let report = tenant.metrics().report(id).await?;
    /// std::fs::write("report.html", report.to_html())?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn to_html(&self) -> String {
        page::page(self)
    }
}
