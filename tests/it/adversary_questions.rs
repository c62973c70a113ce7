//! Everything that can be asked with another tenant's names, and a tenant who has something by every name.

use std::collections::BTreeSet;
use std::path::Path;

use hmac::{Hmac, KeyInit, Mac};
use lastprice::chrono::{TimeDelta, Utc};
use lastprice::secrecy::SecretString;
use lastprice::uuid::Uuid;
use lastprice::webhook::{Delivery, Verifier};
use lastprice::{
    Cursor, ExperimentEdit, ExperimentId, FollowUp, HostOrder, IdempotencyKey, MergePolicy, NewConversion,
    NewPhase, NewRecommendation, NewUsage, NewView, Objective, OrderAmount, OrderId, Period, PriceBounds,
    RecommendationId, RecommendationStatus, SubscriptionId, TenantScope, UserId, ViewId, WebhookStatus,
};

use crate::adversary::said;
use crate::support_repo::*;

/// What a tenant has names for.
#[derive(Clone)]
pub(crate) struct Names {
    pub(crate) experiment: ExperimentId,
    pub(crate) draft: ExperimentId,
    pub(crate) experiment_key: String,
    pub(crate) user: UserId,
    pub(crate) view: ViewId,
    pub(crate) key: IdempotencyKey,
    pub(crate) order: OrderId,
    pub(crate) subscription: SubscriptionId,
    pub(crate) metric_key: IdempotencyKey,
    pub(crate) recommendation: RecommendationId,
    pub(crate) approved: RecommendationId,
    webhook: String,
    /// Of the pages that the tenant was given.
    pub(crate) cursors: Vec<Cursor>,
}

