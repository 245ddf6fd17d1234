//! Reads the tables of a qcow2 image as its bytes stream by: do all clusters that they refer to lie in the file?
//!
//! Kept are the offsets of the L2 tables that are still to be read (8 bytes for 512 MiB of the disk where clusters have
//! 64 KiB), and of everything else only what reaches furthest. An L1 table usually lies before the L2 tables. One that
//! was moved, since the disk was enlarged, lies behind them: so each cluster before it that can be read as an L2 table is
//! read as one, and the result is kept until the L1 table shows whether it is one.

use std::collections::BTreeSet;
use std::ops::Range;

/// The bits of an L1 entry, and of an L2 entry that is not compressed, that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const REFCOUNT_BLOCK_OFFSET: u64 = !0x1ff;
/// The bits of an L2 entry that are zero in every image.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
/// Without subclusters: the cluster reads as zeros.
const ZEROS: u64 = 1;
/// Compressed data is counted in these.
const SECTOR_BYTES: u64 = 512;
/// More tables before the L1 table are not looked into: 32 TiB of a disk with clusters of 64 KiB, and 2 MiB of memory.
const EARLY_MAX: usize = 1 << 16;

/// The places of the tables that the header gives.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) cluster_bits: u32,
    /// An L2 entry has a second word, of subclusters.
    pub(super) has_subclusters: bool,
    pub(super) l1: Range<u64>,
    pub(super) refcount_table: Range<u64>,
}

impl Layout {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster())
    }
}

/// What tables refer to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct References {
    /// The end of the bytes that have to be in the file, and where the cluster that they are in begins.
    pub(super) furthest: (u64, u64),
    /// The first offset that is not aligned.
    pub(super) misaligned: Option<u64>,
}

impl References {
    fn merge(&mut self, other: Self) {
        self.furthest = self.furthest.max(other.furthest);
        self.misaligned = self.misaligned.or(other.misaligned);
    }

    fn add(&mut self, layout: &Layout, offset: u64, needed: u64) {
        if !layout.is_aligned(offset) {
            self.misaligned.get_or_insert(offset);
        }
        self.furthest = self.furthest.max((offset.saturating_add(needed), offset));
    }
}

/// One L2 table that is being read.
#[derive(Debug, Default)]
struct L2 {
    references: References,
    /// The first word of an entry of two.
    entry: Option<u64>,
    /// Reserved bits are set: this is hardly a table.
    is_odd: bool,
}

impl L2 {
    fn read(&mut self, layout: &Layout, words: &[[u8; 8]]) {
        for word in words {
            let word = u64::from_be_bytes(*word);
            if !layout.has_subclusters {
                self.add(layout, word, if word & ZEROS == 0 { u32::MAX } else { 0 });
            } else if let Some(entry) = self.entry.take() {
                let [_, _, _, _, allocated @ ..] = word.to_be_bytes();
                self.add(layout, entry, u32::from_be_bytes(allocated));
            } else {
                self.entry = Some(word);
            }
        }
    }

