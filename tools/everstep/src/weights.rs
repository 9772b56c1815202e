//! Which weights of a run a command is about, and all of them in memory, without moments.

use crate::fingerprint::{choose, open};
use anyhow::Result;
use everstep_actors::{Config, RunFolder};
use everstep_checkpoint::Part;
use everstep_kernels::{CpuBackend, ModelConfig, ParameterMap, Tensor};
use std::sync::Arc;

/// Which weights of a run.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct Which {
    /// The step; the newest stored one by default.
    #[arg(long)]
    pub(crate) step: Option<u64>,
    /// Their average over the steps, if the run keeps one (optimizer.ema).
    #[arg(long)]
    pub(crate) ema: bool,
}

impl Which {
    pub(crate) fn part(self) -> Part {
        if self.ema { Part::Average } else { Part::Weight }
    }
}

/// All weights of a stored step.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) config: Config,
    pub(crate) step: u64,
    pub(crate) map: ParameterMap,
}

impl Weights {
    /// Reads and verifies them.
    pub(crate) fn load(run: &RunFolder, which: Which) -> Result<Self> {
        let (config, reader) = open(run)?;
        let step = choose(&reader, which.step)?;
        let manifest = reader.manifest(step)?;
        let mut map = ParameterMap::new();
        for p in config.spec.model.parameters() {
            let data = reader.part(&manifest, &p.name, p.rows, p.columns, which.part())?;
            map.insert(p.name, Tensor::host(p.rows, p.columns, data));
        }
        Ok(Self { config, step, map })
    }

    /// The arithmetic of the run's precision. Generation and evaluation attend over the compressed cache, which
    /// leaves the up-projection of keys and values in f32.
    pub(crate) fn backend(&self) -> CpuBackend {
        CpuBackend::new(self.config.spec.precision)
    }

    pub(crate) fn model(&self) -> Arc<ModelConfig> {
        Arc::new(self.config.spec.model.clone())
    }
}
