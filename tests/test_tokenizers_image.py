"""Pictures in and out, and the image tokenizer's uint8 interface."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cm3.errors import DataError, ModelFilesError, RequestError
from cm3.tokenizers.image import ImageTokenizer, box_mask, load_image, to_square
from cm3.tokenizers.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    image_size=16,
    downsampling=4,
    base_channels=16,
    channel_multipliers=(1, 1),
    num_residual_blocks=1,
    num_codes=64,
    code_width=4,
)


@pytest.fixture
def tokenizer():
    return ImageTokenizer(VQGAN(CONFIG), batch_size=3)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_any_mode_becomes_rgb(mode):
    source = Image.fromarray(noise(6, 5, 3))
    if mode == "LAB":
        image = Image.merge("LAB", source.split())
    else:
        image = source.convert("L").convert(mode) if mode == "I;16" else source.convert(mode)
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (5, 6))


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    pixels = np.asarray(load_image(png(image)))[0]
    assert pixels[0].tolist() == [255, 0, 0] and pixels[1].tolist() == [255, 255, 255]
    assert abs(int(pixels[2, 0]) - 127) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    loaded = np.asarray(load_image(png(palette, transparency=1)))[0]
    assert loaded.tolist() == [[0, 0, 255], [255, 255, 255]]


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(png(Image.fromarray(values))))[0, :, 0].tolist() == [0, 100, 255]
    assert np.asarray(load_image(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [0, 100, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(load_image(floats))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(noise(4, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(loaded), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_broken_files_give_clear_errors(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*missing\.png: No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="cannot read"):
        load_image(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match="no picture format"):
        load_image(tmp_path / "text.png")
    with pytest.raises(DataError, match="no picture format"):
        load_image(b"")
    whole = png(Image.fromarray(noise(64, 64, 3)))
    for end in range(30, len(whole), 997):
        with pytest.raises(DataError):
            load_image(whole[:end])
    rng = np.random.default_rng(1)
    for _ in range(50):  # damaged bytes: a picture or our error, nothing else
        damaged = bytearray(whole)
        for place in rng.integers(8, 200, 6):
            damaged[place] = rng.integers(256)
        try:
            assert load_image(bytes(damaged)).mode == "RGB"
        except DataError:
            pass


def test_huge_and_empty_pictures_are_refused():
    with pytest.raises(DataError, match="1,000 allowed"):
        load_image(Image.new("L", (40, 40)), max_pixels=1000)
    with pytest.raises(DataError, match="empty"):
        load_image(Image.new("L", (0, 4)))
    bomb = bytearray(png(Image.new("1", (8, 8))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's size; Pillow itself refuses so many pixels
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="make it smaller"):
        load_image(bytes(bomb))


def test_to_square_takes_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert np.unique(np.asarray(to_square(Image.fromarray(pixels), 10))).tolist() == [200]
    assert to_square(Image.new("L", (7, 100)), 16).size == (16, 16)


def test_round_trip_in_batches(tokenizer):
    pixels_BHWC = noise(8, 16, 16, 3)
    codes_BP = tokenizer.encode(pixels_BHWC)
    assert codes_BP.dtype == np.uint16 and codes_BP.shape == (8, 16) == (8, tokenizer.codes_per_image)
    from_pictures_BP = tokenizer.encode([Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC])
    assert np.array_equal(codes_BP, from_pictures_BP)
    assert np.array_equal(tokenizer.encode(pixels_BHWC[5:6])[0], codes_BP[5])
    images = tokenizer.decode(codes_BP)
    assert len(images) == 8 and images[0].size == (16, 16) and images[0].mode == "RGB"
    single = np.asarray(tokenizer.decode(codes_BP[7:])[0], dtype=int)
    assert np.abs(single - np.asarray(images[7], dtype=int)).max() <= 1


def test_other_sizes_and_modes_are_fitted(tokenizer):
    assert tokenizer.encode([Image.new("RGBA", (50, 20)), Image.new("L", (16, 16))]).shape == (2, 16)
    assert tokenizer.encode([]).shape == (0, 16) and tokenizer.decode(np.zeros((0, 16), np.uint16)) == []


def test_wrong_input_is_refused(tokenizer):
    with pytest.raises(DataError, match="16 codes, 9 were given"):
        tokenizer.decode(np.zeros((1, 9), np.uint16))
    with pytest.raises(DataError, match="0 to 63"):
        tokenizer.decode(np.full((1, 16), 64))
    with pytest.raises(DataError, match=r"uint8 of shape \(B, 16, 16, 3\)"):
        tokenizer.encode(noise(2, 8, 8, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_save_and_load_keep_codes_and_hash(tmp_path, precision):
    tokenizer = ImageTokenizer(VQGAN(CONFIG), precision)
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash and loaded.config == CONFIG and loaded.precision == precision
    pixels_BHWC = noise(4, 16, 16, 3)
    assert np.array_equal(loaded.encode(pixels_BHWC), tokenizer.encode(pixels_BHWC))
    loaded.save(tmp_path / "again")
    assert ImageTokenizer.load(tmp_path / "again").hash == tokenizer.hash
    size = (tmp_path / "image_tokenizer.safetensors").stat().st_size
    weights = sum(tensor.numel() for tensor in tokenizer.model.state_dict().values())
    assert (size < 3 * weights + 20_000) == (precision == "bf16")


def test_hash_depends_on_weights():
    first, second = ImageTokenizer(VQGAN(CONFIG)), ImageTokenizer(VQGAN(CONFIG))
    assert first.hash != second.hash and len(first.hash) == 64


def test_bad_files_are_named(tmp_path, tokenizer):
    with pytest.raises(ModelFilesError, match="image_tokenizer.json"):
        ImageTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "image_tokenizer.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(ModelFilesError, match="format_version 99"):
        ImageTokenizer.load(tmp_path)
    path.write_text(json.dumps({**settings, "vqgan": {**settings["vqgan"], "colour": 1}}))
    with pytest.raises(ModelFilesError, match="no valid VQ-GAN configuration"):
        ImageTokenizer.load(tmp_path)
    path.write_text(json.dumps({**settings, "vqgan": {**settings["vqgan"], "code_width": 8}}))
    with pytest.raises(ModelFilesError, match="wrongly shaped"):
        ImageTokenizer.load(tmp_path)


def test_codes_do_not_depend_on_the_precision_around(tokenizer):
    pixels_BHWC = noise(4, 16, 16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        under_BP = tokenizer.encode(pixels_BHWC)
    assert np.array_equal(under_BP, tokenizer.encode(pixels_BHWC))


@pytest.mark.parametrize(
    ("box", "codes"),
    [
        ((0, 0, 64, 48), [(0, 0), (2, 3)]),
        ((16, 16, 32, 32), [(1, 1), (1, 1)]),
        ((15, 16, 33, 32), [(1, 0), (1, 2)]),
        ((63, 47, 64, 48), [(2, 3), (2, 3)]),
    ],
)
def test_a_box_masks_every_code_that_it_touches(box, codes):
    (top, left), (bottom, right) = codes
    expected = np.zeros((3, 4), dtype=bool)
    expected[top : bottom + 1, left : right + 1] = True
    assert np.array_equal(box_mask(box, (48, 64), (3, 4)), expected)


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 65, 4), (8, 8, 8, 9), (0, 9, 4, 8), (0, 0, 4, 49)])
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(RequestError, match="does not lie in the 64x48 picture; give"):
        box_mask(box, (48, 64), (3, 4))
