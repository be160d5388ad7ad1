"""Head dimension: what do wider heads give at equal parameters?

Question: Keys have 1 to 64 channels a head, with one transition for each head. On keys of 16 also
the Taylor feature map (arXiv 2312.04927).

Method: The model of ``experiments/base.py``; heads and the width of all values are set so that
parameters agree within 2 per cent. The state has heads · K · V numbers a layer: it grows with K.

Command: make experiments ARGS=head_dimension DATA=FILE
"""

from experiments import base
from experiments.frame import Variant


def heads(count: int, keys: int, values: int) -> str:
    """Flags of so many heads, with keys and values of so many channels each."""
    return (
        f"--gate-loop-heads {count} --gate-loop-dim-key {count * keys}"
        f" --dim-gate-looped-attn {count * values}"
    )


EXPERIMENT = base.experiment(
    name="head_dimension",
    document=__doc__ or "",
    variants=(
        Variant("1", "", "1 (max heads)"),
        Variant("4", heads(37, 4, 4), "4: 37 heads, values of 4"),
        Variant("8", heads(19, 8, 8), "8: 19 heads, values of 8"),
        Variant("16", heads(9, 16, 17), "16: 9 heads, values of 17"),
        Variant("32", heads(5, 32, 30), "32: 5 heads, values of 30"),
        Variant("64", heads(2, 64, 85), "64: 2 heads, values of 85"),
        Variant(
            "16_taylor",
            heads(9, 16, 17) + " --feature-map taylor",
            "16, Taylor map: states of 153 keys",
        ),
    ),
)
