//! What a web framework asks of every future: `Send`, and of a client: to be shared. Checked by the compiler.

use std::future::Future;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lastprice::{
    Actor, Client, ClientBuilder, Currency, Error, ErrorKind, ExperimentEdit, ExperimentId, FollowUp,
    NewExperiment, NewRecommendation, NewTenant, NewUsage, Objective, PriceBounds, RecommendationStatus,
    Result, TenantChange, TenantHandle, TenantId, TenantScope, TenantTransaction, UserId, Variants,
};

use crate::support::{Login, Side, World};

/// As in axum, which this crate does not depend on.
struct State<S>(S);

/// What axum demands of a handler.
fn route<H, F>(client: &Client, handler: H) -> BoxFuture<'static, Result<()>>
where
    H: FnOnce(State<Client>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    handler(State(client.clone())).boxed()
}

/// Every call of every repository, each of them awaited.
async fn every_call(scope: &TenantScope<'_>, us: Side) -> Result<()> {
    let id = us.experiment;
    let user = UserId::new("user")?;
    let today = lastprice::chrono::Utc::now().date_naive();
    let key = || lastprice::IdempotencyKey::new("key");

    let tenants = scope.tenants();
    assert!(tenants.get().await?.is_some());
    assert!(tenants.webhook_secrets().await?.is_empty());
    assert_eq!(tenants.paid_credentials().await.unwrap_err().kind(), ErrorKind::SecretUnavailable);
    tenants.update(TenantChange::new().name("renamed")).await?;
    let again = NewTenant::managed("again", "ours@x.test").id(us.tenant);
    assert_eq!(tenants.create(again).await.unwrap_err().kind(), ErrorKind::Conflict);

    let experiments = scope.experiments();
    let two = || Variants::new().add("a", 1, 1).add("b", 1, 2);
    let new = || NewExperiment::new("other", "Other", Currency::USD, two());
    let draft = experiments.create(new()).await?;
    let draft = experiments.edit(draft.id, draft.revision, ExperimentEdit::new().name("edited")).await?;
    experiments.delete_draft(draft.id).await?;
    let other = experiments.create(new()).await?;
    experiments.activate(other.id).await?;
    experiments.pause(other.id).await?;
    experiments.resume(other.id).await?;
    experiments.complete(other.id, None).await?;
    assert!(experiments.get(id).await?.is_some());
    assert!(experiments.by_key("plan").await?.is_some());
    assert_eq!(experiments.list(None, 10, None).await?.items.len(), 2);

    let assignments = scope.assignments();
    assignments.assign(id, &user).await?;
    assignments.assign_many(id, &[UserId::new("another")?]).await?;
    assert!(assignments.get(id, &user).await?.is_some());
    assert_eq!(assignments.list_by_user(&user, 10, None).await?.items.len(), 1);

    scope.views().record(&us.view("user")).await?;
    scope.views().record_many(&[us.view("user"), us.view("nobody")]).await?;

    let conversions = scope.conversions();
    conversions.settle(&us.sale("user", "key")).await?.entry()?;
    let again = conversions.settle_many(&[us.sale("user", "key"), us.sale("nobody", "other")]).await?;
    assert_eq!(again.len(), 2);
    assert!(conversions.by_key(&key()?).await?.is_some());
    assert_eq!(conversions.list_by_user(&user, 10, None).await?.items.len(), 1);
    conversions.list_by_order(&lastprice::OrderId::new("order")?, 10, None).await?;

    let usage = scope.usage();
    usage.add(&NewUsage::new("calls", today, 7, key()?)).await?;
    assert_eq!(usage.total("calls", today, today).await?, 7);
    assert_eq!(usage.by_day("calls", today, today).await?.len(), 1);

    let price = lastprice::Money::from_minor(1900, Currency::USD);
    let recommendations = scope.recommendations();
    let new = NewRecommendation::new(id, price, 0.5, Objective::Revenue).expected_revenue(price);
    let new = recommendations.store(&new).await?.id;
    assert!(recommendations.get(new).await?.is_some());
    recommendations.approve(new, &PriceBounds::new().ceiling(price)).await?;
    let draft = recommendations.apply(new, &FollowUp::new("next")).await?;
    recommendations.score(new, price).await?;
    assert_eq!(recommendations.reject(new, "no").await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(recommendations.expire_due().await?, 0);
    assert!(recommendations.latest(id).await?.is_some());
    assert_eq!(recommendations.list(id, 10, None).await?.items.len(), 1);
    let applied = recommendations.list_by_status(RecommendationStatus::Applied, 10, None).await?;
    assert_eq!(applied.items.len(), 1);
    experiments.delete_draft(draft.id).await?;

    let metrics = scope.metrics();
    assert_eq!(metrics.experiment(id).await?.views, 2);
    assert_eq!(metrics.by_variant(id).await?.len(), 2);
    metrics.by_day(id, today, today).await?;
    metrics.refreshed(10, None).await?;
    metrics.fold().await?;
    Ok(())
}

async fn one_shot(client: Client, us: Side) -> Result<()> {
    every_call(&client.tenant(us.tenant).with_actor(Actor::new("me")?), us).await
}

async fn in_a_transaction(client: Client, us: Side) -> Result<()> {
    let transaction = client.tenant(us.tenant).begin().await?;
    every_call(&transaction, us).await?;
    transaction.commit().await
}

async fn within(client: Client, us: Side, mut host: lastprice::tokio_postgres::Client) -> Result<()> {
    let transaction = host.transaction().await.unwrap();
    every_call(&TenantScope::within(&transaction, us.tenant), us).await?;
    transaction.rollback().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    every_call(&client.within(&transaction, us.tenant), us).await?;
    transaction.commit().await.unwrap();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_send_in_all_three_forms_and_works() {
    for login in [Login::App, Login::Superuser] {
        for form in 0..3 {
            let world = World::new().await;
            let client = world.client((login, Default::default())).build().unwrap();
            let us = world.ours;
            let host = match login {
                Login::App => world.database.connect_app().await.unwrap(),
                Login::Superuser => world.database.connect_superuser().await.unwrap(),
            };
            let handled = match form {
                0 => route(&client, move |State(client)| one_shot(client, us)),
                1 => route(&client, move |State(client)| in_a_transaction(client, us)),
                _ => within(client.clone(), us, host).boxed(),
            };
            tokio::spawn(handled).await.unwrap().unwrap();
            // In every form exactly this was written, and nothing of it for the other tenant.
            assert_eq!(world.rows_of("user").await, (2, 1), "{login:?}, form {form}");
            world.check_next_user(&client).await;
            world.check_books(&client).await;
        }
    }
}

#[tokio::test]
async fn the_other_calls_are_send_too() {
    let world = World::new().await;
    let client = world.client((Login::App, Default::default())).build().unwrap();
    let handled = route(&client, |State(client)| async move {
        client.ready().await?;
        let created = client.create_tenant(NewTenant::managed("New", "new@x.test")).await?;
        client.tenant(created.id).begin().await?.rollback().await?;
        client.close().await;
        Ok(())
    });
    tokio::spawn(handled).await.unwrap().unwrap();
    assert_eq!(client.ready().await.unwrap_err().kind(), ErrorKind::Closed);
}

#[test]
fn types_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    fn everywhere<T: Clone + Send + Sync + 'static>() {}
    everywhere::<Client>();
    everywhere::<ClientBuilder>();
    everywhere::<TenantId>();
    everywhere::<ExperimentId>();
    shared::<TenantHandle>();
    shared::<TenantTransaction>();
    shared::<TenantScope<'_>>();
    shared::<Error>();
    assert_eq!(size_of::<Error>(), size_of::<usize>());
    assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
}