impl Names {
    /// Such as nobody has, of the same form: ids of the same millisecond, since a page begins where an id stands.
    pub(crate) fn of_nobody(of: &Names) -> Names {
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
            webhook: text(),
            cursors: of
                .cursors
                .iter()
                .map(|cursor| near(cursor.to_string().parse().unwrap()).to_string().parse().unwrap())
                .collect(),
        }
    }

    /// Takes the names themselves out of an answer.
    pub(crate) fn hide(&self, answer: &str) -> String {
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
            (self.webhook.clone(), "<webhook>"),
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
    let _ = acme.usage().try_consume("acmes.consumed", 3, &metric_key).await.unwrap();
    let new = |price: &str| NewRecommendation::new(id, usd(price), 0.5, Objective::Revenue);
    let recommendation = acme.recommendations().store(&new("30")).await.unwrap().id;
    let approved = acme.recommendations().store(&new("31")).await.unwrap().id;
    acme.recommendations().approve(approved, &PriceBounds::new()).await.unwrap();
    let draft = draft(acme, "acmes-draft").await.id;
    let webhook = "acmes-webhook".to_owned();
    let _ = acme.webhooks().receive(&delivery(&webhook, "unheard.of")).await.unwrap();
    let _ = acme.webhooks().receive(&delivery("acmes-other-webhook", "unheard.of")).await.unwrap();
    let (cookie, gone) = (UserId::new("acmes-cookie").unwrap(), UserId::new("acmes-forgotten").unwrap());
    acme.users().merge(&cookie, &user(1), MergePolicy::Exclude).await.unwrap();
    acme.assignments().assign(id, &gone).await.unwrap();
    acme.users().erase(&gone).await.unwrap().unwrap();
    let cursors = [
        acme.experiments().list(None, 1, None).await.unwrap().next,
        acme.conversions().list_by_user(&buyer, 1, None).await.unwrap().next,
        acme.recommendations().list(id, 1, None).await.unwrap().next,
        acme.webhooks().list(WebhookStatus::Ignored, 1, None).await.unwrap().next,
        acme.audit_trail().list(1, None).await.unwrap().next,
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
        webhook,
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
pub(crate) const QUESTIONS: [&str; 78] = [
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
    "experiments.delete_draft theirs",
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
    "conversions.settle trial in theirs",
    "conversions.by_key",
    "conversions.list_by_user",
    "conversions.list_by_order",
    "conversions.list_by_subscription",
    "conversions.list_by_user after",
    "conversions.authorise refund",
    "conversions.authorise chargeback",
    "conversions.authorise reversal",
    "conversions.authorise renewal",
    "conversions.reconcile",
    "conversions.settle_many in theirs",
    "usage.total",
    "usage.by_day",
    "usage.check_quota",
    "usage.in_period",
    "recommendations.get",
    "recommendations.latest",
    "recommendations.list",
    "recommendations.list after",
    "recommendations.store for theirs",
    "recommendations.approve",
    "recommendations.reject",
    "recommendations.apply",
    "recommendations.score",
    "recommendations.list_by_status after",
    "webhooks.retry",
    "webhooks.discard",
    "webhooks.list after",
    "audit_trail.list after",
    "audit_trail.of_experiment",
    "metrics.experiment",
    "metrics.by_variant",
    "metrics.by_day",
    "metrics.report",
    "metrics.results",
    "metrics.refreshed after",
    "users.erasures after",
    "users.merges after",
    "users.merged",
    "users.erase",
    "users.merge",
    "users.merge known",
    "experiments.create same key",
    "assignments.assign in mine",
    "views.record same id",
    "conversions.settle same key",
    "conversions.settle refund first",
    "conversions.settle_many same key",
    "usage.add same key",
    "usage.add_many same key",
    "usage.try_consume same key",
    "recommendations.store same id",
    "webhooks.receive same id",
];

/// What takes no name: there is nothing of another's to ask it about.
const NAMELESS: [&str; 8] = [
    "metrics.fold",
    "recommendations.expire_due",
    "tenants.create",
    "tenants.get",
    "tenants.paid_credentials",
    "tenants.update",
    "tenants.webhook_secrets",
    "webhooks.process_pending",
];

/// Every call of every repository is asked, or takes no name.
#[test]
fn nothing_is_left_unasked() {
    let asked = QUESTIONS.iter().map(|question| question.split(' ').next().unwrap());
    let asked: BTreeSet<&str> = asked.chain(NAMELESS).collect();
    let mut calls = calls_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/repo"), None);
    calls.insert("metrics.report".to_owned()); // which stands a floor above
    assert!(calls.len() > 50, "{calls:?}");
    for call in &calls {
        assert!(asked.contains(call.as_str()), "{call} is not asked");
    }
    for question in asked {
        assert!(calls.contains(question), "there is no {question}");
    }
}

/// `room.call` for each public asynchronous function below a folder; a room is a folder or file of the first floor.
fn calls_of(folder: &Path, room: Option<&str>) -> BTreeSet<String> {
    let mut calls = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let room = room.unwrap_or_else(|| path.file_stem().unwrap().to_str().unwrap()).to_owned();
        if path.is_dir() {
            calls.extend(calls_of(&path, Some(&room)));
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("pub async fn "));
        let end = |c: char| !(c.is_alphanumeric() || c == '_');
        calls.extend(names.map(|name| format!("{room}.{}", name.split(end).next().unwrap())));
    }
    calls
}

/// By the plain scheme, which takes the id from the body.
fn delivery(id: &str, kind: &str) -> Delivery {
    let secret = "a secret";
    let body = format!(r#"{{"id":"{id}","type":"{kind}","data":{{}}}}"#);
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body.as_bytes());
    let signature = mac.finalize().into_bytes();
    let signature: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
    let verifier = Verifier::new([SecretString::from(secret)]).unwrap();
    verifier.sha256(&format!("sha256={signature}"), body.as_bytes(), Utc::now()).unwrap()
}

/// In three rooms, since in a debug build the calls of all of them do not fit on the stack of a thread.
pub(crate) async fn ask(what: &str, s: &TenantScope<'_>, n: &Names, mine: ExperimentId) -> String {
    match what.split('.').next() {
        Some("experiments" | "assignments" | "views") => Box::pin(of_prices(what, s, n, mine)).await,
        Some("conversions") => Box::pin(of_ledger(what, s, n, mine)).await,
        _ => Box::pin(of_more(what, s, n, mine)).await,
    }
}

async fn of_prices(what: &str, s: &TenantScope<'_>, n: &Names, mine: ExperimentId) -> String {
    let (theirs, draft) = (n.experiment, n.draft);
    let edit = || ExperimentEdit::new().name("stolen");
    let view = |x| NewView::new(x, n.user.clone());
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
        "experiments.delete_draft theirs" => said(s.experiments().delete_draft(theirs).await),
        "experiments.raise_traffic" => said(s.experiments().raise_traffic(theirs, percent(100)).await),
        "experiments.new_phase" => said(s.experiments().new_phase(theirs, 2, NewPhase::new(three())).await),
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
        _ => panic!("{what}: nobody answers"),
    }
}

