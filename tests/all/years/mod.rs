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
//! none was pruned too early; there is one snapshot for a slot. Once all that is over, two runs bring the fleet to rest.
//!
//! It is a campaign, since a seed takes seconds and may not repeat exactly: `SNAPWARDEN_SEEDS=1000` plays that many seeds to their
//! ends, and `SNAPWARDEN_SEED=7` one of them; with `SNAPWARDEN_NIGHTS=4` only their first nights.

mod book;
mod fleet;
mod life;
mod machine;
mod told;
mod troubles;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use life::Played;

use crate::stage::skipped;

const HOURS_A_YEAR: f64 = 365.25 * 24.0;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Plays seeds, each on a runtime of its own with one thread; as many at a time as there are cores.
fn play(seeds: &[u64], nights: u64) -> Played {
    let next = AtomicU64::new(0);
    let all = Mutex::new(Played::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                snapwarden::disk::without_threads();
                while let Some(seed) =
                    seeds.get(usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap())
                {
                    let mut runtime = tokio::runtime::Builder::new_current_thread();
                    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
                    let played = runtime.block_on(Box::pin(life::a_life(*seed, nights)));
                    all.lock().unwrap().add(&played);
                }
            });
        }
    });
    all.into_inner().unwrap()
}

#[test]
fn whatever_goes_wrong_for_years_nothing_is_lost() {
    let seeds: Vec<u64> = match (number("SNAPWARDEN_SEED"), number("SNAPWARDEN_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(count)) => {
            let first = number("SNAPWARDEN_FIRST_SEED").unwrap_or(0);
            (first..first + count).collect()
        }
        (None, None) => return skipped(format_args!("years are played if SNAPWARDEN_SEEDS says how many")),
    };
    let nights = number("SNAPWARDEN_NIGHTS").unwrap_or(u64::MAX);
    let played = play(&seeds, nights);
    println!(
        "{} seeds, {} nights, {:.1} fleet-years: {}",
        seeds.len(),
        played.nights,
        played.hours / HOURS_A_YEAR,
        played.sums()
    );
    assert!(seeds.len() < 100 || played.has_all(), "something never happened: {}", played.sums());
}
