//! The sequence of a run: list, plan, create, export, promote, list and plan again, delete, prune archives, report.
//!
//! A run repeats nothing by itself: the client repeats requests, and the next run repeats what failed in this one.
//!
//! Work that is done at the same time is put into lists of boxed futures. Closures that lend what they capture would do
//! as well, but then the compiler cannot see that a run may move between threads, as the daemon's do.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::num::NonZeroU32;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::future::{FutureExt as _, join_all};
use jiff::{SignedDuration, Timestamp};
use tracing::{Instrument as _, debug, error, info, info_span, warn};

use crate::archive::catalogue::StoredCopy;
use crate::clock::timeout;
use crate::exoscale::wire::Quota;
use crate::policy::name::ArchiveName;
use crate::policy::{Policy, Promote};
use crate::randomness::fresh_id;
use crate::retention::export_gate::unadopted_text;
use crate::retention::guard::is_clock_trusted;
use crate::run::archive_prune::stale_manifests;
use crate::run::context::{RunOptions, Runner};
use crate::run::coverage;
use crate::run::create::{create, note_not_begun, warn_of_inconsistent};
use crate::run::delete::delete_snapshots;
use crate::run::export;
use crate::run::guard::{self, GuardedPlan};
use crate::run::hooks::Hooks;
use crate::run::instance_counts;
use crate::run::list::{Memories, memories};
use crate::run::pauses;
use crate::run::persist::{self, SeenZone};
use crate::run::plan::{ZonePlan, plan_zones};
use crate::run::policy_memory::PolicyMemory;
use crate::run::promote::{self, PrunedTemplates};
use crate::run::report::{HookReport, REPORTED, RunReport, RunResult, Step, ZoneReport, sums_of};
use crate::run::self_instance;
use crate::run::step::Recorder;
use crate::run::zone_run::{ZoneRun, add_steps};
use crate::snapshot::{SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::{Action, AuditMark, StepOutcome};
use crate::state::error::StateError;
use crate::state::last_runs::{AcceptedListing, LastRuns, MissedFromListing, Unparsed};
use crate::text::{chain, counted};

/// The quotas are for metrics alone, so the end of a run does not wait longer for them.
const QUOTAS_WAIT_MAX: Duration = Duration::from_secs(5);

impl Runner {
    /// Runs the policy once.
    ///
    /// # Errors
    /// [`StateError`] if the run could not begin, for example since the policy is running already, or since its state
    /// cannot be read. Later failures are in the report.
    pub async fn run(&self, policy: &Policy, options: &RunOptions) -> Result<RunReport, StateError> {
        let _lock = self.state.lock_policy(&policy.name, &*self.clock).await?;
        let (before, runner, policy) = match self.begin(policy).await {
            Ok(begun) => begun,
            Err(error) => {
                note_not_begun(self, policy, options, &error).await;
                return Err(error);
            }
        };
        let (runner, policy) = (&*runner, &*policy);
        let run_id = fresh_id(&*self.randomness, self.clock.now());
        let span = info_span!("policy_run", policy.name = %policy.name, run.id = %run_id);
        // Boxed, since it is too large for the stacks of its callers.
        let run = Box::pin(async {
            let (runner, policy) = self_instance::resolve(runner, policy).await;
            let (runner, policy) = (&*runner, &*policy);
            let started_at = runner.clock.now();
            let head = runner.state.audit_head().await.ok().flatten();
            let recorder = Recorder::new(runner, policy, run_id, options);
            let hooks = Hooks { runner, policy, options, run_id, started_at };
            let hook = hooks.before().await;
            let memories = memories(runner, policy, &before).await;
            let sequence = Sequence { runner, policy, options, recorder, before: &before, memories };
            let (mut report, seen) = sequence.run(started_at, hook).await;
            // Not by a clock in doubt, which would remove them all.
            if seen.values().any(|zone| zone.is_clock_trusted) {
                let removed = runner.state.remove_old_audit(&*runner.clock, &runner.keep_audit).await;
                if let Err(error) = removed {
                    warn!("old files of the audit log stay: {}", chain(&error));
                }
            }
            if options.instances.is_none() {
                persist::persist(runner, policy, before, seen, &mut report).await;
            }
            // What was done is saved by now, whatever becomes of these.
            runner.keep_audit_head(head.as_ref(), &options.stop).await;
            hooks.finish(&mut report).await;
            report
        });
        let report = run.instrument(span.clone()).await;
        span.in_scope(|| log(&report));
        Ok(report)
    }

    /// Reads what a run rests on: what the last one remembered, and the runner and the policy as they are by the pauses.
    async fn begin<'a>(
        &'a self,
        policy: &'a Policy,
    ) -> Result<(LastRuns, Cow<'a, Self>, Cow<'a, Policy>), StateError> {
        // Before anything else, since a run that forgets what was done must not delete.
        self.state.policy_state(&policy.name).await?;
        let before = self.state.last_runs(&policy.name).await?;
        self.remember_new_archives(&before).await?;
        let (runner, policy) = pauses::heed(self, policy).await?;
        Ok((before, runner, policy))
    }
}

