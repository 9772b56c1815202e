//! Operation graphs of cuDNN's backend API: descriptors that are made, given attributes and finalised; a graph of
//! operations among tensors; a plan that runs it. cuDNN knows attention by the shape of such a graph.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type, cudnnBackendCreateDescriptor,
    cudnnBackendDescriptor_t, cudnnBackendDescriptorType_t as Kind, cudnnBackendDestroyDescriptor, cudnnBackendExecute,
    cudnnBackendFinalize, cudnnBackendGetAttribute, cudnnBackendHeurMode_t as Heuristic, cudnnBackendSetAttribute,
    cudnnCreate, cudnnDataType_t as Data, cudnnDestroy, cudnnGetLastErrorString, cudnnHandle_t,
    cudnnPointwiseMode_t as Mode, cudnnReduceTensorOp_t as Reduction, cudnnSetStream, cudnnStatus_t,
};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use std::ffi::{CStr, c_void};
use std::ptr::null_mut;

fn ok(status: cudnnStatus_t) -> Result<(), String> {
    if status == cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut message = [0; 1024];
    // SAFETY: the buffer has the length that is given; cuDNN ends what it writes with a zero.
    let said = unsafe {
        cudnnGetLastErrorString(message.as_mut_ptr(), message.len());
        CStr::from_ptr(message.as_ptr())
    };
    Err(format!("cuDNN: {status:?}: {}", said.to_string_lossy()))
}

/// A connection to the library.
#[derive(Debug)]
pub(super) struct Handle(cudnnHandle_t);

impl Handle {
    pub(super) fn new() -> Result<Self, String> {
        let mut handle = null_mut();
        // SAFETY: the pointer is of a live variable.
        ok(unsafe { cudnnCreate(&raw mut handle) })?;
        Ok(Self(handle))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was made by `new`. A failure leaves nothing to be done.
        let _ = unsafe { cudnnDestroy(self.0) };
    }
}

