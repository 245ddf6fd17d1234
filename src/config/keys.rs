//! Every section and key that a configuration may have, and which of them this version can't use yet.
//!
//! A **label** is a section's path with `*` in the place of a name: `policies.*.retention`.

/// Every section with its keys, by label. Any other key is unknown.
pub(super) const SECTIONS: &[(&str, &[&str])] = &[
    ("", &["exoscale", "server", "state", "archives", "policies", "notify"]),
    (
        "exoscale",
        &[
            "endpoint",
            "credentials_file",
            "request_timeout",
            "poll_interval",
            "operation_timeout",
            "requests_per_second",
            "concurrency",
            "allow_plain_http",
        ],
    ),
    ("server", &["listen", "shutdown_grace"]),
    ("state", &["directory"]),
    (
        "archives.*",
        &[
            "type",
            "path",
            "endpoint",
            "region",
            "bucket",
            "prefix",
            "credentials_file",
            "allow_plain_http",
            "retention",
            "verify",
        ],
    ),
    ("archives.*.retention", RETENTION),
    ("archives.*.verify", &["schedule", "percent"]),
    (
        "policies.*",
        &[
            "enabled",
            "schedule",
            "timezone",
            "zones",
            "jitter",
            "on_start",
            "deadline",
            "create",
            "select",
            "retention",
            "guard",
            "export",
            "promote",
        ],
    ),
    (
        "policies.*.select",
        &[
            "instances",
            "exclude_instances",
            "labels",
            "snapshot_names",
            "exclude_snapshots",
            "ownership",
            "orphans",
        ],
    ),
    ("policies.*.retention", RETENTION),
    (
        "policies.*.guard",
        &["max_deletes", "max_delete_percent", "max_listing_drop_percent", "max_clock_skew"],
    ),
    (
        "policies.*.export",
        &[
            "archives",
            "snapshots",
            "required",
            "alert_after",
            "concurrency",
            "connections",
            "stall_timeout",
            "bandwidth_limit",
        ],
    ),
    (
        "policies.*.promote",
        &["name", "snapshots", "keep", "description", "default_user", "password_enabled", "ssh_key_enabled"],
    ),
    ("notify.*", &["type", "url_file", "on"]),
];

const RETENTION: &[&str] = &[
    "keep_last",
    "keep_within",
    "keep_hourly",
    "keep_daily",
    "keep_weekly",
    "keep_monthly",
    "keep_yearly",
    "keep_within_hourly",
    "keep_within_daily",
    "keep_within_weekly",
    "keep_within_monthly",
    "keep_within_yearly",
    "keep_oldest",
    "max_age",
    "max_count",
    "min_keep",
    "allow_empty",
    "failed_after",
];

/// Known, but not available in this version: refused, never ignored. To make a key available, remove its line.
pub(super) const PLANNED: &[&str] = &["notify.*"];

/// The keys of a section, if there is such a section.
pub(super) fn of(label: &str) -> Option<&'static [&'static str]> {
    SECTIONS.iter().find(|(known, _)| *known == label).map(|(_, keys)| *keys)
}

/// Whether a key is known, but not available in this version.
pub(super) fn is_planned(label: &str) -> bool {
    PLANNED.contains(&label)
}

/// The candidate that `word` was probably meant to be: a few edits away, fewer for a short word, or with the
/// same beginning (`policy`, `policies`).
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    // A word of this length is no typo, and the search is quadratic.
    if length > 64 {
        return None;
    }
    let edits_max = length.div_ceil(4).min(3);
    let begins_alike = |candidate: &str| {
        let shared = word.bytes().zip(candidate.bytes()).take_while(|(one, other)| one == other).count();
        shared >= 4 && shared + 1 >= length
    };
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(count, candidate)| *count <= edits_max || begins_alike(candidate))
        .min()
        .map(|(_, candidate)| candidate)
}

/// How many letters must be inserted, removed or replaced to turn one word into the other (Levenshtein).
fn edit_distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (line, letter) in one.chars().enumerate() {
        let mut next = vec![line + 1];
        let mut left = line + 1;
        for (pair, candidate) in row.windows(2).zip(&other) {
            if let [diagonal, above] = pair {
                left = (left + 1).min(above + 1).min(diagonal + usize::from(letter != *candidate));
                next.push(left);
            }
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planned_key_is_a_known_key() {
        for label in PLANNED {
            let label = label.strip_suffix(".*").unwrap_or(label);
            let (section, key) = label.rsplit_once('.').unwrap_or(("", label));
            assert!(of(section).is_some_and(|keys| keys.contains(&key)), "{label}");
        }
    }

    #[test]
    fn the_full_example_shows_every_key_that_is_available() {
        let example = include_str!("../../config/full.toml");
        for (section, known) in SECTIONS {
            // Sections, planned ones, and archives, whose keys depend on their type.
            if section.is_empty() || *section == "archives.*" || is_planned(section) {
                continue;
            }
            for key in *known {
                let shown = example.lines().any(|line| {
                    line.starts_with(&format!("{key} = ")) || line.ends_with(&format!(".{key}]"))
                });
                assert_eq!(shown, !is_planned(&format!("{section}.{key}")), "{section}.{key}");
            }
        }
    }

    #[test]
    fn the_nearest_word_is_found_if_it_is_near() {
        assert_eq!((edit_distance("", "abc"), edit_distance("kitten", "sitting"), edit_distance("a", "a")), (3, 3, 0));
        assert_eq!(nearest("max_agee", ["max_count", "max_age"]), Some("max_age"));
        assert_eq!(nearest("policy", ["archives", "policies"]), Some("policies"));
        assert_eq!(nearest("policys", ["archives", "policies"]), Some("policies"));
        assert_eq!(nearest("retain", ["retention", "enabled"]), None);
        assert_eq!(nearest("x", ["path", "on"]), None);
    }
}
