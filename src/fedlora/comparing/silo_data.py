"""The data set of a comparison on a folder of silos: each client's rows divided in three, for every method alike.

Test rows come first: those of `<client>.test.<format>`, a share of the client's rows, or one file for all. Validation
rows are drawn from what is left, so that the two are disjoint; no prompt stands in two parts of one client. The seed
draws both. Losses are grouped by client, so a client's loss is that on its test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora.comparing.experiment import DIGEST, DataSet, SiloFacts, rows_to_answer
from fedlora.config.compare import CompareConfig
from fedlora.config.reading import READING_FIELDS, ReadingConfig
from fedlora.data.client_facts import FieldsReport
from fedlora.data.client_files import check_no_client, check_test_share, find_silos
from fedlora.data.client_names import name_of_file
from fedlora.data.held_out import draw_rows, draw_test_rows, no_test_rows, own_test_files, prompt_key
from fedlora.data.records import iter_rows, read_rows
from fedlora.data.row_parts import refuse_folder
from fedlora.errors import DataError
from fedlora.files import json_lines, sha256_of_json, write_text
from fedlora.paths import ComparisonPaths, DataPaths
from fedlora.plain_text import counted
from fedlora.rows import ReadRules, Row

VALIDATION_SHARE = 5
"""At most one in so many of a client's rows is for validation."""
ALL = "all test rows"
"""The group of test rows that belong to no client and have no categories that the clients' rows have."""


@dataclass(frozen=True)
class _Silo:
    """One client's rows, by what they are for."""

    name: str
    training: Sequence[Row]
    validation: Sequence[Row] = ()
    test: Sequence[Row] = ()

    @property
    def labelled(self) -> list[Row]:
        return _labelled(self.training)


def make_silo_data(config: CompareConfig, seed: int, paths: ComparisonPaths) -> DataSet:
    """Divide the rows under a seed and write the parts. UsageError where nothing is held out, DataError where a
    client's rows are too few."""
    silos = [_hold_out(silo, config, seed) for silo in _read_silos(config, seed)]
    if config.test_file_path is not None:
        rows = _labelled(read_rows(config.test_file_path, rules=_rules(config)))
        tests, shares, grouped_by = _group_shared(rows, silos)
    else:
        tests = [replace(row, category=silo.name) for silo in silos for row in silo.test]
        shares = {str(number): {silo.name: 1.0} for number, silo in enumerate(silos) if silo.test and silo.labelled}
        grouped_by = "client"
    if not shares:
        raise no_test_rows(config.silos or paths.root)
    validation = [replace(row, category=silo.name) for silo in silos for row in silo.validation]
    texts = {silo.name: json_lines(row.as_dict() for row in silo.training) for silo in silos}
    parts = {
        "validation": json_lines(row.as_dict() for row in validation),
        "test": json_lines(row.as_dict() for row in tests),
        "answered": json_lines(row.as_dict() for row in rows_to_answer(tests, config)),
    }
    digest = sha256_of_json([list(texts.items()), parts["validation"], parts["test"]])[:DIGEST]
    place = DataPaths(paths.data_dir, f"{digest}-s{seed}")
    for name, text in texts.items():
        write_text(place.silo_file(name), text)
    for part, text in parts.items():
        write_text(place.part_file(part), text)
    return DataSet(
        folder=place.silo_file(silos[0].name).parent,
        validation=place.part_file("validation"),
        test=place.part_file("test"),
        answered=place.part_file("answered"),
        num_clients=len(silos),
        digest=digest,
        shares=shares,
        validation_shares={
            str(number): {silo.name: 1.0} for number, silo in enumerate(silos) if silo.validation and silo.labelled
        },
        is_mixed=len({row.kind for part in (tests, *(silo.training for silo in silos)) for row in part}) > 1,
        silos=SiloFacts(
            names={str(number): silo.name for number, silo in enumerate(silos)},
            grouped_by=grouped_by,
            rows={silo.name: [len(silo.training), len(silo.validation), len(silo.test)] for silo in silos},
            num_test=len(tests),
            num_leaks=_count_leaks(tests, silos),
        ),
    )


def _labelled(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.output.strip()]


def _rules(config: CompareConfig) -> ReadRules:
    """How strictly rows are read, as the fields of train say."""
    return ReadingConfig.of(**{name: config.train[name] for name in READING_FIELDS & config.train.keys()}).read_rules


def _read_silos(config: CompareConfig, seed: int) -> list[_Silo]:
    rules = _rules(config)
    files, _ = find_silos(config.silos) if config.silos else ([], [])
    own = own_test_files(files) if config.test_file_path is None else {}
    check_test_share(config.test_share, files)
    if config.test_file_path is not None:
        refuse_folder(config.test_file_path, "test_file_path")
        check_no_client(config.test_file_path, files, "test_file_path")
    silos, found = [], FieldsReport()
    for file in files:
        name = name_of_file(file.name)
        test = _labelled(read_rows(own[name], rules=rules)) if name in own else []
        rows = iter_rows(file, rules=rules, may_be_empty=True, on_fields=found.note(file))
        silos.append(_Silo(name, list(rows), test=test))
    if seed == config.seeds[0]:
        found.report(len(files))
    return silos


def _hold_out(silo: _Silo, config: CompareConfig, seed: int) -> _Silo:
    """A client's test rows, then its validation rows; DataError where too few are left."""
    prompts = [prompt_key(row) for row in silo.training]
    silo = _move(silo, draw_test_rows(prompts, config.test_share, seed), "test")
    prompts = [prompt_key(row) for row in silo.training]
    most = max(1, len(silo.labelled) // VALIDATION_SHARE)
    silo = _move(silo, draw_rows(prompts, min(config.validation_per_cat, most), seed, "validation_rows"), "validation")
    if silo.labelled and not silo.validation:
        raise DataError(
            f"client {silo.name}: of its {counted(len(silo.labelled), 'row')} none is left for validation",
            hint="give it at least three rows with different prompts, or leave it out",
        )
    return silo


def _move(silo: _Silo, places: frozenset[int], part: str) -> _Silo:
    if not places:
        return silo
    moved = [row for place, row in enumerate(silo.training) if place in places]
    left = [row for place, row in enumerate(silo.training) if place not in places]
    return replace(silo, training=left, **{part: moved})


def _group_shared(
    rows: Sequence[Row], silos: Sequence[_Silo]
) -> tuple[list[Row], Mapping[str, Mapping[str, float]], str]:
    """One file of test rows for all: by category where it has those of all clients, else as one group."""
    categories = {row.category for row in rows}
    trained = {row.category for silo in silos for row in silo.labelled}
    numbers = [str(number) for number, silo in enumerate(silos) if silo.labelled]
    if "" in categories | trained or not trained <= categories:
        return [replace(row, category=ALL) for row in rows], {number: {ALL: 1.0} for number in numbers}, "file"
    shares = {}
    for number in numbers:
        of = [row.category for row in silos[int(number)].labelled]
        shares[number] = {category: of.count(category) / len(of) for category in sorted(set(of))}
    return list(rows), shares, "category"


def _count_leaks(tests: Sequence[Row], silos: Sequence[_Silo]) -> int:
    """Test rows whose prompt some client trains on, also where one of the two is the beginning of the other."""
    rows = [row for silo in silos for row in silo.labelled]
    trained = {row.prompt for row in rows}
    turns = trained.union(*(row.earlier_prompts for row in rows))
    return sum(row.prompt in turns or not trained.isdisjoint(row.earlier_prompts) for row in tests)
