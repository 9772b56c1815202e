//! Linear layers in low precision, on tensors that keep the forms that products read.

use super::{Columns, Left, Matrix, Path, Quantised, Rows, Scaling, TILE, Target, Turned, product, scaled_product};
use crate::backend::{Precision, Role};
use crate::element::Element;
use crate::tensor::{Tensor, with_elements};

/// How a role's products are made in a precision; none: in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// BF16 operands.
    Rounded,
    /// E4M3 operands, with the scaling of the activation and of its gradient.
    Quantised { x: Scaling, dy: Scaling },
}

impl Form {
    fn index(self) -> usize {
        usize::from(self != Self::Rounded)
    }

    /// Scaling of an activation, in E4M3.
    fn of_x(self) -> Option<Scaling> {
        match self {
            Self::Rounded => None,
            Self::Quantised { x, .. } => Some(x),
        }
    }

    /// Scaling of a gradient, in E4M3.
    fn of_dy(self) -> Option<Scaling> {
        match self {
            Self::Rounded => None,
            Self::Quantised { dy, .. } => Some(dy),
        }
    }

    /// The recipe of the technical report, section 3.3.
    pub(crate) fn of(precision: Precision, role: Role) -> Option<Self> {
        use Scaling::{Exact, PowerOfTwo};
        match (precision, role) {
            (Precision::Fp32, _) | (_, Role::Gate) => None,
            (Precision::Bf16, _) | (Precision::Fp8, Role::Head) => Some(Self::Rounded),
            (Precision::Fp8, Role::Projection) => Some(Self::Quantised { x: Exact, dy: Exact }),
            (Precision::Fp8, Role::Output | Role::ExpertIn) => Some(Self::Quantised { x: PowerOfTwo, dy: Exact }),
            (Precision::Fp8, Role::ExpertOut) => Some(Self::Quantised { x: Exact, dy: PowerOfTwo }),
        }
    }
}

/// A tensor as rows of a product in BF16: itself, if it is stored so and has whole blocks of columns.
fn rounded(x: &Tensor) -> Rows<'_> {
    let (rows, columns) = (x.rows(), x.columns());
    let form = || with_elements!(x, elements => Matrix::round(elements, rows, columns, columns));
    Rows::of(x).unwrap_or_else(|| x.forms().rounded.get_or_init(form).view())
}

fn along_rows(x: &Tensor, scaling: Scaling) -> &Quantised {
    let form = || with_elements!(x, elements => Quantised::rows(elements, x.rows(), x.columns(), scaling));
    x.forms().along_rows[scaling as usize].get_or_init(form)
}

/// A gradient in tiles along its columns, which are the rows of a weight gradient.
fn along_columns(x: &Tensor, scaling: Scaling) -> &Quantised {
    x.forms().along_columns[scaling as usize].get_or_init(|| {
        let q = with_elements!(x, elements => Quantised::columns(elements, x.rows(), x.columns(), scaling));
        Quantised { values: q.values.view().transposed(), scales: q.scales }
    })
}

/// An activation is kept in tiles along its rows: for a weight gradient those are quantised once more.
fn again_along_columns(x: &Tensor, scaling: Scaling) -> &(Columns, Vec<f32>) {
    x.forms().again[scaling as usize].get_or_init(|| {
        let values = along_rows(x, scaling).dequantised_rows();
        let q = Quantised::columns(&values, x.rows(), x.columns(), scaling);
        (Columns::of_columns(q.values.view()), q.scales)
    })
}

/// A weight in E4M3: both of its products read it.
fn blocks(w: &Tensor) -> &Quantised {
    w.forms().blocks.get_or_init(|| Quantised::blocks(w.f32s(), w.rows(), w.columns()))
}

/// A weight as columns of the forward product, with scales in FP8.
fn by_rows(w: &Tensor, form: Form) -> &(Columns, Vec<f32>) {
    w.forms().by_rows[form.index()].get_or_init(|| match form {
        Form::Rounded => (Columns::of_rows(rounded(w)), Vec::new()),
        Form::Quantised { .. } => (Columns::of_rows(blocks(w).values.view()), blocks(w).scales.clone()),
    })
}

/// A weight as columns of the backward product, or an activation as those of a weight gradient.
fn by_columns(w: &Tensor, form: Form) -> &(Columns, Vec<f32>) {
    w.forms().by_columns[form.index()].get_or_init(|| match form {
        Form::Rounded => (Columns::of_columns(rounded(w)), Vec::new()),
        Form::Quantised { .. } => {
            let q = blocks(w);
            let (rows, columns) = (w.rows().div_ceil(TILE), w.columns().div_ceil(TILE));
            let scale = |at: usize| q.scales[at % rows * columns + at / rows];
            (Columns::of_columns(q.values.view()), (0..rows * columns).map(scale).collect())
        }
    })
}

/// Rows times columns, with scales in FP8.
fn times<E: Element>(
    path: Path,
    x: &Tensor,
    scaling: Option<Scaling>,
    (b, scales): &(Columns, Vec<f32>),
    to: &mut Target<'_, E>,
) {
    match scaling {
        None => product(path, Left::Rows(rounded(x)), b, to),
        Some(scaling) => {
            let x = along_rows(x, scaling);
            scaled_product(path, (x.values.view(), &x.scales), (b, scales, TILE), to);
        }
    }
}

/// `x_TI w_OI^T -> y_TO`.
pub(crate) fn forward<E: Element>(path: Path, form: Form, x: &Tensor, w: &Tensor, y: &mut [E]) {
    times(path, x, form.of_x(), by_rows(w, form), &mut Target { data: y, stride: w.rows() });
}

/// `dy_TO w_OI -> dx_TI`.
pub(crate) fn backward_input<E: Element>(path: Path, form: Form, dy: &Tensor, w: &Tensor, dx: &mut [E]) {
    times(path, dy, form.of_dy(), by_columns(w, form), &mut Target { data: dx, stride: w.columns() });
}

/// `dy_TO^T x_TI -> dw_OI`, in f32.
pub(crate) fn backward_weight(path: Path, form: Form, dy: &Tensor, x: &Tensor) -> Vec<f32> {
    let mut dw = crate::wide::unwritten(dy.columns() * x.columns());
    let to = &mut Target { data: &mut dw, stride: x.columns() };
    match form {
        Form::Rounded => {
            product(path, Turned::of(path, rounded(dy)).left(), &by_columns(x, form).0, to);
        }
        Form::Quantised { x: x_scaling, dy: dy_scaling } => {
            let (a, (b, scales)) = (along_columns(dy, dy_scaling), again_along_columns(x, x_scaling));
            scaled_product(path, (a.values.view(), &a.scales), (b, scales, 1), to);
        }
    }
    dw
}
