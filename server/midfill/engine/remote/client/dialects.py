"""API dialects of model servers: how each kind is asked and how it answers, one row per kind.

A row turns a `RemoteRequest` into the JSON body of a request, and one JSON object of the response stream into
a `StreamEvent`. Pure functions: sockets, clocks and retries are the business of `endpoint` and `remote`.
Fields that are used are checked here: one of an unexpected type raises `InvalidResponseError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from midfill.system.printable import shown


class InvalidResponseError(Exception):
    """An invalid response. The message never quotes it, because it may hold source text."""


class Healing(StrEnum):
    """How a server is made to begin its output with `Request.forced_prefix`."""

    FIELD = "field"
    """A request field: our own server."""
    GRAMMAR = "grammar"
    """A grammar (llama.cpp): a literal, then anything."""
    REGEX = "regex"
    """A regular expression (SGLang): a literal, then anything."""
    TOKENS = "tokens"
    """A set of allowed tokens (vLLM): one request per token until the text is complete."""
    NONE = "none"
    """Impossible: the text is appended to the prompt instead, and the partial token is not healed."""


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """A request, as far as it is sent to a server.

    Attributes:
        id: our own identifier for it.
        model: the server's name for the model.
        prompt: token ids, or text with the sentinels spelled out if the vocabulary is unknown.
        suffix: for endpoints that take the text after the cursor separately; `prompt` is then the text before
            it.
        max_tokens: maximum tokens of the output.
        stop_ids: ids that end it.
        stops: the same as text.
        forced_prefix: text that the output must begin with; "" for no constraint.
        allowed_ids: the only tokens that may be chosen; None for all. For `Healing.TOKENS`.
        idle: the result is not needed yet.
        adapter: see `Request.adapter`; for our own server.
    """

    id: str
    model: str
    prompt: Sequence[int] | str
    max_tokens: int
    suffix: str = ""
    stop_ids: Sequence[int] = ()
    stops: Sequence[str] = ()
    forced_prefix: str = ""
    allowed_ids: Sequence[int] | None = None
    idle: bool = False
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One object of a response stream.

    Attributes:
        text: the text it adds.
        ids: its tokens, if the server reports them.
        logprobs: of these tokens, or of the pieces of text that the server takes for tokens.
        done: the output ends here.
        reused: prompt tokens that the server had computed before; None if it does not report them.
        computed: prompt tokens that it had to compute; reported by our own server.
        error: why the output ends; from our own server, whose messages contain no source text.
    """

    text: str = ""
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    done: bool = False
    reused: int | None = None
    computed: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server.

    Attributes:
        title: its name for the user.
        path: of a completion, after the URL that the user set.
        body: converts a request to JSON.
        read: converts one object of the stream.
        healing: see `Healing`.
        takes_ids: a prompt may be token ids.
        tokenize: path and body that turn text into ids, for comparing vocabularies; None if there is no such
            page.
        warm_tokens: `max_tokens` of a request that only computes the prompt; None where that costs money.
        takes_bos: a text prompt must contain the beginning-of-text token, if the model wants one; other
            servers add it themselves.
        takes_suffix: the text after the cursor has its own field, and the server makes the prompt.
    """

    title: str
    path: str
    body: Callable[[RemoteRequest], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], StreamEvent]
    healing: Healing = Healing.NONE
    takes_ids: bool = True
    tokenize: tuple[str, Callable[[str, str], dict[str, Any]]] | None = None
    warm_tokens: int | None = 1
    takes_bos: bool = False
    takes_suffix: bool = False


def typed(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """Return a field of a response, or `default` if it is missing or null. Raises for another type."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidResponseError(f"its field {key!r} is of the type {type(value).__name__}")
    return value


def _numbers(values: Sequence[Any], kind: type | tuple[type, ...]) -> list[Any]:
    if any(not isinstance(value, kind) or isinstance(value, bool) for value in values):
        raise InvalidResponseError("a list of numbers contains something else")
    return list(values)


# OpenAI's completions, as vLLM, SGLang and our own engine extend them.


