//! TLS to the server, with libpq's meaning of `sslmode`.
//!
//! The driver decides whether to ask for TLS ([`Target`] tells it); the [`Connector`] decides what to check.

pub(crate) use imp::connector;

#[cfg(feature = "tls")]
mod imp {
    use std::path::Path;
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::client::{WebPkiServerVerifier, verify_server_name};
    use rustls::crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
        verify_tls13_signature_with_raw_key,
    };
    use rustls::pki_types::pem::{self, PemObject};
    use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
    use rustls::server::ParsedCertificate;
    use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
    use tokio_postgres::config::{SslMode as DriverSslMode, SslNegotiation};
    use tokio_postgres_rustls::MakeRustlsConnect;

    use crate::connect::config::{SslMode, Target};
    use crate::error::{Error, Result};

    /// Makes the TLS sessions of a [`Target`].
    pub(crate) type Connector = MakeRustlsConnect;

    /// Reads the root certificates if the mode needs them. The cryptography is ring's, whatever the process
    /// has installed as its default.
    pub(crate) fn connector(target: &Target) -> Result<Connector> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::internal("rustls refuses its own defaults").with_source(e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier(target)?))
            .with_no_client_auth();
        if target.pg.get_ssl_negotiation() == SslNegotiation::Direct {
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(MakeRustlsConnect::new(config))
    }

    pub(super) fn verifier(target: &Target) -> Result<Verifier> {
        let provider = Arc::new(ring::default_provider());
        Ok(Verifier {
            chain: Chain::of(target, &provider)?,
            check_name: target.ssl == SslMode::VerifyFull,
            algorithms: provider.signature_verification_algorithms,
        })
    }

    /// What is checked of a server's certificate. The signature of the handshake always is: without it channel
    /// binding would bind to nothing.
    #[derive(Debug)]
    pub(super) struct Verifier {
        chain: Option<Chain>,
        check_name: bool,
        algorithms: WebPkiSupportedAlgorithms,
    }

    #[derive(Debug)]
    struct Chain {
        webpki: Arc<WebPkiServerVerifier>,
        /// The certificates of `sslrootcert`; empty if the roots are the system's.
        given: Vec<CertificateDer<'static>>,
    }

    impl Chain {
        fn of(target: &Target, provider: &Arc<CryptoProvider>) -> Result<Option<Chain>> {
            // Not `target.ssl`: over a Unix socket TLS is off whatever the mode.
            let needed = match (target.pg.get_ssl_mode(), target.ssl) {
                (DriverSslMode::Disable, _) | (_, SslMode::Disable | SslMode::Prefer) => false,
                (_, SslMode::Require) => target.root_cert.is_some(),
                (_, SslMode::VerifyCa | SslMode::VerifyFull) => true,
            };
            if !needed {
                if target.ssl == SslMode::Prefer && target.root_cert.is_some() {
                    tracing::warn!("`sslrootcert` is not used: `sslmode` is `prefer`, which checks nothing");
                }
                return Ok(None);
            }
            let given = target.root_cert.as_deref().map(read_certificates).transpose()?.unwrap_or_default();
            let mut roots = RootCertStore::empty();
            if target.root_cert.is_some() {
                roots.add_parsable_certificates(given.iter().cloned());
                if roots.is_empty() {
                    return Err(Error::invalid("sslrootcert", "names a file without a usable certificate"));
                }
            } else {
                let system = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(system.certs);
                if roots.is_empty() {
                    let rule = "is needed: this system has no root certificates of its own";
                    return Err(Error::invalid("sslrootcert", rule));
                }
            }
            let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
                .build()
                .map_err(|e| Error::invalid("sslrootcert", "cannot be used").with_source(e))?;
            Ok(Some(Chain { webpki, given }))
        }
    }

    impl ServerCertVerifier for Verifier {
        fn verify_server_cert(
            &self,
            end_entity: &CertificateDer<'_>,
            intermediates: &[CertificateDer<'_>],
            server_name: &ServerName<'_>,
            ocsp_response: &[u8],
            now: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            use CertificateError::{NotValidForName, NotValidForNameContext, Other};

            let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
            match chain.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            {
                // The name is what webpki checks last: the chain is good.
                Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }))
                    if !self.check_name =>
                {
                    Ok(ServerCertVerified::assertion())
                }
                // `openssl req -x509` makes a CA of a self-signed server certificate, and webpki refuses a CA as
                // a server, after it has checked the dates. OpenSSL accepts it if it is itself a trusted root.
                Err(rustls::Error::InvalidCertificate(Other(_))) if chain.given.contains(end_entity) => {
                    let certificate = ParsedCertificate::try_from(end_entity)?;
                    if self.check_name {
                        verify_server_name(&certificate, server_name)?;
                    }
                    Ok(ServerCertVerified::assertion())
                }
                verdict => verdict,
            }
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, dss, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.algorithms).or_else(|error| {
                let key = public_key(cert).filter(|_| self.chain.is_none()).ok_or(error)?;
                verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
            })
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    }

    fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
        let unreadable = |error| {
            let invalid =
                Error::invalid("sslrootcert", "names a file that cannot be read as PEM certificates");
            match error {
                pem::Error::Io(error) => invalid.with_source(error),
                _ => invalid,
            }
        };
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(unreadable)
    }

    /// The key of a certificate that webpki does not read as a server's: one of X.509 version 1, as the commands
    /// of PostgreSQL's manual make it. As a trust anchor webpki reads it.
    fn public_key(cert: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
        let mut store = RootCertStore::empty();
        store.add(cert.clone().into_owned()).ok()?;
        let key = store.roots.first()?.subject_public_key_info.as_ref();
        let length = u16::try_from(key.len()).ok()?.to_be_bytes();
        let mut der = vec![0x30]; // SEQUENCE, which an anchor leaves out
        match length {
            [0, short @ ..0x80] => der.push(short),
            [0, medium] => der.extend([0x81, medium]),
            long => der.extend([0x82, long[0], long[1]]),
        }
        der.extend_from_slice(key);
        Some(der.into())
    }
}

