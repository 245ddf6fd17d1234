//! How snapshots ended that are not listed any more: by a run of this program, by another key or user, with their instance, or nothing
//! says how. Each one that was ever listed or taken is looked into until that is known, and what was found is a line of the audit log.
//!
//! Nothing is decided by a listing alone, which may be incomplete: the platform's list of events names the deletion, or a
//! request for the instance or the snapshot itself says that it does not exist any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::clock::timeout;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::{ApiError, ErrorKind};
use crate::exoscale::wire::DeletionEvent;
use crate::run::context::Runner;
use crate::run::list::Listing;
use crate::run::step::Recorder;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::audit::{Action, AuditMark, DeletedBy, Deletion, Ending, StepFacts, Subject};
use crate::state::error::StateError;
use crate::state::listed::{ListedZone, Missing};
use crate::text::{chain, counted, printable};

/// The end of a run does not wait longer for all this; the next run continues.
const WAIT_MAX: Duration = Duration::from_mins(10);

/// One request does not wait longer for its response.
const REQUEST_WAIT_MAX: Duration = Duration::from_secs(20);

/// How many snapshots and instances one run asks for at most, each by a request of its own; the next run asks for others.
const REQUESTS_MAX: usize = 100;

/// How long the platform keeps events.
const EVENTS_LAST: SignedDuration = SignedDuration::from_hours(30 * 24);

/// The platform's clock, and the time until an event is listed.
const EVENT_MARGIN: SignedDuration = SignedDuration::from_hours(1);

/// A listing may be this much older than its arrival: then a snapshot that it has may have been deleted before.
const LISTING_AGE_MAX: SignedDuration = SignedDuration::from_hours(24);

/// Requests that have failed for this long are no passing trouble.
const PATIENCE: SignedDuration = SignedDuration::from_hours(48);

/// A run takes its snapshots before it lists, by less than this: what is older would have been listed by an earlier one.
const RUN_LASTS: SignedDuration = SignedDuration::from_hours(24);

/// What is still listed so long after a request to delete it is not deleted by that request, unless an event says so.
const REQUEST_LASTS: SignedDuration = SignedDuration::from_hours(24);

/// For how long an unexplained end is an alert.
const ALERT_LASTS: SignedDuration = SignedDuration::from_hours(7 * 24);

const TRIED_BEFORE: &str = "snapwarden had tried to delete it";

/// How many snapshots are named in one sentence.
const NAMED: usize = 5;

/// What is said of the snapshots of a zone that are not listed any more.
#[derive(Debug, Default)]
pub(crate) struct Endings {
    /// How many ended unexplained, as far as that is still an alert.
    pub(crate) unexplained: u64,
    /// Sentences for people.
    pub(crate) warnings: Vec<String>,
    /// Why what was found is not remembered.
    pub(crate) failure: Option<String>,
}

/// Why nothing is known by events.
#[derive(Debug)]
enum Unasked {
    /// The key may not ask.
    NotAllowed,
    /// The request failed.
    Failed(String),
}

/// Snapshots that are missing, and what was found out about them.
struct Inquiry<'a> {
    client: ZoneClient,
    listing: &'a Listing,
    events: Result<BTreeMap<SnapshotId, DeletionEvent>, Unasked>,
    /// Whether those without an event, or which were tried to delete, are still there, by requests for them.
    there: BTreeMap<SnapshotId, Result<bool, String>>,
    /// Whether instances are still there, by requests for them.
    instances: BTreeMap<InstanceId, bool>,
    /// Whether the key may not ask for instances, so that the listing is all that is known of them.
    is_instance_denied: bool,
    requests: usize,
    now: Timestamp,
}

/// What is to be done about a missing snapshot.
enum Found {
    /// It is still there, though the listing lacks it.
    There,
    /// It is not known yet.
    Undecided(String),
    Ended(Ending, Option<DeletedBy>, String),
}

