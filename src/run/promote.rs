//! Makes templates of snapshots, once each, and deletes the older ones that the same policy made.
//!
//! A promotion must not simply be repeated: that makes a second template. So a request is remembered
//! before the request, and after a lost answer the template is looked for by its name and date.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroU32;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::exoscale::client::ZoneClient;
use crate::exoscale::wire::Deleted;
use crate::exoscale::wire::{PromoteRequest, Template};
use crate::policy::select::Pattern;
use crate::policy::template_name::TemplateNameValues;
use crate::policy::{Policy, Promote};
use crate::randomness::fresh_id;
use crate::retention::change::Change;
use crate::retention::deciding_keys::PROMOTE_KEEP;
use crate::retention::guard::is_clock_trusted;
use crate::retention::inventory::ClockSkew;
use crate::run::context::Runner;
use crate::run::plan::{PlannedAction, ZonePlan};
use crate::run::policy_memory::PolicyMemory;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, TemplateId, ZoneName};
use crate::state::audit::{Action, StepFacts, Subject};
use crate::state::policy_state::{PolicyState, Promotion};
use crate::text::{chain, printable};

/// A promotion whose answer was lost is not asked for again before this is over: it may still go on unseen.
/// Twice the hour that the vendor's own tools give a template.
const UNKNOWN_FOR: SignedDuration = SignedDuration::from_hours(2);

/// A template may be dated a little before our request, if our clock is ahead of the platform's, or was set back since.
const DATED_BEFORE: SignedDuration = SignedDuration::from_mins(10);

/// The snapshots whose template is known: they are never promoted again.
async fn settled(memory: &PolicyMemory<'_>) -> HashSet<SnapshotId> {
    let state = memory.own().await;
    let settled = state.promotions.iter().filter(|made| made.template_id.is_some());
    settled.map(|made| made.snapshot_id).collect()
}

/// Every template that a policy is known to have made: those of others are never taken for this one's.
fn known(memory: &PolicyMemory<'_>, own: &PolicyState) -> HashSet<TemplateId> {
    memory.others.iter().flat_map(template_ids).chain(template_ids(own)).collect()
}

fn template_ids(state: &PolicyState) -> impl Iterator<Item = TemplateId> {
    state.promotions.iter().filter_map(|made| made.template_id)
}

/// Promotes what the policy wants and was not promoted yet.
pub(crate) async fn promote(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    promote: &Promote,
    plans: &[&ZonePlan],
) -> Vec<Step> {
    let memory = PolicyMemory::read(runner, policy).await;
    let settled = match &memory {
        Ok(memory) => settled(memory).await,
        Err(_) => HashSet::new(),
    };
    let memory = memory.as_ref();
    // One after the other where the templates have the same name: otherwise the template of one could be taken for that
    // of another whose answer was lost.
    let mut same_name: BTreeMap<(&ZoneName, String), Vec<Candidate<'_>>> = BTreeMap::new();
    for plan in plans {
        for (name, candidate) in candidates(policy, promote, plan, &settled) {
            same_name.entry((plan.zone(), name)).or_default().push(candidate);
        }
    }
    let mut steps: Vec<BoxFuture<'_, _>> = Vec::new();
    for ((zone, name), candidates) in same_name {
        let in_turn = async move {
            let mut steps = Vec::new();
            for candidate in candidates {
                let intent =
                    StepFacts::new(Action::Promote, zone, candidate.subject.clone(), vec![why(&name)]);
                let name = name.clone();
                let work = async {
                    let memory = memory.map_err(|error| StepError::failed(chain(error)))?;
                    promote_once(memory, promote, zone, &candidate, name).await
                };
                steps.push(recorder.step(intent, work).await);
            }
            steps
        };
        steps.push(in_turn.boxed());
    }
    stream::iter(steps).buffer_unordered(runner.concurrency.get()).concat().await
}

/// The promotions that a run would begin with in a zone.
pub(crate) async fn planned(
    memory: &PolicyMemory<'_>,
    promote: &Promote,
    plan: &ZonePlan,
) -> Vec<PlannedAction> {
    let settled = settled(memory).await;
    let all = candidates(memory.policy, promote, plan, &settled).into_iter().map(|(name, candidate)| {
        let (action, snapshot) = (Action::Promote, candidate.subject);
        PlannedAction { action, archive: None, snapshot, why: why(&name) }
    });
    all.collect()
}

