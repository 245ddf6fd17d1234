//! Claims about parts: what proves that the store has the right bytes, and what happens without memory for them.

use super::*;
use crate::archive::s3::memory::PartMemory;
use crate::archive::testing::{FakeSource, Fault, Offer};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::outputs::Outputs;

use PartSent::{Signed, WithMd5, WithNothing};

/// Parts of 8 MiB are larger than its share.
fn small_memory() -> PartMemory {
    PartMemory::new(4 << 20)
}

/// Downloads an image into the archive.
async fn upload(archive: &S3Archive, source: &FakeSource, image: &[u8]) -> Result<Manifest, String> {
    let sink::Begin::Missing(output) = archive.begin(&of()).await.unwrap() else { panic!("it is there") };
    let mut outputs = Outputs { open: vec![output], failed: Vec::new() };
    let download = Download {
        source,
        clock: &TestClock::at(NOW),
        randomness: &NoRandomness,
        stall_timeout: Duration::from_mins(1),
        connections: 1,
        hashers: &Hashers::default(),
        throttle: None,
        progress: &|_| (),
    };
    match download.fetch(&mut outputs, false).await {
        Err(_) if !outputs.failed.is_empty() => Err(chain(&outputs.failed.remove(0).1)),
        Err(error) => Err(chain(&error)),
        Ok(fetched) => {
            assert_eq!(fetched.md5, md5(image));
            let output = outputs.open.remove(0);
            output.sink.publish(manifest_of(image)).await.map_err(|error| chain(&error))
        }
    }
}

fn source(image: &[u8], script: impl IntoIterator<Item = Fault>) -> FakeSource {
    FakeSource::new(Offer::of(image), script)
}

/// The image is there, byte by byte, and no upload is left.
fn assert_stored(store: &Store, image: &[u8], case: &str) {
    let state = store.state();
    assert!(state.objects[&key(".qcow2")].bytes == image, "{case}");
    assert!(state.uploads.is_empty(), "{case}");
}

fn sent(store: &Store) -> Vec<PartSent> {
    std::mem::take(&mut store.state().parts_sent)
}

/// Where the source was opened behind the beginning.
fn opened_again(source: &FakeSource) -> Vec<u64> {
    source.offsets().into_iter().filter(|offset| *offset > 0).map(|offset| offset >> 20).collect()
}

#[tokio::test(start_paused = true)]
async fn parts_in_memory_have_an_md5_and_are_signed_only_where_their_way_is_open() {
    let image = image(20 * MIB, 1);
    for (endpoint, expected) in [("https://store.example", WithMd5), ("http://127.0.0.1:9000", Signed)] {
        let store = Arc::default();
        let from = source(&image, []);
        upload(&archive_at(endpoint, &store), &from, &image).await.unwrap();
        assert_eq!(sent(&store), [expected; 3]);
        assert_stored(&store, &image, endpoint);
        assert_eq!(from.offsets(), [0]);
    }
}

#[tokio::test(start_paused = true)]
async fn without_memory_for_it_a_part_is_sent_as_it_arrives_and_compared_afterwards() {
    let image = image(20 * MIB, 2);
    for endpoint in ["https://store.example", "http://127.0.0.1:9000"] {
        let store = Arc::default();
        let archive = archive_at(endpoint, &store).with_memory(small_memory());
        let from = source(&image, []);
        upload(&archive, &from, &image).await.unwrap();
        assert_eq!(sent(&store), [WithNothing; 3]);
        assert_stored(&store, &image, endpoint);
        assert_eq!(from.offsets(), [0], "it is read once");
    }
}

