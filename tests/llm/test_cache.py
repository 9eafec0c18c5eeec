import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from fedlora.llm.cache import BLOCK_TOKENS, RoomyLayer, can_share_rows, make_cache, room_for
from fedlora.llm.generation import order_left


def draw(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, 4, generator=generator), torch.randn(rows, 2, length, 3, generator=generator)


def test_the_written_part_is_what_concatenation_gives_and_the_room_behind_is_zero():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()
    for length in (5, 1, 1, BLOCK_TOKENS - 7, 1, 3 * BLOCK_TOKENS, 1):
        keys, values = draw(3, length, generator)
        promised, _ = ours.get_mask_sizes(length)
        found = ours.update(keys, values)
        expected = theirs.update(keys, values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, other in zip(found, expected, strict=True):
            assert mine.shape[2] == promised
            assert torch.equal(mine[:, :, : other.shape[2]], other)
            assert not mine[:, :, other.shape[2] :].any()


def test_rows_leave_and_repeat_as_in_transformers_layer():
    generator = torch.Generator().manual_seed(1)
    ours, theirs = RoomyLayer(), DynamicLayer()
    steps = [(1, None), (1, 4), (4, torch.tensor([3, 1, 2])), (3, torch.tensor([0])), (1, torch.tensor([0, 0]))]
    steps += [(2, torch.tensor([1, 0, 0, 1, 1])), (5, torch.tensor([4, 0])), (2, None)]
    for rows, then in steps:
        keys, values = draw(rows, 2, generator)
        found, expected = ours.update(keys, values), theirs.update(keys, values)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine[:, :, : other.shape[2]], other)
        for layer in (ours, theirs):
            if isinstance(then, int):
                layer.batch_repeat_interleave(then)
            elif then is not None:
                layer.batch_select_indices(then)


def test_between_blocks_nothing_is_allocated_and_nothing_moves():
    generator = torch.Generator().manual_seed(2)
    layer = RoomyLayer()
    layer.update(*draw(2, 10, generator))
    first = layer.update(*draw(2, 1, generator))[0]
    for _ in range(room_for(11) - 11):
        assert layer.update(*draw(2, 1, generator))[0].data_ptr() == first.data_ptr()
    assert layer.update(*draw(2, 1, generator))[0].shape[2] == room_for(11) + BLOCK_TOKENS


def test_a_layer_with_a_sliding_window_stays_transformers_own():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    full, sliding = LlamaConfig(**size), MistralConfig(**size, sliding_window=16)
    assert all(isinstance(layer, RoomyLayer) for layer in make_cache(full).layers)
    assert [type(layer) for layer in make_cache(sliding).layers] == [
        type(layer) for layer in DynamicCache(config=sliding).layers
    ]
    assert can_share_rows(full)
    assert not can_share_rows(sliding)


@pytest.mark.parametrize("pattern", ["0111", "1110", "0101", "1001", "0001", "1010011"])
def test_the_rows_left_fill_the_first_places_and_as_few_as_possible_move(pattern):
    going = torch.tensor([mark == "1" for mark in pattern])
    order = order_left(going)
    assert sorted(order.tolist()) == going.nonzero()[:, 0].tolist()
    stays = [place for place in range(len(order)) if going[place]]
    assert all(order[place] == place for place in stays)
