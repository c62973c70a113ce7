use proptest::collection::vec;
use proptest::prelude::*;

use super::pgp::open_message;
use super::seal::Sealed;
use super::*;
use crate::id::TenantId;

/// Runs what never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(future)
}

fn context(tenant: u128, column: &'static str) -> KeyContext {
    KeyContext::new(TenantId::from(uuid::Uuid::from_u128(tenant)), column)
}

fn keys() -> SecretKeys {
    KeyRing::new("k", [7; 32]).unwrap().into()
}

#[test]
fn stored_texts_of_another_implementation_open() {
    let cases: Vec<serde_json::Value> = serde_json::from_str(include_str!("vectors.json")).unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let text = |name: &str| case[name].as_str().unwrap();
        let hex = text("key");
        let key: Vec<u8> = (0..32).map(|i| u8::from_str_radix(&hex[2 * i..][..2], 16).unwrap()).collect();
        let keys = SecretKeys::from(KeyRing::new(text("key_id"), key.try_into().unwrap()).unwrap());
        let column = if text("column") == "paid_api_key" { "paid_api_key" } else { "webhook_secret" };
        let context = KeyContext::new(text("tenant").parse().unwrap(), column);
        let opened = now(keys.open(&context, text("stored"))).unwrap();
        assert_eq!(opened.expose_secret(), text("secret"));
        assert_eq!(Sealed::parse(text("stored")).unwrap().text(), text("stored"));
    }
}

proptest! {
    #[test]
    fn what_is_sealed_opens_where_it_belongs_and_nowhere_else(secret in any::<String>(), tenant in any::<u128>()) {
        let (secret, here) = (SecretString::from(secret), context(tenant, "paid_api_key"));
        let stored = now(keys().seal(&here, &secret)).unwrap();
        let opened = now(keys().open(&here, &stored)).unwrap();
        prop_assert_eq!(opened.expose_secret(), secret.expose_secret());
        prop_assert!(keys().is_current(&stored));
        let refused = |keys: SecretKeys, context| now(keys.open(&context, &stored)).unwrap_err().kind();
        let wrong = [
            refused(keys(), context(tenant ^ 1, "paid_api_key")),
            refused(keys(), context(tenant, "webhook_secret")),
            refused(KeyRing::new("k", [8; 32]).unwrap().into(), here),
            refused(KeyRing::new("other", [7; 32]).unwrap().into(), here),
        ];
        prop_assert_eq!(wrong, [ErrorKind::SecretUnavailable; 4]);
    }

    #[test]
    fn any_other_character_anywhere_refuses(place in any::<prop::sample::Index>(), other in "[A-Za-z0-9_:. -]") {
        let here = context(1, "paid_api_key");
        let stored = now(keys().seal(&here, &"secret".into())).unwrap();
        let place = place.index(stored.len());
        let changed = format!("{}{other}{}", &stored[..place], &stored[place + 1..]);
        if changed != stored {
            let error = now(keys().open(&here, &changed)).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::SecretUnavailable);
        }
        prop_assert!(now(keys().open(&here, &stored[..place])).is_err());
    }

    #[test]
    fn any_text_is_refused_without_a_panic(text in any::<String>(), parts in vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
        let keys = keys().legacy_passphrase("p");
        for text in [&text, &format!("lp1:{}", parts.join(":")), &format!("lp1:k:{text}"), &format!("\\xc3{text}")] {
            prop_assert!(now(keys.open(&context(1, "paid_api_key"), text)).is_err());
        }
        drop(text.parse::<KeyRing>());
    }

    #[test]
    fn any_message_is_refused_without_a_panic(bytes in vec(any::<u8>(), 0..200), start in any::<bool>()) {
        let head: &[u8] = if start { &[0xc3, 4, 4, 7, 0, 2] } else { &[] };
        prop_assert!(open_message(&[head, &bytes].concat(), b"p").is_err());
    }

    #[test]
    fn a_changed_message_is_refused(place in any::<prop::sample::Index>(), flip in 1..=255u8) {
        let mut message = hex(PGP);
        prop_assert_eq!(&**open_message(&message, b"pass").unwrap(), b"pk-4711");
        let place = place.index(message.len());
        message[place] ^= flip;
        // The same packet with its length written in another way would be the same message; one flip does not make it.
        prop_assert!(open_message(&message, b"pass").is_err(), "{}", place);
        prop_assert!(open_message(&message[..place], b"pass").is_err());
    }
}

