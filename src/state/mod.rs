//! The state directory: plain files.
//!
//! | file | holds |
//! | --- | --- |
//! | `audit.jsonl`, `audit-<month>.jsonl` | a line before and after everything that changes something ([`audit`]), each with the hash of the one before ([`audit_chain`]) |
//! | `policy-<name>.json`, `policy-<name>.<generation>.jsonl` | the creations and promotions of a policy, and later changes of them ([`policy_state`]) |
//! | `runs-<name>.json` | the results of its last runs, and the listings that they accepted ([`last_runs`]) |
//! | `listed-<zone>.json` | the snapshots of a zone as they were last listed, and those whose end is not explained ([`listed`]) |
//! | `shard.json` | which part of the instances the directory is about, if not all ([`shard`]) |
//! | `schedules.json` | how far the daemon served each schedule ([`schedules`]) |
//! | `directory.lock` | nothing: that it can be locked shows that runs may write here |
//! | `daemon.lock`, `daemon.json` | which daemon works on the directory, and where it listens ([`daemon`]) |
//! | `daemon.sock` | nothing: a socket that says whether that daemon's loop turns |
//! | `holds.json` | snapshots on hold ([`holds`]) |
//! | `allowances.json` | allowances to pass the guard ([`allowances`]) |
//! | `controls.json` | policies that are paused by hand, or to run now ([`controls`]) |
//! | `notifications.json` | what notifiers were notified of ([`notifications`]) |
//! | `archives.json` | which archives were used, and what was in them ([`archives`]) |
//! | `disagreement-<policy>-<zone>.json` | the last case about which the plan and the second judge disagreed ([`disagreements`]) |
//! | `policy-<name>.lock`, `zone-<name>.lock`, `create-<zone>.lock` | who runs, who deletes, who decides what is taken ([`directory::StateDirectory::lock_policy`]) |
//! | `holds.lock`, `allowances.lock`, `controls.lock`, `archives.lock`, `notifications.lock` | who changes what commands change beside a running daemon |
//! | `audit.lock` | who adds a line to the audit log |
//!
//! Every file is for its owner alone. But for those of lines, each is replaced in one step and carries a version. One that
//! root makes belongs to the directory's owner, so that a command beside the daemon takes nothing away from it. One that
//! can't be read is an error that names it, never an empty start: an empty state would do things twice.

pub mod allowances;
pub mod archives;
pub mod audit;
pub mod audit_chain;
pub mod controls;
pub mod daemon;
pub mod directory;
pub mod disagreements;
pub mod error;
mod file;
pub mod history;
pub mod holds;
pub mod last_runs;
pub mod listed;
mod locks;
pub mod notifications;
pub mod policy_state;
pub mod schedules;
pub mod shard;
