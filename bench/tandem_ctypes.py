"""The C ABI of tandem.h through ctypes, for the benchmarks and examples/training: plans over PyTorch tensors, on either
device, and the oracle and the ceilings of libtandem_bench.so."""

import ctypes

MAX_RANK = 5
CPU, CUDA = 1, 2
LAYOUT_BHSD, LAYOUT_THD = 1, 3
TOP_LEFT, BOTTOM_RIGHT = 1, 2
BAND, LENGTHS, PACKED, SEGMENTS, DENSE, BLOCK_SPARSE = 1, 3, 4, 5, 6, 7
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "int32": 5, "int64": 6, "bool": 7}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("strides", ctypes.c_int64 * MAX_RANK),
    ]


TensorPointer = ctypes.POINTER(Tensor)


class Head(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("kind", ctypes.c_int32)]


class Band(ctypes.Structure):
    _fields_ = [
        ("head", Head),
        ("alignment", ctypes.c_int32),
        ("left", ctypes.c_int32),
        ("right", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("left_per_head", TensorPointer),
        ("right_per_head", TensorPointer),
        ("prefix", TensorPointer),
    ]


class Lengths(ctypes.Structure):
    _fields_ = [("head", Head), ("q_lengths", TensorPointer), ("kv_lengths", TensorPointer)]


class Packed(ctypes.Structure):
    _fields_ = [
        ("head", Head),
        ("cu_seqlens_q", TensorPointer),
        ("cu_seqlens_k", TensorPointer),
        ("max_q_len", ctypes.c_int64),
        ("max_kv_len", ctypes.c_int64),
    ]


class Dense(ctypes.Structure):
    _fields_ = [("head", Head), ("mask", TensorPointer), ("sequence_offsets", TensorPointer)]


class Segments(ctypes.Structure):
    _fields_ = [("head", Head), ("q_segments", TensorPointer), ("kv_segments", TensorPointer)]


class BlockSparse(ctypes.Structure):
    _fields_ = [("head", Head), ("q_block", ctypes.c_int32), ("kv_block", ctypes.c_int32)] + [
        (name, TensorPointer) for name in ("counts", "indices", "full_counts", "full_indices")]


class Problem(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("layout", ctypes.c_int32),
        ("q", TensorPointer),
        ("k", TensorPointer),
        ("v", TensorPointer),
        ("has_scale", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("mask_term_count", ctypes.c_int32),
        ("mask_terms", ctypes.c_void_p),
        ("mask_plan", ctypes.c_void_p),
        ("bias", TensorPointer),
        ("alibi_slopes", TensorPointer),
        ("alibi_alignment", ctypes.c_int32),
        ("dropout_rate", ctypes.c_float),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("sink", TensorPointer),
        ("q_offset", ctypes.c_int64),
        ("kv_offset", ctypes.c_int64),
        ("global_q_len", ctypes.c_int64),
        ("global_kv_len", ctypes.c_int64),
        ("block_table", TensorPointer),
        ("page_size", ctypes.c_int64),
        ("kv_cache", ctypes.c_void_p),
        ("device_status", ctypes.c_void_p),
    ]


class Outputs(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_int32),
        ("out", TensorPointer),
        ("lse", TensorPointer),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("deterministic", ctypes.c_int32)] + [
        (name, TensorPointer) for name in ("dout", "dlse", "dq", "dk", "dv", "dbias", "dsink", "dalibi")]


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
        ("executor", ctypes.c_void_p),
    ]


def describe(tensor):
    """A descriptor of a PyTorch tensor; the tensor must outlive it."""
    t = Tensor()
    t.struct_size = ctypes.sizeof(Tensor)
    t.dtype = DTYPES[str(tensor.dtype).rsplit(".", maxsplit=1)[-1]]
    t.device_type = CUDA if tensor.is_cuda else CPU
    t.device_index = tensor.device.index or 0
    t.rank = tensor.dim()
    t.data = tensor.data_ptr()
    for d in range(tensor.dim()):
        t.shape[d] = tensor.shape[d]
        t.strides[d] = tensor.stride(d)
    return t


