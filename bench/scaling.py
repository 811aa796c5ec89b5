"""Two processes of one thread beside one process of two threads: `python bench/scaling.py`, 6 minutes of two cores.

The second epoch of each training is timed, validation and all. What came out is written to bench/scaling-DATE.json.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from maelab import recipes
from maelab.config import FinetuneConfig, PretrainConfig, RunOptions
from maelab.runs import environment_of, read_metrics
from maelab.tasks.finetune import finetune
from maelab.tasks.pretrain import pretrain

TURNS, CORES = 3, 2
CASES: dict[str, PretrainConfig | FinetuneConfig] = {
    "quickstart, pretraining": replace(recipes.pretrain_quickstart(), limit=8_960),
    "quickstart, pretraining, AdamW": replace(recipes.pretrain_quickstart(), limit=8_960, optimizer="adamw"),
    "cifar10, pretraining": replace(recipes.pretrain_cifar10(), limit=5_120),
    "cifar10, pretraining, AdamW": replace(recipes.pretrain_cifar10(), limit=5_120, optimizer="adamw"),
    "cifar10, fine-tuning": replace(recipes.finetune_cifar10(), limit=5_120),
}


def rate(config: PretrainConfig | FinetuneConfig, processes: int, folder: Path) -> float:
    """Images per second of the second epoch."""
    options = RunOptions(out=folder, device="cpu", devices=processes, threads=CORES // processes)
    if isinstance(config, PretrainConfig):
        pretrain(replace(config, epochs=2, knn_every=0), options=options)
    else:
        finetune(replace(config, epochs=2), options=options)
    first, second = (row["seconds"] for row in read_metrics(folder) if row["split"] == "train")
    assert config.limit is not None
    return config.limit * (1 - config.val_fraction) / (second - first)


def main() -> None:
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in CASES}
    where: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(TURNS):
            for number, (name, config) in enumerate(CASES.items()):
                for processes in (1, 2):
                    folder = Path(temporary) / f"{turn}-{number}-{processes}"
                    rates[name][processes].append(rate(config, processes, folder))
                    where = environment_of(folder)
    result: dict[str, Any] = {"where": {k: where[k] for k in ("maelab", "torch", "hardware", "cpu", "cpu_capability")}}
    for name, found in rates.items():
        ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
        result[name] = {
            "one_process": statistics.median(found[1]),
            "two_processes": statistics.median(found[2]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    place = Path(__file__).parent / f"scaling-{time.strftime('%Y-%m-%d')}.json"
    place.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
