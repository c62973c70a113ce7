//! Two tenants, of whom one attacks: whatever it asks about the other's ids, keys, users and orders, it gets to the letter
//! the answer that it gets about such as nobody has.

use std::error::Error as _;
use std::fmt::Debug;

use lastprice::chrono::{TimeDelta, Utc};
use lastprice::uuid::Uuid;
use lastprice::{
    Cursor, ExperimentEdit, ExperimentId, FollowUp, HostOrder, IdempotencyKey, NewAssignment, NewConversion,
    NewPhase, NewRecommendation, NewUsage, NewView, Objective, OrderAmount, OrderId, Period, PriceBounds,
    RecommendationId, Result, SubscriptionId, TenantScope, UserId, ViewId,
};

use crate::support_repo::*;
use crate::support_sql::connect;

/// What a tenant has names for.
#[derive(Clone)]
pub(crate) struct Names {
    pub(crate) experiment: ExperimentId,
    draft: ExperimentId,
    experiment_key: String,
    user: UserId,
    view: ViewId,
    key: IdempotencyKey,
    order: OrderId,
    subscription: SubscriptionId,
    metric_key: IdempotencyKey,
    recommendation: RecommendationId,
    approved: RecommendationId,
    /// Of the pages that the tenant was given.
    cursors: Vec<Cursor>,
}

impl Names {
    /// Such as nobody has, of the same form: ids of the same millisecond, since a page begins where an id stands.
    fn of_nobody(of: &Names) -> Names {
        let text = || Uuid::now_v7().to_string();
        Names {
            experiment: near(of.experiment.uuid()).into(),
            draft: near(of.draft.uuid()).into(),
            experiment_key: format!("x-{}", &Uuid::new_v4().simple().to_string()[..12]),
            user: UserId::new(text()).unwrap(),
            view: near(of.view.uuid()).into(),
            key: key(&text()),
            order: OrderId::new(text()).unwrap(),
            subscription: SubscriptionId::new(text()).unwrap(),
            metric_key: key(&text()),
            recommendation: near(of.recommendation.uuid()).into(),
            approved: near(of.approved.uuid()).into(),
            cursors: of
                .cursors
                .iter()
                .map(|cursor| near(cursor.to_string().parse().unwrap()).to_string().parse().unwrap())
                .collect(),
        }
    }

    /// Takes the names themselves out of an answer.
    fn hide(&self, answer: &str) -> String {
        let names = [
            (self.experiment.to_string(), "<experiment>"),
            (self.draft.to_string(), "<draft>"),
            (self.experiment_key.clone(), "<experiment key>"),
            (self.user.as_str().to_owned(), "<user>"),
            (self.view.to_string(), "<view>"),
            (self.key.as_str().to_owned(), "<key>"),
            (self.order.as_str().to_owned(), "<order>"),
            (self.subscription.as_str().to_owned(), "<subscription>"),
            (self.metric_key.as_str().to_owned(), "<metric key>"),
            (self.recommendation.to_string(), "<recommendation>"),
            (self.approved.to_string(), "<approved>"),
        ];
        names.into_iter().fold(answer.to_owned(), |answer, (name, hidden)| answer.replace(&name, hidden))
    }
}

/// The same time, other random bits.
fn near(id: Uuid) -> Uuid {
    let (mut bytes, other) = (id.into_bytes(), Uuid::new_v4().into_bytes());
    bytes[9..].copy_from_slice(&other[9..]);
    Uuid::from_bytes(bytes)
}

/// Acme has something in every table, and Globex an experiment in which everybody pays the same.
pub(crate) struct Prey {
    pub(crate) two: TwoTenants,
    pub(crate) acmes: Names,
    pub(crate) mine: ExperimentId,
}

