use crate::{
    error::Result,
    host::{Host, connect},
    janitor::{self, Discarded},
    roles::{OWNER, SERVICE},
    template::{self, Contents},
};
use std::{
    fmt, process,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};
use tokio_postgres::Client;

/// A database of one test, with the schema of `lastprice` installed.
///
/// It is a copy of a template, so it is quickly made; everything in it is the test's own. Its owner is the role
/// `lastprice_owner`, which is no superuser and has installed the schema; a service logs in as `lastprice_service`,
/// an ordinary member of `lastprice_app`, which is subject to row-level security. Roles, unlike tables, belong to the
/// whole server: what a test changes about them is seen by the others, so use a
/// [`PrivateCluster`](crate::PrivateCluster) for that.
///
/// When it is dropped, the database is dropped, too, by a thread in the background.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lastprice_testkit::TestDatabase;
///
/// let database = TestDatabase::new().await?;
/// let owner = database.connect_owner().await?;
/// owner.batch_execute("CREATE TABLE orders (id int)").await?;
/// println!("psql {}", database.owner_url());
/// # Ok(())
/// # }
/// ```
#[must_use = "the database is dropped together with this"]
pub struct TestDatabase {
    name: String,
    host: Arc<Host>,
    /// Whether there is something to drop.
    made: bool,
}

/// What a [`TestDatabase`] shall start with; made by [`TestDatabase::builder`] and
/// [`PrivateCluster::database_builder`](crate::PrivateCluster::database_builder).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lastprice_testkit::TestDatabase;
///
/// let database = TestDatabase::builder().setup_sql("CREATE TABLE orders (id int)").create().await?;
/// database.connect_owner().await?.batch_execute("INSERT INTO orders VALUES (1)").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing happens before `create`"]
pub struct TestDatabaseBuilder {
    host: Option<Arc<Host>>,
    contents: Contents,
}

impl TestDatabase {
    /// Makes a database with the schema of `lastprice`.
    ///
    /// # Errors
    ///
    /// When there is no PostgreSQL, when it does not start, or when the schema does not install.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn new() -> Result<TestDatabase> {
        TestDatabase::builder().create().await
    }

    /// For a database that starts with more than the schema, or with less.
    pub fn builder() -> TestDatabaseBuilder {
        TestDatabaseBuilder { host: None, contents: Contents::default() }
    }

    /// The name of the database: `lastprice_test_<pid>_<n>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The URL for `lastprice_owner`, who owns the database and everything in it. Like all URLs of this type it is
    /// understood by tokio-postgres as well as by `psql`.
    pub fn owner_url(&self) -> String {
        self.url_for(OWNER)
    }

    /// The URL for `lastprice_service`, an ordinary member of `lastprice_app`: what a service in production would use.
    pub fn app_url(&self) -> String {
        self.url_for(SERVICE)
    }

    /// The URL for the superuser; on the server of `TEST_DATABASE_URL`, for the role given there, whatever it may do.
    pub fn superuser_url(&self) -> String {
        self.url_for(&self.host.superuser)
    }

    /// The URL for some role, which the test makes by itself. Where the server asks for passwords, the role has to
    /// have the one of [`password_for`](TestDatabase::password_for).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let database = lastprice_testkit::TestDatabase::new().await?;
    /// let role = format!("reporter_of_{}", database.name());
    /// let password = database.password_for(&role).unwrap_or_default();
    /// let owner = database.connect_owner().await?;
    /// owner.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'")).await?;
    /// assert!(database.url_for(&role).starts_with("postgres://reporter_of_"));
    /// # owner.batch_execute(&format!("DROP ROLE {role}")).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn url_for(&self, role: &str) -> String {
        self.host.public.url(role, &self.name)
    }

    /// The password that the URLs have for a role; `None` where the server trusts whoever can reach it.
    pub fn password_for(&self, role: &str) -> Option<String> {
        self.host.public.passwords.of(role)
    }

    /// Connects as `lastprice_owner`. The connection is driven by the current runtime and ends with the client.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn connect_owner(&self) -> Result<Client> {
        self.connect_as(OWNER).await
    }

    /// Connects as `lastprice_service`.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn connect_app(&self) -> Result<Client> {
        self.connect_as(SERVICE).await
    }

    /// Connects as the superuser, or as the role of `TEST_DATABASE_URL`.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn connect_superuser(&self) -> Result<Client> {
        self.connect_as(&self.host.superuser).await
    }

    /// Connects as some role; without TLS, over the socket where there is one.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached, or does not let the role in.
    pub async fn connect_as(&self, role: &str) -> Result<Client> {
        connect(&self.host.local.url(role, &self.name)).await
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if self.made {
            let admin_url = self.host.local.url(&self.host.superuser, &self.host.maintenance);
            janitor::discard(Discarded { name: std::mem::take(&mut self.name), admin_url });
        }
    }
}

impl fmt::Debug for TestDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDatabase").field("name", &self.name).field("host", &self.host).finish()
    }
}

impl TestDatabaseBuilder {
    pub(crate) fn on(host: Arc<Host>) -> TestDatabaseBuilder {
        TestDatabaseBuilder { host: Some(host), contents: Contents::default() }
    }

    /// Statements that `lastprice_owner` runs after the schema, such as a host's own migrations. They are part of the
    /// template, so they run once per server and text, not once per test. Calls add up.
    pub fn setup_sql(mut self, sql: impl Into<String>) -> TestDatabaseBuilder {
        if !self.contents.setup_sql.is_empty() {
            self.contents.setup_sql.push_str("\n;\n");
        }
        self.contents.setup_sql.push_str(&sql.into());
        self
    }

    /// Without the schema of `lastprice`: for tests that install it. The database and its schema `public` belong to
    /// `lastprice_owner`; the role `lastprice_app` need not be there on a [`PrivateCluster`](crate::PrivateCluster).
    pub fn empty(mut self) -> TestDatabaseBuilder {
        self.contents.empty = true;
        self
    }

    /// Makes the database.
    ///
    /// # Errors
    ///
    /// When there is no PostgreSQL, when it does not start, or when the schema or the statements of
    /// [`setup_sql`](TestDatabaseBuilder::setup_sql) do not install.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn create(self) -> Result<TestDatabase> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let host = match self.host {
            Some(host) => host,
            None => Host::for_tests().await?,
        };
        let admin = host.admin().await?;
        let template = template::ensure(&host, &admin, &self.contents).await?;
        loop {
            let name = janitor::name(process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            // Made before the wait, so that a future that is dropped meanwhile cleans up.
            let mut database = TestDatabase { name, host: host.clone(), made: true };
            match template::copy(&admin, &template, &database.name).await {
                Ok(true) => return Ok(database),
                // Of a process in another container, or of one that had our number before.
                Ok(false) => database.made = false,
                Err(error) => {
                    database.made = false;
                    return Err(error);
                }
            }
        }
    }
}
