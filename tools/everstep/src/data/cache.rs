//! The cache: one file of tokens for each set of files, made once, in parallel.

use super::documents::{self, Format, Piece};
use super::megatron;
use super::tokenizer::Vocabulary;
use anyhow::{Context, Result, bail, ensure};
use everstep_actors::{SourceInfo, token_width};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

/// Changes when the same files would give other tokens.
const VERSION: u32 = 2;
/// Bytes of text that one thread encodes at a time.
const BATCH: usize = 1 << 20;
/// Batches of a thread that are read before they are encoded.
const AHEAD: usize = 4;
/// What tells backup programs, and our own walk through folders, that a folder is a cache.
const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n";

/// The tokens of `files`: from the cache, or made and put there. `model` is the model's vocabulary.
pub(super) fn tokens(
    folder: &Path,
    files: &[PathBuf],
    field: &str,
    vocabulary: &Vocabulary,
    model: usize,
) -> Result<(PathBuf, SourceInfo)> {
    let key = key(files, field, vocabulary, model)?;
    let (path, json) = (folder.join(format!("{key}.tokens")), folder.join(format!("{key}.json")));
    if let Some(info) = fs::read(&json).ok().and_then(|bytes| serde_json::from_slice::<SourceInfo>(&bytes).ok())
        && fs::metadata(&path).is_ok_and(|m| m.len() == info.bytes())
    {
        return Ok((path, info));
    }
    fs::create_dir_all(folder).with_context(|| format!("data.cache: cannot make {}", folder.display()))?;
    fs::write(folder.join("CACHEDIR.TAG"), TAG)?;
    let scratch = folder.join(format!(".{key}.{}.new", std::process::id()));
    let made = make(&scratch, files, field, vocabulary, model);
    let finished = made.and_then(|info| {
        fs::rename(&scratch, &path)?;
        // The tokens first: without this file they are made again.
        let note = scratch.with_extension("json");
        fs::write(&note, serde_json::to_vec(&info)?)?;
        fs::rename(&note, &json)?;
        Ok(info)
    });
    if finished.is_err() {
        let _ = fs::remove_file(&scratch);
    }
    Ok((path, finished?))
}

/// Names everything that the tokens depend on.
fn key(files: &[PathBuf], field: &str, vocabulary: &Vocabulary, model: usize) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(&VERSION.to_le_bytes());
    add(field.as_bytes());
    add(vocabulary.file().unwrap_or_default());
    add(&vocabulary.end().to_le_bytes());
    add(&(model as u64).to_le_bytes());
    for path in files {
        let mut parts = vec![path.clone()];
        parts.extend(Some(path.with_extension("idx")).filter(|_| Format::of(path) == Format::Megatron));
        for path in parts {
            let full = fs::canonicalize(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let meta = fs::metadata(&full)?;
            let changed = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
            add(full.as_os_str().as_encoded_bytes());
            add(&meta.len().to_le_bytes());
            add(&changed.to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// Writes tokens and counts them.
struct Sink<'a> {
    to: BufWriter<File>,
    hash: blake3::Hasher,
    width: usize,
    model: usize,
    info: SourceInfo,
    vocabulary: &'a Vocabulary,
    /// Whether there is anything but white space.
    any: bool,
}

impl Sink<'_> {
    fn put(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(bad) = tokens.iter().find(|t| **t as usize >= self.model) {
            bail!("token {bad} is not in the model's vocabulary of {}", self.model);
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes().into_iter().take(self.width)).collect();
        self.hash.update(&bytes);
        self.to.write_all(&bytes)?;
        self.info.tokens += tokens.len() as u64;
        Ok(())
    }

    /// Encodes batches in parallel and writes them in order.
    fn round(&mut self, batches: &mut Vec<Vec<Piece>>, threads: usize) -> Result<()> {
        let (next, vocabulary, all) = (AtomicUsize::new(0), self.vocabulary, &*batches);
        let results: Vec<Mutex<Option<Result<Vec<u32>>>>> = batches.iter().map(|_| Mutex::new(None)).collect();
        std::thread::scope(|scope| {
            for _ in 0..threads.min(batches.len()) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(batch) = all.get(at) else { return };
                        let result = encode(vocabulary, batch);
                        *results[at].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
                    }
                });
            }
        });
        for result in results {
            let tokens = result.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.put(&tokens.expect("every batch is encoded")?)?;
        }
        for piece in batches.drain(..).flatten() {
            self.info.documents += u64::from(piece.ends);
            self.any |= piece.text.iter().any(|b| !b.is_ascii_whitespace());
        }
        Ok(())
    }
}

