//! The operators of mixtures of experts, as the registry and the benchmark see them.
//!
//! Shapes: `e` experts of which a token goes to `a`, with weights of `n` outputs and `k` inputs.
//! Tokens go to experts at random, to others in every call; where a call has few tokens, bytes count
//! only the chosen experts' weights, and they come out of memory.

use crate::bench::inputs::{EXP_FLOPS, F32_ONLY};
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout, Weight, encode};
use crate::memory::Anonymous;
use crate::registry::{Case, Dim, Operator, Shape};
use crate::route::balance::{ExpertLoad, ExpertLoadGrad, expert_load, expert_load_grad};
use crate::route::{Route, RouteGrad, Routing, Scoring, route, route_grad};
use crate::{
    ExpertMatmul, ExpertMatmulDw, ExpertMatmulDx, ExpertSum, ExpertSumGrad, expert_matmul,
    expert_matmul_dw, expert_matmul_dx, expert_scratch_len, expert_sum, expert_sum_grad,
};

/// Every operator of mixtures of experts.
pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        name: "expert_matmul",
        description: "y = x · W[expert]ᵀ over routed rows; panels of chosen experts are streamed",
        encodings: &Encoding::ALL,
        shapes: &[
            &product(512, 8, 2, 1024, 1024),
            &product(512, 64, 8, 512, 1024),
            &product(1, 64, 8, 768, 2048),
            &product(4, 64, 8, 768, 2048),
        ],
        prepare: forward_case,
    },
    Operator {
        name: "expert_matmul_dx",
        description: "dx = dy · W[expert] over routed rows",
        encodings: &Encoding::ALL,
        shapes: &[&product(512, 8, 2, 1024, 1024), &product(512, 64, 8, 512, 1024)],
        prepare: dx_case,
    },
    Operator {
        name: "expert_matmul_dw",
        description: "dw = dyᵀ · x of each expert's rows, chains over blocks of 256 folded in order",
        encodings: F32_ONLY,
        shapes: &[&product(512, 8, 2, 1024, 1024), &product(4096, 64, 8, 512, 1024)],
        prepare: dw_case,
    },
    Operator {
        name: "expert_sum",
        description: "weighted sums of routed rows in order of rank",
        encodings: F32_ONLY,
        shapes: &[&[("t", 512), ("a", 8), ("d", 2048)]],
        prepare: sum_case,
    },
    Operator {
        name: "expert_sum_grad",
        description: "the gradients of routed rows and of their weights",
        encodings: F32_ONLY,
        shapes: &[&[("t", 512), ("a", 8), ("d", 2048)]],
        prepare: sum_grad_case,
    },
    Operator {
        name: "route",
        description: "scores, the best experts and their weights",
        encodings: F32_ONLY,
        shapes: ROUTED,
        prepare: route_case,
    },
    Operator {
        name: "route_grad",
        description: "the gradient of the chosen experts' weights for the logits",
        encodings: F32_ONLY,
        shapes: ROUTED,
        prepare: route_grad_case,
    },
    Operator {
        name: "expert_load",
        description: "how often each expert is chosen, and the sum of its probabilities",
        encodings: F32_ONLY,
        shapes: ROUTED,
        prepare: load_case,
    },
    Operator {
        name: "expert_load_grad",
        description: "the gradient of those sums for the logits",
        encodings: F32_ONLY,
        shapes: ROUTED,
        prepare: load_grad_case,
    },
];

const ROUTED: &[&[Dim]] = &[&[("t", 512), ("e", 128), ("a", 8)]];
const ROUTING: Routing =
    Routing { top_k: 8, scoring: Scoring::Softmax, groups: None, normalize: Some(0.0), scale: 1.0 };

/// Tokens up to which a case reads its weights from memory, in panels.
const COLD_TOKENS: usize = 8;

const fn product(t: usize, e: usize, a: usize, n: usize, k: usize) -> [Dim; 5] {
    [("t", t), ("e", e), ("a", a), ("n", n), ("k", k)]
}

struct Numbers(u32);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() as f32 / u32::MAX as f32).mul_add(2.0, -1.0)).collect()
    }

    /// Different experts for each token.
    fn route(&mut self, experts_ta: &mut [u32], a: usize, e: usize) {
        let experts = u32::try_from(e).expect("experts are counted in 32 bits");
        for chosen in experts_ta.chunks_exact_mut(a) {
            for rank in 0..a {
                chosen[rank] = loop {
                    let expert = self.next() % experts;
                    if !chosen[..rank].contains(&expert) {
                        break expert;
                    }
                };
            }
        }
    }
}

/// The sizes and operands of one case.
struct Experts {
    numbers: Numbers,
    sizes: [usize; 5],
    form: (Encoding, Layout),
    memory: Anonymous,
    experts_ta: Vec<u32>,
    scratch: Vec<u32>,
}

