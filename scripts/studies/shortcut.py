"""Whether a discriminator looks at what pictures show, or at how they were stored.

    python scripts/studies/shortcut.py --discriminator runs/discriminator --dataset_name data/discriminator

Of lists with one real image it prints, for the images as they are and for copies (JPEG, blurred, made smaller
and larger again): how often the real image has the higher logit of a real and a generated one; and how far a
copy lowers the real image's own logit, beside how far below a generated image lies. A discriminator that
learned a codec or a resampler loses its edge on copies, and takes a real image's copy for generated.
"""

import argparse
import io
import json
from itertools import chain

import numpy as np
from PIL import Image, ImageFilter

from prefopt.diffusion.tables import read_preferences
from prefopt.evaluation.discrimination import discrimination
from prefopt.judges.discriminator import DiscriminatorScorer


def jpeg(image: Image.Image) -> Image.Image:
    """Through JPEG at quality 75."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def blurred(image: Image.Image) -> Image.Image:
    """A Gaussian blur of 0.7 pixels."""
    return image.filter(ImageFilter.GaussianBlur(0.7))


def smaller(image: Image.Image) -> Image.Image:
    """To three quarters of its size and back."""
    small = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--discriminator", required=True, help="a folder or hub id")
    parser.add_argument("--dataset_name", required=True, help="a build of discriminator_pairs.py")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    options = parser.parse_args()
    table = read_preferences(options.dataset_name, split=options.split, config="ranked")
    scorer, lists = DiscriminatorScorer(options.discriminator), []
    for index in range(len(table)):
        lists.append([Image.open(io.BytesIO(content)).convert("RGB") for content in table.images(index)])
    ranks = np.array(list(table.column("ranks")))
    prompts = [[prompt] * ranks.shape[1] for prompt in table.column("prompt")]

    def logits(copies: list[list[Image.Image]]) -> np.ndarray:
        return scorer.rewards(list(chain(*copies)), list(chain(*prompts))).reshape(ranks.shape)

    kept = logits(lists)
    found = {"as they are": discrimination(kept, ranks)}
    gap = float((kept[:, 0] - kept[:, 1:].mean(1)).mean())
    for copy in (jpeg, blurred, smaller):
        copied = logits([[copy(image) for image in images] for images in lists])
        drop = float((kept[:, 0] - copied[:, 0]).mean())
        found[copy.__name__] = discrimination(copied, ranks) | {
            "a copy lowers the real image's logit by": round(drop, 2),
            "a generated image lies lower by": round(gap, 2),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