impl Runner {
    /// Finds out how those snapshots ended that the zone's listing lacks, writes that to the audit log, and remembers the
    /// listing. The caller has the zone's lock; `mark` is from before the listing.
    pub(crate) async fn account(
        &self,
        recorder: &Recorder,
        listing: &Listing,
        mark: Result<&AuditMark, &StateError>,
        listed_at: Timestamp,
    ) -> Endings {
        let zone = &listing.inventory.zone;
        let work = self.account_for(recorder, listing, mark, listed_at);
        let text = |why: String| {
            format!("how snapshots ended that are not listed any more is not looked into in this run: {why}")
        };
        // What was remembered before is still there, so the next run asks the same.
        let mut endings = match timeout(&*self.clock, WAIT_MAX, Box::pin(work)).await {
            Ok(Ok(endings)) => return endings,
            Ok(Err(error)) => Endings { failure: Some(text(chain(&error))), ..Endings::default() },
            Err(late) => Endings { warnings: vec![text(late.to_string())], ..Endings::default() },
        };
        endings.unexplained = self.remembered_unexplained(zone, listed_at).await;
        endings
    }

    /// How many snapshots of a zone vanished unexplained, by earlier runs; none if that can't be read.
    pub(crate) async fn remembered_unexplained(&self, zone: &ZoneName, now: Timestamp) -> u64 {
        let known = self.state.listed_zone(zone).await.unwrap_or_default();
        alerts(&known.missing, now)
    }

    async fn account_for(
        &self,
        recorder: &Recorder,
        listing: &Listing,
        mark: Result<&AuditMark, &StateError>,
        listed_at: Timestamp,
    ) -> Result<Endings, StateError> {
        let zone = &listing.inventory.zone;
        let before = self.state.listed_zone(zone).await?;
        let mut listed = listed_zone(listing, listed_at);
        let mut missing = self.missing(&before, &mut listed, listing, listed_at).await?;
        let mut endings = Endings::default();
        let AuditMark { month, offset } = match mark {
            Ok(mark) => mark.clone(),
            // With the older mark more of the log is read, and nothing is missed.
            Err(_) => AuditMark { month: before.audit_month.clone(), offset: before.audit_from },
        };
        (listed.audit_month, listed.audit_from) = (month, offset);

        let mut ended: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        if !missing.is_empty() {
            let inquiry = self.inquire(listing, &missing, listed_at).await;
            let mut undecided = None;
            for (id, one) in std::mem::take(&mut missing) {
                match inquiry.find(id, &one) {
                    // It is missed again, should it stay away.
                    Found::There => add_listed(&mut listed, id, &one),
                    Found::Undecided(why) => {
                        undecided = Some(why);
                        missing.insert(id, one);
                    }
                    // It was said before.
                    Found::Ended(Ending::Unexplained, ..) if one.unexplained_at.is_some() => {
                        missing.insert(id, one);
                    }
                    Found::Ended(ending, by, reason) => {
                        let name = one
                            .instance_name
                            .as_deref()
                            .map_or_else(|| id.to_string(), |name| format!("{id} of {}", printable(name)));
                        let subject = Subject {
                            id: Some(id),
                            name: String::new(),
                            created_at: one.created_at,
                            instance_id: one.instance_id,
                            instance_name: one.instance_name.clone(),
                        };
                        let facts = StepFacts::new(Action::Vanish, zone, subject, vec![reason.clone()]);
                        recorder.ended(facts, ending, by).await?;
                        ended.entry(ending.in_log()).or_default().push(format!("{name} ({reason})"));
                        if ending == Ending::Unexplained {
                            let unexplained_at = Some(listed_at);
                            missing.insert(id, Missing { unexplained_at, ..one });
                        }
                    }
                }
            }
            endings.warnings.extend(undecided.map(|why| {
                let count = missing.values().filter(|one| one.unexplained_at.is_none()).count();
                format!("how {} ended is not known yet: {why}", counted(count, "snapshot"))
            }));
        }
        for (ending, what) in [
            (Ending::Unexplained, "vanished unexplained"),
            (Ending::DeletedByOther, "deleted, but not by snapwarden"),
        ] {
            endings.warnings.extend(ended.get(ending.in_log()).map(|names| sentence(names, what)));
        }
        endings.unexplained = alerts(&missing, listed_at);
        listed.missing = missing;
        self.state.set_listed_zone(zone, listed).await?;
        Ok(endings)
    }

