"""`make demo`: draw prompts, caption what was drawn, and write one sheet to look at; with any model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm3.errors import CM3Error
from cm3.gallery import contact_sheet, save_gallery, save_image
from cm3.pipeline import CM3

PROMPTS = (
    "a large red circle left of a small blue square",
    "a small green star above a large yellow triangle on a navy background",
    "three shapes: a large purple circle, a small orange cross and a small cyan square",
)
"""Three of the scenes that the embedded model knows."""

CANDIDATES = 8
"""Of each picture; the one is kept that the model itself would caption most likely with the prompt."""


def make_demo(
    folder: Path, name: str = "demo", prompts: Sequence[str] = PROMPTS, num_images: int = 4, seed: int = 0
) -> Path:
    """Write the pictures, `settings.json` and `contact_sheet.png` into `folder`; return the sheet's path."""
    model = CM3.from_pretrained(name)
    print(f"drawing {len(prompts) * num_images} pictures, the best of {CANDIDATES} each ...", flush=True)
    start = time.monotonic()
    options: dict[str, Any] = {"best_of": CANDIDATES, "rank": "caption", "temperature": 0.5}
    drawings = model.draw(prompts, num_images=num_images, seed=seed, **options)
    images = [[drawing.image for drawing in samples] for samples in drawings]
    print(f"  {time.monotonic() - start:.1f} s; captioning them ...", flush=True)
    start = time.monotonic()
    captions = iter(model.caption([image for samples in images for image in samples]))
    print(f"  {time.monotonic() - start:.1f} s", flush=True)
    pictures = [(drawing.image, drawing.record()) for samples in drawings for drawing in samples]
    save_gallery(folder, pictures, {"model": name, "seed": seed, **model.settings(), **options})
    rows = []
    for prompt, samples in zip(prompts, images, strict=True):
        rows.append((f"prompt: {prompt}", samples, [next(captions) for _ in samples]))
        print(f"\n{prompt}")
        for caption in rows[-1][2]:
            print(f"  captioned back: {caption}")
    return save_image(folder / "contact_sheet.png", contact_sheet(rows))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    parser.add_argument("--model", default="demo", help="model folder, Hub name, or demo")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT", help="what to draw")
    args = parser.parse_args()
    try:
        sheet = make_demo(args.out, args.model, args.prompts)
    except (CM3Error, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"\nopen {sheet}")


if __name__ == "__main__":
    main()