class Library:
    """libtandem.so; every failure is a RuntimeError with the library's message."""

    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        for name in ("last_error", "version", "plan_kernel", "kernel_name", "device_description",
                     "device_unavailable_reason", "kernel_unavailable_reason"):
            getattr(self.c, "tandem_" + name).restype = ctypes.c_char_p
        self.c.tandem_plan_workspace_size.restype = ctypes.c_size_t
        for name in ("plan_destroy", "mask_plan_destroy"):
            getattr(self.c, "tandem_" + name).argtypes = [ctypes.c_void_p]
            getattr(self.c, "tandem_" + name).restype = None

    def check(self, status):
        if status != 0:
            raise RuntimeError(f"{status}: {self.c.tandem_last_error().decode()}")

    def device(self, device_type):
        """A line about the device, or None."""
        text = self.c.tandem_device_description(device_type, 0)
        return text.decode() if text else None

    def kernels(self, device_type):
        """Names of the kernels that this machine can run on a type of device, best first."""
        every = range(self.c.tandem_kernel_count())
        return [self.c.tandem_kernel_name(n).decode() for n in every
                if self.c.tandem_kernel_device(n) == device_type and not self.c.tandem_kernel_unavailable_reason(n)]


class Description:
    """A tandem_problem with tandem_outputs over PyTorch tensors, which it keeps alive.

    terms: ("causal", alignment), ("window", left, right, alignment), ("prefix", lengths, alignment) which is causal but
    for those keys, ("kv_lengths", lengths), ("lengths", of queries and keys), ("dense", mask),
    ("packed", cu_seqlens, longest; 0 on the CPU), ("segments", of queries and keys), ("blocks", size, counts, indices).
    """

    def __init__(self, q, k, v, out, lse=None, terms=(), bias=None, scale=None):
        self.keep = []
        p = self.problem = Problem()
        p.struct_size = ctypes.sizeof(Problem)
        p.layout = LAYOUT_THD if q.dim() == 3 else LAYOUT_BHSD
        p.q, p.k, p.v = self._tensor(q), self._tensor(k), self._tensor(v)
        p.has_scale, p.scale = int(scale is not None), scale or 0.0
        p.bias = self._tensor(bias) if bias is not None else None
        made = [self._term(*term) for term in terms]
        self.terms = (ctypes.c_void_p * max(len(made), 1))(*[ctypes.addressof(t) for t in made])
        p.mask_terms = ctypes.addressof(self.terms)
        p.mask_term_count = len(made)
        o = self.outputs = Outputs()
        o.struct_size = ctypes.sizeof(Outputs)
        o.out = self._tensor(out)
        o.lse = self._tensor(lse) if lse is not None else None

    def _tensor(self, tensor):
        self.keep += [tensor, describe(tensor)]
        return ctypes.pointer(self.keep[-1])

    def _term(self, kind, *arguments):
        if kind in ("causal", "window"):
            term, code = Band(), BAND
            left, right, alignment = (-1, 0, *arguments) if kind == "causal" else arguments
            term.alignment, term.left, term.right = alignment, left, right
        elif kind == "prefix":
            term, code = Band(), BAND
            term.left, term.right, term.prefix, term.alignment = -1, 0, self._tensor(arguments[0]), arguments[1]
        elif kind == "kv_lengths":
            term, code = Lengths(), LENGTHS
            term.kv_lengths = self._tensor(arguments[0])
        elif kind == "lengths":
            term, code = Lengths(), LENGTHS
            term.q_lengths = term.kv_lengths = self._tensor(arguments[0])
        elif kind == "dense":
            term, code = Dense(), DENSE
            term.mask = self._tensor(arguments[0])
        elif kind == "segments":
            term, code = Segments(), SEGMENTS
            term.q_segments = term.kv_segments = self._tensor(arguments[0])
        elif kind == "blocks":
            term, code = BlockSparse(), BLOCK_SPARSE
            term.q_block = term.kv_block = arguments[0]
            term.counts, term.indices = map(self._tensor, arguments[1:])
        elif kind == "packed":
            term, code = Packed(), PACKED
            term.cu_seqlens_q = term.cu_seqlens_k = self._tensor(arguments[0])
            term.max_q_len = term.max_kv_len = arguments[1]
        else:
            raise ValueError(f"mask term {kind!r}")
        term.head.struct_size, term.head.kind = ctypes.sizeof(type(term)), code
        self.keep.append(term)
        return term


