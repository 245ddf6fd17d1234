//! Images: real qcow2 files of any size that are computed where they are read, and stored nowhere.
//!
//! An image is version 3 without extensions: header, refcount table and blocks, L1 table, L2 tables, data.
//! The data is at the beginning of the virtual disk, one cluster after the other; the rest of the disk is
//! unallocated. Every data cluster holds the same pattern, made of the image's seed, under a first word of
//! its own: cheap to make, yet no two clusters and no two images are the same.

use std::ops::Range;
use std::sync::OnceLock;

use bytes::Bytes;

use crate::sim::randomness::nth;
use crate::text::hex;

const GIB: u64 = 1 << 30;

/// "Refcount is exactly one", in entries of L1 and L2 tables.
const COPIED: u64 = 1 << 63;

/// The shape of an instance's root disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    /// The size that the instance sees, in GiB; the API knows 10 to 51200.
    pub size_gib: u64,
    /// How many clusters hold data; these make the size of the image file.
    pub data_clusters: u64,
    /// A cluster has two to the power of this many bytes: 16 as usual, 12 to keep small images small.
    pub cluster_bits: u32,
}

impl Default for DiskShape {
    /// 10 GiB, of which 256 KiB are in use.
    fn default() -> Self {
        Self { size_gib: 10, data_clusters: 4, cluster_bits: 16 }
    }
}

impl DiskShape {
    /// A disk with this many MiB of data in clusters of 64 KiB, and no smaller than the API's least.
    pub fn with_data_mib(data_mib: u64) -> Self {
        Self { size_gib: data_mib.div_ceil(1024).max(10), data_clusters: data_mib * 16, cluster_bits: 16 }
    }
}

/// One image file.
#[derive(Debug)]
pub struct Image {
    shape: DiskShape,
    seed: u64,
    /// How many clusters each part has, in the order of the file.
    parts: Parts,
    md5: OnceLock<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Parts {
    refcount_table: u64,
    refcount_blocks: u64,
    l1_table: u64,
    l2_tables: u64,
}

impl Parts {
    fn before_data(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1_table + self.l2_tables
    }
}

impl Image {
    /// The image of a disk whose contents follow from `seed`.
    pub fn new(shape: DiskShape, seed: u64) -> Self {
        let cluster = 1_u64 << shape.cluster_bits;
        let entries = cluster / 8;
        let virtual_clusters = (shape.size_gib * GIB).div_ceil(cluster);
        let shape = DiskShape { data_clusters: shape.data_clusters.min(virtual_clusters), ..shape };
        let mut parts = Parts {
            l1_table: virtual_clusters.div_ceil(entries).div_ceil(entries),
            l2_tables: shape.data_clusters.div_ceil(entries),
            ..Parts::default()
        };
        // The blocks count themselves too: grow them until they cover everything.
        loop {
            let clusters = parts.before_data() + shape.data_clusters;
            let refcount_blocks = clusters.div_ceil(cluster / 2);
            let refcount_table = refcount_blocks.div_ceil(entries);
            if (refcount_blocks, refcount_table) == (parts.refcount_blocks, parts.refcount_table) {
                break;
            }
            parts = Parts { refcount_table, refcount_blocks, ..parts };
        }
        Self { shape, seed, parts, md5: OnceLock::new() }
    }

    /// The length of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        (self.parts.before_data() + self.shape.data_clusters) << self.shape.cluster_bits
    }

    /// The size of the virtual disk in bytes.
    pub fn virtual_bytes(&self) -> u64 {
        self.shape.size_gib * GIB
    }

    /// The MD5 of the file in lower-case hex; computed once, when it is first asked for.
    pub fn md5(&self) -> &str {
        self.md5.get_or_init(|| {
            let mut md5 = fast_md5::Md5::new();
            self.chunks(0..self.file_bytes()).for_each(|chunk| md5.update(&chunk));
            hex(&md5.finalize())
        })
    }

    /// The entity tag at the object store, which is not the MD5: the file was uploaded in parts.
    pub fn etag(&self) -> String {
        let parts = self.file_bytes().div_ceil(8 << 20);
        format!("\"{:016x}{:016x}-{parts}\"", nth(self.seed, u64::MAX), nth(self.seed, u64::MAX - 1))
    }

    /// The bytes of `range`, which must lie within the file, in chunks of at most a cluster.
    pub fn chunks(&self, range: Range<u64>) -> impl Iterator<Item = Bytes> + Send + 'static {
        let (shape, parts, bits) = (self.shape, self.parts, self.shape.cluster_bits);
        let mut pattern = Vec::with_capacity(1 << bits);
        (0..1_u64 << (bits - 3))
            .for_each(|word| pattern.extend_from_slice(&nth(self.seed, word).to_be_bytes()));
        (range.start >> bits..range.end.div_ceil(1 << bits)).map(move |number| {
            let cluster = Bytes::from(cluster(&shape, &parts, &pattern, number));
            let start = number << bits;
            let within = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX);
            cluster.slice(within(range.start)..within(range.end).min(cluster.len()))
        })
    }

    /// The bytes of `range`, which must lie within the file.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        self.chunks(range).fold(Vec::new(), |mut all, chunk| {
            all.extend_from_slice(&chunk);
            all
        })
    }
}

