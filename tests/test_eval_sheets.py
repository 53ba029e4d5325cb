"""Sheets: which documents stand on them, and what each row shows."""

from PIL import Image

from cm3.eval import sheets


class Recorder:
    """Stands in for a model; the sheet needs round trips and captions only."""

    def reconstruct(self, images):
        self.seen = images
        return images

    def caption(self, images, *, temperature):
        assert temperature == 0.0
        return [f"shade {image.getpixel((0, 0))[0]}" for image in images]


def test_rows_are_spread_over_the_set_and_pictures_stand_beside_their_own_original(monkeypatch):
    rows = []
    monkeypatch.setattr(sheets, "contact_sheet", lambda found: rows.extend(found) or Image.new("RGB", (1, 1)))
    originals = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(15)]
    drawn = [Image.new("RGB", (4, 4), (0, shade, 0)) for shade in range(15)]
    sheets.pairs_sheet(Recorder(), [f"caption {i}" for i in range(15)], originals, {"guidance 3": drawn})
    assert [heading for heading, _, _ in rows] == [f"caption {i}" for i in (0, 2, 4, 6, 8, 10, 12, 14)]
    heading, pictures, below = rows[3]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(6, 0, 0), (6, 0, 0), (0, 6, 0)]
    assert below == ["original, captioned: shade 6", "through the image tokenizer", "guidance 3"]


def test_a_small_set_is_shown_whole():
    originals = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]
    sheet = sheets.pairs_sheet(Recorder(), ["one", "two"], originals, {"drawn": originals})
    colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
