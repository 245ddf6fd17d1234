//! Configurations: the examples that people copy are right, and broken ones are refused with messages that
//! were read by somebody.

#![expect(clippy::unwrap_used, reason = "these are tests, helpers included")]

use std::path::Path;

use proptest::prelude::*;
use snapwarden::config::sections::{ArchiveSettings, ExoscaleSettings};
use snapwarden::config::{self, ConfigError};
use snapwarden::disk::{Disk as _, RealDisk, read_named_file};
use snapwarden::policy::bucket::{Addressing, BucketRules, Encryption, LockMode, LockRule, Noncurrent};
use snapwarden::policy::{Count, Period, Retention, Which};

/// The files of a folder with such an ending, with their texts.
fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let names = RealDisk.list(&folder).unwrap().into_iter().map(|entry| entry.name.into_string().unwrap());
    let wanted: Vec<_> = names.filter(|name| name.ends_with(ending)).collect();
    wanted
        .into_iter()
        .map(|name| {
            let text = read_named_file(&folder.join(&name), config::FILE_BYTES_MAX).unwrap();
            (name, text)
        })
        .collect()
}

#[test]
fn every_example_parses() {
    let examples = files("config", ".toml");
    assert!(examples.len() >= 2);
    for (name, text) in examples {
        if let Err(diagnostics) = config::parse(&text, &name, None) {
            panic!("{diagnostics}");
        }
    }
}

#[test]
fn every_broken_configuration_is_refused_with_its_message() {
    let broken = files("tests/config-invalid", ".toml");
    assert!(broken.len() >= 25);
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../config-invalid");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| {
        for (name, text) in broken {
            let Err(diagnostics) = config::parse(&text, &name, None) else {
                panic!("{name} was accepted");
            };
            insta::assert_snapshot!(name.trim_end_matches(".toml"), diagnostics.to_string());
        }
    });
}

#[test]
fn the_full_example_has_every_key_that_is_available() {
    let (_, text) = files("config", ".toml").into_iter().find(|(name, _)| name == "full.toml").unwrap();
    let config = config::parse(&text, "full.toml", None).unwrap();
    let policy = &config.policies[0];
    let (retention, export) = (policy.retention.as_ref().unwrap(), policy.export.as_ref().unwrap());
    let promote = policy.promote.as_ref().unwrap();
    assert_eq!(config.state_directory.as_deref(), Some(Path::new("/var/lib/snapwarden")));
    let lock = LockRule::new("30d".parse().unwrap(), LockMode::Governance);
    assert_eq!(
        config.archives.values().collect::<Vec<_>>(),
        [
            &ArchiveSettings::Restic {
                repository: "/srv/restic".to_owned(),
                password_file: Some("/etc/snapwarden/restic-password".into()),
                program: "restic".to_owned(),
                cache_directory: Some("/var/cache/snapwarden".into()),
                environment_file: Some("/etc/snapwarden/restic.env".into()),
            },
            &ArchiveSettings::S3 {
                endpoint: "https://sos-de-fra-1.exo.io".parse().unwrap(),
                region: "de-fra-1".to_owned(),
                bucket: "acme-backups".to_owned(),
                prefix: "snapwarden/".to_owned(),
                credentials_file: Some("/etc/snapwarden/offsite".into()),
                ca_file: Some("/etc/ssl/our-ca.pem".into()),
                rules: BucketRules {
                    addressing: Addressing::Path,
                    storage_class: Some("STANDARD".to_owned()),
                    encryption: Some(Encryption::Aes256),
                    lock,
                    noncurrent: Noncurrent::Keep,
                },
            },
            &ArchiveSettings::Local { path: "/var/lib/snapwarden/archive".into() },
        ]
    );
    let rules = &config.archive_rules[&"vault".parse().unwrap()];
    let verify = rules.verify.as_ref().unwrap();
    assert_eq!((verify.schedule.as_str(), verify.percent), ("0 5 * * 0", 25));
    let keep = &rules.retention.as_ref().unwrap().keep;
    assert_eq!(*keep.get(Period::Day), Some(Count::Of(30.try_into().unwrap())));
    assert_eq!(policy.schedule.as_ref().unwrap().as_str(), "30 2 * * *");
    assert_eq!(policy.time_zone.iana_name(), Some("Europe/Zurich"));
    assert_eq!(policy.zones.len(), 2);
    assert_eq!(policy.select.labels["backup"].to_string(), "nightly");
    assert_eq!(policy.select.exclude_labels["backup"].to_string(), "none");
    assert!(policy.select.exclude_managed);
    assert_eq!(policy.select.instances.as_ref().map(Vec::len), Some(2));
    assert_eq!(retention.max_age.as_ref().unwrap().to_string(), "400d");
    assert_eq!(policy.guard.max_deletes, Some(500));
    assert_eq!((export.snapshots, export.required), (Which::Newest, true));
    assert_eq!(promote.keep.unwrap().get(), 3);
    assert_eq!(promote.description.as_deref(), Some("nightly golden image"));
}

