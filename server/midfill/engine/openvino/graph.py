"""Build a decoder as an OpenVINO graph, from `config.json` and tensors.

The graph takes the tokens of several sequences in one flat row and keeps keys and values in blocks that the
caller owns (paged attention), so a past is cut by changing a number and nothing is copied. Weights are int8
with one scale per output channel, or float32, which yields the same tokens as transformers.

Knows tensors and shapes; nothing of slots, requests or text. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from midfill.engine.openvino.int8_weights import Floats, QuantizedTensor, Tensors
from midfill.engine.openvino.quiet_import import op, opset15, ov
from midfill.errors import AdapterError, ModelError
from midfill.system.json_files import read_json

_SEQUENCES = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")

_ACTIVATIONS = {"silu": "silu", "gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a decoder's parts in its files, and their kinds.

    Attributes:
        embedding, positions, final_norm: names of tensors without ".weight"; `positions` is "" for rotary
            positions.
        layer: name of a layer, with a placeholder for its number.
        attention_norm, mlp_norm, out: names in a layer.
        qkv: one name if the three are one matrix (one key-value head), else three.
        mlp: (up, down), or (gate, up, down).
        rms: norms divide by the root mean square; else they are layer norms with a bias.
    """

    embedding: str
    layer: str
    final_norm: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    mlp: tuple[str, ...]
    positions: str = ""
    rms: bool = True


