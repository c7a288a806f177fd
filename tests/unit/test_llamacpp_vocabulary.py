"""Our tokenizer of a GGUF file makes the ids that llama.cpp's own does, and sentinels stay text."""

from __future__ import annotations

import ctypes

import pytest

from midfill.engine.llamacpp.bindings import library
from midfill.models.vocabulary import tokenizer_of

NAMES = ("deepseek-coder", "gpt-2", "llama-spm", "qwen2", "refact", "starcoder")

TEXTS = (
    "def naïve_sum(xs):\n\treturn sum(x1234 for x in xs)  # 'größe', 合計 🙂\n\n\n        <=>::->\n",
    "if (a&&b) { return 3.14159e-10; } /* don't */\r\n\r\n\tx += 1234567890;\n",
    "    \n\n   class Ünïcödé(Базовый):\n        '''日本語 テスト'''\n",
    "x" * 50 + " " * 33 + "_" * 17 + "\t" * 9,
    "<html><body class=\"a\">it's we'll I'VE</body></html>",
)


def native(lib, vocab, text):
    data = text.encode()
    ids = (ctypes.c_int32 * (len(data) + 8))()
    count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), False, False)
    assert count >= 0
    return ids[:count]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_llama_cpp(vocabulary_file, name):
    path = vocabulary_file(name)
    lib = library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    handle = lib.llama_model_load_from_file(str(path).encode(), params)
    assert handle
    try:
        vocab = lib.llama_model_get_vocab(handle)
        tokenizer = tokenizer_of(path)
        for sample in TEXTS:
            text = sample
            if name == "deepseek-coder":
                # Its file lists them as tokens of their own, which llama.cpp takes for the characters; in the
                # original they are bytes of others.
                text = text.translate(dict.fromkeys(map(ord, "õ÷ÁýÀÿøúþüùöû")))
            # A vocabulary of SentencePiece puts a space before a text, which is no part of a prompt.
            expected = native(lib, vocab, text)
            found = tokenizer.encode(text)
            if name == "llama-spm":
                assert tokenizer.decode(found) == text
                assert found[-8:] == expected[-8:]
            else:
                assert found == expected
        sentinel = tokenizer.decode([min(tokenizer.control_ids)])
        assert not tokenizer.control_ids & set(tokenizer.encode(f"a {sentinel} b"))
        assert lib.llama_vocab_n_tokens(vocab) >= tokenizer.num_ids
    finally:
        lib.llama_model_free(handle)
