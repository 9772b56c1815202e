//! What the CPU backend makes of random rows, as raw files that `tests/peers/hopper/memory.py` holds the GPU's kernels
//! against, bit for bit. usage: `hopper_reference FOLDER`

use everstep_kernels::{Backend, CpuBackend, Dispatch, GateShape, Philox, Precision, Tensor, Words};
use std::path::Path;
use std::sync::Arc;

const ROWS: usize = 1001;
const COLUMNS: usize = 1152;
const EPS: f32 = 1e-6;
const GATE: GateShape =
    GateShape { experts: 32, top_k: 8, groups: 8, groups_kept: 4, routed_scale: 2.5, sequence: ROWS };

/// Random numbers, some of them in tiles of zeros, tiny and huge ones.
fn random(name: u32, rows: usize, columns: usize) -> Arc<Vec<f32>> {
    let mut x = Philox::new(5, 77, name).normals(rows * columns, 2.0);
    for (tile, x) in x.chunks_mut(128).enumerate() {
        let factor = [1.0, 1.0, 1.0, 0.0, 1e-20, 1e10, 1.0, 1e-4][tile % 8];
        x.iter_mut().for_each(|x| *x *= factor);
    }
    Arc::new(x)
}

fn save(folder: &Path, name: &str, x: &Tensor) -> std::io::Result<()> {
    let (kind, words) = x.to_words();
    let bytes = x.rows() * x.columns() * if kind == Words::Bf16 { 2 } else { 4 };
    std::fs::write(folder.join(name), &bytemuck::cast_slice::<f32, u8>(&words)[..bytes])
}

fn main() -> std::io::Result<()> {
    let argument = std::env::args().nth(1).ok_or_else(|| std::io::Error::other("usage: hopper_reference FOLDER"))?;
    let folder = Path::new(&argument);
    std::fs::create_dir_all(folder)?;
    let b = CpuBackend::new(Precision::Bf16);
    let low = |name| b.upload(ROWS, COLUMNS, random(name, ROWS, COLUMNS));
    let (x, up, dy) = (low(1), low(2), low(3));
    let w = Tensor::from_vec(1, COLUMNS, Philox::new(5, 77, 4).normals(COLUMNS, 1.0));
    for (name, input) in [("x", &x), ("up", &up), ("dy", &dy), ("w", &w)] {
        save(folder, name, input)?;
    }
    let q = b.quantise(&x);
    let (codes, scales) = q.as_quantised().ok_or_else(|| std::io::Error::other("codes and scales"))?;
    std::fs::write(folder.join("codes"), codes)?;
    std::fs::write(folder.join("scales"), bytemuck::cast_slice::<f32, u8>(scales))?;
    save(folder, "norm", &b.rms_norm(&x, &w, EPS))?;
    save(folder, "norm_backward", &b.rms_norm_backward_input(&x, &w, &dy, EPS))?;
    save(folder, "swiglu", &b.swiglu(&x, &up))?;
    let [_, dgate, dup] = b.swiglu_backward(&x, &up, &dy);
    save(folder, "dgate", &dgate)?;
    save(folder, "dup", &dup)?;
    // A combine: what each token's experts made of it is that expert's own factor times its row.
    let logits = Tensor::from_vec(ROWS, GATE.experts, Philox::new(5, 77, 6).normals(ROWS * GATE.experts, 1.0));
    let (experts, weights) = b.gate(&logits, &Tensor::from_vec(1, GATE.experts, vec![0.0; GATE.experts]), &GATE);
    let chosen = b.read_indices(&experts).map_err(std::io::Error::other)?;
    let plan = Dispatch::new(&chosen, GATE.top_k, GATE.experts, GATE.groups);
    let made = b.upload(chosen.len(), COLUMNS, random(7, chosen.len(), COLUMNS));
    let starts = plan.starts();
    let of_expert = |(from, count): (&usize, u64)| b.rows(&made, *from, count as usize);
    let rows: Vec<Tensor> = starts.iter().zip(plan.counts()).map(of_expert).collect();
    let place: Vec<u32> = plan.slots.iter().map(|s| starts[s.expert as usize] as u32 + s.row).collect();
    std::fs::write(folder.join("experts"), bytemuck::cast_slice::<u32, u8>(&chosen))?;
    std::fs::write(folder.join("place"), bytemuck::cast_slice::<u32, u8>(&place))?;
    save(folder, "weights", &weights)?;
    save(folder, "rows", &made)?;
    save(folder, "combine", &b.combine(&rows, Some(&weights), &plan))?;
    Ok(())
}
