"""The gate: reasons for not asking the model at all, from the document and the settings alone."""

from __future__ import annotations

import re

from midfill.completion.answer import Trigger
from midfill.completion.reasons import Reason
from midfill.settings import Settings
from midfill.text.documents import Document, Snapshot
from midfill.text.languages import is_among
from midfill.text.secret_filter import is_excluded
from midfill.text.secret_watch import SecretWatch, Verdict

_CONTINUES_WORD = re.compile(r"\w")
# Auto-closed brackets and quotes, then one separator, may follow the cursor.
_HARMLESS_TAIL = re.compile(r"""\s*[)>}\]"'`]*\s*[:{;,]?\s*\Z""")


def reason_against(
    snapshot: Snapshot, trigger: Trigger, settings: Settings, secrets: SecretWatch
) -> Reason | None:
    """Return the reason for not asking the model, or None."""
    if (reason := reason_against_file(snapshot.document, settings, secrets)) is not None:
        return reason
    if trigger is Trigger.INVOKED:
        return None
    if _CONTINUES_WORD.match(snapshot.line_after):
        return Reason.MID_WORD
    if not _HARMLESS_TAIL.match(snapshot.line_after):
        return Reason.LINE_TAIL
    return None


def reason_against_file(document: Document, settings: Settings, secrets: SecretWatch) -> Reason | None:
    """Return the reason for suggesting nothing anywhere in a document, or None."""
    if not settings.enabled:
        return Reason.DISABLED
    if is_among(settings.disabled_languages, document.language_id, document.sent_language):
        return Reason.LANGUAGE_OFF
    if is_excluded(document.uri, settings.excluded_files):
        return Reason.FILE_EXCLUDED
    if document.num_chars > settings.max_file_kb * 1024:
        return Reason.FILE_TOO_LARGE
    if all(not line or line.isspace() for line in document.lines):
        return Reason.EMPTY_FILE
    if settings.detect_secrets and (found := secrets.verdict(document)) is not Verdict.CLEAN:
        return Reason.SECRET_IN_FILE if found is Verdict.SECRET else Reason.SECRET_SEARCH
    return None
