//! Random histories of users who are merged at random: money stays, the metrics are a recount, and what each person brought is
//! what the ids of the person had brought.

use std::collections::{BTreeMap, BTreeSet};

use lastprice::chrono::{TimeDelta, Utc};
use lastprice::rust_decimal::Decimal;
use lastprice::{ConversionOutcome, ErrorKind, ExperimentId, MergePolicy, NewConversion, NewView, UserId};

use crate::support_ledger::*;
use crate::support_repo::*;
use crate::support_sql::{Random, assert_exact};

/// What the database holds, by experiment and id.
struct World {
    /// Variant, price and reason of those who count.
    users: BTreeMap<(ExperimentId, String), (String, Decimal, String)>,
    /// All that was paid.
    paid: BTreeMap<(ExperimentId, String), Decimal>,
    entries: i64,
    views: i64,
    /// What was used: assignments, and those that became one with another.
    signals: Decimal,
}

/// What holds of one person by several ids, after each merge: nothing is found by these.
const INVARIANTS: &[(&str, &str)] = &[
    (
        "an entry of somebody who is no user",
        "SELECT count(*) FROM conversions c WHERE c.tenant_id = $1 AND c.reason <> 'outside' AND NOT EXISTS (
           SELECT FROM assignments a WHERE (a.tenant_id, a.experiment_id, a.user_id) = (c.tenant_id, c.experiment_id, c.user_id)
             AND a.merged_into IS NULL)",
    ),
    (
        "an id that leads to somebody who is no user, or to one with another reason",
        "SELECT count(*) FROM assignments a WHERE a.tenant_id = $1 AND a.merged_into IS NOT NULL AND NOT EXISTS (
           SELECT FROM assignments m WHERE (m.tenant_id, m.experiment_id, m.user_id) = (a.tenant_id, a.experiment_id, a.merged_into)
             AND m.merged_into IS NULL AND m.reason = a.reason)",
    ),
    (
        "an id in the statistics at another quote, or from another moment on, than its user",
        "SELECT count(*) FROM assignments a JOIN assignments m
           ON (m.tenant_id, m.experiment_id, m.user_id) = (a.tenant_id, a.experiment_id, a.merged_into)
         WHERE a.tenant_id = $1 AND a.reason <> 'merged'
           AND (a.variant, a.price, a.phase, a.assigned_at) <> (m.variant, m.price, m.phase, m.assigned_at)",
    ),
    (
        "an entry in the statistics of a user who is left out",
        "SELECT count(*) FROM conversions c JOIN assignments a USING (tenant_id, experiment_id, user_id)
         WHERE tenant_id = $1 AND a.reason = 'merged' AND c.reason NOT IN ('merged', 'outside')",
    ),
    (
        "an entry in the statistics at another variant, or from another moment on, than its user",
        "SELECT count(*) FROM conversions c JOIN assignments a USING (tenant_id, experiment_id, user_id)
         WHERE tenant_id = $1 AND c.reason = 'randomised'
           AND (a.variant, a.phase, a.assigned_at) <> (c.variant, c.phase, c.assigned_at)",
    ),
    (
        "a known id that was merged itself",
        "SELECT count(*) FROM identities i JOIN identities k ON (k.tenant_id, k.user_id) = (i.tenant_id, i.known_id) WHERE i.tenant_id = $1",
    ),
];

async fn nothing_is_between_two_ids(two: &TwoTenants, after: &str) {
    for (what, sql) in INVARIANTS {
        let found: i64 = two.owner.query_one(*sql, &[&two.id.uuid()]).await.unwrap().get(0);
        assert_eq!(found, 0, "{what}, after {after}");
    }
}

async fn look(two: &TwoTenants) -> World {
    let tenant = two.id.uuid();
    let sql = "SELECT experiment_id, user_id, variant, price, reason FROM assignments WHERE tenant_id = $1 AND merged_into IS NULL";
    let users = two.owner.query(sql, &[&tenant]).await.unwrap();
    let of =
        |row: &lastprice::tokio_postgres::Row| (ExperimentId::from(row.get::<_, uuid::Uuid>(0)), row.get(1));
    let users = users.iter().map(|row| (of(row), (row.get(2), row.get(3), row.get(4)))).collect();
    let sql =
        "SELECT experiment_id, user_id, sum(revenue) FROM conversions WHERE tenant_id = $1 GROUP BY 1, 2";
    let paid = two.owner.query(sql, &[&tenant]).await.unwrap();
    let paid = paid.iter().map(|row| (of(row), row.get(2))).collect();
    let sql = "SELECT (SELECT count(*) FROM assignments WHERE tenant_id = $1 AND merged_into IS NULL)
                    + (SELECT COALESCE(sum(value), 0) FROM usage WHERE tenant_id = $1 AND metric = 'signals')";
    let signals = two.owner.query_one(sql, &[&tenant]).await.unwrap().get(0);
    let (entries, views) = (two.count("conversions").await, two.count("views").await);
    World { users, paid, entries, views, signals }
}