pub(crate) async fn prey() -> Prey {
    let two = two_tenants().await;
    let acme = &two.acme;
    let id = one_price_for_all(acme, "acmes-plan").await;
    let buyer = UserId::new("acmes-best-customer").unwrap();
    for user in [&buyer, &user(1)] {
        acme.assignments().assign(id, user).await.unwrap();
    }
    let view = ViewId::new();
    let _ = acme.views().record(&NewView::new(id, buyer.clone()).id(view)).await.unwrap();
    let (order, subscription) =
        (OrderId::new("acmes-order").unwrap(), SubscriptionId::new("acmes-subscription").unwrap());
    let sale_key = key("acmes-charge");
    let sale = NewConversion::sale(id, buyer.clone(), usd("29"), sale_key.clone());
    let sale = sale.order(order.clone()).subscription(subscription.clone());
    acme.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
    let renewal = renewal_of(&subscription, "acmes-renewal");
    acme.conversions().settle(&renewal).await.unwrap().entry().unwrap().unwrap();
    let early = NewConversion::refund(OrderId::new("acmes-late").unwrap(), usd("1"), key("acmes-early"));
    let _ = acme.conversions().settle(&early).await.unwrap();
    let metric_key = key("acmes-metric");
    for k in [metric_key.clone(), key("acmes-other")] {
        let _ = acme.usage().add(&NewUsage::new("acmes.metric", today(), 5, k)).await.unwrap();
    }
    let new = |price: &str| NewRecommendation::new(id, usd(price), 0.5, Objective::Revenue);
    let recommendation = acme.recommendations().store(&new("30")).await.unwrap().id;
    let approved = acme.recommendations().store(&new("31")).await.unwrap().id;
    acme.recommendations().approve(approved, &PriceBounds::new()).await.unwrap();
    let draft = draft(acme, "acmes-draft").await.id;
    let cursors = [
        acme.experiments().list(None, 1, None).await.unwrap().next,
        acme.conversions().list_by_user(&buyer, 1, None).await.unwrap().next,
        acme.recommendations().list(id, 1, None).await.unwrap().next,
    ];
    let acmes = Names {
        experiment: id,
        draft,
        experiment_key: "acmes-plan".to_owned(),
        user: buyer,
        view,
        key: sale_key,
        order,
        subscription,
        metric_key,
        recommendation,
        approved,
        cursors: cursors.into_iter().map(Option::unwrap).collect(),
    };
    let mine = one_price_for_all(&two.globex, "mine").await;
    two.owner.batch_execute("SELECT refresh_experiment_metrics()").await.unwrap();
    Prey { two, acmes, mine }
}

/// Whoever it is gets the same: an answer about a user does not depend on the user's name.
async fn one_price_for_all(tenant: &lastprice::TenantHandle, k: &str) -> ExperimentId {
    let variants = lastprice::Variants::new().add("a", 1, "29").add("b", 0, "29");
    let new = lastprice::NewExperiment::new(k, k, lastprice::Currency::USD, variants);
    let id = tenant.experiments().create(new).await.unwrap().id;
    tenant.experiments().activate(id).await.unwrap().id
}

fn renewal_of(subscription: &SubscriptionId, k: &str) -> NewConversion {
    NewConversion::renewal(subscription.clone(), Period::new("2026-02").unwrap(), usd("29"), key(k))
}

/// All that can be asked about names, by what it is called in [`ask`]; what takes a name for good comes last.
const QUESTIONS: [&str; 57] = [
    "experiments.get",
    "experiments.by_key",
    "experiments.list after",
    "experiments.edit",
    "experiments.edit draft",
    "experiments.activate",
    "experiments.pause",
    "experiments.resume",
    "experiments.complete",
    "experiments.delete_draft",
    "experiments.delete",
    "experiments.raise_traffic",
    "experiments.new_phase",
    "experiments.force",
    "assignments.assign",
    "assignments.assign_many",
    "assignments.get",
    "assignments.get mine",
    "assignments.list_by_user",
    "assignments.list_by_user after",
    "views.record in theirs",
    "views.record_many in theirs",
    "conversions.authorise in theirs",
    "conversions.settle in theirs",
    "conversions.trial in theirs",
    "conversions.by_key",
    "conversions.list_by_user",
    "conversions.list_by_order",
    "conversions.list_by_subscription",
    "conversions.list after",
    "conversions.authorise refund",
    "conversions.authorise chargeback",
    "conversions.authorise reversal",
    "conversions.authorise renewal",
    "conversions.reconcile",
    "usage.total",
    "recommendations.get",
    "recommendations.latest",
    "recommendations.list",
    "recommendations.list after",
    "recommendations.store for theirs",
    "recommendations.approve",
    "recommendations.reject",
    "recommendations.apply",
    "recommendations.score",
    "metrics.experiment",
    "metrics.by_variant",
    "metrics.by_day",
    "metrics.report",
    "metrics.refreshed after",
    "experiments.create same key",
    "assignments.assign in mine",
    "views.record same id",
    "conversions.settle same key",
    "conversions.settle refund first",
    "usage.add same key",
    "recommendations.store same id",
];

