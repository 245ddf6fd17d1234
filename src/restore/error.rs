//! Why a restore is not possible.

use std::fmt::Write as _;
use std::path::PathBuf;

use jiff::Timestamp;

use crate::archive::copy_reader::ReadError;
use crate::archive::s3::error::S3Error;
use crate::archive::store::TEMPLATE_VIRTUAL_MAX;
use crate::archive::transfer::sink::{SinkError, shown};
use crate::exoscale::error::ApiError;
use crate::lookup::{Kind, LookupError};
use crate::policy::name::ArchiveName;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::text::printable;

/// Why a copy was not restored. The copy is unchanged, and so is everything that existed before.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No archive has a copy of the snapshot.
    #[error(
        "no archive has a verified copy of snapshot {id}{}: `snapwarden archive list` shows the copies that exist",
        listed(.notes)
    )]
    NoCopy {
        /// The snapshot.
        id: SnapshotId,
        /// Facts that explain it, each a sentence.
        notes: Vec<String>,
    },
    /// No archive has a copy of anything that is named so.
    #[error(
        "no archive has a verified copy of {} with the id or name `{}`{}: `snapwarden archive list` shows the copies that exist",
        match .kind { Kind::Snapshot => "a snapshot", Kind::Instance => "an instance" },
        printable(.text),
        listed(.notes)
    )]
    NothingNamed {
        /// What was looked for.
        kind: Kind,
        /// What the user gave.
        text: String,
        /// Facts that explain it, each a sentence.
        notes: Vec<String>,
    },
    /// Several snapshots or instances are named so.
    #[error(transparent)]
    Ambiguous(LookupError),
    /// Every copy of the instance is too new.
    #[error("instance {instance_id} has no verified copy from before {before}: the oldest is from {oldest}")]
    NoneBefore {
        /// The instance.
        instance_id: InstanceId,
        /// The limit that was asked for.
        before: Timestamp,
        /// When the oldest copy's snapshot was taken.
        oldest: Timestamp,
    },
    /// The newest copy may be in an archive that cannot be read.
    #[error(
        "the newest copy may be in an archive that cannot be read{}\nto take the newest copy of another archive, name that archive with `--archive`",
        listed(.0)
    )]
    NewestUnknown(Vec<String>),
    /// The path has no file name.
    #[error("`{}` is not a file name", shown(.0))]
    NoFileName(PathBuf),
    /// The path exists.
    #[error("{} already exists, and nothing is overwritten: give another name, or move it away", shown(.0))]
    FileExists(PathBuf),
    /// The temporary file exists.
    #[error(
        "{} already exists: it may belong to a restore that is still running; if none is running, remove it",
        shown(.0)
    )]
    PartExists(PathBuf),
    /// The file system is too small.
    #[error(
        "the image has {needs} bytes, and {free} bytes are free in {}: free some space there, or restore it elsewhere",
        shown(.folder)
    )]
    NoSpace {
        /// The folder of the new file.
        folder: PathBuf,
        /// In bytes.
        needs: u64,
        /// In bytes.
        free: u64,
    },
    /// The destination failed.
    #[error(transparent)]
    Destination(#[from] SinkError),
    /// The bucket on the way to a template cannot be used.
    #[error("store it in archive `{archive}`")]
    Bucket {
        /// The bucket's archive.
        archive: ArchiveName,
        /// The cause.
        #[source]
        source: Box<S3Error>,
    },
    /// The bucket on the way to a template is not the archive that was used before, or it can't get its marker.
    #[error("store it in archive `{archive}`: {why}")]
    NotThere {
        /// The bucket's archive.
        archive: ArchiveName,
        /// The cause, with what to do.
        why: String,
    },
    /// A copy is unreadable or damaged; another archive's copy may serve.
    #[error(transparent)]
    Copy(ReadError),
    /// Every copy is unreadable or damaged, or the destination failed after one was. Each cause is a sentence.
    #[error("no copy of it could be restored: {}", .0.join("; "))]
    NoGoodCopy(Vec<String>),
    /// The bytes that were written are not all of the image, or not right.
    #[error(
        "what was written to the standard output ({written} bytes) is not the image, and must not be used: throw it away and try \
         again: {why}"
    )]
    HalfWritten {
        /// In bytes.
        written: u64,
        /// The cause, as a sentence.
        why: String,
    },
    /// A template needs a bucket.
    #[error(
        "the platform fetches a template's image from a URL, so a template needs an archive of type `s3`, and the \
         configuration has no usable one: add one, or restore to a file with `--to` and put it where the platform can \
         fetch it"
    )]
    NoBucket,
    /// The bucket's own retention removed the copy.
    #[error(
        "archive {0} had a copy of it that its retention removed, and does not store it again: name another archive of \
         type `s3`, or restore to a file with `--to`"
    )]
    PrunedInBucket(ArchiveName),
    /// The disk is larger than templates are documented for.
    #[error(
        "the disk has {} GiB, and templates are documented for at most {} GiB, so the platform may refuse it after hours: add \
         `--force` to try it all the same, or restore to a file with `--to`",
        .disk_bytes.div_ceil(1 << 30), TEMPLATE_VIRTUAL_MAX >> 30
    )]
    TooLargeForTemplate {
        /// The size of the disk in bytes.
        disk_bytes: u64,
    },
    /// The boot mode is unknown.
    #[error(
        "the manifest does not record the boot mode of the instance, since its template was unreadable during the \
         export: add `--boot-mode legacy` or `--boot-mode uefi` (an instance with the wrong one does not boot; the \
         template can then be made again)"
    )]
    NoBootMode,
    /// The zone has a template of this name.
    #[error(
        "zone {zone} already has a template named {} ({id}), perhaps from an earlier restore: use it, or give another \
         name",
        printable(.name)
    )]
    TemplateExists {
        /// The zone.
        zone: ZoneName,
        /// The name.
        name: String,
        /// The existing template.
        id: TemplateId,
    },
    /// There is no such instance.
    #[error(
        "zone {zone} has no instance {id}: one that was deleted can be built again, by `snapwarden restore … --to-template NAME`"
    )]
    NoInstance {
        /// The zone.
        zone: ZoneName,
        /// The instance.
        id: InstanceId,
    },
    /// There is no such snapshot any more.
    #[error(
        "zone {zone} has no snapshot {id}: of one that was exported, `snapwarden restore {id} --to-instance …` has the copy"
    )]
    NoSnapshot {
        /// The zone.
        zone: ZoneName,
        /// The snapshot.
        id: SnapshotId,
    },
    /// The API does not say whose snapshot it is.
    #[error("the API does not say which instance snapshot {0} is of")]
    Orphan(SnapshotId),
    /// The snapshot is not whole.
    #[error("snapshot {id} is in state `{}`, so no instance can be reverted to it", printable(.state))]
    NotGood {
        /// The snapshot.
        id: SnapshotId,
        /// Its state in the API's words.
        state: String,
    },
    /// An instance pool or an SKS node pool makes and removes the instance.
    #[error(
        "instance {0} belongs to an instance pool or an SKS node pool, which may replace it at any time: change the template of \
         the pool instead"
    )]
    Managed(InstanceId),
    /// The image does not fit.
    #[error(
        "the disk of instance {id} has {disk_gib} GiB, and the image needs {} GiB: enlarge the disk first, by `exo compute instance \
         resize-disk`",
        .needs.div_ceil(1 << 30)
    )]
    SmallerDisk {
        /// The instance.
        id: InstanceId,
        /// The size of its disk in GiB.
        disk_gib: u64,
        /// In bytes.
        needs: u64,
    },
    /// A size that decides is missing.
    #[error("{0} is not known, so whether the image fits on the disk is not known either")]
    SizeUnknown(&'static str),
    /// The copy is of another instance.
    #[error(
        "the copy is of instance {of}{}, not of instance {id}: add `--from-other` if that is meant",
        .name.as_deref().map_or_else(String::new, |name| format!(" ({})", printable(name)))
    )]
    OfOther {
        /// The copy's instance.
        of: InstanceId,
        /// The name of that.
        name: Option<String>,
        /// The instance that was given.
        id: InstanceId,
    },
    /// The API failed.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Each note on a line of its own.
fn listed(notes: &[String]) -> String {
    notes.iter().fold(String::new(), |mut text, note| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {note}");
        text
    })
}