impl Experts {
    fn new(shape: &Shape, encoding: Encoding) -> Self {
        let sizes @ [t, e, a, n, k] = shape.sizes(["t", "e", "a", "n", "k"]);
        let cold = t <= COLD_TOKENS;
        let layout = if cold { Layout::Panel } else { encoding.layouts()[0] };
        let mut numbers = Numbers(0x9e37_79b9);
        let bytes = Weight::stored_bytes(encoding, layout, e * n, k);
        let mut memory = Anonymous::new(bytes).expect("memory for the benchmark");
        let target = &mut memory.as_mut()[..bytes];
        encode((encoding, layout), (e * n, k), &numbers.values(e * n * k), target);
        let scratch = vec![0; expert_scratch_len(t * a, e)];
        let mut case = Self {
            numbers,
            sizes,
            form: (encoding, layout),
            memory,
            experts_ta: vec![0; t * a],
            scratch,
        };
        case.route();
        case
    }

    fn route(&mut self) {
        let [_, e, a, ..] = self.sizes;
        self.numbers.route(&mut self.experts_ta, a, e);
    }

    fn weight(&self) -> Weight<'_> {
        let ([_, e, _, n, k], (encoding, layout)) = (self.sizes, self.form);
        let bytes = &self.memory.as_ref()[..Weight::stored_bytes(encoding, layout, e * n, k)];
        Weight { encoding, layout, n: e * n, k, bytes }
    }

    fn flops(&self) -> f64 {
        let [t, _, a, n, k] = self.sizes;
        2.0 * (t * a * n * k) as f64
    }

    /// Bytes of the weights of the experts that rows can reach, and of the rows.
    fn bytes(&self) -> f64 {
        let [t, e, a, n, k] = self.sizes;
        let (encoding, layout) = self.form;
        let weights = Weight::stored_bytes(encoding, layout, e.min(t * a) * n, k);
        (weights + 4 * t * (k + a * n)) as f64
    }
}

fn forward_case(shape: &Shape, encoding: Encoding) -> Case {
    let mut experts = Experts::new(shape, encoding);
    let [t, num_experts, top_k, n, k] = experts.sizes;
    let (x, mut y) = (experts.numbers.values(t * k), vec![0.0; t * top_k * n]);
    let (flops, bytes) = (experts.flops(), experts.bytes());
    let run = Box::new(move |cpu: &Cpu| {
        experts.route();
        let mut scratch = std::mem::take(&mut experts.scratch);
        let args = ExpertMatmul {
            x: &x,
            weight: experts.weight(),
            experts_ta: &experts.experts_ta,
            top_k,
            num_experts,
            y_tan: &mut y,
            scratch: &mut scratch,
            compute: crate::Compute::F32,
        };
        expert_matmul(cpu, args);
        experts.scratch = scratch;
    });
    Case { flops, bytes, compute: crate::Compute::F32, run }
}

fn dx_case(shape: &Shape, encoding: Encoding) -> Case {
    let mut experts = Experts::new(shape, encoding);
    let [t, num_experts, top_k, n, k] = experts.sizes;
    let (dy, mut dx) = (experts.numbers.values(t * top_k * n), vec![0.0; t * top_k * k]);
    let (flops, bytes) = (experts.flops(), experts.bytes());
    let run = Box::new(move |cpu: &Cpu| {
        experts.route();
        let mut scratch = std::mem::take(&mut experts.scratch);
        let args = ExpertMatmulDx {
            dy_tan: &dy,
            weight: experts.weight(),
            experts_ta: &experts.experts_ta,
            num_experts,
            dx_tak: &mut dx,
            scratch: &mut scratch,
        };
        expert_matmul_dx(cpu, args);
        experts.scratch = scratch;
    });
    Case { flops, bytes, compute: crate::Compute::F32, run }
}

fn dw_case(shape: &Shape, encoding: Encoding) -> Case {
    let mut experts = Experts::new(shape, encoding);
    let [t, num_experts, top_k, n, k] = experts.sizes;
    let (x, dy) = (experts.numbers.values(t * k), experts.numbers.values(t * top_k * n));
    let mut dw = vec![0.0; num_experts * n * k];
    let (flops, bytes) = (experts.flops(), experts.bytes());
    let run = Box::new(move |cpu: &Cpu| {
        experts.route();
        let args = ExpertMatmulDw {
            dy_tan: &dy,
            x: &x,
            experts_ta: &experts.experts_ta,
            top_k,
            num_experts,
            dw_enk: &mut dw,
            row_tokens: t,
            accumulate: true,
            scratch: &mut experts.scratch,
        };
        expert_matmul_dw(cpu, args);
    });
    Case { flops, bytes, compute: crate::Compute::F32, run }
}

