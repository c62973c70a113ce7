//! What a transaction does after a failure, and what it takes to bind a tenant.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lastprice::{Actor, Client, ErrorKind, NewTenant, SCHEMA_SQL, StatementMode, TenantChange};

use crate::scope_wire::make_slow;
use crate::support::{Login, WAYS, World};
use crate::support_repo::{new_experiment, two_tenants};

/// Views of the user `bad` fail.
async fn make_bad(world: &World) {
    let owner = world.database.connect_owner().await.unwrap();
    let sql = "CREATE FUNCTION bad() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END';
               CREATE TRIGGER bad BEFORE INSERT ON views FOR EACH ROW WHEN (NEW.user_id = 'bad') EXECUTE FUNCTION bad()";
    owner.batch_execute(sql).await.unwrap();
}

#[tokio::test]
async fn a_failed_call_ends_the_transaction() {
    for way in WAYS {
        let world = World::new().await;
        make_bad(&world).await;
        let client = world.client(way).build().unwrap();
        world.ours.assign(&client, &["bad"]).await;
        let us = client.tenant(world.ours.tenant);
        let (good, bad) = (world.ours.view("user"), world.ours.view("bad"));
        let backends = world.backends().await;

        // Alone, as the first statement, and as a later one.
        assert_eq!(us.views().record(&bad).await.unwrap_err().sqlstate().unwrap().code(), "P0001");
        for first in [true, false] {
            for commits in [true, false] {
                let transaction = us.begin().await.unwrap();
                if !first {
                    transaction.views().record(&good).await.unwrap();
                }
                let failed = transaction.views().record(&bad).await.unwrap_err();
                assert_eq!(failed.sqlstate().unwrap().code(), "P0001");
                let later = transaction.views().record(&good).await.unwrap_err();
                assert_eq!((later.kind(), later.sqlstate()), (ErrorKind::Closed, None));
                assert_eq!(transaction.tenants().get().await.unwrap_err().kind(), ErrorKind::Closed);
                if commits {
                    assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
                } else {
                    transaction.rollback().await.unwrap();
                }
                world.check_next_user(&client).await;
            }
        }
        // Input that never reaches the database ends nothing.
        let transaction = us.begin().await.unwrap();
        let invalid = transaction.tenants().update(TenantChange::new().name("")).await.unwrap_err();
        assert_eq!(invalid.kind(), ErrorKind::InvalidInput);
        transaction.tenants().get().await.unwrap();
        transaction.commit().await.unwrap();

        assert_eq!(world.rows_of("user").await, (0, 0));
        assert_eq!(world.backends().await, backends, "a failed statement costs no connection");
    }
}

#[tokio::test]
async fn a_dropped_call_ends_the_transaction() {
    for way in WAYS {
        let world = World::new().await;
        make_slow(&world, 0.1).await;
        let client = world.client(way).build().unwrap();
        world.ours.assign(&client, &["slow"]).await;
        for first in [true, false] {
            let transaction = client.tenant(world.ours.tenant).begin().await.unwrap();
            if !first {
                transaction.views().record(&world.ours.view("user")).await.unwrap();
            }
            let slow = world.ours.view("slow");
            let views = transaction.views();
            tokio::time::timeout(Duration::from_millis(30), views.record(&slow)).await.unwrap_err();
            let later = transaction.tenants().get().await.unwrap_err();
            assert_eq!(
                (later.kind(), later.sqlstate()),
                (ErrorKind::Closed, None),
                "said without asking the server"
            );
            assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
            world.check_next_user(&client).await;
            world.settle(1).await;
            assert_eq!((world.rows_of("user").await, world.rows_of("slow").await), ((0, 0), (0, 0)));
        }
    }
}

#[tokio::test]
async fn a_statement_that_cannot_be_prepared_ends_the_transaction() {
    for login in [Login::App, Login::Superuser] {
        let world = World::new().await;
        let owner = world.database.connect_owner().await.unwrap();
        let client = world.client((login, StatementMode::Prepared)).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        for first in [true, false] {
            owner.batch_execute("ALTER VIEW tenant_usage RENAME TO gone").await.unwrap();
            let transaction = us.begin().await.unwrap();
            if !first {
                transaction.views().record(&world.ours.view("user")).await.unwrap();
            }
            let today = lastprice::chrono::Utc::now().date_naive();
            let failed = transaction.usage().total("calls", today, today).await.unwrap_err();
            assert_eq!(failed.kind(), ErrorKind::SchemaMismatch);
            owner.batch_execute("ALTER VIEW gone RENAME TO tenant_usage").await.unwrap();
            assert_eq!(transaction.tenants().get().await.unwrap_err().kind(), ErrorKind::Closed);
            assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
            world.check_next_user(&client).await;
            us.begin().await.unwrap().rollback().await.unwrap();
        }
        assert_eq!(world.rows_of("user").await, (0, 0));
    }
}

