//! Two tenants, of whom one attacks: whatever it asks about the other's ids, keys, users and orders, it gets to the letter
//! the answer that it gets about such as nobody has.

use std::error::Error as _;
use std::fmt::Debug;

use lastprice::uuid::Uuid;
use lastprice::{NewAssignment, NewConversion, NewView, Result};

use crate::adversary_questions::{Names, Prey, QUESTIONS, ask, prey};
use crate::support_repo::*;
use crate::support_sql::connect;

/// All that a caller could learn of an answer.
pub(crate) fn said<T: Debug>(result: Result<T>) -> String {
    let error = match result {
        Ok(value) => return format!("{value:#?}"),
        Err(error) => error,
    };
    let mut all = format!(
        "{:?} {error} {error:?} {:?} {:?} {:?} {}",
        error.kind(),
        error.field(),
        error.conflicting_fields(),
        error.sqlstate(),
        error.is_retryable()
    );
    let mut cause = error.source();
    while let Some(error) = cause {
        all += &format!("\n{error} {error:?}");
        cause = error.source();
    }
    all
}

/// Without what is new in every answer: ids that were made for it, times, and salts.
fn without_the_new(answer: &str) -> String {
    let is_time = |word: &str| word.len() > 18 && word.as_bytes()[4] == b'-' && word.as_bytes()[10] == b'T';
    let mut kept = String::new();
    for line in answer.lines() {
        if line.trim_start().starts_with("salt:") {
            continue;
        }
        let words = line.split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || "-:.<>".contains(c)));
        for word in words {
            let bare = word.trim_end_matches(|c: char| !(c.is_ascii_alphanumeric() || "-:.<>".contains(c)));
            let hidden = if bare.parse::<Uuid>().is_ok() {
                "<new id>"
            } else if is_time(bare) {
                "<time>"
            } else {
                bare
            };
            kept.push_str(hidden);
            kept.push_str(&word[bare.len()..]);
        }
        kept.push('\n');
    }
    kept
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Alone,
    Together,
    Within,
}

/// What Globex gets for an answer, and keeps only if it asks alone.
async fn answer(prey: &Prey, form: Form, what: &str, names: &Names) -> String {
    let said = match form {
        Form::Alone => ask(what, &prey.two.globex, names, prey.mine).await,
        Form::Together => {
            let transaction = prey.two.globex.begin().await.unwrap();
            let said = ask(what, &transaction, names, prey.mine).await;
            transaction.rollback().await.unwrap();
            said
        }
        Form::Within => {
            let mut host = connect(&prey.two.database.app_url()).await;
            let transaction = host.transaction().await.unwrap();
            let said = {
                let scope = prey.two.client.within(&transaction, prey.two.other_id);
                ask(what, &scope, names, prey.mine).await
            };
            transaction.rollback().await.unwrap();
            said
        }
    };
    without_the_new(&names.hide(&said))
}

/// What is answered differently about Acme's names and about nobody's, and whether two nobodies differ.
async fn differences(prey: &Prey, form: Form) -> Vec<String> {
    let nobodies = [Names::of_nobody(&prey.acmes), Names::of_nobody(&prey.acmes)];
    let mut differing = Vec::new();
    for what in QUESTIONS {
        let of_acme = answer(prey, form, what, &prey.acmes).await;
        let of_nobody = answer(prey, form, what, &nobodies[0]).await;
        let of_another = answer(prey, form, what, &nobodies[1]).await;
        assert_eq!(of_nobody, of_another, "{form:?} {what}: the comparison itself does not hold");
        if of_acme != of_nobody {
            differing.push(format!("{form:?} {what}\nACME'S: {of_acme}\nNOBODY'S: {of_nobody}"));
        }
    }
    differing
}

#[tokio::test]
async fn no_answer_tells_anothers_names_from_nobodys() {
    let prey = prey().await;
    let before = acmes_rows(&prey).await;
    for form in [Form::Together, Form::Within, Form::Alone] {
        let differing = differences(&prey, form).await;
        assert!(differing.is_empty(), "{}", differing.join("\n\n"));
    }
    assert_eq!(acmes_rows(&prey).await, before, "nothing of Acme's was changed");
}

/// The comparison can fail: keys that are unique across tenants, as the original had them, give it away.
#[tokio::test]
async fn a_key_that_is_unique_across_tenants_is_noticed() {
    let prey = prey().await;
    let unique = "CREATE UNIQUE INDEX given_away ON experiments (id); CREATE UNIQUE INDEX given_away_too ON views (id);
                  CREATE UNIQUE INDEX given_away_three ON conversions (idempotency_key)";
    prey.two.owner.batch_execute(unique).await.unwrap();
    for form in [Form::Together, Form::Within, Form::Alone] {
        let differing = differences(&prey, form).await;
        for what in ["experiments.create same key", "views.record same id", "conversions.settle same key"] {
            let name = format!("{form:?} {what}\n");
            assert!(
                differing.iter().any(|difference| difference.starts_with(&name)),
                "{name}: {differing:?}"
            );
        }
    }
}

/// Everything of Acme's, whoever may see it.
async fn acmes_rows(prey: &Prey) -> Vec<String> {
    let mut all = Vec::new();
    for table in [
        "experiments",
        "assignments",
        "views",
        "conversions",
        "waiting_conversions",
        "usage",
        "recommendations",
        "webhook_events",
        "audit_trail",
        "identities",
        "erasures",
    ] {
        let mark = if table == "usage" { " - 'folded'" } else { "" };
        let sql = format!("SELECT (to_jsonb(x){mark})::text FROM {table} x WHERE tenant_id = $1 ORDER BY 1");
        let rows = prey.two.owner.query(&sql, &[&prey.two.id.uuid()]).await.unwrap();
        assert!(!rows.is_empty(), "{table}: Acme has something in it");
        all.extend(rows.iter().map(|row| row.get::<_, String>(0)));
    }
    all
}

#[tokio::test]
async fn the_recorder_and_the_assigner_tell_nothing_either() {
    let prey = prey().await;
    let nobody = Names::of_nobody(&prey.acmes);
    let before = acmes_rows(&prey).await;
    let recorder = prey.two.client.recorder();
    let assigner = prey.two.client.assigner(prey.two.other_id).await.unwrap();
    let mut answers = Vec::new();
    for n in [&prey.acmes, &nobody] {
        let mut all = String::new();
        let sale = NewConversion::sale(n.experiment, n.user.clone(), usd("29"), n.key.clone());
        let refund =
            NewConversion::refund(n.order.clone(), usd("1"), key(&format!("back of {}", n.order.as_str())));
        let events: [lastprice::Event; 4] = [
            NewView::new(n.experiment, n.user.clone()).id(n.view).into(),
            NewAssignment::new(n.experiment, n.user.clone()).into(),
            sale.into(),
            refund.into(),
        ];
        for event in events {
            all += &format!("{:#?}\n", recorder.track(prey.two.other_id, event).await);
        }
        all += &format!("{:?}\n", assigner.assign(&n.experiment_key, &n.user).is_some());
        all += &said(assigner.quote(&n.experiment_key, &n.user).await);
        answers.push(without_the_new(&n.hide(&all)));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(acmes_rows(&prey).await, before);
    let _ = recorder.shutdown(std::time::Duration::from_secs(10)).await;
}