fn encode(vocabulary: &Vocabulary, pieces: &[Piece]) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for piece in pieces {
        tokens.extend(vocabulary.encode(&piece.text, piece.line)?);
        tokens.extend(Some(vocabulary.end()).filter(|_| piece.ends));
    }
    Ok(tokens)
}

fn make(path: &Path, files: &[PathBuf], field: &str, vocabulary: &Vocabulary, model: usize) -> Result<SourceInfo> {
    let width = token_width(model);
    let info = SourceInfo { tokens: 0, width, hash: String::new(), documents: 0 };
    let to = BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    let hash = blake3::Hasher::new();
    let mut sink = Sink { to, hash, width: usize::from(width), model, info, vocabulary, any: false };
    let size = files.iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.len()).sum();
    let bar = indicatif::ProgressBar::new(size);
    let style = "tokenising {bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
    bar.set_style(indicatif::ProgressStyle::with_template(style)?);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let most = threads * AHEAD;
    for file in files {
        if Format::of(file) == Format::Megatron {
            sink.info.documents += megatron::each(file, &mut |tokens| {
                sink.any |= !tokens.is_empty();
                sink.put(&tokens)
            })?;
            continue;
        }
        // Rounds end with the file, so that an error names it.
        let (mut batches, mut room) = (Vec::<Vec<Piece>>::new(), 0usize);
        let read = documents::each(file, field, &bar, &mut |piece| {
            if room == 0 {
                if batches.len() == most {
                    sink.round(&mut batches, threads)?;
                }
                batches.push(Vec::new());
                room = BATCH;
            }
            room = room.saturating_sub(piece.text.len() + 1);
            batches.last_mut().expect("a batch was begun").push(piece);
            Ok(())
        });
        read.and_then(|()| sink.round(&mut batches, threads)).with_context(|| file.display().to_string())?;
    }
    bar.finish_and_clear();
    ensure!(sink.any, "there is no text in {} files", files.len());
    let file = sink.to.into_inner().map_err(|e| e.into_error())?;
    file.sync_all()?;
    Ok(SourceInfo { hash: sink.hash.finalize().to_hex().to_string(), ..sink.info })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> Vec<u8> {
        fs::read(path).unwrap()
    }

    /// DA-1, DA-2: a file that changes is another entry; rounds of any number of threads give the same.
    #[test]
    fn tokens_are_made_once_and_depend_on_the_text_alone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let file = folder.path().join("a.txt");
        let text: String = (0..400_000).map(|i| format!("{i} words\n")).collect();
        fs::write(&file, &text).unwrap();
        let files = [file.clone()];
        let make = || tokens(&cache, &files, "text", &Vocabulary::Bytes, 256).unwrap();
        let (path, info) = make();
        assert_eq!(read(&path), [text.as_bytes(), b"\n"].concat());
        assert_eq!((info.documents, info.width, info.tokens), (1, 1, text.len() as u64 + 1));
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(make(), (path.clone(), info.clone()));
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before, "it is not made again");
        for threads in [1, 3, 8] {
            let scratch = folder.path().join("scratch");
            let to = BufWriter::new(File::create(&scratch).unwrap());
            let start = SourceInfo { tokens: 0, width: 1, hash: String::new(), documents: 0 };
            let vocabulary = &Vocabulary::Bytes;
            let hash = blake3::Hasher::new();
            let mut sink = Sink { to, hash, width: 1, model: 256, info: start, vocabulary, any: false };
            let piece = |t: &[u8]| vec![Piece { text: t.to_vec(), line: 1, ends: false }];
            let mut batches: Vec<Vec<Piece>> = text.as_bytes().chunks(100_000).map(piece).collect();
            sink.round(&mut batches, threads).unwrap();
            sink.to.flush().unwrap();
            assert_eq!(read(&scratch), text.as_bytes());
        }
        let other = tokens(&cache, &files, "text", &Vocabulary::Bytes, 200).unwrap().0;
        assert_ne!(other, path, "a smaller vocabulary is checked anew");
        fs::write(&file, text + "more").unwrap();
        assert_ne!(make().0, path);
    }

    #[test]
    fn nothing_is_left_of_what_could_not_be_made() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let file = folder.path().join("a.jsonl");
        fs::write(&file, "{\"text\": \"good\"}\nbad\n").unwrap();
        let error = tokens(&cache, &[file], "text", &Vocabulary::Bytes, 256).unwrap_err();
        let words = format!("{error:#}");
        assert!(words.contains("a.jsonl") && words.contains("line 2 is not JSON"), "{words}");
        let left: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["CACHEDIR.TAG"]);
    }
}
