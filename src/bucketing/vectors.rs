//! Every vector of `tests/vectors/assignment-v1.json`: what another implementation says of algorithm `v1`.

use serde::Deserialize;

use super::allocation::Gate;
use super::*;

const FILE: &str = include_str!("../../tests/vectors/assignment-v1.json");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    algorithm: String,
    units: Vec<UnitVector>,
    seeds: Vec<SeedVector>,
    weights: Vec<WeightsVector>,
    shares: Vec<ShareVector>,
    ranges: Vec<RangeVector>,
    assignments: Vec<AssignmentVector>,
    placements: Vec<PlacementVector>,
}

/// `"0x"` and 16 digits; a number in JSON would lose bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Hex(u64);

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let digits = text.strip_prefix("0x").filter(|digits| digits.len() == 16);
        digits.and_then(|d| u64::from_str_radix(d, 16).ok()).map(Hex).ok_or(text)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnitVector {
    id: String,
    hash: Hex,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeedVector {
    purpose: String,
    salt: String,
    seed: Hex,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightsVector {
    weights: Vec<u32>,
    thresholds: Vec<Hex>,
    cases: Vec<VariantOfBucket>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VariantOfBucket {
    bucket: Hex,
    variant: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ShareVector {
    millionths: u32,
    bound: Option<Hex>,
    cases: Vec<InsideOfBucket>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeVector {
    start: u32,
    end: u32,
    first: Option<Hex>,
    bound: Option<Hex>,
    cases: Vec<InsideOfBucket>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InsideOfBucket {
    bucket: Hex,
    inside: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AssignmentVector {
    salt: String,
    weights: Vec<u32>,
    cases: Vec<Assigned>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Assigned {
    id: String,
    bucket: Hex,
    variant: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlacementVector {
    tenant_salt: String,
    holdout: u32,
    layer: Option<Layer>,
    traffic: u32,
    salt: String,
    weights: Vec<u32>,
    cases: Vec<Placed>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    name: String,
    start: u32,
    end: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Placed {
    id: String,
    outcome: String,
    variant: Option<u32>,
}

fn vectors() -> Vectors {
    serde_json::from_str(FILE).expect("a file of vectors")
}

fn unit(id: &str) -> Unit {
    Unit::of(&UserId::new(id).unwrap())
}

fn share(millionths: u32) -> Share {
    Share::per_million(millionths).unwrap()
}

fn bound(millionths: u32) -> Option<Hex> {
    share(millionths).threshold().map(Hex)
}

// The vectors are frozen, and so are their numbers: a check that silently checks less would be no check.

#[test]
fn units() {
    let Vectors { algorithm, units, .. } = vectors();
    assert_eq!(algorithm, "v1");
    for v in &units {
        assert_eq!(Hex(unit(&v.id).0), v.hash, "{:?}", v.id);
    }
    assert_eq!(units.len(), 89);
    for length in [1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 512] {
        assert!(units.iter().any(|v| v.id.len() == length), "a limit of a path of XXH3: {length}");
    }
}

#[test]
fn seeds() {
    let seeds = vectors().seeds;
    for v in &seeds {
        assert_eq!(Hex(seed(&v.purpose, &v.salt)), v.seed, "{} {:?}", v.purpose, v.salt);
    }
    assert_eq!(seeds.len(), 96);
}

#[test]
fn weights() {
    let (all, mut checked) = (vectors().weights, 0);
    for v in &all {
        let allocation = Allocation::new("any", &v.weights).unwrap();
        assert!(allocation.thresholds.bounds.iter().copied().map(Hex).eq(v.thresholds.iter().copied()));
        assert_eq!(allocation.variants() as usize, v.weights.len());
        for case in &v.cases {
            assert_eq!(allocation.thresholds.passed(case.bucket.0), case.variant, "{:?}", case.bucket);
            checked += 1;
        }
    }
    assert_eq!((all.len(), checked), (21, 2222));
}

#[test]
fn shares() {
    let (all, mut checked) = (vectors().shares, 0);
    for v in &all {
        assert_eq!(bound(v.millionths), v.bound);
        checked += in_part(0, v.millionths, &v.cases);
    }
    assert_eq!((all.len(), checked), (8, 28));
}

#[test]
fn ranges() {
    let (all, mut checked) = (vectors().ranges, 0);
    for v in &all {
        assert_eq!((bound(v.start), bound(v.end)), (v.first, v.bound));
        checked += in_part(v.start, v.end, &v.cases);
    }
    assert_eq!((all.len(), checked), (13, 52));
}

fn in_part(start: u32, end: u32, cases: &[InsideOfBucket]) -> usize {
    let gate = Gate::new(0, share(start)..share(end));
    for case in cases {
        assert_eq!(gate.has_bucket(case.bucket.0), case.inside, "{start}..{end} {:?}", case.bucket);
    }
    cases.len()
}

#[test]
fn assignments() {
    let (all, mut checked) = (vectors().assignments, 0);
    for v in &all {
        let allocation = Allocation::new(&v.salt, &v.weights).unwrap();
        for case in &v.cases {
            let unit = unit(&case.id);
            assert_eq!(Hex(unit.bucket(seed("variant", &v.salt))), case.bucket, "{:?}", case.id);
            assert_eq!(allocation.variant(unit), case.variant, "{:?}", case.id);
            assert_eq!(allocation.place(unit), Placement::Variant(case.variant), "{:?}", case.id);
            checked += 1;
        }
    }
    assert_eq!((all.len(), checked), (8, 353));
}

#[test]
fn placements() {
    let (all, mut outcomes) = (vectors().placements, [0; 4]);
    for v in &all {
        let bare = Allocation::new(&v.salt, &v.weights).unwrap();
        let mut gated = bare.clone().traffic(share(v.traffic)).holdout(&v.tenant_salt, share(v.holdout));
        if let Some(layer) = &v.layer {
            let salt = format!("{}/{}", v.tenant_salt, layer.name);
            gated = gated.layer(&salt, share(layer.start)..share(layer.end)).unwrap();
        }
        let open = v.holdout == 0 && v.layer.is_none() && v.traffic == Share::ALL.millionths();
        for case in &v.cases {
            let (expected, outcome) = case.expected();
            assert_eq!(gated.place(unit(&case.id)), expected, "{:?}", case.id);
            assert!(!open || bare.place(unit(&case.id)) == expected, "gates that are open are none");
            outcomes[outcome] += 1;
        }
    }
    assert_eq!(all.len(), 14);
    assert_eq!(outcomes, [201, 310, 364, 805], "held out, outside the layer, outside the traffic, a variant");
}

impl Placed {
    fn expected(&self) -> (Placement, usize) {
        match (self.outcome.as_str(), self.variant) {
            ("held_out", None) => (Placement::HeldOut, 0),
            ("outside_layer", None) => (Placement::OutsideLayer, 1),
            ("outside_traffic", None) => (Placement::OutsideTraffic, 2),
            ("variant", Some(index)) => (Placement::Variant(index), 3),
            other => panic!("{other:?} is no outcome"),
        }
    }
}
