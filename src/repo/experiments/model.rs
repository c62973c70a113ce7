//! An experiment, as stored and as it is given.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio_postgres::Row;

use super::decider::{Decider, Parts, allocation};
use super::entry::{AssignmentUnit, Eligibility, Layer};
use super::plan::AnalysisPlan;
use crate::bucketing::{Allocation, Share};
use crate::error::{Error, Result};
use crate::id::ExperimentId;
use crate::money::Currency;
use crate::repo::Tenant;
use crate::repo::row::{Fields, rules, text_enum};
use crate::repo::variants::{FromJsonb, Variant, Variants};

text_enum! {
    /// Where an experiment is in its life: draft → active ⇄ paused → completed.
    ExperimentStatus, "status" {
        /// Can be edited and deleted; assigns nobody.
        Draft = "draft",
        /// Assigns users. What a phase shows them is frozen from here on.
        Active = "active",
        /// Assigns nobody new; stored quotes stand.
        Paused = "paused",
        /// Over; stored quotes stand.
        Completed = "completed",
    }
}

/// An experiment, as stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Experiment {
    /// Its id.
    pub id: ExperimentId,
    /// What the host's code calls it, unique within the tenant.
    pub key: String,
    /// What people call it.
    pub name: String,
    /// Where it is in its life.
    pub status: ExperimentStatus,
    /// The currency of the headline prices.
    pub currency: Currency,
    /// Its arms, in their order: the order decides who gets what.
    pub variants: Vec<Variant>,
    /// The variant whose prices everyone outside the experiment sees.
    pub baseline: String,
    /// The variant that won, once completed with one.
    pub winner: Option<String>,
    /// Decides, with the user's id, who gets what. Random, never changes.
    pub salt: String,
    /// Counts changes of the variants while users were being assigned; 1 at first.
    pub phase: i32,
    /// The share of users whom it takes.
    pub traffic: Share,
    /// The part of a layer that is its own, if it shares one with other experiments.
    pub layer: Option<Layer>,
    /// Whose id decides.
    pub unit: AssignmentUnit,
    /// Whom it takes.
    pub eligibility: Eligibility,
    /// For how long a price is promised when it is shown; `None` means for ever.
    pub quote_validity: Option<Duration>,
    /// How its results are judged.
    pub plan: AnalysisPlan,
    /// The variants that are forced upon some for testing, by the id of the user (or account).
    pub forced: BTreeMap<String, String>,
    /// Whatever the host keeps with it: a JSON object.
    pub metadata: Value,
    /// Raised by every change; an edit names the one it has read.
    pub revision: i64,
    /// When it was activated.
    pub start_date: Option<DateTime<Utc>>,
    /// When it was completed.
    pub end_date: Option<DateTime<Utc>>,
    /// When it was created.
    pub created_at: DateTime<Utc>,
    /// When it was changed last.
    pub updated_at: DateTime<Utc>,
    /// Who changed it last, if they said so.
    pub updated_by: Option<String>,
}

impl Experiment {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let FromJsonb(variants) = row.field::<FromJsonb<Vec<Variant>>>("variants")?;
        let baseline = match row.field::<Option<String>>("baseline")? {
            Some(name) => name,
            None => variants.first().map(|v| v.name.clone()).unwrap_or_default(),
        };
        Ok(Experiment {
            id: row.id("id")?,
            key: row.field("key")?,
            name: row.field("name")?,
            status: ExperimentStatus::stored(row.field("status")?)?,
            currency: row.currency("currency")?,
            variants,
            baseline,
            winner: row.field("winner")?,
            salt: row.field("salt")?,
            phase: row.field("phase")?,
            traffic: row.share("traffic")?,
            layer: Layer::from_row(row)?,
            unit: AssignmentUnit::stored(row.field("unit")?)?,
            eligibility: Eligibility::stored(row.field("eligibility")?)?,
            quote_validity: row
                .field::<Option<i32>>("quote_validity")?
                .map(|seconds| Duration::from_secs(seconds.unsigned_abs().into())),
            plan: row.field::<FromJsonb<_>>("plan")?.0,
            forced: row.field::<FromJsonb<_>>("forced")?.0,
            metadata: row.field("metadata")?,
            revision: row.field("revision")?,
            start_date: row.field("start_date")?,
            end_date: row.field("end_date")?,
            created_at: row.field("created_at")?,
            updated_at: row.field("updated_at")?,
            updated_by: row.field("updated_by")?,
        })
    }

    /// Who gets what by algorithm `v1`, while it is active: for backfills and simulations. Whom the list, a stored quote, or
    /// [`Eligibility`] says otherwise of is not looked at.
    ///
    /// ```no_run
    /// # async fn f(tenant: lastprice::TenantHandle, live: lastprice::Experiment, ids: Vec<lastprice::UserId>) -> lastprice::Result<()> {
    /// use lastprice::bucketing::{Placement, Unit};
    ///
    /// let me = tenant.tenants().get().await?.expect("the tenant of the experiment");
    /// let allocation = live.allocation(&me)?;
    /// let units: Vec<Unit> = ids.iter().map(Unit::of).collect(); // of accounts, in an experiment by account
    /// let mut placements = vec![Placement::HeldOut; units.len()];
    /// allocation.place_all(&units, &mut placements);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if the variants, which are public, have no weight any more.
    pub fn allocation(&self, tenant: &Tenant) -> Result<Allocation> {
        let weights: Vec<u32> = self.variants.iter().map(|v| v.weight).collect();
        allocation(&self.salt, &weights, self.traffic, self.layer.as_ref(), &tenant.salt, tenant.holdout)
    }

    /// A variant, by its name.
    #[must_use]
    pub fn variant(&self, name: &str) -> Option<&Variant> {
        self.variants.iter().find(|v| v.name == name)
    }
}

