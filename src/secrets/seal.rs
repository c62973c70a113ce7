//! The stored text, and the cryptography of it: pure.
//!
//! `lp1:<key id>:<wrapped data key>:<nonce, ciphertext and tag>`, the last two in base64url without padding. AES-256-GCM with a
//! random nonce of 12 bytes and a data key that encrypts one text only. Associated data: version, tenant, column and key
//! id, so that a text that is moved to another tenant or column does not open.

use aes_gcm::aead::{Aead, Generate, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use super::provider::no_randomness;
use crate::error::{Error, Result};

/// The first version of the format.
pub(super) const VERSION: &str = "lp1";

/// More than any sealed text can have, however long a service's wrapped keys are.
const LONGEST: usize = 65_536;

const NONCE: usize = 12;

/// A stored text, taken apart.
#[derive(PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) key_id: String,
    pub(super) wrapped: Vec<u8>,
    pub(super) secret: Vec<u8>,
}

impl Sealed {
    pub(super) fn parse(stored: &str) -> Option<Self> {
        if stored.len() > LONGEST {
            return None;
        }
        let mut parts = stored.split(':');
        let (version, key_id) = (parts.next()?, parts.next()?);
        let (wrapped, secret) = (parts.next()?, parts.next()?);
        if version != VERSION || !is_key_id(key_id) || parts.next().is_some() {
            return None;
        }
        Some(Sealed {
            key_id: key_id.to_owned(),
            wrapped: URL_SAFE_NO_PAD.decode(wrapped).ok()?,
            secret: URL_SAFE_NO_PAD.decode(secret).ok()?,
        })
    }

    pub(super) fn text(&self) -> String {
        let (wrapped, secret) = (URL_SAFE_NO_PAD.encode(&self.wrapped), URL_SAFE_NO_PAD.encode(&self.secret));
        format!("{VERSION}:{}:{wrapped}:{secret}", self.key_id)
    }
}

pub(super) fn is_key_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Nonce, ciphertext and tag.
pub(super) fn encrypt(key: &[u8; 32], associated: &[u8], secret: &[u8]) -> Result<Vec<u8>> {
    let nonce = <[u8; NONCE]>::try_generate().map_err(|_| no_randomness())?;
    let payload = Payload { msg: secret, aad: associated };
    let sealed = Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key))
        .encrypt(&Nonce::from(nonce), payload)
        .map_err(|_| Error::internal("a secret cannot be encrypted"))?;
    Ok([&nonce[..], &sealed].concat())
}

/// None: it was made with another key or for another place, or it was changed.
pub(super) fn decrypt(key: &[u8; 32], associated: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE>()?;
    let payload = Payload { msg: sealed, aad: associated };
    let cipher = Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key));
    cipher.decrypt(&Nonce::from(*nonce), payload).ok().map(Zeroizing::new)
}
