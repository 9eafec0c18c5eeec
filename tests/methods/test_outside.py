"""Methods from outside: what their rows say, where they are found, and what is refused, with the reason."""

import pickle
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from installed_method import EXAMPLE, forget, install

from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.methods import FedAvg, Method, Option, TrainAndSend
from fedlora.methods.choosing import choose_method
from fedlora.methods.table import METHODS, find_method

PLACE = f"{EXAMPLE}:part_way"


@dataclass(frozen=True)
class Careful(FedAvg):
    """A server with an option of every kind, and fields that are none."""

    share: float = 0.5
    steps: int = 3
    is_strict: bool = True
    label: str = "a"
    how: Literal["near", "far"] = "near"
    bound: float | None = None
    lora_scaling: float = 1.0
    held: ClassVar[int] = 5


@dataclass(frozen=True)
class Pulled(TrainAndSend):
    pull: float = 0.1


careful = Method("careful", server=Careful(share=0.25), client=Pulled(), options=(Option("pull", 0.1, "a pull", ge=0),))


def test_options_are_the_fields_of_both_halves_with_the_values_that_they_have():
    found = {option.name: (option.default, option.kind) for option in careful.options}
    assert found == {
        "share": (0.25, float),
        "steps": (3, int),
        "is_strict": (True, bool),
        "label": ("a", str),
        "how": ("near", Literal["near", "far"]),
        "bound": (None, float),
        "pull": (0.1, float),
    }
    assert (careful.family, careful.order, careful.server_sees) == ("own", "parallel", None)
    assert careful.option("pull").help == "a pull"


def test_options_reach_their_halves_and_are_checked_by_type_and_limit():
    given = {"share": "0.5", "is_strict": "false", "how": "far", "bound": 2, "pull": 1}
    config = TrainConfig.of(federation_mode=careful, num_clients=3, **given)
    method = choose_method(config)
    assert (method.server.share, method.server.is_strict, method.server.how, method.server.bound) == (
        *(0.5, False, "far", 2.0),
    )
    assert (method.client.pull, method.server.lora_scaling) == (1.0, 4.0)
    for wrong in (
        {"share": "much"},
        {"how": "here"},
        {"pull": -1},
        {"steps": 1.5},
        {"method_options": {"lora_scaling": 2}},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong.get("method_options", wrong)))):
            TrainConfig.of(federation_mode=careful, **wrong)


def test_the_row_stays_with_the_configuration():
    config = TrainConfig.of(federation_mode=PLACE, step=0.3)
    plan = PlanConfig.of(federation_mode=PLACE, step=0.3)
    sent = pickle.loads(pickle.dumps(config))
    for one in (config, plan.training(), config.model_copy(update={"seed": 1}), sent, TrainConfig.of(method=PLACE)):
        assert (one.federation_mode, one.method.name, one.method.source.kind) == ("part_way", "part_way", "file")
    assert config.record()["step"] == 0.3
    assert plan.training().record() == config.record() == sent.record()
    assert "method_row" not in config.record()


def test_a_built_in_method_has_no_row_beside_its_name():
    config = TrainConfig.of(federation_mode="fedprox", proximal_mu=0.1)
    assert (config.method, config.method_row) == (METHODS["fedprox"], None)
    assert TrainConfig.of(federation_mode=METHODS["fedprox"]).method is METHODS["fedprox"]


def test_what_only_this_process_has_trains_here_and_nowhere_else():
    made = Method("made_here", server=Careful(), client=TrainAndSend())
    config = TrainConfig.of(federation_mode=made)
    assert (config.method.source.kind, config.method.source.place) == ("session", "")
    with pytest.raises(UsageError, match="exists in this process only") as caught:
        pickle.dumps(config)
    assert "save it to a file" in caught.value.hint
    with pytest.raises(UsageError, match="exists in this process only"):
        TrainConfig.of(federation_mode=made, devices=("cpu", "cuda:0"))


