"""The model and the training that variants on text differ from.

Every option that a preset might set is here: a preset may change, a record may not.
"""

PARAMETERS = 1_448_064
LEARNING_RATES = (0.002, 0.004, 0.008)
SEEDS = (0, 1, 2)

# Six layers of GateLoop with max heads, a real gate and a scaled input.
FLAGS = " ".join(
    (
        "--dim 128 --depth 6 --ff-mult 4 --layers gate_loop --simple-gate-loop none",
        "--gate sigmoid --normalize-input=mean --transition-bias=-1,5 --no-sub-ln",
        "--batch 8 --accumulation 1 --length 256 --dtype bfloat16",
        "--optimizer adamw --schedule linear --beta1 0.9 --beta2 0.98 --weight-decay 0.2 --clip 1",
    )
)
