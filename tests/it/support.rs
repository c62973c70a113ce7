//! Two tenants in a database of their own, and ways to look at what a client does there.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use lastprice::{
    Client, ClientBuilder, Currency, ExperimentId, IdempotencyKey, Money, NewConversion, NewExperiment,
    NewTenant, NewView, StatementMode, TenantId, UserId, Variants,
};
use lastprice_testkit::TestDatabase;

/// The name that the server knows a [`World::client`] by.
pub(crate) const APPLICATION: &str = "the client under test";

/// What a client logs in as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Login {
    /// An ordinary member of `lastprice_app`.
    App,
    /// A role that bypasses row-level security, and becomes `lastprice_app` in every transaction.
    Superuser,
}

/// All ways for a client to be: who it is, and how it sends statements.
pub(crate) const WAYS: [(Login, StatementMode); 4] = [
    (Login::App, StatementMode::Prepared),
    (Login::App, StatementMode::Typed),
    (Login::Superuser, StatementMode::Prepared),
    (Login::Superuser, StatementMode::Typed),
];

/// Two tenants, each with an active experiment of the same key and one user in it.
pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) superuser: tokio_postgres::Client,
    pub(crate) ours: Side,
    pub(crate) theirs: Side,
}

/// One tenant.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side {
    pub(crate) tenant: TenantId,
    pub(crate) experiment: ExperimentId,
}

impl World {
    pub(crate) async fn new() -> World {
        let database = TestDatabase::new().await.unwrap();
        let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
        let (ours, theirs) = (side(&client, "ours").await, side(&client, "theirs").await);
        client.close().await;
        World { superuser: database.connect_superuser().await.unwrap(), database, ours, theirs }
    }

    pub(crate) fn url(&self, login: Login) -> String {
        match login {
            Login::App => self.database.app_url(),
            Login::Superuser => self.database.superuser_url(),
        }
    }

    /// A client with one connection.
    pub(crate) fn client(&self, (login, mode): (Login, StatementMode)) -> ClientBuilder {
        Client::builder()
            .url(self.url(login))
            .application_name(APPLICATION)
            .pool_size(1)
            .statement_mode(mode)
            .assume_app_role(login == Login::Superuser)
    }

    /// A number, as the database knows it.
    pub(crate) async fn count(&self, query: &str) -> i64 {
        self.superuser.query_one(query, &[]).await.unwrap().get(0)
    }

    /// How many views and sales there are of a user.
    pub(crate) async fn rows_of(&self, user: &str) -> (i64, i64) {
        let query = format!(
            "SELECT (SELECT count(*) FROM views WHERE user_id = '{user}'),
                    (SELECT count(*) FROM conversions WHERE user_id = '{user}')"
        );
        let row = self.superuser.query_one(&query, &[]).await.unwrap();
        (row.get(0), row.get(1))
    }

    /// The server processes of the clients under test.
    pub(crate) async fn backends(&self) -> Vec<i32> {
        let rows = self.superuser.query(BACKENDS, &[&APPLICATION]).await.unwrap();
        rows.iter().map(|row| row.get("pid")).collect()
    }