fn sum_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, top_k, d] = shape.sizes(["t", "a", "d"]);
    let mut numbers = Numbers(1);
    let (y, weights) = (numbers.values(t * top_k * d), numbers.values(t * top_k));
    let mut out_td = vec![0.0; t * d];
    let run = Box::new(move |cpu: &Cpu| {
        let (weights_ta, out_td) = (Some(&weights[..]), &mut out_td[..]);
        expert_sum(cpu, ExpertSum { y_tad: &y, weights_ta, top_k, d, out_td });
    });
    let bytes = (4 * t * d * (top_k + 1)) as f64;
    Case { flops: 2.0 * (t * top_k * d) as f64, bytes, compute: crate::Compute::F32, run }
}

fn route_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, num_experts, top_k] = shape.sizes(["t", "e", "a"]);
    let logits = Numbers(1).values(t * num_experts);
    let (mut experts, mut weights) = (vec![0; t * top_k], vec![0.0; t * top_k]);
    let routing = Routing { top_k, ..ROUTING };
    let run = Box::new(move |cpu: &Cpu| {
        let (experts_ta, weights_ta) = (&mut experts[..], &mut weights[..]);
        let logits_te = &logits[..];
        route(cpu, Route { logits_te, bias_e: None, routing, num_experts, experts_ta, weights_ta });
    });
    let flops = (t * num_experts) as f64 * (EXP_FLOPS + top_k as f64);
    Case {
        flops,
        bytes: (4 * t * (num_experts + 2 * top_k)) as f64,
        compute: crate::Compute::F32,
        run,
    }
}

fn sum_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, top_k, d] = shape.sizes(["t", "a", "d"]);
    let mut numbers = Numbers(1);
    let (y, weights) = (numbers.values(t * top_k * d), numbers.values(t * top_k));
    let dout = numbers.values(t * d);
    let (mut dy, mut dweights) = (vec![0.0; t * top_k * d], vec![0.0; t * top_k]);
    let run = Box::new(move |cpu: &Cpu| {
        let args = ExpertSumGrad {
            dout_td: &dout,
            y_tad: Some(&y),
            weights_ta: Some(&weights),
            top_k,
            d,
            dy_tad: Some(&mut dy),
            dweights_ta: Some(&mut dweights),
        };
        expert_sum_grad(cpu, args);
    });
    let bytes = (4 * t * d * (2 * top_k + 1)) as f64;
    Case { flops: 3.0 * (t * top_k * d) as f64, bytes, compute: crate::Compute::F32, run }
}

fn route_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, num_experts, top_k] = shape.sizes(["t", "e", "a"]);
    let mut numbers = Numbers(1);
    let (logits, dweights) = (numbers.values(t * num_experts), numbers.values(t * top_k));
    let mut experts = vec![0; t * top_k];
    numbers.route(&mut experts, top_k, num_experts);
    let mut dlogits = vec![0.0; t * num_experts];
    let routing = Routing { top_k, ..ROUTING };
    let run = Box::new(move |cpu: &Cpu| {
        let args = RouteGrad {
            dweights_ta: &dweights,
            logits_te: &logits,
            experts_ta: &experts,
            routing,
            num_experts,
            dlogits_te: &mut dlogits,
        };
        route_grad(cpu, args);
    });
    let flops = (t * num_experts) as f64 * (EXP_FLOPS + top_k as f64);
    Case {
        flops,
        bytes: (4 * t * (2 * num_experts + 2 * top_k)) as f64,
        compute: crate::Compute::F32,
        run,
    }
}

fn load_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, num_experts, top_k] = shape.sizes(["t", "e", "a"]);
    let mut numbers = Numbers(1);
    let logits = numbers.values(t * num_experts);
    let mut experts = vec![0; t * top_k];
    numbers.route(&mut experts, top_k, num_experts);
    let (mut choices, mut mass) = (vec![0.0; num_experts], vec![0.0; num_experts]);
    let run = Box::new(move |cpu: &Cpu| {
        let args = ExpertLoad {
            logits_te: &logits,
            experts_ta: &experts,
            num_experts,
            before: None,
            choices_e: &mut choices,
            mass_e: &mut mass,
        };
        expert_load(cpu, args);
    });
    Case {
        flops: (t * num_experts) as f64 * (EXP_FLOPS + 1.0),
        bytes: (4 * t * (num_experts + top_k)) as f64,
        compute: crate::Compute::F32,
        run,
    }
}

fn load_grad_case(shape: &Shape, _encoding: Encoding) -> Case {
    let [t, num_experts] = shape.sizes(["t", "e"]);
    let mut numbers = Numbers(1);
    let (logits, dmass) = (numbers.values(t * num_experts), numbers.values(num_experts));
    let mut dlogits = vec![0.0; t * num_experts];
    let run = Box::new(move |cpu: &Cpu| {
        let (dmass_e, dlogits_te) = (&dmass[..], &mut dlogits[..]);
        expert_load_grad(cpu, ExpertLoadGrad { dmass_e, logits_te: &logits, dlogits_te });
    });
    Case {
        flops: (t * num_experts) as f64 * (EXP_FLOPS + 4.0),
        bytes: (8 * t * num_experts) as f64,
        compute: crate::Compute::F32,
        run,
    }
}
