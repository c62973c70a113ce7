//! The peers, each in the cheapest form that its public API has: the flag is compiled, and all that it takes of a
//! user is built, ahead. Flags have no targeting and are on for everybody, so that all that is left is the choice.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use lastprice::chrono::Utc;
use serde_json::{Value, json};

use crate::{Contestant, Failure};

const FLAG: &str = "price";

pub(crate) fn all(users: &[String], variants: usize) -> Result<Vec<Contestant>, Failure> {
    Ok(vec![
        unleash(users, variants)?,
        eppo(users, variants)?,
        launchdarkly(users, variants)?,
        posthog(users, variants)?,
        flagsmith(users, variants)?,
        growthbook(users, variants)?,
    ])
}

/// For peers that name variants: `v0` to `v9`.
fn name(variant: usize) -> String {
    format!("v{variant}")
}

/// Of a name; of no variant for what peers call a default.
fn named(name: &str) -> Option<usize> {
    match *name.as_bytes() {
        [b'v', digit @ b'0'..=b'9'] => Some(usize::from(digit - b'0')),
        _ => None,
    }
}

fn each(variants: usize, of: impl FnMut(usize) -> Value) -> Vec<Value> {
    (0..variants).map(of).collect()
}

fn unleash(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use unleash_yggdrasil::{ClientFeatures, Context, EngineState};

    // The cheapest strategy there is: `flexibleRollout` would hash the user a second time.
    let variants = each(variants, |n| json!({"name": name(n), "weight": 1, "stickiness": "userId"}));
    let strategies = json!([{"name": "default"}]);
    let feature = json!({"name": FLAG, "enabled": true, "strategies": strategies, "variants": variants});
    let features: ClientFeatures = serde_json::from_value(json!({"version": 2, "features": [feature]}))?;
    let engine = EngineState::initial_state(Utc::now());
    if let Some(warnings) = engine.apply_client_features(features) {
        return Err(format!("{warnings:?}").into());
    }
    let context = |user: &str| {
        Ok::<_, Infallible>(Context {
            user_id: Some(user.to_owned()),
            session_id: None,
            environment: None,
            app_name: None,
            current_time: None,
            remote_address: None,
            properties: None,
        })
    };
    Contestant::new("unleash-yggdrasil", "`EngineState::get_variant`", users, context, move |context| {
        named(&engine.get_variant(FLAG, context, &None).name)
    })
}

fn eppo(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use eppo_core::ufc::{AssignmentValue, UniversalFlagConfig, VariationType};
    use eppo_core::{Attributes, Configuration, SdkMetadata, Str, eval::get_assignment};

    const SHARDS: usize = 10_000;
    let splits = each(variants, |n| {
        let range = json!({"start": n * SHARDS / variants, "end": (n + 1) * SHARDS / variants});
        json!({"variationKey": name(n), "shards": [{"salt": "a-salt", "ranges": [range]}]})
    });
    let variations: serde_json::Map<_, _> =
        (0..variants).map(|n| (name(n), json!({"key": name(n), "value": n}))).collect();
    let flag = json!({
        "key": FLAG, "enabled": true, "variationType": "INTEGER", "variations": variations, "totalShards": SHARDS,
        "allocations": [{"key": "all", "rules": [], "doLog": true, "splits": splits}],
    });
    let flags = json!({
        "createdAt": "2026-01-01T00:00:00.000Z", "format": "SERVER", "environment": {"name": "bench"},
        "flags": {FLAG: flag},
    });
    let sdk = SdkMetadata { name: "bench", version: "0" };
    let flags = UniversalFlagConfig::from_json(sdk, serde_json::to_vec(&flags)?)?;
    let configuration = Configuration::from_server_response(flags, None);
    let (attributes, now, integer) = (Arc::new(Attributes::new()), Utc::now(), Some(VariationType::Integer));
    let key = |user: &str| Ok::<_, Infallible>(Str::from(user.to_owned()));
    Contestant::new("eppo_core", "`get_assignment`", users, key, move |key| {
        match get_assignment(Some(&configuration), FLAG, key, &attributes, integer, now).ok()??.value {
            AssignmentValue::Integer(n) => usize::try_from(n).ok(),
            _ => None,
        }
    })
}

