//! How fast a listing is read, and how much memory that takes.
//!
//! 100,000 snapshots as list-snapshots has them are 48 MB. `max alloc` of `reading_snapshots` is the most that is
//! allocated at once while it is read, beside the body; `max alloc` of `the_values_alone` is what the decoded values
//! take, measured by a copy of them.
#![expect(clippy::unwrap_used, reason = "what is measured was made here")]

use std::fmt::Write as _;

use divan::counter::{BytesCount, ItemsCount};
use divan::{AllocProfiler, Bencher};
use snapwarden::exoscale::wire::{decode_instances, decode_snapshots};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];

fn main() {
    divan::main();
}

/// So many snapshots, a hundred of each instance, each with the address of its last export.
fn snapshots(count: usize) -> String {
    let mut text = String::from("{\"snapshots\":[");
    for number in 0..count {
        let comma = if number == 0 { "" } else { "," };
        let instance = number / 100;
        let (day, hour) = (1 + number % 28, number % 24);
        write!(
            text,
            r#"{comma}{{"id":"b0c0ef2c-106a-4f3c-a5aa-{number:012x}","name":"web-{instance}_ROOT-{instance}_202611{day:02}{hour:02}3000","created-at":"2026-11-{day:02}T{hour:02}:30:00Z","state":"exported","size":50,"application-consistent":false,"instance":{{"id":"9ee8cb98-ea6e-4d57-bdde-{instance:012x}"}},"export":{{"presigned-url":"https://sos-ch-gva-2.exo.io/snapshots/{number:036x}?X-Amz-Expires=3600&X-Amz-Signature={number:064x}","md5sum":"{number:032x}"}}}}"#
        )
        .unwrap();
    }
    text.push_str("]}");
    text
}

/// So many instances, whole as list-instances has them.
fn instances(count: usize) -> String {
    let mut text = String::from("{\"instances\":[");
    for number in 0..count {
        let comma = if number == 0 { "" } else { "," };
        write!(
            text,
            r#"{comma}{{"id":"9ee8cb98-ea6e-4d57-bdde-{number:012x}","name":"web-{number}","created-at":"2026-01-01T00:00:00Z","state":"running","labels":{{"backup":"nightly","team":"web"}},"template":{{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f107"}},"public-ip":"192.0.2.1","instance-type":{{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f108"}}}}"#
        )
        .unwrap();
    }
    text.push_str("]}");
    text
}

#[divan::bench(args = SIZES, sample_count = 20)]
fn reading_snapshots(bencher: Bencher<'_, '_>, count: usize) {
    let body = snapshots(count);
    bencher
        .counter(BytesCount::new(body.len()))
        .counter(ItemsCount::new(count))
        .bench(|| decode_snapshots(body.as_bytes()).unwrap());
}

#[divan::bench(args = SIZES, sample_count = 20)]
fn the_values_alone(bencher: Bencher<'_, '_>, count: usize) {
    let listed = decode_snapshots(snapshots(count).as_bytes()).unwrap();
    bencher.counter(ItemsCount::new(count)).bench(|| listed.clone());
}

#[divan::bench(args = [1_000, 10_000], sample_count = 20)]
fn reading_instances(bencher: Bencher<'_, '_>, count: usize) {
    let body = instances(count);
    bencher.counter(BytesCount::new(body.len())).bench(|| decode_instances(body.as_bytes()).unwrap());
}
