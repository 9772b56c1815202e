//! `everstep import`: a run whose first state is a published checkpoint.
//!
//! Every tensor is checked before anything is written, then read one at a time. What is written is an
//! ordinary checkpoint of step 0, so each reducer gets the tensors of its shard alone.

use super::config_json;
use super::read::Folder;
use crate::data;
use anyhow::{Context, Result, bail};
use everstep_actors::{Config, RunFolder, first_state, stored};
use everstep_checkpoint::Store;
use everstep_kernels::ModelConfig;
use std::path::Path;

/// Missing or unexpected names in an error.
const SHOWN: usize = 5;

fn shown(names: &[String]) -> String {
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

/// A folder that holds exactly what `model` needs.
#[derive(Debug)]
pub(crate) struct Source {
    folder: Folder,
}

impl Source {
    /// Opens a folder and checks it against the model, without reading its weights.
    pub(crate) fn open(path: &Path, model: &ModelConfig) -> Result<Self> {
        let json = path.join("config.json");
        config_json::compare(&data::read_json(&json)?, model).with_context(|| json.display().to_string())?;
        let folder = Folder::open(path, &["model", "mtp"])?;
        let parameters = model.parameters();
        let missing = parameters.iter().map(|p| p.name.to_string()).filter(|n| !folder.has(n));
        let missing: Vec<String> = missing.collect();
        if !missing.is_empty() {
            bail!("{}: {} tensors are missing: {}", path.display(), missing.len(), shown(&missing));
        }
        for p in &parameters {
            folder.check(&p.name, p.rows, p.columns)?;
        }
        let known: std::collections::BTreeSet<&str> = parameters.iter().map(|p| &*p.name).collect();
        // A model without multi-token prediction may come from a checkpoint with it.
        let prediction = format!("model.layers.{}.", model.layers);
        let expected = |name: &str| {
            let name = name.strip_suffix("_scale_inv").unwrap_or(name);
            known.contains(name) || name.starts_with(&prediction)
        };
        let foreign: Vec<String> = folder.names().filter(|n| !expected(n)).map(str::to_owned).collect();
        if !foreign.is_empty() {
            bail!("{}: {} tensors that the model does not have: {}", path.display(), foreign.len(), shown(&foreign));
        }
        Ok(Self { folder })
    }

    /// Makes the checkpoint of step 0 in a run folder that is being made.
    pub(crate) fn store(&self, run: &RunFolder, config: &Config, job: &str) -> Result<()> {
        let mut store = Store::open(run.store(config, job)?, Some(&run.catalogue()), job, config.keep)?;
        let parameters = config.spec.model.parameters();
        let bar = indicatif::ProgressBar::new(parameters.len() as u64).with_message("tensors");
        for p in &parameters {
            let weight = self.folder.read(&p.name, p.rows, p.columns)?;
            store.put(0, &[stored(&p.name, &first_state(&config.spec, p, weight))])?;
            bar.inc(1);
        }
        store.publish(0)?;
        bar.finish_and_clear();
        Ok(())
    }
}
