//! Reads the structure of a qcow2 image: is it valid, and how large is the disk in it?
//!
//! The header and the tables are read while the bytes stream by: whatever the numbers in them say, nothing large is kept
//! and nothing overflows. Every table has to lie whole in the file, and so has every cluster with data. The format is that of QEMU's
//! `docs/interop/qcow2.txt`; the bounds are those that QEMU sets itself (`block/qcow2.h`).
//!
//! Refused is what can't be restored from this file alone (a backing file, an external data file, encryption)
//! and what this program does not know (features that a reader must understand).

mod tables;

use std::ops::RangeInclusive;

use crate::archive::qcow2::tables::{Layout, Tables};

/// The properties of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2 {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// The size of the disk in it, in bytes.
    pub virtual_size_bytes: u64,
    /// It was not closed properly: the first program that opens it has to repair its reference counts, without loss.
    pub dirty: bool,
}

/// Why a file is not a valid qcow2 image.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Qcow2Error(String, Cause);

/// What a [`Qcow2Error`] may come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The image was made like that.
    Made,
    /// A number makes no sense, so the bytes may have been damaged on their way.
    Nonsense,
}

/// The first bytes of every image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Clusters of 512 bytes to 2 MiB.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// QEMU's bounds: 32 MiB of L1 table, 8 MiB of refcount table, 65,536 internal snapshots.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u64 = 65_536;
/// The fixed part of an entry in the table of internal snapshots.
const SNAPSHOT_ENTRY_BYTES: u64 = 40;
const HEADER_V2: usize = 72;
const HEADER_V3: usize = 104;
/// Version 3 plus the byte for the kind of compression.
pub(super) const HEADER_BYTES: usize = 112;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;

/// Reads an image as its bytes stream by. Of them it keeps the header.
#[derive(Debug, Default)]
pub struct Checker {
    /// The bytes so far.
    bytes: u64,
    header: Header,
    /// None as long as the header is not there, or if it is not valid.
    tables: Option<Tables>,
}

impl Checker {
    /// Reads the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let at = self.bytes;
        self.bytes += bytes.len() as u64;
        let missing = HEADER_BYTES - self.header.0.len();
        if missing > 0 {
            self.header.0.extend(bytes.iter().take(missing));
            if self.header.0.len() == HEADER_BYTES {
                self.tables = self.header.check(u64::MAX).ok().map(|(_, layout)| Tables::new(layout));
            }
        }
        if let Some(tables) = &mut self.tables {
            tables.update(at, bytes);
        }
    }

    /// The properties of the image whose bytes have all been read.
    ///
    /// # Errors
    /// [`Qcow2Error`] if it is not valid.
    pub fn finish(&self) -> Result<Qcow2, Qcow2Error> {
        let len = self.bytes;
        let (qcow2, layout) = self.header.check(len)?;
        let tables = self.tables.as_ref().filter(|tables| tables.l1_bytes == layout.l1.end - layout.l1.start);
        let Some(tables) = tables else { return outside("L1 table", layout.l1.start, len) };
        if let Some(offset) = tables.impossible_l2.or_else(|| tables.missing_l2.first().copied()) {
            return outside("L2 table", offset, len);
        }
        for (kind, references) in [("refcount block", tables.refcount_blocks), ("data cluster", tables.data)]
        {
            let (end, offset) = references.furthest;
            if let Some(offset) = references.misaligned.or((end > len).then_some(offset)) {
                return outside(kind, offset, len);
            }
        }
        Ok(qcow2)
    }
}

/// Whether an image that begins with these bytes, [`HEADER_BYTES`] of them, can be restored. Numbers that make no sense are
/// left to the MD5, which shows whether the bytes were damaged on their way.
///
/// # Errors
/// [`Qcow2Error`] if it cannot, whatever follows.
pub(super) fn check_header(bytes: &[u8]) -> Result<(), Qcow2Error> {
    match Header(bytes.to_vec()).check(u64::MAX) {
        Err(error) if error.1 == Cause::Made => Err(error),
        _ => Ok(()),
    }
}

/// The bytes of the header so far.
#[derive(Debug, Default)]
struct Header(Vec<u8>);