/// The value of an attribute.
enum Value<'a> {
    Handle(&'a Handle),
    Type(Data),
    Flag(bool),
    Numbers(&'a [i64]),
    Addresses(&'a [*mut c_void]),
    Mode(Mode),
    Reduction(Reduction),
    Heuristic(Heuristic),
    Of(&'a [&'a Descriptor]),
}

#[derive(Debug)]
struct Descriptor(cudnnBackendDescriptor_t);

impl Descriptor {
    fn empty(kind: Kind) -> Result<Self, String> {
        let mut made = null_mut();
        // SAFETY: the pointer is of a live variable.
        ok(unsafe { cudnnBackendCreateDescriptor(kind, &raw mut made) })?;
        Ok(Self(made))
    }

    fn new(kind: Kind, attributes: &[(Name, Value<'_>)]) -> Result<Self, String> {
        let made = Self::empty(kind)?;
        for (name, value) in attributes {
            made.set(*name, value).map_err(|e| format!("{e} ({name:?})"))?;
        }
        // SAFETY: it is alive.
        ok(unsafe { cudnnBackendFinalize(made.0) }).map_err(|e| format!("{e} ({kind:?})"))?;
        Ok(made)
    }

    fn set(&self, name: Name, value: &Value<'_>) -> Result<(), String> {
        let flag;
        let list: Vec<cudnnBackendDescriptor_t>;
        let (kind, count, data): (Type, usize, *const c_void) = match value {
            Value::Handle(handle) => (Type::CUDNN_TYPE_HANDLE, 1, (&raw const handle.0).cast()),
            Value::Type(data) => (Type::CUDNN_TYPE_DATA_TYPE, 1, std::ptr::from_ref(data).cast()),
            Value::Flag(on) => {
                flag = u8::from(*on);
                (Type::CUDNN_TYPE_BOOLEAN, 1, (&raw const flag).cast())
            }
            Value::Numbers(all) => (Type::CUDNN_TYPE_INT64, all.len(), all.as_ptr().cast()),
            Value::Addresses(all) => (Type::CUDNN_TYPE_VOID_PTR, all.len(), all.as_ptr().cast()),
            Value::Mode(mode) => (Type::CUDNN_TYPE_POINTWISE_MODE, 1, std::ptr::from_ref(mode).cast()),
            Value::Reduction(how) => (Type::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, std::ptr::from_ref(how).cast()),
            Value::Heuristic(mode) => (Type::CUDNN_TYPE_HEUR_MODE, 1, std::ptr::from_ref(mode).cast()),
            Value::Of(all) => {
                list = all.iter().map(|d| d.0).collect();
                (Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, list.len(), list.as_ptr().cast())
            }
        };
        // SAFETY: `data` points to `count` elements of that type, which live until the end of the call.
        ok(unsafe { cudnnBackendSetAttribute(self.0, name, kind, count as i64, data) })
    }

    fn number(&self, name: Name) -> Result<i64, String> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: there is room for one number, and for their count.
        ok(unsafe {
            let (count, value) = (&raw mut count, (&raw mut value).cast());
            cudnnBackendGetAttribute(self.0, name, Type::CUDNN_TYPE_INT64, 1, count, value)
        })?;
        Ok(value)
    }

    /// The engines that a heuristic proposes, best first.
    fn engines(&self) -> Result<Vec<Self>, String> {
        let (name, kind) = (Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR);
        let mut count = 0i64;
        // SAFETY: no room is offered, so only the count is written.
        ok(unsafe { cudnnBackendGetAttribute(self.0, name, kind, 0, &raw mut count, null_mut()) })?;
        let made = || Self::empty(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
        let mut engines = (0..count).map(|_| made()).collect::<Result<Vec<_>, _>>()?;
        let mut list: Vec<cudnnBackendDescriptor_t> = engines.iter().map(|d| d.0).collect();
        let mut filled = 0i64;
        // SAFETY: the list has `count` descriptors, which cuDNN fills.
        ok(unsafe { cudnnBackendGetAttribute(self.0, name, kind, count, &raw mut filled, list.as_mut_ptr().cast()) })?;
        engines.truncate(filled as usize);
        Ok(engines)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was made by `empty`. A failure leaves nothing to be done.
        let _ = unsafe { cudnnBackendDestroyDescriptor(self.0) };
    }
}

pub(super) type Four = [i64; 4];

/// Strides of rows that lie one after another.
pub(super) fn packed([_, b, c, d]: Four) -> Four {
    [b * c * d, c * d, d, 1]
}

/// The same matrix read by its columns.
pub(super) fn turned([a, b, c, d]: Four) -> Four {
    [a, b, d, c]
}

/// Where a tensor's elements are.
#[derive(Clone, Copy)]
enum Place {
    /// Nowhere: an operation hands them to the next.
    Virtual,
    /// At the address with this number.
    Given(usize),
    /// One number, in this machine's memory.
    Number(f32),
}

/// A tensor of a graph.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(usize);

struct Node {
    descriptor: Descriptor,
    dimensions: Four,
    strides: Four,
    place: Place,
}

/// Operations among tensors of four dimensions.
#[derive(Default)]
pub(super) struct Graph {
    tensors: Vec<Node>,
    operations: Vec<Descriptor>,
}

pub(super) const F32: Data = Data::CUDNN_DATA_FLOAT;
pub(super) const BF16: Data = Data::CUDNN_DATA_BFLOAT16;

impl Graph {
    fn tensor(&mut self, kind: Data, dimensions: Four, strides: Four, place: Place) -> Result<Id, String> {
        let id = self.tensors.len();
        let (hidden, number) = (matches!(place, Place::Virtual), matches!(place, Place::Number(_)));
        let descriptor = Descriptor::new(
            Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_TENSOR_DATA_TYPE, Value::Type(kind)),
                (Name::CUDNN_ATTR_TENSOR_DIMENSIONS, Value::Numbers(&dimensions)),
                (Name::CUDNN_ATTR_TENSOR_STRIDES, Value::Numbers(&strides)),
                (Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, Value::Numbers(&[id as i64 + 1])),
                (Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Value::Numbers(&[16])),
                (Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Value::Flag(hidden)),
                (Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Value::Flag(number)),
            ],
        )?;
        self.tensors.push(Node { descriptor, dimensions, strides, place });
        Ok(Id(id))
    }

    /// A tensor in memory: the `argument`-th of those that a run names.
    pub(super) fn given(&mut self, argument: usize, kind: Data, dimensions: Four, strides: Four) -> Result<Id, String> {
        self.tensor(kind, dimensions, strides, Place::Given(argument))
    }

    /// A constant.
    pub(super) fn number(&mut self, value: f32) -> Result<Id, String> {
        self.tensor(F32, [1; 4], packed([1; 4]), Place::Number(value))
    }

    fn hidden(&mut self, kind: Data, dimensions: Four) -> Result<Id, String> {
        self.tensor(kind, dimensions, packed(dimensions), Place::Virtual)
    }

    fn of(&self, id: Id) -> &Descriptor {
        &self.tensors[id.0].descriptor
    }

    /// `mode(x)`, `mode(x, b)`, or `x` where `by` holds, else `b`: into `out`, or a virtual tensor of type `kind`.
    #[allow(clippy::too_many_arguments, reason = "cuDNN's own operation has as many")]
    fn pointwise(
        &mut self,
        mode: Mode,
        x: Id,
        b: Option<Id>,
        by: Option<Id>,
        out: Option<Id>,
        (kind, compute): (Data, Data),
        axis: Option<i64>,
    ) -> Result<Id, String> {
        let out = match out {
            Some(out) => out,
            None => self.hidden(kind, self.tensors[x.0].dimensions)?,
        };
        let axis = axis.map(|axis| [axis]);
        let mut how = vec![
            (Name::CUDNN_ATTR_POINTWISE_MODE, Value::Mode(mode)),
            (Name::CUDNN_ATTR_POINTWISE_MATH_PREC, Value::Type(compute)),
        ];
        how.extend(axis.as_ref().map(|axis| (Name::CUDNN_ATTR_POINTWISE_AXIS, Value::Numbers(axis))));
        let how = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR, &how)?;
        let (how, x, y) = ([&how], [self.of(x)], [self.of(out)]);
        let (b, by) = (b.map(|b| [self.of(b)]), by.map(|by| [self.of(by)]));
        let mut parts = vec![
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, Value::Of(&how)),
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, Value::Of(&x)),
        ];
        parts.extend(b.as_ref().map(|b| (Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, Value::Of(b))));
        parts.extend(by.as_ref().map(|by| (Name::CUDNN_ATTR_OPERATION_POINTWISE_TDESC, Value::Of(by))));
        parts.push((Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, Value::Of(&y)));
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, &parts)?;
        self.operations.push(operation);
        Ok(out)
    }

    /// `mode(x, b)` in FP32.
    pub(super) fn apply(&mut self, mode: Mode, x: Id, b: Id) -> Result<Id, String> {
        self.pointwise(mode, x, Some(b), None, None, (F32, F32), None)
    }

    /// The same, rounded to BF16 for a product.
    pub(super) fn apply_rounded(&mut self, mode: Mode, x: Id, b: Id) -> Result<Id, String> {
        self.pointwise(mode, x, Some(b), None, None, (BF16, F32), None)
    }

    /// The same, into a tensor in memory.
    pub(super) fn apply_into(&mut self, mode: Mode, x: Id, b: Id, out: Id) -> Result<Id, String> {
        self.pointwise(mode, x, Some(b), None, Some(out), (F32, F32), None)
    }

    /// `mode(x)` in FP32.
    pub(super) fn map(&mut self, mode: Mode, x: Id) -> Result<Id, String> {
        self.pointwise(mode, x, None, None, None, (F32, F32), None)
    }

    /// Scores of earlier tokens and a token's own; minus infinity for later ones.
    pub(super) fn causal(&mut self, scores: Id) -> Result<Id, String> {
        let whole = (Data::CUDNN_DATA_INT32, F32);
        let truth = (Data::CUDNN_DATA_BOOLEAN, Data::CUDNN_DATA_BOOLEAN);
        let row = self.pointwise(Mode::CUDNN_POINTWISE_GEN_INDEX, scores, None, None, None, whole, Some(2))?;
        let column = self.pointwise(Mode::CUDNN_POINTWISE_GEN_INDEX, scores, None, None, None, whole, Some(3))?;
        let seen = self.pointwise(Mode::CUDNN_POINTWISE_CMP_GE, row, Some(column), None, None, truth, None)?;
        let never = self.number(f32::NEG_INFINITY)?;
        let select = Mode::CUDNN_POINTWISE_BINARY_SELECT;
        self.pointwise(select, scores, Some(never), Some(seen), None, (F32, F32), None)
    }

    /// `a b`, matrix by matrix, with FP32 sums: into `out`, or a virtual tensor.
    pub(super) fn product(&mut self, a: Id, b: Id, out: Option<Id>) -> Result<Id, String> {
        let ([batch, heads, rows, _], [.., columns]) = (self.tensors[a.0].dimensions, self.tensors[b.0].dimensions);
        let out = match out {
            Some(out) => out,
            None => self.hidden(F32, [batch, heads, rows, columns])?,
        };
        let how = &[(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, Value::Type(F32))];
        let how = Descriptor::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR, how)?;
        let operation = Descriptor::new(
            Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, Value::Of(&[self.of(a)])),
                (Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, Value::Of(&[self.of(b)])),
                (Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, Value::Of(&[self.of(out)])),
                (Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, Value::Of(&[&how])),
            ],
        )?;
        self.operations.push(operation);
        Ok(out)
    }

    /// Sum or largest of each row.
    pub(super) fn reduce(&mut self, how: Reduction, x: Id) -> Result<Id, String> {
        let [batch, heads, rows, _] = self.tensors[x.0].dimensions;
        let out = self.hidden(F32, [batch, heads, rows, 1])?;
        let how = Descriptor::new(
            Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_REDUCTION_OPERATOR, Value::Reduction(how)),
                (Name::CUDNN_ATTR_REDUCTION_COMP_TYPE, Value::Type(F32)),
            ],
        )?;
        let operation = Descriptor::new(
            Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, Value::Of(&[&how])),
                (Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, Value::Of(&[self.of(x)])),
                (Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, Value::Of(&[self.of(out)])),
            ],
        )?;
        self.operations.push(operation);
        Ok(out)
    }

    /// The same elements read by columns, as a virtual tensor of type `kind`.
    pub(super) fn transpose(&mut self, x: Id, kind: Data) -> Result<Id, String> {
        let (dimensions, strides) = (turned(self.tensors[x.0].dimensions), turned(self.tensors[x.0].strides));
        let out = self.tensor(kind, dimensions, strides, Place::Virtual)?;
        let operation = Descriptor::new(
            Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, Value::Of(&[self.of(x)])),
                (Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, Value::Of(&[self.of(out)])),
            ],
        )?;
        self.operations.push(operation);
        Ok(out)
    }

    /// A plan of the first engine that takes the graph.
    pub(super) fn plan(self, handle: &Handle) -> Result<Plan, String> {
        let operations: Vec<&Descriptor> = self.operations.iter().collect();
        let graph = Descriptor::new(
            Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, Value::Of(&operations)),
                (Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Value::Handle(handle)),
            ],
        )?;
        let heuristic = Descriptor::new(
            Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, Value::Of(&[&graph])),
                (Name::CUDNN_ATTR_ENGINEHEUR_MODE, Value::Heuristic(Heuristic::CUDNN_HEUR_MODE_A)),
            ],
        )?;
        let mut why = "cuDNN has no engine for this graph".to_owned();
        for engine in heuristic.engines()? {
            let plan = Descriptor::new(
                Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR,
                &[(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, Value::Of(&[&engine]))],
            );
            match plan {
                Ok(plan) => {
                    let workspace = plan.number(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)? as usize;
                    return Ok(Plan { graph: self, _engine: engine, plan, workspace });
                }
                Err(error) => why = error,
            }
        }
        Err(why)
    }
}

