"""Explanations of answers: source or reason, prompt segments, stages and filters, as JSON and as text.

The text of the prompt and of the suggestion is shown only to a user who asks for it, and never logged.
"""

from __future__ import annotations

from typing import Any

from midfill.completion.answer import Answer
from midfill.completion.reasons import REASONS
from midfill.engine.api import Tokenizer
from midfill.text.characters import escaped


def explain(answer: Answer, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Return an answer as JSON.

    Args:
        answer: an answer of the completer.
        tokenizer: the model's, to include the texts; None leaves them out.
    """
    prompt = answer.prompt
    result: dict[str, Any] = {
        "source": answer.source,
        "reason": answer.reason,
        "message": answer.detail or (REASONS[answer.reason] if answer.reason else None),
        "latencyMs": round(answer.latency_ms, 2),
        "promptTokens": answer.num_prompt,
        "reusedTokens": answer.num_reused,
        "generatedTokens": answer.num_generated,
        "segments": [{"source": name, "tokens": size} for name, size in answer.segments],
        "layout": prompt.layout if prompt else None,
        "stages": [{"stage": name, "ms": round(ms, 2)} for name, ms in answer.stages],
        "filters": [
            {"filter": name, "characters": len(text) - len(before)}
            for (_, before), (name, text) in zip(answer.texts, answer.texts[1:], strict=False)
        ],
    }
    if prompt is not None:
        result["heldCharacters"] = len(prompt.forced_prefix)
    if tokenizer is not None and prompt is not None:
        at = 0
        for segment in result["segments"]:
            segment["text"] = tokenizer.decode(prompt.tokens[at : at + segment["tokens"]])
            at += segment["tokens"]
        result["held"] = prompt.forced_prefix
        result["texts"] = [{"after": name, "text": text} for name, text in answer.texts]
    return result


def describe(explained: dict[str, Any]) -> str:
    """Return an explanation as lines of text for the user."""
    what = explained["message"] or f"The suggestion came from: {explained['source']}."
    lines = [what, f"{explained['latencyMs']:.0f} ms in all"]
    lines += [f"  {stage['stage']:16}{stage['ms']:8.1f} ms" for stage in explained["stages"]]
    if explained["layout"]:
        lines.append(
            "prompt: {promptTokens} tokens, {reusedTokens} of them computed before, layout {layout}; "
            "{generatedTokens} tokens written".format(**explained)
        )
    for segment in explained["segments"]:
        lines.append(f"  {segment['source']:16}{segment['tokens']:8} tokens")
        lines += [f"    | {line}" for line in segment.get("text", "").split("\n") if "text" in segment]
    if explained.get("heldCharacters"):
        held = f": {explained['held']!r}" if "held" in explained else ""
        lines.append(f"  {explained['heldCharacters']} characters before the cursor were demanded back{held}")
    lines += [f"filter: {one['filter']} ({one['characters']:+} characters)" for one in explained["filters"]]
    for one in explained.get("texts", ()):
        lines.append(f"text after {one['after']}:")
        lines += [f"    | {line}" for line in one["text"].split("\n")]
    return escaped("\n".join(lines))
