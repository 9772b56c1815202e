//! A checkpoint's manifest, as it is, and with its magic and a right checksum around it.
#![no_main]

use everstep_checkpoint::Manifest;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::decode(bytes);
    let whole = [Manifest::MAGIC, bytes, &crc32c::crc32c(bytes).to_le_bytes()].concat();
    if let Ok(manifest) = Manifest::decode(&whole) {
        assert_eq!(Manifest::decode(&manifest.encode()).as_ref(), Ok(&manifest));
    }
});