#[cfg(not(feature = "tls"))]
mod imp {
    use tokio_postgres::NoTls;
    use tokio_postgres::config::SslMode as DriverSslMode;
    use tokio_postgres::tls::{MakeTlsConnect, NoTlsError, NoTlsStream};

    use crate::connect::config::Target;
    use crate::error::{Error, Result};

    /// Makes no TLS sessions: the cargo feature `tls` is off.
    #[derive(Clone)]
    pub(crate) struct Connector;

    impl<S> MakeTlsConnect<S> for Connector {
        type Stream = NoTlsStream;
        type TlsConnect = NoTls;
        type Error = NoTlsError;

        fn make_tls_connect(&mut self, _: &str) -> Result<NoTls, NoTlsError> {
            Ok(NoTls)
        }
    }

    /// Refuses the modes that need TLS.
    pub(crate) fn connector(target: &Target) -> Result<Connector> {
        match target.pg.get_ssl_mode() {
            DriverSslMode::Disable | DriverSslMode::Prefer => Ok(Connector),
            _ => Err(Error::invalid("sslmode", format!("{} needs the cargo feature `tls`", target.ssl))),
        }
    }
}

#[cfg(all(test, feature = "tls"))]
mod tests;

#[cfg(all(test, not(feature = "tls")))]
mod tests_without {
    use super::connector;
    use crate::connect::config::Target;

    #[test]
    fn modes_that_need_tls_say_so() {
        for (mode, fits) in [
            ("disable", true),
            ("prefer", true),
            ("require", false),
            ("verify-ca", false),
            ("verify-full", false),
        ] {
            let verdict = connector(&Target::from_url(&format!("host=db sslmode={mode}")).unwrap());
            assert_eq!(verdict.is_ok(), fits, "{mode}");
            if let Err(error) = verdict {
                assert_eq!(error.field(), Some("sslmode"));
                assert!(error.to_string().contains(mode) && error.to_string().contains("feature `tls`"));
            }
            let local = Target::from_url(&format!("host=/tmp sslmode={mode}")).unwrap();
            assert!(connector(&local).is_ok(), "{mode} over a Unix socket");
        }
    }
}
