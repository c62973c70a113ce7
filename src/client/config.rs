//! Where the database is and how to reach it: connection strings and environment variables.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode as DriverSslMode, SslNegotiation};

use crate::error::{Error, Result};

/// Whether a connection uses TLS and what is checked of the server: libpq's `sslmode`.
///
/// | mode | TLS | a certificate is checked for | protects from |
/// |---|---|---|---|
/// | `disable` | never | | nothing |
/// | `prefer` | if the server offers it | nothing | nothing that is active |
/// | `require` | always | nothing; with an `sslrootcert`, its chain | eavesdropping |
/// | `verify-ca` | always | its chain to a trusted root | an impostor, if only you get certificates from that root |
/// | `verify-full` | always | its chain, and that it names the host | an impostor |
///
/// The roots are the PEM file that `sslrootcert` names, otherwise those of the operating system. As in libpq, a
/// connection over a Unix socket never uses TLS, and `sslrootcert=system` implies `verify-full`.
///
/// ```
/// use lastprice::SslMode;
///
/// assert_eq!("verify-full".parse::<SslMode>()?, SslMode::VerifyFull);
/// assert_eq!(SslMode::default().to_string(), "prefer");
/// # Ok::<(), lastprice::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum SslMode {
    /// `disable`: plain text only.
    Disable,
    /// `prefer`: TLS if the server offers it, plain text otherwise. The certificate is not checked.
    #[default]
    Prefer,
    /// `require`: TLS or an error. The certificate is checked only if an `sslrootcert` was given, as by `verify-ca`.
    Require,
    /// `verify-ca`: TLS with a certificate that a trusted root has signed, for whatever host.
    VerifyCa,
    /// `verify-full`: TLS with a certificate that a trusted root has signed for the host that was asked for.
    VerifyFull,
}

impl SslMode {
    const ALL: [SslMode; 5] =
        [SslMode::Disable, SslMode::Prefer, SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull];
    const RULE: &str = "is not one of `disable`, `prefer`, `require`, `verify-ca` and `verify-full`";

    fn as_str(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for SslMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mode = SslMode::ALL.into_iter().find(|mode| mode.as_str() == text);
        mode.ok_or_else(|| Error::invalid("sslmode", SslMode::RULE))
    }
}

/// A server, a database and a login. Neither `Debug` nor [`describe`](Target::describe) shows the password.
#[derive(Clone)]
pub(crate) struct Target {
    /// What the driver needs. Its `ssl_mode` is derived from `ssl`: build a new `Target` to change that.
    pub(crate) pg: Config,
    pub(crate) ssl: SslMode,
    /// The PEM file of trusted roots; without one, those of the operating system.
    pub(crate) root_cert: Option<PathBuf>,
}

impl Target {
    /// Reads `postgres://…`, `postgresql://…` or `key=value …`, as libpq does.
    pub(crate) fn from_url(url: &str) -> Result<Target> {
        Self::parse("url", url)
    }

    /// The builder's options over the URL's.
    pub(crate) fn with_ssl(self, mode: Option<SslMode>, root_cert: Option<PathBuf>) -> Result<Target> {
        let root_cert = root_cert.or(self.root_cert).map(|path| path.to_string_lossy().into_owned());
        Target::new("ssl_mode", self.pg, TlsOptions { mode: mode.or(Some(self.ssl)), root_cert })
    }

    /// Reads `DATABASE_URL`, or else `DB_HOST`, `DB_PORT` (5432), `DB_NAME`, `DB_USER`, `DB_PASSWORD` and the
    /// optional `DB_SSLMODE` and `DB_SSLROOTCERT`. An empty variable counts as absent.
    pub(crate) fn from_env() -> Result<Target> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// `host:port/database as user`, for log lines.
    pub(crate) fn describe(&self) -> String {
        let ports = self.pg.get_ports();
        let place = |(i, host): (usize, &Host)| {
            let port = ports.get(i).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
            match host {
                Host::Tcp(name) if name.contains(':') => format!("[{name}]:{port}"),
                Host::Tcp(name) => format!("{name}:{port}"),
                #[cfg(unix)]
                Host::Unix(directory) => format!("{}:{port}", directory.display()),
            }
        };
        let hosts: Vec<String> = self.pg.get_hosts().iter().enumerate().map(place).collect();
        let user = self.pg.get_user();
        let database = self.pg.get_dbname().or(user).unwrap_or_default();
        let login = user.map(|user| format!(" as {user}")).unwrap_or_default();
        format!("{}/{database}{login}", hosts.join(","))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Target> {
        let optional = |name: &'static str| var(name).filter(|value| !value.is_empty());
        let required = |name: &'static str| {
            optional(name).ok_or_else(|| Error::invalid(name, "is not set, or is empty"))
        };
        if let Some(url) = optional("DATABASE_URL") {
            return Self::parse("DATABASE_URL", &url);
        }
        let Some(host) = optional("DB_HOST") else {
            return Err(Error::invalid("DATABASE_URL", "is not set, and neither is `DB_HOST`"));
        };
        let port = match optional("DB_PORT") {
            Some(port) => port.parse().map_err(|_| Error::invalid("DB_PORT", "is not a port number"))?,
            None => DEFAULT_PORT,
        };
        let mut pg = Config::new();
        pg.host(host).port(port).dbname(required("DB_NAME")?).user(required("DB_USER")?);
        if let Some(password) = optional("DB_PASSWORD") {
            pg.password(password);
        }
        let mut tls = TlsOptions::default();
        if let Some(mode) = optional("DB_SSLMODE") {
            tls.mode = Some(mode.parse().map_err(|_| Error::invalid("DB_SSLMODE", SslMode::RULE))?);
        }
        tls.root_cert = optional("DB_SSLROOTCERT");
        Self::new("DB_HOST", pg, tls)
    }

