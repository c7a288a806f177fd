import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_settings import EDITOR, FILE, KEYS, PROJECT, RESTART, changed
from pydantic.alias_generators import to_camel

from midfill.errors import SettingsError
from midfill.settings import (
    Policy,
    Scope,
    Settings,
    keep_start_only,
    load,
    merge,
    parse,
    policy,
    store,
    vscode_settings,
)


def test_no_file_means_defaults(tmp_path):
    assert load(tmp_path / "none.toml") == Settings()


def test_a_bad_value_names_the_file_and_the_key(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('max_new_tokens = "many"\n')
    with pytest.raises(SettingsError, match=r"config\.toml.*max_new_tokens"):
        load(path)


def test_broken_toml_names_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("model = [")
    with pytest.raises(SettingsError, match=r"Cannot read .*config\.toml"):
        load(path)


@pytest.mark.parametrize("key", ["max_new_tokens", "maxNewTokens"])
def test_editors_may_write_camel_case(key):
    assert parse({key: 7}).max_new_tokens == 7


def test_good_keys_count_beside_bad_ones():
    settings, problems = merge({"maxNewTokens": 9, "deadline_s": "soon", "nonsense": 1}, Settings())
    assert settings.max_new_tokens == 9
    assert settings.deadline_s == Settings().deadline_s
    assert len(problems) == 2
    assert "deadline_s" in problems[0]
    assert "nonsense" in problems[1]


@pytest.mark.parametrize("junk", [3, "x", [1], True])
def test_junk_keeps_the_old_settings(junk):
    old = Settings(max_new_tokens=5)
    settings, problems = merge(junk, old)
    assert settings is old
    assert problems


def test_nothing_is_no_problem():
    assert merge(None, Settings()) == (Settings(), [])


def test_lists_are_taken_for_tuples():
    assert parse({"disabled_languages": ["markdown"]}).disabled_languages == ("markdown",)


def test_storing_keeps_the_other_settings(tmp_path):
    path = tmp_path / "deep" / "config.toml"
    store("max_new_tokens", 12, path)
    store("model", "tiny-starcoder-py", path)
    assert load(path) == Settings(max_new_tokens=12, model="tiny-starcoder-py")


def test_storing_a_bad_value_changes_nothing(tmp_path):
    path = tmp_path / "config.toml"
    store("max_new_tokens", 12, path)
    with pytest.raises(SettingsError, match="max_new_tokens"):
        store("max_new_tokens", -1, path)
    assert load(path).max_new_tokens == 12


# Files as users write them, and what is in them once `model` was set.
FILES = {
    "comments": ('# my notes\n\neagerness = "low"   # calm\n# end\n', "{}model = {}\n"),
    "order": ('prefetch = false\nmodel = "old"  # why\nenabled = true\n', None),
    "no line end": ('eagerness = "low"', "{}\nmodel = {}\n"),
    "CRLF": ('# notes\r\neagerness = "low"\r\n', "{}model = {}\r\n"),
    "byte order mark": ('\ufeffeagerness = "low"\n', "{}model = {}\n"),
    "mark and CRLF": ('\ufeff# a\r\n\r\neagerness = "low"\r\n', "{}model = {}\r\n"),
    "only comments": ("# nothing yet\n", "{}model = {}\n"),
    "only a mark": ("\ufeff", "{}model = {}\n"),
    "empty": ("", "{}model = {}\n"),
    "list over lines": ('disabled_languages = [\n  "c", # no\n  "d",\n]\n', "{}model = {}\n"),
    "camel case": ("maxNewTokens = 9 # few\n", "{}model = {}\n"),
    "literal strings": ('model = \'C:\\models\\x\'\neagerness = """low"""\n', None),
}


@pytest.mark.parametrize("case", FILES)
def test_storing_keeps_all_else_of_the_users_file(tmp_path, case):
    before, after = FILES[case]
    path = tmp_path / "config.toml"
    path.write_bytes(before.encode())
    old = load(path)
    assert store("model", "new-model", path) == path
    found = path.read_bytes().decode()
    if after is not None:
        assert found == after.format(before, '"new-model"')
    else:
        assert re.sub(r"model = \S+", "", found) == re.sub(r"model = \S+", "", before)
    assert load(path) == old.model_copy(update={"model": "new-model"})


def test_storing_finds_the_key_as_the_user_has_spelled_it(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("maxNewTokens = 9 # few\n")
    store("max_new_tokens", 12, path)
    assert path.read_text() == "maxNewTokens = 12 # few\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX links")
def test_storing_writes_through_a_link_into_a_folder_of_dotfiles(tmp_path):
    real, link = tmp_path / "dotfiles.toml", tmp_path / "config.toml"
    real.write_text("# mine\n")
    real.chmod(0o600)
    link.symlink_to(real)
    store("model", "m", link)
    assert link.is_symlink()
    assert real.read_text() == '# mine\nmodel = "m"\n'
    assert real.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_a_file_in_another_encoding_is_said_and_left_alone(tmp_path, encoding):
    path = tmp_path / "config.toml"
    path.write_bytes('# für mich\neagerness = "low"\n'.encode(encoding))
    before = path.read_bytes()
    for attempt in (lambda: load(path), lambda: store("model", "m", path)):
        with pytest.raises(SettingsError, match=r"config\.toml.*UTF-.*Save it as UTF-8"):
            attempt()
    assert path.read_bytes() == before


def test_a_null_takes_back_what_an_editor_has_set():
    own = Settings(max_new_tokens=5)
    settings, problems = merge({"maxNewTokens": None, "model": "m"}, Settings(max_new_tokens=9), own)
    assert settings == Settings(max_new_tokens=5, model="m")
    assert problems == []


def test_the_settings_of_vs_code_are_the_schema():
    client = Path(__file__).parents[2] / "clients" / "vscode"
    manifest = json.loads((client / "package.json").read_text(encoding="utf-8"))
    generated = runpy.run_path(str(client / "scripts" / "settings.py"))["generated"]
    assert manifest == generated(manifest), "run: python clients/vscode/scripts/settings.py"


def test_every_setting_says_who_may_set_it_and_when_a_change_counts():
    assert set(KEYS) == FILE | EDITOR | PROJECT
    for name, field in Settings.model_fields.items():
        own = [one for one in field.metadata if isinstance(one, Policy)]
        scope = Scope.FILE if name in FILE else Scope.PROJECT if name in PROJECT else Scope.EDITOR
        assert own == [Policy(scope, restart=name in RESTART)], name


def test_a_setting_that_does_not_say_who_may_set_it_is_the_files_alone(monkeypatch):
    monkeypatch.setattr(Settings.model_fields["eagerness"], "metadata", [])
    assert policy("eagerness") == Policy(Scope.FILE, restart=True)
    assert merge({"eagerness": "low"}, Settings(), Settings())[0] == Settings()
    assert "midfill.eagerness" not in vscode_settings()


@pytest.mark.parametrize("spell", [str, to_camel], ids=["snake", "camel"])
@pytest.mark.parametrize("key", KEYS)
def test_an_editor_sets_what_is_not_the_files_alone(key, spell):
    value = changed(key)
    mine = Settings()
    settings, problems = merge({spell(key): value}, mine, mine)
    if key in FILE:
        assert settings == mine
        assert len(problems) == 1
        assert f"{spell(key)!r} is taken from" in problems[0]
    else:
        assert problems == []
        assert settings == parse({key: value}) != mine


@pytest.mark.parametrize("key", sorted(FILE))
def test_an_editor_does_not_take_back_what_the_file_says(key):
    mine = parse({key: changed(key)})
    assert merge({key: None}, mine, Settings())[0] == mine


@pytest.mark.parametrize("key", KEYS)
def test_a_running_server_keeps_what_counts_only_at_the_start(key):
    new = parse({key: changed(key)})
    kept, problems = keep_start_only(new, Settings())
    assert (kept == Settings()) == (key in RESTART)
    assert bool(problems) == (key in RESTART)


@pytest.mark.parametrize("key", KEYS)
def test_vs_code_takes_from_a_project_only_what_a_project_may_choose(key):
    declared = vscode_settings().get(f"midfill.{to_camel(key)}")
    if key in FILE:
        assert declared is None
        return
    assert declared["scope"] == ("window" if key in PROJECT else "machine")
    assert declared["tags"] == (["restart"] if key in RESTART else [])


def test_a_folder_that_is_not_trusted_sets_nothing_in_vs_code():
    client = Path(__file__).parents[2] / "clients" / "vscode"
    manifest = json.loads((client / "package.json").read_text(encoding="utf-8"))
    restricted = manifest["capabilities"]["untrustedWorkspaces"]["restrictedConfigurations"]
    assert {f"midfill.{to_camel(key)}" for key in EDITOR | PROJECT} <= set(restricted)


def test_the_policy_hangs_on_no_sentence(monkeypatch):
    """Descriptions are for users, and whoever improves one changes nothing else."""
    mine = Settings()
    for field in Settings.model_fields.values():
        monkeypatch.setattr(field, "description", "Something else.")
    for key in KEYS:
        settings = merge({key: changed(key)}, mine, mine)[0]
        assert (settings == mine) == (key in FILE)


def test_several_servers_may_have_the_model():
    assert parse({"engine": ["http://a", "http://b"]}).engine_urls == ("http://a", "http://b")


@pytest.mark.parametrize(
    "wrong",
    [
        *("box:8000", "ftp://box", "http://", "http://me:pw@box", "http://b?x=1", []),
        *(
            "http://b/\x1b[2J",
            "http://b\n/",
            "http://b/\u202ea",
            "http://a b/",
            "http://b:x",
            "http://b:99999",
            "http://[",
        ),
    ],
)
def test_an_engine_is_a_place(wrong):
    with pytest.raises(SettingsError, match="engine"):
        parse({"engine": wrong})


any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.fuzz
@given(values=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=9)), any_json, max_size=5))
def test_whatever_an_editor_sends_the_settings_are_valid_and_the_files_own_are_kept(values):
    own = Settings(engine="shared", engine_model="m", engine_key="env:KEY", engine_fallback=True)
    settings, problems = merge(values, own, own)
    assert Settings.model_validate(settings.model_dump()) == settings
    assert all(getattr(settings, key) == getattr(own, key) for key in FILE)
    assert all(isinstance(problem, str) and problem for problem in problems)


@pytest.mark.parametrize("values", [None, {}, []])
def test_no_settings_of_any_kind_are_no_junk(values):
    assert merge(values, Settings()) == (Settings(), [])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"maxNewTokens": "many"}, "Setting 'maxNewTokens' cannot be \"many\": it must be a valid integer."),
        (
            {"device": "gpu"},
            "Setting 'device' cannot be \"gpu\": use `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`.",
        ),
        ({"modle": "x"}, "Unknown setting 'modle'. Did you mean 'model'?"),
        ({"xyz": 1}, "Unknown setting 'xyz'. Remove it, or check its spelling."),
        ([1], "Settings must be an object of names and values, not [1]."),
        ({"engine": []}, "Setting 'engine' cannot be []: the list of URLs is empty."),
    ],
)
def test_an_error_names_the_value_and_the_remedy(values, sentence):
    assert merge(values, Settings())[1] == [sentence]


@pytest.mark.parametrize("values", [{"engine_key": "sk-123"}, {"engine": "http://me:sk-123@box"}])
def test_an_error_does_not_quote_a_key(values):
    [problem] = merge(values, Settings())[1]
    assert "sk-123" not in problem
