//! Merges and erasures beside others, in whatever snapshot: nobody waits for ever, and nothing is between two names.

use lastprice::{Admin, ArchiveOptions, ErrorKind, MergePolicy, TenantScope, UserId, WebhookOutcome};

use crate::erasure::delivery;
use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_retention::{completed, with_history};
use crate::support_sql::assert_exact;

use MergePolicy::{Exclude, FirstQuoteWins};

fn id_of(name: &str) -> UserId {
    UserId::new(name).unwrap()
}

/// With an older snapshot it would not be seen who was merged meanwhile: alice would be bob, and bob alice.
#[tokio::test]
async fn an_older_snapshot_is_refused() {
    let two = two_tenants().await;
    active(&two.acme, "x").await;
    let (alice, bob) = (id_of("alice"), id_of("bob"));
    let mut host = two.database.connect_app().await.unwrap();
    let older =
        host.build_transaction().isolation_level(lastprice::tokio_postgres::IsolationLevel::RepeatableRead);
    let older = older.start().await.unwrap();
    let within = TenantScope::within(&older, two.id);
    within.experiments().list(None, 1, None).await.unwrap();
    two.acme.users().merge(&bob, &alice, FirstQuoteWins).await.unwrap();
    is_kind(within.users().merge(&alice, &bob, FirstQuoteWins).await, ErrorKind::Conflict);
    is_kind(within.users().erase(&alice).await, ErrorKind::Conflict);
    within.experiments().list(None, 1, None).await.unwrap(); // and the host's transaction goes on
    older.commit().await.unwrap();
    is_kind(two.acme.users().merge(&alice, &bob, FirstQuoteWins).await, ErrorKind::Conflict);
    two.bystander_saw_nothing().await;
}

/// The sale of a user who is merged while it is written is the known user's; and of one who is erased, the pseudonym's.
#[tokio::test]
async fn a_sale_at_the_same_moment() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let (cookie, account) = (user(1), user(2));
    for n in [1, 2] {
        two.acme.assignments().assign(x, &user(n)).await.unwrap();
    }
    for (k, erases) in [("merged", false), ("erased", true)] {
        let by = if erases { &account } else { &cookie };
        let sale = lastprice::NewConversion::sale(x, by.clone(), usd("29"), key(k)).order(order(k));
        let open = two.acme.begin().await.unwrap();
        open.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        let (acme, cookie, account) = (two.client.tenant(two.id), cookie.clone(), account.clone());
        let other = tokio::spawn(async move {
            match erases {
                false => acme.users().merge(&cookie, &account, Exclude).await.map(drop),
                true => acme.users().erase(&account).await.map(drop),
            }
        });
        two.one_waits().await;
        open.commit().await.unwrap();
        other.await.unwrap().unwrap();
        let entry = two.acme.conversions().by_key(&key(k)).await.unwrap().unwrap();
        assert_eq!(entry.user_id.as_str().starts_with("erased-"), erases, "{entry:?}");
        if !erases {
            assert_eq!((&entry.user_id, entry.reason), (&user(2), Some(lastprice::AssignmentReason::Merged)));
        }
    }
    assert_exact(&two.database.connect_superuser().await.unwrap(), "after both").await;
    two.bystander_saw_nothing().await;
}

/// Who processes a webhook has it, and then the quote; who changes an experiment has that, and then writes in it. So does who erases.
#[tokio::test]
async fn an_erasure_and_a_webhook_or_a_list_at_the_same_moment() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let alice = id_of("alice");
    let stored = "INSERT INTO webhook_events (tenant_id, id, seq, body, body_hash) SELECT $1, 'w', gen_random_uuid(), b, sha256(b)
                  FROM convert_to('{\"data\":{\"customer_id\":\"alice\"}}', 'UTF8') b";
    two.owner.execute(stored, &[&two.id.uuid()]).await.unwrap();
    for (n, first) in [
        "SELECT FROM webhook_events WHERE tenant_id = $1 FOR UPDATE",
        "SELECT FROM experiments WHERE tenant_id = $1 FOR NO KEY UPDATE",
    ]
    .into_iter()
    .enumerate()
    {
        two.acme.assignments().assign(x, &alice).await.unwrap();
        two.acme.experiments().force(x, &alice, Some("b")).await.unwrap();
        let mut host = two.database.connect_app().await.unwrap();
        let open = host.transaction().await.unwrap();
        open.execute("SELECT app_set_tenant($1)", &[&two.id.uuid()]).await.unwrap();
        assert_eq!(open.execute(first, &[&two.id.uuid()]).await.unwrap(), 1);
        let within = TenantScope::within(&open, two.id);
        let acme = two.client.tenant(two.id);
        let other = tokio::spawn(async move { acme.users().erase(&id_of("alice")).await });
        two.one_waits().await;
        let server = two.database.connect_superuser().await.unwrap();
        let sale = lastprice::NewConversion::sale(x, alice.clone(), usd("29"), key(&format!("sale-{n}")));
        within.conversions().settle(&sale).await.unwrap().entry().unwrap().unwrap();
        drop(within);
        open.commit().await.unwrap();
        let erasure = other.await.unwrap().unwrap().unwrap();
        assert_eq!((erasure.counts.quotes, erasure.counts.entries, erasure.counts.forced), (1, 1, 1));
        let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
        assert_eq!(server.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0);
    }
    two.bystander_saw_nothing().await;
}

