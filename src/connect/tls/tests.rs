use std::path::PathBuf;
use std::time::Duration;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, Error as TlsError};

use super::imp::{connector, verifier};
use crate::connect::config::Target;

/// A file with a content of its own, gone with the test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(content: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lastprice-{}.pem", uuid::Uuid::new_v4()));
        std::fs::write(&path, content).unwrap();
        TempFile(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

fn target(mode: &str, roots: Option<&TempFile>) -> Target {
    let root_cert = roots.map(|file| format!(" sslrootcert='{}'", file.0.display())).unwrap_or_default();
    Target::from_url(&format!("host=db.test sslmode={mode}{root_cert}")).unwrap()
}

/// What a client with these options says to `certificate` from a server it calls `name`, in 2030.
fn verdict(mode: &str, roots: Option<&str>, certificate: &str, name: &str) -> Result<(), TlsError> {
    let roots = roots.map(TempFile::new);
    verdict_at(mode, roots.as_ref(), certificate, name, 1_900_000_000)
}

fn verdict_at(
    mode: &str,
    roots: Option<&TempFile>,
    certificate: &str,
    name: &str,
    now: u64,
) -> Result<(), TlsError> {
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let name = ServerName::try_from(name).unwrap();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    let verifier = verifier(&target(mode, roots)).unwrap();
    verifier.verify_server_cert(&certificate, &[], &name, &[], now).map(drop)
}

#[test]
fn weak_modes_check_nothing() {
    for mode in ["disable", "prefer", "require"] {
        for certificate in [LEAF, SELF_SIGNED, VERSION_1] {
            assert_eq!(verdict(mode, None, certificate, "other.test"), Ok(()), "{mode}");
        }
    }
    assert_eq!(verdict("prefer", Some(OTHER_CA), LEAF, "other.test"), Ok(()));
}

#[test]
fn verify_ca_checks_the_chain_only() {
    for mode in ["require", "verify-ca"] {
        for name in ["db.test", "other.test", "127.0.0.1", "10.0.0.1"] {
            assert_eq!(verdict(mode, Some(CA), LEAF, name), Ok(()), "{mode} {name}");
        }
        assert!(verdict(mode, Some(OTHER_CA), LEAF, "db.test").is_err(), "{mode}");
        assert!(verdict(mode, Some(CA), SELF_SIGNED, "db.test").is_err(), "{mode}");
    }
    assert!(verdict("verify-ca", Some(&format!("{OTHER_CA}\n{CA}\n")), LEAF, "other.test").is_ok());
}

#[test]
fn verify_full_checks_the_name_too() {
    for name in ["db.test", "localhost", "127.0.0.1"] {
        assert_eq!(verdict("verify-full", Some(CA), LEAF, name), Ok(()), "{name}");
    }
    for name in ["other.test", "10.0.0.1"] {
        let error = verdict("verify-full", Some(CA), LEAF, name).unwrap_err();
        let wrong_name = CertificateError::NotValidForName;
        assert!(
            error == wrong_name.into() || format!("{error:?}").contains("NotValidForNameContext"),
            "{error:?}"
        );
    }
    assert!(verdict("verify-full", Some(OTHER_CA), LEAF, "db.test").is_err());
}

#[test]
fn a_self_signed_certificate_may_be_its_own_root() {
    assert_eq!(verdict("verify-ca", Some(SELF_SIGNED), SELF_SIGNED, "other.test"), Ok(()));
    assert_eq!(verdict("verify-full", Some(SELF_SIGNED), SELF_SIGNED, "db.test"), Ok(()));
    assert!(verdict("verify-full", Some(SELF_SIGNED), SELF_SIGNED, "other.test").is_err());
    assert!(verdict("verify-ca", Some(CA), SELF_SIGNED, "db.test").is_err());
}

#[test]
fn dates_are_checked() {
    for (roots, certificate) in [(CA, LEAF), (SELF_SIGNED, SELF_SIGNED)] {
        let roots = TempFile::new(roots);
        for mode in ["require", "verify-ca", "verify-full"] {
            for now in [0, 6_000_000_000] {
                assert!(verdict_at(mode, Some(&roots), certificate, "db.test", now).is_err(), "{mode} {now}");
            }
        }
    }
}

#[test]
fn a_bad_root_file_is_an_error_that_names_the_option() {
    let files = [
        TempFile::new(""),
        TempFile::new("no certificate"),
        TempFile::new("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        TempFile::new("-----BEGIN CERTIFICATE-----\n%%%%\n-----END CERTIFICATE-----\n"),
        TempFile(PathBuf::from("/nonexistent/root.pem")),
        TempFile(std::env::temp_dir()),
    ];
    for file in &files {
        for mode in ["require", "verify-ca", "verify-full"] {
            let error = connector(&target(mode, Some(file))).err().expect("an error");
            assert_eq!(error.field(), Some("sslrootcert"), "{:?}", file.0);
        }
        for mode in ["disable", "prefer"] {
            assert!(connector(&target(mode, Some(file))).is_ok(), "{mode} does not read it");
        }
    }
    let local = "host=/tmp sslmode=verify-full sslrootcert=/nonexistent/root.pem";
    assert!(connector(&Target::from_url(local).unwrap()).is_ok(), "no TLS over a Unix socket");
}

#[test]
fn a_connector_fits_the_pool() {
    let target = target("require", None);
    let tls = connector(&target).unwrap();
    deadpool_postgres::Manager::from_config(target.pg, tls, deadpool_postgres::ManagerConfig::default());
}

/// An authority, valid until 2125.
const CA: &str = "-----BEGIN CERTIFICATE-----
MIIBezCCASGgAwIBAgIUHW+yx8K0qps763/CzbDOUtwD86wwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHdGVzdC1jYTAgFw0yNjExMjIyMjA5NDFaGA8yMTI2MTAyOTIy
MDk0MVowEjEQMA4GA1UEAwwHdGVzdC1jYTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABCakS9twgdXx3Oz4re5Ih7PyMuEtxhuTKpGwm8xGKjy7hiaB7Z1i7QeRnKDs
ZOuac9+jfDhCvkJkUI0PfPluiY+jUzBRMB0GA1UdDgQWBBRLN+8NsElbS1yYFtNi
sfeOgkKn5zAfBgNVHSMEGDAWgBRLN+8NsElbS1yYFtNisfeOgkKn5zAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIEKGhs5DS2cDXUEzPHVlqTDx7vQt
EI9RAsoa1PEbFt7PAiEAlhGOzDT/N5jbfkZWEk50pLhi4zyNJT9sh8SkincnJvU=
-----END CERTIFICATE-----";

/// Another one of the same name.
const OTHER_CA: &str = "-----BEGIN CERTIFICATE-----
MIIBezCCASGgAwIBAgIUdaXQa7NEgUdxb7feUrMTWn8wMFkwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHdGVzdC1jYTAgFw0yNjExMjIyMjA5NDFaGA8yMTI2MTAyOTIy
MDk0MVowEjEQMA4GA1UEAwwHdGVzdC1jYTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABCqYxz5kfn/ZHwitS1IRkO0SsxafCx+MNH/UAenMGs1cG5jwqlzJrpaQypAu
xuY9hlrvK2/74rjlycgI1/VvoDajUzBRMB0GA1UdDgQWBBQNtYZanMT6rFDPX2G3
WR0YWZuqRTAfBgNVHSMEGDAWgBQNtYZanMT6rFDPX2G3WR0YWZuqRTAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIHr4H0K9hmToAOgiqt2NmWfjQngY
ypLBNy2lQJC547I/AiEAyHVH/NEw5SOL0y3an4Ax2I4FWDUxYbgRHyKheDBISuM=
-----END CERTIFICATE-----";

/// By `CA`, for `db.test`, `localhost` and 127.0.0.1.
const LEAF: &str = "-----BEGIN CERTIFICATE-----
MIIBljCCAT2gAwIBAgIUOF1LKF9wcML6c6C41UfawPD2CcUwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHdGVzdC1jYTAgFw0yNjExMjIyMjA5NDFaGA8yMTI2MTAyOTIy
MDk0MVowDzENMAsGA1UEAwwEbGVhZjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IA
BEo+4q+AMpIITg5qeRQPEdwzM7VyTCFi4q/u/Mq9WPKe2iVYI+JL75DqAB4dAoNA
QYSQk44Cltzbqku01WeY+nCjcjBwMCMGA1UdEQQcMBqCB2RiLnRlc3SCCWxvY2Fs
aG9zdIcEfwAAATAJBgNVHRMEAjAAMB0GA1UdDgQWBBQGGOWXIqCNTUh5Ksr2B23j
SS81qTAfBgNVHSMEGDAWgBRLN+8NsElbS1yYFtNisfeOgkKn5zAKBggqhkjOPQQD
AgNHADBEAiAbpyQYRgMKU30wmp6iJLrhrY36IGNJWW9CPxvlwo6qqQIgKdrSpkAk
NufkUaZhbXY7sQ6dEkdZWhotaiPTI2iwDVE=
-----END CERTIFICATE-----";

/// By itself and, as `openssl req -x509` has it, an authority; for `db.test` and `localhost`.
const SELF_SIGNED: &str = "-----BEGIN CERTIFICATE-----
MIIBnTCCAUSgAwIBAgIUD2gQl3Uealu3AcSohH58yNz6FeQwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjIyMDk0MVoYDzIxMjYxMDI5
MjIwOTQxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQw1BTaZ/YcDiV1387iMlYmBwBEgYzH+LkU2Uu4zHdPVv9XjVJeuzgH
oJ1ZYyLSbKu8+g+qqwoKDHJ9OcjzKJkto3IwcDAdBgNVHQ4EFgQUfuRKCfdIxpDg
NQBIP1cotaFnO9gwHwYDVR0jBBgwFoAUfuRKCfdIxpDgNQBIP1cotaFnO9gwDwYD
VR0TAQH/BAUwAwEB/zAdBgNVHREEFjAUggdkYi50ZXN0gglsb2NhbGhvc3QwCgYI
KoZIzj0EAwIDRwAwRAIgBz+ddI55rRW94AccAXKRU/okbAFS88s2/PljR0v/FPIC
IFjOEwSJUM69fd7tRfJlCwXTfDxUD9Jz6245E5rsieqE
-----END CERTIFICATE-----";

/// By `CA`, without extensions.
const VERSION_1: &str = "-----BEGIN CERTIFICATE-----
MIIBHTCBxAIUOF1LKF9wcML6c6C41UfawPD2CcYwCgYIKoZIzj0EAwIwEjEQMA4G
A1UEAwwHdGVzdC1jYTAgFw0yNjExMjIyMjA5NDFaGA8yMTI2MTAyOTIyMDk0MVow
DzENMAsGA1UEAwwEbGVhZjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEo+4q+A
MpIITg5qeRQPEdwzM7VyTCFi4q/u/Mq9WPKe2iVYI+JL75DqAB4dAoNAQYSQk44C
ltzbqku01WeY+nAwCgYIKoZIzj0EAwIDSAAwRQIgNBTwDjEZEZ0ty9x6MXVIuOuM
3OI6APXI5hN5KWv9BJoCIQDpC/slxsR34bjxenekjBRM9XNapUmWHjEg5WKTIZGh
BA==
-----END CERTIFICATE-----";
