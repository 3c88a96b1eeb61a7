"""The columns of the tables that builders write, as plain data: importing this imports no library of tables.

A type is a name of datasets' (`image` for Image), a list of one type, or a dict of them.
"""

from typing import Any

Columns = dict[str, Any]

IMAGES: Columns = {
    "image": "image",  # lossless WebP; null if the model generated values that are not finite
    "pixels_sha256": "string",
    "prompt": "string",
    "prompt_id": "string",  # SHA-256 of the prompt
    "candidate": "int32",  # 0, 1, ... within the prompt
    "seed": "int64",
    "model": "string",
    "model_revision": "string",
    "model_identity": "string",
    "adapter": "string",
    "adapter_identity": "string",
    "adapter_scale": "float32",
    "num_inference_steps": "int32",
    "guidance_scale": "float32",
    "height": "int32",
    "width": "int32",
    "dtype": "string",
    "seconds": "float32",  # the image's share of its batch's time
    "invalid_reason": "string",  # why it cannot be used; empty if it can
}
CANDIDATES: Columns = {
    **IMAGES,
    "class": "string",
    "questions": ["string"],  # the rubric's names; the next five have one value for each
    "verdicts": ["string"],  # yes, no, or empty: unclear
    "log_odds": ["float32"],  # ln p(yes) / p(no)
    "empty_log_odds": ["float32"],  # of the same question about an empty image
    "other_mass": ["float32"],  # the share of the judge's next token that was neither yes nor no
    "points": ["float32"],
    "hard_score": "float32",  # the sum of the points; null if invalid
    "soft_score": "float32",  # what ranks: the judge's, or with a discriminator minus the mean of both ranks
    "judge_score": "float32",  # the sum of the points weighed by how sure the judge is
    "discriminator_score": "float32",  # the logit of 'real'; null without a discriminator
    "boxes": [
        {"label": "string", "confidence": "float32"}
        | dict.fromkeys(("left", "top", "right", "bottom"), "float32")  # pixels
    ],
    "confidence": "float32",  # of the most confident box; 0: none
    "rank": "int32",  # by soft score; 1 = best, equal = tie, null if invalid
    "selected": "bool",
    "not_selected_reason": "string",  # empty if selected or invalid
    "judge": "string",
    "judge_identity": "string",
    "discriminator": "string",
    "discriminator_identity": "string",
    "detector": "string",
    "detector_identity": "string",
}
SFT: Columns = {
    "prompt": "string",
    "image": "image",
    "class": "string",
    "hard_score": "float32",
    "soft_score": "float32",
    "confidence": "float32",
    "prompt_id": "string",
    "seed": "int64",
}
PAIRS: Columns = {
    "prompt": "string",
    "chosen": "image",
    "rejected": "image",
    "margin": "float32",
    "chosen_score": "float32",
    "rejected_score": "float32",
    "prompt_id": "string",
    "chosen_seed": "int64",
    "rejected_seed": "int64",
}
CONSENSUS: Columns = {
    "prompt": "string",
    "chosen": "image",  # the source's bytes
    "rejected": "image",
    "p_chosen": "float32",
    "agreement": "float32",  # the share of the judges that prefer the chosen image; a tie is half a vote
    "chosen_scores": ["float32"],  # of each judge, in the order of --judges
    "rejected_scores": ["float32"],
    "chosen_row": "int64",  # of the source
    "rejected_row": "int64",
    "prompt_id": "string",
}
RANKED: Columns = {
    "prompt": "string",
    "images": ["image"],
    "ranks": ["int32"],  # 1 = best, equal = tie
    "scores": ["float32"],
    "prompt_id": "string",
}
PICKAPIC: Columns = {
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "float32",
    "label_1": "float32",
    "caption": "string",
}


def features(columns: Columns) -> Any:
    """The columns as datasets.Features."""
    from datasets import Features, Image, List, Value

    def feature(kind: Any) -> Any:
        if isinstance(kind, list):
            return List(feature(kind[0]))
        if isinstance(kind, dict):
            return {name: feature(part) for name, part in kind.items()}
        return Image() if kind == "image" else Value(kind)

    return Features({name: feature(kind) for name, kind in columns.items()})
