//! The sections and keys that a configuration may have, and the search for the key that a typo meant.
//!
//! A **label** is a section's path with `*` in the place of a name: `policies.*.retention`.

use std::collections::BTreeMap;

/// Longer words are no typos, and the search is quadratic.
const TYPO_MAX: usize = 64;

/// The keys of each section by label, in the order in which the readers ask for them.
///
/// There is no list of keys beside the readers: a key is known because a reader asks for it.
#[derive(Debug, Default)]
pub(super) struct KnownKeys(BTreeMap<String, Vec<String>>);

impl KnownKeys {
    pub(super) fn add(&mut self, label: &str, key: &str) {
        let keys = self.0.entry(label.to_owned()).or_default();
        if !keys.iter().any(|known| known == key) {
            keys.push(key.to_owned());
        }
    }

    /// `None` if the section may have any keys, such as labels, or if there is no such section.
    pub(super) fn of(&self, label: &str) -> Option<&[String]> {
        self.0.get(label).map(Vec::as_slice)
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.0.iter().map(|(label, keys)| (label.as_str(), keys.as_slice()))
    }

    /// The labels of the sections that have a key, without the file's top level.
    pub(super) fn sections_with(&self, key: &str) -> impl Iterator<Item = &str> {
        let sections = self.0.iter().filter(move |(label, keys)| !label.is_empty() && contains(keys, key));
        sections.map(|(label, _)| label.as_str())
    }
}

pub(super) fn contains(keys: &[String], key: &str) -> bool {
    keys.iter().any(|known| known == key)
}

/// The candidate that `word` was probably meant to be: a few edits away, fewer for a short word, or with the
/// same beginning (`policy`, `policies`).
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    if length > TYPO_MAX {
        return None;
    }
    let edits_max = length.div_ceil(4).min(3);
    let begins_alike = |candidate: &str| {
        let shared = word.bytes().zip(candidate.bytes()).take_while(|(one, other)| one == other).count();
        shared >= 4 && shared + 1 >= length
    };
    candidates
        .into_iter()
        .map(|candidate| (strsim::levenshtein(word, candidate), candidate))
        .filter(|(edits, candidate)| *edits <= edits_max || begins_alike(candidate))
        .min()
        .map(|(_, candidate)| candidate)
}

/// The help for a word that is not known: the candidate that it was probably meant to be, else `otherwise`.
pub(crate) fn help_with<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
    otherwise: impl FnOnce() -> String,
) -> String {
    nearest(word, candidates).map_or_else(otherwise, |near| format!("did you mean `{near}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_if_it_is_near() {
        assert_eq!(nearest("max_agee", ["max_count", "max_age"]), Some("max_age"));
        assert_eq!(nearest("policy", ["archives", "policies"]), Some("policies"));
        assert_eq!(nearest("policys", ["archives", "policies"]), Some("policies"));
        assert_eq!(nearest("kitten", ["sitting"]), None, "three edits are too many for six letters");
        assert_eq!(nearest("retain", ["retention", "enabled"]), None);
        assert_eq!(nearest("x", ["path", "on"]), None);
        assert_eq!(nearest(&"a".repeat(65), ["a"]), None, "too long for a typo");
    }

    #[test]
    fn a_section_keeps_the_order_in_which_its_keys_were_asked_for() {
        let mut known = KnownKeys::default();
        for key in ["schedule", "create", "schedule", "a"] {
            known.add("policies.*", key);
        }
        assert_eq!(known.of("policies.*").unwrap(), ["schedule", "create", "a"]);
        assert_eq!(known.of("policies.*.select.labels"), None);
    }
}
