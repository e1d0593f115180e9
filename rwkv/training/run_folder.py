"""What lies in a run's folder already: looked at before anything heavy is imported."""

import re
from pathlib import Path

from rwkv.errors import InputError

POINTS = "resume"  # within the folder, from before the first step of a run


def newest(folder: Path) -> Path | None:
    """The last resume point of a run, None if it has none. Each is a folder `step-N`."""
    points = [p for p in (folder / POINTS).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(points, key=lambda p: int(p.name[5:]), default=None)


def check_folder(folder: Path, resume: bool) -> None:
    """Stop where a run would be written over another.

    A run that was killed between its first model and its first resume point begins anew.

    Args:
        folder: --proj_dir.
        resume: --resume.

    Raises:
        InputError: there is a run that is not to be resumed, or there are models and no resume
            point, unless they are of such a run and it is to be resumed.
    """
    point = newest(folder)
    if point is not None and not resume:
        raise InputError(
            f"--proj_dir {folder}: already holds a run ({point.name.replace('-', ' ')}); "
            "add --resume 1 to go on with it, or choose another folder"
        )
    if point is None and (models := sorted(folder.glob("rwkv-*.pth"))):
        begun = (folder / POINTS).is_dir()
        if not begun or not resume:
            raise InputError(
                f"--proj_dir {folder}: already holds {models[0].name}, and nothing to go on from; "
                + ("add --resume 1 to begin that run anew, or " if begun else "")
                + "choose another folder"
            )
