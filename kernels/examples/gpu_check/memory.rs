//! Memory that is given back by threads which never did anything on a GPU, and indices that no kernel may get.

use crate::{random, report};
use everstep_kernels::{
    AttentionShape, Backend, BackendError, CudaBackend, Dispatch, GateShape, NoCubins, Precision, Role, RopeShape,
    Tensor,
};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

/// Bytes that libraries may keep for themselves from round to round.
const KEPT: f64 = (8 << 20) as f64;
/// Elements of the matrices of a round: 64 MiB in BF16.
const SIDE: usize = 4096;

/// Drops something on a new thread.
fn elsewhere(what: impl Send + 'static) {
    std::thread::spawn(move || drop(what)).join().expect("dropping does not panic");
}

/// Handles of each kind: elements and a part of them, indices, and weights of host memory.
fn handles(b: &CudaBackend) -> Result<Vec<Tensor>, BackendError> {
    let shape = GateShape { experts: 8, top_k: 2, groups: 1, groups_kept: 1, routed_scale: 1.0, sequence: 64 };
    let x = b.upload(SIDE, SIDE, vec![0.5; SIDE * SIDE].into());
    let weight = Tensor::from_vec(SIDE, 64, vec![0.25; SIDE * 64]);
    let tokens = b.upload_indices(vec![0; 1 << 20]);
    let (experts, weights) =
        b.gate(&Tensor::host(64, 8, random(64, 8, 151)), &Tensor::from_vec(1, 8, vec![0.0; 8]), &shape);
    // In FP8 handles keep the codes of operands.
    let (other, role) = (Tensor::from_vec(64, SIDE, vec![0.1; 64 * SIDE]), Role::Projection);
    let product = b.linear_backward_weight(&x, &b.linear(&x, &other, role), role);
    let all = vec![
        b.add(&x, &x),
        b.rows(&x, 1, 2),
        b.embedding(&tokens, &weight),
        x,
        weight,
        other,
        tokens,
        experts,
        weights,
        product,
    ];
    b.synchronize()?;
    Ok(all)
}

/// What a backend keeps: angles, and in BF16 a plan of attention with its space.
fn kept(b: &CudaBackend) -> Result<(), BackendError> {
    let s = AttentionShape { heads: 2, nope: 128, rope: 64, value: 128, sequence: 2048, scale: 0.1 };
    let [q, kv, k_rope] = [s.heads * 192, s.heads * 256, 64]
        .map(|columns| b.upload(s.sequence, columns, vec![0.1; s.sequence * columns].into()));
    let rope = RopeShape {
        heads: 2,
        head_width: 192,
        offset: 128,
        width: 64,
        sequence: 2048,
        first: 0,
        theta: 1e4,
        yarn: None,
    };
    let q = b.rope(&q, &rope, false);
    let state = b.attention(q, kv, k_rope, &s);
    b.read(&state.o).map(drop)
}

/// Handles, then a whole backend, dropped on threads of their own: all memory is free again, and others go on.
fn given_back(precision: Precision) -> Result<bool, BackendError> {
    let make = || CudaBackend::new(0, precision, Box::new(NoCubins));
    let (b, mut good) = (make()?, true);
    // The first round loads code, which stays.
    drop(handles(&b)?);
    kept(&b)?;
    let free = |b: &CudaBackend| Ok::<_, BackendError>(b.gpu().memory()?.0 as f64);
    let before = free(&b)?;
    let held = handles(&b)?;
    let taken = before - free(&b)?;
    elsewhere(held);
    let missing = before - free(&b)?;
    good &=
        report(&format!("{precision} handles dropped on another thread: bytes missing"), taken as u64, missing, 0.0);
    let x = b.upload(2, 2, vec![1.0; 4].into());
    let sum = b.read(&b.add(&x, &x))?;
    good &= report("a sum afterwards: wrong elements", 4, sum.iter().filter(|x| **x != 2.0).count() as f64, 0.0);
    for round in 0..2 {
        let before = free(&b)?;
        let other = make()?;
        kept(&other)?;
        let all = handles(&other)?;
        let taken = before - free(&b)?;
        elsewhere((all, other));
        let missing = before - free(&b)?;
        // cuDNN and cuBLASLt keep something of the first that they make.
        let most = if round == 0 { f64::INFINITY } else { KEPT };
        good &= report(
            &format!("{precision} a backend dropped on another thread: bytes missing"),
            taken as u64,
            missing,
            most,
        );
    }
    Ok(good)
}

/// What a broken caller asks for is refused before a kernel sees it.
fn refused(b: &CudaBackend) -> Result<bool, BackendError> {
    let s = GateShape { experts: 8, top_k: 2, groups: 1, groups_kept: 1, routed_scale: 1.0, sequence: 4 };
    let (logits, dweights) = (Tensor::host(4, 8, random(4, 8, 152)), Tensor::host(4, 2, random(4, 2, 153)));
    let narrow = GateShape { experts: 4, ..s };
    let choices = |most: u32| b.upload_indices(vec![0, 1, 2, 3, 4, 5, 6, most]);
    let rows = b.upload(4, 16, random(4, 16, 154));
    let mut plan = Dispatch::new(&[0, 1, 1, 0], 1, 2, 1);
    plan.slots[3].row = 2;
    let of_experts = [b.rows(&rows, 0, 2), b.rows(&rows, 2, 2)];
    let weights = Tensor::host(4, 1, random(4, 1, 155));
    let broken: [(&str, &dyn Fn()); 6] = [
        ("a choice of no expert", &|| drop(b.gate_backward(&logits, &choices(8), &dweights, &s))),
        ("a gate of other columns", &|| drop(b.gate_backward(&logits, &choices(3), &dweights, &narrow))),
        ("a balance of other columns", &|| drop(b.gate_balance_backward(&logits, &narrow, 0.1))),
        ("a balance without sequences", &|| {
            drop(b.gate_balance_backward(&logits, &GateShape { sequence: 0, ..s }, 0.1))
        }),
        ("a combine of a row that is not there", &|| drop(b.combine(&of_experts, None, &plan))),
        ("its gradients", &|| drop(b.combine_backward(&rows, &of_experts, &weights, &plan))),
    ];
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let taken = broken.map(|(what, run)| (what, catch_unwind(AssertUnwindSafe(run)).is_ok()));
    set_hook(hook);
    let mut good = true;
    for (what, taken) in taken {
        good &= report(&format!("{what}: taken, not refused"), (), f64::from(taken), 0.0);
    }
    // One that is not broken, after those.
    let d = b.read(&b.gate_backward(&logits, &choices(7), &dweights, &s))?;
    Ok(good
        & report(
            "a gate's gradient afterwards: no number",
            d.len(),
            d.iter().filter(|x| !x.is_finite()).count() as f64,
            0.0,
        ))
}

/// In all precisions; `b` is in FP32.
pub(crate) fn all(b: &CudaBackend) -> Result<bool, BackendError> {
    Ok(refused(b)? & given_back(Precision::Fp32)? & given_back(Precision::Bf16)? & given_back(Precision::Fp8)?)
}
