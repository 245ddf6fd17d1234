//! Years, by seed: the whole program over a simulated platform, in one thread and in virtual time, while everything goes wrong
//! that may.
//!
//! A seed draws a fleet, policies and archives of each kind (`fleet`), and then night after night what strangers, operators, the
//! platform, the network, disks and clocks do (`troubles`). The program runs as processes of a machine (`machine`): as `once`, twice
//! at a time, or as the daemon; it is killed at any step. A witness sees every request that changes something, and judges it by
//! what is true at that moment (`book`).
//!
//! After every night: nothing was deleted that the rules keep, judged anew from the truth, nor without the copies that it needs,
//! nor before a change had settled; each change had its safe line in the audit log before; no copy is listed whose bytes differ,
//! none was pruned too early, nor a template; there is one snapshot for a slot; the judges never disagree. Once all that is over, two runs
//! bring the fleet to rest: what the rules delete is gone, and the newest snapshots have their copies. Then the chain of the audit log is whole, and of each snapshot that was listed and is not there any more the log says how it ended, and who deleted it.
//!
//! The same seed is the same life, to the last byte. The first nights of some seeds are played with the tests;
//! `SNAPWARDEN_SEEDS=1000` plays that many seeds to their ends, and `SNAPWARDEN_SEED=7` one of them; with `SNAPWARDEN_NIGHTS=4` only
//! their first nights.

mod book;
mod fleet;
mod life;
mod machine;
mod told;
mod troubles;

use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use life::Played;

const HOURS_A_YEAR: f64 = 365.25 * 24.0;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How many seeds are played with the tests, and how many nights of each.
const SEEDS: u64 = 200;
const NIGHTS: u64 = 3;

/// What came of seeds.
struct Campaign {
    played: Played,
    /// How each seed failed that did.
    failures: BTreeMap<u64, String>,
}

/// Plays a life on a runtime of its own, with one thread.
#[expect(clippy::print_stderr, reason = "so that the end of the process is understood")]
fn alone<T>(life: impl Future<Output = T>) -> T {
    snapwarden::disk::without_threads();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // Of a runtime like this one, only threads for blocking work begin. How long they take is not in the seed.
    runtime.on_thread_start(|| {
        eprintln!("a life has a second thread, and its seed would not be the same life again");
        std::process::abort();
    });
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(Box::pin(life))
}

/// Plays seeds, as many at a time as there are cores.
fn play(seeds: &[u64], nights: u64) -> Campaign {
    let next = AtomicU64::new(0);
    // Where it is asked only whether something goes wrong at all, as `tests/guards.py` does.
    let is_enough = number("SNAPWARDEN_VIOLATIONS") == Some(1);
    let all = Mutex::new(Campaign { played: Played::default(), failures: BTreeMap::new() });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) =
                    seeds.get(usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap())
                {
                    if is_enough && !all.lock().unwrap().failures.is_empty() {
                        break;
                    }
                    let played = catch_unwind(|| alone(life::a_life(*seed, nights)));
                    let mut all = all.lock().unwrap();
                    match played {
                        Ok(played) => all.played.add(&played),
                        Err(panic) => {
                            let why = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
                            let first = why.lines().next().unwrap_or_default();
                            all.failures.insert(*seed, first.to_owned());
                        }
                    }
                }
            });
        }
    });
    all.into_inner().unwrap()
}

/// The command that plays a seed again.
fn again(seed: u64, nights: u64) -> String {
    let nights = if nights == u64::MAX { String::new() } else { format!("SNAPWARDEN_NIGHTS={nights} ") };
    format!("to repeat: SNAPWARDEN_SEED={seed} {nights}cargo test --test all years::whatever")
}

#[test]
fn whatever_goes_wrong_for_years_nothing_is_lost() {
    let to_the_end = number("SNAPWARDEN_NIGHTS").unwrap_or(u64::MAX);
    let (seeds, nights): (Vec<u64>, u64) = match (number("SNAPWARDEN_SEED"), number("SNAPWARDEN_SEEDS")) {
        (Some(seed), _) => (vec![seed], to_the_end),
        (None, Some(count)) => {
            let first = number("SNAPWARDEN_FIRST_SEED").unwrap_or(0);
            ((first..first + count).collect(), to_the_end)
        }
        (None, None) => ((0..SEEDS).collect(), NIGHTS),
    };
    let Campaign { played, failures } = play(&seeds, nights);
    let violations =
        failures.iter().map(|(seed, why)| format!("seed {seed}: {why}\n{}", again(*seed, nights)));
    let violations: Vec<String> = violations.collect();
    println!(
        "{} seeds, {} nights, {:.1} fleet-years: {}; {} violations",
        seeds.len(),
        played.nights,
        played.hours / HOURS_A_YEAR,
        played.sums(),
        violations.len(),
    );
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    assert!(seeds.len() < 100 || played.has_all(), "something never happened: {}", played.sums());
}

/// Requests with all that is in them, the disk, the archives and the zones after each night, the reports.
#[test]
fn the_same_seed_is_the_same_life() {
    let first = number("SNAPWARDEN_SEED").or(number("SNAPWARDEN_FIRST_SEED")).unwrap_or(1000);
    let count = if number("SNAPWARDEN_SEED").is_some() { 1 } else { number("SNAPWARDEN_SEEDS").unwrap_or(6) };
    let nights = number("SNAPWARDEN_NIGHTS").unwrap_or(NIGHTS);
    for seed in first..first + count {
        let [one, two] = [(); 2].map(|()| alone(life::a_traced_life(seed, nights)));
        let differs = (0..one.len().max(two.len())).find(|line| one.get(*line) != two.get(*line));
        if let Some(line) = differs {
            let [one, two] = [&one, &two].map(|all| all.get(line).map_or("", String::as_str));
            let same = one.bytes().zip(two.bytes()).take_while(|(one, two)| one == two).count();
            let around = |text: &str| {
                let from = text.floor_char_boundary(same.saturating_sub(300));
                let to = text.floor_char_boundary(same + 300);
                text[from..to].to_owned()
            };
            panic!("seed {seed}, line {line}:\n{}\nbut the second time\n{}", around(one), around(two));
        }
        assert!(one.len() > 100, "seed {seed}: {} lines", one.len());
    }
}
