"""Plugins come from anyone: one that fails is named, the others still work."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from inference_pio.engine import ModelNotFound, list_models, registry
from inference_pio.engine.hub import locate
from inference_pio.models.smollm2_135m.plugin import PLUGIN

GOOD = EntryPoint("smollm2-135m", "inference_pio.models.smollm2_135m.plugin:PLUGIN", registry.GROUP)


@pytest.fixture
def install(monkeypatch):
    """Replaces the installed entry points."""
    def use(*entries):
        monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
        registry._discover.cache_clear()

    yield use
    registry._discover.cache_clear()


def test_installed_plugins():
    assert {"smollm2-135m", "qwen3-0.6b", "qwen3-4b-instruct-2507", "qwen3-coder-next"} <= set(registry.plugins())
    assert not registry.broken()
    assert registry.plugin_for("llama", "x") is PLUGIN and registry.plugin_for("LlamaForCausalLM", "x") is PLUGIN


def test_by_architecture_the_one_that_was_asked_for_comes_first():
    small, large = (registry.plugins()[name] for name in ("qwen3-0.6b", "qwen3-4b-instruct-2507"))
    assert registry.plugin_for("qwen3", "x", large.name) is large and registry.plugin_for("qwen3", "x", small.name) is small
    with pytest.raises(ModelNotFound, match="x: no plugin runs the architecture 'mamba'; known are .*llama"):
        registry.plugin_for("mamba", "x")


@pytest.mark.parametrize("value,says", [
    ("no.such.module:PLUGIN", "No module named"), ("inference_pio.models.smollm2_135m.plugin:GONE", "GONE"), ("json:dumps", "not a ModelPlugin"),
])
def test_a_broken_plugin_is_named_and_the_others_work(install, caplog, value, says):
    install(GOOD, EntryPoint("zzz", value, registry.GROUP))
    assert list(registry.plugins()) == ["smollm2-135m"] and says in registry.broken()["zzz"]
    assert "zzz" in caplog.text
    with pytest.raises(ModelNotFound, match="model plugin zzz .* does not load: .*" + says):
        locate("zzz")
    assert [model.name for model in list_models()] == ["smollm2-135m"]


def test_two_plugins_of_one_name(install, tmp_path, monkeypatch):
    (tmp_path / "impostor.py").write_text("import dataclasses\nfrom inference_pio.models.smollm2_135m.plugin import PLUGIN\n"
                                          "OTHER = dataclasses.replace(PLUGIN, description='another')\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(GOOD, EntryPoint("zzz", "impostor:OTHER", registry.GROUP), EntryPoint("again", GOOD.value, registry.GROUP))
    assert registry.plugins() == {"smollm2-135m": PLUGIN} and list(registry.broken()) == ["zzz"], "the same one twice does no harm"
    assert "another plugin is called 'smollm2-135m'" in registry.broken()["zzz"]


def test_without_any_plugin(install):
    install()
    with pytest.raises(ModelNotFound, match="known are none"):
        registry.plugin_for("llama", "x")
    with pytest.raises(ModelNotFound, match="no model 'smollm2-135m'"):
        locate("smollm2-135m")
