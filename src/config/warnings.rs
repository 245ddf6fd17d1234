//! Warns where a valid configuration invites a loss: for `check`.

use crate::config::sections::Config;
use crate::policy::Policy;
use crate::policy::name::ArchiveName;
use crate::snapshot::ZoneName;

/// What an operator should look at again, in the order of the file: creating policies that overlap, deletions without
/// any export, an archive that policies with different retention share, and required exports that nothing runs.
pub fn warnings(config: &Config) -> Vec<String> {
    let enabled: Vec<&Policy> = config.policies.iter().filter(|policy| policy.enabled).collect();
    let pairs = || {
        let others = |index: usize| enabled.iter().skip(index + 1);
        enabled
            .iter()
            .enumerate()
            .flat_map(move |(index, one)| others(index).map(move |other| (*one, *other)))
    };
    let mut warnings: Vec<String> = pairs().filter_map(|(one, other)| both_create(one, other)).collect();
    warnings.extend(enabled.iter().filter_map(|policy| no_export(policy, &enabled)));
    warnings.extend(pairs().flat_map(|(one, other)| shared_archives(config, one, other)));
    warnings.extend(config.policies.iter().filter_map(required_but_not_run));
    warnings
}

fn both_create(one: &Policy, other: &Policy) -> Option<String> {
    let zones: Vec<&str> = shared_zones(one, other).map(ZoneName::as_str).collect();
    let is_so = one.create && other.create && !zones.is_empty() && one.select.may_overlap(&other.select);
    is_so.then(|| {
        format!(
            "policies `{}` and `{}` both create snapshots, and may select the same instances in {}: check that the \
             retention of each leaves what the other is for, or let them select different instances",
            one.name,
            other.name,
            zones.join(", ")
        )
    })
}

fn no_export(policy: &Policy, enabled: &[&Policy]) -> Option<String> {
    policy.retention.as_ref()?;
    let is_exported = |zone: &ZoneName| {
        enabled.iter().any(|other| {
            other.export.is_some() && other.zones.contains(zone) && other.select.may_overlap(&policy.select)
        })
    };
    let zones: Vec<&str> =
        policy.zones.iter().filter(|zone| !is_exported(zone)).map(ZoneName::as_str).collect();
    (!zones.is_empty()).then(|| {
        format!(
            "policy `{0}` deletes snapshots in {1} that no policy exports: no copy is left of what it deletes, nor of \
             an instance's snapshots once the instance is deleted; write `[policies.{0}.export]`",
            policy.name,
            zones.join(", ")
        )
    })
}

fn shared_archives(config: &Config, one: &Policy, other: &Policy) -> Vec<String> {
    let archives = |policy: &Policy| policy.export.as_ref().map(|export| export.archives.clone());
    let (Some(of_one), Some(of_other)) = (archives(one), archives(other)) else { return Vec::new() };
    let warning = |archive: &ArchiveName| {
        let rules = config.archive_rules.get(archive);
        let consequence = if rules.is_some_and(|rules| rules.retention.is_some()) {
            "its retention judges the copies of both by the same rules, and may remove those that only one of them needs"
        } else {
            "it keeps all copies now, but a retention of its own would judge those of both by the same rules"
        };
        format!(
            "policies `{}` and `{}` have different retention and export into one archive, `{archive}`: {consequence}; \
             give each policy an archive of its own",
            one.name, other.name
        )
    };
    let differ = one.retention != other.retention;
    of_one.iter().filter(|archive| differ && of_other.contains(archive)).map(warning).collect()
}

fn required_but_not_run(policy: &Policy) -> Option<String> {
    policy.export.as_ref().filter(|export| export.required)?;
    let (cause, help) = if !policy.enabled {
        ("is not enabled", "enable it, or set `required = false`")
    } else if policy.schedule.is_none() {
        ("has no `schedule`", "write one, let a timer run it by `once`, or set `required = false`")
    } else {
        return None;
    };
    Some(format!(
        "policy `{}` requires exports (`required = true`), but {cause}, so nothing makes them: snapshots that wait for a \
         copy are not deleted; {help}",
        policy.name
    ))
}

