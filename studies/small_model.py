"""The small model of the studies: a Llama of about a million parameters, pre-trained here from a seed.

A random frozen base would only show noise. This one has read the kinds of tasks that the `skills` data asks, but
answered in other words and other forms (`42` or `It makes 42.` where the data wants `12 + 30 = 42`), mixed over all
kinds and with tasks of copying: it knows what the tasks are about, and every category leaves an adapter something to
learn. The text is made up from the package's own vocabulary, so there is no licence to mind. The same seed gives the
same bytes on the same machine with the same number of threads.

    python studies/small_model.py --folder build/small_model
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from fedlora.data.skills import SKILLS
from fedlora.data.vocabulary import NAMES, WORDS
from fedlora.files import sha256_of
from fedlora.llm.library_log import quiet_transformers
from fedlora.seeds import derive_seed

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 704
TOKENIZER_ROWS = 6000
ROWS_PER_STEP = 64
NUM_STEPS = 560
WARMUP_STEPS = 60
PEAK_RATE = 4e-3
COPYING_SHARE = 0.25
OPENINGS = ("", "Sure. ", "Well, ", "Here it is: ", "I think: ")

Line = tuple[str, str]
"""What the user says, and what the assistant answers."""


def _reword_capital(answer: str) -> tuple[str, ...]:
    return f"it is called {answer}.", f"that would be {answer}, as far as I know."


def _reword_date(answer: str) -> tuple[str, ...]:
    date = datetime.date.fromisoformat(answer)
    return f"{date:%d/%m/%Y}", f"day {date.day}, month {date.month}, year {date.year}"


def _reword_extraction(answer: str) -> tuple[str, ...]:
    found = json.loads(answer)
    return "; ".join(map(str, found.values())), " and ".join(f"{key} is {value}" for key, value in found.items())


def _reword_reversing(answer: str) -> tuple[str, ...]:
    return ", ".join(answer.split()), "first " + ", then ".join(answer.split())


def _reword_sentiment(answer: str) -> tuple[str, ...]:
    return ("good", "they liked it.") if answer == "positive" else ("bad", "they did not like it.")


def _reword_sorting(answer: str) -> tuple[str, ...]:
    return " < ".join(answer.split(", ")), answer.replace(",", "")


def _reword_sum(answer: str) -> tuple[str, ...]:
    total = answer.rpartition(" ")[2]
    return total, f"it makes {total}."


def _reword_units(answer: str) -> tuple[str, ...]:
    value, unit = answer.split()
    return f"{unit}: {value}", f"that is {value}."


REWORDINGS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "capitals": _reword_capital,
    "dates": _reword_date,
    "extraction": _reword_extraction,
    "reversing": _reword_reversing,
    "sentiment": _reword_sentiment,
    "sorting": _reword_sorting,
    "sums": _reword_sum,
    "units": _reword_units,
}


def draw_lines(seed: int, purpose: str) -> Iterator[Line]:
    """Endless lines of the mixture: every skill as often as any other, in other forms than the skills data has."""
    draw = random.Random(derive_seed(seed, f"small_model/{purpose}"))  # noqa: S311
    while True:
        if draw.random() < COPYING_SHARE:
            yield _draw_copying(draw)
            continue
        skill = draw.choice(SKILLS)
        instruction, context, answer = skill.make(draw.randrange(skill.num_prompts))
        question = f"{instruction}\n\n{context}" if context else instruction
        yield question, draw.choice(OPENINGS) + draw.choice(REWORDINGS[skill.category](answer))


def _draw_copying(draw: random.Random) -> Line:
    kind = draw.randrange(3)
    if kind == 0:
        items = draw.sample(WORDS, draw.randrange(2, 6))
    elif kind == 1:
        items = [str(draw.randrange(10 ** draw.randrange(1, 6))) for _ in range(draw.randrange(2, 6))]
    else:
        items = draw.sample(NAMES, draw.randrange(2, 5))
    task = draw.randrange(4)
    order = (items, items[:1], items[-1:], items[::-1])[task]
    instruction = ("Repeat this.", "Repeat the first.", "Repeat the last.", "Repeat this backwards.")[task]
    return f"{instruction}\n\n{' '.join(items)}", draw.choice(OPENINGS) + " ".join(order)


def make_tokenizer(seed: int) -> Any:
    """A byte-level BPE with single digits, trained on lines of the mixture."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = draw_lines(seed, "tokenizer")
    texts = [f"{question}\n{answer}" for question, answer in (next(lines) for _ in range(TOKENIZER_ROWS))]
    # the data's own forms too: JSON and signs should not fall apart into bytes
    texts += [" ".join(skill.make(number)) for skill in SKILLS for number in range(0, skill.num_prompts, 997)][:2000]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    unknown, begin, end = SPECIALS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=begin, unk_token=unknown)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed: int, vocabulary: int) -> Any:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(derive_seed(seed, "small_model/weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
    )


def make_batch(lines: Sequence[Line], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (rows, longest), padded on the right; only answers carry labels (others -100)."""
    rows = []
    for question, answer in lines:
        head = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt, reply))
    longest = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for index, (prompt, reply) in enumerate(rows):
        ids[index, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[index, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    return ids, labels


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy () per labelled token; logits are computed only where there is a label."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    there = targets != -100
    return F.cross_entropy(model.lm_head(hidden[there]), targets[there])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def pretrain(model: Any, tokenizer: Any, seed: int, steps: int) -> None:
    """Train on fresh lines at every step; says the loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    lines = draw_lines(seed, "training")
    model.train()
    total, began = 0.0, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, *make_batch([next(lines) for _ in range(ROWS_PER_STEP)], tokenizer))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {total / 100:.3f}, {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
    model.eval()


@torch.no_grad()
def measure(model: Any, tokenizer: Any, seed: int, rows: int = 1024) -> float:
    """Loss on lines that were not trained on."""
    lines = draw_lines(seed, "held_out")
    batches = [[next(lines) for _ in range(ROWS_PER_STEP)] for _ in range(rows // ROWS_PER_STEP)]
    return sum(float(loss_of(model, *make_batch(batch, tokenizer))) for batch in batches) / len(batches)


def main() -> None:
    """Make the model's folder and say what it took."""
    parser = argparse.ArgumentParser(description="Pre-train the small model of the studies.")
    parser.add_argument("--folder", type=Path, default=Path("build/small_model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--threads", type=int, default=1, help="more are faster and give other last bits")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    began, cpu = time.monotonic(), time.process_time()
    tokenizer = make_tokenizer(given.seed)
    model = make_model(given.seed, len(tokenizer))
    pretrain(model, tokenizer, given.seed, given.steps)
    loss = measure(model, tokenizer, given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        tokenizer.save_pretrained(given.folder)
        model.save_pretrained(given.folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(tokenizer)} tokens, held-out loss {loss:.3f}")
    print(f"{time.monotonic() - began:.0f} s by the clock, {time.process_time() - cpu:.0f} s of processor time")
    print(f"model.safetensors {sha256_of(given.folder / 'model.safetensors')}")
    print(f"tokenizer.json {sha256_of(given.folder / 'tokenizer.json')}")


if __name__ == "__main__":
    main()
