"""Associative recall: what was said after this token when it last came?

Question: How accurate are the mixers against the distance to the earlier token? GateLoop has max
heads, wider heads, or fixed transitions; attention is beside it.

Method: The settings of the author's repository (GatedLinearRNN, AssociativeRecallDataset). Tokens
and queries are of one vocabulary of 30, in sequences of 100 steps. Two layers have width 128 and
feed-forwards of 256; batches are of 32. Other than there, every batch is new, instead of 6,000
sequences 200 times. Steps without an answer do not count. At a distance of 1 the answer is the
query itself: it counts in the accuracy of all, but the ranges begin at 2. Parameters agree within 2
per cent by the inner widths.

Command: make experiments ARGS=associative_recall
"""

from functools import partial

from experiments.frame import ACCURACY, Experiment, Variant
from experiments.synthetic import Synthetic

COMPLEX = "gate=magnitude_phase transition_bias=[-1,5]"
REAL = "gate=sigmoid transition_bias=[-1,5]"

EXPERIMENT = Experiment(
    name="associative_recall",
    document=__doc__ or "",
    flags="dim=128 depth=2 ff_mult=2",
    parameters=370_048,
    learning_rates=(0.001, 0.002, 0.004),
    seeds=(0, 1, 2),
    trainer=partial(Synthetic, task="associative_recall"),
    measure=ACCURACY,
    variants=(
        Variant("data", COMPLEX, "GateLoop, complex, data-controlled, max heads"),
        Variant(
            "fixed",
            f"{COMPLEX} transition=fixed dim_gate_looped_attn=179",
            "GateLoop, complex, learned but fixed, max heads",
        ),
        Variant(
            "real",
            f"{REAL} dim_gate_looped_attn=149",
            "GateLoop, real, data-controlled, max heads",
        ),
        Variant(
            "narrow",
            f"{REAL} gate_loop_heads=42 dim_gate_looped_attn=168 gate_loop_dim_key=168",
            "GateLoop, real, data-controlled, 42 heads of 4",
        ),
        Variant(
            "heads",
            f"{REAL} gate_loop_heads=8 dim_gate_looped_attn=176 gate_loop_dim_key=176",
            "GateLoop, real, data-controlled, 8 heads of 22",
        ),
        Variant(
            "attention",
            "layers=attention heads=4 dim_head=44 rotary_emb=true",
            "attention, rotary",
        ),
    ),
)
