//! What holds for any input: claimed by the fuzz targets, and by a short test of a fixed seed.

#![allow(dead_code, clippy::allow_attributes, reason = "each fuzz target makes one of the claims")]

use std::collections::HashSet;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use snapwarden::exoscale::wire::{ListedSnapshots, decode_instances, decode_snapshots};
use snapwarden::policy::span::{Span, parse_duration};
use snapwarden::snapshot::Instance;

/// A body of a listing is refused in a few printable words, or it is read, each thing once, and what was read reads
/// back as the same. Returns whether it was read.
pub(crate) fn listing(bytes: &[u8]) -> bool {
    let snapshots = decode_snapshots(bytes);
    match &snapshots {
        Ok(listed) => {
            let ids: HashSet<_> = listed.snapshots.iter().map(|snapshot| snapshot.id).collect();
            assert_eq!(ids.len(), listed.snapshots.len());
            assert_eq!(decode_snapshots(written(listed).to_string().as_bytes()).as_ref(), Ok(listed));
        }
        Err(error) => is_printable(&error.to_string()),
    }
    let instances = decode_instances(bytes);
    match &instances {
        Ok(instances) => {
            let ids: HashSet<_> = instances.iter().map(|instance| instance.id).collect();
            assert_eq!(ids.len(), instances.len());
            let text = json!({ "instances": instances.iter().map(whole).collect::<Vec<_>>() }).to_string();
            assert_eq!(decode_instances(text.as_bytes()).as_ref(), Ok(instances));
        }
        Err(error) => is_printable(&error.to_string()),
    }
    snapshots.is_ok_and(|listed| !listed.snapshots.is_empty())
        || instances.is_ok_and(|instances| !instances.is_empty())
}

/// A text is refused in a few printable words, or it is a span that reads back from how it is shown and reaches
/// somewhere from any moment. Returns whether it is one.
pub(crate) fn span(text: &str) -> bool {
    if let Err(error) = parse_duration(text) {
        is_printable(&error.to_string());
    }
    let span = match text.parse::<Span>() {
        Ok(span) => span,
        Err(error) => {
            is_printable(&error.to_string());
            return false;
        }
    };
    assert_eq!(span.to_string().parse().as_ref(), Ok(&span), "{text:?}");
    for zone in [TimeZone::UTC, TimeZone::get("Australia/Lord_Howe").unwrap()] {
        for moment in [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX] {
            let _ = span.after(moment, &zone);
        }
    }
    true
}

fn is_printable(error: &str) {
    assert!(!error.is_empty() && error.len() < 2000, "{error}");
    assert!(!error.chars().any(char::is_control), "{error:?}");
}

fn written(listed: &ListedSnapshots) -> Value {
    let snapshots = listed.snapshots.iter().map(|snapshot| {
        let instance = snapshot.instance_id.and_then(|id| listed.mentioned.iter().find(|one| one.id == id));
        json!({
            "id": snapshot.id, "name": snapshot.name, "created-at": snapshot.created_at,
            "state": snapshot.state.as_str(), "size": snapshot.size_gib, "instance": instance.map(whole),
            "application-consistent": snapshot.application_consistent,
        })
    });
    json!({ "snapshots": snapshots.collect::<Vec<_>>() })
}

fn whole(instance: &Instance) -> Value {
    let template = instance.template_id.map(|id| json!({ "id": id }));
    json!({ "id": instance.id, "name": instance.name, "labels": instance.labels, "template": template })
}
