//! TLS: what each `sslmode` accepts and refuses, beside libpq itself; and who stands between.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lastprice::{Client, ClientBuilder, ErrorKind, SslMode};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::support_shop::{all_of, assert_isolated};
use crate::support_sql::program;

#[tokio::test]
async fn tls_is_used_and_checked() {
    let cluster = PrivateCluster::builder().tls().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let server = database.connect_superuser().await.unwrap();
    let by_name = || Client::builder().url(database.app_url());
    let misnamed = || {
        let (port, name) = (cluster.port(), database.name());
        Client::builder().url(format!(
            "host=db.wrong.example hostaddr=127.0.0.1 port={port} dbname={name} user=lastprice_service"
        ))
    };
    let (ca, other) = (cluster.ca_cert_path(), cluster.other_ca_cert_path());

    for (case, builder) in [
        ("verify-full", by_name().ssl_mode(SslMode::VerifyFull).ssl_root_cert(&ca)),
        ("verify-ca", misnamed().ssl_mode(SslMode::VerifyCa).ssl_root_cert(&ca)),
        ("require", misnamed().ssl_mode(SslMode::Require)),
        ("prefer", by_name()),
        ("in the URL", by_url(&database.app_url(), &ca.display().to_string())),
    ] {
        let client = builder.require_app_role().application_name(case).build().unwrap();
        client.ready().await.unwrap_or_else(|e| panic!("{case}: {e:?}"));
        let encrypted = "SELECT bool_and(s.ssl) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid)
                         WHERE a.application_name = $1";
        let row = server.query_one(encrypted, &[&case]).await.unwrap();
        assert_eq!(row.get::<_, Option<bool>>(0), Some(true), "{case}");
        assert_isolated(&client).await;
    }
    for (case, builder) in [
        ("another authority", by_name().ssl_mode(SslMode::VerifyFull).ssl_root_cert(&other)),
        ("another authority, verify-ca", by_name().ssl_mode(SslMode::VerifyCa).ssl_root_cert(&other)),
        ("another authority, require", by_name().ssl_mode(SslMode::Require).ssl_root_cert(&other)),
        ("another name", misnamed().ssl_mode(SslMode::VerifyFull).ssl_root_cert(&ca)),
        ("no TLS, which this server refuses", by_name().ssl_mode(SslMode::Disable)),
    ] {
        let refused = builder.build().unwrap().ready().await.expect_err(case);
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{case}: {refused:?}");
        assert!(std::error::Error::source(&refused).is_some(), "{case}: {refused:?}");
    }
}

fn by_url(url: &str, ca: &str) -> ClientBuilder {
    let and = if url.contains('?') { '&' } else { '?' };
    Client::builder().url(format!("{url}{and}sslmode=verify-full&sslrootcert={ca}"))
}

#[tokio::test]
async fn a_server_without_tls_is_used_only_if_that_is_allowed() {
    let cluster = PrivateCluster::builder().tcp().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let client = |mode| Client::builder().url(database.app_url()).ssl_mode(mode).build().unwrap();
    for mode in [SslMode::Disable, SslMode::Prefer] {
        assert_isolated(&client(mode)).await;
    }
    let refused = client(SslMode::Require).ready().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
}

/// A way to a server, and what libpq and we are told about it.
struct Way<'a> {
    server: &'static str,
    database: &'a TestDatabase,
    port: u16,
}

