//! Verified webhooks: who sent this body, and is it the one that was sent?
//!
//! A [`Verifier`] holds the secrets that a sender signs with, and knows two schemes:
//!
//! - [Standard Webhooks](Verifier::standard): headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. A secret is
//!   `whsec_` with base64, or else the bytes of its text.
//! - [plain `sha256=`](Verifier::sha256): one header with the HMAC-SHA256 of the body, in hexadecimal. The secret is used **as
//!   it is**, `whsec_` included: a sender's library that decodes it signs something else.
//!
//! What comes out is a [`Delivery`], which cannot be had otherwise; [`Webhooks::receive`](crate::Webhooks::receive) takes
//! nothing else. Nothing here reads a clock, a file or a network.
//!
//! ```
//! use lastprice::webhook::Verifier;
//! use lastprice::{ErrorKind, chrono::DateTime, secrecy::SecretString};
//!
//! let verifier = Verifier::new([SecretString::from("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")])?;
//! let headers = [
//!     ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek"),
//!     ("webhook-timestamp", "1614265330"),
//!     ("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
//! ];
//! let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
//! let received_at = DateTime::from_timestamp(1614265331, 0).unwrap(); // a service says when: Utc::now()
//! let delivery = verifier.standard(header, br#"{"test": 2432232314}"#, received_at)?;
//! assert_eq!(delivery.id(), "msg_p5jXN8AQM9LWM0D4loKWxJek");
//!
//! let forged = verifier.standard(header, br#"{"test": 1000000000}"#, received_at).unwrap_err();
//! assert_eq!(forged.kind(), ErrorKind::BadSignature);
//! # Ok::<(), lastprice::Error>(())
//! ```

pub(crate) mod paid;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};

/// Secrets that a verifier may have, while they are rotated.
const MAX_SECRETS: usize = 8;
/// Signatures that a header may have: each is compared for every secret.
const MAX_SIGNATURES: usize = 16;
/// The largest body that can be allowed; the table has the same limit.
const MAX_BODY: usize = 16 << 20;
const MAX_ID: usize = 255;

/// Verifies what a sender has signed: see the [module](self).
///
/// Signatures are compared in constant time. Bodies are at most 1 MiB, headers at most 16 signatures.
#[derive(Clone)]
#[must_use]
pub struct Verifier {
    keys: Vec<Keys>,
    tolerance: Duration,
    max_body: usize,
}

/// One secret, as each scheme takes it.
#[derive(Clone)]
struct Keys {
    plain: Zeroizing<Vec<u8>>,
    /// None: `whsec_` with something else than base64, which the other scheme takes as it is.
    standard: Option<Zeroizing<Vec<u8>>>,
}

/// A body whose signature was verified, when it was received. Only a [`Verifier`] makes one. It does not say whose it is: receive it
/// for the tenant whose secrets verified it.
///
/// `Debug` does not show the body.
#[derive(Clone, PartialEq, Eq)]
pub struct Delivery {
    id: String,
    body: Vec<u8>,
    received_at: DateTime<Utc>,
}

impl Verifier {
    /// For 1 to 8 secrets: while they are rotated, what any of them has signed is accepted.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput), naming `secrets`: there is none, there are more than 8, or one is empty (then
    /// anybody could sign).
    pub fn new(secrets: impl IntoIterator<Item = SecretString>) -> Result<Self> {
        let keys =
            secrets.into_iter().take(MAX_SECRETS + 1).map(|s| Keys::of(&s)).collect::<Result<Vec<_>>>()?;
        if !(1..=MAX_SECRETS).contains(&keys.len()) {
            return Err(Error::invalid(
                "secrets",
                format_args!("are not 1 to {MAX_SECRETS}: is one stored?"),
            ));
        }
        Ok(Verifier { keys, tolerance: Duration::from_secs(300), max_body: 1 << 20 })
    }

