"""What this process may use of the machine: CPUs, quotas and memory limits of its control groups, in made-up trees."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest

from torchship import hardware
from torchship.lowering.torch_stage import prepare
from torchship.serve import prometheus as metrics

Tree: TypeAlias = Callable[..., Path]
GIB = 2**30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_CPU = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A root folder with 16 GiB of memory, 12 of them free; 64 CPUs that this process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    def make(files: Mapping[str, str] = {}, *, group: str = "", mounts: str = "") -> Path:
        meminfo = f"MemTotal:  {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:  {12 * 2**20} kB\n"
        whole = {"proc/meminfo": meminfo, "proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}
        for name, text in whole.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


def seen(root: Path) -> tuple[int, float | None, int, int]:
    """Cores, quota, memory and free memory (GiB)."""
    free, memory = hardware.free_memory(root=root), hardware.memory(root=root)
    return hardware.cores(root=root), hardware.quota(root=root), memory // GIB, free // GIB


def test_without_control_groups_the_machine_is_the_limit(tree: Tree) -> None:
    assert seen(tree()) == (64, None, 16, 12)
    assert seen(tree(group="0::/app", mounts=V2)) == (64, None, 16, 12)


def test_version_2_of_a_group_of_its_own(tree: Tree) -> None:
    files = {
        "sys/fs/cgroup/app/cpu.max": "200000 100000",
        "sys/fs/cgroup/app/memory.max": str(4 * GIB),
        "sys/fs/cgroup/app/memory.current": str(3 * GIB),
        "sys/fs/cgroup/app/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
    }
    assert seen(tree(files, group="0::/app", mounts=V2)) == (2, 2.0, 4, 2)


def test_version_1_of_a_group_of_its_own(tree: Tree) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/pod/app/cpu.cfs_quota_us": "350000",
        "sys/fs/cgroup/cpu,cpuacct/pod/app/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/app/memory.limit_in_bytes": str(4 * GIB),
        "sys/fs/cgroup/memory/app/memory.usage_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/app/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
    }
    group = "4:memory:/app\n3:cpu,cpuacct:/pod/app\n1:name=systemd:/else\n0::/"
    assert seen(tree(files, group=group, mounts=f"{V1_CPU}\n{V1_MEMORY}\n{V2}")) == (3, 3.5, 4, 3)


def test_no_limit_is_written_in_three_ways(tree: Tree) -> None:
    files = {
        "sys/fs/cgroup/app/cpu.max": "max 100000",
        "sys/fs/cgroup/app/memory.max": "max",
        "sys/fs/cgroup/app/memory.current": "5",
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/app/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/app/memory.usage_in_bytes": "5",
    }
    group = "0::/app\n3:cpu,cpuacct:/app\n4:memory:/app"
    assert seen(tree(files, group=group, mounts=f"{V1_CPU}\n{V1_MEMORY}\n{V2}")) == (64, None, 16, 12)


def test_the_smallest_limit_on_the_way_up_counts(tree: Tree) -> None:
    files = {
        "sys/fs/cgroup/slice/pod/app/cpu.max": "800000 100000",
        "sys/fs/cgroup/slice/pod/cpu.max": "150000 100000",
        "sys/fs/cgroup/slice/cpu.max": "max 100000",
        "sys/fs/cgroup/slice/pod/app/memory.max": str(8 * GIB),
        "sys/fs/cgroup/slice/pod/app/memory.current": str(2 * GIB),
        "sys/fs/cgroup/slice/memory.max": str(10 * GIB),
        "sys/fs/cgroup/slice/memory.current": str(9 * GIB),
    }
    assert seen(tree(files, group="0::/slice/pod/app", mounts=V2)) == (1, 1.5, 8, 1)


def test_a_mount_may_begin_below_the_root_of_the_hierarchy(tree: Tree) -> None:
    """A container without a namespace of its own sees its group's path from the host, but only its own part mounted."""
    files = {"sys/fs/cgroup/cpu.max": "300000 100000"}
    below = V2.replace(" / ", " /docker/4f2a ", 1)
    assert hardware.quota(root=tree(files, group="0::/docker/4f2a", mounts=below)) == 3
    hardware._groups.cache_clear()
    assert hardware.quota(root=tree(files, group="0::/../elsewhere", mounts=V2)) == 3


def test_half_a_core_is_one_thread_and_spaces_in_mounts_are_read(tree: Tree) -> None:
    files = {"sys/my groups/app/cpu.max": "50000 100000"}
    root = tree(files, group="0::/app", mounts=V2.replace("/sys/fs/cgroup", "/sys/my\\040groups"))
    assert (hardware.cores(root=root), hardware.quota(root=root)) == (1, 0.5)


def test_what_cannot_be_read_sets_no_limit(tree: Tree) -> None:
    files = {"sys/fs/cgroup/app/cpu.max": "what", "sys/fs/cgroup/app/memory.max/is a folder": ""}
    assert seen(tree(files, group="broken\n0::/app", mounts=f"short\n{V2}")) == (64, None, 16, 12)


def test_without_proc_the_kernel_is_asked_for_the_memory(tmp_path: Path) -> None:
    assert hardware.memory(root=tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert hardware.quota(root=tmp_path) is None


def test_a_quota_is_not_pinned_to_the_first_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    monkeypatch.setattr(hardware, "quota", lambda **_: None)
    assert (hardware.cpus(2), hardware.cpus(0)) == ([4, 5], [4, 5, 6, 7])
    monkeypatch.setattr(hardware, "quota", lambda **_: 2.0)
    assert hardware.cpus(2) == []


def test_models_and_metrics_keep_to_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "quota", lambda **_: 1.0)
    try:
        prepare(device="cpu", threads=0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(hardware, "memory", lambda: 3 * GIB)
    monkeypatch.setattr(hardware, "free_memory", lambda: GIB)
    gauges = {gauge.name: gauge.value for gauge in metrics.gauges()}
    assert (gauges["nv_cpu_memory_total_bytes"], gauges["nv_cpu_memory_used_bytes"]) == (3 * GIB, 2 * GIB)


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert hardware.version("numpy")[0].isdigit()
    assert hardware.version("no-such-package") == ""
