//! Our calls inside a transaction of the host's: whoever the host is, it stays that, and so do its statements.

use futures_util::future::join;
use lastprice::tokio_postgres::{Client as Host, Transaction};
use lastprice::{ConversionOutcome, ErrorKind, ExperimentId, TenantScope, UserId, ViewOutcome};

use crate::support::{Login, World, poll_n};
use crate::wire::Wire;

/// Who the host is, and what it said before its transaction.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    attributes: &'static str,
    /// With `{counter}` for a role that has no right on our tables.
    says: &'static str,
}

const KINDS: [Kind; 7] = [
    Kind { name: "member", attributes: "", says: "" },
    Kind { name: "superuser", attributes: "SUPERUSER", says: "" },
    Kind { name: "bypass", attributes: "BYPASSRLS", says: "" },
    Kind { name: "noinherit", attributes: "NOINHERIT", says: "" },
    Kind { name: "desk", attributes: "", says: "SET ROLE {counter}" },
    Kind { name: "superdesk", attributes: "SUPERUSER", says: "SET ROLE {counter}" },
    Kind { name: "shop", attributes: "", says: "SET search_path = shop" },
];

/// A world with a shop of the host's in it, and its roles.
struct Shop {
    world: World,
    /// Of this test alone: roles belong to the whole server.
    roles: Vec<String>,
}

impl Shop {
    async fn open(kinds: &[Kind]) -> Shop {
        let world = World::new().await;
        let mut roles = vec![format!("counter_{}", world.database.name())];
        let mut sql = format!("CREATE ROLE {};", roles[0]);
        for kind in kinds {
            let role = format!("{}_{}", kind.name, world.database.name());
            let password = world.database.password_for(&role).unwrap_or_default();
            sql += &format!("CREATE ROLE {role} LOGIN {} PASSWORD '{password}';", kind.attributes);
            sql += &format!("GRANT lastprice_app, {} TO {role};", roles[0]);
            roles.push(role);
        }
        // Who is not a member of `lastprice_app` does not even see our tables.
        sql += "REVOKE USAGE ON SCHEMA public FROM PUBLIC;
                CREATE SCHEMA shop; GRANT USAGE ON SCHEMA shop TO PUBLIC;
                CREATE TABLE shop.orders (id int PRIMARY KEY, who text DEFAULT current_user);
                CREATE TABLE shop.views (n int);
                GRANT ALL ON ALL TABLES IN SCHEMA shop TO PUBLIC";
        world.superuser.batch_execute(&sql).await.unwrap();
        Shop { world, roles }
    }

    async fn host(&self, kind: Kind) -> Host {
        let host = self.world.database.connect_as(&self.role(kind)).await.unwrap();
        host.batch_execute(&kind.says.replace("{counter}", &self.roles[0])).await.unwrap();
        host
    }

    fn role(&self, kind: Kind) -> String {
        format!("{}_{}", kind.name, self.world.database.name())
    }

    async fn close(self) {
        let roles = self.roles.join(", ");
        let sql = format!("DROP OWNED BY {roles}; DROP ROLE {roles}");
        self.world.superuser.batch_execute(&sql).await.unwrap();
    }

    async fn orders(&self) -> i64 {
        self.world.count("SELECT count(*) FROM shop.orders").await
    }
}

/// All that our calls could leave behind.
async fn state(transaction: &Transaction<'_>) -> Vec<Option<String>> {
    let row = transaction
        .query_one(
            "SELECT session_user::text, current_user::text, current_setting('role'), current_setting('search_path'),
                    current_setting('app.tenant_id', true), current_setting('app.actor', true),
                    current_setting('row_security'), current_setting('transaction_isolation')",
            &[],
        )
        .await
        .unwrap();
    (0..row.len()).map(|n| row.get(n)).collect()
}

