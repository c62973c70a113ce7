//! Reads what PostgreSQL's `pgp_sym_encrypt` writes, so that the passphrase need not go to the server.
//!
//! RFC 4880, of it: one symmetric-key encrypted session key packet (version 4), and one encrypted packet with integrity
//! protection that holds one literal packet; AES, and SHA-1 or SHA-256 to make a key of the passphrase.

use std::hint::black_box;

use aes_gcm::aead::KeyInit;
use aes_gcm::aes::cipher::BlockCipherEncrypt;
use aes_gcm::aes::{Aes128, Aes192, Aes256, Block};
use secrecy::{ExposeSecret, SecretString};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::unavailable;
use crate::error::{Error, Result};

type Bytes = Zeroizing<Vec<u8>>;

/// Two digits a byte, of more than any secret that is stored.
const LONGEST: usize = 4 * 32_768;

/// The text of a `bytea` whose first packet is a session key packet, in the new or in the old format.
pub(super) fn looks_like(stored: &str) -> bool {
    let first = stored.strip_prefix("\\x").and_then(|hex| hex.get(..2));
    first.is_some_and(|first| ["c3", "8c", "8d", "8e", "8f"].iter().any(|f| f.eq_ignore_ascii_case(first)))
}

/// The secret in such a text.
pub(super) fn open(stored: &str, passphrase: &SecretString) -> Result<SecretString> {
    if stored.len() > LONGEST {
        return Err(damaged());
    }
    let message = unhex(stored).ok_or_else(damaged)?;
    let opened = open_message(&message, passphrase.expose_secret().as_bytes())?;
    std::str::from_utf8(&opened).map(SecretString::from).map_err(|_| unavailable("a secret is not a text"))
}

pub(super) fn open_message(mut message: &[u8], passphrase: &[u8]) -> Result<Bytes> {
    let (tag, session) = packet(&mut message)?;
    if tag != 3 {
        return Err(unavailable(
            "a secret was not written by pgp_sym_encrypt: it is not encrypted by a passphrase",
        ));
    }
    let cipher = session_key(&session, passphrase)?;
    let (tag, mut body) = packet(&mut message)?;
    match tag {
        18 => {}
        9 => return Err(unavailable("a secret was written with disable-mdc=1, which does not protect it")),
        _ => return Err(damaged()),
    }
    if !message.is_empty() || body.first() != Some(&1) {
        return Err(damaged());
    }
    let plain = &mut body[1..];
    cipher.decrypt(plain);
    // A random block and its last two bytes again; then the packets; then a packet with the SHA-1 of all before its 20 bytes.
    let (content, digest) = plain.split_last_chunk::<20>().ok_or_else(damaged)?;
    if !same(&Sha1::digest(content), digest) {
        return Err(unavailable("a secret does not open by the passphrase, or it was changed"));
    }
    let mut content =
        content.strip_suffix(&[0xd3, 0x14]).and_then(|c| c.get(BLOCK + 2..)).ok_or_else(damaged)?;
    let (tag, literal) = packet(&mut content)?;
    match tag {
        11 if content.is_empty() => {}
        8 => return Err(unavailable("a secret was written with compress-algo, which is not supported")),
        _ => return Err(damaged()),
    }
    // Format, name with its length, date.
    let name = usize::from(*literal.get(1).ok_or_else(damaged)?);
    literal.get(2 + name + 4..).map(|text| Zeroizing::new(text.to_vec())).ok_or_else(damaged)
}

fn session_key(packet: &[u8], passphrase: &[u8]) -> Result<Cipher> {
    let ([4, algorithm, mode, digest], mut rest) = packet.split_first_chunk::<4>().ok_or_else(damaged)?
    else {
        return Err(unavailable("a secret was written with another version of a session key"));
    };
    let mut salt: &[u8] = &[];
    let mut octets = 0;
    match mode {
        0 => {}
        1 | 3 => {
            (salt, rest) = rest.split_at_checked(8).ok_or_else(damaged)?;
            if *mode == 3 {
                let (count, after) = rest.split_first().ok_or_else(damaged)?;
                octets = (16 + usize::from(count & 15)) << ((count >> 4) + 6);
                rest = after;
            }
        }
        _ => return Err(unavailable("a secret was written with another s2k-mode than 0, 1 or 3")),
    }
    let length = Cipher::key_length(*algorithm)?;
    let key = match digest {
        2 => stretch::<Sha1>(passphrase, salt, octets, length),
        8 => stretch::<Sha256>(passphrase, salt, octets, length),
        _ => {
            return Err(unavailable("a secret was written with another s2k-digest-algo than sha1 or sha256"));
        }
    };
    let cipher = Cipher::new(*algorithm, &key)?;
    if rest.is_empty() {
        return Ok(cipher);
    }
    // sess-key=1: a random key, encrypted by that of the passphrase.
    let mut session = Zeroizing::new(rest.to_vec());
    cipher.decrypt(&mut session);
    let (algorithm, key) = session.split_first().ok_or_else(damaged)?;
    let wrong = |_| unavailable("a secret does not open by the passphrase, or its cipher-algo is not AES");
    Cipher::new(*algorithm, key).map_err(wrong)
}