#[tokio::test]
async fn a_tenant_that_cannot_be_bound_costs_the_connection_and_nothing_else() {
    for mode in [StatementMode::Prepared, StatementMode::Typed] {
        let world = World::new().await;
        // Of this test alone: roles belong to the whole server.
        let role = format!("bypass_{}", world.database.name());
        let password = world.database.password_for(&role).unwrap_or_default();
        let create = format!("CREATE ROLE {role} LOGIN BYPASSRLS PASSWORD '{password}'");
        let grant = format!("GRANT lastprice_app TO {role}");
        let revoke = format!(
            "REVOKE lastprice_app FROM {role}; GRANT INSERT, SELECT ON ALL TABLES IN SCHEMA public TO {role}"
        );
        world.superuser.batch_execute(&format!("{create}; {grant}")).await.unwrap();
        let client =
            world.client((Login::Superuser, mode)).url(world.database.url_for(&role)).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        let view = world.ours.view("user");
        world.check_next_user(&client).await;
        for form in ["one-shot", "transaction"] {
            let before = world.backends().await;
            world.superuser.batch_execute(&revoke).await.unwrap();
            let error = if form == "one-shot" {
                us.views().record(&view).await.unwrap_err()
            } else {
                let transaction = us.begin().await.unwrap();
                let error = transaction.views().record(&view).await.unwrap_err();
                assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
                error
            };
            assert_eq!(error.kind(), ErrorKind::IsolationNotEnforced, "{form}");
            world.superuser.batch_execute(&grant).await.unwrap();
            world.check_next_user(&client).await;
            assert_eq!(world.rows_of("user").await, (0, 0), "{form}");
            world.settle(1).await;
            assert_ne!(world.backends().await, before, "{form}");
        }
        us.views().record(&view).await.unwrap();
        assert_eq!(world.rows_of("user").await, (1, 0));
        client.close().await;
        world.settle(0).await;
        let drop = format!("DROP OWNED BY {role}; DROP ROLE {role}");
        world.superuser.batch_execute(&drop).await.unwrap();
    }
}

