//! A host whose checkout writes an order of its own and our entry, and what must hold of both.

use lastprice::rust_decimal::Decimal;
use lastprice::tokio_postgres::{self, NoTls};
use lastprice::{
    Client, ConversionOutcome, Currency, Error, ErrorKind, ExperimentId, Money, NewConversion, NewView,
    OrderId, UserId,
};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::task::JoinHandle;

use crate::support_repo::*;
use crate::wire::Wire;

/// The host's own table, on which `lastprice_app` has no right: only the host's own statements write to it.
const ORDERS: &str = "
    CREATE TABLE orders (tenant_id uuid, id text, total numeric NOT NULL, PRIMARY KEY (tenant_id, id));
    GRANT SELECT, INSERT ON orders TO lastprice_service";

/// The name that the server knows the service's connections by.
const SERVICE: &str = "checkout";

/// Whose transaction a checkout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The host's: quote, view, entry by `within`, and an order of its own.
    Hosts,
    /// Ours: quote, view, and two entries (a sale, and what goes back of it at once).
    Ours,
}

/// What is to be bought: the same ids and keys, however often it is tried.
pub(crate) struct Order {
    id: String,
    user: UserId,
    view: NewView,
}

/// Who sells, over one connection.
pub(crate) enum Service {
    Hosts(tokio_postgres::Client, JoinHandle<()>),
    Ours(Client),
}

/// What a checkout says when it breaks off: an error of ours, or of the driver.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A dropped service hangs up.
impl Drop for Service {
    fn drop(&mut self) {
        if let Service::Hosts(_, connection) = self {
            connection.abort();
        }
    }
}

impl Service {
    pub(crate) async fn open(way: Way, url: &str) -> Result<Service, Failure> {
        Ok(match way {
            Way::Ours => Service::Ours(Client::builder().url(url).pool_size(1).require_app_role().build()?),
            Way::Hosts => {
                let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
                Service::Hosts(client, tokio::spawn(async move { drop(connection.await) }))
            }
        })
    }

    /// Whether this is what sold it; otherwise it was sold before.
    pub(crate) async fn checkout(&mut self, shop: &Shop, order: &Order) -> Result<bool, Failure> {
        match self {
            Service::Hosts(host, _) => {
                let transaction = host.transaction().await?;
                let ours = shop.two.client.within(&transaction, shop.two.id);
                let quote = ours.assignments().assign(shop.experiment, &order.user).await?;
                let _ = ours.views().record(&order.view).await?;
                let outcome = ours.conversions().authorise(&shop.sale(order, quote.price())).await?;
                let is_new = matches!(outcome, ConversionOutcome::Recorded(_));
                let entry = outcome.entry()?.unwrap();
                if is_new {
                    // Without ON CONFLICT: an order whose entry was not there would be noticed here.
                    let insert = "INSERT INTO orders (tenant_id, id, total) VALUES ($1, $2, $3)";
                    let params = (shop.two.id.uuid(), entry.revenue.amount());
                    transaction.execute(insert, &[&params.0, &order.id, &params.1]).await?;
                }
                transaction.commit().await?;
                Ok(is_new)
            }
            Service::Ours(client) => {
                let transaction = client.tenant(shop.two.id).begin().await?;
                let quote = transaction.assignments().assign(shop.experiment, &order.user).await?;
                let _ = transaction.views().record(&order.view).await?;
                let mut new = 0;
                for entry in [shop.sale(order, quote.price()), shop.refund(order)] {
                    let outcome = transaction.conversions().authorise(&entry).await?;
                    new += usize::from(matches!(outcome, ConversionOutcome::Recorded(_)));
                    outcome.entry()?.unwrap();
                }
                transaction.commit().await?;
                assert!(new != 1, "half of it was there");
                Ok(new > 0)
            }
        }
    }
}

/// Two tenants, and what the host has of its own.
pub(crate) struct Shop {
    pub(crate) two: TwoTenants,
    pub(crate) superuser: tokio_postgres::Client,
    experiment: ExperimentId,
    pub(crate) way: Way,
    orders: u32,
}

impl Shop {
    pub(crate) async fn open(way: Way, cluster: Option<&PrivateCluster>) -> Shop {
        let database = cluster.map_or_else(TestDatabase::builder, PrivateCluster::database_builder);
        let two = two_tenants_in(database.setup_sql(ORDERS).create().await.unwrap()).await;
        let experiment = active(&two.acme, "checkout").await.id;
        Shop { superuser: two.database.connect_superuser().await.unwrap(), two, experiment, way, orders: 0 }
    }

    pub(crate) fn order(&mut self) -> Order {
        self.orders += 1;
        let user = UserId::new(format!("buyer-{}", self.orders)).unwrap();
        Order {
            id: format!("order-{}", self.orders),
            view: NewView::new(self.experiment, user.clone()),
            user,
        }
    }

    /// Three, with something taken off.
    fn sale(&self, order: &Order, price: Money) -> NewConversion {
        let net = price.checked_mul(3).unwrap().checked_sub(usd("2.50")).unwrap();
        NewConversion::sale(self.experiment, order.user.clone(), net, key(&order.id))
            .order(OrderId::new(&*order.id).unwrap())
            .quantity(3)
            .discount(usd("2.50"))
    }

    fn refund(&self, order: &Order) -> NewConversion {
        let back = key(&format!("back:{}", order.id));
        NewConversion::refund(OrderId::new(&*order.id).unwrap(), usd("0.01"), back)
    }

