"""The laws that every federated method keeps, and the arithmetic of this one."""

import math

import torch
from own_method import ClipAndSend, clipped

import fedlora as fl
from fedlora.types import ClientMemory, Download, LocalResult

UNBOUNDED = {"longest": 1e9}


def test_it_keeps_the_laws_of_federated_methods():
    checked = fl.check_method(clipped, combines="factors", plain=UNBOUNDED, options=UNBOUNDED)
    assert checked.is_sound, checked
    assert fl.check_method(clipped).is_sound


def test_a_change_is_cut_to_its_length_and_keeps_its_direction():
    start, trained = {"x.lora_A.weight": torch.zeros(1, 2)}, {"x.lora_A.weight": torch.tensor([[3.0, 4.0]])}
    for longest, wanted in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        sent, _ = ClipAndSend(longest).upload([LocalResult(trained)], Download(start), ClientMemory())
        assert sent is not None
        found = sent.adapter["x.lora_A.weight"].tolist()[0]
        assert math.dist(found, wanted) < 1e-6