/// The templates that a run would delete in a zone after these promotions, if they succeed.
///
/// # Errors
/// Why that is unknown, as a sentence.
pub(crate) async fn planned_deletions(
    memory: &PolicyMemory<'_>,
    promote: &Promote,
    plan: &ZonePlan,
    promotions: &[PlannedAction],
) -> Result<Vec<TemplateDecision>, String> {
    let Some(keep) = promote.keep.and_then(|keep| settled_keep(keep, memory.policy, plan)) else {
        return Ok(Vec::new());
    };
    let made = memory.own().await.promotions.clone();
    if made.is_empty() {
        return Ok(Vec::new());
    }
    let listed = memory.runner.client.zone(plan.zone()).list_templates().await;
    let listed = listed
        .map_err(|error| format!("which templates `promote.keep` deletes is not known: {}", chain(&error)))?;
    let come: Vec<Subject> = promotions.iter().map(|action| action.snapshot.clone()).collect();
    Ok(beyond(keep, &made, &listed, &come, plan, None))
}

fn why(name: &str) -> String {
    format!("the policy makes it a template named {}", printable(name))
}

/// A snapshot that is to become a template.
struct Candidate<'a> {
    snapshot: &'a Snapshot,
    instance_id: InstanceId,
    subject: Subject,
    clock: ClockSkew,
}

/// The snapshots that the policy wants promoted and that were not yet, each with its template's name.
fn candidates<'a>(
    policy: &Policy,
    promote: &Promote,
    plan: &'a ZonePlan,
    settled: &HashSet<SnapshotId>,
) -> Vec<(String, Candidate<'a>)> {
    let wanted = plan.wanted(promote.snapshots).into_iter();
    let unsettled = wanted.filter(|(snapshot, _)| !settled.contains(&snapshot.id));
    let named = unsettled.map(|(snapshot, instance_id)| {
        let subject = plan.listing.subject(snapshot);
        let values = TemplateNameValues {
            instance: subject.instance_name.as_deref().unwrap_or_default(),
            zone: plan.zone(),
            policy: &policy.name,
            snapshot: snapshot.id,
            created: snapshot.created_at,
            time_zone: &policy.time_zone,
        };
        (
            promote.name.render(&values),
            Candidate { snapshot, instance_id, subject, clock: plan.listing.inventory.clock },
        )
    });
    named.collect()
}

