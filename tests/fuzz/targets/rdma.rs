//! What a peer sends and writes over an RDMA link.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| everstep_transport::fuzz::rdma(bytes));