/// What the phases of one run share.
struct Sequence<'a> {
    runner: &'a Runner,
    policy: &'a Policy,
    options: &'a RunOptions,
    recorder: Recorder,
    /// What the policy's last run remembered.
    before: &'a LastRuns,
    /// What that run rested on.
    memories: Memories,
}

impl Sequence<'_> {
    /// The report, and what the delete phase found. After a hook `before` that failed, it is as if no zone could be listed.
    async fn run(
        &self,
        begun_at: Timestamp,
        hook: Option<HookReport>,
    ) -> (RunReport, BTreeMap<ZoneName, SeenZone>) {
        let Self { runner, policy, recorder, .. } = self;
        // After the hook.
        let (started_at, begun) = (runner.clock.now(), runner.clock.elapsed());
        let only = self.options.instances.as_ref();
        let refusal = hook.as_ref().and_then(|hook| hook.failure.as_ref());
        let plans = match refusal.map(|failure| format!("nothing is done here: {failure}")) {
            Some(failure) => policy.zones.iter().map(|_| Err(failure.clone())).collect(),
            None => self.plans(&policy.zones).await,
        };
        let mut zones: Vec<ZoneRun> =
            policy.zones.iter().zip(plans).map(|(zone, plan)| ZoneRun::new(zone, plan)).collect();
        // All zones of a run have the same archives.
        let first = zones.iter_mut().find_map(|ZoneRun { plan, report }| Some((plan.as_ref()?, report)));
        if let Some((plan, report)) = first {
            report.failures.extend(runner.mark_used_archives(&plan.listing).await);
            // Before the exports, which may store them again.
            report.warnings.extend(plan.listing.losses.iter().cloned());
        }
        if policy.create {
            let slot = self.options.slot.unwrap_or(started_at);
            // One from before the hook is no snapshot of what it prepared. This policy's own serve their slot all the same, so that
            // a restart takes no second one.
            let since = if hook.is_some() { slot.max(started_at) } else { slot };
            create(runner, recorder, policy, (slot, since, only), &mut zones, self.before).await;
            self.plan_again_where_created(&mut zones).await;
            warn_of_inconsistent(runner, &mut zones).await;
        }
        let mut full: BTreeSet<ArchiveName> = BTreeSet::new();
        if let Some(export) = &policy.export {
            for ZoneRun { plan, report } in &mut zones {
                let listings = plan.iter().map(|plan| &plan.listing);
                report.failures.extend(listings.flat_map(|listing| export::unreadable(export, listing)));
            }
            let (steps, without_space) =
                export::export(runner, recorder, policy, export, &plans_of(&zones)).await;
            add_steps(&mut zones, steps);
            full = without_space;
            // Before anything is deleted that needs a copy.
            runner.lock_copies(policy, export, &mut zones, &self.options.stop).boxed().await;
        }
        if let Some(promote) = &policy.promote {
            let steps = promote::promote(runner, recorder, policy, promote, &plans_of(&zones)).await;
            add_steps(&mut zones, steps);
        }
        let seen = self.delete(&mut zones, (started_at, begun)).await;
        if only.is_none() {
            runner.prune_archives(policy, recorder, &mut zones, full, &self.options.stop).boxed().await;
            if let Some(export) = &policy.export {
                runner.remove_leftovers(policy, export, &mut zones, &self.options.stop).boxed().await;
            }
        }
        let times = [begun_at, runner.clock.now()];
        let quotas = self.quotas().await;
        let zones = zones.into_iter().map(|zone| zone.report).collect();
        let hooks = hook.into_iter().collect();
        (RunReport::new(recorder.run_id(), policy.name.clone(), times, zones, hooks, quotas), seen)
    }

    /// Plans for all but deletions.
    async fn plans(&self, zones: &[ZoneName]) -> Vec<Result<ZonePlan, String>> {
        let mut plans = plan_zones(self.runner, self.policy, &self.memories, zones).await;
        plans.iter_mut().flatten().for_each(|plan| plan.limit_to(self.options.instances.as_ref()));
        plans
    }

    /// What was created belongs into the plans for exports and promotions.
    async fn plan_again_where_created(&self, zones: &mut [ZoneRun]) {
        // One that was skipped may have been taken by another policy.
        let is_begun =
            |step: &Step| step.outcome != StepOutcome::Skipped || step.facts.action == Action::Create;
        let changed =
            zones.iter_mut().filter(|zone| zone.plan.is_some() && zone.report.steps.iter().any(is_begun));
        let changed: Vec<&mut ZoneRun> = changed.collect();
        let names: Vec<ZoneName> = changed.iter().map(|zone| zone.report.zone.clone()).collect();
        let plans = self.plans(&names).await;
        for (zone, plan) in changed.into_iter().zip(plans) {
            zone.set_plan(plan);
        }
    }

    /// Lists and plans again, and deletes what that plan says, in every zone that this run could list. Returns what it
    /// found there.
    async fn delete(
        &self,
        zones: &mut [ZoneRun],
        (started_at, begun): (Timestamp, Duration),
    ) -> BTreeMap<ZoneName, SeenZone> {
        let Self { runner, policy, options, before, .. } = self;
        // The plans before are done with; later steps only ask how the archives and the clocks stood.
        zones.iter_mut().filter_map(|zone| zone.plan.as_mut()).for_each(|plan| plan.listing.forget_copies());
        let mut zones: Vec<&mut ZoneReport> =
            zones.iter_mut().filter(|zone| zone.plan.is_some()).map(|zone| &mut zone.report).collect();
        // Every run locks its zones in this order, so that two runs never wait for each other.
        zones.sort_by(|one, other| one.zone.cmp(&other.zone));
        let mut locked = Vec::new();
        for report in zones {
            match runner.state.lock_zone(&report.zone, &*runner.clock, &options.stop).await {
                Ok(lock) => locked.push((report, lock)),
                Err(error) => report.failures.push(format!("nothing is deleted: {}", chain(&error))),
            }
        }
        if options.stop.is_cancelled() {
            for (report, _) in locked {
                // Without a plan there are no steps to say so.
                report.failures.push("nothing is deleted: the program is stopping".to_owned());
            }
            return BTreeMap::new();
        }

        let names: Vec<ZoneName> = locked.iter().map(|(report, _)| report.zone.clone()).collect();
        // Before the listing, so that every deletion since the listing is in the log after this mark.
        let mark = runner.state.audit_end().await;
        let plans = plan_zones(runner, policy, &self.memories, &names).await;
        let listed_at = runner.clock.now();
        // The clock may have been set since the run began, and it is the one of now that is compared with the platform's.
        let running = SignedDuration::try_from(runner.clock.elapsed().saturating_sub(begun));
        let by_now = running.ok().and_then(|running| listed_at.checked_sub(running).ok());
        let started_at = by_now.map_or(started_at, |by_now| started_at.max(by_now));
        let listing = plans.iter().flatten().map(|plan| &plan.listing).next();
        let is_said = |loss: &&String| locked.iter().any(|(report, _)| report.warnings.contains(loss));
        let losses = listing.iter().flat_map(|listing| &listing.losses);
        let losses: Vec<String> = losses.filter(|loss| !is_said(loss)).cloned().collect();
        if let (Some(listing), Some((report, _))) = (listing, locked.first_mut()) {
            report.warnings.extend(losses);
            if options.instances.is_none() {
                report.failures.extend(runner.accept_archives(listing, &names).await);
                report.warnings.extend(runner.mark_holds(listing).await);
            }
            let exports = policy.export.iter();
            report.failures.extend(exports.flat_map(|export| export::write_failed(export, listing)));
        }
        let mut guarded = guard::judge_run(runner, policy, plans, before, options).await;
        let inventories = guarded.iter().map(|guarded| Some(&guarded.as_ref().ok()?.plan.listing.inventory));
        let only = options.instances.as_ref();
        let unmatched = coverage::unmatched_text(policy, inventories).filter(|_| only.is_none());
        guarded.iter_mut().flatten().for_each(|guarded| guarded.limit_to(policy, only));
        let longest_gap = coverage::longest_gap(policy, listed_at);
        let templates = match &policy.promote {
            Some(promote) => Some((promote, PolicyMemory::read(runner, policy).await)),
            None => None,
        };
        let mut deletions: Vec<BoxFuture<'_, _>> = Vec::new();
        for ((report, _), guarded) in locked.iter_mut().zip(guarded) {
            let (templates, mark) = (templates.as_ref(), mark.as_ref());
            report.unmatched.clone_from(&unmatched);
            let deletion = async move {
                let mut guarded = guarded.map_err(|failure| report.failures.push(failure)).ok()?;
                let is_unadopted = guarded.plan.listing.inventory.unadopted.is_some();
                if guarded.held.is_none() && !is_unadopted {
                    guarded.disagreement = runner.judge_again(policy, &guarded).await;
                }
                let seen = self.report_plan(report, &guarded, mark, [started_at, listed_at]);
                if guarded.held.is_none() && !is_unadopted && guarded.disagreement.is_none() {
                    self.delete_in(report, &guarded.plan, templates).await;
                }
                self.report_instances(report, &guarded, longest_gap, listed_at).await;
                let listing = &guarded.plan.listing;
                // By a clock in doubt events would be looked for at other times, and found missing.
                let is_trusted = is_clock_trusted(&policy.guard, listing.inventory.clock);
                let is_whole = options.instances.is_none() && !options.stop.is_cancelled();
                let unexplained = if is_whole && is_trusted {
                    let endings = runner.account(&self.recorder, listing, mark, listed_at).boxed().await;
                    report.warnings.extend(endings.warnings);
                    report.failures.extend(endings.failure);
                    endings.unexplained
                } else {
                    runner.remembered_unexplained(&report.zone, listed_at).await
                };
                report.coverage.iter_mut().for_each(|coverage| coverage.unexplained = unexplained);
                Some((report.zone.clone(), seen, self.stale_manifests(&guarded)))
            };
            deletions.push(deletion.boxed());
        }
        let deleted = join_all(deletions).await;
        let mut all_seen = BTreeMap::new();
        // One after the other, since manifests are changed one at a time.
        for ((report, _), deleted) in locked.into_iter().zip(deleted) {
            let Some((zone, seen, stale)) = deleted else { continue };
            let forgotten = runner.forget_pruned(&stale, &options.stop).await;
            report.warnings.extend(forgotten.err());
            all_seen.insert(zone, seen);
        }
        all_seen
    }

    /// The manifests of pruned copies that nothing needs any more, by a listing that is in no doubt.
    fn stale_manifests(&self, guarded: &GuardedPlan) -> Vec<(ArchiveName, StoredCopy)> {
        let GuardedPlan { plan, held, emptied, disagreement, is_accepted, .. } = guarded;
        let is_whole = self.options.instances.is_none() && plan.listing.inventory.unadopted.is_none();
        let is_free = held.is_none() && emptied.is_none() && disagreement.is_none();
        let is_sure = is_whole && is_free && *is_accepted;
        let before = self.before.zones.get(plan.zone()).and_then(|zone| zone.accepted.as_ref());
        before.filter(|_| is_sure).map(|before| stale_manifests(plan, before)).unwrap_or_default()
    }

    /// Reports the plan of the delete phase. Returns what the next run compares with.
    fn report_plan(
        &self,
        report: &mut ZoneReport,
        guarded: &GuardedPlan,
        mark: Result<&AuditMark, &StateError>,
        [started_at, listed_at]: [Timestamp; 2],
    ) -> SeenZone {
        let GuardedPlan { plan, held, emptied, pending, missed, disagreement, is_accepted } = guarded;
        let mut sums = sums_of(&plan.plan);
        if held.is_some() || plan.listing.inventory.unadopted.is_some() {
            sums.blocked_by_guard += sums.delete;
        }
        if disagreement.is_some() {
            sums.blocked_by_judge += sums.delete;
        }
        report.plan = Some(sums);
        report.held = held.as_ref().map(ToString::to_string).or_else(|| Some(emptied.as_ref()?.1.clone()));
        if let Some(archive) = &plan.listing.inventory.unadopted {
            report.held = Some(unadopted_text(archive));
        }
        report.held = disagreement.clone().or_else(|| report.held.take());
        report.pending.clone_from(pending);
        report.warnings.extend(plan.listing.warnings.iter().cloned());
        report.warnings.extend(persist::overdue_in(self.policy, self.before, plan, listed_at));
        let accepted = match mark {
            Ok(mark) => is_accepted.then(|| accepted_listing(listed_at, mark, plan)),
            Err(error) => {
                // The older one stays: then more of the log is read, and nothing is missed.
                report.failures.push(format!("the listing is not accepted: {}", chain(error)));
                None
            }
        };
        let clock = plan.listing.inventory.clock;
        let is_clock_trusted = is_clock_trusted(&self.policy.guard, clock);
        let policies = &self.runner.policies;
        let memory = if is_clock_trusted {
            Some(plan.memory(policies, started_at, accepted.is_some()))
        } else {
            let by_platform = clock.by_platform(started_at).filter(|_| plan.listing.memory.at.is_some());
            by_platform.map(|by_platform| plan.memory_in_doubt(policies, started_at.max(by_platform)))
        };
        let rested_on = memory.and_then(|memory| Unparsed::of(&memory));
        let before = self.before.zones.get(plan.zone()).and_then(|zone| zone.missed.as_ref());
        let since = before.filter(|before| before.ids == *missed).map_or(started_at, |before| before.since);
        let missed = MissedFromListing { since: since.min(started_at), ids: missed.clone() };
        let missed = Some(missed).filter(|_| is_clock_trusted && accepted.is_none());
        let missed = missed.or_else(|| before.filter(|_| !is_clock_trusted).cloned());
        SeenZone { accepted, rested_on, is_clock_trusted, missed }
    }

    /// Reports what each instance has after the deletions, and which lack what they should have.
    async fn report_instances(
        &self,
        report: &mut ZoneReport,
        guarded: &GuardedPlan,
        longest_gap: Option<SignedDuration>,
        listed_at: Timestamp,
    ) {
        let Self { runner, policy, options, before, .. } = self;
        let plan = &guarded.plan;
        let done = report.steps.iter().filter(|step| step.has_deleted_a_snapshot());
        let deleted: HashSet<SnapshotId> = done.filter_map(|step| step.facts.snapshot.id).collect();
        let before = before.zones.get(plan.zone()).map_or(&[][..], |zone| &zone.instances);
        let mut instances = instance_counts::count(policy, &runner.exempt, plan, &deleted, before, listed_at);
        instances.retain(|one| plan.listing.is_one_of(options.instances.as_ref(), one.id));
        let judged = coverage::judge(policy, longest_gap, &instances, listed_at);
        report.missing = judged.missing;
        // With `expect_newest` the plan has said so.
        report.warnings.extend(judged.stale.filter(|_| policy.guard.expect_newest.is_none()));
        report.warnings.extend(coverage::vanished_text(&instances, listed_at));
        if options.with_details {
            report.details = Some(runner.details(policy, guarded, &deleted, &instances, listed_at).await);
        }
        report.instances = instances;
        let inventory = &plan.listing.inventory;
        let elsewhere = inventory.elsewhere.iter();
        report.elsewhere = elsewhere.filter(|instance| policy.select.selects_listed(instance)).count() as u64;
        report.coverage = Some(coverage::of_zone(&runner.policies, &runner.exempt, inventory, listed_at));
    }

    async fn delete_in(
        &self,
        report: &mut ZoneReport,
        plan: &ZonePlan,
        templates: Option<&(&Promote, Result<PolicyMemory<'_>, StateError>)>,
    ) {
        report.steps.extend(delete_snapshots(self.runner, &self.recorder, plan).await);
        let pruned = match templates {
            Some((promote, Ok(memory))) => {
                let only = self.options.instances.as_ref();
                promote::prune_templates(memory, &self.recorder, promote, plan, only).await
            }
            Some((_, Err(error))) => Err(chain(error)),
            None => Ok(PrunedTemplates::default()),
        };
        match pruned {
            Ok(PrunedTemplates { steps, waiting }) => {
                report.steps.extend(steps);
                if let (1.., Some((promote, _))) = (waiting, templates) {
                    let templates = templates_wait(promote, waiting);
                    let pending = report.pending.take().into_iter().chain([templates]);
                    report.pending = Some(pending.collect::<Vec<_>>().join("; "));
                }
            }
            Err(failure) => report.failures.push(failure),
        }
    }

    /// The organization's quotas; none if they cannot be read in time.
    async fn quotas(&self) -> Vec<Quota> {
        let stop = &self.options.stop;
        let Some(zone) = self.policy.zones.first().filter(|_| !stop.is_cancelled()) else {
            return Vec::new();
        };
        let client = self.runner.client.zone(zone);
        let why = match timeout(&*self.runner.clock, QUOTAS_WAIT_MAX, client.list_quotas()).await {
            Ok(Ok(quotas)) => return quotas,
            Ok(Err(error)) => chain(&error),
            Err(late) => late.to_string(),
        };
        debug!(zone.name = %zone, "the quotas cannot be read: {why}");
        Vec::new()
    }
}

