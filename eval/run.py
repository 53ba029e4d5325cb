"""`cm3 eval`: run the tasks that a config names on one model, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cm3.config import STAGE_KEY, load_config, read_yaml, to_dict
from cm3.errors import ConfigError
from cm3.eval.compositional_task import CompositionalGeneration, DpgPictures, GenEvalPictures
from cm3.eval.decoding_tasks import DecodingStudy, PairDecodingStudy
from cm3.eval.document_tasks import Captioning, PictureMatching, Reconstruction
from cm3.eval.frechet_task import FrechetDistance
from cm3.eval.instruct_file_tasks import InstructionAnswers, InstructionEdits
from cm3.eval.instruct_task import SceneInstructions
from cm3.eval.likelihood import Likelihood
from cm3.eval.nlvr_box import BoxCaptioning, BoxGeneration, BoxReconstruction
from cm3.eval.report import markdown, write_report
from cm3.eval.retrieval_tasks import RetrievedLikelihood, RetrievedSceneGeneration
from cm3.eval.retrieved_pictures import RetrievedPictureMatching
from cm3.eval.scene_tasks import SceneCaptioning, SceneGeneration, SceneInfilling, SceneReconstruction
from cm3.eval.vqa_task import VisualQuestions
from cm3.model.quantized import Quantization
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """One evaluation: a model and the tasks to run on it. A task that is null is left out."""

    model: str = "demo"
    """Model folder, Hub name, or `demo`."""
    quantize: Quantization | None = None
    """int8: round the weights of all blocks to 8 bits; null keeps them as they are."""
    output: str
    """Folder for results.json and results.md."""
    scene_reconstruction: SceneReconstruction | None = None
    """Round trip of rendered scenes through the image tokenizer."""
    scene_generation: SceneGeneration | None = None
    """Pictures of held-out scene captions."""
    scene_captioning: SceneCaptioning | None = None
    """Captions of held-out scenes."""
    scene_infilling: SceneInfilling | None = None
    """Objects drawn into boxes of held-out scenes."""
    scene_instructions: SceneInstructions | None = None
    """Edits, questions, boxes, maps, letters and long captions of held-out scenes, beside baselines."""
    box_reconstruction: BoxReconstruction | None = None
    """Round trip of NLVR boxes through the image tokenizer, graded by pixels."""
    box_generation: BoxGeneration | None = None
    """Pictures of NLVR box captions, graded by pixels."""
    box_captioning: BoxCaptioning | None = None
    """Captions of NLVR boxes, graded against their objects."""
    reconstruction: Reconstruction | None = None
    """Round trip of any pictures through the image tokenizer."""
    captioning: Captioning | None = None
    """Captions of any pictures, compared with theirs."""
    picture_matching: PictureMatching | None = None
    """Whether pictures drawn from captions resemble their own originals most."""
    likelihood: Likelihood | None = None
    """Bits per image code and per byte of text on held-out documents."""
    compositional_generation: CompositionalGeneration | None = None
    """GenEval's six categories on scenes, graded by the oracle."""
    frechet: FrechetDistance | None = None
    """Distances between drawn and real pictures, and CLIPScore; FID and KID where their weights are given."""
    geneval_pictures: GenEvalPictures | None = None
    """Pictures of GenEval's prompts in its folder layout."""
    dpg_pictures: DpgPictures | None = None
    """Pictures of DPG-Bench's prompts in its folder layout."""
    instruction_answers: InstructionAnswers | None = None
    """Answers in text to the rows of a file of instruction data, beside what the questions give away."""
    instruction_edits: InstructionEdits | None = None
    """Pictures made of pictures by the rows of a file of instruction data, beside a copy of the picture given."""
    visual_questions: VisualQuestions | None = None
    """VQA accuracy on VQAv2, OK-VQA or VizWiz, or a file of answers for their servers."""
    retrieved_likelihood: RetrievedLikelihood | None = None
    """The same behind retrieved documents."""
    retrieved_scene_generation: RetrievedSceneGeneration | None = None
    """Pictures of scene captions behind retrieved documents."""
    retrieved_picture_matching: RetrievedPictureMatching | None = None
    """Whether pictures drawn behind retrieved documents resemble their own originals most."""
    decoding: DecodingStudy | None = None
    """Top-p, guidance, CD-K and their mixture, over 1, 2, 4, 8 samples a caption."""
    pair_decoding: PairDecodingStudy | None = None
    """The same on any captioned pictures."""


TASKS = tuple(field.name for field in fields(EvalRun) if field.name not in ("model", "quantize", "output"))
"""The fields of `EvalRun` that are tasks."""


def load_evaluation(config_path: str, overrides: Sequence[str] = ()) -> EvalRun:
    """Read an evaluation config.

    Raises:
        ConfigError: the config has no task, or is one of training.
    """
    stage = read_yaml(config_path).get(STAGE_KEY)
    if stage is not None:
        verb = "prepare" if stage == "prepare" else "train"
        raise ConfigError(f"{config_path} says {STAGE_KEY}: {stage}, so it is no evaluation; `cm3 {verb}` runs it")
    config = load_config(EvalRun, config_path, overrides)
    if not tasks_of(config):
        raise ConfigError(
            f"{config_path} names no task; add one of the keys of EvalRun, such as scene_generation: {{}}"
        )
    return config


def tasks_of(config: EvalRun) -> dict[str, Any]:
    """The tasks of an evaluation by their names, less those that are left out."""
    return {name: task for name in TASKS if (task := getattr(config, name))}


def evaluate(config_path: str, overrides: Sequence[str] = ()) -> str:
    """Run an evaluation config and return its table of results in Markdown.

    Raises:
        ConfigError: as `load_evaluation`.
    """
    config = load_evaluation(config_path, overrides)
    model = CM3.from_pretrained(config.model, quantize=config.quantize)
    results = []
    for task in tasks_of(config).values():
        print(f"running {type(task).__name__} ...", flush=True)
        results.append(task.run(model))
    header = {"config": to_dict(config), "model_hash": model.hash, "tokenizer_hash": model.tokenizer.hash}
    write_report(Path(config.output), results, header)
    return markdown(results)
