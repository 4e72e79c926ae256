"""Free memory: the host's, or what is left of the limits of a container or a job."""

import pytest

from jaxtune import host_memory


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in the place of /, of a host with 1 MB available."""
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    write(tmp_path / "proc/meminfo", "MemTotal:  2000 kB\nMemAvailable:  1000 kB\nHugePages_Total:   0\n")
    return tmp_path


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def group(folder, limit, used, cached, version):
    for name, value in zip(host_memory.GROUP_FILES[2 - version][:2], (limit, used), strict=True):
        write(folder / name, f"{value}\n")
    write(folder / "memory.stat", f"cache 7\n{host_memory.GROUP_FILES[2 - version][2]} {cached}\n")


def test_this_machine_has_some():
    assert 10**6 < host_memory.available() < 10**15


def test_without_limits_it_is_the_hosts(root):
    assert host_memory.available() == 1_024_000
    write(root / "proc/self/cgroup", "0::/\n")
    assert host_memory.available() == 1_024_000
    group(root / "sys/fs/cgroup", "max", 500_000, 0, version=2)
    assert host_memory.available() == 1_024_000


def test_a_job_of_a_cluster(root):
    """The limit is of a group above this process's own."""
    write(root / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    group(root / "sys/fs/cgroup/slurm/job_7", 600_000, 500_000, 50_000, version=2)
    group(root / "sys/fs/cgroup/slurm/job_7/step_0", "max", 500_000, 50_000, version=2)
    assert host_memory.available() == 150_000


def test_a_container_of_version_1(root):
    """It shows its own group at the root, and names one that it does not show."""
    write(root / "proc/self/cgroup", "12:pids:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n")
    group(root / "sys/fs/cgroup/memory", 400_000, 300_000, 20_000, version=1)
    assert host_memory.available() == 120_000


def test_more_used_than_allowed_is_nothing_left(root):
    write(root / "proc/self/cgroup", "0::/\n")
    group(root / "sys/fs/cgroup", 100, 300, 0, version=2)
    assert host_memory.available() == 0


def test_without_proc_it_is_all_memory(root):
    (root / "proc/meminfo").unlink()
    assert host_memory.available() > 10**9
