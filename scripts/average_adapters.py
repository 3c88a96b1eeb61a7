"""Averages LoRA adapters exactly: average_adapters.py --adapters A B C D --output_dir OUT [--rank 16]

Each adapter is a folder or a hub id in peft's format, or a file that diffusers' pipelines load, and OUT will
be the same. What is averaged are the updates alpha / r * B A, never A and B apart. Without `--rank` the
average is exact and its rank is the sum of the adapters' ranks; with it, the best of that rank, and the
program says how much of the average's energy (squared singular values) is kept.
"""

import argparse
import sys
from pathlib import Path

from prefopt.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", nargs="+", required=True, metavar="ADAPTER")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, help="rank of the average (default: the sum, which is exact)")
    parser.add_argument(
        "--weights", type=float, nargs="+", help="one for each adapter, summing to 1 (default: equal)"
    )
    options = parser.parse_args()

    from prefopt.averaging import average_adapters  # loads torch, which --help need not wait for

    try:
        average = average_adapters(
            options.adapters, options.output_dir, weights=options.weights, rank=options.rank
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    weights = ", ".join(f"{weight:g}" for weight in average.weights)
    print(f"{average.file}: average of {len(options.adapters)} adapters")
    print(f"weights      {weights} (sum {sum(average.weights):g})")
    print(f"rank         {average.rank}, {len(average.layers)} layers")
    least = min(average.layers, key=average.layers.__getitem__)
    print(f"energy kept  {average.energy:.2%}, least {average.layers[least]:.2%} in {least}")
    print(f"size         {average.size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
