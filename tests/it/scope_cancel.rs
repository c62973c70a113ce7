//! Every future of a scope, dropped at every point where it can wait.

use std::time::Duration;

use futures_util::future::BoxFuture;
use lastprice::{Client, Result, StatementMode, UserId};

use crate::support::{Login, Side, WAYS, World, poll_n};
use crate::wire::Wire;

/// A piece of work for a user that nobody else uses.
struct Work {
    name: &'static str,
    run: fn(Client, Side, String) -> BoxFuture<'static, Result<()>>,
    leaves: Leaves,
}

/// What there may be of the user afterwards: (views, sales).
enum Leaves {
    /// All of it or nothing, and all of it if the work was done.
    AllOrNothing(i64, i64),
    Nothing,
}

use Leaves::{AllOrNothing, Nothing};

const WORK: &[Work] = &[
    Work {
        name: "one-shot read",
        leaves: Nothing,
        run: |client, us, _| {
            Box::pin(async move {
                let found = client.tenant(us.tenant).experiments().get(us.experiment).await?;
                assert_eq!(found.unwrap().id, us.experiment);
                Ok(())
            })
        },
    },
    Work {
        name: "one-shot write",
        leaves: AllOrNothing(1, 0),
        run: |client, us, user| {
            Box::pin(async move { client.tenant(us.tenant).views().record(&us.view(&user)).await.map(drop) })
        },
    },
    Work {
        name: "settle",
        leaves: AllOrNothing(0, 1),
        run: |client, us, user| {
            Box::pin(async move {
                let sale = us.sale(&user, &user);
                client.tenant(us.tenant).conversions().settle(&sale).await?.entry().map(drop)
            })
        },
    },
    Work {
        name: "assign, of two statements",
        leaves: Nothing,
        run: |client, us, user| {
            Box::pin(async move {
                let new = UserId::new(format!("new-{user}"))?;
                let outcome = client.tenant(us.tenant).assignments().assign(us.experiment, &new).await?;
                assert!(outcome.is_new());
                Ok(())
            })
        },
    },
    Work {
        name: "begin, and nothing else",
        leaves: Nothing,
        run: |client, us, _| Box::pin(async move { client.tenant(us.tenant).begin().await.map(drop) }),
    },
    Work {
        name: "two statements without a commit",
        leaves: Nothing,
        run: |client, us, user| {
            Box::pin(async move {
                let transaction = client.tenant(us.tenant).begin().await?;
                transaction.views().record(&us.view(&user)).await?;
                transaction.conversions().settle(&us.sale(&user, &user)).await.map(drop)
            })
        },
    },
    Work {
        name: "commit",
        leaves: AllOrNothing(2, 1),
        run: |client, us, user| {
            Box::pin(async move {
                let transaction = client.tenant(us.tenant).begin().await?;
                transaction.views().record(&us.view(&user)).await?;
                transaction.conversions().settle(&us.sale(&user, &user)).await?.entry()?;
                transaction.views().record(&us.view(&user)).await?;
                transaction.commit().await
            })
        },
    },
    Work {
        name: "two calls at once, and a commit",
        leaves: AllOrNothing(1, 1),
        run: |client, us, user| {
            Box::pin(async move {
                let transaction = client.tenant(us.tenant).begin().await?;
                let (view, sale) = (us.view(&user), us.sale(&user, &user));
                let (views, conversions) = (transaction.views(), transaction.conversions());
                let (a, b) = futures_util::future::join(views.record(&view), conversions.settle(&sale)).await;
                a?;
                b?.entry()?;
                transaction.commit().await
            })
        },
    },
    Work {
        name: "rollback",
        leaves: Nothing,
        run: |client, us, user| {
            Box::pin(async move {
                let transaction = client.tenant(us.tenant).begin().await?;
                transaction.views().record(&us.view(&user)).await?;
                transaction.rollback().await
            })
        },
    },
    Work {
        name: "ready",
        leaves: Nothing,
        run: |client, _, _| Box::pin(async move { client.ready().await }),
    },
];

