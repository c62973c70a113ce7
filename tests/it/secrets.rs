//! Secrets of tenants: what is stored, who can read it, and what becomes of keys.

use std::sync::Mutex;
use std::time::Duration;

use lastprice::secrecy::{ExposeSecret, SecretString};
use lastprice::{
    Admin, Client, DataKey, ErrorKind, KeyContext, KeyFuture, KeyProvider, KeyRing, NewTenant,
    PaidCredentials, SecretKeys, TenantChange, TenantScope, TenantTransaction,
};

use crate::support::poll_n;
use crate::support_repo::*;

fn secrets(all: &[&str]) -> Vec<SecretString> {
    all.iter().map(|s| SecretString::from(*s)).collect()
}

fn shown(all: &[SecretString]) -> Vec<&str> {
    all.iter().map(ExposeSecret::expose_secret).collect()
}

fn client(two: &TwoTenants, keys: impl Into<SecretKeys>) -> Client {
    Client::builder().url(two.database.app_url()).require_app_role().keys(keys).build().unwrap()
}

/// A column of Acme's and of the bystander's, as stored.
async fn stored(two: &TwoTenants, column: &str) -> Vec<Option<String>> {
    let sql = format!("SELECT {column} FROM tenants WHERE id = $1");
    let mut texts = Vec::new();
    for id in [two.id, two.other_id] {
        texts.push(two.owner.query_one(&sql, &[&id.uuid()]).await.unwrap().get(0));
    }
    texts
}

async fn store(two: &TwoTenants, column: &str, text: &str) {
    let mode = "CASE WHEN $1 = '' THEN mode ELSE 'byok' END";
    let sql = format!(
        "UPDATE tenants SET {column} = $1, mode = {mode}, paid_api_key = COALESCE(paid_api_key, 'x') WHERE id = $2"
    );
    let sql = if column == "paid_api_key" {
        sql.replace(", paid_api_key = COALESCE(paid_api_key, 'x')", "")
    } else {
        sql
    };
    two.owner.execute(&sql, &[&text, &two.id.uuid()]).await.unwrap();
}

