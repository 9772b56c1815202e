//! How text becomes tokens: bytes, or a file of the `tokenizers` library.

use anyhow::{Context, Result, anyhow, bail, ensure};
use everstep_actors::{Config, DataConfig, RunFolder};
use std::fs;
use std::path::{Path, PathBuf};

/// Tokens that end a document in published tokenizers; the first one that exists is taken.
const ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>"];

/// See the module.
#[derive(Debug)]
pub(crate) enum Vocabulary {
    /// A token is a byte; documents end with a line.
    Bytes,
    /// A tokenizer, the token at a document's end, and its file.
    File { tokenizer: Box<tokenizers::Tokenizer>, end: u32, json: Vec<u8> },
}

impl Vocabulary {
    /// What a configuration names, for a model with so many tokens.
    pub(crate) fn of(data: &DataConfig, model: usize) -> Result<Self> {
        let Some(path) = &data.tokenizer else { return Ok(Self::Bytes) };
        let json = fs::read(path).with_context(|| format!("data.tokenizer: cannot read {}", path.display()))?;
        Self::read(json, data.end.as_deref(), model).with_context(|| format!("data.tokenizer: {}", path.display()))
    }

    /// A run's own.
    pub(crate) fn of_run(run: &RunFolder, config: &Config) -> Result<Self> {
        let path = run.tokenizer();
        if !path.exists() {
            return Ok(Self::Bytes);
        }
        let json = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let end = config.data.end.as_deref();
        Self::read(json, end, config.spec.model.vocabulary).with_context(|| path.display().to_string())
    }

    fn read(json: Vec<u8>, end: Option<&str>, model: usize) -> Result<Self> {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| anyhow!("it is no tokenizer: {e}"))?;
        // A file may say that texts are cut or filled up: for training they are neither.
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        tokenizer.with_padding(None);
        let highest = tokenizer.get_vocab(true).into_values().max().context("it has no tokens")?;
        ensure!(
            (highest as usize) < model,
            "it has tokens up to {highest}, but model.vocabulary is {model}: expected at least {}",
            highest as usize + 1
        );
        let found = match end {
            Some(name) => {
                tokenizer.token_to_id(name).with_context(|| format!("it has no token {name:?} (data.end)"))?
            }
            None => match ENDS.iter().find_map(|name| tokenizer.token_to_id(name)) {
                Some(id) => id,
                None => bail!("it has none of {ENDS:?}: name the token at a document's end with data.end"),
            },
        };
        Ok(Self::File { tokenizer: Box::new(tokenizer), end: found, json })
    }

    /// Its file, if it has one.
    pub(crate) fn file(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes => None,
            Self::File { json, .. } => Some(json),
        }
    }

    /// The token at the end of a document.
    pub(crate) fn end(&self) -> u32 {
        match self {
            Self::Bytes => u32::from(b'\n'),
            Self::File { end, .. } => *end,
        }
    }

    /// Tokens of a text that begins at a line of its file.
    pub(crate) fn encode(&self, text: &[u8], line: u64) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.iter().map(|b| u32::from(*b)).collect()),
            Self::File { tokenizer, .. } => {
                let text = std::str::from_utf8(text).map_err(|e| {
                    let good = &text[..e.valid_up_to()];
                    let line = line + good.iter().filter(|b| **b == b'\n').count() as u64;
                    anyhow!("line {line} is not UTF-8")
                })?;
                let encoding = tokenizer.encode_fast(text, false).map_err(|e| anyhow!("line {line}: {e}"))?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// The text of tokens, as far as they are text.
    pub(crate) fn decode(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|t| *t as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::File { tokenizer, .. } => tokenizer.decode(tokens, false).map_err(|e| anyhow!("{e}")),
        }
    }
}

/// The characters by which byte-level tokenizers write bytes: printable ones stand for themselves, the
/// others follow each other from U+0100 on.
fn byte_names() -> Vec<String> {
    let printable = |b: u8| (b'!'..=b'~').contains(&b) || (0xa1..=0xac).contains(&b) || b >= 0xae;
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|b| {
            let code = if printable(b) {
                u32::from(b)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("a character below U+0200").to_string()
        })
        .collect()
}

