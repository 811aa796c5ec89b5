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
size = (prepare["width"], prepare["height"])


def read(path: str) -> np.ndarray:
    """An image file or an array (H, W), (H, W, C) or (C, H, W) as numbers (H, W, C)."""
    if path.endswith(".npy"):
        array = np.load(path, allow_pickle=False)
        array = array[:, :, None] if array.ndim == 2 else array
        return array if array.shape[2] <= array.shape[0] else array.transpose(1, 2, 0)
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    deep = image.mode[0] in "IF"  # grey of more than 8 bits
    image = image if deep else image.convert("L" if prepare["channels"] == 1 else "RGB")
    return np.asarray(image).reshape(image.height, image.width, -1)


def pixels(path: str) -> np.ndarray:
    """An image file as the model takes it: float32 (C, H, W) in [-1, 1]."""
    array = read(path)
    if array.dtype != np.uint8:
        low, high = np.array(prepare["value_range"], float).T
        array = np.clip(np.nan_to_num((array - low) * 255 / (high - low)).round(), 0, 255).astype(np.uint8)
    if (array.shape[2], prepare["channels"]) == (1, 3):
        array = array.repeat(3, axis=2)
    bands = [Image.fromarray(array)] if array.shape[2] == 3 else [Image.fromarray(b) for b in array.transpose(2, 0, 1)]
    fit = {"crop": ImageOps.fit, "pad": ImageOps.pad, "squash": Image.Image.resize}[prepare["resize"]]
    bands = [np.asarray(fit(band, size, Image.Resampling.BICUBIC), np.float32) for band in bands]
    return (bands[0].transpose(2, 0, 1) if bands[0].ndim == 3 else np.stack(bands)) / 127.5 - 1


logits = np.asarray(session.run(["logits"], {"images": np.stack([pixels(path) for path in images])})[0])
odds = np.exp(logits - logits.max(axis=1, keepdims=True))  # (N, classes)
for path, row in zip(images, odds / odds.sum(axis=1, keepdims=True), strict=True):
    print(f"{path}\t{names[row.argmax()]}\t{row.max():.4f}")
