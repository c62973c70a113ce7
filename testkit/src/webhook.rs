//! Webhooks as their senders sign them, for tests of the route that receives them.
//!
//! ```
//! use lastprice::{chrono::Utc, secrecy::SecretString, webhook::Verifier};
//! use lastprice_testkit::webhook;
//!
//! let (secret, now) = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", Utc::now());
//! let body = br#"{"id":"evt_1","type":"customer.updated","data":{}}"#;
//! let headers = webhook::sign_standard(secret, "evt_1", now, body);
//!
//! // A test sends headers and body to its service; this is what the service does with them.
//! let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
//! let delivery = Verifier::new([SecretString::from(secret)])?.standard(header, body, now)?;
//! assert_eq!(delivery.id(), "evt_1");
//! # Ok::<(), lastprice::Error>(())
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use lastprice::chrono::{DateTime, Utc};
use sha2::Sha256;

/// The three headers of Standard Webhooks, their names in lower case: see the [module](self). A secret is `whsec_` with base64, or else
/// the bytes of its text. A time that is more than five minutes from the receipt is refused, as is an `id` with a point in it.
///
/// # Panics
///
/// For a secret of `whsec_` with something else than base64, which no sender has.
#[must_use]
pub fn sign_standard(secret: &str, id: &str, at: DateTime<Utc>, body: &[u8]) -> [(&'static str, String); 3] {
    let key =
        secret.strip_prefix("whsec_").map(|encoded| STANDARD.decode(encoded).expect("whsec_ and base64"));
    let timestamp = at.timestamp().to_string();
    let key = key.unwrap_or_else(|| secret.as_bytes().to_vec());
    let signed = hmac(&key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body]);
    [
        ("webhook-id", id.to_owned()),
        ("webhook-timestamp", timestamp),
        ("webhook-signature", format!("v1,{}", STANDARD.encode(signed))),
    ]
}

/// The value of the one header of the plain scheme, whatever its name is: `sha256=` and 64 hexadecimal digits. The secret is taken as it is.
///
/// ```
/// use lastprice::{chrono::Utc, secrecy::SecretString, webhook::Verifier};
///
/// let signature = lastprice_testkit::webhook::sign_sha256("a secret", b"{}");
/// Verifier::new([SecretString::from("a secret")])?.sha256(&signature, b"{}", Utc::now())?;
/// # Ok::<(), lastprice::Error>(())
/// ```
#[must_use]
pub fn sign_sha256(secret: &str, body: &[u8]) -> String {
    let digits = hmac(secret.as_bytes(), &[body]).into_iter().map(|byte| format!("{byte:02x}"));
    format!("sha256={}", digits.collect::<String>())
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().to_vec()
}
