//! The store's promises, in a folder.

use super::*;
use crate::chunk::CHUNK_WORDS;
use std::fs;

fn open(folder: &tempfile::TempDir, keep: usize) -> Result<Store, StoreError> {
    Store::open(Place::folder(folder.path()), Some(&folder.path().join("catalogue")), "job", keep)
}

fn tensors(seed: f32) -> Vec<StoredTensor> {
    let part = |n: usize, plus: f32| StoredPart {
        element: Element::F32,
        words: Arc::new((0..n).map(|i| i as f32 * 0.5 + plus).collect()),
    };
    // Moments in BF16: five of them take three words.
    let low = |n: usize, plus: f32| StoredPart { element: Element::Bf16, ..part(n.div_ceil(2), plus) };
    let long = CHUNK_WORDS + 5;
    vec![
        StoredTensor { name: "b".into(), rows: 1, columns: 5, parts: vec![part(5, seed), low(5, 1.0), low(5, 2.0)] },
        StoredTensor {
            name: "a".into(),
            rows: 1,
            columns: long,
            parts: vec![part(long, seed), part(long, 0.0), part(long, 0.0)],
        },
    ]
}

fn names() -> Vec<(String, usize, usize)> {
    vec![("a".into(), 1, CHUNK_WORDS + 5), ("b".into(), 1, 5)]
}

fn save(store: &mut Store, step: u64, seed: f32) {
    store.put(step, &tensors(seed)).unwrap();
    store.publish(step).unwrap();
}

/// CH-2: what two checkpoints share and a disk has damaged is whole again with the next one, whoever knows of the damage.
#[test]
fn shared_chunks_that_were_damaged_heal_when_they_are_stored_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 3).unwrap();
    save(&mut store, 1, 1.0);
    // A moment, which the next step has as well.
    let manifest = store.reader().manifest(1).unwrap();
    let path = folder.path().join("chunks").join(ChunkHash(manifest.tensors[0].parts[1].chunks[0]).to_string());
    let mut bytes = fs::read(&path).unwrap();
    bytes[5] ^= 1;
    fs::write(&path, bytes).unwrap();
    save(&mut store, 2, 2.0);
    let (good, wrong) = store.newest_good().unwrap();
    assert_eq!((good, wrong.len()), (Some(2), 0));
}

/// All that is damaged is written again when its content comes again, not the first alone.
#[test]
fn all_damaged_chunks_are_put_aside() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 3).unwrap();
    save(&mut store, 1, 1.0);
    save(&mut store, 2, 2.0);
    let manifest = store.reader().manifest(2).unwrap();
    let weights = manifest.tensors.iter().map(|t| t.parts[0].chunks[0]);
    for hash in weights {
        let path = folder.path().join("chunks").join(ChunkHash(hash).to_string());
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let (good, wrong) = store.newest_good().unwrap();
    assert_eq!((good, wrong.len()), (Some(1), 1));
    store.refuse_after(1).unwrap();
    save(&mut store, 2, 2.0);
    assert_eq!(store.newest_good().unwrap().0, Some(2));
}

#[test]
fn a_checkpoint_that_is_being_made_keeps_its_chunks_when_an_older_one_is_published() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 1).unwrap();
    save(&mut store, 1, 1.0);
    store.put(3, &tensors(3.0)).unwrap();
    save(&mut store, 2, 2.0);
    store.publish(3).unwrap();
    assert_eq!(store.newest_good().unwrap().0, Some(3));
}

#[test]
fn what_an_interrupted_write_left_goes_with_the_next_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 3).unwrap();
    save(&mut store, 1, 1.0);
    let manifests = store.reader().path();
    fs::write(manifests.join(".2.7.new"), b"half").unwrap();
    fs::write(manifests.join("2.refused"), b"kept").unwrap();
    save(&mut store, 3, 3.0);
    let mut names: Vec<_> = fs::read_dir(&manifests).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["1", "2.refused", "3"]);
}

/// DS-1, DS-3, CH-2, PC-1, PC-2.
#[test]
fn what_is_stored_is_read_and_old_ones_go_with_their_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 2).unwrap();
    for step in 1..=4 {
        save(&mut store, step, step as f32);
    }
    assert_eq!(store.reader().steps().unwrap(), [3, 4]);
    let read = store.reader().read(4, &names()).unwrap();
    assert_eq!(read[1], tensors(4.0)[0]);
    assert_eq!(read[0], tensors(4.0)[1]);
    let count = fs::read_dir(folder.path().join("chunks")).unwrap().count();
    // Per step: three chunks of weights (a: 2, b: 1); common: b's moments (2) and a's (2, shared by both).
    assert_eq!(count, 2 * 3 + 4);
}

