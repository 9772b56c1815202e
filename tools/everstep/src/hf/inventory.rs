//! The tensors of a published checkpoint: names, shapes, types.

use everstep_kernels::{Group, ModelConfig, Parameter, Update};
use std::sync::Arc;

/// Rows and columns of a block that shares a scale in the FP8 form.
pub(crate) const BLOCK: usize = 128;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Precision {
    /// Everything in f32.
    F32,
    /// Everything but the gates' biases in bf16.
    Bf16,
    /// Matrices of attention and feed-forward parts in E4M3 with a scale for each block of 128 x 128,
    /// the others in bf16.
    Fp8,
}

/// How one tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    Bf16,
    /// The codes of a matrix.
    Codes,
    /// The scales of a matrix.
    Scales,
}

impl Form {
    pub(crate) fn dtype(self) -> safetensors::Dtype {
        match self {
            Self::F32 | Self::Scales => safetensors::Dtype::F32,
            Self::Bf16 => safetensors::Dtype::BF16,
            Self::Codes => safetensors::Dtype::F8_E4M3,
        }
    }
}

/// One tensor of a folder.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Its name in the file.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) form: Form,
    /// The parameter that it is made of.
    pub(crate) parameter: Arc<Parameter>,
    /// Whether it belongs to multi-token prediction.
    pub(crate) mtp: bool,
}

impl Entry {
    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.form.dtype().bitsize() / 8
    }
}

/// Whether the published FP8 checkpoint has a matrix quantised: the projections of attention and of all
/// feed-forward parts, but neither gates nor what is outside the blocks.
fn is_quantised(p: &Parameter) -> bool {
    let projection = p.name.ends_with("_proj.weight") || p.name.ends_with("_proj_with_mqa.weight");
    p.update == Update::Decayed && projection && !p.name.ends_with("eh_proj.weight")
}

/// All tensors of a model in order of its parameters; those of multi-token prediction with the copies of
/// embedding and head that the published layout has.
pub(crate) fn of(model: &ModelConfig, precision: Precision) -> impl Iterator<Item = Entry> + '_ {
    let prediction = format!("model.layers.{}.", model.layers);
    model.groups_of_model().into_iter().flat_map(move |group| {
        let mtp = matches!(group, Group::Layer(l) | Group::Expert { layer: l, .. } if l as usize >= model.layers);
        let mut entries = Vec::new();
        for p in model.parameters_of(group).into_iter().map(Arc::new) {
            entries.extend(entries_of(p.name.to_string(), &p, precision, mtp));
        }
        if mtp && matches!(group, Group::Layer(_)) {
            for (shared, name) in [(Group::Embedding, "embed_tokens.weight"), (Group::Head, "shared_head.head.weight")]
            {
                let all = model.parameters_of(shared).into_iter();
                for p in all.filter(|p| p.update == Update::Decayed).map(Arc::new) {
                    entries.extend(entries_of(format!("{prediction}{name}"), &p, precision, true));
                }
            }
        }
        entries
    })
}

fn entries_of(name: String, p: &Arc<Parameter>, precision: Precision, mtp: bool) -> Vec<Entry> {
    let shape = if p.update == Update::Decayed { vec![p.rows, p.columns] } else { vec![p.columns] };
    let entry = |name, shape, form| Entry { name, shape, form, parameter: Arc::clone(p), mtp };
    match precision {
        Precision::Fp8 if is_quantised(p) => {
            let scales = vec![p.rows.div_ceil(BLOCK), p.columns.div_ceil(BLOCK)];
            let scale = format!("{name}_scale_inv");
            vec![entry(name, shape, Form::Codes), entry(scale, scales, Form::Scales)]
        }
        Precision::Bf16 | Precision::Fp8 if p.update != Update::Balance => vec![entry(name, shape, Form::Bf16)],
        Precision::F32 | Precision::Bf16 | Precision::Fp8 => vec![entry(name, shape, Form::F32)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published FP8 checkpoint, to the byte: what the headers of its files add up to.
    #[test]
    fn the_published_checkpoint_has_these_tensors() {
        let text = include_str!("../../../../configs/deepseek-v3.toml");
        let model = everstep_actors::Config::parse(text, "deepseek-v3.toml", &[]).unwrap().spec.model;
        let (mut count, mut bytes) = (0, 0);
        for entry in of(&model, Precision::Fp8) {
            count += 1;
            bytes += entry.bytes();
        }
        assert_eq!((count, bytes), (91_991, 688_574_839_360));
    }
}
