//! One tenant, and the books of what it was told.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lastprice::webhook::{Delivery, Verifier};
use lastprice::{
    Assigner, Client, Currency, ExperimentId, IdempotencyKey, Money, NewExperiment, NewTenant, OrderId,
    SubscriptionId, TenantHandle, UserId, Variants, ViewId, chrono::Utc, secrecy::SecretString, uuid::Uuid,
};

use crate::Failure;

pub(crate) const MAIN: &str = "pro-plan";
const SECRET: &str = "the sender's and ours";

/// What was done, or may have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    View,
    Sale,
    Refund,
    Renewal,
    Usage,
    /// A sale that is reported by a webhook.
    Reported,
}

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nobody knows, and nobody ever will but by looking.
    Open,
    /// A recorder took it.
    Promised,
    /// It was acknowledged.
    Done,
    /// It was refused, rolled back, or failed with an error that says that nothing was written.
    NotDone,
}

/// One thing that was done; its number is its id and key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) what: What,
    pub(crate) fate: Fate,
    pub(crate) user: u32,
    pub(crate) cents: i64,
    /// With the next entry it is there, or neither is.
    pub(crate) has_twin: bool,
}

#[derive(Default)]
pub(crate) struct Books {
    pub(crate) entries: Vec<Entry>,
    /// What users were quoted, in cents, and were told so.
    pub(crate) quotes: HashMap<u32, i64>,
    pub(crate) users: Vec<u32>,
    /// Sales that were acknowledged, with a subscription or without.
    pub(crate) sales: Vec<u32>,
    /// Acknowledged since somebody last looked.
    pub(crate) fresh: Vec<u32>,
    counts: [(u64, u64); 6],
}

pub(crate) struct Shop {
    pub(crate) number: usize,
    pub(crate) tenant: TenantHandle,
    pub(crate) main: ExperimentId,
    pub(crate) assigner: Assigner,
    books: Mutex<Books>,
    /// One experiment after another.
    pub(crate) churn: tokio::sync::Mutex<u32>,
}

impl Shop {
    pub(crate) async fn open(client: &Client, number: usize) -> Result<Shop, Failure> {
        let new = NewTenant::managed(format!("Shop {number}"), format!("shop-{number}@example.com"));
        let tenant = client.tenant(client.create_tenant(new).await?.id);
        let draft = tenant.experiments().create(experiment(MAIN)).await?;
        let main = tenant.experiments().activate(draft.id).await?.id;
        let assigner = client.assigner(tenant.tenant_id()).await?;
        let (books, churn) = (Mutex::default(), tokio::sync::Mutex::default());
        Ok(Shop { number, tenant, main, assigner, books, churn })
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The user's name says whose it is: a row of somebody else's is known by it.
    pub(crate) fn user(&self, n: u32) -> UserId {
        UserId::new(format!("shop{}-{n}", self.number)).expect("it is short")
    }

    /// The same in all shops, which must not mind.
    pub(crate) fn key(n: u32) -> IdempotencyKey {
        IdempotencyKey::new(format!("entry-{n}")).expect("it is short")
    }

    pub(crate) fn order(n: u32) -> OrderId {
        OrderId::new(format!("order-{n}")).expect("it is short")
    }

    pub(crate) fn subscription(n: u32) -> SubscriptionId {
        SubscriptionId::new(format!("subscription-{n}")).expect("it is short")
    }

    pub(crate) fn view(n: u32) -> ViewId {
        ViewId::from(Uuid::from_u128(u128::from(n) << 64 | 0x8000 << 48 | u128::from(n)))
    }

    /// A signed report of a sale.
    pub(crate) fn delivery(&self, n: u32, entry: Entry) -> Delivery {
        use base64::Engine as _;
        use hmac::{Hmac, KeyInit, Mac};
        let body = format!(
            r#"{{"id":"evt-{n}","type":"subscription.created","data":{{"customer_id":"{}","order_id":"order-{n}",
                "amount":"{}.{:02}","subscription_id":"reported-{n}","metadata":{{"experiment_id":"{}"}}}}}}"#,
            self.user(entry.user),
            entry.cents / 100,
            entry.cents % 100,
            self.main
        );
        let (id, time) = (format!("message-{n}"), Utc::now().timestamp().to_string());
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(SECRET.as_bytes()).expect("any length will do");
        mac.update(format!("{id}.{time}.{body}").as_bytes());
        let signature = base64::engine::general_purpose::STANDARD.encode(mac.finalize().into_bytes());
        let signature = format!("v1,{signature}");
        let headers = [("webhook-id", &id), ("webhook-timestamp", &time), ("webhook-signature", &signature)];
        let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
        let verifier = Verifier::new([SecretString::from(SECRET)]).expect("there is one");
        verifier.standard(header, body.as_bytes(), Utc::now()).expect("it was signed so")
    }
}

impl Books {
    pub(crate) fn note(&mut self, what: What, user: u32, cents: i64, has_twin: bool) -> u32 {
        self.counts[what as usize].1 += 1;
        self.entries.push(Entry { what, fate: Fate::Open, user, cents, has_twin });
        u32::try_from(self.entries.len() - 1).expect("fewer than four billions")
    }

    /// What became of it. What is known stays so.
    pub(crate) fn set(&mut self, n: u32, fate: Fate) {
        let entry = &mut self.entries[n as usize];
        if matches!(entry.fate, Fate::Done | Fate::NotDone) {
            return;
        }
        entry.fate = fate;
        let (done, all) = &mut self.counts[entry.what as usize];
        *done += u64::from(fate == Fate::Done);
        *all -= u64::from(fate == Fate::NotDone);
        if fate == Fate::Done {
            self.fresh.push(n);
            if entry.what == What::Sale {
                self.sales.push(n);
            }
        }
    }

    /// What a user was quoted; another price than before, if there was one.
    pub(crate) fn quoted(&mut self, user: u32, cents: i64) -> Option<i64> {
        let before = self.quotes.insert(user, cents);
        if before.is_none() {
            self.users.push(user);
        }
        before.filter(|before| *before != cents)
    }

    /// How many there are of a kind: that were acknowledged, and with all that may be there.
    pub(crate) fn count(&self, what: What) -> (u64, u64) {
        self.counts[what as usize]
    }
}

pub(crate) fn experiment(key: &str) -> NewExperiment {
    let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00").add("39", 1, "39.00");
    NewExperiment::new(key, format!("Experiment {key}"), Currency::USD, variants)
}

pub(crate) fn usd(cents: i64) -> Money {
    Money::from_minor(cents, Currency::USD)
}
