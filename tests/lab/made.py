"""A folder of pictures made up for the occasion: coloured shapes and letters on gradients, each with its caption."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from twinrl.backends.unet import UNet
from twinrl.data import collection
from twinrl.data.captions import ReadConfig
from twinrl.lab.fitting import Recipe
from twinrl.lab.material import Material
from twinrl.lab.pretrain import Pretraining
from twinrl.lab.recipe import Form, LabRecipe, for_pictures

COLOURS = {"red": (220, 40, 40), "green": (30, 170, 70), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "letter")
SHORT = Recipe(steps=4, batch=16, lr=1e-3, seed=1)
TINY = dataclasses.replace(
    for_pictures(32), codec=SHORT, judge=SHORT, clip=SHORT, hps=SHORT, preference_judge=SHORT,
    teacher=Pretraining(steps=4, batch=16), clip_size=(32, 1), preference_judge_size=(32, 1),
    network=UNet.Config(width=8, multipliers=(1,), attention=False),
    form=Form(codec_channels=(8, 8, 8), judge_channels=(8, 8, 8), context=8, shift=2, clusters=3),
)  # fmt: skip
"""Everything that a laboratory has, in seconds and of no use."""


def drawn(number: int, side: int = 40) -> tuple[Image.Image, str, str]:
    """Picture, caption and shape number ``number``; no two are alike."""
    draw = np.random.default_rng(number)
    colour, shape = list(COLOURS)[number % 4], SHAPES[number % 3]
    ramp = np.linspace(*draw.uniform(60, 255, 2), side)
    page = Image.fromarray(np.repeat(np.tile(ramp, (side, 1))[..., None], 3, axis=2).astype(np.uint8))
    pen, (x, y), size = ImageDraw.Draw(page), draw.uniform(2, side / 2, 2), draw.uniform(side / 4, side / 2)
    if shape == "letter":
        pen.text((x, y), chr(65 + number % 26), COLOURS[colour], font_size=size)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + size, y + size), COLOURS[colour])
    return page, f"a {colour} {shape} {'on the left' if x < side / 4 else 'on the right'}", shape


def write(folder: Path, n: int = 240) -> Path:
    """The folder with ``n`` pictures and their metadata."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for number in range(n):
            page, caption, shape = drawn(number)
            page.save(folder / f"{number}.png")
            lines.write(json.dumps({"file_name": f"{number}.png", "text": caption, "shape": shape}) + "\n")
    return folder


def material(folder: Path, label: str | None = "shape", recipe: LabRecipe = TINY, name: str = "made") -> Material:
    """As ``twinrl lab build`` reads it."""
    found = collection.collect(folder, ReadConfig(label_column=label), recipe.form.side, lambda done: None)
    collection.check(folder, found, recipe.form.context)
    return collection.material_of(folder, found, name, label)[0]