_LLAMA = TensorNames(
    embedding="model.embed_tokens",
    layer="model.layers.{}.",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_STARCODER2 = TensorNames(
    embedding=_LLAMA.embedding,
    layer=_LLAMA.layer,
    final_norm=_LLAMA.final_norm,
    attention_norm=_LLAMA.attention_norm,
    qkv=_LLAMA.qkv,
    out=_LLAMA.out,
    mlp_norm=_LLAMA.mlp_norm,
    mlp=("mlp.c_fc", "mlp.c_proj"),
    rms=False,
)
_GPT_BIGCODE = TensorNames(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{}.",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp_norm="ln_2",
    mlp=("mlp.c_fc", "mlp.c_proj"),
    rms=False,
)
TENSOR_NAMES = {"qwen2": _LLAMA, "llama": _LLAMA, "starcoder2": _STARCODER2, "gpt_bigcode": _GPT_BIGCODE}
"""By transformers' `model_type`. Other architectures are run by torch."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The dimensions of a decoder.

    Attributes:
        architecture: transformers' `model_type`, a key of `TENSOR_NAMES`.
        context: maximum number of tokens of one sequence.
        head_width: entries of one head's query, key or value.
        activation: "silu", or the kind of gelu, "erf" or "tanh".
        rope_theta, rope_factor: base of the rotary frequencies, and the divisor of positions.
        window: number of tokens that each one attends to, itself included; 0 for all.
    """

    architecture: str
    vocab_size: int
    context: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    epsilon: float
    activation: str
    rope_theta: float
    rope_factor: float
    window: int


# More than any model has, and little enough that no memory runs out before the weights are looked at.
_MAX_SIZE = 1 << 20
_MAX_CONTEXT = 1 << 31
_MAX_LAYERS = 1000
_MAX_NUMBER = 1e30


class UnsupportedError(Exception):
    """No graph can be built of the model; the message says why."""


def read_shape(path: Path) -> DecoderShape:
    """Return the shape of the model in a folder. Raises `UnsupportedError` if no graph can be built of it."""
    try:
        shape = _shape(read_json(path / "config.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UnsupportedError(f"config.json is not as expected ({str(error)[:200]!r})") from error
    for name, value in asdict(shape).items():
        if not _is_sound(name, value):
            raise UnsupportedError(f"config.json is not as expected ({name} is {str(value)[:80]})")
    return shape


def _is_sound(name: str, value: Any) -> bool:
    """Return whether a field of `DecoderShape` has a value that a model can have."""
    if name in {"architecture", "activation"}:
        return isinstance(value, str)
    if name in {"epsilon", "rope_theta", "rope_factor"}:
        return type(value) in {int, float} and 0 <= value <= _MAX_NUMBER
    least, most = {
        "context": (0, _MAX_CONTEXT),
        "window": (0, _MAX_CONTEXT),
        "num_layers": (1, _MAX_LAYERS),
    }.get(name, (1, _MAX_SIZE))
    return type(value) is int and least <= value <= most


def _shape(config: Mapping[str, Any]) -> DecoderShape:
    kind = config["model_type"]
    if kind not in TENSOR_NAMES:
        raise UnsupportedError(f"its architecture {kind} is not supported")
    if kind == "gpt_bigcode":
        return _gpt_bigcode_shape(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in {"default", "linear"}:
        raise UnsupportedError(f"rotary positions of type {rope_type} are not supported")
    layout = TENSOR_NAMES[kind]
    # The defaults are those of transformers' configuration classes.
    num_heads = config["num_attention_heads"]
    return DecoderShape(
        architecture=kind,
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_width=config.get("head_dim") or config["hidden_size"] // num_heads,
        epsilon=config.get("rms_norm_eps", 1e-6) if layout.rms else config.get("norm_epsilon", 1e-5),
        activation=_activation(config, "silu" if layout.rms else "gelu_pytorch_tanh"),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_factor=float(rope["factor"]) if rope_type == "linear" else 1.0,
        window=_window(config),
    )


def _gpt_bigcode_shape(config: Mapping[str, Any]) -> DecoderShape:
    if not config.get("multi_query", True):
        raise UnsupportedError("gpt_bigcode with several key-value heads is not supported")
    if not config.get("scale_attn_weights", True):
        raise UnsupportedError("gpt_bigcode with unscaled attention is not supported")
    return DecoderShape(
        architecture="gpt_bigcode",
        vocab_size=config["vocab_size"],
        context=config["n_positions"],
        width=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        num_kv_heads=1,
        head_width=config["n_embd"] // config["n_head"],
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation({"hidden_act": config.get("activation_function")}, "gelu_pytorch_tanh"),
        rope_theta=0.0,
        rope_factor=1.0,
        window=0,
    )


def _activation(config: Mapping[str, Any], default: str) -> str:
    name = config.get("hidden_act") or default
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"the activation {name} is not supported")
    return _ACTIVATIONS[name]


def _window(config: Mapping[str, Any]) -> int:
    """Return the attention window that all layers share."""
    window = config.get("sliding_window") or 0
    if not config.get("use_sliding_window", config["model_type"] == "starcoder2"):
        window = 0
    kinds = set(config.get("layer_types") or ())
    if window and len(kinds) > 1:
        raise UnsupportedError("layers with different windows are not supported")
    return 0 if kinds == {"full_attention"} else window


def siblings(shape: DecoderShape, branched: frozenset[str]) -> list[tuple[str, ...]]:
    """Return the linear layers with LoRA inputs, those with the same input together.

    Raises `AdapterError` if one of `branched` is not a linear layer of such a model.
    """
    layout = TENSOR_NAMES[shape.architecture]
    groups = [layout.qkv, (layout.out,), layout.mlp[:-1], layout.mlp[-1:]]
    names = [
        tuple(name for part in group if (name := layout.layer.format(number) + part) in branched)
        for number in range(shape.num_layers)
        for group in groups
    ]
    if strangers := sorted(branched - {name for group in names for name in group}):
        raise AdapterError(
            f"The adapter changes {strangers[0]}, which OpenVINO does not support; set `runner` to torch."
        )
    return [group for group in names if group]


def build_parts(
    shape: DecoderShape, tensors: Tensors, branched: frozenset[str] = frozenset(), *, num_parts: int = 1
) -> list[ov.Model]:
    """Return the graphs of a model, to be run one after the other, with LoRA inputs for `branched` layers.

    Each part has about the same number of layers; one part is the whole model. They hand over `hidden`
    (tokens x width). Inputs, each of the parts that need it: `input_ids`, `position_ids` (the tokens of all
    sequences, one after the other), `selected` (indexes of the tokens whose logits are wanted), `key_cache.N`
    and `value_cache.N` of every layer, and, as OpenVINO's paged attention defines them, `past_lens`,
    `subsequence_begins`, `block_indices`, `block_indices_begins`, `max_context_len`. With `branched` layers
    also, as `LoraStack` makes them, `mask` (tokens x rank), `down.NAME` for each of `siblings`, by the name
    of its first layer, and `up.NAME` for each layer. Output of the last part: logits, one row for each
    selected token.

    Raises `ModelError` if the tensors do not have that shape; names the tensor at fault.
    """
    read = _Parts(tensors)
    num_parts = min(num_parts, shape.num_layers)
    bounds = [shape.num_layers * number // num_parts for number in range(num_parts + 1)]
    models = [_Graph(shape, read, branched, range(first, end)).build() for first, end in pairwise(bounds)]
    read.check_all_used((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))
    return models


def skip_quantization(shape: DecoderShape) -> Callable[[str], bool]:
    """Return whether a tensor must stay float32: learned positions must, because small steps matter."""
    positions = TENSOR_NAMES[shape.architecture].positions
    return lambda name: name == f"{positions}.weight"


class _Parts:
    """The tensors of a model, and which of them no part of the graph has used yet."""

    def __init__(self, tensors: Tensors) -> None:
        self._read = tensors
        self._unused = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def take(self, name: str, *shape: int) -> Floats | QuantizedTensor:
        """Return a tensor, which must have that shape."""
        tensor = self._read.get(name)
        if tensor is None:
            raise ModelError(
                f"The weights do not contain {name}, which config.json requires. Pull the model again."
            )
        found = (tensor.values if isinstance(tensor, QuantizedTensor) else tensor).shape
        if found != shape:
            raise ModelError(f"{name} has shape {found}, but config.json requires {shape}.")
        self._unused.discard(name)
        return tensor

    def floats(self, name: str, *shape: int) -> Floats:
        """Return a tensor that is not quantized."""
        return cast("Floats", self.take(name, *shape))

    def num_rows(self, name: str) -> int:
        """Return the number of outputs of a matrix; 0 if there is none of that name."""
        tensor = self._read.get(name)
        return 0 if tensor is None else len(tensor.values if isinstance(tensor, QuantizedTensor) else tensor)

    def check_all_used(self, harmless: tuple[str, ...]) -> None:
        """Raise `ModelError` if there is a tensor that no part of the graph has used."""
        unknown = sorted(name for name in self._unused if not name.endswith(harmless))
        if unknown:
            raise ModelError(
                f"The weights contain {len(unknown)} tensors that config.json does not describe, "
                f"for example {unknown[0]}. Use weights and a config.json of the same model."
            )


class _Graph:
    """Builds one graph. Nodes are OpenVINO's; every activation is (tokens x something)."""

    def __init__(self, shape: DecoderShape, tensors: _Parts, branched: frozenset[str], layers: range) -> None:
        self._shape = shape
        self._layers = layers
        self._branched = branched
        self._names = TENSOR_NAMES[shape.architecture]
        self._tensors = tensors
        self._inputs: list[op.Parameter] = []

    def build(self) -> ov.Model:
        """Return the finished graph."""
        shape = self._shape
        is_last = self._layers.stop == shape.num_layers
        positions = self._input("position_ids", ov.Type.i64, [-1])
        if is_last:
            selected = self._input("selected", ov.Type.i64, [-1])
        sequences = [self._input(name, ov.Type.i32, [-1]) for name in _SEQUENCES]
        longest = self._input("max_context_len", ov.Type.i32, [])
        if self._branched:
            self._mask = self._input("mask", ov.Type.f32, [-1, -1])
        if self._layers.start == 0:
            hidden = self._embed(self._input("input_ids", ov.Type.i64, [-1]), positions)
        else:
            hidden = self._input("hidden", ov.Type.f32, [-1, shape.width])
        rotary = None if self._names.positions else self._rotary_angles(positions)
        for number in self._layers:
            name = self._names.layer.format(number)
            normed = self._norm(hidden, name + self._names.attention_norm)
            attended = self._attend(normed, name, number, rotary, sequences, longest)
            [projected] = self._linears(attended, {name + self._names.out: shape.width})
            hidden = opset15.add(hidden, projected)
            normed = self._norm(hidden, name + self._names.mlp_norm)
            hidden = opset15.add(hidden, self._mlp(normed, name))
        result = (
            opset15.result(self._logits(hidden, selected), name="logits")
            if is_last
            else opset15.result(hidden, name="hidden")
        )
        return ov.Model([result], self._inputs, shape.architecture)

    def _embedding(self) -> Floats | QuantizedTensor:
        shape = self._shape
        return self._tensors.take(f"{self._names.embedding}.weight", shape.vocab_size, shape.width)

    def _embed(self, ids: ov.Node, positions: ov.Node) -> ov.Node:
        shape, layout = self._shape, self._names
        hidden = _rows(self._embedding(), ids)
        if layout.positions:
            table = self._tensors.floats(f"{layout.positions}.weight", shape.context, shape.width)
            hidden = opset15.add(hidden, opset15.gather(_constant(table), positions, _constant(np.int64(0))))
        return hidden

    def _logits(self, hidden: ov.Node, selected: ov.Node) -> ov.Node:
        shape = self._shape
        last = opset15.gather(hidden, selected, _constant(np.int64(0)))
        last = self._norm(last, self._names.final_norm)
        head = self._embedding()
        if "lm_head.weight" in self._tensors:
            head = self._tensors.take("lm_head.weight", shape.vocab_size, shape.width)
        return opset15.matmul(last, _matrix(head), transpose_a=False, transpose_b=True)

    def _input(self, name: str, kind: ov.Type, shape: list[int]) -> op.Parameter:
        node = op.Parameter(kind, ov.PartialShape(shape))
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
        self._inputs.append(node)
        return node

    def _linears(self, inputs: ov.Node, widths: Mapping[str, int]) -> list[ov.Node]:
        """Return the outputs of linear layers with the same input, LoRA terms included."""
        outputs = {name: self._linear(inputs, name, width) for name, width in widths.items()}
        branched = [name for name in widths if name in self._branched]
        if branched:
            num_inputs = inputs.get_output_partial_shape(0)[1].get_length()
            down = self._input(f"down.{branched[0]}", ov.Type.f32, [-1, num_inputs])
            low = opset15.matmul(inputs, down, transpose_a=False, transpose_b=True)
            parts = [low.output(0)]
            if len(branched) > 1:
                parts = opset15.split(low, _constant(np.int64(1)), len(branched)).outputs()
            for name, part in zip(branched, parts, strict=True):
                up = self._input(f"up.{name}", ov.Type.f32, [widths[name], -1])
                chosen = opset15.multiply(part, self._mask)
                product = opset15.matmul(chosen, up, transpose_a=False, transpose_b=True)
                outputs[name] = opset15.add(outputs[name], product)
        return list(outputs.values())

    def _linear(self, inputs: ov.Node, name: str, num_outputs: int) -> ov.Node:
        num_inputs = inputs.get_output_partial_shape(0)[1].get_length()
        weight = self._tensors.take(f"{name}.weight", num_outputs, num_inputs)
        result = opset15.matmul(inputs, _matrix(weight), transpose_a=False, transpose_b=True)
        if f"{name}.bias" in self._tensors:
            result = opset15.add(result, _constant(self._tensors.floats(f"{name}.bias", num_outputs)[None]))
        return result

    def _norm(self, inputs: ov.Node, name: str) -> ov.Node:
        width = self._shape.width
        weight = _constant(self._tensors.floats(f"{name}.weight", width)[None])
        if not self._names.rms:
            bias = _constant(self._tensors.floats(f"{name}.bias", width)[None])
            normed = opset15.mvn(inputs, _axes(-1), True, self._shape.epsilon, "inside_sqrt")
            return opset15.add(opset15.multiply(normed, weight), bias)
        square = opset15.reduce_mean(opset15.power(inputs, _constant(np.float32(2))), _axes(-1), True)
        root = opset15.sqrt(opset15.add(square, _constant(np.float32(self._shape.epsilon))))
        normed = opset15.multiply(inputs, opset15.divide(_constant(np.float32(1)), root))
        return opset15.multiply(weight, normed)

    def _rotary_angles(self, positions: ov.Node) -> tuple[ov.Node, ov.Node]:
        """Return cosines and sines of the rotary angles: (tokens x 1 x head width)."""
        width = self._shape.head_width
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequencies = np.float32(1) / np.float32(self._shape.rope_theta) ** exponents
        places = opset15.unsqueeze(opset15.convert(positions, ov.Type.f32), _axes(1, 2))
        if self._shape.rope_factor != 1.0:
            frequencies = frequencies / np.float32(self._shape.rope_factor)
        half = opset15.multiply(places, _constant(frequencies.astype(np.float32)[None, None]))
        angles = opset15.concat([half, half], -1)
        return opset15.cos(angles), opset15.sin(angles)

    def _rotate(self, inputs: ov.Node, num_heads: int, rotary: tuple[ov.Node, ov.Node] | None) -> ov.Node:
        if rotary is None:
            return inputs
        cosines, sines = rotary
        width = self._shape.head_width
        heads = _reshape(inputs, -1, num_heads, width)
        halves = opset15.split(heads, _constant(np.int64(-1)), 2)
        minus = opset15.multiply(halves.output(1), _constant(np.float32(-1)))
        swapped = opset15.concat([minus, halves.output(0)], -1)
        turned = opset15.add(opset15.multiply(heads, cosines), opset15.multiply(swapped, sines))
        return _reshape(turned, -1, num_heads * width)

    def _attend(
        self,
        inputs: ov.Node,
        name: str,
        number: int,
        rotary: tuple[ov.Node, ov.Node] | None,
        sequences: list[op.Parameter],
        longest: op.Parameter,
    ) -> ov.Node:
        """Return the attention of a layer: project to queries, keys and values, store the latter, attend."""
        shape = self._shape
        widths = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        widths = [heads * shape.head_width for heads in widths]
        if len(self._names.qkv) == 1:
            [joint] = self._linears(inputs, {name + self._names.qkv[0]: sum(widths)})
            parts = opset15.variadic_split(joint, _constant(np.int64(-1)), _constant(np.array(widths)))
            query, key, value = parts.outputs()
        else:
            names = [name + part for part in self._names.qkv]
            linears = self._linears(inputs, dict(zip(names, widths, strict=True)))
            query, key, value = (linear.output(0) for linear in linears)
        caches = [
            self._input(f"{kind}_cache.{number}", ov.Type.dynamic, [-1, -1, -1, -1])
            for kind in ("key", "value")
        ]
        node = op._PagedAttentionExtension(  # noqa: SLF001 - it has no public name yet; the version is pinned
            [
                self._rotate(query, shape.num_heads, rotary).output(0) if rotary else query,
                self._rotate(key, shape.num_kv_heads, rotary).output(0) if rotary else key,
                value,
                *(cache.output(0) for cache in caches),
                *(row.output(0) for row in sequences),
                *(constant.output(0) for constant in _attention_constants(shape, longest)),
            ]
        )
        info = node.get_rt_info()
        for kind in "kv":
            info[f"num_{kind}_heads"] = shape.num_kv_heads
            info[f"{kind}_head_size"] = shape.head_width
        return _reshape(node.output(0), -1, widths[0])

    def _mlp(self, inputs: ov.Node, name: str) -> ov.Node:
        *inner, down = (name + part for part in self._names.mlp)
        width = self._tensors.num_rows(f"{inner[0]}.weight")
        first, *second = self._linears(inputs, dict.fromkeys(inner, width))
        kind = self._shape.activation
        first = opset15.swish(first) if kind == "silu" else opset15.gelu(first, kind)
        if second:
            first = opset15.multiply(first, second[0])
        [result] = self._linears(first, {down: self._shape.width})
        return result


def _attention_constants(shape: DecoderShape, longest: op.Parameter) -> list[ov.Node]:
    """Return the inputs of OpenVINO 2026.4's paged attention after the block tables; mostly unused."""
    none_i32 = np.zeros(0, np.int32)
    none_f32 = np.zeros(0, np.float32)
    zero = np.int32(0)
    return [
        _constant(np.float32(shape.head_width**-0.5)),
        _constant(np.int32(shape.window)),
        _constant(none_f32),  # slopes of ALiBi
        longest,
        _constant(none_i32),  # score aggregation
        *(_constant(none_i32), _constant(none_i32), _constant(none_f32)),  # rotation of kept blocks
        *(_constant(none_f32), _constant(zero), _constant(zero)),  # sparse attention
        _constant(none_f32),  # sinks
        *(_constant(zero), *(_constant(none_i32) for _ in range(3))),  # eviction
        _constant(none_i32),  # kinds of tokens
        *(_constant(np.zeros(0, np.uint8)), _constant(none_i32)),  # trees of drafts
    ]


def _constant(value: npt.NDArray[Any] | np.generic) -> ov.Node:
    """Return a constant that shares the memory of an array."""
    return op.Constant(np.asarray(value, order="C"), shared_memory=True)


def _axes(*axes: int) -> ov.Node:
    return _constant(np.array(axes, np.int64))


def _reshape(node: ov.Node, *shape: int) -> ov.Node:
    return opset15.reshape(node, _axes(*shape), special_zero=False)


def _matrix(weight: Floats | QuantizedTensor) -> ov.Node:
    """Return weights for a product. OpenVINO keeps int8 ones as they are and scales in the kernel."""
    if not isinstance(weight, QuantizedTensor):
        return _constant(weight)
    return opset15.multiply(opset15.convert(_constant(weight.values), ov.Type.f32), _constant(weight.scales))


def _rows(table: Floats | QuantizedTensor, ids: ov.Node) -> ov.Node:
    """Return some rows of a table; only these are ever converted."""
    axis = _constant(np.int64(0))
    if not isinstance(table, QuantizedTensor):
        return opset15.gather(_constant(table), ids, axis)
    values = opset15.convert(opset15.gather(_constant(table.values), ids, axis), ov.Type.f32)
    return opset15.multiply(values, opset15.gather(_constant(table.scales), ids, axis))
