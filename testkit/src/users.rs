use lastprice::bucketing::{Allocation, Placement, Unit};
use lastprice::{Experiment, UserId};

/// Users who are assigned a given variant of an experiment, without end, by the algorithm that assigns everybody:
/// for a test that needs somebody who sees a certain price.
///
/// `None` if the experiment has no such variant, or one that nobody is assigned, for it has no weight or the experiment
/// takes no users. A layer and a holdout, which are the tenant's, are not looked at.
///
/// ```no_run
/// # async fn f(tenant: lastprice::TenantHandle, experiment: lastprice::Experiment) -> lastprice::Result<()> {
/// let user = lastprice_testkit::users_of_variant(&experiment, "29").unwrap().next().unwrap();
/// let outcome = tenant.assignments().assign(experiment.id, &user).await?;
/// assert_eq!(outcome.variant(), "29");
/// # Ok(()) }
/// ```
pub fn users_of_variant(
    experiment: &Experiment,
    variant: &str,
) -> Option<impl Iterator<Item = UserId> + use<>> {
    let wanted = experiment.variants.iter().position(|v| v.name == variant && v.weight > 0)?;
    let wanted =
        Placement::Variant(u32::try_from(wanted).ok().filter(|_| experiment.traffic.millionths() > 0)?);
    let weights: Vec<u32> = experiment.variants.iter().map(|v| v.weight).collect();
    let allocation = Allocation::new(&experiment.salt, &weights).ok()?.traffic(experiment.traffic);
    Some(
        (0u64..)
            .filter_map(|n| UserId::new(format!("test-user-{n}")).ok())
            .filter(move |user| allocation.place(Unit::of(user)) == wanted),
    )
}
