"""Makes a judge's folder of ImageReward's weights: convert_image_reward.py ImageReward.safetensors FOLDER

What THUDM/ImageReward publishes is a .pt, a pickle, which can run any code when it is read; nothing here
reads one. Its tensors, under the names they have there, are to be saved as safetensors first, by whoever
trusts the file or by a converter of the hub. BLIP's two projections among them, which the reward does not
use, are left out. `--tokenizer` is the one that BLIP was trained with; its files are kept in the folder, so
that nothing else is needed later.
"""

import argparse
import re
import sys
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessorPil

from prefopt.errors import InputError
from prefopt.files import replacing, reporting_write_errors, write_atomically
from prefopt.judges.image_reward import ImageRewardConfig, ImageRewardModel

HEAD_WIDTH = 64  # of each attention head, in both encoders and in every size of ViT and BERT
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
NAMES = (  # BLIP's, which its image encoder has from timm -> transformers'
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token", "visual_encoder.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "visual_encoder.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.", r"visual_encoder.encoder.layers.\1."),
    (r"^(visual_encoder\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(visual_encoder\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(visual_encoder\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; InputError for a pickle, and for what cannot be read."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no .safetensors file; save its tensors as one first, a .pt is not read")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that make the reward, float32, by the names they have in ImageRewardModel."""
    # The head's linear layers stand among dropouts: 0, 2, 4, 6, 7 of the published one.
    head = sorted({int(found[1]) for name in weights if (found := re.match(r"mlp\.layers\.(\d+)\.", name))})
    kept = {}
    for name, tensor in weights.items():
        if UNUSED.match(name):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^mlp\.layers\.(\d+)\.", lambda found: f"head.{head.index(int(found[1]))}.", name)
        kept[name] = tensor.float().contiguous()
    return kept


def described(weights: dict[str, Tensor]) -> ImageRewardConfig:
    """The config of renamed tensors, from their shapes."""
    patches = weights["visual_encoder.embeddings.patch_embedding.weight"]
    places = weights["visual_encoder.embeddings.position_embedding"].shape[1] - 1
    words = weights["text_encoder.embeddings.word_embeddings.weight"]
    vision = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=weights["visual_encoder.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, "visual_encoder.encoder.layers"),
        num_attention_heads=patches.shape[0] // HEAD_WIDTH,
        patch_size=patches.shape[-1],
        image_size=isqrt(places) * patches.shape[-1],
        layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=patches.shape[0],
        intermediate_size=weights["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(weights, "text_encoder.encoder.layer"),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=weights["text_encoder.embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        bos_token_id=None,  # nothing is generated
        eos_token_id=None,
        sep_token_id=None,
    )
    head = [weights[f"head.{layer}.weight"] for layer in range(_layers(weights, "head"))]
    return ImageRewardConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        head_sizes=[head[0].shape[1], *(layer.shape[0] for layer in head)],
    )


def _layers(weights: dict[str, Tensor], within: str) -> int:
    return len({name.removeprefix(f"{within}.").split(".")[0] for name in weights if name.startswith(within)})


def convert(source: Path, folder: Path, tokenizer_name: str) -> None:
    """Write `folder`; InputError if the tensors are not an ImageReward's, or the tokenizer is another's."""
    weights = renamed(read(source))
    try:
        config: Any = described(weights)
        with torch.device("meta"):
            ImageRewardModel(config).load_state_dict(weights, assign=True)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise InputError(f"the tensors of {source} are not those of an ImageReward: {error}") from error
    try:
        tokenizer = BertTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {tokenizer_name} cannot be read: {error}") from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer_name} knows {len(tokenizer)} words, {source} has embeddings for "
            f"{config.text_config.vocab_size}; name the tokenizer it was trained with"
        )
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
    )
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        with replacing(folder / "model.safetensors") as path:
            save_file(weights, path, metadata={"format": "pt"})
        write_atomically(folder / "config.json", config.to_json_string())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tokenizer", default="google-bert/bert-base-uncased", help="folder or hub id (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        convert(options.source, options.folder, options.tokenizer)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
