//! A simulated restic: the calls that an archive makes of it, over repositories in memory.
//!
//! As the real one, it saves a snapshot of whatever it has read once its input ends, none if it is killed before; it takes
//! data that it knows for stored; and it says the same things, by which a caller distinguishes failures.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, DuplexStream};

use crate::process::Command;
use crate::sim::processes::{Done, SimTool};

/// The simulated program. Clones are the same one, with the same repositories.
#[derive(Debug, Clone, Default)]
pub struct SimRestic {
    repositories: Arc<Mutex<BTreeMap<String, SimRepository>>>,
}

/// What a repository holds.
#[derive(Debug, Default)]
pub struct SimRepository {
    /// The snapshots, the oldest first.
    pub snapshots: Vec<SimSnapshot>,
    /// Whether another process has it locked, until `unlock` is called so often.
    pub locked_for: u32,
    /// Data that is lost: what has it can be saved again, and not be read.
    pub lost: Vec<Bytes>,
    /// The ids of snapshots whose files can't be read: a listing leaves them out, and ends well.
    pub unreadable: Vec<String>,
    /// Whether there is no space left.
    pub is_full: bool,
    /// How many snapshots were ever made.
    made: u64,
}

/// A snapshot of one file.
#[derive(Debug, Clone)]
pub struct SimSnapshot {
    /// Its id.
    pub id: String,
    /// The id of its tree.
    pub tree: String,
    /// The path of its file, with a slash at the beginning.
    pub path: String,
    /// As `--time` gave it.
    pub time: String,
    /// The machine.
    pub host: String,
    /// The content.
    pub bytes: Bytes,
}

impl SimRestic {
    /// Makes an empty repository, as `restic init` does.
    pub fn init(&self, repository: &str) {
        self.all().insert(repository.to_owned(), SimRepository::default());
    }