async fn promote_once(
    memory: &PolicyMemory<'_>,
    promote: &Promote,
    zone: &ZoneName,
    candidate: &Candidate<'_>,
    name: String,
) -> Result<Done, StepError> {
    let Candidate { snapshot, instance_id, clock, .. } = *candidate;
    let client = memory.runner.client.zone(zone);
    let now = memory.runner.clock.now();
    let (asked_before, known, lost) = {
        let state = memory.own().await;
        let asked = state.promotions.iter().find(|made| made.snapshot_id == snapshot.id).cloned();
        let lost = |asked: &Promotion| lost_namesakes(&state, zone, &asked.template_name);
        let lost = asked.as_ref().map_or(0, lost);
        (asked, known(memory, &state), lost)
    };
    // The policy may call its templates otherwise by now.
    let asked_for = asked_before.as_ref().map_or(&name, |asked| &asked.template_name);
    let named: Vec<Template> = client
        .list_templates()
        .await?
        .into_iter()
        .filter(|template| template.name == *asked_for && !known.contains(&template.id))
        .collect();

    if let Some(asked) = asked_before {
        if let Some(template_id) = made_since(&named, asked.by_platform(), lost) {
            memory.change(|state| settle(state, snapshot.id, template_id)).await?;
            let message = Some(format!("found the template that was requested at {}", asked.requested_at));
            return Ok(Done { template_id: Some(template_id), message, ..Done::default() });
        }
        let again_at = asked.requested_at.checked_add(UNKNOWN_FOR).unwrap_or(Timestamp::MAX);
        // A clock that ran far ahead must not put it off until then.
        let is_time = asked.requested_at <= now.checked_add(DATED_BEFORE).unwrap_or(Timestamp::MAX);
        if is_time && now < again_at {
            return Err(StepError::skipped(format!(
                "it was requested at {}, and the result is unknown: not requested again before {again_at}",
                asked.requested_at
            )));
        }
    }
    if let Some(template) = named.first() {
        return Err(StepError::failed(format!(
            "a template named {} exists already ({}), and no policy is known to have made it: delete or rename it, or \
             give the policy another `name`",
            printable(&template.name),
            template.id
        )));
    }

    let promotion = Promotion {
        zone: zone.clone(),
        snapshot_id: snapshot.id,
        snapshot_created_at: snapshot.created_at,
        instance_id,
        template_name: name.clone(),
        requested_at: now,
        requested_at_there: clock.by_platform(now),
        template_id: None,
        deleted_at: None,
    };
    let since = promotion.by_platform();
    memory
        .change(|state| {
            state.promotions.retain(|made| made.snapshot_id != snapshot.id);
            state.promotions.push(promotion);
        })
        .await?;
    let request = PromoteRequest {
        name: name.clone(),
        description: promote.description.clone(),
        default_user: promote.default_user.clone(),
        password_enabled: promote.password_enabled,
        ssh_key_enabled: promote.ssh_key_enabled,
    };
    match request_and_look(&client, snapshot.id, &request, since, &known).await {
        Ok(done) => {
            if let Some(template_id) = done.template_id {
                memory.change(|state| settle(state, snapshot.id, template_id)).await?;
            }
            Ok(done)
        }
        Err((step_error, may_have_happened)) => {
            if !may_have_happened {
                memory
                    .change(|state| state.promotions.retain(|made| made.snapshot_id != snapshot.id))
                    .await?;
            }
            Err(step_error)
        }
    }
}

fn settle(state: &mut PolicyState, snapshot_id: SnapshotId, template_id: TemplateId) {
    if let Some(made) = state.promotions.iter_mut().find(|made| made.snapshot_id == snapshot_id) {
        made.template_id = Some(template_id);
    }
}

/// Promotes; where the answer was lost, or does not say which template came of it, looks for it by name.
/// An error comes with whether the promotion may have happened all the same.
pub(super) async fn request_and_look(
    client: &ZoneClient,
    snapshot_id: SnapshotId,
    request: &PromoteRequest,
    since: Timestamp,
    known: &HashSet<TemplateId>,
) -> Result<Done, (StepError, bool)> {
    let (operation_id, lost) = match client.promote_snapshot(snapshot_id, request).await {
        Ok(operation) => {
            if let Some(reference) = operation.reference {
                let template_id = Some(TemplateId(reference));
                return Ok(Done { operation_id: operation.id, template_id, ..Done::default() });
            }
            (operation.id, None)
        }
        Err(error) if error.may_have_happened() => (error.operation_id(), Some(error)),
        Err(error) => return Err((error.into(), false)),
    };
    let found = look(client, &request.name, since, known).await;
    match (found, lost) {
        (Some(template_id), _) => {
            let message = Some("the answer did not name the template: found by its name".to_owned());
            Ok(Done { operation_id, template_id: Some(template_id), message, ..Done::default() })
        }
        (None, None) => Ok(Done {
            operation_id,
            message: Some("the API does not say which template came of it".to_owned()),
            ..Done::default()
        }),
        (None, Some(error)) => Err((error.into(), true)),
    }
}

/// The template of this name that a request made, if there is exactly one that was not known before.
pub(crate) async fn look(
    client: &ZoneClient,
    name: &str,
    since: Timestamp,
    known: &HashSet<TemplateId>,
) -> Option<TemplateId> {
    let listed = client.list_templates().await.ok()?;
    let named = listed.iter().filter(|template| template.name == name && !known.contains(&template.id));
    made_since(named, since, 1)
}

