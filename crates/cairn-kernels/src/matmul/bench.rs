//! The products as the registry and the benchmark see them.

use super::{Matmul, MatmulDw, MatmulDx, matmul, matmul_dw, matmul_dx};
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout, Weight, encode};
use crate::memory::{ALIGNMENT, Anonymous};
use crate::registry::{Case, Operator, Shape};

/// The forward product.
pub(crate) const MATMUL: Operator = Operator {
    name: "matmul",
    description: "y = x · Wᵀ, one chain over the inputs; panels are streamed for a few tokens",
    encodings: &Encoding::ALL,
    shapes: || {
        let mut shapes = layer_shapes();
        shapes.extend([shape(256, 4096, 384), shape(256, 50257, 768)]);
        for t in [1, 4, 8] {
            shapes.extend([shape(t, 384, 384), shape(t, 3072, 768), shape(t, 50257, 768)]);
        }
        shapes
    },
    prepare: prepare_forward,
};

/// The input gradient.
pub(crate) const MATMUL_DX: Operator = Operator {
    name: "matmul_dx",
    description: "dx = dy · W, one chain over the outputs",
    encodings: &Encoding::ALL,
    shapes: || {
        let mut shapes = layer_shapes();
        shapes.extend([shape(256, 4096, 384), shape(256, 50257, 768)]);
        shapes
    },
    prepare: prepare_dx,
};

/// The weight gradient.
pub(crate) const MATMUL_DW: Operator = Operator {
    name: "matmul_dw",
    description: "dw = dyᵀ · x, chains over blocks of 256 tokens folded in order",
    encodings: &[Encoding::F32],
    shapes: || {
        let mut shapes = layer_shapes();
        shapes.extend([shape(256, 4096, 384), shape(256, 50257, 768)]);
        shapes
    },
    prepare: prepare_dw,
};

/// Tokens up to which a case reads its weights from memory, not from cache.
const COLD_TOKENS: usize = 8;
/// Bytes that the copies of a cold case's weight take together: far beyond any cache.
const COLD_BYTES: usize = 256 << 20;
/// Tokens of a batch row in the weight gradient's cases.
const ROW_TOKENS: usize = 256;

fn shape(t: usize, n: usize, k: usize) -> Shape {
    Shape(vec![("t", t), ("n", n), ("k", k)])
}

/// The layers of the two training configurations that the project is measured on.
fn layer_shapes() -> Vec<Shape> {
    vec![
        shape(4096, 384, 384),
        shape(4096, 1024, 384),
        shape(4096, 384, 1024),
        shape(1024, 768, 768),
        shape(1024, 3072, 768),
        shape(1024, 768, 3072),
    ]
}

/// Values in (-1, 1) with full mantissas; never subnormal sums.
fn values(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32).mul_add(2.0, -1.0)
    };
    (0..len).map(|_| next()).collect()
}

struct Stored {
    form: (Encoding, Layout),
    n: usize,
    k: usize,
    bytes: usize,
    /// Copies one after the other, in huge pages like the weights of a session.
    copies: Anonymous,
    next: usize,
}

impl Stored {
    fn new(shape: &Shape, encoding: Encoding) -> Self {
        let (t, n, k) = (shape.size("t"), shape.size("n"), shape.size("k"));
        let layout = if t <= COLD_TOKENS { Layout::Panel } else { Layout::RowMajor };
        let bytes = Weight::stored_bytes(encoding, layout, n, k);
        let stride = bytes.next_multiple_of(ALIGNMENT);
        let count = if t <= COLD_TOKENS { COLD_BYTES.div_ceil(stride) } else { 1 };
        let mut copies = Anonymous::new(stride * count).expect("memory for the benchmark");
        let (first, others) = copies.as_mut().split_at_mut(stride);
        encode((encoding, layout), (n, k), &values(n * k), &mut first[..bytes]);
        for copy in others.chunks_exact_mut(stride) {
            copy.copy_from_slice(first);
        }
        Self { form: (encoding, layout), n, k, bytes, copies, next: 0 }
    }

    fn weight(&mut self) -> Weight<'_> {
        let stride = self.bytes.next_multiple_of(ALIGNMENT);
        let count = self.copies.as_ref().len() / stride;
        self.next = (self.next + 1) % count;
        let bytes = &self.copies.as_ref()[self.next * stride..][..self.bytes];
        Weight { encoding: self.form.0, layout: self.form.1, n: self.n, k: self.k, bytes }
    }
}

fn flops(shape: &Shape) -> f64 {
    2.0 * shape.size("t") as f64 * shape.size("n") as f64 * shape.size("k") as f64
}

fn prepare_forward(shape: &Shape, encoding: Encoding) -> Case {
    let (t, n, k) = (shape.size("t"), shape.size("n"), shape.size("k"));
    let mut stored = Stored::new(shape, encoding);
    let (x_tk, mut y_tn) = (values(t * k), vec![0.0; t * n]);
    let bytes = (stored.bytes + 4 * (t * k + t * n)) as f64;
    let run = Box::new(move |cpu: &Cpu| {
        let weight = stored.weight();
        let y_tn = &mut y_tn;
        matmul(cpu, Matmul { x_tk: &x_tk, weight, bias_n: None, y_tn, t, accumulate: false });
    });
    Case { flops: flops(shape), bytes, run }
}

fn prepare_dx(shape: &Shape, encoding: Encoding) -> Case {
    let (t, n, k) = (shape.size("t"), shape.size("n"), shape.size("k"));
    let mut stored = Stored::new(shape, encoding);
    let (dy_tn, mut dx_tk) = (values(t * n), vec![0.0; t * k]);
    let bytes = (stored.bytes + 4 * (t * k + t * n)) as f64;
    let run = Box::new(move |cpu: &Cpu| {
        let weight = stored.weight();
        let dx_tk = &mut dx_tk;
        matmul_dx(cpu, MatmulDx { dy_tn: &dy_tn, weight, dx_tk, t, accumulate: false });
    });
    Case { flops: flops(shape), bytes, run }
}

fn prepare_dw(shape: &Shape, _encoding: Encoding) -> Case {
    let (t, n, k) = (shape.size("t"), shape.size("n"), shape.size("k"));
    let (dy_tn, x_tk, mut dw_nk) = (values(t * n), values(t * k), vec![0.0; n * k]);
    let bytes = (4 * (t * k + t * n + 2 * n * k)) as f64;
    let run = Box::new(move |cpu: &Cpu| {
        let (dy_tn, x_tk, dw_nk) = (&dy_tn[..], &x_tk[..], &mut dw_nk[..]);
        let accumulate = true;
        matmul_dw(
            cpu,
            MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens: ROW_TOKENS, accumulate },
        );
    });
    Case { flops: flops(shape), bytes, run }
}