#[tokio::test]
async fn the_host_stays_who_it_is() {
    let shop = Shop::open(&KINDS).await;
    let world = &shop.world;
    let us = world.ours;
    for kind in KINDS {
        let mut host = shop.host(kind).await;
        for commits in [false, true] {
            let transaction = host.transaction().await.unwrap();
            // It has a tenant of its own going, which is not the one of our calls.
            let own =
                format!("SET LOCAL app.tenant_id = '{}'; SET LOCAL app.actor = 'host'", world.theirs.tenant);
            transaction.batch_execute(&own).await.unwrap();
            let before = state(&transaction).await;
            let scope = TenantScope::within(&transaction, us.tenant);
            let unchanged = async |what: &str| {
                assert_eq!(state(&transaction).await, before, "{kind:?}, after {what}");
                transaction.execute("INSERT INTO shop.views VALUES (1)", &[]).await.unwrap();
            };
            transaction.execute("INSERT INTO shop.orders VALUES (1)", &[]).await.unwrap();

            let (user, key) = (format!("{}-{commits}", kind.name), format!("{}-{commits}", kind.name));
            let assigned =
                scope.assignments().assign(us.experiment, &UserId::new(&*user).unwrap()).await.unwrap();
            assert!(assigned.is_new());
            unchanged("assign").await;
            let view = us.view(&user);
            assert_eq!(scope.views().record(&view).await.unwrap(), ViewOutcome::Recorded);
            unchanged("record").await;
            let sale = us.sale(&user, &key);
            scope.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
            unchanged("settle").await;

            // What did not work is told, and the transaction goes on.
            assert_eq!(scope.views().record(&view).await.unwrap(), ViewOutcome::Duplicate);
            unchanged("a duplicate").await;
            let again = scope.conversions().settle(&sale).await.unwrap();
            assert!(matches!(again, ConversionOutcome::Duplicate(_)));
            let other = scope.conversions().settle(&us.sale("user", &key)).await.unwrap();
            assert!(matches!(other, ConversionOutcome::Conflict { .. }));
            unchanged("a conflict").await;
            let nobody = scope.views().record(&us.view("nobody")).await.unwrap();
            assert_eq!(nobody, ViewOutcome::NotAssigned);
            let wrong = us.sale("user", "wrong").quantity(2);
            let refused = scope.conversions().authorise(&wrong).await.unwrap();
            assert!(matches!(refused, ConversionOutcome::Refused(_)));
            unchanged("a refusal").await;
            let user_id = UserId::new("user").unwrap();
            for unknown in [ExperimentId::new(), world.theirs.experiment] {
                let error = scope.assignments().assign(unknown, &user_id).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NotFound);
                assert!(scope.experiments().get(unknown).await.unwrap().is_none());
                assert!(scope.assignments().get(unknown, &user_id).await.unwrap().is_none());
            }
            let seen = scope.experiments().list(None, 10, None).await.unwrap().items;
            assert_eq!(seen.iter().map(|e| e.id).collect::<Vec<_>>(), [us.experiment], "{kind:?}");
            unchanged("what does not exist").await;

            // Two tenants in one transaction, even at once.
            let theirs = TenantScope::within(&transaction, world.theirs.tenant);
            let (ours, theirs_found) = (scope.tenants(), theirs.tenants());
            let (a, b) = join(ours.get(), theirs_found.get()).await;
            assert_eq!(
                (a.unwrap().unwrap().name, b.unwrap().unwrap().name),
                ("ours".into(), "theirs".into())
            );
            unchanged("two tenants").await;

            let done = if commits { transaction.commit().await } else { transaction.rollback().await };
            done.unwrap();
            let expected = i64::from(commits);
            assert_eq!(world.rows_of(&user).await, (expected, expected), "{kind:?}");
            assert_eq!(shop.orders().await, expected, "{kind:?}");
        }
        let who: String =
            world.superuser.query_one("DELETE FROM shop.orders RETURNING who", &[]).await.unwrap().get(0);
        let role = if kind.says.contains("ROLE") { shop.roles[0].clone() } else { shop.role(kind) };
        assert_eq!(who, role, "the host's own statements are the host's");
        // Nothing outlives the transaction.
        let transaction = host.transaction().await.unwrap();
        let after = state(&transaction).await;
        assert!(
            after[4..6].iter().all(|setting| setting.as_deref().unwrap_or_default().is_empty()),
            "{after:?}"
        );
        assert_eq!(after[1].as_deref(), Some(role.as_str()));
    }
    assert_eq!(world.rows_of("nobody").await, (0, 0));
    shop.close().await;
}

