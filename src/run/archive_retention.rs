//! What an archive's retention and its guard say of the copies in it: which are deleted, which stay all the same, and why.
//!
//! The same engine decides as for snapshots: each verified copy stands for its snapshot. Corrupt copies, and everything else
//! that does not count as a copy, are neither counted nor deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use jiff::Timestamp;
use serde_json::Value;
use uuid::Uuid;

use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::copies::CopyId;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::{ArchiveRules, Policy};
use crate::retention;
use crate::retention::change_guard::keep_pending;
use crate::retention::guard::{self, Limit, ListingDrop, WholeRun, ZoneCase};
use crate::retention::inventory::{ClockSkew, Inventory};
use crate::retention::memory::Memory;
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::sources::{keep_where_missing, late_texts};
use crate::retention::verdict::{Rule, Verdict};
use crate::run::archive_rules::{COPIES, policies, remembered};
use crate::run::list::{holds_by_snapshot, missing};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::allowances::Allowance;
use crate::state::archives::ArchiveMemory;
use crate::state::audit::{Action, StepFacts, Subject};
use crate::state::holds::Holds;
use crate::state::policy_state::PolicyState;
use crate::text::{counted, printable};

/// What is known of an archive when its copies are judged.
#[derive(Debug)]
pub(crate) struct Judged<'a> {
    pub(crate) archive: &'a ArchiveName,
    pub(crate) rules: &'a ArchiveRules,
    /// Every policy of the configuration, and what each remembers of the snapshots that it could not take.
    pub(crate) policies: &'a [Policy],
    pub(crate) states: &'a [(PolicyName, PolicyState)],
    pub(crate) catalogue: &'a Catalogue,
    pub(crate) holds: &'a Holds,
    pub(crate) memory: &'a ArchiveMemory,
    /// Those that have not ended.
    pub(crate) allowances: &'a [Allowance],
    /// Copies that will be there, too: those that a run is about to store.
    pub(crate) coming: &'a [(ZoneName, Subject)],
}

/// A copy that the retention does not keep.
#[derive(Debug, Clone)]
pub struct CopyDecision {
    /// The copy.
    pub copy: StoredCopy,
    /// The step that deletes it.
    pub facts: StepFacts,
    /// What keeps it all the same, in the words of a snapshot's `blocked_by`.
    pub blocked_by: Option<&'static str>,
}

/// The copies that the retention does not keep.
#[derive(Debug, Default)]
pub struct CopyPlan {
    /// The oldest first in each zone.
    pub decisions: Vec<CopyDecision>,
    /// Why the guard blocks all deletions, by zone.
    pub held: BTreeMap<ZoneName, String>,
    /// Which deletions wait for a change to settle or for a newer copy, by zone.
    pub pending: BTreeMap<ZoneName, String>,
    /// Sentences for people, by zone.
    pub warnings: BTreeMap<ZoneName, Vec<String>>,
    /// What the next plan is compared with.
    pub(crate) memories: BTreeMap<ZoneName, Value>,
    /// Of each instance that loses copies the newest one that stays and counts, if one does.
    pub(crate) newest_kept: BTreeMap<InstanceId, StoredCopy>,
}

impl CopyPlan {
    /// The copies to delete.
    pub(crate) fn deletions(&self) -> impl Iterator<Item = &CopyDecision> {
        self.decisions.iter().filter(|decision| decision.blocked_by.is_none())
    }

