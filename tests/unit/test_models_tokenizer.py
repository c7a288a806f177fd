import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midfill.errors import ModelError
from midfill.models.tokenizer import FastTokenizer, load_tokenizer
from profiles import examples

NAMES = ["deepseek-coder", "gpt-2", "llama-spm", "qwen2", "refact", "starcoder"]

SAMPLE = (
    "def area(r):\n\tif r < 0:  # Größe, 日本語, 🙂, e\u0301, \u2581\r\n"
    '        raise ValueError(f"r={r:.3f} 12345")\n\n\n    return   3.14159 * r**2\n'
    "<p>don't</p> \u00f5 \u00ff \u0000"
)


def spelled(tokenizer, token):
    return tokenizer.decode([token])


@pytest.mark.parametrize("name", NAMES)
def test_source_code_round_trips(vocabulary, name):
    tokenizer = vocabulary(name)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_text_can_never_become_a_control_token(vocabulary, name):
    tokenizer = vocabulary(name)
    assert tokenizer.control_ids
    for token in tokenizer.control_ids:
        mark = spelled(tokenizer, token)
        assert tokenizer.token_id(mark) == token
        for text in (mark, f"x = '{mark}'", mark * 2, f" {mark}\n"):
            ids = tokenizer.encode(text)
            assert not tokenizer.control_ids & set(ids), (mark, ids)
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_gives_the_same_text_as_decoding_at_once(vocabulary, name):
    tokenizer = vocabulary(name)
    ids = tokenizer.encode(SAMPLE)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == SAMPLE
    assert not any("\ufffd" in piece for piece in pieces)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == SAMPLE.encode()


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_the_vocabulary_are_those_of_the_tokens(vocabulary, name):
    tokenizer = vocabulary(name)
    every = tokenizer.vocab_bytes()
    assert len(every) == tokenizer.num_ids
    assert all(every[token] == b"" for token in tokenizer.control_ids)
    # Bytes of assigned characters are tokens of their own, so any such text can be healed and spelled.
    # UTF-8 never has 0xC0, 0xC1 and 0xF5 up; 0xF1 (planes without characters) is missing in StarCoder's.
    never = {0xC0, 0xC1, 0xF1, *range(0xF5, 0x100)}
    valid = {bytes([byte]) for byte in range(256) if byte not in never}
    assert valid <= set(every)


def test_qwen_splits_like_its_original(vocabulary):
    tokenizer = vocabulary("qwen2")
    # Ids of the original Qwen2.5 tokenizer: digits one by one, three spaces and the word's own.
    assert tokenizer.encode("print(123)") == [1350, 7, 16, 17, 18, 8]
    assert tokenizer.encode("def add(a, b):\n    return ") == [750, 912, 2877, 11, 293, 982, 262, 470, 220]
    assert tokenizer.token_id("<|endoftext|>") == 151643


def test_starcoder_ids_are_those_of_its_tokenizer(vocabulary):
    tokenizer = vocabulary("starcoder")
    assert [tokenizer.token_id(f"<fim_{part}>") for part in ("prefix", "middle", "suffix")] == [1, 2, 3]
    assert tokenizer.token_id("<|endoftext|>") == 0
    digits = tokenizer.encode("2024")
    assert [tokenizer.decode([token]) for token in digits] == ["2", "0", "2", "4"]


def test_fragments_of_a_sentencepiece_model_join_without_spaces(vocabulary):
    tokenizer = vocabulary("llama-spm")
    assert tokenizer.decode(tokenizer.encode("json.") + tokenizer.encode("loads(x)")) == "json.loads(x)"


def test_a_lone_surrogate_becomes_a_replacement_character(vocabulary):
    tokenizer = vocabulary("qwen2")
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_an_unfinished_character_is_held_back(vocabulary):
    tokenizer = vocabulary("gpt-2")
    every = tokenizer.vocab_bytes()
    first, second = every.index(b"\xc3"), every.index(b"\xbc")
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.push(second) == "ü"
    assert stream.push(first) == ""
    assert stream.push(tokenizer.token_id("a")) == "\ufffda"
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert tokenizer.decode([first]) == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text(vocabulary):
    tokenizer = vocabulary("gpt-2")
    assert tokenizer.decode([tokenizer.num_ids + 5]) == ""
    assert tokenizer.stream().push(tokenizer.num_ids) == ""
    assert tokenizer.token_bytes(tokenizer.num_ids) == b""


@settings(max_examples=examples(2))
@given(text=st.text(alphabet=st.characters(), max_size=40))
@pytest.mark.parametrize("name", ["qwen2", "llama-spm", "deepseek-coder"])
def test_any_text_round_trips(vocabulary, name, text):
    tokenizer = vocabulary(name)
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected
    assert not tokenizer.control_ids & set(ids)


def small(**parts):
    """A byte-level tokenizer.json with three letters, for the cases that no shared vocabulary has."""
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 4, "content": "<|fim_prefix|>", "special": False},
            {"id": 5, "content": "   ", "special": False},
            {"id": 6, "content": "</table>", "special": False},
            {"id": 7, "content": "<s>", "special": True},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<s>": 7, "<": 8, "s": 9, ">": 10, "<s": 11},
            "merges": ["a b", "< s", "<s >"],
        },
    } | parts


def with_flags(description):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description["added_tokens"] = [flags | token for token in description["added_tokens"]]
    return description


def test_added_tokens_that_are_text_stay_text():
    tokenizer = FastTokenizer(with_flags(small()))
    assert tokenizer.encode("ab   ab</table>") == [3, 5, 3, 6]
    assert tokenizer.control_ids == {4, 7}
    assert tokenizer.token_bytes(5) == b"   "


def test_no_space_and_no_bos_are_added():
    assert FastTokenizer(with_flags(small())).encode("ab ab") == [3, 2, 3]


def test_merges_do_not_make_a_control_token():
    tokenizer = FastTokenizer(with_flags(small()))
    assert 7 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"


def test_a_folder_is_loaded(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_flags(small())), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("ab") == [3]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("{}", "not a valid tokenizer.json"),
        ("[]", "not a valid tokenizer.json"),
        ('{"model": {"type": "WordPiece", "vocab": {}}}', "WordPiece"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}', "refuses"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=complaint) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
