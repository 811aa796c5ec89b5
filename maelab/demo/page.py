"""The demo's page: a thin layer of Gradio over `maelab.demo.logic`.

Pictures go to the browser as data in the page and come back as data in events, so that no file is ever written.
"""

import base64
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
import torch
from fastapi import FastAPI
from gradio.themes import Base
from PIL import Image

from maelab.config import ValueRange
from maelab.demo import logic
from maelab.demo.guard import UPLOAD_BYTES, Guard
from maelab.demo.logic import Loaded
from maelab.errors import UsageError
from maelab.figures import to_picture
from maelab.model.masks import MaskKind
from maelab.names import visible

BOARD = 140  # pixels of a drawing's side, as board.js sends it
HERE = Path(__file__).parent
_TYPES = "image/png,image/jpeg,image/webp,image/bmp,image/gif,image/tiff,image/avif,image/heic,.npy"
# No endpoint for programs. Values come as they were sent: of a wrong one handlers say why, Gradio prints a traceback.
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
_EACH = _QUIET | {"trigger_mode": "multiple"}  # one after the other: "always_last" would repeat the first one's data
_INVITATION = '<p class="note">Draw a digit from 0 to 9, as large as you like.</p>'
_turn = itertools.count()  # makes every value of the patches a new one, so that the page draws it anew


