//! A shop whose checkout is one transaction of its own, on a PostgreSQL that it starts itself: `cargo run --example checkout`.
//!
//! The shop's orders and our ledger are in one database, so that both have a sale, or neither has it. With `DATABASE_URL` set it
//! uses that database instead (the shop's own connection without TLS), and leaves a tenant and the schema `checkout_shop`. Its role
//! then has to be one that may create schemas in the database (`GRANT CREATE ON DATABASE`), and tables where the schema is installed.

use std::process::ExitCode;

use lastprice::tokio_postgres::{self, NoTls};
use lastprice::{
    Admin, Client, ConversionOutcome, Currency, ExperimentId, IdempotencyKey, Money, NewConversion,
    NewExperiment, NewTenant, OrderId, TenantId, UserId, Variants, rust_decimal::Decimal,
};
use lastprice_testkit::TestDatabase;

type Failure = Box<dyn std::error::Error>;

/// The shop's own table: a row for each sale, and one for what goes back. It never sells more than ten at once.
const ORDERS: &str = "CREATE SCHEMA IF NOT EXISTS checkout_shop;
    CREATE TABLE IF NOT EXISTS checkout_shop.orders (
      tenant_id uuid, id text, order_id text NOT NULL, total numeric NOT NULL, quantity bigint NOT NULL,
      PRIMARY KEY (tenant_id, id), CONSTRAINT ten_at_once CHECK (quantity <= 10));
    GRANT USAGE ON SCHEMA checkout_shop TO lastprice_app;
    GRANT SELECT, INSERT ON checkout_shop.orders TO lastprice_app";

/// What somebody asks for, or reports: also the amount, which may be wrong.
#[derive(Clone, Copy)]
struct Request<'a> {
    id: &'a str,
    order: &'a str,
    amount: Money,
    sold: Option<(u32, Money)>, // how many, and what is taken off; None: the amount goes back
}

/// Asked before the money moves, `authorise` may refuse. Told after it has moved, `settle` writes.
enum Door {
    Authorise,
    Settle,
}

struct Shop {
    client: Client,
    host: tokio_postgres::Client, // in a real service, of its pool
    tenant: TenantId,
    experiment: ExperimentId,
    customer: UserId,
}

impl Shop {
    /// The point of it all: our entry and the shop's row, one commit. Whatever returns before it rolls both back.
    async fn take(&mut self, door: Door, request: Request<'_>) -> Result<ConversionOutcome, Failure> {
        let transaction = self.host.transaction().await?;
        let ours = self.client.within(&transaction, self.tenant);

        let Request { id, order, amount, sold } = request;
        let (order_id, key) = (OrderId::new(order)?, IdempotencyKey::new(id)?);
        let (entry, total) = if let Some((quantity, discount)) = sold {
            let quote = ours.assignments().get(self.experiment, &self.customer).await?.ok_or("no quote")?;
            let sale = NewConversion::sale(self.experiment, self.customer.clone(), amount, key);
            let sale = sale.order(order_id).list_price(quote.price).quantity(quantity).discount(discount);
            (sale, amount.amount())
        } else {
            (NewConversion::refund(order_id, amount, key), -amount.amount())
        };
        let outcome = match door {
            Door::Authorise => ours.conversions().authorise(&entry).await?,
            Door::Settle => ours.conversions().settle(&entry).await?,
        };
        if matches!(outcome, ConversionOutcome::Refused(_)) {
            return Ok(outcome);
        }
        outcome.clone().entry()?; // other contradictions are errors

        let count = sold.map_or(0, |(quantity, _)| i64::from(quantity));
        // Repeated, a checkout changes nothing.
        let insert = "INSERT INTO checkout_shop.orders VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING";
        transaction.execute(insert, &[&self.tenant.uuid(), &id, &order, &total, &count]).await?;
        transaction.commit().await?;
        Ok(outcome)
    }

    /// What all sales come to: by the shop's table, and by the ledger's live numbers.
    async fn sums(&self) -> Result<(Money, Money), Failure> {
        let sum = "SELECT COALESCE(sum(total), 0) FROM checkout_shop.orders WHERE tenant_id = $1";
        let own: Decimal = self.host.query_one(sum, &[&self.tenant.uuid()]).await?.get(0);
        let counts = self.client.tenant(self.tenant).metrics().experiment(self.experiment).await?;
        Ok((Money::of(own, Currency::USD)?, counts.revenue(Currency::USD)))
    }
}

