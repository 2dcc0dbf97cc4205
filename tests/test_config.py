from __future__ import annotations

import math
from typing import Any

import pytest

from fwdcompile import Normal, Rademacher, Sphere
from fwdcompile.config import NAMES, Config
from fwdcompile.methods import METHODS


def config(**changes: Any) -> Config:
    return Config(**({"methods": ("fgd", "backprop"), "compile": False} | changes))


def test_every_name_has_a_method() -> None:
    assert tuple(METHODS) == NAMES


def test_a_method_has_the_settings_behind_its_name() -> None:
    method = "fgd:lr=1e-3:samples=16:rank_one=true:directions=rademacher:perturb=weights:clip=2"
    whole = config(methods=(method, "backprop:optimizer=adam", "fgd"), lr=0.5, iterations=7)
    name, own = whole.of(method)
    assert name == "fgd" and own.iterations == 7 and not own.compile
    assert (own.lr, own.samples, own.rank_one, own.clip) == (1e-3, 16, True, 2.0)
    assert own.source == Rademacher(rank_one=True)
    assert whole.of("backprop:optimizer=adam")[1].optimizer == "adam"
    assert whole.of("fgd") == ("fgd", whole)
    assert whole.of("fgd:perturb=activations:samples=1/16")[1].samples == (1, 16)


def test_sources() -> None:
    sources = [config(directions=d).source for d in ("normal", "sphere", "orthogonal")]
    assert sources == [Normal(), Sphere(), Sphere(orthogonal=True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"iterations": (1, 2)}, "iterations must be a whole number"),
        ({"samples": 2.5}, "samples must be a whole number, not 2.5"),
        ({"samples": ()}, "samples must be a whole number"),
        ({"methods": ("torch-jvp",), "perturb": "activations"}, "torch-jvp perturbs weights alone"),
        ({"runs": 0}, "runs must be"),
        ({"samples": 0}, "samples must be"),
        ({"every": 0}, "every must be"),
        ({"methods": ()}, "name each method once, not none"),
        ({"methods": ("fgd", "fgd")}, "name each method once"),
        ({"methods": ("adam",)}, "no method is called 'adam'; there are fgd, backprop"),
        ({"directions": "uniform"}, "no kind of directions is called 'uniform'"),
        ({"mode": "fast"}, "no mode of torch.compile is called 'fast'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"decay": -1.0}, "decay not negative"),
        ({"decay": math.nan}, "decay not negative"),
        ({"optimizer": "lion"}, "no optimizer is called 'lion'; there are sgd, momentum, adam"),
        ({"perturb": "inputs"}, "no thing to perturb is called 'inputs'"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"directions": "sphere", "rank_one": True}, "cannot be rank_one"),
        ({"directions": "sphere", "perturb": "activations"}, "perturbed by normal or rademacher"),
        ({"methods": ("fgd:samples=0",)}, "samples must be at least 1"),
        ({"methods": ("fgd:samples=many",)}, "'samples=many' needs a value of type int"),
        ({"methods": ("fgd:rank_one=1",)}, "'rank_one=1' needs a value of type bool"),
        ({"methods": ("fgd:perturb=activations:samples=1/0",)}, "samples must be at least 1"),
        ({"samples": (1, 2)}, "is for the layers of perturb=activations"),
        ({"methods": ("fgd:samples=1/",)}, "'samples=1/' needs a value of type int"),
        ({"methods": ("fgd:iterations=3",)}, "no setting of fgd is called 'iterations'"),
        ({"methods": ("backprop:samples=3",)}, "no setting of backprop is called 'samples'"),
        ({"methods": ("torch-jvp:directions=sphere",)}, "torch-jvp is plain gradient descent"),
        ({"methods": ("torch-jvp",), "optimizer": "adam"}, "torch-jvp is plain gradient descent"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_which_methods_compile() -> None:
    plain = {name for name in NAMES if not Config().compiles(name)}
    assert plain == {"backprop", "torch-jvp"}
    assert not config().compiles("fgd") and not config().compiles("fgd:samples=2")
    assert Config().compiles("fgd:samples=2") and Config().compiles("backprop-compiled:lr=1")
