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

    /// [`from_url`](Target::from_url), for another one than the server itself.
    pub(crate) fn from_replica(url: &str) -> Result<Target> {
        Self::parse("replica", url)
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
mod tests;
