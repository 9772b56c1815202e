//! `everstep export`: a checkpoint as a folder that `transformers` loads.
//!
//! Tensors are read, converted and written one at a time. The folder is made under another name and
//! renamed when it is whole. Tensors of multi-token prediction go into files of their own
//! (`mtp-*.safetensors`, with an index of their own) unless the model has the published depth:
//! `transformers` knows to pass over them at that depth alone.

use super::config_json;
use super::inventory::{self, Entry, Form, Precision};
use crate::data;
use crate::launcher::whole_folder;
use crate::weights::Which;
use anyhow::{Context, Result, bail};
use everstep_actors::{Config, RunFolder};
use everstep_checkpoint::{Manifest, Part, Reader};
use everstep_kernels::{bf16_bits, quantise_blocks};
use safetensors::Dtype;
use safetensors::tensor::View;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a file, unless a single tensor has more.
const FILE_MAX: usize = 4 << 30;
/// Layers of the published model.
const PUBLISHED_DEPTH: usize = 61;

/// A weight by name.
type Named = (Arc<str>, Arc<Vec<f32>>);

/// Where weights come from, and the first thing that went wrong.
struct Source<'a> {
    reader: &'a Reader,
    manifest: Manifest,
    part: Part,
    /// The last weight: an FP8 matrix is asked for its codes and its scales.
    last: RefCell<Option<Named>>,
    error: RefCell<Option<anyhow::Error>>,
}

impl Source<'_> {
    fn weight(&self, entry: &Entry) -> Result<Arc<Vec<f32>>> {
        let p = &entry.parameter;
        if let Some((name, data)) = &*self.last.borrow()
            && *name == p.name
        {
            return Ok(Arc::clone(data));
        }
        let data = self.reader.part(&self.manifest, &p.name, p.rows, p.columns, self.part)?;
        *self.last.borrow_mut() = Some((p.name.clone(), Arc::clone(&data)));
        Ok(data)
    }
}

/// A tensor that is made when it is written.
struct Lazy<'a> {
    entry: &'a Entry,
    source: &'a Source<'a>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.entry.form.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let weight = match self.source.weight(self.entry) {
            Ok(weight) => weight,
            Err(error) => {
                // The interface has no way to fail: what is written now is thrown away.
                self.source.error.borrow_mut().get_or_insert(error);
                return Cow::Owned(vec![0; self.data_len()]);
            }
        };
        let p = &self.entry.parameter;
        let bytes = match self.entry.form {
            Form::F32 => weight.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Form::Bf16 => weight.iter().flat_map(|x| bf16_bits(*x).to_le_bytes()).collect(),
            Form::Codes => quantise_blocks(&weight, p.rows, p.columns).0,
            Form::Scales => {
                quantise_blocks(&weight, p.rows, p.columns).1.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
        };
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.entry.bytes()
    }
}

/// Cuts tensors into files.
fn files(entries: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut files: Vec<Vec<Entry>> = Vec::new();
    let mut room = 0;
    for entry in entries {
        let bytes = entry.bytes();
        // A matrix and its scales stay together.
        if files.is_empty() || (bytes > room && entry.form != Form::Scales) {
            files.push(Vec::new());
            room = FILE_MAX;
        }
        room = room.saturating_sub(bytes);
        files.last_mut().expect("a file was begun").push(entry);
    }
    files
}

/// Writes tensors as `NAME-00001-of-0000N.safetensors` with an index.
fn write_set(
    folder: &Path,
    name: &str,
    entries: Vec<Entry>,
    source: &Source<'_>,
    bar: &indicatif::ProgressBar,
) -> Result<()> {
    let files = files(entries);
    let mut map = BTreeMap::new();
    let mut total = 0;
    for (n, entries) in files.iter().enumerate() {
        let file = format!("{name}-{:05}-of-{:05}.safetensors", n + 1, files.len());
        let views = entries.iter().map(|entry| (entry.name.clone(), Lazy { entry, source }));
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let path = folder.join(&file);
        safetensors::serialize_to_file(views, Some(format), &path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        if let Some(error) = source.error.borrow_mut().take() {
            return Err(error);
        }
        for entry in entries {
            total += entry.bytes();
            map.insert(entry.name.clone(), file.clone());
            bar.inc(1);
        }
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
    write_json(&folder.join(format!("{name}.safetensors.index.json")), &index)
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    fs::write(path, serde_json::to_string_pretty(value)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Exports weights of a run. Gives their step.
pub(crate) fn export(run: &RunFolder, out: &Path, which: Which, precision: Precision) -> Result<u64> {
    if out.exists() {
        bail!("{} exists: choose another folder", out.display());
    }
    let (config, reader) = crate::fingerprint::open(run)?;
    let step = crate::fingerprint::choose(&reader, which.step)?;
    let source = Source {
        reader: &reader,
        manifest: reader.manifest(step)?,
        part: which.part(),
        last: RefCell::default(),
        error: RefCell::default(),
    };
    whole_folder(out, |scratch| fill(scratch, &config, run, &source, precision))?;
    Ok(step)
}

fn fill(folder: &Path, config: &Config, run: &RunFolder, source: &Source<'_>, precision: Precision) -> Result<()> {
    let model = &config.spec.model;
    let apart = model.layers != PUBLISHED_DEPTH;
    let (mtp, main): (Vec<Entry>, Vec<Entry>) = inventory::of(model, precision).partition(|e| e.mtp && apart);
    let bar = indicatif::ProgressBar::new((mtp.len() + main.len()) as u64).with_message("tensors");
    write_set(folder, "model", main, source, &bar)?;
    if !mtp.is_empty() {
        write_set(folder, "mtp", mtp, source, &bar)?;
    }
    bar.finish_and_clear();
    let end = data::Vocabulary::of_run(run, config)?.end();
    let dtype = if precision == Precision::F32 { "float32" } else { "bfloat16" };
    write_json(&folder.join("config.json"), &config_json::write(model, dtype, precision == Precision::Fp8, end))?;
    let ends = serde_json::json!({ "eos_token_id": end });
    write_json(&folder.join("generation_config.json"), &ends)?;
    data::export(run, folder)
}
