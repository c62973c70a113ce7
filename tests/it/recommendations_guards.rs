//! The steps of a recommendation's life, all that there could be: by the interface, and by SQL.

use lastprice::uuid::Uuid;
use lastprice::{
    ErrorKind, ExperimentId, FollowUp, PriceBounds, RecommendationId, RecommendationStatus as Status,
    Recommendations, Result,
};

use crate::support_recommend::*;
use crate::support_repo::*;

const ALL: [Status; 5] =
    [Status::Proposed, Status::Approved, Status::Applied, Status::Rejected, Status::Expired];

/// What the tenant calls on a recommendation to bring it from anywhere to `to`.
async fn attempt(
    recommendations: Recommendations<'_>,
    id: RecommendationId,
    to: Status,
) -> Option<Result<()>> {
    Some(match to {
        Status::Approved => recommendations.approve(id, &PriceBounds::new()).await.map(drop),
        Status::Applied => recommendations.apply(id, &follow_up()).await.map(drop),
        Status::Rejected => recommendations.reject(id, "no").await.map(drop),
        _ => return None,
    })
}

const ALLOWED: [(Status, Status); 6] = [
    (Status::Proposed, Status::Approved),
    (Status::Proposed, Status::Rejected),
    (Status::Proposed, Status::Expired),
    (Status::Approved, Status::Applied),
    (Status::Approved, Status::Rejected),
    (Status::Approved, Status::Expired),
];

/// One recommendation in this state, written by the owner; its time is over, or not.
async fn in_state(
    two: &TwoTenants,
    experiment: ExperimentId,
    status: Status,
    is_due: bool,
) -> RecommendationId {
    let id = RecommendationId::new();
    let sql = format!(
        "INSERT INTO recommendations (tenant_id, id, experiment_id, price, currency, confidence, status, expires_at)
         VALUES ($1, $2, $3, 30, 'USD', 1, '{status}', now() + interval '{} day')",
        if is_due { -1 } else { 1 }
    );
    two.owner.execute(&sql, &[&two.id.uuid(), &id.uuid(), &experiment.uuid()]).await.unwrap();
    id
}

#[tokio::test]
async fn every_transition_by_the_interface() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let recommendations = two.acme.recommendations();
    for is_due in [false, true] {
        for from in ALL {
            for to in ALL {
                let id = in_state(&two, experiment, from, is_due).await;
                // Whoever asks for another tenant's gets the answer for one that there is not.
                if let Some(result) = attempt(two.globex.recommendations(), id, to).await {
                    is_kind(result, ErrorKind::NotFound);
                }
                let Some(result) = attempt(recommendations, id, to).await else { continue };
                let is_allowed = ALLOWED.contains(&(from, to));
                if is_allowed && (!is_due || to == Status::Rejected) {
                    result.unwrap();
                    assert_eq!(recommendations.get(id).await.unwrap().unwrap().status, to);
                    continue;
                }
                let said = conflicts(result, if is_allowed { "expires_at" } else { "status" });
                assert!(is_allowed || said.contains(from.as_str()) && said.contains(to.as_str()), "{said}");
                assert_eq!(recommendations.get(id).await.unwrap().unwrap().status, from);
            }
        }
    }
    // Two were applied: the one that was not due, and no other.
    assert_eq!(two.count("experiments").await, 2);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn every_transition_by_sql() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let mut drafts = 0;
    let app = two.database.connect_app().await.unwrap();
    for is_due in [false, true] {
        for from in ALL {
            for to in ALL {
                let id = in_state(&two, experiment, from, is_due).await;
                let follow_up = if to == Status::Applied && from != to {
                    drafts += 1;
                    format!(", follow_up_id = '{}'", draft(&two.acme, &format!("d{drafts}")).await.id)
                } else {
                    String::new()
                };
                let update =
                    format!("UPDATE recommendations SET status = '{to}'{follow_up} WHERE id = '{id}'");
                let expected = match (ALLOWED.contains(&(from, to)), to) {
                    _ if from == to => None,
                    (false, _) => Some("recommendations_guard_transition"),
                    (true, Status::Rejected) => None,
                    (true, to) if is_due != (to == Status::Expired) => Some("recommendations_guard_expiry"),
                    _ => None,
                };
                // Without a follow-up there is nothing that was applied.
                if expected.is_none() && !follow_up.is_empty() {
                    let bare = update.replace(&follow_up, "");
                    assert_eq!(by(&app, &two, &bare).await, Err("recommendations_guard_once".to_owned()));
                }
                let other = app.execute_as(two.other_id.uuid(), &update).await;
                assert_eq!(other, Ok(0), "the other tenant");
                // The owner is bound by it as well.
                if let Some(constraint) = expected {
                    for client in [&app, &two.owner] {
                        assert_eq!(
                            by(client, &two, &update).await,
                            Err(constraint.to_owned()),
                            "{from} {to}"
                        );
                    }
                } else {
                    assert_eq!(by(&app, &two, &update).await, Ok(1), "{from} {to} due {is_due}");
                    let sql = format!(
                        "SELECT concat_ws(' ', status, decided_at IS NOT NULL, applied_at IS NOT NULL) FROM recommendations WHERE id = '{id}'"
                    );
                    let now: String = two.owner.query_one(&sql, &[]).await.unwrap().get(0);
                    let decided = from != to && matches!(to, Status::Approved | Status::Rejected);
                    let applied = from != to && to == Status::Applied;
                    let letter = |yes| if yes { "t" } else { "f" };
                    assert_eq!(now, format!("{to} {} {}", letter(decided), letter(applied)));
                }
            }
        }
    }
}

