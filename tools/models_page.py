"""docs/models.md: what every_base.py found for each architecture."""

from __future__ import annotations

import json

from every_base import RESULTS
from python_page import escape
from reference_pages import WRITTEN

# ruff: noqa: E501 - rows of tables
HEAD = (
    WRITTEN.format("tools/every_base.json, which tools/every_base.py measures")
    + """\
# Base models

For every base model fedlora either computes the model's own results, or refuses the model with a reason. No list of names
decides this. When a base is loaded, a few tokens go through the model's own forward pass, and through each of our faster
ways to train and to answer. A way whose logits differ by more than 1e-5 of their size in float32 is off for this base.
The model's own, slower way takes its place, and one message says so. Past every length at which the configuration says
that the model computes differently (windows, chunks, original positions of long RoPE), one more row is tried. Where that
would take too long, rows of that length are answered without our cache. In bfloat16, rounding may take our results no
farther from float32 than it takes the model's own. Before training, the gradient of one adapted layer is compared with
that of a dense layer.

Of a model that reads images too (Qwen-VL, Mistral 3, LLaVA) the language model is trained and answers; its towers are
loaded and not adapted.

What was found is kept in the cache folder under the model's files, the versions of torch and transformers, device,
number type, quantization and targets. `fedlora model check NAME` tries again and prints the result:

```bash
fedlora model check smollm2-135m
```

| when | what takes the place of the faster way |
| --- | --- |
| our cache would change an answer | transformers' own cache and `generate()`, with our choice of tokens |
| padding would change an answer or a loss | prompts or rows of one length share a batch; where that changes them too, one |
| a shared prefix would | each row has its own |
| our attention would, or the model passes an option that ours does not know | the model's attention |
| logits are more than the output layer (scale, soft cap, a head of several layers) | the model's own code after its decoder, on the labelled positions only |
| a row's positions depend on the rows before it (dynamic RoPE) | rows past the original length are refused |
| a token's logits depend on later tokens (BERT, XLNet), or an encoder reads first (BART, T5) | the base is refused |

"""
)
TABLE = """\
## Architectures that were tried

{count} architectures of transformers {version}, each with two layers of width 32 and random weights, in float32 on a
CPU. `make test-thorough` tries them again. Greedy answers to one row, to three, to seven, and to seven with one
beginning are those of transformers' `generate()` for each row alone. Loss, and gradients of all factors with
`all-linear`, with and without checkpointing, are those of dense weights `W + s B A`. {refused} are refused.

"""
COLUMNS = ("answers", "prompts of a batch", "rows of a pass", "shared prefix", "logits", "checkpointing", "int8")


def make_models() -> str:
    """The page."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    results = kept["results"]
    refused = {name: found["refused"] for name, found in results.items() if "refused" in found}
    right = {name: found for name, found in results.items() if name not in refused}
    head = TABLE.format(count=len(results), version=kept["transformers"], refused=len(refused))
    rows = [
        (f"`{name}`", *(found[column].partition(":")[0] for column in COLUMNS), layers_of(found["all-linear"]))
        for name, found in right.items()
    ]
    reasons = [(f"`{name}`", escape(reason)) for name, reason in refused.items()]
    return (
        f"{HEAD}{head}{table_of(('architecture', *COLUMNS, 'all-linear'), rows)}\n"
        f"### Refused\n\n{table_of(('architecture', 'reason'), reasons)}"
    )


def layers_of(text: str) -> str:
    """The number of adapted layers, and whether others are left out."""
    count, _, rest = text.partition(";")
    return f"{count}, others left out" if rest else count


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
