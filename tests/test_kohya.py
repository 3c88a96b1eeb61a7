"""A LoRA under kohya's names is found by the programs that read such files, and computes the same."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from launching import ROOT
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_adapters import deltas_of, error, save_random

from prefopt.adapters import POLICY
from prefopt.diffusion.families import FAMILIES
from prefopt.diffusion.generator import Generator
from prefopt.diffusion.lora import LOADED, save_weights
from prefopt.diffusion.sampling import load_generator
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE
from prefopt.kohya import write_kohya

STOCK = {"stable_diffusion": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
ENDS = ("lora_down.weight", "lora_up.weight", "alpha")
OURS = [*FAMILIES["StableDiffusionPipeline"].lora_targets]
WIDE = [*OURS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]


def adapted(network: Any, folder: Path, targets: list[str], **options: Any) -> Path:
    """Give the network a random LoRA, and save it as a recipe does; its file."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets, **options)
    network.add_adapter(config, adapter_name=POLICY)
    save_weights(network, "unet", folder, network.state_dict(), fold=True)
    return folder / ADAPTER_FILE


# Names


def unet(layout: str) -> UNet2DConditionModel:
    """A narrow network with the blocks of Stable Diffusion 1.5 or XL."""
    cross, plain, up, up_plain = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
    blocks = {
        "sd15": {
            "down_block_types": (cross, cross, cross, plain),
            "up_block_types": (up_plain, up, up, up),
            "block_out_channels": (4, 4, 4, 4),
        },
        "sdxl": {
            "down_block_types": (plain, cross, cross),
            "up_block_types": (up, up, up_plain),
            "block_out_channels": (4, 4, 4),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
        },
    }
    common = {"attention_head_dim": 2, "norm_num_groups": 2, "cross_attention_dim": 4, "sample_size": 8}
    return UNet2DConditionModel(**common, **blocks[layout])


RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def comfy_names(network: UNet2DConditionModel) -> dict[str, str]:
    """ComfyUI's rule: the layer of the original checkpoint for each key of a LoRA, made from the config.

    Blocks are counted through: `input_blocks` from 1, a block's layers and its downsampler one number each,
    `output_blocks` from 0. At a number, slot 0 is the residual block and slot 1 the attention.
    """
    config = network.config
    each, names = config["layers_per_block"], {}
    depths = config["transformer_layers_per_block"]
    depths = [depths] * len(config["down_block_types"]) if isinstance(depths, int) else list(depths)

    def attention(name: str, place: str, depth: int) -> None:
        for layer in ("proj_in", "proj_out"):
            names[f"{name}.{layer}"] = f"{place}.{layer}"
        for number in range(depth):
            inner = [f"attn{i}.{one}" for i in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out.0")]
            for layer in (*inner, "ff.net.0.proj", "ff.net.2"):
                path = f"transformer_blocks.{number}.{layer}"
                names[f"{name}.{path}"] = f"{place}.{path}"

    def resnet(name: str, place: str) -> None:
        names.update({f"{name}.{layer}": f"{place}.{other}" for layer, other in RESNET.items()})

    for block, (kind, depth) in enumerate(zip(config["down_block_types"], depths, strict=True)):
        first = 1 + (each + 1) * block
        for i in range(each):
            resnet(f"down_blocks.{block}.resnets.{i}", f"input_blocks.{first + i}.0")
            if kind.startswith("CrossAttn"):
                attention(f"down_blocks.{block}.attentions.{i}", f"input_blocks.{first + i}.1", depth)
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + each}.0.op"
    attention("mid_block.attentions.0", "middle_block.1", depths[-1])
    for i in (0, 1):
        resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    for block, (kind, depth) in enumerate(zip(config["up_block_types"], depths[::-1], strict=True)):
        for i in range(each + 1):
            number = (each + 1) * block + i
            resnet(f"up_blocks.{block}.resnets.{i}", f"output_blocks.{number}.0")
            if kind.startswith("CrossAttn"):
                attention(f"up_blocks.{block}.attentions.{i}", f"output_blocks.{number}.1", depth)
    return {f"lora_unet_{name.replace('.', '_')}": place for name, place in names.items()}


def a1111_name(key: str) -> str:
    """A1111's rule: the same numbers from the key alone, three to a block."""
    side, *words = key.removeprefix("lora_unet_").split("_")
    if side == "mid":
        kind, number, rest = words[1], int(words[2]), words[3:]
        place = ["middle_block", "1" if kind == "attentions" else str(2 * number)]
    else:
        block, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
        start = "input_blocks" if side == "down" else "output_blocks"
        place = [start, str(3 * block + number + (side == "down")), str(int(kind == "attentions"))]
    last = "_".join(rest)
    return "_".join([*place, RESNET[last].replace(".", "_") if kind == "resnets" else last])


@pytest.mark.parametrize(("layout", "layers"), [("sd15", 16 * 8), ("sdxl", 70 * 8)])
@pytest.mark.parametrize("targets", [OURS, WIDE], ids=["default layers", "more layers"])
def test_comfy_and_a1111_find_every_layer(
    tmp_path: Path, layout: str, layers: int, targets: list[str]
) -> None:
    network = unet(layout)
    written = write_kohya(adapted(network, tmp_path, targets), tmp_path / "kohya.safetensors")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    keys = {name.partition(".")[0] for name in shapes}
    assert len(keys) == written and (written == layers if targets is OURS else written > layers)
    assert set(shapes) == {f"{key}.{end}" for key in keys for end in ENDS}
    assert all(shapes[f"{key}.alpha"] == () for key in keys)
    comfy = comfy_names(network)
    assert keys <= comfy.keys()
    assert len({comfy[key] for key in keys}) == len(keys), "no two layers are taken for one"
    assert {key: a1111_name(key) for key in keys} == {key: comfy[key].replace(".", "_") for key in keys}


