import json
import struct

import gguf
import numpy as np
import pytest
import tiny_gguf
from safetensors import safe_open

from midfill.errors import ModelError
from midfill.models.gguf import convert, tokenizer_from_gguf
from midfill.models.tokenizer import load_tokenizer


def silent(message, share):
    pass


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "converted"
    made.mkdir()
    return made


def weights_of(folder):
    """bfloat16 values as float32, by name; read by the safetensors library, not by our code."""
    found = {}
    with safe_open(folder / "model.safetensors", "np") as file:
        raw = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            start, end = header[name]["data_offsets"]
            bits = (
                np.frombuffer(raw[8 + length + start : 8 + length + end], np.uint16).astype(np.uint32) << 16
            )
            found[name] = bits.view(np.float32).reshape(header[name]["shape"])
    return found


def test_the_weights_arrive_under_their_names(tmp_path, folder):
    values = tiny_gguf.write_qwen2(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", folder, silent)
    found = weights_of(folder)
    assert len(found) == len(values)
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    }
    for name, source in pairs.items():
        np.testing.assert_allclose(found[name], values[source], rtol=2**-8)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6
    assert (config["eos_token_id"], config["pad_token_id"]) == (261, 260)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "F16", "BF16"])
def test_quantised_weights_are_those_of_the_gguf_library(tmp_path, folder, kind):
    name = "blk.0.ffn_gate.weight"
    values = tiny_gguf.write_qwen2(tmp_path / "m.gguf", quants={name: kind})
    convert(tmp_path / "m.gguf", folder, silent)
    quant = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values[name], quant), quant)
    found = weights_of(folder)["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_allclose(found, expected, rtol=2**-8)


def test_values_are_rounded_to_the_nearest_ties_to_even(tmp_path, folder):
    one = np.float32(1)
    step = np.float32(2**-7)  # between neighbours of bfloat16 at 1
    given = np.array(
        [one + step / 2, one + step * 1.5, one + step * 0.51, -one - step * 0.49] * 16, np.float32
    )
    tiny_gguf.write_qwen2(tmp_path / "m.gguf", change={"output_norm.weight": given})
    convert(tmp_path / "m.gguf", folder, silent)
    expected = np.array([1, 1 + 2 * step, 1 + step, -1] * 16, np.float32)
    np.testing.assert_array_equal(weights_of(folder)["model.norm.weight"], expected)


def test_a_better_head_replaces_the_embedding_it_equals(tmp_path, folder):
    values = tiny_gguf.write_qwen2(tmp_path / "m.gguf", head="same", quants={"token_embd.weight": "Q4_0"})
    convert(tmp_path / "m.gguf", folder, silent)
    found = weights_of(folder)
    assert "lm_head.weight" not in found
    np.testing.assert_allclose(found["model.embed_tokens.weight"], values["output.weight"], rtol=2**-8)


def test_a_head_of_its_own_is_kept(tmp_path, folder):
    values = tiny_gguf.write_qwen2(tmp_path / "m.gguf", head="own")
    convert(tmp_path / "m.gguf", folder, silent)
    np.testing.assert_allclose(weights_of(folder)["lm_head.weight"], values["output.weight"], rtol=2**-8)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_tokenizer_has_the_same_ids(tmp_path, folder):
    tiny_gguf.write_qwen2(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", folder, silent)
    for tokenizer in (load_tokenizer(folder), tokenizer_from_gguf(tmp_path / "m.gguf")):
        assert tokenizer.encode(" def") == [tiny_gguf.token_id("Ġdef")]
        assert tokenizer.token_id("<|fim_middle|>") == tiny_gguf.token_id("<|fim_middle|>")
        assert tokenizer.control_ids == {tiny_gguf.token_id(mark) for mark in tiny_gguf.CONTROL}
        assert tokenizer.num_ids == len(tiny_gguf.TOKENS)  # padding is no token


def test_progress_ends_at_one(tmp_path, folder):
    tiny_gguf.write_qwen2(tmp_path / "m.gguf")
    shares = []
    convert(tmp_path / "m.gguf", folder, lambda _, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"change": {"blk.1.attn_q.bias": None}}, r"weight 'blk.1.attn_q.bias' is missing"),
        ({"change": {"blk.0.extra.weight": np.zeros((2, 2), np.float32)}}, r"does not know.*extra"),
        ({"change": {"blk.0.ffn_up.weight": np.full((128, 64), np.nan, np.float32)}}, "NaN or infinite"),
        ({"pre": "martian"}, r"pre-tokenizer 'martian'.*qwen2"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused(tmp_path, folder, options, complaint):
    tiny_gguf.write_qwen2(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError, match=complaint):
        convert(tmp_path / "m.gguf", folder, silent)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path, folder):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    tiny_gguf.add_vocabulary(writer)
    tiny_gguf.write(tmp_path / "m.gguf", writer)
    with pytest.raises(ModelError, match=r"'mamba'.*gemma, llama, qwen2, starcoder, starcoder2"):
        convert(tmp_path / "m.gguf", folder, silent)


HUGE = 1 << 60


def header(num_tensors=0, num_keys=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"t", sizes=(64,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF", "incomplete"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "little-endian"),
        (header(num_keys=HUGE), "more than fit"),
        (header(num_tensors=HUGE), "more than fit"),
        (header(num_keys=1, rest=struct.pack("<Q", HUGE) + b" " * 40), "does not fit"),
        (header(num_keys=1, rest=text(b"k") + struct.pack("<IQ", 8, HUGE) + b" " * 40), "does not fit"),
        (header(num_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + b" " * 40), "does not fit"),
        (header(num_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + b" " * 40), "does not fit"),
        (header(num_keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b" " * 40), "unsupported type"),
        (header(num_keys=1, rest=text(b"k") + struct.pack("<I", 99) + b" " * 40), "unknown type 99"),
        (header(1, rest=tensor(offset=HUGE) + b"\0" * 512), "beyond the end"),
        (header(1, rest=tensor(sizes=(HUGE,)) + b"\0" * 512), "beyond the end"),
        (header(1, rest=tensor(sizes=(0,)) + b"\0" * 512), "beyond the end"),
        (header(1, rest=tensor(sizes=(33,), kind=8) + b"\0" * 512), "not whole Q8_0 blocks"),
        (header(1, rest=tensor(sizes=(1, 1, 1, 1, 1)) + b"\0" * 512), "5 dimensions"),
        (header(1, rest=tensor(kind=4999) + b"\0" * 512), "unknown type 4999"),
        (header(2, rest=tensor() + tensor() + b"\0" * 512), "two tensors named"),
        (header(rest=b"\0" * 64), "no vocabulary"),
    ],
)
def test_a_malformed_file_is_an_error_and_not_an_allocation(tmp_path, content, complaint):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        tokenizer_from_gguf(path)


def test_a_file_cut_anywhere_is_refused(tmp_path, folder):
    tiny_gguf.write_qwen2(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 60):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            convert(cut, folder, silent)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.gguf cannot be read"):
        tokenizer_from_gguf(tmp_path / "gone.gguf")