#[tokio::test]
async fn a_rollback_to_a_savepoint_unbinds_nothing() {
    for login in [Login::App, Login::Superuser] {
        let world = World::new().await;
        let mut host = match login {
            Login::App => world.database.connect_app().await.unwrap(),
            Login::Superuser => world.database.connect_superuser().await.unwrap(),
        };
        let transaction = host.transaction().await.unwrap();
        let before = state(&transaction).await;
        let scope = TenantScope::within(&transaction, world.ours.tenant);
        scope.views().record(&world.ours.view("user")).await.unwrap();
        transaction.batch_execute("SAVEPOINT here").await.unwrap();
        let lost = world.ours.view("user");
        scope.views().record(&lost).await.unwrap();
        transaction.batch_execute("ROLLBACK TO SAVEPOINT here").await.unwrap();
        let same = |state: Vec<Option<String>>| -> Vec<String> {
            state.into_iter().flatten().filter(|s| !s.is_empty()).collect()
        };
        assert_eq!(same(state(&transaction).await), same(before.clone()));
        assert_eq!(
            scope.views().record(&lost).await.unwrap(),
            ViewOutcome::Recorded,
            "it is not there any more"
        );
        assert!(scope.experiments().get(world.theirs.experiment).await.unwrap().is_none());

        // Also out of an error of the host's own, in whose wake our call fails without a trace.
        transaction.batch_execute("SAVEPOINT here").await.unwrap();
        transaction.batch_execute("SELECT 1 / 0").await.unwrap_err();
        let error = scope.views().record(&world.ours.view("user")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        transaction.batch_execute("ROLLBACK TO SAVEPOINT here").await.unwrap();
        scope.views().record(&world.ours.view("user")).await.unwrap();
        assert_eq!(same(state(&transaction).await), same(before));
        transaction.commit().await.unwrap();
        assert_eq!(world.rows_of("user").await, (3, 0));
    }
}

/// The host goes on as if a dropped statement had been finished.
#[tokio::test]
async fn a_dropped_call_leaves_the_host_as_it_was() {
    for login in [Login::App, Login::Superuser] {
        let world = World::new().await;
        let wire = Wire::before(&world.url(login)).await;
        let mut points = 0;
        for n in 0.. {
            let (mut host, connection) =
                lastprice::tokio_postgres::connect(wire.url(), lastprice::tokio_postgres::NoTls)
                    .await
                    .unwrap();
            tokio::spawn(connection);
            let transaction = host.transaction().await.unwrap();
            let own = format!("SET LOCAL app.tenant_id = '{}'", world.theirs.tenant);
            transaction.batch_execute(&own).await.unwrap();
            let before = state(&transaction).await;
            let scope = TenantScope::within(&transaction, world.ours.tenant);
            let view = world.ours.view("user");
            let done = poll_n(n, async {
                scope.views().record(&view).await?;
                scope.conversions().settle(&world.ours.sale("user", &format!("sale {n}"))).await
            })
            .await;
            let mut after = state(&transaction).await;
            after[5] = after[5].take().filter(|actor| !actor.is_empty()); // set and unset again
            assert_eq!(after, before, "{login:?}, dropped after {n} polls");
            let again = scope.views().record(&view).await.unwrap();
            let expected = if n == 0 { ViewOutcome::Recorded } else { ViewOutcome::Duplicate };
            assert_eq!(again, expected, "a call that was polled is finished by the server");
            wire.take_sent();
            drop(scope);
            transaction.batch_execute("SELECT 'next'").await.unwrap();
            assert_eq!(wire.take_sent(), ["Q SELECT 'next'"], "dropping the scope sends nothing");
            transaction.commit().await.unwrap();
            points += 1;
            if let Some(done) = done {
                done.unwrap().entry().unwrap().unwrap();
                break;
            }
        }
        assert!(points > 4, "{points}");
        assert_eq!(world.rows_of("user").await.0, points);
        assert_eq!(wire.cancels(), 0, "the host's connection is the host's");
    }
}

#[tokio::test]
async fn a_call_is_one_flight() {
    let world = World::new().await;
    let wire = Wire::before(&world.database.app_url()).await;
    let (mut host, connection) =
        lastprice::tokio_postgres::connect(wire.url(), lastprice::tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let transaction = host.transaction().await.unwrap();
    let scope = TenantScope::within(&transaction, world.ours.tenant);
    wire.take_sent();
    wire.answer_only(0);
    let tenants = scope.tenants();
    let mut call = std::pin::pin!(tenants.get());
    tokio::time::timeout(std::time::Duration::from_millis(50), &mut call).await.unwrap_err();
    let sent: Vec<String> = wire.take_sent().iter().map(|m| m.chars().take(8).collect()).collect();
    assert_eq!(sent, ["Q SELECT", "P", "B", "D", "E", "S", "Q SELECT"]);
    wire.answer_all();
    assert_eq!(call.await.unwrap().unwrap().name, "ours");
    assert_eq!(wire.take_sent(), [""; 0]);
}
