//! A value that changes at given steps and is constant between them: a pure function of the step.
//!
//! In a configuration it is a plain value, or a list of `[from step, value]` pairs that starts at step 0.

use crate::ids::Step;
use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Pieces<T> {
    /// The same at every step.
    Constant(T),
    /// Each value from its step on.
    From(Vec<(Step, T)>),
}

impl<T: Copy> Pieces<T> {
    /// Its value at a step.
    pub fn at(&self, step: Step) -> T {
        match self {
            Self::Constant(value) => *value,
            Self::From(pieces) => {
                let piece = pieces.iter().rev().find(|(from, _)| *from <= step);
                piece.expect("a checked list starts at step 0").1
            }
        }
    }

    /// Every value.
    pub fn values(&self) -> impl Iterator<Item = T> + '_ {
        let (one, list) = match self {
            Self::Constant(value) => (Some(*value), &[][..]),
            Self::From(pieces) => (None, &pieces[..]),
        };
        one.into_iter().chain(list.iter().map(|(_, value)| *value))
    }

    /// Whether it has a value at every step.
    pub fn is_whole(&self) -> bool {
        match self {
            Self::Constant(_) => true,
            Self::From(pieces) => {
                pieces.first().is_some_and(|(from, _)| *from == 0) && pieces.windows(2).all(|w| w[0].0 < w[1].0)
            }
        }
    }
}

impl Pieces<u32> {
    /// The sum over the steps `1..step`.
    pub fn before(&self, step: Step) -> u64 {
        match self {
            Self::Constant(value) => u64::from(*value) * (step - 1),
            Self::From(pieces) => {
                let ends = pieces.iter().skip(1).map(|(from, _)| *from).chain([Step::MAX]);
                let of = |((from, value), end): (&(Step, u32), Step)| {
                    u64::from(*value) * end.min(step).saturating_sub((*from).max(1))
                };
                pieces.iter().zip(ends).map(of).sum()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_the_value_of_their_step_and_add_up() {
        let pieces = Pieces::From(vec![(0, 2u32), (4, 3), (6, 7)]);
        assert!(pieces.is_whole());
        assert_eq!((1..8).map(|s| pieces.at(s)).collect::<Vec<_>>(), [2, 2, 2, 3, 3, 7, 7]);
        for step in 1..12 {
            assert_eq!(pieces.before(step), (1..step).map(|s| u64::from(pieces.at(s))).sum::<u64>(), "{step}");
            assert_eq!(Pieces::Constant(5).before(step), 5 * (step - 1));
        }
        for bad in [vec![], vec![(1, 2)], vec![(0, 2), (0, 3)], vec![(0, 2), (5, 3), (4, 3)]] {
            assert!(!Pieces::From(bad).is_whole());
        }
    }
}
