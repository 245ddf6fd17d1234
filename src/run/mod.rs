//! One run of a policy: list → select → plan → create → export → promote → list again → plan again → delete → report.
//!
//! [`sequence`] is the order of all this, and [`preview`] shows it without changing anything; both work on a [`context`].
//! [`list`] reads a zone, [`plan`] decides, and [`guard`] may block the deletions of a zone, as does [`second_judge`]. [`create`], [`export`],
//! [`promote`], [`delete`] and [`archive_prune`] do the work, each step of it through [`step`], which writes it to the audit
//! log before and after. [`report`] is the result, [`coverage`] says which instances lack snapshots, `endings` how those snapshots ended that are not listed any more, and [`persist`] saves what the next run needs.
//! [`audit_heads`] keeps the end of the audit log in the archives, `archive_locks` locks the copies that stay, `archive_leftovers` removes what interrupted exports left. [`hooks`] starts the policy's programs around it. `retention` alone decides
//! which snapshots are kept.

pub mod archive_adopt;
pub mod archive_copy;
pub mod archive_holds;
mod archive_leftovers;
mod archive_locks;
mod archive_memory;
pub(crate) mod archive_presence;
pub mod archive_prune;
pub mod archive_retention;
mod archive_rules;
pub mod archive_verify;
pub mod audit_heads;
mod build_facts;
pub mod context;
pub mod coverage;
pub mod create;
pub mod delete;
pub mod details;
pub mod downloads;
mod endings;
pub mod export;
pub mod guard;
pub mod hooks;
pub mod instance_counts;
pub mod list;
pub mod pauses;
pub mod persist;
pub mod plan;
pub mod policy_memory;
pub mod preview;
pub mod promote;
pub mod report;
pub mod second_judge;
pub mod self_instance;
pub mod sequence;
pub mod shard_adopt;
pub(crate) mod single_export;
pub mod source;
pub mod step;
pub mod zone_run;