    /// Adds an entry of which these of 32 subclusters hold data.
    fn add(&mut self, layout: &Layout, entry: u64, allocated: u32) {
        if entry & COMPRESSED != 0 {
            let bits = 62 - (layout.cluster_bits - 8);
            let offset = entry & ((1 << bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
            let end = offset - offset % SECTOR_BYTES + sectors * SECTOR_BYTES;
            self.references.furthest = self.references.furthest.max((end, offset));
            return;
        }
        self.is_odd |= entry & RESERVED != 0;
        let offset = entry & OFFSET;
        if offset != 0 {
            let subclusters = u64::from(u32::BITS - allocated.leading_zeros());
            // One that is set aside for data and reads as zeros only begins in the file.
            self.references.add(layout, offset, (layout.cluster() / 32 * subclusters).max(1));
        }
    }

    fn is_plausible(&self) -> bool {
        !self.is_odd && self.references.misaligned.is_none()
    }
}

/// The tables of an image, as far as they were read.
#[derive(Debug)]
pub(super) struct Tables {
    layout: Layout,
    /// The bytes of a word that is not complete.
    word: u64,
    pub(super) refcount_blocks: References,
    /// Bytes of the L1 table that were read.
    pub(super) l1_bytes: u64,
    /// The first offset in the L1 table at which no L2 table can be.
    pub(super) impossible_l2: Option<u64>,
    /// L2 tables that are still to be read, at least to their ends.
    pub(super) missing_l2: BTreeSet<u64>,
    l2: L2,
    /// A cluster before the L1 table, as long as it reads as an L2 table.
    candidate: Option<L2>,
    /// Clusters before the L1 table that read as L2 tables, in their order.
    early: Vec<(u64, References)>,
    pub(super) data: References,
}

impl Tables {
    pub(super) fn new(layout: Layout) -> Self {
        Self {
            layout,
            word: 0,
            refcount_blocks: References::default(),
            l1_bytes: 0,
            impossible_l2: None,
            missing_l2: BTreeSet::new(),
            l2: L2::default(),
            candidate: None,
            early: Vec::new(),
            data: References::default(),
        }
    }

    /// Reads the next bytes, the first of which is at `at`.
    pub(super) fn update(&mut self, mut at: u64, mut bytes: &[u8]) {
        while let Some((byte, rest)) = bytes.split_first().filter(|_| !at.is_multiple_of(8)) {
            self.word = self.word << 8 | u64::from(*byte);
            (at, bytes) = (at + 1, rest);
            if at.is_multiple_of(8) {
                self.read(at - 8, &[self.word.to_be_bytes()]);
            }
        }
        let (words, rest) = bytes.as_chunks();
        self.read(at, words);
        for byte in rest {
            self.word = self.word << 8 | u64::from(*byte);
        }
    }

    fn read(&mut self, at: u64, words: &[[u8; 8]]) {
        for block in within(words, at, &self.layout.refcount_table).1 {
            let offset = u64::from_be_bytes(*block) & REFCOUNT_BLOCK_OFFSET;
            if offset != 0 {
                self.refcount_blocks.add(&self.layout, offset, self.layout.cluster());
            }
        }
        self.read_early(at, words);
        let (_, l1) = within(words, at, &self.layout.l1);
        for entry in l1 {
            self.add_l2(u64::from_be_bytes(*entry) & OFFSET);
        }
        self.l1_bytes += l1.as_flattened().len() as u64;
        self.read_l2(at, words);
    }

    /// Reads the clusters before the L1 table.
    fn read_early(&mut self, at: u64, words: &[[u8; 8]]) {
        let cluster = self.layout.cluster();
        let (mut at, mut words) = within(words, at, &(cluster..self.layout.l1.start));
        while !words.is_empty() {
            let begin = at - at % cluster;
            let left = usize::try_from((begin + cluster - at) / 8).unwrap_or(usize::MAX);
            let (piece, rest) = words.split_at(left.min(words.len()));
            if at == begin {
                self.candidate = Some(L2::default());
            }
            // Data is known by its first words.
            for part in piece.chunks(32) {
                let Some(l2) = &mut self.candidate else { break };
                l2.read(&self.layout, part);
                self.candidate = self.candidate.take().filter(L2::is_plausible);
            }
            (at, words) = (at + piece.as_flattened().len() as u64, rest);
            if at == begin + cluster
                && let Some(l2) = self.candidate.take()
                && l2.references.furthest.0 > 0
                && self.early.len() < EARLY_MAX
            {
                self.early.push((begin, l2.references));
            }
        }
    }

    /// The L1 table refers to an L2 table; 0 means that there is none: zeros.
    fn add_l2(&mut self, offset: u64) {
        let l1 = &self.layout.l1;
        if offset == 0 {
            return;
        }
        if !self.layout.is_aligned(offset) || l1.contains(&offset) {
            self.impossible_l2.get_or_insert(offset);
        } else if offset > l1.start {
            self.missing_l2.insert(offset);
        } else if let Ok(found) = self.early.binary_search_by_key(&offset, |(at, _)| *at) {
            self.data.merge(self.early[found].1);
        }
    }

    fn read_l2(&mut self, at: u64, words: &[[u8; 8]]) {
        while let Some(offset) = self.missing_l2.first().copied() {
            let end = offset + self.layout.cluster();
            let (from, piece) = within(words, at, &(offset..end));
            if piece.is_empty() {
                return;
            }
            if from == offset {
                self.l2 = L2::default();
            }
            self.l2.read(&self.layout, piece);
            if from + (piece.as_flattened().len() as u64) < end {
                return;
            }
            self.data.merge(self.l2.references);
            self.missing_l2.pop_first();
        }
    }
}

/// Those of these words, the first of which is at `at`, that lie in `range`, and where they begin.
fn within<'a>(words: &'a [[u8; 8]], at: u64, range: &Range<u64>) -> (u64, &'a [[u8; 8]]) {
    let end = at + words.as_flattened().len() as u64;
    let (from, until) = (range.start.clamp(at, end), range.end.clamp(at, end));
    let index = |place: u64| usize::try_from((place - at) / 8).unwrap_or(usize::MAX);
    (from, words.get(index(from)..index(until)).unwrap_or_default())
}