/// The template that came of a request, of those that have its name and are not known: one that is dated much earlier
/// or later was made by someone else, and so may any if there are more than the `lost` requests for this name.
fn made_since<'a>(
    named: impl IntoIterator<Item = &'a Template>,
    since: Timestamp,
    lost: usize,
) -> Option<TemplateId> {
    let earliest = since.checked_sub(DATED_BEFORE).unwrap_or(Timestamp::MIN);
    let latest = since.checked_add(UNKNOWN_FOR).unwrap_or(Timestamp::MAX);
    let is_dated_so =
        |template: &&Template| template.created_at.is_some_and(|at| (earliest..=latest).contains(&at));
    let candidates: Vec<&Template> = named.into_iter().filter(is_dated_so).collect();
    candidates.first().filter(|_| candidates.len() <= lost).map(|template| template.id)
}

/// How many promotions under this name were asked for whose template is not known.
fn lost_namesakes(state: &PolicyState, zone: &ZoneName, name: &str) -> usize {
    let is_lost =
        |made: &&Promotion| made.zone == *zone && made.template_name == name && made.template_id.is_none();
    state.promotions.iter().filter(is_lost).count()
}

/// What came of the templates beyond `keep`.
#[derive(Debug, Default)]
pub(crate) struct PrunedTemplates {
    pub(crate) steps: Vec<Step>,
    /// How many more there are that stay only because a change of `keep` has not settled.
    pub(crate) waiting: usize,
}

/// Deletes the templates beyond `keep` that this policy made.
///
/// # Errors
/// Why it is unknown which templates those are, as a sentence.
pub(crate) async fn prune_templates(
    memory: &PolicyMemory<'_>,
    recorder: &Recorder,
    promote: &Promote,
    plan: &ZonePlan,
    only: Option<&Pattern<InstanceId>>,
) -> Result<PrunedTemplates, String> {
    let Some(keep) = promote.keep else { return Ok(PrunedTemplates::default()) };
    let (runner, zone) = (memory.runner, plan.zone());
    forget(memory, plan).await?;
    let client = runner.client.zone(zone);
    let is_ours = |made: &&Promotion| made.zone == *zone && made.deleted_at.is_none();
    if memory.own().await.promotions.iter().filter(is_ours).count() <= keep.get() as usize {
        return Ok(PrunedTemplates::default());
    }
    let listed = client.list_templates().await.map_err(|error| chain(&error))?;
    find_lost(memory, zone, &listed).await?;
    let made = memory.own().await.promotions.clone();
    let mut steps = Vec::new();
    let beyond = |keep| beyond(keep, &made, &listed, &[], plan, only);
    let by_now = beyond(keep).len();
    let beyond = settled_keep(keep, memory.policy, plan).map(beyond).unwrap_or_default();
    let waiting = by_now - beyond.len();
    if !beyond.is_empty() && !is_clock_trusted(&memory.policy.guard, plan.listing.inventory.clock) {
        return Err("no template is deleted: this machine's clock may be wrong".to_owned());
    }
    for TemplateDecision { facts, template_id, needed, .. } in beyond {
        let snapshot = facts.snapshot.id;
        let work = async {
            if let Some(why) = needed {
                return Err(StepError::skipped(why));
            }
            // Again, so that a hold that was placed since the plan still counts.
            let holds = runner.state.holds().await.map_err(|error| StepError::failed(chain(&error)))?;
            if snapshot.is_some_and(|id| holds.on(id, runner.clock.now()).is_some()) {
                return Err(StepError::skipped("its snapshot has been put on hold since the plan"));
            }
            let deleted = client.delete_template(template_id).await.map_err(StepError::of_deletion)?;
            let now = runner.clock.now();
            memory
                .change(|state| {
                    for made in &mut state.promotions {
                        if made.template_id == Some(template_id) {
                            made.deleted_at = Some(now);
                        }
                    }
                })
                .await?;
            let operation_id = match deleted {
                Deleted::Done(operation) => operation.id,
                Deleted::AlreadyGone => None,
            };
            Ok(Done { operation_id, ..Done::default() })
        };
        steps.push(recorder.step(facts, work).await);
    }
    Ok(PrunedTemplates { steps, waiting })
}

/// A template that `keep` does not keep.
#[derive(Debug)]
pub struct TemplateDecision {
    /// The step that deletes it.
    pub facts: StepFacts,
    /// The template's name.
    pub name: String,
    template_id: TemplateId,
    /// Why it stays all the same.
    pub needed: Option<String>,
}

