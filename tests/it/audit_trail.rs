//! The audit trail: who changed what, never a secret, never another tenant's, and nobody can change it.

use lastprice::{
    Actor, Admin, AuditAction, AuditEntry, AuditObject, Client, Cursor, ErrorKind, ExperimentEdit, KeyRing,
    LimitPeriod, NewRecommendation, NewTenant, Objective, PriceBounds, SecretKeys, TenantChange,
    TenantHandle, TenantScope, UserId,
};

use crate::support_repo::*;
use crate::support_sql::{as_tenant, refusal, rows, value};

fn actor(name: &str) -> Actor {
    Actor::new(name).unwrap()
}

async fn trail(tenant: &TenantHandle) -> Vec<AuditEntry> {
    tenant.audit_trail().list(1000, None).await.unwrap().items
}

/// As `who action object: columns`, the oldest first.
fn told(entries: &[AuditEntry]) -> Vec<String> {
    let object = |entry: &AuditEntry| match entry.object {
        AuditObject::Tenant => "tenant",
        AuditObject::Experiment(_) => "experiment",
        AuditObject::Recommendation(_) => "recommendation",
        _ => "?",
    };
    let columns = |entry: &AuditEntry| entry.changes.keys().cloned().collect::<Vec<_>>().join(" ");
    let line = |entry: &AuditEntry| {
        format!(
            "{} {} {}: {}",
            entry.actor.as_deref().unwrap_or("-"),
            entry.action,
            object(entry),
            columns(entry)
        )
    };
    entries.iter().rev().map(line).collect()
}

/// By the owner's hand, and in the tenant's trail.
#[tokio::test]
async fn limits_of_a_tenant_are_changes_of_it() {
    let two = two_tenants().await;
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap().with_actor(actor("ann"));
    let limits = admin.limits();
    limits.set_tenant(two.id, "exports", LimitPeriod::Day, Some(5)).await.unwrap();
    limits.set_tenant(two.id, "exports", LimitPeriod::Day, Some(5)).await.unwrap();
    limits.set_tenant(two.id, "exports", LimitPeriod::Day, None).await.unwrap();
    limits.set_billing_day(two.id, 15).await.unwrap();
    limits.clear_tenant(two.id, "exports").await.unwrap();
    let all = trail(&two.acme).await;
    let expected = ["limit.exports", "limit.exports", "billing_day", "limit.exports"];
    assert_eq!(told(&all)[1..], expected.map(|change| format!("ann changed tenant: {change}")));
    let change = |n: usize| serde_json::to_value(&all[n].changes).unwrap();
    let limit = |quota: serde_json::Value| serde_json::json!({ "period": "day", "quota": quota });
    assert_eq!(change(3), serde_json::json!({ "limit.exports": { "new": limit(5.into()) } }));
    let lifted = serde_json::json!({ "old": limit(5.into()), "new": limit(serde_json::Value::Null) });
    assert_eq!(change(2)["limit.exports"], lifted);
    assert_eq!(change(0), serde_json::json!({ "limit.exports": { "old": limit(serde_json::Value::Null) } }));
    two.bystander_saw_nothing().await;
    // It goes with the tenant.
    limits.set_tenant(two.id, "exports", LimitPeriod::Day, Some(5)).await.unwrap();
    two.owner.execute("DELETE FROM tenants WHERE id = $1", &[&two.id.uuid()]).await.unwrap();
    let left = "SELECT string_agg(action, ' ') FROM audit_trail WHERE tenant_id = $1";
    assert_eq!(two.owner.query_one(left, &[&two.id.uuid()]).await.unwrap().get::<_, &str>(0), "deleted");
}

