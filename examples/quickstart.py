"""The main job, start to end: pretrain on MNIST, look at reconstructions, fine-tune, read the test set once.

`make quickstart` runs this. A second call finds both runs complete, makes the page again and prints the summary; after
an interruption it goes on where it was. With --overwrite, runs of these names that are others are replaced.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import maelab
from maelab import recipes
from maelab.report import report

MAE, CLASSIFIER = Path("runs/quickstart-mae"), Path("runs/quickstart-classifier")
PAGE = Path("runs/quickstart.html")


def main(arguments: list[str]) -> int:
    begun, overwrite = time.perf_counter(), arguments == ["--overwrite"]
    _, mae = maelab.pretrain(
        recipes.pretrain_quickstart(), options=maelab.RunOptions(out=MAE, overwrite=overwrite), recipe="quickstart"
    )
    config = replace(recipes.finetune_quickstart(), init=str(MAE))
    _, classifier = maelab.finetune(
        config, options=maelab.RunOptions(out=CLASSIFIER, overwrite=overwrite), recipe="quickstart"
    )
    report([MAE, CLASSIFIER], out=PAGE)
    error, trivial = mae["val"]["masked_mse"], mae["mean_predictor_loss"]
    test, val = classifier["test"]["accuracy"], classifier["val"]["accuracy"]
    print(f"""
Pretrained in {mae["train_time_s"]:.0f} s: rebuilds the {mae["mask_ratio"]:.0%} of patches that it cannot see with a
mean squared error of {error:.4f} on validation, where predicting the mean image gives {trivial:.4f}.
Fine-tuned in {classifier["train_time_s"]:.0f} s: test accuracy {test:.2%} (validation {val:.2%}).

  page             {PAGE}: what happened, and how it compares
  reconstructions  {MAE}/figures/reconstructions.png
  predictions      {CLASSIFIER}/figures/predictions.png
  curves           {CLASSIFIER}/figures/curves.png
  model            {CLASSIFIER}/checkpoints/best

This call took {time.perf_counter() - begun:.0f} s. Next: .venv/bin/maelab --help, or the recipes'
own 6 + 6 epochs, for 99.4%: .venv/bin/maelab pretrain mnist""")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except maelab.MaelabError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
