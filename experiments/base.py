"""The model and the training that variants on text differ from.

Every option that a preset might set is here: a preset may change, a record may not.
"""

from collections.abc import Sequence
from functools import partial

from experiments.frame import Experiment, Variant
from experiments.language import Language

# Six layers of GateLoop with max heads, a real gate and a scaled input.
FLAGS = " ".join(
    (
        "--dim 128 --depth 6 --ff-mult 4 --layers gate_loop --simple-gate-loop none",
        "--gate sigmoid --normalize-input=mean --transition-bias=-1,5 --no-sub-ln",
        "--batch 8 --accumulation 1 --length 256 --dtype bfloat16",
        "--optimizer adamw --schedule linear --beta1 0.9 --beta2 0.98 --weight-decay 0.2 --clip 1",
    )
)


def experiment(
    name: str, document: str, variants: tuple[Variant, ...], windows: Sequence[int] = ()
) -> Experiment:
    """Of variants of that model; ``windows`` are tested in beside the validation."""
    return Experiment(
        name=name,
        document=document,
        variants=variants,
        flags=FLAGS,
        parameters=1_448_064,
        learning_rates=(0.002, 0.004, 0.008),
        seeds=(0, 1, 2),
        trainer=partial(Language, windows=windows),
    )