/// What another version of the program wrote is neither read nor put aside.
#[test]
fn another_version_is_named_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 3).unwrap();
    save(&mut store, 1, 1.0);
    let path = store.reader().manifest_path(2);
    let mut bytes = fs::read(store.reader().manifest_path(1)).unwrap();
    bytes[7] = b'1';
    fs::write(&path, &bytes).unwrap();
    let error = store.newest_good().unwrap_err().to_string();
    assert!(error.contains("EVERMAN1") && error.contains(&path.display().to_string()), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

/// DS-4: one that wakes when another has the store removes neither a checkpoint nor a chunk of it.
#[test]
fn a_process_whose_turn_is_over_removes_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, mine: Arc<dyn Fn() -> bool + Send + Sync>| {
        Store::in_turn(Place::folder(folder.path()), Some(&folder.path().join(name)), "job", 1, mine).unwrap()
    };
    let turn = Arc::new(AtomicBool::new(true));
    let mine = Arc::clone(&turn);
    let mut first = open("first", Arc::new(move || mine.load(Relaxed)));
    save(&mut first, 1, 1.0);
    first.put(2, &tensors(2.0)).unwrap();
    turn.store(false, Relaxed);
    let mut second = open("second", Arc::new(|| true));
    second.put(3, &tensors(3.0)).unwrap();
    let error = first.publish(2).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    assert!(first.refuse_after(0).is_err() && first.prune().is_ok());
    assert_eq!(second.reader().steps().unwrap(), [1]);
    second.publish(3).unwrap();
    assert_eq!(second.reader().steps().unwrap(), [3]);
    assert_eq!(second.newest_good().unwrap().0, Some(3));
}

/// DS-2.
#[test]
fn the_catalogue_is_made_again_from_manifests() {
    let folder = tempfile::tempdir().unwrap();
    save(&mut open(&folder, 3).unwrap(), 1, 1.0);
    fs::remove_dir_all(folder.path().join("catalogue")).unwrap();
    save(&mut open(&folder, 3).unwrap(), 2, 2.0);
    for file in fs::read_dir(folder.path().join("catalogue")).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            fs::write(path, b"garbage").unwrap();
        }
    }
    let mut store = open(&folder, 1).unwrap();
    save(&mut store, 3, 3.0);
    assert_eq!(store.reader().steps().unwrap(), [3]);
    assert_eq!(store.reader().read(3, &names()).unwrap()[1], tensors(3.0)[0]);
}

/// CH-1, CH-3.
#[test]
fn damage_is_named_and_the_one_before_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 3).unwrap();
    save(&mut store, 1, 11.0);
    save(&mut store, 2, 12.0);
    let hash = ChunkHash(store.reader().manifest(2).unwrap().tensors[1].parts[0].chunks[0]);
    let path = folder.path().join("chunks").join(hash.to_string());
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[3] ^= 1;
    for bad in [&good[..5], &flipped, &[]] {
        fs::write(&path, bad).unwrap();
        let error = store.reader().read(2, &names()).unwrap_err().to_string();
        assert!(error.contains(&hash.to_string()), "{error}");
        let (newest, wrong) = store.newest_good().unwrap();
        assert_eq!((newest, wrong.len()), (Some(1), 1));
        // The same content is stored again in its place.
        save(&mut store, 2, 12.0);
        assert_eq!(store.newest_good().unwrap().0, Some(2));
    }
    let manifest = folder.path().join("manifests/2");
    let mut bytes = fs::read(&manifest).unwrap();
    bytes[20] ^= 4;
    fs::write(&manifest, &bytes).unwrap();
    assert_eq!(store.newest_good().unwrap().0, Some(1));
}

#[test]
fn a_foreign_manifest_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    save(&mut open(&folder, 3).unwrap(), 1, 1.0);
    let error = Store::open(Place::folder(folder.path()), Some(&folder.path().join("catalogue")), "other", 3)
        .unwrap()
        .reader()
        .manifest(1)
        .unwrap_err();
    assert!(matches!(error, StoreError::ForeignJob { .. }), "{error}");
}

/// Every cut and every changed byte of a manifest is an error that is told, never a panic.
#[test]
fn damaged_manifests_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(&folder, 2).unwrap();
    save(&mut store, 1, 1.0);
    let good = fs::read(folder.path().join("manifests/1")).unwrap();
    assert!(Manifest::decode(&good).is_ok());
    for at in 0..good.len() {
        assert!(Manifest::decode(&good[..at]).is_err());
        let mut changed = good.clone();
        changed[at] ^= 0x40;
        assert!(Manifest::decode(&changed).is_err(), "byte {at}");
    }
}

#[test]
fn garbage_is_no_manifest() {
    for bytes in [&b""[..], b"EVERMAN3", b"EVERMAN3\0\0\0\0", b"EVERMAN3aaaaaaaaaaaaaaaaaaaaaa"] {
        assert!(Manifest::decode(bytes).is_err());
    }
}
