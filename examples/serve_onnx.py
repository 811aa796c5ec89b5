"""Classify images with what `maelab export RUN --format onnx` wrote: numpy, pillow and onnxruntime are all it needs.

usage: python serve_onnx.py MODEL.onnx IMAGE...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map  # other tools may have added to it
names, prepare = json.loads(about["class_names"]), json.loads(about["preprocessing"])


def pixels(path: str) -> np.ndarray:
    """An image file as the model takes it: float32 (C, H, W) in [-1, 1]."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("L" if prepare["channels"] == 1 else "RGB")
    image = ImageOps.fit(image, (prepare["width"], prepare["height"]), Image.Resampling.BICUBIC)
    array = np.asarray(image, np.float32).reshape(prepare["height"], prepare["width"], prepare["channels"])
    return array.transpose(2, 0, 1) / 127.5 - 1


logits = np.asarray(session.run(["logits"], {"images": np.stack([pixels(path) for path in images])})[0])
odds = np.exp(logits - logits.max(axis=1, keepdims=True))  # (N, classes)
for path, row in zip(images, odds / odds.sum(axis=1, keepdims=True), strict=True):
    print(f"{path}\t{names[row.argmax()]}\t{row.max():.4f}")
