//! TensorBoard's event files, made of a run's own lines.
//!
//! A file is a list of records: length, masked CRC-32C of it, protobuf, masked CRC-32C of that. Of
//! TensorFlow's `Event` only wall time (1), step (2), file version (3) and `Summary` (5) of scalars are
//! written: `Value` (1) with tag (1) and number (2). The crates that write such files bring half of
//! TensorFlow's protobuf with them, or are no longer kept.

use crate::eval::Evaluation;
use everstep_actors::MetricsLine;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Appends scalars to one event file.
#[derive(Debug)]
pub(crate) struct Events(File);

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of bytes.
fn bytes(out: &mut Vec<u8>, field: u8, content: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// A checksum as records have it: turned and shifted, so that a record of records is no trouble.
fn masked(content: &[u8]) -> [u8; 4] {
    crc32c::crc32c(content).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), event, &masked(event)].concat()
}

fn event(seconds: f64, step: u64, content: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(seconds.to_le_bytes());
    out.push(2 << 3);
    varint(&mut out, step);
    content(&mut out);
    record(&out)
}

fn scalars(seconds: f64, step: u64, values: &[(&str, f64)]) -> Vec<u8> {
    event(seconds, step, |out| {
        let mut summary = Vec::new();
        for (tag, number) in values {
            let mut value = Vec::new();
            bytes(&mut value, 1, tag.as_bytes());
            value.push(2 << 3 | 5);
            value.extend((*number as f32).to_le_bytes());
            bytes(&mut summary, 1, &value);
        }
        bytes(out, 5, &summary);
    })
}

impl Events {
    /// Begins a file in `folder`; each part of a run, from a start to an end, has one of its own.
    pub(crate) fn begin(folder: &Path, milliseconds: u64) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let name = format!("events.out.tfevents.{:010}.everstep.{}", milliseconds / 1000, std::process::id());
        let mut file = File::create(folder.join(name))?;
        file.write_all(&event(milliseconds as f64 / 1e3, 0, |out| bytes(out, 3, b"brain.Event:2")))?;
        Ok(Self(file))
    }

    /// Appends a step.
    pub(crate) fn step(&mut self, line: &MetricsLine) -> io::Result<()> {
        let mut values = vec![
            ("loss", line.loss),
            ("gradient norm", line.grad_norm),
            ("learning rate", f64::from(line.lr)),
            ("nodes", line.nodes as f64),
        ];
        values.extend(line.mtp_loss.map(|loss| ("loss of multi-token prediction", loss)));
        values.extend((line.tokens_per_s > 0.0).then_some(("tokens per second", line.tokens_per_s)));
        self.0.write_all(&scalars(line.time as f64 / 1e3, line.step, &values))
    }

    /// Appends an evaluation.
    pub(crate) fn evaluation(&mut self, milliseconds: u64, e: &Evaluation) -> io::Result<()> {
        let values = [("held-out loss", e.loss), ("held-out perplexity", e.perplexity)];
        self.0.write_all(&scalars(milliseconds as f64 / 1e3, e.step, &values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_the_published_layout() {
        // The checksum of "123456789" is the known answer of CRC-32C: e3069283, masked by hand.
        let turned = 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked(b"123456789"), turned.to_le_bytes());
        let all = scalars(1.5, 300, &[("loss", 0.25)]);
        let length = u64::from_le_bytes(all[..8].try_into().unwrap()) as usize;
        assert_eq!(all.len(), 8 + 4 + length + 4);
        let body = &all[12..12 + length];
        assert_eq!(body[..9], [&[9][..], &1.5f64.to_le_bytes()].concat());
        assert_eq!(body[9..12], [16, 0xac, 2]);
        let value = [&[0x0a, 4][..], b"loss", &[0x15], &0.25f32.to_le_bytes()].concat();
        let summary = [&[0x0a, value.len() as u8][..], &value].concat();
        assert_eq!(body[12..], [&[0x2a, summary.len() as u8][..], &summary].concat());
    }
}