#[test]
fn a_default_is_what_the_full_example_says() {
    let policy = "[policies.p]\nzones = [\"z\"]\n[policies.p.export]\narchives = [\"a\"]\n[policies.p.retention]\nkeep_last = 1\n\
                  [archives.a]\ntype = \"local\"\npath = \"/a\"\n";
    let short = config::parse(policy, "short.toml", None).unwrap();
    let (_, text) = files("config", ".toml").into_iter().find(|(name, _)| name == "full.toml").unwrap();
    let full = config::parse(&text, "full.toml", None).unwrap();
    let with_credentials = ExoscaleSettings {
        credentials_file: full.exoscale.credentials_file.clone(),
        ..short.exoscale.clone()
    };
    assert_eq!(with_credentials, full.exoscale);
    let (short, full) = (&short.policies[0], &full.policies[0]);
    assert_eq!(short.enabled, full.enabled);
    assert!(short.schedule.is_none());
    assert_eq!(short.time_zone.iana_name(), Some("UTC"));
    assert_eq!(short.guard.max_deletes, None);
    assert_eq!(short.guard.max_delete_percent, full.guard.max_delete_percent);
    assert_eq!(short.guard.max_clock_skew, full.guard.max_clock_skew);
    assert_eq!(short.retention.as_ref().unwrap().min_keep, full.retention.as_ref().unwrap().min_keep);
    let (short, full) = (short.export.as_ref().unwrap(), full.export.as_ref().unwrap());
    assert_eq!((short.snapshots, short.required), (full.snapshots, full.required));
    assert_eq!((short.concurrency, short.stall_timeout), (full.concurrency, full.stall_timeout));
    assert_eq!(short.alert_after, full.alert_after);
}

/// What a retention table of these lines says, or what is wrong with it.
fn retention(lines: &str) -> Result<Retention, String> {
    let text = format!("[policies.p]\nzones = [\"z\"]\n[policies.p.retention]\n{lines}\n");
    let mut config = config::parse(&text, "x.toml", None).map_err(|diagnostics| diagnostics.to_string())?;
    Ok(config.policies.swap_remove(0).retention.unwrap())
}

#[test]
fn point_02_a_table_that_can_keep_nothing_is_refused_and_without_one_nothing_is_pruned() {
    for lines in [
        "",
        "min_keep = 3",
        "keep_oldest = true",
        "failed_after = \"2d\"",
        "min_keep = 2\nkeep_oldest = false",
    ] {
        let error = retention(lines).unwrap_err();
        assert!(error.contains("there is no rule in it"), "{lines}: {error}");
    }
    for rule in [
        "keep_last = 1",
        "keep_weekly = 1",
        "keep_within_yearly = \"1y\"",
        "max_age = \"1d\"",
        "max_count = 1",
    ] {
        assert_eq!(retention(rule).unwrap().min_keep, 1, "{rule}");
    }
    let without = config::parse("[policies.p]\nzones = [\"z\"]\n", "x.toml", None).unwrap();
    assert!(without.policies[0].retention.is_none());
}