def test_an_object_of_a_module_is_found_in_it():
    source = TrainConfig.of(federation_mode=careful).method.source
    assert (source.kind, source.place) == ("module", f"{__name__}:careful")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Method("x", server=Careful), "server is the class"),
        (lambda: Method("x", server=object()), "has no fewest_clients"),
        (lambda: Method("x", client=FedAvg()), "has no sends"),
        (lambda: Method("x", server=NotDecorated()), r"NotDecorated.step is not a dataclass field"),
        (lambda: Method("x", server=OfNoKind()), "field layers of OfNoKind is no option"),
        (lambda: Method("x", server=Careful(), client=SharesAName()), "give share different defaults"),
        (
            lambda: Method("x", server=Careful(), options=(Option("speed", 1.0, ""),)),
            "option speed is a field of neither",
        ),
        (lambda: Method("x", server=Careful(), options=(Option("share", 1.0, ""),)), "share has the default 1.0"),
    ],
)
def test_a_row_that_cannot_be_is_refused_when_it_is_made(make, what):
    with pytest.raises(UsageError, match=what):
        make()


class NotDecorated(FedAvg):
    step: float = 0.5


@dataclass(frozen=True)
class OfNoKind(FedAvg):
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class SharesAName(TrainAndSend):
    share: float = 0.9


@dataclass(frozen=True)
class TakesARate(FedAvg):
    learning_rate: float = 1.0


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (Method("x", server=TakesARate()), "option learning_rate has the name of a flag"),
        (Method("homo", server=Careful()), "'homo' is the name of a built-in method"),
        (Method("a/b", server=Careful()), "'a/b' is no name of letters"),
    ],
)
def test_a_row_that_would_be_taken_for_something_else_is_refused(row, what):
    with pytest.raises(UsageError, match=what):
        TrainConfig.of(federation_mode=row)