    /// The snapshots that were listed before, or taken, and are not listed now, but for those that this program deleted. Adds to
    /// those that are listed what was tried to delete.
    async fn missing(
        &self,
        before: &ListedZone,
        now: &mut ListedZone,
        listing: &Listing,
        listed_at: Timestamp,
    ) -> Result<BTreeMap<SnapshotId, Missing>, StateError> {
        let listed: BTreeSet<SnapshotId> =
            listing.inventory.snapshots.iter().map(|snapshot| snapshot.id).collect();
        // Later the platform has no events of that time any more.
        let is_open = |one: &Missing| {
            one.unexplained_at.is_none() || listed_at.duration_since(one.missed_at) <= EVENTS_LAST
        };
        let known = before.missing.iter().filter(|(_, one)| is_open(one)).map(|(id, one)| (*id, one.clone()));
        let mut missing: BTreeMap<SnapshotId, Missing> =
            before.snapshots(listed_at).chain(known).filter(|(id, _)| !listed.contains(id)).collect();
        let shard = self.state.shard();
        let is_of_shard = |id: SnapshotId, instance| shard.is_none_or(|shard| shard.has_of(id, instance));
        missing.retain(|id, one| is_of_shard(*id, one.instance_id));
        now.tried =
            before.tried.iter().filter(|(id, _)| listed.contains(id)).map(|(id, at)| (*id, *at)).collect();
        if before.at.is_none() {
            return Ok(missing);
        }
        let zone = &listing.inventory.zone;
        let mark = AuditMark { month: before.audit_month.clone(), offset: before.audit_from };
        let recorded = self.state.taken_and_deleted_since(zone, mark).await?;
        let mut taken = recorded.taken;
        taken.retain(|id, (subject, _)| {
            let is_new = !listed.contains(id) && !missing.contains_key(id);
            let is_recent = before.at.is_some_and(|at| at.duration_since(subject.created_at) < RUN_LASTS);
            is_new && is_recent && subject.created_at <= listed_at && is_of_shard(*id, subject.instance_id)
        });
        for (id, (said, at)) in recorded.ended {
            match (said, missing.get_mut(&id)) {
                (Deletion::Tried | Deletion::Begun, None) if listed.contains(&id) => {
                    now.tried.insert(id, at);
                }
                (Deletion::Tried, Some(one)) => one.tried_at = Some(at),
                (Deletion::Begun | Deletion::Done | Deletion::Ended, Some(_)) => drop(missing.remove(&id)),
                // The program was killed before it was remembered.
                (Deletion::Unexplained, Some(one)) => one.unexplained_at = one.unexplained_at.or(Some(at)),
                _ => {}
            }
        }
        if taken.is_empty() && missing.values().all(|one| one.unexplained_at.is_some()) {
            return Ok(missing);
        }
        // The whole log: a wrong clock's lines are in files of other months, and one that was deleted long before may have been listed
        // once more, by a listing that was older.
        let recorded = self.state.taken_and_deleted_since(zone, AuditMark::default()).await?;
        missing.retain(|id, _| !recorded.deleted.contains(id));
        // Those that no listing had.
        for (id, (subject, at)) in taken {
            let tried_at = match recorded.ended.get(&id) {
                None => None,
                Some((Deletion::Tried, at)) => Some(*at),
                Some(_) => continue,
            };
            missing.insert(
                id,
                Missing {
                    created_at: subject.created_at,
                    instance_id: subject.instance_id,
                    instance_name: subject.instance_name,
                    // It was there from then on, and may have been deleted before the line was written.
                    listed_at: at.min(subject.created_at),
                    missed_at: listed_at,
                    tried_at,
                    unexplained_at: None,
                },
            );
        }
        Ok(missing)
    }

    async fn inquire<'a>(
        &self,
        listing: &'a Listing,
        missing: &BTreeMap<SnapshotId, Missing>,
        now: Timestamp,
    ) -> Inquiry<'a> {
        let client = self.client.clone().trying_once(REQUEST_WAIT_MAX).zone(&listing.inventory.zone);
        let ids: BTreeSet<SnapshotId> = missing.keys().copied().collect();
        let seen = || missing.values().flat_map(|one| [Some(one.listed_at), one.tried_at]).flatten();
        // Where a clock was wrong then, or is now, nothing is known of the time between.
        let earliest = seen().min().filter(|_| seen().all(|at| at <= now)).unwrap_or(Timestamp::MIN);
        let shifted = |at: Timestamp, by: SignedDuration| at.checked_add(by).unwrap_or(at);
        let from = shifted(earliest, -LISTING_AGE_MAX).max(shifted(now, -EVENTS_LAST));
        let between = [from, shifted(now, EVENT_MARGIN)];
        let events = deletions(&client, &ids, between).await;
        let (there, instances) = (BTreeMap::new(), BTreeMap::new());
        let is_instance_denied = false;
        let mut inquiry =
            Inquiry { client, listing, events, there, instances, is_instance_denied, requests: 0, now };
        let mut is_any_gone = false;
        for (id, one) in missing {
            // The event of a request does not say that it was carried out, and here one was not, as far as was known.
            let has_event = inquiry.events.as_ref().is_ok_and(|events| events.contains_key(id));
            if !has_event || one.tried_at.is_some() {
                let is_there = inquiry.is_there(*id, one).await;
                let is_new = one.unexplained_at.is_none() && !inquiry.is_without_instance(one);
                is_any_gone |= is_there == Ok(false) && is_new;
                inquiry.there.insert(*id, is_there);
            }
        }
        // Some may have been deleted after the first answer.
        if is_any_gone && inquiry.events.is_ok() {
            inquiry.events = deletions(&inquiry.client, &ids, between).await;
        }
        inquiry
    }
}

