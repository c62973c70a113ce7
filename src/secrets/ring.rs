//! Local keys.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use super::provider::{DataKey, KeyContext, KeyFuture, KeyProvider, KeyRefused};
use super::seal::{decrypt, encrypt, is_key_id};
use crate::error::{Error, Result};

/// Keys that the program holds itself: the first one writes, all read.
///
/// To change keys while all goes on: add the new key with [`and_reading`](KeyRing::and_reading) to every process; when all have it, make
/// it the first in every process; run [`Admin::rewrap_secrets`](crate::Admin::rewrap_secrets); then remove the old one.
///
/// ```
/// use lastprice::KeyRing;
///
/// # fn main() -> lastprice::Result<()> {
/// let keys = KeyRing::new("2026-11", [7; 32])?.and_reading("2025-01", [6; 32])?;
/// assert_eq!(format!("{keys:?}"), r#"KeyRing { ids: ["2026-11", "2025-01"] }"#);
///
/// // As LASTPRICE_KEYS has them: in base64, the first one writes.
/// let keys: KeyRing = "2026-11:4BFtUk8tVN2FsYUuPxZMvlwVtOlBVfyWo4n0nVTKPHc=".parse()?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct KeyRing {
    keys: Vec<(String, Zeroizing<[u8; 32]>)>,
}

impl KeyRing {
    /// The key that writes: its id (1 to 64 of `A-Z a-z 0-9 . _ -`), and 32 random bytes. Not a password: whoever reads the
    /// database could try all that people think of.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names `key_id` or `key`, and shows neither.
    pub fn new(id: impl Into<String>, key: [u8; 32]) -> Result<Self> {
        KeyRing { keys: Vec::new() }.and_reading(id, key)
    }

    /// Another key, which only reads.
    ///
    /// ```
    /// # fn main() -> lastprice::Result<()> {
    /// let keys = lastprice::KeyRing::new("new", [2; 32])?.and_reading("old", [1; 32])?;
    /// assert!(keys.and_reading("old", [3; 32]).is_err(), "a second one of this id");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names `key_id` or `key`: not well formed, or there already.
    pub fn and_reading(mut self, id: impl Into<String>, key: [u8; 32]) -> Result<Self> {
        let id = id.into();
        if !is_key_id(&id) {
            return Err(Error::invalid("key_id", "is not 1 to 64 of A-Z, a-z, 0-9, `.`, `_` and `-`"));
        }
        let key = Zeroizing::new(key);
        if key.iter().all(|byte| *byte == 0) {
            return Err(Error::invalid("key", "is all zeros"));
        }
        if self.keys.iter().any(|(other, _)| *other == id) {
            return Err(Error::invalid("key_id", "is there twice"));
        }
        if self.keys.iter().any(|(_, other)| *other == key) {
            return Err(Error::invalid("key", "is there twice, under two ids"));
        }
        self.keys.push((id, key));
        Ok(self)
    }

    /// The keys in `LASTPRICE_KEYS`: `2026-11:<base64>,2025-01:<base64>`. The first one writes, all read.
    ///
    /// ```no_run
    /// # fn main() -> lastprice::Result<()> {
    /// let keys = lastprice::KeyRing::from_env()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names `LASTPRICE_KEYS`.
    pub fn from_env() -> Result<Self> {
        KeyRing::from_env_if_set()?.ok_or_else(|| Error::invalid(VARIABLE, "is not set"))
    }

    pub(crate) fn from_env_if_set() -> Result<Option<Self>> {
        match std::env::var(VARIABLE) {
            Ok(text) if text.trim().is_empty() => Ok(None), // as some files set what is not set
            Ok(text) => parse(VARIABLE, &Zeroizing::new(text)).map(Some),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => Err(Error::invalid(VARIABLE, "is not a text")),
        }
    }

    fn key(&self, id: &str) -> std::result::Result<&[u8; 32], KeyRefused> {
        let found = self.keys.iter().find(|(known, _)| known == id);
        found.map(|(_, key)| &**key).ok_or(KeyRefused)
    }
}

/// `2026-11:<base64>,2025-01:<base64>`: the first one writes, all read.
///
/// # Errors
///
/// [`InvalidInput`](crate::ErrorKind::InvalidInput) that names `keys` and the entry, and shows neither.
impl FromStr for KeyRing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse("keys", text)
    }
}

impl KeyProvider for KeyRing {
    fn current_key_id(&self) -> String {
        self.keys.first().map_or_else(String::new, |(id, _)| id.clone())
    }

    fn wrap<'a>(
        &'a self,
        key_id: &'a str,
        key: &'a DataKey,
        context: &'a KeyContext,
    ) -> KeyFuture<'a, Vec<u8>> {
        Box::pin(async move {
            let data = context.associated_data(WRAPPED, key_id);
            Ok(encrypt(self.key(key_id)?, &data, key.expose())?)
        })
    }

    fn unwrap<'a>(
        &'a self,
        key_id: &'a str,
        wrapped: &'a [u8],
        context: &'a KeyContext,
    ) -> KeyFuture<'a, DataKey> {
        Box::pin(async move {
            let data = context.associated_data(WRAPPED, key_id);
            let opened = decrypt(self.key(key_id)?, &data, wrapped).ok_or(KeyRefused)?;
            let mut bytes = Zeroizing::new([0; 32]);
            if opened.len() != bytes.len() {
                return Err(KeyRefused.into());
            }
            bytes.copy_from_slice(&opened);
            Ok(DataKey::new(*bytes))
        })
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<&str> = self.keys.iter().map(|(id, _)| id.as_str()).collect();
        f.debug_struct("KeyRing").field("ids", &ids).finish()
    }
}

/// `field`: what an error names. The text may be of a configuration file, or of the environment.
fn parse(field: &'static str, text: &str) -> Result<KeyRing> {
    let mut ring = KeyRing { keys: Vec::new() };
    for (n, entry) in text.split(',').enumerate() {
        let wrong = |rule: &dyn fmt::Display| {
            Error::invalid(field, format_args!("is wrong in entry {}: {rule}", n + 1))
        };
        let (id, key) = entry.trim().split_once(':').ok_or_else(|| wrong(&"it is not `id:key`"))?;
        let key = from_base64(key).ok_or_else(|| wrong(&"the key is not the base64 of 32 bytes"))?;
        // The cause names the rule, and not the value.
        ring = ring.and_reading(id, *key).map_err(|e| wrong(&e))?;
    }
    Ok(ring)
}

fn from_base64(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    [&alphabet::STANDARD, &alphabet::URL_SAFE].into_iter().find_map(|letters| {
        let any = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let bytes = GeneralPurpose::new(letters, any).decode(text).ok().map(Zeroizing::new)?;
        let key: [u8; 32] = bytes.as_slice().try_into().ok()?;
        Some(Zeroizing::new(key))
    })
}

/// Keeps a wrapped key apart from a secret in its associated data.
const WRAPPED: &str = "lp1-key";

const VARIABLE: &str = "LASTPRICE_KEYS";
