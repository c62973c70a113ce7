//! What is signed here is what the verifier of the SDK accepts, and what others publish.

use lastprice::chrono::{DateTime, Utc};
use lastprice::secrecy::SecretString;
use lastprice::webhook::{Delivery, Verifier};
use lastprice::{ErrorKind, Result};
use lastprice_testkit::webhook::{sign_sha256, sign_standard};

/// Of the specification's own libraries.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const BODY: &[u8] = br#"{"test": 2432232314}"#;

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(seconds, 0).unwrap()
}

fn verifier(secret: &str) -> Verifier {
    Verifier::new([SecretString::from(secret)]).unwrap()
}

fn receive(secret: &str, headers: &[(&str, String)], body: &[u8], now: i64) -> Result<Delivery> {
    let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
    verifier(secret).standard(header, body, at(now))
}

#[test]
fn published_vectors() {
    let headers = sign_standard(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", at(1614265330), BODY);
    let signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    let values = headers.each_ref().map(|(_, value)| value.as_str());
    assert_eq!(values, ["msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", signature]);
    let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    assert_eq!(sign_sha256("It's a Secret to Everybody", b"Hello, World!"), signature);
}

#[test]
fn the_verifier_accepts_it_and_nothing_else() {
    for secret in [SECRET, "plain", "ä"] {
        let headers = sign_standard(secret, "evt_1", at(1000), BODY);
        let delivery = receive(secret, &headers, BODY, 1299).unwrap();
        assert_eq!((delivery.id(), delivery.body()), ("evt_1", BODY));
        let refused = [
            receive("another", &headers, BODY, 1000),
            receive(secret, &headers, b"{}", 1000),
            receive(secret, &headers, BODY, 1301),
            verifier("another").sha256(&sign_sha256(secret, BODY), BODY, at(0)),
            verifier(secret).sha256(&sign_sha256(secret, BODY), b"{}", at(0)),
        ];
        for refused in refused {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::BadSignature);
        }
        verifier(secret).sha256(&sign_sha256(secret, BODY), BODY, at(0)).unwrap();
    }
}