    /// Takes down which copies stay in place of those that are deleted.
    pub(crate) fn note_kept(&mut self, catalogue: &Catalogue) {
        let ids = |decision: &CopyDecision| decision.copy.manifest.id();
        let deleted: HashSet<CopyId> = self.deletions().map(ids).collect();
        let losing: BTreeSet<InstanceId> =
            self.deletions().map(|decision| decision.copy.manifest.instance.id).collect();
        let mut kept: BTreeMap<InstanceId, &StoredCopy> = BTreeMap::new();
        for copy in catalogue.counting().filter(|copy| copy.manifest.pruned_at.is_none()) {
            let instance = copy.manifest.instance.id;
            if losing.contains(&instance) && !deleted.contains(&copy.manifest.id()) {
                let taken = |copy: &StoredCopy| copy.manifest.snapshot.created_at;
                let newest = kept.entry(instance).or_insert(copy);
                *newest = if taken(copy) > taken(newest) { copy } else { *newest };
            }
        }
        self.newest_kept = kept.into_iter().map(|(instance, copy)| (instance, copy.clone())).collect();
    }
}

/// The plan for the copies of one zone.
struct ZoneCopies<'a> {
    zone: &'a ZoneName,
    copies: Vec<&'a StoredCopy>,
    /// The first stands for the archive's retention.
    policies: Vec<Policy>,
    inventory: Inventory,
    plan: PolicyPlan,
    memory: Memory,
    unsettled: Vec<retention::change::Seen>,
}