#[tokio::test]
async fn every_change_is_there_with_who_made_it() {
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(actor("ann"));
    let ben = two.client.tenant(two.id).with_actor(actor("Жуков's"));
    let x = ann.experiments().create(new_experiment("pro")).await.unwrap();
    let dearer = lastprice::Variants::new().add("19", 1, "19.50").add("29", 2, "29.00").add("39", 1, "39.00");
    let x = ben
        .experiments()
        .edit(x.id, x.revision, ExperimentEdit::new().variants(lastprice::Currency::USD, dearer))
        .await
        .unwrap();
    ann.experiments().activate(x.id).await.unwrap();
    two.acme.experiments().force(x.id, &UserId::new("a-tester").unwrap(), Some("39")).await.unwrap();
    ben.experiments().pause(x.id).await.unwrap();
    let new = NewRecommendation::new(x.id, usd("24.90"), 0.9, Objective::Revenue);
    let r = ann.recommendations().store(&new).await.unwrap();
    let bounds = PriceBounds::new();
    ben.recommendations().approve(r.id, &bounds).await.unwrap();
    // What changes nothing is no change, nor what is counted.
    assign(&two.acme, x.id, 0..3).await;
    two.acme.views().record(&lastprice::NewView::new(x.id, user(0))).await.unwrap();
    two.owner.execute("UPDATE experiments SET name = name WHERE id = $1", &[&x.id.uuid()]).await.unwrap();

    let all = trail(&two.acme).await;
    assert_eq!(
        told(&all),
        [
            "- created tenant: billing_day email holdout mode name plan",
            "ann created experiment: baseline currency eligibility key name phase status traffic unit variants",
            "Жуков's changed experiment: variants",
            "ann changed experiment: start_date status",
            "- changed experiment: forced",
            "Жуков's changed experiment: status",
            "ann created recommendation: confidence currency experiment_id objective price status",
            "Жуков's changed recommendation: status",
        ]
    );
    let [.., edit, _, _] = &all[..] else { unreachable!() };
    let (old, new) =
        (edit.changes["variants"].old.as_ref().unwrap(), edit.changes["variants"].new.as_ref().unwrap());
    assert_eq!((&old[0]["price"], &new[0]["price"]), (&"19.00".into(), &"19.50".into()));
    let status = &all[2].changes["status"];
    assert_eq!((status.old.as_ref(), status.new.as_ref()), (Some(&"active".into()), Some(&"paused".into())));
    assert_eq!((all[2].action, all[2].object), (AuditAction::Changed, AuditObject::Experiment(x.id)));
    assert!(all.iter().all(|entry| entry.role == "lastprice_service"
        && (lastprice::chrono::Utc::now() - entry.at).num_minutes() < 5));
    assert!(!format!("{all:?}").contains("a-tester"), "ids of users are not in it");

    // Of one experiment, with its recommendations, by pages.
    let mut pages = Vec::new();
    let mut after: Option<Cursor> = None;
    loop {
        let page = ann.audit_trail().of_experiment(x.id, 3, after).await.unwrap();
        pages.push(page.items.len());
        assert_eq!(page.items, all[pages[..pages.len() - 1].iter().sum()..][..page.items.len()]);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(pages, [3, 3, 1]);
    refused(ann.audit_trail().list(0, None).await, "limit");
    refused(ann.audit_trail().of_experiment(x.id, 1001, None).await, "limit");
    // The other one has the same, and sees nothing of this.
    assert!(two.globex.audit_trail().of_experiment(x.id, 10, None).await.unwrap().items.is_empty());
    assert!(told(&trail(&two.globex).await).iter().all(|line| line.starts_with("- ")));
    two.bystander_saw_nothing().await;
}

/// Neither in plain nor encrypted, whatever is done with them.
#[tokio::test]
async fn of_secrets_it_says_only_that_they_are_others() {
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(actor("ann"));
    let change = TenantChange::new().byok("pk_live_1").webhook_secrets(["whsec_1".into(), "whsec_2".into()]);
    ann.tenants().update(change).await.unwrap();
    ann.tenants().update(TenantChange::new().byok("pk_live_2")).await.unwrap();
    let byok = two.client.create_tenant(NewTenant::byok("New", "n@new.example", "pk_live_3")).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap().with_actor(actor("rotation"));
    let keys = KeyRing::new("next", [8; 32]).unwrap().and_reading("test", [7; 32]).unwrap();
    admin.rewrap_secrets(&SecretKeys::from(keys), |_| ()).await.unwrap();

    let lines = told(&trail(&two.acme).await);
    assert_eq!(
        lines[1..],
        [
            "ann changed tenant: mode paid_api_key webhook_secret",
            "ann changed tenant: paid_api_key",
            "rotation changed tenant: paid_api_key webhook_secret"
        ]
    );
    assert_eq!(told(&trail(&two.client.tenant(byok.id)).await).len(), 2);
    let holds = "SELECT string_agg(t::text, ' ') FROM audit_trail t";
    let holds = value(&rows(&two.owner, holds).await.unwrap()).to_owned();
    for secret in ["pk_live", "whsec", "lp1:", "globex's key", "salt"] {
        assert!(!holds.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn it_goes_and_stays_with_the_transaction_of_the_change() {
    let two = two_tenants().await;
    let x = draft(&two.acme, "x").await;
    let before = trail(&two.acme).await.len();
    let ann = two.client.tenant(two.id).with_actor(actor("ann"));
    let transaction = ann.begin().await.unwrap();
    transaction.experiments().activate(x.id).await.unwrap();
    assert_eq!(transaction.audit_trail().list(1, None).await.unwrap().items[0].actor.as_deref(), Some("ann"));
    transaction.rollback().await.unwrap();
    assert_eq!(trail(&two.acme).await.len(), before);

    // In a host's: under the host's role and actor before and after, rolled back with its rows or kept with them.
    let mut host = two.database.connect_app().await.unwrap();
    for commits in [false, true] {
        let transaction = host.transaction().await.unwrap();
        transaction.batch_execute("SET LOCAL app.actor = 'the host'").await.unwrap();
        let scope: TenantScope<'_> = two.client.within(&transaction, two.id).with_actor(actor("carl"));
        let name = ExperimentEdit::new().name(format!("X {commits}"));
        scope.experiments().edit(x.id, 1, name).await.unwrap();
        let still = transaction.query_one("SELECT current_setting('app.actor')", &[]).await.unwrap();
        assert_eq!(still.get::<_, &str>(0), "the host");
        assert_eq!(scope.audit_trail().list(1, None).await.unwrap().items[0].actor.as_deref(), Some("carl"));
        if commits {
            transaction.commit().await.unwrap()
        } else {
            transaction.rollback().await.unwrap()
        }
        assert_eq!(trail(&two.acme).await.len(), before + usize::from(commits));
    }

    // By hand, by the owner: what the database knows is there.
    let sql = format!("UPDATE experiments SET name = 'by hand' WHERE tenant_id = '{}'", two.id);
    two.owner.batch_execute(&sql).await.unwrap();
    let sql = format!("BEGIN; SET LOCAL app.actor = 'dba'; {}; COMMIT", sql.replace("by hand", "by a dba"));
    two.owner.batch_execute(&sql).await.unwrap();
    let last = trail(&two.acme).await;
    let who = |entry: &AuditEntry| (entry.actor.clone(), entry.role.clone());
    assert_eq!(who(&last[0]), (Some("dba".into()), "lastprice_owner".into()));
    assert_eq!(who(&last[1]), (None, "lastprice_owner".into()));
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn what_is_deleted_leaves_its_trail() {
    let two = two_tenants().await;
    let ann = two.client.tenant(two.id).with_actor(actor("ann"));
    let x = draft(&two.acme, "x").await;
    let r = NewRecommendation::new(x.id, usd("24.90"), 0.9, Objective::Revenue);
    two.acme.recommendations().store(&r).await.unwrap();
    ann.experiments().delete_draft(x.id).await.unwrap();
    let left = ann.audit_trail().of_experiment(x.id, 10, None).await.unwrap().items;
    let mut lines = told(&left);
    lines.sort();
    assert_eq!(
        lines,
        [
            "- created experiment: baseline currency eligibility key name phase status traffic unit variants",
            "- created recommendation: confidence currency experiment_id objective price status",
            "ann deleted experiment: baseline currency eligibility key name phase status traffic unit variants",
            "ann deleted recommendation: confidence currency experiment_id objective price status",
        ]
    );
    let gone = left
        .iter()
        .find(|e| e.object == AuditObject::Experiment(x.id) && e.action == AuditAction::Deleted)
        .unwrap();
    assert_eq!(
        (gone.changes["status"].old.as_ref(), gone.changes["status"].new.as_ref()),
        (Some(&"draft".into()), None)
    );

    // A tenant takes it along: what stays is that it went, and by whom. The follow-up makes one change more on its way.
    let id = two.client.create_tenant(NewTenant::managed("Initech", "i@initech.example")).await.unwrap().id;
    let initech = two.client.tenant(id);
    let x = active(&initech, "x").await.id;
    let r = NewRecommendation::new(x, usd("24.90"), 0.9, Objective::Revenue);
    let r = initech.recommendations().store(&r).await.unwrap().id;
    initech.recommendations().approve(r, &PriceBounds::new()).await.unwrap();
    initech.recommendations().apply(r, &lastprice::FollowUp::new("next")).await.unwrap();
    let admin = Admin::connect(&two.database.owner_url()).await.unwrap().with_actor(actor("somebody"));
    assert!(admin.tenants().with_actor(actor("the owner")).delete(id).await.unwrap());
    assert_eq!(told(&trail(&initech).await), ["the owner deleted tenant: "]);
    let kept = "SELECT string_agg(t::text, ' ') FROM audit_trail t WHERE tenant_id = $1";
    let kept: String = two.owner.query_one(kept, &[&id.uuid()]).await.unwrap().get(0);
    assert!(!kept.contains("initech"), "{kept}");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_service_can_neither_write_nor_change_nor_forge_it() {
    let two = two_tenants().await;
    let app = two.database.connect_app().await.unwrap();
    let id = two.id.to_string();
    for sql in [
        "UPDATE audit_trail SET actor = 'nobody'",
        "DELETE FROM audit_trail",
        "TRUNCATE audit_trail",
        "INSERT INTO audit_trail SELECT * FROM audit_trail LIMIT 1",
        "SELECT audit_change()",
        "ALTER TABLE tenants DISABLE TRIGGER audit_trail",
        "DROP TRIGGER audit_trail ON tenants",
        "SET session_replication_role = replica",
        // A table in the way of ours.
        "CREATE TEMP TABLE audit_trail (LIKE public.audit_trail); UPDATE tenants SET name = 'in the way'; SELECT 1 / (SELECT count(*) FROM pg_temp.audit_trail)",
    ] {
        let (code, _, message) = refusal(as_tenant(&app, &id, sql).await);
        let expected = if sql.starts_with("CREATE") { "division by zero" } else { "" };
        assert!(
            message.contains(expected) && (!expected.is_empty() || code.code() == "42501"),
            "{sql}: {code:?} {message}"
        );
    }
    let theirs = format!("SELECT count(*) FROM audit_trail WHERE tenant_id = '{}'", two.other_id);
    assert_eq!(value(&as_tenant(&app, &id, &theirs).await.unwrap()), "0");
    assert_eq!(value(&rows(&app, "SELECT count(*) FROM audit_trail").await.unwrap()), "0", "of nobody");

    // The audit of the isolation sees what somebody gave away.
    let client = Client::builder().url(two.database.app_url()).build().unwrap();
    client.verify_isolation().await.unwrap().into_result().unwrap();
    two.owner.batch_execute("GRANT DELETE ON audit_trail TO lastprice_app").await.unwrap();
    let refused = client.verify_isolation().await.unwrap().into_result().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::IsolationNotEnforced);
    two.bystander_saw_nothing().await;
}
