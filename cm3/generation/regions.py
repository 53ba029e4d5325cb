"""Regions: the inside of a box of a picture drawn anew, every pixel outside of it left as it is."""

from collections.abc import Mapping
from typing import Any

from PIL import Image as PILImage

from cm3.errors import RequestError
from cm3.generation.settings import check_negative
from cm3.generation.trained import Picture, TrainedModel
from cm3.tokenizers.image import box_mask, central_square, load_image, to_square


def infill(
    model: TrainedModel,
    image: Picture,
    *,
    box: tuple[int, int, int, int],
    prompt: str,
    negative: str,
    seed: int,
    sampling: Mapping[str, Any],
) -> PILImage.Image:
    """The picture with the box drawn anew; arguments as in `CM3.infill`."""
    settings = model.sampling(sampling)
    check_negative(negative, settings)
    original = load_image(image)
    left, top, side = _square_around(original, box)
    size = model.image_size
    inner = (  # rounded outwards, in integers: a float could round past the picture
        (box[0] - left) * size // side,
        (box[1] - top) * size // side,
        -((left - box[2]) * size // side),
        -((top - box[3]) * size // side),
    )
    codes_HW = model.encode([to_square(original, size)])[0]
    mask_HW = box_mask(inner, (size, size), model.tokenizer.image.grid)
    request = model.prompts.infill_image(
        codes_HW, mask_HW, model.pieces(prompt), negative=model.pieces(negative), seeds=(seed,)
    )
    new_ids = model.engine.run([request], settings)[0][0]
    filled_HW = model.prompts.filled(codes_HW, mask_HW, new_ids)
    drawn = model.tokenizer.image.decode(filled_HW.reshape(1, -1))[0]
    drawn = drawn.resize((side, side), PILImage.Resampling.LANCZOS)
    result = original.copy()
    result.paste(drawn.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top)), box[:2])
    return result


def _square_around(image: PILImage.Image, box: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Left, top and side of the picture's central square; raises RequestError unless it holds the box."""
    left, top, side = central_square(image)
    if not (left <= box[0] < box[2] <= left + side and top <= box[1] < box[3] <= top + side):
        raise RequestError(
            f"box {','.join(map(str, box))} does not lie in the central square of the {image.width}x{image.height} "
            f"picture; give LEFT,TOP,RIGHT,BOTTOM with {left} <= LEFT < RIGHT <= {left + side} and "
            f"{top} <= TOP < BOTTOM <= {top + side}"
        )
    return left, top, side
