//! All weights of a stored step in memory, without moments.

use crate::fingerprint::{choose, open};
use anyhow::Result;
use everstep_actors::{Config, RunFolder};
use everstep_kernels::{CpuBackend, ModelConfig, ParameterMap, Tensor};
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) config: Config,
    pub(crate) step: u64,
    pub(crate) map: ParameterMap,
}

impl Weights {
    /// Of a step of a run, the newest by default.
    pub(crate) fn load(run: &RunFolder, step: Option<u64>) -> Result<Self> {
        let (config, reader) = open(run)?;
        let step = choose(&reader, run, step)?;
        let manifest = reader.manifest(step)?;
        let mut map = ParameterMap::new();
        for p in config.spec.model.parameters() {
            let data = reader.weight(&manifest, &p.name, p.rows, p.columns)?;
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