    /// Looks at a repository, or changes it.
    pub fn with<T>(&self, repository: &str, action: impl FnOnce(&mut SimRepository) -> T) -> Option<T> {
        self.all().get_mut(repository).map(action)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, SimRepository>> {
        self.repositories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a call that ends well writes to its standard error.
    fn complaints(&self, command: &Command) -> String {
        let repository = command.environment.get("RESTIC_REPOSITORY").cloned().unwrap_or_default();
        let all = self.all();
        let is_listing = command.arguments.first().is_some_and(|name| name == "snapshots");
        let unreadable = all.get(&repository).filter(|_| is_listing).map(|found| &*found.unreadable);
        let complaint = |id: &String| {
            let short = &id[..8];
            format!("could not load snapshot {short}: load <snapshot/{short}>: invalid data returned\n")
        };
        unreadable.unwrap_or_default().iter().map(complaint).collect()
    }

    fn call(&self, command: &Command, input: &Bytes) -> Result<Vec<u8>, (i32, String)> {
        let repository = command.environment.get("RESTIC_REPOSITORY").cloned().unwrap_or_default();
        let mut all = self.all();
        let Some(found) = all.get_mut(&repository) else {
            let text = format!(
                "Fatal: unable to open config file: stat {repository}/config: no such file or directory\nIs there a repository at \
                 the following location?\n{repository}\n"
            );
            return Err((1, text));
        };
        let (name, options, rest) = taken_apart(&command.arguments);
        if name == "unlock" {
            found.locked_for = found.locked_for.saturating_sub(1);
            return Ok(Vec::new());
        }
        if found.locked_for > 0 && !options.contains_key("--no-lock") {
            let text = "unable to create lock in backend: repository is already locked by PID 7 on backup-2 by root (UID 0, GID 0)\n";
            return Err((1, text.to_owned()));
        }
        match name {
            "backup" => found.backup(&options, input),
            "snapshots" => Ok(found.listing(&rest)),
            "dump" => found.dump(&rest),
            "forget" => {
                // Unknown ones are no error.
                found.snapshots.retain(|snapshot| !rest.contains(&&*snapshot.id));
                Ok(Vec::new())
            }
            "prune" => Ok(Vec::new()),
            other => Err((1, format!("unknown command \"{other}\" for \"restic\"\n"))),
        }
    }
}

/// The command, its options with their values, and what follows `--`.
fn taken_apart(arguments: &[String]) -> (&str, BTreeMap<&str, &str>, Vec<&str>) {
    const FLAGS: [&str; 4] = ["--json", "--quiet", "--stdin", "--no-lock"];
    let mut words = arguments.iter().map(String::as_str);
    let name = words.next().unwrap_or_default();
    let mut options = BTreeMap::new();
    while let Some(word) = words.next() {
        if word == "--" {
            break;
        }
        options.insert(word, if FLAGS.contains(&word) { "" } else { words.next().unwrap_or_default() });
    }
    (name, options, words.collect())
}

impl SimRepository {
    /// Adds a snapshot of a file, and returns its id.
    pub fn add(&mut self, path: &str, time: &str, host: &str, bytes: Bytes) -> String {
        self.made += 1;
        let mut tree = Sha256::new();
        for part in [path.as_bytes(), time.as_bytes(), &bytes] {
            tree.update(part);
        }
        // In their order, and different in their first eight characters.
        let id = format!("{:08x}{:056x}", self.made, 0);
        self.snapshots.push(SimSnapshot {
            id: id.clone(),
            tree: tree.finalize().iter().fold(String::new(), |tree, byte| tree + &format!("{byte:02x}")),
            path: path.to_owned(),
            time: time.to_owned(),
            host: host.to_owned(),
            bytes,
        });
        id
    }

    fn backup(&mut self, options: &BTreeMap<&str, &str>, input: &Bytes) -> Result<Vec<u8>, (i32, String)> {
        if self.is_full {
            return Err((
                1,
                "Fatal: unable to save snapshot: write /srv/x: no space left on device\n".to_owned(),
            ));
        }
        let option = |name: &str| options.get(name).copied().unwrap_or_default();
        let path = format!("/{}", option("--stdin-filename"));
        let id = self.add(&path, option("--time"), option("--host"), input.clone());
        let summary = json!({"message_type": "summary", "files_new": 1, "snapshot_id": &id[..8]});
        Ok(format!("{summary}\n").into_bytes())
    }

    fn listing(&self, ids: &[&str]) -> Vec<u8> {
        let is_meant = |snapshot: &&SimSnapshot| {
            !self.unreadable.contains(&snapshot.id)
                && (ids.is_empty() || ids.iter().any(|id| snapshot.id.starts_with(id)))
        };
        let row = |snapshot: &SimSnapshot| {
            json!({
                "time": format!("{}Z", snapshot.time.replace(' ', "T")),
                "tree": snapshot.tree,
                "paths": [snapshot.path],
                "hostname": snapshot.host,
                "username": "root",
                "tags": ["snapwarden"],
                "id": snapshot.id,
                "short_id": &snapshot.id[..8],
            })
        };
        Value::from(self.snapshots.iter().filter(is_meant).map(row).collect::<Vec<_>>())
            .to_string()
            .into_bytes()
    }

    fn dump(&self, rest: &[&str]) -> Result<Vec<u8>, (i32, String)> {
        let [id, path] = rest else {
            return Err((1, "Fatal: no file and no snapshot ID specified\n".to_owned()));
        };
        let Some(found) = self.snapshots.iter().find(|snapshot| snapshot.id == **id) else {
            return Err((
                1,
                format!("Fatal: invalid id \"{id}\": no matching ID found for prefix \"{id}\"\n"),
            ));
        };
        if found.path != **path || self.lost.contains(&found.bytes) {
            return Err((2, "cannot dump file: ReadFull(<data/52ddd96f5e>): open data/52/52ddd: no such file or directory\n".to_owned()));
        }
        Ok(found.bytes.to_vec())
    }
}

impl SimTool for SimRestic {
    fn run(&self, command: Command, mut input: DuplexStream) -> BoxFuture<'static, Done> {
        let restic = self.clone();
        Box::pin(async move {
            let mut bytes = Vec::new();
            if command.has_input {
                // What was read by then counts.
                let _ = input.read_to_end(&mut bytes).await;
            }
            match restic.call(&command, &bytes.into()) {
                Ok(stdout) => {
                    Done { stdout: stdout.into(), stderr: restic.complaints(&command), ..Done::default() }
                }
                Err((status, stderr)) => Done { stderr, status, ..Done::default() },
            }
        })
    }
}
