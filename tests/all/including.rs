//! `include`: one configuration in several files.

use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use snapwarden::config::sections::Config;
use snapwarden::config::{self, ConfigError};
use snapwarden::disk::{Access, RealDisk, create_folders, replace_file};

use crate::stage::skipped;

const MAIN: &str = "include = [\"conf.d/*.toml\"]\n";

fn policy(name: &str) -> String {
    format!("[policies.{name}]\nzones = [\"ch-gva-2\"]\n")
}

/// A folder with these files, of which the first is the main one.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let these = Self(tempfile::tempdir().unwrap());
        for (name, text) in files {
            these.write(name, text);
        }
        these
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        self.write_bytes(name, text.as_bytes());
    }

    fn write_bytes(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        create_folders(&RealDisk, path.parent().unwrap(), Access::Owner).unwrap();
        replace_file(&RealDisk, &path, bytes, Access::Owner).unwrap();
    }

    fn load(&self) -> Result<Config, String> {
        config::load(&self.path("main.toml"), None).map_err(|error| match error {
            ConfigError::Invalid(diagnostics) => {
                diagnostics.to_string().replace(self.0.path().to_str().unwrap(), "")
            }
            other => panic!("{other}"),
        })
    }
}

#[test]
fn included_files_are_read_once_in_order_and_leftovers_of_editors_are_not() {
    let files = Files::new(&[
        (
            "main.toml",
            "include = [\"conf.d/*.toml\", \"conf.d/10-z.toml\", \"more/?/p.toml\"]\n[policies.m]\nzones = [\"z\"]\n",
        ),
        ("conf.d/20-a.toml", &policy("a")),
        (
            "conf.d/10-z.toml",
            &format!("{}[archives.vault]\ntype = \"local\"\npath = \"/vault\"\n", policy("z")),
        ),
        ("conf.d/.10-z.toml", "nonsense"),
        ("conf.d/10-z.toml~", "nonsense"),
        ("conf.d/README", "nonsense"),
        ("more/b/p.toml", &policy("b")),
        ("more/bb/p.toml", &policy("bb")),
        ("more/c", "no folder"),
    ]);
    let config = files.load().unwrap();
    let names: Vec<_> = config.policies.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!(names, ["m", "z", "a", "b"]);
    let read: Vec<_> = config.files.iter().map(|file| Path::new(file).file_name().unwrap()).collect();
    assert_eq!(read, ["main.toml", "10-z.toml", "20-a.toml", "p.toml"]);
    assert!(config.archives.contains_key(&"vault".parse().unwrap()));
    assert_eq!(config.written["policies.a.zones"], serde_json::json!(["ch-gva-2"]));
}

#[test]
fn every_error_of_every_file_is_said_at_once_with_its_file_and_line() {
    let files = Files::new(&[
        (
            "main.toml",
            "include = [\"conf.d/*.toml\", \"missing.toml\", \"none/*.toml\", \"main.toml\", \"../x\"]\n\
             [server]\nshutdown_grace = \"1s\"\n[policies.a]\nzones = [\"z\"]\n",
        ),
        (
            "conf.d/1.toml",
            "include = [\"deeper.toml\"]\n[policies.a]\nzones = [\"z\"]\n[archives.vault]\ntype = \"local\"\npath = \"/a\"\n\
             [notify.ops]\ntype = \"webhook\"\n",
        ),
        (
            "conf.d/2.toml",
            "[server]\nlisten = \"127.0.0.1:1\"\n[archives.vault]\ntype = \"local\"\npath = \"/b\"\n[notify.ops]\ntype = \"webhook\"\n\
             [state]\ndirectory = \"/s\"\n[policies.b]\nzoness = 1\nzones = [\n",
        ),
        (
            "conf.d/3.toml",
            "[state]\ndirectory = \"/t\"\n[exoscale]\n[policies.c.export]\narchives = [\"elsewhere\"]\n",
        ),
    ]);
    let said = files.load().unwrap_err();
    for part in [
        "/main.toml:1:29: include: `missing.toml` matches no file\n     1 | include = [",
        "/main.toml:1:45: include: `none/*.toml` matches no file\n",
        "/main.toml:1:60: include: it includes this file itself\n",
        "/main.toml:1:73: include: the pattern has a `..` in it\n",
        "/conf.d/1.toml:1:1: include: an included file can't include others\n",
        "/conf.d/1.toml:2:11: policies.a: this is also at /main.toml:4\n     2 | [policies.a]\n",
        "give one of them another name, or take it out",
        "/conf.d/2.toml:1:2: server: this is also at /main.toml:2\n",
        "write it in one of the files only",
        "/conf.d/2.toml:3:11: archives.vault: this is also at /conf.d/1.toml:4\n",
        "/conf.d/2.toml:6:9: notify.ops: this is also at /conf.d/1.toml:7\n",
        "/conf.d/2.toml:11:1: policies.b.zoness: unknown key\n    11 | zoness = …",
        "/conf.d/2.toml:12:",
        "/conf.d/3.toml:1:2: state: this is also at /conf.d/2.toml:8\n",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("elsewhere"), "a part of 2.toml can't be read, and may have it: {said}");
}

#[test]
fn what_others_could_change_is_refused_with_the_way_out() {
    let files =
        Files::new(&[("main.toml", MAIN), ("conf.d/a.toml", &policy("a")), ("conf.d/b.toml", &policy("b"))]);
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(files.path("conf.d/b.toml"), mode(0o666)).unwrap();
    let said = files.load().unwrap_err();
    for part in [
        "/main.toml:1:12: include: every user of this machine may change /conf.d/b.toml",
        "\n     1 | include = [\"conf.d/*.toml\"]\n",
        "chmod o-w /conf.d/b.toml",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    std::fs::set_permissions(files.path("conf.d/b.toml"), mode(0o664)).unwrap();
    assert_eq!(files.load().unwrap().policies.len(), 2);
    if chown(files.path("conf.d/b.toml"), Some(12345), None).is_err() {
        return skipped(format_args!("a file of somebody else: only root can give files away"));
    }
    let said = files.load().unwrap_err();
    let part = "include: /conf.d/b.toml belongs to user 12345, who could change it\n";
    assert!(said.contains(part) && said.contains("chown root /conf.d/b.toml"), "{said}");
    // Whoever may write the main file need not be kept from writing another.
    chown(files.path("main.toml"), Some(12345), None).unwrap();
    assert_eq!(files.load().unwrap().policies.len(), 2);
}

#[test]
fn what_is_no_readable_file_is_an_error_and_nothing_is_said_to_be_missing_for_it() {
    let files = Files::new(&[
        (
            "main.toml",
            &format!("{MAIN}[policies.a]\nzones = [\"z\"]\n[policies.a.export]\narchives = [\"vault\"]\n"),
        ),
        ("conf.d/ok.toml", &policy("b")),
    ]);
    files.write("conf.d/folder.toml/x", "");
    symlink("nowhere", files.path("conf.d/link.toml")).unwrap();
    files.write_bytes("conf.d/latin1.toml", b"a = \"\xe9\"");
    files.write_bytes("conf.d/large.toml", &vec![b'#'; 1024 * 1024 + 1]);
    let said = files.load().unwrap_err();
    for why in [
        "folder.toml: it is no file",
        "link.toml: No such file",
        "latin1.toml: stream did not contain valid UTF-8",
        "large.toml: it has more than 1048576 bytes",
    ] {
        assert!(said.contains(&format!("can't read /conf.d/{why}")), "{why}: {said}");
    }
    assert!(!said.contains("vault"), "it may stand in a file that can't be read: {said}");
}