    fn parse(field: &'static str, text: &str) -> Result<Target> {
        let text = text.trim();
        let mut options = Options { field, tls: TlsOptions::default(), may_name: true };
        let rest = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"));
        let pg = match rest {
            Some(rest) => options.read_url(rest)?,
            None => options.read_pairs(text)?,
        };
        Self::new(field, pg, options.tls)
    }

    fn new(field: &'static str, mut pg: Config, tls: TlsOptions) -> Result<Target> {
        let (ssl, root_cert) = tls.resolve(field)?;
        if pg.get_hosts().is_empty() {
            // The driver wants a name for the handshake, and checks an address against the certificate's.
            for address in pg.get_hostaddrs().to_vec() {
                pg.host(address.to_string());
            }
        }
        let (hosts, addresses, ports) =
            (pg.get_hosts().len(), pg.get_hostaddrs().len(), pg.get_ports().len());
        if hosts == 0 || (addresses == 0 && pg.get_hosts().contains(&Host::Tcp(String::new()))) {
            return Err(Error::invalid(field, "names no `host`"));
        }
        if addresses != 0 && addresses != hosts {
            return Err(Error::invalid(field, "has a `hostaddr` list that is not as long as that of `host`"));
        }
        if ports > 1 && ports != hosts {
            return Err(Error::invalid(field, "has a `port` list that is not as long as that of `host`"));
        }
        let weak = matches!(ssl, SslMode::Disable | SslMode::Prefer);
        if weak && pg.get_ssl_negotiation() == SslNegotiation::Direct {
            return Err(Error::invalid(
                field,
                "needs an `sslmode` of `require` or more for `sslnegotiation=direct`",
            ));
        }
        // PostgreSQL has no TLS over a Unix socket; libpq ignores `sslmode` there.
        let local = addresses == 0 && !pg.get_hosts().iter().any(|host| matches!(host, Host::Tcp(_)));
        pg.ssl_mode(match ssl {
            _ if local => DriverSslMode::Disable,
            SslMode::Disable => DriverSslMode::Disable,
            SslMode::Prefer => DriverSslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => DriverSslMode::Require,
        });
        Ok(Target { pg, ssl, root_cert })
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("at", &self.describe())
            .field("ssl", &self.ssl)
            .field("root_cert", &self.root_cert)
            .finish_non_exhaustive()
    }
}

const DEFAULT_PORT: u16 = 5432;

/// libpq's options that the driver does not have: an error may name them whatever stands around them.
const UNSUPPORTED: &str = "
    client_encoding fallback_application_name gssdelegation gssencmode gsslib keepalives_count
    krbsrvname max_protocol_version min_protocol_version passfile replication require_auth requirepeer
    requiressl scram_client_key scram_server_key service servicefile ssl ssl_max_protocol_version
    ssl_min_protocol_version sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey sslkeylogfile
    sslpassword sslsni
";

#[derive(Default)]
struct TlsOptions {
    mode: Option<SslMode>,
    root_cert: Option<String>,
}

impl TlsOptions {
    fn resolve(self, field: &'static str) -> Result<(SslMode, Option<PathBuf>)> {
        match (self.root_cert.as_deref(), self.mode) {
            (Some("system"), None | Some(SslMode::VerifyFull)) => Ok((SslMode::VerifyFull, None)),
            (Some("system"), Some(_)) => Err(Error::invalid(
                field,
                "has `sslrootcert=system`, which needs the `sslmode` `verify-full`",
            )),
            (path, mode) => Ok((mode.unwrap_or_default(), path.map(PathBuf::from))),
        }
    }
}

/// The options of one connection string while it is read.
struct Options {
    field: &'static str,
    tls: TlsOptions,
    /// Whether an error may name an option that nobody knows: what stands after a password may be its second half.
    may_name: bool,
}

