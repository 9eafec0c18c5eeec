"""A comparison as Markdown, as plain text for a terminal, and its plan before anything runs.

Numbers are means over seeds with their interval; a metric that no row has is no column, one that a row lacks is `-`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fedlora.comparing.row_gains import LOSS, OWN_ROWS, read_gains
from fedlora.comparing.silo_text import OWN, own_losses_parts, silo_intro, silo_plan
from fedlora.comparing.tables import MARK, METRICS
from fedlora.console import duration
from fedlora.methods.table import BASELINES
from fedlora.plain_text import NOTHING, counted, size_text, table_text
from fedlora.reporting.markdown import escape, gains_counts, gains_tables, markdown_table

Result = Mapping[str, Any]
COUNTED = ("num_steps", "num_tokens")
OWN_SHARE = 0.1
"""From this share of its rows on a category counts as a client's own."""

DEFINITIONS = """\
- **held-out loss, all**: the plain mean over all categories, or over the clients whose rows they are (and over the
  clients' adapters, where each has one).
- **worst client**: the largest own loss of a client.
- **difference**: own loss less that of the first method, seed by seed; below zero is better than it.
- **[low, high]**: 95 % interval of the mean over seeds, by Student's t. It takes runs of different seeds for draws from
  one normal distribution, and says nothing about the choice of data.
- **steps, tokens, bytes, seconds**: as measured, all clients and rounds together; bytes are tensors as they travel
  (in `pooled` rows would travel, which are not counted), seconds are those of the rounds.
- **aggregation error**: what the mean of the factors misses of the mean of the products, relative; mean over rounds."""


