import json
import runpy
from pathlib import Path

import pytest
from pydantic.alias_generators import to_camel

from midfill.errors import SettingsError
from midfill.settings import PROJECT_SETTINGS, Settings, load, merge, parse, store, vscode_settings


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


def test_vs_code_takes_from_a_project_only_what_a_project_may_choose():
    declared = vscode_settings()
    known = {name for name in Settings.model_fields if not name.startswith("engine")}
    assert {to_camel(name) for name in known} == {key.split(".")[1] for key in declared}
    scopes = {key.split(".")[1]: value["scope"] for key, value in declared.items()}
    theirs = {name for name, scope in scopes.items() if scope == "window"}
    assert theirs == {to_camel(name) for name in PROJECT_SETTINGS}
    mine = ("model", "adapter", "family", "device", "excludedFiles", "detectSecrets")
    assert all(scopes[name] == "machine" for name in mine)


def test_an_editor_does_not_say_where_code_is_sent():
    mine = Settings(engine="http://box:8000")
    sent = {"engine": "http://thief", "engineKey": "command:x", "engineApi": None, "eagerness": "low"}
    settings, problems = merge(sent, mine, mine)
    assert (settings.engine, settings.engine_key, settings.eagerness) == (mine.engine, mine.engine_key, "low")
    assert len(problems) == 2 + 1
    assert parse({"engine": ["http://a", "http://b"]}).engine_urls == ("http://a", "http://b")


@pytest.mark.parametrize(
    "wrong", ["box:8000", "ftp://box", "http://", "http://me:pw@box", "http://b?x=1", []]
)
def test_an_engine_is_a_place(wrong):
    with pytest.raises(SettingsError, match="engine"):
        parse({"engine": wrong})


@pytest.mark.parametrize("values", [None, {}, []])
def test_no_settings_of_any_kind_are_no_junk(values):
    assert merge(values, Settings()) == (Settings(), [])