impl Header {
    /// The properties of an image of `len` bytes with this header, and the places of its tables.
    fn check(&self, len: u64) -> Result<(Qcow2, Layout), Qcow2Error> {
        let header = self;
        if let Some(magic) = header.0.first_chunk()
            && *magic != MAGIC
        {
            return invalid(format!("it is no qcow2 image: it begins with {magic:02x?}"));
        }
        if header.0.len() < HEADER_V2 {
            return short(len);
        }

        let version = header.u32(4);
        if !(2..=3).contains(&version) {
            return number("version", version);
        }
        let mut features = 0;
        if version == 3 {
            if header.0.len() < HEADER_V3 {
                return short(len);
            }
            features = header.u64(72);
        }
        let cluster_bits = header.u32(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return number("cluster_bits", cluster_bits);
        }
        let cluster = 1_u64 << cluster_bits;
        if version == 3 {
            check_version_3(header, features, cluster, len)?;
        }
        if header.u64(8) != 0 {
            return needs_other("a backing file");
        }
        if header.u32(32) != 0 {
            let method = header.u32(32);
            return invalid(format!(
                "the image is encrypted (method {method}), so nothing in it can be checked"
            ));
        }

        let inside = |table: &str, offset: u64, size: u64| {
            let end = offset.checked_add(size);
            if offset >= cluster && offset.is_multiple_of(cluster) && end.is_some_and(|end| end <= len) {
                Ok(())
            } else {
                outside(table, offset, len)
            }
        };

        let virtual_size_bytes = header.u64(24);
        let (l1_size, l1_offset) = (u64::from(header.u32(36)), header.u64(40));
        if l1_size * 8 > L1_BYTES_MAX {
            return number("l1_size", l1_size);
        }
        let l2_entry = if features & EXTENDED_L2 == 0 { 8 } else { 16 };
        // At most 2^18 entries of 2^21 bytes each: no overflow.
        let covered_by_one_l2 = cluster / l2_entry * cluster;
        if virtual_size_bytes == 0 || virtual_size_bytes.div_ceil(covered_by_one_l2) > l1_size {
            return number("size", virtual_size_bytes);
        }
        inside("L1 table", l1_offset, l1_size * 8)?;

        let refcount_table_bytes = u64::from(header.u32(56)) << cluster_bits;
        if refcount_table_bytes == 0 || refcount_table_bytes > REFCOUNT_TABLE_BYTES_MAX {
            return number("refcount_table_clusters", header.u32(56));
        }
        inside("refcount table", header.u64(48), refcount_table_bytes)?;

        let snapshots = u64::from(header.u32(60));
        if snapshots > SNAPSHOTS_MAX {
            return number("nb_snapshots", snapshots);
        }
        if snapshots > 0 {
            inside("snapshot table", header.u64(64), snapshots * SNAPSHOT_ENTRY_BYTES)?;
        }
        let layout = Layout {
            cluster_bits,
            has_subclusters: features & EXTENDED_L2 != 0,
            l1: l1_offset..l1_offset + l1_size * 8,
            refcount_table: header.u64(48)..header.u64(48) + refcount_table_bytes,
        };
        Ok((Qcow2 { version, virtual_size_bytes, dirty: features & DIRTY != 0 }, layout))
    }

    /// The big-endian number at `at`; zero where nothing was read.
    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }
}

/// The fields that only version 3 has.
fn check_version_3(header: &Header, features: u64, cluster: u64, len: u64) -> Result<(), Qcow2Error> {
    if features & !KNOWN != 0 {
        let unknown = features & !KNOWN;
        return invalid(format!("the image needs features that are not known here (bits {unknown:#x})"));
    }
    if features & CORRUPT != 0 {
        return invalid("the image is marked as corrupt".to_owned());
    }
    if features & EXTERNAL_DATA != 0 {
        return needs_other("an external data file");
    }
    if header.u32(96) > 6 {
        return number("refcount_order", header.u32(96));
    }
    let header_length = u64::from(header.u32(100));
    if header_length < HEADER_V3 as u64 || header_length % 8 != 0 || header_length > cluster {
        return number("header_length", header_length);
    }
    if header_length > len {
        return short(len);
    }
    // 0 is deflate, 1 is zstd.
    let compression = if header_length > HEADER_V3 as u64 { header.0[104] } else { 0 };
    if compression > 1 || (compression == 0) == (features & COMPRESSION_TYPE != 0) {
        return number("compression_type", compression);
    }
    // Each entry has 32 subclusters of at least 512 bytes.
    if features & EXTENDED_L2 != 0 && cluster < 1 << 14 {
        return number("cluster_bits", cluster.trailing_zeros());
    }
    Ok(())
}

