"""Makes a newcomer's own images: ``python tests/support/newcomer.py FOLDER [--split]``.

Seven classes with a natural tail of 60 down to 2 images, of mixed sizes, grey and colour, PNG and JPEG, in folders whose names have
spaces and non-ASCII letters. A class is a shape in a colour of its own on noise, so that there is something to learn. With
``--split`` the folder has train/ and test/, without only the class folders.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COUNTS = {
    "Rotkehlchen": 60,
    "blue tit": 38,
    "Zaunkönig": 24,
    "house sparrow": 15,
    "Kormorán": 9,
    "ルリビタキ": 5,
    "Große Möwe": 2,
}
TEST_PER_CLASS = 4


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    """One image of a class: a shape on noise, of random size and place; every fourth is grey."""
    width, height = (int(n) for n in rng.integers(20, 70, 2))
    noise = rng.integers(60, 150, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in np.clip(np.array([37 * label % 256, 255 - 33 * label, 90 * label % 256]), 0, 255))
    left, top = width * rng.uniform(0.1, 0.3), height * rng.uniform(0.1, 0.3)
    box = (left, top, left + width * 0.5, top + height * 0.5)
    if label % 3 == 0:
        draw.ellipse(box, fill=colour)
    elif label % 3 == 1:
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=colour)
    return image.convert("L") if rng.random() < 0.25 else image


def make(root: Path, split: bool = False) -> None:
    """Write the images below ``root``; the same ones each time."""
    rng = np.random.default_rng(7)
    for label, (name, count) in enumerate(COUNTS.items()):
        wanted = {root / "train" / name: count, root / "test" / name: TEST_PER_CLASS} if split else {root / name: count}
        for folder, images in wanted.items():
            folder.mkdir(parents=True)
            for i in range(images):
                picture(label, rng).save(folder / f"photo {i}.{'png' if i % 2 else 'jpg'}")


if __name__ == "__main__":
    make(Path(sys.argv[1]), "--split" in sys.argv)
