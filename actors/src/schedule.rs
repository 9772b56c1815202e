//! The order in which a stage runs its operations: a pure list, made before the step.
//!
//! Invariants, held by the tests: every micro-batch has one forward, one backward for inputs and one
//! backward for weights, in this order; weight parts ascend in micro-batches (DESIGN 3.1).

/// One operation of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Forward of a micro-batch.
    Forward(u32),
    /// Input part of the backward.
    BackwardInput(u32),
    /// Weight part of the backward.
    BackwardWeight(u32),
}

/// One forward, one backward (PipeDream-Flush): stage `stage` of `stages` runs ahead by as many
/// forwards as there are stages after it, so at most `stages - stage` micro-batches are alive in it.
pub(crate) fn one_forward_one_backward(stage: u32, stages: u32, micro_batches: u32) -> Vec<Operation> {
    let ahead = (stages - stage).min(micro_batches);
    let mut program: Vec<Operation> = (0..ahead).map(Operation::Forward).collect();
    for micro_batch in 0..micro_batches {
        program.push(Operation::BackwardInput(micro_batch));
        program.push(Operation::BackwardWeight(micro_batch));
        if micro_batch + ahead < micro_batches {
            program.push(Operation::Forward(micro_batch + ahead));
        }
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_complete_and_ordered_and_bounded() {
        for stages in 1..6 {
            for stage in 0..stages {
                for micro_batches in 1..9 {
                    let program = one_forward_one_backward(stage, stages, micro_batches);
                    let (mut forward, mut input, mut weight) = (0, 0, 0);
                    for op in program {
                        match op {
                            Operation::Forward(m) => {
                                assert_eq!(m, forward);
                                forward += 1;
                            }
                            Operation::BackwardInput(m) => {
                                assert!(m == input && m < forward);
                                input += 1;
                            }
                            Operation::BackwardWeight(m) => {
                                assert!(m == weight && m < input);
                                weight += 1;
                            }
                        }
                        assert!(forward - weight <= stages - stage, "micro-batches alive");
                    }
                    assert_eq!((forward, input, weight), (micro_batches, micro_batches, micro_batches));
                }
            }
        }
    }
}