/// Drops all work after 0, 1, 2, … polls, until it completes.
async fn drop_everywhere(way: (Login, StatementMode)) {
    let world = World::new().await;
    let wire = Wire::before(&world.url(way.0)).await;
    let users: Vec<String> = (0..1000).map(|n| format!("dropped-{n}")).collect();
    let setup = world.client(way).build().unwrap();
    world.ours.assign(&setup, &users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    setup.close().await;
    let mut users = users.into_iter();
    let mut points = 0;
    for work in WORK {
        // A connection that knows the statements, and before that one that meets everything for the first time.
        let passes: &[bool] = if way == WAYS[0] { &[false, true] } else { &[true] };
        for &warm in passes {
            let mut client = world.client(way).url(wire.url()).build().unwrap();
            for n in 0.. {
                if warm {
                    (work.run)(client.clone(), world.ours, users.next().unwrap()).await.unwrap();
                }
                let user = users.next().unwrap();
                let done = poll_n(n, (work.run)(client.clone(), world.ours, user.clone())).await;
                let at = format!("{} ({way:?}, warm {warm}) dropped after {n} polls", work.name);
                if let Some(done) = &done {
                    assert!(done.is_ok(), "{at}: {done:?}");
                }
                world.check_next_user(&client).await;
                world.settle(1).await;
                let left = world.rows_of(&user).await;
                match (&work.leaves, &done) {
                    (Nothing, _) => assert_eq!(left, (0, 0), "{at}"),
                    (AllOrNothing(views, sales), Some(_)) => assert_eq!(left, (*views, *sales), "{at}"),
                    (AllOrNothing(views, sales), None) => {
                        assert!([(0, 0), (*views, *sales)].contains(&left), "{at}: {left:?}");
                    }
                }
                points += 1;
                if done.is_some() {
                    assert!(n > 1 || work.name.starts_with("begin"), "{at}: it never waited");
                    client.close().await;
                    break;
                }
                if !warm {
                    client.close().await;
                    client = world.client(way).url(wire.url()).build().unwrap();
                }
            }
        }
    }
    // Nobody ever met an open transaction (25001), and nothing was set for longer than one.
    assert!(!wire.take_warnings().contains(&"25001".to_owned()));
    for text in wire.take_sent().iter().filter(|text| text.starts_with("Q ")) {
        assert!(!text.replace("SET LOCAL", "").contains("SET"), "{text}");
    }
    let client = world.client(way).build().unwrap();
    world.check_books(&client).await;
    println!("{way:?}: dropped at {points} points, {} statements cancelled", wire.cancels());
    assert!(points > 45);
}

#[tokio::test]
async fn an_ordinary_role_with_named_statements() {
    drop_everywhere(WAYS[0]).await;
}

#[tokio::test]
async fn an_ordinary_role_with_typed_statements() {
    drop_everywhere(WAYS[1]).await;
}

#[tokio::test]
async fn a_bypassing_role_with_named_statements() {
    drop_everywhere(WAYS[2]).await;
}

#[tokio::test]
async fn a_bypassing_role_with_typed_statements() {
    drop_everywhere(WAYS[3]).await;
}

/// A call dropped while the server parses its statement, which waits for a lock, keeps nobody waiting.
#[tokio::test]
async fn a_drop_while_a_statement_is_being_prepared() {
    for login in [Login::App, Login::Superuser] {
        let world = World::new().await;
        let client = world.client((login, StatementMode::Prepared)).build().unwrap();
        world.check_next_user(&client).await;
        let migration = world.database.connect_owner().await.unwrap();
        migration.batch_execute("BEGIN; LOCK TABLE views").await.unwrap();
        let limit = Duration::from_millis(100);
        let view = world.ours.view("user");
        let us = client.tenant(world.ours.tenant);
        tokio::time::timeout(limit, us.views().record(&view)).await.unwrap_err();
        tokio::time::timeout(Duration::from_millis(500), world.check_next_user(&client)).await.unwrap();

        let transaction = us.begin().await.unwrap();
        transaction.experiments().get(world.ours.experiment).await.unwrap();
        tokio::time::timeout(limit, transaction.views().record(&view)).await.unwrap_err();
        let later = transaction.tenants().get().await.unwrap_err();
        assert_eq!((later.kind(), later.sqlstate()), (lastprice::ErrorKind::Closed, None));
        drop(transaction);
        tokio::time::timeout(Duration::from_millis(500), world.check_next_user(&client)).await.unwrap();
        world.settle(1).await; // the server does not wait for the lock either
        migration.batch_execute("ROLLBACK").await.unwrap();
        assert_eq!(world.rows_of("user").await, (0, 0));
    }
}
