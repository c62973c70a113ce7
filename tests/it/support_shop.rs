//! What several tests need.

use lastprice::{
    Client, Currency, Error, ErrorKind, ExperimentId, IdempotencyKey, Money, NewConversion, NewExperiment,
    NewTenant, NewView, TenantHandle, UserId, Variants,
};

/// A tenant with an active experiment and a user who has a quote in it.
pub(crate) struct Shop {
    pub(crate) tenant: TenantHandle,
    pub(crate) experiment: ExperimentId,
    pub(crate) user: UserId,
}

impl Shop {
    pub(crate) async fn open(client: &Client, name: &str) -> Result<Self, Error> {
        let address = format!("{name}-{}@example.com", lastprice::TenantId::new());
        let tenant = client.tenant(client.create_tenant(NewTenant::managed(name, address)).await?.id);
        let variants = Variants::new().add("19", 1, "19.00").add("29", 1, "29.00");
        let new = NewExperiment::new("pro-plan", "Price of the Pro plan", Currency::USD, variants);
        let experiment = tenant.experiments().create(new).await?.id;
        tenant.experiments().activate(experiment).await?;
        let user = UserId::new("user-42")?;
        tenant.assignments().assign(experiment, &user).await?;
        Ok(Shop { tenant, experiment, user })
    }

    /// The same shop through another client.
    pub(crate) fn through(&self, client: &Client) -> Self {
        Shop {
            tenant: client.tenant(self.tenant.tenant_id()),
            experiment: self.experiment,
            user: self.user.clone(),
        }
    }

    pub(crate) fn view(&self) -> NewView {
        NewView::new(self.experiment, self.user.clone())
    }

    pub(crate) fn sale(&self, key: &str) -> NewConversion {
        let key = IdempotencyKey::new(key).unwrap();
        NewConversion::sale(self.experiment, self.user.clone(), Money::from_minor(1900, Currency::USD), key)
    }

    /// Views and sales, as the metrics have them.
    pub(crate) async fn counts(&self) -> (u64, u64) {
        let counts = self.tenant.metrics().experiment(self.experiment).await.unwrap();
        (counts.views, counts.conversions)
    }
}

/// Two tenants who see their own experiment, can write to it, and see nothing of the other's.
pub(crate) async fn assert_isolated(client: &Client) {
    let acme = Shop::open(client, "acme").await.unwrap();
    let globex = Shop::open(client, "globex").await.unwrap();
    for (mine, theirs) in [(&acme, &globex), (&globex, &acme)] {
        mine.tenant.views().record(&mine.view()).await.unwrap();
        let experiments = mine.tenant.experiments();
        assert_eq!(experiments.list(None, 10, None).await.unwrap().items.len(), 1);
        assert!(experiments.get(mine.experiment).await.unwrap().is_some());
        assert!(experiments.get(theirs.experiment).await.unwrap().is_none());
        let refused = mine.tenant.metrics().experiment(theirs.experiment).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound);
        assert_eq!(mine.counts().await, (1, 0));
    }
}

/// All that an error says, to whoever asks: its sentence, its `Debug`, and those of its causes.
pub(crate) fn all_of(error: &Error) -> String {
    let mut shown = String::new();
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        shown += &format!("{error}\n{error:?}\n{error:#?}\n");
        next = error.source();
    }
    shown
}