#[test]
fn point_03_a_count_of_zero_is_refused_and_never_means_delete() {
    for key in
        ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "max_count"]
    {
        let error = retention(&format!("{key} = 0")).unwrap_err();
        assert!(error.contains("leave the key out to switch the rule off"), "{key}: {error}");
    }
    let error = retention("max_age = \"1d\"\nmin_keep = 0").unwrap_err();
    assert!(error.contains("allow_empty = true"), "{error}");
    let error = retention("max_age = \"1d\"\nmin_keep = 0\nallow_empty = false").unwrap_err();
    assert!(error.contains("allow_empty = true"), "{error}");
    assert_eq!(retention("max_age = \"1d\"\nmin_keep = 0\nallow_empty = true").unwrap().min_keep, 0);
}

#[test]
fn point_04_without_end_is_a_word_and_no_number() {
    for key in ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly"] {
        let rules = retention(&format!("{key} = \"all\"")).unwrap();
        let counts = Period::ALL.iter().filter_map(|period| *rules.keep.get(*period)).chain(rules.keep_last);
        assert_eq!(counts.collect::<Vec<_>>(), [Count::All], "{key}");
        assert!(retention(&format!("{key} = 1_000_000_000")).is_ok(), "{key}");
        for bad in ["-1", "\"ALL\"", "\"\"", "1.5", "4294967296", "true", "\"1\""] {
            let error = retention(&format!("{key} = {bad}")).unwrap_err();
            assert!(error.contains(key), "{key} = {bad}: {error}");
        }
    }
    assert!(retention("max_count = \"all\"").is_err(), "a limit without end is none");
}

#[test]
fn a_span_that_overflows_is_refused_for_every_key_that_takes_one() {
    let keys = [
        "keep_within",
        "keep_within_hourly",
        "keep_within_daily",
        "keep_within_weekly",
        "keep_within_monthly",
    ];
    for key in keys.iter().chain(&["keep_within_yearly", "max_age", "failed_after"]) {
        for bad in ["1001y", "99999999999999999999d", "18446744073709551615h", "1000y1mo999999999w", "9999y"]
        {
            let error = retention(&format!("keep_last = 1\n{key} = \"{bad}\"")).unwrap_err();
            assert!(error.contains(key) && error.contains("is too long"), "{key} = {bad}: {error}");
        }
        assert!(retention(&format!("keep_last = 1\n{key} = \"1000y\"")).is_ok(), "{key}");
    }
}

#[test]
fn policies_stand_in_the_order_of_the_file() {
    let text =
        "[policies.b]\nzones = [\"z\"]\n[policies.c]\nzones = [\"z\"]\n[policies.a]\nzones = [\"z\"]\n";
    let config = config::parse(text, "order.toml", None).unwrap();
    let names: Vec<_> = config.policies.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!(names, ["b", "c", "a"]);
}

#[test]
fn the_environment_overrides_the_endpoint_and_is_checked_like_it() {
    let text = "[exoscale]\nendpoint = \"https://one.example\"\n[policies.a]\nzones = [\"y\", \"z\"]\n";
    let parse = |endpoint| config::parse(text, "x.toml", endpoint);
    assert_eq!(parse(Some("https://{zone}.example")).unwrap().exoscale.endpoint, "https://{zone}.example");
    assert!(parse(None).is_err());
    assert!(parse(Some("")).is_err(), "an empty one overrides nothing");
    assert_eq!(
        parse(Some("http://{zone}.example")).unwrap_err().to_string(),
        "EXOSCALE_API_ENDPOINT: `http://` to another machine can be read and changed on the way\n  \
         use `https://`, or set `allow_plain_http = true` if the way is safe"
    );
    for loopback in ["http://127.0.0.1:8080/{zone}", "http://[::1]/{zone}/v2", "http://localhost/{zone}"] {
        assert_eq!(parse(Some(loopback)).unwrap().exoscale.endpoint, loopback);
    }
}