@pytest.mark.parametrize(
    ("layout", "name", "original"),
    [
        ("sd15", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "input_blocks.1.1"),
        ("sd15", "up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0", "output_blocks.5.1"),
        ("sdxl", "down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_k", "input_blocks.4.1"),
        ("sdxl", "up_blocks_0_attentions_2_transformer_blocks_9_attn2_to_v", "output_blocks.2.1"),
        ("sdxl", "mid_block_attentions_0_transformer_blocks_9_attn1_to_q", "middle_block.1"),
    ],
)
def test_the_rules_above_are_the_known_layout(layout: str, name: str, original: str) -> None:
    """Layers that everyone knows: SDXL's first attention is input block 4."""
    assert comfy_names(unet(layout))[f"lora_unet_{name}"].startswith(f"{original}.transformer_blocks.")


# Values


@pytest.mark.parametrize("options", [{"lora_alpha": 2}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("model", STOCK)
def test_diffusers_and_we_read_the_same_from_it(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, options: dict
) -> None:
    folder = request.getfixturevalue(model)
    network = STOCK[model].from_pretrained(folder).unet
    file = adapted(network, tmp_path, WIDE, **options)
    expected = deltas_of(network, POLICY)
    kohya = tmp_path / "for comfy" / "dpo.safetensors"
    assert write_kohya(file.parent, kohya) == len(expected)
    stock = STOCK[model].from_pretrained(folder)
    stock.load_lora_weights(kohya.parent, weight_name=kohya.name, adapter_name=LOADED)
    for unet in (stock.unet, load_generator(Generator(folder, str(kohya.parent))).unet):
        found = deltas_of(unet, LOADED)
        assert found.keys() == expected.keys()
        assert all(error(found[name], expected[name]) < 1e-6 for name in expected)


def test_the_scaling_of_a_file_that_is_not_folded_becomes_its_alpha(
    stable_diffusion: str, tmp_path: Path
) -> None:
    """A checkpoint, or what another trainer saved."""
    network = StableDiffusionPipeline.from_pretrained(stable_diffusion).unet
    adapted(network, tmp_path, ["to_q"], lora_alpha=6)
    save_weights(network, "unet", tmp_path, network.state_dict())
    write_kohya(tmp_path, tmp_path / "kohya.safetensors")
    before, after = load_file(tmp_path / ADAPTER_FILE), load_file(tmp_path / "kohya.safetensors")
    alphas = {value.item() for name, value in after.items() if name.endswith(".alpha")}
    assert alphas == {6.0} and len(after) == len(before) * 3 // 2
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lora_unet_{name.replace('.', '_')}"
    assert torch.equal(after[f"{key}.lora_down.weight"], before[f"unet.{name}.lora_A.weight"])
    assert torch.equal(after[f"{key}.lora_up.weight"], before[f"unet.{name}.lora_B.weight"])


# Errors and the command


def test_what_cannot_be_converted_is_named(stable_diffusion: str, tmp_path: Path) -> None:
    file = adapted(StableDiffusionPipeline.from_pretrained(stable_diffusion).unet, tmp_path, ["to_q"])
    output = tmp_path / "kohya.safetensors"
    with pytest.raises(InputError, match=r"kohya.bin is no name of a safetensors file"):
        write_kohya(file, output.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"is the adapter itself; name another file"):
        write_kohya(tmp_path, file)
    write_kohya(file, output)
    with pytest.raises(InputError, match=r"lora_unet_.*is not named as diffusers names it"):
        write_kohya(output, tmp_path / "again.safetensors")
    save_file(
        {name.replace("unet.", "text_encoder."): value for name, value in load_file(file).items()},
        tmp_path / "text.safetensors",
    )
    with pytest.raises(
        InputError, match=r"text_encoder\..* is no layer of the unet; others are not converted"
    ):
        write_kohya(tmp_path / "text.safetensors", output)
    peft = save_random(tmp_path / "peft", target_modules=["narrow"], r=2)
    with pytest.raises(InputError, match=r"base_model.model.narrow is no layer of the unet"):
        write_kohya(peft, output)


def test_the_command_converts(
    stable_diffusion: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapted(StableDiffusionPipeline.from_pretrained(stable_diffusion).unet, tmp_path, OURS)
    output = tmp_path / "dpo.safetensors"

    def convert(adapter: Path) -> int:
        arguments = ["--adapter", str(adapter), "--output_file", str(output)]
        monkeypatch.setattr("sys.argv", ["convert_adapter.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts/convert_adapter.py"), run_name="__main__")
        return int(str(ended.value))

    assert convert(tmp_path) == 0
    assert f"{output}: {len(load_file(output)) // 3} layers" in capsys.readouterr().out
    assert convert(tmp_path / "nowhere") == 2
    assert "error: no adapter" in capsys.readouterr().err