/// A tokenizer whose tokens are bytes, for `transformers`.
fn of_bytes() -> serde_json::Value {
    let names: serde_json::Map<String, serde_json::Value> =
        byte_names().into_iter().enumerate().map(|(byte, name)| (name, byte.into())).collect();
    let level =
        serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": names, "merges": [] },
    })
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// The tokenizer of a Hugging Face folder, if it has one that a configuration must name: that of bytes is
/// what a run has without. A configuration that names another one is refused.
pub(crate) fn of_folder(folder: &Path, named: Option<&Path>) -> Result<Option<PathBuf>> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return Ok(None);
    }
    let found = read_json(&path)?;
    match named {
        None if found == of_bytes() => Ok(None),
        None => Ok(Some(path)),
        Some(named) if read_json(named)? == found => Ok(Some(path)),
        Some(named) => bail!(
            "data.tokenizer is {}, but the model's own is {}: leave data.tokenizer out",
            named.display(),
            path.display()
        ),
    }
}

/// Where a run keeps what its model's folder said of the tokenizer.
fn kept_config(run: &RunFolder) -> PathBuf {
    run.data().join("tokenizer_config.json")
}

/// Keeps what a folder says of its tokenizer (special tokens, chat template) for an export.
pub(crate) fn keep_config(run: &RunFolder, folder: &Path) -> Result<()> {
    let from = folder.join("tokenizer_config.json");
    if from.exists() {
        fs::copy(&from, kept_config(run)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// Writes the tokenizer of a run for `transformers`; one whose tokens are bytes where there is none.
pub(crate) fn export(run: &RunFolder, folder: &Path) -> Result<()> {
    let to = folder.join("tokenizer.json");
    if run.tokenizer().exists() {
        fs::copy(run.tokenizer(), &to).with_context(|| format!("cannot write {}", to.display()))?;
    } else {
        let json = serde_json::to_string(&of_bytes())?;
        fs::write(&to, json).with_context(|| format!("cannot write {}", to.display()))?;
    }
    let to = folder.join("tokenizer_config.json");
    if kept_config(run).exists() {
        fs::copy(kept_config(run), &to).with_context(|| format!("cannot write {}", to.display()))?;
    } else {
        let class = serde_json::json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
        fs::write(&to, serde_json::to_string_pretty(&class)? + "\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokenizer that is written for bytes gives every text's bytes.
    #[test]
    fn the_tokenizer_of_bytes_gives_bytes() {
        let folder = tempfile::tempdir().unwrap();
        export(&RunFolder(folder.path().join("run")), folder.path()).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        for text in ["//! plain text\n", " ünïcödé €  \t", "\u{0}\u{7f}\u{1f600}"] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_named_by_its_line() {
        let folder = tempfile::tempdir().unwrap();
        export(&RunFolder(folder.path().join("run")), folder.path()).unwrap();
        let json = fs::read(folder.path().join("tokenizer.json")).unwrap();
        let small = Vocabulary::read(json.clone(), Some("a"), 255).unwrap_err();
        assert!(small.to_string().contains("model.vocabulary is 255: expected at least 256"), "{small}");
        let cut = String::from_utf8(json.clone()).unwrap().replace(
            "\"truncation\":null",
            "\"truncation\":{\"direction\":\"Right\",\"max_length\":3,\"strategy\":\"LongestFirst\",\"stride\":0}",
        );
        let whole = Vocabulary::read(cut.into_bytes(), Some("a"), 256).unwrap().encode(b"longer than three", 1);
        assert_eq!(whole.unwrap().len(), 17, "nothing is cut off");
        let vocabulary = Vocabulary::read(json.clone(), Some("a"), 256).unwrap();
        assert_eq!(vocabulary.end(), u32::from(b'a'));
        let error = vocabulary.encode(b"one\ntwo\nth\xffree", 7).unwrap_err();
        assert_eq!(error.to_string(), "line 9 is not UTF-8");
        assert!(Vocabulary::read(json, None, 256).unwrap_err().to_string().contains("data.end"));
        assert!(Vocabulary::read(b"{}".to_vec(), None, 256).unwrap_err().to_string().contains("no tokenizer"));
    }
}
