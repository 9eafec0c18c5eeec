import io
import zipfile

import pytest
import torch

from fedlora.llm.adapter_files import load_adapter, to_bin
from fedlora.llm.bin_layout import BinLayout

SHAPES = {f"base_model.model.layers.{layer}.lora_{half}.weight": (4, 6 + layer) for layer in range(12) for half in "AB"}


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("seed", range(20))
def test_what_the_writer_wrote_is_read_without_unpickling_and_is_what_torch_reads(tmp_path, seed, monkeypatch):
    path = tmp_path / "adapter.bin"
    path.write_bytes(to_bin(draw(seed)))
    expected = torch.load(path, weights_only=True)
    monkeypatch.setattr(torch, "load", None)
    found = load_adapter(path, SHAPES, layout=BinLayout(SHAPES))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_every_byte_around_the_values_counts(tmp_path):
    layout = BinLayout(SHAPES)
    content = to_bin(draw(0))
    values = sum(span.end - span.begin for span in layout.values.values())
    fixed = sum(span.end - span.begin for span in layout.fixed)
    # two checksums a record and torch's identifier are all that is neither
    assert len(content) - values - fixed < 40 + 3 * 4 * (len(SHAPES) + 8)
    path = tmp_path / "adapter.bin"
    for span in layout.fixed:
        for place in (span.begin, span.end - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert layout.read(path) is None


def rewritten(change) -> bytes:
    """A file of torch's, with its records changed by `change(name, content)` and zipped anew."""
    source, target = zipfile.ZipFile(io.BytesIO(to_bin(draw(0)))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as zipped:
        for name in source.namelist():
            zipped.writestr(name, change(name, source.read(name)))
    return target.getvalue()


def test_other_files_are_left_to_torch(tmp_path):
    layout = BinLayout(SHAPES)
    other_order = {key: draw(0)[key] for key in sorted(SHAPES, reverse=True)}
    halves = {key: value.half() for key, value in draw(0).items()}
    buffers = []
    for state in (other_order, halves):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffers.append(buffer.getvalue())
    path = tmp_path / "adapter.bin"
    for content in (
        *buffers,
        rewritten(lambda name, content: content),
        b"",
        to_bin(draw(0))[:-1],
        to_bin(draw(0)) + b"x",
    ):
        path.write_bytes(content)
        assert layout.read(path) is None
    path.write_bytes(buffers[0])
    found = load_adapter(path, SHAPES, layout=layout)
    assert all(torch.equal(found[key], value) for key, value in draw(0).items())
