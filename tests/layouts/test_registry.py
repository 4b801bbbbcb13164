"""Layouts by the names of classes: a pipeline's, else its denoiser's; those of users first."""

import sys
from types import ModuleType

import pytest
from torch import nn

from i2am.layouts import TokenLayout, registry
from i2am.layouts.registry import known_layout, register_layout


class Denoiser(nn.Module):
    pass


class FineTuned(Denoiser):
    pass


class Pipeline:
    pass


class OwnPipeline(Pipeline):
    pass


def layout(name):
    return TokenLayout(name, lambda call, frame: None)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """What a test registers is forgotten after it."""
    for table in ("_PIPELINES", "_DENOISERS", "_REGISTERED"):
        monkeypatch.setattr(registry, table, {})


@pytest.fixture
def family(monkeypatch):
    """A module of the package with layouts of its own."""
    module = ModuleType("i2am.layouts.family_of_a_test")
    module.of_pipeline = lambda pipe, denoiser: layout("of pipeline")
    module.of_denoiser = lambda pipe, denoiser: layout("of denoiser")
    module.nothing = lambda pipe, denoiser: None
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def entries(table, **functions):
        named = {cls: f"family_of_a_test:{function}" for cls, function in functions.items()}
        monkeypatch.setattr(registry, table, named)

    return entries


def test_nothing_is_known_of_other_classes(family):
    family("_PIPELINES", Pipeline="of_pipeline")
    family("_DENOISERS", Denoiser="of_denoiser")
    assert known_layout(object(), nn.Linear(1, 1)) is None


def test_pipeline_goes_before_denoiser(family):
    family("_DENOISERS", Denoiser="of_denoiser")
    assert known_layout(Pipeline(), Denoiser()).name == "of denoiser"
    family("_PIPELINES", Pipeline="of_pipeline")
    assert known_layout(Pipeline(), Denoiser()).name == "of pipeline"


def test_classes_that_inherit(family):
    family("_PIPELINES", Pipeline="of_pipeline")
    family("_DENOISERS", Denoiser="of_denoiser")
    assert known_layout(OwnPipeline(), FineTuned()).name == "of pipeline"
    assert known_layout(object(), FineTuned()).name == "of denoiser"


def test_nearest_class_goes_first(family):
    family("_PIPELINES", Pipeline="of_pipeline", OwnPipeline="of_denoiser")
    assert known_layout(OwnPipeline(), Denoiser()).name == "of denoiser"
    assert known_layout(Pipeline(), Denoiser()).name == "of pipeline"


def test_family_that_does_not_know_leaves_it_to_the_next(family):
    family("_PIPELINES", OwnPipeline="nothing", Pipeline="of_pipeline")
    assert known_layout(OwnPipeline(), Denoiser()).name == "of pipeline"
    family("_PIPELINES", Pipeline="nothing")
    assert known_layout(Pipeline(), Denoiser()) is None
    family("_DENOISERS", Denoiser="of_denoiser")
    assert known_layout(Pipeline(), Denoiser()).name == "of denoiser"


def test_registered_layouts_go_first(family):
    family("_PIPELINES", Pipeline="of_pipeline")
    register_layout("Denoiser", lambda pipe, denoiser: layout("mine"))
    assert known_layout(Pipeline(), FineTuned()).name == "mine"
    register_layout("Pipeline", lambda pipe, denoiser: layout("of my pipeline"))
    assert known_layout(OwnPipeline(), FineTuned()).name == "of my pipeline"
    register_layout("Pipeline", lambda pipe, denoiser: None)
    assert known_layout(OwnPipeline(), FineTuned()).name == "mine"


def test_last_registered_layout_of_a_class_holds():
    register_layout("Pipeline", lambda pipe, denoiser: layout("first"))
    register_layout("Pipeline", lambda pipe, denoiser: layout("second"))
    assert known_layout(Pipeline(), Denoiser()).name == "second"


def test_what_a_layout_is_made_of():
    """Twice the denoiser where it comes alone."""
    given = []
    register_layout("Denoiser", lambda *parts: given.append(parts) or layout("mine"))
    pipe, denoiser = Pipeline(), Denoiser()
    known_layout(pipe, denoiser)
    known_layout(denoiser, denoiser)
    assert given == [(pipe, denoiser), (denoiser, denoiser)]


@pytest.mark.parametrize("table", ["_PIPELINES", "_DENOISERS"])
def test_every_entry_leads_to_a_function(monkeypatch, table):
    monkeypatch.undo()
    for entry in getattr(registry, table).values():
        module, _, function = entry.partition(":")
        assert callable(getattr(registry.import_module(f"i2am.layouts.{module}"), function))
