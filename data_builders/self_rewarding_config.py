"""The options of the self-rewarding builder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from data_builders.config import DrawingConfig, at_least, there
from data_builders.selection import PairRule
from prefopt.judges.rubric import Rubric
from prefopt.records import InputError

ExportName = Literal["sft", "pairs", "ranked", "pickapic", "imagefolder"]
NONE = "none"


@dataclass
class SelfRewardingConfig(DrawingConfig):
    """Classes, prompts, judge, detector, selection; and, inherited, who draws."""

    classes: list[str] = field(
        default_factory=lambda: ["elephant", "giraffe"], metadata={"help": "What the images are to show."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Text file, one prompt a line, each naming one class (default: written)."},
    )
    prompts_per_class: int = field(default=100, metadata={"help": "Prompts to write."})
    held_out_per_class: int = field(default=25, metadata={"help": "Prompts to write and keep apart."})
    writer_model_name_or_path: str = field(
        default="pocket", metadata={"help": "LLM that writes: a folder, a hub id or pocket."}
    )
    writer_revision: str | None = field(default=None, metadata={"help": "Revision of that LLM on the hub."})
    writer_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that serves the LLM."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Text file for the LLM's system prompt."}
    )
    request_template: str | None = field(
        default=None, metadata={"help": "Text file for the request, with {count} and {class}."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Of the LLM's sampling."})
    top_p: float = field(default=0.95, metadata={"help": "Of the LLM's sampling."})

    candidates: int = field(default=10, metadata={"help": "Images per prompt."})
    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Several drawers that take turns, each quoted: `model steps=4 adapter=folder scale=0.4`."
        },
    )

    judge_model_name_or_path: str = field(
        default="pocket",
        metadata={"help": "Folder, hub id or pocket: a VLM, or for --rubric reward a reward model."},
    )
    judge_revision: str | None = field(default=None, metadata={"help": "Revision of the judge on the hub."})
    judge_url: str | None = field(
        default=None, metadata={"help": "Endpoint that serves the judge: /v1/systemone or OpenAI-compatible."}
    )
    judge_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the judge."}
    )
    judge_batch_size: int = field(default=16, metadata={"help": "Images judged at once."})
    rubric: str = field(
        default="class_conditional", metadata={"help": "The questions: a YAML file, or one of ours by name."}
    )
    calibrate: bool = field(
        default=True, metadata={"help": "Subtract what the judge answers about an empty image."}
    )

    detector: str = field(
        default="pocket", metadata={"help": "YOLO-World folder, OWLv2 folder or hub id, pocket, or none."}
    )
    detector_revision: str | None = field(default=None, metadata={"help": "Revision of the detector."})
    detection_threshold: float = field(default=0.6, metadata={"help": "Confidence from which a box counts."})

    pair_rule: PairRule = field(
        default="best_worst", metadata={"help": "Which ranked candidates become pairs."}
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "Pairs whose soft scores differ by less are left out."}
    )
    max_pairs_per_prompt: int | None = field(default=None, metadata={"help": "The widest margins stay."})
    exports: list[str] = field(
        default_factory=lambda: ["sft", "pairs", "ranked"],
        metadata={"help": f"Tables to write: {', '.join(get_args(ExportName))}."},
    )
    gallery: bool = field(default=True, metadata={"help": "Write gallery.html."})
    keep_resident: bool = field(
        default=False, metadata={"help": "Keep all models loaded and go block by block, where memory allows."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Dataset id on the hub to upload to."})
    output_dir: str = field(default="data/self_rewarding", metadata={"help": "Where the dataset goes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "prompts_per_class", "judge_batch_size", "max_pairs_per_prompt")
        at_least(self, 0, "held_out_per_class", "min_margin", "temperature")
        # Hours of writing and drawing come before these are read.
        if not self.judge_url:
            there(self, "judge_model_name_or_path")
        there(self, "writer_model_name_or_path", "detector", "prompts")
        Rubric.load(self.rubric)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise InputError(f"--classes is {self.classes}; name one or more, each once")
        for name in ("detection_threshold", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it lies in (0, 1]")
        if unknown := [name for name in self.exports if name not in get_args(ExportName)]:
            raise InputError(
                f"--exports {unknown[0]} is unknown; known are {', '.join(get_args(ExportName))}"
            )
        if len(self.sources) > self.candidates:
            raise InputError(
                f"{len(self.sources)} --sources for {self.candidates} --candidates: some draw nothing"
            )
