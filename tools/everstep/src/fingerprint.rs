//! The fingerprint of a stored step, computed again from its chunks.

use anyhow::{Context, Result, bail};
use everstep_actors::{Config, Layout, RunFolder, RunIdentity, fingerprint_root, state_of};
use everstep_checkpoint::{Reader, StoredTensor};
use everstep_kernels::state_sum;

/// Opens a run folder's configuration and store.
pub(crate) fn open(run: &RunFolder) -> Result<(Config, Reader)> {
    let path = run.config();
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = Config::parse(&text, &path.display().to_string(), &[])?;
    let job = RunIdentity::read(run)?.job;
    let place = run.store(&config, &job)?;
    Ok((config, Reader::new(place, &job)))
}

/// A stored step: the newest by default.
pub(crate) fn choose(store: &Reader, step: Option<u64>) -> Result<u64> {
    let steps = store.steps()?;
    match step {
        Some(step) if steps.contains(&step) => Ok(step),
        Some(step) => bail!("step {step} is not stored in {}: there are {steps:?}", store.path().display()),
        None => Ok(*steps.last().with_context(|| format!("{} holds no checkpoint", store.path().display()))?),
    }
}

/// All tensors of a stored step, in order of name.
pub(crate) fn tensors(run: &RunFolder, step: Option<u64>) -> Result<(Config, u64, Vec<StoredTensor>)> {
    let (config, store) = open(run)?;
    let step = choose(&store, step)?;
    let layout = Layout::new(&config.spec);
    let names: Vec<_> = layout.parameters.iter().map(|p| (p.name.to_string(), p.rows, p.columns)).collect();
    let tensors = store.read(step, &names)?;
    Ok((config, step, tensors))
}

pub(crate) fn of_step(run: &RunFolder, step: Option<u64>) -> Result<String> {
    let (config, _, tensors) = tensors(run, step)?;
    let layout = Layout::new(&config.spec);
    let sums = tensors.into_iter().enumerate().map(|(n, t)| (n as u32, state_sum(&state_of(t))));
    Ok(fingerprint_root(&layout, &sums.collect()))
}
