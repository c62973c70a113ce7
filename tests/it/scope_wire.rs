//! What goes over the wire: nothing that need not, all of it in one flight, and a cancel only when it is safe.

use std::time::{Duration, Instant};

use futures_util::future::join3;
use lastprice::StatementMode;

use crate::support::{WAYS, World, poll_n};
use crate::wire::Wire;

/// The letters of what was sent, and `BEGIN`, `COMMIT` and `ROLLBACK` by name.
fn outline(sent: &[String]) -> String {
    let word = |message: &String| match message.strip_prefix("Q ") {
        Some(text) => text.split([';', ' ']).next().unwrap().to_owned(),
        None => message.clone(),
    };
    sent.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// How a statement goes: bind, execute, sync; unnamed ones are parsed and described as well.
fn statement(mode: StatementMode) -> &'static str {
    if mode == StatementMode::Typed { "P B D E S" } else { "B E S" }
}

#[tokio::test]
async fn no_message_more_than_needed() {
    for way in WAYS {
        let world = World::new().await;
        let wire = Wire::before(&world.url(way.0)).await;
        let client = world.client(way).url(wire.url()).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        us.experiments().get(world.ours.experiment).await.unwrap();
        us.tenants().get().await.unwrap();
        wire.take_sent();
        let one = statement(way.1);
        let alone = format!("BEGIN {one} COMMIT");

        us.experiments().get(world.ours.experiment).await.unwrap();
        assert_eq!(outline(&wire.take_sent()), alone);

        us.begin().await.unwrap().commit().await.unwrap();
        drop(us.begin().await.unwrap());
        assert_eq!(outline(&wire.take_sent()), "", "an empty transaction sends nothing");

        let transaction = us.begin().await.unwrap();
        transaction.tenants().get().await.unwrap();
        transaction.experiments().get(world.ours.experiment).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(outline(&wire.take_sent()), format!("BEGIN {one} {one} COMMIT"));

        // Dropped: one ROLLBACK, ahead of the next user, and nothing to check the connection.
        for _ in 0..3 {
            let transaction = us.begin().await.unwrap();
            transaction.tenants().get().await.unwrap();
            drop(transaction);
            us.tenants().get().await.unwrap();
            assert_eq!(outline(&wire.take_sent()), format!("BEGIN {one} ROLLBACK {alone}"));
        }
        assert_eq!(wire.cancels(), 0);
        assert_eq!(wire.take_warnings(), [""; 0]);
    }
}

#[tokio::test]
async fn a_call_is_one_flight() {
    for way in WAYS {
        let world = World::new().await;
        let wire = Wire::before(&world.url(way.0)).await;
        let client = world.client(way).url(wire.url()).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        us.tenants().get().await.unwrap();
        wire.take_sent();
        let one = statement(way.1);

        // All that can be sent without an answer is all that is sent.
        let tenants = us.tenants();
        let mut call = std::pin::pin!(tenants.get());
        wire.answer_only(0);
        tokio::time::timeout(Duration::from_millis(50), &mut call).await.unwrap_err();
        assert_eq!(outline(&wire.take_sent()), format!("BEGIN {one} COMMIT"));
        wire.answer_all();
        assert_eq!(call.await.unwrap().unwrap().id, world.ours.tenant);
        assert_eq!(outline(&wire.take_sent()), "");

        // The BEGIN of a transaction travels with its first calls, however many are made at once.
        let transaction = us.begin().await.unwrap();
        let tenants = transaction.tenants();
        let mut calls = std::pin::pin!(join3(tenants.get(), tenants.get(), tenants.get()));
        wire.answer_only(0);
        tokio::time::timeout(Duration::from_millis(50), &mut calls).await.unwrap_err();
        assert_eq!(outline(&wire.take_sent()), format!("BEGIN {one} {one} {one}"));
        wire.answer_all();
        let (a, b, c) = calls.await;
        assert!([a, b, c].iter().all(|tenant| tenant.as_ref().unwrap().is_some()));
    }
}

/// A cancel could hit the BEGIN, and the statement behind it would run on its own.
#[tokio::test]
async fn no_cancel_before_begin_is_answered() {
    for way in WAYS {
        let world = World::new().await;
        let wire = Wire::before(&world.url(way.0)).await;
        let client = world.client(way).url(wire.url()).build().unwrap();
        world.check_next_user(&client).await;
        let us = client.tenant(world.ours.tenant);
        // Ten messages into a call, the statement is known and its answer is still out.
        for (answers, cancels) in [(0, 0), (1, 1)] {
            us.tenants().get().await.unwrap();
            let before = wire.cancels();
            wire.answer_only(answers);
            let call = async { us.tenants().get().await.map(drop) };
            tokio::time::timeout(Duration::from_millis(50), call).await.unwrap_err();
            wire.answer_all();
            world.check_next_user(&client).await;
            assert_eq!(wire.cancels() - before, cancels, "one-shot, {answers} answers");

            let before = wire.cancels();
            let transaction = us.begin().await.unwrap();
            let view = world.ours.view("user");
            if way.1 == StatementMode::Prepared {
                wire.answer_only(answers + 1); // the first one is the statement's name
            } else {
                wire.answer_only(answers);
            }
            tokio::time::timeout(Duration::from_millis(50), transaction.views().record(&view))
                .await
                .unwrap_err();
            drop(transaction);
            wire.answer_all();
            world.check_next_user(&client).await;
            assert_eq!(wire.cancels() - before, cancels, "transaction, {answers} answers");
        }
        world.settle(1).await;
        assert_eq!(world.rows_of("user").await, (0, 0));
    }
}

