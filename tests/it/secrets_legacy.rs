//! What the original's `pgp_sym_encrypt` has written: read here, by the real extension's output.

use lastprice::{Admin, ErrorKind, SecretKeys};

use crate::support_repo::*;
use crate::support_sql::skipped;

const PASSPHRASE: &str = "pässphrase ✓";

const READ: [&str; 14] = [
    "",
    "cipher-algo=aes128",
    "cipher-algo=aes192",
    "cipher-algo=aes256",
    "s2k-mode=0",
    "s2k-mode=1",
    "s2k-mode=3",
    "s2k-mode=3, s2k-count=1024",
    "sess-key=1",
    "sess-key=1, cipher-algo=aes256",
    "sess-key=1, cipher-algo=aes192, s2k-cipher-algo=aes256",
    "s2k-cipher-algo=aes192, cipher-algo=aes128",
    "unicode-mode=1",
    "s2k-digest-algo=sha1, cipher-algo=aes256, s2k-mode=1",
];

const REFUSED: [(&str, &str); 4] = [
    ("compress-algo=1", "compress-algo"),
    ("disable-mdc=1", "disable-mdc"),
    ("cipher-algo=bf", "cipher-algo"),
    ("s2k-digest-algo=md5", "s2k-digest-algo"),
];

#[tokio::test]
async fn the_originals_rows_are_read_and_rewritten() {
    let two = two_tenants().await;
    let superuser = two.database.connect_superuser().await.unwrap();
    if superuser.batch_execute("CREATE EXTENSION IF NOT EXISTS pgcrypto").await.is_err() {
        skipped("pgcrypto is not installed");
        return;
    }
    let keys = SecretKeys::from(ring()).legacy_passphrase(PASSPHRASE);
    let client =
        lastprice::Client::builder().url(two.database.app_url()).require_app_role().keys(keys.clone());
    let client = client.build().unwrap();
    let acme = client.tenant(two.id);
    let write =
        "UPDATE tenants SET mode = 'byok', paid_api_key = pgp_sym_encrypt($1, $2, $3)::text WHERE id = $4";
    for options in READ {
        for length in [1, 15, 16, 17, 150, 200, 600, 8000] {
            let secret: String = "pk-é0123456789".chars().cycle().take(length).collect();
            superuser.execute(write, &[&secret, &PASSPHRASE, &options, &two.id.uuid()]).await.unwrap();
            assert_eq!(own_key(&acme).await.as_ref(), Some(&secret), "{options} {length}");
        }
    }
    for (options, word) in REFUSED {
        superuser
            .execute(write, &[&"pk-secret ".repeat(20), &PASSPHRASE, &options, &two.id.uuid()])
            .await
            .unwrap();
        let error = is_kind(acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
        assert!(error.to_string().contains(word), "{error}");
    }
    // No passphrase, or another one.
    superuser.execute(write, &[&"pk-legacy", &PASSPHRASE, &"", &two.id.uuid()]).await.unwrap();
    is_kind(two.acme.tenants().paid_credentials().await, ErrorKind::SecretUnavailable);
    let other = SecretKeys::from(ring()).legacy_passphrase("another");
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    assert_eq!(admin.rewrap_secrets(&other, |_| ()).await.unwrap().total.failed, 1);
    let report = admin.rewrap_secrets(&keys, |_| ()).await.unwrap();
    assert_eq!((report.total.rewrapped, report.total.failed), (1, 0));
    assert_eq!((report.total.plaintext, report.total.legacy), (0, 1));
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("pk-legacy")); // without the passphrase now
    two.bystander_saw_nothing().await;
}
