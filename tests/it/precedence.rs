//! Who sees what, and why: by the database and from memory alike.

use lastprice::bucketing::{Allocation, Placement, Share, Unit};
use lastprice::chrono::{Duration, Utc};
use lastprice::{
    AssignOutcome, AssignmentReason, AssignmentUnit, Decision, Eligibility, ErrorKind, ExperimentEdit, Layer,
    NewPhase, Reason, Subject, TenantChange, Variants,
};

use crate::support_repo::*;

fn reason(outcome: &AssignOutcome) -> Reason {
    match outcome {
        AssignOutcome::Assigned { quote, .. } => match quote.reason {
            AssignmentReason::Forced => Reason::Forced,
            AssignmentReason::Grandfathered => Reason::Grandfathered,
            _ => Reason::Randomised,
        },
        AssignOutcome::Outside { reason, .. } => *reason,
        other => panic!("{other:?}"),
    }
}

fn same(decision: &Decision<'_>, outcome: &AssignOutcome) -> bool {
    (decision.variant(), decision.price(), decision.book())
        == (outcome.variant(), outcome.price(), outcome.book())
}

/// All 128 combinations of what can decide, each with everything below it in place.
#[tokio::test]
async fn the_first_that_holds_decides() {
    let two = two_tenants().await;
    let (experiments, who) = (two.acme.experiments(), user(1));
    let salt = "SELECT salt FROM tenants WHERE id = $1";
    let salt: String = two.owner.query_one(salt, &[&two.id.uuid()]).await.unwrap().get(0);
    let assigner = two.client.assigner(two.id).await.unwrap();
    let yes = |_: &str| true;
    let no = |_: &str| false;
    for case in 0..128 {
        let on = |bit: u32| case & (1 << bit) > 0;
        let [forced, stored, paused, ineligible, held_out, other_layer, no_traffic] =
            std::array::from_fn(|bit| on(bit as u32));
        let holdout = if held_out { Share::ALL } else { Share::NONE };
        two.acme.tenants().update(TenantChange::new().holdout(holdout)).await.unwrap();
        let name = format!("layer-{case}");
        let is_in = |part| {
            let allocation =
                Allocation::new("", &[1]).unwrap().layer(&format!("{salt}/{name}"), part).unwrap();
            matches!(allocation.place(Unit::of(&who)), Placement::Variant(_))
        };
        let (low, high) = (Share::NONE..percent(50), percent(50)..Share::ALL);
        assert_ne!(is_in(low.clone()), is_in(high.clone()));
        let part = if is_in(low.clone()) == other_layer { high } else { low };
        let traffic = if no_traffic { Share::NONE } else { Share::ALL };
        let new = new_experiment(&name).traffic(traffic).layer(Layer::new(name.clone(), part).unwrap());
        let id = experiments.create(new).await.unwrap().id;
        experiments.activate(id).await.unwrap();
        if stored {
            let sql = "INSERT INTO assignments (tenant_id, experiment_id, user_id, variant, price, currency, reason)
                       VALUES ($1, $2, $3, '19', 18, 'USD', 'imported')";
            two.owner.execute(sql, &[&two.id.uuid(), &id.uuid(), &who.as_str()]).await.unwrap();
        }
        if forced {
            experiments.force(id, &who, Some("39")).await.unwrap();
        }
        if paused {
            experiments.pause(id).await.unwrap();
        }
        let subject = Subject::new(&who).eligible_if(if ineligible { &no } else { &yes });

        assigner.confirm().await.unwrap();
        let decision = assigner.assign(&name, subject).unwrap();
        let outcome = two.acme.assignments().assign(id, subject).await.unwrap();
        let after_stored = match () {
            () if paused => Reason::Paused,
            () if ineligible => Reason::Ineligible,
            () if held_out => Reason::HeldOut,
            () if other_layer => Reason::OutsideLayer,
            () if no_traffic => Reason::OutsideTraffic,
            () => Reason::Randomised,
        };
        let what = format!("case {case:07b}: {decision:?} {outcome:?}");
        assert_eq!(decision.reason(), if forced { Reason::Forced } else { after_stored }, "{what}");
        if stored && !forced {
            assert_eq!(outcome.price(), usd("18"), "{what}");
            assert_eq!(outcome.quote().unwrap().reason, AssignmentReason::Imported, "{what}");
            assert!(!decision.is_certain(), "{what}");
        } else {
            assert_eq!(reason(&outcome), if forced { Reason::Forced } else { after_stored }, "{what}");
            assert!(same(&decision, &outcome), "{what}");
            let is_baseline = !forced && after_stored != Reason::Randomised;
            assert!(!is_baseline || decision.variant() == "29", "{what}");
        }
        // A quote is written for who is in, and for nobody else.
        let written = two.acme.assignments().get(id, &who).await.unwrap();
        let is_in = !paused && (forced || after_stored == Reason::Randomised);
        assert_eq!(written.is_some(), stored || is_in, "{what}");
    }
    two.bystander_saw_nothing().await;
}

