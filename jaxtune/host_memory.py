"""Free memory of this host, as far as this process may use it: a container or a cluster's job has limits of its own."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Files of a control group's memory, versions 2 and 1: its limit, what is used, and in memory.stat the part of that
# which is cached files and makes room at once.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available() -> int:
    """Bytes that may still be allocated, cached files counted as free: of the host, or of the control groups (cgroup
    versions 1 and 2) that this process is in where one has less left. Without /proc, all of the host's memory."""
    try:
        host = _table(ROOT / "proc/meminfo")["MemAvailable:"] * 1024
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min([host, *(left for folder in _groups() for left in _left(folder))]), 0)


def _groups() -> Iterator[Path]:
    """Folders of the groups that limit this process's memory, and of those above them."""
    mount = ROOT / "sys/fs/cgroup"
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            place = PurePosixPath(path.lstrip("/"))
            yield from (mount / controllers / folder for folder in (place, *place.parents))


def _left(folder: Path) -> Iterator[int]:
    """Bytes that a group may still allocate, if it has a limit."""
    for limit, used, cached in GROUP_FILES:
        try:
            allowed, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            if allowed != "max":
                yield int(allowed) - taken + _table(folder / "memory.stat").get(cached, 0)
        except OSError:  # the other version's, or a folder that a container does not show
            continue


def _table(file: Path) -> dict[str, int]:
    """The second word of each line by the first."""
    return {words[0]: int(words[1]) for words in map(str.split, file.read_text().splitlines())}