async fn deletions(
    client: &ZoneClient,
    of: &BTreeSet<SnapshotId>,
    between: [Timestamp; 2],
) -> Result<BTreeMap<SnapshotId, DeletionEvent>, Unasked> {
    client.list_deletions(of, between).await.map_err(|error| match error.kind() {
        ErrorKind::Permission => Unasked::NotAllowed,
        _ => Unasked::Failed(chain(&error)),
    })
}

impl Inquiry<'_> {
    /// What is known of one snapshot.
    fn find(&self, id: SnapshotId, one: &Missing) -> Found {
        match self.there.get(&id) {
            Some(Ok(true)) => return Found::There,
            Some(Err(why)) => return Found::Undecided(why.clone()),
            Some(Ok(false)) | None => {}
        }
        if let Some(event) = self.events.as_ref().ok().and_then(|events| events.get(&id)) {
            return self.deleted(event, one);
        }
        let last_seen = one.tried_at.map_or(one.listed_at, |at| at.max(one.listed_at));
        let is_too_late = self.now.duration_since(last_seen) > EVENTS_LAST - EVENT_MARGIN;
        let may_be_ours = one.tried_at.is_some_and(|at| one.listed_at.duration_since(at) <= REQUEST_LASTS);
        let (ending, reason) = match &self.events {
            Ok(_) | Err(Unasked::NotAllowed) if self.is_without_instance(one) => (
                Ending::DeletedWithInstance,
                "its instance does not exist any more, and the platform deletes snapshots with their instance".to_owned(),
            ),
            Err(Unasked::Failed(why)) if self.now.duration_since(one.missed_at) < PATIENCE => {
                return Found::Undecided(why.clone());
            }
            // With the events of that time its own deletion would be among them.
            events if may_be_ours && (events.is_err() || is_too_late) => {
                (Ending::DeletedByUs, TRIED_BEFORE.to_owned())
            }
            Err(Unasked::NotAllowed) => (
                Ending::Unexplained,
                "not allowed to ask: the API key may not list events (`list-events`)".to_owned(),
            ),
            Ok(_) if is_too_late => (
                Ending::Unexplained,
                "the API keeps events for 30 days, and it may have been deleted before those".to_owned(),
            ),
            Ok(_) => (Ending::Unexplained, "no event of the API says who deleted it".to_owned()),
            Err(Unasked::Failed(why)) => {
                (Ending::Unexplained, format!("the API could not be asked who deleted it: {why}"))
            }
        };
        Found::Ended(ending, None, reason)
    }

    /// Whether it had an instance that does not exist any more.
    fn is_without_instance(&self, one: &Missing) -> bool {
        one.instance_id.is_some_and(|id| self.instances.get(&id) == Some(&false))
    }

    fn deleted(&self, event: &DeletionEvent, one: &Missing) -> Found {
        let by = DeletedBy {
            key_name: event.key_name.clone(),
            key: event.key.clone(),
            user: event.user.clone(),
            address: event.address.clone(),
            at: event.at,
            request_id: event.request_id.clone(),
        };
        let is_own_key = event.key.is_some() && event.key.as_deref() == self.client.key();
        let (ending, note) = match (is_own_key, one.tried_at) {
            (true, Some(_)) => (Ending::DeletedByUs, TRIED_BEFORE),
            (true, None) => (
                Ending::DeletedByOther,
                "that is the key of snapwarden, but this audit log has no such deletion",
            ),
            (false, _) => (Ending::DeletedByOther, ""),
        };
        let reason =
            [&*who(&by), note].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ");
        Found::Ended(ending, Some(by), reason)
    }

    /// Whether a snapshot is still there, though the listing lacks it.
    async fn is_there(&mut self, id: SnapshotId, one: &Missing) -> Result<bool, String> {
        // It was asked when it was found to be unexplained.
        if one.unexplained_at.is_some() {
            return Ok(false);
        }
        // Where the instance can't be asked for, its snapshot can.
        if let Some(instance) = one.instance_id
            && !self.has_instance(instance).await?
            && !self.is_instance_denied
        {
            return Ok(false);
        }
        self.count_request()?;
        answered(self.client.get_snapshot(id).await)
    }

    async fn has_instance(&mut self, id: InstanceId) -> Result<bool, String> {
        if let Some(known) = self.instances.get(&id) {
            return Ok(*known);
        }
        let inventory = &self.listing.inventory;
        let mut listed = inventory.instances.iter().chain(&inventory.elsewhere);
        let is_there = if listed.any(|instance| instance.id == id) {
            true
        } else {
            self.count_request()?;
            let answer = self.client.get_instance(id).await;
            self.is_instance_denied |=
                answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Permission);
            answered(answer)?
        };
        self.instances.insert(id, is_there);
        Ok(is_there)
    }

    fn count_request(&mut self) -> Result<(), String> {
        if self.requests == REQUESTS_MAX {
            return Err(format!("a run asks for {REQUESTS_MAX} of them, and the next one for the others"));
        }
        self.requests += 1;
        Ok(())
    }
}

