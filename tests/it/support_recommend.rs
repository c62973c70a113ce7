//! Recommendations to work on.

use lastprice::{
    ErrorKind, ExperimentId, FollowUp, NewRecommendation, Objective, PriceBounds, Recommendation,
    RecommendationId, Result, TenantHandle,
};

use crate::support_repo::{is_kind, usd};

pub(crate) fn proposal(experiment: ExperimentId) -> NewRecommendation {
    NewRecommendation::new(experiment, usd("31.5"), 0.5, Objective::Revenue).expected_revenue(usd("2700"))
}

pub(crate) async fn store(tenant: &TenantHandle, experiment: ExperimentId) -> RecommendationId {
    tenant.recommendations().store(&proposal(experiment)).await.unwrap().id
}

pub(crate) async fn approve(tenant: &TenantHandle, id: RecommendationId) -> Result<Recommendation> {
    tenant.recommendations().approve(id, &PriceBounds::new()).await
}

/// One of this price, in dollars, that is approved.
pub(crate) async fn approved(
    tenant: &TenantHandle,
    experiment: ExperimentId,
    price: &str,
) -> RecommendationId {
    let new =
        NewRecommendation::new(experiment, usd(price), 0.5, Objective::Revenue).expected_revenue(usd("2700"));
    let id = tenant.recommendations().store(&new).await.unwrap().id;
    approve(tenant, id).await.unwrap();
    id
}

/// A [`FollowUp`] whose key nobody else has.
pub(crate) fn follow_up() -> FollowUp {
    FollowUp::new(format!("follow-up-{}", ExperimentId::new()))
}

#[track_caller]
pub(crate) fn conflicts<T: std::fmt::Debug>(result: Result<T>, field: &str) -> String {
    let error = is_kind(result, ErrorKind::Conflict);
    assert_eq!(error.conflicting_fields(), [field], "{error:?}");
    error.to_string()
}
