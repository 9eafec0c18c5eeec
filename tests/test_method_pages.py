"""The generated pages against the tables that they are made from."""

from __future__ import annotations

import re

import method_bytes
from make_docs import GENERATED, README, families, make_readme

from fedlora.methods.table import METHODS
from fedlora.stages.methods import combinations_of

STALE = "run `make docs`"


def test_the_pages_are_those_that_the_tables_make():
    for page, make in GENERATED.items():
        assert page.read_text(encoding="utf-8") == make(), f"{page.name}: {STALE}"
    readme = README.read_text(encoding="utf-8")
    assert readme == make_readme(readme), STALE


def test_every_method_is_in_a_family_that_the_pages_describe():
    assert sorted(row.name for methods in families().values() for row in methods) == sorted(METHODS)
    assert all(families().values())


def test_the_combinations_are_those_that_a_configuration_refuses():
    homo, krum = combinations_of(METHODS["homo"]), combinations_of(METHODS["krum"])
    assert homo["privacy by client"]
    assert not krum["privacy by client"]
    assert not homo["client_ranks"]
    assert homo["reaggregate"]


def test_the_bytes_of_every_method_are_measured():
    page = method_bytes.PAGE.read_text(encoding="utf-8")
    table = page.split(method_bytes.BEGIN)[1].split(method_bytes.END)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(METHODS), "run `make method-bytes`"
