"""Every diffusion model behind one face: clean latents, a draw and a conditioning go in, scores come out.

A score is minus the denoising error: the mean over C, H, W of the squared difference to the target. Noise,
noised latents and targets are float32 and are cast once, at the model's input; the error is reduced in
float32.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.adapters import POLICY, REFERENCE, adapter_layers
from prefopt.diffusion.sampling import ADAPTER_FILE, load_adapter
from prefopt.records import InputError
from prefopt.store import content_key, tensors_key

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Denoiser(nn.Module):
    """A conditional UNet of Stable Diffusion 1.x, 2.x or XL, with its noise schedule and what it predicts."""

    alphas_cumprod: Tensor  # (steps,) float32

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__()
        unet = getattr(pipeline, "unet", None)
        if not isinstance(unet, UNet2DConditionModel):
            raise InputError(f"{pipeline.name_or_path}: a {type(pipeline).__name__} has no conditional UNet")
        schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction = str(schedule.config["prediction_type"])
        if self.prediction not in PREDICTIONS:
            raise InputError(f"{pipeline.name_or_path} predicts {self.prediction!r}; known are {PREDICTIONS}")
        self.unet = unet
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)

    @property
    def identity(self) -> dict[str, str]:
        """What scores depend on besides the weights."""
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}
        layers = [layer for layer in adapter_layers(self.unet) if REFERENCE in layer.scaling]
        return {
            "noise schedule": tensors_key({"alphas_cumprod": self.alphas_cumprod}),
            "prediction": self.prediction,
            "UNet configuration": content_key(json.dumps(config, sort_keys=True, default=str)),
            "reference adapter's scale": str(sorted({layer.scaling[REFERENCE] for layer in layers})),
        }

    def forward(
        self, latents: Tensor, noise: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Scores (batch, k) of clean latents (batch, k, C, H, W) at one shared noise (batch, C, H, W) and
        time (batch,).

        `time` in [0, 1) is the share of the schedule; `conditioning` holds the text embeddings of the batch,
        and for SDXL the pooled ones and the size conditioning of each candidate.
        """
        if time.dtype in (torch.float16, torch.bfloat16):
            raise InputError(f"times came in {time.dtype}, too coarse for timesteps: leave inputs in float32")
        batch, candidates = latents.shape[:2]
        steps = self.alphas_cumprod.shape[0]
        timestep = (time * steps).long().clamp(max=steps - 1)
        alpha = self.alphas_cumprod[timestep].view(batch, 1, 1, 1, 1)
        noise = noise[:, None].float().expand_as(latents)
        latents = latents.float()
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = self._target(latents, noise, alpha)
        output = self.unet(
            noised.flatten(0, 1).to(self.unet.dtype),
            timestep.repeat_interleave(candidates),
            **self._conditioning(conditioning, candidates),
            return_dict=False,
        )[0]
        error = (output.float().view_as(target) - target).square().mean(dim=(2, 3, 4))
        return -error

    def _target(self, latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":  # arXiv 2202.00512, appendix D
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return latents

    def _conditioning(self, conditioning: Mapping[str, Tensor], candidates: int) -> dict[str, Any]:
        def repeated(name: str) -> Tensor:
            return conditioning[name].to(self.unet.dtype).repeat_interleave(candidates, dim=0)

        inputs: dict[str, Any] = {"encoder_hidden_states": repeated("embeddings")}
        if "pooled" in conditioning:
            sizes = conditioning["sizes"].flatten(0, 1).to(self.unet.dtype)  # (batch * k, 6)
            inputs["added_cond_kwargs"] = {"text_embeds": repeated("pooled"), "time_ids": sizes}
        return inputs

    # Adapters

    def add_lora(self, config: LoraConfig) -> None:
        """A fresh float32 LoRA on the frozen UNet; no layer by these names is an InputError."""
        self.unet.requires_grad_(False)
        try:
            self.unet.add_adapter(config, adapter_name=POLICY)
        except ValueError as error:  # peft says which names it looked for
            raise InputError(f"--lora_target_modules {config.target_modules}: {error}") from error
        self._upcast_trained()

    def start_from_lora(self, pipeline: DiffusionPipeline, adapter: str) -> None:
        """Train on from an adapter, its frozen copy the reference; one that does not fit is an InputError."""
        self.unet.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # two are meant
            for name in (REFERENCE, POLICY):
                load_adapter(pipeline, adapter, name)
        for name, part in pipeline.components.items():
            if part is not self.unet and isinstance(part, nn.Module) and adapter_layers(part):
                raise InputError(f"the adapter {adapter} changes the {name}, too; only a UNet's is trained")
        self.unet.set_adapter(POLICY)
        for layer in adapter_layers(self.unet):
            layer.set_adapter(POLICY)  # which also freezes the other one
        self._upcast_trained()

    def _upcast_trained(self) -> None:
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # Saving, for the trainer

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """LoRA as `load_lora_weights` reads it, or the UNet as `from_pretrained` reads `folder/unet`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name.removeprefix("unet."): value
            for name, value in (self.state_dict() if state_dict is None else state_dict).items()
        }
        if not adapter_layers(self.unet):
            self.unet.save_config(folder / "unet")
            save_file(
                {k: v.contiguous() for k, v in state.items()},
                folder / "unet" / WEIGHTS_FILE,
                {"format": "pt"},
            )
            return
        factors = get_peft_model_state_dict(self.unet, state_dict=dict(state), adapter_name=POLICY)
        # Without the metadata a reader takes alpha = r: the adapter is then wrong by the factor alpha / r.
        # It is the only entry: safetensors writes several in an order of chance, and equal runs differ.
        metadata = {
            f"unet.{k}": sorted(v) if isinstance(v, set) else v
            for k, v in self.unet.peft_config[POLICY].to_dict().items()
        }
        save_file(
            {f"unet.{name}": factor.contiguous() for name, factor in factors.items()},
            folder / ADAPTER_FILE,
            {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True, default=str)},
        )
        written = load_file(folder / ADAPTER_FILE)
        if len(written) != 2 * len(adapter_layers(self.unet)):
            layers = len(adapter_layers(self.unet))
            raise RuntimeError(f"{folder / ADAPTER_FILE} holds {len(written)} tensors for {layers} layers")

    def load_weights(self, folder: str | Path) -> None:
        """Take back what `save_pretrained` wrote, bit for bit; what does not fit is an InputError."""
        layers = len(adapter_layers(self.unet))
        file = Path(folder, ADAPTER_FILE) if layers else Path(folder, "unet", WEIGHTS_FILE)
        try:
            state = {name.removeprefix("unet."): value for name, value in load_file(file).items()}
            if not layers:
                self.unet.load_state_dict(state)
                return
            unknown = set_peft_model_state_dict(self.unet, state, adapter_name=POLICY).unexpected_keys
        except (OSError, SafetensorError, RuntimeError) as error:  # the last of another shape
            raise InputError(f"{file} does not fit this model: {error}") from error
        if unknown or len(state) != 2 * layers:
            raise InputError(f"{file} does not fit this model: {len(state)} tensors for {layers} layers")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Trade compute for memory in the UNet's blocks."""
        self.unet.enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable


def denoising_metrics(batch: Mapping[str, Tensor], scores: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The denoising errors of a batch, over all times and by quartile of the schedule (q1: least noise)."""
    errors = {"chosen": -scores.policy[:, 0]}
    if scores.policy.shape[1] > 1:
        errors["rejected"] = -scores.policy[:, -1]
    metrics = {}
    for side, error in errors.items():
        metrics[f"error/{side}"] = (error, torch.ones_like(error))
        for quartile in range(4):
            inside = (batch["time"] * 4).floor() == quartile
            metrics[f"error/{side}/q{quartile + 1}"] = (error, inside.to(error.dtype))
    return metrics