/// A database that cannot hold the actor's name refuses the whole message that binds the tenant, if that is where the
/// name is, with the BEGIN in it; and the statement behind would run bare.
#[tokio::test]
async fn an_actor_that_the_database_cannot_hold() {
    let world = World::new().await;
    let name = format!("{}_latin1", world.database.name());
    let create =
        format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'");
    world.superuser.batch_execute(&create).await.unwrap();
    for (login, role) in [(Login::Superuser, "superuser"), (Login::App, "service")] {
        let url = world.url(login).replace(world.database.name(), &name);
        if login == Login::Superuser {
            let (superuser, connection) =
                lastprice::tokio_postgres::connect(&url, lastprice::tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            superuser.batch_execute(&SCHEMA_SQL.replace('…', "...")).await.unwrap();
        }
        let client = Client::builder().url(url).pool_size(1).build().unwrap();
        let new = NewTenant::managed("Acme", format!("{role}@x.test"));
        let tenant = client.create_tenant(new).await.unwrap();
        let change = || TenantChange::new().name("changed");

        let us = client.tenant(tenant.id).with_actor(Actor::new("Жуков").unwrap());
        us.tenants().update(change()).await.unwrap_err();
        let transaction = us.begin().await.unwrap();
        transaction.tenants().update(change()).await.unwrap_err();
        assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(us.tenants().get().await.unwrap_err().sqlstate().unwrap().code(), "22P05");
        assert_eq!(client.tenant(tenant.id).tenants().get().await.unwrap(), Some(tenant.clone()), "{role}");

        // What it can hold arrives as it is.
        let actor = Actor::new(r"Zoë's \ account").unwrap();
        let us = client.tenant(tenant.id).with_actor(actor.clone());
        let changed = us.tenants().update(change()).await.unwrap();
        assert_eq!(changed.updated_by.as_deref(), Some(actor.as_str()));
        client.close().await;
    }
    // PostgreSQL 12 has no WITH (FORCE).
    let sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    world.superuser.query(sessions, &[&name]).await.unwrap();
    world.superuser.batch_execute(&format!("DROP DATABASE {name}")).await.unwrap();
}

#[tokio::test]
async fn a_panic_between_begin_and_commit_rolls_back() {
    for way in WAYS {
        let world = World::new().await;
        let client = world.client(way).build().unwrap();
        let (us, view) = (client.tenant(world.ours.tenant), world.ours.view("user"));
        let task = tokio::spawn(async move {
            let transaction = us.begin().await.unwrap();
            transaction.views().record(&view).await.unwrap();
            std::panic::resume_unwind(Box::new("the host's own bug")); // without the noise of a panic
            #[allow(unreachable_code)]
            transaction.commit().await.unwrap();
        });
        assert!(task.await.unwrap_err().is_panic());
        let (before, started) = (world.backends().await, Instant::now());
        world.check_next_user(&client).await;
        assert!(started.elapsed() < Duration::from_millis(500));
        assert_eq!(world.backends().await, before);
        assert_eq!(world.rows_of("user").await, (0, 0));
    }
}

#[tokio::test]
async fn calls_at_once_are_one_transaction() {
    for way in WAYS {
        let world = World::new().await;
        let client = world.client(way).build().unwrap();
        for commits in [false, true] {
            let transaction = client.tenant(world.ours.tenant).begin().await.unwrap();
            let views: Vec<_> = (0..20).map(|_| world.ours.view("user")).collect();
            let repository = transaction.views();
            let calls = join_all(views.iter().map(|view| repository.record(view))).await;
            assert!(calls.into_iter().all(|outcome| outcome.unwrap() == lastprice::ViewOutcome::Recorded));
            if commits {
                transaction.commit().await.unwrap()
            } else {
                drop(transaction)
            }
            world.check_next_user(&client).await;
            assert_eq!(world.rows_of("user").await, (if commits { 20 } else { 0 }, 0));
        }
        assert_eq!(world.count("SELECT count(DISTINCT xmin::text) FROM views").await, 1);

        // One that fails takes the others with it; one that is dropped as well.
        make_bad(&world).await;
        world.ours.assign(&client, &["bad"]).await;
        let transaction = client.tenant(world.ours.tenant).begin().await.unwrap();
        let views = [world.ours.view("user"), world.ours.view("bad"), world.ours.view("user")];
        let repository = transaction.views();
        let calls = join_all(views.iter().map(|view| repository.record(view))).await;
        assert!(calls[1].is_err());
        assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
        world.check_next_user(&client).await;
        assert_eq!(world.rows_of("user").await, (20, 0));
    }
}

#[tokio::test]
async fn a_call_of_its_own_recovers_from_a_changed_table() {
    for way in WAYS {
        let world = World::new().await;
        let owner = world.database.connect_owner().await.unwrap();
        let client = world.client(way).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        let changes = [
            "ALTER TABLE tenants ALTER COLUMN name TYPE varchar(300)",
            "ALTER TABLE tenants ADD COLUMN later integer DEFAULT 7",
            "ALTER TABLE tenants ALTER COLUMN name TYPE text",
        ];
        for (n, change) in changes.into_iter().enumerate() {
            us.tenants().get().await.unwrap();
            us.tenants().update(TenantChange::new().name(format!("before {n}"))).await.unwrap();
            let before = world.backends().await;
            owner.batch_execute(change).await.unwrap();
            assert_eq!(us.tenants().get().await.unwrap().unwrap().name, format!("before {n}"));
            let updated = us.tenants().update(TenantChange::new().name(format!("after {n}"))).await.unwrap();
            assert_eq!(updated.name, format!("after {n}"));
            assert_eq!(world.backends().await, before, "by itself, on the same connection");
            world.check_next_user(&client).await;
        }

        // A transaction cannot try again by itself; the next one knows better.
        owner.batch_execute("ALTER TABLE tenants ALTER COLUMN name TYPE varchar(300)").await.unwrap();
        let transaction = us.begin().await.unwrap();
        let first = transaction.tenants().get().await;
        if way.1 == StatementMode::Prepared {
            assert_eq!(first.unwrap_err().sqlstate().unwrap().code(), "0A000");
            assert_eq!(transaction.commit().await.unwrap_err().kind(), ErrorKind::Closed);
            us.begin().await.unwrap().tenants().get().await.unwrap();
        } else {
            first.unwrap();
        }
    }
}

#[tokio::test]
async fn a_terminated_connection_is_replaced() {
    let world = World::new().await;
    let client = world.client(WAYS[0]).build().unwrap();
    world.check_next_user(&client).await;
    let [pid] = world.backends().await[..] else { panic!("one connection") };
    world.superuser.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    world.settle(0).await;
    tokio::time::sleep(Duration::from_millis(20)).await; // its end arrives here, too
    world.check_next_user(&client).await;
    assert_ne!(world.backends().await, [pid]);
}

#[tokio::test]
async fn a_member_that_does_not_inherit_its_rights() {
    let world = World::new().await;
    let role = format!("noinherit_{}", world.database.name());
    let password = world.database.password_for(&role).unwrap_or_default();
    let create =
        format!("CREATE ROLE {role} LOGIN NOINHERIT PASSWORD '{password}'; GRANT lastprice_app TO {role}");
    world.superuser.batch_execute(&create).await.unwrap();
    let client = world.client(WAYS[0]).url(world.database.url_for(&role)).build().unwrap();
    client.tenant(world.ours.tenant).views().record(&world.ours.view("user")).await.unwrap();
    world.check_next_user(&client).await;
    client.close().await;
    world.superuser.batch_execute(&format!("DROP ROLE {role}")).await.unwrap();
}

/// In every form, whoever logs in: row-level security binds the statement's role, and its tenant is ours.
#[tokio::test]
async fn every_statement_runs_bound() {
    for way in WAYS {
        let world = World::new().await;
        let owner = world.database.connect_owner().await.unwrap();
        let sql = "CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$
                   BEGIN
                     NEW.metadata := jsonb_build_object('bound', row_security_active('experiments'), 'tenant', app_tenant_id(),
                                                        'actor', current_setting('app.actor', true));
                     RETURN NEW;
                   END $$;
                   CREATE TRIGGER witness BEFORE INSERT ON views FOR EACH ROW EXECUTE FUNCTION witness()";
        owner.batch_execute(sql).await.unwrap();
        let client = world.client(way).build().unwrap();
        for side in [world.ours, world.theirs] {
            let actor = Actor::new("Zoë").unwrap();
            let tenant = client.tenant(side.tenant).with_actor(actor.clone());
            tenant.views().record(&side.view("user")).await.unwrap();
            let transaction = tenant.begin().await.unwrap();
            transaction.views().record(&side.view("user")).await.unwrap();
            transaction.views().record(&side.view("user")).await.unwrap();
            transaction.commit().await.unwrap();
            let mut host = match way.0 {
                Login::App => world.database.connect_app().await.unwrap(),
                Login::Superuser => world.database.connect_superuser().await.unwrap(),
            };
            let transaction = host.transaction().await.unwrap();
            client
                .within(&transaction, side.tenant)
                .with_actor(actor)
                .views()
                .record(&side.view("user"))
                .await
                .unwrap();
            transaction.commit().await.unwrap();
        }
        let witnessed = "SELECT count(*) FROM views WHERE metadata @> '{\"bound\": true, \"actor\": \"Zoë\"}'
                         AND (metadata ->> 'tenant')::uuid = tenant_id";
        assert_eq!(world.count(witnessed).await, 8, "{way:?}");
    }
}

/// A clone is the same handle, with its actor, and a transaction of its own for each call.
#[tokio::test]
async fn a_clone_of_a_handle_is_bound_and_signed_like_it() {
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(Actor::new("ann").unwrap());
    let clone = ann.clone();
    drop(ann);
    let x = clone.experiments().create(new_experiment("x")).await.unwrap();
    let trail = two.acme.audit_trail().of_experiment(x.id, 1, None).await.unwrap().items;
    assert_eq!((trail[0].actor.as_deref(), clone.tenant_id()), (Some("ann"), two.id));
    let both = clone.clone().begin().await.unwrap();
    both.experiments().get(x.id).await.unwrap().unwrap();
    both.commit().await.unwrap();
    two.bystander_saw_nothing().await;
}
