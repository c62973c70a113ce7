//! Secrets at rest: encrypted before they leave the program, with what they belong to as associated data.

mod pgp;
mod provider;
mod ring;
mod seal;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

pub use provider::{DataKey, KeyContext, KeyFuture, KeyProvider, KeyRefused};
pub use ring::KeyRing;

use crate::error::{Error, ErrorKind, Result};
use seal::{Sealed, VERSION, decrypt, encrypt, is_key_id};

/// What encrypts and decrypts the secrets of tenants: a [`KeyProvider`], and, for rows of the original schema, a passphrase.
///
/// ```
/// use lastprice::{KeyRing, SecretKeys};
///
/// # fn main() -> lastprice::Result<()> {
/// let keys = SecretKeys::from(KeyRing::new("2026-11", [7; 32])?).legacy_passphrase("what pgp_sym_encrypt was given");
/// # Ok(()) }
/// ```
#[derive(Clone)]
#[must_use]
pub struct SecretKeys {
    provider: Arc<dyn KeyProvider>,
    legacy: Option<SecretString>,
    limit: Duration,
}

impl SecretKeys {
    /// The keys of a provider.
    pub fn new(provider: impl KeyProvider + 'static) -> Self {
        SecretKeys { provider: Arc::new(provider), legacy: None, limit: Duration::from_secs(5) }
    }

    /// Also reads what `pgp_sym_encrypt` wrote with this passphrase. It is used here only, and never sent to the server.
    pub fn legacy_passphrase(mut self, passphrase: impl Into<SecretString>) -> Self {
        self.legacy = Some(passphrase.into());
        self
    }

    /// How long the provider may take for one key, before the call fails with [`Timeout`](ErrorKind::Timeout). Default: 5 s.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The text to store.
    pub(crate) async fn seal(&self, context: &KeyContext, secret: &SecretString) -> Result<String> {
        let key_id = self.provider.current_key_id();
        if !is_key_id(&key_id) {
            let rule =
                "the key provider's current key has no valid id: 1 to 64 of A-Z, a-z, 0-9, `.`, `_` and `-`";
            return Err(unavailable(rule));
        }
        let key = DataKey::random()?;
        let wrapped = self.in_time(self.provider.wrap(&key_id, &key, context), &key_id).await?;
        let associated = context.associated_data(VERSION, &key_id);
        let secret = encrypt(key.expose(), &associated, secret.expose_secret().as_bytes())?;
        let text = Sealed { key_id, wrapped, secret }.text();
        // What could not be read again is not to be written.
        if Sealed::parse(&text).is_none() {
            return Err(unavailable("the key provider's wrapped key is too long"));
        }
        Ok(text)
    }

    /// The secret of a stored text.
    pub(crate) async fn open(&self, context: &KeyContext, stored: &str) -> Result<SecretString> {
        match Stored::of(stored) {
            Stored::Sealed => self.unseal(context, stored).await,
            Stored::Legacy => {
                let passphrase = self.legacy.as_ref().ok_or_else(|| {
                    unavailable(
                        "a secret was encrypted by pgp_sym_encrypt, and there is no passphrase to read it",
                    )
                })?;
                // As many rounds as the text says: not where other tasks wait.
                let (stored, passphrase) = (stored.to_owned(), passphrase.clone());
                let opened = tokio::task::spawn_blocking(move || pgp::open(&stored, &passphrase)).await;
                opened.unwrap_or_else(|_| Err(Error::internal("reading a secret ended early")))
            }
            Stored::Plain => Err(unavailable("a secret is stored unencrypted: run Admin::rewrap_secrets")),
        }
    }

    /// The id of the key that writes now.
    pub(crate) fn current_key_id(&self) -> String {
        self.provider.current_key_id()
    }

    /// Whether a stored text is under the key that writes now.
    pub(crate) fn is_current(&self, stored: &str) -> bool {
        Sealed::parse(stored).is_some_and(|sealed| sealed.key_id == self.provider.current_key_id())
    }

    async fn unseal(&self, context: &KeyContext, stored: &str) -> Result<SecretString> {
        let sealed = Sealed::parse(stored).ok_or_else(|| unavailable("a stored secret is damaged"))?;
        let does_not_open = || does_not_open(&sealed.key_id);
        let asking = self.provider.unwrap(&sealed.key_id, &sealed.wrapped, context);
        let key = self.in_time(asking, &sealed.key_id).await?;
        let associated = context.associated_data(VERSION, &sealed.key_id);
        let opened = decrypt(key.expose(), &associated, &sealed.secret).ok_or_else(does_not_open)?;
        std::str::from_utf8(&opened).map(SecretString::from).map_err(|_| does_not_open())
    }

    /// The provider's own error is dropped on purpose: nobody knows what its text holds.
    async fn in_time<T>(&self, asking: KeyFuture<'_, T>, key_id: &str) -> Result<T> {
        match tokio::time::timeout(self.limit, asking).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(e)) if e.is::<KeyRefused>() => Err(does_not_open(key_id)),
            Ok(Err(_)) => Err(Error::new(ErrorKind::Unavailable, "the key provider failed")),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "the key provider did not answer in time")),
        }
    }
}

impl From<KeyRing> for SecretKeys {
    fn from(ring: KeyRing) -> Self {
        SecretKeys::new(ring)
    }
}

impl fmt::Debug for SecretKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKeys")
            .field("legacy", &self.legacy.is_some())
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// What a column holds, by its first characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Ours, or damaged.
    Sealed,
    /// By `pgp_sym_encrypt`.
    Legacy,
    /// Neither.
    Plain,
}

impl Stored {
    pub(crate) fn of(stored: &str) -> Self {
        if stored.starts_with("lp1:") {
            Stored::Sealed
        } else if pgp::looks_like(stored) {
            Stored::Legacy
        } else {
            Stored::Plain
        }
    }
}

/// What a client has of keys. Empty for a scope that was made without a client.
#[derive(Default)]
pub(crate) struct Vault {
    /// The tenants' secrets.
    pub(crate) keys: Option<SecretKeys>,
    /// The platform's own key.
    pub(crate) paid_api_key: Option<SecretString>,
}

impl Vault {
    pub(crate) fn keys(&self) -> Result<&SecretKeys> {
        self.keys.as_ref().ok_or_else(|| {
            unavailable("no key for secrets is configured: `ClientBuilder::keys`, or LASTPRICE_KEYS")
        })
    }
}

pub(crate) fn unavailable(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::SecretUnavailable, message)
}

fn does_not_open(key_id: &str) -> Error {
    unavailable(format!(
        "a secret under key `{key_id}` does not open: that key is missing or another one, or the text was changed, or made for \
         another tenant or column"
    ))
}
