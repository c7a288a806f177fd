"""Why an answer is empty: a code for programs, and a sentence for the user."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why an answer is empty. Each has a sentence in `REASONS`."""

    LOADING = "loading"
    MODEL_FAILED = "model-failed"
    DISABLED = "disabled"
    LANGUAGE_OFF = "language-off"
    FILE_EXCLUDED = "file-excluded"
    FILE_TOO_LARGE = "file-too-large"
    SECRET_IN_FILE = "secret-in-file"  # noqa: S105 - the reason's code
    SECRET_SEARCH = "secret-search"  # noqa: S105 - the reason's code
    EMPTY_FILE = "empty-file"
    MID_WORD = "mid-word"
    LINE_TAIL = "line-tail"
    NOT_OPEN = "not-open"
    MODEL_SILENT = "model-silent"
    SPECIAL_TOKEN = "special-token"  # noqa: S105 - the reason's code
    TOKEN_LIMIT = "token-limit"  # noqa: S105 - the reason's code
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


# A sentence for each reason, for the user.
REASONS = {
    Reason.LOADING: "The model is still being loaded.",
    Reason.MODEL_FAILED: "The model could not be loaded; the log and the first message say why.",
    Reason.DISABLED: "Suggestions are switched off (`enabled`).",
    Reason.LANGUAGE_OFF: "Suggestions are switched off for this language (`disabled_languages`).",
    Reason.FILE_EXCLUDED: "The file's name is on the list of excluded files (`excluded_files`).",
    Reason.FILE_TOO_LARGE: "The file is larger than `max_file_kb`.",
    Reason.SECRET_IN_FILE: "The file holds what looks like a password, a token or a private key "
    "(`detect_secrets`).",
    Reason.SECRET_SEARCH: "The file is still being searched for passwords, tokens and private keys "
    "(`detect_secrets`); ask again in a moment.",
    Reason.EMPTY_FILE: "The file is empty, so there is nothing to go by.",
    Reason.MID_WORD: "The cursor is inside a word that goes on behind it.",
    Reason.LINE_TAIL: "Code stands behind the cursor on its line; ask explicitly to get a suggestion there.",
    Reason.NOT_OPEN: "The document is not open.",
    Reason.MODEL_SILENT: "The model had nothing to add.",
    Reason.SPECIAL_TOKEN: "The model began with one of its special tokens, which is never inserted.",
    Reason.TOKEN_LIMIT: "The token limit (`max_new_tokens`) cut the only line with text in it.",
    Reason.REPEATS_TEXT: "The model only repeated what stands behind the cursor or below it.",
    Reason.REPEATS_ITSELF: "The model wrote the same again and again without end.",
    Reason.UNSAFE_CHARACTERS: "The model began with a control, bidirectional or invisible character, "
    "which the file does not have near the cursor.",
    Reason.BLANK_LINES: "The model began with line breaks, where a suggestion ends.",
    Reason.CODE_FENCE: "The model began with a fence of Markdown, where a suggestion of code ends.",
    Reason.CLOSES_BLOCK: "The model only closed a block that is closed below already.",
    Reason.OUTSIDE_BLOCK: "The model went on outside of the block that the cursor is in.",
    Reason.TOP_LEVEL: "The model began what belongs at the top of a file, and the cursor is in a block.",
    Reason.UNREACHABLE: "The model wrote a jump that would keep what follows from ever being reached.",
    Reason.OTHER_LINE: "What the model wrote does not lead to the rest of the line.",
    Reason.OTHER_CLOSERS: "The suggestion does not fit what the editor put behind the cursor.",
    Reason.LOW_CONFIDENCE: "The model was not sure enough (`eagerness`); ask explicitly to see it anyway.",
    Reason.COMMENT_ONLY: "The model wrote nothing but a comment; ask explicitly to see it.",
    Reason.ENGINE_ERROR: "The model failed on this request; the log says how.",
    Reason.ENGINE_UNAVAILABLE: "The model is being restarted after a fault, or has been given up.",
    Reason.DEADLINE: "The model took longer than `deadline_s`.",
}