/// Whether what was asked for is there. Where that may not be asked, the listing is believed.
fn answered<T>(answer: Result<Option<T>, ApiError>) -> Result<bool, String> {
    match answer {
        Ok(found) => Ok(found.is_some()),
        Err(error) if error.kind() == ErrorKind::Permission => Ok(false),
        Err(error) => Err(chain(&error)),
    }
}

/// The listing, as the next run compares with it.
fn listed_zone(listing: &Listing, at: Timestamp) -> ListedZone {
    let mut listed = ListedZone { at: Some(at), ..ListedZone::default() };
    for snapshot in &listing.inventory.snapshots {
        match snapshot.instance_id {
            Some(id) => {
                let instance = listed.instances.entry(id).or_default();
                instance.snapshots.insert(snapshot.id, snapshot.created_at);
                if instance.name.is_none() {
                    instance.name = listing.instance_of(snapshot).map(|instance| instance.name.to_string());
                }
            }
            None => drop(listed.without_instance.insert(snapshot.id, snapshot.created_at)),
        }
    }
    listed
}

fn add_listed(listed: &mut ListedZone, id: SnapshotId, one: &Missing) {
    match one.instance_id {
        Some(instance) => {
            let instance = listed.instances.entry(instance).or_default();
            instance.snapshots.insert(id, one.created_at);
            instance.name = instance.name.take().or_else(|| one.instance_name.clone());
        }
        None => drop(listed.without_instance.insert(id, one.created_at)),
    }
    listed.tried.extend(one.tried_at.map(|at| (id, at)));
}

/// How many unexplained ends are an alert.
fn alerts(missing: &BTreeMap<SnapshotId, Missing>, now: Timestamp) -> u64 {
    let is_alert =
        |one: &&Missing| one.unexplained_at.is_some_and(|at| now.duration_since(at) <= ALERT_LASTS);
    missing.values().filter(is_alert).count() as u64
}

fn sentence(all: &[String], what: &str) -> String {
    let named = all.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    let more = if all.len() > NAMED { ", …" } else { "" };
    format!("{} {what}: {named}{more}", counted(all.len(), "snapshot"))
}

/// Who deleted it, when, and from where.
fn who(by: &DeletedBy) -> String {
    let text = |text: &Option<String>| text.as_deref().map(|text| printable(text).into_owned());
    let key = match (text(&by.key_name), text(&by.key)) {
        (Some(name), Some(key)) => Some(format!("the API key {name} ({key})")),
        (name, key) => name.or(key).map(|key| format!("the API key {key}")),
    };
    let user = text(&by.user).map(|user| format!("the user {user}"));
    let who = user.or(key).unwrap_or_else(|| "an unknown key or user".to_owned());
    let at = by.at.map_or_else(String::new, |at| format!(" {at}"));
    let address = text(&by.address).map_or_else(String::new, |address| format!(" from {address}"));
    format!("deleted{at} by {who}{address}")
}
