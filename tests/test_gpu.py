"""The script for a rented GPU, tried on this machine's CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_processes import ROOT


@pytest.mark.slow
def test_the_script_for_a_gpu_measures_each_case_once(tmp_path):
    """Its flags are also those of other programs: it runs in a process of its own."""
    file = tmp_path / "gpu.json"

    def run(minutes):
        command = [sys.executable, "-m", "experiments.gpu", "--tiny", f"--output={file}", f"--minutes={minutes}"]
        one_device = {**os.environ, "XLA_FLAGS": ""}
        done = subprocess.run(command, cwd=ROOT, env=one_device, capture_output=True, text=True, check=True)
        return json.loads(file.read_text())["cases"], done.stdout

    ours, theirs, other = run(10)[0]
    assert (ours["dtype"], other["dtype"]) == ("bfloat16", "float32")
    for case in (ours, other):
        assert min(case["compile_seconds"], case["images_per_second"], case["memory_bytes"]) > 0
        assert case["flops_per_image"] == pytest.approx(sum(case["flops_per_image_of"].values()))
        assert case["share_of_peak"] is None  # Of a processor none is published.
    # Without PyTorch a case of it says so.
    assert theirs["framework"] == "torch"
    assert theirs.get("failed", "cannot be imported").endswith("cannot be imported")
    # Nothing is measured again, and what is said stands in the table.
    again, printed = run(0)
    assert [again[0], again[2]] == [ours, other]
    assert printed.count(f"| {ours['images_per_second']:.1f} |") == 2
