//! The commands that build the instance of a copy again, for the vendor's command line.
//!
//! They are meant to be pasted into a shell, and all names in them come from outside. So each word is quoted, and one that
//! can't be shown as it is (a control character, a text that turns the reading direction) is left out, with a note. What the
//! command line has no option for is a note, too.

use std::borrow::Cow;

use tracing::warn;

use crate::archive::manifest::{BuildFacts, Manifest};
use crate::restore::find::ArchivedCopy;
use crate::snapshot::{Attached, Machine, TemplateId, ZoneName};
use crate::text::{chain, excerpt, printable};

/// The longest name that the API knows, in characters.
const NAME_MAX: usize = 255;

/// Bytes of a GiB.
const GIB: u64 = 1 << 30;

/// The commands, and what they can't do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilding {
    /// The command that creates the instance: the command with the name, then each option. Joined by spaces, it can be pasted.
    pub create: Vec<String>,
    /// Commands for after that.
    pub then: Vec<String>,
    /// What is different, or unknown; each a sentence.
    pub notes: Vec<String>,
}

/// How to build the instance again, by the first copy that knows it. What can't be read counts as not recorded.
pub async fn facts_of(copies: &[ArchivedCopy]) -> BuildFacts {
    let mut found = BuildFacts::default();
    for ArchivedCopy { archive, copy } in copies {
        match archive.manifest_bytes(copy).await {
            Ok(Some(bytes)) => found = BuildFacts::of(&bytes),
            Ok(None) => warn!("archive {}: the manifest has changed in the meantime", archive.name()),
            Err(error) => warn!("{}", chain(&error)),
        }
        if found.machine.is_some() {
            break;
        }
    }
    found
}

/// The commands that build the instance of a copy again, from this template in this zone.
pub fn rebuilding(
    manifest: &Manifest,
    facts: &BuildFacts,
    zone: &ZoneName,
    template_id: Option<TemplateId>,
) -> Rebuilding {
    let mut rebuilding = Rebuilding { create: Vec::new(), then: Vec::new(), notes: Vec::new() };
    let name = rebuilding.name(manifest);
    rebuilding.create.push(format!("exo compute instance create {name}"));
    rebuilding.create.push(format!("--zone {zone}"));
    let template = template_id.map_or_else(|| "TEMPLATE_ID".to_owned(), |id| id.to_string());
    rebuilding.create.push(format!("--template {template}"));
    rebuilding.create.push("--template-visibility private".to_owned());
    let in_image = manifest.image.virtual_size_bytes.map(|bytes| bytes.div_ceil(GIB));
    let of_snapshot = in_image.or(manifest.snapshot.size_gib);
    let of_machine = facts.machine.as_ref().and_then(|machine| machine.disk_size_gib);
    if let Some(gib) = of_snapshot.max(of_machine) {
        rebuilding.create.push(format!("--disk-size {gib}"));
    }
    match &facts.machine {
        Some(machine) => rebuilding.machine(machine, manifest, &name, zone),
        None => rebuilding.note(
            "the manifest does not record how the instance was built: choose `--instance-type`, `--security-group`, \
             `--ssh-key` and what else it needs; without them `exo` takes its own defaults",
        ),
    }
    for (key, value) in &manifest.instance.labels {
        rebuilding.label(key, value);
    }
    rebuilding
}

impl Rebuilding {
    fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// The instance's name as a word; `NAME` if that can't be one.
    fn name(&mut self, manifest: &Manifest) -> String {
        let Some(name) = manifest.instance.name.as_deref() else {
            self.note("the name of the instance is not recorded: put one in the place of NAME");
            return "NAME".to_owned();
        };
        // One that begins so would be an option.
        if let Some(name) = word(name).filter(|_| !name.starts_with('-')) {
            return name;
        }
        let shown = excerpt(name, NAME_MAX);
        self.note(format!(
            "the name of the instance, `{shown}`, cannot stand in a command: put one in the place of NAME"
        ));
        "NAME".to_owned()
    }

