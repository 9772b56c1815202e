//! The ends of files of lines that grow with their job: who begins in the middle of it reads what it needs, not all.
//!
//! - TA-1: what is read is whole lines. What follows the last line end was torn: its writer died.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom};
use std::path::Path;

/// Bytes of a file that are looked at first; then twice as many, as long as they are too few.
pub(super) const PART: u64 = 1 << 16;

/// How many bytes of a file are whole lines.
pub(super) fn whole_bytes(file: &mut File) -> Result<u64> {
    let length = file.metadata()?.len();
    let mut bytes = PART;
    loop {
        let from = length.saturating_sub(bytes);
        if let Some(at) = between(file, from, length)?.iter().rposition(|byte| *byte == b'\n') {
            return Ok(from + at as u64 + 1);
        }
        if from == 0 {
            return Ok(0);
        }
        bytes *= 2;
    }
}

/// The bytes of a file in a range.
pub(super) fn between(file: &mut File, from: u64, to: u64) -> Result<Vec<u8>> {
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(to.saturating_sub(from)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The lines in the last `bytes` of a file, and at which byte they begin (0: these are all). A missing file has none.
pub(super) fn last_lines(path: &Path, bytes: u64) -> Result<(String, u64)> {
    let named = |e: Error| Error::new(e.kind(), format!("{}: {e}", path.display()));
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok((String::new(), 0)),
        Err(e) => return Err(named(e)),
    };
    let whole = whole_bytes(&mut file).map_err(named)?;
    let from = whole.saturating_sub(bytes);
    let mut text = between(&mut file, from, whole).map_err(named)?;
    // The first of them may be the end of a line.
    let cut = if from == 0 { 0 } else { text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |at| at + 1) };
    text.drain(..cut);
    let text = String::from_utf8(text).map_err(|e| named(Error::new(ErrorKind::InvalidData, e)))?;
    Ok((text, from + cut as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TA-1: for every length of a file and of its torn end.
    #[test]
    fn ends_of_files_are_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        assert_eq!(last_lines(&path, PART).unwrap(), (String::new(), 0));
        let text = "eins\nzwei ä\n\ndrei\n";
        for (length, torn) in [(0, 0), (0, 7), (5, 3), (text.len(), 0), (text.len(), 200_000)] {
            std::fs::write(&path, [&text.as_bytes()[..length], &vec![0xff; torn]].concat()).unwrap();
            assert_eq!(whole_bytes(&mut File::open(&path).unwrap()).unwrap(), length as u64);
            for bytes in 0..=length as u64 + 1 {
                let (lines, at) = last_lines(&path, bytes).unwrap();
                assert_eq!(lines, text[at as usize..length], "the last {bytes} of {length} bytes");
                assert!(at == 0 || text[..at as usize].ends_with('\n'));
                assert!(lines.len() as u64 <= bytes);
                // None is left out that is there whole.
                let before = text[..at as usize].trim_end_matches('\n').rfind('\n').map_or(0, |end| end as u64 + 1);
                assert!(at == 0 || before < length as u64 - bytes.min(length as u64) + 1, "{bytes} of {length}: {at}");
            }
        }
    }
}
