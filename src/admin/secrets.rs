//! Secrets under another key: tenant by tenant, without a pause for who uses them.

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Admin, Param, column};
use crate::error::{ErrorKind, Result};
use crate::id::TenantId;
use crate::repo::{PAID_API_KEY, WEBHOOK_SECRET};
use crate::secrets::{KeyContext, SecretKeys, Stored, unavailable};

/// How far [`Admin::rewrap_secrets`] is: after each batch, and at its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RewrapProgress {
    /// Tenants that were looked at.
    pub tenants: u64,
    /// Secrets that are now under the key that writes, and were not before.
    pub rewrapped: u64,
    /// Of `rewrapped`, those that nothing had encrypted: have them issued anew.
    pub plaintext: u64,
    /// Of `rewrapped`, those of `pgp_sym_encrypt`.
    pub legacy: u64,
    /// Secrets that were under it already.
    pub current: u64,
    /// Secrets that somebody else changed meanwhile, and that were left alone.
    pub changed: u64,
    /// Secrets that cannot be opened, or have more than 32 KiB, and that were left alone.
    pub failed: u64,
}

/// What [`Admin::rewrap_secrets`] has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RewrapReport {
    /// The key that writes: that of all secrets now, apart from those that `changed` and `failed` count.
    pub key_id: String,
    /// The numbers of all.
    pub total: RewrapProgress,
    /// What cannot be opened.
    pub failures: Vec<RewrapFailure>,
}

/// One secret that cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RewrapFailure {
    /// Whose.
    pub tenant_id: TenantId,
    /// `paid_api_key` or `webhook_secret`.
    pub column: &'static str,
    /// Why.
    pub kind: ErrorKind,
}

impl Admin {
    /// Encrypts the secrets of all tenants under the key that writes now, also those that `pgp_sym_encrypt` encrypted and
    /// those that nothing did. Services go on meanwhile. What is under that key already is passed over, so that it
    /// may be called again after whatever has ended it.
    ///
    /// Each tenant is a transaction of its own. The server sees encrypted texts only: not a passphrase, and not what is to be encrypted.
    ///
    /// ```no_run
    /// # async fn f(admin: lastprice::Admin, keys: lastprice::SecretKeys) -> lastprice::Result<()> {
    /// let report = admin.rewrap_secrets(&keys, |so_far| println!("{} tenants", so_far.tenants)).await?;
    /// assert!(report.failures.is_empty(), "keep the old keys: {:?}", report.failures);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Unavailable`](ErrorKind::Unavailable) or [`Timeout`](ErrorKind::Timeout) of the key provider, or of the connection;
    /// [`SecretUnavailable`](ErrorKind::SecretUnavailable) if the key that writes is of no use. What was done stays done. A secret that
    /// cannot be opened is no error: it is in the report.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, what was done stays done, and one tenant more may be.
    pub async fn rewrap_secrets(
        &self,
        keys: &SecretKeys,
        mut progress: impl FnMut(&RewrapProgress),
    ) -> Result<RewrapReport> {
        let mut report = RewrapReport { key_id: keys.current_key_id(), ..RewrapReport::default() };
        let mut from = Some(0);
        while let Some(next) = from {
            let first = uuid::Uuid::from_u128(next);
            let rows = self.query(None, BATCH, &[(&first, Type::UUID), (&BATCH_SIZE, Type::INT8)]).await?;
            for row in &rows {
                let held = Held::from_row(row)?;
                report.total.tenants += 1;
                from = held.tenant.uuid().as_u128().checked_add(1);
                self.rewrap_tenant(keys, held, &mut report).await?;
            }
            progress(&report.total);
            if (rows.len() as i64) < BATCH_SIZE {
                break;
            }
        }
        Ok(report)
    }

