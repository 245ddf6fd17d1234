//! The guards that `tests/guards.py` switches off: it must still be able to.

use std::path::Path;

#[test]
#[expect(clippy::disallowed_methods, reason = "sources are no files of archive or state")]
fn each_guard_can_be_switched_off() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table: toml::Table = include_str!("../guards.toml").parse().unwrap();
    for guard in table["guard"].as_array().unwrap() {
        for edit in guard["edit"].as_array().unwrap() {
            let text = |key: &str| edit[key].as_str().unwrap();
            let source = std::fs::read_to_string(root.join(text("file"))).unwrap();
            let count = source.matches(text("code")).count();
            assert_eq!(count, 1, "{}: edit tests/guards.toml: {}", guard["name"], text("code"));
            assert!(text("off").contains("OFF"), "{}", guard["name"]);
        }
    }
}
