//! Listings from files instead of the API.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use crate::cli::args::ZoneFile;
use crate::cli::exit::Refusal;
use crate::config::sections::Config;
use crate::disk;
use crate::exoscale::wire::{self, ListedSnapshots};
use crate::policy::Policy;
use crate::retention::inventory::{Copies, Inventory, Ownership};
use crate::snapshot::{Instance, ZoneName};
use crate::text::chain;

/// A listing of 100,000 snapshots has about 40 MB; a million should still be read.
const LISTING_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// Refuses a file that no plan would use: its snapshots would silently be missing.
pub(super) fn check_files(policies: &[&Policy], files: &[ZoneFile]) -> Result<(), Refusal> {
    for (place, file) in files.iter().enumerate() {
        let why = if files.iter().take(place).any(|earlier| earlier.zone == file.zone) {
            "another file is for the same zone".to_owned()
        } else if let Some(zone) = &file.zone
            && !policies.iter().any(|policy| policy.zones.contains(zone))
        {
            format!("none of the planned policies has zone `{zone}`")
        } else {
            continue;
        };
        let text = format!("the listing {} would not be used: {why}", file.file.display());
        return Err(Refusal::usage(text));
    }
    Ok(())
}

/// The file for a zone: the one that names it, else for the policy's first zone the one without a zone.
fn file_of<'a>(files: &'a [ZoneFile], policy: &Policy, zone: &ZoneName) -> Option<&'a ZoneFile> {
    let named = files.iter().find(|file| file.zone.as_ref() == Some(zone));
    named.or_else(|| files.iter().find(|file| file.zone.is_none() && policy.zones.first() == Some(zone)))
}

/// The listings in files. Each is read once: policies share them, and a pipe cannot be read twice.
#[derive(Default)]
pub(crate) struct Files {
    snapshots: BTreeMap<PathBuf, ListedSnapshots>,
    instances: BTreeMap<PathBuf, Vec<Instance>>,
}

/// The inventories of the policy's zones, from files, and whether each has all instances of the zone.
pub(crate) fn inventories(
    config: &Config,
    policy: &Policy,
    snapshots: &[ZoneFile],
    instances: &[ZoneFile],
    files: &mut Files,
) -> Result<Vec<(Inventory, bool)>, Refusal> {
    let mut inventories = Vec::new();
    for zone in &policy.zones {
        let Some(file) = file_of(snapshots, policy, zone) else { continue };
        let listing = once(&mut files.snapshots, &file.file, wire::decode_snapshots)?.clone();
        let (instances, is_whole) = match file_of(instances, policy, zone) {
            Some(file) => (once(&mut files.instances, &file.file, wire::decode_instances)?.clone(), true),
            None => (listing.mentioned, false),
        };
        let everyones = listing.snapshots.iter().map(|snapshot| (snapshot.id, Ownership::default()));
        let inventory = Inventory {
            // Without a state, all of them count as created by this program, and as every policy's.
            created: everyones.collect(),
            archives: config.archives.keys().map(|name| (name.clone(), Copies::Assumed)).collect(),
            ..Inventory::on_paper(zone.clone(), listing.snapshots, instances)
        };
        inventories.push((inventory, is_whole));
    }
    Ok(inventories)
}

/// The listing in a file, which is read at its first use.
fn once<'f, T>(
    known: &'f mut BTreeMap<PathBuf, T>,
    path: &Path,
    decode: impl Fn(&[u8]) -> Result<T, wire::DecodeError>,
) -> Result<&'f T, Refusal> {
    match known.entry(path.to_owned()) {
        Entry::Occupied(known) => Ok(known.into_mut()),
        Entry::Vacant(place) => {
            let text =
                disk::read_named_file(path, LISTING_BYTES_MAX).map_err(|error| unreadable(path, &error))?;
            Ok(place.insert(decode(text.as_bytes()).map_err(|error| unreadable(path, &error))?))
        }
    }
}

fn unreadable(path: &Path, error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::failed(format!("read the listing {}: {}", path.display(), chain(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Exit;

    #[test]
    fn a_listing_that_no_plan_would_look_at_is_refused() {
        let text = "[policies.nightly]\nzones = [\"ch-gva-2\", \"de-fra-1\"]\n[policies.weekly]\nzones = [\"at-vie-1\"]\n";
        let config = crate::config::parse(text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
        let (both, weekly): (Vec<_>, Vec<_>) =
            (config.policies.iter().collect(), config.policies.iter().skip(1).collect());
        for (policies, files, refused) in [
            (&both, &["a.json"][..], None),
            (&both, &["a.json", "de-fra-1=b.json", "at-vie-1=c.json"], None),
            (&both, &["ch-dk-2=a.json"], Some("`ch-dk-2`")),
            (&weekly, &["ch-gva-2=a.json"], Some("`ch-gva-2`")),
            (&both, &["a.json", "b.json"], Some("b.json")),
            (&both, &["de-fra-1=a.json", "de-fra-1=b.json"], Some("b.json")),
        ] {
            let files: Vec<ZoneFile> = files.iter().map(|file| ZoneFile::from(*file)).collect();
            match (check_files(policies, &files), refused) {
                (Ok(()), None) => {}
                (Err(refusal), Some(word)) => {
                    assert_eq!(refusal.exit, Exit::Usage, "{files:?}");
                    assert!(refusal.text.contains(word), "{files:?}: {}", refusal.text);
                }
                (checked, _) => panic!("{files:?}: {checked:?}"),
            }
        }
    }

    #[test]
    fn a_file_that_names_its_zone_goes_before_one_that_names_none() {
        let text = "[policies.nightly]\nzones = [\"ch-gva-2\", \"de-fra-1\"]\n";
        let config = crate::config::parse(text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
        let found = |files: &[&str], zone: &str| {
            let files: Vec<ZoneFile> = files.iter().map(|file| ZoneFile::from(*file)).collect();
            file_of(&files, &config.policies[0], &zone.parse().unwrap()).map(|file| file.file.clone())
        };
        assert_eq!(found(&["a.json", "ch-gva-2=b.json"], "ch-gva-2"), Some("b.json".into()));
        assert_eq!(found(&["a.json", "de-fra-1=b.json"], "ch-gva-2"), Some("a.json".into()));
        assert_eq!(found(&["a.json"], "de-fra-1"), None);
    }
}