/// A graph that can be run.
pub(super) struct Plan {
    graph: Graph,
    _engine: Descriptor,
    plan: Descriptor,
    /// Bytes that a run needs beside its tensors.
    pub(super) workspace: usize,
}

impl Plan {
    /// Enqueues the graph with its tensors at these addresses.
    ///
    /// # Safety
    ///
    /// The addresses are of device memory that is as long as the graph's tensors say, and `space` of the workspace's
    /// length; all stay valid until the stream has done the work.
    pub(super) unsafe fn run(
        &self,
        handle: &Handle,
        stream: CUstream,
        arguments: &[CUdeviceptr],
        space: CUdeviceptr,
    ) -> Result<(), String> {
        let numbers: Vec<f32> =
            self.graph.tensors.iter().map(|t| if let Place::Number(n) = t.place { n } else { 0.0 }).collect();
        let (mut ids, mut addresses) = (Vec::new(), Vec::new());
        for (at, tensor) in self.graph.tensors.iter().enumerate() {
            let address = match tensor.place {
                Place::Virtual => continue,
                Place::Given(argument) => arguments[argument] as *mut c_void,
                Place::Number(_) => (&raw const numbers[at]).cast_mut().cast(),
            };
            ids.push(at as i64 + 1);
            addresses.push(address);
        }
        let pack = Descriptor::new(
            Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR,
            &[
                (Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Value::Numbers(&ids)),
                (Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Value::Addresses(&addresses)),
                (Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Value::Addresses(&[space as *mut c_void])),
            ],
        )?;
        // SAFETY: handle, plan and pack are alive; numbers are read during the call; the rest is the caller's promise.
        unsafe {
            ok(cudnnSetStream(handle.0, stream.cast()))?;
            ok(cudnnBackendExecute(handle.0, self.plan.0, pack.0))
        }
    }
}
