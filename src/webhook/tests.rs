use chrono::TimeZone;
use proptest::prelude::*;

use super::paid::{Said, What, read};
use super::*;

/// Of the specification's own libraries.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const TIME: &str = "1614265330";
const BODY: &[u8] = br#"{"test": 2432232314}"#;
const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

fn verifier(secrets: &[&str]) -> Verifier {
    Verifier::new(secrets.iter().map(|s| SecretString::from(*s))).unwrap()
}

fn at(seconds: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(seconds, 0).unwrap()
}

fn standard(of: &Verifier, id: &str, time: &str, signature: &str, body: &[u8], now: i64) -> Result<Delivery> {
    let header = |name: &str| match name {
        "webhook-id" => Some(id),
        "webhook-timestamp" => Some(time),
        "webhook-signature" => Some(signature),
        _ => None,
    };
    of.standard(header, body, at(now))
}

fn sign(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    hmac(key, parts).unwrap().finalize().into_bytes().to_vec()
}

#[test]
fn published_vector() {
    let of = verifier(&[SECRET]);
    let delivery = standard(&of, ID, TIME, SIGNATURE, BODY, 1614265330).unwrap();
    assert_eq!((delivery.id(), delivery.body(), delivery.received_at()), (ID, BODY, at(1614265330)));
    // Of several, of other versions, and while secrets are rotated.
    let among = format!("v1a,AAAA v2,x v1,{} {SIGNATURE}", STANDARD.encode([0; 32]));
    standard(&verifier(&["old", SECRET]), ID, TIME, &among, BODY, 1614265330).unwrap();
}

