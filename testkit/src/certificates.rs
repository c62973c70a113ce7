//! Certificates for a server on this machine, made on the spot.

use crate::{
    account::Account,
    error::{Context, Result},
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

pub(crate) const CA: &str = "ca.pem";
/// A CA that has signed nothing here, for tests that must not connect.
pub(crate) const OTHER_CA: &str = "other-ca.pem";
pub(crate) const SETTINGS: [(&str, &str); 3] =
    [("ssl", "on"), ("ssl_cert_file", "../server.pem"), ("ssl_key_file", "../server.key")];

/// Writes the certificates of a server that is `localhost` and 127.0.0.1, or was until the year 2021 began.
pub(crate) fn write(account: &Account, dir: &Path, expired: bool) -> Result<()> {
    let made = || -> Result<[(&str, String); 4], rcgen::Error> {
        let (ca, issuer) = authority("lastprice-testkit CA")?;
        let (other, _) = authority("lastprice-testkit other CA")?;
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        leaf.distinguished_name.push(DnType::CommonName, "localhost");
        leaf.use_authority_key_identifier_extension = true;
        if expired {
            (leaf.not_before, leaf.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        }
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = leaf.signed_by(&key, &issuer)?;
        let key = key.serialize_pem();
        Ok([(CA, ca.pem()), (OTHER_CA, other.pem()), ("server.pem", leaf.pem()), ("server.key", key)])
    };
    for (name, text) in made().context(|| "cannot make the certificates of the test server".to_owned())? {
        let path = dir.join(name);
        let write = || {
            let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path)?;
            file.write_all(text.as_bytes())
        };
        write().context(|| format!("cannot write {}", path.display()))?;
        // The server takes a key only from its own user.
        account.give(&path)?;
    }
    Ok(())
}

fn authority(name: &str) -> Result<(Certificate, Issuer<'static, KeyPair>), rcgen::Error> {
    let mut params = CertificateParams::new([])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate, Issuer::new(params, key)))
}