async fn ask(what: &str, s: &TenantScope<'_>, n: &Names, mine: ExperimentId) -> String {
    let (theirs, draft) = (n.experiment, n.draft);
    let edit = || ExperimentEdit::new().name("stolen");
    let new_key = || key(&Uuid::now_v7().to_string());
    let sale = |x: ExperimentId, k: &IdempotencyKey| {
        let sale = NewConversion::sale(x, n.user.clone(), usd("29"), k.clone());
        sale.order(n.order.clone()).subscription(n.subscription.clone())
    };
    let back = |k| NewConversion::refund(n.order.clone(), usd("1"), k);
    let recommended = |x| NewRecommendation::new(x, usd("33"), 0.5, Objective::Revenue);
    let view = |x| NewView::new(x, n.user.clone());
    let share = percent(100);
    let phase = || NewPhase::new(three());
    let now = Utc::now();
    match what {
        "experiments.get" => said(s.experiments().get(theirs).await),
        "experiments.by_key" => said(s.experiments().by_key(&n.experiment_key).await),
        "experiments.list after" => said(s.experiments().list(None, 10, Some(n.cursors[0])).await),
        "experiments.edit" => said(s.experiments().edit(theirs, 1, edit()).await),
        "experiments.edit draft" => said(s.experiments().edit(draft, 1, edit()).await),
        "experiments.activate" => said(s.experiments().activate(draft).await),
        "experiments.pause" => said(s.experiments().pause(theirs).await),
        "experiments.resume" => said(s.experiments().resume(theirs).await),
        "experiments.complete" => said(s.experiments().complete(theirs, Some("a")).await),
        "experiments.delete_draft" => said(s.experiments().delete_draft(draft).await),
        "experiments.delete" => said(s.experiments().delete_draft(theirs).await),
        "experiments.raise_traffic" => said(s.experiments().raise_traffic(theirs, share).await),
        "experiments.new_phase" => said(s.experiments().new_phase(theirs, 2, phase()).await),
        "experiments.force" => said(s.experiments().force(theirs, &n.user, Some("a")).await),
        "assignments.assign" => said(s.assignments().assign(theirs, &n.user).await),
        "assignments.assign_many" => said(s.assignments().assign_many(theirs, [&n.user, &user(1)]).await),
        "assignments.get" => said(s.assignments().get(theirs, &n.user).await),
        "assignments.get mine" => said(s.assignments().get(mine, &n.user).await),
        "assignments.list_by_user" => said(s.assignments().list_by_user(&n.user, 10, None).await),
        "assignments.list_by_user after" => {
            said(s.assignments().list_by_user(&n.user, 10, Some(n.cursors[0])).await)
        }
        "views.record in theirs" => said(s.views().record(&view(theirs)).await),
        "views.record_many in theirs" => said(s.views().record_many(&[view(theirs), view(draft)]).await),
        "conversions.authorise in theirs" => said(s.conversions().authorise(&sale(theirs, &new_key())).await),
        "conversions.settle in theirs" => said(s.conversions().settle(&sale(theirs, &new_key())).await),
        "conversions.trial in theirs" => {
            let trial = NewConversion::trial_start(theirs, n.user.clone(), n.subscription.clone(), new_key());
            said(s.conversions().settle(&trial).await)
        }
        "conversions.by_key" => said(s.conversions().by_key(&n.key).await),
        "conversions.list_by_user" => said(s.conversions().list_by_user(&n.user, 10, None).await),
        "conversions.list_by_order" => said(s.conversions().list_by_order(&n.order, 10, None).await),
        "conversions.list_by_subscription" => {
            said(s.conversions().list_by_subscription(&n.subscription, 10, None).await)
        }
        "conversions.list after" => said(s.conversions().list_by_user(&n.user, 10, Some(n.cursors[1])).await),
        "conversions.authorise refund" => said(s.conversions().authorise(&back(new_key())).await),
        "conversions.authorise chargeback" => {
            let entry = NewConversion::chargeback(n.order.clone(), usd("29"), new_key());
            said(s.conversions().authorise(&entry).await)
        }
        "conversions.authorise reversal" => {
            let entry = NewConversion::chargeback_reversal(n.order.clone(), usd("29"), new_key());
            said(s.conversions().authorise(&entry).await)
        }
        "conversions.authorise renewal" => {
            let entry = renewal_of(&n.subscription, new_key().as_str());
            said(s.conversions().authorise(&entry).await)
        }
        "conversions.reconcile" => {
            let orders = [HostOrder::new(n.order.clone(), usd("29"))];
            let time = now - TimeDelta::days(1)..now + TimeDelta::days(1);
            said(s.conversions().reconcile(orders, time, OrderAmount::Net).await)
        }
        "usage.total" => said(s.usage().total("acmes.metric", today(), today()).await),
        "recommendations.get" => said(s.recommendations().get(n.recommendation).await),
        "recommendations.latest" => said(s.recommendations().latest(theirs).await),
        "recommendations.list" => said(s.recommendations().list(theirs, 10, None).await),
        "recommendations.list after" => said(s.recommendations().list(theirs, 10, Some(n.cursors[2])).await),
        "recommendations.store for theirs" => said(s.recommendations().store(&recommended(theirs)).await),
        "recommendations.approve" => {
            said(s.recommendations().approve(n.recommendation, &PriceBounds::new()).await)
        }
        "recommendations.reject" => said(s.recommendations().reject(n.recommendation, "no").await),
        "recommendations.apply" => said(s.recommendations().apply(n.approved, &FollowUp::new("next")).await),
        "recommendations.score" => said(s.recommendations().score(n.approved, usd("1")).await),
        "metrics.experiment" => said(s.metrics().experiment(theirs).await),
        "metrics.by_variant" => said(s.metrics().by_variant(theirs).await),
        "metrics.by_day" => said(s.metrics().by_day(theirs, today(), today()).await),
        "metrics.report" => said(s.metrics().report(theirs).await),
        "metrics.refreshed after" => said(s.metrics().refreshed(10, Some(n.cursors[0])).await),
        "experiments.create same key" => {
            let new = lastprice::NewExperiment::new(
                n.experiment_key.clone(),
                "E",
                lastprice::Currency::USD,
                three(),
            );
            said(s.experiments().create(new.id(theirs)).await)
        }
        "assignments.assign in mine" => said(s.assignments().assign(mine, &n.user).await),
        "views.record same id" => {
            // Whoever has no quote is told so before the id is looked at.
            s.assignments().assign(mine, &n.user).await.unwrap();
            said(s.views().record(&view(mine).id(n.view)).await)
        }
        "conversions.settle same key" => said(s.conversions().settle(&sale(mine, &n.key)).await),
        "conversions.settle refund first" => said(s.conversions().settle(&back(new_key())).await),
        "usage.add same key" => {
            let usage = NewUsage::new("acmes.metric", today(), 5, n.metric_key.clone());
            said(s.usage().add(&usage).await)
        }
        "recommendations.store same id" => {
            said(s.recommendations().store(&recommended(mine).id(n.recommendation)).await)
        }
        _ => panic!("{what}: nobody answers"),
    }
}

