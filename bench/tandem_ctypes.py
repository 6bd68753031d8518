"""The C ABI of tandem.h through ctypes, for the benchmarks: plans over PyTorch tensors, on either device."""

import ctypes

MAX_RANK = 5
CPU, CUDA = 1, 2
LAYOUT_BHSD, LAYOUT_THD = 1, 3
TOP_LEFT, BOTTOM_RIGHT = 1, 2
BAND, PACKED, DENSE = 1, 4, 6
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
        for name in ("last_error", "version", "plan_kernel", "kernel_name", "device_description"):
            getattr(self.c, "tandem_" + name).restype = ctypes.c_char_p
        self.c.tandem_plan_workspace_size.restype = ctypes.c_size_t

    def check(self, status):
        if status != 0:
            raise RuntimeError(f"{status}: {self.c.tandem_last_error().decode()}")

    def device(self, device_type):
        text = self.c.tandem_device_description(device_type, 0)
        return text.decode() if text else None


class Attention:
    """A planned problem over PyTorch tensors: call it to run; `out` and `lse` hold the result."""

    def __init__(self, library, torch, q, k, v, terms=(), bias=None, kernel=None,
                 threads=0):
        self.library = library
        self.torch = torch
        self.keep = [q, k, v, bias]
        layout = LAYOUT_THD if q.dim() == 3 else LAYOUT_BHSD
        self.out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:-1]
        self.lse = torch.empty(*lse_shape, dtype=torch.float32, device=q.device)
        p = self.problem = Problem()
        p.struct_size = ctypes.sizeof(Problem)
        p.layout = layout
        p.q, p.k, p.v = self._tensor(q), self._tensor(k), self._tensor(v)
        p.bias = self._tensor(bias) if bias is not None else None
        made = [self._term(*term) for term in terms]
        self.terms = (ctypes.c_void_p * max(len(made), 1))(*[ctypes.addressof(t) for t in made])
        p.mask_terms = ctypes.addressof(self.terms)
        p.mask_term_count = len(made)
        o = self.outputs = Outputs()
        o.struct_size = ctypes.sizeof(Outputs)
        o.out, o.lse = self._tensor(self.out), self._tensor(self.lse)
        options = Options()
        options.struct_size = ctypes.sizeof(Options)
        options.threads = threads
        options.kernel = kernel.encode() if kernel else None
        self.plan = ctypes.c_void_p()
        library.check(library.c.tandem_plan_create(ctypes.byref(p), ctypes.byref(o), None,
                                                   ctypes.byref(options), ctypes.byref(self.plan)))
        self.kernel = library.c.tandem_plan_kernel(self.plan).decode()
        self.workspace_size = library.c.tandem_plan_workspace_size(self.plan)
        self.workspace = torch.empty(self.workspace_size + 256, dtype=torch.uint8, device=q.device)
        self.workspace_data = (self.workspace.data_ptr() + 255) // 256 * 256
        self.is_cuda = q.is_cuda

    def _tensor(self, tensor):
        self.keep.append(tensor)
        self.keep.append(describe(tensor))
        return ctypes.pointer(self.keep[-1])

    def _term(self, kind, *arguments):
        """("causal", alignment) | ("window", left, right, alignment) | ("dense", mask) | ("packed", cu, longest)"""
        if kind in ("causal", "window"):
            term = Band()
            left, right, alignment = (-1, 0, *arguments) if kind == "causal" else arguments
            term.alignment, term.left, term.right = alignment, left, right
            code = BAND
        elif kind == "dense":
            term = Dense()
            term.mask = self._tensor(arguments[0])
            code = DENSE
        else:
            term = Packed()
            term.cu_seqlens_q = term.cu_seqlens_k = self._tensor(arguments[0])
            term.max_q_len = term.max_kv_len = arguments[1]
            code = PACKED
        term.head.struct_size, term.head.kind = ctypes.sizeof(type(term)), code
        self.keep.append(term)
        return term

    def __call__(self):
        stream = self.torch.cuda.current_stream().cuda_stream if self.is_cuda else None
        self.library.check(self.library.c.tandem_plan_run(
            self.plan, ctypes.byref(self.problem), ctypes.byref(self.outputs), None,
            ctypes.c_void_p(self.workspace_data), ctypes.c_size_t(self.workspace_size),
            ctypes.c_void_p(stream)))
        return self.out

    def __del__(self):
        if getattr(self, "plan", None):
            self.library.c.tandem_plan_destroy(self.plan)