/// Whatever happens to an experiment, in whatever order: who is told to be certain is not told otherwise later.
#[tokio::test]
async fn what_is_certain_is_what_is_stored() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let assigner = two.client.assigner(two.id).await.unwrap();
    // A small generator, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut certain, mut uncertain) = (0, 0);
    for round in 0..12 {
        let key = format!("x-{round}");
        let eligibility = if round % 3 == 0 { Eligibility::NewCustomersOnly } else { Eligibility::Everyone };
        let new = new_experiment(&key).traffic(percent(30)).eligibility(eligibility);
        let id = experiments.create(new).await.unwrap().id;
        experiments.activate(id).await.unwrap();
        for step in 0..40 {
            let live = experiments.get(id).await.unwrap().unwrap();
            match random(12) {
                0 => drop(experiments.pause(id).await),
                1 | 2 => drop(experiments.resume(id).await),
                3 => drop(experiments.raise_traffic(id, percent(10 * random(11) as u32)).await),
                4 if round > 5 => {
                    let variants = three().add("49", random(5) as u32, 49);
                    let phase = NewPhase::new(variants).traffic(percent(10 * random(11) as u32));
                    drop(experiments.new_phase(id, live.revision, phase).await);
                }
                5 => {
                    let share = percent([0, 0, 20, 50][random(4) as usize]);
                    two.acme.tenants().update(TenantChange::new().holdout(share)).await.unwrap();
                }
                6 if round % 2 == 0 => {
                    let variant = (random(2) == 0).then_some("39");
                    experiments.force(id, &user(random(30) as usize), variant).await.unwrap();
                }
                _ => {}
            }
            assigner.confirm().await.unwrap();
            for n in 0..30 {
                let who = user(n);
                let reaches = random(4) > 0;
                let eligible = move |_: &str| reaches;
                let subject = Subject::new(&who).eligible_if(&eligible);
                // Facts that stay as they are: a third are customers of old.
                let subject = match n % 3 {
                    0 => subject.customer_since(Utc::now() - Duration::days(900)),
                    1 => subject.not_a_customer(),
                    _ => subject.customer_since(Utc::now() + Duration::days(1)),
                };
                let decision = assigner.assign(&key, subject).unwrap();
                if decision.is_certain() {
                    certain += 1;
                } else {
                    uncertain += 1;
                }
                if random(3) > 0 {
                    continue; // not everybody comes at every step
                }
                let outcome = assigner.quote(&key, subject).await.unwrap();
                let what = format!("round {round}, step {step}, user {n}: {decision:?} {outcome:?}");
                assert!(same(&decision, &outcome) || !decision.is_certain(), "{what}");
                if decision.reason() == Reason::Randomised && decision.is_certain() {
                    assert!(outcome.quote().is_some(), "{what}");
                }
            }
        }
        experiments.complete(id, None).await.unwrap();
    }
    assert!(certain > 1000 && uncertain > 1000, "{certain} {uncertain}");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn existing_customers_keep_their_price() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let new = new_experiment("x").eligibility(Eligibility::NewCustomersOnly);
    let id = experiments.create(new).await.unwrap().id;
    experiments.activate(id).await.unwrap();
    let assigner = two.client.assigner(two.id).await.unwrap();
    let check = async |n: usize, facts: &dyn Fn(Subject<'_>) -> Subject<'_>, expected: Reason| {
        let who = user(n);
        let subject = facts(Subject::new(&who));
        let decision = assigner.assign("x", subject).unwrap();
        let outcome = two.acme.assignments().assign(id, subject).await.unwrap();
        assert_eq!((decision.reason(), reason(&outcome)), (expected, expected), "{n}");
        assert!(same(&decision, &outcome));
        outcome
    };
    let unknown = check(1, &|s| s, Reason::CustomerUnknown).await;
    assert_eq!((unknown.quote(), unknown.variant()), (None, "29"));
    let before = Utc::now() - Duration::days(400);
    let old = check(2, &|s| s.customer_since(before), Reason::Grandfathered).await;
    let quote = old.quote().unwrap();
    assert_eq!((quote.reason, quote.variant.as_str()), (AssignmentReason::Grandfathered, "29"));
    check(3, &|s| s.not_a_customer(), Reason::Randomised).await;
    check(4, &|s| s.customer_since(Utc::now()), Reason::Randomised).await;
    // Who has bought within the experiment keeps the price of then.
    let first = two.acme.assignments().get(id, &user(3)).await.unwrap().unwrap();
    let three = user(3);
    let again =
        two.acme.assignments().assign(id, Subject::new(&three).customer_since(Utc::now())).await.unwrap();
    assert_eq!(again.quote(), Some(&first));
    // They buy, and are counted, apart: by their reason.
    two.acme.conversions().settle(&sale(id, 2, "29")).await.unwrap().entry().unwrap();
    let of_reason =
        "SELECT string_agg(DISTINCT reason, ' ' ORDER BY reason) FROM metric_deltas WHERE experiment_id = $1";
    let reasons: String = two.owner.query_one(of_reason, &[&id.uuid()]).await.unwrap().get(0);
    assert_eq!(reasons, "grandfathered randomised");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn an_account_sees_one_price() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let id = experiments.create(new_experiment("x").unit(AssignmentUnit::Account)).await.unwrap().id;
    experiments.activate(id).await.unwrap();
    let assigner = two.client.assigner(two.id).await.unwrap();
    let mut prices = std::collections::BTreeSet::new();
    for account in 100..130 {
        let account = user(account);
        let mut of_account = std::collections::BTreeSet::new();
        for n in 0..3 {
            let who = user(n);
            let subject = Subject::new(&who).account(&account);
            let outcome = two.acme.assignments().assign(id, subject).await.unwrap();
            assert!(same(&assigner.assign("x", subject).unwrap(), &outcome));
            assert_eq!(outcome.quote().unwrap().user_id, account);
            assert_eq!(outcome.is_new(), n == 0);
            of_account.insert(outcome.price().to_string());
        }
        assert_eq!(of_account.len(), 1);
        prices.append(&mut of_account);
    }
    assert_eq!(prices.len(), 3, "accounts see different prices");
    // Without an account there is nobody to assign.
    let (alone, decision) =
        (two.acme.assignments().assign(id, &user(1)).await.unwrap(), assigner.assign("x", &user(1)).unwrap());
    assert_eq!((reason(&alone), decision.reason()), (Reason::NoAccount, Reason::NoAccount));
    assert!(decision.is_certain() && same(&decision, &alone) && alone.quote().is_none());
    // Many at once, of several accounts.
    let (one, other) = (user(100), user(200));
    let (a, b) = (user(1), user(2));
    let asked = [Subject::new(&a).account(&one), Subject::new(&b), Subject::new(&b).account(&other)];
    let outcomes = two.acme.assignments().assign_many(id, asked).await.unwrap();
    assert_eq!(outcomes.iter().map(AssignOutcome::is_new).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(two.count("assignments").await, 31);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_tester_sees_what_is_forced() {
    let two = two_tenants().await;
    let (experiments, assignments) = (two.acme.experiments(), two.acme.assignments());
    let id = draft(&two.acme, "x").await.id;
    let [new, known] = [user(1), user(2)];
    // In a draft as well, and nothing is stored yet.
    experiments.force(id, &new, Some("39")).await.unwrap();
    let outcome = assignments.assign(id, &new).await.unwrap();
    assert_eq!((outcome.variant(), reason(&outcome), outcome.quote()), ("39", Reason::Forced, None));
    experiments.activate(id).await.unwrap();
    let stored = assignments.assign(id, &new).await.unwrap();
    assert_eq!(stored.quote().unwrap().reason, AssignmentReason::Forced);

    let first = assignments.assign(id, &known).await.unwrap();
    let other = if first.variant() == "39" { "19" } else { "39" };
    let listed = experiments.force(id, &known, Some(other)).await.unwrap();
    assert_eq!(listed.forced.len(), 2);
    let shown = assignments.assign(id, &known).await.unwrap();
    assert_eq!((shown.variant(), reason(&shown)), (other, Reason::Forced));
    assert_eq!(assignments.get(id, &known).await.unwrap().as_ref(), first.quote(), "what is stored stands");
    experiments.force(id, &known, None).await.unwrap();
    assert_eq!(assignments.assign(id, &known).await.unwrap().quote(), first.quote());
    let left = experiments.force(id, &new, None).await.unwrap();
    assert!(left.forced.is_empty());
    assert_eq!(assignments.assign(id, &new).await.unwrap().variant(), "39", "the quote of then");

    refused(experiments.force(id, &new, Some("49")).await, "variant");
    refused(experiments.force(id, &new, Some("a\0")).await, "variant");
    is_kind(experiments.force(lastprice::ExperimentId::new(), &new, None).await, ErrorKind::NotFound);
    // A draft whose arms are replaced keeps those that are forced.
    let draft = draft(&two.acme, "y").await;
    let draft = experiments.force(draft.id, &new, Some("39")).await.unwrap();
    let arms = Variants::new().add("19", 1, 19).add("29", 1, 29);
    let edit = ExperimentEdit::new().variants(lastprice::Currency::USD, arms);
    refused(experiments.edit(draft.id, draft.revision, edit).await, "variants");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_new_phase_is_for_new_users() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    let live = active(&two.acme, "x").await;
    let assigner = two.client.assigner(two.id).await.unwrap();
    let before = assign(&two.acme, live.id, 0..50).await;
    let to_one = |weight| Variants::new().add("29", 0, 29).add("49", weight, 49);
    let second = experiments.new_phase(live.id, live.revision, NewPhase::new(to_one(1))).await.unwrap();
    assert_eq!((second.phase, second.revision, second.variants.len()), (2, live.revision + 1, 2));
    let after = assign(&two.acme, live.id, 0..100).await;
    for (n, outcome) in after.iter().enumerate() {
        let quote = outcome.quote().unwrap();
        if n < 50 {
            assert_eq!(Some(quote), before[n].quote(), "a quote stands");
        } else {
            assert_eq!((quote.phase, quote.variant.as_str(), quote.price), (2, "49", usd("49")));
        }
    }
    assigner.confirm().await.unwrap();
    let decision = assigner.assign("x", &user(1)).unwrap();
    assert_eq!((decision.phase(), decision.variant(), decision.is_certain()), (2, "49", false));
    let of_phases = "SELECT string_agg(phase || ': ' || n, ', ' ORDER BY phase) FROM (
        SELECT phase, sum(assignments) AS n FROM metric_deltas WHERE experiment_id = $1 GROUP BY 1) d";
    let of_phases: String = two.owner.query_one(of_phases, &[&live.id.uuid()]).await.unwrap().get(0);
    assert_eq!(of_phases, "1: 50, 2: 50", "counted apart");

    // The baseline stays, and so does what users outside of it see.
    refused(
        experiments
            .new_phase(live.id, second.revision, NewPhase::new(Variants::new().add("a", 1, 1).add("b", 1, 1)))
            .await,
        "variants",
    );
    is_kind(
        experiments.new_phase(live.id, live.revision, NewPhase::new(to_one(2))).await,
        ErrorKind::Conflict,
    );
    is_kind(
        experiments.new_phase(draft(&two.acme, "d").await.id, 1, NewPhase::new(to_one(2))).await,
        ErrorKind::Conflict,
    );
    is_kind(
        experiments.new_phase(lastprice::ExperimentId::new(), 1, NewPhase::new(to_one(2))).await,
        ErrorKind::NotFound,
    );

    // Fewer users are a new phase; within one, there are only more.
    let third = NewPhase::new(to_one(1)).traffic(percent(10));
    let third = experiments.new_phase(live.id, second.revision, third).await.unwrap();
    assert_eq!((third.phase, third.traffic), (3, percent(10)));
    is_kind(experiments.raise_traffic(live.id, percent(9)).await, ErrorKind::Conflict);
    assert_eq!(experiments.raise_traffic(live.id, percent(20)).await.unwrap().traffic, percent(20));
    experiments.complete(live.id, None).await.unwrap();
    is_kind(experiments.raise_traffic(live.id, percent(30)).await, ErrorKind::Conflict);
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn experiments_of_a_layer_share_no_user_and_the_holdout_is_in_none() {
    let two = two_tenants().await;
    let experiments = two.acme.experiments();
    two.acme.tenants().update(TenantChange::new().holdout(percent(10))).await.unwrap();
    let part = |from, to| Layer::new("checkout", percent(from)..percent(to)).unwrap();
    let mut ids = Vec::new();
    for (key, layer) in [("a", Some(part(0, 40))), ("b", Some(part(40, 90))), ("free", None)] {
        let new = new_experiment(key);
        let new = match layer {
            Some(layer) => new.layer(layer),
            None => new,
        };
        let created = experiments.create(new).await.unwrap();
        ids.push(experiments.activate(created.id).await.unwrap().id);
    }
    let [a, b, free] = ids[..] else { panic!() };
    let (mut in_a, mut in_b, mut held_out) = (0, 0, 0);
    let [of_a, of_b, of_free] = [
        assign(&two.acme, a, 0..1000).await,
        assign(&two.acme, b, 0..1000).await,
        assign(&two.acme, free, 0..1000).await,
    ];
    for n in 0..1000 {
        let is_in = |outcome: &AssignOutcome| outcome.quote().is_some();
        assert!(!(is_in(&of_a[n]) && is_in(&of_b[n])), "user {n} is in both");
        let held = reason(&of_free[n]) == Reason::HeldOut;
        assert_eq!(held, reason(&of_a[n]) == Reason::HeldOut);
        assert_eq!(held, !is_in(&of_free[n]));
        in_a += u32::from(is_in(&of_a[n]));
        in_b += u32::from(is_in(&of_b[n]));
        held_out += u32::from(held);
    }
    assert!(
        (300..420).contains(&in_a) && (380..520).contains(&in_b) && (60..140).contains(&held_out),
        "{in_a} {in_b} {held_out}"
    );

    // What decides, compiled for a backfill, says the same.
    let me = two.acme.tenants().get().await.unwrap().unwrap();
    for (id, outcomes) in [(a, &of_a), (b, &of_b), (free, &of_free)] {
        let live = experiments.get(id).await.unwrap().unwrap();
        let allocation = live.allocation(&me).unwrap();
        for (n, outcome) in outcomes.iter().enumerate() {
            let placed = allocation.place(Unit::of(&user(n))).variant();
            let variant = placed.map_or("29", |variant| &live.variants[variant as usize].name);
            assert_eq!(
                (placed.is_some(), variant),
                (outcome.quote().is_some(), outcome.variant()),
                "user {n}"
            );
        }
    }

    // All of a layer go by one unit: a user and their account are in different parts.
    let by_account = new_experiment("by-account").layer(part(90, 100)).unit(AssignmentUnit::Account);
    let by_account = experiments.create(by_account).await.unwrap();
    is_kind(experiments.activate(by_account.id).await, ErrorKind::Conflict);

    // A part that is taken is refused, and says which.
    let taken = experiments.create(new_experiment("c").layer(part(80, 95))).await.unwrap();
    let error = is_kind(experiments.activate(taken.id).await, ErrorKind::Conflict);
    assert!(error.to_string().contains("80 % to 95 % of layer `checkout`"), "{error}");
    let edit = ExperimentEdit::new().layer(part(90, 95));
    let moved = experiments.edit(taken.id, taken.revision, edit).await.unwrap();
    assert_eq!(moved.layer, Some(part(90, 95)));
    experiments.activate(taken.id).await.unwrap();
    // Free again once its owner is over; and a draft may leave its layer.
    experiments.complete(a, None).await.unwrap();
    let next = experiments.create(new_experiment("d").layer(part(0, 40))).await.unwrap();
    experiments.activate(next.id).await.unwrap();
    let last = experiments.create(new_experiment("e").layer(part(0, 40))).await.unwrap();
    let free = experiments.edit(last.id, last.revision, ExperimentEdit::new().no_layer()).await.unwrap();
    assert_eq!(free.layer, None);
    refused(Layer::new("checkout", percent(5)..percent(5)), "layer");
    refused(Layer::new("check out", percent(5)..percent(6)), "layer");
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn the_testkit_finds_users_of_a_variant() {
    let two = two_tenants().await;
    let created = two.acme.experiments().create(new_experiment("x").traffic(percent(20))).await.unwrap();
    let live = two.acme.experiments().activate(created.id).await.unwrap();
    for variant in ["19", "29", "39"] {
        for who in lastprice_testkit::users_of_variant(&live, variant).unwrap().take(5) {
            let outcome = two.acme.assignments().assign(live.id, &who).await.unwrap();
            assert_eq!((outcome.variant(), outcome.is_new()), (variant, true));
        }
    }
    assert!(lastprice_testkit::users_of_variant(&live, "49").is_none());
    let nobody = two.acme.experiments().create(new_experiment("y").traffic(Share::NONE)).await.unwrap();
    assert!(lastprice_testkit::users_of_variant(&nobody, "19").is_none());
    two.bystander_saw_nothing().await;
}
