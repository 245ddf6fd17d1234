//! The guards that `tests/guards.py` switches off: it must still be able to.

use std::path::Path;

#[test]
#[expect(clippy::disallowed_methods, reason = "sources are no files of archive or state")]
fn each_guard_can_be_switched_off() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table: toml::Table = include_str!("../guards.toml").parse().unwrap();
    let guards = table["guard"].as_array().unwrap();
    let edits = guards.iter().flat_map(|guard| guard["edit"].as_array().unwrap());
    for edit in edits.chain([&table["judge"]]) {
        let text = |key: &str| edit[key].as_str().unwrap();
        let source = std::fs::read_to_string(root.join(text("file"))).unwrap();
        let count = source.matches(text("code")).count();
        assert_eq!(count, 1, "{}: edit tests/guards.toml: {}", text("file"), text("code"));
        assert!(text("off").contains("OFF"), "{}", text("code"));
    }
}
