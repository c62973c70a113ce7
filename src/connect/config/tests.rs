use std::time::Duration;

use super::*;
use crate::error::ErrorKind;

fn target(url: &str) -> Target {
    Target::from_url(url).unwrap_or_else(|e| panic!("{url}: {e}"))
}

/// The error of a connection string whose secrets all start with `hunter`.
fn refused(url: &str) -> String {
    let error = Target::from_url(url).expect_err(url);
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some("url")), "{url}");
    assert!(std::error::Error::source(&error).is_none(), "{url}");
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("hunter"), "{url}: {shown}");
    error.to_string()
}

fn from_vars(vars: &[(&str, &str)]) -> Result<Target> {
    Target::from_vars(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
}

#[test]
fn url_forms() {
    for scheme in ["postgres", "postgresql"] {
        let t = target(&format!("{scheme}://app:s%40c%2Fret@db.example:6432/shop"));
        assert_eq!(t.describe(), "db.example:6432/shop as app");
        assert_eq!(t.pg.get_password(), Some(&b"s@c/ret"[..]));
        assert_eq!((t.ssl, t.root_cert), (SslMode::Prefer, None));
        assert_eq!(t.pg.get_ssl_mode(), DriverSslMode::Prefer);
    }
    assert_eq!(target("postgres://app@db/shop").describe(), "db:5432/shop as app");
    assert_eq!(target("postgres://app@db").describe(), "db:5432/app as app");
    assert_eq!(target("postgres://db/shop\n").describe(), "db:5432/shop");
    assert_eq!(target("postgres://app@[::1]:5433/shop").describe(), "[::1]:5433/shop as app");
    assert_eq!(target("postgres://app@a:1,b/shop").describe(), "a:1,b:5432/shop as app");
    assert_eq!(
        target("postgres:///shop?host=/run/pg&user=app&port=5433").describe(),
        "/run/pg:5433/shop as app"
    );
}

#[test]
fn url_options_pass_through() {
    let t = target(
        "postgres://app@db/shop?application_name=a%20b@c&connect_timeout=7&sslmode=require&\
         options=-c%20work_mem%3D1MB%26&target_session_attrs=read-write",
    );
    assert_eq!(t.pg.get_application_name(), Some("a b@c"));
    assert_eq!(t.pg.get_connect_timeout(), Some(&Duration::from_secs(7)));
    assert_eq!(t.pg.get_options(), Some("-c work_mem=1MB&"));
    assert_eq!(t.pg.get_ssl_mode(), DriverSslMode::Require);
    // No login before the host, though an `@` follows.
    let t = target("postgres://db/shop?application_name=me@here&user=app");
    assert_eq!(t.describe(), "db:5432/shop as app");
    assert_eq!(t.pg.get_application_name(), Some("me@here"));
}

#[test]
fn special_characters_in_an_url_password() {
    for (written, password) in
        [("a%3Fb%26c", "a?b&c"), ("a?b&c=d", "a?b&c=d"), ("a/b", "a/b"), ("a:b#", "a:b#")]
    {
        let t = target(&format!("postgres://app:{written}@db/shop?sslmode=disable"));
        assert_eq!(t.pg.get_password(), Some(password.as_bytes()), "{written}");
        assert_eq!(t.describe(), "db:5432/shop as app", "{written}");
    }
    assert_eq!(target("postgres://app:%ff@db/shop").pg.get_password(), Some(&[0xff][..]));
}

#[test]
fn every_sslmode() {
    for mode in SslMode::ALL {
        assert_eq!(mode.to_string().parse::<SslMode>().unwrap(), mode);
        let driver = match mode {
            SslMode::Disable => DriverSslMode::Disable,
            SslMode::Prefer => DriverSslMode::Prefer,
            _ => DriverSslMode::Require,
        };
        for text in [format!("postgres://app@db/shop?sslmode={mode}"), format!("host=db sslmode = '{mode}'")]
        {
            let t = target(&text);
            assert_eq!((t.ssl, t.pg.get_ssl_mode()), (mode, driver), "{text}");
        }
    }
    assert!(refused("postgres://app:hunter2@db/shop?sslmode=hunter").contains("`sslmode`"));
    assert!(refused("host=db sslmode=Require").contains("`sslmode`"));
    assert_eq!("allow".parse::<SslMode>().unwrap_err().field(), Some("sslmode"));
}

#[test]
fn root_certificates() {
    let root = |text: &str| {
        let t = target(text);
        (t.ssl, t.root_cert)
    };
    let file = Some(PathBuf::from("/etc/my ca.pem"));
    assert_eq!(
        root("postgres://db/x?sslmode=verify%2Dfull&sslrootcert=%2Fetc%2Fmy%20ca.pem"),
        (SslMode::VerifyFull, file.clone())
    );
    assert_eq!(
        root("postgres://db/x?sslrootcert=/etc/my%20ca.pem&sslmode=verify-ca"),
        (SslMode::VerifyCa, file.clone())
    );
    assert_eq!(
        root(r"host=db sslrootcert='/etc/my ca.pem' sslmode=require"),
        (SslMode::Require, file.clone())
    );
    assert_eq!(root(r"host=db sslrootcert=/etc/my\ ca.pem"), (SslMode::Prefer, file));
    assert_eq!(root("postgres://db/x?sslrootcert=&sslmode=verify-full"), (SslMode::VerifyFull, None));
    assert_eq!(root("postgres://db/x?sslrootcert=system"), (SslMode::VerifyFull, None));
    assert_eq!(root("host=db sslrootcert=system sslmode=verify-full"), (SslMode::VerifyFull, None));
    assert!(refused("postgres://db/x?sslrootcert=system&sslmode=require").contains("sslrootcert=system"));
}

#[test]
fn unix_sockets_never_use_tls() {
    for text in [
        "postgres://app@%2Ftmp%2Fx/shop?sslmode=verify-full",
        "host=/tmp/x dbname=shop user=app sslmode=verify-full",
    ] {
        let t = target(text);
        assert_eq!(t.describe(), "/tmp/x:5432/shop as app");
        assert_eq!((t.ssl, t.pg.get_ssl_mode()), (SslMode::VerifyFull, DriverSslMode::Disable));
    }
    assert_eq!(target("host=/tmp/x,db sslmode=require").pg.get_ssl_mode(), DriverSslMode::Require);
}

#[test]
fn key_value_form() {
    let t =
        target(r"host = db port=6432 user=app password='a b\'c\\d=' dbname = 'shop' application_name=x\ y");
    assert_eq!(t.describe(), "db:6432/shop as app");
    assert_eq!(t.pg.get_password(), Some(&br"a b'c\d="[..]));
    assert_eq!(t.pg.get_application_name(), Some("x y"));
    assert_eq!(target("host=db password='sslmode=disable'").ssl, SslMode::Prefer);
    assert_eq!(target("host=db password=''").pg.get_password(), Some(&b""[..]));
    assert_eq!(target("host=a,b port=1,2 user=app").describe(), "a:1,b:2/app as app");
    for broken in
        ["host=db password='hunter", "host=db password=hunter 2 user=x", "host=db password=", "hunter2"]
    {
        refused(broken);
    }
}

#[test]
fn hosts_addresses_and_ports() {
    let t = target("hostaddr=127.0.0.1 user=app sslmode=verify-full");
    assert_eq!(t.pg.get_hosts(), [Host::Tcp("127.0.0.1".into())]);
    assert_eq!(target("host=db hostaddr=127.0.0.1").pg.get_hosts(), [Host::Tcp("db".into())]);
    for none in
        ["", "user=app", "host=''", "postgres:///shop", "postgres://app:hunter2@/shop", "postgres://app@:1/x"]
    {
        assert!(refused(none).contains("`host`"), "{none}");
    }
    assert!(refused("host=a,b port=1,2,3").contains("`port`"));
    assert!(refused("host=a,b hostaddr=::1").contains("`hostaddr`"));
    assert!(refused("host=a sslnegotiation=direct").contains("`sslnegotiation=direct`"));
    assert!(target("host=a sslnegotiation=direct sslmode=require").root_cert.is_none());
}

#[test]
fn bad_options_are_named_without_their_value() {
    for (key, value) in
        [("sslcert", "/hunter"), ("sslkey", "/hunter"), ("gssencmode", "hunter"), ("ssl_mode", "hunter")]
    {
        assert!(
            refused(&format!("postgres://app:hunter2@db/shop?{key}={value}")).contains(&format!("`{key}`"))
        );
        assert!(refused(&format!("host=db {key}={value} password=hunter2")).contains(&format!("`{key}`")));
    }
    for key in ["port", "connect_timeout", "channel_binding", "hostaddr", "keepalives"] {
        assert!(refused(&format!("postgres://app@db/shop?{key}=hunter")).contains(&format!("`{key}`")));
        assert!(refused(&format!("host=db password=hunter2 {key}=hunter")).contains(&format!("`{key}`")));
    }
    assert!(refused("host=db password=hunter2 sslcert=x").contains("`sslcert`"));
    assert!(refused("postgres://app:hunter2@db:hunter/shop").contains("port"));
}

#[test]
fn errors_never_hold_a_part_of_the_password() {
    for url in [
        "postgre://app:hunter2@db/shop",
        "jdbc:postgresql://app:hunter2@db/shop?sslmode=require",
        "postgres://app:pass@hunter2@db/shop",
        "postgres://app:pass@hunter/2@db/shop",
        "postgres://app:pass@x?hunter=2@db/shop",
        "postgres://app:a/b?hunter=2@db/shop",
        "postgres://db/shop?password=a&hunter=2",
        "postgres://db/shop?password=a&hunter",
        "postgres://db/shop?hunter%ff=2",
        "postgres://db/shop?hunter%20=2",
        "postgres://app:hunter2",
        "host=db password=pass hunter=2",
        "host=db password=pass hunter 2=3",
    ] {
        refused(url);
    }
}

#[test]
fn the_password_is_never_shown() {
    let t = target("postgres://app:hunter2@db/shop?options=-c%20my.key%3Dhunter3");
    for shown in [format!("{t:?}"), format!("{t:#?}"), t.describe()] {
        assert!(shown.contains("db:5432/shop as app") && !shown.contains("hunter"), "{shown}");
    }
}

const VARS: [(&str, &str); 4] =
    [("DB_HOST", "db"), ("DB_NAME", "shop"), ("DB_USER", "app"), ("DB_PASSWORD", "hunter 2'")];

#[test]
fn environment() {
    let t = from_vars(&VARS).unwrap();
    assert_eq!((t.describe().as_str(), t.ssl), ("db:5432/shop as app", SslMode::Prefer));
    assert_eq!(t.pg.get_password(), Some(&b"hunter 2'"[..]));
    let tls = [("DB_PORT", "6432"), ("DB_SSLMODE", "verify-full"), ("DB_SSLROOTCERT", "/ca.pem")];
    let t = from_vars(&[&VARS[..], &tls].concat()).unwrap();
    assert_eq!((t.describe().as_str(), t.ssl), ("db:6432/shop as app", SslMode::VerifyFull));
    assert_eq!((t.root_cert, t.pg.get_ssl_mode()), (Some("/ca.pem".into()), DriverSslMode::Require));
    let t = from_vars(&[&VARS[..], &[("DATABASE_URL", "postgres://u@h/d")]].concat()).unwrap();
    assert_eq!(t.describe(), "h:5432/d as u");
    let t = from_vars(&[&VARS[..], &[("DATABASE_URL", ""), ("DB_PORT", "")]].concat()).unwrap();
    assert_eq!(t.describe(), "db:5432/shop as app");
    let socket = [("DB_HOST", "/tmp/x"), VARS[1], VARS[2], VARS[3], ("DB_SSLMODE", "require")];
    assert_eq!(from_vars(&socket).unwrap().pg.get_ssl_mode(), DriverSslMode::Disable);
}

#[test]
fn environment_errors_name_the_variable() {
    let field = |vars: &[(&str, &str)]| {
        let error = from_vars(vars).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter"), "{error:?}");
        error.field().unwrap()
    };
    assert_eq!(field(&[]), "DATABASE_URL");
    assert!(from_vars(&[]).unwrap_err().to_string().contains("`DB_HOST`"));
    for missing in 1..3 {
        let mut vars = VARS;
        vars[missing].1 = "";
        assert_eq!(field(&vars), VARS[missing].0);
    }
    for (name, value) in [
        ("DB_PORT", "hunter"),
        ("DB_PORT", "65536"),
        ("DB_SSLMODE", "hunter"),
        ("DATABASE_URL", "postgres://app:hunter2@db/shop?sslkey=hunter"),
    ] {
        assert_eq!(field(&[&VARS[..], &[(name, value)]].concat()), name);
    }
}