/// The results say of the randomised what the events say of them.
async fn results_agree(two: &TwoTenants, x: ExperimentId) {
    let sql = "SELECT (SELECT count(*) FROM assignments WHERE tenant_id = $1 AND experiment_id = $2 AND reason = 'randomised' AND merged_into IS NULL),
                 COALESCE(sum(total), 0), COALESCE(sum(total * total), 0), count(*) FILTER (WHERE sold)
               FROM (SELECT sum(c.revenue) AS total, bool_or(c.kind = 'sale') AS sold FROM conversions c JOIN assignments a
                       ON a.tenant_id = $1 AND a.experiment_id = $2 AND a.user_id = c.user_id AND a.reason = 'randomised' AND a.merged_into IS NULL
                     WHERE c.tenant_id = $1 AND c.experiment_id = $2 AND c.occurred_at < a.assigned_at + interval '14 days' GROUP BY c.user_id) u";
    let row = two.owner.query_one(sql, &[&two.id.uuid(), &x.uuid()]).await.unwrap();
    let number = |n: usize| row.get::<_, Decimal>(n).try_into().unwrap();
    let (users, total, squares, buyers): (i64, f64, f64, i64) =
        (row.get(0), number(1), number(2), row.get(3));
    let results = two.acme.metrics().results(x).await.unwrap();
    let cohorts: Vec<_> = results.arms.iter().flat_map(|arm| &arm.days).map(|day| day.cohort).collect();
    let sum = |of: &dyn Fn(&lastprice::Cohort) -> f64| cohorts.iter().map(of).sum::<f64>();
    assert_eq!(sum(&|c| c.users() as f64), users as f64);
    assert_eq!(sum(&|c| c.buyers as f64), buyers as f64);
    let near = |a: f64, b: f64| (a - b).abs() < 1e-6 * b.abs().max(1.0);
    let found = sum(&|c| c.metric.mean() * c.users() as f64);
    assert!(near(found, total), "{found} {total}");
    let of_squares = |c: &lastprice::Cohort| {
        let (n, mean) = (c.users() as f64, c.metric.mean());
        c.metric.deviations() + n * mean * mean
    };
    assert!(near(sum(&of_squares), squares), "{} {squares}", sum(&of_squares));
    assert_eq!(results.crossovers, 0);
}

#[tokio::test]
async fn random_histories() {
    for _ in 0..4 {
        let seed = Random::seed();
        println!("LASTPRICE_SEED={seed}");
        history(Random(seed)).await;
    }
}

async fn history(mut random: Random) {
    let two = two_tenants().await;
    let mut experiments = Vec::new();
    for k in ["x", "y", "z"] {
        experiments.push(active(&two.acme, k).await.id);
    }
    let people: Vec<UserId> = (0..12).map(|n| UserId::new(format!("p{n}")).unwrap()).collect();
    let mut sales: Vec<NewConversion> = Vec::new();
    let mut resolved: BTreeMap<String, String> = BTreeMap::new();
    for step in 0..120 {
        let user = people[random.below(12) as usize].clone();
        let x = experiments[random.below(3) as usize];
        match random.below(10) {
            0 | 1 => {
                let outcome = two.acme.assignments().assign(x, &user).await.unwrap();
                if outcome.is_new() {
                    let time = Utc::now() - TimeDelta::minutes(random.below(60 * 24 * 40) as i64);
                    let sql = "UPDATE assignments SET assigned_at = $4 WHERE tenant_id = $1 AND experiment_id = $2 AND user_id = $3";
                    two.owner
                        .execute(sql, &[&two.id.uuid(), &x.uuid(), &user.as_str(), &time])
                        .await
                        .unwrap();
                }
            }
            2 => drop(two.acme.views().record(&NewView::new(x, user)).await.unwrap()),
            3..=6 => {
                let at = Utc::now() - TimeDelta::hours(random.below(24 * 20) as i64);
                let name = format!("{step}");
                let price = random.one_of(&["19", "29", "39"]);
                let sale = NewConversion::sale(x, user, usd(price), key(&name)).order(order(&name)).at(at);
                let late = two.acme.conversions().settle(&sale).await.unwrap();
                assert!(matches!(late, ConversionOutcome::Recorded(_)), "{late:?}");
                sales.push(sale);
            }
            7 if !sales.is_empty() => {
                // Again what was reported: it counts once, whoever is whom by now.
                let again = &sales[random.below(sales.len() as u64) as usize];
                let again = two.acme.conversions().settle(again).await.unwrap();
                assert!(matches!(again, ConversionOutcome::Duplicate(_)), "{again:?}");
                let of = random.below(step + 1);
                let _ = two
                    .acme
                    .conversions()
                    .settle(&refund(&of.to_string(), "1.05", &format!("r{step}")))
                    .await;
            }
            8 | 9 if step > 30 => {
                let other = &people[random.below(12) as usize];
                merge(&two, &mut random, &mut resolved, &user, other).await;
            }
            _ => {}
        }
    }
    nothing_is_between_two_ids(&two, "all").await;
    for x in experiments {
        results_agree(&two, x).await;
    }
    assert_exact(&two.database.connect_superuser().await.unwrap(), "after a history").await;
    two.acme.metrics().fold().await.unwrap();
    assert_exact(&two.database.connect_superuser().await.unwrap(), "folded").await;
    two.bystander_saw_nothing().await;
}

