//! A parameter's state as the store of checkpoints has it, and back.

use everstep_checkpoint::{Element, StoredPart, StoredTensor};
use everstep_kernels::{Tensor, Words};

/// What the store calls it.
pub(crate) fn element(words: Words) -> Element {
    match words {
        Words::F32 => Element::F32,
        Words::Bf16 => Element::Bf16,
    }
}

/// To be stored. Panics on tensors that are not in host memory.
pub fn stored(name: &str, state: &[Tensor]) -> StoredTensor {
    let part = |t: &Tensor| {
        let (kind, words) = t.to_words();
        StoredPart { element: element(kind), words }
    };
    StoredTensor {
        name: name.to_owned(),
        rows: state[0].rows(),
        columns: state[0].columns(),
        parts: state.iter().map(part).collect(),
    }
}

/// From the store.
pub fn state_of(tensor: StoredTensor) -> Vec<Tensor> {
    let part = |part: StoredPart| {
        let kind = match part.element {
            Element::F32 => Words::F32,
            Element::Bf16 => Words::Bf16,
        };
        Tensor::from_words(tensor.rows, tensor.columns, kind, part.words)
    };
    tensor.parts.into_iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_was() {
        let weight = Tensor::from_vec(3, 3, (0..9).map(|i| i as f32).collect());
        let state = [weight, Tensor::zeros(3, 3, Words::Bf16), Tensor::zeros(3, 3, Words::F32)];
        let back = state_of(stored("w", &state));
        assert_eq!(format!("{back:?}"), format!("{state:?}"));
        assert_eq!(back[0].as_host(), state[0].as_host());
    }
}
