"""The data sets of a comparison: a folder of silos, or dealt out by `allocate`, with the held-out rows divided in two.

The seed of a run draws its data too, so that what is said over seeds holds for other splits as well. The held-out rows
are the same whatever the partition; the first of every category are for choosing, the others for reporting.
"""

from __future__ import annotations

from collections import Counter

from fedlora.comparing.experiment import DIGEST, DataSet, allocation_of, rows_to_answer, split_rows
from fedlora.comparing.silo_data import make_silo_data
from fedlora.config.compare import CompareConfig
from fedlora.config.contenders import Setting
from fedlora.config.data import AllocateConfig, SkillsConfig
from fedlora.console import collect_lines
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.files import json_lines, sha256_of_json, write_text
from fedlora.paths import ComparisonPaths, DataPaths
from fedlora.rows import MIXED, Row
from fedlora.stages import allocate, data_skills


class DataSets:
    """Makes each data set when it is first asked for; the same bytes again where they lie already."""

    def __init__(self, config: CompareConfig, paths: ComparisonPaths) -> None:
        self.config = config
        self.paths = paths
        self._made: dict[str, DataSet] = {}

    def find(self, setting: Setting, seed: int) -> DataSet:
        """The data set of a setting under a seed."""
        if self.config.silos is not None:
            name = f"silos-{seed}"
            if name not in self._made:
                self._made[name] = make_silo_data(self.config, seed, self.paths)
            return self._made[name]
        wanted = allocation_of(self.config, setting, seed, self.paths)
        if wanted.dataset_name not in self._made:
            self._made[wanted.dataset_name] = self._make(wanted)
        return self._made[wanted.dataset_name]

    def _make(self, wanted: AllocateConfig) -> DataSet:
        own = self.paths.rows_file(wanted.seed)
        with collect_lines():
            if wanted.input_file == own:
                rows = wanted.train_per_cat + wanted.test_per_cat
                made = SkillsConfig.of(output_file=own, rows_per_category=rows, seed=wanted.seed, overwrite=True)
                data_skills.run(made)
            manifest = allocate.run(wanted).manifest
        place = DataPaths(wanted.output_root, wanted.dataset_name)
        held_out = read_rows(place.test_file(None if wanted.test_share else wanted.test_per_cat), rules=MIXED)
        validation, test = split_rows(held_out, self._count_validation(held_out))
        answered = rows_to_answer(test, self.config)
        for part, rows in (("validation", validation), ("test", test), ("answered", answered)):
            write_text(place.part_file(part), json_lines(row.as_dict() for row in rows))
        return DataSet(
            folder=place.folder,
            validation=place.part_file("validation"),
            test=place.part_file("test"),
            answered=place.part_file("answered"),
            num_clients=len(manifest["clients"]),
            digest=sha256_of_json([manifest, self.config.validation_per_cat])[:DIGEST],
            is_mixed=wanted.row_kind == "any",
        )

    def _count_validation(self, held_out: list[Row]) -> int:
        """Validation rows per category: of a share at most half of what it holds out; DataError where that is none."""
        if not self.config.test_share:
            return self.config.validation_per_cat
        fewest = min(Counter(row.category for row in held_out).values())
        if fewest < 2:
            raise DataError(
                f"test_share={self.config.test_share:g} holds out one row of a category, and learning rates are chosen "
                "on other rows than those that are reported",
                hint="raise test_share, or add rows",
            )
        return min(self.config.validation_per_cat, fewest // 2)
