//! Text becomes tokens: files of many formats, a tokenizer, a cache of mapped token files.
//!
//! - DA-1: a cache file is whole or not there; the files that it is made of (path, length, time of change),
//!   the tokenizer and the vocabulary name it.
//! - DA-2: tokens do not depend on the number of threads: pieces of text are cut by their content and
//!   written in their order.

mod cache;
mod documents;
mod files;
mod megatron;
mod tokenizer;

pub(crate) use tokenizer::{Vocabulary, export, keep_config, of_folder, read_json};

use anyhow::{Context, Result, ensure};
use everstep_actors::{Config, Corpus, RunFolder, RunIdentity, SourceInfo, Tokens};
use everstep_checkpoint::Mapped;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// A run's text, ready to be trained on.
#[derive(Debug)]
pub(crate) struct Data {
    /// Cache files with what is known of them, in order of the sources.
    sources: Vec<(PathBuf, SourceInfo)>,
    vocabulary: Vocabulary,
}

/// The cache folder of a configuration.
fn cache_folder(config: &Config) -> PathBuf {
    let beside = || config.folder.parent().map_or_else(PathBuf::new, PathBuf::from).join("cache");
    config.data.cache.clone().unwrap_or_else(beside)
}

/// Makes the tokens of some paths, or finds them in the cache.
fn source(config: &Config, vocabulary: &Vocabulary, paths: &[PathBuf]) -> Result<(PathBuf, SourceInfo)> {
    let files = files::collect(paths)?;
    let named = || format!("data: {paths:?}");
    cache::tokens(&cache_folder(config), &files, &config.data.field, vocabulary, config.spec.model.vocabulary)
        .with_context(named)
}

impl Data {
    /// Tokenises what the configuration names.
    pub(crate) fn prepare(config: &Config) -> Result<Self> {
        let vocabulary = Vocabulary::of(&config.data, config.spec.model.vocabulary)?;
        let all = config.data.sources.iter();
        let sources = all.map(|s| source(config, &vocabulary, &s.paths)).collect::<Result<Vec<_>>>()?;
        if let Some(eval) = &config.data.eval {
            // What is wrong with it is said now, not after hours.
            source(config, &vocabulary, &eval.paths).context("data.eval")?;
        }
        let data = Self { sources, vocabulary };
        let tokens = data.sources.iter().map(|(path, info)| map(path, info)).collect::<Result<Vec<_>>>()?;
        let paths: Vec<&Vec<PathBuf>> = config.data.sources.iter().map(|s| &s.paths).collect();
        Corpus::new(tokens, &config.spec).with_context(|| format!("data: {paths:?}"))?;
        Ok(data)
    }

    /// Puts the snapshot into a run folder that is being made: links to the cache, or copies.
    pub(crate) fn store(&self, run: &RunFolder) -> Result<Vec<SourceInfo>> {
        fs::create_dir_all(run.data())?;
        for (n, (path, _)) in self.sources.iter().enumerate() {
            let to = run.tokens(n);
            // Another file system has no links to this one.
            fs::hard_link(path, &to)
                .or_else(|_| fs::copy(path, &to).map(|_| ()))
                .with_context(|| format!("cannot write {}", to.display()))?;
        }
        if let Some(json) = self.vocabulary.file() {
            fs::write(run.tokenizer(), json)?;
        }
        Ok(self.sources.iter().map(|(_, info)| info.clone()).collect())
    }
}

/// Writes what the steps of a run are trained on.
pub(crate) fn samples(run: &RunFolder, steps: std::ops::Range<u64>, out: &mut impl Write) -> Result<()> {
    ensure!(steps.start > 0, "steps are counted from 1 on");
    let (config, _) = crate::fingerprint::open(run)?;
    let identity = RunIdentity::read(run)?;
    let tokens = identity.sources.iter().enumerate().map(|(n, info)| map(&run.tokens(n), info));
    let spec = &config.spec;
    let corpus = Corpus::new(tokens.collect::<Result<_>>()?, spec)?;
    for step in steps {
        for lane in 0..spec.lanes {
            for micro_batch in 0..spec.micro_batches.at(step) {
                let (tokens, targets) = corpus.micro_batch(spec, step, lane, micro_batch);
                let line = serde_json::json!({
                    "step": step, "lane": lane, "micro_batch": micro_batch, "tokens": tokens, "targets": targets,
                });
                writeln!(out, "{line}")?;
            }
        }
    }
    Ok(())
}

fn map(path: &std::path::Path, info: &SourceInfo) -> Result<Tokens> {
    let mapped = Mapped::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Tokens::new(Arc::new(mapped), info.width))
}

/// The held-out tokens of some paths, for a run with its own tokenizer.
pub(crate) fn held_out(run: &RunFolder, config: &Config, paths: &[PathBuf]) -> Result<Tokens> {
    let vocabulary = Vocabulary::of_run(run, config)?;
    let (path, info) = source(config, &vocabulary, paths)?;
    map(&path, &info)
}
