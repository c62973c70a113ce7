//! What deciding a user's variant costs, side by side with what feature-flag SDKs do for the same.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench assignment               prints the tables
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench assignment -- --write    puts them into RESULTS.md
//! cargo bench --manifest-path benches/peers/Cargo.toml --bench assignment -- --quick    checks the answers only
//! ```
//!
//! A time counts only if what was timed is an assignment: exit code 1 if a contestant answers with an error, with a
//! default, with a split that is not the one it was asked for, or differently from one round to the next.

#[path = "assignment/allocations.rs"]
mod allocations;
#[path = "assignment/peers.rs"]
mod peers;

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Instant;

use lastprice::UserId;
use lastprice::bucketing::{Allocation, Unit};
use twox_hash::XxHash3_64;

type Failure = Box<dyn std::error::Error>;

const USERS: usize = 8192;
/// Odd, so that there is a median.
const ROUNDS: usize = 101;
const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../RESULTS.md");
const MARKERS: [&str; 2] = ["<!-- assignment -->\n", "<!-- /assignment -->"];

fn main() -> Result<(), Failure> {
    let asked_for = |flag: &str| std::env::args().any(|arg| arg == flag);
    let quick = asked_for("--quick") || asked_for("--test");
    let users = users();
    let cores = std::thread::available_parallelism()?;
    let mut report = format!(
        "{USERS} ids of 12 to 36 bytes, median and first decile of {ROUNDS} rounds, {cores} cores.\n"
    );

    for variants in [2, 10] {
        let mut contestants = ours(&users, variants)?;
        contestants.extend(peers::all(&users, variants)?);
        for contestant in &mut contestants {
            let name = contestant.name();
            contestant.check(variants).map_err(|e| format!("{name}, {variants} variants: {e}"))?;
        }
        for _ in 0..if quick { 1 } else { ROUNDS } {
            for contestant in &mut contestants {
                contestant.round()?;
            }
        }
        if quick {
            println!("{variants} variants: all {} contestants assign", contestants.len());
            continue;
        }
        write!(report, "\n### {variants} variants\n\n{}", table(&mut contestants))?;
    }

    if asked_for("--write") && !quick {
        std::fs::write(RESULTS, between_markers(&std::fs::read_to_string(RESULTS)?, &report)?)?;
    } else if !quick {
        println!("{report}");
    }
    Ok(())
}

/// What we measure of our own. All the others are compared with the first.
fn ours(users: &[String], variants: usize) -> Result<Vec<Contestant>, Failure> {
    let allocation = Allocation::new("a-salt", &vec![1; variants])?;
    let bare = Bare::new(variants);
    let id = |user: &str| UserId::new(user);
    Ok(vec![
        Contestant::new("lastprice", "`Allocation::variant(Unit::of(id))`", users, id, move |id| {
            Some(allocation.variant(Unit::of(id)))
        })?,
        Contestant::new("twox-hash", "seeded XXH3, thresholds counted", users, id, move |id| {
            Some(bare.variant(id.as_str().as_bytes()))
        })?,
    ])
}

/// The least that an assignment can be: one hash of the id, and a choice without branches.
struct Bare {
    seed: u64,
    thresholds: Vec<u64>,
}

impl Bare {
    fn new(variants: usize) -> Self {
        let step = u64::MAX / variants as u64;
        let thresholds = (1..variants as u64).map(|n| n * step).collect();
        Bare { seed: XxHash3_64::oneshot(b"a-salt"), thresholds }
    }

    #[inline]
    fn variant(&self, id: &[u8]) -> usize {
        let hash = XxHash3_64::oneshot_with_seed(self.seed, id);
        self.thresholds.iter().map(|&t| usize::from(hash >= t)).sum()
    }
}

/// Ids as services have them: numbers, prefixed numbers and UUIDs, in no order that a branch predictor could learn.
fn users() -> Vec<String> {
    let mut state = 0u64;
    let mut random = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut id = |_| match random() % 3 {
        0 => format!("{:012}", random() % 1_000_000_000_000),
        1 => format!("customer-{:09}", random() % 1_000_000_000),
        _ => uuid::Uuid::from_u64_pair(random(), random()).to_string(),
    };
    (0..USERS).map(&mut id).collect()
}

/// Decides for all users, in their order.
type Pass = Box<dyn FnMut(&mut [u8])>;

