//! What deciding a user's variant costs, side by side with what feature-flag SDKs do for the same.
//!
//! ```text
//! cargo bench --manifest-path benches/peers/Cargo.toml --features peers --bench assignment    prints the tables
//! … -- --write                    puts them into RESULTS.md
//! … -- --quick                    checks the answers only
//! … -- --instructions NAME N      N passes of the contestants whose call has NAME in it, for a profiler to count
//! ```
//!
//! Without the feature, our own contestants only: the peers take minutes to build.
//!
//! A time counts only if what was timed is an assignment: exit code 1 if a contestant answers with an error, with a
//! default, with a split that is not the one it was asked for, or differently from one round to the next.

#[path = "assignment/allocations.rs"]
mod allocations;
#[path = "assignment/ours.rs"]
mod ours;
#[cfg(feature = "peers")]
#[path = "assignment/peers.rs"]
mod peers;

#[path = "results.rs"]
mod results;

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

const USERS: usize = 8192;
/// Odd, so that there is a median.
const ROUNDS: usize = 101;

fn main() -> Result<(), Failure> {
    let asked_for = |flag: &str| std::env::args().any(|arg| arg == flag);
    let quick = asked_for("--quick") || asked_for("--test");
    let users = users();
    let cores = std::thread::available_parallelism()?;
    if let [.., name, passes] = &std::env::args().collect::<Vec<_>>()[..]
        && asked_for("--instructions")
    {
        return run_passes(&users, name, passes.parse()?);
    }
    let mut report = format!(
        "{USERS} ids of 12 to 36 bytes, median and first decile of {ROUNDS} rounds, {cores} cores.\n"
    );

    for variants in [2, 10] {
        let mut contestants = ours::all(&users, variants)?;
        #[cfg(feature = "peers")]
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

    let rounds = if quick { 1 } else { ROUNDS };
    report.push_str("\n### One user, 50 experiments\n\nFor each, the id hashed once: ");
    for variants in [2, 10] {
        let [median, p10] = ours::of_many_experiments(&users, variants, rounds)?;
        write!(report, "{variants} variants, median {median:.2} ns, first decile {p10:.2} ns. ")?;
    }
    let ratio = ours::of_two_threads(&users, if quick { 1 } else { 11 })?;
    write!(
        report,
        "\n\n### Two threads\n\n`Assigner::assign` on two threads, the snapshot replaced every 10 ms: \
         {ratio:.2} times the decisions of one.\n"
    )?;

    if asked_for("--write") && !quick {
        results::write("assignment", &report)?;
    } else if !quick {
        println!("{report}");
    }
    Ok(())
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
    /// Some users get no variant, rightly.
    leaves_some_out: bool,
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
        prepare: impl FnMut(&str) -> Result<T, E>,
        mut decide: impl FnMut(&T) -> Option<usize> + 'static,
    ) -> Result<Self, Failure> {
        let prepared = users.iter().map(String::as_str).map(prepare).collect::<Result<Vec<T>, E>>();
        let prepared = prepared.map_err(Into::into)?;
        let pass = move |answers: &mut [u8]| {
            for (user, answer) in prepared.iter().zip(answers) {
                *answer = decide(black_box(user)).map_or(NONE, |variant| variant as u8);
            }
        };
        let answers = vec![NONE; users.len()];
        let pass = Box::new(pass);
        let (leaves_some_out, allocations, times) = (false, 0, Vec::new());
        Ok(Contestant { package, call, pass, answers, leaves_some_out, allocations, times })
    }

    pub(crate) fn who_leaves_some_out(mut self) -> Self {
        self.leaves_some_out = true;
        self
    }

    fn name(&self) -> String {
        format!("{} {}, {}", self.package, locked_version(self.package).unwrap_or("?"), self.call)
    }

    /// A first pass: are the answers an even split? Also counts allocations.
    fn check(&mut self, variants: usize) -> Result<(), Failure> {
        // The first pass may set something up that later ones share.
        (self.pass)(&mut self.answers);
        self.allocations = allocations::count(|| (self.pass)(&mut self.answers));
        let mut users_of = vec![0u32; variants];
        for answer in self.answers.iter().filter(|answer| !self.leaves_some_out || **answer != NONE) {
            *users_of.get_mut(usize::from(*answer)).ok_or("some user has no variant")? += 1;
        }
        if self.package == "lastprice" && self.allocations > 0 {
            return Err(format!("{} allocations", self.allocations).into());
        }
        // Six standard deviations: 46.7 to 53.3 % for each of 2, 8.0 to 12.0 % for each of 10.
        let users: u32 = users_of.iter().sum();
        if users < USERS as u32 / 10 {
            return Err(format!("only {users} users are assigned").into());
        }
        let (users, share) = (f64::from(users), 1.0 / variants as f64);
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

fn run_passes(users: &[String], name: &str, passes: usize) -> Result<(), Failure> {
    let mut contestants = ours::all(users, 2)?;
    contestants.retain(|contestant| contestant.call.contains(name));
    for contestant in &mut contestants {
        for _ in 0..passes {
            (contestant.pass)(black_box(&mut contestant.answers));
        }
    }
    Ok(())
}

fn locked_version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = include_str!("peers/Cargo.lock").split_once(&package)?;
    Some(rest.split_once('"')?.0)
}