fn launchdarkly(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use launchdarkly_server_sdk_evaluation::{ContextBuilder, Flag, Reason, Segment, Store, evaluate};

    /// Where flags and segments that a flag refers to are looked up; ours refers to none.
    struct Nothing;
    impl Store for Nothing {
        fn flag(&self, _: &str) -> Option<Flag> {
            None
        }
        fn segment(&self, _: &str) -> Option<Segment> {
            None
        }
    }

    let weighted = each(variants, |n| json!({"variation": n, "weight": 100_000 / variants}));
    let rollout = json!({"kind": "experiment", "contextKind": "user", "seed": 61, "variations": weighted});
    let flag: Flag = serde_json::from_value(json!({
        "key": FLAG, "version": 1, "on": true, "clientSide": false, "salt": "a-salt", "targets": [],
        "contextTargets": [], "rules": [], "prerequisites": [], "offVariation": null,
        "variations": each(variants, |n| json!(n)), "fallthrough": {"rollout": rollout},
    }))?;
    let context = |user: &str| ContextBuilder::new(user).build();
    let package = "launchdarkly-server-sdk-evaluation";
    Contestant::new(package, "`evaluate`", users, context, move |context| {
        let detail = evaluate(&Nothing, &flag, context, None);
        let is_assigned = matches!(detail.reason, Reason::Fallthrough { in_experiment: true });
        detail.variation_index.filter(|_| is_assigned)?.try_into().ok()
    })
}

fn posthog(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use posthog_rs::{FeatureFlag, FlagValue, match_feature_flag};

    let share = 100.0 / variants as f64;
    let variants = each(variants, |n| json!({"key": name(n), "rollout_percentage": share}));
    let flag: FeatureFlag = serde_json::from_value(json!({
        "key": FLAG, "active": true,
        "filters": {"groups": [{"properties": [], "rollout_percentage": 100.0}], "multivariate": {"variants": variants}},
    }))?;
    let (properties, groups, group_types) = (HashMap::new(), HashMap::new(), HashMap::new());
    let group_properties = HashMap::new();
    let id = |user: &str| Ok::<_, Infallible>(user.to_owned());
    Contestant::new("posthog-rs", "`match_feature_flag`", users, id, move |id| {
        match match_feature_flag(&flag, id, &properties, &groups, &group_properties, &group_types) {
            Ok(FlagValue::String(variant)) => named(&variant),
            _ => None,
        }
    })
}

fn flagsmith(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use flagsmith_flag_engine::engine::get_evaluation_result;
    use flagsmith_flag_engine::engine_eval::context::{EngineEvaluationContext, IdentityContext};

    let share = 100.0 / variants as f64;
    let variants =
        each(variants, |n| json!({"key": name(n), "value": name(n), "weight": share, "priority": n}));
    let feature = json!({"key": FLAG, "name": FLAG, "enabled": true, "value": "off", "variants": variants});
    let mut context: EngineEvaluationContext = serde_json::from_value(json!({
        "environment": {"key": "bench", "name": "bench"}, "segments": {}, "features": {FLAG: feature},
    }))?;
    let identity = |user: &str| {
        let (identifier, key) = (user.to_owned(), user.to_owned());
        Ok::<_, Infallible>(IdentityContext { identifier, key, traits: HashMap::new() })
    };
    // The context holds the flags and the user, so it is the user who changes, in place.
    context.identity = Some(identity("")?);
    Contestant::new("flagsmith-flag-engine", "`get_evaluation_result`", users, identity, move |user| {
        let identity = context.identity.as_mut()?;
        identity.identifier.clone_from(&user.identifier);
        identity.key.clone_from(&user.key);
        named(get_evaluation_result(&context).flags.get(FLAG)?.variant.as_deref()?)
    })
}

fn growthbook(users: &[String], variants: usize) -> Result<Contestant, Failure> {
    use growthbook_rust::growthbook::GrowthBook;
    use growthbook_rust::model_public::{GrowthBookAttribute, GrowthBookAttributeValue};

    let rule = json!({
        "key": FLAG, "seed": "a-salt", "hashAttribute": "id", "hashVersion": 2, "coverage": 1.0,
        "variations": each(variants, |n| json!(n)),
        "weights": each(variants, |_| json!(1.0 / variants as f64)),
    });
    let feature = json!({"defaultValue": null, "rules": [rule]});
    let growthbook = GrowthBook {
        features: serde_json::from_value(json!({FLAG: feature}))?,
        attributes: None,
        forced_variations: None,
        sticky_bucket_service: None,
        saved_groups: HashMap::new(),
    };
    let attributes = |user: &str| {
        let id = GrowthBookAttributeValue::String(user.to_owned());
        Ok::<_, Infallible>(Some(vec![GrowthBookAttribute::new("id".to_owned(), id)]))
    };
    Contestant::new("growthbook-rust", "`GrowthBook::check`", users, attributes, move |attributes| {
        let result = growthbook.check(FLAG, attributes).experiment_result?;
        usize::try_from(result.variation_id).ok().filter(|_| result.in_experiment)
    })
}