fn shared_zones<'a>(one: &'a Policy, other: &'a Policy) -> impl Iterator<Item = &'a ZoneName> {
    one.zones.iter().filter(|zone| other.zones.contains(zone))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const CREATES: &str = "schedule = \"@daily\"\nzones = [\"ch-gva-2\", \"de-fra-1\"]\ncreate = true\n";
    const ARCHIVE: &str = "[archives.vault]\ntype = \"local\"\npath = \"/srv/vault\"\n";

    fn warned(text: &str) -> Vec<String> {
        let config = config::parse(text, "test.toml", None).unwrap_or_else(|wrong| panic!("{wrong}"));
        warnings(&config)
    }

    fn policy(name: &str, keys: &str, sections: &[(&str, &str)]) -> String {
        let sections =
            sections.iter().map(|(section, keys)| format!("[policies.{name}.{section}]\n{keys}\n"));
        format!("[policies.{name}]\n{keys}\n{}", sections.collect::<String>())
    }

    #[test]
    fn creating_policies_that_may_select_one_instance_overlap() {
        for (one, other, overlap) in [
            ("", "", true),
            ("instances = [\"web-*\"]", "", true),
            ("instances = [\"web-*\"]", "instances = [\"db-*\"]", false),
            ("instances = [\"web-*\"]", "instances = [\"*-1\"]", true),
            ("instances = [\"web-*\"]", "instances = [\"db-*\", \"web-1\"]", true),
            ("instances = [\"web-1\"]", "instances = [\"web-2\"]", false),
            ("instances = [\"web-1\"]", "exclude_instances = [\"web-*\"]", false),
            ("instances = [\"web-*\"]", "exclude_instances = [\"web-*\"]", false),
            ("instances = [\"web-*\"]", "exclude_instances = [\"web-1\"]", true),
            ("instances = [\"self\"]", "", true),
            ("instances = [\"self\"]", "exclude_instances = [\"self\"]", false),
            ("instances = [\"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec\"]", "instances = [\"web-1\"]", true),
            ("labels = { backup = \"a\" }", "labels = { backup = \"b\" }", false),
            ("labels = { backup = \"a\" }", "labels = { tier = \"b\" }", true),
            ("labels = { backup = \"a\" }", "instances = [\"web-1\"]", true),
            ("labels = { backup = \"a*\" }", "labels = { backup = \"ab\" }", true),
            ("labels = { backup = \"a*\" }", "labels = { backup = \"b*\" }", false),
            ("labels = { backup = \"a\" }", "exclude_labels = { backup = \"*\" }", false),
            ("labels = { backup = \"a\" }", "exclude_labels = { backup = \"b\" }", true),
            ("labels = { backup = \"*\" }", "exclude_labels = { backup = \"none\" }", true),
            ("exclude_labels = { backup = \"none\" }", "exclude_labels = { backup = \"none\" }", true),
            ("labels = { backup = \"none\" }", "exclude_labels = { backup = \"none\" }", false),
            ("managed = false", "", true),
        ] {
            let text = policy("hourly", CREATES, &[("select", one)])
                + &policy("weekly", CREATES, &[("select", other)]);
            let warned = warned(&text);
            assert_eq!(warned.len(), usize::from(overlap), "{one} and {other}: {warned:?}");
            let names = "policies `hourly` and `weekly` both create snapshots, and may select the same instances in \
                         ch-gva-2, de-fra-1: ";
            assert!(warned.iter().all(|warning| warning.starts_with(names)), "{warned:?}");
        }
        let elsewhere = CREATES.replace("\"ch-gva-2\", \"de-fra-1\"", "\"at-vie-1\"");
        for keys in
            [elsewhere.as_str(), &CREATES.replace("true", "false"), &format!("{CREATES}enabled = false")]
        {
            assert_eq!(
                warned(&(policy("hourly", CREATES, &[]) + &policy("weekly", keys, &[]))),
                [""; 0],
                "{keys}"
            );
        }
    }

    #[test]
    fn deleting_without_any_export_is_named_with_its_zones() {
        let prunes = policy("nightly", CREATES, &[("retention", "keep_last = 3")]);
        let exports = |zones: &str, keys: &str| {
            let keys = format!("schedule = \"@daily\"\nzones = [{zones}]\n{keys}");
            policy("offsite", &keys, &[("export", "archives = [\"vault\"]")]) + ARCHIVE
        };
        let named =
            |zones: &str| format!("policy `nightly` deletes snapshots in {zones} that no policy exports: ");
        for (text, zones) in [
            (prunes.clone(), Some("ch-gva-2, de-fra-1")),
            (format!("{prunes}{}", exports("\"de-fra-1\"", "")), Some("ch-gva-2")),
            (format!("{prunes}{}", exports("\"ch-gva-2\", \"de-fra-1\"", "")), None),
            (
                format!(
                    "{prunes}{}",
                    exports("\"ch-gva-2\", \"de-fra-1\"", "select = { instances = [\"db\"] }")
                ),
                None,
            ),
            (prunes.clone() + "[policies.nightly.export]\narchives = [\"vault\"]\n" + ARCHIVE, None),
        ] {
            let warned = warned(&text);
            assert_eq!(warned.len(), usize::from(zones.is_some()), "{text}: {warned:?}");
            assert!(warned.iter().all(|warning| warning.starts_with(&named(zones.unwrap()))), "{warned:?}");
        }
    }

    #[test]
    fn an_archive_that_policies_with_other_retention_share_is_named() {
        let keeps = |name: &str, count: u32| {
            let retention = format!("keep_last = {count}");
            policy(
                name,
                "schedule = \"@daily\"\nzones = [\"ch-gva-2\"]\n",
                &[("retention", &retention), ("export", "archives = [\"vault\"]")],
            )
        };
        let both = |other: u32| keeps("nightly", 3) + &keeps("weekly", other) + ARCHIVE;
        assert_eq!(warned(&both(3)), [""; 0]);
        let names =
            "policies `nightly` and `weekly` have different retention and export into one archive, `vault`: ";
        for (rules, consequence) in [
            ("", "it keeps all copies now"),
            ("[archives.vault.retention]\nkeep_last = 9\n", "its retention judges"),
        ] {
            let warned = warned(&(both(4) + rules));
            assert_eq!(warned.len(), 1, "{warned:?}");
            assert!(warned[0].strip_prefix(names).unwrap().starts_with(consequence), "{warned:?}");
        }
    }

    #[test]
    fn a_required_export_that_nothing_runs_is_named() {
        for (keys, export, cause) in [
            ("schedule = \"@daily\"", "", None),
            ("", "", Some("has no `schedule`")),
            ("", "required = false", None),
            ("schedule = \"@daily\"\nenabled = false", "", Some("is not enabled")),
            ("enabled = false", "required = false", None),
        ] {
            let export = format!("archives = [\"vault\"]\n{export}");
            let keys = format!("zones = [\"ch-gva-2\"]\n{keys}");
            let warned = warned(&(policy("offsite", &keys, &[("export", &export)]) + ARCHIVE));
            assert_eq!(warned.len(), usize::from(cause.is_some()), "{keys}, {export}: {warned:?}");
            let named =
                |cause| format!("policy `offsite` requires exports (`required = true`), but {cause}, ");
            assert!(warned.iter().all(|warning| warning.starts_with(&named(cause.unwrap()))), "{warned:?}");
        }
    }
}