async fn merge(
    two: &TwoTenants,
    random: &mut Random,
    resolved: &mut BTreeMap<String, String>,
    from: &UserId,
    to: &UserId,
) {
    let who = |of: &UserId, resolved: &BTreeMap<String, String>| {
        let mut id = of.as_str().to_owned();
        while let Some(next) = resolved.get(&id) {
            id = next.clone();
        }
        id
    };
    let policy = *[MergePolicy::FirstQuoteWins, MergePolicy::Exclude].get(random.below(2) as usize).unwrap();
    let before = look(two).await;
    let merge = match two.acme.users().merge(from, to, policy).await {
        Ok(merge) => merge,
        Err(error) => {
            let is_same =
                from == to || resolved.contains_key(from.as_str()) || who(to, resolved) == from.as_str();
            assert!(
                is_same && matches!(error.kind(), ErrorKind::Conflict | ErrorKind::InvalidInput),
                "{error:?}"
            );
            return;
        }
    };
    let master = who(to, resolved);
    assert_eq!(merge.known.as_str(), master);
    let is_first = resolved.insert(from.as_str().to_owned(), master.clone()).is_none();
    let after = look(two).await;
    assert_eq!((after.entries, after.views), (before.entries, before.views), "nothing is lost or made");
    assert_eq!(after.signals, before.signals, "what was used stays used");
    nothing_is_between_two_ids(two, &format!("{from} became {to}")).await;

    // Money: of both together as much as of each, of nobody else another amount; and nobody has what is left of the old id.
    let sum = |of: &World| of.paid.values().sum::<Decimal>();
    assert_eq!(sum(&after), sum(&before));
    let mut expected = BTreeMap::new();
    for ((x, user), paid) in &before.paid {
        let user = if user == from.as_str() { master.clone() } else { user.clone() };
        *expected.entry((*x, user)).or_insert(Decimal::ZERO) += paid;
    }
    assert_eq!(after.paid, expected);

    // Users: whoever had a quote by one of the ids is one, and nobody else is another.
    let mut persons = BTreeSet::new();
    let (mut shared, mut crossed, mut taken) = (0, BTreeSet::new(), 0);
    for (x, user) in before.users.keys() {
        let is_from = user == from.as_str();
        persons.insert((*x, if is_from { master.clone() } else { user.clone() }));
        let (Some(a), b) =
            (before.users.get(&(*x, from.as_str().to_owned())), before.users.get(&(*x, master.clone())))
        else {
            continue;
        };
        match b {
            Some(b) if is_from => {
                shared += 1;
                if (&a.0, a.1) != (&b.0, b.1) {
                    crossed.insert(*x);
                }
                let outcome = &after.users[&(*x, master.clone())];
                let is_out =
                    a.0 != b.0 || policy == MergePolicy::Exclude || a.2 == "merged" || b.2 == "merged";
                assert_eq!(outcome.2 == "merged", is_out, "{a:?} {b:?}");
            }
            None if is_from => {
                taken += 1;
                assert_eq!(&after.users[&(*x, master.clone())], a, "the quote of the one is the other's");
            }
            _ => {}
        }
    }
    assert_eq!(after.users.keys().cloned().collect::<BTreeSet<_>>(), persons);
    assert_eq!(before.users.len() as u64 - after.users.len() as u64, shared);
    if is_first {
        assert_eq!((merge.shared, merge.taken_over), (shared, taken));
        assert_eq!(merge.crossovers.iter().copied().collect::<BTreeSet<_>>(), crossed);
        assert!(crossed.is_subset(&merge.excluded.iter().copied().collect()));
    }
    // And by either id the price is the same.
    if is_first && policy == MergePolicy::FirstQuoteWins {
        for (x, user) in &persons {
            if *user == master {
                let price = async |id: &str| {
                    let quote = two.acme.assignments().get(*x, &UserId::new(id).unwrap()).await.unwrap();
                    quote.map(|quote| quote.price)
                };
                assert_eq!(price(from.as_str()).await, price(&master).await);
            }
        }
    }
}
