//! The files of the configured paths in order of name.
//!
//! In folders, what is hidden, built (`target`), a cache (`CACHEDIR.TAG`), locked by a package manager, a
//! run's own or not a format that we read is left out; a file that is named itself is taken as it is.

use super::documents::Format;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes at the start of a file that are looked at to tell text from other data.
const SNIFF: usize = 8192;

pub(super) fn collect(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let meta = fs::metadata(path).with_context(|| format!("data: {} cannot be read", path.display()))?;
        if meta.is_dir() {
            walk(path, &mut files)?;
        } else if meta.is_file() {
            let index = path.with_extension("idx");
            if path.extension().is_some_and(|e| e == "bin") && !index.exists() && !is_text(path)? {
                bail!(
                    "data: {} is no text, and the index of its tokens, {}, is missing",
                    path.display(),
                    index.display()
                );
            }
            files.push(path.clone());
        } else {
            bail!("data: {} is neither a file nor a folder", path.display());
        }
    }
    Ok(files)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let read = || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect() };
    let mut entries = read().with_context(|| format!("data: {} cannot be read", folder.display()))?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            let is_run = path.join("job.json").exists() && path.join("config.toml").exists();
            if name != "target" && !is_run && !path.join("CACHEDIR.TAG").exists() {
                walk(&path, files)?;
            }
        } else if path.is_file() && !name.ends_with(".lock") && is_readable(&path)? {
            files.push(path);
        }
    }
    Ok(())
}

fn is_readable(path: &Path) -> Result<bool> {
    match Format::of(path) {
        Format::Text => is_text(path),
        Format::Packed | Format::Lines | Format::Parquet | Format::Megatron => Ok(true),
    }
}

fn is_text(path: &Path) -> Result<bool> {
    use std::io::Read;
    let mut start = Vec::new();
    let file = fs::File::open(path).with_context(|| format!("data: {} cannot be read", path.display()))?;
    file.take(SNIFF as u64).read_to_end(&mut start)?;
    Ok(!start.contains(&0))
}