/// Runs one statement as a tenant: the number of rows, or the name of the constraint that refuses it.
trait ExecuteAs {
    async fn execute_as(&self, tenant: Uuid, sql: &str) -> std::result::Result<u64, String>;
}

impl ExecuteAs for lastprice::tokio_postgres::Client {
    async fn execute_as(&self, tenant: Uuid, sql: &str) -> std::result::Result<u64, String> {
        let bind = format!("BEGIN; SET LOCAL app.tenant_id = '{tenant}'; SET LOCAL app.actor = 'sql'");
        self.batch_execute(&bind).await.unwrap();
        let done = self.execute(sql, &[]).await;
        self.batch_execute(if done.is_ok() { "COMMIT" } else { "ROLLBACK" }).await.unwrap();
        done.map_err(|e| {
            let error = e.as_db_error().unwrap();
            error.constraint().unwrap_or(error.message()).to_owned()
        })
    }
}

async fn by(
    client: &lastprice::tokio_postgres::Client,
    two: &TwoTenants,
    sql: &str,
) -> std::result::Result<u64, String> {
    client.execute_as(two.id.uuid(), sql).await
}

#[tokio::test]
async fn what_was_recommended_never_changes() {
    let two = two_tenants().await;
    let experiment = active(&two.acme, "x").await.id;
    let other = draft(&two.acme, "y").await.id;
    let app = two.database.connect_app().await.unwrap();
    let id = approved(&two.acme, experiment, "31.5").await;
    for change in [
        "price = 32".to_owned(),
        "currency = 'EUR'".to_owned(),
        "expected_revenue = NULL".to_owned(),
        "confidence = 0.51".to_owned(),
        "objective = 'profit'".to_owned(),
        "simulation = '[]'".to_owned(),
        "source = 'somebody'".to_owned(),
        "model_version = '2'".to_owned(),
        "inputs_hash = '2'".to_owned(),
        "expires_at = now() + interval '1 day'".to_owned(),
        "created_at = created_at + interval '1 second'".to_owned(),
        "id = gen_random_uuid()".to_owned(),
        format!("experiment_id = '{other}'"),
        format!("tenant_id = '{}'", two.other_id),
    ] {
        let update = format!("UPDATE recommendations SET {change} WHERE id = '{id}'");
        assert_eq!(
            by(&two.owner, &two, &update).await,
            Err("recommendations_guard_frozen".into()),
            "{change}"
        );
        let denied = by(&app, &two, &update).await.unwrap_err();
        assert!(denied.contains("permission denied"), "{change}: {denied}");
    }
    // Who and when are the trigger's, whatever the statement says.
    let lie = format!(
        "UPDATE recommendations SET decided_by = 'x', decided_at = 'epoch', applied_by = 'x', applied_at = 'epoch', scored_at = 'epoch'
         WHERE id = '{id}'"
    );
    let before = two.acme.recommendations().get(id).await.unwrap();
    by(&two.owner, &two, &lie).await.unwrap();
    assert_eq!(two.acme.recommendations().get(id).await.unwrap(), before);

    // Each of the rest at its time, and once.
    let update = |change: &str| format!("UPDATE recommendations SET {change} WHERE id = '{id}'");
    let once = Err("recommendations_guard_once".to_owned());
    let link = update(&format!("follow_up_id = '{other}'"));
    assert_eq!(by(&app, &two, &link).await, once, "before it is applied");
    assert_eq!(by(&app, &two, &update("rejection_reason = 'no'")).await, once, "and not rejected");
    let score = "observed_revenue = 1";
    assert_eq!(by(&app, &two, &update(score)).await, Err("recommendations_observed_revenue_check".into()));
    let applied = two.acme.recommendations().apply(id, &FollowUp::new("x-2")).await.unwrap();
    for client in [&app, &two.owner] {
        assert_eq!(by(client, &two, &link).await, once, "another one");
    }
    assert_eq!(by(&app, &two, &update("follow_up_id = NULL")).await, once, "cut off");
    assert_eq!(by(&app, &two, &update(score)).await, Ok(1));
    for again in ["observed_revenue = 2", "observed_revenue = NULL"] {
        assert_eq!(by(&app, &two, &update(again)).await, once, "{again}");
    }
    // One experiment follows one recommendation.
    let second = approved(&two.acme, experiment, "31.5").await;
    let steal = format!(
        "UPDATE recommendations SET status = 'applied', follow_up_id = '{}' WHERE id = '{second}'",
        applied.id
    );
    assert_eq!(by(&app, &two, &steal).await, Err("recommendations_follow_up_key".into()));
    let theirs = two.globex.experiments().by_key("pro-plan").await.unwrap().unwrap().id;
    let foreign = steal.replace(&applied.id.to_string(), &theirs.to_string());
    assert_eq!(by(&app, &two, &foreign).await, Err("recommendations_follow_up_fkey".into()));
    two.bystander_saw_nothing().await;
}