/// The templates beyond `keep` of those that the policy made, per instance the oldest first; promotions that are yet to
/// `come` count as kept.
fn beyond(
    keep: NonZeroU32,
    made: &[Promotion],
    listed: &[Template],
    come: &[Subject],
    plan: &ZonePlan,
    only: Option<&Pattern<InstanceId>>,
) -> Vec<TemplateDecision> {
    let names: BTreeMap<TemplateId, &String> =
        listed.iter().map(|template| (template.id, &template.name)).collect();
    // Newest first, each with what was made, if it was.
    let mut per_instance: BTreeMap<InstanceId, Vec<_>> = BTreeMap::new();
    for subject in come {
        if let (Some(id), Some(instance)) = (subject.id, subject.instance_id) {
            per_instance.entry(instance).or_default().push((Reverse((subject.created_at, id)), None));
        }
    }
    let is_ours = |made: &&Promotion| made.zone == *plan.zone() && made.deleted_at.is_none();
    for promotion in made.iter().filter(is_ours) {
        let Some(template_id) = promotion.template_id else { continue };
        // Only those that are still there count as kept: people delete templates too. They renamed it: it is theirs.
        let is_there = names.get(&template_id) == Some(&&promotion.template_name);
        if is_there && plan.listing.is_one_of(only, promotion.instance_id) {
            let age = Reverse((promotion.snapshot_created_at, promotion.snapshot_id));
            per_instance
                .entry(promotion.instance_id)
                .or_default()
                .push((age, Some((promotion, template_id))));
        }
    }
    let mut decisions = Vec::new();
    for mut of_instance in per_instance.into_values() {
        of_instance.sort_by_key(|(age, _)| *age);
        let beyond = of_instance.into_iter().skip(keep.get() as usize).rev();
        decisions.extend(beyond.filter_map(|(_, made)| made).map(|(promotion, template_id)| {
            let why = vec![format!("{keep} newer templates of its instance are kept")];
            let subject = subject_of(promotion, plan);
            TemplateDecision {
                facts: StepFacts {
                    template_id: Some(template_id),
                    rule: Some("keep"),
                    ..StepFacts::new(Action::DeleteTemplate, plan.zone(), subject, why)
                },
                name: promotion.template_name.clone(),
                template_id,
                needed: needed(promotion, template_id, plan),
            }
        }));
    }
    decisions
}

/// How many templates stay per instance: the larger number of those that `keep` was while a change of it has not settled; none if all did.
fn settled_keep<'p>(keep: NonZeroU32, policy: &Policy, plan: &'p ZonePlan) -> Option<NonZeroU32> {
    let was = |change: &'p Change| match change {
        Change::Key { policy: name, key, was, .. } if *name == policy.name && key == PROMOTE_KEEP => {
            Some(was.as_ref())
        }
        _ => None,
    };
    let mut former: Vec<Option<&Value>> =
        plan.unsettled.iter().filter_map(|seen| was(&seen.change)).collect();
    if !former.is_empty() {
        let remembered = plan.listing.memory.policies.get(&policy.name);
        former.extend(remembered.map(|keys| keys.get(PROMOTE_KEEP)));
    }
    let mut largest = keep;
    for before in former {
        largest = largest.max(before?.as_u64()?.try_into().ok().and_then(NonZeroU32::new)?);
    }
    Some(largest)
}

/// Why a template is not deleted, however many there are.
fn needed(promotion: &Promotion, template_id: TemplateId, plan: &ZonePlan) -> Option<String> {
    let inventory = &plan.listing.inventory;
    let mut instances = inventory.instances.iter().chain(&inventory.elsewhere);
    let user = instances.find(|instance| instance.template_id == Some(template_id));
    if let Some(instance) = user {
        return Some(format!("instance {} runs on it", printable(&instance.name)));
    }
    let hold = inventory.holds.get(&promotion.snapshot_id);
    let hold = hold.filter(|hold| hold.until.is_none_or(|until| until > plan.plan.at));
    hold.map(|_| "its snapshot is on hold".to_owned())
}