/// Somebody who decides a variant for each user.
pub(crate) struct Contestant {
    package: &'static str,
    call: &'static str,
    pass: Pass,
    answers: Vec<u8>,
    allocations: u64,
    /// Nanoseconds per decision, by round.
    times: Vec<f64>,
}

/// Stands for "no variant", such as an error or a default; no experiment here has that many.
const NONE: u8 = u8::MAX;

impl Contestant {
    /// `prepare` makes of a user's id what `decide` takes, once and untimed; `decide` is what is timed, and gives the
    /// index of a variant if it has assigned one.
    pub(crate) fn new<T: 'static, E: Into<Failure>>(
        package: &'static str,
        call: &'static str,
        users: &[String],
        prepare: impl Fn(&str) -> Result<T, E>,
        mut decide: impl FnMut(&T) -> Option<usize> + 'static,
    ) -> Result<Self, Failure> {
        let prepared = users.iter().map(|user| prepare(user)).collect::<Result<Vec<T>, E>>();
        let prepared = prepared.map_err(Into::into)?;
        let pass = move |answers: &mut [u8]| {
            for (user, answer) in prepared.iter().zip(answers) {
                *answer = decide(black_box(user)).map_or(NONE, |variant| variant as u8);
            }
        };
        let answers = vec![NONE; users.len()];
        Ok(Contestant { package, call, pass: Box::new(pass), answers, allocations: 0, times: Vec::new() })
    }

    fn name(&self) -> String {
        format!("{} {}, {}", self.package, locked_version(self.package).unwrap_or("?"), self.call)
    }

    /// A first pass: are the answers an even split? Also counts allocations.
    fn check(&mut self, variants: usize) -> Result<(), Failure> {
        self.allocations = allocations::count(|| (self.pass)(&mut self.answers));
        let mut users_of = vec![0u32; variants];
        for answer in &self.answers {
            *users_of.get_mut(usize::from(*answer)).ok_or("some user has no variant")? += 1;
        }
        // Six standard deviations: 46.7 to 53.3 % for each of 2, 8.0 to 12.0 % for each of 10.
        let (users, share) = (USERS as f64, 1.0 / variants as f64);
        let tolerance = 6.0 * (users * share * (1.0 - share)).sqrt();
        if users_of.iter().any(|&n| (f64::from(n) - users * share).abs() > tolerance) {
            return Err(format!("not an even split: {users_of:?}").into());
        }
        Ok(())
    }

    fn round(&mut self) -> Result<(), Failure> {
        let mut answers = vec![NONE; self.answers.len()];
        // Untimed, so that nobody pays for the caches that the contestant before has filled.
        (self.pass)(&mut answers);
        let started = Instant::now();
        (self.pass)(black_box(&mut answers));
        let time = started.elapsed().as_nanos() as f64 / USERS as f64;
        self.times.push(time);
        if answers == self.answers { Ok(()) } else { Err(format!("{}: other answers", self.name()).into()) }
    }
}

fn table(contestants: &mut [Contestant]) -> String {
    let mut table =
        "| | version | call | median | p10 | p10, of ours | allocations |\n|---|---|---|--:|--:|--:|--:|\n"
            .to_owned();
    let mut of_ours = None;
    for Contestant { package, call, allocations, times, .. } in contestants {
        times.sort_unstable_by(f64::total_cmp);
        let (median, p10) = (times[times.len() / 2], times[times.len() / 10]);
        // Not of the medians: whatever else the machine does hits the long passes of peers more than our short ones.
        let ratio = p10 / *of_ours.get_or_insert(p10);
        let ratio = if ratio < 10.0 { format!("{ratio:.2}") } else { format!("{ratio:.0}") };
        let version = locked_version(package).unwrap_or("?");
        let each = *allocations as f64 / USERS as f64;
        let line = format!(
            "| {package} | {version} | {call} | {median:.1} ns | {p10:.1} ns | {ratio} | {each:.1} |"
        );
        table.extend([&line, "\n"]);
    }
    table
}

fn between_markers(document: &str, report: &str) -> Result<String, Failure> {
    let [start, end] = MARKERS;
    let (before, rest) = document.split_once(start).ok_or("RESULTS.md has no place for the tables")?;
    let (_, after) = rest.split_once(end).ok_or("the place for the tables has no end")?;
    Ok(format!("{before}{start}{report}{end}{after}"))
}

fn locked_version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = include_str!("peers/Cargo.lock").split_once(&package)?;
    Some(rest.split_once('"')?.0)
}