class Attention:
    """A planned problem over PyTorch tensors: call it to run; `out` and `lse` hold the result.

    prepared: the mask is made a mask plan once, so that calls do not pay for its preparation.
    """

    def __init__(self, library, torch, q, k, v, terms=(), bias=None, scale=None, kernel=None, threads=0,
                 prepared=False, lse=True):
        self.library, self.torch, self.is_cuda = library, torch, q.is_cuda
        self.plan, self.mask_plan, self.mask_plan_size = ctypes.c_void_p(), ctypes.c_void_p(), 0
        self.out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:-1]
        self.lse = torch.empty(*lse_shape, dtype=torch.float32, device=q.device) if lse else None
        self.description = Description(q, k, v, self.out, self.lse, terms, bias, scale)
        self.problem, self.outputs = self.description.problem, self.description.outputs
        self.options = Options()
        self.options.struct_size = ctypes.sizeof(Options)
        self.options.threads = threads
        self.options.kernel = kernel.encode() if kernel else None
        c = library.c
        if prepared:
            self._prepare()
        library.check(c.tandem_plan_create(ctypes.byref(self.problem), ctypes.byref(self.outputs), None,
                                           ctypes.byref(self.options), ctypes.byref(self.plan)))
        self.kernel = c.tandem_plan_kernel(self.plan).decode()
        self.workspace_size = c.tandem_plan_workspace_size(self.plan)
        self.workspace, self.workspace_data = self._allocate(self.workspace_size)

    def _allocate(self, size):
        """Memory of the device and where it is aligned to 256."""
        memory = self.torch.empty(size + 256, dtype=self.torch.uint8, device=self.out.device)
        return memory, (memory.data_ptr() + 255) // 256 * 256

    def _prepare(self):
        size, c = ctypes.c_size_t(), self.library.c
        self.library.check(c.tandem_mask_plan_size(ctypes.byref(self.problem), ctypes.byref(self.options),
                                                   ctypes.byref(size)))
        self.mask_plan_size = size.value
        self.mask_memory, data = self._allocate(size.value)
        self.library.check(c.tandem_mask_plan_create(
            ctypes.byref(self.problem), ctypes.byref(self.options), ctypes.c_void_p(data), size,
            ctypes.c_void_p(self._stream()), ctypes.byref(self.mask_plan)))
        self.problem.mask_plan = self.mask_plan
        self.problem.mask_term_count = 0

    def _stream(self):
        return self.torch.cuda.current_stream().cuda_stream if self.is_cuda else None

    def set_kv(self, k, v):
        """Other keys and values of the same shape and strides, which the caller keeps alive."""
        self.problem.k.contents.data, self.problem.v.contents.data = k.data_ptr(), v.data_ptr()

    def __call__(self):
        self.library.check(self.library.c.tandem_plan_run(
            self.plan, ctypes.byref(self.problem), ctypes.byref(self.outputs), None,
            ctypes.c_void_p(self.workspace_data), ctypes.c_size_t(self.workspace_size),
            ctypes.c_void_p(self._stream())))
        return self.out

    def __del__(self):
        self.library.c.tandem_plan_destroy(self.plan)
        self.library.c.tandem_mask_plan_destroy(self.mask_plan)