fn invalid<T>(why: String) -> Result<T, Qcow2Error> {
    Err(Qcow2Error(why, Cause::Made))
}

fn short<T>(len: u64) -> Result<T, Qcow2Error> {
    invalid(format!("the file ends inside its header, after {len} bytes"))
}

fn number<T>(field: &str, value: impl Into<u64>) -> Result<T, Qcow2Error> {
    let why = format!("the header says {field} = {}, which is not valid", value.into());
    Err(Qcow2Error(why, Cause::Nonsense))
}

fn outside<T>(table: &str, offset: u64, len: u64) -> Result<T, Qcow2Error> {
    let why = format!(
        "the {table} at byte {offset} does not lie whole in the file's {len} bytes, or is not aligned"
    );
    Err(Qcow2Error(why, Cause::Nonsense))
}

fn needs_other<T>(file: &str) -> Result<T, Qcow2Error> {
    invalid(format!("the image needs another file ({file}), so it holds less than the disk"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::archive::testing::{GIB, image, put};
    use crate::disk::{Access, RealDisk, read_file, replace_file};
    use crate::sim::image::{DiskShape, Image};
    use proptest::prelude::*;

    const LEN: usize = 5 << 16;

    fn read(bytes: &[u8], piece: usize) -> Result<Qcow2, Qcow2Error> {
        let mut checker = Checker::default();
        bytes.chunks(piece).for_each(|piece| checker.update(piece));
        checker.finish()
    }

    fn read_bytes(bytes: &[u8]) -> Result<Qcow2, Qcow2Error> {
        read(bytes, 1000)
    }

    /// The verdict on a valid image with other bytes at a place.
    fn with(at: usize, what: &[u8]) -> String {
        let mut bytes = image(LEN, 1);
        put(&mut bytes, at, what);
        read_bytes(&bytes).map_or_else(|error| error.to_string(), |found| format!("{found:?}"))
    }

    #[test]
    fn a_valid_image_gives_its_version_and_disk_size() {
        let expected = Qcow2 { version: 3, virtual_size_bytes: 10 * GIB, dirty: false };
        assert_eq!(read_bytes(&image(LEN, 1)).unwrap(), expected);
        assert!(with(4, &2_u32.to_be_bytes()).contains("version: 2"));
        assert!(with(72, &DIRTY.to_be_bytes()).contains("dirty: true"));
    }

    #[test]
    fn what_is_not_valid_is_named() {
        let number =
            |field: &str, value: u64| format!("the header says {field} = {value}, which is not valid");
        let max = u64::MAX.to_be_bytes();
        let cases: Vec<(usize, Vec<u8>, String)> = vec![
            (0, b"VMDK".to_vec(), "it is no qcow2 image: it begins with [56, 4d, 44, 4b]".to_owned()),
            (4, 1_u32.to_be_bytes().into(), number("version", 1)),
            (4, 4_u32.to_be_bytes().into(), number("version", 4)),
            (8, 1_u64.to_be_bytes().into(), "a backing file".to_owned()),
            (20, 8_u32.to_be_bytes().into(), number("cluster_bits", 8)),
            (20, 22_u32.to_be_bytes().into(), number("cluster_bits", 22)),
            (20, u32::MAX.to_be_bytes().into(), number("cluster_bits", u32::MAX.into())),
            (24, 0_u64.to_be_bytes().into(), number("size", 0)),
            (24, max.into(), number("size", u64::MAX)),
            (24, (10 * GIB + 1).to_be_bytes().into(), number("size", 10 * GIB + 1)),
            (32, 2_u32.to_be_bytes().into(), "the image is encrypted (method 2)".to_owned()),
            (36, u32::MAX.to_be_bytes().into(), number("l1_size", u32::MAX.into())),
            (36, 40_000_u32.to_be_bytes().into(), "the L1 table at byte 196608".to_owned()),
            (40, max.into(), "the L1 table".to_owned()),
            (40, 0_u64.to_be_bytes().into(), "the L1 table at byte 0".to_owned()),
            (40, 65_537_u64.to_be_bytes().into(), "or is not aligned".to_owned()),
            (40, (LEN as u64).to_be_bytes().into(), "the L1 table".to_owned()),
            (48, max.into(), "the refcount table".to_owned()),
            (48, (LEN as u64).to_be_bytes().into(), "the refcount table".to_owned()),
            (56, 0_u32.to_be_bytes().into(), number("refcount_table_clusters", 0)),
            (56, 5_u32.to_be_bytes().into(), "the refcount table".to_owned()),
            (56, u32::MAX.to_be_bytes().into(), number("refcount_table_clusters", u32::MAX.into())),
            (60, 1_u32.to_be_bytes().into(), "the snapshot table at byte 0".to_owned()),
            (60, u32::MAX.to_be_bytes().into(), number("nb_snapshots", u32::MAX.into())),
            (72, CORRUPT.to_be_bytes().into(), "marked as corrupt".to_owned()),
            (72, EXTERNAL_DATA.to_be_bytes().into(), "an external data file".to_owned()),
            (72, COMPRESSION_TYPE.to_be_bytes().into(), number("compression_type", 0)),
            (72, (1_u64 << 40).to_be_bytes().into(), "not known here (bits 0x10000000000)".to_owned()),
            (96, 7_u32.to_be_bytes().into(), number("refcount_order", 7)),
            (100, 96_u32.to_be_bytes().into(), number("header_length", 96)),
            (100, 107_u32.to_be_bytes().into(), number("header_length", 107)),
            (100, u32::MAX.to_be_bytes().into(), number("header_length", u32::MAX.into())),
            (3 << 16, (LEN as u64 + 65_536).to_be_bytes().into(), "the L2 table at byte 393216".to_owned()),
            ((3 << 16) + 19 * 8, 512_u64.to_be_bytes().into(), "the L2 table at byte 512".to_owned()),
        ];
        for (at, what, expected) in cases {
            let found = with(at, &what);
            assert!(found.contains(&expected), "{at}: {found}");
        }
    }

    #[test]
    fn a_file_cut_anywhere_before_its_tables_end_is_refused() {
        let bytes = image(LEN, 1);
        let end_of_l1 = (3 << 16) + 20 * 8;
        for len in (0..end_of_l1).step_by(997).chain([71, 72, 103, 104, end_of_l1 - 1]) {
            assert!(read_bytes(&bytes[..len]).is_err(), "{len}");
        }
        assert!(read_bytes(&bytes[..end_of_l1]).is_ok());
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(header in proptest::collection::vec(any::<u8>(), 108), plain in any::<bool>()) {
            let mut bytes = image(LEN, 1);
            put(&mut bytes, if plain { 8 } else { 24 }, &header[..80]);
            let _ = read_bytes(&bytes);
            put(&mut bytes, 4, &header[4..]);
            let _ = read_bytes(&bytes);
        }
    }

    proptest! {
        #[test]
        fn the_verdict_is_the_same_however_the_bytes_are_split(
            // Mostly plausible numbers at the places that matter.
            edits in proptest::collection::vec(
                (
                    prop_oneof![
                        prop::sample::select(vec![0_usize, 4, 8, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 96, 100, 104]),
                        (3_usize << 16)..(3 << 16) + 160,
                    ],
                    prop_oneof![0_u64..4, (0_u64..8).prop_map(|n| n << 16), (0_u64..24).prop_map(|n| n << 32), any::<u64>()],
                    any::<bool>(),
                ),
                0..4,
            ),
            len in prop_oneof![Just(LEN), 0_usize..LEN, (3_usize << 16)..(3 << 16) + 200],
            pieces in prop_oneof![1_usize..9, 100_usize..70_000],
        ) {
            let mut bytes = image(LEN, 1);
            for (at, number, wide) in edits {
                let number = number.to_be_bytes();
                put(&mut bytes, at, if wide { &number } else { &number[4..] });
            }
            let bytes = &bytes[..len];
            let (whole, split) = (read(bytes, LEN), read(bytes, pieces));
            prop_assert_eq!(format!("{whole:?}"), format!("{split:?}"));
        }
    }

    /// The verdict after each cluster of these bytes, and in the middle of each.
    fn verdicts(bytes: &[u8], cluster: usize) -> Vec<(usize, Result<Qcow2, Qcow2Error>)> {
        let (mut checker, mut len) = (Checker::default(), 0);
        let mut verdicts = Vec::new();
        for piece in bytes.chunks(cluster / 2) {
            checker.update(piece);
            len += piece.len();
            verdicts.push((len, checker.finish()));
        }
        verdicts
    }

    #[test]
    fn an_image_cut_anywhere_inside_its_tables_or_data_is_refused() {
        let small = DiskShape { size_gib: 10, data_clusters: 4, cluster_bits: 12 };
        let shapes = [DiskShape::default(), small, DiskShape { data_clusters: 1500, ..small }];
        for shape in shapes {
            let image = Image::new(shape, 3);
            let bytes = image.read(0..image.file_bytes());
            let verdicts = verdicts(&bytes, 1 << shape.cluster_bits);
            let (whole, cut) = verdicts.split_last().unwrap();
            assert!(whole.1.is_ok(), "{shape:?}: {whole:?}");
            for (len, verdict) in cut {
                assert!(verdict.is_err(), "{shape:?} cut at {len}");
            }
            let error = cut.last().unwrap().1.as_ref().unwrap_err().to_string();
            assert!(error.starts_with("the data cluster at byte "), "{error}");
        }
    }

    #[test]
    fn an_l1_table_behind_the_tables_and_the_data_is_read_too() {
        let shape = DiskShape { size_gib: 10, data_clusters: 1500, cluster_bits: 12 };
        let image = Image::new(shape, 3);
        let mut bytes = image.read(0..image.file_bytes());
        let from = usize::try_from(u64::from_be_bytes(*bytes[40..].first_chunk().unwrap())).unwrap();
        let l1_bytes = usize::try_from(u32::from_be_bytes(*bytes[36..].first_chunk().unwrap())).unwrap() * 8;
        let l2 = u64::from_be_bytes(*bytes[from..].first_chunk().unwrap()) & 0x00ff_ffff_ffff_fe00;
        // As after the disk was enlarged.
        let end = bytes.len();
        let l1 = bytes[from..from + l1_bytes].to_vec();
        bytes[from..from + l1_bytes].fill(0);
        bytes.extend(l1);
        put(&mut bytes, 40, &(end as u64).to_be_bytes());
        assert!(read_bytes(&bytes).is_ok(), "{:?}", read_bytes(&bytes));
        assert!(read_bytes(&bytes[..bytes.len() - 1]).is_err());
        // One of the L2 tables refers to a cluster behind the end.
        let behind = (bytes.len() as u64).next_multiple_of(1 << 12);
        put(&mut bytes, usize::try_from(l2).unwrap() + 80, &(1 << 63 | behind).to_be_bytes());
        for piece in [1000, 4096, 1 << 20] {
            let error = read(&bytes, piece).unwrap_err().to_string();
            assert!(error.contains(&format!("data cluster at byte {behind}")), "{error}");
        }
    }

    /// Runs a program of QEMU; none where it is not installed.
    fn qemu(program: &str, arguments: &[&str]) -> Option<std::process::Output> {
        match Command::new(program).args(arguments).output() {
            Ok(output) => Some(output),
            Err(error) => {
                crate::text::skipped(format_args!("{program} does not run here: {error}"));
                None
            }
        }
    }

    #[test]
    fn an_image_by_qemu_is_valid_whole_and_refused_wherever_qemu_img_refuses_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let raw: Vec<u8> = (0..700_000_u64).map(|n| (n.wrapping_mul(n) >> 7).to_be_bytes()[7]).collect();
        replace_file(&RealDisk, folder.path().join("raw").as_path(), &raw, Access::Owner).unwrap();
        let kinds: [(&str, &[&str]); 9] = [
            ("plain", &[]),
            ("version 2", &["-o", "compat=0.10"]),
            ("small clusters", &["-o", "cluster_size=4k"]),
            ("smallest clusters", &["-o", "cluster_size=512"]),
            ("compressed", &["-c"]),
            ("compressed by zstd", &["-c", "-o", "compression_type=zstd"]),
            ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"]),
            ("allocated before", &["-o", "preallocation=metadata"]),
            ("enlarged, with an internal snapshot", &["-o", "cluster_size=4k"]),
        ];
        for (kind, options) in kinds {
            let (source, image, cut) = (at("raw"), at("image"), at("cut"));
            let convert = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[&source, &image]].concat();
            let Some(made) = qemu("qemu-img", &convert) else { return };
            assert!(made.status.success(), "{kind}: {made:?}");
            if kind.starts_with("enlarged") {
                // The L1 table is moved behind the data, and more data follows.
                for arguments in [&["resize", &image, "8G"][..], &["snapshot", "-c", "one", &image]] {
                    let done = qemu("qemu-img", arguments).unwrap();
                    assert!(done.status.success(), "{done:?}");
                }
                let write = ["-f", "qcow2", "-c", "write -P 7 0 100k", "-c", "write -P 8 7G 30k", &image];
                let Some(done) = qemu("qemu-io", &write) else { continue };
                assert!(done.status.success(), "{done:?}");
            }
            let bytes = read_file(&RealDisk, Path::new(&image), 1 << 30).unwrap();
            assert!(read_bytes(&bytes).is_ok(), "{kind}: {:?}", read_bytes(&bytes));
            for part in 1..12 {
                let len = (bytes.len() * part / 12).next_multiple_of(512);
                replace_file(&RealDisk, Path::new(&cut), &bytes[..len], Access::Owner).unwrap();
                let checked = qemu("qemu-img", &["check", "-f", "qcow2", &cut]).unwrap();
                let verdict = read_bytes(&bytes[..len]);
                assert!(checked.status.success() || verdict.is_err(), "{kind} cut at {len}: {checked:?}");
            }
        }
    }

    #[test]
    fn what_qemu_img_makes_is_valid_and_what_needs_more_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let create = |name: &str, arguments: &[&str]| {
            let path = folder.path().join(name);
            let output = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .args(arguments)
                .arg(&path)
                .arg("64M")
                .output();
            match output {
                Ok(output) => {
                    assert!(output.status.success(), "{output:?}");
                    Some(read_bytes(&read_file(&RealDisk, &path, 1 << 30).unwrap()))
                }
                Err(error) => {
                    crate::text::skipped(format_args!("qemu-img does not run here: {error}"));
                    None
                }
            }
        };
        let valid: [(&str, u32); 7] = [
            ("compat=0.10", 2),
            ("compat=1.1", 3),
            ("cluster_size=512", 3),
            ("cluster_size=2M", 3),
            ("extended_l2=on,cluster_size=128k", 3),
            ("preallocation=metadata", 3),
            ("lazy_refcounts=on,refcount_bits=64,compression_type=zstd", 3),
        ];
        for (options, version) in valid {
            let Some(found) = create("valid", &["-o", options]) else { return };
            assert_eq!(
                found.unwrap(),
                Qcow2 { version, virtual_size_bytes: 64 << 20, dirty: false },
                "{options}"
            );
        }
        let backed = create("backed", &["-b", "valid", "-F", "qcow2"]).unwrap();
        assert!(backed.as_ref().is_err_and(|error| error.0.contains("(a backing file)")), "{backed:?}");
        let data = format!("data_file={}", folder.path().join("data").display());
        let external = create("external", &["-o", &data]).unwrap();
        assert!(
            external.as_ref().is_err_and(|error| error.0.contains("(an external data file)")),
            "{external:?}"
        );
    }
}