    fn machine(&mut self, machine: &Machine, manifest: &Manifest, name: &str, zone: &ZoneName) {
        match machine.instance_type.as_deref().and_then(word) {
            Some(instance_type) => self.create.push(format!("--instance-type {instance_type}")),
            None => self.note(
                "the instance's type is not recorded: add `--instance-type FAMILY.SIZE`, or `exo` takes its own default",
            ),
        }
        self.attach("--security-group", &machine.security_groups);
        self.attach("--anti-affinity-group", &machine.anti_affinity_groups);
        for key in &machine.ssh_keys {
            self.listed("--ssh-key", key);
        }
        for (flag, is_on) in [("--secureboot", machine.secure_boot), ("--tpm", machine.tpm)] {
            self.create.extend((is_on == Some(true)).then(|| flag.to_owned()));
        }
        let of_template = manifest.template.as_ref().and_then(|template| template.application_consistent);
        let asked = machine.application_consistent_snapshots;
        if let Some(asked) = asked.filter(|asked| *asked != of_template.unwrap_or(false)) {
            self.create.push(format!("--application-consistent-snapshot-enabled={asked}"));
        }
        match machine.public_ip_assignment.as_deref() {
            None | Some("inet4") => {}
            Some(assignment @ ("dual" | "none")) => {
                self.create.push(format!("--public-ip {assignment}"));
                self.note(
                    "releases of `exo` without `--public-ip` have `--ipv6` for `dual` and `--private-instance` for `none`",
                );
            }
            Some(other) => {
                let other = printable(other);
                self.note(format!(
                    "its public addresses were `{other}`, for which `exo` has no known option"
                ));
            }
        }
        self.of_zone(machine, manifest, name, zone);
        if machine.user_data.is_some() {
            self.note(
                "its user data is in the manifest, in base64: `jq -r .machine.user_data MANIFEST | base64 -d > user-data`, then \
                 add `--cloud-init user-data`",
            );
        }
        if let Some(manager) = &machine.manager {
            let kind = manager.kind.as_deref().unwrap_or("pool");
            let id = manager.id.map_or_else(String::new, |id| format!(" {id}"));
            self.note(format!(
                "it was made by {}{id}, which the new instance does not belong to",
                printable(kind)
            ));
        }
    }

    /// Networks, addresses and hosts are of one zone.
    fn of_zone(&mut self, machine: &Machine, manifest: &Manifest, name: &str, zone: &ZoneName) {
        let target = machine.deploy_target.as_slice();
        let all = [
            ("private networks", machine.private_networks.as_slice()),
            ("elastic IPs", machine.elastic_ips.as_slice()),
            ("dedicated hosts", target),
        ];
        if manifest.zone != *zone {
            for (what, attached) in all.into_iter().filter(|(_, attached)| !attached.is_empty()) {
                let shown = attached.iter().map(shown).collect::<Vec<_>>().join(", ");
                self.note(format!("its {what} in zone {} are left out: {shown}", manifest.zone));
            }
            return;
        }
        self.attach("--private-network", &machine.private_networks);
        self.attach("--deploy-target", target);
        for address in &machine.elastic_ips {
            self.then
                .push(format!("exo compute instance elastic-ip attach {name} {} --zone {zone}", address.id));
        }
    }

    fn attach(&mut self, flag: &str, attached: &[Attached]) {
        self.create.extend(attached.iter().map(|one| format!("{flag} {}", one.id)));
    }

    /// A value of an option that `exo` reads as a line of CSV.
    fn listed(&mut self, flag: &str, value: &str) {
        match word(&csv_field(value)) {
            Some(value) => self.create.push(format!("{flag} {value}")),
            None => self.left_out(flag, value),
        }
    }

    /// A label: `exo` cuts at the first `=`, and reads a text with several of them as a line of CSV.
    fn label(&mut self, key: &str, value: &str) {
        let pair = format!("{key}={value}");
        let written = match pair.matches('=').count() {
            1 => Some(Cow::Borrowed(&*pair)).filter(|pair| !pair.starts_with('"') && !pair.ends_with('"')),
            _ => Some(csv_field(&pair)),
        };
        let written = written.filter(|_| !key.is_empty() && !key.contains('='));
        match written.and_then(|written| word(&written)) {
            Some(pair) => self.create.push(format!("--label {pair}")),
            None => self.left_out("--label", &pair),
        }
    }

    fn left_out(&mut self, flag: &str, value: &str) {
        self.note(format!(
            "`{flag}` is left out for `{}`, which cannot stand in a command",
            excerpt(value, NAME_MAX)
        ));
    }
}

fn shown(attached: &Attached) -> String {
    match &attached.name {
        Some(name) => format!("{} ({})", printable(name), attached.id),
        None => attached.id.to_string(),
    }
}

/// A field of a line of CSV.
fn csv_field(text: &str) -> Cow<'_, str> {
    if text.contains(['"', ',']) { format!("\"{}\"", text.replace('"', "\"\"")).into() } else { text.into() }
}

