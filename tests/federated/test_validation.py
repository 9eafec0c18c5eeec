import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.federated.adapters import weighted_mean
from fedlora.federated.validation import find_fault, find_update_fault
from fedlora.types import ClientMemory, ClientUpdate, Download, TrainTask

SHAPES = {"l.lora_A.weight": (2, 5), "l.lora_B.weight": (4, 2), "m.lora_A.weight": (2, 3), "m.lora_B.weight": (3, 2)}
TASK = TrainTask("name", 1, 0, 3, (3,), Download({}))
ALONE = dataclasses.replace(TASK, download=Download({}, travels=None, shared=None))
"""A task of which nothing is sent back."""


def adapter(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}


def update(**changes) -> ClientUpdate:
    good = ClientUpdate(
        "name",
        1,
        3,
        adapter(),
        ClientMemory(),
        7,
        50,
        4,
        "start",
        {"loss": 1.5, "num_response_tokens": 20, "update_norm": 1.0},
    )
    return dataclasses.replace(good, **changes)


def fault_of(*, is_clipped: bool = False, **changes) -> str | None:
    task = TASK if changes.get("upload", {}) is not None else ALONE
    return find_update_fault(update(**changes), task, SHAPES, is_clipped=is_clipped)


def test_a_good_update_has_no_fault():
    assert fault_of() is None
    assert fault_of(upload=None, memory=ClientMemory(adapter())) is None


def test_what_could_overflow_in_a_product_passes_only_where_it_is_clipped():
    huge = {key: torch.full_like(value, 3e38) for key, value in adapter().items()}
    assert "the norm of" in str(fault_of(upload=huge))
    assert fault_of(upload=huge, is_clipped=True) is None
    # nobody clips what a client sends besides, or keeps
    assert "the norm of" in str(fault_of(upload=huge, memory=ClientMemory(huge), is_clipped=True))
    sent = update(extra={"control": huge})
    assert "the norm of" in str(find_update_fault(sent, TASK, SHAPES, ("control",), is_clipped=True))


def test_what_is_sent_is_what_the_task_shares():
    kept = ClientMemory(adapter())
    assert find_update_fault(update(upload=None, memory=kept), TASK, SHAPES) == "it sends nothing"
    assert "unknown keys" in str(find_update_fault(update(memory=kept), ALONE, SHAPES))


def test_a_model_that_stays_may_be_of_another_rank_and_what_is_sent_may_not():
    twice = {key: (2 * a, b) if ".lora_A." in key else (a, 2 * b) for key, (a, b) in SHAPES.items()}
    large = {key: torch.zeros(shape) for key, shape in twice.items()}
    assert find_update_fault(update(memory=ClientMemory(large)), TASK, SHAPES, keeps=twice) is None
    for changes in ({"memory": ClientMemory(adapter())}, {"upload": large, "memory": ClientMemory(large)}):
        assert "expected" in str(find_update_fault(update(**changes), TASK, SHAPES, keeps=twice))


keys = st.sampled_from(sorted(SHAPES))
places = st.integers(0, 1000)