/// The second try of a call has a BEGIN of its own.
#[tokio::test]
async fn no_cancel_before_the_begin_of_a_second_try_is_answered() {
    let world = World::new().await;
    let wire = Wire::before(&world.database.app_url()).await;
    let client = world.client(WAYS[0]).url(wire.url()).build().unwrap();
    let us = client.tenant(world.ours.tenant);
    us.tenants().get().await.unwrap();
    let owner = world.database.connect_owner().await.unwrap();
    owner.batch_execute("ALTER TABLE tenants ALTER COLUMN name TYPE varchar(300)").await.unwrap();
    wire.take_sent();
    wire.answer_only(5); // BEGIN, a stale statement, COMMIT; its end, and its new name
    tokio::time::timeout(Duration::from_millis(100), us.tenants().get()).await.unwrap_err();
    assert_eq!(outline(&wire.take_sent()), "BEGIN B E S COMMIT C S P D S BEGIN B E S COMMIT");
    wire.answer_all();
    world.check_next_user(&client).await;
    assert_eq!(wire.cancels(), 0);
}

/// Cancels that come late find nobody: the connection that they name is never used again.
#[tokio::test]
async fn a_late_cancel_hits_nobody() {
    for way in WAYS {
        let world = World::new().await;
        make_slow(&world, 1.0).await;
        let wire = Wire::before(&world.url(way.0)).await;
        wire.delay_cancels(Duration::from_millis(20));
        let client = world.client(way).url(wire.url()).build().unwrap();
        world.ours.assign(&client, &["slow"]).await;
        for _ in 0..5 {
            let view = world.ours.view("slow");
            let us = client.tenant(world.ours.tenant);
            tokio::time::timeout(Duration::from_millis(20), us.views().record(&view)).await.unwrap_err();
            let started = Instant::now();
            while started.elapsed() < Duration::from_millis(40) {
                world.check_next_user(&client).await;
            }
        }
        // On a busy machine a drop may come before its BEGIN is answered: then nothing is cancelled.
        assert!((1..=5).contains(&wire.cancels()), "{}", wire.cancels());
        world.settle(1).await;
        assert_eq!(world.rows_of("slow").await, (0, 0));
    }
}

/// Views of the user `slow` take so many seconds.
pub(crate) async fn make_slow(world: &World, seconds: f64) {
    let owner = world.database.connect_owner().await.unwrap();
    let sql = format!(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
           'BEGIN PERFORM pg_catalog.pg_sleep({seconds}); RETURN NEW; END';
         CREATE TRIGGER slow BEFORE INSERT ON views FOR EACH ROW WHEN (NEW.user_id LIKE 'slow%')
           EXECUTE FUNCTION slow()"
    );
    owner.batch_execute(&sql).await.unwrap();
}

#[tokio::test]
async fn nobody_waits_for_a_dropped_statement() {
    for way in WAYS {
        let world = World::new().await;
        make_slow(&world, 1.0).await;
        let client = world.client(way).build().unwrap();
        world.ours.assign(&client, &["slow"]).await;
        let us = client.tenant(world.ours.tenant);
        for form in ["one-shot", "transaction, first statement", "transaction, later", "rolled back"] {
            us.tenants().get().await.unwrap();
            let before = world.backends().await;
            let view = world.ours.view("slow");
            let limit = Duration::from_millis(100);
            let dropped = if form == "one-shot" {
                tokio::time::timeout(limit, us.views().record(&view)).await.unwrap_err();
                Instant::now()
            } else {
                let transaction = us.begin().await.unwrap();
                if form == "transaction, later" {
                    transaction.tenants().get().await.unwrap();
                }
                tokio::time::timeout(limit, transaction.views().record(&view)).await.unwrap_err();
                let dropped = Instant::now();
                if form == "rolled back" {
                    transaction.rollback().await.unwrap();
                }
                dropped
            };
            assert_eq!(before.len(), 1);
            client.tenant(world.theirs.tenant).tenants().get().await.unwrap();
            let waited = dropped.elapsed();
            while world.backends().await.contains(&before[0]) {
                assert!(dropped.elapsed() < Duration::from_millis(700), "the statement goes on: {form}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let gone = dropped.elapsed();
            println!(
                "{way:?}, {form}: the next user waited {waited:.1?}, the statement was gone after {gone:.1?}"
            );
            assert!(waited < Duration::from_millis(500));
            world.check_next_user(&client).await;
            assert_eq!(world.rows_of("slow").await, (0, 0), "{form}");
        }
    }
}

/// A transaction dropped with nothing under way keeps its connection, and takes no time.
#[tokio::test]
async fn an_idle_transaction_returns_its_connection() {
    for way in WAYS {
        let world = World::new().await;
        let client = world.client(way).build().unwrap();
        let us = client.tenant(world.ours.tenant);
        us.tenants().get().await.unwrap();
        let before = world.backends().await;
        for _ in 0..20 {
            let transaction = us.begin().await.unwrap();
            transaction.views().record(&world.ours.view("user")).await.unwrap();
            drop(transaction);
            assert_eq!(client.pool_status().available, 1, "without a wait");
            assert!(poll_n(1, client.tenant(world.theirs.tenant).begin()).await.is_some());
            world.check_next_user(&client).await;
        }
        assert_eq!(world.backends().await, before);
        assert_eq!(world.rows_of("user").await, (0, 0));
    }
}
