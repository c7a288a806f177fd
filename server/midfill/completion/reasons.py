"""Reasons for empty answers: a code for programs, and a sentence for the user."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Code of a reason for an empty answer. Each has a sentence in `REASONS`."""

    LOADING = "loading"
    MODEL_FAILED = "model-failed"
    DISABLED = "disabled"
    LANGUAGE_OFF = "language-off"
    FILE_EXCLUDED = "file-excluded"
    FILE_TOO_LARGE = "file-too-large"
    SECRET_IN_FILE = "secret-in-file"
    SECRET_SEARCH = "secret-search"
    EMPTY_FILE = "empty-file"
    MID_WORD = "mid-word"
    LINE_TAIL = "line-tail"
    NOT_OPEN = "not-open"
    MODEL_SILENT = "model-silent"
    SPECIAL_TOKEN = "special-token"
    TOKEN_LIMIT = "token-limit"
    REPEATS_TEXT = "repeats-text"
    REPEATS_ITSELF = "repeats-itself"
    UNSAFE_CHARACTERS = "unsafe-characters"
    BLANK_LINES = "blank-lines"
    CODE_FENCE = "code-fence"
    CLOSES_BLOCK = "closes-block"
    OUTSIDE_BLOCK = "outside-block"
    TOP_LEVEL = "top-level"
    UNREACHABLE = "unreachable"
    OTHER_CLOSERS = "other-closers"
    OTHER_LINE = "other-line"
    LOW_CONFIDENCE = "low-confidence"
    COMMENT_ONLY = "comment-only"
    ENGINE_ERROR = "engine-error"
    ENGINE_UNAVAILABLE = "engine-unavailable"
    DEADLINE = "deadline"


# Sentences for the user.
REASONS = {
    Reason.LOADING: "The model is still loading.",
    Reason.MODEL_FAILED: "The model could not be loaded; the log says why.",
    Reason.DISABLED: "Suggestions are switched off (`enabled`).",
    Reason.LANGUAGE_OFF: "Suggestions are switched off for this language (`disabled_languages`).",
    Reason.FILE_EXCLUDED: "The file's name matches a pattern in `excluded_files`.",
    Reason.FILE_TOO_LARGE: "The file is larger than `max_file_kb`.",
    Reason.SECRET_IN_FILE: "The file contains what looks like a password, a token or a private key "
    "(`detect_secrets`).",
    Reason.SECRET_SEARCH: "The file is still being searched for passwords, tokens and private keys "
    "(`detect_secrets`); try again in a moment.",
    Reason.EMPTY_FILE: "The file is empty, so there is no context for a suggestion.",
    Reason.MID_WORD: "A word continues directly after the cursor.",
    Reason.LINE_TAIL: "There is code after the cursor on this line; "
    "trigger a suggestion explicitly to get one here.",
    Reason.NOT_OPEN: "The document is not open.",
    Reason.MODEL_SILENT: "The model had nothing to add.",
    Reason.SPECIAL_TOKEN: "The model's text began with a special token, which is never inserted.",
    Reason.TOKEN_LIMIT: "The token limit (`max_new_tokens`) cut off the only line with text.",
    Reason.REPEATS_TEXT: "The model only repeated the text after the cursor or below it.",
    Reason.REPEATS_ITSELF: "The model repeated the same text over and over.",
    Reason.UNSAFE_CHARACTERS: "The model's text began with a control, bidirectional or invisible character "
    "that does not occur near the cursor.",
    Reason.BLANK_LINES: "The model's text began with blank lines, where a suggestion ends.",
    Reason.CODE_FENCE: "The model's text began with a Markdown code fence, where a suggestion of code ends.",
    Reason.CLOSES_BLOCK: "The model only closed a block that is already closed below.",
    Reason.OUTSIDE_BLOCK: "The model's text belongs outside the block that the cursor is in.",
    Reason.TOP_LEVEL: "The model's text belongs at the top level of a file, and the cursor is in a block.",
    Reason.UNREACHABLE: "The model wrote a jump (such as `return`) that would make the code after it "
    "unreachable.",
    Reason.OTHER_LINE: "The model's text does not connect to the rest of the line.",
    Reason.OTHER_CLOSERS: "The suggestion does not fit the closing brackets that the editor inserted "
    "after the cursor.",
    Reason.LOW_CONFIDENCE: "The model was not confident enough (`eagerness`); trigger a suggestion "
    "explicitly to see it.",
    Reason.COMMENT_ONLY: "The model wrote only a comment; trigger a suggestion explicitly to see it.",
    Reason.ENGINE_ERROR: "The model failed on this request; the log says why.",
    Reason.ENGINE_UNAVAILABLE: "The engine is unavailable: it is restarting after a failure, or has "
    "failed too often.",
    Reason.DEADLINE: "The model did not answer within `deadline_s`.",
}
