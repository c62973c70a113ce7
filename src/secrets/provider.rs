//! Who keeps the keys: a trait that a key management service can implement.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use aes_gcm::aead::Generate;
use zeroize::Zeroize;

use crate::error::{Error, ErrorKind, Result};
use crate::id::TenantId;

/// What a [`KeyProvider`] answers with.
///
/// Its error may be any. [`KeyRefused`] is final ([`SecretUnavailable`](ErrorKind::SecretUnavailable)); every other one may go away
/// ([`Unavailable`](ErrorKind::Unavailable)). Neither its text nor its source is kept: they could hold a secret. A provider
/// that wants its failures known logs them itself.
pub type KeyFuture<'a, T> = Pin<
    Box<dyn Future<Output = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>> + Send + 'a>,
>;

/// Encrypts data keys, which encrypt the secrets: local keys ([`KeyRing`](crate::KeyRing)), or a key management service.
///
/// ```
/// use lastprice::{DataKey, KeyContext, KeyFuture, KeyProvider, KeyRing};
///
/// /// Holds a client of the service, and the local keys of what was written before there was one.
/// struct Kms {
///     before: KeyRing,
/// }
/// # type Answer<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
/// # impl Kms {
/// #     async fn encrypt(&self, _: &str, _: &[u8; 32], _: &KeyContext) -> Answer<Vec<u8>> { Ok(vec![]) }
/// #     async fn decrypt(&self, _: &str, _: &[u8], _: &KeyContext) -> Answer<DataKey> { Err("no".into()) }
/// # }
///
/// impl KeyProvider for Kms {
///     fn current_key_id(&self) -> String {
///         "alias-2026".to_owned()
///     }
///
///     fn wrap<'a>(&'a self, key_id: &'a str, key: &'a DataKey, context: &'a KeyContext) -> KeyFuture<'a, Vec<u8>> {
///         // kms.encrypt(key_id, key.expose(), encryption context: tenant and column)
///         Box::pin(self.encrypt(key_id, key.expose(), context))
///     }
///
///     fn unwrap<'a>(&'a self, key_id: &'a str, wrapped: &'a [u8], context: &'a KeyContext) -> KeyFuture<'a, DataKey> {
///         if key_id == "2026-11" {
///             return self.before.unwrap(key_id, wrapped, context); // until Admin::rewrap_secrets has been run
///         }
///         Box::pin(self.decrypt(key_id, wrapped, context))
///     }
/// }
///
/// let before = KeyRing::new("2026-11", [7; 32])?;
/// let keys = lastprice::SecretKeys::new(Kms { before });
/// # Ok::<(), lastprice::Error>(())
/// ```
pub trait KeyProvider: Send + Sync {
    /// The id of the key that new secrets are written under: 1 to 64 of `A-Z a-z 0-9 . _ -`. It is stored with each secret.
    fn current_key_id(&self) -> String;

    /// Encrypts a data key under the key of this id, bound to its context.
    fn wrap<'a>(
        &'a self,
        key_id: &'a str,
        key: &'a DataKey,
        context: &'a KeyContext,
    ) -> KeyFuture<'a, Vec<u8>>;

    /// Decrypts what [`wrap`](KeyProvider::wrap) made, with the same id and context. An id or a text that it does not know is
    /// [`KeyRefused`].
    fn unwrap<'a>(
        &'a self,
        key_id: &'a str,
        wrapped: &'a [u8],
        context: &'a KeyContext,
    ) -> KeyFuture<'a, DataKey>;
}

/// A [`KeyProvider`] cannot do it, and will not be able to: it has no such key, or the wrapped key was made for another context.
#[derive(Debug, Clone, Copy, Default, thiserror::Error)]
#[error("the key is unknown, or does not fit")]
pub struct KeyRefused;

/// What a secret belongs to: associated data, or the encryption context of a key management service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyContext {
    tenant: TenantId,
    column: &'static str,
}

impl KeyContext {
    pub(crate) fn new(tenant: TenantId, column: &'static str) -> Self {
        KeyContext { tenant, column }
    }

    /// The tenant.
    #[must_use]
    pub fn tenant_id(&self) -> TenantId {
        self.tenant
    }

    /// `paid_api_key` or `webhook_secret`.
    #[must_use]
    pub fn column(&self) -> &'static str {
        self.column
    }

    /// No part can hold a line feed, so no two contexts look the same.
    pub(super) fn associated_data(&self, version: &str, key_id: &str) -> Vec<u8> {
        format!("{version}\n{}\n{}\n{key_id}", self.tenant, self.column).into_bytes()
    }
}

/// The 32 bytes that encrypt one secret. Wiped when dropped; `Debug` does not show them.
pub struct DataKey([u8; 32]);

impl DataKey {
    /// A key that a provider has decrypted.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        DataKey(bytes)
    }

    /// The bytes, for a provider to encrypt.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    pub(super) fn random() -> Result<Self> {
        let bytes = <[u8; 32]>::try_generate().map_err(|_| no_randomness())?;
        Ok(DataKey(bytes))
    }
}

impl Drop for DataKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

pub(super) fn no_randomness() -> Error {
    Error::new(ErrorKind::Unavailable, "the system gives no random numbers")
}
