"""How the ranks of a SLURM job get into a container."""

from pathlib import Path

from narrowgauge.engine.config.slurm_block import ContainerBlock


def container_words(container: ContainerBlock, folder: Path, *, with_gpus: bool) -> tuple[list[str], list[str]]:
    """Flags for ``srun``, and the words before a node's command.

    Args:
        folder: that the job runs in; it is seen inside under the same path.
    """
    mounts = [f"{folder}:{folder}", *container.mounts]
    if container.runtime == "pyxis":
        return [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={folder}",
        ], []
    words = ["apptainer", "exec", *(["--nv"] if with_gpus else []), "--pwd", str(folder)]
    return [], [*words, *(word for mount in mounts for word in ("--bind", mount)), container.image]