/// python3: base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()), and hexdigest() for the plain scheme.
#[test]
fn vectors_of_python() {
    let of = verifier(&["plain secret"]);
    let signature = "v1,bfa0SxClWlHBXJM9bL4mleKN0kO7NWjdmgplt2g65nw=";
    standard(&of, "evt_1", "1700000000", signature, br#"{"id":"evt_1"}"#, 1700000000).unwrap();
    // The plain scheme takes a secret as it is, prefix and all.
    let signature = "sha256=fdc08bb179c3948b0063f9d95a9aa09776ea511bea853e83274c2b4e23e24a5f";
    // What the body calls itself may be the order's name, and many events' then: the hash is what was delivered.
    let delivery = verifier(&[SECRET]).sha256(signature, br#"{"id":"evt_1"}"#, at(0)).unwrap();
    assert_eq!(delivery.id(), "sha256:40993c639ffb5f13a0a2ef5c93c965f10b405f2b87a379272381da2dbc158dfa");
    let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    let of = verifier(&["It's a Secret to Everybody"]);
    let delivery = of.sha256(signature, b"Hello, World!", at(0)).unwrap();
    let hash = "sha256:dffd6021bb2bd5b0af676290809ec3a53191dd81c7f70a4b28688a362182986f";
    assert_eq!(delivery.id(), hash);
    assert!(of.sha256(&signature.to_uppercase(), b"Hello, World!", at(0)).is_err());
}

#[test]
fn refusals_name_the_header_and_nothing_else() {
    let of = verifier(&[SECRET]);
    let many = [SIGNATURE; 17].join(" ");
    let mut cases = vec![
        ("webhook-timestamp", ID, TIME, SIGNATURE, BODY, 1614265330 + 301),
        ("webhook-timestamp", ID, TIME, SIGNATURE, BODY, 1614265330 - 301),
        ("webhook-timestamp", ID, "99999999999999999999", SIGNATURE, BODY, 1614265330),
        ("webhook-timestamp", ID, "+1614265330", SIGNATURE, BODY, 1614265330),
        ("webhook-timestamp", ID, "", SIGNATURE, BODY, 1614265330),
        ("webhook-id", "", TIME, SIGNATURE, BODY, 1614265330),
        ("webhook-id", "a.b", TIME, SIGNATURE, BODY, 1614265330),
        ("webhook-signature", "msg_other", TIME, SIGNATURE, BODY, 1614265330),
        ("webhook-signature", ID, "1614265331", SIGNATURE, BODY, 1614265330),
        ("webhook-signature", ID, TIME, "", BODY, 1614265330),
        ("webhook-signature", ID, TIME, &SIGNATURE[3..], BODY, 1614265330),
        ("webhook-signature", ID, TIME, &many, BODY, 1614265330),
        ("webhook-signature", ID, TIME, SIGNATURE, b"{\"test\": 2432232315}", 1614265330),
    ];
    let large = vec![b' '; (1 << 20) + 1];
    cases.push(("body", ID, TIME, SIGNATURE, &large, 1614265330));
    for (field, id, time, signature, body, now) in cases {
        let error = standard(&of, id, time, signature, body, now).unwrap_err();
        let kind = if field == "body" { ErrorKind::InvalidInput } else { ErrorKind::BadSignature };
        assert_eq!(error.kind(), kind);
        let said = format!("{error} {error:?}");
        assert!(said.contains(&format!("`{field}`")), "{said}");
        assert!(!said.contains("g0hM9") && !said.contains("MfKQ") && !said.contains("2432232"), "{said}");
    }
    for inside in [1614265330 + 300, 1614265330 - 300] {
        standard(&of, ID, TIME, SIGNATURE, BODY, inside).unwrap();
    }
    let missing = of.standard(|_| None, BODY, at(0)).unwrap_err();
    assert!(missing.to_string().contains("webhook-id"));
    assert!(!format!("{of:?}").contains("MfKQ"));
}

#[test]
fn secrets_with_which_anybody_could_sign_are_refused() {
    for secrets in [&[][..], &[""], &["good", ""], &["whsec_"], &["s"; 9]] {
        let error = Verifier::new(secrets.iter().map(|s| SecretString::from(*s))).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidInput, Some("secrets")));
    }
    // What is no base64 after `whsec_` is a secret of the plain scheme only.
    let error = standard(&verifier(&["whsec_!"]), ID, TIME, SIGNATURE, BODY, 1614265330).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn amounts_are_read_by_their_digits() {
    let amount = |amount: &str| {
        let body = format!(r#"{{"type":"refund.created","data":{{"order_id":"o","amount":{amount}}}}}"#);
        match read(body.as_bytes(), "d") {
            Ok(Said::Entry(event)) => match event.what {
                What::Refund { amount, .. } => Ok(amount.to_string()),
                other => panic!("{other:?}"),
            },
            Ok(Said::Nothing) => panic!(),
            Err(wrong) => Err(wrong),
        }
    };
    for (given, is) in [
        ("19.90", "19.90"),
        ("\"19.90\"", "19.90"),
        ("0.1", "0.1"),
        ("0.300000", "0.300000"),
        ("999999999999.999999", "999999999999.999999"),
        ("0", "0"),
    ] {
        assert_eq!(amount(given).as_deref(), Ok(is));
    }
    for bad in [
        "1e2",
        "-1",
        "\"-1\"",
        "\"+1\"",
        "\" 1\"",
        "\"1.\"",
        "\".5\"",
        "\"1,5\"",
        "\"NaN\"",
        "\"\"",
        "null",
        "true",
        "[1]",
        "0.1234567",
        "1000000000000",
        "\"١\"",
    ] {
        assert_eq!(amount(bad), Err("data.amount"), "{bad}");
    }
}

#[test]
fn the_longest_ids_have_keys_of_their_own() {
    let key = |order: &str| {
        let body = format!(
            r#"{{"type":"subscription.created","data":{{"customer_id":"u","order_id":"{order}","amount":1,
                "metadata":{{"experiment_id":"00000000-0000-0000-0000-000000000001"}}}}}}"#
        );
        match read(body.as_bytes(), "d") {
            Ok(Said::Entry(event)) => event.key,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(key("o-1"), "paid:sale:o-1");
    let given = r#"{"type":"refund.created","data":{"order_id":"o","amount":1,"metadata":{"idempotency_key":"mine"}}}"#;
    assert!(matches!(read(given.as_bytes(), "d"), Ok(Said::Entry(event)) if event.key == "mine"));
    for bad in ["\"\"", "1", "[]"] {
        let given = given.replace("\"mine\"", bad);
        assert_eq!(read(given.as_bytes(), "d").unwrap_err(), "data.metadata.idempotency_key");
    }
    assert_eq!(key(&"o".repeat(245)), format!("paid:sale:{}", "o".repeat(245)));
    let (one, other) = (key(&"o".repeat(255)), key(&format!("{}p", "o".repeat(254))));
    assert!(one.len() <= 255 && one.starts_with("paid:sale:sha256:") && one != other, "{one}");
}