impl Options {
    /// What follows `postgres://`. The driver parses it, without the options that it does not know.
    fn read_url(&mut self, rest: &str) -> Result<Config> {
        let (login, rest) = rest.split_at(login_len(rest));
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        if place.contains('@') {
            return Err(self
                .invalid("has a second `@`: inside a user, password or database name it is written `%40`"));
        }
        self.may_name = !query.contains('@');
        let mut url = format!("postgres://{login}{place}?");
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| self.invalid("has an option without a value"))?;
            let key = percent_decode(key).ok_or_else(|| self.invalid("has an option that is not UTF-8"))?;
            let value = percent_decode(value);
            let value = value.ok_or_else(|| self.invalid("has an option with a value that is not UTF-8"))?;
            if self.is_for_driver(&key, &value)? {
                // The driver takes the first `@`, wherever it stands, for the end of the login.
                url.push_str(&pair.replace('@', "%40"));
                url.push('&');
            }
        }
        let rule =
            "has an invalid user, host, port or database name (special characters are percent-encoded)";
        url.parse().map_err(|_| self.invalid(rule))
    }

    /// `key=value` pairs, values quoted with `'` where they hold a space, `\` before a `'` or `\`.
    fn read_pairs(&mut self, text: &str) -> Result<Config> {
        const RULE: &str =
            "is neither a `postgres://` URL nor `key=value` pairs (a value with a space needs quotes)";
        let mut kept = String::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (key, after) = rest.split_once('=').ok_or_else(|| self.invalid(RULE))?;
            let key = key.trim_end();
            if !is_name(key) {
                return Err(self.invalid(RULE));
            }
            let (value, after) = read_value(after.trim_start()).ok_or_else(|| self.invalid(RULE))?;
            if self.is_for_driver(key, &value)? {
                kept.push_str(&quoted(key, &value));
            }
            rest = after.trim_start();
        }
        kept.parse().map_err(|_| self.invalid(RULE))
    }

    /// Keeps the TLS options and checks every other one by itself, so that an error can name it: the driver's
    /// own errors may quote what they could not read.
    fn is_for_driver(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "sslmode" => {
                let mode = value.parse();
                self.tls.mode =
                    Some(mode.map_err(|_| self.invalid(format!("has an `sslmode` that {}", SslMode::RULE)))?);
                return Ok(false);
            }
            "sslrootcert" => {
                self.tls.root_cert = Some(value.to_owned()).filter(|path| !path.is_empty());
                return Ok(false);
            }
            "password" => self.may_name = false,
            _ if UNSUPPORTED.split_whitespace().any(|option| option == key) => {
                return Err(self.invalid(format!("has the option `{key}`, which is not supported")));
            }
            _ => {}
        }
        let name_only = quoted(if is_name(key) { key } else { "-" }, value);
        let Err(error) = name_only.parse::<Config>() else { return Ok(true) };
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        Err(match (cause.starts_with("unknown option"), self.may_name && is_name(key)) {
            (false, _) => self.invalid(format!("has an invalid value for `{key}`")),
            (true, true) => self.invalid(format!("has the unknown option `{key}`")),
            (true, false) => {
                self.invalid("has an unknown option (or an unescaped character in its password)")
            }
        })
    }

    fn invalid(&self, rule: impl fmt::Display) -> Error {
        Error::invalid(self.field, rule)
    }
}

/// How much of a URL is `user:password@`: up to the first `@`, unless that stands in an option's value.
fn login_len(rest: &str) -> usize {
    let Some(at) = rest.find('@') else { return 0 };
    let path = rest.find('/').unwrap_or(at);
    let query = rest.find('?').unwrap_or(at);
    if path < query && query < at { 0 } else { at + 1 }
}

fn is_name(key: &str) -> bool {
    let mut bytes = key.bytes();
    matches!(key.len(), 1..=40) && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// The value at the start of `text`, unescaped, and what follows it.
fn read_value(text: &str) -> Option<(String, &str)> {
    let (is_quoted, text) = text.strip_prefix('\'').map_or((false, text), |text| (true, text));
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' if is_quoted => return Some((value, &text[at + 1..])),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ if !is_quoted && c.is_whitespace() => return Some((value, &text[at..])),
            _ => value.push(c),
        }
    }
    (!is_quoted && !value.is_empty()).then_some((value, ""))
}

fn quoted(key: &str, value: &str) -> String {
    format!("{key}='{}' ", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// `None` if the result is not UTF-8. What is no `%` and two hexadecimal digits stays, as the driver has it.
fn percent_decode(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16)).map(|d| d as u8);
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(high << 4 | low);
                at += 3;
            }
            (byte, ..) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
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
        Target::from_vars(|name| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
        })
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
            for text in
                [format!("postgres://app@db/shop?sslmode={mode}"), format!("host=db sslmode = '{mode}'")]
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
        let t = target(
            r"host = db port=6432 user=app password='a b\'c\\d=' dbname = 'shop' application_name=x\ y",
        );
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
        for none in [
            "",
            "user=app",
            "host=''",
            "postgres:///shop",
            "postgres://app:hunter2@/shop",
            "postgres://app@:1/x",
        ] {
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
                refused(&format!("postgres://app:hunter2@db/shop?{key}={value}"))
                    .contains(&format!("`{key}`"))
            );
            assert!(
                refused(&format!("host=db {key}={value} password=hunter2")).contains(&format!("`{key}`"))
            );
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
}
