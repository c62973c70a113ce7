//! What the tests of the ledger have in common.

use lastprice::tokio_postgres::{Client as Host, IsolationLevel, Transaction};
use lastprice::{
    Conversion, ConversionOutcome, Currency, ExperimentId, IdempotencyKey, LedgerRule, Money, NewConversion,
    OrderId, Period, Refusal, SubscriptionId, TenantHandle,
};

use crate::support_repo::*;

pub(crate) fn order(id: &str) -> OrderId {
    OrderId::new(id).unwrap()
}

pub(crate) fn subscription(id: &str) -> SubscriptionId {
    SubscriptionId::new(id).unwrap()
}

pub(crate) fn period(id: &str) -> Period {
    Period::new(id).unwrap()
}

pub(crate) fn new_key() -> IdempotencyKey {
    key(&lastprice::uuid::Uuid::now_v7().to_string())
}

pub(crate) fn eur(amount: &str) -> Money {
    Money::new(amount, "EUR").unwrap()
}

pub(crate) async fn settled(tenant: &TenantHandle, new: &NewConversion) -> Conversion {
    match tenant.conversions().settle(new).await.unwrap() {
        ConversionOutcome::Recorded(entry) => entry,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn refused_by(
    tenant: &TenantHandle,
    new: &NewConversion,
) -> (Vec<LedgerRule>, Option<Money>) {
    match tenant.conversions().authorise(new).await.unwrap() {
        ConversionOutcome::Refused(Refusal { rules, allowed, .. }) => (rules, allowed),
        other => panic!("{other:?}"),
    }
}

/// All that the ledger adds up to, whoever counts: the metrics, and the entries themselves.
pub(crate) async fn net(two: &TwoTenants, experiment: ExperimentId, currency: Currency) -> Money {
    let live = two.acme.metrics().experiment(experiment).await.unwrap().revenue(currency);
    let sql = "SELECT COALESCE(sum(revenue), 0) FROM conversions WHERE tenant_id = $1 AND experiment_id = $2 AND currency = $3";
    let row =
        two.owner.query_one(sql, &[&two.id.uuid(), &experiment.uuid(), &currency.code()]).await.unwrap();
    assert_eq!(live, Money::of(row.get(0), currency).unwrap());
    live
}

pub(crate) fn refund(o: &str, amount: &str, k: &str) -> NewConversion {
    NewConversion::refund(order(o), usd(amount), key(k))
}

pub(crate) fn renewal(s: &str, p: &str, amount: &str, k: &str) -> NewConversion {
    NewConversion::renewal(subscription(s), Period::new(p).unwrap(), usd(amount), key(k))
}

/// An experiment in which everybody pays 29.
pub(crate) async fn one_price(tenant: &TenantHandle, k: &str) -> ExperimentId {
    let variants = lastprice::Variants::new().add("a", 1, "29.00").add("b", 1, "29.00");
    let new = lastprice::NewExperiment::new(k, k, Currency::USD, variants);
    let draft = tenant.experiments().create(new).await.unwrap();
    tenant.experiments().activate(draft.id).await.unwrap().id
}

pub(crate) async fn repeatable(host: &mut Host) -> Transaction<'_> {
    let transaction = host.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
    let transaction = transaction.start().await.unwrap();
    transaction.batch_execute("SELECT count(*) FROM pg_class").await.unwrap(); // the snapshot
    transaction
}