    /// Both secrets of a tenant in one statement, which writes nothing if the row has changed since it was read: then once more,
    /// if it was not the secrets that did.
    async fn rewrap_tenant(
        &self,
        keys: &SecretKeys,
        mut held: Held,
        report: &mut RewrapReport,
    ) -> Result<()> {
        let mut anew = [None, None];
        let (mut plaintext, mut legacy) = (0, 0);
        let tenant = held.tenant;
        for ((column, stored), anew) in COLUMNS.iter().zip(&held.stored).zip(&mut anew) {
            let Some(stored) = stored.as_deref().filter(|stored| !stored.is_empty()) else { continue };
            if keys.is_current(stored) {
                report.total.current += 1;
                continue;
            }
            match rewrap(keys, &KeyContext::new(tenant, column), stored).await? {
                Some(text) => {
                    plaintext += u64::from(Stored::of(stored) == Stored::Plain);
                    legacy += u64::from(Stored::of(stored) == Stored::Legacy);
                    *anew = Some(text);
                }
                None => {
                    report.total.failed += 1;
                    let kind = ErrorKind::SecretUnavailable;
                    report.failures.push(RewrapFailure { tenant_id: tenant, column, kind });
                }
            }
        }
        let count = anew.iter().flatten().count() as u64;
        if count == 0 {
            return Ok(());
        }
        let id = tenant.uuid();
        for _ in 0..TRIES {
            let params: [Param<'_>; 4] = [
                (&id, Type::UUID),
                (&anew[0], Type::TEXT),
                (&anew[1], Type::TEXT),
                (&held.version, Type::TEXT),
            ];
            if !self.query(None, STORE, &params).await?.is_empty() {
                report.total.rewrapped += count;
                report.total.plaintext += plaintext;
                report.total.legacy += legacy;
                return Ok(());
            }
            let rows = self.query(None, AGAIN, &[(&id, Type::UUID)]).await?;
            let Some(row) = rows.first() else { return Ok(()) }; // deleted, and its secrets with it
            let now = Held::from_row(row)?;
            if now.stored != held.stored {
                break;
            }
            held = now;
        }
        report.total.changed += count;
        Ok(())
    }
}

/// What a tenant's row holds, and in which version of it.
struct Held {
    tenant: TenantId,
    stored: [Option<String>; 2],
    version: String,
}

impl Held {
    fn from_row(row: &Row) -> Result<Self> {
        let id: uuid::Uuid = column(row, 0)?;
        Ok(Held { tenant: id.into(), stored: [column(row, 1)?, column(row, 2)?], version: column(row, 3)? })
    }
}

/// None: it cannot be opened, or is too long to be a secret.
async fn rewrap(keys: &SecretKeys, context: &KeyContext, stored: &str) -> Result<Option<String>> {
    let secret = if Stored::of(stored) == Stored::Plain {
        SecretString::from(stored)
    } else {
        match keys.open(context, stored).await {
            Ok(secret) => secret,
            Err(e) if e.kind() == ErrorKind::SecretUnavailable => return Ok(None),
            Err(e) => return Err(e),
        }
    };
    // By what nobody can have stored through the client, the others are not held up.
    if secret.expose_secret().len() > LONGEST {
        return Ok(None);
    }
    let text = keys.seal(context, &secret).await?;
    // The only text that is known to open is about to be replaced.
    if keys.open(context, &text).await?.expose_secret() != secret.expose_secret() {
        return Err(unavailable("what the key provider encrypts, it does not decrypt"));
    }
    Ok(Some(text))
}

const COLUMNS: [&str; 2] = [PAID_API_KEY, WEBHOOK_SECRET];
const BATCH_SIZE: i64 = 200;
const TRIES: usize = 4;
/// Well above any key and any list of secrets; sealed, it can still be read again.
const LONGEST: usize = 32_768;

/// By the primary key, all tenants, so that a batch is bounded whoever has secrets.
const BATCH: &str = "SELECT id, paid_api_key, webhook_secret, xmin::text FROM {s}.tenants WHERE id >= $1 ORDER BY id LIMIT $2";

const AGAIN: &str = "SELECT id, paid_api_key, webhook_secret, xmin::text FROM {s}.tenants WHERE id = $1";

/// The version, and not the old secrets: one of them may be a plaintext, which would be in the server's log.
const STORE: &str = "UPDATE {s}.tenants SET paid_api_key = COALESCE($2, paid_api_key), webhook_secret = COALESCE($3, webhook_secret)
     WHERE id = $1 AND xmin::text = $4 RETURNING id";