    /// Waits until the clients under test have no more than `connections`, all idle and outside of transactions.
    pub(crate) async fn settle(&self, connections: usize) {
        let started = Instant::now();
        loop {
            let rows = self.superuser.query(BACKENDS, &[&APPLICATION]).await.unwrap();
            if rows.len() <= connections && rows.iter().all(|row| row.get("idle")) {
                return;
            }
            let states: Vec<(String, String)> =
                rows.iter().map(|row| (row.get("state"), row.get("query"))).collect();
            assert!(started.elapsed() < Duration::from_secs(5), "no rest: {states:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What the next user of a client sees, for the other tenant: its own rows, all of them, and no others.
    pub(crate) async fn check_next_user(&self, client: &Client) {
        let next = client.tenant(self.theirs.tenant);
        let all = next.experiments().list(None, 10, None).await.unwrap().items;
        assert_eq!(all.iter().map(|e| e.id).collect::<Vec<_>>(), [self.theirs.experiment]);
        assert!(next.experiments().get(self.ours.experiment).await.unwrap().is_none());
        assert_eq!(next.tenants().get().await.unwrap().unwrap().name, "theirs");
    }

    /// Live metrics are the rows, and every row is of a user's own tenant.
    pub(crate) async fn check_books(&self, client: &Client) {
        for side in [self.ours, self.theirs] {
            let counts = client.tenant(side.tenant).metrics().experiment(side.experiment).await.unwrap();
            let of = format!("WHERE tenant_id = '{}' AND experiment_id = '{}'", side.tenant, side.experiment);
            let views = self.count(&format!("SELECT count(*) FROM views {of}")).await;
            let sales = self.count(&format!("SELECT count(*) FROM conversions {of}")).await;
            assert_eq!((counts.views as i64, counts.conversions as i64), (views, sales));
        }
    }
}

const BACKENDS: &str = "
    SELECT pid, state, query, state = 'idle' AND xact_start IS NULL AS idle FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = $1 AND state IS NOT NULL";

impl Side {
    pub(crate) fn view(&self, user: &str) -> NewView {
        NewView::new(self.experiment, UserId::new(user).unwrap())
    }

    pub(crate) fn sale(&self, user: &str, key: &str) -> NewConversion {
        let price = Money::from_minor(1900, Currency::USD);
        NewConversion::sale(
            self.experiment,
            UserId::new(user).unwrap(),
            price,
            IdempotencyKey::new(key).unwrap(),
        )
    }

    /// Puts users into the experiment.
    pub(crate) async fn assign(&self, client: &Client, users: &[&str]) {
        let users: Vec<UserId> = users.iter().map(|user| UserId::new(*user).unwrap()).collect();
        client.tenant(self.tenant).assignments().assign_many(self.experiment, &users).await.unwrap();
    }
}

async fn side(client: &Client, name: &str) -> Side {
    let tenant = client.create_tenant(NewTenant::managed(name, format!("{name}@x.test"))).await.unwrap().id;
    let variants = Variants::new().add("low", 1, "19.00").add("high", 1, "29.00");
    let new = NewExperiment::new("plan", name, Currency::USD, variants);
    let experiments = client.tenant(tenant);
    let draft = experiments.experiments().create(new).await.unwrap();
    experiments.experiments().activate(draft.id).await.unwrap();
    let side = Side { tenant, experiment: draft.id };
    side.assign(client, &["user"]).await;
    side
}

/// Polls a future `n` times and drops it. A poll counts only if the future asked for it, so each one makes progress.
/// `Some` if it was ready by then.
pub(crate) async fn poll_n<F: Future>(n: usize, future: F) -> Option<F::Output> {
    PollN { future: Box::pin(future), left: n, asked: Arc::new(Asked::default()) }.await
}

struct PollN<F> {
    future: Pin<Box<F>>,
    left: usize,
    asked: Arc<Asked>,
}

/// A waker that remembers.
struct Asked {
    yes: AtomicBool,
    outer: std::sync::Mutex<Option<Waker>>,
}

impl Default for Asked {
    fn default() -> Self {
        Asked { yes: AtomicBool::new(true), outer: std::sync::Mutex::default() }
    }
}

impl Wake for Asked {
    fn wake(self: Arc<Self>) {
        self.yes.store(true, Ordering::SeqCst);
        if let Some(outer) = &*self.outer.lock().unwrap() {
            outer.wake_by_ref();
        }
    }
}

impl<F: Future> Future for PollN<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        *self.asked.outer.lock().unwrap() = Some(context.waker().clone());
        if !self.asked.yes.swap(false, Ordering::SeqCst) {
            return Poll::Pending;
        }
        let waker = Waker::from(Arc::clone(&self.asked));
        let polled = self.future.as_mut().poll(&mut Context::from_waker(&waker));
        self.left -= 1;
        match polled {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if self.left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Numbers that look random and are the same in every run: splitmix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}
