//! Token files of Megatron-LM: `.bin` with tokens, `.idx` with where each sequence is.
//!
//! The index: nine bytes of magic, version 1 (u64), the code of the tokens' type (u8), the numbers of
//! sequences and of document boundaries (u64), then lengths (i32), byte offsets (i64) and the boundaries.

use anyhow::{Context, Result, bail, ensure};
use everstep_checkpoint::Mapped;
use std::path::Path;

const MAGIC: &[u8; 9] = b"MMIDIDX\x00\x00";

/// Gives each sequence's tokens in order; returns the number of documents.
pub(super) fn each(path: &Path, take: &mut dyn FnMut(Vec<u32>) -> Result<()>) -> Result<u64> {
    let index = path.with_extension("idx");
    let open = |path: &Path| Mapped::open(path).with_context(|| format!("cannot read {}", path.display()));
    let (tokens, index_bytes) = (open(path)?, open(&index)?);
    read(tokens.as_ref(), index_bytes.as_ref(), take).with_context(|| index.display().to_string())
}

fn read(tokens: &[u8], index: &[u8], take: &mut dyn FnMut(Vec<u32>) -> Result<()>) -> Result<u64> {
    let u64_at = |at: usize| -> Result<u64> {
        let bytes = index.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map(u64::from_le_bytes).with_context(|| format!("it is truncated: nothing at byte {at}"))
    };
    ensure!(index.starts_with(MAGIC), "it is no index of Megatron-LM");
    ensure!(u64_at(9)? == 1, "it has version {}, expected 1", u64_at(9)?);
    let code = *index.get(17).context("it is truncated")?;
    let width = match code {
        1 => 1,
        8 => 2,
        4 => 4,
        5 => 8,
        other => bail!("tokens have type {other}: expected 1 (u8), 8 (u16), 4 (i32) or 5 (i64)"),
    };
    let (sequences, boundaries) = (u64_at(18)?, u64_at(26)?);
    let need = sequences.checked_mul(12).and_then(|n| n.checked_add(34)).context("it names too many sequences")?;
    ensure!(index.len() as u64 >= need, "it is truncated: {} bytes for {sequences} sequences", index.len());
    let sequences = sequences as usize;
    for n in 0..sequences {
        let size = index[34 + 4 * n..].first_chunk::<4>().map_or(0, |b| i32::from_le_bytes(*b));
        let from = u64_at(34 + 4 * sequences + 8 * n)? as usize;
        let bytes = usize::try_from(size).ok().and_then(|s| s.checked_mul(width));
        let all = bytes.and_then(|b| tokens.get(from..from.checked_add(b)?));
        let all =
            all.with_context(|| format!("sequence {n} of {size} tokens at byte {from} is not in the .bin file"))?;
        let token = |b: &[u8]| -> Result<u32> {
            let mut wide = [0; 8];
            wide[..width].copy_from_slice(b);
            u32::try_from(u64::from_le_bytes(wide)).with_context(|| format!("sequence {n} has a token out of range"))
        };
        take(all.chunks_exact(width).map(token).collect::<Result<_>>()?)?;
    }
    Ok(boundaries.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(code: u8, sizes: &[i32], width: i64) -> Vec<u8> {
        let mut all = [MAGIC.as_slice(), &1u64.to_le_bytes(), &[code]].concat();
        all.extend((sizes.len() as u64).to_le_bytes());
        all.extend((sizes.len() as u64 + 1).to_le_bytes());
        sizes.iter().for_each(|s| all.extend(s.to_le_bytes()));
        let mut at = 0i64;
        for size in sizes {
            all.extend(at.to_le_bytes());
            at += i64::from(*size) * width;
        }
        (0..=sizes.len() as i64).for_each(|n| all.extend(n.to_le_bytes()));
        all
    }

    #[test]
    fn sequences_of_every_type_come_in_order() {
        for (code, width) in [(1u8, 1i64), (8, 2), (4, 4), (5, 8)] {
            let tokens: Vec<u8> = (0..7u64).flat_map(|t| t.to_le_bytes()[..width as usize].to_vec()).collect();
            let mut all = Vec::new();
            let documents = read(&tokens, &index(code, &[3, 0, 4], width), &mut |t| {
                all.push(t);
                Ok(())
            });
            assert_eq!(documents.unwrap(), 3);
            assert_eq!(all, [vec![0, 1, 2], vec![], vec![3, 4, 5, 6]]);
        }
    }

    #[test]
    fn broken_indices_are_refused() {
        let good = index(8, &[3, 4], 2);
        let mut take = |_| Ok(());
        for end in 0..good.len() - 25 {
            assert!(read(&[0; 14], &good[..end], &mut take).is_err(), "{end}");
        }
        let error = format!("{:#}", read(&[0; 13], &good, &mut take).unwrap_err());
        assert!(error.contains("sequence 1 of 4 tokens at byte 6 is not in the .bin file"), "{error}");
        assert!(read(&[0; 14], &index(7, &[3], 2), &mut take).is_err());
    }
}
