//! What the ends of a connection say about their session's way.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| everstep_transport::fuzz::way(bytes));