async fn of_ledger(what: &str, s: &TenantScope<'_>, n: &Names, mine: ExperimentId) -> String {
    let theirs = n.experiment;
    let new_key = || key(&Uuid::now_v7().to_string());
    let sale = |x: ExperimentId, k: &IdempotencyKey| {
        let sale = NewConversion::sale(x, n.user.clone(), usd("29"), k.clone());
        sale.order(n.order.clone()).subscription(n.subscription.clone())
    };
    let back = |k| NewConversion::refund(n.order.clone(), usd("1"), k);
    match what {
        "conversions.authorise in theirs" => said(s.conversions().authorise(&sale(theirs, &new_key())).await),
        "conversions.settle in theirs" => said(s.conversions().settle(&sale(theirs, &new_key())).await),
        "conversions.settle trial in theirs" => {
            let trial = NewConversion::trial_start(theirs, n.user.clone(), n.subscription.clone(), new_key());
            said(s.conversions().settle(&trial).await)
        }
        "conversions.by_key" => said(s.conversions().by_key(&n.key).await),
        "conversions.list_by_user" => said(s.conversions().list_by_user(&n.user, 10, None).await),
        "conversions.list_by_order" => said(s.conversions().list_by_order(&n.order, 10, None).await),
        "conversions.list_by_subscription" => {
            said(s.conversions().list_by_subscription(&n.subscription, 10, None).await)
        }
        "conversions.list_by_user after" => {
            said(s.conversions().list_by_user(&n.user, 10, Some(n.cursors[1])).await)
        }
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
            let now = Utc::now();
            let time = now - TimeDelta::days(1)..now + TimeDelta::days(1);
            said(s.conversions().reconcile(orders, time, OrderAmount::Net).await)
        }
        "conversions.settle_many in theirs" => {
            let entries = [sale(theirs, &new_key()), back(new_key())];
            said(s.conversions().settle_many(&entries).await)
        }
        "conversions.settle same key" => said(s.conversions().settle(&sale(mine, &n.key)).await),
        "conversions.settle refund first" => said(s.conversions().settle(&back(new_key())).await),
        "conversions.settle_many same key" => said(s.conversions().settle_many(&[sale(mine, &n.key)]).await),
        _ => panic!("{what}: nobody answers"),
    }
}

async fn of_more(what: &str, s: &TenantScope<'_>, n: &Names, mine: ExperimentId) -> String {
    let theirs = n.experiment;
    let recommended = |x| NewRecommendation::new(x, usd("33"), 0.5, Objective::Revenue);
    match what {
        "usage.by_day" => said(s.usage().by_day("acmes.metric", today(), today()).await),
        "usage.check_quota" => said(s.usage().check_quota("acmes.metric").await),
        "usage.in_period" => said(s.usage().in_period("acmes.metric", today()).await),
        // Twice, so that the answer is the same whenever it is asked; without the sum, which grows with each key.
        "usage.try_consume same key" => {
            let _ = s.usage().try_consume("acmes.consumed", 1, &n.metric_key).await;
            let again = s.usage().try_consume("acmes.consumed", 1, &n.metric_key).await;
            said(again.map(|outcome| std::mem::discriminant(&outcome)))
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
        "recommendations.list_by_status after" => {
            let status = RecommendationStatus::Proposed;
            said(s.recommendations().list_by_status(status, 10, Some(n.cursors[2])).await)
        }
        "webhooks.retry" => said(s.webhooks().retry(&n.webhook).await),
        "webhooks.discard" => said(s.webhooks().discard(&n.webhook).await),
        "webhooks.list after" => {
            said(s.webhooks().list(WebhookStatus::Ignored, 10, Some(n.cursors[3])).await)
        }
        "audit_trail.list after" => said(s.audit_trail().list(10, Some(n.cursors[4])).await),
        "audit_trail.of_experiment" => said(s.audit_trail().of_experiment(theirs, 10, None).await),
        "metrics.results" => said(s.metrics().results(theirs).await),
        "metrics.experiment" => said(s.metrics().experiment(theirs).await),
        "metrics.by_variant" => said(s.metrics().by_variant(theirs).await),
        "metrics.by_day" => said(s.metrics().by_day(theirs, today(), today()).await),
        "metrics.report" => said(s.metrics().report(theirs).await),
        "metrics.refreshed after" => said(s.metrics().refreshed(10, Some(n.cursors[0])).await),
        "users.merged" => said(s.users().merged(&n.user).await),
        "users.erase" => said(s.users().erase(&n.user).await),
        "users.merge" => said(s.users().merge(&n.user, &user(1), MergePolicy::FirstQuoteWins).await),
        "users.merge known" => {
            let fresh = UserId::new(Uuid::now_v7().to_string()).unwrap();
            said(s.users().merge(&fresh, &n.user, MergePolicy::Exclude).await)
        }
        "users.erasures after" => said(s.users().erasures(10, Some(n.cursors[0])).await),
        "users.merges after" => said(s.users().merges(10, Some(n.cursors[0])).await),
        "usage.add_many same key" => {
            let usage = NewUsage::new("acmes.metric", today(), 6, n.metric_key.clone());
            said(s.usage().add_many(&[usage]).await)
        }
        "webhooks.receive same id" => {
            said(s.webhooks().receive(&delivery(&n.webhook, "unheard.of.too")).await)
        }
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