#[test]
fn what_is_wrong_is_named_by_its_field() {
    let wrong = |body: &str| read(body.as_bytes(), "d").unwrap_err();
    for (body, field) in [
        ("", "body"),
        ("[]", "body"),
        (r#"["id", "refund.created"]"#, "body"),
        (r#"{"type":"x","type":"y"}"#, "body"),
        ("{}", "type"),
        (r#"{"type":7}"#, "type"),
        (r#"{"type":"refund.created"}"#, "data"),
        (r#"{"type":"refund.created","data":[]}"#, "data"),
        (r#"{"type":"refund.created","id":7,"data":{}}"#, "id"),
        (r#"{"type":"refund.created","created_at":"yesterday","data":{}}"#, "created_at"),
        (r#"{"type":"refund.created","data":{"currency":"usd"}}"#, "data.currency"),
        (
            r#"{"type":"refund.created","data":{"metadata":{"experiment_id":"7"}}}"#,
            "data.metadata.experiment_id",
        ),
        (r#"{"type":"refund.created","data":{"order_id":7,"amount":1}}"#, "data.order_id"),
        (
            r#"{"type":"invoice.paid","data":{"subscription_id":"s","order_id":"o","amount":1}}"#,
            "data.period",
        ),
        (r#"{"type":"trial.started","data":{"customer_id":"c"}}"#, "data.subscription_id"),
        (
            r#"{"type":"subscription.created","data":{"customer_id":"c","order_id":"o","amount":1}}"#,
            "data.metadata.experiment_id",
        ),
    ] {
        assert_eq!(wrong(body), field, "{body}");
    }
    assert!(matches!(read(br#"{"type":"customer.created","data":7}"#, "d"), Ok(Said::Nothing)));
}

/// splitmix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// Some bytes changed, left out, or repeated.
    fn mutate(&mut self, of: &[u8]) -> Vec<u8> {
        let mut bytes = of.to_vec();
        for _ in 0..1 + self.below(4) {
            let place = self.below(bytes.len() + 1);
            match self.below(4) {
                0 if place < bytes.len() => bytes[place] ^= 1 << self.below(8),
                1 if place < bytes.len() => drop(bytes.remove(place)),
                2 => bytes.truncate(place),
                _ => bytes.insert(place, b"{}[]\",:.=\\\0u9 "[self.below(14)]),
            }
        }
        bytes
    }
}

/// A million inputs: none panics, none is accepted that differs from what was signed.
#[test]
fn a_million_inputs() {
    let of = verifier(&[SECRET, "other"]);
    let key = STANDARD.decode(&SECRET[6..]).unwrap();
    let event = br#"{"id":"evt_1","type":"subscription.created","created_at":"2026-01-01T00:00:00Z","data":{"customer_id":"c","amount":19.90,"currency":"USD","order_id":"o","metadata":{"experiment_id":"0192f1c4-7a3e-7c1e-8a53-0123456789ab"}}}"#;
    let signed = format!("v1,{}", STANDARD.encode(sign(&key, &[b"evt_1.1700000000.", event])));
    let plain = format!("sha256={}", hex(&sign(SECRET.as_bytes(), &[event])));
    standard(&of, "evt_1", "1700000000", &signed, event, 1700000000).unwrap();
    of.sha256(&plain, event, at(0)).unwrap();
    let mut dice = Dice(7);
    let mut read_well = 0;
    for n in 0..1_000_000 {
        match n % 4 {
            0 | 1 => {
                let body = dice.mutate(event);
                read_well += usize::from(read(&body, "d").is_ok());
                let _ = paid::type_of(&body);
            }
            2 => {
                let mut headers = ["evt_1".to_owned(), "1700000000".to_owned(), signed.clone()];
                let one = dice.below(3);
                headers[one] = String::from_utf8_lossy(&dice.mutate(headers[one].as_bytes())).into_owned();
                let [id, time, signature] = &headers;
                if let Ok(delivery) = standard(&of, id, time, signature, event, 1700000000) {
                    let same = (id.as_str(), time.as_str()) == ("evt_1", "1700000000");
                    assert!(same && delivery.id() == "evt_1" && signature.split(' ').any(|s| s == signed));
                }
            }
            _ => {
                let signature = String::from_utf8_lossy(&dice.mutate(plain.as_bytes())).into_owned();
                assert!(of.sha256(&signature, event, at(0)).is_err() || signature == plain);
            }
        }
    }
    assert!(read_well > 1000, "{read_well}: mutations that leave nothing to read test little");
}

proptest! {
    #[test]
    fn what_is_signed_passes_and_any_other_bit_does_not(
        key in proptest::collection::vec(any::<u8>(), 1..80), body in proptest::collection::vec(any::<u8>(), 0..300),
        id in "[a-zA-Z0-9_]{1,40}", now in 0i64..4_000_000_000, flip in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let of = verifier(&[&format!("whsec_{}", STANDARD.encode(&key))]);
        let time = now.to_string();
        let signature = format!("v1,{}", STANDARD.encode(sign(&key, &[id.as_bytes(), b".", time.as_bytes(), b".", &body])));
        prop_assert!(standard(&of, &id, &time, &signature, &body, now).is_ok());
        let flipped = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            if !bytes.is_empty() {
                let at = flip.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            bytes
        };
        if !body.is_empty() {
            prop_assert!(standard(&of, &id, &time, &signature, &flipped(&body), now).is_err());
        }
        if let Ok(other) = String::from_utf8(flipped(signature.as_bytes())) {
            prop_assert!(standard(&of, &id, &time, &other, &body, now).is_err());
        }
        if let Ok(other) = String::from_utf8(flipped(id.as_bytes())) {
            prop_assert!(standard(&of, &other, &time, &signature, &body, now).is_err());
        }
        if let Ok(other) = String::from_utf8(flipped(time.as_bytes())) {
            prop_assert!(standard(&of, &id, &other, &signature, &body, now).is_err());
        }
    }
}