    /// How far the sender's time may be from the receipt, before or after. Default: 5 minutes. A retry is signed anew.
    pub fn tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// How many bytes a body may have, at most 16 MiB. Default: 1 MiB.
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes.min(MAX_BODY);
        self
    }

    /// Verifies by Standard Webhooks: `v1`, HMAC-SHA256 over `id.timestamp.body`. `header` is asked for three headers, in
    /// lower case, as most frameworks keep them; signatures of other versions are passed over. For the same body delivered again the id is the same.
    ///
    /// # Errors
    ///
    /// [`BadSignature`](ErrorKind::BadSignature) that names the header and the rule;
    /// [`InvalidInput`](ErrorKind::InvalidInput) for a `body` that is too large, or `secrets` of which none can be used in this
    /// scheme.
    pub fn standard<'h>(
        &self,
        header: impl Fn(&str) -> Option<&'h str>,
        body: &[u8],
        received_at: DateTime<Utc>,
    ) -> Result<Delivery> {
        self.check_body(body)?;
        let get = |name| header(name).ok_or_else(|| bad(name, "is missing"));
        let (id, timestamp) = (get("webhook-id")?, get("webhook-timestamp")?);
        let signatures = get("webhook-signature")?;
        // A point would let what was signed be divided otherwise: `a.1` and `2`, or `a` and `1.2`.
        if !is_id(id) || id.contains('.') {
            return Err(bad("webhook-id", "is not 1 to 255 bytes without a point"));
        }
        self.check_time(timestamp, received_at)?;
        if signatures.split(' ').nth(MAX_SIGNATURES).is_some() {
            return Err(bad("webhook-signature", "has more than 16 signatures"));
        }
        let signatures: Vec<[u8; 32]> = signatures.split(' ').filter_map(version_1).collect();
        if signatures.is_empty() {
            return Err(bad("webhook-signature", "has none of version 1"));
        }
        let mut usable = false;
        for key in self.keys.iter().filter_map(|keys| keys.standard.as_ref()) {
            usable = true;
            let signed = hmac(key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body])?;
            if signatures.iter().any(|signature| signed.clone().verify_slice(signature).is_ok()) {
                return Ok(Delivery { id: id.to_owned(), body: body.to_owned(), received_at });
            }
        }
        if !usable {
            return Err(Error::invalid("secrets", "have `whsec_` and something else than base64"));
        }
        Err(bad("webhook-signature", "does not fit the body"))
    }

    /// Verifies the value of a header `sha256=<64 digits in lower case>`: HMAC-SHA256 over the body, by the secret as it is.
    ///
    /// There is no time in it, so an old delivery can be sent again: it is recorded once. The delivery's id is `sha256:` with the
    /// hash of the body, which is all that was signed.
    ///
    /// ```
    /// use lastprice::{secrecy::SecretString, webhook::Verifier};
    ///
    /// let verifier = Verifier::new([SecretString::from("It's a Secret to Everybody")])?;
    /// let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    /// verifier.sha256(signature, b"Hello, World!", lastprice::chrono::Utc::now())?;
    /// # Ok::<(), lastprice::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`BadSignature`](ErrorKind::BadSignature) that names what is wrong; [`InvalidInput`](ErrorKind::InvalidInput) for a `body` that
    /// is too large.
    pub fn sha256(&self, signature: &str, body: &[u8], received_at: DateTime<Utc>) -> Result<Delivery> {
        self.check_body(body)?;
        let Some(signature) = signature.strip_prefix("sha256=").and_then(unhex) else {
            return Err(bad("signature", "is not `sha256=` and 64 hexadecimal digits in lower case"));
        };
        for keys in &self.keys {
            if hmac(&keys.plain, &[body])?.verify_slice(&signature).is_ok() {
                let id = format!("sha256:{}", hex(&Sha256::digest(body)));
                return Ok(Delivery { id, body: body.to_owned(), received_at });
            }
        }
        Err(bad("signature", "does not fit the body"))
    }

    fn check_body(&self, body: &[u8]) -> Result<()> {
        if body.len() > self.max_body {
            return Err(Error::invalid("body", format_args!("has more than {} bytes", self.max_body)));
        }
        Ok(())
    }

    fn check_time(&self, timestamp: &str, received_at: DateTime<Utc>) -> Result<()> {
        let digits = !timestamp.is_empty() && timestamp.bytes().all(|b| b.is_ascii_digit());
        let Some(seconds) = digits.then(|| timestamp.parse::<i64>().ok()).flatten() else {
            return Err(bad("webhook-timestamp", "is not a number of seconds"));
        };
        let apart = i128::from(received_at.timestamp_millis()) - i128::from(seconds) * 1000;
        if apart.unsigned_abs() > self.tolerance.as_millis() {
            let rule = if apart > 0 { "is too long ago" } else { "is too far in the future" };
            return Err(bad("webhook-timestamp", rule));
        }
        Ok(())
    }
}

impl Delivery {
    /// The same when it is delivered again.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The body, as it was signed.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// When it was received.
    #[must_use]
    pub fn received_at(&self) -> DateTime<Utc> {
        self.received_at
    }

    pub(crate) fn body_hash(&self) -> Vec<u8> {
        Sha256::digest(&self.body).to_vec()
    }
}

impl Keys {
    fn of(secret: &SecretString) -> Result<Self> {
        let text = secret.expose_secret();
        let plain = Zeroizing::new(text.as_bytes().to_vec());
        let standard = match text.strip_prefix("whsec_") {
            Some(encoded) => STANDARD.decode(encoded).ok().map(Zeroizing::new),
            None => Some(plain.clone()),
        };
        if plain.is_empty() || standard.as_ref().is_some_and(|key| key.is_empty()) {
            return Err(Error::invalid("secrets", "has an empty one"));
        }
        Ok(Keys { plain, standard })
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("secrets", &self.keys.len())
            .field("tolerance", &self.tolerance)
            .field("max_body", &self.max_body)
            .finish()
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Delivery");
        debug.field("id", &self.id).field("bytes", &self.body.len());
        debug.field("received_at", &self.received_at).finish_non_exhaustive()
    }
}

fn bad(field: &str, rule: impl fmt::Display) -> Error {
    Error::new(ErrorKind::BadSignature, format!("`{field}` {rule}"))
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len()) && !id.contains('\0')
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key)
        .map_err(|_| Error::internal("HMAC refuses the length of a key"))?;
    parts.iter().for_each(|part| mac.update(part));
    Ok(mac)
}

fn version_1(signature: &str) -> Option<[u8; 32]> {
    STANDARD.decode(signature.strip_prefix("v1,").filter(|s| s.len() == 44)?).ok()?.try_into().ok()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