#[tokio::test]
async fn what_is_stored_is_sealed_and_what_is_read_is_not() {
    let two = two_tenants().await;
    let tenants = two.acme.tenants();
    let change = TenantChange::new().byok("pk-1").webhook_secrets(secrets(&["new", "old"]));
    tenants.update(change).await.unwrap();
    for column in ["paid_api_key", "webhook_secret"] {
        let text = stored(&two, column).await[0].clone().unwrap();
        assert!(text.starts_with("lp1:test:") && !text.contains("pk-1") && !text.contains("new"), "{text}");
    }
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("pk-1"));
    assert_eq!(shown(&tenants.webhook_secrets().await.unwrap()), ["new", "old"]);
    // What is not named stays; the same secret is another text each time.
    let before = stored(&two, "webhook_secret").await;
    tenants.update(TenantChange::new().name("Acme Ltd")).await.unwrap();
    assert_eq!(stored(&two, "webhook_secret").await, before);
    tenants.update(TenantChange::new().webhook_secrets(secrets(&["new", "old"]))).await.unwrap();
    assert_ne!(stored(&two, "webhook_secret").await, before);
    tenants.update(TenantChange::new().managed().webhook_secrets([])).await.unwrap();
    assert_eq!(
        (stored(&two, "paid_api_key").await[0].clone(), stored(&two, "webhook_secret").await[0].clone()),
        (None, None)
    );
    assert!(tenants.webhook_secrets().await.unwrap().is_empty());
    let PaidCredentials::Managed(key) = tenants.paid_credentials().await.unwrap() else { panic!("its own") };
    assert_eq!(key.expose_secret(), "the platform's key");
    // At its creation, too.
    let new = NewTenant::byok("Hooli", "h@h.example", "pk-2").webhook_secrets(secrets(&["w"]));
    let hooli = two.client.tenant(two.client.create_tenant(new).await.unwrap().id);
    assert_eq!(own_key(&hooli).await.as_deref(), Some("pk-2"));
    assert_eq!(shown(&hooli.tenants().webhook_secrets().await.unwrap()), ["w"]);
    for bad in [vec![""], vec!["a\nb"], vec!["a\0"], vec!["x"; 9], vec![&*"x".repeat(1025)]] {
        let error = refused(
            tenants.update(TenantChange::new().webhook_secrets(secrets(&bad))).await,
            "webhook_secrets",
        );
        assert!(!format!("{error:?}").contains("xx"));
    }
    refused(
        two.client.create_tenant(NewTenant::managed("E", "e@e").webhook_secrets([])).await,
        "webhook_secrets",
    );
    assert_eq!(own_key(&two.globex).await.as_deref(), Some("globex's key"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn all_three_forms_have_the_clients_keys_and_a_bare_one_has_none() {
    let two = two_tenants().await;
    let transaction: TenantTransaction = two.acme.begin().await.unwrap();
    transaction.tenants().update(TenantChange::new().byok("pk-t")).await.unwrap();
    assert!(matches!(transaction.tenants().paid_credentials().await.unwrap(), PaidCredentials::Byok(_)));
    transaction.commit().await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    let transaction = host.transaction().await.unwrap();
    let scope = two.client.within(&transaction, two.id);
    scope.tenants().update(TenantChange::new().webhook_secrets(secrets(&["h"]))).await.unwrap();
    assert_eq!(shown(&scope.tenants().webhook_secrets().await.unwrap()), ["h"]);
    let bare = TenantScope::within(&transaction, two.id);
    is_kind(bare.tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
    is_kind(bare.tenants().update(TenantChange::new().byok("x")).await, ErrorKind::SecretUnavailable);
    transaction.commit().await.unwrap();
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("pk-t"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn without_a_key_nothing_is_written_and_never_in_plain() {
    let two = two_tenants().await;
    let bare = Client::builder().url(two.database.app_url()).require_app_role().build().unwrap();
    let tenants = bare.tenant(two.id);
    let change = TenantChange::new().name("Changed").byok("pk-plain");
    is_kind(tenants.tenants().update(change).await, ErrorKind::SecretUnavailable);
    let change = TenantChange::new().webhook_secrets(secrets(&["w"]));
    is_kind(tenants.tenants().update(change).await, ErrorKind::SecretUnavailable);
    let new = NewTenant::byok("New", "new@new.example", "pk-plain");
    is_kind(bare.create_tenant(new).await, ErrorKind::SecretUnavailable);
    is_kind(bare.tenant(two.other_id).tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
    is_kind(tenants.tenants().paid_credentials().await, ErrorKind::SecretUnavailable); // the platform's
    assert_eq!(tenants.tenants().get().await.unwrap().unwrap().name, "Acme");
    assert_eq!(stored(&two, "paid_api_key").await[0], None);
    tenants.tenants().update(TenantChange::new().managed().webhook_secrets([])).await.unwrap();
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_text_that_was_moved_or_changed_does_not_open() {
    let two = two_tenants().await;
    let change = TenantChange::new().byok("pk").webhook_secrets(secrets(&["w"]));
    two.acme.tenants().update(change).await.unwrap();
    let (key, hook) = (stored(&two, "paid_api_key").await, stored(&two, "webhook_secret").await);
    let (ours, theirs, hook) = (key[0].clone().unwrap(), key[1].clone().unwrap(), hook[0].clone().unwrap());
    let cut = &ours[..ours.len() - 2];
    for wrong in
        [&theirs, &hook, cut, "lp1:", "lp1:test:a:b", "plain", &ours.replace("lp1:test", "lp1:other")]
    {
        store(&two, "paid_api_key", wrong).await;
        let error = is_kind(two.acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
        assert!(!format!("{error} {error:?}").contains(wrong) || wrong == "plain", "{error:?}");
    }
    store(&two, "webhook_secret", &ours).await;
    is_kind(two.acme.tenants().webhook_secrets().await, ErrorKind::SecretUnavailable);
    store(&two, "paid_api_key", &ours).await;
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("pk"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn keys_change_while_all_goes_on() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let change = TenantChange::new().byok("pk").webhook_secrets(secrets(&["w"]));
    two.acme.tenants().update(change).await.unwrap();
    // 1. Everywhere: the new key reads. 2. Pod by pod: it writes. Old pods and new ones read each other's.
    let old_pod = client(&two, ring().and_reading("new", [9; 32]).unwrap());
    let new_ring = KeyRing::new("new", [9; 32]).unwrap().and_reading("test", [7; 32]).unwrap();
    let new_pod = client(&two, new_ring.clone());
    for (writes, reads) in [(&old_pod, &new_pod), (&new_pod, &old_pod)] {
        let change = TenantChange::new().webhook_secrets(secrets(&["w2"]));
        writes.tenant(two.id).tenants().update(change).await.unwrap();
        assert_eq!(shown(&reads.tenant(two.id).tenants().webhook_secrets().await.unwrap()), ["w2"]);
    }
    // 3. Rewrap. 4. The old key is not needed any more.
    let keys = SecretKeys::from(new_ring);
    let mut told = Vec::new();
    let report = admin.rewrap_secrets(&keys, |so_far| told.push(so_far.clone())).await.unwrap();
    let total = &report.total;
    assert_eq!((total.tenants, total.rewrapped, total.current, total.changed, total.failed), (2, 2, 1, 0, 0));
    assert_eq!(told.last(), Some(total));
    let again = admin.rewrap_secrets(&keys, |_| ()).await.unwrap().total;
    assert_eq!((again.rewrapped, again.current), (0, 3));
    let last = client(&two, KeyRing::new("new", [9; 32]).unwrap());
    assert_eq!(own_key(&last.tenant(two.id)).await.as_deref(), Some("pk"));
    assert_eq!(own_key(&last.tenant(two.other_id)).await.as_deref(), Some("globex's key"));
    is_kind(two.acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable); // the old ring alone
}

#[tokio::test]
async fn rewrap_encrypts_what_was_not_and_reports_what_it_cannot_read() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    store(&two, "paid_api_key", "a plain key").await;
    is_kind(two.acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
    let broken = "UPDATE tenants SET webhook_secret = 'lp1:gone:YQ:YQ' WHERE id = $1";
    two.owner.execute(broken, &[&two.other_id.uuid()]).await.unwrap();
    let report = admin.rewrap_secrets(&ring().into(), |_| ()).await.unwrap();
    assert_eq!((report.total.rewrapped, report.total.current, report.total.failed), (1, 1, 1));
    assert_eq!((report.total.plaintext, report.total.legacy), (1, 0));
    let failure = &report.failures[0];
    assert_eq!((failure.tenant_id, failure.column), (two.other_id, "webhook_secret"));
    assert_eq!(failure.kind, ErrorKind::SecretUnavailable);
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("a plain key"));
    assert_eq!(own_key(&two.globex).await.as_deref(), Some("globex's key"));
}

#[tokio::test]
async fn rewrap_dropped_at_each_poll_loses_nothing_and_goes_on() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    two.acme.tenants().update(TenantChange::new().byok("pk").webhook_secrets(secrets(&["w"]))).await.unwrap();
    let mut finished = false;
    for polls in 1..60 {
        let id = format!("k{polls}");
        let keys = KeyRing::new(id, [100 + polls as u8; 32]).unwrap();
        let mut keys = keys.and_reading("test", [7; 32]).unwrap();
        for old in 1..polls {
            keys = keys.and_reading(format!("k{old}"), [100 + old as u8; 32]).unwrap();
        }
        let keys = SecretKeys::from(keys);
        let ended = poll_n(polls, admin.rewrap_secrets(&keys, |_| ())).await;
        let now = client(&two, keys.clone());
        assert_eq!(own_key(&now.tenant(two.id)).await.as_deref(), Some("pk"), "{polls}");
        assert_eq!(own_key(&now.tenant(two.other_id)).await.as_deref(), Some("globex's key"), "{polls}");
        finished = ended.is_some();
        if finished {
            break;
        }
        // Resumed, it does the rest.
        let rest = admin.rewrap_secrets(&keys, |_| ()).await.unwrap().total;
        assert_eq!((rest.rewrapped + rest.current, rest.failed), (3, 0), "{polls}");
    }
    assert!(finished);
}

/// A key management service, in some mood; around a ring.
struct Kms(KeyRing, Mutex<Mood>);

#[derive(Clone, Copy)]
enum Mood {
    Well,
    Fails,
    Slow,
    WrongKey,
    Garbage,
}

const LEAK: &str = "the service's text with a secret";

impl KeyProvider for &'static Kms {
    fn current_key_id(&self) -> String {
        self.0.current_key_id()
    }

    fn wrap<'a>(&'a self, id: &'a str, key: &'a DataKey, context: &'a KeyContext) -> KeyFuture<'a, Vec<u8>> {
        let mood = *self.1.lock().unwrap();
        Box::pin(async move {
            match mood {
                Mood::Fails => Err(LEAK.into()),
                Mood::Slow => std::future::pending().await,
                Mood::Garbage => Ok(vec![1; 10]),
                Mood::WrongKey => self.0.wrap(id, &DataKey::new([3; 32]), context).await,
                Mood::Well => self.0.wrap(id, key, context).await,
            }
        })
    }

    fn unwrap<'a>(
        &'a self,
        id: &'a str,
        wrapped: &'a [u8],
        context: &'a KeyContext,
    ) -> KeyFuture<'a, DataKey> {
        let mood = *self.1.lock().unwrap();
        Box::pin(async move {
            match mood {
                Mood::Fails => Err(LEAK.into()),
                Mood::Slow => std::future::pending().await,
                Mood::WrongKey | Mood::Garbage => Ok(DataKey::new([3; 32])),
                Mood::Well => self.0.unwrap(id, wrapped, context).await,
            }
        })
    }
}

#[tokio::test]
async fn a_key_service_in_trouble_is_an_error_of_its_kind() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let kms: &'static Kms =
        Box::leak(Box::new(Kms(KeyRing::new("kms", [5; 32]).unwrap(), Mutex::new(Mood::Well))));
    let keys = SecretKeys::new(kms).time_limit(Duration::from_millis(50));
    let client = client(&two, keys.clone());
    let acme = client.tenant(two.id);
    acme.tenants().update(TenantChange::new().byok("pk")).await.unwrap();
    assert_eq!(own_key(&acme).await.as_deref(), Some("pk"));
    for (mood, reading, writing) in [
        (Mood::Fails, ErrorKind::Unavailable, Some(ErrorKind::Unavailable)),
        (Mood::Slow, ErrorKind::Timeout, Some(ErrorKind::Timeout)),
        (Mood::WrongKey, ErrorKind::SecretUnavailable, None),
        (Mood::Garbage, ErrorKind::SecretUnavailable, None),
    ] {
        *kms.1.lock().unwrap() = mood;
        let error = is_kind(acme.tenants().paid_credentials().await, reading);
        assert!(std::error::Error::source(&error).is_none() && !format!("{error:?}").contains(LEAK));
        if let Some(kind) = writing {
            is_kind(acme.tenants().update(TenantChange::new().byok("other")).await, kind);
        }
    }
    // What a broken service wraps is not written over what can be read.
    let before = stored(&two, "webhook_secret").await;
    let plain = "UPDATE tenants SET webhook_secret = 'plain' WHERE id = $1";
    two.owner.execute(plain, &[&two.id.uuid()]).await.unwrap();
    *kms.1.lock().unwrap() = Mood::Garbage;
    is_kind(admin.rewrap_secrets(&keys, |_| ()).await, ErrorKind::SecretUnavailable);
    *kms.1.lock().unwrap() = Mood::Fails;
    is_kind(admin.rewrap_secrets(&keys, |_| ()).await, ErrorKind::Unavailable);
    assert_eq!(stored(&two, "webhook_secret").await[0].as_deref(), Some("plain"));
    *kms.1.lock().unwrap() = Mood::Well;
    let report = admin.rewrap_secrets(&keys, |_| ()).await.unwrap();
    assert_eq!((report.total.rewrapped, report.total.current, report.total.failed), (1, 1, 1), "{before:?}");
    assert_eq!(shown(&acme.tenants().webhook_secrets().await.unwrap()), ["plain"]);
    two.bystander_saw_nothing().await;
}

/// Somebody who changes a tenant just when a secret of it is being rewrapped.
struct Meddler {
    ring: KeyRing,
    owner: lastprice::tokio_postgres::Client,
    sql: Mutex<Option<String>>,
}

impl KeyProvider for Meddler {
    fn current_key_id(&self) -> String {
        self.ring.current_key_id()
    }

    fn wrap<'a>(&'a self, id: &'a str, key: &'a DataKey, context: &'a KeyContext) -> KeyFuture<'a, Vec<u8>> {
        Box::pin(async move {
            let sql = self.sql.lock().unwrap().take();
            if let Some(sql) = sql {
                self.owner.batch_execute(&sql).await?;
            }
            self.ring.wrap(id, key, context).await
        })
    }

    fn unwrap<'a>(
        &'a self,
        id: &'a str,
        wrapped: &'a [u8],
        context: &'a KeyContext,
    ) -> KeyFuture<'a, DataKey> {
        self.ring.unwrap(id, wrapped, context)
    }
}

#[tokio::test]
async fn a_secret_that_was_changed_meanwhile_is_not_overwritten() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    for (change, expected) in [
        ("webhook_secret = 'somebody else''s'", (0, 1)),
        ("webhook_secret = NULL", (0, 1)),
        ("name = 'another name'", (1, 0)),
    ] {
        store(&two, "webhook_secret", "plain").await;
        two.acme.tenants().update(TenantChange::new().managed()).await.unwrap();
        let meddler = Meddler {
            ring: ring(),
            owner: two.database.connect_owner().await.unwrap(),
            sql: Mutex::new(Some(format!("UPDATE tenants SET {change} WHERE id = '{}'", two.id))),
        };
        let total = admin.rewrap_secrets(&SecretKeys::new(meddler), |_| ()).await.unwrap().total;
        assert_eq!((total.rewrapped, total.changed), expected, "{change}");
        let now = stored(&two, "webhook_secret").await[0].clone();
        match change {
            "webhook_secret = NULL" => assert_eq!(now, None),
            "name = 'another name'" => assert!(now.unwrap().starts_with("lp1:")),
            _ => assert_eq!(now.as_deref(), Some("somebody else's")),
        }
    }
    two.bystander_saw_nothing().await;
}

/// Written by hand, and longer than what could be read again: in the report, and in nobody's way.
#[tokio::test]
async fn a_text_that_is_too_long_to_be_encrypted_holds_up_no_other() {
    let two = two_tenants().await;
    let write = "UPDATE tenants SET webhook_secret = repeat('x', $2::int) WHERE id = $1";
    two.owner.execute(write, &[&two.id.uuid(), &60_000_i32]).await.unwrap();
    two.owner.execute(write, &[&two.other_id.uuid(), &32_768_i32]).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let report = admin.rewrap_secrets(&ring().into(), |_| ()).await.unwrap();
    assert_eq!((report.total.rewrapped, report.total.failed), (1, 1), "{report:?}");
    assert_eq!(report.failures[0].tenant_id, two.id);
    assert_eq!(two.globex.tenants().webhook_secrets().await.unwrap().len(), 1);
}
