"""All experiments, in the order of docs/experiments.md."""

from experiments import (
    ablations,
    associative_recall,
    head_dimension,
    head_to_head,
    memory_horizon,
)
from experiments.frame import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    head_to_head.EXPERIMENT,
    ablations.EXPERIMENT,
    head_dimension.EXPERIMENT,
    memory_horizon.EXPERIMENT,
    associative_recall.EXPERIMENT,
)