def _openai(query: RemoteRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": query.model,
        "prompt": query.prompt if isinstance(query.prompt, str) else list(query.prompt),
        "max_tokens": query.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    if query.stops:
        # OpenAI's own endpoint takes at most four.
        body["stop"] = list(query.stops)[:4]
    return body


def _openai_logprobs(query: RemoteRequest) -> dict[str, Any]:
    return _openai(query) | {"logprobs": 1}


def _vllm(query: RemoteRequest) -> dict[str, Any]:
    body = _openai_logprobs(query) | {
        "add_special_tokens": False,
        "return_tokens_as_token_ids": True,
        "stop_token_ids": list(query.stop_ids),
        "stream_options": {"include_usage": True},
    }
    if query.allowed_ids is not None:
        body["allowed_token_ids"] = list(query.allowed_ids)
    return body


def _sglang(query: RemoteRequest) -> dict[str, Any]:
    body = _openai_logprobs(query) | {"stop_token_ids": list(query.stop_ids)}
    if query.forced_prefix:
        body["regex"] = f"{_escaped(query.forced_prefix)}[\\s\\S]*"
    return body


def _escaped(text: str) -> str:
    """Return a regular expression for exactly this text.

    Not `re.escape`: it escapes blanks, which not all engines can read.
    """
    return "".join(f"\\{char}" if char in r".^$*+?{}[]\|()/-" else char for char in text)


def _midfill(query: RemoteRequest) -> dict[str, Any]:
    return _openai_logprobs(query) | {
        "stop_token_ids": list(query.stop_ids),
        "midfill": {
            "id": query.id,
            "starts_with": query.forced_prefix,
            "idle": query.idle,
            "adapter": query.adapter,
        },
    }


def _read_midfill(answer: Mapping[str, Any]) -> StreamEvent:
    if "error" in answer:
        return StreamEvent(
            error=shown(typed(typed(answer, "error", Mapping, {}), "message", str, "It failed."))
        )
    return _read_openai(answer)


def _read_openai(answer: Mapping[str, Any]) -> StreamEvent:
    if "error" in answer:
        raise InvalidResponseError("it reports an error")
    usage = typed(answer, "usage", Mapping, {})
    details = typed(usage, "prompt_tokens_details", Mapping, {})
    reused = typed(details, "cached_tokens", int, None)
    choices = typed(answer, "choices", list, [])
    own = typed(answer, "midfill", Mapping, {})
    computed = typed(own, "computed", int, None)
    if computed is not None:
        reused = typed(own, "reused", int, reused)
    if not choices:
        return StreamEvent(reused=reused, computed=computed)
    choice = choices[0]
    if not isinstance(choice, Mapping):
        raise InvalidResponseError("its first choice is not an object")
    text = typed(choice, "text", str, "")
    ids = _numbers(typed(choice, "token_ids", list, []), int)
    logprobs = typed(choice, "logprobs", Mapping, {})
    told = [number for number in typed(logprobs, "token_logprobs", list, []) if number is not None]
    numbers = _numbers(told, (int, float))
    if not ids:
        ids = _spelled_ids(typed(logprobs, "tokens", list, []))
    # llama.cpp's form.
    for token in typed(logprobs, "content", list, []):
        if isinstance(token, Mapping) and "logprob" in token:
            numbers += _numbers([token["logprob"]], (int, float))
            ids += _numbers([token["id"]], int) if "id" in token else []
    done = typed(choice, "finish_reason", str, None) is not None
    return StreamEvent(text, ids, numbers, done=done, reused=reused, computed=computed)


def _spelled_ids(tokens: Sequence[Any]) -> list[int]:
    """Return ids as vLLM spells them on request: "token_id:123"."""
    mark = "token_id:"
    spelled = [
        token.removeprefix(mark) for token in tokens if isinstance(token, str) and token.startswith(mark)
    ]
    return [int(number) for number in spelled if number.isdecimal()] if len(spelled) == len(tokens) else []


# llama.cpp's own completions: they take token ids and grammars.


def _llama_cpp(query: RemoteRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": query.prompt if isinstance(query.prompt, str) else list(query.prompt),
        "n_predict": query.max_tokens,
        "temperature": 0.0,
        "top_k": 1,
        "samplers": ["top_k"],
        "cache_prompt": True,
        "stream": True,
        "n_probs": 1,
        "return_tokens": True,
    }
    if query.forced_prefix:
        # The escapes of its grammars are those of JSON.
        body["grammar"] = f"root ::= {json.dumps(query.forced_prefix, ensure_ascii=False)} [^\\x00]*"
    return body


def _read_llama_cpp(answer: Mapping[str, Any]) -> StreamEvent:
    if "error" in answer:
        raise InvalidResponseError("it reports an error")
    if "content" not in answer:
        raise InvalidResponseError("it is not a completion")
    probabilities = typed(answer, "completion_probabilities", list, [])
    if not all(isinstance(row, Mapping) for row in probabilities):
        raise InvalidResponseError("its probabilities are not objects")
    numbers = [typed(row, "logprob", (int, float), None) for row in probabilities]
    timings = typed(answer, "timings", Mapping, {})
    return StreamEvent(
        typed(answer, "content", str, ""),
        _numbers(typed(answer, "tokens", list, []), int),
        [number for number in numbers if number is not None],
        done=typed(answer, "stop", bool, False),
        reused=typed(timings, "cache_n", int, None),
    )


# Ollama: text only, its template switched off.


def _ollama(query: RemoteRequest) -> dict[str, Any]:
    return {
        "model": query.model,
        "prompt": query.prompt,
        "raw": True,
        "stream": True,
        "logprobs": True,
        "keep_alive": "30m",
        "options": {
            "temperature": 0,
            "top_k": 1,
            "num_predict": query.max_tokens,
            "stop": list(query.stops),
        },
    }


def _read_ollama(answer: Mapping[str, Any]) -> StreamEvent:
    if "error" in answer:
        raise InvalidResponseError("it reports an error")
    rows = typed(answer, "logprobs", list, [])
    numbers = [row["logprob"] for row in rows if isinstance(row, Mapping) and "logprob" in row]
    return StreamEvent(
        typed(answer, "response", str, ""),
        logprobs=_numbers(numbers, (int, float)),
        done=typed(answer, "done", bool, False),
    )


# Mistral's endpoint for filling in the middle: it makes the prompt itself.


def _mistral(query: RemoteRequest) -> dict[str, Any]:
    return _openai(query) | {"suffix": query.suffix}


def _read_mistral(answer: Mapping[str, Any]) -> StreamEvent:
    if "error" in answer:
        raise InvalidResponseError("it reports an error")
    choices = typed(answer, "choices", list, [])
    if not choices:
        return StreamEvent()
    if not isinstance(choices[0], Mapping):
        raise InvalidResponseError("its first choice is not an object")
    delta = typed(choices[0], "delta", Mapping, {})
    done = typed(choices[0], "finish_reason", str, None) is not None
    return StreamEvent(typed(delta, "content", str, ""), done=done)


# vLLM's form, which SGLang uses too.
_TOKENIZE: tuple[str, Callable[[str, str], dict[str, Any]]] = (
    "/tokenize",
    lambda model, text: {"model": model, "prompt": text, "add_special_tokens": False},
)

DIALECTS: dict[str, Dialect] = {
    "midfill": Dialect(
        "midfill engine serve",
        "/v1/completions",
        _midfill,
        _read_midfill,
        healing=Healing.FIELD,
        takes_bos=True,
        warm_tokens=0,
    ),
    "vllm": Dialect(
        "vLLM",
        "/v1/completions",
        _vllm,
        _read_openai,
        healing=Healing.TOKENS,
        takes_bos=True,
        tokenize=_TOKENIZE,
    ),
    "sglang": Dialect(
        "SGLang",
        "/v1/completions",
        _sglang,
        _read_openai,
        healing=Healing.REGEX,
        tokenize=_TOKENIZE,
    ),
    "llama.cpp": Dialect(
        "llama.cpp",
        "/completion",
        _llama_cpp,
        _read_llama_cpp,
        healing=Healing.GRAMMAR,
        warm_tokens=0,
        tokenize=(
            "/tokenize",
            lambda _model, text: {"content": text, "add_special": False, "parse_special": True},
        ),
    ),
    "ollama": Dialect("Ollama", "/api/generate", _ollama, _read_ollama, takes_ids=False),
    "mistral": Dialect(
        "Mistral's FIM endpoint",
        "/v1/fim/completions",
        _mistral,
        _read_mistral,
        takes_ids=False,
        warm_tokens=None,
        takes_suffix=True,
    ),
    "openai": Dialect(
        "an OpenAI-compatible server",
        "/v1/completions",
        _openai_logprobs,
        _read_openai,
        takes_ids=False,
        warm_tokens=None,
    ),
}

OWNERS = {
    "midfill": "midfill",
    "llamacpp": "llama.cpp",
    "vllm": "vllm",
    "sglang": "sglang",
    "library": "ollama",
    "mistralai": "mistral",
}
"""Dialects by the `owned_by` of a server's models."""


@dataclass(slots=True)
class StreamParser:
    """Splits the bytes of a stream into JSON objects: server-sent events, or one object per line.

    A line has at most `limit` bytes, so that an endless one takes no memory. `num_comments` counts the lines
    that only show that the server is alive.
    """

    limit: int = 1_000_000
    num_comments: int = 0
    _incomplete: bytes = field(default=b"")

    def take(self, chunk: bytes | None) -> list[dict[str, Any]]:
        """Return the objects that are complete now; None is the end. The mark `[DONE]` is an empty object.

        Raises `InvalidResponseError`.
        """
        if chunk is None:
            chunk = b"\n"
        *lines, self._incomplete = (self._incomplete + chunk).split(b"\n")
        if len(self._incomplete) > self.limit:
            raise InvalidResponseError(f"one of its lines is longer than {self.limit} bytes")
        self.num_comments += sum(line.startswith(b":") for line in lines)
        return [found for line in lines if (found := _object(line.strip())) is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    """Return one line as an object; None for blank lines, comments and names of events."""
    if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
        return None
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidResponseError("one of its lines is not JSON") from None
    if not isinstance(value, dict):
        raise InvalidResponseError("one of its lines is not a JSON object")
    return value