/// An experiment to create.
///
/// ```
/// use lastprice::{Currency, NewExperiment, Variants};
///
/// let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00").add("39", 1, "39.00");
/// let new = NewExperiment::new("pro-plan", "Price of the Pro plan", Currency::USD, variants).baseline("29");
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewExperiment {
    pub(super) id: ExperimentId,
    pub(super) key: String,
    pub(super) name: String,
    pub(super) currency: Currency,
    pub(super) variants: Variants,
    pub(super) baseline: Option<String>,
    pub(super) entry: Entry,
    pub(super) metadata: Value,
}

/// Who enters, and for how long; what is not said stays, or is the default.
#[derive(Debug, Clone, Default)]
pub(super) struct Entry {
    pub(super) traffic: Option<Share>,
    pub(super) layer: Option<Option<Layer>>,
    pub(super) unit: Option<AssignmentUnit>,
    pub(super) eligibility: Option<Eligibility>,
    pub(super) quote_validity: Option<Duration>,
    pub(super) plan: Option<AnalysisPlan>,
}

/// The setters that a new experiment and the edit of a draft have in common.
macro_rules! entry_setters {
    () => {
        /// The share of users whom it takes; of those in its part, if it has a part of a layer. Default: all.
        pub fn traffic(mut self, share: Share) -> Self {
            self.entry.traffic = Some(share);
            self
        }

        /// A part of a layer: the experiment shares no user with the others of the layer. Two that are live have no
        /// part in common: that is checked when one is activated.
        pub fn layer(mut self, layer: Layer) -> Self {
            self.entry.layer = Some(Some(layer));
            self
        }

        /// Whose id decides. Default: the user's.
        pub fn unit(mut self, unit: AssignmentUnit) -> Self {
            self.entry.unit = Some(unit);
            self
        }

        /// Whom it takes. Default: everyone.
        pub fn eligibility(mut self, eligibility: Eligibility) -> Self {
            self.entry.eligibility = Some(eligibility);
            self
        }

        /// For how long a price is promised when it is shown: whole seconds, from one to ten years. Default: for ever.
        /// It ends a checkout that was left open; the user's price is no other one when it is asked for again. See
        /// [`Quote::valid_until`](crate::Quote::valid_until).
        pub fn quotes_valid_for(mut self, validity: Duration) -> Self {
            self.entry.quote_validity = Some(validity);
            self
        }

        /// How its results are judged: frozen when it is activated, so that nobody chooses the rule that fits the
        /// numbers. Default: [`AnalysisPlan::default`].
        pub fn plan(mut self, plan: AnalysisPlan) -> Self {
            self.entry.plan = Some(plan);
            self
        }
    };
}

impl NewExperiment {
    /// An experiment with a key for code (`A-Z a-z 0-9 _ . : / -`, at most 128), a name for people, and its arms.
    pub fn new(
        key: impl Into<String>,
        name: impl Into<String>,
        currency: Currency,
        variants: Variants,
    ) -> Self {
        NewExperiment {
            id: ExperimentId::new(),
            key: key.into(),
            name: name.into(),
            currency,
            variants,
            baseline: None,
            entry: Entry::default(),
            metadata: Value::Object(Default::default()),
        }
    }