/// All that a caller could learn of an answer.
fn said<T: Debug>(result: Result<T>) -> String {
    let error = match result {
        Ok(value) => return format!("{value:#?}"),
        Err(error) => error,
    };
    let mut all = format!(
        "{:?} {error} {error:?} {:?} {:?} {:?} {}",
        error.kind(),
        error.field(),
        error.conflicting_fields(),
        error.sqlstate(),
        error.is_retryable()
    );
    let mut cause = error.source();
    while let Some(error) = cause {
        all += &format!("\n{error} {error:?}");
        cause = error.source();
    }
    all
}

/// Without what is new in every answer: ids that were made for it, times, and salts.
fn without_the_new(answer: &str) -> String {
    let is_time = |word: &str| word.len() > 18 && word.as_bytes()[4] == b'-' && word.as_bytes()[10] == b'T';
    let mut kept = String::new();
    for line in answer.lines() {
        if line.trim_start().starts_with("salt:") {
            continue;
        }
        let words = line.split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || "-:.<>".contains(c)));
        for word in words {
            let bare = word.trim_end_matches(|c: char| !(c.is_ascii_alphanumeric() || "-:.<>".contains(c)));
            let hidden = if bare.parse::<Uuid>().is_ok() {
                "<new id>"
            } else if is_time(bare) {
                "<time>"
            } else {
                bare
            };
            kept.push_str(hidden);
            kept.push_str(&word[bare.len()..]);
        }
        kept.push('\n');
    }
    kept
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Alone,
    Together,
    Within,
}

/// What Globex gets for an answer, and keeps only if it asks alone.
async fn answer(prey: &Prey, form: Form, what: &str, names: &Names) -> String {
    let said = match form {
        Form::Alone => ask(what, &prey.two.globex, names, prey.mine).await,
        Form::Together => {
            let transaction = prey.two.globex.begin().await.unwrap();
            let said = ask(what, &transaction, names, prey.mine).await;
            transaction.rollback().await.unwrap();
            said
        }
        Form::Within => {
            let mut host = connect(&prey.two.database.app_url()).await;
            let transaction = host.transaction().await.unwrap();
            let said = {
                let scope = prey.two.client.within(&transaction, prey.two.other_id);
                ask(what, &scope, names, prey.mine).await
            };
            transaction.rollback().await.unwrap();
            said
        }
    };
    without_the_new(&names.hide(&said))
}