    /// Whether an order is there: all that belongs to it, or nothing, and the same amount on both sides.
    async fn has(&self, order: &Order) -> bool {
        let sql = "SELECT (SELECT count(*) FROM assignments WHERE tenant_id = $1 AND user_id = $2),
                          (SELECT count(*) FROM views WHERE tenant_id = $1 AND user_id = $2),
                          (SELECT count(*) FROM conversions WHERE tenant_id = $1 AND user_id = $2),
                          (SELECT count(*) FROM orders WHERE tenant_id = $1 AND id = $3)";
        let (acme, user) = (self.two.id.uuid(), order.user.as_str());
        let row = self.superuser.query_one(sql, &[&acme, &user, &order.id]).await.unwrap();
        let found: [i64; 4] = [0, 1, 2, 3].map(|n| row.get(n));
        let whole = if self.way == Way::Hosts { [1, 1, 1, 1] } else { [1, 1, 2, 0] };
        assert!(found == whole || found == [0; 4], "{}: half a checkout: {found:?}", order.id);
        found == whole
    }

    /// The books of all that was ever tried: orders and ledger agree, row by row and in their sum, and so do the live
    /// numbers. The other tenant has nothing of it, and sees nothing.
    pub(crate) async fn check_books(&self, last: &Order) {
        let sql = "SELECT (SELECT count(*) FROM assignments WHERE tenant_id = $1),
                          (SELECT count(*) FROM views WHERE tenant_id = $1),
                          (SELECT count(*) FROM conversions WHERE tenant_id = $1 AND kind = 'sale'),
                          (SELECT COALESCE(sum(revenue), 0) FROM conversions WHERE tenant_id = $1),
                          (SELECT COALESCE(sum(total), 0) FROM orders WHERE tenant_id = $1),
                          (SELECT count(*) FROM conversions c FULL JOIN orders o ON o.tenant_id = c.tenant_id AND o.id = c.order_id
                           WHERE $1 IN (c.tenant_id, o.tenant_id)
                             AND (o.total IS DISTINCT FROM c.revenue OR o.id IS DISTINCT FROM c.idempotency_key)),
                          (SELECT count(*) FROM conversions WHERE tenant_id <> $1 AND experiment_id = $2)
                          + (SELECT count(*) FROM orders WHERE tenant_id <> $1)";
        let ids = (self.two.id.uuid(), self.experiment.uuid());
        let row = self.superuser.query_one(sql, &[&ids.0, &ids.1]).await.unwrap();
        let live = self.two.acme.metrics().experiment(self.experiment).await.unwrap();
        let counts = [live.assignments, live.views, live.conversions].map(|n| n as i64);
        assert_eq!(counts, [0, 1, 2].map(|n| row.get::<_, i64>(n)));
        let net = live.revenue(Currency::USD).amount();
        assert_eq!(net, row.get::<_, Decimal>(3));
        if self.way == Way::Hosts {
            assert_eq!(net, row.get::<_, Decimal>(4), "the sums of orders and ledger differ");
            assert_eq!(row.get::<_, i64>(5), 0, "orders and ledger differ");
        }
        assert_eq!(row.get::<_, i64>(6), 0, "something of another tenant's");
        let (ledger, order) = (self.two.globex.conversions(), OrderId::new(&*last.id).unwrap());
        assert!(ledger.list_by_order(&order, 10, None).await.unwrap().items.is_empty());
        assert!(ledger.by_key(&key(&last.id)).await.unwrap().is_none());
    }

    /// What must hold however a checkout has ended, and that it is one order in the end. `true` if it had been sold.
    pub(crate) async fn check(
        &self,
        order: &Order,
        ended: Option<Result<bool, Failure>>,
        next: &mut Service,
    ) -> bool {
        let sold = self.has(order).await;
        match &ended {
            Some(Ok(is_new)) => assert!(*is_new && sold, "{}: what was acknowledged is gone", order.id),
            Some(Err(e)) if self.is_undone(e) => assert!(!sold, "{} is there: {e:?}", order.id),
            _ => {} // nobody knows
        }
        self.check_books(order).await;
        let is_new = next.checkout(self, order).await.unwrap();
        assert_eq!(is_new, !sold, "{}: sold twice, or never", order.id);
        assert!(self.has(order).await);
        sold
    }

    /// Whether it says that nothing was written. In a transaction of the host's every error of ours does.
    fn is_undone(&self, failure: &Failure) -> bool {
        let ours = failure.downcast_ref::<Error>();
        ours.is_some_and(|error| self.way == Way::Hosts || error.kind() != ErrorKind::OutcomeUnknown)
    }

    /// After many checkouts.
    pub(crate) async fn close(mut self) {
        let nobodys = self.order();
        self.check_books(&nobodys).await;
        self.two.bystander_saw_nothing().await;
    }

    /// Where a service goes that the server knows by its name.
    pub(crate) fn url(&self, wire: &Wire) -> String {
        format!("{} application_name={SERVICE}", wire.url())
    }

    /// Until the server has heard the last of the service: its connections are gone, or idle outside of transactions.
    pub(crate) async fn at_rest(&self) {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1
                   AND (state <> 'idle' OR xact_start IS NOT NULL)";
        eventually("rest", async || {
            self.superuser.query_one(sql, &[&SERVICE]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }

    pub(crate) async fn gone(&self) {
        eventually("the end of the service's connections", async || self.backends().await.is_empty()).await;
    }

    pub(crate) async fn backends(&self) -> Vec<i32> {
        let sql =
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1";
        let rows = self.superuser.query(sql, &[&SERVICE]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// After the server was away.
    pub(crate) async fn connect_again(&mut self) {
        let database = &self.two.database;
        eventually("a server", async || database.connect_owner().await.is_ok()).await;
        self.two.owner = database.connect_owner().await.unwrap();
        self.superuser = database.connect_superuser().await.unwrap();
    }
}
