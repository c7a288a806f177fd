"""Who may set which setting, written down once more, and values that are not the defaults."""

from midfill.settings import Settings, merge

KEYS = sorted(Settings.model_fields)

# A new setting has to be put on one of these lists.
FILE = {
    *("engine", "engine_model", "engine_api", "engine_key", "engine_ca", "engine_fallback"),
    *("engine_unload_min", "engine_exit_min"),
}
PROJECT = {
    *("enabled", "context", "max_new_tokens", "max_new_tokens_invoked", "eagerness", "disabled_languages"),
}
EDITOR = {
    *("model", "family", "adapter", "adapter_holdout", "device", "dtype", "runner", "num_threads"),
    *("prefix_tokens", "suffix_tokens", "context_tokens", "popup_budget_ms", "layout", "healing", "prefetch"),
    *("deadline_s", "excluded_files", "detect_secrets", "count_feedback", "max_file_kb"),
}
RESTART = FILE | {
    *("model", "family", "adapter", "adapter_holdout", "device", "dtype", "runner", "num_threads"),
}


def changed(key):
    """A value of a setting that is not its default."""
    candidates = (
        *(True, False, 77, 7.5, ["open"], ["x"]),
        *("cpu", "psm", "low", "vllm", "int8", "torch", "http://thief:1", "command:touch x", "x"),
    )
    default = Settings()
    for value in candidates:
        settings, problems = merge({key: value}, default)
        if not problems and settings != default:
            return value
    raise AssertionError(f"no value for {key}")