/// `pk-4711` under `pass`, by pgp_sym_encrypt with s2k-mode=1.
const PGP: &str = "c30c0407010241274188bdd435ebd2380162c1fc94d866b24b64cac19266153613a10026a2354a5170a5fe19782e73b0a38a750fe6aefc99b4d9e88210a532373c1b7b8bb9826eaa";

/// `pk-gpg é` under `pass ✓`, by GnuPG: AES-128 of SHA-256, the first packet in the old format.
const GPG: &str = "\\x8c0d0407030898a251592247871fffd23a0197feac7c24a63c4302ff38e10f890959430aa0e11f36cbcc4c18b5fc140922deb98bdd5b7aa6c84aa8c2e0412ff6f5aa09f0d418acc04aeeb8";

fn hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..][..2], 16).unwrap()).collect()
}

#[test]
fn what_gnupg_writes_is_read() {
    assert_eq!(pgp::open(GPG, &"pass ✓".into()).unwrap().expose_secret(), "pk-gpg é");
    let error = pgp::open(&GPG[..80], &"pass ✓".into()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SecretUnavailable);
}

#[test]
fn packets_of_every_length_format_are_read() {
    let message = hex(PGP);
    let split = 2 + usize::from(message[1]);
    let (session, data) = (&message[..split], &message[split + 2..]);
    assert_eq!((data.len(), data.len() < 128), (usize::from(message[split + 1]), true));
    let length = data.len() as u8;
    let whole = |head: &[u8]| [session, head, data].concat();
    let mut partial = [session, &[0xd2, 0xe0 | 4], &data[..16], &[0xe0 | 1], &data[16..18]].concat();
    partial.push(length - 18);
    partial.extend_from_slice(&data[18..]);
    for message in [partial, whole(&[0xd2, 255, 0, 0, 0, length]), whole(&[0xd2, length])] {
        assert_eq!(&**open_message(&message, b"pass").unwrap(), b"pk-4711");
    }
    let old = |head: &[u8]| [head, &session[2..], &message[split..]].concat();
    let size = session.len() as u8 - 2;
    for message in [old(&[0x8c, size]), old(&[0x8d, 0, size]), old(&[0x8e, 0, 0, 0, size])] {
        assert_eq!(&**open_message(&message, b"pass").unwrap(), b"pk-4711");
    }
}

#[test]
fn rings_refuse_what_is_no_key_and_do_not_repeat_it() {
    let base64 = "4BFtUk8tVN2FsYUuPxZMvlwVtOlBVfyWo4n0nVTKPHc=";
    let ring =
        format!("2026-11:{base64}, 2025-01:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc").parse::<KeyRing>();
    assert_eq!(format!("{:?}", ring.as_ref().unwrap()), r#"KeyRing { ids: ["2026-11", "2025-01"] }"#);
    assert_eq!(ring.unwrap().current_key_id(), "2026-11");
    let long = "x".repeat(65);
    for id in ["", "a b", "a:b", "é", long.as_str()] {
        assert_eq!(KeyRing::new(id, [1; 32]).unwrap_err().field(), Some("key_id"));
    }
    let zeros = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    for key in [
        "",
        "short",
        "a password of thirty-two letters",
        &base64[1..],
        zeros,
        &format!("{base64}AAAA"),
        &format!("{base64} x"),
    ] {
        let error = format!("k:{key}").parse::<KeyRing>().unwrap_err();
        assert_eq!(error.field(), Some("keys"));
        assert!(!format!("{error} {error:?}").contains("UuPxZM"));
    }
    assert!(KeyRing::new("k", [0; 32]).is_err());
    let ring = KeyRing::new("k", [1; 32]).unwrap();
    assert_eq!(ring.clone().and_reading("k", [2; 32]).unwrap_err().field(), Some("key_id"));
    assert_eq!(ring.and_reading("l", [1; 32]).unwrap_err().field(), Some("key"));
    for text in ["", "k", ":", "k:", &format!("k:{base64},"), &format!("k:{base64},k:{base64}")] {
        let error = text.parse::<KeyRing>().unwrap_err();
        assert_eq!(error.field(), Some("keys"));
        assert!(!format!("{error} {error:?}").contains("UuPxZM"), "{error}");
    }
}

#[test]
fn debug_hides_every_key() {
    let key = DataKey::new([0xab; 32]);
    let keys = keys().legacy_passphrase("hunter2");
    let shown = format!("{key:?} {keys:?}");
    assert!(
        shown.starts_with("DataKey(..) SecretKeys {") && !shown.contains("hunter2") && !shown.contains("171")
    );
}