/// Finds the templates of promotions whose answer was lost. A snapshot that is not wanted any more is not looked
/// at again by [`promote`], and its template would stay for ever.
async fn find_lost(memory: &PolicyMemory<'_>, zone: &ZoneName, listed: &[Template]) -> Result<(), String> {
    let is_lost = |made: &&Promotion| made.zone == *zone && made.template_id.is_none();
    let lost: Vec<Promotion> = memory.own().await.promotions.iter().filter(is_lost).cloned().collect();
    if lost.is_empty() {
        return Ok(());
    }
    let find = |state: &mut PolicyState| {
        for asked in &lost {
            let known = known(memory, state);
            let named = listed
                .iter()
                .filter(|template| template.name == asked.template_name && !known.contains(&template.id));
            let namesakes = lost_namesakes(state, zone, &asked.template_name);
            if let Some(template_id) = made_since(named, asked.by_platform(), namesakes) {
                settle(state, asked.snapshot_id, template_id);
            }
        }
    };
    memory.change(find).await.map_err(|step_error| step_error.message)
}

/// Forgets promotions whose template this policy deleted, once their snapshot is deleted and cannot be promoted again.
async fn forget(memory: &PolicyMemory<'_>, plan: &ZonePlan) -> Result<(), String> {
    let zone = plan.zone();
    let listed: HashSet<SnapshotId> =
        plan.listing.inventory.snapshots.iter().map(|snapshot| snapshot.id).collect();
    let over = |made: &Promotion| {
        made.zone == *zone && made.deleted_at.is_some() && !listed.contains(&made.snapshot_id)
    };
    if memory.own().await.promotions.iter().any(over) {
        memory
            .change(|state| state.promotions.retain(|made| !over(made)))
            .await
            .map_err(|step_error| step_error.message)?;
    }
    Ok(())
}

/// The snapshot that a template was made of; it may have been deleted.
fn subject_of(promotion: &Promotion, plan: &ZonePlan) -> Subject {
    let snapshots = &plan.listing.inventory.snapshots;
    match snapshots.iter().find(|snapshot| snapshot.id == promotion.snapshot_id) {
        Some(snapshot) => plan.listing.subject(snapshot),
        None => Subject {
            id: Some(promotion.snapshot_id),
            name: promotion.template_name.clone(),
            created_at: promotion.snapshot_created_at,
            instance_id: Some(promotion.instance_id),
            instance_name: None,
        },
    }
}

/// Promotes one snapshot now, as a manual command.
///
/// # Errors
/// Why it was not even begun, as a sentence.
pub async fn promote_manually(
    runner: &Runner,
    zone: &ZoneName,
    snapshot_id: SnapshotId,
    request: &PromoteRequest,
) -> Result<Step, String> {
    let client = runner.client.zone(zone);
    let details = client
        .get_snapshot(snapshot_id)
        .await
        .map_err(|error| chain(&error))?
        .ok_or_else(|| format!("zone {zone} has no snapshot {snapshot_id}"))?;
    let snapshot = details.snapshot;
    if !snapshot.state.is_good() {
        let state = printable(snapshot.state.as_str()).into_owned();
        return Err(format!(
            "snapshot {snapshot_id} is in state `{state}`: only `exported` and `ready` ones are complete"
        ));
    }
    let templates = client.list_templates().await.map_err(|error| chain(&error))?;
    // The API takes a name any number of times: whoever repeats the command would have two and not know which.
    if let Some(existing) = templates.iter().find(|template| template.name == request.name) {
        return Err(format!(
            "zone {zone} already has a template named {} ({}), perhaps from an earlier promotion: use it, or give another \
             name",
            printable(&request.name),
            existing.id
        ));
    }
    let known: HashSet<TemplateId> = templates.iter().map(|template| template.id).collect();
    let now = runner.clock.now();
    let recorder =
        Recorder::manual(runner.state.clone(), runner.clock.clone(), fresh_id(&*runner.randomness, now));
    let intent = StepFacts::new(
        Action::Promote,
        zone,
        Subject::of(&snapshot, None),
        vec![format!("manual command, to be named {}", printable(&request.name))],
    );
    let work = async {
        request_and_look(&client, snapshot_id, request, now, &known)
            .await
            .map_err(|(step_error, _)| step_error)
    };
    Ok(recorder.step(intent, work).await)
}