    /// Takes an id that the host made.
    pub fn id(mut self, id: ExperimentId) -> Self {
        self.id = id;
        self
    }

    /// The variant whose prices everyone outside the experiment sees. Default: the first.
    pub fn baseline(mut self, variant: impl Into<String>) -> Self {
        self.baseline = Some(variant.into());
        self
    }

    entry_setters!();

    /// A JSON object, at most 64 KiB. Default: `{}`.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }
}

impl NewExperiment {
    /// As if it were active, without a database: its key is its salt.
    pub(crate) fn decider(&self) -> Result<Decider> {
        let entry = self.entry.clone();
        Decider::new(Parts {
            id: self.id,
            key: &self.key,
            phase: 1,
            status: ExperimentStatus::Active,
            currency: self.currency,
            variants: self.checked_variants()?,
            baseline: self.baseline.as_deref(),
            salt: &self.key,
            traffic: entry.traffic.unwrap_or(Share::ALL),
            layer: entry.layer.flatten(),
            tenant_salt: "",
            holdout: Share::NONE,
            unit: entry.unit.unwrap_or(AssignmentUnit::User),
            eligibility: entry.eligibility.unwrap_or(Eligibility::Everyone),
            started: Some(Utc::now()),
            forced: HashMap::new(),
            exceptions: false,
        })
    }

    /// The variants, after all that is given was checked.
    pub(super) fn checked_variants(&self) -> Result<Vec<Variant>> {
        check_key("key", &self.key)?;
        rules::name("name", &self.name)?;
        rules::object("metadata", &self.metadata)?;
        let variants = self.variants.check()?;
        if self.baseline.as_ref().is_some_and(|b| variants.iter().all(|v| v.name != *b)) {
            return Err(Error::invalid("baseline", "is none of the variants"));
        }
        Ok(variants)
    }
}

/// What to change of a draft; what is not set stays.
///
/// ```
/// let edit = lastprice::ExperimentEdit::new().name("A better name").baseline("29");
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct ExperimentEdit {
    pub(super) name: Option<String>,
    pub(super) arms: Option<(Currency, Variants)>,
    pub(super) baseline: Option<String>,
    pub(super) entry: Entry,
    pub(super) metadata: Option<Value>,
}

impl ExperimentEdit {
    /// Changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Other arms, in place of the stored ones, and their currency.
    pub fn variants(mut self, currency: Currency, variants: Variants) -> Self {
        self.arms = Some((currency, variants));
        self
    }

    /// Another baseline.
    pub fn baseline(mut self, variant: impl Into<String>) -> Self {
        self.baseline = Some(variant.into());
        self
    }

    entry_setters!();

    /// Out of its layer: it shares users with all other experiments.
    pub fn no_layer(mut self) -> Self {
        self.entry.layer = Some(None);
        self
    }

    /// Another JSON object, in place of the stored one.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = Some(metadata);
        self
    }
}

/// The next phase of an experiment that has been activated: other weights, or other variants, for new users.
///
/// ```
/// use lastprice::{NewPhase, Variants};
///
/// let most_to_29 = NewPhase::new(Variants::new().add("19", 1, 19).add("29", 8, 29).add("39", 1, 39));
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NewPhase {
    pub(super) variants: Variants,
    pub(super) traffic: Option<Share>,
}

impl NewPhase {
    /// The variants from now on, the baseline among them.
    pub fn new(variants: Variants) -> Self {
        NewPhase { variants, traffic: None }
    }

    /// The share of users who are taken from now on, which may be smaller than before. Default: as before.
    pub fn traffic(mut self, share: Share) -> Self {
        self.traffic = Some(share);
        self
    }
}

pub(in crate::repo) fn check_key(field: &'static str, key: &str) -> Result<()> {
    let good = |c: u8| c.is_ascii_alphanumeric() || b"_.:/-".contains(&c);
    if key.is_empty()
        || key.len() > 128
        || !key.bytes().all(good)
        || !key.as_bytes()[0].is_ascii_alphanumeric()
    {
        return Err(Error::invalid(
            field,
            "is not 1 to 128 of `A-Z a-z 0-9 _ . : / -`, a letter or digit first",
        ));
    }
    Ok(())
}