@given(keys, places, st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_one_value_that_is_no_number_is_found_wherever_it_stands(key, place, value, is_personal):
    state = adapter()
    flat = state[key].view(-1)
    flat[place % flat.numel()] = value
    changes = {"upload": None, "memory": ClientMemory(state)} if is_personal else {"upload": state}
    assert fault_of(**changes) == f"non-finite tensor {key}"


@given(st.lists(st.tuples(keys, places, st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=20))
def test_finite_values_of_any_size_pass_and_their_mean_is_finite(entries):
    state = adapter()
    for key, place, value in entries:
        flat = state[key].view(-1)
        flat[place % flat.numel()] = value
    assert fault_of(upload=state, is_clipped=True) is None
    mean = weighted_mean([(state, 3.0), (adapter(1), 1.0), (state, 10.0**9)])
    assert all(bool(torch.isfinite(value).all()) for value in mean.values())


@given(st.data())
def test_missing_foreign_and_renamed_keys_are_named(data):
    state = adapter()
    gone = data.draw(st.sets(keys))
    foreign = data.draw(st.sets(st.text(min_size=1, max_size=20).filter(lambda name: name not in SHAPES)))
    state = {key: value for key, value in state.items() if key not in gone}
    state |= {name: torch.zeros(2) for name in foreign}
    fault = fault_of(upload=state)
    if gone:
        assert fault == f"{len(gone)} missing keys: {', '.join(sorted(gone)[:3])}"
    elif foreign:
        assert fault == f"{len(foreign)} unknown keys: {', '.join(sorted(foreign)[:3])}"
    else:
        assert fault is None


@given(keys, st.lists(st.integers(0, 6), max_size=4))
def test_any_other_shape_is_refused_and_never_broadcast(key, shape):
    state = {**adapter(), key: torch.zeros(shape)}
    fault = fault_of(upload=state)
    assert (fault is None) == (tuple(shape) == SHAPES[key])
    assert fault is None or fault == f"{key} has shape {tuple(shape)}, expected {SHAPES[key]}"


def test_the_transposed_factor_is_refused():
    state = adapter()
    assert "has shape (5, 2), expected (2, 5)" in fault_of(
        upload={**state, "l.lora_A.weight": state["l.lora_A.weight"].T}
    )


@pytest.mark.parametrize(
    "kind",
    ["float16", "bfloat16", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn", "uint8"],
)
def test_nothing_is_cast(kind):
    state = adapter()
    state["l.lora_B.weight"] = torch.zeros(4, 2).to(getattr(torch, kind))
    assert fault_of(upload=state) == f"l.lora_B.weight has type torch.{kind}, expected torch.float32"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.zeros(2, 5).to_sparse(), "is torch.sparse_coo on cpu"),
        (torch.zeros(2, 5, device="meta"), "is torch.strided on meta"),
        ([[0.0] * 5] * 2, "is not a tensor but list"),
        (None, "is not a tensor but NoneType"),
    ],
)
def test_only_dense_tensors_in_memory_are_tensors(value, what):
    assert what in find_fault({**adapter(), "l.lora_A.weight": value}, SHAPES)


def test_a_view_that_would_expand_to_terabytes_is_never_materialised():
    state = {**adapter(), "l.lora_A.weight": torch.zeros(1).expand(10**12)}
    assert "has shape (1000000000000,)" in fault_of(upload=state)


COUNTS = [0, -1, -(10**12), 10**9 + 1, 10**12, 10**400, math.nan, math.inf, 1.0, 7.5, "7", "", None, True, False, [7]]


@pytest.mark.parametrize("name", ["num_examples", "num_steps", "num_tokens"])
def test_a_count_is_a_whole_number_that_can_be_believed(name):
    # 0 steps and a billion steps can be, but not 0 rows, nor more than a billion
    believed = [] if name == "num_examples" else [0, 10**9 + 1, 10**12]
    for value in COUNTS:
        fault = fault_of(**{name: value})
        if type(value) is int and value in believed:
            assert fault is None, value
        else:
            assert str(fault).startswith(f"{name}="), str(value)[:12]


@pytest.mark.parametrize(
    ("metrics", "what"),
    [
        ({"num_response_tokens": 5, "update_norm": 1.0}, "the metric loss is missing"),
        ({"loss": 1.0}, "the metric num_response_tokens is missing"),
        ({"loss": math.nan, "num_response_tokens": 5, "update_norm": 1.0}, "the metric loss is nan"),
        ({"loss": 1.0, "num_response_tokens": 0, "update_norm": 1.0}, "num_response_tokens=0 is not positive"),
        ({"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0, "seconds": math.inf}, "the metric seconds is inf"),
        ({"loss": "1.0", "num_response_tokens": 5, "update_norm": 1.0}, "the metric loss is '1.0'"),
        ({"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0, "note": {"a": 1}}, "the metric note is {'a': 1}"),
    ],
)
def test_metrics_that_could_not_be_written_down_are_refused(metrics, what):
    assert what in fault_of(metrics=metrics)


@pytest.mark.parametrize("changes", [{"round": 2}, {"client_id": 4}, {"task_id": "other"}, {"task_id": ""}])
def test_an_answer_to_another_task_is_refused(changes):
    assert "it answers another task" in fault_of(**changes)


def test_an_update_without_an_adapter_is_refused():
    assert fault_of(upload=None) == "it holds no adapter"
