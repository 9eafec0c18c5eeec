import os
import stat
from array import array

import pytest

from fedlora.llm import token_files
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import Example, ExampleSet, RowCounts
from fedlora.llm.token_files import TokenFiles, fingerprint_tokenizer

IDS = [array("i", ids) for ids in ([1, 2, 3], [49151], [7, 8, 9, 4, 5])]
EXAMPLES = [Example(IDS[0], 2), Example(IDS[1], 1), Example(IDS[2], 1, ((2, 3),))]
TRAINING = ExampleSet(EXAMPLES, RowCounts(4, 5))
NOTHING = ExampleSet([], RowCounts(0, 0))


def test_sets_come_back_as_they_were_saved(tmp_path):
    files = TokenFiles(tmp_path)
    assert files.load(["a", 1]) is None
    files.save(["a", 1], TRAINING, NOTHING)
    assert files.load(["a", 1]) == (TRAINING, NOTHING)
    assert files.load(["a", 2]) is None
    assert files.load(["a", "1"]) is None


def test_only_the_owner_may_read_what_can_be_turned_back_into_text(tmp_path):
    TokenFiles(tmp_path / "tokens").save(["a"], TRAINING, NOTHING)
    (file,) = (tmp_path / "tokens").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", [0, 3, 70, 200, -1])
def test_a_damaged_file_is_not_used(tmp_path, place):
    files = TokenFiles(tmp_path)
    files.save(["a"], TRAINING, TRAINING)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert files.load(["a"]) is None
    file.write_bytes(bytes(content[: len(content) // 2]))
    assert files.load(["a"]) is None
    files.save(["a"], TRAINING, TRAINING)
    assert files.load(["a"]) is not None


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    files = TokenFiles(tmp_path / "file" / "tokens")
    files.save(["a"], TRAINING, NOTHING)
    assert files.load(["a"]) is None


def test_the_files_unused_for_longest_make_room(tmp_path, monkeypatch):
    files = TokenFiles(tmp_path)
    for number in range(4):
        files.save([number], TRAINING, NOTHING)
        os.utime(files._path([number]), (1000 + number, 1000 + number))
    assert files.load([0]) is not None
    size = files._path([0]).stat().st_size
    monkeypatch.setattr(token_files, "MOST_BYTES", 3 * size)
    files.save([4], TRAINING, NOTHING)
    assert [number for number in range(5) if files.load([number])] == [0, 3, 4]


def test_a_tokenizer_that_encodes_differently_has_another_fingerprint(tiny_model):
    prints = set()
    for change in (None, "template", "token", "again"):
        tokenizer = load_base_model(str(tiny_model), device="cpu").tokenizer
        if change == "template":
            tokenizer.chat_template = "{{ messages }}"
        elif change == "token":
            tokenizer.add_tokens(["north"])
        prints.add(fingerprint_tokenizer(tokenizer))
    assert len(prints) == 3