class BackwardAttention:
    """The planned backward pass of an Attention with LSE, as it was run last; `dq`, `dk`, `dv` and, with a bias,
    `dbias` hold the result. deterministic: the same bits on every run are asked for."""

    def __init__(self, forward, q, k, v, dout, bias=None, kernel=None, deterministic=False):
        torch, self.forward, self.library, self.plan = forward.torch, forward, forward.library, ctypes.c_void_p()
        self.dq, self.dk, self.dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self.dbias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        g = self.gradients = Gradients()
        g.struct_size, g.deterministic = ctypes.sizeof(Gradients), int(deterministic)
        for name, tensor in (("dout", dout), ("dq", self.dq), ("dk", self.dk), ("dv", self.dv), ("dbias", self.dbias)):
            if tensor is not None:
                setattr(g, name, forward.description._tensor(tensor))
        options = Options()
        options.struct_size = ctypes.sizeof(Options)
        options.kernel = kernel.encode() if kernel else None
        options.threads = forward.options.threads
        c = self.library.c
        self.library.check(c.tandem_plan_create(ctypes.byref(forward.problem), ctypes.byref(forward.outputs),
                                                ctypes.byref(g), ctypes.byref(options), ctypes.byref(self.plan)))
        self.kernel = c.tandem_plan_kernel(self.plan).decode()
        self.workspace_size = c.tandem_plan_workspace_size(self.plan)
        self.workspace, self.workspace_data = forward._allocate(self.workspace_size)

    def __call__(self):
        self.library.check(self.library.c.tandem_plan_run(
            self.plan, ctypes.byref(self.forward.problem), ctypes.byref(self.forward.outputs),
            ctypes.byref(self.gradients), ctypes.c_void_p(self.workspace_data), ctypes.c_size_t(self.workspace_size),
            ctypes.c_void_p(self.forward._stream())))

    def __del__(self):
        self.library.c.tandem_plan_destroy(self.plan)


class Judgement(ctypes.Structure):
    """What the oracle says of an answer; see judge.cpp."""

    _fields_ = [
        ("max_error", ctypes.c_double),
        ("error_over_bound", ctypes.c_double),
        ("out_error_over_bound", ctypes.c_double),
        ("lse_error_over_bound", ctypes.c_double),
        ("nonfinite_mismatches", ctypes.c_int64),
        ("empty_row_mismatches", ctypes.c_int64),
        ("empty_rows", ctypes.c_int64),
        ("rows_compared", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("worst", ctypes.c_char * 256),
    ]

    def as_dict(self):
        result = {name: getattr(self, name) for name, _ in self._fields_}
        result["worst"] = self.worst.decode()
        return result


class Support:
    """libtandem_bench.so: the f64 oracle as a judge of anybody's answer, and the ceilings of the CPU."""

    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        for name in ("read_bytes_per_second", "fma_flops_per_second", "amx_flops_per_second"):
            function = getattr(self.c, "tandem_bench_" + name)
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int32, ctypes.c_double]
        self.c.tandem_bench_visible_pairs.restype = ctypes.c_int64

    def judge(self, description, on_tensor_cores, max_pairs=1 << 20, threads=0):
        """description: of host tensors, with terms. Rows are sampled above max_pairs."""
        result = Judgement()
        self.c.tandem_bench_judge(ctypes.byref(description.problem), ctypes.byref(description.outputs),
                                  ctypes.c_int32(on_tensor_cores), ctypes.c_int64(max_pairs),
                                  ctypes.c_int32(threads), ctypes.byref(result))
        return result.as_dict()

    def visible_pairs(self, description):
        """Over all query heads."""
        return self.c.tandem_bench_visible_pairs(ctypes.byref(description.problem))

    def ceiling(self, name, threads, seconds):
        """Bytes or FLOP per second; None where the machine lacks it."""
        rate = getattr(self.c, f"tandem_bench_{name}_per_second")(threads, seconds)
        return rate if rate > 0 else None
