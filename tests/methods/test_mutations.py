"""One mutation per known pitfall: the check passes on the method and fails on the method with the fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import base_mutants
import client_mutants
import paper_laws
import pytest
import robust_mutants
import server_mutants
import torch
from method_properties import PROPERTIES
from published_values import (
    CLOSE_POINTS,
    CLOSE_SCORES,
    OPTIONS,
    OTHER_PLACES,
    PLACES,
    POINTS,
    assert_places,
    assert_point,
    assert_scores,
)

from fedlora.laws import aggregation_laws as laws
from fedlora.laws import run_laws
from fedlora.laws.promises import Promises
from fedlora.methods import fedrot, one_factor
from fedlora.methods.choosing import LoadedMethod, load_method

split_products = one_factor.split_products
DOCS = Path(__file__).parents[2] / "docs" / "proofs.md"


@dataclass(frozen=True)
class Mutation:
    """`mutant` replaces the half of the mode that it derives from; `patch` a function of torch's or the package's."""

    pitfall: str
    mode: str
    check: Callable[[LoadedMethod, Promises], None]
    mutant: type | None = None
    patch: tuple[Any, str, Callable[..., Any]] | None = None

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> LoadedMethod:
        mode = load_method(self.mode)
        if self.patch:
            monkeypatch.setattr(*self.patch)
        if self.mutant is None:
            return mode
        half = "client" if hasattr(self.mutant, "phases") else "server"
        return replace(mode, **{half: self.mutant(**asdict(getattr(mode, half)))})


def goes_where_published(mode: LoadedMethod, row: Promises) -> None:
    name = next(name for name in PLACES if PROPERTIES[name] is row)
    assert_places(replace(mode.server, **OPTIONS[name]), PLACES[name])


def scores_five_points(mode: LoadedMethod, row: Promises) -> None:
    assert_scores(mode.server, POINTS, (2, 2, 2, 2, 343))


def scores_close_points(mode: LoadedMethod, row: Promises) -> None:
    assert_scores(mode.server, CLOSE_POINTS, CLOSE_SCORES)


def trims_five_points(mode: LoadedMethod, row: Promises) -> None:
    assert_point(mode.server, (2 / 3, 2 / 3))


def trims_a_whole_number(mode: LoadedMethod, row: Promises) -> None:
    points = [(float(k * k), 0.0) for k in range(100)]
    assert_point(replace(mode.server, trimmed_share=0.29), (sum(k * k for k in range(29, 71)) / 42, 0.0), points)


def halves_an_even_count(mode: LoadedMethod, row: Promises) -> None:
    assert_point(mode.server, (1.5, 1.5), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (10.0, 10.0)])


def is_not_moved_by_one_far_away(mode: LoadedMethod, row: Promises) -> None:
    assert_point(mode.server, (0.788675, 0.788675), [*POINTS[:4], (1e6, 1e6)], tolerance=2e-5)


def v_for_vh(matrix, full_matrices=True, _svd=torch.linalg.svd):
    u, s, vh = _svd(matrix, full_matrices=full_matrices)
    return u, s, vh.mT


def nearest_orthogonal(match):
    u, _, vh = torch.linalg.svd(match)
    return u @ vh


def mixed_only(rotation, strength):
    return strength * rotation + (1 - strength) * torch.eye(len(rotation), dtype=rotation.dtype)


def always_split(state):
    """FedSVD that decomposes a product of zero."""
    nudged = {key: value + 1e-30 if ".lora_B." in key else value for key, value in state.items()}
    return split_products(nudged)


MUTATIONS = [
    Mutation("only the first client is kept", "homo", laws.check_order, server_mutants.FirstClientOnly),
    Mutation("the order of arrival weighs", "homo", laws.check_order, server_mutants.LaterCountsMore),
    Mutation("rows do not weigh where they should", "homo", laws.check_weights, server_mutants.EvenMean),
    Mutation("weights that do not sum to 1", "homo", laws.check_weights, server_mutants.FixedDenominator),
    Mutation("weights on both factors (w squared)", "ffa", laws.check_equal_clients, server_mutants.SquaredShares),
    Mutation("a sum in the order of a file's keys", "homo", laws.check_key_order, server_mutants.SumOfKeys),
    Mutation("averaging in bfloat16", "homo", laws.check_combination, server_mutants.MeanOfBfloat16),
    Mutation(
        "the mean is rounded before the server's step",
        "diloco",
        laws.check_one_rounding,
        server_mutants.RoundedFirst,
    ),
    Mutation("an input is overwritten", "homo", laws.check_inputs_stay, server_mutants.AddsInPlace),
    Mutation(
        "momentum kept on the object, not in the state",
        "fedavgm",
        run_laws.check_resume,
        server_mutants.RemembersItself,
    ),
    Mutation("momentum as an exponential average", "fedavgm", goes_where_published, server_mutants.ExponentialAverage),
    Mutation("plain momentum for Nesterov's", "diloco", goes_where_published, server_mutants.PlainMomentum),
    Mutation(
        "rows weigh in DiLoCo's uniform mean",
        "diloco",
        laws.check_weights,
        server_mutants.WeightedDiLoCo,
    ),
    Mutation("FedAdagrad from v = 0", "fedadagrad", goes_where_published, server_mutants.AdagradFromZero),
    Mutation("FedAdam from v = 0", "fedadam", goes_where_published, server_mutants.AdamFromZero),
    Mutation("FedYogi from v = 0", "fedyogi", goes_where_published, server_mutants.YogiFromZero),
    Mutation("bias correction with exponent t + 1", "fedadam", goes_where_published, server_mutants.BiasCorrected),
    Mutation(
        "second moment of m instead of the change", "fedadam", goes_where_published, server_mutants.VarianceOfMean
    ),
    Mutation(
        "controls averaged over the cohort, not all N",
        "scaffold",
        paper_laws.check_controls,
        client_mutants.OverTheCohort,
    ),
    Mutation("the most steps allowed as E", "scaffold", paper_laws.check_controls, client_mutants.MostStepsAsE),
    Mutation(
        "the correction with the wrong sign", "scaffold", paper_laws.check_controls, client_mutants.CorrectsBackwards
    ),
    Mutation(
        "a client's control forgotten",
        "scaffold",
        paper_laws.check_control_of_the_absent,
        client_mutants.ForgetsControl,
    ),
    Mutation("a pull that matches no tensor", "fedprox", paper_laws.check_pull, client_mutants.PullsNothing),
    Mutation(
        "a pull to zero instead of the global adapter", "fedprox", paper_laws.check_pull, client_mutants.PullsToZero
    ),
    Mutation("another A for every client", "ffa", run_laws.check_waves, client_mutants.OwnA),
    Mutation("factors recognised by their shape", "ffa", run_laws.check_halves, client_mutants.FactorByShape),
    Mutation("RoLoRA begins with A", "rolora", run_laws.check_first_step, client_mutants.BeginsWithA),
    Mutation(
        "a client starts where the last one ended",
        "rolora",
        run_laws.check_nothing_leaks,
        client_mutants.GoesOnFromTheLast,
    ),
    Mutation("a transposed product", "fedsvd", laws.check_combination, client_mutants.TransposedProduct),
    Mutation("V taken for its transpose", "fedsvd", laws.check_combination, patch=(torch.linalg, "svd", v_for_vh)),
    Mutation(
        "a product of zero decomposed",
        "fedsvd",
        laws.check_fixed_point,
        patch=(one_factor, "split_products", always_split),
    ),
    Mutation("only A is turned", "fedrot", laws.check_one_client, client_mutants.TurnsAOnly),
    Mutation(
        "a reflection taken for a rotation",
        "fedrot",
        paper_laws.check_turns,
        patch=(fedrot, "_nearest_rotation", nearest_orthogonal),
    ),
    Mutation("a mixed rotation that is none", "fedrot", laws.check_one_client, patch=(fedrot, "_mix", mixed_only)),
    Mutation("a personal B that is sent", "fedsa", run_laws.check_halves, client_mutants.SendsBToo),
    Mutation("a personal B forgotten", "fedsa", run_laws.check_missed_rounds, client_mutants.ForgetsB),
    Mutation(
        "a personal B that goes to the next client", "fedsa", run_laws.check_nothing_leaks, client_mutants.OneBForAll
    ),
    Mutation("local training that sends", "none", run_laws.check_halves, client_mutants.SendsItsOwn),
    Mutation("Krum by the Gram matrix in float32", "krum", scores_close_points, robust_mutants.GramInFloat32),
    Mutation("Krum counts the distance to itself", "krum", scores_five_points, robust_mutants.CountsItself),
    Mutation("Krum counts one neighbour more", "krum", scores_five_points, robust_mutants.OneNeighbourMore),
    Mutation("Multi-Krum weighted by rows", "multi_krum", laws.check_weights, robust_mutants.ExampleWeightedKrum),
    Mutation("one more trimmed at each end", "trimmed_mean", trims_five_points, robust_mutants.TrimsOneMore),
    Mutation("a share of 0.29 of 100 cut to 28", "trimmed_mean", trims_a_whole_number, robust_mutants.TrimsByFloor),
    Mutation("the lower median of an even count", "median", halves_an_even_count, robust_mutants.LowerMedian),
    Mutation(
        "a rank spread over a larger one",
        "median",
        laws.check_ranks,
        robust_mutants.SpreadsSmallRanks,
    ),
    Mutation(
        "four Weiszfeld steps from the mean",
        "geometric_median",
        is_not_moved_by_one_far_away,
        robust_mutants.FourStepsFromTheMean,
    ),
    Mutation(
        "the residual without alpha / r",
        "fedex",
        laws.check_combination,
        base_mutants.NoScalingInResidual,
    ),
    Mutation(
        "the residual of clients that weigh the same",
        "fedex",
        laws.check_combination,
        base_mutants.ResidualOfEvenClients,
    ),
    Mutation("a transposed residual", "fedex", laws.check_combination, base_mutants.TransposedResidual),
    Mutation(
        "a client that missed rounds lacks their residuals",
        "fedex",
        run_laws.check_beneath,
        base_mutants.OnlyTheNewest,
    ),
    Mutation(
        "weights on both factors of a stack (w squared)",
        "flora",
        laws.check_combination,
        base_mutants.SharesOnBothFactors,
    ),
    Mutation("a stack without alpha / r", "flora", laws.check_combination, base_mutants.NoScalingInStack),
    Mutation(
        "stacked into the base, and kept as well",
        "flora",
        laws.check_combination,
        base_mutants.StacksAndGoesOn,
    ),
    Mutation(
        "the mean of factors is decomposed",
        "flexlora",
        laws.check_combination,
        base_mutants.MeanOfFactorsDecomposed,
    ),
    Mutation("HetLoRA weighted by rows", "hetlora", laws.check_combination, base_mutants.RowsWeighInHetLora),
    Mutation("a personal model that is sent", "ditto", paper_laws.check_own_models, client_mutants.SendsItsOwnModel),
    Mutation("Ditto pulled to where it starts", "ditto", paper_laws.check_own_models, client_mutants.PulledToItself),
    Mutation("factors mixed instead of outputs", "feddpa", paper_laws.check_own_models, client_mutants.MixesFactors),
]


@pytest.fixture(autouse=True)
def _empty_shelves(monkeypatch):
    """What mutants keep outside of any state."""
    monkeypatch.setattr(client_mutants.Shelf, "last", None)
    monkeypatch.setattr(server_mutants.Velocity, "kept", None)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.pitfall)
def test_a_known_fault_is_caught(mutation, monkeypatch):
    row = PROPERTIES[mutation.mode]
    mutation.check(load_method(mutation.mode).with_values(row.settings), row)
    mutated = mutation.apply(monkeypatch).with_values(row.settings)
    with pytest.raises(AssertionError):
        mutation.check(mutated, row)


@pytest.mark.parametrize(
    ("name", "server"),
    [
        ("an exponential average as FedAvgM (OpenFedLLM)", server_mutants.ExponentialAverage()),
        ("FedAdagrad from v = 0", server_mutants.AdagradFromZero(0.1, 0.9)),
        ("FedAdam from v = 0", server_mutants.AdamFromZero(0.1)),
        ("FedYogi from v = 0", server_mutants.YogiFromZero(0.1)),
        ("FedAdam with bias correction of exponent t + 1 (Flower)", server_mutants.BiasCorrected(0.1)),
        ("FedAdam with v from m squared and m beginning at delta (OpenFedLLM)", server_mutants.VarianceOfMean(0.1)),
    ],
)
def test_the_mutants_are_the_published_code(name, server):
    assert_places(server, OTHER_PLACES[name])


def test_four_steps_from_the_mean_end_where_published():
    assert_point(robust_mutants.FourStepsFromTheMean(), (0.87254125, 0.87254125), tolerance=1e-8)
    assert_point(robust_mutants.FourStepsFromTheMean(), (976, 976), [*POINTS[:4], (1e6, 1e6)], tolerance=1)


def test_the_documentation_names_every_pitfall_and_what_catches_it():
    text = DOCS.read_text(encoding="utf-8")
    rows = [f"| {mutation.pitfall} | `{mutation.mode}` | `{mutation.check.__name__}` |" for mutation in MUTATIONS]
    assert not [row for row in rows if row not in text]