/// Each mode, with each authority, to each server, by its name and by another one: `psql` gets through where we do, and
/// nowhere else.
#[tokio::test(flavor = "multi_thread")] // the one who denies answers while psql is waited for
async fn every_mode_accepts_and_refuses_what_libpq_does() {
    let Some(psql) = program("psql") else { return };
    let good = PrivateCluster::builder().tls().start().await.unwrap();
    let expired = PrivateCluster::builder().tls_expired().start().await.unwrap();
    let plain = PrivateCluster::builder().tcp().start().await.unwrap();
    let databases =
        [good.database().await.unwrap(), expired.database().await.unwrap(), plain.database().await.unwrap()];
    let denier = Denier::before(good.port()).await;
    let ways = [
        Way { server: "with TLS", database: &databases[0], port: good.port() },
        Way { server: "whose certificate has ended", database: &databases[1], port: expired.port() },
        Way { server: "without TLS", database: &databases[2], port: plain.port() },
        Way { server: "behind somebody who says it has no TLS", database: &databases[0], port: denier.port },
    ];
    let empty = std::env::temp_dir(); // no ~/.postgresql there, where libpq would look for roots
    let mut accepted = 0;
    for Way { server, database, port } in &ways {
        for host in ["localhost", "db.wrong.example"] {
            for (mode, roots) in [
                ("disable", None),
                ("prefer", None),
                ("require", None),
                ("require", Some("its own")),
                ("require", Some("another")),
                ("verify-ca", Some("its own")),
                ("verify-ca", Some("another")),
                ("verify-full", Some("its own")),
                ("verify-full", Some("another")),
            ] {
                let of = if *server == "whose certificate has ended" { &expired } else { &good };
                let roots_are = match roots {
                    Some("its own") => format!("sslrootcert='{}'", of.ca_cert_path().display()),
                    Some(_) => format!("sslrootcert='{}'", of.other_ca_cert_path().display()),
                    None => String::new(),
                };
                let address = format!(
                    "host={host} hostaddr=127.0.0.1 port={port} dbname={} user=lastprice_service sslmode={mode} {roots_are}",
                    database.name()
                );
                let theirs = Command::new(&psql)
                    .args([&address, "-XAtc", "SELECT 1"])
                    .env("HOME", &empty)
                    .env("PGGSSENCMODE", "disable")
                    .output()
                    .unwrap();
                let ours = Client::builder().url(&address).require_app_role().build().unwrap().ready().await;
                let case = format!("{mode}, {roots:?}, a server {server}, as {host}");
                let stderr = String::from_utf8_lossy(&theirs.stderr);
                assert_eq!(ours.is_ok(), theirs.status.success(), "{case}: {ours:?} {stderr}");
                if let Err(refused) = &ours {
                    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{case}: {refused:?}");
                }
                accepted += usize::from(ours.is_ok());
            }
        }
    }
    // With TLS: prefer, require (twice), verify-ca by both names, verify-full by one. Ended: prefer and require. Without, and as if
    // without: what may do without; but the server behind the denier refuses plain text.
    assert_eq!(accepted, 4 * 2 + 1 + 2 * 2 + 2 * 2);
}

/// Answers every question for TLS with "no", and counts what it is sent after that.
struct Denier {
    port: u16,
    heard: Arc<AtomicUsize>,
    _connections: JoinSet<()>,
}

impl Denier {
    async fn before(server: u16) -> Denier {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, heard) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
        let (mut connections, count) = (JoinSet::new(), Arc::clone(&heard));
        connections.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(deny(client, server, Arc::clone(&count)));
            }
        });
        Denier { port, heard, _connections: connections }
    }
}

async fn deny(mut client: TcpStream, server: u16, heard: Arc<AtomicUsize>) -> std::io::Result<()> {
    let mut request = [0; 8];
    client.read_exact(&mut request).await?;
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    if request == SSL_REQUEST {
        client.write_all(b"N").await?;
    } else {
        server.write_all(&request).await?; // plain text from the start: the head of its first message
        heard.fetch_add(request.len(), Ordering::SeqCst);
    }
    let mut first = [0; 1024];
    let length = client.read(&mut first).await?;
    heard.fetch_add(length, Ordering::SeqCst);
    server.write_all(&first[..length]).await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

#[tokio::test]
async fn who_must_have_tls_says_nothing_without_it() {
    let cluster = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let denier = Denier::before(cluster.port()).await;
    let tls = PrivateCluster::builder().tls().start().await.unwrap();
    let url = database.app_url().replace(&format!(":{}/", cluster.port()), &format!(":{}/", denier.port));
    for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
        let client =
            Client::builder().url(&url).ssl_mode(mode).ssl_root_cert(tls.ca_cert_path()).build().unwrap();
        let refused = client.ready().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{mode}: {refused:?}");
    }
    assert_eq!(denier.heard.load(Ordering::SeqCst), 0, "neither a user nor a password was sent");

    let client = Client::builder().url(&url).ssl_mode(SslMode::Prefer).build().unwrap();
    assert_isolated(&client).await;
    // Who only prefers it goes on in plain text, as libpq does.
    assert_ne!(denier.heard.load(Ordering::SeqCst), 0);
}

