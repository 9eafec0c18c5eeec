"""Configuration of the `loss` stage."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import flag, place_of_base
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, Subjects, WhichRound


class LossConfig(ReadingConfig):
    """Measure the loss of the base model, the global adapter or a client's on a file of rows, without training.

    The loss is the mean cross-entropy per response token, with its 95 % interval. For rows with a list `choices`, the
    result also says how often the right one is the most probable. Base model, prompt template and cutoff are those of
    the run.
    """

    exp_name: str = flag("fedavg-1B", "run whose adapters are measured", everyday=True)
    of_subjects: Subjects = flag(None, f"whose loss: {WORDS}", everyday=True, if_none="base,global")
    communication_rounds: WhichRound = flag(
        None, f"round whose adapters are measured: {ROUNDS}", everyday=True, if_none="the run's last"
    )
    test_file_path: Path = flag(
        Path("./data/dataset1/dolly_test_200.jsonl"), "rows with the reference answers", everyday=True
    )
    base_model: str = place_of_base(everyday=True)
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    evaluation_dir: Path = flag(
        Path("./evaluations_rouge"), "root folder of the results, beside those of score", everyday=True
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", everyday=True)
    base_dtype: Precision = flag(
        "auto", "number type of the frozen base model; auto: bfloat16 where the device multiplies it fast"
    )
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")

    @property
    def words(self) -> tuple[str, ...]:
        """Whose loss is measured."""
        return self.of_subjects or ("base", "global")