impl Judged<'_> {
    /// Decides about the copies of these zones, or of all.
    ///
    /// # Errors
    /// Why nothing can be decided, as a sentence.
    pub(crate) fn plan(&self, zones: Option<&[ZoneName]>, now: Timestamp) -> Result<CopyPlan, String> {
        let mut all = CopyPlan::default();
        let mut by_zone: BTreeMap<&ZoneName, Vec<&StoredCopy>> = BTreeMap::new();
        let is_meant = |zone: &ZoneName| zones.is_none_or(|zones| zones.contains(zone));
        let needed = self.catalogue.pruned_without_newer();
        let needed = needed.filter(|copy| copy.has_image && !self.rules.may_empty());
        let needed: HashSet<CopyId> = needed.map(|copy| copy.manifest.id()).collect();
        for copy in self.catalogue.copies().iter().filter(|copy| is_meant(&copy.manifest.zone)) {
            match copy.manifest.pruned_at {
                None => by_zone.entry(&copy.manifest.zone).or_default().push(copy),
                Some(at) if needed.contains(&copy.manifest.id()) => {
                    let text = needed_again(copy, at);
                    all.warnings.entry(copy.manifest.zone.clone()).or_default().push(text);
                }
                Some(at) => all.decisions.extend(self.left_behind(copy, at, now)),
            }
        }
        let planned: Result<Vec<ZoneCopies<'_>>, String> =
            by_zone.into_iter().map(|(zone, copies)| self.plan_zone(zone, copies, now)).collect();
        let mut planned = planned?;

        let pending: u64 = planned.iter().map(|zone| zone.plan.pending).sum();
        let of_run = self.allowances.iter().filter(|allowance| allowance.zone.is_none());
        let of_run = of_run.map(|allowance| allowance.deletes).max();
        let mut cases = Vec::new();
        for zone in &mut planned {
            cases.push(self.ask_for_allowance(zone, of_run, pending)?);
        }
        let run = WholeRun::new(cases.iter(), of_run.filter(|_| pending == 0));
        for (mut zone, case) in planned.into_iter().zip(&cases) {
            let policy = zone.policies.first().map(|policy| (&policy.name, &policy.guard));
            let held = policy.and_then(|(name, guard)| guard::hold(name, guard, case, run));
            let name = zone.zone.clone();
            let late = zone.policies.iter().flat_map(|policy| late_texts(policy, &zone.inventory, now));
            let late: Vec<String> = late.map(|text| self.of_copies(&text)).collect();
            if !late.is_empty() {
                all.warnings.entry(name.clone()).or_default().extend(late);
            }
            all.pending.extend(self.pending_text(&zone.plan, pending).map(|text| (name.clone(), text)));
            let memory = zone.remember(now);
            all.memories.extend(memory.map(|memory| (name.clone(), memory)));
            let is_held = held.is_some();
            all.held.extend(held.map(|held| (name, self.held_text(zone.zone, held.limit, run.deletes))));
            all.decisions.extend(self.decisions(&zone, is_held));
        }
        Ok(all)
    }

    /// A copy that is marked as pruned while its image is still there: an earlier pruning was interrupted.
    fn left_behind(&self, copy: &StoredCopy, pruned_at: Timestamp, now: Timestamp) -> Option<CopyDecision> {
        let id = copy.manifest.snapshot.id;
        let is_marked =
            self.catalogue.holds().get(&id).is_some_and(|marks| marks.iter().any(|mark| mark.counts_at(now)));
        if !copy.has_image || is_marked || self.holds.on(id, now).is_some() {
            return None;
        }
        let reason = format!("it was marked as pruned at {pruned_at}, and its image is still there");
        let facts = self.facts(&copy.manifest, None, vec![reason]);
        Some(CopyDecision { copy: copy.clone(), facts, blocked_by: None })
    }

    fn plan_zone<'c>(
        &self,
        zone: &'c ZoneName,
        copies: Vec<&'c StoredCopy>,
        now: Timestamp,
    ) -> Result<ZoneCopies<'c>, String> {
        let mut times: HashMap<SnapshotId, usize> = HashMap::new();
        for copy in &copies {
            *times.entry(copy.manifest.snapshot.id).or_default() += 1;
        }
        // Two copies of one snapshot, of different instances: something is odd, so both stay.
        let copies: Vec<&StoredCopy> =
            copies.into_iter().filter(|copy| times.get(&copy.manifest.snapshot.id) == Some(&1)).collect();
        let policies = policies(zone, self.rules, self.policies)?;
        let coming = self.coming.iter().filter(|(of, _)| of == zone).map(|(_, subject)| subject);
        let holds = holds_by_snapshot(self.holds, [self.catalogue]);
        let missing = missing(self.states, zone);
        let inventory = Inventory { holds, missing, ..inventory(zone, &copies, coming) };
        let mut plan = decide(&policies, &inventory, now)?;
        keep_where_missing(&mut plan, &policies, &inventory);
        let memory = remembered(self.archive, self.memory, zone)?;
        let unsettled = keep_pending(&mut plan, &policies, &inventory, &memory)?;
        Ok(ZoneCopies { zone, copies, policies, inventory, plan, memory, unsettled })
    }

    /// What the guard asks of a zone. Where deletions wait for changes to settle, an allowance is for those alone, and where they wait for
    /// newer copies, for these.
    fn ask_for_allowance(
        &self,
        zone: &mut ZoneCopies<'_>,
        of_run: Option<u64>,
        pending: u64,
    ) -> Result<ZoneCase, String> {
        let of_zone = self.allowances.iter().rfind(|allowance| allowance.zone.as_ref() == Some(zone.zone));
        let of_zone = of_zone.map(|allowance| allowance.deletes);
        let mut case = ZoneCase {
            zone: zone.zone.clone(),
            deletes: zone.plan.deletes,
            accepted: 0,
            good_deletes: zone.plan.good_deletes,
            good: zone.plan.good,
            drop: ListingDrop::default(),
            clock: ClockSkew::OnPaper,
            allowed: of_zone.filter(|_| pending == 0),
        };
        let is_accepted = of_run.is_some_and(|allowed| pending <= allowed)
            || of_zone.is_some_and(|allowed| zone.plan.pending <= allowed);
        if zone.plan.pending > 0 && is_accepted {
            let is_for_changes = zone.plan.decisions.iter().any(|decision| decision.rule == Rule::Change);
            zone.plan = decide(&zone.policies, &zone.inventory, zone.plan.at)?;
            if is_for_changes {
                zone.unsettled.clear();
            } else {
                // Nobody was told of a change that would delete the same ones.
                zone.unsettled = keep_pending(&mut zone.plan, &zone.policies, &zone.inventory, &zone.memory)?;
            }
            case.accepted = zone.plan.deletes.saturating_sub(case.deletes);
        }
        Ok(case)
    }

    /// What the retention says of each copy of the zone; none without a retention. Where it cannot be judged, nothing.
    pub(crate) fn kept(&self, zone: &ZoneName, now: Timestamp) -> Option<HashMap<SnapshotId, Decision>> {
        self.rules.retention.as_ref()?;
        let copies = self.catalogue.unpruned().filter(|copy| copy.manifest.zone == *zone).collect();
        let Ok(planned) = self.plan_zone(zone, copies, now) else { return Some(HashMap::new()) };
        let copy = |decision: &Decision| planned.copies.get(decision.index as usize);
        let decisions = planned.plan.decisions.iter();
        let kept =
            decisions.filter_map(|decision| Some((copy(decision)?.manifest.snapshot.id, decision.clone())));
        Some(kept.collect())
    }

    /// What the retention does not keep, oldest first.
    fn decisions(&self, zone: &ZoneCopies<'_>, is_held: bool) -> Vec<CopyDecision> {
        let mut decisions = Vec::new();
        for decision in &zone.plan.decisions {
            let blocked_by = match decision.verdict {
                Verdict::Delete => is_held.then_some("guard"),
                _ => decision.blocked_by(),
            };
            let Some(copy) = zone.copies.get(decision.index as usize) else { continue };
            if decision.verdict == Verdict::Delete || blocked_by.is_some() {
                let reasons = decision.reasons().map(|reason| self.of_copies(&reason.to_string())).collect();
                let facts = self.facts(&copy.manifest, Some(decision.rule.as_str()), reasons);
                decisions.push(CopyDecision { copy: (*copy).clone(), facts, blocked_by });
            }
        }
        let age = |one: &CopyDecision| (one.copy.manifest.snapshot.created_at, one.copy.manifest.snapshot.id);
        decisions.sort_by_key(age);
        decisions
    }

    /// The rule is the configuration key that decided it; none for what an earlier pruning left behind.
    fn facts(&self, manifest: &Manifest, rule: Option<&'static str>, reasons: Vec<String>) -> StepFacts {
        StepFacts {
            archive: Some(self.archive.clone()),
            rule,
            ..StepFacts::new(Action::PruneCopy, &manifest.zone, subject_of(manifest), reasons)
        }
    }

    /// The engine speaks of policies and snapshots.
    fn of_copies(&self, text: &str) -> String {
        text.replace(&format!("policy {COPIES}"), &format!("archive {}", self.archive))
            .replace("good snapshot", "verified copy")
    }

    /// Which deletions wait, and how to let them pass; `in_all` is their number in all zones.
    fn pending_text(&self, plan: &PolicyPlan, in_all: u64) -> Option<String> {
        let archive = self.archive;
        let of = |rule: Rule| plan.decisions.iter().filter(move |decision| decision.rule == rule);
        let text = |rule: Rule, cause: &str, when: &str| {
            let count = of(rule).count();
            let verb = if count == 1 { "is" } else { "are" };
            let why = self.of_copies(&of(rule).next()?.reasons().next()?.to_string());
            let copies = counted(count, "copy");
            Some(format!("archive {archive}: {copies} {verb} kept only because {cause}{when}: {why}"))
        };
        let until = of(Rule::Change).filter_map(|decision| decision.expires_at).min();
        let when = until.map_or_else(String::new, |until| format!(", the first not before {until}"));
        let changes = text(Rule::Change, "a change has not settled (`settle`)", &when);
        let sources = text(Rule::Source, "a newer copy of their instance is missing", "");
        let texts: Vec<String> = changes.into_iter().chain(sources).collect();
        let look = format!("look: snapwarden archive prune {archive} --dry-run");
        let allow = format!("snapwarden allow --archive {archive} {in_all}");
        (!texts.is_empty()).then(|| {
            format!("{}; {look}; if that is right, let it pass the next time: {allow}", texts.join("; "))
        })
    }

    fn held_text(&self, zone: &ZoneName, limit: Limit, in_all: u64) -> String {
        let archive = self.archive;
        let all = counted(usize::try_from(in_all).unwrap_or(usize::MAX), "copy");
        let why = match limit {
            Limit::DeletePercent { deletes, good, max } => {
                format!("{deletes} of {good} would be deleted, more than max_delete_percent = {max}")
            }
            Limit::Deletes { max } => format!("{all} would be deleted, more than max_deletes = {max}"),
            // The clocks are compared before this, and a copy that vanished closes the archive: neither is a case here.
            Limit::ClockSkew { .. } | Limit::NoClock | Limit::ListingDrop { .. } => "in doubt".to_owned(),
        };
        format!(
            "no copy of zone {zone} is deleted from archive {archive}: {why}; look: snapwarden archive prune {archive} --dry-run; if that is right, let it pass the next time: \
             snapwarden allow --archive {archive} {in_all}"
        )
    }
}