/// A text as one word of a shell; none if it can't be shown as it is, or is no name at all.
fn word(text: &str) -> Option<String> {
    let is_plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '=' | ':' | '@' | '%' | '+' | ',' | '/')
    };
    // A field of CSV and a label are longer than a name.
    let is_shown = !text.is_empty()
        && text.chars().count() <= 4 * NAME_MAX
        && matches!(printable(text), Cow::Borrowed(_));
    is_shown.then(|| {
        if text.chars().all(is_plain) {
            text.to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::archive::testing::{image, manifest_of};
    use crate::snapshot::Manager;

    fn attached(number: u128) -> Attached {
        Attached { id: Uuid::from_u128(number), name: None }
    }

    fn of(name: &str, labels: &[(&str, &str)], machine: Option<Machine>, zone: &str) -> Rebuilding {
        let mut manifest = manifest_of(&image(300_000, 1));
        let instance = Arc::make_mut(&mut manifest.instance);
        instance.name = Some(name.to_owned());
        instance.labels =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let facts = BuildFacts { machine, ..BuildFacts::default() };
        rebuilding(&manifest, &facts, &zone.parse().unwrap(), None)
    }

    fn whole() -> Machine {
        Machine {
            instance_type: Some("standard.medium".to_owned()),
            disk_size_gib: Some(50),
            security_groups: vec![attached(1), attached(2)],
            private_networks: vec![attached(3)],
            elastic_ips: vec![attached(4)],
            anti_affinity_groups: vec![attached(5)],
            deploy_target: Some(attached(6)),
            ssh_keys: vec!["alice".to_owned(), "bob, \"the\" admin".to_owned()],
            secure_boot: Some(true),
            tpm: Some(true),
            public_ip_assignment: Some("dual".to_owned()),
            application_consistent_snapshots: Some(true),
            user_data: Some("aHVzaA==".to_owned()),
            manager: Some(Manager { id: None, kind: Some("instance-pool".to_owned()) }),
            ..Machine::default()
        }
    }

    #[test]
    fn all_that_is_recorded_is_in_the_commands_or_noted() {
        let made = of("web-1", &[("backup", "nightly")], Some(whole()), "ch-gva-2");
        insta::assert_snapshot!(made.create.join("\n"), @r#"
        exo compute instance create web-1
        --zone ch-gva-2
        --template TEMPLATE_ID
        --template-visibility private
        --disk-size 50
        --instance-type standard.medium
        --security-group 00000000-0000-0000-0000-000000000001
        --security-group 00000000-0000-0000-0000-000000000002
        --anti-affinity-group 00000000-0000-0000-0000-000000000005
        --ssh-key alice
        --ssh-key '"bob, ""the"" admin"'
        --secureboot
        --tpm
        --application-consistent-snapshot-enabled=true
        --public-ip dual
        --private-network 00000000-0000-0000-0000-000000000003
        --deploy-target 00000000-0000-0000-0000-000000000006
        --label backup=nightly
        "#);
        let attach = "exo compute instance elastic-ip attach web-1 00000000-0000-0000-0000-000000000004 --zone ch-gva-2";
        assert_eq!(made.then, [attach]);
        for (note, word) in made.notes.iter().zip(["--ipv6", "--cloud-init", "instance-pool"]) {
            assert!(note.contains(word), "{note}");
        }
        assert!(!format!("{made:?}").contains("aHVzaA"), "user data may hold secrets");
    }

    #[test]
    fn what_is_of_another_zone_is_left_out_and_named() {
        let made = of("web-1", &[], Some(whole()), "de-fra-1");
        let command = made.create.join(" ");
        assert!(!command.contains("private-network") && !command.contains("deploy-target"), "{command}");
        assert_eq!(made.then, Vec::<String>::new());
        let notes = made.notes.join("\n");
        for word in ["private networks in zone ch-gva-2", "elastic IPs in zone", "dedicated hosts in zone"] {
            assert!(notes.contains(word), "{notes}");
        }
    }

    #[test]
    fn hostile_names_are_quoted_or_left_out() {
        let machine =
            Machine { ssh_keys: vec!["a\u{1b}[31m".to_owned(), "it's".to_owned()], ..Machine::default() };
        let labels = [
            ("a", "b=c,d"),
            ("x=y", "z"),
            ("say", "\"hi\""),
            ("$(id)", "`id`"),
            ("turn", "\u{202e}"),
            ("empty", ""),
        ];
        let made = of("db; rm -rf ~", &labels, Some(machine), "ch-gva-2");
        let command = made.create.join(" ");
        assert!(command.starts_with("exo compute instance create 'db; rm -rf ~' "), "{command}");
        for word in
            [r"--ssh-key 'it'\''s'", r#"--label '"a=b=c,d"'"#, "--label '$(id)=`id`'", "--label empty="]
        {
            assert!(command.contains(word), "{word}: {command}");
        }
        assert!(!command.contains(['\u{1b}', '\u{202e}']) && !command.contains("x=y"), "{command}");
        let notes = made.notes.join("\n");
        for word in ["a\\u{1b}[31m", "x=y=z", "say=\"hi\"", "turn=\\u{202e}"] {
            assert!(notes.contains(word), "{word}: {notes}");
        }
        for name in ["--help", "a\nb", ""] {
            assert!(of(name, &[], None, "ch-gva-2").create[0].ends_with(" NAME"), "{name}");
        }
    }
}