#[tokio::test(start_paused = true)]
async fn a_part_that_failed_on_its_way_is_read_again_and_no_other() {
    let image = image(27 * MIB, 3);
    let slow = || refuse(503, "SlowDown");
    for (number, effect) in [
        ("part 2", Effect::Cut),
        ("part 2", slow()),
        ("part 2", Effect::Hang),
        ("part 2", Effect::Flip),
        ("part 2", Effect::Lose),
        ("part 4", Effect::Flip),
    ] {
        let store: Arc<Store> = Arc::default();
        store.fault(number, effect.clone());
        let archive = archive(&store).with_memory(small_memory());
        let from = source(&image, []);
        let case = format!("{number} {effect:?}");
        upload(&archive, &from, &image).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_stored(&store, &image, &case);
        assert_eq!(opened_again(&from), [if number == "part 2" { 8 } else { 24 }], "{case}");
        let sent = sent(&store);
        assert_eq!(sent.iter().filter(|how| **how == WithMd5).count(), 1, "{case}: {sent:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_read_again_outlasts_the_source_and_the_store() {
    let (longer, image) = (image(40 * MIB, 4), image(20 * MIB, 4));
    // Of the second connection, which reads the part again, and the third.
    for faults in [
        vec![Fault::Fine, Fault::Cut(3 * MIB)],
        vec![Fault::Fine, Fault::End(3 * MIB)],
        vec![Fault::Fine, Fault::Stall(3 * MIB)],
        vec![Fault::Fine, Fault::Hang],
        vec![Fault::Fine, Fault::Broken, Fault::Expired],
        vec![Fault::Fine, Fault::NoRange(20 * MIB)],
        vec![Fault::Fine, Fault::Wide],
        vec![Fault::Fine, Fault::Flip],
    ] {
        let store: Arc<Store> = Arc::default();
        store.fault("part 2", Effect::Cut);
        let archive = archive(&store).with_memory(small_memory());
        let case = format!("{faults:?}");
        let from = source(&image, faults);
        upload(&archive, &from, &image).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_stored(&store, &image, &case);
    }
    // While later parts arrive: what came with the bytes before the interruption is no gap.
    for fault in
        [Fault::Cut(3 * MIB), Fault::End(3 * MIB), Fault::Stall(3 * MIB), Fault::Hang, Fault::Expired]
    {
        let store: Arc<Store> = Arc::default();
        store.fault("part 2", Effect::Cut);
        let archive = archive(&store).with_memory(small_memory());
        let from = source(&longer, [Fault::Fine, fault]);
        upload(&archive, &from, &longer).await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert_stored(&store, &longer, &format!("{fault:?}"));
    }
    // A store that asks for less for 100 s.
    let store: Arc<Store> = Arc::default();
    for _ in 0..15 {
        store.fault("part 2", refuse(503, "SlowDown"));
    }
    let archive = archive(&store).with_memory(small_memory());
    let before = tokio::time::Instant::now();
    upload(&archive, &source(&image, []), &image).await.unwrap();
    assert!(before.elapsed() > Duration::from_secs(95), "{:?}", before.elapsed());
    assert_stored(&store, &image, "slow");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_stays_wrong_or_refuses_is_given_up_and_says_why() {
    let image = image(20 * MIB, 5);
    for (effect, words) in [
        (refuse(503, "SlowDown"), "SlowDown"),
        (refuse(403, "AccessDenied"), "needs `s3:PutObject`"),
        (refuse(507, "QuotaExceeded"), "free some space in the bucket"),
        (Effect::Cut, "the connection broke"),
    ] {
        let store: Arc<Store> = Arc::default();
        store.always("part 2", effect);
        let archive = archive(&store).with_memory(small_memory());
        let error = upload(&archive, &source(&image, []), &image).await.unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
        assert!(store.keys().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn where_an_etag_is_no_md5_parts_are_signed_and_in_memory() {
    let image = image(20 * MIB, 6);
    for memory in [PartMemory::default(), small_memory()] {
        let is_small = memory.try_reserve(8 << 20).is_none();
        for (manner, unsigned) in [
            // The first ones, by which it is found out.
            (Manner::OtherEtags, if is_small { 1..=4 } else { 1..=3 }),
            (Manner::WantsSignatures, 1..=3),
            (Manner::Kms, 0..=0),
        ] {
            let store: Arc<Store> = Arc::default();
            store.state().manner = Some(manner);
            let archive = archive(&store).with_memory(memory.clone());
            let case = format!("{manner:?}, small: {is_small}");
            let from = source(&image, []);
            upload(&archive, &from, &image).await.unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_stored(&store, &image, &case);
            let all = sent(&store);
            let signed = all.iter().filter(|how| **how == Signed).count();
            assert!(signed == 3 && unsigned.contains(&(all.len() - signed)), "{case}: {all:?}");
            // From then on nothing else is tried.
            store.state().objects.clear();
            upload(&archive, &source(&image, []), &image).await.unwrap();
            assert_eq!(sent(&store), [Signed; 3], "{case}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_md5_is_required_a_part_without_memory_is_read_twice_and_sent_with_it() {
    let image = image(20 * MIB, 7);
    let store: Arc<Store> = Arc::default();
    store.state().manner = Some(Manner::WantsMd5);
    let archive = archive(&store).with_memory(small_memory());
    upload(&archive, &source(&image, []), &image).await.unwrap();
    assert_stored(&store, &image, "first");
    sent(&store);
    store.state().objects.clear();
    let from = source(&image, []);
    upload(&archive, &from, &image).await.unwrap();
    assert_stored(&store, &image, "second");
    assert_eq!(sent(&store), [WithMd5; 3]);
    assert_eq!(from.offsets(), [0, 0, 8 << 20, 16 << 20]);
}

#[tokio::test(start_paused = true)]
async fn an_upload_without_memory_is_resumed_and_only_if_it_is_of_this_image() {
    let image_before = image(33 * MIB, 8);
    for (other, sent_again) in [(image_before.clone(), 1), (image(33 * MIB, 12), 5)] {
        let store: Arc<Store> = Arc::default();
        let archive = archive(&store).with_memory(small_memory());
        store.always("part 4", refuse(403, "AccessDenied"));
        upload(&archive, &source(&image_before, []), &image_before).await.unwrap_err();
        let there = store.state().uploads.values().next().unwrap().parts.len();
        assert_eq!(there, 4, "all but the fourth");
        store.state().faults.clear();
        sent(&store);
        // As another process: it knows nothing of what the first one learned of the store.
        let again = self::archive(&store).with_memory(small_memory());
        upload(&again, &source(&other, []), &other).await.unwrap();
        assert!(store.state().objects[&key(".qcow2")].bytes == other);
        assert_eq!(sent(&store).len(), sent_again);
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_of_unknown_length_is_uploaded_from_memory() {
    let image = image(20 * MIB, 10);
    let store: Arc<Store> = Arc::default();
    let archive = archive(&store).with_memory(small_memory());
    let offer = Offer { tells_total: false, ..Offer::of(&image) };
    upload(&archive, &FakeSource::new(offer, []), &image).await.unwrap();
    assert_stored(&store, &image, "unknown");
    assert_eq!(sent(&store), [WithMd5; 3]);
}