FAULTS = {
    "def f(:": (r"faulty\.py:1: SyntaxError", "without an error"),
    "\nimport nothing_of_this_name": (r"faulty\.py:2: ModuleNotFoundError", "without an error"),
    "raise SystemExit(3)": (r"faulty\.py:1: SystemExit", "without an error"),
    "from fedlora.methods import Method, FedAvg\nx = Method('a', server=FedAvg)": (r"server is the class", "FedAvg()"),
    "from fedlora.methods import Method\nother = Method('a')": (r"there is no 'row'", "its methods are other"),
    "row = 3": ("is a int, not a fedlora.methods.Method", 'Method("name"'),
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_file_that_holds_no_method_is_an_error_with_its_line(text, tmp_path):
    what, hint = FAULTS[text]
    (tmp_path / "faulty.py").write_text(text)
    with pytest.raises(UsageError, match=what) as caught:
        find_method(f"{tmp_path / 'faulty.py'}:row")
    assert hint in caught.value.hint


def test_a_file_is_read_again_when_it_has_changed(tmp_path):
    file = tmp_path / "part_way.py"
    text = EXAMPLE.read_text()
    file.write_text(text)
    before = find_method(f"{file}:part_way")
    assert find_method(f"{file}:part_way").server == before.server
    file.write_text(text.replace("step: float = 0.5", "step: float = 0.7"))
    after = find_method(f"{file}:part_way")
    assert (before.option("step").default, after.option("step").default) == (0.5, 0.7)
    assert before.source.files != after.source.files


def test_a_file_must_not_choose_code(tmp_path):
    yaml = tmp_path / "run.yaml"
    for line in (f"federation_mode: {PLACE}", f"method: {PLACE}", "method: some.module:row"):
        yaml.write_text(line)
        with pytest.raises(UsageError, match="names code; a file must not choose") as caught:
            TrainConfig.make({}, file=yaml)
        assert "--federation_mode" in caught.value.hint
    yaml.write_text("step: 0.3\n")
    assert TrainConfig.make({"federation_mode": PLACE}, file=yaml).method_options == {"step": 0.3}


def test_an_installed_method_is_a_name_like_any_other(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    yaml = tmp_path / "run.yaml"
    yaml.write_text("method: part_way\nstep: 0.3\n")
    source = TrainConfig.make({}, file=yaml).method.source
    assert (source.kind, source.place, source.distribution, source.version) == (
        *("entry point", "part_way", "own-method", "1.2"),
    )
    assert list(source.files) == ["own_method"]
    # the same object by its module, and as an object
    assert find_method("own_method:part_way").source == source
    import own_method  # pyright: ignore[reportMissingImports]

    assert TrainConfig.of(federation_mode=own_method.part_way).method.source == source
    assert pickle.loads(pickle.dumps(TrainConfig.of(federation_mode="part_way"))).method.source == source
    with pytest.raises(UsageError) as caught:
        find_method("part_wya")
    assert caught.value.hint == "did you mean part_way?"


def test_names_of_several_packages_take_the_package_s_before_them(tmp_path, monkeypatch):
    install(tmp_path / "a", monkeypatch)
    install(tmp_path / "b", monkeypatch, package="Other_Method", module="other_method")
    with pytest.raises(UsageError, match="in several packages") as caught:
        find_method("part_way")
    assert caught.value.hint == "name one: other-method/part_way, own-method/part_way"
    row = find_method("other_method/part_way")
    assert (row.name, row.source.distribution) == ("other-method/part_way", "Other_Method")


def test_an_installed_method_never_takes_the_place_of_a_built_in_one(tmp_path, monkeypatch):
    code = EXAMPLE.read_text().replace('"part_way"', '"homo"')
    install(tmp_path, monkeypatch, name="homo", code=code)
    assert find_method("homo") is METHODS["homo"]
    row = find_method("own-method/homo")
    assert (row.name, row.server.step) == ("own-method/homo", 0.5)


def test_an_entry_point_of_another_name_than_its_method_is_refused(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, name="halfway")
    with pytest.raises(UsageError, match="the entry point halfway names the method 'part_way'"):
        find_method("halfway")


def test_a_package_that_has_changed_is_another_source(tmp_path, monkeypatch):
    file = install(tmp_path, monkeypatch)
    before = find_method("part_way").source
    file.write_text(file.read_text() + "# changed\n")
    forget(monkeypatch)
    now = find_method("part_way").source
    assert now.find_changes(before.record()) == [
        f"own_method: {before.files['own_method'][:12]} -> {now.files['own_method'][:12]}"
    ]
    assert not now.find_changes(now.record())


def test_a_class_of_a_cell_is_known_by_its_code_and_that_of_the_functions_it_calls(tmp_path):
    """As in a notebook, classes belong to `__main__` and have no file."""
    script = tmp_path / "cell.py"
    script.write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from fedlora.config.train import TrainConfig
            from fedlora.methods import FedAvg, Method

            FIRST = '''
            def grow(value):
                return value + 1

            @dataclass(frozen=True)
            class Cell(FedAvg):
                step: float = 1.0
                def aggregate(self, state, updates, context):
                    return grow(state) if {"a", "b", "c"} else self
            '''
            SAME = "\\n\\n# a comment\\n" + FIRST
            OTHERS = [FIRST.replace(*change) for change in (("+ 1", "+ 2"), ("1.0", "0.5"), ("grow(state)", "state"))]

            def files(cell):
                exec(cell, globals())
                source = TrainConfig.of(federation_mode=Method("cell", server=Cell())).method.source
                assert (source.kind, source.place, list(source.files)) == ("session", "", ["Cell"])
                return source.files["Cell"]

            assert files(FIRST) == files(SAME)
            assert len({files(cell) for cell in (FIRST, *OTHERS)}) == 4
            print(files(FIRST))
            """
        )
    )
    runs = [subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True) for _ in "ab"]
    # as after a restart of the kernel
    assert runs[0].stdout == runs[1].stdout


def test_the_public_names_are_loaded_when_they_are_used():
    code = (
        "import sys, fedlora.methods as m; m.Method; m.Option; assert 'torch' not in sys.modules; m.FedAvg; m.combine"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_no_method_at_all_is_named(tmp_path):
    for given, what, hint in (
        (Careful(), "is of type Careful", "Method"),
        ("part_way.py", "is not a method", "name the method in the file: part_way.py:NAME"),
    ):
        with pytest.raises(UsageError, match=what) as caught:
            TrainConfig.of(federation_mode=given)
        assert hint in caught.value.hint
    (tmp_path / "apart.py").write_text("from . import more")
    with pytest.raises(UsageError, match="ImportError") as caught:
        find_method(f"{tmp_path / 'apart.py'}:row")
    assert "a method of several files is a package" in caught.value.hint