/// One cluster of the file.
fn cluster(shape: &DiskShape, parts: &Parts, pattern: &[u8], number: u64) -> Vec<u8> {
    let size = pattern.len();
    let entries = size as u64 / 8;
    let offset = |cluster: u64| cluster << shape.cluster_bits;
    // Big-endian words, as far as they go; the rest of the cluster is zero.
    let filled = |words: &mut dyn Iterator<Item = u64>| {
        let mut bytes = Vec::with_capacity(size);
        words.for_each(|word| bytes.extend_from_slice(&word.to_be_bytes()));
        bytes.resize(size, 0);
        bytes
    };
    let refcount_table = 1;
    let refcount_blocks = refcount_table + parts.refcount_table;
    let l1_table = refcount_blocks + parts.refcount_blocks;
    let l2_tables = l1_table + parts.l1_table;
    let data = parts.before_data();
    // The entries of a table's `part`-th cluster that point at `count` clusters from `first` on.
    let table = |part: u64, count: u64, first: u64, flag: u64| {
        let from = part * entries;
        filled(&mut (from..count.min(from + entries)).map(|entry| offset(first + entry) | flag))
    };
    if number >= data {
        let mut bytes = pattern.to_vec();
        bytes[..8].copy_from_slice(&(number - data).to_be_bytes());
        bytes
    } else if number >= l2_tables {
        table(number - l2_tables, shape.data_clusters, data, COPIED)
    } else if number >= l1_table {
        table(number - l1_table, parts.l2_tables, l2_tables, COPIED)
    } else if number >= refcount_blocks {
        // Four counts of 16 bits in a word: 1 for each cluster of the file.
        let all = data + shape.data_clusters;
        let first = (number - refcount_blocks) * (entries * 4);
        let counts = all.saturating_sub(first).min(entries * 4);
        let whole = usize::try_from(counts / 4).unwrap_or(usize::MAX);
        let ones = 0x0001_0001_0001_0001_u64;
        let rest = ones.checked_shl(64 - 16 * u32::try_from(counts % 4).unwrap_or(0)).unwrap_or(0);
        filled(&mut std::iter::repeat_n(ones, whole).chain((rest != 0).then_some(rest)))
    } else if number >= refcount_table {
        table(number - refcount_table, parts.refcount_blocks, refcount_blocks, 0)
    } else {
        let l1_entries = (shape.size_gib * GIB).div_ceil(size as u64).div_ceil(entries);
        filled(
            &mut [
                // "QFI\xfb" and version 3.
                0x5146_49fb_0000_0003,
                // No backing file; two words of 32 bits: its name's length, the cluster bits.
                0,
                u64::from(shape.cluster_bits),
                shape.size_gib * GIB,
                // No encryption; the entries of the L1 table.
                l1_entries,
                offset(l1_table),
                offset(refcount_table),
                // The refcount table's clusters; no internal snapshots.
                parts.refcount_table << 32,
                0,
                // No feature, neither incompatible, compatible nor auto-clear.
                0,
                0,
                0,
                // Refcounts of 2^4 bits; the header's length.
                (4 << 32) + 104,
                // The end of the (empty) list of extensions.
                0,
            ]
            .into_iter(),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const SMALL: DiskShape = DiskShape { size_gib: 10, data_clusters: 4, cluster_bits: 12 };

    #[test]
    fn qemu_finds_nothing_wrong_with_images_of_any_shape() {
        let shapes = [
            DiskShape::default(),
            SMALL,
            DiskShape { data_clusters: 0, ..SMALL },
            // More than one L2 table, more than one refcount block.
            DiskShape { data_clusters: 5000, ..SMALL },
            DiskShape { size_gib: 51_200, data_clusters: 1, cluster_bits: 16 },
        ];
        if Command::new("qemu-img").arg("--version").output().is_err() {
            crate::text::skipped(format_args!("qemu-img is not installed, so no image was checked by it"));
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        for shape in shapes {
            let image = Image::new(shape, 7);
            let path = folder.path().join("image.qcow2");
            std::io::copy(
                &mut image.read(0..image.file_bytes()).as_slice(),
                &mut std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(&path).unwrap(),
            )
            .unwrap();
            let checked =
                Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&checked.stdout).into_owned();
            assert!(checked.status.success(), "{shape:?}: {said}{checked:?}");
            assert!(said.contains("No errors were found"), "{shape:?}: {said}");
            let clusters =
                format!("{}/{} ", shape.data_clusters, (shape.size_gib * GIB) >> shape.cluster_bits);
            assert!(shape.data_clusters == 0 || said.contains(&clusters), "{shape:?}: {said}");
        }
    }

    #[test]
    fn any_part_reads_as_it_stands_in_the_whole() {
        let image = Image::new(SMALL, 3);
        let whole = image.read(0..image.file_bytes());
        assert_eq!(whole.len() as u64, image.file_bytes());
        for range in
            [0..1, 4095..4097, 5..5, 1..image.file_bytes(), image.file_bytes() - 1..image.file_bytes()]
        {
            let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
            assert_eq!(image.read(range), whole[start..end]);
        }
    }

    #[test]
    fn the_md5_is_of_the_whole_file_and_no_two_images_share_it() {
        use md5::Digest as _;
        let image = Image::new(SMALL, 3);
        let oracle = hex(&md5::Md5::digest(image.read(0..image.file_bytes())));
        assert_eq!(image.md5(), oracle);
        assert_ne!(image.md5(), Image::new(SMALL, 4).md5());
        assert!(!image.etag().contains(&oracle));
    }

    #[test]
    fn two_gibibytes_need_no_memory_before_they_are_read() {
        let image = Image::new(DiskShape::with_data_mib(2048), 1);
        assert!(image.file_bytes() > 2 << 30);
        let end = image.file_bytes();
        assert_eq!(image.read(end - 65_536..end).len(), 65_536);
    }
}