/// Along chains, and over the same experiments: whoever needs several locks takes them in one order.
#[tokio::test]
async fn many_along_chains_do_not_deadlock() {
    let two = two_tenants().await;
    for n in 0..6 {
        let x = one_price(&two.acme, &format!("x{n}")).await;
        assign(&two.acme, x, 0..24).await;
    }
    two.acme.users().merge(&user(0), &user(23), FirstQuoteWins).await.unwrap();
    let merges = (0..200).map(|n| {
        let (a, b) = match n % 3 {
            0 => (user(0), user(1)), // who is another by now
            1 => (user(1), user(23)),
            _ => (user(2 + n / 3 % 10), user(12 + n / 3 % 10)), // in the same experiments
        };
        let acme = two.client.tenant(two.id);
        async move {
            match acme.users().merge(&a, &b, if n % 3 == 0 { Exclude } else { FirstQuoteWins }).await {
                Ok(_) => {}
                Err(e) => assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::InvalidInput), "{e}"),
            }
        }
    });
    futures_util::future::join_all(merges).await;
    two.client.close().await;
    let server = two.database.connect_superuser().await.unwrap();
    eventually("the statistics are in", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'lastprice_service'";
        server.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(server.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0);
    let chained = "SELECT count(*) FROM identities i JOIN identities k ON k.tenant_id = i.tenant_id AND k.user_id = i.known_id";
    assert_eq!(
        two.owner.query_one(chained, &[]).await.unwrap().get::<_, i64>(0),
        0,
        "each leads to the last"
    );
    assert_exact(&server, "merged").await;
}

/// Money of a webhook that failed is not erased with its user; and an order that has the name of a user keeps it.
#[tokio::test]
async fn an_erasure_leaves_the_money_of_webhooks() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    let body = format!(
        r#"{{"id":"e","type":"subscription.created","data":{{"customer_id":"1001","order_id":"1001","amount":29,"metadata":{{"experiment_id":"{x}"}}}}}}"#
    );
    // Failed for another reason than its content.
    let fail = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '23514'; END $$;
                CREATE TRIGGER fail BEFORE INSERT ON conversions FOR EACH ROW EXECUTE FUNCTION fail()";
    two.owner.batch_execute(fail).await.unwrap();
    let received = delivery(&body);
    let outcome = two.acme.webhooks().receive(&received).await.unwrap();
    assert!(matches!(outcome, WebhookOutcome::Failed { .. }), "{outcome:?}");
    let erasure = two.acme.users().erase(&id_of("1001")).await.unwrap().unwrap();
    assert_eq!((erasure.counts.pending_webhooks, erasure.counts.naming), (1, 1));
    two.owner.batch_execute("DROP TRIGGER fail ON conversions").await.unwrap();
    let outcome = two.acme.webhooks().retry(received.id()).await.unwrap();
    assert!(matches!(outcome, WebhookOutcome::Processed(_)), "{outcome:?}");
    let entry = two.acme.conversions().by_key(&key("paid:sale:1001")).await.unwrap().unwrap();
    assert_eq!((entry.user_id, entry.order_id), (erasure.pseudonym.clone(), Some(order("1001"))));
    refused(two.acme.users().merge(&erasure.pseudonym, &user(3), FirstQuoteWins).await, "anonymous");
    refused(two.acme.users().merge(&user(3), &erasure.pseudonym, FirstQuoteWins).await, "known");
    two.bystander_saw_nothing().await;
}

/// Two assignments become one; what was used stays used. And what was archived stays as it is.
#[tokio::test]
async fn a_merge_takes_nothing_back() {
    let two = two_tenants().await;
    let x = one_price(&two.acme, "x").await;
    assign(&two.acme, x, 0..4).await;
    let old = with_history(&two, "old", 40).await;
    completed(&two, old, 100).await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    admin.archive_completed(ArchiveOptions::new(), |_| ()).await.unwrap();
    let from = today() - lastprice::chrono::Days::new(400);
    let signals = async || two.acme.usage().total("signals", from, today()).await.unwrap();
    let told = async || format!("{:?}", two.acme.metrics().by_variant(old).await.unwrap());
    let (before, archived) = (signals().await, told().await);
    two.acme.users().merge(&user(0), &user(1), FirstQuoteWins).await.unwrap();
    // A buyer of the archived one, who has a row there, and somebody whose row is gone.
    let merge = two.acme.users().merge(&id_of("user-5"), &id_of("user-6"), Exclude).await.unwrap();
    assert_eq!((merge.entries, merge.shared, merge.taken_over), (0, 0, 0));
    assert_eq!((signals().await, told().await), (before, archived));
    assert_exact(&two.database.connect_superuser().await.unwrap(), "merged").await;
    two.bystander_saw_nothing().await;
}
