"""Parameters of a completion in OpenAI's form: which are supported, and their limits.

Each parameter works as OpenAI's clients send it, or is refused by its name; none is ignored silently. No
message quotes what was sent. Pure: no HTTP, no engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_TOKENS = 65_536
CHARS_PER_TOKEN = 16
"""A text with more characters per token of the context is too long in any vocabulary of these models."""
MAX_STOPS = 8
_MAX_STOP_CHARS = 100
_MAX_STOP_IDS = 100
_MOST_IDS = 2**31
_MAX_NAME = 60

_UNUSED = "this engine supports its neutral value only"
# Unsupported parameters that OpenAI's clients may send, and the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "presence_penalty": (0,),
}
_REMEDIES = {
    "best_of": "send 1 or leave it out",
    "echo": "send false or leave it out",
    "frequency_penalty": "send 0 or leave it out",
    "logit_bias": "leave it out",
    "n": "send one request per answer",
    "presence_penalty": "send 0 or leave it out",
}


class InvalidParamsError(Exception):
    """An invalid request, or one with an unsupported parameter.

    Attributes:
        name: of the field; "" for the whole body.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}" if name else why)
        self.name = name


class Extra(BaseModel):
    """midfill's extensions of OpenAI's form."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str = Field(default="", max_length=64)
    starts_with: str = Field(default="", max_length=1000)
    idle: bool = False
    adapter: str | None = Field(default=None, max_length=200)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class CompletionBody(BaseModel):
    """The body of a completion request. Null means that a field is missing.

    Attributes:
        prompt: text, or token ids. A list of one prompt is that prompt.
        suffix: the text after the hole; `prompt` is then the text before it.
        temperature: the engine always takes the most likely token, as 0 asks for; see `read`.
        top_p: has no effect, because the most likely token is taken.
        seed: has no effect, because the output is deterministic.
        user: ignored; the token identifies the user.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(default="", max_length=1000)
    prompt: str | list[int]
    suffix: str | None = Field(default=None, max_length=MAX_TOKENS * CHARS_PER_TOKEN)
    max_tokens: int = Field(default=16, ge=0, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    user: str = Field(default="", max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=1)
    stop: Annotated[list[Annotated[str, Field(max_length=_MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)] = (
        Field(default=[])
    )
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_STOP_IDS)] = []
    midfill: Extra = Extra()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_values(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise InvalidParamsError("", "The body is not a JSON object.")
        kept = {name: value for name, value in values.items() if value is not None}
        for name, neutral in _NEUTRAL.items():
            if name in kept:
                value = kept.pop(name)
                if isinstance(value, bool) is not isinstance(neutral[0], bool) or value not in neutral:
                    raise InvalidParamsError(name, f"{_UNUSED}; {_REMEDIES[name]}.")
        return kept

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_prompt(cls, value: Any) -> str | list[int]:
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                raise InvalidParamsError("prompt", f"{len(value)} prompts were sent; send one per request.")
            value = value[0]
        if isinstance(value, str):
            if len(value) > MAX_TOKENS * CHARS_PER_TOKEN:
                raise InvalidParamsError(
                    "prompt", f"a text may have at most {MAX_TOKENS * CHARS_PER_TOKEN} characters."
                )
            return value
        if not isinstance(value, list):
            raise InvalidParamsError("prompt", "it must be a text or a list of token ids.")
        if len(value) > MAX_TOKENS:
            raise InvalidParamsError("prompt", f"{len(value)} tokens were sent; the limit is {MAX_TOKENS}.")
        if not all(type(one) is int and 0 <= one < _MOST_IDS for one in value):
            raise InvalidParamsError(
                "prompt", "it must be a text or a list of token ids, which are whole numbers."
            )
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("midfill", mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return (
            {name: one for name, one in value.items() if one is not None}
            if isinstance(value, dict)
            else value
        )


def read(body: bytes, *, any_temperature: bool = False) -> CompletionBody:
    """Parse and validate a body.

    Args:
        body: JSON.
        any_temperature: accept temperatures above 0, although the answer is that of 0.

    Raises `InvalidParamsError` that names the field and its limit.
    """
    try:
        params = CompletionBody.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    if params.temperature and not any_temperature:
        raise InvalidParamsError(
            "temperature",
            "this engine always takes the most likely token; send 0, or start it with --any-temperature, "
            "which accepts other values and answers as for 0.",
        )
    if params.suffix is not None and not isinstance(params.prompt, str):
        raise InvalidParamsError("suffix", "needs a prompt that is text, not token ids.")
    if params.stream_options is not None and not params.stream:
        raise InvalidParamsError("stream_options", "works only with stream: true.")
    return params


def refusal(error: ValidationError) -> InvalidParamsError:
    """Return the first validation error, without quoting the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    # For a union, the names of its members follow.
    named = [str(part) for part in first["loc"] if isinstance(part, int) or _is_plain(part)]
    name = ".".join(named)[:_MAX_NAME] or "A field"
    if first["type"] == "extra_forbidden":
        return InvalidParamsError(name, "this engine does not have this parameter; leave it out.")
    if first["type"] == "json_invalid":
        return InvalidParamsError("", "The body is not valid JSON.")
    return InvalidParamsError(name, f"{first['msg'].removesuffix('.')}.")


def _is_plain(name: str) -> bool:
    return name.isascii() and name.isidentifier()