/// Speaks TLS to both sides, with a certificate of its own to the client, and could read what they say to each other.
async fn impostor(cluster: &PrivateCluster) -> (u16, JoinSet<()>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let chain = vec![made.cert.der().clone()];
    let accepts = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(cluster.ca_cert_path()).unwrap();
    roots.add_parsable_certificates(certificates.map(Result::unwrap));
    let connects = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (acceptor, connector) =
        (TlsAcceptor::from(Arc::new(accepts)), TlsConnector::from(Arc::new(connects)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, server) = (listener.local_addr().unwrap().port(), cluster.port());
    let mut connections = JoinSet::new();
    connections.spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(relay(client, server, acceptor.clone(), connector.clone()));
        }
    });
    (port, connections)
}

async fn relay(
    mut client: TcpStream,
    server: u16,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
) -> std::io::Result<()> {
    let mut request = [0; 8];
    client.read_exact(&mut request).await?;
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    server.write_all(&SSL_REQUEST).await?;
    server.read_exact(&mut [0]).await?;
    let mut server = connector.connect(ServerName::try_from("localhost").unwrap(), server).await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

#[tokio::test]
async fn a_password_is_bound_to_the_channel_it_is_given_in() {
    let cluster = PrivateCluster::builder().tls().password_auth().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    let direct = database.app_url() + "?sslmode=require";
    let (port, _impostor) = impostor(&cluster).await;
    let between = direct.replace(&format!(":{}/", cluster.port()), &format!(":{port}/"));
    let client = |url: String| Client::builder().url(url).require_app_role().build().unwrap();

    for binding in ["prefer", "require"] {
        assert_isolated(&client(format!("{direct}&channel_binding={binding}"))).await;
        // `require` checks no certificate, so the impostor's is taken; but the proof of the password is of that certificate, and
        // the server has another.
        let refused = client(format!("{between}&channel_binding={binding}")).ready().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
        assert!(!all_of(&refused).contains(PrivateCluster::PASSWORD), "{refused:?}");
    }
    client(between.clone()).ready().await.expect_err("it is bound by default");
    // That it was the binding: without it nobody notices.
    client(format!("{between}&channel_binding=disable")).ready().await.unwrap();

    // Without TLS there is no channel to bind to.
    let plain = PrivateCluster::builder().tcp().password_auth().start().await.unwrap();
    let database = plain.database().await.unwrap();
    client(database.app_url() + "?channel_binding=require").ready().await.expect_err("nothing to bind to");
    assert_isolated(&client(database.app_url())).await;
}

/// Run by the test below, in a process that has other roots.
#[tokio::test]
#[ignore = "a part of `the_roots_are_the_systems_by_default`"]
async fn by_the_systems_roots() {
    let url = std::env::var("TLS_TEST_URL").unwrap();
    let verdict = async { Client::builder().url(url).build()?.ready().await }.await;
    println!("verdict: {}", verdict.map_or_else(|e| all_of(&e), |()| "ready".to_owned()));
}

#[tokio::test]
async fn the_roots_are_the_systems_by_default() {
    let cluster = PrivateCluster::builder().tls().start().await.unwrap();
    let database = cluster.database().await.unwrap();
    for (query, roots, ready) in [
        ("sslmode=verify-full", cluster.ca_cert_path(), true),
        ("sslmode=verify-ca", cluster.ca_cert_path(), true),
        ("sslmode=verify-full", cluster.other_ca_cert_path(), false),
        ("sslmode=verify-ca", cluster.other_ca_cert_path(), false),
        // As libpq has it, this is verify-full.
        ("sslrootcert=system", cluster.ca_cert_path(), true),
        ("sslrootcert=system", cluster.other_ca_cert_path(), false),
        ("sslmode=require", cluster.other_ca_cert_path(), true),
    ] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["tls::by_the_systems_roots", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("TLS_TEST_URL", format!("{}?{query}", database.app_url()))
            .env("SSL_CERT_FILE", &roots)
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        let (_, verdict) = printed.split_once("verdict: ").expect("it ran");
        assert_eq!(verdict.starts_with("ready"), ready, "{query} {}: {printed}", roots.display());
        assert!(ready || verdict.contains("UnknownIssuer"), "{query}: {printed}");
    }
}
