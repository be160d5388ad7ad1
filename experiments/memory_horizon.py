"""Memory Horizon: what does a transition that depends on the data give over a fixed one?

Question: The paper's synthetic task (arXiv 2311.01927, section 5) has number tokens and reset
tokens. Its target compresses all inputs since the last reset. How accurate are the mixers against
the span that a target needs? GateLoop has data-controlled transitions, learned but fixed ones, or
none; attention is beside it.

Method: Numbers 0 to 4. The target at each step is the sum modulo 5 of the numbers since the last
reset. The span is the steps since then. The paper's own function of the inputs and its settings are
not used: figures do not compare with its. Sequences of 256 steps, a reset at one step of 48;
two layers of width 64; 16 fresh sequences at each step, 256 to test on. Chance is 0.2. Parameters
agree within 2 per cent by the inner widths.

Command: make experiments ARGS=memory_horizon
"""

from functools import partial

from experiments.frame import ACCURACY, Experiment, Variant
from experiments.synthetic import Synthetic

COMPLEX = "gate=magnitude_phase transition_bias=[-1,5]"
REAL = "gate=sigmoid transition_bias=[-1,5]"

EXPERIMENT = Experiment(
    name="memory_horizon",
    document=__doc__ or "",
    flags="dim=64 depth=2",
    parameters=124_864,
    learning_rates=(0.004, 0.008, 0.016),
    seeds=(0, 1, 2),
    trainer=partial(Synthetic, task="memory_horizon"),
    measure=ACCURACY,
    variants=(
        Variant("data", COMPLEX, "GateLoop, complex, data-controlled"),
        Variant(
            "fixed",
            f"{COMPLEX} transition=fixed dim_gate_looped_attn=89",
            "GateLoop, complex, learned but fixed",
        ),
        Variant("data_real", f"{REAL} dim_gate_looped_attn=76", "GateLoop, real, data-controlled"),
        Variant(
            "fixed_real",
            f"{REAL} transition=fixed dim_gate_looped_attn=90",
            "GateLoop, real, learned but fixed",
        ),
        Variant(
            "none",
            "gate=sigmoid ablate_state_transition=true dim_gate_looped_attn=90",
            "GateLoop, transition 1",
            unused=2 * 65 * 90,
        ),
        Variant(
            "attention",
            "layers=attention heads=4 dim_head=22 rotary_emb=true",
            "attention, rotary",
        ),
    ),
)
