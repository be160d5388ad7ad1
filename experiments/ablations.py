"""Ablations: which options of a GateLoop layer pay at equal parameters?

Question: A real transition or a complex one, the reference's gate or the paper's, a transition that
is learned but fixed, none at all; one projection to k v or two; the swish gate; sub-LN; scaling the
input by 1 - |a|: what does each do to the loss?

Method: The model of ``experiments/base.py``, and one change at a time. It has six layers of width
128, a real gate, two projections, a swish gate, no sub-LN and scaled input. The inner width of the
layers is set so that parameters that take part agree within 2 per cent.

Command: make experiments ARGS=ablations DATA=FILE
"""

from experiments import base
from experiments.frame import Variant

INNER = "--dim-gate-looped-attn"

EXPERIMENT = base.experiment(
    name="ablations",
    document=__doc__ or "",
    variants=(
        Variant("base", "", "the model without a change"),
        Variant(
            "polar",
            f"--gate polar --transition-bias= {INNER} 110",
            "complex: the reference's gate, without initial biases",
        ),
        Variant(
            "magnitude_phase",
            f"--gate magnitude_phase {INNER} 110",
            "complex: the paper's gate",
        ),
        # Its phases of to_a take part in nothing: 129 parameters for each channel and layer.
        Variant(
            "magnitude_only",
            f"--gate magnitude_phase --ablate-complex {INNER} 128",
            "the paper's gate, phase 0: the real gate again",
            unused=129 * 128 * 6,
        ),
        Variant(
            "no_transition",
            f"--ablate-state-transition {INNER} 154",
            "transition 1: a sum over time",
            unused=129 * 154 * 6,
        ),
        # The same gate with its initial spread of half-lives, as LRU has; to_a is its bias alone.
        Variant(
            "fixed",
            f"--fixed-transitions {INNER} 154",
            "learned transitions that do not depend on the text",
            unused=128 * 154 * 6,
        ),
        Variant("joint_kv", f"--joint-kv {INNER} 154", "one projection to k v"),
        Variant("no_swish", f"--no-attn-add-swish-gating {INNER} 154", "no swish gate"),
        Variant("sub_ln", "--sub-ln", "sub-LN"),
        Variant("no_scale", "--no-normalize-input", "input not scaled"),
        Variant("variance", "--normalize-input=variance", "input scaled by √(1 - abs(a)²)"),
    ),
)