#[test]
fn a_file_that_is_no_configuration_gives_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str, bytes: Option<&[u8]>| {
        let path = folder.path().join(name);
        if let Some(bytes) = bytes {
            let file = RealDisk
                .open(&path, snapwarden::disk::Open::CreateNew, snapwarden::disk::Access::Owner)
                .unwrap();
            file.write_all_at(bytes, 0).unwrap();
        }
        config::load(&path, None).unwrap_err()
    };
    assert!(matches!(error("missing.toml", None), ConfigError::Missing { .. }));
    assert!(matches!(error("latin1.toml", Some(b"a = \"\xe9\"")), ConfigError::NotText { .. }));
    let large = vec![b'#'; 1024 * 1024 + 1];
    assert!(matches!(error("large.toml", Some(&large)), ConfigError::TooLarge { .. }));
    assert!(matches!(config::load(folder.path(), None).unwrap_err(), ConfigError::Read { .. }));
    let ConfigError::Invalid(diagnostics) = error("empty.toml", Some(b"")) else { panic!("accepted") };
    assert!(diagnostics.to_string().contains("there is no policy"), "{diagnostics}");
}

#[test]
fn deep_and_endless_text_is_refused_and_not_choked_on() {
    for (what, text) in [
        ("lists in lists", format!("a = {}", "[".repeat(500_000))),
        ("tables in tables", format!("a = {}", "{a=".repeat(300_000))),
        ("a long path", format!("{}a = 1", "a.".repeat(400_000))),
        ("a long section", format!("[{}a]", "policies.".repeat(100_000))),
        ("errors on one line", "= ".repeat(400_000)),
        ("errors on many lines", "=\n[a]\n".repeat(10_000)),
        ("unknown keys", (0..5_000).map(|number| format!("kee{number} = 1")).collect::<Vec<_>>().join("\n")),
        ("a long key", format!("{} = 1", "k".repeat(900_000))),
        ("a long schedule", format!("[policies.a]\nschedule = \"{}\"", "* ".repeat(400_000))),
        ("a long field", format!("[policies.a]\nschedule = \"{} * * * *\"", "1,".repeat(400_000))),
        ("a long span", format!("[policies.a.retention]\nmax_age = \"{}\"", "1d".repeat(400_000))),
        ("a long glob", format!("[policies.a.select]\ninstances = [\"{}\"]", "*a".repeat(400_000))),
        ("a long list", format!("[policies.a]\nzones = [{}]", "\"ch-gva-2\", ".repeat(8_000))),
    ] {
        let shown = config::parse(&text, "x.toml", None).unwrap_err().to_string();
        assert!(shown.len() < 60_000, "{what}: {} bytes", shown.len());
    }
}

/// Text that is nearly a configuration: lines of a right one, some of them damaged.
fn nearly() -> impl Strategy<Value = String> {
    let (_, full) = files("config", ".toml").into_iter().find(|(name, _)| name == "full.toml").unwrap();
    let lines: Vec<String> = full.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let damaged = (prop::sample::select(lines), any::<prop::sample::Index>(), any::<char>(), 0..4u8)
        .prop_map(|(line, at, character, how)| {
            let mut characters: Vec<char> = line.chars().collect();
            let at = at.index(characters.len() + 1);
            match how {
                0 => characters.insert(at, character),
                1 => characters.truncate(at),
                _ => {}
            }
            characters.into_iter().collect::<String>()
        });
    prop::collection::vec(damaged, 0..60).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn no_text_is_too_strange(text in any::<String>(), near in nearly()) {
        for text in [text, near] {
            if let Err(diagnostics) = config::parse(&text, "x.toml", None) {
                let shown = diagnostics.to_string();
                prop_assert!(diagnostics.count() > 0 && !shown.is_empty());
                prop_assert!(shown.chars().all(|character| character == '\n' || !character.is_control()), "{shown:?}");
            }
        }
    }
}
