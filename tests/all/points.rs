//! Each of the forty numbered edge cases of retention has a test that bears its number: `point_NN_…`, or
//! `point_NN_and_NN_…` for several at once.

use std::collections::BTreeSet;
use std::path::Path;

/// The numbers in a line that begins a function.
fn numbers(line: &str) -> Vec<u32> {
    let Some((_, name)) = line.split_once("fn point_") else { return Vec::new() };
    let words = name.split(['_', '(']).filter(|word| *word != "and");
    words.map_while(|word| word.parse().ok().filter(|_| word.len() == 2)).collect()
}

#[test]
fn each_of_the_forty_points_has_a_test_that_bears_its_number() {
    let mut found = BTreeSet::new();
    for folder in ["src", "tests"] {
        for (path, bytes) in crate::stage::files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
            if path.extension().is_some_and(|extension| extension == "rs") {
                let text = String::from_utf8(bytes).unwrap();
                found.extend(text.lines().flat_map(numbers));
            }
        }
    }
    let missing: Vec<u32> = (1..=40).filter(|point| !found.contains(point)).collect();
    assert!(missing.is_empty(), "no test bears the number of {missing:?}");
    assert_eq!(found.iter().next_back(), Some(&40), "there are forty");
}