def table_of(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the main table."""
    names = shown_metrics(result)
    has_settings = any(result["settings"])
    heads = [*(["setting"] if has_settings else []), "method", "lr", "n", "rounds"]
    heads += ["difference" if name == "difference" else METRICS[name] for name in names]
    rows = []
    for row in result["rows"]:
        n = max((metric["n"] for metric in row["metrics"].values()), default=0)
        rate = NOTHING if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        rounds = "-".join(map(str, sorted({min(row["rounds"]), max(row["rounds"])}))) if row["rounds"] else NOTHING
        cells = [*([row["setting"]] if has_settings else []), row["label"], rate, str(n), rounds]
        cells += [cell_text(name, row["metrics"].get(name)) for name in names]
        if row["tuned_privately"] and "epsilon" in names:
            cells[heads.index(METRICS["epsilon"])] += MARK
        rows.append(cells)
    return heads, rows


def shown_metrics(result: Result) -> list[str]:
    """The metrics that have columns: the last ones of the main table."""
    names = [name for name in METRICS if any(name in row["metrics"] for row in result["rows"])]
    if any("difference" in row["metrics"] for row in result["rows"]):
        names.insert(1, "difference")
    return names


def cell_text(name: str, metric: Mapping[str, Any] | None) -> str:
    """A mean, with its interval where it is a score."""
    if metric is None:
        return NOTHING
    if name in COUNTED:
        return f"{metric['mean']:,.0f}"
    if name.startswith("bytes"):
        return size_text(round(metric["mean"]))
    if name == "seconds":
        return f"{metric['mean']:,.1f}"
    form = ".2e" if name == "aggregation_error" and abs(metric["mean"]) < 1e-3 else ".3f"
    if name == "difference":
        form = f"+{form}"
    mean = format(metric["mean"], form)
    return mean if metric["low"] is None else f"{mean} [{metric['low']:{form}}, {metric['high']:{form}}]"


def comparison_parts(result: Result) -> list[str]:
    """The main table and the remarks, as text."""
    return [table_text(*table_of(result)), *own_losses_parts(result), *(f"note: {text}" for text in result["remarks"])]


def comparison_markdown(result: Result, *, figures: Collection[str]) -> str:
    """The whole result as a page; `figures` are the pictures beside it."""
    parts = [f"# Comparison: {escape(result['name'])}", comparison_intro(result), markdown_table(*table_of(result))]
    if result["remarks"]:
        parts.append("\n".join(f"- {escape(text)}" for text in result["remarks"]))
    parts += [f"![{escape(name)}]({name})" for name in figures]
    if result["clients"]:
        parts += ["## Who gains from joining", _CLIENTS]
        parts += [part for table in result["clients"] for part in _client_parts(table)]
    for one in result.get(OWN_ROWS, []):
        gains = read_gains(one["clients"])
        parts.append("## Who gains on its own test rows" + (f", {escape(one['setting'])}" if one["setting"] else ""))
        parts += [gains_counts(gains), ROW_INTERVALS, *gains_tables(gains, [LOSS])]
    if result["curves"]:
        parts += ["## What is forgotten on the way", CURVES, _curve_table(result["curves"])]
    if result["sweeps"]:
        parts += ["## Learning rates", SWEEPS, _sweep_table(result["sweeps"])]
    parts += ["## What the columns mean", definitions(result)]
    return "\n\n".join(parts) + "\n"


def definitions(result: Result) -> str:
    """What the columns of the main table mean."""
    own = OWN[result["silos"]["grouped_by"] if "silos" in result else "category"]
    return f"- **held-out loss, own**: {own}\n{DEFINITIONS}"


_CLIENTS = (
    "Held-out loss on each client's own kind of rows. In brackets: how much lower it is than under the client's own "
    "training alone (`none`); above zero the client gains from joining. Client by category for every method is in "
    "comparison.json (`less_than_alone`)."
)
ROW_INTERVALS = (
    "Losses per response token, means over seeds; models are paired row by row within a seed. Intervals cover the "
    "choice of the test rows and, of several seeds, the luck of training too; of one seed they cover the rows alone. "
    "With fewer than about 20 rows an interval is too narrow."
)
CURVES = (
    "Loss of the global adapter on every client's kind of rows after every hop (`seq`) or round. *Forgotten*: the last "
    "loss less the best one on the way, mean over clients and seeds. *Swing*: the largest less the smallest loss "
    "inside a round, mean over clients and the rounds of the second half; 0 where a round is one point."
)
SWEEPS = "Own loss on the validation rows, which are no test rows; **bold** is what was chosen."


def comparison_intro(result: Result) -> str:
    """What every run had, and what is measured on which rows."""
    experiment = result["experiment"]
    unit = "steps" if experiment["budget_steps"] is not None else "tokens"
    seeds = ", ".join(map(str, experiment["seeds"]))
    return (
        f"Budget of every run: {experiment[f'budget_{unit}']:,} {unit}, all clients together. Seeds {seeds}; each "
        "draws data, untrained adapter, cohorts and order of rows, alike for every method. Means over seeds with 95 % "
        f"t intervals; {silo_intro(result['silos']) if 'silos' in result else _held_out(experiment)}"
    )


def _held_out(experiment: Mapping[str, Any]) -> str:
    if share := experiment.get("test_share"):
        return (
            f"{share:.0%} of the rows of every category are held out: learning rates were chosen on at most "
            f"{experiment['validation_per_cat']} of them per category and at most half, everything here is measured on "
            "the others."
        )
    return (
        f"learning rates were chosen on {counted(experiment['validation_per_cat'], 'validation row')} per "
        f"category, everything "
        f"here is measured on {counted(experiment['test_per_cat'], 'other row')} per category."
    )


def _client_parts(table: Mapping[str, Any]) -> Iterable[str]:
    methods = table["methods"]
    if table["setting"]:
        yield f"### {escape(table['setting'])}"
    heads = ["client", *methods]
    rows = []
    if table["same_clients"]:
        for client in methods["base"]["own"]:
            rows.append([client_head(table, client), *(_client_cell(one, client) for one in methods.values())])
    gain = [f"{_mean(m['clients_that_gain']):.1f} of {m['clients']}" for m in methods.values()]
    rows.append(["clients that gain", *gain])
    yield markdown_table(heads, rows)
    federated = [name for name in methods if name not in ("base", *BASELINES)]
    if table["same_clients"] and federated:
        yield _category_parts(table, federated[0])


def client_head(table: Mapping[str, Any], client: str) -> str:
    """A client's name, or its number and its largest categories."""
    if name := table.get("names", {}).get(client):
        return name
    mix = sorted(table["shares"][client].items(), key=lambda item: (-item[1], item[0]))
    return f"{client}: " + ", ".join(name for name, _ in mix[:2]) + (" ..." if len(mix) > 2 else "")


def _category_parts(table: Mapping[str, Any], method: str) -> str:
    """Client by category: what the first method makes of each category, against the client alone."""
    cells = table["methods"][method]["less_than_alone"]
    categories = sorted({category for line in cells.values() for category in line})
    rows = []
    for client, line in cells.items():
        texts = [f"{line[category]:+.3f}" for category in categories]
        own = [table["shares"][client].get(category, 0.0) >= OWN_SHARE for category in categories]
        name = escape(table.get("names", {}).get(client, client))
        rows.append([name, *(f"**{text}**" if mine else text for text, mine in zip(texts, own, strict=True))])
    head = (
        f"Client by {'test rows' if table.get('names') else 'category'}: loss under {escape(method)} less that of the "
        f"client alone; below zero joining helps. Bold: at least {OWN_SHARE:.0%} of the client's rows."
    )
    return head + "\n\n" + markdown_table(["client", *map(escape, categories)], rows, escaped=True)


def _client_cell(method: Mapping[str, Any], client: str) -> str:
    if client not in method["own"]:
        return NOTHING
    return f"{method['own'][client]:.3f} ({method['gain'][client]:+.3f})"


def _curve_table(curves: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [c["setting"] or NOTHING, c["method"], f"{c['mean_forgotten']:.3f}", f"{c['swing']:.3f}", str(len(c["seeds"]))]
        for c in curves
    ]
    return markdown_table(["setting", "method", "forgotten", "swing", "n"], rows)


def _sweep_table(sweeps: Sequence[Mapping[str, Any]]) -> str:
    rates = sorted({entry["learning_rate"] for sweep in sweeps for entry in sweep["tried"]})
    rows = []
    for sweep in sweeps:
        tried = {entry["learning_rate"]: entry for entry in sweep["tried"]}
        cells = [escape(sweep["setting"] or NOTHING), escape(sweep["method"])]
        for rate in rates:
            entry = tried.get(rate)
            loss = None if entry is None else entry["loss"]
            text = NOTHING if entry is None else "failed" if loss is None else f"{loss:.3f}"
            cells.append(f"**{text}**" if rate == sweep["chosen"] else text)
        rows.append(cells)
    return markdown_table(["setting", "method", *(f"{rate:g}" for rate in rates)], rows, escaped=True)


def plan_of_runs_parts(plan: Mapping[str, Any]) -> list[str]:
    """The plan of a comparison, as text."""
    unit = "steps" if plan["config"]["budget_steps"] is not None else "tokens"
    heads = ["setting", "method", "learning rates", "rounds", unit]
    rows = [
        [
            row["setting"] or NOTHING,
            row["method"],
            " ".join(f"{rate:g}" for rate in row["learning_rates"]),
            _range(row["rounds"]),
            _range(row[unit]),
        ]
        for row in plan["rows"]
    ]
    left = plan["runs"] - plan["done"]
    budget = plan["config"][f"budget_{unit}"]
    lines: list[str] = [table_text(heads, rows)] if rows else []
    if plan.get("silos"):
        lines.append(silo_plan(plan["silos"]))
    lines += [f"no run: {one['method']} {one['setting']}: {one['reason']}" for one in plan["refused"]]
    lines.append(f"{counted(plan['runs'], 'run')} of at most {budget:,} {unit} each, {plan['done']} of them done")
    if plan["seconds_per_run"] is not None:
        each = plan["seconds_per_run"]
        lines.append(
            f"about {duration(each * left)} of training ({each:.1f} s a run, after two steps of one client); "
            "writing and scoring come on top"
        )
    return lines


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}-{max(values):,}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
