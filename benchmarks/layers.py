"""How fast the routed layers are: one table, beside colt5-attention and dense equivalents, in one run.

    python benchmarks/layers.py                 on a GPU
    python benchmarks/layers.py --only block    of autoregressive, block, feedforward, image, dense
    python benchmarks/layers.py --tiny          on a CPU, to see that it runs: its times mean nothing

colt5-attention is measured if it can be imported: it comes with `pip install xlroute[test]`, or

    pip install --no-deps --target peer-0.11.2 -r benchmarks/requirements-peers-0.11.2.txt
    PYTHONPATH=peer-0.11.2 python benchmarks/layers.py

It writes layers.csv to --out, with everything that was measured and how. No speed is printed of a result that
was not checked first; where a check is red, the error stands in its place, and the exit code is 1. Where
colt5-attention fails, the table says so, and the exit code stays 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from layers_contest import DENSE, PEER
from layers_work import TINY, WORK, LayerSizes
from routing import Progress, describe
from routing_report import REFERENCE, Work, failures, table, write_csv
from routing_settings import Sizes
from timing import on_one_stream

NOTES = """\
Milliseconds where no unit is given, medians; every result was checked before it was timed. float32: no TF32.
memory: the most GPU memory held beyond what was held before the call, its result included.
reference: the same layer with use_triton=False. dense: attention of every token to all (to all before it, in
the autoregressive layer) by scaled_dot_product_attention, and the heavy feedforward for every token.
floor: of the feedforward, its matrix products alone; of the image attention, its light branch alone.
block: ε of its routers is 1, so that results in bfloat16, which rounds what is routed, can be compared.
colt5: colt5-attention, with Triton on a GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="default: all")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")
    if device.type == "cpu" and not options.tiny:
        parser.error("--tiny: expected on a CPU, where the full sizes would take hours")

    options.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if options.tiny else LayerSizes()
    works: list[Work] = []
    progress = Progress()
    torch.set_float32_matmul_precision("highest")
    with on_one_stream(device):
        machine = describe(device, Sizes(copy_bytes=1 << 20) if options.tiny else Sizes())
        for name in options.only:
            measured, dtypes = WORK[name]
            for dtype in dtypes:
                with progress.step(f"{name}, {str(dtype).removeprefix('torch.')}"):
                    works += measured(sizes, device, dtype)
    progress("done")
    print(table(works, machine, (REFERENCE, DENSE, PEER), NOTES))
    write_csv(options.out / "layers.csv", works, [], machine)
    wrong = failures(works, []) + progress.broken
    if wrong:
        print("\n" + "\n".join(wrong))
    ours = any(each.failure for work in works for each in work.measurements if each.subject != PEER)
    return int(ours or bool(progress.broken))


if __name__ == "__main__":
    sys.exit(main())
