"""Write the example sbatch files of this folder: ``python slurm/render.py``.

The files are like the output of ``promptshard submit ... --dry-run`` in a clone with its libraries
in .venv; run them there with ``sbatch slurm/NAME.sbatch``. In contrast, ``promptshard submit``
checks the run file first, and keeps a copy of it and of the code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.slurm import Job, render

QUICKSTART = "examples/quickstart.yaml"
#: A short run to test a cluster: two prompts, few steps, few validation rows.
SMOKE = (
    *(QUICKSTART, "output_dir=runs/smoke", "training.steps=30", "checkpoint.every=2"),
    *("evaluation.every=15", "tasks[0].hand_written=[]", "tasks[1].hand_written=[]"),
    *("tasks[0].max_validation_rows=20", "tasks[1].max_validation_rows=20"),
)
SEEDS = tuple(
    (QUICKSTART, f"training.seed={seed}", f"output_dir=runs/quickstart/seed-{seed}")
    for seed in (0, 1, 2)
)
ONE_NODE = Job(
    name="one-node",
    nodes=1,
    gpus_per_node=8,
    cpus_per_task=64,
    mem="0",
    time="04:00:00",
    tasks=((QUICKSTART,),),
)

EXAMPLES = {
    "one-node": ONE_NODE,
    "four-nodes": replace(
        ONE_NODE,
        name="four-nodes",
        nodes=4,
        time="12:00:00",
        partition="gpu",
        modules=("cuda/12.4",),
    ),
    "long-requeueing": replace(
        ONE_NODE,
        name="long-requeueing",
        nodes=4,
        time="1-00:00:00",
        tasks=((QUICKSTART, "training.steps=30000", "checkpoint.every=100"),),
        signal_seconds=600,
        max_requeues=100,
    ),
    "sweep-array": replace(
        ONE_NODE, name="sweep-array", tasks=SEEDS, at_once=2, log="slurm-%A_%a.out"
    ),
    "cpu-smoke-test": Job(name="cpu-smoke-test", nodes=2, time="00:10:00", tasks=(SMOKE,)),
}


def main() -> None:
    for name, job in EXAMPLES.items():
        (Path(__file__).parent / f"{name}.sbatch").write_text(render(job), encoding="utf-8")


if __name__ == "__main__":
    main()
