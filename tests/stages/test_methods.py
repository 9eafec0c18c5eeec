"""The command that lists the methods, and describes one."""

from __future__ import annotations

import json

import pytest

from fedlora.config.methods import MethodsConfig
from fedlora.errors import UsageError
from fedlora.methods.table import METHODS
from fedlora.stages import methods


def test_the_list_has_a_line_for_every_method():
    listed = methods.run(MethodsConfig.of())
    lines = listed.text().splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in METHODS)
    assert json.loads(json.dumps(listed.as_dict()))["methods"].keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described_with_its_flags_and_what_it_refuses(name):
    described = methods.run(MethodsConfig.of(method=name))
    text, row = described.text(), METHODS[name]
    assert text.startswith(f"{name}: {row.summary}")
    assert all(f"--{option.name}: " in text for option in row.options)
    facts = json.loads(json.dumps(described.as_dict()))
    assert facts["combines_with"] == methods.combinations_of(row)
    assert facts["options"].keys() == {option.name for option in row.options}


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="fedpro"):
        methods.run(MethodsConfig.of(method="fedpro"))
