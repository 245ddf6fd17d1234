//! How fast images are hashed: one alone, several at once in the lanes of a vector, and one together with its parts.
//!
//!     cargo bench --bench md5
//!
//! What several at once gain is the ratio of their throughputs in one run.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use snapwarden::archive::md5::Md5;

const BATCH_BYTES: usize = 1 << 20;

fn main() {
    divan::main();
}

#[divan::bench(args = [1, 2, 3, 4])]
fn at_once(bencher: Bencher<'_, '_>, images: usize) {
    let batches: Vec<Vec<u8>> =
        (0..images).map(|image| vec![u8::try_from(image).unwrap_or(0); BATCH_BYTES]).collect();
    let mut hashes: Vec<Md5> = batches.iter().map(|_| Md5::new()).collect();
    bencher.counter(BytesCount::new(images * BATCH_BYTES)).bench_local(|| {
        let mut each: Vec<_> = hashes.iter_mut().zip(batches.iter().map(Vec::as_slice)).collect();
        Md5::update_together(black_box(&mut each));
    });
}

/// The whole and its parts.
#[divan::bench]
fn twice_of_the_same_bytes(bencher: Bencher<'_, '_>) {
    let batch = vec![0; BATCH_BYTES];
    let (mut whole, mut part) = (Md5::new(), Md5::new());
    bencher
        .counter(BytesCount::new(BATCH_BYTES))
        .bench_local(|| Md5::update_both(&mut whole, &mut part, black_box(&batch)));
}