/// A key of a passphrase: as many digests as it takes, each with one more zero before it.
fn stretch<D: Digest>(passphrase: &[u8], salt: &[u8], octets: usize, length: usize) -> Bytes {
    let round = Zeroizing::new([salt, passphrase].concat());
    let mut key = Zeroizing::new(Vec::with_capacity(128));
    for zeros in 0.. {
        if key.len() >= length {
            break;
        }
        let mut digest = D::new();
        digest.update(vec![0; zeros]);
        let mut left = octets.max(round.len());
        while left > 0 && !round.is_empty() {
            let part = left.min(round.len());
            digest.update(&round[..part]);
            left -= part;
        }
        key.extend_from_slice(&digest.finalize());
    }
    key.truncate(length);
    key
}

enum Cipher {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
}

const BLOCK: usize = 16;

impl Cipher {
    fn key_length(algorithm: u8) -> Result<usize> {
        match algorithm {
            7 => Ok(16),
            8 => Ok(24),
            9 => Ok(32),
            _ => Err(unavailable("a secret was written with another cipher-algo than AES")),
        }
    }

    fn new(algorithm: u8, key: &[u8]) -> Result<Self> {
        let cipher = match Cipher::key_length(algorithm)? {
            16 => Aes128::new_from_slice(key).map(|c| Cipher::Aes128(Box::new(c))),
            24 => Aes192::new_from_slice(key).map(|c| Cipher::Aes192(Box::new(c))),
            _ => Aes256::new_from_slice(key).map(|c| Cipher::Aes256(Box::new(c))),
        };
        cipher.map_err(|_| damaged())
    }

    /// Cipher feedback, from a block of zeros.
    fn decrypt(&self, data: &mut [u8]) {
        let mut before = Block::default();
        for chunk in data.chunks_mut(BLOCK) {
            let mut pad = before;
            match self {
                Cipher::Aes128(c) => c.encrypt_block(&mut pad),
                Cipher::Aes192(c) => c.encrypt_block(&mut pad),
                Cipher::Aes256(c) => c.encrypt_block(&mut pad),
            }
            for (i, byte) in chunk.iter_mut().enumerate() {
                before[i] = *byte;
                *byte ^= pad[i];
            }
        }
    }
}

/// Takes one packet off: its tag, and its body in one piece.
fn packet(input: &mut &[u8]) -> Result<(u8, Bytes)> {
    let head = take(input, 1)?[0];
    let mut body = Zeroizing::new(Vec::new());
    match head >> 6 {
        0b11 => loop {
            let (length, last) = new_length(input)?;
            body.extend_from_slice(take(input, length)?);
            if last {
                return Ok((head & 0x3f, body));
            }
        },
        0b10 => {
            let length = match head & 3 {
                3 => input.len(),
                size => big_endian(take(input, 1 << size)?),
            };
            body.extend_from_slice(take(input, length)?);
            Ok((head >> 2 & 15, body))
        }
        _ => Err(damaged()),
    }
}

/// How long the next part is, and whether it is the last one.
fn new_length(input: &mut &[u8]) -> Result<(usize, bool)> {
    Ok(match usize::from(take(input, 1)?[0]) {
        first @ 0..192 => (first, true),
        first @ 192..224 => (((first - 192) << 8) + usize::from(take(input, 1)?[0]) + 192, true),
        255 => (big_endian(take(input, 4)?), true),
        partial => (1 << (partial & 31), false),
    })
}

fn big_endian(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn take<'a>(input: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(length).ok_or_else(damaged)?;
    *input = rest;
    Ok(taken)
}

/// In a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len()
        && black_box(a.iter().zip(b).fold(0, |differ, (a, b)| black_box(differ | (a ^ b)))) == 0
}

fn unhex(stored: &str) -> Option<Vec<u8>> {
    let hex = stored.strip_prefix("\\x")?.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|d| d as u8);
    let pairs = hex.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?));
    pairs.collect()
}

fn damaged() -> Error {
    unavailable("a secret looks as if pgp_sym_encrypt had written it, and cannot be read")
}
