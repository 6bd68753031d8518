"""ONNX Runtime's attention on the CPU, as peers (see peers_torch.py): its own MultiHeadAttention, which is fused where
there is no bias, and the standard's Attention."""

import torch

from peers_torch import Call, Declined


def _session(onnxruntime, model, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Its idle threads would take time from whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bias(inputs):
    """The mask as an additive f32 array [B or 1, H or 1, Sq, Sk], or None."""
    mask = inputs.torch_mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    full = mask.expand(mask.shape[0], mask.shape[1], inputs.case.q_len, inputs.case.kv_len)
    return torch.zeros(full.shape).masked_fill(~full, float("-inf")).to(inputs.dtype)


def _prepare(make_node, arrange_kv):
    def prepare_with(onnx, onnxruntime, threads):
        element = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}

        def prepare(inputs):
            case = inputs.case
            if inputs.dtype not in element:
                raise Declined("its CPU provider has no bf16")
            bias = _bias(inputs)
            q, node, domains = make_node(onnx, inputs, bias is not None)
            tensors = {"q": q, **({"bias": bias.contiguous()} if bias is not None else {})}
            copies = [dict(zip("kv", arrange_kv(*pair))) for pair in inputs.kv]
            info = [onnx.helper.make_tensor_value_info(name, element[inputs.dtype], list(t.shape))
                    for name, t in {**tensors, **copies[0]}.items()]
            out = onnx.helper.make_tensor_value_info("out", element[inputs.dtype], list(q.shape))
            graph = onnx.helper.make_graph([node], "attention", info, [out])
            opsets = [onnx.helper.make_opsetid(*domain) for domain in domains]
            model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
            session = _session(onnxruntime, model, threads)
            value = lambda t: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy())
            fixed = {name: value(t) for name, t in tensors.items()}
            result = value(torch.empty_like(q))
            bindings = []
            for copy in copies:
                binding = session.io_binding()
                for name, t in {**fixed, **{n: value(c) for n, c in copy.items()}}.items():
                    binding.bind_ortvalue_input(name, t)
                binding.bind_ortvalue_output("out", result)
                bindings.append(binding)

            def run(copy):
                session.run_with_iobinding(bindings[copy])
                return result

            def arrange(value):
                answer = torch.from_numpy(value.numpy().copy())
                if answer.dim() == 3:  # [B, S, H * D]
                    answer = answer.view(case.batch, case.q_len, case.heads, case.dim).transpose(1, 2)
                return inputs.packed(answer) if case.is_packed else answer
            return Call(run, arrange)
        return prepare
    return prepare_with


def _rows(t):
    """[B, H, S, D] as [B, S, H * D]."""
    return t.transpose(1, 2).contiguous().flatten(2)


def _scale(inputs):
    """A scale of 0 means the default to ONNX."""
    if inputs.scale == 0:
        raise Declined("a scale of 0 is its default scale")
    return {} if inputs.scale is None else {"scale": inputs.scale}


def _multi_head_node(onnx, inputs, with_bias):
    case = inputs.case
    if case.heads != case.kv_heads:
        raise Declined("MultiHeadAttention has no grouped heads")
    names = ["q", "k", "v"] + (["", "", "bias"] if with_bias else [])
    node = onnx.helper.make_node("MultiHeadAttention", names, ["out"], domain="com.microsoft",
                                 num_heads=case.heads, unidirectional=int(inputs.is_causal and not with_bias),
                                 **_scale(inputs))
    return _rows(inputs.q), node, (("", 17), ("com.microsoft", 1))


def _standard_node(onnx, inputs, with_bias):
    names = ["q", "k", "v"] + (["bias"] if with_bias else [])
    node = onnx.helper.make_node("Attention", names, ["out"], is_causal=int(inputs.is_causal and not with_bias),
                                 **_scale(inputs))
    return inputs.q, node, (("", 23),)


def peers(threads):
    """Peers by name, and why they are absent."""
    names = {"ORT MultiHeadAttention": _prepare(_multi_head_node, lambda k, v: (_rows(k), _rows(v))),
             "ORT Attention": _prepare(_standard_node, lambda k, v: (k, v))}
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        return {}, {name: str(error) for name in names}
    onnxruntime.set_default_logger_severity(4)
    return {name: prepare(onnx, onnxruntime, threads) for name, prepare in names.items()}, {}