/// What is answered differently about Acme's names and about nobody's, and whether two nobodies differ.
async fn differences(prey: &Prey, form: Form) -> Vec<String> {
    let nobodies = [Names::of_nobody(&prey.acmes), Names::of_nobody(&prey.acmes)];
    let mut differing = Vec::new();
    for what in QUESTIONS {
        let of_acme = answer(prey, form, what, &prey.acmes).await;
        let of_nobody = answer(prey, form, what, &nobodies[0]).await;
        let of_another = answer(prey, form, what, &nobodies[1]).await;
        assert_eq!(of_nobody, of_another, "{form:?} {what}: the comparison itself does not hold");
        if of_acme != of_nobody {
            differing.push(format!("{form:?} {what}\nACME'S: {of_acme}\nNOBODY'S: {of_nobody}"));
        }
    }
    differing
}

#[tokio::test]
async fn no_answer_tells_anothers_names_from_nobodys() {
    let prey = prey().await;
    let before = acmes_rows(&prey).await;
    for form in [Form::Together, Form::Within, Form::Alone] {
        let differing = differences(&prey, form).await;
        assert!(differing.is_empty(), "{}", differing.join("\n\n"));
    }
    assert_eq!(acmes_rows(&prey).await, before, "nothing of Acme's was changed");
}

/// The comparison can fail: keys that are unique across tenants, as the original had them, give it away.
#[tokio::test]
async fn a_key_that_is_unique_across_tenants_is_noticed() {
    let prey = prey().await;
    let unique = "CREATE UNIQUE INDEX given_away ON experiments (id); CREATE UNIQUE INDEX given_away_too ON views (id);
                  CREATE UNIQUE INDEX given_away_three ON conversions (idempotency_key)";
    prey.two.owner.batch_execute(unique).await.unwrap();
    for form in [Form::Together, Form::Within, Form::Alone] {
        let differing = differences(&prey, form).await;
        for what in ["experiments.create same key", "views.record same id", "conversions.settle same key"] {
            let name = format!("{form:?} {what}\n");
            assert!(
                differing.iter().any(|difference| difference.starts_with(&name)),
                "{name}: {differing:?}"
            );
        }
    }
}

/// Everything of Acme's, whoever may see it.
async fn acmes_rows(prey: &Prey) -> Vec<String> {
    let mut all = Vec::new();
    for table in [
        "experiments",
        "assignments",
        "views",
        "conversions",
        "waiting_conversions",
        "usage",
        "recommendations",
    ] {
        let sql = format!("SELECT x::text FROM {table} x WHERE tenant_id = $1 ORDER BY 1");
        let rows = prey.two.owner.query(&sql, &[&prey.two.id.uuid()]).await.unwrap();
        assert!(!rows.is_empty(), "{table}: Acme has something in it");
        all.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    }
    all
}

#[tokio::test]
async fn the_recorder_and_the_assigner_tell_nothing_either() {
    let prey = prey().await;
    let nobody = Names::of_nobody(&prey.acmes);
    let before = acmes_rows(&prey).await;
    let recorder = prey.two.client.recorder();
    let assigner = prey.two.client.assigner(prey.two.other_id).await.unwrap();
    let mut answers = Vec::new();
    for n in [&prey.acmes, &nobody] {
        let mut all = String::new();
        let sale = NewConversion::sale(n.experiment, n.user.clone(), usd("29"), n.key.clone());
        let refund =
            NewConversion::refund(n.order.clone(), usd("1"), key(&format!("back of {}", n.order.as_str())));
        let events: [lastprice::Event; 4] = [
            NewView::new(n.experiment, n.user.clone()).id(n.view).into(),
            NewAssignment::new(n.experiment, n.user.clone()).into(),
            sale.into(),
            refund.into(),
        ];
        for event in events {
            all += &format!("{:#?}\n", recorder.track(prey.two.other_id, event).await);
        }
        all += &format!("{:?}\n", assigner.assign(&n.experiment_key, &n.user).is_some());
        all += &said(assigner.quote(&n.experiment_key, &n.user).await);
        answers.push(without_the_new(&n.hide(&all)));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(acmes_rows(&prey).await, before);
    let _ = recorder.shutdown(std::time::Duration::from_secs(10)).await;
}