async fn connect(url: &str) -> Result<tokio_postgres::Client, Failure> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Two logins, as in the quickstart: the owner installs, the service sells. Ada has seen the page, and has a quote.
async fn open() -> Result<(Shop, Money, Option<TestDatabase>), Failure> {
    let (owner_url, service_url, database) = if let Ok(url) = std::env::var("DATABASE_URL") {
        (url.clone(), url, None)
    } else {
        let database = TestDatabase::new().await?;
        (database.owner_url(), database.app_url(), Some(database))
    };
    Admin::connect(&owner_url).await?.migrate().await?;
    connect(&owner_url).await?.batch_execute(ORDERS).await?;
    let client = Client::builder().url(&service_url).build()?;
    let address = format!("shop-{}@example.com", TenantId::new());
    let tenant = client.tenant(client.create_tenant(NewTenant::managed("Shop", address)).await?.id);
    let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00").add("39", 1, "39.00");
    let new = NewExperiment::new("seat", "Price per seat", Currency::USD, variants);
    let draft = tenant.experiments().create(new).await?;
    let experiment = tenant.experiments().activate(draft.id).await?.id;
    let customer = UserId::new("ada")?;
    let quoted = tenant.assignments().assign(experiment, &customer).await?.price();
    let host = connect(&service_url).await?;
    Ok((Shop { client, host, tenant: tenant.tenant_id(), experiment, customer }, quoted, database))
}

#[tokio::main]
async fn main() -> ExitCode {
    let Err(failure) = run().await else { return ExitCode::SUCCESS };
    eprintln!("the shop is closed: {failure}");
    let mut cause = failure.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

async fn run() -> Result<(), Failure> {
    use ConversionOutcome::{Duplicate, Recorded, Refused, Waiting};
    let (mut shop, seat, _database) = open().await?;
    println!("Ada is quoted {seat} a seat.");
    let [zero, one, five] = [0, 100, 500].map(|cents| Money::from_minor(cents, Currency::USD));

    // Three seats with a discount: quantity × quoted price − discount is what may be charged.
    let amount = seat.checked_mul(3)?.checked_sub(five)?;
    let sale = Request { id: "charge:1", order: "order-1", amount, sold: Some((3, five)) };
    assert!(matches!(shop.take(Door::Authorise, sale).await?, Recorded(_)));
    assert_eq!(shop.sums().await?, (amount, amount));
    println!("order-1: 3 seats less {five} are {amount}, authorised: order and entry are committed");

    // Somebody has changed the amount on its way to the shop.
    let tampered = Request { id: "charge:2", order: "order-2", amount: one, ..sale };
    let Refused(why) = shop.take(Door::Authorise, tampered).await? else { panic!("sold for {one}") };
    assert_eq!((why.allowed, shop.sums().await?), (Some(amount), (amount, amount)));
    println!("order-2: {one} is refused by {:?}, {amount} would be right: nothing is committed", why.rules);

    // A sale that we authorise, and a row that the shop's own table does not take.
    let eleven = seat.checked_mul(11)?;
    let large = Request { id: "charge:3", order: "order-3", amount: eleven, sold: Some((11, zero)) };
    let error = shop.take(Door::Authorise, large).await.unwrap_err().downcast::<tokio_postgres::Error>()?;
    let broken = error.as_db_error().and_then(|e| e.constraint());
    assert_eq!((broken, shop.sums().await?), (Some("ten_at_once"), (amount, amount)));
    println!(
        "order-3: 11 seats, authorised, break the shop's own rule: our entry is rolled back with its row"
    );

    // The payment provider tells of the first charge, and tells it again.
    for _ in 0..2 {
        assert!(matches!(shop.take(Door::Settle, sale).await?, Duplicate(_)));
    }
    assert_eq!(shop.sums().await?, (amount, amount));
    println!("order-1: the webhook of its charge comes twice: still one order, one entry");

    let refund = Request { id: "refund:1", amount: five, sold: None, ..sale };
    assert!(matches!(shop.take(Door::Authorise, refund).await?, Recorded(_)));
    let left = amount.checked_sub(five)?;
    let all = Request { id: "refund:2", amount, ..refund };
    let Refused(why) = shop.take(Door::Authorise, all).await? else { panic!("more went back than was paid") };
    assert_eq!((why.allowed, shop.sums().await?), (Some(left), (left, left)));
    println!("order-1: {five} go back; all of it again is refused by {:?}, {left} are left", why.rules);

    // Webhooks overtake each other: the refund of a sale that nobody here knows of yet.
    let refund = Request { id: "refund:4", order: "order-4", ..refund };
    assert_eq!(shop.take(Door::Settle, refund).await?, Waiting);
    assert_eq!(shop.sums().await?, (left.checked_sub(five)?, left));
    let sale = Request { id: "charge:4", order: "order-4", amount: seat, sold: Some((1, zero)) };
    assert!(matches!(shop.take(Door::Settle, sale).await?, Recorded(_)));
    println!("order-4: its refund of {five} came first, and waited; with the sale of {seat} both count");

    let (orders, ledger) = shop.sums().await?;
    println!("\nthe shop's own table: {orders}\nthe ledger:           {ledger}");
    if orders == ledger { Ok(()) } else { Err("they differ".into()) }
}
