//! Tenants: by themselves, and by their operator.

use lastprice::uuid::Uuid;
use lastprice::{Actor, Admin, ErrorKind, NewTenant, Plan, TenantChange, TenantId, TenantMode};

use crate::support_repo::*;

#[tokio::test]
async fn managed_and_byok_with_a_hosts_own_id() {
    let two = two_tenants().await;
    let id = TenantId::from(Uuid::from_u128(0x1234_5678));
    let new = NewTenant::managed("Initech ✓", "Ops+x@Initech.example")
        .id(id)
        .plan(Plan::Enterprise)
        .metadata(lastprice::serde_json::json!({"crm": 42, "tags": ["a", "é"]}));
    let created = two.client.create_tenant(new).await.unwrap();
    assert_eq!((created.id, created.mode, created.plan), (id, TenantMode::Managed, Plan::Enterprise));
    assert_eq!((created.name.as_str(), created.email.as_str()), ("Initech ✓", "Ops+x@Initech.example"));
    assert_eq!(created.metadata["tags"][1], "é");
    assert_eq!(created.updated_by, None);
    let tenant = two.client.tenant(id);
    assert_eq!(tenant.tenants().get().await.unwrap(), Some(created));
    assert_eq!(own_key(&tenant).await, None);

    let new = NewTenant::byok("Hooli", "it@hooli.example", "k'ey \\ \"quoted\"");
    let created = two.client.create_tenant(new).await.unwrap();
    assert_eq!((created.mode, created.plan), (TenantMode::Byok, Plan::Free));
    let hooli = two.client.tenant(created.id);
    assert_eq!(own_key(&hooli).await.as_deref(), Some("k'ey \\ \"quoted\""));

    // The nil UUID is an id like any other, for the operator's list too.
    let nil = NewTenant::managed("Nil", "nil@nil.example").id(Uuid::nil().into());
    two.client.create_tenant(nil).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    let first = admin.tenants().list(1, None).await.unwrap();
    assert_eq!(first.items[0].name, "Nil");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_change_changes_what_it_names_and_records_who() {
    let two = two_tenants().await;
    let tenants = two.acme.tenants();
    let before = tenants.get().await.unwrap().unwrap();

    let ann = two.client.tenant(two.id).with_actor(Actor::new("ann@acme.example").unwrap());
    let after = ann.tenants().update(TenantChange::new().plan(Plan::Pro)).await.unwrap();
    assert_eq!(after.updated_by.as_deref(), Some("ann@acme.example"));
    assert_eq!((after.plan, &after.name, after.mode), (Plan::Pro, &before.name, before.mode));
    assert!(after.updated_at >= before.updated_at && after.created_at == before.created_at);

    let metadata = lastprice::serde_json::json!({"a": {"b": [1, null, true]}});
    let change = TenantChange::new().name("Acme Ltd").byok("key 1").metadata(metadata.clone());
    let after = ann.tenants().update(change).await.unwrap();
    assert_eq!((after.mode, after.name.as_str(), &after.metadata), (TenantMode::Byok, "Acme Ltd", &metadata));
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("key 1"));
    // What is not named stays, the key included; who says nothing is nobody.
    let after = tenants.update(TenantChange::new()).await.unwrap();
    assert_eq!((after.mode, after.updated_by), (TenantMode::Byok, None));
    assert_eq!(own_key(&two.acme).await.as_deref(), Some("key 1"));
    tenants.update(TenantChange::new().managed()).await.unwrap();
    assert_eq!(own_key(&two.acme).await, None);

    // In a transaction the actor travels along, and a rollback takes the change back.
    let transaction = ann.begin().await.unwrap();
    let inside = transaction.tenants().update(TenantChange::new().name("Acme Inc")).await.unwrap();
    assert_eq!(inside.updated_by.as_deref(), Some("ann@acme.example"));
    transaction.rollback().await.unwrap();
    assert_eq!(tenants.get().await.unwrap().unwrap().name, "Acme Ltd");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn whoever_creates_is_recorded_too() {
    let two = two_tenants().await;
    let new = NewTenant::managed("Initech", "ops@initech.example");
    let id = TenantId::new();
    let bob = two.client.tenant(id).with_actor(Actor::new("bob").unwrap());
    assert_eq!(bob.tenants().create(new.id(id)).await.unwrap().updated_by.as_deref(), Some("bob"));
    let created = bob.experiments().create(new_experiment("x")).await.unwrap();
    assert_eq!(created.updated_by.as_deref(), Some("bob"));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn an_address_belongs_to_one_tenant_in_any_case() {
    let two = two_tenants().await;
    let before = two.acme.tenants().get().await.unwrap();
    for email in ["it@globex.example", "IT@GLOBEX.example", "It@Globex.Example"] {
        let new = NewTenant::byok("Copy", email, "the copy's key");
        let taken = is_kind(two.client.create_tenant(new).await, ErrorKind::Conflict);
        let text = format!("{taken} {taken:?}").to_lowercase();
        for secret in ["globex", "copy", "key\"", &two.other_id.to_string()] {
            assert!(!text.contains(secret), "{text}");
        }
        // A taken id cannot be told from a taken address.
        let id = NewTenant::managed("Copy", "new@copy.example").id(two.other_id);
        let taken_id = is_kind(two.client.create_tenant(id).await, ErrorKind::Conflict);
        assert_eq!(format!("{taken_id} {taken_id:?}").to_lowercase(), text);
    }
    // One scope cannot make another one's tenant.
    let foreign = NewTenant::managed("X", "x@x.example").id(TenantId::new());
    refused(two.acme.tenants().create(foreign).await, "id");
    assert_eq!(two.acme.tenants().get().await.unwrap(), before);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_tenant_that_is_not_there_has_nothing() {
    let two = two_tenants().await;
    let nobody = two.client.tenant(TenantId::new());
    assert_eq!(nobody.tenants().get().await.unwrap(), None);
    is_kind(nobody.tenants().paid_credentials().await, ErrorKind::NotFound);
    is_kind(nobody.tenants().update(TenantChange::new().name("X")).await, ErrorKind::NotFound);
    is_kind(nobody.experiments().create(new_experiment("x")).await, ErrorKind::NotFound);
    let usage = lastprice::NewUsage::new("api_calls", today(), 1, key("k"));
    is_kind(nobody.usage().add(&usage).await, ErrorKind::NotFound);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn rules_are_checked_before_the_database_is_asked() {
    let two = two_tenants().await;
    let create = |new: NewTenant| two.client.create_tenant(new);
    for name in ["", "   ", "\n", "a\0b", &"x".repeat(201)] {
        refused(create(NewTenant::managed(name, "a@b.example")).await, "name");
        refused(two.acme.tenants().update(TenantChange::new().name(name)).await, "name");
    }
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    for email in ["", "a", "a@", "@b", "a@b@c", "a b@c", "a@b\n", "a\0@b", &format!("{}@b", "x".repeat(320))]
    {
        refused(create(NewTenant::managed("A", email)).await, "email");
        refused(admin.tenants().by_email(email).await, "email");
        refused(admin.tenants().set_email(two.id, email).await, "email");
    }
    for key in ["", "a\0b", &"x".repeat(8193)] {
        refused(create(NewTenant::byok("A", "a@b.example", key)).await, "paid_api_key");
        refused(two.acme.tenants().update(TenantChange::new().byok(key)).await, "paid_api_key");
    }
    let longest = "é".repeat(200);
    create(NewTenant::managed(&longest, format!("{}@b", "x".repeat(318)))).await.unwrap();
    refused(admin.tenants().list(0, None).await, "limit");
    refused(admin.tenants().list(1001, None).await, "limit");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn the_operator_lists_finds_renames_and_deletes() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap();
    for n in 0..7 {
        two.client.create_tenant(NewTenant::managed("T", format!("t{n}@t.example"))).await.unwrap();
    }
    let (mut all, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = admin.tenants().list(2, after).await.unwrap();
        all.extend(page.items.iter().map(|t| t.id));
        pages += 1;
        let Some(next) = page.next else { break };
        after = Some(next.to_string().parse().unwrap());
    }
    assert_eq!((all.len(), pages), (9, 5));
    assert!(all.is_sorted() && all.contains(&two.id) && all.contains(&two.other_id));

    let found = admin.tenants().by_email("OPS@acme.EXAMPLE").await.unwrap().unwrap();
    assert_eq!(found.id, two.id);
    assert_eq!(admin.tenants().by_email("nobody@acme.example").await.unwrap(), None);
    let renamed = admin.tenants().set_email(two.id, "New@acme.example").await.unwrap();
    assert_eq!((renamed.id, renamed.email.as_str()), (two.id, "New@acme.example"));
    assert_eq!(admin.tenants().by_email("ops@acme.example").await.unwrap(), None);
    admin.tenants().set_email(two.id, "NEW@acme.example").await.unwrap(); // its own, in another case
    is_kind(admin.tenants().set_email(two.id, "IT@globex.example").await, ErrorKind::Conflict);
    is_kind(admin.tenants().set_email(TenantId::new(), "a@b.example").await, ErrorKind::NotFound);

    // Deleting takes everything along, active experiments and their ledger included, and nothing else.
    let experiment = active(&two.acme, "pro-plan").await;
    assign(&two.acme, experiment.id, 0..10).await;
    two.acme.views().record(&lastprice::NewView::new(experiment.id, user(1))).await.unwrap();
    let sold = sale(experiment.id, 1, "29");
    two.acme.conversions().settle(&sold).await.unwrap().entry().unwrap().unwrap();
    two.acme.usage().add(&lastprice::NewUsage::new("api_calls", today(), 1, key("k"))).await.unwrap();
    assert!(two.count("metric_deltas").await > 0);
    assert!(admin.tenants().delete(two.id).await.unwrap());
    assert!(!admin.tenants().delete(two.id).await.unwrap());
    for table in
        ["experiments", "assignments", "views", "conversions", "usage", "metric_deltas", "metric_totals"]
    {
        assert_eq!(two.count(table).await, 0, "{table}");
    }
    assert_eq!(two.acme.tenants().get().await.unwrap(), None);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn no_key_in_any_debug_output() {
    let two = two_tenants().await;
    let new = NewTenant::byok("Initech", "ops@initech.example", "s3cret");
    let mut seen = format!("{new:?}");
    let created = two.client.create_tenant(new.clone()).await.unwrap();
    seen += &format!("{created:?}");
    let handle = two.client.tenant(created.id);
    let transaction = handle.begin().await.unwrap();
    transaction.tenants().update(TenantChange::new().byok("s3cret 2")).await.unwrap();
    seen += &format!("{transaction:?} {handle:?} {:?} {:?}", handle.tenants(), two.client);
    transaction.commit().await.unwrap();
    seen += &format!("{:?}", two.client.create_tenant(new).await.unwrap_err());
    seen += &format!("{:?}", Admin::connect(&two.database.owner_url()).await.unwrap());
    assert!(!seen.contains("s3cret"), "{seen}");
    two.bystander_saw_nothing().await;
}