/// Why an interrupted pruning is not brought to its end.
fn needed_again(copy: &StoredCopy, pruned_at: Timestamp) -> String {
    let image = copy.image();
    format!(
        "{} was marked as pruned at {pruned_at}, but its image is still there, and no newer copy of its instance is: it is not \
         deleted; to have it count again, remove its `.pruned.json` if its `.json` is there, else take `pruned_at` out of the former and \
         rename it to the latter; to delete it: `snapwarden archive rm`",
        printable(&image.to_string_lossy())
    )
}

impl ZoneCopies<'_> {
    /// What the next plan is compared with.
    fn remember(&mut self, now: Timestamp) -> Option<Value> {
        let unsettled = std::mem::take(&mut self.unsettled);
        let nothing = Inventory::on_paper(self.zone.clone(), Vec::new(), Vec::new());
        serde_json::to_value(self.memory.renewed(&self.policies, &nothing, now, unsettled)).ok()
    }
}

fn decide(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Result<PolicyPlan, String> {
    let plan = retention::decide(policies, inventory, now).policies.into_iter().next();
    plan.ok_or_else(|| "there is no plan for it".to_owned())
}

/// The snapshot of a copy, as the audit log and the report name it.
pub fn subject_of(manifest: &Manifest) -> Subject {
    Subject {
        id: Some(manifest.snapshot.id),
        name: manifest.snapshot.name.to_string(),
        created_at: manifest.snapshot.created_at,
        instance_id: Some(manifest.instance.id),
        instance_name: manifest.instance.name.clone(),
    }
}

/// The copies of a zone, in this order, as if they were its snapshots; then those that are coming.
fn inventory<'s>(
    zone: &ZoneName,
    copies: &[&StoredCopy],
    coming: impl Iterator<Item = &'s Subject>,
) -> Inventory {
    let mut instances: BTreeMap<InstanceId, Instance> = BTreeMap::new();
    let mut snapshots = Vec::new();
    let mut add = |subject: &Subject, size_gib, application_consistent| {
        let Some(id) = subject.instance_id else { return };
        instances.entry(id).or_insert_with(|| Instance {
            id,
            name: subject.instance_name.clone().unwrap_or_default().into(),
            labels: BTreeMap::new(),
            template_id: None,
            is_managed: false,
            created_at: None,
        });
        snapshots.push(Snapshot {
            // One that is still to be taken has no id yet; here only its age counts.
            id: subject.id.unwrap_or(SnapshotId(Uuid::nil())),
            name: subject.name.clone().into(),
            created_at: subject.created_at,
            state: SnapshotState::Exported,
            size_gib,
            instance_id: Some(id),
            application_consistent,
        });
    };
    for copy in copies {
        let snapshot = &copy.manifest.snapshot;
        add(&subject_of(&copy.manifest), snapshot.size_gib, snapshot.application_consistent);
    }
    for subject in coming {
        add(subject, None, None);
    }
    let instances = instances.into_values().collect();
    Inventory::on_paper(zone.clone(), snapshots, instances)
}
