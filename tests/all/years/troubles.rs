//! What goes wrong in a night: drawn, done, and undone.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use jiff::SignedDuration;
use snapwarden::disk::Disk as _;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};

use super::fleet::{FOLDER, REPOSITORY};
use super::machine::{Lie, Line, Listing, Machine, StoreFault};
use crate::crashes::{Dice, any_disk_failure, any_fault, used};

/// Who runs the policies in a night.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crew {
    Once,
    /// Two processes at a time.
    Twice,
    Daemon,
}

/// How the processes of a night end, if they are not let end by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Orderly,
    /// After this number of steps.
    Killed(u64),
    /// After this long.
    Late(Duration),
}

/// What a daemon finds that reads its configuration again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reload {
    Same,
    /// The operator has edited it.
    Edited,
}

/// One attempt of a night.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    pub(super) crew: Crew,
    pub(super) end: End,
    pub(super) line: Line,
    /// A daemon is asked to read its configuration.
    pub(super) reload: Option<Reload>,
    /// How far the machine's clock is off, while the platform's is right.
    pub(super) skew: SignedDuration,
    /// The folder of the archive is not mounted.
    pub(super) is_unmounted: bool,
    /// Nothing goes wrong.
    pub(super) is_quiet: bool,
}

impl Attempt {
    /// Nothing goes wrong.
    pub(super) fn quiet() -> Self {
        let skew = SignedDuration::ZERO;
        let line = Line::default();
        Self {
            crew: Crew::Once,
            end: End::Orderly,
            line,
            reload: None,
            skew,
            is_unmounted: false,
            is_quiet: true,
        }
    }

    /// Whether a process can see what others have done.
    pub(super) fn is_seeing(&self) -> bool {
        self.line.lie.is_none() && self.skew.abs() < SignedDuration::from_mins(4)
    }

    /// Draws an attempt, and does to the world and the disk what it says. [`clear`] undoes that. Where changes need not settle,
    /// listings of instances are the truth.
    pub(super) fn draw(dice: &Dice, machine: &Machine, all_settles: bool) -> Self {
        let mut attempt = Self::quiet();
        attempt.crew = match dice.below(8) {
            0 | 1 => Crew::Daemon,
            2 => Crew::Twice,
            _ => Crew::Once,
        };
        if dice.one_in(3) {
            return attempt;
        }
        attempt.is_quiet = false;
        for _ in 0..dice.below(4) {
            machine.world.fault(any_fault(dice));
        }
        if dice.one_in(4) {
            let fault = create_fault(dice);
            machine.world.fault(fault);
        }
        if dice.one_in(4) {
            let pause = Effect::Slow(Duration::from_millis(500 + dice.below(3000)));
            machine.world.fault(Fault::on(Call::GetImage, pause));
        }
        if dice.one_in(8) {
            attempt.line.lie = Some(*dice.any(&[Lie::Stale, Lie::Doubled, Lie::Half, Lie::Empty]));
        }
        if dice.one_in(12) && all_settles {
            attempt.line.lie = Some(*dice.any(&[Lie::Stale, Lie::Doubled, Lie::Half, Lie::Empty]));
            attempt.line.lies_about = Listing::Instances;
        }
        for _ in 0..dice.below(3).saturating_sub(1) {
            attempt.line.meddling.push((dice.below(60), dice.below(1 << 32)));
        }
        attempt.line.is_doubling = dice.one_in(10);
        for _ in 0..dice.below(4) {
            let faults =
                [StoreFault::Unreachable, StoreFault::LostAnswer, StoreFault::Busy, StoreFault::Denied];
            attempt.line.store_faults.push((dice.below(40), *dice.any(&faults)));
        }
        if dice.one_in(10) {
            let minutes = [2, -2, 30, -30, 180, -180, 400 * 24 * 60];
            attempt.skew = SignedDuration::from_mins(*dice.any(&minutes));
            machine.clock.step(attempt.skew);
            machine.world.set_skew(-attempt.skew);
        }
        attempt.is_unmounted = dice.one_in(20);
        if dice.one_in(12) {
            let there: usize = machine.zones.iter().map(|zone| machine.world.snapshots(zone).len()).sum();
            machine.world.set_quota("snapshot", i64::try_from(there).unwrap());
        }
        // After a failed sync the disk saves nothing more of the file for any process, which is worse than any real one: what
        // another process writes later would be safe there.
        if attempt.crew != Crew::Twice && dice.one_in(4) {
            any_disk_failure(dice, &machine.disk);
        }
        if dice.one_in(10) {
            let room = dice.below(100_000);
            machine.disk.set_capacity(Some(used(&machine.disk, Path::new("/")) + room));
        }
        if dice.one_in(12) {
            let folder = Path::new(FOLDER).join(*dice.any(&["vault", "state"]));
            machine.disk.set_unwritable(&folder, Some(ErrorKind::ReadOnlyFilesystem));
        }
        if dice.one_in(5) {
            machine.disk.stop_after(dice.below(160));
        }
        if dice.one_in(8) {
            let (locked_for, is_full) = (u32::from(dice.one_in(2)), dice.one_in(2));
            machine.restic.with(REPOSITORY, |all| (all.locked_for, all.is_full) = (locked_for, is_full));
        }
        attempt.end = match dice.below(6) {
            0 => End::Killed(dice.below(300)),
            1 => End::Killed(dice.below(3000)),
            2 => End::Late(dice.seconds(120)),
            _ => End::Orderly,
        };
        if attempt.crew == Crew::Daemon && dice.one_in(3) {
            attempt.reload = Some(if dice.one_in(2) { Reload::Edited } else { Reload::Same });
        }
        attempt
    }

    /// Everything is as it should be again.
    pub(super) fn clear(&self, machine: &Machine) {
        machine.world.clear_faults();
        machine.world.set_quota("snapshot", -1);
        machine.world.set_skew(SignedDuration::ZERO);
        machine.clock.step(-self.skew);
        machine.disk.set_capacity(None);
        machine.restic.with(REPOSITORY, |all| (all.locked_for, all.is_full) = (0, false));
        debug_assert!(machine.disk.metadata(Path::new("/")).is_ok(), "a new process");
    }
}

fn create_fault(dice: &Dice) -> Fault {
    let effect = match dice.below(9) {
        0 => Effect::Unreachable,
        1 => Effect::CutBefore,
        2 => Effect::CutAfter,
        3 => Effect::Delay(dice.seconds(90)),
        4 => Effect::status(*dice.any(&[403, 409, 429, 500, 503]), "no"),
        5 => Effect::operation_fails("fault", "storage failed"),
        6 => Effect::fails_inline("busy", "the instance is busy"),
        7 => Effect::operation_hangs(),
        _ => Effect::malformed_json(),
    };
    let fault = Fault::on(Call::CreateSnapshot, effect).after(dice.below(2)).times(1 + dice.below(4));
    if dice.one_in(2) { fault.each() } else { fault }
}
