"""What a job takes, in lines that are printed before it is queued."""

from __future__ import annotations

from launch.job import CPUS_PER_GPU, MEMORY_GIB_PER_GPU, Job

# After which Vertex AI ends a job that has no limit.
_VERTEX_HOURS = 7 * 24.0


def lines(job: Job, num_runs: int) -> str:
    """Says what one allocation costs, how many there may be, and the defaults.

    Args:
        job: the job.
        num_runs: how many runs it has; more than one of a sweep.

    Returns:
        One line or more.
    """
    found = [_allocation(job, num_runs), _again(job, num_runs), _defaults(job)]
    return "\n".join(filter(None, found))


def _hours(job: Job) -> float:
    is_vertex = job.options.backend == "vertex"
    return job.options.max_hours or (_VERTEX_HOURS if is_vertex else 0.0)


def _total(job: Job, num_runs: int) -> float:
    return num_runs * job.options.num_nodes * (job.options.gpus_per_node or 1)


def _hours_text(job: Job, hours: float) -> str:
    unit = "GPU hours" if job.options.gpus_per_node else "node hours"
    return f"{hours:,.1f}".removesuffix(".0") + f" {unit}"


def _allocation(job: Job, num_runs: int) -> str:
    options = job.options
    counts = [(options.num_nodes, "node")]
    if num_runs > 1:
        counts.insert(0, (num_runs, "run"))
    if options.gpus_per_node:
        counts.append((options.gpus_per_node, "GPU"))
    size = " x ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts)
    hours = _hours(job)
    if not hours:
        return f"{size}, without a time limit of its own"
    total = _hours_text(job, hours * _total(job, num_runs))
    how = "at most"
    if options.backend != "vertex":
        how += " for one allocation" + " of each" * (num_runs > 1)
    return f"{size} x {hours:g} h = {total} {how}"


def _again(job: Job, num_runs: int) -> str:
    """Says how many allocations there may be, where that has no end."""
    options = job.options
    if options.backend == "vertex":
        # Its limit is that of all attempts together.
        return ""
    causes, counted = "preemption", "the loss of a node"
    if options.backend == "skypilot":
        counted = "a failure"
    elif options.max_hours or options.backend == "slurm":
        # A partition of Slurm has a limit where the job has none.
        causes += " and time limit"
    times = options.max_requeues
    bound = f"{times:,} times at most" if times else "not at all"
    if times and options.max_hours:
        total = (times + 1) * options.max_hours * _total(job, num_runs)
        bound += f", {_hours_text(job, total)}"
    subject = "each" if num_runs > 1 else "it"
    return (
        f"{subject} is started again after each {causes}, however often, until "
        f"its last step; after {counted} {bound}"
    )


def _defaults(job: Job) -> str:
    """Says what is asked for that nobody has typed."""
    options = job.options
    shares = []
    if job.cpus_per_node != options.cpus_per_node:
        shares.append(f"{job.cpus_per_node} CPUs ({CPUS_PER_GPU} a GPU)")
    if job.memory_gib != options.memory_gib:
        shares.append(f"{job.memory_gib} GiB ({MEMORY_GIB_PER_GPU} a GPU)")
    if not shares:
        return ""
    return (
        f"each node has {' and '.join(shares)} by default; --cpus_per_node and "
        "--memory_gib say otherwise"
    )