def _url(picture: Any) -> str:
    """A picture as a data URL: an Image, uint8 (H, W), or (C, H, W) in [-1, 1]."""
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture)
        pixels = pixels if pixels.dtype == np.uint8 else np.rint(to_picture(pixels) * 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _card(title: str, picture: Any) -> str:
    image = f'<img {_sharp(picture)} alt="{escape(title)}" src="{_url(picture)}">'
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _sharp(picture: Any) -> str:
    """The attribute of an image whose pixels are to be seen."""
    return 'class="small"' * (max(np.shape(picture)) <= 128)


def _bars(title: str, rows: Iterable[tuple[str, float, str, bool]], kind: str = "") -> str:
    """Rows of (name, length from 0 to 1, what to write, whether it is the best)."""
    lines = "".join(
        f'<div class="bar{" best" * best}"><b>{escape(visible(name))}</b>'
        f'<i><u style="width:{100 * length:.1f}%"></u></i>'
        f"<span>{escape(text)}</span></div>"
        for name, length, text, best in rows
    )
    return f'<div class="bars {kind}"><h4>{escape(title)}</h4>{lines}</div>'


def _guess_bars(title: str, shares: Sequence[tuple[str, float]], kind: str = "") -> str:
    best = max(share for _, share in shares)
    return _bars(title, [(name, share, f"{share:.1%}", share == best) for name, share in shares], kind)


def _cards(*cards: str) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _problem(text: str) -> str:
    return f'<p class="problem" role="alert">{escape(visible(text))}</p>' if text else ""


def scene(chosen: Loaded, image: Image.Image, mask: torch.Tensor) -> str:
    """HTML of what one model makes of an image: an autoencoder rebuilds what the mask hides, a classifier guesses with
    and without it; and where its encoder looks.

    Args:
        chosen: the model.
        image: of any size.
        mask: (1, L) on the model's grid, 1 = hidden.
    """
    attention = _card("attention rollout", logic.look(chosen, image)) if len(chosen.model.blocks) else ""
    if not chosen.rebuilds:
        whole = _guess_bars("says of the whole image", logic.guess(chosen, image))
        return _cards(attention, whole, _guess_bars("says of what is not hidden", logic.guess(chosen, image, mask)))
    hidden, total = int(mask.sum()), mask.numel()
    text = f'<p class="note">{hidden} of {total} patches hidden ({hidden / total:.0%})</p>'
    try:
        rebuilt = logic.rebuild(chosen, image, mask)
    except UsageError as error:
        return text + _problem(str(error))
    errors = {"this model": rebuilt.masked_mse, "mean of visible pixels": rebuilt.visible_mean_mse}
    longest, best = max(*errors.values(), 1e-9), min(errors.values())
    rows = [(name, value / longest, f"{value:.4f}", value == best) for name, value in errors.items()]
    bars = _bars("mean squared error over the hidden pixels, on a scale from -1 to 1", rows, "wide")
    given = getattr(chosen.model, "norm_pix_loss", False)
    note = '<p class="note">Patches were given their true mean and deviation.</p>' * given
    pictures = _card("rebuilt", rebuilt.picture), _card("absolute error (root)", rebuilt.error)
    return text + _cards(*pictures, attention, bars) + note


def _board() -> gr.HTML:
    canvas = '<canvas width="320" height="320" aria-label="board"></canvas>'
    html = f'<div class="board">{canvas}<button>Clear</button></div>'
    return gr.HTML("", html_template=html, js_on_load=(HERE / "board.js").read_text())


def _draw_tab(chosen: Loaded, drawing: gr.State) -> None:
    """Draw a digit and watch the probabilities."""

    def answer(event: gr.EventData) -> tuple[Any, str, str]:
        try:
            ink = np.frombuffer(base64.b64decode(event.ink, validate=True), np.uint8).reshape(BOARD, BOARD)
        except (ValueError, TypeError, AttributeError):
            return None, _problem("the drawing did not arrive whole; draw again"), ""
        digit = logic.centre_drawing(ink)
        if digit is None:
            return None, _INVITATION, ""
        image = Image.fromarray(digit)
        seen = [_card("what the model sees", digit)]
        if len(chosen.model.blocks):
            seen += [_card("attention, last block", logic.look(chosen, image, "last"))]
            seen += [_card("attention rollout", logic.look(chosen, image))]
        return image, _guess_bars("probability of each digit", logic.guess(chosen, image), "big"), _cards(*seen)

    with gr.Row():
        with gr.Column(scale=0, min_width=344):
            board = _board()
        with gr.Column():
            shares = gr.HTML(_INVITATION, elem_id="shares")
    seen = gr.HTML(elem_id="seen")
    board.drawn(answer, None, [drawing, shares, seen], **_EACH)


def _read_picked(
    event: gr.EventData, examples: Sequence[Image.Image], drawing: Image.Image | None, value_range: ValueRange | None
) -> Image.Image:
    """The image that was picked. Raises UsageError."""
    sent: dict[str, Any] = event._data or {}
    index, content = sent.get("index"), sent.get("content")
    if index is not None:
        if type(index) is not int or not -1 <= index < len(examples):
            raise UsageError("there is no such image; reload the page")
        if index == -1 and drawing is None:
            raise UsageError("nothing is drawn yet: draw a digit in the first tab")
        return drawing if drawing is not None and index == -1 else examples[index]
    name = str(sent.get("name", "the file"))[:80]
    if content is None:  # sources.js sends no more than its size
        raise UsageError(f"{name} is too large: at most {UPLOAD_BYTES >> 20} MB")
    try:
        return logic.read_upload(base64.b64decode(content, validate=True), value_range)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: it did not arrive whole") from error
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def _look_tab(
    tab: str, shown: Callable[..., list[str]], grid_of: Callable[..., Loaded], choices: list[gr.Dropdown],
    examples: Sequence[Image.Image], drawing: gr.State | None, ratio: float, columns: int,
) -> None:  # fmt: skip
    """Pick an image and a mask, and see what models make of them.

    Args:
        tab: name for elements of the page.
        shown: (image, mask, *chosen names) -> HTML for each column.
        grid_of: (*chosen names) -> the model whose patches are hidden.
        choices: what says the chosen names.
        examples: to pick from.
        drawing: state that holds the drawing, if there is a board.
        ratio: of hidden patches, at first.
        columns: how many.
    """

    def patches(image: Image.Image, mask: torch.Tensor, chosen: Loaded) -> dict[str, Any]:
        rows, cols = chosen.model.grid_size
        pixels = _pixels(chosen, image)
        cells = "".join(str(int(cell)) for cell in mask[0])
        seen = {"src": _url(Image.fromarray(pixels)), "small": _sharp(pixels), "turn": next(_turn)}
        return seen | {"rows": rows, "cols": cols, "cells": cells}

    def masked(ratio: object, kind: object, seed: int, chosen: Loaded) -> torch.Tensor:
        if not isinstance(ratio, int | float) or not 0 <= ratio <= 1 or kind not in get_args(MaskKind):
            raise UsageError("there is no such mask; reload the page")
        return logic.choose_mask(kind, chosen.model.grid_size, float(ratio), seed)  # type: ignore[arg-type]

    def draw(image: Image.Image | None, ratio: float, kind: str, seed: int, *names: str) -> tuple[Any, ...]:
        if image is None:
            return (gr.skip(),) * (1 + columns)
        try:
            chosen = grid_of(*names)
            mask = masked(ratio, kind, seed, chosen)
            return patches(image, mask, chosen), *shown(image, mask, *names)
        except UsageError as error:
            return gr.skip(), _problem(str(error)), *[""] * (columns - 1)

    def pick(
        event: gr.EventData, current: Image.Image | None, drawn: Image.Image | None, ratio: float, kind: str, seed: int,
        *names: str,
    ) -> tuple[Any, ...]:  # fmt: skip
        try:
            image = _read_picked(event, examples, drawn, grid_of(*names).spec.reading.value_range)
        except UsageError as error:
            return current, _problem(str(error)), *(gr.skip(),) * (1 + columns)
        return image, "", *draw(image, ratio, kind, seed, *names)

    def toggle(event: gr.EventData, image: Image.Image | None, *names: str) -> list[Any]:
        if image is None:
            return [gr.skip()] * columns
        try:
            mask = logic.parse_mask((event._data or {}).get("mask"), grid_of(*names).model.num_patches)
            return shown(image, mask, *names)
        except UsageError as error:
            return [_problem(str(error)), *[""] * (columns - 1)]

    first = examples[0] if examples else None
    image = gr.State(first, time_to_live=3600)
    names = [str(choice.value) for choice in choices]
    start = draw(first, ratio, "random", 0, *names) if first else (None, *[""] * columns)
    with gr.Row():
        with gr.Column(scale=0, min_width=344):
            thumbs = "".join(
                f'<button data-index="{i}" aria-label="example {i + 1}"><img alt="" src="{_url(example)}"></button>'
                for i, example in enumerate(examples)
            )
            board = '<button data-index="-1">Take the drawing</button>' if drawing else ""
            upload = f'<label>Upload an image<input type="file" accept="{_TYPES}"></label>'
            ways = f'<div class="ways">{board}{upload}</div>'
            html = f'<div class="sources"><div class="thumbs">{thumbs}</div>{ways}</div>'
            sources = gr.HTML(
                "", html_template=html, js_on_load=(HERE / "sources.js").read_text(), limit=UPLOAD_BYTES,
                elem_id=f"{tab}-sources",
            )  # fmt: skip
            problem = gr.HTML(elem_id=f"{tab}-problem")
            picker = gr.HTML(
                start[0], html_template=_PATCHES, js_on_load=(HERE / "patches.js").read_text(), elem_id=f"{tab}-patches"
            )
            slider = gr.Slider(0.05, 0.95, ratio, step=0.05, label="share of hidden patches", elem_id=f"{tab}-ratio")
            kind = gr.Radio(list(get_args(MaskKind)), value="random", label="which", elem_id=f"{tab}-kind")
            seed = gr.State(0)
            another = gr.Button("Another mask", size="sm")
        with gr.Column(), gr.Row():
            outputs = []
            for column in range(columns):
                with gr.Column(min_width=230):
                    if columns > 1:
                        choices[column].render()
                    outputs.append(gr.HTML(start[1 + column], elem_id=f"{tab}-result-{column}"))
    settings = [slider, kind, seed, *choices]
    drawn = drawing or gr.State(None)
    sources.picked(pick, [image, drawn, *settings], [image, problem, picker, *outputs], **_QUIET)
    picker.toggled(toggle, [image, *choices], outputs, **_EACH)
    for moved in (slider.change, kind.change, seed.change, *(choice.change for choice in choices)):
        moved(draw, [image, *settings], [picker, *outputs], **_QUIET, trigger_mode="always_last")
    another.click(lambda seed: seed + 1, seed, seed, **_QUIET)


def _pixels(chosen: Loaded, image: Image.Image) -> np.ndarray:
    pixels = logic.fit(chosen, image)[0].permute(1, 2, 0).cpu().numpy()  # (H, W, C)
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


_PATCHES = """<div class="patches">${value ? `<p class="note">Click a patch to hide or show it.</p><div>
<img ${value.small} alt="image" src="${value.src}">
<div class="cells" style="grid-template: repeat(${value.rows}, 1fr) / repeat(${value.cols}, 1fr)">${
  [...value.cells].map((cell, i) =>
    `<button aria-label="patch ${i + 1}" aria-pressed="${cell === '1'}"></button>`).join("")
}</div></div>` : '<p class="note">Pick or upload an image.</p>'}</div>"""


def build(models: Sequence[Loaded], examples: Sequence[Image.Image]) -> gr.Blocks:
    """The page for these models: a tab to draw on for the first classifier of digits, one to look inside the first
    autoencoder and the first classifier, and with two models or more, one to compare two of them."""
    by_name = {chosen.name: chosen for chosen in models}
    digits = next((chosen for chosen in models if chosen.reads_digits), None)
    inside = [next((m for m in models if m.rebuilds is rebuilds), None) for rebuilds in (True, False)]
    inside = [chosen for chosen in inside if chosen is not None]
    ratio = inside[0].spec.mask_ratio or 0.75 if inside[0].rebuilds else 0.5

    def scenes(image: Image.Image, mask: torch.Tensor, grid: tuple[int, int], shown: Iterable[Loaded]) -> list[str]:
        return [scene(chosen, image, logic.move_mask(mask, grid, chosen.model.grid_size)) for chosen in shown]

    def look(image: Image.Image, mask: torch.Tensor) -> list[str]:
        parts = scenes(image, mask, inside[0].model.grid_size, inside)
        titles = [f"<h3>{escape(chosen.name)}</h3>" for chosen in inside]
        return ["".join(title + part for title, part in zip(titles, parts, strict=True))]

    def named(name: str, *_: str) -> Loaded:
        if name not in by_name:
            raise UsageError("there is no such model; reload the page")
        return by_name[name]

    def compare(image: Image.Image, mask: torch.Tensor, *names: str) -> list[str]:
        return scenes(image, mask, named(*names).model.grid_size, map(named, names))

    with gr.Blocks(title="maelab demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h2>maelab demo</h2>")
        drawing = gr.State(None, time_to_live=3600) if digits else None
        with gr.Tabs():
            if digits and drawing:
                with gr.Tab("Draw a digit"):
                    _draw_tab(digits, drawing)
            with gr.Tab("Hide and rebuild" if inside[0].rebuilds else "Look inside"):
                _look_tab("look", look, lambda *_: inside[0], [], examples, drawing, ratio, 1)
            if len(models) > 1:
                with gr.Tab("Compare"):
                    choices = [
                        gr.Dropdown(list(by_name), value=name, label=f"model {letter}", render=False)
                        for letter, name in zip("AB", by_name, strict=False)
                    ]
                    _look_tab("compare", compare, named, choices, examples, drawing, ratio, 2)
    return page


def app(page: gr.Blocks, host: str, address: str) -> Guard:
    """The page as a web application that answers to its own page and hands out nothing else.

    Args:
        page: what `build` made.
        host: as the server was told, a name or an address.
        address: that the server listens on.
    """
    theme = Base(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    server = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="/", footer_links=[], run_history=False, show_error=False,
        max_file_size=UPLOAD_BYTES, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, theme=theme,
        css=(HERE / "page.css").read_text(),
    )  # fmt: skip
    page.has_launched = True  # until then, Gradio takes any path for a file of its own
    return Guard(server, {number: len(event.inputs) for number, event in page.fns.items()}, host, address)