fn plans_of(zones: &[ZoneRun]) -> Vec<&ZonePlan> {
    zones.iter().filter_map(|zone| zone.plan.as_ref()).collect()
}

/// That templates stay only because a change of their number has not settled.
fn templates_wait(Promote { keep, .. }: &Promote, waiting: usize) -> String {
    let (are, keep) = (if waiting == 1 { "is" } else { "are" }, keep.map_or(0, NonZeroU32::get));
    let templates = counted(waiting, "template");
    format!(
        "{templates} {are} kept only because a change has not settled (`settle`): keep = {keep} does not keep them"
    )
}

fn accepted_listing(at: Timestamp, mark: &AuditMark, plan: &ZonePlan) -> AcceptedListing {
    // One that is being deleted will not be missed, and the line of its deletion may be before the mark.
    let is_leaving =
        |state: &SnapshotState| matches!(state, SnapshotState::Deleting | SnapshotState::Deleted);
    let AuditMark { month: audit_month, offset: audit_from } = mark.clone();
    let (snapshots, of_instances) = (Vec::new(), BTreeMap::new());
    let mut accepted = AcceptedListing { at, audit_from, audit_month, snapshots, of_instances };
    let snapshots = plan.listing.inventory.snapshots.iter();
    for (place, snapshot) in (0..).zip(snapshots.filter(|snapshot| !is_leaving(&snapshot.state))) {
        accepted.snapshots.push(snapshot.id);
        if let Some(instance) = snapshot.instance_id {
            accepted.of_instances.entry(instance).or_default().push(place);
        }
    }
    accepted
}

/// Logs the whole run in one line, which is an error if it failed, after what concerns its zones; steps were logged as they
/// ended.
fn log(report: &RunReport) {
    for zone in &report.zones {
        let name = &zone.zone;
        let blocked = zone.held.iter().map(|held| format!("deletions are blocked by the guard: {held}"));
        let lacking = zone.failures.iter().chain(&zone.warnings).chain(&zone.missing).chain(&zone.unmatched);
        for text in lacking.chain(&zone.pending).cloned().chain(blocked) {
            warn!(target: REPORTED, { zone.name = %name }, "zone {name}: {text}");
        }
    }
    let (result, sums) = (report.result.as_str(), report.sums());
    match report.result {
        RunResult::Success => info!(target: REPORTED, result, "{result}: {sums}"),
        RunResult::Held => warn!(target: REPORTED, result, "{result}: {sums}"),
        RunResult::Partial | RunResult::Failed => {
            let first =
                report.zones.iter().find_map(|zone| Some((&zone.zone, persist::first_failure(zone)?)));
            let first =
                first.map_or_else(String::new, |(zone, why)| format!("; first in zone {zone}: {why}"));
            error!(target: REPORTED, result, "{result}: {sums}{first}");
        }
    }
}
