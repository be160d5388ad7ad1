"""Questions about GateLoop, each a file, answered by runs: see docs/experiments.md."""
