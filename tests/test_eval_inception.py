"""The FID network and its three ways of reading pictures, and what is said where its weights are missing.

How the fixtures were made: `FeatureExtractorInceptionV3` of torch-fidelity (commit 5e211a9) with the weights of
`pseudo_weights`, its resizing, and clean-fid 0.1.35's `build_resizer` ("clean", "legacy_pytorch"), all on `PICTURE`.
The two networks agreed to 1e-6 on every feature. The real weights cannot be had offline; a file of the right hash is
the only one that `open_inception` takes.
"""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from cm3.data.sources import SourceConfig
from cm3.errors import ModelFilesError
from cm3.eval import inception
from cm3.eval.document_tasks import PairSet
from cm3.eval.frechet_task import FrechetDistance, InceptionConfig
from cm3.eval.inception import Inception, InceptionFeatures, network_input, open_inception
from cm3.pipeline import CM3

Y, X = np.mgrid[:40, :56]
PICTURE = Image.fromarray(
    np.stack([(X * 11 + Y * 7) % 256, (X * Y * 3) % 256, (255 - X * 4 - Y) % 256], -1).astype(np.uint8)
)

PLACES = [(0, 0), (0, 298), (298, 0), (298, 298), (149, 150), (37, 211)]  # row and column, of the green channel
INPUTS = {
    "clean-fid": ([-0.99967510, -1.0, -1.0, -0.96496153, -0.52731156, 0.09863055], -0.029839425845),
    "pytorch-fid": ([-1.0, -1.0, -1.0, -0.72549021, -0.34347987, 0.11132348], -0.026280498772),
    "torch-fidelity": ([-1.0, -1.0, -1.0, -0.72656250, 0.12485242, -0.31506884], -0.028562072951),
}
FEATURES = [  # every 128th
    *(0.130421042, 0.547058642, 1.607940316, 0.0, 0.040437035, 0.551674962, 1.237169385, 0.007890849),
    *(0.017286485, 0.960901856, 0.918740392, 1.037337899, 0.191068307, 0.305390626, 0.212199762, 0.0),
]
FEATURES_MEAN = 0.39362120628


def pseudo_weights(network: Inception) -> dict[str, torch.Tensor]:
    """Weights by a formula, of a size that keeps every layer alive."""
    weights = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = sorted(name for name in shapes if not name.endswith("num_batches_tracked"))
    for number, name in enumerate(names):
        wave = np.sin(np.arange(np.prod(shapes[name]), dtype=np.float64) * 12.9898 + number) * 43758.5453
        noise = 2 * (wave - np.floor(wave)) - 1
        if name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.2 * noise
        elif name.endswith(("running_mean", "bn.bias")):
            values = 0.05 * noise
        else:
            values = noise * np.sqrt(6 / np.prod(shapes[name][1:]))
        weights[name] = torch.from_numpy(values.astype(np.float32).reshape(shapes[name]))
    return weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file as its authors wrote theirs: with the classifier, without counters of batches."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(
        {**pseudo_weights(Inception()), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path
    )
    return path


@pytest.fixture
def accepted(weights_file, monkeypatch):
    """The file, with its own hash in the place of the one that is wanted."""
    monkeypatch.setattr(inception, "WEIGHTS_HASH", hashlib.sha256(weights_file.read_bytes()).hexdigest()[:8])
    return weights_file


@pytest.mark.parametrize("convention", INPUTS)
def test_pictures_reach_the_network_as_in_the_named_library(convention):
    image_CHW = network_input(PICTURE, convention)
    values, mean = INPUTS[convention]
    assert image_CHW.shape == (3, 299, 299) and image_CHW.dtype == torch.float32
    assert [image_CHW[1, row, column].item() for row, column in PLACES] == pytest.approx(values, abs=1e-6)
    assert image_CHW.double().mean().item() == pytest.approx(mean, abs=1e-7)


def test_features_agree_with_torch_fidelity(accepted):
    features_NF = open_inception(accepted, "torch-fidelity", "cpu").encode_images([PICTURE])
    assert features_NF.shape == (1, 2048) and features_NF.dtype == np.float32
    assert features_NF[0, ::128] == pytest.approx(FEATURES, abs=1e-4)
    assert features_NF.mean() == pytest.approx(FEATURES_MEAN, abs=1e-5)


def test_missing_weights_say_what_to_fetch_and_what_else_there_is(tmp_path):
    with pytest.raises(ModelFilesError) as raised:
        open_inception(tmp_path / "nowhere.pth", "clean-fid")
    for part in (
        "no weights at",
        "pt_inception-2015-12-05-6726825d.pth",
        "github.com/mseitzer/pytorch-fid",
        "on our own encoder (inception: null)",
        "is no FID",
    ):
        assert part in str(raised.value)


def test_other_weights_give_no_fid(weights_file):
    with pytest.raises(ModelFilesError, match="weights with 6726825d: features of other weights give no FID"):
        open_inception(weights_file, "pytorch-fid")


def test_damaged_or_strange_weights_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    path.write_bytes(b"no tensors")
    monkeypatch.setattr(inception, "WEIGHTS_HASH", "")
    with pytest.raises(ModelFilesError, match="cannot read .*fetch it again"):
        open_inception(path, "pytorch-fid")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelFilesError, match="do not fit Inception; missing:"):
        open_inception(path, "pytorch-fid")


def test_the_task_names_the_convention_in_figure_and_record(accepted, model_folder, tmp_path, monkeypatch):
    for number in range(3):
        PICTURE.rotate(90 * number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a red circle")
    calls = []

    def encode(self, images):  # the network was tested above and takes seconds
        calls.append(len(images))
        return np.stack([np.asarray(image, dtype=np.float32).mean(0).ravel()[:9] / 255 for image in images])

    monkeypatch.setattr(InceptionFeatures, "encode_images", encode)
    task = FrechetDistance(
        pairs=PairSet(source=SourceConfig(kind="folder", path=str(tmp_path))),
        inception=InceptionConfig(weights=str(accepted), convention="clean-fid"),
        guidance_scales=(1.0,),
    )
    result = task.run(CM3.from_pretrained(model_folder, device="cpu"))
    assert calls == [3, 3]
    assert {"FID (clean-fid), guidance 1", "KID (clean-fid), guidance 1"} < set(result.metrics)
    said = result.protocol["metrics"]["FID and KID"]
    assert "clean-fid" in said and hashlib.sha256(accepted.read_bytes()).hexdigest() in said
